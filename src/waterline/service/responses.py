"""OpenAI's responses, made of chat completions: what is asked in one form is asked of engines in the other.

So it is for engines that make no responses themselves, or make them likewise (llama.cpp); those that do are asked as
they are, see `response_relay`. A stream of chat completions can go on on another engine. Nothing is stored: what would
need a memory of earlier responses, or tools that run here, is refused by name. What is in neither form passes as it is.
"""

import time
from collections.abc import Iterator
from typing import Any

import orjson

from waterline.service.body import loaded
from waterline.service.errors import RejectedError, shortened

RESPONSES = "/responses"
UNKNOWN_HERE = ("previous_response_id", "conversation", "prompt", "background")  # they need a memory
NOT_PASSED = (
    *("input", "instructions", "max_output_tokens", "text", "reasoning", "tools", "tool_choice", "top_logprobs"),
    *("store", "include", "truncation", "max_tool_calls", "metadata", *UNKNOWN_HERE),
)
PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}

Json = dict[str, Any]


def as_chat(body: bytes) -> tuple[bytes, Json]:
    """Return a request for a response as one for a chat completion, and what was asked. Raises RejectedError."""
    asked = loaded(body)
    if not isinstance(asked, dict):
        raise RejectedError(f"The body should be a JSON object, not {type(asked).__name__}.", code="bad_json")
    check_stateless(asked)
    chat: Json = {name: value for name, value in asked.items() if name not in NOT_PASSED}
    chat["messages"] = [*_instructions(asked), *_messages(_of(asked, "input", (str, list)))]
    if tools := _of(asked, "tools", list):
        chat["tools"] = [_tool(tool) for tool in tools]
        chat["tool_choice"] = _tool_choice(asked.get("tool_choice") or "auto")
    return orjson.dumps(chat | _renamed(asked)), asked


def check_stateless(asked: Json) -> None:
    """Raise RejectedError for what needs a memory: the next request may go to another replica, which has none of it."""
    for name in UNKNOWN_HERE:
        if asked.get(name):
            raise _unsupported(name, "Nothing is remembered here: send the whole conversation as 'input'")


def _renamed(asked: Json) -> Json:
    """Return what chat completions have other names for, where it is asked."""
    text, reasoning = _of(asked, "text", dict) or {}, _of(asked, "reasoning", dict) or {}
    form = _of(text, "format", dict)
    renamed = {
        "max_completion_tokens": asked.get("max_output_tokens"),
        "response_format": _response_format(form) if form else None,
        "verbosity": text.get("verbosity"),
        "reasoning_effort": reasoning.get("effort"),
        "logprobs": True if asked.get("top_logprobs") else None,
        "top_logprobs": asked.get("top_logprobs") or None,
        "stream_options": {"include_usage": True} if asked.get("stream") else None,
    }
    return {name: value for name, value in renamed.items() if value is not None}


# --- What is asked ----------------------------------------------------------------------------------------------------


def _of(asked: Json, name: str, kinds: type | tuple[type, ...]) -> Any:
    """Return a field that is of one of these kinds, or None. Raises RejectedError when it is of another."""
    value = asked.get(name)
    if value is not None and not isinstance(value, kinds):
        raise RejectedError(f"'{name}' is a {type(value).__name__}, which is wrong.", param=name, code="wrong_type")
    return value


def _unsupported(name: str, advice: str) -> RejectedError:
    return RejectedError(f"'{name}' is not supported. {advice}.", param=name, code="unsupported_parameter")


def _instructions(asked: Json) -> list[Json]:
    instructions = _of(asked, "instructions", str)
    return [{"role": "system", "content": instructions}] if instructions else []


def _messages(asked: str | list[Any] | None) -> list[Json]:
    if not asked:
        raise RejectedError("'input' is missing or empty.", param="input", code="missing_parameter")
    if isinstance(asked, str):
        return [{"role": "user", "content": asked}]
    messages: list[Json] = []
    for number, item in enumerate(asked):
        where = f"input[{number}]"
        if not isinstance(item, dict):
            raise RejectedError(f"'{where}' should be an object.", param=where, code="wrong_type")
        message = _message(item, where)
        if message and messages and "tool_calls" in message and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])  # of one turn
        elif message:
            messages.append(message)
    return messages


def _message(item: Json, where: str) -> Json | None:
    """Return an item of the input as a message; None for one that only reminds a model of its thoughts."""
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        return {"role": "system" if role == "developer" else role, "content": _content(item.get("content"), where)}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        output = item.get("output")
        content = output if isinstance(output, str) else _content(output, where)
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
    if kind == "reasoning":
        return None
    raise RejectedError(
        f"'{where}' is a '{shortened(str(kind))}', which is not supported. Known: message, function_call, "
        "function_call_output, reasoning.",
        param=where,
        code="unsupported_value",
    )


