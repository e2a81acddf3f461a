"""An engine that fails as its request says, and says the words of the fake one until then.

The name of the client (`user-agent`, which the gateway passes on) is the fault: "cut@17" cuts the connection after 17
tokens, at an engine that is `faulty`. It speaks vLLM's dialect unless it is told another.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import orjson
from serving import QUESTION, fake_plan, served

from waterline.cost import replica_step_cost
from waterline.service.body import CHAT, COMPLETIONS, read_asked
from waterline.service.engines.dialect import OWNERS
from waterline.service.engines.fake_answer import Answer, Part
from waterline.service.engines.openai import Attached
from waterline.service.errors import RejectedError, error_json

PLAN = fake_plan()
BEFORE = (
    "reset",
    "closed",
    "500",
    "503",
    "429",
    "told 503",
    "hang",
    "wrong type",
    "empty",
    "nonsense",
)  # a byte of the answer
WITHIN = ("cut", "half", "end", "stall", "broken", "error", "abort", "chunked")  # a stream
HARMLESS = ("trickle", "comments", "late")


@dataclass(frozen=True)
class Line:
    """A connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


@dataclass(kw_only=True, eq=False)
class Engine:
    """One engine, and what has happened to it."""

    faulty: bool = False
    owner: str = "vllm"  # which dialect it speaks
    refuses: str = ""  # a field that no request may have
    output_tokens: int = 50
    max_context_tokens: int = 4096
    token_s: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of the requests it has got
    running: int = 0
    left: int = 0  # clients that went away while it answered
    url: str = ""
    server: asyncio.Server | None = None

    @property
    def part(self) -> Part:
        return Part(
            model="chat",
            step=replica_step_cost(PLAN.fleet, PLAN.replicas[0]),
            max_batch=1000,
            max_context_tokens=self.max_context_tokens,
            expected_output_tokens=self.output_tokens,
        )

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                request, *lines = head.split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._answer(request.split()[1], body, headers, Line(reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):  # the last: at the loop's end
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: bytes, headers: Mapping[str, str], line: Line) -> None:
        if not body:
            models = {"object": "list", "data": [{"id": "chat", "object": "model", "owned_by": self.owner}]}
            await self._whole(line, 200, orjson.dumps(models))
            return
        if path == "/v1/responses":  # which it has not
            await self._whole(line, 404, b"{}")
            return
        fields = orjson.loads(body)
        self.bodies.append(fields)
        fault, _, after = headers.get("user-agent", "").partition("@") if self.faulty else ("", "", "")
        if path == "/abort_request":
            await self._whole(line, 200, b"{}")
            return
        named = {name: value for name, value in fields.items() if name != "rid"}  # which only a gateway says
        asked = read_asked(path.removeprefix("/v1"), orjson.dumps(named))
        if self.refuses in fields:
            await self._whole(line, 400, b'{"error": {"message": "' + self.refuses.encode() + b' is not for me"}}')
            return
        try:
            answer = Answer(asked, self.part, chat=path.endswith(CHAT))
        except RejectedError as error:
            await self._whole(line, error.status, error_json(error))
            return
        if path.removeprefix("/v1") not in OWNERS[self.owner].token_ids:
            answer.tells_ids = False
        self.running += 1
        try:
            if fault in BEFORE and not after:
                await self._fail_before(fault, line, stream=asked.stream)
            elif asked.stream:
                await self._stream(answer, line, fault, int(after or 0))
            else:
                await self._think(line, self.token_s * answer.output_tokens)
                await self._whole(line, 200, orjson.dumps(answer.whole()))
        except (ConnectionError, asyncio.CancelledError):
            self.left += 1
            raise
        finally:
            self.running -= 1

    async def _whole(self, line: Line, status: int, data: bytes, kind: str = "application/json") -> None:
        line.writer.write(
            b"HTTP/1.1 %d X\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n" % (status, kind.encode(), len(data))
        )
        line.writer.write(data)
        await line.writer.drain()

    async def _think(self, line: Line, within_s: float) -> None:
        """Work on an answer that comes whole, unless the client leaves."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await line.reader.read(1)
                raise ConnectionError

    async def _fail_before(self, fault: str, line: Line, *, stream: bool) -> None:
        if fault == "reset":
            _reset(line)
        elif fault == "closed":
            raise ConnectionError
        elif fault == "hang":
            await _forever(line)
        elif fault == "wrong type":
            await self._whole(line, 200, b"<html>Log in</html>", "text/html")
        elif fault == "empty":
            await self._whole(line, 200, b"", "text/event-stream" if stream else "application/json")
        elif fault == "nonsense":
            data = b"data: {nonsense\n\n" if stream else b'{"choices": ['
            await self._whole(line, 200, data, "text/event-stream" if stream else "application/json")
        elif fault.startswith("told") and stream:  # as vLLM 0.32 does: 200, and the first event says otherwise
            event = b'data: {"error": {"message": "a fault", "code": %s}}' % fault.removeprefix("told ").encode()
            await self._whole(line, 200, event + b"\n\ndata: [DONE]\n\n", "text/event-stream")
        else:
            await self._whole(line, int(fault.removeprefix("told ")), b'{"error": {"message": "a fault"}}')

    async def _stream(self, answer: Answer, line: Line, fault: str, after: int) -> None:
        line.writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for number in range(answer.output_tokens):
            if number == after and fault in WITHIN:
                await self._fail_within(fault, answer.event(number), line)
            if self.token_s:
                await asyncio.sleep(self.token_s)
            event = answer.event(number)
            if fault == "trickle":
                for byte in range(len(event)):
                    await _send(line, event[byte : byte + 1])
            else:
                await _send(line, event)
            if fault == "comments":
                await _send(line, b": ping\r\n\r\n" if number % 2 else b":\n")
            if line.writer.is_closing():
                raise ConnectionError
        if after >= answer.output_tokens and fault in WITHIN:  # the answer is there, its end is not
            await self._fail_within(fault, answer.last(), line)
        if fault == "late":
            await asyncio.sleep(0.5)
        await _send(line, answer.last() + b"data: [DONE]\n\n")
        line.writer.write(b"0\r\n\r\n")
        await line.writer.drain()

    async def _fail_within(self, fault: str, event: bytes, line: Line) -> None:
        await asyncio.sleep(0.01)  # so that what was said is on its way to the client
        if fault == "cut":
            _reset(line)
        elif fault == "half":
            await _send(line, event[:40])
            _reset(line)
        elif fault == "end":
            line.writer.write(b"0\r\n\r\n")
            raise ConnectionError
        elif fault == "stall":
            await _forever(line)
        elif fault == "broken":
            await _send(line, event[:40] + b"\n\n")
        elif fault == "error":
            await _send(line, b'data: {"error": {"message": "out of memory", "code": 500}}\n\ndata: [DONE]\n\n')
        elif fault == "abort":
            abort = {"index": 0, "delta": {}, "finish_reason": "abort"}
            await _send(line, b"data: " + orjson.dumps({"choices": [abort]}) + b"\n\ndata: [DONE]\n\n")
        elif fault == "chunked":  # no length of a chunk
            line.writer.write(b"zzz\r\n")
        await line.writer.drain()


async def _send(line: Line, data: bytes) -> None:
    line.writer.write(b"%x\r\n%s\r\n" % (len(data), data))
    await line.writer.drain()


async def _forever(line: Line) -> None:
    """Say nothing until the other side leaves."""
    await line.reader.read()
    raise ConnectionError


def _reset(line: Line) -> None:
    """Cut the connection with a reset, so that what is on its way may be lost."""
    with suppress(OSError):  # the other side has left already
        line.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.writer.transport.abort()
    raise ConnectionError


@asynccontextmanager
async def listening(*engines: Engine) -> AsyncIterator[dict[str, Attached]]:
    """Yield the engines of as many replicas of "chat", attached."""
    try:
        for engine in engines:
            engine.server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
            engine.url = f"http://127.0.0.1:{engine.server.sockets[0].getsockname()[1]}/v1"
        yield {f"chat/{number}": Attached(url=engine.url, name="chat") for number, engine in enumerate(engines)}
    finally:
        for engine in engines:
            assert engine.server
            engine.server.close()


def said_by(fields: Mapping[str, Any], engine: Engine, path: str = CHAT) -> str:
    """Return what an engine says that does not fail."""
    asked = read_asked(path, orjson.dumps(fields))
    return "".join(Answer(asked, engine.part, chat=path == CHAT).words)


__all__ = ["BEFORE", "COMPLETIONS", "HARMLESS", "QUESTION", "WITHIN", "Engine", "listening", "said_by", "served"]
