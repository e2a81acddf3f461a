"""Ask a running engine for held-out products and count the right answers.

Speaks OpenAI's chat completions, so it measures the embedded engine, a gateway or anything else that serves abacus.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import numpy as np

from waterline.catalog import weights_file
from waterline.errors import EngineError
from waterline.training.problems import Problem, held_out, phrase

SHIPPED_WEIGHTS: Final = weights_file("abacus")
SIZES: Final = ((3, 3), (3, 2), (3, 1), (2, 2), (2, 1))  # digits of the larger and the smaller factor
CONCURRENCY: Final = 16


@dataclass(frozen=True, slots=True)
class Question:
    problem: Problem
    text: str


@dataclass(frozen=True, slots=True)
class Score:
    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        return self.right / self.asked


def draw_questions(larger_digits: int, smaller_digits: int, limit: int, seed: int) -> list[Question]:
    """Return different held-out problems in mixed phrasings, fewer than `limit` where there are not that many."""
    dice = np.random.default_rng(seed)
    found = held_out(larger_digits, smaller_digits)
    chosen = dice.permutation(len(found))[:limit]
    return [Question(found[index], phrase(found[index], dice)) for index in chosen]


def score(base_url: str, model: str, questions: list[Question], *, thinking: bool, votes: int = 1) -> Score:
    """Count the right answers to `questions`; the URL is that of the API, as in ``http://127.0.0.1:8000/v1``.

    With one vote the model takes its likeliest token each time; with more it answers so many times by chance
    (temperature 1, nothing cut off) and the most frequent answer counts.
    """
    answers = asyncio.run(_ask_all(base_url, model, questions, thinking=thinking, votes=votes))
    right = sum(answer == question.problem.answer for answer, question in zip(answers, questions, strict=True))
    return Score(right, len(questions))


def body(model: str, question: str, *, thinking: bool, sampled: bool = False) -> dict[str, Any]:
    """Return the request for one answer."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "chat_template_kwargs": {"enable_thinking": thinking},
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} if sampled else {"temperature": 0.0}),
    }


async def _ask_all(
    base_url: str, model: str, questions: list[Question], *, thinking: bool, votes: int
) -> list[str | None]:
    turns = asyncio.Semaphore(CONCURRENCY)

    async def ask(question: Question) -> str:
        request = body(model, question.text, thinking=thinking, sampled=votes > 1)
        async with turns, session.post(f"{base_url}/chat/completions", json=request) as reply:
            if reply.status != 200:
                raise EngineError(f"{base_url} answered {reply.status} to {question.text!r}: {await reply.text()}")
            return str((await reply.json())["choices"][0]["message"]["content"])

    async def elect(question: Question) -> str:
        answers = await asyncio.gather(*(ask(question) for _ in range(votes)))
        return Counter(answers).most_common(1)[0][0]

    async with aiohttp.ClientSession() as session:
        return await asyncio.gather(*(elect(question) for question in questions))
