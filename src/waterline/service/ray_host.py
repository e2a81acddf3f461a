"""What runs on one node of a Ray cluster: it starts the engines of that node, and ends them with itself.

An actor, so that Ray keeps the node's GPUs for it and ends it with the service that has made it. A process of an engine
ends when nobody holds its standard input any more (see `lifeline`), and that is held here.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waterline.errors import EngineError
from waterline.service.child import Child, StillbornError, mark_of
from waterline.service.processes import end_marked, marked
from waterline.service.state import State

LOOK_AGAIN_S = 5.0  # for processes that hang in the kernel


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


class Host:
    """The processes of one node, by replica and rank; every method waits until there is an answer.

    Args:
        mark: of the service and the node; who bears it already was left behind by an earlier one, and is ended.
    """

    def __init__(self, mark: str) -> None:
        self._state = State(path=Path(mark))
        self._children: dict[str, Child] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._run(end_marked(mark))

    def ready(self) -> bool:
        return True

    def start(self, key: str, replica: str, started: Started, python: str) -> Said:
        """Start a process; `python` is what the service calls the interpreter, which is another one here."""
        first, *others = started.command
        command = (sys.executable if first == python else first, *others)
        mine = Started(command=command, environment=started.environment, input=started.input)
        said = self._try(Child.start(mine, self._state, replica))
        if said.problem:
            return said
        self._children[key] = said.value
        return Said(value=said.value.pid)

    def url(self, key: str) -> Said:
        return self._try(self._children[key].announced_url())

    def ended(self, key: str) -> Said:
        return self._try(self._children[key].ended())

    def last_words(self, key: str) -> Said:
        return self._try(self._children[key].last_words())

    def stop(self, key: str, replica: str) -> None:
        """End a process and all it has started; return when they are gone."""
        if child := self._children.pop(key, None):
            self._run(child.stop())
            while marked(mark_of(self._state, replica)):
                time.sleep(LOOK_AGAIN_S)

    def _try(self, work: Coroutine[Any, Any, Any]) -> Said:
        try:
            return Said(value=self._run(work))
        except EngineError as error:
            return Said(problem=str(error), stillborn=isinstance(error, StillbornError))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
