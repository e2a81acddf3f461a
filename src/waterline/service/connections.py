"""Connections to engines: as little of HTTP/1.1 as it takes, kept for the next request, closed for a lost one.

llhttp parses what comes. Bytes that come in one read are handed on in one piece, and in the same step of the event
loop where whoever reads says how (a *tap*): a token of a stream wakes no task on its way.
"""

import asyncio
import base64
import ssl
from asyncio import Future
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache, partial
from typing import NamedTuple, Self, cast
from urllib.parse import quote, unquote, urlsplit

import httptools

from waterline.service.together import Together

CONNECT_WITHIN_S = 2.0
KEPT_S = 3.0  # without a request; most servers wait 5 s
SWEEP_EVERY_S = 1.0
MOST_UNREAD_BYTES = 2**17  # of a stream whose client is slow; then its engine has to wait
LONGEST_HEAD_BYTES = 2**17

Tap = Callable[[bytes], bool]  # takes what has come, or leaves it to whoever waits for it


class AbsentError(OSError):
    """Nobody takes a connection there, which was found out at once."""


class BrokenOffError(OSError):
    """The connection ended before the answer did, or what came is no HTTP."""


class Address(NamedTuple):
    """Where a server is."""

    host: str
    port: int
    secure: bool


class Response:
    """An answer that has begun: its status and headers have come, the rest of it comes."""

    def __init__(self, connection: "Connection", status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.headers = headers  # by name in small letters; of several with one name the first
        self.ended = False  # all of it has come
        self._connection: Connection | None = connection
        self._parts: deque[bytes] = deque()  # come, and not read
        self._unread_bytes = 0
        self._takes_all = False
        self._is_forgotten = False
        self._error: Exception | None = None
        self._tap: Tap | None = None
        self._waiter: Future[None] | None = None

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def read(self) -> bytes:
        """Return all of it. Raises BrokenOffError."""
        self._takes_all = True
        if self._connection:
            self._connection.resume()
        while not self.ended:
            await self._wait()
        if self._error:
            raise self._error
        whole = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        return whole

    async def read_some(self, tap: Tap | None = None) -> bytes | None:
        """Return what has come since, b"" at its end, None after `wake`. Raises BrokenOffError.

        While this waits, `tap` is offered what comes, and what it takes is not returned.
        """
        if not self._parts and not self.ended:
            self._tap = tap
            try:
                await self._wait()
            finally:
                self._tap = None
        if self._parts:
            some = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            self._unread_bytes = 0
            if self._connection:
                self._connection.resume()
            return some
        if self._error:
            raise self._error
        return b"" if self.ended else None

    def wake(self) -> None:
        """Have whoever waits in `read_some` look around."""
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """End it: where it has not come to its end, its connection is closed, and its engine stops."""
        if self._connection:
            self._connection.close()

    def close_unless_ended(self, within_s: float) -> None:
        """Have the connection used again if the answer ends soon, though nobody reads what is left of it."""
        self._is_forgotten = True
        self._parts.clear()
        if self._connection:
            self._connection.resume()
            asyncio.get_running_loop().call_later(within_s, self.close)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # --- What its connection calls ----------------------------------------------------------------------------------

    def came(self, data: bytes) -> bool:
        """Take what has come; False when that is enough for now."""
        if self._is_forgotten:
            return True
        if self._tap and not self._parts and self._waiter and not self._waiter.done():
            try:
                if self._tap(data):
                    if self._connection:
                        self._connection.runs()
                    return True
            except Exception as error:  # noqa: BLE001 - whoever waits raises it
                self._waiter.set_exception(error)
                return True
        self._parts.append(data)
        if self._takes_all:
            return True
        self._unread_bytes += len(data)
        self.wake()
        return self._unread_bytes <= MOST_UNREAD_BYTES

    def end(self, error: Exception | None = None) -> None:
        self.ended, self._error, self._connection = True, error, None
        self.wake()


class Connection(asyncio.Protocol):
    """One connection, with at most one request under way.

    Args:
        on_free: told when it may be used for another request.
        on_lost: told when it is gone.
        together: reads it while a stream runs by it, and by many others.
    """

    def __init__(
        self,
        on_free: "Callable[[Connection], None]",
        on_lost: "Callable[[Connection], None]",
        together: Together,
    ) -> None:
        self._on_free, self._on_lost, self._together = on_free, on_lost, together
        self._runs = False  # a stream whose tokens pass at once
        self._joined_fd = -1  # of its socket, while it is read together with others
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._is_paused = False
        self._asked: Future[Response] | None = None  # until its answer begins
        self._response: Response | None = None  # until it ends
        self._begin()
        self.kept_s = 0.0  # since when nothing was asked

    def _begin(self) -> None:
        """Get ready for the next head."""
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._in_head = True
        self._parts: list[bytes] = []  # of the read that is being parsed
        self._has_ended = self._keeps = False

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def _is_idle(self) -> bool:
        return self._asked is None and self._response is None

    def ask(self, request: bytes, body: bytes) -> "Future[Response]":
        """Send a request; the answer is there when it has begun. Its future raises BrokenOffError."""
        asked = self._asked = asyncio.get_running_loop().create_future()
        if not self._transport:  # it ended as soon as it was there
            self._fail(BrokenOffError("The connection ended."))
        elif len(body) < MOST_UNREAD_BYTES:
            self._transport.write(request + body)
        else:
            self._transport.writelines((request, body))
        return asked

    def close(self) -> None:
        self._abort()
        self._fail(BrokenOffError("The connection was closed."))

    def resume(self) -> None:
        if self._is_paused and self._transport:
            self._is_paused = False
            self._transport.resume_reading()

    def runs(self) -> None:
        """Its tokens pass at once, until its answer ends: it may be read together with others."""
        if not self._runs:
            self._runs = True
            self._together.running += 1
        elif self._joined_fd < 0 and self._together.are_many:
            self._join()

    def _join(self) -> None:
        """Be read together with others; TLS takes more than to read."""
        if self._transport and self.is_open and self._transport.get_extra_info("sslcontext") is None:
            self._transport.pause_reading()
            self._joined_fd = self._transport.get_extra_info("socket").fileno()
            self._together.join(self._joined_fd, self)

    def part(self) -> None:
        """Read for itself again, unless nobody is to read it."""
        if self._joined_fd >= 0:
            self._together.leave(self._joined_fd, self)
            self._joined_fd = -1
            if self._transport and self.is_open and not self._is_paused:
                self._transport.resume_reading()

    # --- What the event loop calls ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        problem: Exception | None = None
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            problem = error
        if self._parts:
            self._hand_on()
        if self._has_ended:  # whatever came behind it
            self._finish(keeps=not problem)
        elif problem or self._is_idle or (self._in_head and self._head_bytes > LONGEST_HEAD_BYTES):
            self._break_off(problem)

    def eof_received(self) -> None:
        """The other side has said all: without a length, that is the end of an answer."""
        if self._response and not self._in_head and not self._has_length():
            response, self._response = self._response, None
            response.end()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        self._transport = None
        self._on_lost(self)
        self._fail(BrokenOffError(str(error) if error else "The connection ended."))

    # --- What the parser calls --------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it is a trailer: nobody here has a use for one
            self._headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # the answer proper follows
            return
        if not self._asked:
            raise BrokenOffError("An answer came that nobody had asked for.")
        asked, self._asked, self._in_head = self._asked, None, False
        self._response = Response(self, status, self._headers)
        if not asked.done():
            asked.set_result(self._response)

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        if self._in_head:
            self._headers = {}
        else:
            self._has_ended, self._keeps = True, self._parser.should_keep_alive()

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _has_length(self) -> bool:
        codings = self._headers.get("transfer-encoding", "").lower()
        return codings.endswith("chunked") or (not codings and "content-length" in self._headers)

    def _hand_on(self) -> None:
        parts = self._parts
        if parts and self._response:
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            if not self._response.came(data) and self._transport and not self._is_paused:
                self._is_paused = True
                self._transport.pause_reading()
                self.part()
        parts.clear()

    def _finish(self, *, keeps: bool) -> None:
        """The answer has come to its end: the connection is free for the next request, if both sides keep it."""
        response, self._response = self._response, None
        self._stop()
        keeps = keeps and self._keeps and self.is_open
        if keeps and self._transport and not self._transport.get_write_buffer_size():
            self.resume()
            self._begin()
            self.kept_s = asyncio.get_running_loop().time()
            self._on_free(self)
        else:
            self._abort()
        if response:
            response.end()

    def _stop(self) -> None:
        """No stream runs by it any more."""
        self.part()
        self._together.running -= self._runs
        self._runs = False

    def _abort(self) -> None:
        self._stop()
        if self._transport:
            self._transport.abort()

    def _break_off(self, error: Exception | None) -> None:
        self._abort()
        broken = BrokenOffError("What came is no HTTP.")
        broken.__cause__ = error
        self._fail(broken)

    def _fail(self, error: BrokenOffError) -> None:
        asked, self._asked = self._asked, None
        response, self._response = self._response, None
        if asked and not asked.done():
            asked.set_exception(error)
        if response:
            response.end(error)


class Connections:
    """The client of all engines: as many connections as there are requests, and no limit on an answer's time.

    Connections are kept for the next request, and some servers close theirs without a word (llama.cpp after a stream,
    all of them when idle for a while). So a request that finds a dead one is sent again on a fresh one; an answer has
    no effect but itself, so asking twice does no harm.

    Args:
        hold_back: see `Together`.
    """

    def __init__(self, hold_back: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self._together = Together(hold_back)
        self._kept: defaultdict[Address, list[Connection]] = defaultdict(list)  # those used last stand last
        self._sweeping: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sweeping:
            self._sweeping.cancel()
        self._together.close()
        for kept in self._kept.values():
            for connection in tuple(kept):
                connection.close()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Response:
        """Return an answer that has begun; the caller closes it, or reads it to its end.

        Raises:
            AbsentError: there is nobody.
            BrokenOffError: the connection ended.
            TimeoutError: nobody takes the connection.
            ValueError: a header has an end of line in it.
        """
        address, start = _parsed(url)
        request = _head(start, headers, len(body))
        kept = self._kept[address]
        fresh_s = asyncio.get_running_loop().time() - KEPT_S
        while kept:
            connection = kept.pop()
            if not connection.is_open or connection.kept_s < fresh_s:
                connection.close()
                continue
            try:
                return await self._asked(connection, request, body)
            except BrokenOffError:  # it was dead, and the others may be
                break
        return await self._asked(await self._connected(address), request, body)

    async def _asked(self, connection: Connection, request: bytes, body: bytes) -> Response:
        answer = connection.ask(request, body)
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.cancelled():
                connection.close()
            elif not answer.exception():  # it came in the same moment; its connection may be somebody else's by now
                answer.result().close()
            raise

    async def _connected(self, address: Address) -> Connection:
        trust = _trust() if address.secure else None
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(partial(self._keep, address), partial(self._lose, address), self._together),
                    address.host,
                    address.port,
                    ssl=trust,
                )
        except TimeoutError:
            raise
        except OSError as error:
            raise AbsentError(str(error)) from error
        return connection

    def _keep(self, address: Address, connection: Connection) -> None:
        self._kept[address].append(connection)
        self._sweep_soon()

    def _lose(self, address: Address, connection: Connection) -> None:
        if connection in self._kept[address]:
            self._kept[address].remove(connection)

    def _sweep_soon(self) -> None:
        if not self._sweeping:
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP_EVERY_S, self._sweep)

    def _sweep(self) -> None:
        """Close what was not used for a while."""
        self._sweeping = None
        old_s = asyncio.get_running_loop().time() - KEPT_S
        for address, kept in tuple(self._kept.items()):
            self._kept[address] = [connection for connection in kept if connection.kept_s >= old_s]
            for connection in kept:
                if connection.kept_s < old_s:
                    connection.close()
        if any(self._kept.values()):
            self._sweep_soon()
        else:
            self._kept.clear()


@cache
def _trust() -> ssl.SSLContext:
    return ssl.create_default_context()


@lru_cache(maxsize=4096)  # a replica has three or four of them
def _parsed(url: str) -> tuple[Address, bytes]:
    """Return the address in a URL, and how a request to it begins."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    host = (parts.hostname or "").encode("idna").decode() if not (parts.hostname or "").isascii() else parts.hostname
    address = Address(host or "", parts.port or (443 if secure else 80), secure)
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{parts.query}" if parts.query else "")
    named = parts.netloc.rpartition("@")[2]
    head = f"POST {path} HTTP/1.1\r\nhost: {named}\r\n"
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        head += f"authorization: Basic {base64.b64encode(user.encode()).decode()}\r\n"
    return address, head.encode("latin-1")


def _head(start: bytes, headers: Mapping[str, str], size: int) -> bytes:
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers) or "\0" in lines:
        raise ValueError("A header has an end of line in it.")
    return b"%b%bcontent-length: %d\r\n\r\n" % (start, lines.encode("latin-1"), size)
