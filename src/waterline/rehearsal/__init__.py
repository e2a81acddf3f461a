"""From a plan and traffic to what will happen: who waits, who is refused, what it costs.

`arrivals` says who asks what, `house` serves it. `oracle` says what that means, step by step; `station` gives the same,
many steps at a time. A day's rehearsal is a matter of arithmetic: no clock, no network.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial

import numpy as np
from numpy.typing import NDArray

from waterline.errors import InputError, UnknownNameError, nearest
from waterline.fleet import Demand
from waterline.outcome import Completion
from waterline.plan import Plan, Replica
from waterline.policy.decisions import FIELDS, NONE, REASONS
from waterline.rehearsal.acting import Actor, Planned, Tidal, in_order, request_rows
from waterline.rehearsal.arrivals import traffic
from waterline.rehearsal.beside import Behind
from waterline.rehearsal.dealing import deal
from waterline.rehearsal.failures import Failure, failure_notes
from waterline.rehearsal.house import Settled
from waterline.rehearsal.jit import COMPILED
from waterline.rehearsal.policies import POLICIES, Policy
from waterline.rehearsal.record import JobRecord, Move
from waterline.rehearsal.recorder import Recorder, Report
from waterline.rehearsal.station import warm_up
from waterline.units import HOUR_S, PICOSECONDS_PER_S
from waterline.workload import Trace
from waterline.workload.operators import Surge
from waterline.workload.stream import Stream

__all__ = ["COMPILED", "POLICIES", "Failure", "Progress", "Rehearsal", "prepare", "rehearse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a rehearsal is."""

    requests: int  # that have arrived
    at_s: float  # when the last of them did
    of_s: float  # when the last of all will, about


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal(Report):
    """What happened to every request, and what it comes to."""

    notes: tuple[str, ...]  # what was replayed
    rows: tuple[Demand, ...]  # who asks
    first_hour: int  # of the day, with which the traffic begins: at 0 s
    kept: tuple[Settled, ...]  # what became of every request, if that was to be kept
    moves: tuple[Move, ...] = ()  # what was started and stopped, lent and handed back
    jobs: tuple[JobRecord, ...] = ()
    decisions: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, len(FIELDS)), np.int64))  # [n, field]
    reasons: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, len(REASONS)), np.int64))  # [n, reason]
    digest: str = ""  # SHA-256 of the bytes of the decisions about replicas
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of the fields of a decision about replicas
    request_names: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of those of one about a request

    @property
    def completions(self) -> tuple[Completion, ...]:
        """What became of each request, in the order of arrival; times from the start of the trace.

        They are made when they are asked for. There are none when the rehearsal was told not to keep them.
        """
        return tuple(completion for settled in self.kept for completion in settled.completions())


def prepare(*, decisions: bool = False) -> None:
    """Compile, or load what was compiled before: about a minute once, then a fraction of a second.

    With `decisions` it is for rehearsals that keep the log of them.
    """
    deal(1, [1.0])
    warm_up(reasons=decisions)


class Scribe:
    """Writes down what became of requests."""

    def __init__(self, recorder: Recorder, came: Sequence[Replica], *, keep: bool, decisions: bool) -> None:
        """Begin with nothing; `came`: replicas as they come, by their numbers in the house."""
        self.recorder, self.came, self.keep, self.decisions = recorder, came, keep, decisions
        self.kept: list[Settled] = []
        self.rows: list[NDArray[np.int64]] = []  # of the log of decisions, about requests
        self.reasons: list[NDArray[np.int64]] = []  # of each row
        self._in_report = array("q")  # [replica] what the recorder calls it

    def note(self, settled: Settled) -> None:
        if not len(settled.numbers):
            return
        self.meet()
        settled.note(self.recorder, np.array(self._in_report))
        if self.keep:
            self.kept.append(settled)
        if self.decisions:
            rows, reasons = request_rows(settled, self.recorder.tenants)
            self.rows.append(rows)
            self.reasons.append(reasons)

    def meet(self) -> None:
        """Let the recorder know of those who have come."""
        self._in_report.extend(map(self.recorder.add_replica, self.came[len(self._in_report) :]))


