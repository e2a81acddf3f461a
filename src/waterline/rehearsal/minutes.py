"""The minutes clock in a rehearsal: replicas and jobs start, load, drain and fail, as the policy decides.

`Minutes` stands between traffic and the station that serves it. It cuts the traffic at the times at which something
happens, lets the station serve up to there, tells the tide, and does what the tide decides. Replicas serve one load
time after their start. Those that drain get nothing new and are gone when nothing runs on them any more, at their
deadline at the latest; what still runs then goes on elsewhere.

Of events at one instant, what has become ready or free comes first, then failures and repairs, then decisions.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

import numpy as np

from waterline.fleet import HOURS, Demand
from waterline.plan import Plan, Replica
from waterline.policy import tide as tides
from waterline.policy.decisions import RULES
from waterline.policy.holdings import DRAIN, HAND_BACK, HOLD, NOBODY, START, TAKE_OVER, Moves
from waterline.policy.jit import compiled
from waterline.policy.tide import Log, Signal
from waterline.rehearsal.failures import Failure, placed
from waterline.rehearsal.jobs import Books, Work
from waterline.rehearsal.pieces import Piece
from waterline.rehearsal.record import Move, MoveKind
from waterline.roster import Roster, Run, expected_output_tokens, token_costs
from waterline.units import HOUR_S, PICOSECONDS_PER_S

KINDS: dict[int, MoveKind] = {
    START: "start",
    DRAIN: "drain",
    HOLD: "hold",
    HAND_BACK: "hand back",
    TAKE_OVER: "take over",
}
COMPILED_FROM = 2_000_000  # steps times rows of replicas: below that, to compile takes longer than it saves
FREED, FAILS, REPAIRED, TURNS, DECIDES = range(5)  # the order of events at one instant

Decide = Callable[[tides.Tide, float], Moves]


class Station(Protocol):
    """Serves requests on replicas that come and go; times in picoseconds from the start of the traffic."""

    def start_all(self, replicas: Sequence[Replica], ready_ps: int) -> Sequence[int]:
        """Let replicas serve from a time on, which has not passed; return their rows."""

    def drain(self, row: int, at_ps: int) -> None:
        """Give it nothing new."""

    def fail(self, row: int, at_ps: int) -> None:
        """It is gone; what ran on it goes on elsewhere."""

    def offer(self, piece: Piece) -> None:
        """Take in requests, in the order of their arrival, all of them later than what was served."""

    def advance(self, until_ps: int) -> None:
        """Serve up to a time."""

    def idle(self, row: int) -> bool:
        """Whether nothing runs on a replica."""


@dataclass(slots=True)
class Present:
    """A replica that the station has, or a run of a job."""

    what: Replica | Run
    began_s: float
    ready_s: float
    row: int = NOBODY  # of the station
    work: Work | None = None  # of a job
    gone_s: float | None = None  # when it will be gone at the latest
    moves: tuple[int, ...] = ()  # that wait for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """How long a replica or a run of a job was there."""

    what: Replica | Run
    tenant: str  # for whom it counted last
    began_s: float
    ready_s: float
    ended_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """How long a node was down."""

    pool: str
    gpus: int
    began_s: float
    ended_s: float


class Meter:
    """What is asked of each service: planned requests, counted in whole tokens so that pieces may be cut anywhere."""

    def __init__(self, roster: Roster, rows: Sequence[Demand]) -> None:
        """Begin with nothing. How long an answer will be nobody knows: it counts as the row's mean."""
        self.services = [roster.service(row.tenant, row.model) for row in rows]
        self.costs = [token_costs(roster.plan, row.model) for row in rows]
        self.output_tokens = [expected_output_tokens(roster.plan, row) for row in rows]
        self.requests, self.prompt_tokens = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)

    def note(self, piece: Piece) -> None:
        self.requests += np.bincount(piece.row, minlength=len(self.requests))
        np.add.at(self.prompt_tokens, piece.row, piece.prompt_tokens)

    def loads(self) -> dict[int, float]:
        """Return planned requests by service since this was asked last."""
        loads = dict.fromkeys(self.services, 0.0)
        counted = zip(self.services, self.costs, self.output_tokens, strict=True)
        for row, (service, (read, write), output_tokens) in enumerate(counted):
            answers = int(self.requests[row]) * output_tokens
            loads[service] += int(self.prompt_tokens[row]) * read + answers * write
        self.requests[:], self.prompt_tokens[:] = 0, 0
        return loads


