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


def serving_point(
    step: StepCost, batch: int, prompt_tokens: int, output_tokens: int, context_tokens: int = 0
) -> ServingPoint:
    """Return the closed-loop steady state at a batch, with chunked prefill.

    `context_tokens` is the mean context of the answers under way; 0 takes it from requests that are all alike.

    `batch / output_tokens` requests finish in a step, and as many prompts have to be read. An engine reads them in
    chunks as large as a step has room for, so a share of the steps carries a full chunk and the others none; a token
    takes the mean of the two. When there is more to read than all steps have room for, every step carries a chunk and
    decodes wait for prompts.
    """
    room = max(1, step.step_tokens - batch)
    chunks_per_step = batch / output_tokens * prompt_tokens / room
    context_tokens = context_tokens or prompt_tokens + output_tokens // 2
    decodes = max(1, round(batch / max(1.0, chunks_per_step)))  # the others wait for their prompt to be read
    cached_tokens = decodes * context_tokens
    pairs = round(prefill_pairs(0, prompt_tokens) / prompt_tokens * room)
    plain_s = step.step_ps(0, 0, decodes, cached_tokens) / PICOSECONDS_PER_S
    chunk_s = step.step_ps(room, pairs, decodes, cached_tokens) / PICOSECONDS_PER_S
    share = min(1.0, chunks_per_step)
    mean_s = share * chunk_s + (1 - share) * plain_s
    tpot_s = mean_s * max(1.0, chunks_per_step)
    return ServingPoint(
        batch=batch,
        ttft_s=mean_s / 2 + _prefill_s(step, prompt_tokens, batch, context_tokens),
        tpot_s=tpot_s,
        requests_per_s=batch / (output_tokens * tpot_s),
    )


def _prefill_s(step: StepCost, prompt_tokens: int, batch: int, context_tokens: int) -> float:
    """Return the time to read one prompt in chunks while the others of the batch decode along."""
    room = max(1, step.step_tokens - batch)
    decodes = batch - 1
    total_ps = 0
    for first in range(0, prompt_tokens, room):
        tokens = min(room, prompt_tokens - first)
        total_ps += step.step_ps(tokens, prefill_pairs(first, tokens), decodes, decodes * context_tokens)
    return total_ps / PICOSECONDS_PER_S
