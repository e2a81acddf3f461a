"""`gpus.toml`, decoded: human units become bytes, bytes per second and FLOPs here and nowhere else.

A figure in another unit than its key says would make every estimate wrong by a thousand, so each has limits that no
card is near and that a wrong unit leaves.
"""

from collections.abc import Mapping
from datetime import date
from functools import cache
from importlib import resources

import msgspec

from waterline.errors import InputError
from waterline.hardware import Gpu, Link
from waterline.units import GIGA, MIB, TERA


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the file; its header says what the keys mean."""

    name: str
    vendor: str
    architecture: str
    stack: str
    support: str
    memory_mib: int
    memory_gb_per_s: float
    dense_tflops: dict[str, float]
    link: str
    topology: str
    link_gb_per_s: float
    pair_gb_per_s: float
    gpus_per_node: int
    source: str
    read: date
    aliases: tuple[str, ...] = ()
    chip: str = ""
    target: str = ""
    nominal_gb: float = 0
    tdp_watts: float | None = None
    pcie: str = ""
    pcie_gb_per_s: float | None = None
    release_year: int | None = None
    msrp_usd: float | None = None
    tpp: float | None = None
    die_mm2: float | None = None
    doubtful: tuple[str, ...] = ()
    notes: str = ""


LIMITS = {  # key -> least, most, unit
    "memory_mib": (1024, 2**22, "mebibytes"),
    "memory_gb_per_s": (10, 100_000, "gigabytes a second"),
    "link_gb_per_s": (4, 20_000, "gigabytes a second, each way"),
    "pair_gb_per_s": (4, 20_000, "gigabytes a second, each way"),
    "pcie_gb_per_s": (2, 1000, "gigabytes a second, each way"),
    "tdp_watts": (5, 10_000, "watts"),
    "gpus_per_node": (1, 1024, "cards"),
}
NONE = {"link_gb_per_s", "pair_gb_per_s"}  # may be 0: there is no link
FLOPS_PER_BYTE = (1, 6000)  # of memory traffic, that any precision reaches: cards lie between 9 and 1,900


@cache
def table() -> dict[str, Gpu]:
    """Return every accelerator of the catalogue by id."""
    return {id_: _gpu(id_, entry) for id_, entry in entries().items()}


@cache
def names() -> dict[str, tuple[str, ...]]:
    """Return for every id the names its card goes by, the id last; the marketing size counts (``4090 24GB``)."""
    return {
        id_: (*_spelled(entry, entry.name), *_spelled(entry, *entry.aliases), *_spelled(entry, id_))
        for id_, entry in entries().items()
    }


def _spelled(entry: _Entry, *names: str) -> tuple[str, ...]:
    vendor = tuple(f"{entry.vendor} {name}" for name in names)
    return (*vendor, *(f"{name} {entry.nominal_gb:.0f} GB" for name in names if entry.nominal_gb), *names)


@cache
def entries() -> dict[str, _Entry]:
    """Return the tables of the file by id, checked."""
    text = resources.files("waterline.catalog").joinpath("gpus.toml").read_bytes()
    found: dict[str, _Entry] = msgspec.toml.decode(text, type=dict[str, dict[str, _Entry]])["gpu"]
    for id_, entry in found.items():
        _check(id_, entry)
    return found


def decoded(tables: Mapping[str, Mapping[str, object]]) -> dict[str, _Entry]:
    """Return tables like those of the file, checked. Raises InputError for a figure that is in another unit."""
    found = msgspec.convert(tables, type=dict[str, _Entry])
    for id_, entry in found.items():
        _check(id_, entry)
    return found


def _check(id_: str, entry: _Entry) -> None:
    for key, (least, most, unit) in LIMITS.items():
        value = getattr(entry, key)
        if value is None or (key in NONE and value == 0) or least <= value <= most:
            continue
        shown = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        raise InputError(f"gpus.toml: [gpu.{id_}] {key} = {shown}, which should be from {least:,} to {most:,}: {unit}.")
    least, most = FLOPS_PER_BYTE
    for precision, rate in entry.dense_tflops.items():
        if not least <= rate * TERA / (entry.memory_gb_per_s * GIGA) <= most:
            raise InputError(
                f"gpus.toml: [gpu.{id_}] dense_tflops.{precision} = {rate:g}, which is not from {least} to {most:,} "
                f"operations for each byte of memory_gb_per_s = {entry.memory_gb_per_s:g}: teraflops, without sparsity."
            )


def _gpu(id_: str, entry: _Entry) -> Gpu:
    return Gpu(
        id=id_,
        name=entry.name,
        vendor=entry.vendor,
        architecture=entry.architecture,
        stack=entry.stack,
        support=entry.support,
        memory_bytes=entry.memory_mib * MIB,
        memory_bytes_per_s=entry.memory_gb_per_s * GIGA,
        flops_per_s={precision: rate * TERA for precision, rate in entry.dense_tflops.items()},
        tdp_watts=entry.tdp_watts,
        link=Link(
            kind=entry.link,
            topology=entry.topology,
            bytes_per_s=entry.link_gb_per_s * GIGA,
            pair_bytes_per_s=entry.pair_gb_per_s * GIGA,
        ),
        pcie_bytes_per_s=None if entry.pcie_gb_per_s is None else entry.pcie_gb_per_s * GIGA,
        gpus_per_node=entry.gpus_per_node,
        release_year=entry.release_year,
        source=entry.source,
        read=entry.read.isoformat(),
        doubtful=entry.doubtful,
        notes=entry.notes,
        aliases=entry.aliases,
        chip=entry.chip,
        target=entry.target,
        pcie=entry.pcie,
        msrp_usd=entry.msrp_usd,
        tpp=entry.tpp,
        die_mm2=entry.die_mm2,
    )
