"""The fake engine keeps the time of the cost model; measured in its own loop, without a process around it."""

import asyncio
import time
from dataclasses import replace

from serving import fake_plan

from waterline.cost import replica_step_cost
from waterline.cost.step import prefill_pairs
from waterline.service.engines.fake import Batch, Job
from waterline.units import PICOSECONDS_PER_S

PLAN = fake_plan()
STEP = replace(replica_step_cost(PLAN.fleet, PLAN.replicas[0]), step_tokens=10)


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
    [end_s] = asyncio.run(finish_s([Job(prompt_tokens=25, output_tokens=200)], max_batch=4))
    chunks = [(0, 10), (10, 10), (20, 5)]  # of the prompt; the last one gives the first token
    prompt_ps = sum(STEP.step_ps(tokens, prefill_pairs(first, tokens), 0, 0) for first, tokens in chunks)
    expected_s = (prompt_ps + sum(STEP.step_ps(0, 0, 1, 25 + n) for n in range(1, 200))) / PICOSECONDS_PER_S
    assert expected_s > 0.01, "or there is nothing to measure"
    assert expected_s - 0.002 <= end_s <= expected_s + 2, "late only by what the machine is busy with"


def test_requests_beyond_the_batch_wait_for_a_place_in_order() -> None:
    jobs = [Job(prompt_tokens=1, output_tokens=100) for _ in range(4)]
    ends_s = asyncio.run(finish_s(jobs, max_batch=2))
    assert ends_s == sorted(ends_s)
    assert ends_s[2] >= 200 * STEP.step_ps(0, 0, 2, 2) / PICOSECONDS_PER_S - 0.002, "the others began after the first"
