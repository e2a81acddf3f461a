"""The ledger as the gateway uses it: quotas are kept, and what became of every request is written down once.

What a caller may rely on:

- `reserve` answers from memory when a key's quotas have room, and waits for the database only when they may not.
- `Reservation.durable` returns when it is on the disk: from then on the request is in the ledger, whatever dies.
- `settle` is done when the row is on the disk. Told again, it changes nothing.
"""

import asyncio
import secrets
import threading
import time
from asyncio import AbstractEventLoop, Future
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import structlog
from sqlalchemy import Engine, func, select

from waterline.errors import LedgerError, QuotaError
from waterline.ledger.batch import Batch, Books, Ending, Note, Reserve, Written, key_of
from waterline.ledger.database import connect, in_words, reading
from waterline.ledger.displaced import DisplacedError, save
from waterline.ledger.keys import hash_of
from waterline.ledger.presence import left_behind, presence
from waterline.ledger.quotas import Balance, Balances, Room, fits, periods, tightest
from waterline.ledger.records import MOST_OF_A_REQUEST, Key, Settlement, storable, utc_us
from waterline.ledger.tables import keys, reservations
from waterline.ledger.writer import PATIENCE_S, Writer

PRESENCE_S = 10.0  # between looks for gateways that have died
MOST_WAITING = 50_000  # rows in memory, while the database is away, with those of requests that it let nobody begin
CACHED = 100_000  # balances in memory; beyond that they are read again

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A request that has been let in."""

    request_id: str
    done: "Future[None]"

    async def durable(self) -> None:
        """Wait until it is on the disk; let no byte of the answer out before.

        Raises:
            QuotaError: another gateway has spent the rest of the quota a moment before.
            LedgerError: the ledger cannot be written.
        """
        if not self.done.done():
            await asyncio.wait((self.done,), timeout=PATIENCE_S)
            if not self.done.done():  # the writer hangs in the database, which may take it yet: settle it
                raise LedgerError(f"the ledger has not answered for {PATIENCE_S:g} s.")
        self.done.result()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """How far what is written lags behind what was done."""

    waiting_rows: int
    lag_s: float  # since the oldest of them came
    problem: str  # why they cannot be written; "" when they can


class Ledger:
    """One gateway's hold on the ledger, to be used in a `with` block: at its end what has gathered is written."""

    def __init__(self, engine: Engine) -> None:
        """Begin; see `open`."""
        self.engine = engine
        self.owner = secrets.token_hex(4)
        self._books = Books(engine, self.owner)
        self._presence = presence(engine, self.owner)
        self._lock = threading.Lock()  # of all that follows: event loops and the writer's thread meet here
        self._batch = Batch()
        self._in_flight = Batch()
        self._notes: dict[str, Note] = {}
        self._under_way: dict[str, Reserve] = {}
        self._doubtful: set[str] = set()  # reservations that failed, and may have been made all the same
        self._balances: Balances = {}  # as the last commit that decided about them left them
        self._pending: Balances = {}  # reserved since
        self._without_row = 0  # requests that could not begin, and so many that not even that is written down
        self._keys: dict[str, Key] = {}  # by the hash of their secrets
        self._keys_by_id: dict[str, Key] = {}
        self._keys_counted = (-1, -1)
        self._saved = ""  # what was done about a ledger whose file is gone
        self._looked_s = time.monotonic()
        with in_words(engine):
            self._presence.hold()
        self._read_keys()
        self._bury()
        self._writer = Writer(
            take=self._take,
            write=self._write,
            written=self._on_written,
            gave_up=self._on_gave_up,
            lost=self._on_lost,
            look_around=self._look_around,
        )

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the ledger at a path or a URL, bring its tables up to date, and settle what dead gateways left open.

        Raises:
            InputError: that is neither a path nor a URL we know.
            MissingExtraError: PostgreSQL without psycopg.
            LedgerError: it cannot be reached or used, or is newer than this program.
        """
        return cls(connect(url))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what is left. Raises LedgerError when that cannot be done in ten seconds, or it hangs for fifteen."""
        if self._writer.close():
            self._presence.leave()
            self.engine.dispose()
            left = self._writer.left
        else:
            with self._lock:
                left = len(self._in_flight.endings) + len(self._batch.endings)
        if left:
            raise LedgerError(
                f"{left} requests that have ended could not be written to the ledger: of each is charged what was "
                f"noted last. The reason: {self._writer.problem or 'it does not answer.'}"
            )

    def find_key(self, secret: str) -> Key | None:
        """Return the key of a secret, from memory: one that was made or revoked elsewhere is known within a second.

        It may be revoked: look at `revoked_us`.
        """
        return self._keys.get(hash_of(secret))

    async def reserve(
        self,
        *,
        request_id: str,
        tenant: str,
        client: str,
        key: Key | None,
        model: str,
        tokens: int,
        nano_usd: int,
        arrival_us: int,
    ) -> Reservation:
        """Set aside the most that a request may use: `tokens` in and out, and money.

        The answer comes at once when memory says that there is room; then `Reservation.durable` has the last word.
        However it ends, and also when this raises: `settle` it.

        Raises:
            QuotaError: a quota of the key has no room for it.
            LedgerError: the ledger cannot be asked.
        """
        if trouble := self._writer.trouble:  # to wait for it would be for nothing, and so would be what an engine did
            raise LedgerError(trouble)
        one = Reserve(
            request_id=request_id,
            tenant=tenant,
            client=client,
            key=key,
            model=model,
            arrival_us=arrival_us,
            tokens=min(tokens, MOST_OF_A_REQUEST),
            nano_usd=min(nano_usd, MOST_OF_A_REQUEST),
            periods=periods(key, arrival_us),
        )
        with self._lock:
            room = self._has_room(one)
            done: Future[None] = asyncio.get_running_loop().create_future()
            batch = self._gathering()
            done = batch.reserving.setdefault(request_id, done)
            batch.reserves[request_id] = self._under_way[request_id] = one
        self._writer.wake()
        reservation = Reservation(request_id=request_id, done=done)
        if not room:
            await reservation.durable()
        return reservation

    def room(self, key: Key) -> tuple[Room | None, Room | None]:
        """Return the quotas of a key that have least left, of tokens and of nano-dollars, as far as memory knows."""
        with self._lock:
            return tightest(key, self._balances, utc_us())

    def note(self, reservation: Reservation, *, prompt_tokens: int, output_tokens: int, nano_usd: int) -> None:
        """Say how far a request has come, now and then: that is charged should this process be killed.

        All notes that come between two commits are written with the next.
        """
        note = Note(
            request_id=reservation.request_id,
            prompt_tokens=min(prompt_tokens, MOST_OF_A_REQUEST),
            output_tokens=min(output_tokens, MOST_OF_A_REQUEST),
            nano_usd=min(nano_usd, MOST_OF_A_REQUEST),
            noted_us=utc_us(),
        )
        with self._lock:
            first = not self._notes
            self._notes[reservation.request_id] = note
        if first:
            self._writer.wake()

    def settle(self, settlement: Settlement) -> "Future[None]":
        """Write down what became of a request, once: what is told again is left as it is.

        It will be written also when nobody awaits the future, which is done when the row is on the disk.
        """
        written: Future[None] = asyncio.get_running_loop().create_future()
        settlement = storable(settlement)
        request_id = settlement.request_id
        with self._lock:
            reserved = self._under_way.pop(request_id, None)
            if not reserved and settlement.outcome == "failed" and self._is_crowded():
                self._without_row += 1
                written.set_result(None)
                return written
            limited = reserved.periods if reserved else periods(self._key(settlement.key_id), settlement.arrival_us)
            ending = Ending(settlement=settlement, periods=limited, reserved=reserved)
            batch = self._gathering()
            batch.endings.setdefault(request_id, ending)
            batch.ending.append(written)
            self._notes.pop(request_id, None)
            if request_id in self._doubtful:
                self._doubtful.discard(request_id)
                batch.careful = True
        self._writer.wake()
        return written

    @property
    def is_troubled(self) -> bool:
        """Whether it is unlikely that what ends now is on the disk in a moment."""
        return self._writer.is_late

    def lag(self) -> Lag:
        """Return how far the disk is behind."""
        with self._lock:
            batches = [batch for batch in (self._in_flight, self._batch) if batch.rows]
            oldest_s = min((batch.since_s for batch in batches), default=time.monotonic())
            return Lag(
                waiting_rows=sum(batch.rows for batch in batches),
                lag_s=time.monotonic() - oldest_s,
                problem=self._writer.problem or self._writer.trouble,
            )

    def _gathering(self) -> Batch:
        """Return the batch that is written next; the lock is held."""
        if not self._batch:
            self._batch.since_s = time.monotonic()
        return self._batch

    def _is_crowded(self) -> bool:
        return len(self._in_flight.endings) + len(self._batch.endings) >= MOST_WAITING

    def _key(self, key_id: str) -> Key | None:
        return self._keys_by_id.get(key_id)

    def _has_room(self, one: Reserve) -> bool:
        """Return whether memory is sure that a request fits, and count it as pending."""
        if not one.key or not one.periods:
            return True
        expected: Balances = {}
        sure = True
        for period in one.periods:
            pending = self._pending.setdefault((one.key.id, period), Balance())
            committed = self._balances.get((one.key.id, period))
            sure = sure and committed is not None
            expected[one.key.id, period] = balance = Balance()
            balance.add(committed or Balance())
            balance.add(pending)
            pending.add(Balance(reserved_tokens=one.tokens, reserved_nano_usd=one.nano_usd))
        return sure and fits(one.key, expected, one.tokens, one.nano_usd, one.arrival_us)

    # --- What the writer's thread calls -----------------------------------------------------------------------------

    def _take(self, stuck: Batch | None = None) -> Batch:
        """Return what has gathered, added to what could not be written yet."""
        with self._lock:
            batch, self._batch = self._batch, Batch()
            if stuck:
                stuck.absorb(batch)
                batch = stuck
            self._in_flight = batch
            batch.notes |= self._notes
            self._notes = {}
        return batch

    def _write(self, batch: Batch) -> Written:
        with self._saving():
            return self._books.write(batch)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Save what is in a ledger that is found displaced in this block, once."""
        try:
            yield
        except DisplacedError as error:
            self._saved = self._saved or save(self.engine)
            raise LedgerError(f"{error} {self._saved}") from error
        self._saved = ""

    def _on_written(self, batch: Batch, written: Written) -> None:
        with self._lock:
            self._in_flight = Batch()
            self._no_longer_pending(batch.reserves.values())
            if len(self._balances) > CACHED:
                self._balances.clear()
            for name, change in written.changes.items():
                if name in self._balances:
                    self._balances[name].add(change)
            self._balances |= written.balances
            for request_id in written.refused:
                self._under_way.pop(request_id, None)
            without_row, self._without_row = self._without_row, 0
        if without_row:
            log.warning("ledger", requests_that_could_not_begin_and_have_no_row=without_row)
        _tell(batch, written.refused)

    def _on_gave_up(self, batch: Batch, error: LedgerError) -> None:
        """Let go who waits for a reservation; the endings of the batch stay in it."""
        with self._lock:
            self._no_longer_pending(batch.reserves.values())
            self._doubtful |= batch.reserves.keys()
        _tell(Batch(reserving=batch.reserving), dict.fromkeys(batch.reserves, error))
        batch.reserves, batch.reserving = {}, {}

    def _on_lost(self, batch: Batch, error: LedgerError) -> None:
        self._on_gave_up(batch, error)
        with self._lock:
            self._in_flight = Batch()
        _tell(batch, {}, error)

    def _no_longer_pending(self, reserves: Iterable[Reserve]) -> None:
        for one in reserves:
            for period in one.periods:
                name = (one.key.id if one.key else "", period)
                pending = self._pending[name]
                pending.add(Balance(reserved_tokens=-one.tokens, reserved_nano_usd=-one.nano_usd))
                if pending == Balance():
                    del self._pending[name]

    def _look_around(self) -> None:
        with self._saving():
            self._read_keys()
        if time.monotonic() - self._looked_s > PRESENCE_S:
            self._looked_s = time.monotonic()
            with in_words(self.engine):
                self._presence.hold()
            self._bury()

    def _read_keys(self) -> None:
        """Read the keys again when there are more of them, or more revoked ones; nothing else of a key changes."""
        with reading(self.engine) as connection:
            counted = connection.execute(select(func.count(), func.count(keys.c.revoked_us)).select_from(keys)).one()
            if tuple(counted) != self._keys_counted:
                self._keys = {row.hash: key_of(row) for row in connection.execute(select(keys))}
                self._keys_by_id = {key.id: key for key in self._keys.values()}
                self._keys_counted = (counted[0], counted[1])

    def _bury(self) -> None:
        """Settle what gateways have left open whose lock is free: they are dead."""
        with reading(self.engine) as connection:
            owners = set(connection.scalars(select(reservations.c.owner).distinct())) | left_behind(self.engine)
        for owner in sorted(owners - {self.owner}):
            lock = presence(self.engine, owner)
            with in_words(self.engine):
                dead = lock.hold()
            if dead:
                try:
                    left_open = self._books.recover(owner)
                finally:
                    lock.leave()
                if left_open:
                    log.warning("ledger", gateway=owner, died_with_open_requests=left_open)


def _tell(
    batch: Batch, errors: "dict[str, LedgerError] | dict[str, QuotaError]", lost: LedgerError | None = None
) -> None:
    """Tell those who wait for a batch, each in its own event loop."""
    loops: dict[AbstractEventLoop, list[tuple[Future[None], Exception | None]]] = {}
    for request_id, future in batch.reserving.items():
        loops.setdefault(future.get_loop(), []).append((future, errors.get(request_id)))
    for future in batch.ending:
        loops.setdefault(future.get_loop(), []).append((future, lost))
    for loop, told in loops.items():
        try:
            loop.call_soon_threadsafe(_resolve, told)
        except RuntimeError:  # that loop has ended, and nobody waits any more
            continue


def _resolve(told: list[tuple["Future[None]", Exception | None]]) -> None:
    for future, error in told:
        if future.done():
            continue
        if error:
            future.set_exception(error)
            future.exception()  # nobody may be there to ask; then it need not be reported as forgotten
        else:
            future.set_result(None)
