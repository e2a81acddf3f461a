"""Histograms of durations, in so little memory that a hundred million requests are no matter.

A bin is the exponent of a number and the first seven binary digits after its point, as they stand in its 64 bits: 128
bins to every power of two. So a value is known to one part in 256, and which bin it is in takes no arithmetic that
could differ from one machine to another.
"""

from collections.abc import Sequence
from struct import pack, unpack
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGITS = 7
BINS_PER_OCTAVE = 1 << DIGITS
RELATIVE_ERROR = 1 / (2 * BINS_PER_OCTAVE)  # of a value that is read back
SHIFT = 52 - DIGITS  # a double has 52 binary digits after its point
LEAST, MOST = 2.0**-30, 2.0**30  # seconds: what is shorter counts as nothing, what is longer as the longest

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]


class Histograms:
    """One histogram in each row; rows come as they are met."""

    def __init__(self) -> None:
        self.first = _bin(1.0)  # of the bins that are kept; more come on both sides as values are met
        self.counts = np.zeros((0, BINS_PER_OCTAVE), np.int32)  # [row, bin] of two thousand million at most
        self.nothing = np.zeros(0, np.int64)  # [row] values shorter than LEAST
        self.sums = np.zeros(0)  # [row] of the values

    def make_rows(self, rows: int) -> None:
        """Let there be at least so many rows."""
        more = rows - len(self.sums)
        if more > 0:
            more = max(more, len(self.sums))
            self.counts = np.pad(self.counts, ((0, more), (0, 0)))
            self.nothing, self.sums = np.pad(self.nothing, (0, more)), np.pad(self.sums, (0, more))

    def add(self, row: Integers, value: Reals) -> None:
        """Count values, each in its row."""
        if not len(value):
            return
        self.sums += np.bincount(row, value, len(self.sums))
        if value.min() < LEAST:
            short = value < LEAST
            self.nothing += np.bincount(row[short], minlength=len(self.nothing))
            row, value = row[~short], value[~short]
            if not len(value):
                return
        bins = np.minimum(value, MOST).view(np.int64) >> SHIFT
        self._make_bins(int(bins.min()), int(bins.max()))
        one = np.int32(1)  # of the type of the counts: any other is sixty times slower
        np.add.at(self.counts.reshape(-1), row * self.counts.shape[1] + (bins - self.first), one)

    def percentiles(self, rows: Sequence[int], percents: Sequence[int]) -> tuple[int, float, list[float]]:
        """Return how many values some rows hold together, their mean, and nearest-rank percentiles.

        The p-th is the value at rank ⌈p n / 100⌉ of n, counted from 1: in integers, because 0.9 is not nine tenths.
        It is exact to `RELATIVE_ERROR`. Without values, the others are 0.
        """
        below = self._below(rows)
        count = int(below[-1])
        ranks = [-(-percent * count // 100) for percent in percents]
        values = [self._value(index) for index in np.searchsorted(below, ranks).tolist()]
        return count, float(self.sums[rows].sum()) / max(1, count), values

    def shares(self, rows: Sequence[int]) -> list[tuple[float, float]]:
        """Return the values that occurred, rising, each with the share of all that does not exceed it."""
        below = self._below(rows)
        if not below[-1]:
            return []
        met = np.flatnonzero(np.diff(below, prepend=0))
        return [(self._value(index), float(below[index] / below[-1])) for index in met.tolist()]

    def _below(self, rows: Sequence[int]) -> Integers:
        """Return how many values of some rows lie in the bins up to each; the first is for what counts as nothing."""
        one = len(rows) == 1  # as it is, of most
        counts = self.counts[rows[0]] if one else self.counts[rows].sum(axis=0, dtype=np.int64)
        below = np.empty(len(counts) + 1, np.int64)
        below[0] = self.nothing[rows].sum()
        np.cumsum(counts, out=below[1:])
        below[1:] += below[0]
        return below

    def _value(self, index: int) -> float:
        """Return the middle of a bin."""
        if index == 0:
            return 0.0
        low, high = unpack("dd", pack("qq", self.first + index - 1 << SHIFT, self.first + index << SHIFT))
        return float((low + high) / 2)

    def _make_bins(self, least: int, most: int) -> None:
        """Make room for bins from one to another, by whole powers of two."""
        before = max(0, -(-(self.first - least) // BINS_PER_OCTAVE))
        after = max(0, -(-(most + 1 - self.first - self.counts.shape[1]) // BINS_PER_OCTAVE))
        if before or after:
            self.counts = np.pad(self.counts, ((0, 0), (before * BINS_PER_OCTAVE, after * BINS_PER_OCTAVE)))
            self.first -= before * BINS_PER_OCTAVE


def _bin(value: float) -> int:
    bits: Any = np.array([value]).view(np.int64)
    return int(bits[0]) >> SHIFT
