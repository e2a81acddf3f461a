"""The events of an engine's stream: read once, all of a chunk together, and whole and well-formed when they go on.

Of an event we know what tells how far an answer has got; the rest of it passes unread, and its bytes pass as they came.
"""

from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from waterline.errors import EngineError

LONGEST_EVENT_BYTES = 16 * 2**20
LOST = ("abort", "error")  # reasons to finish that are none: the engine gave up
UNREADABLE = "The engine sent an event that nobody can read."
DONE = b"data: [DONE]\n\n"


class BadEventError(EngineError):
    """The engine broke off, gave up, or sent what nobody can read."""


Id = Annotated[int, Meta(ge=0, le=2**63 - 1)]  # of a token


class Function(Struct):
    name: str | None = None
    arguments: str | None = None


class Call(Struct):
    index: int = 0
    function: Function | None = None


class Delta(Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # what vLLM calls it
    refusal: str | None = None
    tool_calls: list[Call] | None = None


class Choice(Struct):
    index: int = 0
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None
    logprobs: Any = None
    token_ids: list[Id] | None = None
    prompt_token_ids: list[Id] | None = None  # here in completions, in the event in chats


class Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Any = None
    completion_tokens_details: Any = None
    reasoning_tokens: Any = None  # where SGLang says it


class Event(Struct):
    choices: list[Choice] | None = None
    usage: Usage | None = None
    timings: Any = None  # llama.cpp's
    prompt_token_ids: list[Id] | None = None
    error: Any = None
    object: str | None = None


class _Anything(Struct):
    """Of an event in a form that we do not know, whether it tells of an error."""

    error: Any = None
    object: Any = None


UNKNOWN: Final = Event()  # stands for an event in a form that we do not know
_ANYTHING: Final = msgspec.json.Decoder(_Anything)
_EVENT: Final = msgspec.json.Decoder(Event)
_EVENTS: Final = msgspec.json.Decoder(list[Event])
_ERRORS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Events:
    """A stream, taken apart; no socket: `feed` it.

    Args:
        explain: says what an event means that tells of an error.
    """

    def __init__(self, explain: Callable[[bytes], str]) -> None:
        self._explain = explain
        self._rest = b""  # of an event that is not whole yet
        self.begun = False  # an event has come
        self.done = False  # [DONE] has come
        self.problem = ""  # with what follows the events that were returned last: the stream cannot go on
        self.refusal = b""  # what the engine said of it in the place of an answer: vLLM begins a stream before it looks
        self.latest: list[Event] = []  # those that were returned last

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes, b"" at their end, and return the events that are whole now."""
        if chunk:
            data = self._cut(self._rest + chunk if self._rest else chunk)
        else:
            data = self._cut_slowly(self._rest + b"\n\n")
            if not self.done and self.problem in {"", UNREADABLE}:
                self.problem = "The engine broke off." if self.begun or data else "The engine sent an empty answer."
        if data:
            self.begun = True
        return data

    def _cut(self, data: bytes) -> bytes:
        """Return the whole events up to the first that is wrong."""
        end = data.rfind(b"\n\n") + 2
        if end == 1 and b"\r\n\r\n" not in data:
            self._rest = data
            if len(data) > LONGEST_EVENT_BYTES:
                self.problem = "The engine sent an event without end."
            return b""
        whole = data[:end] if end < len(data) else data
        done = whole.endswith(DONE)
        if done:
            whole = whole[: -len(DONE)]
        plain = whole.startswith(b"data: {") and whole.endswith(b"\n\n")  # [DONE] may stand within a line, too
        if plain and (events := _read(whole)) and not any(map(_failed, events)):
            self._rest = data[end:] if end < len(data) else b""
            self.done, self.latest = done, events
            return whole
        return self._cut_slowly(data)

    def _cut_slowly(self, data: bytes) -> bytes:
        """Take events one by one: comments, other fields, other ends of lines, and those that are wrong."""
        good: list[bytes] = []
        self.latest = []
        *blocks, self._rest = data.replace(b"\r\n", b"\n").split(b"\n\n")
        for block in blocks:
            lines = [line for line in block.split(b"\n") if line and not line.startswith(b":")]
            said = b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))
            if said == b"null":  # llama.cpp opens so what it says to several prompts
                continue
            if said == b"[DONE]":
                self.done = True
                break
            if not said:
                continue
            event = None if b"\r" in block else _decoded(said)  # clients end a line there
            if event is None:
                self.problem = UNREADABLE
                break
            if _failed(event):
                self.problem = f"The engine gave up: {self._explain(said)[:200]}"
                self.refusal = b"" if self.begun or good else said
                break
            self.latest.append(event)
            good.append(b"\n".join(lines) + b"\n\n")
        return b"".join(good)


def read_events(data: bytes) -> list[Event]:
    """Return what whole events of ours say. Raises BadEventError."""
    if events := _read(data):
        return events
    raise BadEventError(UNREADABLE)


def _read(data: bytes) -> list[Event]:
    """Return what whole events say, each one line that begins with its data; none where one of them is not so."""
    if b"\r" in data:  # the end of a line, too
        return []
    try:
        check_text(data)
        said = data[6:-2]
        if b"\n" not in said:
            return [_EVENT.decode(said)]
        events = _EVENTS.decode(b"[%s]" % said.replace(b"\n\ndata: ", b","))
    except _ERRORS:
        return []
    return events if data.count(b"\n") == 2 * len(events) else []  # JSON may have others, where a blank may stand


def check_text(data: bytes) -> None:
    """Raise UnicodeDecodeError where bytes are no text: what is not decoded into something is not looked at else."""
    if not data.isascii():
        data.decode()


def _decoded(said: bytes) -> Event | None:
    """Return what an event says, UNKNOWN where its form is new to us; None when it is no JSON object."""
    try:
        check_text(said)
        return _EVENT.decode(said)
    except msgspec.ValidationError:
        pass
    except _ERRORS:
        return None
    try:
        anything = _ANYTHING.decode(said)
    except _ERRORS:
        return None
    failed = anything.error is not None or anything.object == "error"
    return Event(error=True) if failed else UNKNOWN


def _failed(event: Event) -> bool:
    if event.error is not None or event.object == "error":
        return True
    for choice in event.choices or ():  # noqa: SIM110 - twice as fast as `any`, and done for every token
        if choice.finish_reason in LOST:
            return True
    return False
