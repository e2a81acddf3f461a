"""One engine: how it is asked, what it refuses, and how far its answer has got.

Closing the connection is what makes an engine stop generating.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import orjson

from waterline.errors import EngineError
from waterline.service.asgi import Headers
from waterline.service.body import Asked
from waterline.service.connections import AbsentError, Connections, Response
from waterline.service.counts import Counts, of_all, read_counts, sum_of
from waterline.service.engines import Engine
from waterline.service.errors import RejectedError, retry_after
from waterline.service.events import LOST, Event, Usage, check_text

LONGEST_ERROR_BYTES = 65_536
PASSED_ON = (b"user-agent",)  # of the request: the rest is between others, and the client's key is not for engines
PASSED_BACK = ("content-type", "cache-control")
STREAM, WHOLE = "text/event-stream", "application/json"  # what answers are made of
PATH = re.compile(r"(?<![\w:/.])(?!/v1/)(?:/[\w.@+~-]+){2,}/?|\b[A-Za-z]:\\[^\s\"']+")  # of a file, not of a URL
OUR_MISTAKES = (401, 403, 407)  # of the statuses from 400 on: the key is ours, the client can do nothing about it
BUSY = (429, 503)  # an engine that is full, or loads: not a sick one
UNABLE = 501  # it does not do such a thing, and nor do others of its kind: llama.cpp about embeddings


class UnansweredError(RejectedError):
    """The engine has not answered, or not to the end: somebody else may. Else this is what the client gets.

    Args:
        busy: it is well, but full.
        certain: it is the engine's fault, whatever the request was.
        silent: it let somebody wait in vain.
        absent: it takes no connections, which was found out at once.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 502,
        headers: Mapping[str, str] | None = None,
        busy: bool = False,
        certain: bool = True,
        silent: bool = False,
        absent: bool = False,
    ) -> None:
        super().__init__(message, status=status, code="engine_failed", headers=headers)
        self.busy = busy
        self.certain = certain
        self.silent = silent
        self.absent = absent


