"""How another engine is asked to go on with a stream, so that nobody notices.

An engine that tells the ids of its tokens is gone on with exactly: the ids of the prompt and of what was produced are
the next engine's prompt. Else what was said is put before it as text. Where neither is right (a grammar would begin
anew, several answers are under way) but the request is one that is answered alike each time, it is asked once more,
and what the client has is left out, after comparing. What is left is refused.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from waterline.service.body import CHAT, COMPLETIONS, Asked
from waterline.service.engines.dialect import Dialect
from waterline.service.said import THINKING, Said
from waterline.service.weave import Weave

GUIDED = ("structured_outputs", "grammar", "json_schema", "regex", "ebnf", "functions")
BRANCHING = ("best_of", "use_beam_search", "echo", "suffix", "logprobs", "prompt_logprobs")
LIMITS = ("max_tokens", "max_completion_tokens")
COUNTED = ("min_tokens", "thinking_token_budget", "thinking_budget_tokens", "reasoning_budget_tokens")
OF_CHATS = (  # what a completion knows nothing of
    *("messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "max_completion_tokens"),
    *("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "documents"),
    *("reasoning_effort", "include_reasoning", "separate_reasoning", "modalities"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """What another engine is asked, and how its answer becomes the rest of the stream."""

    path: str  # below /v1
    fields: dict[str, Any]  # of the body
    weave: Weave


class RefusedError(Exception):
    """Nobody can go on with a stream; says why."""


def resume(asked: Asked, path: str, said: Said, dialect: Dialect, max_context_tokens: int) -> Resume:
    """Return how an engine is asked to go on with a stream. Raises RefusedError.

    Args:
        asked: what the client wants.
        path: of its request, below /v1.
        said: what it has got.
        dialect: of the engine that is to go on.
        max_context_tokens: of the engine.
    """
    fields = asked.fields
    said.forget_unspoken()
    if path not in {CHAT, COMPLETIONS} or said.unknown:
        raise RefusedError("the form of this answer is not known here.")
    if not said.texts:
        return _once_more(fields, path, said, dialect)
    if ended(asked, said):
        return _count(fields, path, said)
    obstacle = said.refusal or _obstacle(asked, fields, said)
    if not obstacle and _ids_suffice(fields, path, said, dialect):
        return _by_ids(asked, fields, path, said, dialect, max_context_tokens)
    if not obstacle and (body := _by_text(asked, fields, path, said, dialect)):
        weave = Weave(said, earlier_tokens=said.tokens)
        said.told = False  # the next engine takes the text apart in its own way
        return Resume(path=path, fields=body | _wishes(path, dialect), weave=weave)
    if fields.get("temperature") == 0 or fields.get("seed") is not None or fields.get("top_k") == 1:
        return _once_more(fields, path, said, dialect)
    raise RefusedError(f"{obstacle or 'its engine cannot be handed what was said before'}.")


def ended(asked: Asked, said: Said) -> bool:
    """Whether all has been said, and only the end of the stream is missing."""
    if len(said.finished) >= asked.answers:
        return True
    return asked.answers == 1 and asked.most_tokens is not None and 0 < asked.most_tokens <= said.tokens


def wishes(asked: Asked, path: str, dialect: Dialect) -> dict[str, Any]:
    """Return what we ask of an engine beside what the client does: fields of the body the client has not set."""
    return {name: value for name, value in _wishes(path, dialect).items() if b'"%s"' % name.encode() not in asked.body}


def _wishes(path: str, dialect: Dialect) -> dict[str, Any]:
    return {"return_token_ids": True} if path in dialect.token_ids else {}


def _obstacle(asked: Asked, fields: dict[str, Any], said: Said) -> str:
    """Say why nobody can go on from the middle of an answer; "" where somebody can."""
    form = fields.get("response_format")
    guides = [name for name, value in fields.items() if value and (name in GUIDED or name.startswith("guided_"))]
    if isinstance(form, dict) and form.get("type") != "text":
        guides.append("response_format")
    if fields.get("tools") and fields.get("tool_choice") not in {None, "auto", "none"}:
        guides.append("tool_choice")
    obstacles = [f"its form is guided by {name}" for name in guides]
    obstacles += [f"it asks for {name}" for name in BRANCHING if fields.get(name)]
    if any(name.startswith(("name", "arguments")) for _, name in said.texts):
        obstacles.append("it is in the middle of a tool call")
    if asked.answers > 1:
        obstacles.append(f"it asks for {asked.answers} answers at once")
    return obstacles[0] if obstacles else ""


def _ids_suffice(fields: dict[str, Any], path: str, said: Said, dialect: Dialect) -> bool:
    if not (said.exact and COMPLETIONS in dialect.token_ids):
        return False
    if _in_thought(said) and not dialect.end_of_thinking:
        return False
    if fields.get("stop"):  # text is held back while it may become one, so ids run ahead of it
        return False
    if path == COMPLETIONS:
        return True
    uses_tools = fields.get("tools") and fields.get("tool_choice") != "none"
    contents = [message.get("content") for message in fields["messages"]]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return not uses_tools and all(isinstance(part, str) or part.get("type") == "text" for part in parts)


def _in_thought(said: Said) -> bool:
    return bool(said.text(*THINKING)) and not said.text("content")


def _by_ids(
    asked: Asked, fields: dict[str, Any], path: str, said: Said, dialect: Dialect, max_context_tokens: int
) -> Resume:
    assert said.prompt_ids is not None  # noqa: S101 - or it would not be exact
    ids = [*said.prompt_ids, *said.ids]
    body = {name: value for name, value in fields.items() if path == COMPLETIONS or name not in OF_CHATS}
    body["max_tokens"] = max(1, max_context_tokens - len(ids))
    body |= _limits(asked, body, path, said, dialect)
    thinking = dialect.end_of_thinking if _in_thought(said) else ""
    if thinking:
        body["skip_special_tokens"] = False  # the mark that ends thinking may be one
    body |= {"prompt": ids, "stream": True, **_wishes(COMPLETIONS, dialect)}
    weave = Weave(said, earlier_tokens=said.tokens, as_chat=path == CHAT, thinking=thinking)
    return Resume(path=COMPLETIONS, fields=body, weave=weave)


def _by_text(asked: Asked, fields: dict[str, Any], path: str, said: Said, dialect: Dialect) -> dict[str, Any]:
    """Return the request with what was said put before the rest of the answer; empty where that cannot be."""
    limits = _limits(asked, fields, path, said, dialect)
    if path == COMPLETIONS:
        prompt = fields["prompt"]
        if isinstance(prompt, list) and len(prompt) == 1:
            [prompt] = prompt
        return {**fields, "prompt": prompt + said.text("text"), **limits} if isinstance(prompt, str) else {}
    content, thoughts = said.text("content"), said.text(*THINKING)
    if dialect.prefill is None or said.text("refusal") or not (content or dialect.prefill_thinking):
        return {}
    messages = list(fields["messages"])
    message: dict[str, Any] = {"role": "assistant"}
    if messages[-1].get("role") == "assistant":  # the client has begun the answer itself
        message = messages.pop()
        if not isinstance(message.get("content"), str):
            return {}
        content = message["content"] + content
    message = {**message, "content": content, **({"reasoning_content": thoughts} if thoughts else {})}
    return {**fields, "messages": [*messages, message], **dialect.prefill, **limits}


def _limits(asked: Asked, fields: dict[str, Any], path: str, said: Said, dialect: Dialect) -> dict[str, Any]:
    """Return the limits of a request, less what has been produced."""
    counted = {name: max(0, fields[name] - said.tokens) for name in COUNTED if isinstance(fields.get(name), int)}
    most_tokens = asked.most_tokens
    if most_tokens is None and path == COMPLETIONS:
        most_tokens = dialect.completion_tokens
    if most_tokens is None:
        return counted
    left = max(1, most_tokens - said.tokens)
    named = [name for name in LIMITS if fields.get(name) is not None] or ["max_tokens"]
    return counted | dict.fromkeys(named, left)


def _once_more(fields: dict[str, Any], path: str, said: Said, dialect: Dialect) -> Resume:
    """Ask for the whole answer; of it, what the client has is left out."""
    weave = Weave(said, left_out={channel: "".join(texts) for channel, texts in said.texts.items()})
    return Resume(path=path, fields=fields | _wishes(path, dialect), weave=weave)


def _count(fields: dict[str, Any], path: str, said: Said) -> Resume:
    """Ask for one token, and leave it out: how long the prompt is, only an engine knows."""
    limits = dict.fromkeys([name for name in LIMITS if fields.get(name) is not None] or ["max_tokens"], 1)
    body = {**fields, **limits, "stream_options": {"include_usage": True}}
    return Resume(path=path, fields=body, weave=Weave(said, earlier_tokens=said.tokens, counts=True))


def missing_reason(said: Said) -> bytes:
    """Return the event that says why an answer ended which has all its tokens; b"" where it has come."""
    if said.finished:
        return b""
    said.finished[0] = "length"
    rest: dict[str, Any] = {"text": ""} if (0, "text") in said.texts else {"delta": {}}
    return _event(said, [{"index": 0, **rest, "logprobs": None, "finish_reason": "length"}])


def missing_usage(said: Said) -> bytes:
    """Return the event that counts tokens; b"" where it has come, or the length of the prompt is not known."""
    if said.usage or said.prompt_ids is None:
        return b""
    prompt, output = len(said.prompt_ids), said.tokens
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return _event(said, [], usage=usage)


def _event(said: Said, choices: list[dict[str, Any]], **more: Any) -> bytes:
    return b"data: " + orjson.dumps({**said.stamp, "choices": choices, **more}) + b"\n\n"
