"""The little of HTTP that the gateway and the fake engine share: a server, a body, a reply, a client that leaves."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import uvicorn

from waterline.errors import WaterlineError
from waterline.service.errors import (
    LONGEST_BODY_BYTES,
    RejectedError,
    error_headers,
    error_json,
    http_status,
    retry_after,
    shortened,
)
from waterline.service.limits import BODY, ON_GONE, GuardedProtocol

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Result = TypeVar("Result")

JSON = (b"content-type", b"application/json")
BODY_WITHIN_S = 30.0
MOST_COMING_BYTES = 2**30  # of bodies that are not whole yet, over all connections
KEEP_ALIVE_S = 75  # longer than clients do: one that closes as they ask again looks like a failure


class ClientGoneError(Exception):
    """The client has closed its connection: there is nobody left to answer."""


class Edit(Protocol):
    """What an engine's answer is made into on its way to a client. Chunks end where a line does."""

    def whole(self, data: bytes) -> bytes: ...

    def chunk(self, data: bytes) -> bytes: ...

    def last(self, data: bytes) -> bytes:
        """Return the end of a stream."""
        ...

    def broken(self, error: WaterlineError) -> bytes:
        """Return the end of a stream that failed on the way."""
        ...


class Reply:
    """What goes back to one client, and how far it has got; `headers` come with every answer.

    Args:
        send: of ASGI.
        headers: come with every answer.
        write: sends a part of a stream that has begun, at once, and tells whether there is room for more.
    """

    def __init__(
        self, send: Send, headers: Headers | None = None, write: Callable[[bytes], bool] | None = None
    ) -> None:
        self._send = send
        self._write = write
        self.headers = headers or []
        self.edit: Edit | None = None
        self.before: Callable[[], Awaitable[None]] | None = None  # awaited before the first byte of an answer
        self.after: Callable[[], Awaitable[None]] | None = None  # awaited before its last one, when it is whole
        self.begun = False
        self.is_flowing = False  # a stream has begun, and `push` may be called
        self._within_event = False

    async def begin(self, status: int, headers: Headers) -> None:
        if self.before and status == 200:
            await self.before()
        await self._begin(status, headers)

    async def _begin(self, status: int, headers: Headers) -> None:
        self.begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": [*self.headers, *headers]})

    async def chunk(self, data: bytes) -> None:
        """Send a part of a stream, when its client has made room for it."""
        if data := self._edited(data):
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self.is_flowing = self._write is not None

    def push(self, data: bytes) -> None:
        """Send a part of a stream that flows."""
        assert self._write  # noqa: S101 - or it would not flow
        if data := self._edited(data):
            self.is_flowing = self._write(data)

    def _edited(self, data: bytes) -> bytes:
        if self.edit:
            data = self.edit.chunk(data)
        if data:
            self._within_event = not data.endswith(b"\n\n")
        return data

    async def end(self, data: bytes = b"") -> None:
        """End a stream."""
        if self.after:
            await self.after()
        await self._finish(self.edit.last(data) if self.edit else data)

    async def whole(self, status: int, data: bytes, headers: Headers) -> None:
        if self.edit and status == 200:
            data = self.edit.whole(data)
        if status == 200:
            if self.before:  # it may say no, and then there is nothing to charge
                await self.before()
            if self.after:
                await self.after()
        await self._begin(status, [*headers, (b"content-length", b"%d" % len(data))])
        await self._finish(data)

    async def error(self, error: WaterlineError) -> None:
        """Answer with an error; in the middle of a stream, as its last event."""
        if not self.begun:
            await self.whole(http_status(error), error_json(error), [JSON, *error_headers(error)])
        elif self.edit:
            await self._finish(self.edit.broken(error))
        else:
            await self._finish(b"\n" * self._within_event + broken_event(error))

    async def _finish(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data})


def broken_event(error: WaterlineError) -> bytes:
    """Return the last event of a stream that failed, as OpenAI's clients expect it."""
    return b"data: " + error_json(error) + b"\n\n"


