"""Nodes that fail, and come back: as a person says it, or drawn at a mean time between failures."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from waterline.errors import InputError, UnknownNameError, nearest
from waterline.fleet import HOURS, Fleet
from waterline.units import DAY_S, HOUR_S
from waterline.workload.grammar import duration_s

MOST_TOLD = 5  # failures in a note


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A node that is down for a while, at a time of the day."""

    pool: str
    node: int
    begin_s: float  # since midnight; of the next days too, where it is larger than a day
    length_s: float

    def __str__(self) -> str:
        length = next(
            f"{self.length_s / unit_s:g}{unit}"
            for unit, unit_s in (("h", HOUR_S), ("m", 60.0), ("s", 1.0))
            if self.length_s % unit_s == 0 or unit == "s"
        )
        return f"{self.pool}:{self.node}@{_clock_text(self.begin_s)}+{length}"


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


def failure_notes(failures: Sequence[Failure], fleet: Fleet, first_s: float, length_s: float) -> Iterator[str]:
    """Say what fails.

    Raises UnknownNameError or InputError, for what would fail after the end of the traffic too: nobody would notice.

    Args:
        failures: of nodes.
        fleet: whose nodes they are.
        first_s: of the day, at which the traffic starts.
        length_s: of the traffic.
    """
    for failure, (begin_s, *_) in zip(failures, _checked(failures, fleet, first_s), strict=True):
        if begin_s >= length_s:
            starts, ends = _clock_text(first_s), _clock_text(first_s + length_s)
            raise InputError(
                f"the failure {failure} begins outside of the rehearsal, which goes from {starts} to {ends}. Write "
                "another time, or a longer --duration."
            )
    if failures:
        told = ", ".join(map(str, failures[:MOST_TOLD]))
        yield f"failing {told}" + (f" and {len(failures) - MOST_TOLD:,} more" if len(failures) > MOST_TOLD else "")


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
            known = nearest(failure.pool, [one.name for one in fleet.pools])
            raise UnknownNameError(f"the fleet has no pool '{failure.pool}', of which a node is to fail. {known}")
        if failure.node >= pool.nodes:
            raise InputError(
                f"pool '{pool.name}' has no node {failure.node} that could fail: it has {pool.nodes}, counted from 0. "
                f"Write {pool.name}:{pool.nodes - 1} for the last."
            )
        begin_s = _begin_s(failure, first_s)
        yield begin_s, begin_s + failure.length_s, failure.pool, failure.node


def _begin_s(failure: Failure, first_s: float) -> float:
    """Return when it begins, in seconds from the start of the traffic; before that there is the next day."""
    begin_s = failure.begin_s - first_s
    return begin_s + DAY_S if begin_s < 0 else begin_s


def _clock_text(at_s: float) -> str:
    minutes = int(at_s // 60)
    return f"{minutes // 60 % HOURS:02}:{minutes % 60:02}"
