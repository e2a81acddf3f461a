"""What a stranger's connection may cost: raw sockets against a server on whose clock time passes when a test says so."""

import asyncio
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import accumulate
from typing import Any

import orjson
import pytest
from serving import until

from waterline.errors import InputError
from waterline.service import asgi
from waterline.service.asgi import (
    ClientGoneError,
    HttpServer,
    Receive,
    Reply,
    Scope,
    Send,
    read_body,
    unless_disconnected,
)
from waterline.service.errors import RejectedError
from waterline.service.limits import (
    LONGEST_HEAD_BYTES,
    MOST_AHEAD,
    MOST_HEADERS,
    WRITE,
    GuardedProtocol,
    room_for_connections,
    was_slow,
)
from waterline.service.server import listen

HELLO = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi"


class Clock:
    """The event loop, but for what is to happen later: that happens when `go_on` says that so much time has passed."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.now_s = 0.0
        self._timers: list[asyncio.TimerHandle] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_later(self, delay_s: float, callback: Callable[..., object], *arguments: Any) -> asyncio.TimerHandle:
        self._timers.append(asyncio.TimerHandle(self.now_s + delay_s, callback, arguments, self._loop))
        return self._timers[-1]

    def go_on(self, seconds: float) -> None:
        self.now_s += seconds
        due = [timer for timer in self._timers if timer.when() <= self.now_s]
        self._timers = [timer for timer in self._timers if timer not in due]
        for timer in sorted(due):
            if not timer.cancelled():
                timer._run()


class Tight(GuardedProtocol):
    head_within_s = 2.0
    read_within_s = 2.0
    rest_within_s = 3.0
    most_connections = 3
    clock: Clock
    last: "Tight | None" = None  # that was opened

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.loop, Tight.last = self.clock, self  # type: ignore[assignment]
        self.got_bytes = 0

    def data_received(self, data: bytes) -> None:
        self.got_bytes += len(data)
        super().data_received(data)


class App:
    """Says how long a body is; to /endless it talks without end, to /late and /streams it would say more; notes how these ended."""

    def __init__(self) -> None:
        self.slow: list[bool] = []
        self.waits = False
        self.ended: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        with suppress(ClientGoneError):
            if scope["path"] == "/early":
                await reply.whole(401, b"no", [])
                return
            try:
                body = await read_body(scope, receive)
            except RejectedError as error:
                await reply.error(error)
                return
            if scope["path"] == "/endless":
                await reply.begin(200, [])
                while not was_slow(scope):
                    await reply.chunk(b"word " * 2000)
                self.slow.append(True)
                return
            if scope["path"] == "/parts":
                reply = Reply(send, write=scope[WRITE])
                await reply.begin(200, [])
                await reply.chunk(b"one\r\n\r\n")
                reply.push(b"two")
                await reply.end(b"three")
                return
            if scope["path"] in {"/late", "/streams"}:
                if scope["path"] == "/streams":
                    await reply.begin(200, [])
                    await reply.chunk(b"word")
                self.waits = True
                try:
                    await unless_disconnected(asyncio.sleep(60), scope, receive)
                    await reply.whole(200, b"late", [])
                except (ClientGoneError, RuntimeError) as error:
                    self.ended.append(type(error).__name__)
                return
            await reply.whole(200, b"%d %d" % (len(body), len(scope["headers"])), [])


@asynccontextmanager
async def tight() -> AsyncIterator[tuple[int, App, Clock]]:
    app, listening, Tight.clock = App(), listen("127.0.0.1", 0), Clock()
    server = HttpServer(app, protocol=Tight)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield listening.getsockname()[1], app, Tight.clock
    finally:
        Tight.clock.go_on(3600.0)  # who lingers goes
        server.should_exit, Tight.last = True, None
        await serving


async def say(port: int, *data: bytes, clock: Clock | None = None, pause_s: float = 0.0) -> bytes:
    """Send some data, with pauses on the server's clock; return all there is to read until the server closes."""
    before = Tight.last
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    def has_got(some_bytes: int) -> bool:
        return Tight.last not in {None, before} and Tight.last.got_bytes == some_bytes

    async def send() -> None:
        for part, sent_bytes in zip(data, accumulate(map(len, data)), strict=True):
            writer.write(part)
            await writer.drain()
            if clock:
                await until(partial(has_got, sent_bytes))
                clock.go_on(pause_s)

    sending, answer = asyncio.create_task(send()), b""
    with suppress(ConnectionError):
        async with asyncio.timeout(60):
            while part := await reader.read(2**16):
                answer += part
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    writer.close()
    return answer


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), orjson.loads(body)["error"]["code"] or ""


