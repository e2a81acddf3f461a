"""Who acts in a rehearsal: the plan by its hours, or the minutes clock by its decisions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from waterline.plan import Plan, Replica
from waterline.policy.decisions import COMES_BACK, FIELDS, NONE, REASONS, TAKES_OVER
from waterline.policy.holdings import NOBODY
from waterline.rehearsal.arrivals import Traffic
from waterline.rehearsal.capacity import PICOSECONDS_PER_NS, Terms
from waterline.rehearsal.failures import Failure
from waterline.rehearsal.house import House, Settled
from waterline.rehearsal.minutes import Minutes
from waterline.rehearsal.pieces import Piece
from waterline.rehearsal.policies import Policy, Setting, setting
from waterline.rehearsal.record import JobRecord, Move
from waterline.rehearsal.recorder import Recorder
from waterline.rehearsal.state import ENTRY_AT, ENTRY_REASONS, ENTRY_REPLICA, ENTRY_REQUEST, ENTRY_RULE
from waterline.roster import Run
from waterline.units import GIGA, HOUR_S, PICOSECONDS_PER_S

Integers = NDArray[np.int64]
Names = Mapping[str, Sequence[str]]
PICOSECONDS_PER_MS = PICOSECONDS_PER_S // 1000


class Actor(Protocol):
    """Serves traffic on replicas that come and go by its rules."""

    @property
    def came(self) -> Sequence[Replica]:
        """Return the replicas that ever came, as the report is to show them; more come at its end."""

    @property
    def moves(self) -> tuple[Move, ...]:
        """Return what was decided about replicas."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what its rules cannot do."""

    @property
    def jobs(self) -> tuple[JobRecord, ...]:
        """Return what jobs came to."""

    @property
    def decisions(self) -> Integers:
        """Return moves as rows of the decision log."""

    @property
    def digest(self) -> str:
        """Return the SHA-256 of that log; "" where nothing is decided."""

    @property
    def names(self) -> Names:
        """Return the names of tenants, claimants and places in that log."""

    @property
    def request_names(self) -> Names:
        """Return the same for rows about requests; see `request_rows`."""

    def serve(self, piece: Piece) -> Settled:
        """Serve requests; return what has been settled."""

    def finish(self) -> Settled:
        """Serve the rest; nothing is decided any more."""

    def close(self) -> None:
        """Write down who was there, of those that came; everything else has been written down."""


class Planned:
    """Replicas come and go at the hours of the plan."""

    moves: tuple[Move, ...] = ()
    notes: tuple[str, ...] = ()
    jobs: tuple[JobRecord, ...] = ()
    digest = ""

    def __init__(self, plan: Plan, asked: Traffic, recorder: Recorder, *, reasons: bool) -> None:
        """Begin without replicas; `reasons`: whether to write down why each request is given to its replica."""
        self.house = House(plan, asked.rows, asked.clients, asked.first_hour, reasons=reasons)
        self.recorder, self.first_hour = recorder, asked.first_hour
        for replica in plan.replicas:
            recorder.add_replica(replica)
        self.decisions: Integers = np.zeros((0, len(FIELDS)), np.int64)
        self.names: Names = {}

    @property
    def came(self) -> Sequence[Replica]:
        return self.house.replicas

    @property
    def request_names(self) -> Names:
        return _request_names(self.recorder, self.house.clients, self.came)

    def serve(self, piece: Piece) -> Settled:
        self.house.keep_hours(int(piece.arrival_ps[-1]))
        self.house.offer(piece)
        return self.house.settle()

    def finish(self) -> Settled:
        self.house.finish()
        return self.house.settle()

    def close(self) -> None:
        self.recorder.run_as_planned(self.first_hour)


class Tidal:
    """The minutes clock decides."""

    clock: type[Minutes] = Minutes

    def __init__(
        self,
        policy: Policy,
        plan: Plan,
        asked: Traffic,
        recorder: Recorder,
        failures: Sequence[Failure],
        *,
        reasons: bool,
    ) -> None:
        """Begin with the replicas of the first hour; `reasons` as at `Planned`."""
        self.recorder = recorder
        self.setting = setting(policy, plan, asked.rows, asked.first_hour)
        self.house = Moving(self.setting, asked, reasons=reasons)
        self.minutes = self.clock(
            self.setting.plan,
            self.setting.roster,
            self.house,
            rows=self.setting.rows,
            first_hour=asked.first_hour,
            length_s=asked.length_s,
            failures=failures,
            warm=self.setting.warm,
        )
        self.house.rows = asked.rows  # from here on by the names that people know

    @property
    def came(self) -> Sequence[Replica]:
        return self.house.shown

    @property
    def moves(self) -> tuple[Move, ...]:
        names = self.setting.names
        return tuple(replace(move, target=names.get(move.target, move.target)) for move in self.minutes.moves)

    @property
    def notes(self) -> tuple[str, ...]:
        return self.setting.notes

    @property
    def jobs(self) -> tuple[JobRecord, ...]:
        return self.minutes.books.records()

    @property
    def decisions(self) -> Integers:
        return np.array(self.minutes.log.rows, np.int64).reshape(-1, len(FIELDS))

    @property
    def digest(self) -> str:
        return self.minutes.log.digest

    @property
    def names(self) -> Names:
        roster, names = self.setting.roster, self.setting.names
        claimants = [f"{one.tenant}/{names.get(one.target, one.target)}" for one in roster.services]
        return {**roster.names, "claimant": claimants}

    @property
    def request_names(self) -> Names:
        clients = ["everybody"] if self.setting.one_queue else self.house.clients
        return _request_names(self.recorder, clients, self.came)

    def serve(self, piece: Piece) -> Settled:
        self.minutes.serve(piece)
        return self.house.settle()

    def finish(self) -> Settled:
        self.house.finish()
        return self.house.settle()

    def close(self) -> None:
        self.minutes.finish(max(self.minutes.now_s, self.recorder.last_ps / PICOSECONDS_PER_S))
        tenants = {name: number for number, name in enumerate(self.recorder.tenants)}
        first_ps, last_ps = self.recorder.first_ps or 0, self.recorder.last_ps  # nobody pays for other times

        def within_ps(*times_s: float) -> list[int]:
            return [min(max(round(time_s * PICOSECONDS_PER_S), first_ps), last_ps) for time_s in times_s]

        for outage in self.minutes.outages:
            self.recorder.down(outage.pool, outage.gpus, *within_ps(outage.began_s, outage.ended_s))
        for stay in self.minutes.stays:
            begin_ps, ready_ps, end_ps = within_ps(stay.began_s, stay.ready_s, stay.ended_s)
            if isinstance(stay.what, Run):
                self.recorder.works(tenants[stay.tenant], stay.what.pool, stay.what.gpus, begin_ps, end_ps)
            else:
                alone = tenants[stay.tenant] if self.setting.apart else NOBODY
                self.recorder.runs(self.recorder.known[stay.what.id], begin_ps, ready_ps, end_ps, alone)


