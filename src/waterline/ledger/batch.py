"""What one transaction does: reservations that fit their quotas, settlements, and the sums of both.

Nothing is charged twice, whatever is tried again: a request's row is written once, and only whoever writes it adds it
to the sums. Normally nothing of a batch is there yet, so it is written without looking. When the counts of rows say
otherwise (a commit whose answer got lost, a gateway that was taken for dead), the transaction starts over and looks.
"""

from asyncio import Future
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import msgspec
from msgspec import Struct
from sqlalchemy import Connection, Engine, bindparam, delete, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from waterline.errors import QuotaError
from waterline.ledger.database import writing
from waterline.ledger.quotas import Balance, Balances, periods, refusal
from waterline.ledger.records import Key, Settlement, day_of
from waterline.ledger.tables import AMOUNTS, SUMS, balances, completions, keys, reservations, usage

CHUNK = 500  # ids in one question
Flows = dict[tuple[str, tuple[str, ...]], Balance]  # by key, and the periods in which it has quotas
Sums = dict[tuple[str, ...], dict[str, int]]  # by GROUP, then by SUMS


class Reserve(Struct, frozen=True, kw_only=True):
    """A request that wants in, with the most it may use."""

    request_id: str
    tenant: str
    client: str
    key: Key | None
    model: str
    arrival_us: int
    tokens: int
    nano_usd: int
    periods: tuple[str, ...]  # in which the key has quotas


class Note(Struct, frozen=True, kw_only=True):
    """How far a request has come that has not ended."""

    request_id: str
    prompt_tokens: int
    output_tokens: int
    nano_usd: int
    noted_us: int


class Ending(Struct, frozen=True, kw_only=True):
    """A request that has ended."""

    settlement: Settlement
    periods: tuple[str, ...]  # in which its key has quotas
    reserved: Reserve | None  # for it


@dataclass(slots=True, kw_only=True)
class Batch:
    """What is written together, of each request at most one of a kind, and who waits for it."""

    reserves: dict[str, Reserve] = field(default_factory=dict)
    endings: dict[str, Ending] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)
    careful: bool = False  # some of it may be there already
    reserving: dict[str, "Future[None]"] = field(default_factory=dict)
    ending: list["Future[None]"] = field(default_factory=list)
    since_s: float = 0.0  # when the first of it came, by the monotonic clock

    def __bool__(self) -> bool:
        return bool(self.reserves or self.endings or self.notes)

    @property
    def rows(self) -> int:
        return len(self.reserves) + len(self.endings)

    def parts(self) -> "Iterator[Batch]":
        """Yield each request of it alone, to find the one that cannot be written; who waits is told with the last."""
        for request_id in {**self.reserves, **self.endings}:
            part = Batch(careful=True)
            if request_id in self.reserves:
                part.reserves[request_id] = self.reserves[request_id]
                part.reserving[request_id] = self.reserving[request_id]
            if request_id in self.endings:
                part.endings[request_id] = self.endings[request_id]
            yield part
        yield Batch(ending=self.ending, notes=self.notes)

    def absorb(self, later: "Batch") -> None:
        """Take in what gathered behind this one."""
        self.since_s = self.since_s if self.rows else later.since_s
        self.reserves |= later.reserves
        self.endings = later.endings | self.endings  # what was said first stands
        self.notes |= later.notes
        self.careful |= later.careful
        self.reserving |= later.reserving
        self.ending += later.ending


@dataclass(slots=True, kw_only=True)
class Written:
    """What came of a batch."""

    refused: dict[str, QuotaError] = field(default_factory=dict)  # by request
    balances: Balances = field(default_factory=dict)  # as they are now, of the keys it decided about
    changes: Balances = field(default_factory=dict)  # of all keys with quotas


@dataclass(frozen=True, slots=True, kw_only=True)
class _There:
    """What of a batch is there already."""

    open: frozenset[str] = frozenset()
    settled: frozenset[str] = frozenset()
    interrupted: dict[str, Settlement] = field(default_factory=dict)  # by a gateway that took this one for dead


class _StartOverError(Exception):
    """Something is there already, or not there any more."""


