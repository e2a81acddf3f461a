"""What a stream has said so far: as little as it takes to have somebody else go on with it.

Ids and text of one event may part: a letter that takes two tokens comes with the second, a mark that ends thinking has
no text at all. So ids whose text has not been sent are told apart: they can be produced again.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from waterline.service.events import UNKNOWN, Choice, Delta, Event

THINKING = ("reasoning_content", "reasoning")  # what engines call it
PIECES = 256  # are joined, so that a long answer is few objects
STAMP = ("id", "created", "model", "object", "system_fingerprint")  # what every event of a stream repeats

Channel = tuple[int, str]  # the answer, by its index, and the part of it


@dataclass(slots=True, eq=False)
class Said:
    """What has been said in one stream, over all engines that had a part in it."""

    texts: dict[Channel, list[str]] = field(default_factory=dict)
    ids: "array[int]" = field(default_factory=lambda: array("q"))
    unspoken: int = 0  # of the ids, at their end: their text has not come yet
    told: bool = True  # every text came with its ids
    prompt_ids: list[int] | None = None
    pieces: int = 0  # events with text: a token each, as engines do
    roles: set[int] = field(default_factory=set)  # answers whose role was told
    unknown: bool = False  # something was said in a form that we do not know
    refusal: str = ""  # why an engine did not go on from here
    finished: dict[int, str] = field(default_factory=dict)  # by answer
    usage: bool = False
    first: bytes = b""  # events, which name the stream

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            if event is UNKNOWN:
                self.unknown = True
            if event.prompt_token_ids:
                self.prompt_ids = event.prompt_token_ids
            if not event.choices:
                self.usage = self.usage or event.usage is not None
            for choice in event.choices or ():
                self._add(choice)

    def _add(self, choice: Choice) -> None:
        """Note what one choice says; done for every token."""
        spoken = False
        for name, text in parts(choice):
            if text:
                spoken = True
                texts = self.texts.setdefault((choice.index, name), [])
                texts.append(text)
                if len(texts) >= PIECES:
                    texts[:] = ["".join(texts)]
        if choice.token_ids:
            self.ids.extend(choice.token_ids)
            said_all = spoken or choice.finish_reason  # the token that ends an answer has no text
            self.unspoken = 0 if said_all else self.unspoken + len(choice.token_ids)
        elif spoken:
            self.told = False
        self.pieces += spoken
        if choice.prompt_token_ids:
            self.prompt_ids = choice.prompt_token_ids
        if choice.delta and choice.delta.role:
            self.roles.add(choice.index)
        if choice.finish_reason:
            self.finished[choice.index] = choice.finish_reason

    def text(self, *names: str, index: int = 0) -> str:
        return "".join("".join(self.texts.get((index, name), ())) for name in names)

    def forget_unspoken(self) -> None:
        """Forget the ids whose text nobody has seen: the next engine produces them again."""
        if self.unspoken:
            del self.ids[-self.unspoken :]
            self.unspoken = 0

    @property
    def stamp(self) -> dict[str, Any]:
        for line in self.first.split(b"\n"):
            if line.startswith(b"data:"):
                event = orjson.loads(line[5:])
                return {name: event[name] for name in STAMP if name in event}
        return {}

    @property
    def exact(self) -> bool:
        """Whether all tokens are known by their ids."""
        return self.told and bool(self.ids) and self.prompt_ids is not None

    @property
    def tokens(self) -> int:
        """Produced and sent: as the ids say, else one for each text, and one for the mark that ends thinking."""
        if self.exact:
            return len(self.ids) - self.unspoken
        return self.pieces + bool(self.text(*THINKING) and self.text("content"))


def parts(choice: Choice) -> Iterable[tuple[str, str | None]]:
    """Return what an event says, part by part."""
    delta = choice.delta
    if delta is None:
        return (("text", choice.text),)
    if delta.content and not (delta.reasoning_content or delta.reasoning or delta.refusal or delta.tool_calls):
        return (("content", delta.content),)  # nearly all are such
    return _parts(delta)


def _parts(delta: Delta) -> Iterable[tuple[str, str | None]]:
    if delta.content:
        yield "content", delta.content
    if delta.reasoning_content:
        yield "reasoning_content", delta.reasoning_content
    elif delta.reasoning:
        yield "reasoning", delta.reasoning
    if delta.refusal:
        yield "refusal", delta.refusal
    for call in delta.tool_calls or ():
        if call.function:
            yield f"name of call {call.index}", call.function.name
            yield f"arguments of call {call.index}", call.function.arguments