class Moving(House):
    """A house under a policy, which may have other models, shares and clients than the fleet."""

    def __init__(self, setting: Setting, asked: Traffic, *, reasons: bool) -> None:
        """Begin without replicas."""
        self.setting = setting
        self.shown: list[Replica] = []  # that ever came, by the names that people know
        super().__init__(setting.plan, setting.rows, asked.clients, asked.first_hour, reasons=reasons)

    def start_all(self, replicas: Sequence[Replica], ready_ps: int) -> range:
        self.shown += map(self.setting.shown, replicas)
        return super().start_all(replicas, ready_ps)

    def _terms(self) -> Terms:
        terms, shares = replace(super()._terms(), affinity=self.setting.affinity), self.setting.shares
        if shares is None:
            return terms
        guarantee, deserved, limit = (tuple(column) for column in zip(*shares, strict=True))
        return replace(terms, guarantee=guarantee, deserved=deserved, limit=limit)

    def _clients(self, asked: Piece) -> Integers:
        return np.zeros(len(asked), np.int64) if self.setting.one_queue else super()._clients(asked)


# --- The log of decisions about requests ------------------------------------------------------------------------------


def request_rows(settled: Settled, tenants: Sequence[str]) -> tuple[Integers, Integers]:
    """Return a row each time that a request is given to a replica, and for each that is refused or gives up; and why.

    On the clock of the minutes, on which a day begins at 0. Claimants are the desk's clients, places replicas. Rows are
    in the order in which the requests came; of one request in that of time.
    """
    passages, asked, house, placed = settled.passages, settled.asked, settled.house, settled.passages.placed
    refused = np.flatnonzero(passages.replica < 0)
    request = np.concatenate([placed[:, ENTRY_REQUEST], refused])
    at_ps = np.concatenate([placed[:, ENTRY_AT], passages.finish_ps[refused]])
    rule = np.concatenate([placed[:, ENTRY_RULE], -passages.replica[refused]])
    begun = (rule == COMES_BACK) | (rule == TAKES_OVER)
    rows: Integers = np.full((len(request), len(FIELDS)), NONE, np.int64)
    reasons: Integers = np.full((len(request), len(REASONS)), NONE, np.int64)
    first_ns = house.first_hour * HOUR_S * GIGA
    rows[:, FIELDS.index("at_ns")] = at_ps // PICOSECONDS_PER_NS + first_ns
    rows[:, FIELDS.index("rule")] = rule
    rows[:, FIELDS.index("tenant")] = np.array([tenants.index(row.tenant) for row in house.rows])[asked.row[request]]
    rows[:, FIELDS.index("claimant")] = passages.client[request]
    rows[: len(placed), FIELDS.index("place")] = placed[:, ENTRY_REPLICA]
    rows[:, FIELDS.index("amount")] = (asked.prompt_tokens + asked.output_tokens)[request]
    rows[:, FIELDS.index("cost_ms")] = np.where(begun, NONE, (at_ps - asked.arrival_ps[request]) // PICOSECONDS_PER_MS)
    retry_s = passages.retry_s[request]
    back_ns = first_ns + at_ps // PICOSECONDS_PER_NS + np.round(retry_s * GIGA).astype(np.int64)
    rows[:, FIELDS.index("deadline_ns")] = np.where(retry_s > 0, back_ns, NONE)
    reasons[: len(placed)] = placed[:, ENTRY_REASONS:]
    order = np.argsort(request, kind="stable")
    return rows[order], reasons[order]


def _request_names(recorder: Recorder, clients: Sequence[str], came: Sequence[Replica]) -> Names:
    """Return the names in those rows."""
    return {"tenant": recorder.tenants, "claimant": clients, "place": [replica.id for replica in came]}


def in_order(rows: Integers, reasons: Integers) -> tuple[Integers, Integers]:
    """Return rows in the order of time, and their reasons; those of one instant stay as they are."""
    order = np.argsort(rows[:, FIELDS.index("at_ns")], kind="stable")
    return rows[order], reasons[order]