class Books:
    """Writes batches to one database, for one gateway."""

    def __init__(self, engine: Engine, owner: str) -> None:
        self.engine = engine
        self.owner = owner
        insert: Any = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
        of_reservation = reservations.c.id == bindparam("request_id")
        notes = ("prompt_tokens", "output_tokens", "nano_usd", "noted_us")
        note = update(reservations).where(of_reservation).values({name: bindparam(name) for name in notes})
        self._open = _Statement(engine, insert(reservations).on_conflict_do_nothing())
        self._close = _Statement(engine, delete(reservations).where(of_reservation))
        self._note = _Statement(engine, note, (*notes, "request_id"))
        self._complete = _Statement(engine, insert(completions).on_conflict_do_nothing())
        self._take_back = _Statement(engine, delete(completions).where(completions.c.id == bindparam("request_id")))
        self._balance = _Statement(engine, _adding(insert(balances), BALANCE))
        self._use = _Statement(engine, _adding(insert(usage), SUMS))
        some_keys = keys.c.id.in_(bindparam("ids", expanding=True))
        self._hold = select(keys.c.id).where(some_keys).order_by(keys.c.id).with_for_update()
        names: Any = bindparam("names", expanding=True)
        self._spent = select(balances).where(tuple_(balances.c.key_id, balances.c.period).in_(names))

    def write(self, batch: Batch) -> Written:
        """Write all of a batch.

        Raises LedgerError; then nothing is written, or all of it is and the answer got lost: a second try has to be
        `careful`.
        """
        careful = batch.careful
        while True:
            try:
                with writing(self.engine) as connection:
                    return self._write(connection, batch, _look(connection, batch) if careful else None)
            except _StartOverError:
                careful = True

    def recover(self, owner: str) -> int:
        """Settle what a gateway that is dead has left open; return how many requests that were."""
        with writing(self.engine) as connection:
            rows = connection.execute(select(reservations).where(reservations.c.owner == owner)).all()
            known = {row.id: key_of(row) for row in connection.execute(select(keys))} if rows else {}
        batch = Batch(careful=True)
        for row in rows:
            reserve = Reserve(
                request_id=row.id,
                tenant=row.tenant,
                client=row.client,
                key=known.get(row.key_id),
                periods=periods(known.get(row.key_id), row.arrival_us),
                model=row.model,
                arrival_us=row.arrival_us,
                tokens=row.reserved_tokens,
                nano_usd=row.reserved_nano_usd,
            )
            batch.endings[row.id] = Ending(settlement=_interrupted(row), periods=reserve.periods, reserved=reserve)
        self.write(batch)
        return len(rows)

    def _write(self, connection: Connection, batch: Batch, there: _There | None) -> Written:
        written = Written()
        reserves = [one for one in batch.reserves.values() if not there or one.request_id not in there.open]
        if there:
            reserves = [one for one in reserves if one.request_id not in there.settled]
        self._decide(connection, reserves, written)
        granted = {one.request_id: one for one in reserves if one.request_id not in written.refused}
        settled, closed = _settled(batch, granted, written.refused, there)

        here = {one.request_id for one in closed} & granted.keys()  # come and gone since the last commit
        self._open.run(connection, [self._reservation(one) for id_, one in granted.items() if id_ not in here])
        self._close.run(connection, [(one.request_id,) for one in closed if one.request_id not in here])
        sums: Sums = {}
        flows: Flows = {}
        if there and there.interrupted:
            self._undo(connection, there, batch, sums, flows)
        self._complete.run(connection, [_completion(one) for one in settled])
        self._note.run(connection, list(map(_note, batch.notes.values())), each=False)

        for one in granted.values():
            _flow(flows, one, 1)
        for one in closed:
            _flow(flows, one, -1)
        for settlement in settled:
            _count(sums, settlement, 1)
            _charge(flows, batch.endings[settlement.request_id].periods, settlement, 1)
        for (key_id, of_periods), flow in flows.items():
            for period in of_periods:
                written.changes.setdefault((key_id, period), Balance()).add(flow)
        for name in written.changes.keys() & written.balances.keys():
            written.balances[name].add(written.changes[name])
        self._keep_sums(connection, written.changes, sums)
        return written

    def _decide(self, connection: Connection, reserves: Sequence[Reserve], written: Written) -> None:
        """Refuse what does not fit; from here to the end of the transaction nobody else decides about these keys."""
        asking = {(one.key.id, period) for one in reserves if one.key for period in one.periods}
        if not asking:
            return
        if self.engine.dialect.name == "postgresql":  # SQLite has one writer at a time
            connection.execute(self._hold, {"ids": sorted({key_id for key_id, _ in asking})})
        written.balances = {one: Balance() for one in asking}
        for row in connection.execute(self._spent, {"names": sorted(asking)}):
            written.balances[row.key_id, row.period] = Balance(
                tokens=row.tokens,
                nano_usd=row.nano_usd,
                reserved_tokens=row.reserved_tokens,
                reserved_nano_usd=row.reserved_nano_usd,
            )
        then = {name: replace(balance) for name, balance in written.balances.items()}
        for one in reserves:
            if not one.key or not one.periods:
                continue
            error = refusal(one.key, then, one.tokens, one.nano_usd, one.arrival_us)
            if error:
                written.refused[one.request_id] = error
                continue
            more = Balance(reserved_tokens=one.tokens, reserved_nano_usd=one.nano_usd)
            for period in one.periods:
                then[one.key.id, period].add(more)

    def _undo(self, connection: Connection, there: _There, batch: Batch, sums: Sums, flows: Flows) -> None:
        """Undo what another gateway wrote of requests that had not ended: this one was alive, and knows better."""
        self._take_back.run(connection, [(request_id,) for request_id in there.interrupted])
        for request_id, old in there.interrupted.items():
            _count(sums, old, -1)
            _charge(flows, batch.endings[request_id].periods, old, -1)

    def _keep_sums(self, connection: Connection, changes: Balances, sums: Sums) -> None:
        """Add to the sums: in one order, so that gateways wait for each other in a row, never in a ring."""
        self._balance.run(connection, [(*name, *_amounts(changes[name])) for name in sorted(changes)])
        self._use.run(connection, [(*group, *sums[group].values()) for group in sorted(sums)])

    def _reservation(self, one: Reserve) -> tuple[Any, ...]:
        key_id = one.key.id if one.key else ""
        who = (one.request_id, self.owner, one.tenant, one.client, key_id, one.model, one.arrival_us)
        return (*who, one.tokens, one.nano_usd, 0, 0, 0, one.arrival_us)


