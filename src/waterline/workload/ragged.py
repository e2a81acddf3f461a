"""Lists of whole numbers, one for each of some requests: all values in a row, and where each list ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

Longs = NDArray[np.int64]
GOLDEN, FIRST, SECOND = (np.uint64(one) for one in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True, slots=True)
class Ragged:
    """Many lists; it can be indexed like an array of them."""

    values: Longs
    ends: Longs  # [list] of each in the values; it begins where the one before ends

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def begins(self) -> Longs:
        return self.ends - self.counts

    @property
    def counts(self) -> Longs:
        """Return how long each list is."""
        return np.diff(self.ends, prepend=0)

    def __getitem__(self, which: "slice | NDArray[np.bool_] | NDArray[np.intp]") -> "Ragged":
        if not len(self.values):
            return Ragged(self.values, self.ends[which])
        counts, begins = self.counts[which], self.begins[which]
        ends = np.cumsum(counts)
        if isinstance(which, slice) and which.step in {None, 1}:
            begin = int(begins[0]) if len(begins) else 0
            return Ragged(self.values[begin : begin + int(counts.sum())], ends)
        places = np.arange(int(counts.sum())) + np.repeat(begins - ends + counts, counts)
        return Ragged(self.values[places], ends)

    def first(self, most: NDArray[np.integer]) -> "Ragged":
        """Return the lists with so many values of each, its first, at most."""
        counts = np.minimum(self.counts, most)
        if (counts == self.counts).all():
            return self
        ends = np.cumsum(counts)
        places = np.arange(int(counts.sum())) + np.repeat(self.begins - ends + counts, counts)
        return Ragged(self.values[places], ends)

    def apart(self, number: NDArray[np.integer], of: str) -> "Ragged":
        """Return the values as keys: for each number a list has, those of a population of their own; 0: as they are.

        `of` tells these numbers from others that mean something else. By the finish of SplitMix64 (Steele, Lea and
        Flood, 2014), which maps no two values of a population to one.
        """
        if not len(self.values) or not number.any():
            return self
        salt = np.uint64(int.from_bytes(blake2b(of.encode(), digest_size=8).digest()))
        with np.errstate(over="ignore"):
            mixed = self.values.view(np.uint64) + np.repeat(number.astype(np.uint64) * GOLDEN ^ salt, self.counts)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * FIRST
            mixed = (mixed ^ (mixed >> np.uint64(27))) * SECOND
            mixed ^= mixed >> np.uint64(31)
        return Ragged(np.where(np.repeat(number == 0, self.counts), self.values, mixed.view(np.int64)), self.ends)


def empty(count: int) -> Ragged:
    """Return so many empty lists."""
    return Ragged(np.zeros(0, np.int64), np.zeros(count, np.int64))


def ragged(lists: Sequence[Sequence[int]]) -> Ragged:
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    values = np.fromiter((value for one in lists for value in one), np.int64, int(counts.sum()))
    return Ragged(values, np.cumsum(counts))


def joined(parts: Sequence[Any]) -> Any:
    """Return columns as one, arrays of numbers or of lists, in their order; there must be one."""
    if not isinstance(parts[0], Ragged):
        return np.concatenate(parts)
    before = np.cumsum([0, *(len(part.values) for part in parts[:-1])])
    return Ragged(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.ends + begin for part, begin in zip(parts, before.tolist(), strict=True)]),
    )
