"""What a connection may cost before anybody knows whose it is: bytes and time of its headers, and time to read.

uvicorn parses HTTP; this keeps whoever sends it within bounds, at no cost for a token. Bodies have theirs in `asgi`.
"""

import asyncio
import re
import resource
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache, partial
from http import HTTPStatus
from typing import Any, ClassVar, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from waterline.errors import InputError
from waterline.service.errors import RejectedError, error_json

LONGEST_HEAD_BYTES = 65_536
MOST_HEADERS = 100
MOST_AHEAD = 16  # requests sent ahead on one connection before the first was answered
MOST_UNREAD_BYTES = 2**24  # of a body whose request was answered before its end
LINGERS_S = 1.0  # a connection that was refused, for its client to read why
FILES_KEPT = 128  # descriptors that are not for clients: engines' pipes, the ledger, the log
FILES_PER_REQUEST = 2  # its client's connection, and one to an engine
MOST_FILES = 2**20
UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
CHUNKED = b"transfer-encoding: chunked\r\n"
# Keys of the scope: what this server tells beside ASGI.
SLOW = "waterline.slow"  # its client was cut, because it did not read
ON_GONE = "waterline.on_gone"  # takes what to call when the client goes away
WRITE = "waterline.write"  # sends a part of a stream that has begun, at once, and tells whether there is room for more
BODY = "waterline.body"  # returns the body, if all of it has come; else None


@cache
def room_for_connections() -> int:
    """Raise the limit of open files as far as we may; return how many clients it has room for.

    Raises InputError where that is nobody.
    """
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MOST_FILES if allowed == resource.RLIM_INFINITY else min(allowed, MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, allowed))
    if files < FILES_KEPT + FILES_PER_REQUEST:
        raise InputError(
            f"{files} files may be open at a time here, and {FILES_KEPT} of them are for engines, the ledger and the "
            "log: nobody could connect. Allow more: ulimit -n 65536, or LimitNOFILE=65536 in the unit of systemd."
        )
    return (files - FILES_KEPT) // FILES_PER_REQUEST


class GuardedProtocol(HttpToolsProtocol):
    """One connection. Who exceeds a bound is told so in OpenAI's words where HTTP still allows it, and closed."""

    head_within_s: ClassVar[float] = 20.0  # from the opening of a connection, or the first byte of a request, on
    read_within_s: ClassVar[float] = 30.0  # for a client to make room in its full buffers; then it is cut
    rest_within_s: ClassVar[float] = 30.0  # of a body whose request was answered before its end
    most_connections: ClassVar[int] = 0  # of one server; 0: as many as files can be open
    _held: "ClassVar[list[tuple[asyncio.Transport, bytes]] | None]" = None  # parts of streams, to be sent in a moment

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0
        self._unread_bytes = 0  # of a body whose request has been answered before its end
        self._problem: RejectedError | None = None
        self._refused = False
        self._answering: RequestResponseCycle | None = None  # `cycle` is the request that was read last
        self._on_gone: Callable[[], object] | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        most = self.most_connections or room_for_connections()
        if len(self.connections) > most:
            self._refuse(_too_many(most))
        else:
            self._head_timer = self.loop.call_later(self.head_within_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._read_timer, self._rest_timer):
            if timer:
                timer.cancel()
        super().connection_lost(exc)
        if self._on_gone:
            self._on_gone()

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
            if UPGRADE.search(data):
                data = _without_upgrade(data)
            if not self._head_timer:
                self._head_timer = self.loop.call_later(self.head_within_s, self._head_is_late)
        super().data_received(data)
        if self._in_head and self._head_bytes > LONGEST_HEAD_BYTES and not self._refused:
            self._refuse(_head_too_large(f"more than {LONGEST_HEAD_BYTES} bytes"))

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MOST_AHEAD:
            raise self._rejected(_too_far_ahead())
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer: nobody here has a use for one
            return
        if len(self.headers) >= MOST_HEADERS:
            raise self._rejected(_head_too_large(f"more than {MOST_HEADERS} of them"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._head_bytes > LONGEST_HEAD_BYTES and self._head_is_large():  # it came in one piece
            raise self._rejected(_head_too_large(f"more than {LONGEST_HEAD_BYTES} bytes"))
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() != "1.0"):  # RFC 9112, 3.2
            raise self._rejected(_wrong_host(hosts))
        self._in_head, self._head_bytes, self._unread_bytes = False, 0, 0
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None
        scope = cast("dict[str, Any]", self.scope)
        scope[ON_GONE] = self.when_gone
        super().on_headers_complete()
        is_old = scope["http_version"] == "1.0"
        if is_old:  # where a stream has no other end
            self.cycle.keep_alive = False
        self.cycle.transport = cast("asyncio.Transport", _HeadFirst(self.transport, self.loop, is_old=is_old))
        scope[WRITE] = partial(self._write, self.cycle)
        scope[BODY] = partial(self._body, self.cycle)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _head_is_large(self) -> bool:
        """Tell whether it was the head that was large, and not what came with it."""
        lines = sum(len(name) + len(value) + 4 for name, value in self.headers)
        return len(self.url) + lines > LONGEST_HEAD_BYTES

    def when_gone(self, tell: Callable[[], object] | None) -> None:
        """Call this when the client goes away; one request is answered at a time, and the last one who asks is told."""
        self._on_gone = tell
        if tell and self.transport.is_closing():
            self.loop.call_soon(tell)

    def _body(self, cycle: RequestResponseCycle) -> bytes | None:
        """Return what came with the headers, as most bodies do: nobody has to wait, and no clock has to run."""
        return None if cycle.more_body or self.flow.read_paused else bytes(cycle.body)

    def _write(self, cycle: RequestResponseCycle, data: bytes) -> bool:
        """Send a part of a stream: ASGI would take a coroutine and a message for each."""
        if cycle.disconnected:
            return False
        part = b"%x\r\n%b\r\n" % (len(data), data)
        if self._held is None:
            cycle.transport.write(part)
        else:
            self._held.append((cycle.transport, part))
        return not self.flow.write_paused

    @staticmethod
    @contextmanager
    def hold_back() -> Iterator[None]:
        """Hold back parts of streams that are to be sent at once, of all connections, until the end of this block."""
        held = GuardedProtocol._held = []
        try:
            yield
        finally:
            GuardedProtocol._held = None
            for transport, part in held:
                if not transport.is_closing():
                    transport.write(part)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.cycle.response_complete:
            self._unread_bytes += len(body)
            if self._unread_bytes > MOST_UNREAD_BYTES:
                self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_head and self.cycle.response_complete:  # nobody waits for the rest
            self._rest_timer = self.loop.call_later(self.rest_within_s, self.transport.abort)

    def on_message_complete(self) -> None:
        self._in_head = True
        if self._rest_timer:
            self._rest_timer.cancel()
            self._rest_timer = None
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(self._problem or RejectedError(msg, code="bad_http"))

    def pause_writing(self) -> None:
        super().pause_writing()
        if not self._read_timer:
            self._read_timer = self.loop.call_later(self.read_within_s, self._reader_is_slow)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer:
            self._read_timer.cancel()
            self._read_timer = None

    def _rejected(self, problem: RejectedError) -> RejectedError:
        """Keep the reason: the parser would swallow it."""
        self._problem = problem
        return problem

    def _head_is_late(self) -> None:
        if self._head_bytes:
            self._refuse(RejectedError(f"The headers did not come within {self.head_within_s:g} s.", status=408))
        else:
            self.transport.close()

    def _reader_is_slow(self) -> None:
        if self._answering:
            cast("dict[str, Any]", self._answering.scope)[SLOW] = True
        self.transport.abort()

    def _refuse(self, error: RejectedError) -> None:
        """Say why, and close, once; who has a part of an answer already is not told in the middle of it."""
        if self._refused:
            return
        answering = self._answering
        if answering and not answering.response_complete:
            if answering.response_started:
                self.transport.close()
                return
            answering.disconnected = True
            answering.message_event.set()
            if self._on_gone:
                self._on_gone()
        data = error_json(error)
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\nconnection: close\r\n\r\n"
        )
        self._refused = True
        self.transport.write(head.encode() + data)
        if self.transport.can_write_eof():  # to close at once would reset the connection, and the answer might be lost
            self.transport.write_eof()
            self.loop.call_later(LINGERS_S, self.transport.close)
        else:
            self.transport.close()