def key_of(row: Any) -> Key:
    """Return a key from its row."""
    names = ("tokens_per_day", "tokens_per_month", "tokens_total")
    return msgspec.convert(
        {
            **{name: getattr(row, name) for name in ("id", "prefix", "tenant", "client", "created_us", "revoked_us")},
            "models": msgspec.json.decode(row.models),
            "quotas": {
                name: getattr(row, name) for name in (*names, *(n.replace("tokens", "nano_usd") for n in names))
            },
        },
        Key,
    )


def _look(connection: Connection, batch: Batch) -> _There:
    """Find out what of a batch is there already."""
    ids = list({**batch.reserves, **batch.endings})
    open_ids: set[str] = set()
    ended: dict[str, Settlement] = {}
    for start in range(0, len(ids), CHUNK):
        some = ids[start : start + CHUNK]
        open_ids |= set(connection.scalars(select(reservations.c.id).where(reservations.c.id.in_(some))))
        for row in connection.execute(select(completions).where(completions.c.id.in_(some))):
            ended[row.id] = settlement_of(row)
    early = {one for one, row in ended.items() if row.outcome == "interrupted" and one in batch.endings}
    early = {one for one in early if batch.endings[one].settlement.outcome != "interrupted"}
    return _There(
        open=frozenset(open_ids),
        settled=frozenset(ended.keys() - early),
        interrupted={request_id: ended[request_id] for request_id in sorted(early)},
    )


def settlement_of(row: Any) -> Settlement:
    """Return a settlement from its row."""
    names = (name for name in Settlement.__struct_fields__ if name not in {"request_id", "replicas"})
    fields = {name: getattr(row, name) for name in names}
    return Settlement(request_id=row.id, replicas=tuple(msgspec.json.decode(row.replicas)), **fields)


