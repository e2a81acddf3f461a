"""HTTP to engines: what is kept, what is read to which end, and what becomes of servers that do not keep to it."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from shutil import which
from subprocess import run as run_program
from typing import Any

import pytest
import uvloop

from waterline.service import connections as module
from waterline.service.connections import MOST_UNREAD_BYTES, AbsentError, BrokenOffError, Connections
from waterline.service.together import Together

OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = OK + b"content-type: Application/JSON; charset=utf-8\r\ncontent-length: 2\r\n\r\n{}"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


class Server:
    """Says the same to each request, whatever it is."""

    def __init__(self, *parts: bytes, closes: bool = False) -> None:
        self.parts, self.closes = parts, closes
        self.requests: list[bytes] = []
        self.connections = 0
        self.lost = asyncio.Event()
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
                self.requests.append(head + await reader.readexactly(int(length.split(b": ")[1])))
                for part in self.parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)
                if self.closes:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.lost.set()


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Connections]:
    listening = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1/x"
    with Connections() as connections:
        yield connections
    listening.close()


def run(case: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(case(), 20))


@pytest.mark.parametrize(
    "answer", [WHOLE, CHUNKED + b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE]
)
def test_a_connection_is_kept_for_the_next_request(answer: bytes) -> None:
    async def case() -> None:
        server = Server(answer)
        async with serving(server) as connections:
            for _ in range(3):
                response = await connections.post(server.url, b"{}", {"user-agent": "x"})
                assert (response.status, await response.read()) == (200, b"{}")
        assert server.connections == 1
        host = server.url.split("/")[2].encode()
        assert (
            server.requests
            == [b"POST /v1/x HTTP/1.1\r\nhost: %b\r\nuser-agent: x\r\ncontent-length: 2\r\n\r\n{}" % host] * 3
        )

    run(case)


def test_the_type_of_an_answer_is_known_whatever_its_letters() -> None:
    async def case() -> None:
        server = Server(WHOLE)
        async with serving(server) as connections:
            assert (await connections.post(server.url, b"", {})).content_type == "application/json"

    run(case)


@pytest.mark.parametrize(
    ("parts", "data"),
    [
        ((OK + b"\r\nto ", b"the end"), b"to the end"),  # no length: the end of the connection is that of the answer
        ((OK + b"connection: close\r\ncontent-length: 2\r\n\r\n{}",), b"{}"),
        ((CHUNKED + b"2\r\n{}\r\n0\r\nafter: word\r\n\r\n",), b"{}"),
        ((WHOLE + b"HTTP/1.1 500 Nobody asked\r\n\r\n",), b"{}"),
        ((WHOLE + b"nonsense",), b"{}"),
    ],
)
def test_an_answer_is_read_to_its_end_and_a_connection_that_ends_is_not_used_again(
    parts: tuple[bytes, ...], data: bytes
) -> None:
    async def case() -> None:
        server = Server(*parts, closes=True)
        async with serving(server) as connections:
            for _ in range(2):
                assert await (await connections.post(server.url, b"{}", {})).read() == data
            assert server.connections == 2

    run(case)


@pytest.mark.parametrize(
    "parts",
    [
        (b"",),
        (b"SSH-2.0-OpenSSH_9.2\r\n",),
        (b"HTTP/1.1 200 OK\r\ncontent-le",),
        (OK + b"content-length: 9\r\n\r\n{}",),
        (OK + b"content-length: 9\r\ncontent-length: 2\r\n\r\n{}",),
        (CHUNKED + b"2\r\n{}\r\n",),
        (CHUNKED, b"x\r\n{}\r\n"),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",),
        (OK + b"x: " + b"y" * 200_000,),
    ],
)
def test_what_breaks_off_or_is_no_http_is_no_answer(parts: tuple[bytes, ...]) -> None:
    async def case() -> None:
        server = Server(*parts, closes=True)
        async with serving(server) as connections:
            with pytest.raises(BrokenOffError):
                await (await connections.post(server.url, b"{}", {})).read()
            assert server.connections == 1, "who never answered on a fresh connection is not asked again"

    run(case)


def test_a_kept_connection_that_has_died_is_replaced() -> None:
    async def case() -> None:
        server = Server(WHOLE)
        async with serving(server) as connections:
            await (await connections.post(server.url, b"{}", {})).read()
            (kept,) = connections._kept.values()
            dead = kept[0]
            dead._transport.abort()  # type: ignore[union-attr]  # as when its server had closed it this moment
            assert await (await connections.post(server.url, b"{}", {})).read() == b"{}"
            assert (server.connections, dead in kept) == (2, False)

    run(case)


def test_what_is_not_used_for_a_while_is_closed_and_what_is_used_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_S", 0.15)
    monkeypatch.setattr(module, "SWEEP_EVERY_S", 0.02)

    async def case() -> None:
        server, waits = Server(WHOLE), Server(CHUNKED)
        async with serving(server) as connections, serving(waits):
            under_way = await connections.post(waits.url, b"{}", {})
            for _ in range(8):  # for longer than any sweep
                await (await connections.post(server.url, b"{}", {})).read()
                await asyncio.sleep(0.03)
            assert server.connections == 1
            await asyncio.wait_for(server.lost.wait(), 1.0)
            assert not waits.lost.is_set()
            assert connections._sweeping is None or not any(connections._kept.values())
            under_way.close()

    run(case)


def test_who_does_not_listen_is_absent_and_a_header_of_two_lines_is_not_sent() -> None:
    async def case() -> None:
        with Connections() as connections:
            with pytest.raises(AbsentError):
                await connections.post("http://127.0.0.1:9/v1", b"", {})
            with pytest.raises(ValueError, match="end of line"):
                await connections.post("http://127.0.0.1:9/v1", b"", {"authorization": "Bearer x\r\nhost: y"})

    run(case)


@pytest.mark.parametrize("begun", [False, True])
def test_who_gives_up_or_closes_ends_the_connection_at_once(begun: bool) -> None:
    async def case() -> None:
        server = Server(*((CHUNKED + b"2\r\n{}\r\n",) if begun else ()))
        async with serving(server) as connections:
            if begun:
                response = await connections.post(server.url, b"{}", {})
                assert await response.read_some() == b"{}"
                response.close()
            else:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await connections.post(server.url, b"{}", {})
            await asyncio.wait_for(server.lost.wait(), 1.0)

    run(case)


def test_a_connection_that_ends_before_anything_was_asked_is_no_bug_of_ours() -> None:
    async def case() -> None:
        connection = module.Connection(lambda _: None, lambda _: None, Together())
        connection.connection_lost(ConnectionResetError("reset by peer"))
        with pytest.raises(BrokenOffError):
            await connection.ask(b"POST / HTTP/1.1\r\n\r\n", b"")

    run(case)


def test_an_engine_waits_for_a_reader_that_is_slow_and_nothing_is_lost() -> None:
    pieces, piece = 400, b"%x\r\n%b\r\n" % (2**16, b"x" * 2**16)

    async def case() -> None:
        server = Server(CHUNKED, *[piece] * pieces, b"0\r\n\r\n")
        async with serving(server) as connections:
            response = await connections.post(server.url, b"{}", {})
            await asyncio.sleep(0.3)
            assert response._unread_bytes <= MOST_UNREAD_BYTES + 2**20, "of 26 MB: one read more than the bound"
            read = 0
            while some := await response.read_some():
                read += len(some)
            assert read == pieces * 2**16

    run(case)


@pytest.mark.parametrize("head", [CHUNKED + b"%x\r\n" % 3_000_000, OK + b"content-length: 3000000\r\n\r\n"])
def test_a_long_answer_is_read_whole_however_much_of_it_came_with_its_head(head: bytes) -> None:
    async def case() -> None:
        server = Server(head + b"x" * 3_000_000 + b"\r\n0\r\n\r\n" * head.startswith(CHUNKED))
        async with serving(server) as connections:
            response = await connections.post(server.url, b"{}", {})
            await asyncio.sleep(0.05)  # more comes than anybody has asked for
            assert await response.read() == b"x" * 3_000_000

    run(case)
    uvloop.run(asyncio.wait_for(case(), 20))  # which reads more at a time


def test_who_leaves_as_the_answer_comes_closes_nobody_elses_connection() -> None:
    async def case() -> None:
        server = Server(WHOLE)
        async with serving(server) as connections:
            others: list[asyncio.Future[module.Response]] = []

            def keep(_: module.Address, connection: module.Connection) -> None:
                if not others:  # the answer has come, and whoever waits for it has not woken up yet
                    leaving.cancel()
                    others.append(connection.ask(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n", b""))

            connections._keep = keep  # type: ignore[method-assign]
            leaving = asyncio.create_task(connections.post(server.url, b"{}", {}))
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert await (await others[0]).read() == b"{}"

    run(case)


@pytest.mark.skipif(which("openssl") is None, reason="makes its certificate with openssl, which is not here")
def test_https_is_spoken_with_who_can_prove_its_name_and_with_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof, key = tmp_path / "proof.pem", tmp_path / "key.pem"
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    making = (
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    )
    run_program([*making, *subject, "-out", str(proof), "-keyout", str(key)], check=True, capture_output=True)

    async def case(trusted: bool) -> None:
        server, secure = Server(WHOLE), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        secure.load_cert_chain(proof, key)
        listening = await asyncio.start_server(server.answer, "localhost", 0, ssl=secure)
        url = f"https://localhost:{listening.sockets[0].getsockname()[1]}/v1"
        with Connections() as connections:
            if trusted:
                for _ in range(2):
                    assert await (await connections.post(url, b"{}", {})).read() == b"{}"
                assert server.connections == 1
            else:
                with pytest.raises(AbsentError, match="certificate"):
                    await connections.post(url, b"{}", {})
        listening.close()

    for trusted in (False, True):
        if trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(proof))
        module._trust.cache_clear()
        run(partial(case, trusted))
        uvloop.run(asyncio.wait_for(case(trusted), 20))
    module._trust.cache_clear()


def test_a_tap_takes_what_comes_while_it_is_waited_for_and_leaves_the_rest() -> None:
    async def case() -> None:
        server = Server(CHUNKED, *[b"1\r\n%d\r\n" % digit for digit in range(6)], b"0\r\n\r\n")
        taken: list[bytes] = []

        def tap(data: bytes) -> bool:
            if b"3" in data:
                return False
            taken.append(data)
            return True

        async with serving(server) as connections:
            response = await connections.post(server.url, b"{}", {})
            left = b""
            while some := await response.read_some(tap):
                left += some
            assert b"3" in left
            assert sorted(b"".join(taken) + left) == list(b"012345")

    run(case)
