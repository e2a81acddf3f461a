"""One engine's part of a stream, relayed: what is said is noted, what only we have asked for is taken out."""

import asyncio
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import aiohttp

from waterline.service.asgi import Reply
from waterline.service.events import DONE, Events, read_events
from waterline.service.health import Watch
from waterline.service.said import Said
from waterline.service.upstream import Progress, UnansweredError, engine_words, passed_back
from waterline.service.weave import Weave

LAST_BYTES_WITHIN_S = 0.2  # of a stream that is done
# It never stands inside a text, where each quote has a backslash before it.
IDS = re.compile(rb',\s*"(?:prompt_)?token_ids"\s*:\s*(?:\[[\d,\s]*\]|null)')


class Stream:
    """The answer of one engine, as a part of what the client gets.

    Args:
        response: of the engine, of which no byte was read.
        said: in the whole stream; it grows.
        progress: of the request; kept up to date.
        reply: to the client.
        weave: makes it a part of a stream that has begun; None where it is the beginning.
        wished: what the engine was asked for on top of what the client wants.
    """

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        said: Said,
        progress: Progress,
        reply: Reply,
        *,
        weave: Weave | None,
        wished: Mapping[str, Any],
    ) -> None:
        self._response = response
        self._said = said
        self._progress = progress
        self._reply = reply
        self._weave = weave
        self._ids = "return_token_ids" in wished
        self._events = Events(self._read, lambda data: engine_words(data)[0])
        self._time = asyncio.get_running_loop().time
        self._watch: Watch
        self._data = b""
        self._first_s = math.nan
        self._pieces = said.pieces

    async def read(self, watch: Watch) -> bool:
        """Wait for the next events; False when the stream is done. Raises BadEventError, UnansweredError."""
        self._watch = watch
        self._data = await self._events.next()
        return bool(self._data)

    async def _read(self) -> bytes:
        watch = self._watch
        watch.since_s = self._time()
        try:
            chunk = await self._response.content.readany()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UnansweredError("The engine broke off.") from error
        watch.since_s = math.inf
        watch.vitals.heard_s = self._time()
        return chunk

    async def pass_on(self) -> None:
        """Send what was read to the client."""
        data, events = self._data, self._events.latest
        if self._weave:
            data = self._weave.events(data)
            events = read_events(data) if data else []
        if self._first_s != self._first_s:
            self._first_s = self._time()
        self._said.add(events)
        if self._ids and b'token_ids"' in data:
            data = IDS.sub(b"", data)
        if not data:
            return
        self._progress.saw(data, len(events))
        if not self._reply.begun:
            self._said.first = data.partition(b"\n\n")[0]
            await self._reply.begin(200, passed_back(self._response))
        await self._reply.chunk(data)

    async def end(self) -> None:
        if not self._reply.begun:
            raise UnansweredError("The engine sent an empty answer.")
        self._progress.done = True
        await self._reply.end(DONE)

    def pace(self, begun_s: float) -> tuple[float, float]:
        """Return the time to the first token and per token after it; NaN where there was none."""
        tokens = self._said.pieces - self._pieces
        return self._first_s - begun_s, (self._time() - self._first_s) / (tokens - 1) if tokens > 1 else math.nan


async def read_to_the_end(response: aiohttp.ClientResponse) -> None:
    """Let the connection of a stream that is done be used again, or close it."""
    try:
        with suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(LAST_BYTES_WITHIN_S):
                await response.content.read()
    finally:
        response.close()