class _HeadFirst:
    """Sends the head of an answer together with what follows at once: a packet less, and a call of the system.

    A client of HTTP/1.0 knows no chunks: it gets what is in them, until the connection ends.
    """

    __slots__ = ("_head", "_is_first", "_is_old", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, *, is_old: bool) -> None:
        self._transport, self._loop = transport, loop
        self._head, self._is_first, self._is_old = b"", True, is_old

    def write(self, data: bytes) -> None:
        if self._is_first:
            if self._is_old:
                self._is_old = CHUNKED in data
                data = data.replace(CHUNKED, b"", 1)
            self._head, self._is_first = data, False
            self._loop.call_soon(self._flush)
            return
        if self._is_old:
            data = _unchunked(data)
        self._head, head = b"", self._head
        if data := head + data if head else data:
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def _flush(self) -> None:
        if self._head and not self._transport.is_closing():
            self._transport.write(self._head)
        self._head = b""


def _without_upgrade(data: bytes) -> bytes:
    """Hide that a client would rather speak HTTP/2 (Java's does, and curl --http2): the parser would drop its body."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return UPGRADE.sub(b"\r\nx-grade:", head) + end + rest


def _unchunked(data: bytes) -> bytes:
    """Return what is in some whole chunks."""
    parts = []
    while data:
        size, _, rest = data.partition(b"\r\n")
        parts.append(rest[: int(size, 16)])
        data = rest[int(size, 16) + 2 :]
    return b"".join(parts)


def was_slow(scope: MutableMapping[str, Any]) -> bool:
    """Tell whether a client that is gone was cut because it did not read."""
    return SLOW in scope


def _too_many(most: int) -> RejectedError:
    return RejectedError(
        f"{most} connections are open, and that is all there is room for.",
        status=503,
        code="too_many_connections",
        headers={"retry-after": "1"},
    )


def _head_too_large(what: str) -> RejectedError:
    return RejectedError(f"The headers are too large: {what}.", status=431, code="headers_too_large")


def _wrong_host(hosts: int) -> RejectedError:
    return RejectedError(
        f"There {'are' if hosts else 'is'} {hosts or 'no'} Host header{'s' if hosts else ''}. Send one.",
        code="bad_http",
    )


def _too_far_ahead() -> RejectedError:
    return RejectedError(
        f"More than {MOST_AHEAD} requests were sent ahead. Wait for answers, or open more connections.",
        code="too_far_ahead",
    )
