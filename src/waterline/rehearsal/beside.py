"""What goes on beside the event loop, each on a thread of its own: drawing traffic, and writing down what came of it.

Compiled code lets other threads run meanwhile. What they do is done in the same order as without them, one thing after
the other, so the results are the same bytes.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

Thing = TypeVar("Thing")
MOST_WAITING = 2  # so that memory does not fill where one thread is slower than the other


def ahead(things: Iterator[Thing]) -> Iterator[Thing]:
    """Yield the same things, each made while whoever asks is still busy with the one before."""
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = thread.submit(next, things, None)
        while (thing := coming.result()) is not None:
            coming = thread.submit(next, things, None)
            yield thing


class Behind:
    """Does things in the order in which it is told, and raises at `do` or at the end what one of them raised."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "behind")
        self._waiting: deque[Future[None]] = deque()

    def do(self, thing: Callable[[], None]) -> None:
        while len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(thing))

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=error is not None)
        while self._waiting and error is None:
            self._waiting.popleft().result()
