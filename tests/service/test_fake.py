"""The fake engine keeps the time of the cost model; measured in its own loop, without a process around it."""

import asyncio
import time

import pytest

from waterline.cost import StepCost
from waterline.service.engines.fake import Batch, Job
from waterline.units import PICOSECONDS_PER_S

# 5 ms a step, and 1 ms more for every token in it; at most 10 tokens
STEP = StepCost(
    overhead_ps=5 * 10**9,
    weights_ps=0,
    experts_ps=(0,),
    state_ps_per_sequence=0,
    attention=(),
    multiply_ps_per_token=10**9,
    head_ps_per_sequence=0,
    exchange_ps=0,
    exchange_ps_per_token=0,
    step_tokens=10,
)


async def finish_s(jobs: list[Job], max_batch: int) -> list[float]:
    """Return when each job has got its last token."""
    batch = Batch(STEP, max_batch)
    running = asyncio.create_task(batch.run())
    begun_s = time.monotonic()

    async def wait(job: Job) -> float:
        for _ in range(job.output_tokens):
            await job.produced.get()
        return time.monotonic() - begun_s

    for job in jobs:
        batch.add(job)
    ends = await asyncio.gather(*map(wait, jobs))
    running.cancel()
    assert not batch.running
    assert not batch.waiting
    return list(ends)


def test_steps_take_as_long_as_the_cost_model_says() -> None:
    [end_s] = asyncio.run(finish_s([Job(prompt_tokens=25, output_tokens=6)], max_batch=4))
    prompt_ps = 2 * STEP.step_ps(10, 0, 0, 0) + STEP.step_ps(5, 0, 0, 0)  # chunks of 10, 10 and 5; the first token
    expected_s = (prompt_ps + 5 * STEP.step_ps(0, 0, 1, 0)) / PICOSECONDS_PER_S
    assert expected_s == pytest.approx(0.070)
    assert expected_s - 0.002 <= end_s <= expected_s + 2, "late only by what the machine is busy with"


def test_requests_beyond_the_batch_wait_for_a_place_in_order() -> None:
    jobs = [Job(prompt_tokens=1, output_tokens=4) for _ in range(4)]
    ends_s = asyncio.run(finish_s(jobs, max_batch=2))
    assert ends_s == sorted(ends_s)
    assert ends_s[2] - ends_s[1] >= 0.020, "four steps of 7 ms lie between the first two and the others"