def _content(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    return [_part(part, f"{where}.content[{number}]") for number, part in enumerate(content)]


def _part(part: Any, where: str) -> Json:
    kind = str(part.get("type")) if isinstance(part, dict) else "None"
    if kind in PARTS:
        return {"type": PARTS[kind], PARTS[kind]: part.get(PARTS[kind])}
    if kind == "input_image" and part.get("image_url"):
        return {"type": "image_url", "image_url": {"url": part["image_url"], "detail": part.get("detail") or "auto"}}
    if kind == "input_audio":
        return {"type": "input_audio", "input_audio": part.get("input_audio")}
    raise RejectedError(
        f"'{where}' is a '{shortened(kind)}', which is not supported. Known: input_text, output_text, "
        "input_image with an image_url, input_audio.",
        param=where,
        code="unsupported_value",
    )


def _response_format(form: Json) -> Json:
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


def _tool(tool: Any) -> Json:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = shortened(str(tool.get("type") if isinstance(tool, dict) else tool))
        raise RejectedError(
            f"Tools of the type '{kind}' run nowhere here. Known: function, which your own program runs.",
            param="tools",
            code="unsupported_value",
        )
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


# --- What is answered -------------------------------------------------------------------------------------------------


class Answer:
    """What is said of one response, whole or in parts.

    Args:
        asked: as it came.
        request_id: of which the ids of its parts are made.
    """

    def __init__(self, asked: Json, request_id: str) -> None:
        self.asked = asked
        self._id = request_id
        self._created = int(time.time())

    def id_of(self, kind: str, number: int = 0) -> str:
        return f"{kind}_{self._id}{number or ''}"

    def response(
        self, output: list[Json], *, finish: str | None, usage: Json | None, error: Json | None = None
    ) -> Json:
        """Return the object that OpenAI calls a response; `finish` is None while it goes on."""
        asked = self.asked
        cut = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(str(finish))
        status = "failed" if error else "incomplete" if cut else "completed" if finish else "in_progress"
        return {
            "id": self.id_of("resp"),
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": cut} if cut else None,
            "instructions": asked.get("instructions"),
            "max_output_tokens": asked.get("max_output_tokens"),
            "metadata": asked.get("metadata") or {},
            "model": asked.get("model"),
            "output": output,
            "parallel_tool_calls": asked.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None, **(asked.get("reasoning") or {})},
            "service_tier": asked.get("service_tier"),
            "store": False,
            "temperature": asked.get("temperature"),
            "text": {"format": {"type": "text"}, **(asked.get("text") or {})},
            "tool_choice": asked.get("tool_choice") or "auto",
            "tools": asked.get("tools") or [],
            "top_p": asked.get("top_p"),
            "truncation": "disabled",
            "usage": _usage(usage) if usage else None,
        }

    def of_chat(self, chat: Json) -> Json:
        """Return a chat completion as a response."""
        choice = (chat.get("choices") or [{}])[0]
        output = list(self._items(choice.get("message") or {}, choice.get("logprobs")))
        return self.response(output, finish=choice.get("finish_reason") or "stop", usage=chat.get("usage"))

    def _items(self, message: Json, logprobs: Json | None) -> Iterator[Json]:
        if thoughts := message.get("reasoning_content") or message.get("reasoning"):
            yield self.reasoning(thoughts)
        calls = message.get("tool_calls") or []
        if message.get("content") or message.get("refusal") or not calls:
            yield self.message(message.get("content"), message.get("refusal"), logprobs)
        for number, call in enumerate(calls):
            function = call.get("function") or {}
            yield self.call(number, call.get("id"), function.get("name"), function.get("arguments") or "")

    def reasoning(self, text: str, status: str = "completed") -> Json:
        content = [{"type": "reasoning_text", "text": text}] if text else []
        return {"id": self.id_of("rs"), "type": "reasoning", "summary": [], "content": content, "status": status}

    def message(
        self, text: str | None, refusal: str | None = None, logprobs: Json | None = None, status: str = "completed"
    ) -> Json:
        content = [text_part(text or "", (logprobs or {}).get("content"))] if text or not refusal else []
        content += [{"type": "refusal", "refusal": refusal}] if refusal else []
        return {
            "id": self.id_of("msg"),
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content if status == "completed" else [],
        }

    def call(self, number: int, call_id: Any, name: Any, arguments: str, status: str = "completed") -> Json:
        return {
            "id": self.id_of("fc", number),
            "type": "function_call",
            "status": status,
            "call_id": call_id or self.id_of("call", number),
            "name": name,
            "arguments": arguments,
        }


def text_part(text: str, logprobs: list[Json] | None = None) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def _usage(usage: Json) -> Json:
    prompt, output = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thinking = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": thinking},
        "total_tokens": prompt + output,
    }
