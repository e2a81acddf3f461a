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
    """Where the request is, see `asking.Placement`."""

    def second(self, on_lost: Callable[[], None]) -> Replica | None: ...
    def take_second(self) -> None: ...
    def drop_second(self) -> None: ...


class Listener(Protocol):
    """Told what becomes of the two."""

    def goes_second(self) -> None:
        """It is the second that goes on with the request; told again when that speaks."""
        ...

    def failed(self, error: UnansweredError, *, second: bool) -> None:
        """One of them has failed, which ends nothing: the other goes on."""
        ...

    def was_beaten(self, *, second: bool) -> None:
        """One of them has said nothing when the other spoke."""
        ...


class Race:
    """One request at one engine, and after a while at another as well.

    Args:
        place: of the request.
        listener: told what becomes of the two.
    """

    def __init__(self, place: Place, listener: Listener) -> None:
        self._place = place
        self._listener = listener
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
            if not (tasks[0].done() or self._spoke) and (replica := self._place.second(self._lose_second)):
                tasks.append(loop.create_task(ask_second(replica)))
                self._second = tasks[1]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                self._settle()
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
        is_second = asyncio.current_task() is self._second
        other = self._first if is_second else self._second  # None where this one goes on alone
        if other and not self._has_failed(other, second=not is_second):
            self._listener.was_beaten(second=not is_second)
        if is_second:
            self._go_second()
        else:
            self._drop_second()

    def _settle(self) -> None:
        """See who goes on, now that one of the two has ended: it has lost, or failed, or answered already."""
        if self._spoke or not self._second:
            return
        if self._second.done():
            self._has_failed(self._second, second=True)
            self._drop_second()
        elif self._first and self._has_failed(self._first, second=False):  # else it is refused, and would be there
            self._go_second()

    def _has_failed(self, task: Task[None], *, second: bool) -> bool:
        """Tell of a failure that ends nothing, if it was one."""
        error = task.exception() if task.done() and not task.cancelled() else None
        if isinstance(error, UnansweredError):
            self._listener.failed(error, second=second)
            return True
        return False

    def _go_second(self) -> None:
        """Go on with the second alone."""
        if self._first:
            self._first.cancel()
            self._first = None
            self._place.take_second()
        self._listener.goes_second()

    def _drop_second(self) -> None:
        """Go on with the first alone, and give the place of the second back, if there is one."""
        if self._second:
            self._lose_second()
            self._place.drop_second()

    def _lose_second(self) -> None:
        """Go on with the first alone: the place of the second is somebody else's now."""
        if self._second:
            self._second.cancel()
            self._second = None


async def _end(tasks: Sequence[Task[None]]) -> None:
    """Have nobody asked any more: it is answered, or has failed, or its client has left."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # it is known, or of no interest; else it would be logged as one that nobody saw
