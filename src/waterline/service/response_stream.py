"""The events of a streamed response, made of those of a streamed chat completion, one as it comes."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import orjson

from waterline.errors import WaterlineError
from waterline.service.errors import error_json
from waterline.service.responses import Answer, Json, text_part
from waterline.service.upstream import UnansweredError

TEXT = {"text": "output_text.delta", "refusal": "refusal.delta", "thoughts": "reasoning_text.delta"}


@dataclass(slots=True, kw_only=True)
class Item:
    """One item of the output, as far as it has come."""

    kind: str  # "thoughts", "text", "refusal" or "call"
    id: str
    index: int  # in the output
    said: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    number: int = 0  # of a call
    call_id: str | None = None
    name: str | None = None

    @property
    def whole(self) -> str:
        return "".join(self.said)


class ResponseStream:
    """An `asgi.Edit` that turns chat completions into responses.

    Args:
        answer: what is said of the response.
        sequence: number of its next event.
        item: that is open, in a stream that another has begun.
    """

    def __init__(self, answer: Answer, *, sequence: int = 0, item: Item | None = None) -> None:
        self._answer = answer
        self._sequence = sequence
        self._events: list[bytes] = []
        self._output: list[Json] = []  # items that are whole
        self._open = item
        self._finish: str | None = None
        self._usage: Json | None = None
        self._begun, self._ended = item is not None, False

    def whole(self, data: bytes) -> bytes:
        """Return a response. Raises UnansweredError for what is no chat completion: another engine may know better."""
        try:
            return orjson.dumps(self._answer.of_chat(orjson.loads(data)))
        except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise UnansweredError("The engine's answer is no chat completion.") from error

    def chunk(self, data: bytes) -> bytes:
        for line in data.splitlines():
            if line.startswith(b"data:") and (event := _loaded(line[5:])):
                with suppress(
                    AttributeError, TypeError
                ):  # an event in a form that is new to us has nothing to say here
                    self._take(event)
        return self._taken()

    def last(self, data: bytes) -> bytes:
        said = self.chunk(data)
        self._end()
        return said + self._taken()

    def broken(self, error: WaterlineError) -> bytes:
        self._begin()
        problem = orjson.loads(error_json(error))["error"]
        failed = {"code": problem["code"], "message": problem["message"]}
        response = self._answer.response(self._output, finish=None, usage=self._usage, error=failed)
        self._say("response.failed", response=response)
        self._say("error", **failed, param=problem["param"])
        return self._taken()

    def _taken(self) -> bytes:
        said, self._events = b"".join(self._events), []
        return said

    def _say(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        self._events.append(b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n")

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            response = self._answer.response([], finish=None, usage=None)
            self._say("response.created", response=response)
            self._say("response.in_progress", response=response)

    def _take(self, event: Json) -> None:
        self._begin()
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            if thoughts := delta.get("reasoning_content") or delta.get("reasoning"):
                self._add("thoughts", thoughts)
            if text := delta.get("content"):
                self._add("text", text, (choice.get("logprobs") or {}).get("content"))
            if refusal := delta.get("refusal"):
                self._add("refusal", refusal)
            for call in delta.get("tool_calls") or ():
                self._call(call)
            self._finish = str(choice.get("finish_reason") or "") or self._finish

    def _end(self) -> None:
        if self._ended:
            return
        self._begin()
        self._ended = True
        self._close()
        if not any(item["type"] in {"message", "function_call"} for item in self._output):
            self._add("text", "")
            self._close()
        response = self._answer.response(self._output, finish=self._finish or "stop", usage=self._usage)
        self._say(f"response.{response['status']}", response=response)

    # --- Items ------------------------------------------------------------------------------------------------------

    def _item(self, kind: str, number: int = 0) -> Item:
        """Return the item that is open, when it is this one; else close that, and open this."""
        item = self._open
        if item and item.kind == kind and item.number == number:
            return item
        self._close()
        names = {"thoughts": "rs", "call": "fc"}
        index = len(self._output)
        item = self._open = Item(
            kind=kind, id=self._answer.id_of(names.get(kind, "msg"), index), index=index, number=number
        )
        return item

    def _announce(self, item: Item) -> None:
        self._say("response.output_item.added", output_index=item.index, item=self._shown(item, "in_progress"))
        if part := _part(item, ""):
            self._say("response.content_part.added", **_place(item), part=part)

    def _add(self, kind: str, text: Any, logprobs: list[Json] | None = None) -> None:
        text = text if isinstance(text, str) else str(text)  # an engine may say anything
        item = self._item(kind)
        if not item.said:
            self._announce(item)
        item.said.append(text)
        item.logprobs += logprobs or ()
        extra = {"logprobs": logprobs or []} if kind == "text" else {}
        self._say(f"response.{TEXT[kind]}", **_place(item), delta=text, **extra)

    def _call(self, call: Json) -> None:
        function, number = call.get("function") or {}, call.get("index") or 0
        item = self._item("call", number)
        if item.name is None:
            item.call_id, item.name = call.get("id"), function.get("name")
            self._announce(item)
        if arguments := str(function.get("arguments") or ""):
            item.said.append(arguments)
            self._say(
                "response.function_call_arguments.delta",
                item_id=item.id,
                output_index=item.index,
                delta=arguments,
            )

    def _close(self) -> None:
        item, self._open = self._open, None
        if not item:
            return
        whole = item.whole
        if item.kind == "call":
            self._say(
                "response.function_call_arguments.done",
                item_id=item.id,
                output_index=item.index,
                arguments=whole,
                name=item.name,
            )
        else:
            key = "refusal" if item.kind == "refusal" else "text"
            extra = {"logprobs": item.logprobs} if item.kind == "text" else {}
            done = TEXT[item.kind].replace("delta", "done")
            self._say(f"response.{done}", **_place(item), **{key: whole}, **extra)
            self._say("response.content_part.done", **_place(item), part=_part(item, whole))
        shown = self._shown(item, "completed")
        self._output.append(shown)
        self._say("response.output_item.done", output_index=item.index, item=shown)

    def _shown(self, item: Item, status: str) -> Json:
        answer, whole = self._answer, item.whole
        if item.kind == "call":
            shown = answer.call(item.number, item.call_id, item.name, whole, status)
        elif item.kind == "thoughts":
            shown = answer.reasoning(whole, status)
        elif item.kind == "refusal":
            shown = answer.message(None, whole, status=status)
        else:
            shown = answer.message(whole, None, {"content": item.logprobs}, status)
        return {**shown, "id": item.id}


def _place(item: Item) -> Json:
    return {"item_id": item.id, "output_index": item.index, "content_index": 0}


def _part(item: Item, text: str) -> Json | None:
    if item.kind == "call":
        return None
    if item.kind == "thoughts":
        return {"type": "reasoning_text", "text": text}
    return {"type": "refusal", "refusal": text} if item.kind == "refusal" else text_part(text, item.logprobs)


def _loaded(data: bytes) -> Json | None:
    try:
        event = orjson.loads(data)
    except orjson.JSONDecodeError:  # [DONE]
        return None
    return event if isinstance(event, dict) else None