def test_headers_that_trickle_are_cut_and_a_silent_connection_is_closed() -> None:
    async def case() -> None:
        async with tight() as (port, _, clock):
            trickle = [b"POST / HTTP/1.1\r\n", *(b"x-%d: y\r\n" % number for number in range(20))]
            assert error_of(await say(port, *trickle, clock=clock, pause_s=0.2))[0] == 408
            assert await say(port, b"", clock=clock, pause_s=2.0) == b""
            later = await say(port, HELLO, b"\r\n", b"GET / HT", clock=clock, pause_s=1.5)
            assert later.startswith(b"HTTP/1.1 200")
            assert b"HTTP/1.1 408" in later, "the next request of a connection has as long"

    asyncio.run(case())


def test_headers_without_end_are_refused() -> None:
    async def case() -> None:
        async with tight() as (port, _, _):
            long = b"GET / HTTP/1.1\r\nx: " + b"y" * (LONGEST_HEAD_BYTES + 1)
            assert error_of(await say(port, long)) == (431, "headers_too_large")
            many = b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * (MOST_HEADERS + 1) + b"\r\n"
            assert error_of(await say(port, many)) == (431, "headers_too_large")
            assert error_of(await say(port, b"GET /" + b"y" * (LONGEST_HEAD_BYTES + 1)))[0] == 431
            assert error_of(await say(port, b"\x16\x03\x01 this is TLS")) == (400, "bad_http")
            assert error_of(await say(port, b"GET /\xff HTTP/1.1\r\n\r\n")) == (400, "bad_http")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"no HTTP at all\r\n\r\n")
            assert error_of(await reader.read()) == (400, "bad_http")
            Tight.last._head_is_late()  # type: ignore[union-attr]  # before it has closed: it has been told already
            writer.close()
            for hosts in (b"", b"host: x\r\nHost: x\r\n", b"host: x\r\nhost: y\r\n"):  # proxies might read another
                assert error_of(await say(port, b"GET / HTTP/1.1\r\n" + hosts + b"\r\n")) == (400, "bad_http")
            assert b" 200 " in await say(port, b"GET / HTTP/1.0\r\n\r\n"), "which knows no hosts"

    asyncio.run(case())


def test_a_head_that_is_too_large_is_refused_in_one_piece_too_and_a_large_body_behind_it_is_not() -> None:
    async def case() -> None:
        async with tight() as (port, _, _):
            for line in (b"x: " + b"x" * LONGEST_HEAD_BYTES, b"\r\n".join(b"x: " + b"x" * 9000 for _ in range(9))):
                assert b" 431 " in await say(port, b"GET / HTTP/1.1\r\nhost: x\r\n" + line + b"\r\n\r\n")
            size = 2 * LONGEST_HEAD_BYTES
            head = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % size
            assert (await say(port, head + b"x" * size)).endswith(b"%d 3" % size)

    asyncio.run(case())


def test_who_would_rather_speak_http_2_is_answered_in_http_1_with_its_body() -> None:
    async def case() -> None:
        async with tight() as (port, _, _):
            head = b"POST / HTTP/1.1\r\nhost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUPGRADE: h2c\r\n"
            answer = await say(port, head + b"content-length: 17\r\n\r\n\r\nUpgrade: body!!")
            assert (answer[:12], answer[-4:]) == (b"HTTP/1.1 200", b"17 4")

    asyncio.run(case())


@pytest.mark.parametrize(
    ("files", "room"), [(129, None), (130, 1), (65_536, 32_704), (resource.RLIM_INFINITY, 524_224)]
)
def test_the_limit_of_open_files_says_how_many_may_connect(
    monkeypatch: pytest.MonkeyPatch, files: int, room: int | None
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, files))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    counted = room_for_connections.__wrapped__
    if room:
        assert counted() == room
        return
    with pytest.raises(InputError, match="129 files may be open at a time here.* Allow more: ulimit -n 65536"):
        counted()


def test_bodies_on_their_way_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "MOST_COMING_BYTES", 300_000)

    async def case() -> None:
        async with tight() as (port, _, _):
            head = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 200000\r\n\r\n"
            whole = b"x" * 200_000
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + whole[:-1])
            await until(lambda: asgi._coming.bytes > 190_000)
            assert b'"too_many_bytes"' in await say(port, head + whole)
            writer.write(whole[-1:])
            assert (await reader.read()).endswith(b"200000 3")
            writer.close()
            assert asgi._coming.bytes == 0
            assert (await say(port, head + whole)).endswith(b"200000 3")

    asyncio.run(case())


