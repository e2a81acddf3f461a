"""How another engine's answer becomes the rest of a stream: one name, no token twice, counts that add up."""

from collections.abc import Iterable
from typing import Any

import orjson

from waterline.service.events import UNREADABLE, BadEventError
from waterline.service.said import THINKING, Channel, Said

ANOTHER = "The engine was asked once more, and gave another answer."


class Weave:
    """Makes events of another answer into events of a stream that has begun.

    Args:
        said: what the stream has said.
        earlier_tokens: of it that the other engine reads as a part of its prompt.
        as_chat: the answer is a completion, the stream a chat.
        thinking: … which is in the middle of a thought: until this mark, in text that nobody has parsed.
        left_out: what the answer repeats, part by part.
        counts: nothing of the answer is wanted but the length of its prompt.
    """

    def __init__(
        self,
        said: Said,
        *,
        earlier_tokens: int = 0,
        as_chat: bool = False,
        thinking: str = "",
        left_out: dict[Channel, str] | None = None,
        counts: bool = False,
    ) -> None:
        self._said = said
        self._stamp = said.stamp
        self._roles = frozenset(said.roles)
        self._finished = frozenset(said.finished)
        self._earlier_tokens = earlier_tokens
        self._as_chat = as_chat
        self._thinking = thinking
        self._answering = left_out is None and bool(said.text("content"))
        self._thought = next((name for name in THINKING if said.text(name)), THINKING[0])
        self._held = ""  # of a thought: it may be the beginning of the mark that ends it
        self._left_out = left_out
        self._counts = counts

    def events(self, data: bytes) -> bytes:
        """Return whole events as the client should see them. Raises BadEventError when they do not fit."""
        woven = []
        for block in data[:-2].split(b"\n\n"):
            lines = [line[5:] for line in block.split(b"\n") if line.startswith(b"data:")]
            try:
                event = orjson.loads(b"\n".join(lines))
            except orjson.JSONDecodeError as error:
                raise BadEventError(UNREADABLE) from error
            if self._turned(event):
                woven.append(b"data: " + orjson.dumps(event) + b"\n\n")
        return b"".join(woven)

    def _turned(self, event: dict[str, Any]) -> bool:
        """Turn an event into one of the stream; False when nothing of it is left."""
        event |= self._stamp
        event.pop("timings", None)  # of a part of the answer only
        if self._left_out is None:
            event.pop("prompt_token_ids", None)
        usage = event.get("usage")
        if usage:
            self._sum(usage)
        event["choices"] = [choice for choice in event.get("choices") or () if self._turned_choice(choice)]
        return bool(event["choices"] or usage)

    def _sum(self, usage: dict[str, Any]) -> None:
        if self._counts:
            usage["completion_tokens"] = self._earlier_tokens
        else:
            usage["prompt_tokens"] = max(0, (usage.get("prompt_tokens") or 0) - self._earlier_tokens)
            usage["completion_tokens"] = (usage.get("completion_tokens") or 0) + self._earlier_tokens
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):  # of what was said, too
            details["cached_tokens"] = min(details["cached_tokens"], usage.get("prompt_tokens", 0))
        usage["total_tokens"] = usage.get("prompt_tokens", 0) + usage["completion_tokens"]

    def _turned_choice(self, choice: dict[str, Any]) -> bool:
        if self._counts:
            return False
        if self._left_out is None:
            choice.pop("prompt_token_ids", None)
        if self._as_chat:
            text, last = choice.pop("text", None) or "", bool(choice.get("finish_reason"))
            choice["delta"] = self._parted(text, last=last)
        delta, index = choice.get("delta"), choice.get("index", 0)
        if isinstance(delta, dict) and self._answering:
            _without_thoughts(delta)
        if isinstance(delta, dict) and index in self._roles and delta.pop("role", None):
            for name in [name for name, value in delta.items() if not value]:
                del delta[name]
        if self._left_out and not self._shortened(choice):
            return False
        if index in self._finished:  # one of several answers; what it says is what was said
            return False
        return bool(delta or choice.get("text") or choice.get("finish_reason") or choice.get("token_ids"))

    def _parted(self, text: str, *, last: bool) -> dict[str, str]:
        """Part text into a thought and what follows it."""
        if not self._thinking:
            return {"content": text} if text else {}
        thought, mark, content = (self._held + text).partition(self._thinking)
        self._held = ""
        if mark:
            self._thinking = ""
        elif not last:
            sizes = range(len(self._thinking) - 1, 0, -1)
            held = next((size for size in sizes if thought.endswith(self._thinking[:size])), 0)
            thought, self._held = thought[: len(thought) - held], thought[len(thought) - held :]
        return {name: part for name, part in ((self._thought, thought), ("content", content)) if part}

    def _shortened(self, choice: dict[str, Any]) -> bool:
        """Leave out what the client has; False when that is all of it. Raises BadEventError where the two differ."""
        index, found, rest = choice.get("index", 0), False, False
        delta = choice.get("delta") or {}
        places = [(choice, "text", "text"), *((delta, name, name) for name in ("content", *THINKING, "refusal"))]
        for call in delta.get("tool_calls") or ():
            function, number = call.get("function") or {}, call.get("index", 0)
            places += [
                (function, "name", f"name of call {number}"),
                (function, "arguments", f"arguments of call {number}"),
            ]
        for place, name, channel in places:
            if text := place.get(name):
                left = self._without(text, (index, channel))
                found, rest = found or left != text, rest or bool(left)
                place[name] = left
                if not left:
                    del place[name]
        for call in delta.get("tool_calls") or ():
            if found and "name" not in (call.get("function") or {}):  # it has been named, and has an id
                call.pop("id", None)
                call.pop("type", None)
        pending = any(left for (answer, _), left in self._left_out_items() if answer == index)
        if (pending and choice.get("finish_reason")) or (found and rest and choice.get("logprobs")):
            raise BadEventError(ANOTHER)
        if found:
            choice.pop("token_ids", None)
            self._said.told = self._said.told and not rest
        return rest or bool(choice.get("finish_reason")) or not (found or pending)

    def _without(self, text: str, channel: Channel) -> str:
        assert self._left_out is not None  # noqa: S101 - who calls has looked
        left = self._left_out.get(channel, "")
        both = min(len(left), len(text))
        if left[:both] != text[:both]:
            raise BadEventError(ANOTHER)
        if left:
            self._left_out[channel] = left[both:]
        return text[both:]

    def _left_out_items(self) -> Iterable[tuple[Channel, str]]:
        return (self._left_out or {}).items()


def _without_thoughts(delta: dict[str, Any]) -> None:
    """Make what an engine takes for a thought a part of the answer.

    One that goes on with an answer that has begun may not see, in its prompt, that the thought before it has ended.
    """
    thoughts = [text for name in THINKING if (text := delta.pop(name, None))]
    if thoughts:
        delta["content"] = thoughts[0] + (delta.get("content") or "")
