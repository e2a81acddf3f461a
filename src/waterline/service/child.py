"""One engine process, from its first line to its last."""

import asyncio
import os
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol
from urllib.parse import quote

import orjson
import structlog

from waterline.errors import EngineError
from waterline.service.engines.seat import environment_of
from waterline.service.processes import end_marked
from waterline.service.state import State

GRACE_S = 1.0  # between asking a process to end and ending it
ENDED_WITHIN_S = GRACE_S + 0.5  # all of it, and to have seen that
LAST_LINES = 200  # of standard error are kept
LAST_BYTES = 64 * 1024

log = structlog.get_logger()


class StillbornError(EngineError):
    """It ended by itself before it said where it listens: started again, it would do the same."""


ENGINES = "engines"  # what the marks of all replicas begin with


def run_of(replica: str) -> str:
    return f"{ENGINES}/{quote(replica, safe='')}"


def mark_of(state: State, replica: str) -> str:
    """Return what the processes of a replica bear."""
    return f"{state.mark}/{run_of(replica)}"


class Startable(Protocol):
    """What is started: as much of an `Engine` as a process needs."""

    @property
    def command(self) -> tuple[str, ...]: ...

    @property
    def environment(self) -> Mapping[str, str]: ...

    @property
    def input(self) -> bytes: ...


class Running(Protocol):
    """The process of an engine, wherever it runs; see `Child`."""

    @property
    def pid(self) -> int: ...

    @property
    def has_ended(self) -> bool: ...

    async def announced_url(self) -> str: ...

    async def ended(self) -> str: ...

    async def last_words(self) -> str: ...

    async def stop(self, *, verify: bool = True) -> None: ...


class Child:
    """A running engine process in a process group of its own, so that a terminal's Ctrl-C does not reach it."""

    def __init__(self, process: Process, mark: str = "") -> None:
        self._process = process
        self._mark = mark
        self._errors = bytearray()
        self._readers = [asyncio.ensure_future(self._keep_errors())]

    @classmethod
    async def start(cls, engine: Startable, state: State | None = None, replica: str = "") -> "Child":
        """Start the process and hand it its input. Raises EngineError when there is no such program.

        With the state of a service, its processes bear a mark and are found wherever they have gone.
        """
        mark = state.environment(run_of(replica)) if state else {}
        try:
            process = await asyncio.create_subprocess_exec(
                *engine.command,
                stdin=PIPE,  # kept open: it ends when we do, however we end
                stdout=PIPE,
                stderr=PIPE,
                env={**environment_of(engine.environment, os.environ), **mark},
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(f"cannot start {engine.command[0]}: {error.strerror}.") from error
        assert process.stdin is not None  # noqa: S101 - we asked for a pipe
        process.stdin.write(engine.input)  # should it never read, it will not say where it listens either
        return cls(process, mark_of(state, replica) if state else "")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    async def announced_url(self) -> str:
        """Return where it listens, as it says itself. Raises EngineError when it does not."""
        assert self._process.stdout is not None  # noqa: S101 - we asked for a pipe
        try:
            url = str(orjson.loads(await self._process.stdout.readline())["url"])
        except (ValueError, TypeError, KeyError) as error:  # no JSON, or a line without end
            words = await self.last_words()
            raise (StillbornError if (self._process.returncode or 0) > 0 else EngineError)(words) from error
        self._readers.append(asyncio.ensure_future(_discard(self._process.stdout)))
        return url

    async def ended(self) -> str:
        """Wait for the process to end by itself, and say how it did."""
        await self._process.wait()
        return await self.last_words()

    async def last_words(self) -> str:
        """Say how the process has ended, or that it must, with what it left on standard error."""
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await self._process.wait()
                await self._readers[0]
        code = self._process.returncode
        how = (
            "talked nonsense" if code is None else f"was ended by {_signal_name(-code)}" if code < 0 else f"exit {code}"
        )
        lines = self._errors.decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        return f"{how}. Its last words:\n" + "\n".join(f"  {line}" for line in lines) if lines else f"{how}."

    async def stop(self, *, verify: bool = True) -> None:
        """End the process and all it has started: politely, then not. Returns when it is gone.

        `verify`: look for those who have left its group; else the caller does, for many at once.
        """
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(GRACE_S):
                await self._process.wait()
        except TimeoutError:
            pass
        finally:
            self.signal(signal.SIGKILL)  # whoever is left of its group
            await self._process.wait()
            for reader in self._readers:
                reader.cancel()
            if verify and self._mark and (left := await end_marked(self._mark)):
                log.error("hang in the kernel: their GPUs are not free", pids=[process.pid for process in left])

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def _keep_errors(self) -> None:
        assert self._process.stderr is not None  # noqa: S101 - we asked for a pipe
        while data := await self._process.stderr.read(LAST_BYTES):
            self._errors += data
            del self._errors[:-LAST_BYTES]


async def _discard(stream: asyncio.StreamReader) -> None:
    while await stream.read(LAST_BYTES):
        pass


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
