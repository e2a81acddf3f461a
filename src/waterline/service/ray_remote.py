"""What runs on another node of a Ray cluster, and the way there: it may be lost, and then nobody waits for it."""

import asyncio
import sys
import time
from contextlib import suppress
from typing import Any

from waterline.errors import EngineError
from waterline.service.child import ENDED_WITHIN_S, StillbornError
from waterline.service.ray_host import LEASE_S, Said, Started

STOPPED_WITHIN_S = ENDED_WITHIN_S + 1.0  # the way there and back included
PING_WITHIN_S = 2.0
PINGS_MISSED = 4  # in a row; then the node is silent
ENDED_AFTER_S = LEASE_S + 5.0  # from when a host heard of us last until what it had has ended, but for a grace


class Reach:
    """The way to the actor (`ray_host.Host`) of a node, until it is lost: then whoever waits for an answer is told.

    A host that hears nothing of us for `LEASE_S` ends what it has. So after `ENDED_AFTER_S`, and the grace of a run,
    nothing of it is left there, whether we can see that or not.
    """

    def __init__(self, actor: Any, where: str) -> None:
        self.actor = actor
        self.where = where
        self.runs: set[str] = set()  # that it holds
        self.is_dead = False  # the actor has ended
        self.told_s = time.monotonic()  # when it was told last that we are there
        self.cleaning: asyncio.Task[bool] | None = None
        self._missed = 0
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def lost(self) -> str:
        """Why it cannot be reached; nothing if it can."""
        return self._lost.result() if self._lost.done() else ""

    def lose(self, why: str) -> None:
        if not self._lost.done():
            self._lost.set_result(why)

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Return what it answers. Raises EngineError: what it says itself, or that it cannot be reached."""
        self._check()
        answer = asyncio.ensure_future(_answered(getattr(self.actor, method).remote(*arguments)))
        try:
            await asyncio.wait((answer, self._lost), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self._check()
            said = answer.result()
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"node {self.where} does not answer any more: {type(error).__name__}.") from error
        finally:
            answer.cancel()
        if isinstance(said, Said) and said.problem:
            raise (StillbornError if said.stillborn else EngineError)(f"on node {self.where}: {said.problem}")
        return said.value if isinstance(said, Said) else said

    def tell(self, method: str, *arguments: Any) -> None:
        if not self.lost:
            getattr(self.actor, method).remote(*arguments)

    async def ping(self) -> str:
        """Tell it that we are there; return why it is to be given up, if it is."""
        self.told_s = time.monotonic()
        if not (why := await silence(self.actor.hear.remote(), PING_WITHIN_S)):
            self._missed = 0
            return ""
        self._missed += 1
        if is_dead(why):
            self.is_dead = True
            return f"has lost our actor: {why}."
        return f"has been silent for {PINGS_MISSED * PING_WITHIN_S:g} s." if self._missed == PINGS_MISSED else ""

    async def clean(self) -> bool:
        """Have a node that was lost, and answers again, end all that it has; return whether it has."""
        if why := await silence(self.actor.ready.remote(), PING_WITHIN_S):
            self.is_dead = is_dead(why)
            return False
        return not await silence(self.actor.clean.remote(), None)

    def _check(self) -> None:
        if self.lost:
            raise EngineError(f"node {self.where} {self.lost}")


class RemoteChild:
    """The processes of one replica on their nodes: a `Running`."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._parts: list[tuple[Reach, str]] = []  # who has it, and what it is called there
        self._ends: list[asyncio.Task[str]] = []
        self.pid = 0  # of the first, on its node

    async def start(self, reach: Reach, key: str, started: Started) -> None:
        """Start the next of its processes. Raises EngineError."""
        pid: int = await reach.ask("start", key, self._replica, started, sys.executable)
        self._parts.append((reach, key))
        self.pid = self.pid or pid
        self._ends.append(asyncio.create_task(_words(reach, "ended", key)))

    @property
    def has_ended(self) -> bool:
        return any(end.done() for end in self._ends)

    async def announced_url(self) -> str:
        reach, key = self._parts[0]
        said: str = await reach.ask("url", key)
        return said

    async def ended(self) -> str:
        done, _ = await asyncio.wait(self._ends, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()

    async def last_words(self) -> str:
        if self.has_ended:
            return await self.ended()
        reach, key = self._parts[0]
        return await _words(reach, "last_words", key)

    async def stop(self, *, verify: bool = True) -> None:
        """End its processes; a node that is lost ends them itself.

        Not to `verify` is to leave the cluster: nobody waits then for a node that has just fallen silent.
        """
        for end in self._ends:
            end.cancel()
        stops = [reach.ask("stop", key, self._replica) for reach, key in self._parts]
        with suppress(TimeoutError):
            async with asyncio.timeout(None if verify else STOPPED_WITHIN_S):
                await asyncio.gather(*stops, return_exceptions=True)


class RemoteRun:
    """The holder of a run on its node: a `Holding`."""

    def __init__(self, reach: Reach, key: str, pid: int) -> None:
        self._reach, self._key = reach, key
        self.pid = pid

    def tell(self, data: bytes) -> None:
        self._reach.tell("tell", self._key, data)

    async def wait(self) -> int:
        code: int = await self._reach.ask("left", self._key)
        self._reach.runs.discard(self._key)
        return code


async def silence(answer: Any, within_s: float | None) -> str:
    """Return why an actor does not answer; nothing if it does."""
    try:
        async with asyncio.timeout(within_s):
            await answer
    except TimeoutError:
        return f"nothing within {within_s:g} s"
    except Exception as error:  # noqa: BLE001 - Ray has many for an actor that is dead, or cannot be reached
        *_, last = ("", *str(error).strip().splitlines())  # some say nothing
        return f"{type(error).__name__}, {last.rstrip('.')}".rstrip(", ")
    return ""


def is_dead(why: str) -> bool:
    """Whether an actor has ended for good, by what `silence` says."""
    return why.startswith("ActorDiedError")


async def _answered(reference: Any) -> Any:
    return await reference


async def _words(reach: Reach, method: str, key: str) -> str:
    try:
        return f"on node {reach.where}: {await reach.ask(method, key)}"
    except EngineError as error:
        return str(error)