async def read_body(
    scope: Scope, receive: Receive, longest_bytes: int = LONGEST_BODY_BYTES, within_s: float = BODY_WITHIN_S
) -> bytes:
    """Return the body of a request.

    Raises RejectedError when it is longer than that, without keeping it, or takes longer, or is compressed;
    ClientGoneError when the client leaves before its end.
    """
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.lower() != b"identity":
            raise _compressed(value)
    if (at_once := scope.get(BODY)) and (body := at_once()) is not None and len(body) <= longest_bytes:
        return cast("bytes", body)
    try:
        async with asyncio.timeout(within_s):
            return await _read_body(scope, receive, longest_bytes)
    except TimeoutError:
        raise RejectedError(
            f"The body did not come within {within_s:g} s.", status=408, code="request_timeout"
        ) from None


async def _read_body(scope: Scope, receive: Receive, longest_bytes: int) -> bytes:
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if declared.isdigit() and int(declared) > longest_bytes:
        raise _too_long(longest_bytes)
    message = await receive()
    if message["type"] != "http.disconnect" and not message.get("more_body", False):  # the usual one comes in one piece
        return _bounded(message.get("body", b""), longest_bytes)
    parts = bytearray()
    try:
        while message["type"] != "http.disconnect":
            part = message.get("body", b"")
            parts += part
            _coming.take(len(part))
            if len(parts) > longest_bytes:
                raise _too_long(longest_bytes)
            if not message.get("more_body", False):
                return bytes(parts)
            message = await receive()
        raise ClientGoneError
    finally:
        _coming.give_back(len(parts))


class _Coming:
    """How much has come of bodies that are not whole yet."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, size: int) -> None:
        """Raise RejectedError when that is more than there is room for."""
        self.bytes += size
        if self.bytes > MOST_COMING_BYTES:
            raise RejectedError(
                f"More than {MOST_COMING_BYTES} bytes of requests are on their way here. Come back in a moment.",
                status=503,
                code="too_many_bytes",
                headers=retry_after(1),
            )

    def give_back(self, size: int) -> None:
        self.bytes -= size


_coming = _Coming()


def _bounded(body: bytes, longest_bytes: int) -> bytes:
    if len(body) > longest_bytes:
        raise _too_long(longest_bytes)
    return body


def _compressed(how: bytes) -> RejectedError:
    return RejectedError(
        f"The body is compressed ({shortened(how.decode('latin-1'))}). Send it as it is.",
        status=415,
        code="unsupported_encoding",
        headers={"accept-encoding": "identity"},
    )


def _too_long(longest_bytes: int) -> RejectedError:
    return RejectedError(
        f"The body is longer than {longest_bytes} bytes. Send a shorter prompt.", status=413, code="body_too_large"
    )


async def unless_disconnected(work: Coroutine[Any, Any, Result], scope: Scope, receive: Receive) -> Result:
    """Do the work; when the client goes away first, cancel it and raise ClientGoneError. The body has been read."""
    if when_gone := scope.get(ON_GONE):
        return await _unless_told(work, when_gone)
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


async def _unless_told(
    work: Coroutine[Any, Any, Result], when_gone: Callable[[Callable[[], object] | None], None]
) -> Result:
    """Do the same without a task that waits for the client: our own server tells."""
    task, is_gone = asyncio.current_task(), False
    assert task is not None  # noqa: S101 - a coroutine runs in a task

    def leave() -> None:
        nonlocal is_gone
        is_gone = True
        task.cancel()

    when_gone(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if not is_gone:
            raise
        task.uncancel()
        raise ClientGoneError from None
    finally:
        when_gone(None)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class HttpServer(uvicorn.Server):
    """A uvicorn that leaves signals to us and logs nothing.

    Args:
        app: that answers.
        grace_s: for what is under way when it stops.
        protocol: of its connections.
        proxies: addresses or networks whose `X-Forwarded-For` says who their clients are.
    """

    def __init__(
        self,
        app: App,
        grace_s: int = 1,
        protocol: type[GuardedProtocol] = GuardedProtocol,
        proxies: Sequence[str] = (),
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                lifespan="off",
                ws="none",
                access_log=False,
                log_config=None,
                log_level="critical",
                timeout_keep_alive=KEEP_ALIVE_S,
                server_header=False,
                proxy_headers=bool(proxies),  # else whoever is on this machine could pretend to be anybody
                forwarded_allow_ips=list(proxies),
                timeout_graceful_shutdown=grace_s,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
