"""One engine's answer, relayed: bytes pass untouched, a token is never parsed.

What is learnt on the way costs a search in each chunk: events are counted, the first one is timed, and the usage is
read from the last bytes. When the relay is cancelled it closes the connection, and the engine stops generating.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Self

import aiohttp
import orjson

from waterline.errors import EngineError
from waterline.service.asgi import Headers, Reply
from waterline.service.engines import Engine
from waterline.service.errors import RejectedError, retry_after

TAIL_BYTES = 4096  # of the end of an answer, where the usage stands
LONGEST_ERROR_BYTES = 65_536
LARGE_BYTES = 2**20
PASSED_ON = (b"user-agent",)  # of the request: the rest is between others, and the client's key is not for engines
PASSED_BACK = ("content-type", "cache-control")
COMPLETION_TOKENS = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')
PROMPT_TOKENS = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
TIMED_TOKENS = re.compile(rb'"(?:cache|prompt)_n"\s*:\s*(\d+)')  # llama.cpp's: kept from before, and read
STREAM, WHOLE = "text/event-stream", "application/json"  # what answers are made of
EVENT = b"\ndata:"  # a line feed never stands inside JSON, so this is never part of a text
DONE = re.compile(rb"\ndata: ?\[DONE\]")
OUR_MISTAKES = (401, 403, 407)  # of the statuses from 400 on: the key is ours, the client can do nothing about it


class UnansweredError(RejectedError):
    """The engine failed before the client got a byte: somebody else may answer. Else this is what the client gets."""

    def __init__(self, message: str, *, status: int = 502, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, status=status, code="engine_failed", headers=headers)


class BrokenStreamError(EngineError):
    """The engine failed after the client got a part of the answer."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """What has come back so far."""

    first_token_s: float = float("nan")
    events: int = 0  # of a stream, [DONE] included
    tail: bytes = b"\n"  # the last bytes

    @property
    def output_tokens(self) -> int:
        """What the engine says, else the events of the stream: engines send one for each token.

        A chat stream has three more: the role, the reason it ended, [DONE]. Those that never ended have the first only.
        """
        if said := COMPLETION_TOKENS.findall(self.tail):
            return int(said[-1])
        return max(0, self.events - (3 if DONE.search(self.tail) else 1))

    @property
    def prompt_tokens(self) -> int | None:
        if said := PROMPT_TOKENS.findall(self.tail):
            return int(said[-1])
        timed = TIMED_TOKENS.findall(self.tail)[-2:]
        return sum(map(int, timed)) if timed else None

    def saw(self, chunk: bytes) -> None:
        """Count the events in a chunk; one may be cut anywhere."""
        overlap = self.tail[1 - len(EVENT) :]
        self.events += (overlap + chunk).count(EVENT)
        self.tail = (self.tail + chunk)[-TAIL_BYTES:] if len(chunk) < TAIL_BYTES else chunk[-TAIL_BYTES:]


class Connections:
    """The client of all engines: as many connections as there are requests, and no limit on an answer's time.

    Connections are kept for the next request, and some servers close theirs without a word (llama.cpp after a stream,
    all of them when idle for a while). So a request that finds a dead one is sent again on a fresh one; an answer has
    no effect but itself, so asking twice does no harm.
    """

    def __init__(self) -> None:
        self.kept = _session(aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0))  # most servers wait 5 s
        self._fresh = _session(aiohttp.TCPConnector(limit=0, force_close=True))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kept.close()
        await self._fresh.close()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        try:
            return await self.kept.post(url, data=_sendable(body), headers=headers, allow_redirects=False)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            return await self._fresh.post(url, data=_sendable(body), headers=headers, allow_redirects=False)


def _session(connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=2.0),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def _sendable(body: bytes) -> bytes | BytesIO:
    """Wrap what aiohttp would rather send in pieces."""
    return body if len(body) <= LARGE_BYTES else BytesIO(body)


async def relay(
    connections: Connections,
    engine: Engine,
    url: str,
    body: bytes,
    headers: Headers,
    *,
    stream: bool,
    reply: Reply,
    progress: Progress,
    on_first_token: Callable[[], None],
) -> None:
    """Ask the engine, at `url`, and pass its answer on, as it comes or, without `stream`, when it is whole.

    Raises:
        UnansweredError: it could not be reached, broke off or failed, and the client has no byte yet.
        BrokenStreamError: it broke off after that.
        RejectedError: it has refused the request (4xx); the client is told so in OpenAI's words.
    """
    passed_on = {name.decode(): value.decode("latin-1") for name, value in headers if name in PASSED_ON}
    passed_on["content-type"] = "application/json"  # what the body has proved to be, whatever the client called it
    passed_on |= engine.headers
    try:
        response = await connections.post(url, body, passed_on)
        try:
            if response.status != 200:
                await _raise_refusal(response, engine.faults)
            if response.content_type != (STREAM if stream else WHOLE):
                raise UnansweredError(f"The engine answered with {response.content_type}, which is no answer.")
            if stream:
                await _relay_stream(response, reply, progress, on_first_token)
            else:
                await _relay_whole(response, reply, progress, on_first_token)
        finally:
            response.close()  # a connection that was read to its end has gone back to the others before
    except aiohttp.ClientConnectorError as error:  # it is gone, and about to be restarted
        raise UnansweredError("The engine takes no connections.", status=503, headers=retry_after(1)) from error
    except (aiohttp.ClientError, OSError) as error:
        raise (BrokenStreamError if reply.begun else UnansweredError)("The engine broke off.") from error


async def _relay_stream(
    response: aiohttp.ClientResponse, reply: Reply, progress: Progress, on_first_token: Callable[[], None]
) -> None:
    rest = b""  # of a line that is not whole yet: were the engine to break off here, nobody could read what follows
    async for chunk in response.content.iter_any():
        if not reply.begun:
            on_first_token()
            await reply.begin(200, _passed_back(response))
        data = rest + chunk
        end = data.rfind(b"\n") + 1
        rest = data[end:]
        if end:
            progress.saw(data[:end])
            await reply.chunk(data[:end])
    if not reply.begun:
        raise UnansweredError("The engine sent an empty answer.")
    if not DONE.search(progress.tail):
        raise BrokenStreamError("The engine broke off.")
    await reply.end(rest)


async def _relay_whole(
    response: aiohttp.ClientResponse, reply: Reply, progress: Progress, on_first_token: Callable[[], None]
) -> None:
    data = await response.read()
    on_first_token()
    progress.saw(data)
    await reply.whole(200, data, _passed_back(response))


def _passed_back(response: aiohttp.ClientResponse) -> Headers:
    """Return the headers the client should see; names of engines and hop-by-hop headers stay here."""
    return [
        (name.encode(), response.headers[name].encode("latin-1")) for name in PASSED_BACK if name in response.headers
    ]


async def _raise_refusal(response: aiohttp.ClientResponse, faults: Mapping[str, str]) -> None:
    """Say what the engine said. 4xx is the client's own doing; everything else is a reason to try another engine."""
    message, code, param = _engine_words(await _read_most(response, LONGEST_ERROR_BYTES))
    status = response.status
    again = {name: response.headers[name] for name in ("retry-after",) if name in response.headers}
    fault = next((code for words, code in faults.items() if words in message.lower()), None)
    if fault and status == 500:
        status = 400
    if 400 <= status < 500 and status not in OUR_MISTAKES:
        raise RejectedError(message, status=status, param=param, code=fault or code or "engine_refused", headers=again)
    raise UnansweredError(
        f"The engine answered {status}: {message}", status=503 if status == 503 else 502, headers=again
    )


async def _read_most(response: aiohttp.ClientResponse, longest_bytes: int) -> bytes:
    try:
        return await response.content.readexactly(longest_bytes)
    except asyncio.IncompleteReadError as whole:
        return whole.partial


def _engine_words(data: bytes) -> tuple[str, str | None, str | None]:
    """Return message, code and parameter of an engine's error, however it is shaped."""
    try:
        said = orjson.loads(data)
    except orjson.JSONDecodeError:
        return data.decode(errors="replace").strip() or "no reason given", None, None
    error = said.get("error", said) if isinstance(said, dict) else said
    if not isinstance(error, dict):
        return str(error), None, None
    code = error["code"] if isinstance(error.get("code"), str) else error.get("type")  # llama.cpp's code is the status
    param = error.get("param")
    return str(error.get("message", said)), None if code is None else str(code), None if param is None else str(param)
