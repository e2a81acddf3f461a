"""Streams that run, read together: a gateway that wakes for each token spends more on waking than on tokens.

Where many run at a time, what their engines send is left in the sockets for a few milliseconds. Then all of it is read,
all of it is looked at, and all of it is written: three short programs in a row, each of which stays in the processor's
caches, where token by token they drive each other out. Nobody waits longer for a first token: a stream is read so from
its third on.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from selectors import EVENT_READ, DefaultSelector
from typing import Protocol

MANY = 32  # streams that run at a time
EVERY_S = 0.004
READ_BYTES = 2**16


class Stream(Protocol):
    """A connection that an answer comes by."""

    def data_received(self, data: bytes) -> None: ...

    def part(self) -> None:
        """Read for itself again: it ended, or failed, which the event loop tells better."""
        ...

    def close(self) -> None: ...


class Together:
    """Reads the streams that have joined, every few milliseconds.

    Args:
        hold_back: in whose `with` block what is written is held back, and is sent at its end.
    """

    def __init__(self, hold_back: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self.running = 0  # streams; whoever runs counts itself
        self._hold_back = hold_back
        self._selector: DefaultSelector | None = None  # while there is something to read
        self._timer: asyncio.TimerHandle | None = None

    @property
    def are_many(self) -> bool:
        return self.running >= MANY

    def join(self, fd: int, stream: Stream) -> None:
        """Read a stream from now on; nobody else may."""
        if not self._selector:
            self._selector = DefaultSelector()
        with suppress(KeyError):  # of one whose end is not known yet, though its descriptor is in use again
            self._selector.unregister(fd)
        self._selector.register(fd, EVENT_READ, stream)
        if not self._timer:
            self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._read)

    def leave(self, fd: int, stream: Stream) -> None:
        if self._selector and (key := self._selector.get_map().get(fd)) and key.data is stream:
            self._selector.unregister(fd)

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._selector:
            self._selector.close()
        self._selector = self._timer = None

    def _read(self) -> None:
        assert self._selector  # noqa: S101 - the timer runs while there is one
        self._timer = None
        came: list[tuple[Stream, bytes]] = []
        for key, _ in self._selector.select(0):
            data = b""
            with suppress(OSError):
                data = os.read(key.fd, READ_BYTES)
            came.append((key.data, data))
        with self._hold_back():
            for stream, data in came:
                self._tell(stream, data)
        if self._selector and self._selector.get_map():
            self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._read)

    def _tell(self, stream: Stream, data: bytes) -> None:
        """Give a stream what has come of it; one that cannot bear it is closed, and the others get theirs."""
        try:
            if data:
                stream.data_received(data)
            else:
                stream.part()
        except Exception as error:  # noqa: BLE001 - as an event loop does
            stream.close()
            asyncio.get_running_loop().call_exception_handler({"message": "a stream", "exception": error})
