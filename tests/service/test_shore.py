"""Single replicas start and drain while requests run."""

import asyncio
import time

import pytest
from msgspec.structs import replace
from serving import QUESTION, Served, fake_plan, served, until

from waterline.plan import Place
from waterline.service.processes import marked


async def words(service: Served, tokens: int) -> int:
    """Ask for a long answer; return how many words came."""
    stream = await service.openai.chat.completions.create(
        model="chat", messages=QUESTION, max_tokens=tokens, stream=True
    )
    return len([event async for event in stream if event.choices and event.choices[0].delta.content])


def test_what_is_not_finished_at_the_deadline_of_a_drain_goes_on_elsewhere() -> None:
    async def case() -> tuple[list[int], float]:
        async with served(fake_plan({"chat": 2}, output_tokens=300)) as service:
            asking = [asyncio.create_task(words(service, 300)) for _ in range(4)]
            await until(lambda: service.gateway.under_way("chat/0") > 0 and service.gateway.under_way("chat/1") > 0)
            begun_s = time.monotonic()
            await service.shore.drain("chat/0", 1.6)  # of which a second and a half are for its process
            took_s = time.monotonic() - begun_s
            assert list(service.supervisor.states) == ["chat/1"]
            answers = await asyncio.gather(*asking)
            assert {one.status for one in service.completions} == {"ok"}
            return answers, took_s

    answers, took_s = asyncio.run(case())
    print(f"drained in {took_s:.2f} s, with answers of {answers} words")
    assert answers == [300] * 4


def test_a_replica_that_nobody_uses_is_drained_at_once_and_its_processes_are_gone() -> None:
    async def case() -> float:
        async with served(fake_plan({"chat": 2})) as service:
            begun_s = time.monotonic()
            await asyncio.gather(service.shore.drain("chat/0", 60.0), service.shore.drain("chat/0", 1.0))
            assert marked(f"{service.state.mark}/engines/chat%2F0") == []
            assert len(marked(f"{service.state.mark}/engines/chat%2F1")) == 1
            return time.monotonic() - begun_s

    assert asyncio.run(case()) < 10


def test_a_replica_that_is_started_takes_over_from_one_that_goes() -> None:
    plan = fake_plan({"chat": 1})
    plan = replace(plan, replicas=(replace(plan.replicas[0], usd_per_hour=3600.0),))
    second = replace(plan.replicas[0], id="chat/1", places=(Place(node=0, gpus=(1,)),), usd_per_hour=7200.0)

    async def case() -> None:
        async with served(plan) as service:
            begun_s = time.monotonic()
            service.shore.start(second)
            await until(lambda: service.supervisor.states["chat/1"].status == "ready")
            assert service.shore.taken == {("box", 0, 0), ("box", 0, 1)}
            await service.shore.drain("chat/0", 0.0)
            assert await words(service, 5) == 5
            assert [one.replica for one in service.completions] == ["chat/1"]
            usd, took_s = service.shore.usd(), time.monotonic() - begun_s
            print(f"after {took_s:.1f} s: {usd}")
            assert usd["chat/1"] == pytest.approx(2 * took_s, rel=0.01)
            assert usd["chat/0"] > 0, "a dollar a second, for as long as it was there"
            assert service.shore.usd()["chat/0"] == usd["chat/0"], "it is gone, and costs nothing any more"

    asyncio.run(case())
