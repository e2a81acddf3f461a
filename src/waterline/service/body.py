"""What a request asks: only what the gateway decides by. Everything else in a body is the engine's business."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Annotated, Any, cast

import msgspec
import orjson
from msgspec import UNSET, Meta, Struct, UnsetType

from waterline.service.errors import RejectedError
from waterline.service.media import Part, check_links, text_of

CHAT = "/chat/completions"
COMPLETIONS = "/completions"
EMBEDDINGS = "/embeddings"
BYTES_PER_TOKEN = 4  # of text, before an engine has counted: what tokenizers make of English
TOKENS_PER_MESSAGE = 4  # its role, and the marks where it begins and ends
LONGEST_TOKEN_BYTES = 128  # vocabularies hold runs of that many blanks or dashes; words are much shorter

# What clients have no say in, and what they may say instead. Read from vLLM 0.33, SGLang 0.5.23 and llama.cpp's server:
# who goes first and where, whose cache is read and over which connection, by which name a request is ended (SGLang ends
# all whose names begin alike), with which weights; code; and other names for what the gateway decides by.
LEAVE_OUT = "Leave it out"
STEERING = {
    **dict.fromkeys(
        ("priority", "data_parallel_rank", "routed_dp_rank", "disagg_prefill_dp_rank", "id_slot"), LEAVE_OUT
    ),
    **dict.fromkeys(("kv_transfer_params", "ec_transfer_params", "session_params"), LEAVE_OUT),
    **dict.fromkeys(("bootstrap_host", "bootstrap_port", "bootstrap_room"), LEAVE_OUT),
    **dict.fromkeys(("rid", "request_id"), "Say X-Request-Id in a header"),
    **dict.fromkeys(("custom_logit_processor", "logits_processors"), LEAVE_OUT),
    **dict.fromkeys(("lora", "lora_path"), "Say which model by 'model'"),
    "n_predict": "Say max_tokens",
    "n_cmpl": "Say n",
}
UNSAID = {"priority": 0, "id_slot": -1, "n_cmpl": 1}  # means nothing, as do these:
NOTHING: tuple[Any, ...] = (None, "", [], {})

Tokens = Annotated[int, Meta(ge=0, lt=2**31)]


class _ChatMessage(Struct):
    role: str
    content: str | list[Part | str] | None = None


class _StreamOptions(Struct):
    include_usage: bool | None = None


class Steering(Struct):
    """Fields of engines that are between them and us."""

    priority: Any = None
    data_parallel_rank: Any = None
    routed_dp_rank: Any = None
    disagg_prefill_dp_rank: Any = None
    id_slot: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None
    session_params: Any = None
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    rid: Any = None
    request_id: Any = None
    custom_logit_processor: Any = None
    logits_processors: Any = None
    lora: Any = None
    lora_path: Any = None
    n_predict: Any = None
    n_cmpl: Any = None
    vllm_xargs: "Steering | None" = None  # in which it looks for some of them
    mm_processor_kwargs: Part | None = None
    media_io_kwargs: Part | None = None

    def check(self) -> None:
        """Raise RejectedError where a client wants to steer an engine."""
        if _steering(self) != UNSTEERED:  # a look at all of them: hardly anybody says any
            self._check()

    def _check(self) -> None:
        for name, instead in STEERING.items():
            if (value := getattr(self, name)) not in NOTHING and value != UNSAID.get(name):
                raise RejectedError(
                    f"'{name}' is not for clients. {instead}.", param=name, code="unsupported_parameter"
                )
        if self.vllm_xargs:
            self.vllm_xargs.check()
        for settings in (self.mm_processor_kwargs, self.media_io_kwargs):
            if settings:
                check_links(settings)


_steering = attrgetter(*Steering.__struct_fields__)
UNSTEERED = _steering(Steering())


class _Body(Steering, kw_only=True):
    model: str
    stream: bool | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None  # of a completion for llama.cpp alone
    stream_options: _StreamOptions | UnsetType | None = UNSET
    n: Annotated[int, Meta(ge=1, le=128)] | None = None  # OpenAI's limit
    service_tier: str | None = None


class _ChatBody(_Body, kw_only=True):
    messages: list[_ChatMessage]


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[str | int | list[int]]


class _EmbeddingBody(Steering, kw_only=True):
    model: str
    input: str | list[str | int | list[int] | Part] | UnsetType = UNSET
    messages: list[_ChatMessage] = []  # which vLLM takes instead


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request for tokens, as far as we look into it."""

    endpoint: str  # CHAT, COMPLETIONS or EMBEDDINGS
    model: str
    stream: bool
    include_usage: bool  # at the end of the stream: the client wants it; we always do
    most_tokens: int | None  # the limit the client has set, of each answer
    answers: int  # how many it wants: `n` for each of its prompts
    prompt_tokens: int  # estimated, of all its prompts; at least 1
    fewest_tokens: int  # its longest prompt has no fewer, whatever the tokenizer
    is_patient: bool = False  # it says service_tier "flex": it would rather wait than be refused
    body: bytes = field(repr=False)  # for an engine: as it came, but a stream is to end with its usage

    @property
    def fields(self) -> dict[str, Any]:
        """The whole body, decoded again: few need it. Raises RejectedError for JSON that only we could read."""
        return loaded(self.body)

    def check_context(self, max_context_tokens: int) -> None:
        """Raise RejectedError when no engine could hold the prompt and a token of an answer."""
        if self.fewest_tokens >= max_context_tokens:
            raise RejectedError(
                f"This model's maximum context length is {max_context_tokens} tokens, prompt and answer; the prompt "
                f"has at least {self.fewest_tokens}. Send a shorter one.",  # clients look for OpenAI's words
                param="messages" if self.endpoint == CHAT else "prompt" if self.endpoint == COMPLETIONS else "input",
                code="context_length_exceeded",
            )


