"""`measured/kernels.npz`, decoded: how measured kernels differ from physics, one card after another, on first use.

The file holds an array of bytes for each card and a header in JSON; `measured/README.md` says where the figures come
from. What the grids are is known to `waterline.cost.kernels_curves`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import prod
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

FILE = "kernels.npz"


@dataclass(frozen=True, slots=True)
class Measured:
    """The fit of one kind of kernel on one card."""

    correction: NDArray[np.float64]  # natural logarithm of measured over usual time, [knot of each size]
    measured: Mapping[str, tuple[float, float]]  # smallest and largest size there are points for


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    knots: tuple[int, ...]
    step: float  # what one unit of the bytes stands for
    measured: dict[str, tuple[float, float]]


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    source: str
    licence: str
    version: str
    read: str
    gpus: dict[str, dict[str, _Table]]


@cache
def measured_gpus() -> tuple[str, ...]:
    """Return the cards kernels were measured on, by id."""
    return tuple(_header(None).gpus)


@cache
def measured_kernels(gpu: str) -> Mapping[str, Measured]:
    """Return by name what is known of one card's kernels; nothing for a card that was not measured."""
    return read_kernels(None, gpu)


def read_kernels(file: Path | None, gpu: str) -> Mapping[str, Measured]:
    """Return the kernels of one card of a fit file, the one that ships if there is none given."""
    tables = _header(file).gpus.get(gpu)
    if tables is None:
        return {}
    with _open(file) as arrays:
        codes = arrays[gpu]
    found, begin = {}, 0
    for name, table in tables.items():
        end = begin + prod(table.knots)
        values = codes[begin:end].reshape(table.knots)
        for axis in range(values.ndim):
            values = np.cumsum(values, axis=axis, dtype=np.uint8)
        found[name] = Measured(values.view(np.int8).astype(np.float64) * table.step, table.measured)
        begin = end
    return found


def write_kernels(
    file: Path, provenance: Mapping[str, str], gpus: Mapping[str, Mapping[str, Measured]], least_step: float = 0.01
) -> None:
    """Write a fit file; corrections are rounded to a 127th of the largest of their table, or to `least_step`.

    Neighbours differ little, so differences along every size are kept; they wrap around like the bytes they are.
    """
    header: dict[str, object] = {**provenance, "gpus": {}}
    arrays: dict[str, NDArray[np.uint8]] = {}
    tables: dict[str, dict[str, object]] = {}
    for gpu, kernels in gpus.items():
        codes = []
        tables[gpu] = {}
        for name, fit in kernels.items():
            step = max(least_step, float(np.abs(fit.correction).max()) / 127)
            rounded = np.rint(fit.correction / step).astype(np.int8).view(np.uint8)
            tables[gpu][name] = {"knots": rounded.shape, "step": step, "measured": fit.measured}
            for axis in range(rounded.ndim):
                rounded = np.diff(rounded, axis=axis, prepend=np.uint8(0))
            codes.append(rounded.ravel())
        arrays[gpu] = np.concatenate([np.zeros(0, np.uint8), *codes])
    header["gpus"] = tables
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type] # numpy's stub takes the names for its own options


def _open(file: Path | None) -> "np.lib.npyio.NpzFile[np.uint8]":
    shipped = Path(str(resources.files("waterline.catalog").joinpath("measured", FILE)))
    arrays: np.lib.npyio.NpzFile[np.uint8] = np.load(file or shipped, allow_pickle=False)
    return arrays


@cache
def _header(file: Path | None) -> _Header:
    with _open(file) as arrays:
        return msgspec.json.decode(arrays["header"].tobytes(), type=_Header)
