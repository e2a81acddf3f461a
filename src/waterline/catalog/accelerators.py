"""`gpus.toml`, decoded: human units become bytes, bytes per second and FLOPs here and nowhere else."""

from datetime import date
from functools import cache
from importlib import resources

import msgspec

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


@cache
def table() -> dict[str, Gpu]:
    """Return every accelerator of the catalogue by id."""
    return {id_: _gpu(id_, entry) for id_, entry in _entries().items()}


@cache
def names() -> dict[str, tuple[str, ...]]:
    """Return for every id the names its card goes by, the id last; the marketing size counts (``4090 24GB``)."""
    return {
        id_: (*_spelled(entry, entry.name), *_spelled(entry, *entry.aliases), *_spelled(entry, id_))
        for id_, entry in _entries().items()
    }


def _spelled(entry: _Entry, *names: str) -> tuple[str, ...]:
    vendor = tuple(f"{entry.vendor} {name}" for name in names)
    return (*vendor, *(f"{name} {entry.nominal_gb:.0f} GB" for name in names if entry.nominal_gb), *names)


@cache
def _entries() -> dict[str, _Entry]:
    text = resources.files("waterline.catalog").joinpath("gpus.toml").read_bytes()
    entries: dict[str, _Entry] = msgspec.toml.decode(text, type=dict[str, dict[str, _Entry]])["gpu"]
    return entries


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