def _settled(
    batch: Batch, granted: dict[str, Reserve], refused: dict[str, QuotaError], there: _There | None
) -> tuple[list[Settlement], list[Reserve]]:
    """Return the settlements that are new, and the reservations that end with them."""
    settled, closed = [], []
    for request_id, ending in batch.endings.items():
        if not there or request_id not in there.settled:
            settled.append(ending.settlement)
        if not ending.reserved or request_id in refused:
            continue
        if not there or request_id in there.open or request_id in granted:
            closed.append(ending.reserved)
    return settled, closed


def _adding(insert: Any, sums: Sequence[str]) -> Any:
    """Return a statement that inserts a row, or adds to the one that is there."""
    column = insert.table.c
    return insert.on_conflict_do_update(
        index_elements=list(insert.table.primary_key),
        set_={name: column[name] + insert.excluded[name] for name in sums},
    )


class _Statement:
    """A statement for many rows, put into the database's words once: SQLAlchemy's way takes three times as long.

    Args:
        engine: of the database.
        statement: to put into words.
        names: of what a row holds, in its order; of an insertion, the table's columns.
    """

    def __init__(self, engine: Engine, statement: Any, names: Sequence[str] = ("request_id",)) -> None:
        columns = [column.name for column in statement.table.c] if statement.is_insert else None
        of_kind: Any = type(engine.dialect)
        dialect = of_kind(paramstyle="qmark" if engine.dialect.name == "sqlite" else "format")
        compiled = statement.compile(dialect=dialect, column_keys=columns)
        self._sql = str(compiled)
        assert compiled.positiontup == list(columns or names)  # noqa: S101 - or rows would be written askew

    def run(self, connection: Connection, rows: list[tuple[Any, ...]], *, each: bool = True) -> None:
        """Run it for each row; `each` must find what it expects."""
        if not rows:
            return
        filled: Any = rows
        done = connection.exec_driver_sql(self._sql, filled)
        if each and done.rowcount != len(rows):
            raise _StartOverError


BALANCE = ("tokens", "nano_usd", "reserved_tokens", "reserved_nano_usd")
_amounts = attrgetter(*BALANCE)
_note = attrgetter("prompt_tokens", "output_tokens", "nano_usd", "noted_us", "request_id")
_before_replicas = attrgetter("request_id", "tenant", "client", "key_id", "model")
_after_replicas = attrgetter(*[column.name for column in completions.c][6:])


def _completion(one: Settlement) -> tuple[Any, ...]:
    return (*_before_replicas(one), msgspec.json.encode(one.replicas).decode(), *_after_replicas(one))


def _flow(flows: Flows, one: Reserve, times: int) -> None:
    if one.periods and one.key:
        flow = flows.setdefault((one.key.id, one.periods), Balance())
        flow.reserved_tokens += times * one.tokens
        flow.reserved_nano_usd += times * one.nano_usd


def _charge(flows: Flows, of_periods: tuple[str, ...], one: Settlement, times: int) -> None:
    if of_periods and (one.prompt_tokens or one.output_tokens or one.nano_usd):
        flow = flows.setdefault((one.key_id, of_periods), Balance())
        flow.tokens += times * (one.prompt_tokens + one.output_tokens)
        flow.nano_usd += times * one.nano_usd


def _count(sums: Sums, one: Settlement, times: int) -> None:
    group = (day_of(one.arrival_us), one.tenant, one.client, one.key_id, one.model)
    row = sums.get(group)
    if row is None:
        row = sums[group] = dict.fromkeys(SUMS, 0)
    row["requests"] += times
    row[one.outcome] += times
    for name in AMOUNTS:
        row[name] += times * getattr(one, name)


def _interrupted(row: Any) -> Settlement:
    return Settlement(
        request_id=row.id,
        tenant=row.tenant,
        client=row.client,
        key_id=row.key_id,
        model=row.model,
        prompt_tokens=row.prompt_tokens,
        output_tokens=row.output_tokens,
        arrival_us=row.arrival_us,
        finish_us=row.noted_us,
        nano_usd=row.nano_usd,
        outcome="interrupted",
        reason="its gateway died; charged is what was noted last",
    )
