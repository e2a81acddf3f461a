"""One engine's part of a stream, relayed: what is said is noted, what only we have asked for is taken out."""

import asyncio
import math
import re
from collections.abc import Callable, Mapping
from functools import partial

from waterline.service.asgi import Reply
from waterline.service.connections import Response
from waterline.service.events import DONE, BadEventError, Event, Events, read_events
from waterline.service.said import Said
from waterline.service.silence import Watch
from waterline.service.upstream import Progress, UnansweredError, engine_words, passed_back, refusal
from waterline.service.weave import Weave

# It never stands inside a text, where each quote has a backslash before it.
ONE = b',"token_ids":['
IDS = re.compile(rb',\s*"(?:prompt_)?token_ids"\s*:\s*(?:\[[\d,\s]*\]|null)')


class Stream:
    """The answer of one engine, as a part of what the client gets.

    Args:
        response: of the engine, of which no byte was read.
        said: in the whole stream; it grows.
        progress: of the request; kept up to date.
        reply: to the client.
        weave: makes it a part of a stream that has begun; None where it is the beginning.
        hides_ids: of tokens, which the client has not asked for.
        faults: codes by words in the engine's refusals, as `Engine` has them.
    """

    def __init__(
        self,
        response: Response,
        said: Said,
        progress: Progress,
        reply: Reply,
        *,
        weave: Weave | None,
        hides_ids: bool,
        faults: Mapping[str, str] | None = None,
    ) -> None:
        self._response = response
        self._said = said
        self._progress = progress
        self._reply = reply
        self._weave = weave
        self._hides_ids = hides_ids
        self._faults = faults or {}
        self._events = Events(lambda data: engine_words(data)[0])
        self._time = asyncio.get_running_loop().time
        self._first_s = math.nan
        self._pieces = said.pieces
        progress.ask_anew()

    async def relay(self, watch: Watch, on_first: Callable[[], None]) -> None:
        """Pass the answer on as it comes. Raises BadEventError or RejectedError where it cannot go on."""
        events = self._events
        at_once = None if self._weave else partial(self._at_once, watch)
        while not events.done:
            if events.refusal:
                raise refusal(events.refusal, self._faults)
            if events.problem:
                raise BadEventError(events.problem)
            try:
                chunk = await self._response.read_some(at_once)
            except OSError as error:
                raise UnansweredError("The engine broke off.") from error
            if chunk is None or events.done or events.problem:  # the end went by
                continue
            data = self._take(chunk, watch)
            if events.begun and not watch.heard:
                self._first_s = watch.since_s
                on_first()
            if data:
                watch.writing = True  # if the client does not read, it is not the engine that is silent
                await self._pass_on(data)
                watch.writing = False

    def _at_once(self, watch: Watch, chunk: bytes) -> bool:
        """Pass on what can go in this step of the event loop: of a stream that runs, to a client that reads."""
        if not self._reply.is_flowing:
            return False
        if data := self._take(chunk, watch):
            self._reply.push(data)
        if self._events.done or self._events.problem:
            self._response.wake()
        return True

    def _take(self, chunk: bytes, watch: Watch) -> bytes:
        """Note what has come, and return what the client gets of it: whole events."""
        watch.since_s = watch.vitals.heard_s = self._time()
        data, events = self._events.feed(chunk), self._events.latest
        if not data:
            return data
        if self._weave:
            data = self._weave.events(data)
            events = read_events(data) if data else []
        self._said.add(events)
        if self._hides_ids:
            data = _without_ids(data, events)
        if data:
            self._progress.saw(events)
        return data

    async def _pass_on(self, data: bytes) -> None:
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


def _without_ids(data: bytes, events: list[Event]) -> bytes:
    """Take the ids of tokens out of events: they were asked for, but not by the client."""
    if len(events) == 1 and events[0].prompt_token_ids is None:  # the usual event has one list of them
        begin = data.find(ONE)
        if begin > 0:
            rest = data[data.find(b"]", begin) + 1 :]
            return data[:begin] + rest if b'token_ids"' not in rest else IDS.sub(b"", data)
    return IDS.sub(b"", data) if b'token_ids"' in data else data
