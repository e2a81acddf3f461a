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

    def __init__(self, nodes: int, gpus_per_node: int, hours: int) -> None:
        self.taken = np.zeros((nodes, gpus_per_node, hours), dtype=bool)

    def place(self, option: int, groups: Sequence[int], hours: Hours, count: int) -> list[Placed]:
        """Place replicas of equal groups that serve at the same hours; there must be room at each of them."""
        whole = self._slots(groups[0], hours)[: count * len(groups)]
        whole = whole[: len(whole) // len(groups) * len(groups)]
        placed = [
            Placed(option=option, hours=hours, places=self._take(slots, groups[0], hours))
            for slots in whole.reshape(-1, len(groups), 2)
        ]
        for _ in range(count - len(placed)):
            placed += self._place_in_parts(option, groups, hours)
        return placed

    def _slots(self, size: int, hours: Iterable[int]) -> NDArray[np.int64]:
        """Return [slot, (node, first GPU)] of the slots free at all these hours, the best first.

        A slot that others use at other hours is better than one that nobody uses, and one on a fuller node better than
        one on an emptier: whole nodes stay free for those who need them.
        """
        at = list(hours)
        by_slot = self._by_slot(size)
        node, slot = np.nonzero(~by_slot[:, :, at].any(axis=2))
        used = by_slot[node, slot].sum(axis=1)
        fullness = self.taken[:, :, at].sum(axis=(1, 2))[node]
        order = np.lexsort((slot, node, -used, -fullness))
        return np.stack([node, slot * size], axis=1)[order]

    def _by_slot(self, size: int) -> NDArray[np.bool_]:
        """[node, slot, hour] whether any GPU of a slot is taken."""
        nodes, gpus, hours = self.taken.shape
        slots = gpus // size
        blocks = self.taken[:, : slots * size].reshape(nodes, slots, size, hours)
        taken: NDArray[np.bool_] = np.logical_or.reduce(blocks, axis=2)
        return taken

    def _take(self, slots: NDArray[np.int64], size: int, hours: Hours) -> tuple[Place, ...]:
        for node, first in slots:
            self.taken[node, first : first + size, list(hours)] = True
        return tuple(Place(node=int(node), gpus=tuple(range(int(first), int(first) + size))) for node, first in slots)

    def _place_in_parts(self, option: int, groups: Sequence[int], hours: Hours) -> list[Placed]:
        """Place one replica wherever there is room for some of its hours, as many of them as can be each time."""
        placed, left = [], list(hours)
        while left:
            size = groups[0]
            free = np.logical_not(self._by_slot(size)[:, :, left])  # [node, slot, hour]
            here = int(np.argmax(free.sum(axis=(0, 1))))  # the hour with most room: others are likelier to share it
            node, slot = np.nonzero(free[:, :, here])
            best = np.argsort(-free[node, slot].sum(axis=1), kind="stable")[: len(groups)]
            slots = np.stack([node, slot * size], axis=1)[best]
            fits = free[node[best], slot[best]].sum(axis=0) == len(groups)  # [hour that is left]
            part = tuple(left[index] for index in np.flatnonzero(fits).tolist())
            placed.append(Placed(option=option, hours=part, places=self._take(slots, size, part)))
            left = [hour for hour in left if hour not in part]
        return placed


def pack(
    pools: Sequence[tuple[int, int]], options: Sequence[tuple[int, Sequence[int]]], replicas: NDArray[np.int64]
) -> list[Placed]:
    """Place all replicas, in the order of the options.

    Args:
        pools: nodes, and GPUs of a node.
        options: the pool of each, and the GPUs of each of its groups, which are equal.
        replicas: [option, hour].
    """
    gpus = [PoolGpus(nodes, per_node, replicas.shape[1]) for nodes, per_node in pools]
    stacks = [
        (index, hours, count) for index in range(len(options)) for hours, count in stacked(replicas[index].tolist())
    ]
    placed: list[Placed] = []
    for index, hours, count in sorted(stacks, key=lambda one: (-options[one[0]][1][0], -len(one[1]), one[0])):
        pool, groups = options[index]
        placed += gpus[pool].place(index, groups, hours, count)
    return sorted(placed, key=lambda one: one.option)
