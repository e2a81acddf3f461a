"""What runs on one node of a Ray cluster: it starts the engines of that node, and ends them with itself.

An actor, so that Ray keeps the node's GPUs for it and ends it with the service that has made it. A process of an engine
ends when nobody holds its standard input any more (see `lifeline`), and that is held here.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waterline.errors import EngineError
from waterline.service.child import Child, StillbornError, mark_of
from waterline.service.jobs import Held, end_runs, mark_of_run, open_log
from waterline.service.processes import MARK, end_marked, marked
from waterline.service.state import State

LOOK_AGAIN_S = 5.0  # for processes that hang in the kernel
LEASE_S = 20.0  # whoever has heard nothing of the service for so long ends what he has: it may start it elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What is started: as much as a `Child` wants to know of an engine."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    input: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An answer to who has asked from another node, or why there is none."""

    value: Any = None
    problem: str = ""
    stillborn: bool = False


class Kept:
    """What runs on a node. Not in the actor itself: Ray has an actor with one coroutine do one thing at a time."""

    def __init__(self, mark: str, grace_s: float) -> None:
        self.heard_s = time.monotonic()  # of the service
        self.children: dict[str, Child] = {}  # by replica and rank
        self.held: dict[str, Held] = {}  # by run
        self.given_up: set[Held] = set()  # that we have ended ourselves
        self._mark = mark
        self._grace_s = grace_s

    async def mind_the_lease(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 20)
            if time.monotonic() - self.heard_s > LEASE_S and (self.children or self.held):
                await self.clean()

    async def clean(self) -> None:
        """End all that runs by now, jobs with their grace; return when it is gone."""
        children, held = dict(self.children), dict(self.held)
        for one in held.values():
            self.given_up.add(one)
            one.tell(f"{self._grace_s}\n".encode())
        await asyncio.gather(*(child.stop() for child in children.values()), *(one.wait() for one in held.values()))
        await asyncio.gather(*(end_marked(f"{self._mark}/{mark_of_run(run)}") for run in held))
        _forget(self.children, children)
        _forget(self.held, held)


def _forget(known: dict[str, Any], gone: Mapping[str, Any]) -> None:
    for key, one in gone.items():
        if known.get(key) is one:
            del known[key]


class Host:
    """The processes of one node, by replica and rank; every method waits until there is an answer.

    Args:
        mark: of the service and the node; who bears it already was left behind by an earlier one, and is ended.
        grace_s: for jobs among them to save their work.
    """

    def __init__(self, mark: str, grace_s: float) -> None:
        self._state = State(path=Path(mark))
        self._kept = Kept(mark, grace_s)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._run(end_marked(mark, grace_s))
        asyncio.run_coroutine_threadsafe(self._kept.mind_the_lease(), self._loop)

    def ready(self) -> bool:
        return True

    def hear(self) -> None:
        """Take note that the service is there."""
        self._kept.heard_s = time.monotonic()

    def clean(self) -> None:
        """End all that runs here, jobs with their grace; return when it is gone."""
        self._run(self._kept.clean())
        self.hear()

    def start(self, key: str, replica: str, started: Started, python: str) -> Said:
        """Start a process; `python` is what the service calls the interpreter, which is another one here."""
        first, *others = started.command
        command = (sys.executable if first == python else first, *others)
        mine = Started(command=command, environment=started.environment, input=started.input)
        said = self._try(Child.start(mine, self._state, replica))
        if said.problem:
            return said
        self._kept.children[key] = said.value
        return Said(value=said.value.pid)

    def url(self, key: str) -> Said:
        return self._try(self._kept.children[key].announced_url())

    def ended(self, key: str) -> Said:
        return self._try(self._kept.children[key].ended())

    def last_words(self, key: str) -> Said:
        return self._try(self._kept.children[key].last_words())

    def stop(self, key: str, replica: str) -> None:
        """End a process and all it has started; return when they are gone."""
        if child := self._kept.children.pop(key, None):
            self._run(child.stop())
            while marked(mark_of(self._state, replica)):
                time.sleep(LOOK_AGAIN_S)

    def hold(self, key: str, arguments: Sequence[str], environment: Mapping[str, str], log: str) -> Said:
        """Start the holder of a run; it writes its log here."""
        try:
            Path(log).parent.mkdir(parents=True, exist_ok=True)
            with open_log(Path(log)) as output:
                held = self._kept.held[key] = self._run(Held.start(arguments, self._marked(environment), output))
        except OSError as error:
            return Said(problem=f"cannot write its log {log}: {error.strerror}.")
        return Said(value=held.pid)

    def tell(self, key: str, data: bytes) -> None:
        if held := self._kept.held.get(key):
            self._loop.call_soon_threadsafe(held.tell, data)

    def left(self, key: str) -> Said:
        """Return the exit code of a holder, once it is gone."""
        if not (held := self._kept.held.get(key)):
            return Said(problem="its run is gone.")
        code = self._run(held.wait())
        if held in self._kept.given_up:
            self._kept.given_up.discard(held)
            return Said(problem=f"it was ended: nothing was heard of the service for {LEASE_S:g} s.")
        if self._kept.held.get(key) is held:
            del self._kept.held[key]
        return Said(value=code)

    def end(self, mark: str, grace_s: float) -> Said:
        """End who bears a mark; return the pids of those who hang."""
        return Said(value=self._run(end_runs(self._here(mark), grace_s)))

    def _marked(self, environment: Mapping[str, str]) -> dict[str, str]:
        return {**environment, MARK: self._here(environment[MARK])}

    def _here(self, mark: str) -> str:
        """Return the mark that a run bears on this node: ours, and what follows the service's own."""
        return f"{self._state.mark}/jobs/{mark.rpartition('/jobs/')[2]}"

    def _try(self, work: Coroutine[Any, Any, Any]) -> Said:
        try:
            return Said(value=self._run(work))
        except EngineError as error:
            return Said(problem=str(error), stillborn=isinstance(error, StillbornError))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
