"""What a fake engine says: words that follow from the prompt, ended and counted as a real engine ends and counts."""

import secrets
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any, Literal

import orjson

from waterline.cost import StepCost
from waterline.plan import Role
from waterline.service.body import BYTES_PER_TOKEN, TOKENS_PER_MESSAGE, Asked
from waterline.service.errors import RejectedError

WORDS = ("when", "the", "water", "line", "drops", "cards", "below", "are", "lent", "to", "those", "above", "in", "time")
LOGPROB = -log(len(WORDS))  # of each, wherever it stands


@dataclass(frozen=True, kw_only=True)
class Part:
    """What the process has to play."""

    model: str
    step: StepCost
    max_batch: int
    max_context_tokens: int
    expected_output_tokens: int  # of a request without a limit
    role: Role = "both"
    host: str = "127.0.0.1"  # where it listens
    sent_s_per_token: float = 0.0  # for the cache of a prompt to be with the one that writes


class Answer:
    """What is said to one request: words that follow from all that stands before them, and nothing else.

    So an answer that is gone on with from its middle, by ids or by text, is the answer that was begun.

    Args:
        asked: what the client wants.
        part: what is played.
        chat: a chat, or a completion.
        number: of several answers; to the first prompt come the first `n` of them.
    """

    def __init__(self, asked: Asked, part: Part, *, chat: bool, number: int = 0) -> None:
        fields = asked.fields
        prompt, again = divmod(number, fields.get("n") or 1)
        self.prompt_ids, begun = _chat_ids(fields) if chat else _prompt_ids(_prompts(fields["prompt"])[prompt])
        room = part.max_context_tokens - len(self.prompt_ids)
        if room <= 0:
            raise RejectedError(
                f"This model's maximum context length is {part.max_context_tokens} tokens; the prompt has "
                f"{len(self.prompt_ids)}.",
                code="context_length_exceeded",
            )
        most = room if asked.most_tokens is None else min(asked.most_tokens, room)
        expected = most + 1 if fields.get("ignore_eos") else max(0, part.expected_output_tokens - begun)
        self.asked, self.chat, self.number, self.is_first = asked, chat, number, again == 0
        self.finish: Literal["stop", "length"] = "stop" if expected <= most else "length"
        self.ids, self.words = _words(self.prompt_ids, begun, min(most, expected), again)
        self.texts = self.words  # as they are sent: a stop cuts them short
        if stops := _stops(fields):
            said = "".join(map(_word, self.prompt_ids[len(self.prompt_ids) - begun :]))
            self._stop(said, stops)
        self.output_tokens = len(self.ids)
        self.beside: dict[str, Any] = {}  # what else is said, when it comes whole
        self.tells_ids = fields.get("return_token_ids") is True
        self.likely = _likely(fields, chat=chat)
        self.stamp = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model,
        }

    @property
    def usage(self) -> dict[str, int]:
        return usage_of([self])

    def _stop(self, said: str, stops: Sequence[str]) -> None:
        """End with the token in which a stop is complete, and leave out the stop; some of it may have been said."""
        whole, first = said + "".join(self.words), len(said)
        found = [(at + len(stop), at) for stop in stops if (at := whole.find(stop, max(0, first - len(stop) + 1))) >= 0]
        if not found:
            return
        end, at = min(found)
        self.texts, begin = [], first
        for word in self.words:
            if begin >= end:
                break
            self.texts.append(whole[begin : max(begin, min(begin + len(word), at))])
            begin += len(word)
        self.ids, self.words, self.finish = self.ids[: len(self.texts)], self.words[: len(self.texts)], "stop"

    def shorten(self) -> None:
        """Say one word: all the rest is said elsewhere."""
        if self.output_tokens > 1:
            self.output_tokens, self.finish = 1, "length"
            self.ids, self.words, self.texts = self.ids[:1], self.words[:1], self.texts[:1]

    def whole(self) -> dict[str, Any]:
        return whole_of([self])

    def choice(self) -> dict[str, Any]:
        text = "".join(self.texts)
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        logprobs = self._logprobs(0, self.output_tokens)
        return {"index": self.number, "finish_reason": self.finish, "logprobs": logprobs, **said}

    def event(self, number: int) -> bytes:
        """Return what is sent for one token; before the first one of a chat comes the role."""
        opening = b""
        if number == 0:
            prompt_ids = {"prompt_token_ids": self.prompt_ids} if self.tells_ids else {}
            if self.chat:
                opening = self._event({"role": "assistant", "content": ""}, beside=prompt_ids)
        within: dict[str, Any] = {"token_ids": [self.ids[number]]} if self.tells_ids else {}
        if self.likely is not None:
            within["logprobs"] = self._logprobs(number, number + 1)
        if self.chat:
            return opening + self._event({"content": self.texts[number]}, within=within)
        return self._event({"text": self.texts[number]}, within=within | (prompt_ids if number == 0 else {}))

    def end(self) -> bytes:
        """Return the event that says why an answer ended."""
        return self._event({} if self.chat else {"text": ""}, finish=self.finish)

    def last(self) -> bytes:
        """Return what ends the stream of one answer, but for [DONE]."""
        return self.end() + self.counts([self])

    def counts(self, answers: "Sequence[Answer]") -> bytes:
        """Return the event that counts the tokens of a stream, where they are wanted."""
        return self._encoded({"choices": [], "usage": usage_of(answers)}) if self.asked.include_usage else b""

    def _logprobs(self, first: int, end: int) -> dict[str, Any] | None:
        """Return how likely words were: one is as likely as another."""
        if self.likely is None:
            return None
        words = self.words[first:end]
        others = [[word, *(one for one in WORDS if one != word.strip())][: self.likely] for word in words]
        if self.chat:
            content = [
                {**_likelihood(word), "top_logprobs": list(map(_likelihood, tops))}
                for word, tops in zip(words, others, strict=True)
            ]
            return {"content": content}
        begins = [len("".join(self.words[:number])) for number in range(first, first + len(words))]
        return {
            "tokens": words,
            "token_logprobs": [LOGPROB] * len(words),
            "top_logprobs": [dict.fromkeys(tops, LOGPROB) for tops in others],
            "text_offset": begins,
        }

    def _event(
        self,
        said: dict[str, str],
        *,
        finish: str | None = None,
        within: Mapping[str, Any] | None = None,
        beside: Mapping[str, list[int]] | None = None,
    ) -> bytes:
        said_so = {"delta": said} if self.chat else said
        choice = {"index": self.number, **said_so, "finish_reason": finish, "logprobs": None, **(within or {})}
        return self._encoded({"choices": [choice], **(beside or {})})

    def _encoded(self, event: dict[str, Any]) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return b"data: " + orjson.dumps({**self.stamp, "object": kind, **event}) + b"\n\n"


