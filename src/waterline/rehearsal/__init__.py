"""From a plan and traffic to what will happen: who waits, who is refused, what it costs.

`arrivals` says who asks what, `lane` serves it, a model each. `oracle` says what that means, step by step; `station`
gives the same, many steps at a time. A day's rehearsal is a matter of arithmetic: no clock, no network.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from waterline.fleet import HOURS, Demand
from waterline.outcome import Completion, Summary, Tally
from waterline.plan import Plan, Replica
from waterline.rehearsal.arrivals import traffic
from waterline.rehearsal.dealing import deal
from waterline.rehearsal.jit import COMPILED
from waterline.rehearsal.lane import Lane, Settled
from waterline.rehearsal.oracle import PICOSECONDS_PER_HOUR
from waterline.rehearsal.station import warm_up
from waterline.units import HOUR_S, PICOSECONDS_PER_S
from waterline.workload import Trace
from waterline.workload.operators import Surge
from waterline.workload.stream import Stream

__all__ = ["COMPILED", "Progress", "Rehearsal", "prepare", "rehearse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a rehearsal is."""

    requests: int  # that have arrived
    at_s: float  # when the last of them did
    of_s: float  # when the last of all will, about


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What happened to every request, and what it comes to."""

    summaries: tuple[Summary, ...]  # the total first, then by tenant and model
    by_tenant: tuple[Summary, ...]  # over all models
    preempted: int  # requests whose cache was taken at least once
    duration_s: float  # from the first arrival to the last finish
    usd: float  # all replicas of the plan, at the hours they serve of that time, and loading for them
    notes: tuple[str, ...]  # what was replayed
    rows: tuple[Demand, ...]  # who asks
    kept: tuple[Settled, ...]  # what became of every request, if that was to be kept

    @property
    def completions(self) -> tuple[Completion, ...]:
        """What became of each request, in the order of arrival; times from the start of the trace.

        They are made when they are asked for. There are none when the rehearsal was told not to keep them.
        """
        numbered = [
            pair
            for settled in self.kept
            for pair in zip(settled.numbers.tolist(), settled.completions(self.rows), strict=True)
        ]
        return tuple(completion for _, completion in sorted(numbered, key=lambda pair: pair[0]))


def prepare() -> None:
    """Compile, or load what was compiled before: 10 to 30 s once, then a fraction of a second."""
    deal(1, [1.0])
    warm_up()


def rehearse(
    plan: Plan,
    trace: Trace | Stream | None = None,
    *,
    seed: int = 0,
    duration_s: float | None = None,
    surges: Sequence[Surge] = (),
    keep: bool = True,
    watch: Callable[[Progress], bool] = lambda _: True,
) -> Rehearsal:
    """Replay traffic against a plan until the last request is done. Same input, same bytes.

    Args:
        plan: its replicas serve, each at the speed of the cost model; see `oracle` for what they do.
        trace: requests, dealt to the rows of the fleet's demand by their rates. None: what the demand says.
        seed: of drawn arrivals.
        duration_s: how much of the traffic; None: all of a trace, 15 minutes of the busiest hour without one.
        surges: windows of the day in which a tenant, or all, ask more.
        keep: every request as well, for `Rehearsal.completions`; that takes some 100 bytes each.
        watch: called every now and then. Once it returns False, no more requests arrive, and the rehearsal tells of
            those whose end is known, up to the first of each model whose end is not.

    Raises:
        TraceError: a trace of the demand cannot be read.
        InputError: nothing is asked in that time, or it takes more than 100 days.
    """
    asked = traffic(plan, trace, seed=seed, duration_s=duration_s, surges=surges)
    lanes = [Lane(plan, model, asked.first_hour) for model in plan.models]
    gpus = [replica.layout.gpus for replica in plan.replicas]
    tally = Tally(plan.fleet.slos, [replica.id for replica in plan.replicas], gpus)
    lane_of_row = np.array([[lane.model for lane in lanes].index(row.model) for row in asked.rows])
    stopped = ""
    first_ps = last_ps = preempted = 0
    kept: list[Settled] = []

    def settle() -> Iterator[Settled]:
        nonlocal first_ps, stopped
        requests = 0
        for piece in asked.pieces():
            first_ps = int(piece.arrival_ps[0]) if requests == 0 else first_ps
            numbers = np.arange(requests, requests + len(piece))
            for number, lane in enumerate(lanes):
                own = lane_of_row[piece.row] == number
                yield lane.serve(piece[own], numbers[own])
            requests += len(piece)
            at_s = int(piece.arrival_ps[-1]) / PICOSECONDS_PER_S
            if not watch(Progress(requests=requests, at_s=at_s, of_s=asked.length_s)):
                stopped = f"stopped after {requests:,} requests; those under way then are not counted"
                return
        for lane in lanes:
            yield lane.drain()

    for settled in settle():
        if len(settled.numbers):
            settled.count(tally, asked.rows)
            last_ps = max(last_ps, int(settled.passages.finish_ps.max()))
            preempted += int((settled.passages.preemptions > 0).sum())
            if keep:
                kept.append(settled)
    lasted_s = (last_ps - first_ps) / PICOSECONDS_PER_S
    usd = {
        replica.id: replica.usd_per_hour * _paid_s(replica, asked.first_hour, first_ps, last_ps) / HOUR_S
        for replica in plan.replicas
    }
    summaries = tally.summaries(lasted_s, usd)
    return Rehearsal(
        summaries=summaries,
        by_tenant=tally.by_tenant(lasted_s, usd),
        preempted=preempted,
        duration_s=lasted_s,
        usd=summaries[0].usd,
        notes=(*asked.notes, stopped) if stopped else asked.notes,
        rows=asked.rows,
        kept=tuple(kept),
    )


def _paid_s(replica: Replica, first_hour: int, first_ps: int, last_ps: int) -> float:
    """Return how long a replica serves, and loads for that once it has begun, within a stretch of time."""
    paid_ps = 0
    for hour in range(first_ps // PICOSECONDS_PER_HOUR, last_ps // PICOSECONDS_PER_HOUR + 1):
        begin_ps, end_ps = hour * PICOSECONDS_PER_HOUR, (hour + 1) * PICOSECONDS_PER_HOUR
        if (first_hour + hour) % HOURS in replica.hours:
            paid_ps += min(end_ps, last_ps) - max(begin_ps, first_ps)
        elif (first_hour + hour + 1) % HOURS in replica.hours and end_ps <= last_ps:
            paid_ps += min(round(replica.load_s * PICOSECONDS_PER_S), end_ps - max(begin_ps, first_ps))
    return paid_ps / PICOSECONDS_PER_S