class Minutes:
    """Decides and acts, a step at a time."""

    def __init__(
        self,
        plan: Plan,
        roster: Roster,
        station: Station,
        *,
        rows: Sequence[Demand],
        first_hour: int,
        length_s: float,
        failures: Iterable[Failure] = (),
        warm: bool = False,
    ) -> None:
        """Begin with what runs on the roster, served by the station from the start.

        Args:
            plan: whose hours those keep to that do not belong to the tide.
            roster: who runs, and the tide that decides.
            station: that serves; it has no replicas yet.
            rows: of the demand, who asks.
            first_hour: of the day, with which the traffic begins.
            length_s: of the traffic, about.
            failures: of nodes.
            warm: what is decided on at the start has loaded before it.
        """
        self.roster, self.tide, self.station = roster, roster.tide, station
        self.first_s = float(first_hour * HOUR_S)  # on the clock of the tide, where a day begins at 0
        self.log, self.books = Log(), Books(plan.fleet.jobs)
        self.signals: list[Signal] | None = None  # a list, if they are to be kept
        self.moves: list[Move] = []
        self.stays: list[Stay] = []
        self.outages: list[Outage] = []
        self.present: dict[int, Present] = {}  # by the row of the tide
        self.kept: dict[str, Present] = {}  # by id: who keeps to the plan
        self.now_s = 0.0
        self.warm = warm
        self.meter = Meter(roster, rows)
        large = length_s / roster.step_s * len(self.tide.replicas.state) >= COMPILED_FROM
        self.decide: Decide = compiled(tides.decide) if large else tides.decide
        self._numbers = count()
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._fresh: list[Present] = []  # whom the station does not know yet
        self._draining: set[int] = set()  # rows of the tide
        self._down_s: dict[tuple[str, int], float] = {}  # pool and node: since when
        for row, one in roster.has.items():
            if isinstance(one, Replica):
                self.present[row] = Present(one, 0.0, 0.0)
                self._fresh.append(self.present[row])
        self._meet()
        self._turn(first_hour, first=True)
        for begin_s, end_s, pool, node in placed(failures, plan.fleet, self.first_s):
            self._at(begin_s, FAILS, lambda pool=pool, node=node: self._fail(pool, node))  # type: ignore[misc]
            self._at(end_s, REPAIRED, lambda pool=pool, node=node: self._repair(pool, node))  # type: ignore[misc]
        self._at(0.0, DECIDES, self._decide)

    # --- Time ---------------------------------------------------------------------------------------------------------

    def serve(self, piece: Piece) -> None:
        """Serve requests up to the last one's arrival."""
        begin = 0
        while self._events and self._events[0][0] * PICOSECONDS_PER_S <= piece.arrival_ps[-1]:
            end = int(np.searchsorted(piece.arrival_ps, _ps(self._events[0][0])))
            if end > begin:
                self._offer(piece[begin:end])
            begin = end
            self._happen()
        self._offer(piece[begin:])

    def _offer(self, piece: Piece) -> None:
        self.meter.note(piece)
        self.station.offer(piece)

    def advance(self, until_s: float) -> None:
        """Let time pass without requests."""
        while self._events and self._events[0][0] <= until_s:
            self._happen()
        self.station.advance(_ps(until_s))
        self.now_s = until_s

    def finish(self, end_s: float) -> None:
        """Write down who is still there at the end."""
        for row, present in self.present.items():
            self._leave(present, self.roster.tenant_of(row), end_s, stopped=False)
        for present in self.kept.values():
            self._leave(present, "", end_s, stopped=False)
        self.present, self.kept = {}, {}
        for pool, node in list(self._down_s):
            self._is_up(pool, node, end_s)

    def _at(self, at_s: float, order: int, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, order, next(self._numbers), event))

    def _happen(self) -> None:
        at_s, _, _, event = heapq.heappop(self._events)
        if at_s > self.now_s:
            self.station.advance(_ps(at_s))
            self.now_s = at_s
        event()

    # --- Decisions ----------------------------------------------------------------------------------------------------

    def _tell(self, signal: str, **more: int | float) -> Moves | None:
        said = {"at_s": self.first_s + self.now_s, "signal": signal, **more}
        if self.signals is not None:
            self.signals.append(said)
        moves, rows = tides.feed(self.tide, said, self.decide)
        self.log.add(rows)
        return moves

    def _decide(self) -> None:
        for row in sorted(self._draining):
            if self.station.idle(self.present[row].row):
                self._gone(row)
        if self.now_s > 0.0:
            self._tell_loads()
        service = self.tide.replicas.service.copy()  # before somebody takes over from somebody
        moves = self._tell("tick")
        assert moves is not None  # noqa: S101 - that is the answer to a tick
        for move in range(len(moves.kind)):
            victim = int(moves.victim[move])
            self._do(moves, move, self.roster.services[int(service[victim])].tenant if victim != NOBODY else "")
        self._meet()
        self._at(self.now_s + self.roster.step_s, DECIDES, self._decide)

    def _tell_loads(self) -> None:
        step = round((self.first_s + self.now_s) / self.roster.step_s) - 1
        for service, load in self.meter.loads().items():
            self._tell("load", service=service, step=step, load=load / self.roster.step_s)

    def _do(self, moves: Moves, move: int, victim_tenant: str) -> None:
        kind, victim = int(moves.kind[move]), int(moves.victim[move])
        self._note(moves, move, victim_tenant)
        if kind == START:
            self._start(moves, move)
        elif kind in {DRAIN, HAND_BACK} and victim != NOBODY:
            self._stop(victim, float(moves.deadline_s[move]) - self.first_s)

    def _start(self, moves: Moves, move: int) -> None:
        row = int(moves.started[move])
        one = self.roster.start(moves, move)
        if one is None:
            self._tell("unfit", replica=row)
            return
        loads_s = one.job.load_s if isinstance(one, Run) else one.load_s
        ready_s = self.now_s + (0.0 if self.warm and self.now_s == 0.0 else loads_s)
        present = Present(one, self.now_s, ready_s, moves=(len(self.moves) - 1,))
        if isinstance(one, Run):
            present.work = Work(job=one.job, began_s=self.now_s)
        else:
            self._fresh.append(present)
        self.present[row] = present
        self._at(ready_s, FREED, lambda: self._ready(row, present))

    def _meet(self) -> None:
        """Let the station know of those who have come, all that will be ready at the same time together."""
        for ready_s in sorted({present.ready_s for present in self._fresh}):
            together = [present for present in self._fresh if present.ready_s == ready_s]
            replicas = [present.what for present in together if isinstance(present.what, Replica)]
            for present, row in zip(together, self.station.start_all(replicas, _ps(ready_s)), strict=True):
                present.row = row
        self._fresh = []

    def _ready(self, row: int, present: Present) -> None:
        if self.present.get(row) is not present:
            return  # it failed while it loaded
        self._tell("loaded", replica=row)
        self._done(present)
        if present.work:
            self._at(present.work.next_save_s, FREED, lambda: self._save(row, present))

    def _save(self, row: int, present: Present) -> None:
        if self.present.get(row) is not present or present.work is None or present.gone_s is not None:
            return
        present.work.saved_s = self.now_s
        self._tell("saved", replica=row)
        self._at(present.work.next_save_s, FREED, lambda: self._save(row, present))

    def _stop(self, row: int, deadline_s: float) -> None:
        present = self.present[row]
        present.gone_s, present.moves = deadline_s, (len(self.moves) - 1,)
        if present.work:
            present.gone_s = present.work.gone_s(self.now_s, deadline_s - self.now_s)
        else:
            self.station.drain(present.row, _ps(self.now_s))
            self._draining.add(row)
        self._at(present.gone_s, FREED, lambda: self._gone(row, present))

    def _gone(self, row: int, present: Present | None = None) -> None:
        """A replica that drained is gone; what runs on it still goes on elsewhere."""
        if present is not None and self.present.get(row) is not present:
            return  # it was idle before its deadline
        present = self.present.pop(row)
        self._draining.discard(row)
        if present.work is None:
            self.station.fail(present.row, _ps(self.now_s))
        self._leave(present, self.roster.tenant_of(row), self.now_s, stopped=True)
        self._tell("ended", replica=row)
        self.roster.end(row)
        self._done(present)

    def _leave(self, present: Present, tenant: str, ended_s: float, *, stopped: bool) -> None:
        self.stays.append(
            Stay(
                what=present.what,
                tenant=tenant,
                began_s=present.began_s,
                ready_s=min(present.ready_s, ended_s),
                ended_s=ended_s,
            )
        )
        if present.work:
            self.books.end(present.work, ended_s, stopped=stopped)

    # --- Failures -----------------------------------------------------------------------------------------------------

    def _fail(self, pool: str, node: int) -> None:
        for row in self.roster.rows_on(pool, node):
            present = self.present.pop(row)
            self._draining.discard(row)
            if present.work is None:
                self.station.fail(present.row, _ps(self.now_s))
            self._leave(present, self.roster.tenant_of(row), self.now_s, stopped=True)
            self._tell("failed", replica=row)
            self.roster.end(row)
            if present.gone_s is not None:  # else it never got to serve
                self._done(present)
        for present in [one for one in self.kept.values() if _is_on(one.what, pool, node)]:
            self._let_go(present)
            self.station.fail(present.row, _ps(self.now_s))
        self._down_s[pool, node] = self.now_s
        berth, gpus = self.roster.fail(pool, node)
        self._tell("down", node=berth, gpus=gpus)

    def _repair(self, pool: str, node: int) -> None:
        self._is_up(pool, node, self.now_s)
        berth, gpus = self.roster.repair(pool, node)
        self._tell("up", node=berth, gpus=gpus)
        self._turn(int((self.first_s + self.now_s) // HOUR_S) % HOURS, again=True)

    def _is_up(self, pool: str, node: int, at_s: float) -> None:
        gpus, began_s = self.roster.pools[pool].gpus_per_node, self._down_s.pop((pool, node))
        self.outages.append(Outage(pool=pool, gpus=gpus, began_s=began_s, ended_s=at_s))

    # --- Who keeps to the plan ----------------------------------------------------------------------------------------

    def _turn(self, hour: int, *, first: bool = False, again: bool = False) -> None:
        """Let those serve that the plan has at an hour; they are loaded before, but not where a node was down."""
        if not self.roster.kept:
            return
        for present in [one for one in self.kept.values() if isinstance(one.what, Replica)]:
            if isinstance(present.what, Replica) and hour not in present.what.hours:
                self._let_go(present)
        for replica in self.roster.kept:
            down = any((replica.pool, place.node) in self.roster.down for place in replica.places)
            if hour in replica.hours and replica.id not in self.kept and not down:
                loads_s = 0.0 if first or not again else replica.load_s
                began_s = max(0.0, self.now_s + loads_s - replica.load_s)
                self.kept[replica.id] = Present(replica, began_s, self.now_s + loads_s)
                self._fresh.append(self.kept[replica.id])
        self._meet()
        if not again:
            next_s = (np.floor((self.first_s + self.now_s) / HOUR_S) + 1) * HOUR_S - self.first_s
            self._at(float(next_s), TURNS, lambda: self._turn((hour + 1) % HOURS))

    def _let_go(self, present: Present) -> None:
        """Give a replica that keeps to the plan nothing new; what runs on it, it finishes."""
        self.station.drain(present.row, _ps(self.now_s))
        self._leave(present, "", self.now_s, stopped=False)
        del self.kept[present.what.id]

    # --- The record ---------------------------------------------------------------------------------------------------

    def _note(self, moves: Moves, move: int, victim_tenant: str) -> None:
        claimant, victim = self.roster.services[int(moves.claimant[move])], int(moves.victim[move])
        berth = self.roster.berths[int(moves.node[move])]
        self.moves.append(
            Move(
                at_s=self.now_s,
                kind=KINDS[int(moves.kind[move])],
                rule=RULES[int(moves.rule[move])][0],
                tenant=claimant.tenant,
                target=claimant.target,
                victim=self.roster.has[victim].id if victim != NOBODY else "",
                victim_tenant=victim_tenant,
                pool=berth.pool,
                node=berth.nodes[0],
                gpus=int(moves.gpus[move]),
                cost_gpu_s=float(moves.cost_gpu_s[move]),
                deadline_s=float(moves.deadline_s[move]) - self.first_s,
            )
        )

    def _done(self, present: Present) -> None:
        for number in present.moves:
            self.moves[number] = replace(self.moves[number], done_s=self.now_s)
        present.moves = ()


def _ps(at_s: float) -> int:
    return round(at_s * PICOSECONDS_PER_S)


def _is_on(one: Replica | Run, pool: str, node: int) -> bool:
    return one.pool == pool and any(place.node == node for place in one.places)