def read_asked(endpoint: str, body: bytes) -> Asked:
    """Read the body of a request to CHAT, COMPLETIONS or EMBEDDINGS. Raises RejectedError naming what is wrong."""
    try:
        if not body.isascii():
            body.decode()  # the decoder skips over what it does not know, letters and all
        if endpoint == CHAT:
            return _read_chat(_CHAT.decode(body), body)
        if endpoint == EMBEDDINGS:
            return _read_embedding(_EMBEDDING.decode(body), body)
        return _read_completion(_COMPLETION.decode(body), body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise explained(error, body) from error


_CHAT = msgspec.json.Decoder(_ChatBody)
_COMPLETION = msgspec.json.Decoder(_CompletionBody)
_EMBEDDING = msgspec.json.Decoder(_EmbeddingBody)
WITH_USAGE = b'{"stream_options":{"include_usage":true},'


def _read_chat(asked: _ChatBody, body: bytes) -> Asked:
    if not asked.messages:
        raise RejectedError("'messages' is empty. Send at least one message.", param="messages", code="empty_array")
    sizes = list(map(_message_size, asked.messages))
    most_tokens = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    prompt_tokens = sum(map(estimated_tokens, sizes)) + TOKENS_PER_MESSAGE * len(sizes)
    return _asked(asked, body, most_tokens, prompt_tokens, sum(sizes) // LONGEST_TOKEN_BYTES)


def estimated_tokens(size: int) -> int:
    """Return the tokens of a text of so many bytes, as far as is known; rounded up, for quotas are set aside by it."""
    return -(-size // BYTES_PER_TOKEN)


def _message_size(message: _ChatMessage) -> int:
    """Return the bytes of its text. Raises RejectedError where it has an engine fetch what is not public."""
    content, size = message.content or "", 0
    if isinstance(content, str):
        return _size(content)
    for part in content:
        size += _part_size(part)
    return size


def _part_size(part: Part | str) -> int:
    if isinstance(part, str):
        return _size(part)
    check_links(part)
    return _size(text_of(part))


def _read_completion(asked: _CompletionBody, body: bytes) -> Asked:
    tokens, fewest, prompts = _measured(asked.prompt, "prompt")
    limits = [most for most in (asked.max_tokens, asked.max_completion_tokens) if most is not None]
    return _asked(asked, body, max(limits, default=None), tokens, fewest, prompts)


def _read_embedding(asked: _EmbeddingBody, body: bytes) -> Asked:
    asked.check()
    if asked.input is UNSET and not asked.messages:
        raise RejectedError("'input' is missing.", param="input", code="missing_parameter")
    tokens, fewest, _ = (0, 0, 1) if asked.input is UNSET else _measured(asked.input, "input")
    tokens += sum(estimated_tokens(_message_size(message)) for message in asked.messages)
    return Asked(
        endpoint=EMBEDDINGS,
        model=asked.model,
        stream=False,
        include_usage=False,
        most_tokens=0,
        answers=1,
        prompt_tokens=max(1, tokens),
        fewest_tokens=fewest,
        body=body,
    )


def _measured(prompt: str | Sequence[str | int | list[int] | Part], param: str) -> tuple[int, int, int]:
    """Return the tokens of prompts, the fewest the longest of them may have, and how many prompts there are."""
    if prompt == []:
        raise RejectedError(f"'{param}' is an empty list. Send text, or tokens.", param=param, code="empty_array")
    parts = [prompt] if isinstance(prompt, str) else prompt
    alone = sum(isinstance(part, int) for part in parts)  # tokens that stand by themselves are one prompt
    tokens, fewest = alone, alone
    for part in parts:
        if isinstance(part, str | dict):
            size = _part_size(part)
            tokens += estimated_tokens(size)
            fewest = max(fewest, size // LONGEST_TOKEN_BYTES)
        elif isinstance(part, list):
            tokens += len(part)
            fewest = max(fewest, len(part))
    return tokens, fewest, len(parts) - alone + bool(alone)


def _asked(
    asked: _Body, body: bytes, most_tokens: int | None, prompt_tokens: int, fewest_tokens: int, prompts: int = 1
) -> Asked:
    asked.check()
    options = asked.stream_options
    include_usage = isinstance(options, _StreamOptions) and bool(options.include_usage)
    return Asked(
        endpoint=CHAT if isinstance(asked, _ChatBody) else COMPLETIONS,
        model=asked.model,
        stream=bool(asked.stream),
        include_usage=include_usage,
        most_tokens=most_tokens,
        answers=prompts * (asked.n or 1),
        prompt_tokens=max(1, prompt_tokens),
        fewest_tokens=fewest_tokens,
        is_patient=asked.service_tier == "flex",
        body=_with_usage(asked, body) if asked.stream and not include_usage else body,
    )


def _with_usage(asked: _Body, body: bytes) -> bytes:
    """Return the body of a stream with the wish for its usage; everything else in it stays as it is, to the byte."""
    if asked.stream_options is UNSET:
        return WITH_USAGE + body[body.index(b"{") + 1 :]
    whole = loaded(body)
    whole["stream_options"] = {**(whole["stream_options"] or {}), "include_usage": True}
    return orjson.dumps(whole)


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def loaded(body: bytes) -> dict[str, Any]:
    """Return the JSON of a body. Raises RejectedError where it is none."""
    try:
        return cast("dict[str, Any]", orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise _no_json(error) from error


def explained(error: Exception, body: bytes) -> RejectedError:
    """Turn what msgspec says into a sentence and the name of the parameter."""
    if isinstance(error, UnicodeDecodeError):
        return RejectedError(f"The body is not UTF-8 text: {error.reason} at byte {error.start}.", code="bad_json")
    try:
        whole = orjson.loads(body)
    except orjson.JSONDecodeError as worse:
        return _no_json(worse)
    if not isinstance(whole, dict):
        return RejectedError(f"The body should be a JSON object, not {type(whole).__name__}.", code="bad_json")
    problem, _, where = str(error).partition(" - at `$")
    param = where.rstrip("`").lstrip(".") or None
    if missing := re.search(r"missing required field `(.+)`", problem):
        param = f"{param}.{missing[1]}" if param else missing[1]
        return RejectedError(f"'{param}' is missing.", param=param, code="missing_parameter")
    return RejectedError(f"'{param}' is wrong: {problem[0].lower()}{problem[1:]}.", param=param, code="wrong_type")


def _no_json(error: orjson.JSONDecodeError) -> RejectedError:
    return RejectedError(
        f"The body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.", code="bad_json"
    )
