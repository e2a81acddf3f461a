"""The thread that writes: everything that has gathered while the last commit was on its way goes into the next one."""

import math
import threading
import time
from collections.abc import Callable

import structlog

from waterline.errors import LedgerError
from waterline.ledger.batch import Batch, Written

GATHER_S = 0.005  # between the beginnings of two commits: under load a commit is shared by what came meanwhile
IDLE_S = 1.0  # between looks around
LATE_S = 0.5  # a commit that takes so long is no commit yet
PATIENCE_S = 5.0  # for a reservation; its client is told then, and may come back
RETRY_S = (0.05, 0.2, 1.0)  # after a failure; the last again and again
FAREWELL_S = 10.0  # for what is left at the end

log = structlog.get_logger()


class Writer:
    """Writes batches, one after the other, until it is closed.

    Args:
        take: returns what has gathered, together with a batch that could not be written.
        write: writes it, or raises LedgerError.
        written: told what came of a batch.
        gave_up: told whose reservations could not be made in `PATIENCE_S`.
        lost: told what can never be written.
        look_around: called about once a second.
    """

    def __init__(
        self,
        *,
        take: Callable[[Batch | None], Batch],
        write: Callable[[Batch], Written],
        written: Callable[[Batch, Written], None],
        gave_up: Callable[[Batch, LedgerError], None],
        lost: Callable[[Batch, LedgerError], None],
        look_around: Callable[[], None],
    ) -> None:
        self._take, self._write, self._written = take, write, written
        self._gave_up, self._lost = gave_up, lost
        self._look_around = look_around
        self.problem = ""  # why nothing can be written just now
        self._begun_s = math.inf  # when the batch was begun that is being written
        self.left = 0  # requests that have ended and could not be written by the end
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        if not self._wake.is_set():  # who clears it takes what has gathered after that
            self._wake.set()

    @property
    def is_late(self) -> bool:
        """Whether what was tried last could not be written, or takes longer than a healthy disk does."""
        return bool(self.problem) or time.monotonic() - self._begun_s > LATE_S

    @property
    def trouble(self) -> str:
        """Why nothing new should wait for the database: it has taken none of a batch for longer than anybody waits."""
        waited_s = time.monotonic() - self._begun_s
        return (self.problem or f"it has not answered for {waited_s:.0f} s") if waited_s > PATIENCE_S else ""

    def close(self) -> bool:
        """Write what is left, and end; False when the database keeps the thread, which then ends with the program."""
        self._closing.set()
        self._wake.set()
        self._thread.join(FAREWELL_S + PATIENCE_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        begun_s = looked_s = time.monotonic()
        while True:
            self._wake.wait(IDLE_S)
            self._closing.wait(max(0.0, begun_s + GATHER_S - time.monotonic()))
            self._wake.clear()
            begun_s = time.monotonic()
            closing = self._closing.is_set()  # asked before what is left is taken, so that nothing comes after it
            batch = self._take(None)
            if batch:
                self._write_down(batch)
            if closing:
                return
            if begun_s - looked_s > IDLE_S:
                looked_s = begun_s
                self._look()

    def _look(self) -> None:
        try:
            self._look_around()
            self.problem = ""
        except LedgerError as error:
            self._remember(error)
        except Exception:  # this thread must not end
            log.exception("a bug in the ledger")

    def _write_down(self, batch: Batch) -> None:
        self._begun_s = time.monotonic()
        try:
            self._insist(batch)
        except Exception:
            log.exception("a bug in the ledger")
            for part in batch.parts():
                try:
                    self._insist(part)
                except Exception:
                    log.exception("cannot be written", lost=[ending.settlement for ending in part.endings.values()])
                    self._lost(part, LedgerError("The ledger has a bug; its log says where."))
        finally:
            self._begun_s = math.inf

    def _remember(self, error: LedgerError) -> None:
        """Say what is wrong, once."""
        if self.problem != str(error):
            self.problem = str(error)
            log.warning("ledger", error=self.problem)

    def _insist(self, batch: Batch) -> None:
        """Write a batch, however often it takes; who waits for a reservation is let go in time."""
        begun_s, tries = time.monotonic(), 0
        while True:
            try:
                written = self._write(batch)
            except LedgerError as error:
                waited_s = time.monotonic() - begun_s
                self._remember(error)
                batch.careful = True
                if batch.reserves and (waited_s > PATIENCE_S or self._closing.is_set()):
                    self._gave_up(batch, error)
                if not batch or (self._closing.is_set() and waited_s > FAREWELL_S):
                    self.left = len(batch.endings)
                    return
            else:
                self.problem = ""
                self._written(batch, written)
                return
            time.sleep(RETRY_S[min(tries, len(RETRY_S) - 1)])
            batch = self._take(batch)  # nobody is to wait behind it without end
            tries += 1
