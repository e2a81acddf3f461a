"""What engines say of tokens, each in its own way: read from a prompt's cache, produced, produced in thought.

Of several answers llama.cpp counts each by itself: there are as many usages in a stream, and what comes whole has that
of the first alone. Nor does it say how long it thought; and vLLM says 0 where a template begins the thought. What is
not said is worked out from the lengths of the texts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from waterline.service.body import CHAT, Asked, estimated_tokens
from waterline.service.events import Choice, Delta
from waterline.service.said import THINKING, parts

PROMPT = ("prompt_tokens", "input_tokens")  # of chats, of responses
OUTPUT = ("completion_tokens", "output_tokens")
PROMPT_DETAILS, OUTPUT_DETAILS = (tuple(f"{name}_details" for name in names) for names in (PROMPT, OUTPUT))


class Counts(NamedTuple):
    """Tokens of one request; None where nothing is said of them."""

    prompt: int | None = None
    output: int | None = None  # thoughts included
    cached: int | None = None  # of the prompt
    thinking: int | None = None  # of the output


def read_counts(usage: Mapping[str, Any]) -> Counts:
    """Return what a usage says, as far as it is counts."""
    cached = (_within(usage.get(name), "cached_tokens") for name in PROMPT_DETAILS)
    thinking = (_within(usage.get(name), "reasoning_tokens") for name in OUTPUT_DETAILS)
    return Counts(
        prompt=_first(*(usage.get(name) for name in PROMPT)),
        output=_first(*(usage.get(name) for name in OUTPUT)),
        cached=_first(*cached),
        thinking=_first(*thinking, usage.get("reasoning_tokens")),  # SGLang's place for it
    )


def sum_of(usages: Sequence[Counts], asked: Asked) -> Counts:
    """Return the counts of a stream of which each answer has a usage of its own.

    A prompt counts once, however many answers it gets; that the others found it in the cache is not told as such.
    """
    if len(usages) < 2:
        return usages[0]
    answers_a_prompt = asked.answers / len(_prompt_sizes(asked))
    prompt = round(sum(one.prompt or 0 for one in usages) / answers_a_prompt)
    return Counts(prompt=prompt, output=sum(one.output or 0 for one in usages), cached=usages[0].cached)


def of_all(data: bytes, said: Counts, timings: Any, asked: Asked) -> Counts:
    """Return the counts of all answers in a reply that came whole."""
    alone = asked.answers > 1 and isinstance(timings, dict) and timings.get("predicted_n") == said.output
    if said.output is None or not (alone or (not said.thinking and any(name in data for name in _THOUGHTS))):
        return said
    texts = _texts(data)
    sizes = [sum(map(len, text.values())) for text in texts]
    output, prompt = said.output, said.prompt
    if alone and sizes:
        output = round(output * (sum(sizes) / sizes[0] if sizes[0] else len(sizes)))
        prompt = None if prompt is None else prompt + sum(_prompt_sizes(asked)[1:])
    thoughts = sum(len(text.get(name, "")) for text in texts for name in THINKING)
    return said._replace(output=output, prompt=prompt, thinking=round(output * thoughts / max(1, sum(sizes))))


class _Answer(Struct):
    text: str | None = None
    message: Delta | None = None


class _Answers(Struct):
    choices: list[_Answer] = []


_ANSWERS = msgspec.json.Decoder(_Answers)
_THOUGHTS = tuple(f'"{name}"'.encode() for name in THINKING)


def _texts(data: bytes) -> list[dict[str, str]]:
    """Return what each answer says, part by part; nothing where they have a form that we do not know."""
    try:
        answers = _ANSWERS.decode(data).choices
    except msgspec.ValidationError:
        return []
    choices = (Choice(text=one.text, delta=one.message) for one in answers)
    return [{name: text for name, text in parts(choice) if text} for choice in choices]


def _within(details: Any, name: str) -> Any:
    return details.get(name) if isinstance(details, dict) else None


def _first(*counts: Any) -> int | None:
    return next((count for count in counts if type(count) is int and count >= 0), None)


def _prompt_sizes(asked: Asked) -> list[int]:
    """Return about how many tokens each prompt has."""
    if asked.endpoint == CHAT:
        return [asked.prompt_tokens]
    prompt = asked.fields["prompt"]
    many = prompt if isinstance(prompt, list) else [prompt]
    texts = [one for one in many if not isinstance(one, int)]
    sizes = [estimated_tokens(len(one.encode())) if isinstance(one, str) else len(one) for one in texts]
    alone = len(many) - len(texts)  # tokens that stand by themselves are one prompt
    return [*sizes, alone] if alone else sizes