def check_policy(policy: str) -> Policy:
    """Return a policy by its name. Raises UnknownNameError when there is no such policy."""
    for known in POLICIES:
        if policy == known:
            return known
    raise UnknownNameError(f"no policy is called '{policy}'. {nearest(policy, POLICIES)}")


def rehearse(
    plan: Plan,
    trace: Trace | Stream | None = None,
    *,
    seed: int = 0,
    duration_s: float | None = None,
    surges: Sequence[Surge] = (),
    failures: Sequence[Failure] = (),
    keep: bool = True,
    policy: str = POLICIES[0],
    decisions: bool = False,
    watch: Callable[[Progress], bool] = lambda _: True,
) -> Rehearsal:
    """Replay traffic against a plan until the last request is done. Same input, same bytes.

    Args:
        plan: its replicas serve, each at the speed of the cost model; see `oracle` for what they do.
        trace: requests, dealt to the rows of the fleet's demand by their rates. None: what the demand says.
        seed: of drawn arrivals.
        duration_s: how much of the traffic; None: all of a trace, 15 minutes of the busiest hour without one.
        surges: windows of the day in which a tenant, or all, ask more.
        failures: of nodes.
        keep: every request as well, for `Rehearsal.completions`; that takes some 100 bytes each.
        policy: who decides which replicas there are and whose turn it is, one of `POLICIES`; see `policies`.
        decisions: keep those about requests as well; those about replicas are kept anyhow.
        watch: called every now and then. Once it returns False, no more requests arrive; those that have come are
            served to their end.

    Raises:
        UnknownNameError: there is no such policy, or no such pool in a failure.
        TraceError: a trace of the demand cannot be read.
        InputError: nothing is asked in that time, or it takes more than 100 days; a failure is of no node or after the
            end, or the plan is to go on where nodes fail.
    """
    chosen = check_policy(policy)
    asked = traffic(plan, trace, seed=seed, duration_s=duration_s, surges=surges)
    notes = tuple(failure_notes(failures, plan.fleet, float(asked.first_hour * HOUR_S), asked.length_s))
    recorder = Recorder(plan, asked.length_s)
    actor: Actor
    if chosen == "plan":
        if failures:
            raise InputError("a plan does not say what to do when a node fails. Rehearse that under another policy.")
        actor = Planned(plan, asked, recorder, reasons=decisions)
    else:
        actor = Tidal(chosen, plan, asked, recorder, failures, reasons=decisions)
    scribe = Scribe(recorder, actor.came, keep=keep, decisions=decisions)
    requests = 0
    with Behind() as behind:
        for piece in asked.pieces():
            behind.do(partial(scribe.note, actor.serve(piece)))
            requests += len(piece)
            at_s = int(piece.arrival_ps[-1]) / PICOSECONDS_PER_S
            if not watch(Progress(requests=requests, at_s=at_s, of_s=asked.length_s)):
                notes = (
                    *notes,
                    f"stopped after {requests:,} requests, {at_s / 60:,.1f} of {asked.length_s / 60:,.1f} min",
                )
                break
        behind.do(partial(scribe.note, actor.finish()))
    scribe.meet()
    actor.close()
    report = recorder.report()
    of_moves = np.full((len(actor.decisions), len(REASONS)), NONE)
    rows, reasons = in_order(
        np.concatenate([actor.decisions, *scribe.rows]), np.concatenate([of_moves, *scribe.reasons])
    )
    return Rehearsal(
        **{one.name: getattr(report, one.name) for one in fields(Report)},
        notes=(*asked.notes, *notes, *actor.notes),
        rows=asked.rows,
        first_hour=asked.first_hour,
        kept=tuple(scribe.kept),
        moves=actor.moves,
        jobs=actor.jobs,
        decisions=rows,
        reasons=reasons,
        digest=actor.digest,
        names=actor.names,
        request_names=actor.request_names,
    )
