"""Nodes that fail, and come back: as a person says it, or drawn at a mean time between failures."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from waterline.errors import InputError, UnknownNameError
from waterline.fleet import Fleet
from waterline.units import DAY_S, HOUR_S
from waterline.workload.grammar import duration_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A node that is down for a while, at a time of the day."""

    pool: str
    node: int
    begin_s: float  # since midnight; of the next days too, where it is larger than a day
    length_s: float

    def __str__(self) -> str:
        minutes = int(self.begin_s // 60)
        return f"{self.pool}:{self.node}@{minutes // 60:02}:{minutes % 60:02}+{self.length_s / HOUR_S:g}h"


def parse_failure(text: str) -> Failure:
    """Read ``h800:3@20:30+2h``: node 3 of pool h800 is down from half past eight for two hours. Raises InputError."""
    found = re.fullmatch(r"(.+):(\d+)@(\d{1,2}):(\d\d)\+(\S+)", text.strip())
    length_s = duration_s(found[5]) if found else None
    if not found or not length_s or length_s <= 0 or int(found[3]) > 23 or int(found[4]) > 59:
        raise InputError(
            f"the failure '{text}' is none. Write a pool and a node, a time of the day and how long: h800:3@20:30+2h"
        )
    begin_s = int(found[3]) * HOUR_S + int(found[4]) * 60.0
    return Failure(pool=found[1].strip(), node=int(found[2]), begin_s=begin_s, length_s=length_s)


def random_failures(
    fleet: Fleet, *, mean_hours_between: float, repair_s: float, length_s: float, begin_s: float = 0.0, seed: int = 0
) -> tuple[Failure, ...]:
    """Return failures of nodes drawn for some time, each node at the same rate, whatever else happens.

    Args:
        fleet: whose nodes fail.
        mean_hours_between: two failures of one node, from its repair on; the mean of an exponential distribution.
        repair_s: how long a node is down.
        length_s: of the time they are drawn for.
        begin_s: of that time, since midnight.
        seed: the same gives the same failures; a pool's nodes have dice of their own.
    """
    if mean_hours_between <= 0 or repair_s <= 0:
        raise InputError("failures need a mean time between them, and a time for repair, of more than 0.")
    found = []
    for number, pool in enumerate(fleet.pools):
        dice = np.random.default_rng([seed, number])
        for node in range(pool.nodes):
            at_s = dice.exponential(mean_hours_between * HOUR_S)
            while at_s < length_s:
                found.append(Failure(pool=pool.name, node=node, begin_s=begin_s + at_s, length_s=repair_s))
                at_s += repair_s + dice.exponential(mean_hours_between * HOUR_S)
    return tuple(sorted(found, key=lambda one: (one.begin_s, one.pool, one.node)))


def placed(failures: Iterable[Failure], fleet: Fleet, first_s: float) -> Iterator[tuple[float, float, str, int]]:
    """Yield begin and end in seconds from the start of the traffic, pool and node; `first_s`: of the day, it starts.

    What lies before the start is taken to be of the next day. A node that fails again while it is down stays so until
    the later end. Raises UnknownNameError or InputError.
    """
    down: dict[tuple[str, int], tuple[float, float]] = {}
    for begin_s, end_s, pool, node in sorted(_checked(failures, fleet, first_s)):
        before = down.get((pool, node))
        if before and begin_s <= before[1]:
            down[pool, node] = before[0], max(before[1], end_s)
            continue
        if before:
            yield *before, pool, node
        down[pool, node] = begin_s, end_s
    for (pool, node), last in down.items():
        yield *last, pool, node


def _checked(failures: Iterable[Failure], fleet: Fleet, first_s: float) -> Iterator[tuple[float, float, str, int]]:
    for failure in failures:
        pool = next((one for one in fleet.pools if one.name == failure.pool), None)
        if pool is None:
            names = ", ".join(one.name for one in fleet.pools)
            raise UnknownNameError(f"pool '{failure.pool}' of the failure {failure} is none. The fleet has: {names}")
        if failure.node >= pool.nodes:
            raise InputError(
                f"node {failure.node} of the failure {failure} is none: pool '{pool.name}' has {pool.nodes}, counted "
                "from 0."
            )
        begin_s = failure.begin_s - first_s
        begin_s += DAY_S if begin_s < 0 else 0.0
        yield begin_s, begin_s + failure.length_s, failure.pool, failure.node