def test_trailers_are_no_headers() -> None:
    async def case() -> None:
        async with tight() as (port, _, _):
            chunked = (
                b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n"
            )
            trailers = b"".join(b"x-%d: y\r\n" % number for number in range(MOST_HEADERS + 1))
            assert (await say(port, chunked + trailers + b"\r\n")).endswith(b"\r\n\r\n2 3")

    asyncio.run(case())


def test_requests_sent_ahead_are_answered_in_order_up_to_a_few() -> None:
    async def case() -> None:
        async with tight() as (port, _, _):
            last = HELLO.replace(b"host: x", b"host: x\r\nconnection: close")
            assert (await say(port, HELLO * 5 + last)).count(b"HTTP/1.1 200") == 6
            answer = await say(port, HELLO * (MOST_AHEAD + 5) + last)
            assert answer.count(b"HTTP/1.1 200") <= MOST_AHEAD + 1

    asyncio.run(case())


@pytest.mark.parametrize("path", [b"/late ", b"/streams "])
def test_nonsense_behind_a_request_ends_it_and_never_stands_in_the_middle_of_an_answer(path: bytes) -> None:
    async def case() -> None:
        async with tight() as (port, app, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HELLO.replace(b"/ ", path, 1))
            await until(lambda: app.waits)
            writer.write(b"nonsense\r\n\r\n")
            answer = await reader.read()
            if path == b"/late ":
                assert error_of(answer) == (400, "bad_http")
            else:
                assert answer.count(b"HTTP/1.1") == 1
                assert answer.endswith(b"word\r\n")
            await until(lambda: app.ended == ["ClientGoneError"])
            writer.close()  # not before: who leaves ends a request anyway

    asyncio.run(case())


@pytest.mark.parametrize("connection", [b"", b"connection: keep-alive\r\n"], ids=["", "keep-alive"])
def test_a_stream_to_a_client_of_http_1_0_has_no_chunks_and_ends_with_its_connection(connection: bytes) -> None:
    async def case() -> None:
        async with tight() as (port, _, _):
            asked = b"POST /parts HTTP/1.0\r\n" + connection + b"content-length: 2\r\n\r\nhi"
            head, _, body = (await say(port, asked)).partition(b"\r\n\r\n")
            assert body == b"one\r\n\r\ntwothree"
            assert b"transfer-encoding" not in head
            assert (await say(port, asked.replace(b"/parts", b"/"))).endswith(b"\r\n\r\n2 %d" % (1 + bool(connection)))

    asyncio.run(case())


def test_who_does_not_read_is_cut_and_the_application_knows_why() -> None:
    async def case() -> None:
        async with tight() as (port, app, clock):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(HELLO.replace(b"/ ", b"/endless ", 1))
            await until(lambda: Tight.last is not None and Tight.last._read_timer is not None)
            clock.go_on(1.9)
            assert not app.slow
            clock.go_on(0.1)
            await until(lambda: app.slow == [True])
            writer.close()
            with suppress(ConnectionError):
                await reader.read()

    asyncio.run(case())


def test_more_connections_than_there_is_room_for_are_told_so() -> None:
    async def case() -> None:
        async with tight() as (port, _, _):
            kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            assert error_of(await say(port, HELLO)) == (503, "too_many_connections")
            for _, writer in kept:
                writer.close()

    asyncio.run(case())


def test_a_body_nobody_waits_for_is_read_up_to_a_bound() -> None:
    async def case() -> None:
        async with tight() as (port, _, _):
            head = b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n"
            assert (await say(port, head, *[b"x" * 2**20] * 40)).startswith(b"HTTP/1.1 401")

    asyncio.run(case())


def test_a_body_nobody_waits_for_is_not_waited_for_however_it_trickles() -> None:
    async def case() -> None:
        async with tight() as (port, _, clock):
            head = b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
            assert (await say(port, head, *[b"x"] * 100, clock=clock, pause_s=0.5)).startswith(b"HTTP/1.1 401")
            assert 3.0 <= clock.now_s <= 4.0, "bytes that come make it no longer"
            short = head.replace(b"1000", b"2")
            last = short.replace(b"\r\n", b"\r\nconnection: close\r\n", 1)
            answers = await say(port, short, b"hi", short + b"hi", last + b"hi", clock=clock, pause_s=1.0)
            assert answers.count(b" 401 ") == 3, "whose body is whole may stay"

    asyncio.run(case())
