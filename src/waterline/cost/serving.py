"""What a replica does in steady state, from the time of its steps."""

from dataclasses import dataclass

from waterline.cost.step import StepCost, prefill_pairs
from waterline.units import PICOSECONDS_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPoint:
    """A replica that always decodes `batch` requests and prefills new ones as fast as old ones finish."""

    batch: int
    ttft_s: float  # of a request that finds a free place; queueing comes on top
    tpot_s: float
    requests_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """The times a closed loop of equal requests is made of; each is a sum of steps."""

    plain_s: float  # a step of the whole batch without any prompt
    delay_s: float  # what reading one prompt adds to the steps of the others
    alone_s: float  # reading one prompt, or one on each data-parallel rank, with nobody else about
    reading_s: float  # reading one prompt while the others decode along


def pieces(step: StepCost, batch: int, prompt_tokens: int, context_tokens: int, cached_tokens: int = 0) -> Pieces:
    """Price what a batch of requests spends its time on, with chunked prefill.

    Args:
        step: of the replica.
        batch: requests that decode together.
        prompt_tokens: of one request.
        context_tokens: mean context of the requests under way.
        cached_tokens: of the prompt, that need not be read because another request has left them in the cache.
    """
    whole = batch * context_tokens
    plain_ps = step.step_ps(0, 0, batch, whole)
    ranks = step.ranks
    room = max(1, step.step_tokens - batch, step.step_tokens // 2) // ranks
    alone_ps = reading_ps = delay_ps = 0
    for first in range(min(cached_tokens, prompt_tokens - 1), prompt_tokens, room):
        tokens = min(room, prompt_tokens - first)
        pairs = prefill_pairs(first, tokens)
        alone_ps += step.step_ps(ranks * tokens, ranks * pairs, 0, 0)
        reading_ps += step.step_ps(tokens, pairs, batch - 1, (batch - 1) * context_tokens)
        delay_ps += step.step_ps(tokens, pairs, batch, whole) - plain_ps
    return Pieces(
        plain_s=plain_ps / PICOSECONDS_PER_S,
        delay_s=delay_ps / PICOSECONDS_PER_S,
        alone_s=alone_ps / PICOSECONDS_PER_S,
        reading_s=reading_ps / PICOSECONDS_PER_S,
    )


def serving_point(
    step: StepCost, batch: int, prompt_tokens: int, output_tokens: int, context_tokens: int = 0
) -> ServingPoint:
    """Return the closed-loop steady state at a batch, with chunked prefill.

    `context_tokens` is the mean context of the answers under way; 0 takes it from requests that are all alike.

    `batch / output_tokens` requests finish in a step, and as many prompts have to be read. Their chunks ride along in
    the steps of the others, so a token takes a plain step and its share of what reading adds.
    """
    found = pieces(step, batch, prompt_tokens, context_tokens or prompt_tokens + output_tokens // 2)
    tpot_s = found.plain_s + batch / output_tokens * found.delay_s
    return ServingPoint(
        batch=batch,
        ttft_s=tpot_s / 2 + found.reading_s,
        tpot_s=tpot_s,
        requests_per_s=batch / (output_tokens * tpot_s),
    )