class BrokenStreamError(EngineError):
    """A stream broke off after the client got a part of the answer, and nobody can go on with it."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """What the client has got so far."""

    first_token_s: float = float("nan")
    events: int = 0  # of a stream, without [DONE]
    done: bool = False  # the stream has come to its end
    asked: Asked | None = None  # where there may be several answers
    prompt_tokens: int | None = None  # as the engine says, once it does
    told_output_tokens: int | None = None  # likewise
    cached_tokens: int = 0  # of the prompt, likewise
    told_thinking_tokens: int = 0  # likewise
    thoughts: int = 0  # events of a stream that are such
    # Usages of several answers, of the engine that is asked now: with the end of one of them, and by themselves.
    usages: tuple[list[Counts], list[Counts]] = field(default_factory=lambda: ([], []))

    @property
    def output_tokens(self) -> int:
        """What the engine says, else the events of the stream: engines send one for each token.

        A chat stream has two more: the role, and the reason it ended. Those that never ended have the first only.
        """
        seen = max(0, self.events - (2 if self.done else 1))
        if self.told_output_tokens is None:
            return seen
        is_all = self.done or not self.asked or self.asked.answers == 1  # else others may be under way
        return self.told_output_tokens if is_all else max(self.told_output_tokens, seen)

    @property
    def thinking_tokens(self) -> int:
        """Of those, what the engine calls thoughts, else the events of a stream that were some."""
        return min(self.output_tokens, max(self.told_thinking_tokens, self.thoughts))

    def saw(self, events: list[Event]) -> None:
        self.events += len(events)
        for event in events:
            for choice in event.choices or ():
                if choice.delta and (choice.delta.reasoning_content or choice.delta.reasoning):
                    self.thoughts += 1
            if event.usage:
                self._read(event, event.usage)
            elif event.timings:
                self.timed(event.timings)

    def _read(self, event: Event, usage: Usage) -> None:
        counts = read_counts(msgspec.structs.asdict(usage))
        if self.asked and self.asked.answers > 1:
            with_an_end, alone = self.usages
            if not event.choices:
                alone.append(counts)
            elif any(choice.finish_reason for choice in event.choices):
                with_an_end.append(counts)
            else:  # so far
                return
            counts = sum_of(alone or with_an_end, self.asked)
        self.told(counts)

    def ask_anew(self) -> None:
        """Another engine is asked, which counts for itself."""
        self.usages = ([], [])

    def told(self, counts: Counts) -> None:
        """Take what an engine says of tokens."""
        self.prompt_tokens = self.prompt_tokens if counts.prompt is None else counts.prompt
        self.told_output_tokens = self.told_output_tokens if counts.output is None else counts.output
        self.cached_tokens = counts.cached or self.cached_tokens
        self.told_thinking_tokens = counts.thinking or self.told_thinking_tokens

    def timed(self, timings: Any) -> None:
        """Take what llama.cpp says of the prompt where there is no usage: tokens kept from before, and read."""
        if self.prompt_tokens is None and isinstance(timings, dict):
            counts = [timings.get(name, 0) for name in ("cache_n", "prompt_n")]
            if all(isinstance(count, int) and count >= 0 for count in counts):
                self.told(Counts(prompt=sum(counts), cached=counts[0]))


async def ask(
    connections: Connections, engine: Engine, url: str, body: bytes, headers: Headers, *, stream: bool
) -> Response:
    """Return an answer that has begun well; the caller closes it.

    Raises:
        UnansweredError: it could not be reached, broke off or failed.
        RejectedError: it has refused the request (4xx); the client is told so in OpenAI's words.
    """
    passed_on = {name.decode(): value.decode("latin-1") for name, value in headers if name in PASSED_ON}
    passed_on["content-type"] = "application/json"  # what the body has proved to be, whatever the client called it
    passed_on |= engine.headers
    try:
        response = await connections.post(url, body, passed_on)
        try:
            await _check(response, engine, STREAM if stream else WHOLE)
        except BaseException:
            response.close()
            raise
    except AbsentError as error:  # it is gone, and about to be restarted
        raise UnansweredError(
            "The engine takes no connections.", status=503, headers=retry_after(1), absent=True
        ) from error
    except (OSError, ValueError) as error:  # ValueError: headers that nobody can send
        raise UnansweredError("The engine broke off.") from error
    return response


def passed_back(response: Response) -> Headers:
    """Return the headers the client should see; names of engines and hop-by-hop headers stay here."""
    return [
        (name.encode(), response.headers[name].encode("latin-1")) for name in PASSED_BACK if name in response.headers
    ]


async def read_whole(response: Response, progress: Progress) -> bytes:
    """Return an answer that comes whole. Raises UnansweredError when it breaks off or is no answer."""
    try:
        data = await response.read()
        check_text(data)
        whole = _WHOLE.decode(data)
    except OSError as error:
        raise UnansweredError("The engine broke off.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnansweredError("The engine's answer is no JSON object.") from error
    if whole.error is not None or any(choice.finish_reason in LOST for choice in whole.choices or ()):
        raise UnansweredError(f"The engine gave up: {engine_words(data)[0][:200]}")
    if isinstance(whole.usage, dict):
        counts = read_counts(whole.usage)
        progress.told(of_all(data, counts, whole.timings, progress.asked) if progress.asked else counts)
    progress.timed(whole.timings)
    progress.done = True
    return data


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Whole(msgspec.Struct):
    choices: list[_Choice] | None = None
    error: Any = None  # null is an error that is none, as in OpenAI's /v1/responses
    usage: Any = None
    timings: Any = None


_WHOLE = msgspec.json.Decoder(_Whole)


# --- Refusals -------------------------------------------------------------------------------------------------------


async def _check(response: Response, engine: Engine, wanted: str) -> None:
    if response.status != 200:
        await _raise_refusal(response, engine.faults)
    if response.content_type != wanted:
        raise UnansweredError(f"The engine answered with {response.content_type}, which is no answer.")


async def _raise_refusal(response: Response, faults: Mapping[str, str]) -> None:
    data = await _read_most(response, LONGEST_ERROR_BYTES)
    again = {name: response.headers[name] for name in ("retry-after",) if name in response.headers}
    raise refusal(data, faults, status=response.status, headers=again)


def refusal(
    data: bytes, faults: Mapping[str, str], *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> RejectedError:
    """Return what the engine said, and whose doing it is: a 4xx is the client's own, all else a reason to ask another.

    Args:
        data: the error as the engine words it.
        faults: codes by words in it, as `Engine` has them.
        status: of the answer; None where the error came as the first event of a stream and tells it itself.
        headers: of the answer that say when to ask again.
    """
    message, code, param = engine_words(data)
    status = status or _status_told(data)
    if status is None:
        return UnansweredError(f"The engine gave up: {message[:200]}")
    fault = next((code for words, code in faults.items() if words in message.lower()), None)
    if (fault and status == 500) or status == UNABLE:
        status = 400
    if 400 <= status < 500 and status not in {*OUR_MISTAKES, *BUSY}:
        code = fault or code or "engine_refused"
        return RejectedError(message, status=status, param=param, code=code, headers=headers)
    return UnansweredError(
        f"The engine answered {status}: {message}",
        status=status if status in BUSY else 502,
        headers=headers,
        busy=status in BUSY,
        certain=False,
    )


def _status_told(data: bytes) -> int | None:
    """Return the status that an error names as its code: vLLM, SGLang and llama.cpp do so."""
    try:
        code = orjson.loads(data)["error"]["code"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return None
    return code if isinstance(code, int) and 400 <= code < 600 else None


async def _read_most(response: Response, longest_bytes: int) -> bytes:
    data = b""
    while len(data) < longest_bytes and (more := await response.read_some()):
        data += more
    return data[:longest_bytes]


def engine_words(data: bytes) -> tuple[str, str | None, str | None]:
    """Return message, code and parameter of an engine's error, however it is shaped, as a client may read it."""
    try:
        said = orjson.loads(data)
    except orjson.JSONDecodeError:
        return _discreet(data.decode(errors="replace")), None, None
    error = said.get("error", said) if isinstance(said, dict) else said
    if not isinstance(error, dict):
        return _discreet(str(error)), None, None
    code = error["code"] if isinstance(error.get("code"), str) else error.get("type")  # llama.cpp's code is the status
    param = error.get("param")
    return (
        _discreet(str(error.get("message", said))),
        None if code is None else str(code),
        None if param is None else str(param),
    )


def _discreet(message: str) -> str:
    """Leave out where things are on the engine's machine, and the inside of its program: its own log has them."""
    return PATH.sub("…", message.partition("Traceback (most recent call last)")[0]).strip() or "no reason given"
