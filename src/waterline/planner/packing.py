"""Which GPUs of which node, hour by hour: replicas onto the nodes of a pool.

A replica keeps its GPUs through all its hours, and at other hours others may have them. Larger groups are placed
before smaller ones, each at a multiple of its size, so that at every single hour there is a place (`Problem.slots` has
the proof). Where no place is free at all hours of a replica, it is cut in two that run one after the other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from waterline.plan import Place

Hours = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One replica of an option, or a part of its day."""

    option: int
    hours: Hours
    places: tuple[Place, ...]


def stacked(counts: Sequence[int]) -> list[tuple[Hours, int]]:
    """Return hours and how many replicas serve at them, so that `counts` [hour] serve at each hour.

    The first replica serves whenever any does, the next whenever two do: nobody starts while another stops.
    """
    levels = sorted(set(counts) - {0})
    steps = zip([0, *levels], levels, strict=False)
    return [
        (tuple(hour for hour, count in enumerate(counts) if count >= above), above - below) for below, above in steps
    ]


class PoolGpus:
    """The GPUs of one pool at every hour. The one place where planning keeps state."""

    def __init__(self, nodes: int, gpus_per_node: int) -> None:
        self.taken = np.zeros((nodes, gpus_per_node), dtype=np.uint32)  # a bit for each hour

    def place(self, option: int, groups: Sequence[int], hours: Hours, count: int) -> list[Placed]:
        """Place replicas of equal groups that serve at the same hours; there must be room at each of them."""
        whole = self._slots(groups[0], hours)[: count * len(groups)]
        whole = whole[: len(whole) // len(groups) * len(groups)]
        placed = [
            Placed(option=option, hours=hours, places=places)
            for places in self._take(whole.reshape(-1, len(groups), 2), groups[0], hours)
        ]
        for _ in range(count - len(placed)):
            placed += self._place_in_parts(option, groups, hours)
        return placed

    def _slots(self, size: int, hours: Hours) -> NDArray[np.int64]:
        """Return [slot, (node, first GPU)] of the slots free at all these hours, the best first.

        A slot that others use at other hours is better than one that nobody uses, and one on a fuller node better than
        one on an emptier: whole nodes stay free for those who need them.
        """
        by_slot = self._by_slot(size)
        node, slot = np.nonzero(by_slot & _bits(hours) == 0)
        used = _hours_in(by_slot[node, slot])
        fullness = _hours_in(self.taken & _bits(hours)).sum(axis=1)[node]
        order = np.lexsort((slot, node, -used, -fullness))
        return np.stack([node, slot * size], axis=1)[order]

    def _by_slot(self, size: int) -> NDArray[np.uint32]:
        """[node, slot] hours at which any GPU of a slot is taken."""
        nodes, gpus = self.taken.shape
        slots = gpus // size
        blocks = self.taken[:, : slots * size].reshape(nodes, slots, size)
        taken: NDArray[np.uint32] = np.bitwise_or.reduce(blocks, axis=2)
        return taken

    def _take(self, slots: NDArray[np.int64], size: int, hours: Hours) -> list[tuple[Place, ...]]:
        """Take [replica, part, (node, first GPU)] slots."""
        node, first = slots[..., 0], slots[..., 1]
        self.taken[node[..., None], first[..., None] + np.arange(size)] |= _bits(hours)
        gpus = {at: tuple(range(at, at + size)) for at in np.unique(first).tolist()}
        return [tuple(Place(node=node, gpus=gpus[at]) for node, at in parts) for parts in slots.tolist()]

    def _place_in_parts(self, option: int, groups: Sequence[int], hours: Hours) -> list[Placed]:
        """Place one replica wherever there is room for some of its hours, as many of them as can be each time."""
        placed, left, size = [], hours, groups[0]
        while left:
            free = ~self._by_slot(size) & _bits(left)  # [node, slot] hours
            room = [int(np.count_nonzero(free & _bits([hour]))) for hour in left]
            here = left[int(np.argmax(room))]  # the hour with most room: others are likelier to share it
            node, slot = np.nonzero(free & _bits([here]))
            best = np.argsort(-_hours_in(free[node, slot]), kind="stable")[: len(groups)]
            slots = np.stack([node, slot * size], axis=1)[best]
            common = int(np.bitwise_and.reduce(free[node[best], slot[best]]))
            part = tuple(hour for hour in left if common >> hour & 1)
            placed.append(Placed(option=option, hours=part, places=self._take(slots[None], size, part)[0]))
            left = tuple(hour for hour in left if hour not in part)
        return placed


def _bits(hours: Iterable[int]) -> np.uint32:
    return np.uint32(sum(1 << hour for hour in hours))


def _hours_in(bits: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return how many bits are set: in pairs, in fours, in bytes, and the bytes added up by a product."""
    pairs = bits - (bits >> 1 & 0x55555555)
    fours = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    added: NDArray[np.uint32] = eights * np.uint32(0x01010101) >> 24
    return added.astype(np.int64)


def pack(
    pools: Sequence[tuple[int, int]], options: Sequence[tuple[int, Sequence[int]]], replicas: NDArray[np.int64]
) -> list[Placed]:
    """Place all replicas, in the order of the options.

    Args:
        pools: nodes, and GPUs of a node.
        options: the pool of each, and the GPUs of each of its groups, which are equal.
        replicas: [option, hour], of at most 32 hours.
    """
    gpus = [PoolGpus(nodes, per_node) for nodes, per_node in pools]
    stacks = [
        (index, hours, count) for index in range(len(options)) for hours, count in stacked(replicas[index].tolist())
    ]
    placed: list[Placed] = []
    for index, hours, count in sorted(stacks, key=lambda one: (-options[one[0]][1][0], -len(one[1]), one[0])):
        pool, groups = options[index]
        placed += gpus[pool].place(index, groups, hours, count)
    return sorted(placed, key=lambda one: one.option)
