"""Responses of engines that make them themselves, passed on as they came: what is asked, and the stream of events.

Until something was said, the events that only tell that it has begun are held back, so that a failure before the first
token is nobody's news. After that, what goes to the client is noted, so that another may go on; see `response_resume`.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Any

import msgspec
import orjson
from msgspec import Struct

from waterline.errors import WaterlineError
from waterline.service.asgi import Reply
from waterline.service.body import (
    LONGEST_TOKEN_BYTES,
    TOKENS_PER_MESSAGE,
    Asked,
    Steering,
    Tokens,
    estimated_tokens,
    explained,
)
from waterline.service.connections import Response
from waterline.service.counts import read_counts
from waterline.service.errors import error_json
from waterline.service.events import LONGEST_EVENT_BYTES, UNREADABLE, BadEventError, check_text
from waterline.service.media import Part, check_links, check_url, text_of
from waterline.service.response_resume import BEGINS, Event, Written
from waterline.service.responses import RESPONSES, check_stateless
from waterline.service.silence import Watch
from waterline.service.upstream import Progress, UnansweredError, engine_words, passed_back

ENDS = ("response.completed", "response.incomplete")
FAILS = ("response.failed", "error")
THOUGHT = "response.reasoning_text.delta"


class _Item(Struct):
    content: str | list[Part] | Part | None = None
    output: str | list[Part] | Part | None = None
    arguments: str | None = None


class _Tool(Struct):
    server_url: str | None = None  # of an MCP server


class _Body(Steering, kw_only=True):
    model: str
    input: str | list[_Item]
    tools: list[_Tool] | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Tokens | None = None
    service_tier: str | None = None


_BODY = msgspec.json.Decoder(_Body)
_EVENT = msgspec.json.Decoder(Event)


def read_own(body: bytes) -> Asked:
    """Read a request that goes to an engine as it came. Raises RejectedError naming what is wrong with it."""
    try:
        if not body.isascii():
            body.decode()
        asked = _BODY.decode(body)
        check_stateless(orjson.loads(body))
        asked.check()
        for tool in asked.tools or ():
            if tool.server_url is not None:
                check_url(tool.server_url, "server_url")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, orjson.JSONDecodeError) as error:
        raise explained(error, body) from error
    items = [_Item(content=asked.input)] if isinstance(asked.input, str) else asked.input
    sizes = [len((asked.instructions or "").encode()), *map(_size, items)]
    return Asked(
        endpoint=RESPONSES,
        model=asked.model,
        stream=bool(asked.stream),
        include_usage=True,  # it is in the last event, whoever asks
        most_tokens=asked.max_output_tokens,
        answers=1,
        prompt_tokens=max(1, sum(map(estimated_tokens, sizes)) + TOKENS_PER_MESSAGE * len(items)),
        fewest_tokens=sum(sizes) // LONGEST_TOKEN_BYTES,
        is_patient=asked.service_tier == "flex",
        body=body,
    )


def _size(item: _Item) -> int:
    texts = [item.arguments or ""]
    for said in (item.content, item.output):
        if isinstance(said, str):
            texts.append(said)
        for part in [said] if isinstance(said, dict) else said if isinstance(said, list) else ():
            check_links(part)
            texts.append(text_of(part))
    return sum(len(text.encode()) for text in texts)


class Own:
    """An `asgi.Edit` that changes nothing, and ends a stream that failed as clients of responses expect it."""

    def whole(self, data: bytes) -> bytes:
        return data

    def chunk(self, data: bytes) -> bytes:
        return data

    def last(self, data: bytes) -> bytes:
        return data

    def broken(self, error: WaterlineError) -> bytes:
        problem = orjson.loads(error_json(error))["error"]
        event: dict[str, Any] = {"type": "error", **{name: problem[name] for name in ("code", "message", "param")}}
        return b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"


class Relay:
    """The stream of one engine.

    Args:
        response: of the engine, of which no byte was read.
        progress: of the request; kept up to date.
        written: what the client gets; kept up to date.
        reply: to the client.
        may_go_on: another engine could, from the middle of it.
    """

    def __init__(
        self, response: Response, progress: Progress, written: Written, reply: Reply, *, may_go_on: bool
    ) -> None:
        self._response = response
        self._may_go_on = may_go_on
        self._written = written
        self._progress = progress
        self._reply = reply
        self._held = b""  # events that tell of a beginning
        self._last = b""  # the event that ends it, and what follows
        self._deltas = 0
        self._first_s = math.nan
        self._time = asyncio.get_running_loop().time

    async def relay(self, watch: Watch, on_first: Callable[[], None]) -> None:
        """Pass the answer on as it comes. Raises BadEventError or UnansweredError where it breaks off."""
        rest = b""
        while not self._last:
            try:
                chunk = await self._response.read_some()
            except OSError as error:
                raise self._broke_off() from error
            watch.since_s = watch.vitals.heard_s = self._time()
            data = (rest + (chunk or b"\n\n")).replace(b"\r\n", b"\n")
            whole, mark, rest = data.rpartition(b"\n\n")
            if len(rest) > LONGEST_EVENT_BYTES:
                raise BadEventError("The engine sent an event without end.")
            data, problem = self._said(whole + mark)
            if problem and not self._reply.begun:
                raise UnansweredError(str(problem), certain=False) from problem
            if (data or self._last) and not watch.heard:
                self._first_s = watch.since_s
                on_first()
            if data:
                if self._written.problem or not self._may_go_on:
                    watch.patience = math.inf  # to end it now would help nobody
                watch.writing = True
                await self._pass_on(data)
                watch.writing = False
            if problem:
                raise problem
            if not chunk and not self._last:
                raise self._broke_off()

    def _broke_off(self) -> UnansweredError:
        """Say so. Before the first word it may be the request: vLLM ends a stream so whose grammar it cannot read."""
        return UnansweredError("The engine broke off.", certain=self._deltas > 0)

    def _said(self, data: bytes) -> tuple[bytes, BadEventError | None]:
        """Return what goes to the client now of whole events, and what is wrong with the one that follows, if it is."""
        good: list[bytes] = []
        try:
            for block in filter(None, data.split(b"\n\n")):
                if self._last:
                    self._last += block + b"\n\n"
                elif event := _read(block):
                    self._take(event, block, good)
        except BadEventError as error:
            return b"".join(good), error
        return b"".join(good), None

    def _take(self, event: Event, block: bytes, good: list[bytes]) -> None:
        if event.type in FAILS:
            raise BadEventError(f"The engine gave up: {_words(block)[:200]}")
        if event.type in ENDS:
            self._last = block + b"\n\n"
            if event.response and event.response.usage:
                self._progress.told(read_counts(msgspec.structs.asdict(event.response.usage)))
        elif event.type in BEGINS and not (self._reply.begun or good):
            self._held += block + b"\n\n"
            self._written.add(event, _data(block))
        else:
            self._deltas += event.type.endswith(".delta")
            self._progress.thoughts += event.type == THOUGHT
            good.append(block + b"\n\n")
            self._written.add(event, _data(block))

    async def _pass_on(self, data: bytes) -> None:
        self._progress.events = self._deltas + 1  # as in a chat, whose first event has the role
        if not self._reply.begun:
            await self._reply.begin(200, passed_back(self._response))
            data, self._held = self._held + data, b""
        await self._reply.chunk(data)

    async def end(self) -> None:
        if not self._reply.begun:
            await self._reply.begin(200, passed_back(self._response))
        self._progress.done = True
        await self._reply.end(self._held + self._last)

    def pace(self, begun_s: float) -> tuple[float, float]:
        """Return the time to the first token and per token after it; NaN where there was none."""
        deltas = self._deltas
        return self._first_s - begun_s, (self._time() - self._first_s) / (deltas - 1) if deltas > 1 else math.nan


def _read(block: bytes) -> Event | None:
    """Return what an event is; None for a comment, [DONE], and nothing. Raises BadEventError for what is none."""
    said = _data(block)
    if not said or said == b"[DONE]":
        return None
    try:
        check_text(said)
        return _EVENT.decode(said)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadEventError(UNREADABLE) from error


def _data(block: bytes) -> bytes:
    return b"\n".join(line[5:].strip() for line in block.splitlines() if line.startswith(b"data:"))


def _words(block: bytes) -> str:
    said = orjson.loads(_data(block))
    return engine_words(orjson.dumps((said.get("response") or said).get("error") or said))[0]
