"""Many streams that run are read together: each gets all of its own, and what befalls one is nothing to the others."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import contextmanager
from typing import Any

import pytest
import uvloop

from waterline.service import together as module
from waterline.service.connections import MOST_UNREAD_BYTES, BrokenOffError, Connections, Response

STREAMS = 12
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MANY", 4)
    monkeypatch.setattr(module, "EVERY_S", 0.001)


class Counting:
    """Counts in a stream, a number a millisecond; how far, and whether it ends well, is in the path."""

    def __init__(self) -> None:
        self.connections = 0
        self.left = 0  # that have not ended

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.left += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                numbers, size, breaks = map(int, head.split(b" ")[1].strip(b"/").split(b"/"))
                writer.write(HEAD)
                for number in range(numbers):
                    word = b"%d," % number * size
                    writer.write(b"%x\r\n%b\r\n" % (len(word), word))
                    await writer.drain()
                    await asyncio.sleep(0.001)
                if breaks:
                    break
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.left -= 1


Case = Callable[[Connections, Counting, str], Coroutine[Any, Any, None]]


def run(case: Case, hold_back: Callable[[], Any] | None = None) -> None:
    async def whole() -> None:
        server = Counting()
        listening = await asyncio.start_server(server.answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        with Connections(hold_back) if hold_back else Connections() as connections:
            await case(connections, server, url)
        listening.close()
        await until(lambda: not server.left)
        await asyncio.sleep(0.005)

    for runner in (asyncio.run, uvloop.run):
        runner(asyncio.wait_for(whole(), 20))


async def heard(response: Response, tap: Callable[[bytes], bool] | None = None) -> bytes:
    """Return all of a stream, most of it by a tap."""
    taken: list[bytes] = []

    def take(data: bytes) -> bool:
        taken.append(data)
        return True

    while some := await response.read_some(tap or take):
        taken.append(some)
    return b"".join(taken)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - what others do is asked for, and they tell nobody
        await asyncio.sleep(0.001)


def joined(connections: Connections) -> int:
    selector = connections._together._selector
    return len(selector.get_map()) if selector else 0


def text(numbers: int, size: int = 1) -> bytes:
    return b"".join(b"%d," % number * size for number in range(numbers))


def test_each_of_many_streams_gets_all_of_its_own_and_its_connection_is_kept() -> None:
    async def case(connections: Connections, server: Counting, url: str) -> None:
        for _ in range(2):
            responses = [await connections.post(f"{url}/{200 + n}/1/0", b"", {}) for n in range(STREAMS)]
            hearing = [asyncio.create_task(heard(response)) for response in responses]
            await until(lambda: joined(connections) == STREAMS)
            assert await asyncio.gather(*hearing) == [text(200 + n) for n in range(STREAMS)]
            assert (joined(connections), connections._together.running) == (0, 0)
        assert server.connections == STREAMS

    run(case)


def test_few_streams_are_read_as_they_come() -> None:
    async def case(connections: Connections, _: Counting, url: str) -> None:
        responses = [await connections.post(f"{url}/40/1/0", b"", {}) for _ in range(3)]
        hearing = [asyncio.create_task(heard(response)) for response in responses]
        await until(lambda: connections._together.running == 3)
        assert joined(connections) == 0
        assert await asyncio.gather(*hearing) == [text(40)] * 3

    run(case)


def test_one_that_breaks_off_or_is_closed_or_cannot_be_borne_takes_no_other_with_it() -> None:
    async def case(connections: Connections, _: Counting, url: str) -> None:
        def unbearable(data: bytes) -> bool:
            if b"150" in data:
                raise ZeroDivisionError
            return True

        breaking = await connections.post(f"{url}/200/1/1", b"", {})
        closing = await connections.post(f"{url}/1000/1/0", b"", {})
        failing = await connections.post(f"{url}/300/1/0", b"", {})
        responses = [await connections.post(f"{url}/300/1/0", b"", {}) for _ in range(STREAMS)]
        hearing = [asyncio.create_task(heard(response)) for response in (breaking, closing, *responses)]
        bearing = asyncio.create_task(heard(failing, unbearable))
        await until(lambda: joined(connections) == STREAMS + 3)
        closing.close()
        ends = await asyncio.gather(*hearing, bearing, return_exceptions=True)
        assert [type(end) for end in (*ends[:2], ends[-1])] == [BrokenOffError, BrokenOffError, ZeroDivisionError]
        assert ends[2:-1] == [text(300)] * STREAMS
        failing.close()
        assert (joined(connections), connections._together.running) == (0, 0)

    run(case)


def test_a_stream_whose_client_is_slow_is_not_read_on_and_loses_nothing() -> None:
    async def case(connections: Connections, _: Counting, url: str) -> None:
        numbers, size, is_slow, reads_on, read_bytes = 150, 40_000, False, asyncio.Event(), 0
        reads_on.set()

        def take(data: bytes) -> bool:
            nonlocal read_bytes
            read_bytes += 0 if is_slow else len(data)
            return not is_slow

        async def read(response: Response) -> None:
            nonlocal read_bytes
            while some := await response.read_some(take):
                read_bytes += len(some)
                await reads_on.wait()

        others = [await connections.post(f"{url}/2000/1/0", b"", {}) for _ in range(STREAMS)]
        response = await connections.post(f"{url}/{numbers}/{size}/0", b"", {})
        hearing = [asyncio.create_task(heard(other)) for other in others]
        reading = asyncio.create_task(read(response))
        await until(lambda: joined(connections) == STREAMS + 1)
        is_slow = True
        reads_on.clear()
        await until(lambda: joined(connections) == STREAMS)
        await asyncio.sleep(0.05)
        assert response._unread_bytes <= MOST_UNREAD_BYTES + module.READ_BYTES
        is_slow = False
        reads_on.set()
        await reading
        assert read_bytes == len(text(numbers, size))
        for other in others:
            other.close()
        await asyncio.gather(*hearing, return_exceptions=True)

    run(case)


def test_what_is_written_while_streams_are_read_is_held_back_until_all_are() -> None:
    rounds: list[list[bytes]] = []
    heard_now: list[bytes] = []

    @contextmanager
    def hold_back() -> Any:
        heard_now.clear()
        yield
        rounds.append(list(heard_now))

    async def case(connections: Connections, _: Counting, url: str) -> None:
        def take(data: bytes) -> bool:
            heard_now.append(data)
            return True

        responses = [await connections.post(f"{url}/60/1/0", b"", {}) for _ in range(STREAMS)]
        await asyncio.gather(*(heard(response, take) for response in responses))
        assert max(map(len, rounds)) > 1, "several streams in one round"

    run(case, hold_back)
