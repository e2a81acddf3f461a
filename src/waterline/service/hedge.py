"""Hedging: a request whose first token is late is sent to a second engine as well, and the first to speak answers it.

Both are asked in tasks of their own, and neither touches the client before it speaks. Who speaks says so first
(`spoke`), which cancels the other in the same step of the event loop: what the client gets is what one engine has said.
Until then a failure of one of the two is nobody's news.

Source: J. Dean, L. A. Barroso, The Tail at Scale, Communications of the ACM 56 (2), 2013: hedged requests.
"""

import asyncio
from asyncio import Task
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from waterline.plan import Replica
from waterline.service.upstream import UnansweredError

Asking = Coroutine[Any, Any, None]


class Place(Protocol):
    """Where the request is, see `passage.Placement`."""

    def second(self, give_up: Callable[[], None]) -> Replica | None: ...
    def take_second(self) -> None: ...
    def drop_second(self) -> None: ...


class Failed(Protocol):
    """Told that one of the two has failed where the other goes on."""

    def __call__(self, error: UnansweredError, *, second: bool) -> None: ...


class Race:
    """One request at one engine, and after a while at another as well.

    Args:
        place: of the request.
        on_second: told that it is the second engine that goes on with the request, and again when that speaks.
        on_failure: told of a failure that ends nothing.
    """

    def __init__(self, place: Place, on_second: Callable[[], None], on_failure: Failed) -> None:
        self._place = place
        self._on_second = on_second
        self._on_failure = on_failure
        self._first: Task[None] | None = None  # while it may be the one that answers …
        self._second: Task[None] | None = None  # … likewise
        self._spoke = False

    async def run(self, first: Asking, after_s: float, ask_second: Callable[[Replica], Asking]) -> None:
        """Have it answered. Raises what either of them does who is asked alone, or is left."""
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(first)]
        self._first = tasks[0]
        try:
            await asyncio.wait(tasks, timeout=after_s)
            if not (tasks[0].done() or self._spoke) and (replica := self._place.second(self._drop_second)):
                tasks.append(loop.create_task(ask_second(replica)))
                self._second = tasks[1]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                self._settle(*tasks)
            await (self._first or tasks[1])
        finally:
            if self._first:
                self._drop_second()
            await _end(tasks)

    def spoke(self) -> None:
        """The engine that this task asks begins to answer: the other is given up at once."""
        if self._spoke:
            return
        self._spoke = True
        if asyncio.current_task() is self._second:
            self._go_second()
        else:
            self._drop_second()

    def _settle(self, first: Task[None], second: Task[None]) -> None:
        """See who goes on, now that one of the two has ended: it has lost, or failed, or answered already."""
        if self._spoke:
            return
        if second.done() or not self._second:
            error = None if second.cancelled() or not second.done() else second.exception()
            if isinstance(error, UnansweredError):
                self._on_failure(error, second=True)
            self._drop_second()
        elif isinstance(error := first.exception(), UnansweredError):  # else it is refused, and would be there
            self._on_failure(error, second=False)
            self._go_second()

    def _go_second(self) -> None:
        """Go on with the second alone."""
        if self._first:
            self._first.cancel()
            self._first = None
            self._place.take_second()
        self._on_second()

    def _drop_second(self) -> None:
        """Go on with the first alone, and give the place of the second back, if there is one."""
        if self._second:
            self._second.cancel()
            self._second = None
            self._place.drop_second()


async def _end(tasks: Sequence[Task[None]]) -> None:
    """Have nobody asked any more: it is answered, or has failed, or its client has left."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # it is known, or of no interest; else it would be logged as one that nobody saw
