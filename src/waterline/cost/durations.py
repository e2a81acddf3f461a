"""Picoseconds by count, known at a few counts and joined by straight lines: a table that is looked up, not written out.

The table of a step has thousands of entries and a search asks for a few dozen of them, so entries are computed when
they are first asked for. One entry and all of them at once come from the same operations on the same floats: they are
the same integers, on every machine.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from waterline.units import PICOSECONDS_PER_S

Numbers = NDArray[np.float64]
ROUNDING = 1000.0  # parts of a picosecond that count: 8000.0000000001 is 8000


class Durations(Sequence[int]):
    """Picoseconds, rounded up, for counts from 0 to the last of `counts`; below the first, what the first takes."""

    __slots__ = ("_counts", "_known", "_last", "_slopes", "_took_s")

    def __init__(self, counts: Numbers, took_s: Numbers, *, free: bool = True) -> None:
        """Take rising counts from 1 and seconds at each; `free`: a count of 0 takes no time."""
        self._last = int(counts[-1])
        self._counts: list[float] = [0.0, *counts.tolist()]
        self._took_s: list[float] = [0.0 if free else float(took_s[0]), *took_s.tolist()]
        self._slopes: list[float] = [0.0, *((took_s[1:] - took_s[:-1]) / (counts[1:] - counts[:-1])).tolist(), 0.0]
        self._known: dict[int, int] = {}

    def __len__(self) -> int:
        return self._last + 1

    @overload
    def __getitem__(self, count: int) -> int: ...
    @overload
    def __getitem__(self, count: slice) -> tuple[int, ...]: ...
    def __getitem__(self, count: int | slice) -> int | tuple[int, ...]:
        """Return the entry of a count, of the last but so many for a negative one."""
        try:
            return self._known[count]  # type: ignore[index] # a slice is not there
        except (KeyError, TypeError):
            return tuple(self.whole()[count].tolist()) if isinstance(count, slice) else self._computed(count)

    def _computed(self, count: int) -> int:
        if not 0 <= count <= self._last:
            if not -self._last - 1 <= count < 0:
                raise IndexError(f"{count} is not among {len(self)} counts")
            count += self._last + 1
        knot = bisect_right(self._counts, count) - 1
        took_s = self._slopes[knot] * (count - self._counts[knot]) + self._took_s[knot]
        self._known[count] = found = math.ceil(round(took_s * PICOSECONDS_PER_S * ROUNDING) / ROUNDING)
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self.whole().tolist())

    def whole(self) -> NDArray[np.int64]:
        """Return all entries."""
        places = np.arange(len(self), dtype=np.float64)
        counts = np.array(self._counts)
        knots = counts.searchsorted(places, side="right") - 1
        return picoseconds(np.array(self._slopes)[knots] * (places - counts[knots]) + np.array(self._took_s)[knots])

    def __array__(self, dtype: object = None, copy: object = None) -> NDArray[np.int64]:
        """Return `whole`, which NumPy asks for."""
        del copy  # it always is one
        return self.whole().astype(dtype or np.int64)  # type: ignore[call-overload, no-any-return] # NumPy's own type

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash((len(self), self[-1]))

    def __repr__(self) -> str:
        return f"Durations of {len(self)}, the last {self[-1]} ps"


def picoseconds(duration_s: Numbers | float) -> NDArray[np.int64]:
    """Round up, but not for the last bits of a float."""
    took_ps = np.asarray(duration_s) * PICOSECONDS_PER_S
    return np.ceil(np.rint(took_ps * ROUNDING) / ROUNDING).astype(np.int64)
