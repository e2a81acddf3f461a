"""What a replica does in steady state, from the time of its steps."""

import math
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


def serving_point(step: StepCost, batch: int, prompt_tokens: int, output_tokens: int) -> ServingPoint:
    """Return the closed-loop steady state at a batch, with chunked prefill.

    Each request is in the batch for `output_tokens` steps, so `batch / output_tokens` requests finish and as many
    prompts are read in a step. When that is more than the step has room for, prompts set the pace and decodes wait.
    """
    prompts_per_step = batch / output_tokens
    prefill_tokens = prompts_per_step * prompt_tokens
    room = max(1, step.step_tokens - batch)
    slower = max(1.0, prefill_tokens / room)
    mean_context = prompt_tokens + output_tokens // 2
    tokens = round(min(prefill_tokens, room))
    step_s = (
        step.step_ps(
            tokens,
            round(prefill_pairs(0, prompt_tokens) / prompt_tokens * tokens),
            max(1, round(batch / slower)),
            round(batch / slower) * mean_context,
        )
        / PICOSECONDS_PER_S
    )
    tpot_s = step_s * slower
    ttft_s = _prefill_s(step, room, prompt_tokens, batch, mean_context) + step_s / 2
    return ServingPoint(batch=batch, ttft_s=ttft_s, tpot_s=tpot_s, requests_per_s=batch / (output_tokens * tpot_s))


def _prefill_s(step: StepCost, room: int, prompt_tokens: int, batch: int, mean_context: int) -> float:
    """Return the time to read one prompt in chunks while the others of the batch decode along."""
    chunks = math.ceil(prompt_tokens / room)
    return (
        sum(
            step.step_ps(
                min(room, prompt_tokens - chunk * room),
                prefill_pairs(chunk * room, min(room, prompt_tokens - chunk * room)),
                batch - 1,
                (batch - 1) * mean_context,
            )
            for chunk in range(chunks)
        )
        / PICOSECONDS_PER_S
    )
