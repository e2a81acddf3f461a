"""Keeps engines alive: starts them, watches them, restarts what fails, drains who has to go, leaves nothing behind."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import aiohttp
import structlog

from waterline.errors import EngineError
from waterline.service.child import ENDED_WITHIN_S, ENGINES, Child, Running, StillbornError, mark_of
from waterline.service.engines import Engine, NotReadyError
from waterline.service.processes import end_marked, marked
from waterline.service.state import State

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
HEALTHY_S = 60.0  # after so long a failure is taken for a new one
PROBE_STARTING_EVERY_S = 0.1
# A probe waits `engines.ANSWER_S`. Threads that do not decode answer it, so an engine is silent so long only when it
# hangs or the machine does. Doubt is cheap and comes with the first miss; a restart is dear and wants three in a row.
PROBE_EVERY_S = 1.0
PROBES_FAILED = 3
START_ATTEMPTS = 2  # of an engine that does not end by itself at once
LOOK_AGAIN_S = 5.0
LOOK_EVERY_S = 0.05  # whether a draining replica has finished

log = structlog.get_logger()

Launch = Callable[[Engine, State | None, str], Awaitable[Running]]
Status = Literal["starting", "ready", "suspect", "backing off", "draining", "stopped"]
STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """How a replica is; a new record for every change."""

    status: Status
    url: str = ""  # of its API when it is ready, with /v1
    served_name: str = ""  # what its engine calls the model
    pid: int | None = None  # of its process, if it is ours
    restarts: int = 0
    reason: str = ""  # why it is suspect or backing off
    delay_s: float = 0.0  # how long
    load_s: float = 0.0  # what its start took the last time; 0 where that is not known


def next_delay_s(delay_s: float, healthy_s: float) -> float:
    """Return how long to wait before the next start, after the last wait and the time it was ready since."""
    if delay_s == 0.0 or healthy_s >= HEALTHY_S:
        return FIRST_DELAY_S
    return min(2 * delay_s, LONGEST_DELAY_S)


class Supervisor:
    """The engines of a service, by the id of their replica. They come and go.

    Args:
        engines: what to run or reach at first.
        session: the client its questions go through.
        on_change: told the id of a replica and its new state.
        under_way: how many requests a replica has; a drain waits for them.
        state: whose mark the processes bear; None: only their groups are known.
        launch: starts the process of an engine.
        clock, sleep: of the event loop, or of a test.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        session: aiohttp.ClientSession,
        on_change: Callable[[str, ReplicaState], None],
        *,
        under_way: Callable[[str], int] = lambda _replica: 0,
        state: State | None = None,
        launch: Launch = Child.start,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.engines = dict(engines)
        self.states = {replica: ReplicaState(status="stopped") for replica in engines}
        self._session = session
        self._on_change = on_change
        self._under_way = under_way
        self._state = state
        self._launch = launch
        self._clock = clock
        self._sleep = sleep
        self._children: dict[str, Running] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._draining: set[str] = set()
        self._load_s: dict[str, float] = {}
        self._stopping = False

    async def start(self) -> None:
        """Start all engines; return when each of ours has been ready once and each attached server has been asked.

        Raises EngineError with its last words when one of ours cannot be started. The others keep running: the caller
        stops them. An attached server that does not answer is asked again for ever.
        """
        loop = asyncio.get_running_loop()
        firsts = {replica: loop.create_future() for replica in self.engines}
        self._keepers = {replica: asyncio.create_task(self._keep(replica, first)) for replica, first in firsts.items()}
        try:
            await asyncio.gather(*firsts.values())
        finally:
            for first in firsts.values():
                first.cancel()

    def begin(self, replica: str, engine: Engine) -> None:
        """Start one more; one that cannot be started is tried again after longer and longer waits, as one that fails.

        The first word about it comes after the caller has left the event loop to others.
        """
        assert replica not in self._keepers, f"{replica} runs already"  # noqa: S101 - whoever asks keeps count
        self.engines[replica], self.states[replica] = engine, ReplicaState(status="stopped")
        first = asyncio.get_running_loop().create_future()
        first.set_result(None)  # nobody waits for it
        self._keepers[replica] = asyncio.create_task(self._keep(replica, first))

    async def drain(self, replica: str, within_s: float) -> None:
        """Give a replica no more work, let it finish what it has, end it and forget it; return when it is gone.

        That is within the time given: what has not finished in time to end its process is cut.
        """
        cut_s = self._clock() + within_s - ENDED_WITHIN_S
        keeper, was_ready = self._keepers[replica], self.states[replica].status in {"ready", "suspect"}
        if was_ready:
            self._change(replica, replace(self.states[replica], status="draining", reason=""))
        self._draining.add(replica)
        while was_ready and not keeper.done() and self._under_way(replica) and self._clock() < cut_s:
            await self._sleep(LOOK_EVERY_S)
        self._draining.discard(replica)
        self._change(replica, ReplicaState(status="stopped"))  # before the grace of its process: who is left is cut
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        mark = mark_of(self._state, replica) if self._state else ""
        while mark and len(await asyncio.to_thread(marked, mark)):
            await self._sleep(LOOK_AGAIN_S)  # it hangs in the kernel, which has been said: its GPUs are not free
        for known in (self._keepers, self.engines, self.states, self._load_s):
            known.pop(replica, None)

    async def stop(self) -> None:
        """Stop all engines at once; return when every process is gone."""
        self._stopping = True
        keepers = list(self._keepers.values())
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        if self._state:
            await end_marked(f"{self._state.mark}/{ENGINES}")
        for replica in self.states:
            self._change(replica, ReplicaState(status="stopped"))

    async def _keep(self, replica: str, first: asyncio.Future[None]) -> None:
        delay_s, restarts, ours = 0.0, 0, bool(self.engines[replica].command)
        try:
            while True:
                load_s = self._load_s.get(replica, 0.0)
                if ours or not restarts:  # to ask an attached server once more is not to start it
                    self._change(replica, ReplicaState(status="starting", restarts=restarts, load_s=load_s))
                healthy_s, problem = await self._run(replica, restarts, first)
                reason = f"The engine of replica '{replica}' failed: {problem}" if ours else str(problem)
                hopeless = isinstance(problem, StillbornError) or restarts + 1 == START_ATTEMPTS
                if ours and hopeless and not first.done():
                    first.set_exception(EngineError(reason))
                    return
                delay_s = next_delay_s(delay_s, healthy_s)
                backing_off = ReplicaState(status="backing off", restarts=restarts, reason=reason, delay_s=delay_s)
                load_s = self._load_s.get(replica, 0.0)
                self._change(replica, replace(backing_off, load_s=load_s))  # before the grace of its process: no work
                if not ours and not first.done():
                    first.set_result(None)
                await self._end(replica)
                if replica in self._draining:
                    return
                await self._sleep(delay_s)
                restarts += 1
        finally:
            await self._end(replica)

    async def _end(self, replica: str) -> None:
        if child := self._children.get(replica):
            await child.stop(verify=not self._stopping)
            del self._children[replica]

    async def _run(self, replica: str, restarts: int, first: asyncio.Future[None]) -> tuple[float, EngineError]:
        """Run an engine until it fails; return for how long it was ready, and what went wrong."""
        engine, child, begun_s, ready_s = self.engines[replica], None, self._clock(), float("inf")
        try:
            if engine.command:
                child = self._children[replica] = await self._launch(engine, self._state, replica)
            url, name = await self._until_ready(engine, child)
            ready_s = self._clock()
            pid = child.pid if child else None
            self._load_s[replica] = ready_s - begun_s if child else 0.0
            ready = ReplicaState(status="ready", url=url, served_name=name, pid=pid, restarts=restarts)
            self._change(replica, ready)
            if not first.done():
                first.set_result(None)
            problem = await self._until_failed(replica, ready, child)
        except EngineError as error:
            problem = error
        except Exception as error:
            log.exception("a bug in the supervisor", id=replica)
            problem = EngineError(f"a bug in Waterline, {error!r}.")
        return max(0.0, self._clock() - ready_s), problem

    async def _until_ready(self, engine: Engine, child: Running | None) -> tuple[str, str]:
        """Return where the engine listens and what it calls the model. Raises EngineError when it fails before."""
        if not child:
            return engine.url, await engine.served_name(self._session, engine.url)
        deadline_s = self._clock() + engine.start_within_s
        try:
            async with asyncio.timeout(engine.start_within_s):
                url = await child.announced_url()
        except TimeoutError:
            raise EngineError(f"it did not say where it listens within {engine.start_within_s:g} s.") from None
        while True:
            try:
                return url, await engine.served_name(self._session, url)
            except NotReadyError as error:
                if child.has_ended:
                    raise EngineError(await child.last_words()) from error
                if self._clock() >= deadline_s:
                    raise EngineError(f"{error} (waited {engine.start_within_s:g} s)") from error
            await self._sleep(PROBE_STARTING_EVERY_S)

    async def _until_failed(self, replica: str, ready: ReplicaState, child: Running | None) -> EngineError:
        """Watch a ready engine; return why it is no longer. From the first missed probe on it gets no new work."""
        engine, failed = self.engines[replica], 0
        ended = asyncio.ensure_future(child.ended()) if child else asyncio.get_running_loop().create_future()
        try:
            while True:
                pause = asyncio.ensure_future(self._sleep(PROBE_EVERY_S))
                await asyncio.wait((ended, pause), return_when=asyncio.FIRST_COMPLETED)
                pause.cancel()
                if ended.done():
                    return EngineError(ended.result())
                try:
                    await engine.served_name(self._session, ready.url)
                    failed = 0
                    self._change(replica, ready)
                except NotReadyError as error:
                    failed += 1
                    if failed == PROBES_FAILED:
                        return error
                    self._change(replica, replace(ready, status="suspect", reason=str(error)))
        finally:
            ended.cancel()

    def _change(self, replica: str, state: ReplicaState) -> None:
        if replica in self._draining and state.status in {"ready", "suspect"}:
            return  # it answers still, and is told so to nobody
        if state != self.states[replica]:
            self.states[replica] = state
            try:
                self._on_change(replica, state)
            except Exception:
                log.exception("a bug in who is told about replicas", id=replica)
