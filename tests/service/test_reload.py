"""A new plan is moved to while requests run, and none of them is lost; a wrong one changes nothing."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from msgspec.structs import replace
from serving import QUESTION, Served, fake_plan, served, until

from waterline.errors import PlanFileError
from waterline.plan import Place, Plan, read_plan
from waterline.service.lines import Ticket
from waterline.service.reload import changes, keep_to_file


def spread(plan: Plan, gpus: Callable[[int], int] = lambda number: number) -> Plan:
    """Return the plan with each replica on a GPU of its own."""
    pool = replace(plan.fleet.pools[0], gpus_per_node=8)
    replicas = tuple(
        replace(replica, places=(Place(node=0, gpus=(gpus(number),)),)) for number, replica in enumerate(plan.replicas)
    )
    return replace(plan, fleet=replace(plan.fleet, pools=(pool,)), replicas=replicas)


async def ask(service: Served, stop: asyncio.Event, model: str = "chat") -> int:
    """Ask one question after the other until it is enough; return how many were answered."""
    answered = 0
    while not stop.is_set():
        stream = await service.openai.chat.completions.create(
            model=model, messages=QUESTION, max_tokens=40, stream=True
        )
        words = [event.choices[0].delta.content async for event in stream]
        assert len([word for word in words if word]) == 40
        answered += 1
    return answered


async def while_asked(service: Served, plan: Plan, clients: int = 6) -> int:
    """Move to a plan while clients ask; return how many answers they got."""
    stop = asyncio.Event()
    asking = [asyncio.create_task(ask(service, stop)) for _ in range(clients)]
    await asyncio.sleep(0.1)
    await service.keeper.move_to(plan)
    await asyncio.sleep(0.1)
    stop.set()
    return sum(await asyncio.gather(*asking))


def statuses(service: Served) -> dict[str, str]:
    return {replica: state.status for replica, state in service.supervisor.states.items()}


def test_who_is_in_both_plans_stays_new_ones_start_first_and_no_request_is_lost() -> None:
    before = spread(fake_plan({"chat": 2}, output_tokens=40))
    longer = spread(fake_plan({"chat": 4}, output_tokens=40))
    after = replace(longer, replicas=longer.replicas[1:])  # chat/0 goes, chat/2 and chat/3 come

    async def case() -> int:
        async with served(before) as service:
            pid = service.supervisor.states["chat/1"].pid
            answered = await while_asked(service, after)
            assert statuses(service) == dict.fromkeys(("chat/1", "chat/2", "chat/3"), "ready")
            assert service.supervisor.states["chat/1"].pid == pid
            assert {one.status for one in service.completions} == {"ok"}
            return answered

    answered = asyncio.run(case())
    print(f"{answered} answers while the plan changed")
    assert answered > 6


def test_a_replica_that_runs_otherwise_is_replaced_by_one_of_another_name_where_gpus_are_free() -> None:
    before = spread(fake_plan({"chat": 1}, output_tokens=40))
    after = spread(fake_plan({"chat": 1}, output_tokens=40, max_batch=8), lambda _: 5)

    async def case() -> None:
        async with served(before) as service:
            await while_asked(service, after)
            assert statuses(service) == {"chat/1": "ready"}
            assert service.shore.taken == {("box", 0, 5)}
            assert {one.status for one in service.completions} == {"ok"}

    asyncio.run(case())


def test_where_no_gpu_is_free_the_old_one_drains_first() -> None:
    before = spread(fake_plan({"chat": 1}, output_tokens=40))
    after = spread(fake_plan({"other": 1, "chat": 1}, output_tokens=40))  # 'other' gets the GPU of chat/0

    async def case() -> None:
        async with served(before) as service:
            chat = service.openai.chat.completions
            under_way = asyncio.create_task(chat.create(model="chat", messages=QUESTION, max_tokens=40))
            await until(lambda: service.gateway.under_way("chat/0") == 1)
            await service.keeper.move_to(after)
            assert (await under_way).usage.completion_tokens == 40, "it was waited for"
            assert statuses(service) == {"other/0": "ready", "chat/1": "ready"}
            await chat.create(model="other", messages=QUESTION, max_tokens=2)
            assert (await service.openai.models.list()).data[0].id == "chat"

    asyncio.run(case())


def test_while_the_only_replica_makes_room_for_its_successor_requests_wait_as_their_deadline_lets_them() -> None:
    """It has 20 s of work, as planned, and its successor takes 100 s to load, as planned; both take less."""
    before = spread(fake_plan({"chat": 1}, output_tokens=40, ttft_s=5.0))
    before = replace(before, replicas=(replace(before.replicas[0], tpot_s=0.5),))
    after = replace(before, replicas=(replace(before.replicas[0], max_batch=8, load_s=100.0),))

    async def case() -> None:
        async with served(before) as service:
            chat = service.openai.chat.completions
            desk, now_s = service.gateway.dispatcher, service.gateway.now_s
            under_way = desk.enter("chat", 5, None, lambda _: None, now_s(), tenant="enterprise")
            assert isinstance(under_way, Ticket)
            moving = asyncio.create_task(service.keeper.move_to(after))
            await until(lambda: statuses(service) == {"chat/0": "draining"})
            patient = asyncio.create_task(
                chat.create(model="chat", messages=QUESTION, max_tokens=2, service_tier="flex")
            )
            with pytest.raises(openai.InternalServerError, match="'chat' is not ready: chat/0 is draining") as caught:
                await chat.create(model="chat", messages=QUESTION)
            assert 30 < int(caught.value.response.headers["retry-after"]) <= 121, "without a successor it is 30"
            assert service.gateway.snapshot().health == "not ready"
            desk.leave(under_way, now_s())
            assert (await patient).usage.completion_tokens == 2
            await moving
            assert [one.status for one in service.completions] == ["refused", "ok"]

    asyncio.run(case())


def test_a_model_that_is_gone_from_the_plan_is_not_found_any_more() -> None:
    before = spread(fake_plan({"chat": 1, "other": 1}))
    after = spread(fake_plan({"chat": 1}))

    async def case() -> None:
        async with served(before) as service:
            await service.keeper.move_to(after)
            assert [model.id for model in (await service.openai.models.list()).data] == ["chat"]
            assert service.gateway.snapshot().health == "ok"

    asyncio.run(case())


def test_a_file_is_read_again_when_it_has_changed_and_is_quiet_and_when_somebody_asks(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("1")
    seen: list[str] = []

    async def case() -> None:
        hangup = asyncio.Event()

        def look() -> None:
            seen.append(path.read_text())

        async def follow() -> None:
            async for _ in changes(path, hangup, 0.02):
                look()

        following = asyncio.create_task(follow())
        await asyncio.sleep(0.1)
        assert seen == [], "it is as it was"
        path.write_text("22")
        await until(lambda: seen == ["22"])
        path.unlink()
        await asyncio.sleep(0.1)
        path.write_text("333")
        await until(lambda: seen == ["22", "333"])
        hangup.set()
        await until(lambda: seen == ["22", "333", "333"])
        following.cancel()

    asyncio.run(case())


def test_a_plan_that_is_wrong_is_said_and_the_old_one_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = spread(fake_plan())
    path = tmp_path / "plan.json"
    path.write_text("{}")
    alien = replace(plan, replicas=(replace(plan.replicas[0], engine="vllm", id="chat/9"),))
    answers: list[Callable[[], Plan]] = [lambda: read_plan(path), lambda: alien, lambda: plan]
    read = 0

    def next_answer() -> Plan:
        nonlocal read
        read += 1
        return answers[read - 1]()

    async def case() -> None:
        async with served(plan) as service:
            pid, hangup = service.supervisor.states["chat/0"].pid, asyncio.Event()
            following = asyncio.create_task(keep_to_file(path, next_answer, service.keeper, hangup, 0.01))
            for turn in range(3):
                hangup.set()
                await until(lambda turn=turn: read == turn + 1)  # type: ignore[misc]
                await asyncio.sleep(0.1)
            following.cancel()
            assert service.supervisor.states["chat/0"].pid == pid
            await service.openai.chat.completions.create(model="chat", messages=QUESTION, max_tokens=2)
            os.kill(pid or 0, 0)

    asyncio.run(case())
    said = capsys.readouterr().out
    assert said.count("the new plan cannot be used, the old one stays") == 2
    assert "is not a plan" in said
    assert "not on the path of this machine" in said
    with pytest.raises(PlanFileError):
        read_plan(path)
