"""What a request asks: only what the gateway decides by. Everything else in a body is the engine's business."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import orjson
from msgspec import Meta, Struct

from waterline.service.errors import RejectedError

CHAT = "/chat/completions"
COMPLETIONS = "/completions"
BYTES_PER_TOKEN = 4  # of text, before an engine has counted: what tokenizers make of English

Tokens = Annotated[int, Meta(ge=0, lt=2**31)]


class _Part(Struct):
    type: str = ""
    text: str | None = None


class _ChatMessage(Struct):
    role: str
    content: str | list[_Part | str] | None = None


class _StreamOptions(Struct):
    include_usage: bool | None = None


class _Body(Struct):
    model: str
    stream: bool | None = None
    max_tokens: Tokens | None = None
    stream_options: _StreamOptions | None = None


class _ChatBody(_Body, kw_only=True):
    messages: list[_ChatMessage]
    max_completion_tokens: Tokens | None = None


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[str | int | list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request for tokens, as far as we look into it."""

    model: str
    stream: bool
    include_usage: bool  # at the end of the stream
    most_tokens: int | None  # the limit the client has set
    prompt_tokens: int  # estimated; at least 1
    fields: dict[str, Any]  # the whole body


def read_asked(endpoint: str, body: bytes) -> Asked:
    """Read the body of a request to CHAT or COMPLETIONS. Raises RejectedError naming the place that is wrong."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RejectedError(
            f"The body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.", code="bad_json"
        ) from error
    if not isinstance(fields, dict):
        raise RejectedError(f"The body should be a JSON object, not {type(fields).__name__}.", code="bad_json")
    try:
        if endpoint == CHAT:
            return _read_chat(msgspec.convert(fields, _ChatBody), fields)
        return _read_completion(msgspec.convert(fields, _CompletionBody), fields)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from error


def _read_chat(body: _ChatBody, fields: dict[str, Any]) -> Asked:
    if not body.messages:
        raise RejectedError("'messages' is empty. Send at least one message.", param="messages")
    size = 0
    for message in body.messages:
        content = message.content or ""
        for part in [content] if isinstance(content, str) else content:
            size += _size(part if isinstance(part, str) else part.text or "")
    most_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _asked(body, most_tokens, size // BYTES_PER_TOKEN, fields)


def _read_completion(body: _CompletionBody, fields: dict[str, Any]) -> Asked:
    if body.prompt == []:
        raise RejectedError("'prompt' is an empty list. Send text, or tokens.", param="prompt")
    tokens = 0
    for part in [body.prompt] if isinstance(body.prompt, str) else body.prompt:
        tokens += _size(part) // BYTES_PER_TOKEN if isinstance(part, str) else 1 if isinstance(part, int) else len(part)
    return _asked(body, body.max_tokens, tokens, fields)


def _asked(body: _Body, most_tokens: int | None, prompt_tokens: int, fields: dict[str, Any]) -> Asked:
    return Asked(
        model=body.model,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        most_tokens=most_tokens,
        prompt_tokens=max(1, prompt_tokens),
        fields=fields,
    )


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _explained(problem: str) -> RejectedError:
    """Turn what msgspec says into a sentence and the name of the parameter."""
    problem, _, where = problem.partition(" - at `$")
    param = where.rstrip("`").lstrip(".") or None
    if missing := re.search(r"missing required field `(.+)`", problem):
        param = f"{param}.{missing[1]}" if param else missing[1]
        return RejectedError(f"'{param}' is missing.", param=param, code="missing_parameter")
    return RejectedError(f"'{param}' is wrong: {problem[0].lower()}{problem[1:]}.", param=param, code="wrong_type")
