"""How a response goes on that an engine has made itself and not ended: as a chat, whose events take up its item.

That can be where all it has said is the text of a message: the text is put before the rest of the answer, as in
`continuation`. Thoughts, calls of tools and whatever only its own engine understands have no such form.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

from waterline.service.body import CHAT, Asked, read_asked
from waterline.service.continuation import RefusedError
from waterline.service.response_stream import Item, ResponseStream
from waterline.service.responses import Answer, Json, as_chat
from waterline.service.said import Said

BEGINS = ("response.queued", "response.created", "response.in_progress")  # nothing is said by them


class _Usage(Struct):
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: Any = None
    output_tokens_details: Any = None


class _Response(Struct):
    usage: _Usage | None = None


class Event(Struct):
    """An event of a response, as far as it is looked at."""

    type: str
    response: _Response | None = None
    sequence_number: Any = None
    output_index: Any = None
    content_index: Any = None
    item_id: Any = None
    item: Any = None
    part: Any = None
    delta: Any = None
    logprobs: Any = None


class _Begun(Struct):
    response: Json


@dataclass(slots=True, kw_only=True)
class Written:
    """What a client has of a response."""

    first: bytes = b""  # event, which has the response as it begins
    sequence: int = 0  # number of the next event
    place: tuple[Any, Any] = (None, None)  # id and index of the message that is being written
    texts: list[str] = field(default_factory=list)
    problem: str = ""  # why nobody else can go on

    def add(self, event: Event, said: bytes) -> None:
        """Note an event that goes to the client; `said` is its JSON."""
        number = event.sequence_number
        self.sequence = number + 1 if isinstance(number, int) else self.sequence + 1
        if event.type in BEGINS:
            self.first = self.first or said
        elif not self.problem and not self._is_text(event):
            self.problem = f"'{event.type}' has been sent"

    def _is_text(self, event: Event) -> bool:
        """Take what belongs to a message that is nothing but text; False for anything else."""
        here = (event.item_id, event.output_index) == self.place and event.content_index == 0
        if event.type == "response.output_text.delta":
            fits = here and isinstance(event.delta, str) and not event.logprobs
            self.texts += [event.delta] * fits
            return fits
        if event.type == "response.content_part.added":
            return here and not self.texts and _kind(event.part) == "output_text"
        if event.type == "response.output_item.added" and self.place == (None, None):
            self.place = (event.item.get("id"), event.output_index) if _kind(event.item) == "message" else self.place
        else:
            return False
        return isinstance(self.place[0], str) and self.place[1] == 0


def _kind(thing: Any) -> Any:
    return thing.get("type") if isinstance(thing, dict) else None


def as_rest_of(written: Written, body: bytes) -> tuple[Asked, Said, ResponseStream]:
    """Return the request for a response as one for a chat, what that has said, and what makes its rest of the chat's.

    Raises RefusedError, or RejectedError for what cannot be asked as a chat.
    """
    if written.problem or written.place[0] is None:
        raise RefusedError(f"{written.problem or 'it has not begun a message'}.")
    try:
        begun = msgspec.json.decode(written.first, type=_Begun).response
    except msgspec.DecodeError:
        raise RefusedError("it has not said how it begins.") from None
    chat, asked = as_chat(body)
    text = "".join(written.texts)
    said = Said(texts={(0, "content"): [text]} if text else {}, pieces=len(written.texts), told=False, roles={0})
    item = Item(kind="text", id=written.place[0], index=0, said=[text])
    return read_asked(CHAT, chat), said, ResponseStream(_Answer(asked, begun), sequence=written.sequence, item=item)


class _Answer(Answer):
    """A response as its first engine has begun it."""

    def __init__(self, asked: Json, begun: Json) -> None:
        super().__init__(asked, "")
        self._begun = begun

    def response(
        self, output: list[Json], *, finish: str | None, usage: Json | None, error: Json | None = None
    ) -> Json:
        ours = super().response(output, finish=finish, usage=usage, error=error)
        return self._begun | {name: ours[name] for name in ("status", "error", "incomplete_details", "output", "usage")}