def answers_to(asked: Asked, part: Part, *, chat: bool) -> list[Answer]:
    """Return all answers to a request: `n` to each of its prompts."""
    answers = [Answer(asked, part, chat=chat, number=number) for number in range(asked.answers)]
    for answer in answers:
        answer.stamp = answers[0].stamp
    return answers


def whole_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return answers that come whole."""
    first = answers[0]
    kind = "chat.completion" if first.chat else "text_completion"
    choices = [answer.choice() for answer in answers]
    return {**first.stamp, "object": kind, "choices": choices, "usage": usage_of(answers), **first.beside}


def usage_of(answers: Sequence[Answer]) -> dict[str, int]:
    """Return the tokens of answers and of their prompts, each read once."""
    prompt = sum(max(1, len(answer.prompt_ids)) for answer in answers if answer.is_first)
    output = sum(answer.output_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def _likely(fields: dict[str, Any], *, chat: bool) -> int | None:
    """Return how many likely words are wanted at each place; None where nobody asks how likely they were."""
    wanted = fields.get("logprobs")
    if wanted is None or wanted is False:
        return None
    return int(fields.get("top_logprobs") or 0) if chat else int(wanted)


def _likelihood(word: str) -> dict[str, Any]:
    return {"token": word, "logprob": LOGPROB, "bytes": list(word.encode())}


def _stops(fields: dict[str, Any]) -> list[str]:
    stops = fields.get("stop") or []
    return [stop for stop in ([stops] if isinstance(stops, str) else stops) if isinstance(stop, str) and stop]


# Its tokens: words that it says, once as the first of an answer and once after a blank; and of what it is told, four
# bytes each, whose ids say which. A message of a chat has tokens more, for what is around it.
FIRST_WORDS, OTHERS = len(WORDS), 2 * len(WORDS)
AROUND = OTHERS  # an id without text


def _chat_ids(fields: dict[str, Any]) -> tuple[list[int], int]:
    """Return the prompt of a chat, and how many words of it are the answer that is gone on with."""
    messages = fields["messages"]
    begun = ""
    if fields.get("continue_final_message") and messages[-1]["role"] == "assistant":
        *messages, last = messages
        begun = last.get("content") or ""
    ids = []
    for message in messages:
        content = message.get("content") or ""
        texts = (
            [content]
            if isinstance(content, str)
            else [part if isinstance(part, str) else part.get("text") or "" for part in content]
        )
        ids += [AROUND] * TOKENS_PER_MESSAGE + _text_ids("".join(texts))
    said = _said_ids(begun)
    return ids + said, len(said)


def _prompts(prompt: Any) -> list[Any]:
    """Return the prompts of a completion, each text or a list of tokens; tokens that stand by themselves are one."""
    if isinstance(prompt, str):
        return [prompt]
    alone = [part for part in prompt if isinstance(part, int)]
    return [*(part for part in prompt if not isinstance(part, int)), *([alone] if alone else [])]


def _prompt_ids(prompt: str | list[int]) -> tuple[list[int], int]:
    """Return a prompt of a completion, of which the words at its end are said already where it is a list of ids."""
    ids = _text_ids(prompt) if isinstance(prompt, str) else prompt
    begun = next((number for number, one in enumerate(reversed(ids)) if one >= OTHERS), len(ids))
    return ids, begun


def _text_ids(text: str) -> list[int]:
    data = text.encode()
    groups = [data[start : start + BYTES_PER_TOKEN] for start in range(0, len(data), BYTES_PER_TOKEN)]
    return [AROUND + 1 + (len(group) - 1) * 2**32 + int.from_bytes(group, "big") for group in groups]


def _said_ids(text: str) -> list[int]:
    """Return the ids of words it has said."""
    words = [WORDS.index(word) if word in WORDS else 0 for word in text.split()]
    return [word + FIRST_WORDS * (number > 0) for number, word in enumerate(words)]


def _word(one: int) -> str:
    return " " * (one >= FIRST_WORDS) + WORDS[one % FIRST_WORDS]


def _words(prompt_ids: list[int], begun: int, count: int, again: int) -> tuple[list[int], list[str]]:
    """Return the next so many tokens and their text, of the answer that is given the first time, or once again."""
    state = zlib.crc32(orjson.dumps(prompt_ids[: len(prompt_ids) - begun]), again)
    for one in prompt_ids[len(prompt_ids) - begun :]:
        state = zlib.crc32(b"%d" % one, state)
    ids = []
    for number in range(begun, begun + count):
        ids.append((state >> 8) % FIRST_WORDS + FIRST_WORDS * (number > 0))
        state = zlib.crc32(b"%d" % ids[-1], state)
    return ids, list(map(_word, ids))
