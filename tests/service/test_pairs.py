"""A prompt is read on one replica and its answer written on another: the client sees the answer of a single one."""

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

import aiohttp
import orjson
import pytest
from msgspec.structs import replace
from serving import Served, fake_plan, served, until
from split import Played, played, split_plan

from waterline.errors import EngineError
from waterline.plan import Plan
from waterline.service.body import CHAT, COMPLETIONS, read_asked
from waterline.service.engines.dialect import AT_ONCE, IN_TURN
from waterline.service.engines.fake_answer import Answer
from waterline.service.pairs import check_pairs, met, read_while, reading, where_to_meet

WAYS = pytest.mark.parametrize("way", [IN_TURN, AT_ONCE])
LONG = [{"role": "user", "content": "What is 347 * 586? " * 20}]
TOKENS = 20


async def ask(service: Served, path: str = CHAT, **fields: Any) -> tuple[int, dict[str, Any]]:
    """Return status and answer of a request whose answer comes whole."""
    prompt = {"messages": LONG} if path == CHAT else {"prompt": "How deep is the water?"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{service.url}/v1{path}", json={"model": "chat", **prompt, **fields}) as reply,
    ):
        return reply.status, orjson.loads(await reply.read())


async def stream(service: Served) -> tuple[str, dict[str, int]]:
    """Return text and usage of a stream, which has an end."""
    text, usage = "", {}
    async with await service.openai.chat.completions.create(
        model="chat", messages=LONG, stream=True, stream_options={"include_usage": True}
    ) as events:
        async for event in events:
            text += "".join(choice.delta.content or "" for choice in event.choices)
            usage = event.usage.model_dump() if event.usage else usage
    return text, usage


def single(app: Played, path: str = CHAT, **fields: Any) -> Answer:
    """Return what one replica that does both would answer."""
    prompt = {"messages": LONG} if path == CHAT else {"prompt": "How deep is the water?"}
    asked = read_asked(path, orjson.dumps({"model": "chat", **prompt, **fields}))
    return Answer(asked, app.part, chat=path == CHAT)


@WAYS
def test_prompts_are_read_on_one_replica_and_answers_written_on_another_and_counted_once(way: str) -> None:
    plan = split_plan(1, 1)

    async def case() -> None:
        async with played(plan, way) as (engines, apps), served(plan, engines=engines) as service:
            reader, writer = apps["r0"], apps["w0"]
            expected = single(reader)
            text, usage = await stream(service)
            assert text == "".join(expected.words)
            assert usage["prompt_tokens"] == len(expected.prompt_ids) > 90
            assert usage["completion_tokens"] == TOKENS
            status, whole = await ask(service)
            assert status == 200
            assert whole["choices"][0]["message"]["content"] == text
            assert "kv_transfer_params" not in whole
            status, whole = await ask(service, COMPLETIONS, max_tokens=7)
            assert whole["choices"][0]["text"] == "".join(single(reader, COMPLETIONS, max_tokens=7).words)
            assert reader.read_tokens == [len(expected.prompt_ids)] * 2 + [len(single(reader, COMPLETIONS).prompt_ids)]
            assert writer.read_tokens == [1, 1, 1], "the rest is fetched"
            assert not reader.caches._kept
            assert [(one.replica, one.status) for one in service.completions] == [("w0", "ok")] * 3
            told = [(one.prompt_tokens, one.output_tokens) for one in service.completions]
            assert told[:2] == [(len(expected.prompt_ids), TOKENS)] * 2
            assert told[2][1] == 7
            assert all(lane.running == lane.keeping == 0 for lane in service.gateway.dispatcher.lanes.values())

    asyncio.run(case())


def test_what_is_asked_is_what_the_proxies_of_the_engines_ask() -> None:
    asked = {"model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 9}
    assert orjson.loads(reading(orjson.dumps({**asked, "min_tokens": 3, "temperature": 0}), "served")) == {
        "model": "served",
        "stream": False,
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "temperature": 0,
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        },
    }
    plan = split_plan(1, 1)

    async def case() -> None:
        async with played(plan, AT_ONCE) as (engines, apps), served(plan, engines=engines) as service:
            meeting = where_to_meet(engines["r0"].dialect, engines["r0"].url)
            assert meeting["bootstrap_host"] == "127.0.0.1"
            assert f":{meeting['bootstrap_port']}/v1" in engines["r0"].url
            assert 0 <= meeting["bootstrap_room"] < 2**63
            assert where_to_meet(engines["r0"].dialect, "http://[::1]:80/v1")["bootstrap_host"] == "[::1]"
            await stream(service)
            [read], [written] = apps["r0"].asked, apps["w0"].asked
            rooms = [{name: one[name] for name in meeting} for one in (read, written)]
            assert rooms[0] == rooms[1]
            assert {name for name in written if read.get(name) != written[name]} == {"stream", "stream_options"}

    asyncio.run(case())
    assert orjson.loads(met(orjson.dumps(asked), {"bootstrap_room": 7}, "served")) == {
        "model": "served",
        "stream": False,
        "max_completion_tokens": 9,
        "bootstrap_room": 7,
    }


@WAYS
def test_when_one_that_reads_fails_another_reads_and_nobody_sees_it(way: str) -> None:
    plan = split_plan(2, 2)

    async def case(fault: str) -> None:
        async with played(plan, way) as (engines, apps), served(plan, engines=engines) as service:
            apps["r0"].fault = fault
            expected = "".join(single(apps["r1"]).words)
            answers = await asyncio.gather(*(stream(service) for _ in range(4)))
            assert [text for text, _ in answers] == [expected] * 4
            assert {one.status for one in service.completions} == {"ok"}
            assert len(apps["r1"].read_tokens) == 4
            await until(lambda: all(app.under_way == 0 for app in apps.values()))

    asyncio.run(at_the_same_time(case("500"), case("hang")))


async def at_the_same_time(*cases: Awaitable[None]) -> None:
    await asyncio.gather(*cases)


@WAYS
def test_when_one_that_writes_fails_another_goes_on_and_nobody_sees_it(way: str) -> None:
    plan = split_plan(1, 2)

    async def case(fault: str) -> None:
        async with played(plan, way) as (engines, apps), served(plan, engines=engines) as service:
            apps["w0"].fault = fault
            expected = "".join(single(apps["w1"]).words)
            answers = await asyncio.gather(*(stream(service) for _ in range(4)))
            assert [text for text, _ in answers] == [expected] * 4
            assert {usage["completion_tokens"] for _, usage in answers} == {TOKENS}
            assert {(one.status, one.replica, one.output_tokens) for one in service.completions} == {
                ("ok", "w1", TOKENS)
            }
            assert set(apps["w1"].read_tokens) == {1}, "who goes on fetches too: all that was said has been read again"
            await until(lambda: all(app.under_way == 0 for app in apps.values()))
            assert all(lane.running == lane.keeping == 0 for lane in service.gateway.dispatcher.lanes.values())

    asyncio.run(at_the_same_time(case("500"), case("cut@5")))


def test_a_cache_that_is_gone_is_read_again() -> None:
    plan = split_plan(1, 1)

    async def case() -> None:
        async with played(plan, IN_TURN) as (engines, apps), served(plan, engines=engines) as service:
            apps["r0"].fault = "forget"
            asking = asyncio.create_task(stream(service))
            await until(lambda: len(apps["r0"].read_tokens) == 2)
            apps["r0"].fault = ""
            text, _ = await asking
            assert text == "".join(single(apps["r0"]).words)
            assert [one.status for one in service.completions] == ["ok"]

    asyncio.run(case())


def test_a_cache_that_has_gone_with_its_reader_is_not_the_fault_of_the_one_that_writes() -> None:
    plan = split_plan(2, 1)

    async def case() -> None:
        async with played(plan, IN_TURN) as (engines, apps), served(plan, engines=engines) as service:
            states = service.supervisor.states
            apps["r0"].fault = "forget"
            states["r0"] = replace_state(states["r0"], "backing off")  # which the desk has not heard of yet
            text, _ = await stream(service)
            assert text == "".join(single(apps["r1"]).words)
            assert [len(app.asked) for app in apps.values()] == [1, 1, 2]
            health = service.gateway._asker.health
            assert {one.id: health.of(one).failures for one in plan.replicas}["w0"] == 0.0

    asyncio.run(case())


def test_who_wants_several_answers_is_served_whole_where_answers_are_written() -> None:
    plan = split_plan(1, 1)

    async def case() -> None:
        async with played(plan, IN_TURN) as (engines, apps), served(plan, engines=engines) as service:
            status, whole = await ask(service, n=2)
            assert status == 200
            assert whole["choices"]
            assert apps["r0"].asked == []
            assert apps["w0"].read_tokens == [len(single(apps["w0"]).prompt_ids), 1], (
                "the second goes on from the first's"
            )

    asyncio.run(case())


def test_without_anybody_who_writes_nobody_waits_in_vain() -> None:
    plan = split_plan(1, 1)

    async def case() -> None:
        async with played(plan, IN_TURN) as (engines, _), served(plan, engines=engines) as service:
            state = service.supervisor.states["w0"]
            service.gateway.replica_changed("w0", replace_state(state, "stopped"))
            begun_s = time.monotonic()
            status, body = await ask(service)
            assert (status, body["error"]["code"]) == (503, "model_not_ready")
            assert time.monotonic() - begun_s < 1.0
            async with aiohttp.ClientSession() as session, session.get(f"{service.url}/health") as reply:
                assert (await reply.json())["models"] == {"chat": {"ready": 0, "total": 2}}
            service.gateway.replica_changed("w0", state)
            assert (await ask(service))[0] == 200

    asyncio.run(case())


def replace_state(state: Any, status: str) -> Any:
    return type(state)(status=status, url=state.url, served_name=state.served_name)


def test_one_that_has_read_is_not_stopped_before_its_cache_has_been_fetched() -> None:
    plan = split_plan(1, 1)

    async def case() -> None:
        async with played(plan, IN_TURN) as (engines, apps), served(plan, engines=engines) as service:
            apps["w0"].fault = "hang"
            asking = asyncio.create_task(stream(service))
            await until(lambda: service.gateway.dispatcher.lanes["r0"].keeping == 1)
            assert service.gateway.dispatcher.lanes["r0"].running == 0, "it may read the next"
            assert service.gateway.under_way("r0") == 1
            asking.cancel()
            await until(lambda: service.gateway.under_way("r0") == service.gateway.under_way("w0") == 0)

    asyncio.run(case())


def test_a_client_who_leaves_while_its_prompt_is_read_stops_both() -> None:
    plan = split_plan(1, 1)

    async def case() -> None:
        async with played(plan, AT_ONCE) as (engines, apps), served(plan, engines=engines) as service:
            apps["r0"].fault = "hang"
            asking = asyncio.create_task(stream(service))
            await until(lambda: apps["w0"].under_way == 1)
            asking.cancel()
            await until(lambda: apps["w0"].under_way == 0)
            await until(lambda: [one.status for one in service.completions] == ["cancelled"])
            assert all(lane.running == lane.keeping == 0 for lane in service.gateway.dispatcher.lanes.values())

    asyncio.run(case())


def test_the_failure_of_the_one_that_writes_gives_up_the_reading() -> None:
    async def case() -> None:
        read = asyncio.create_task(asyncio.sleep(60))
        write = asyncio.create_task(failing())
        await asyncio.wait_for(read_while(read, write), 1.0)
        assert read.cancelled()
        assert isinstance(write.exception(), EngineError)

    async def failing() -> None:
        await asyncio.sleep(0.01)
        raise EngineError("it has no room")

    asyncio.run(case())


# --- What is planned ------------------------------------------------------------------------------------------------


def only(plan: Plan, role: str) -> Plan:
    return replace(plan, replicas=tuple(one for one in plan.replicas if one.role == role))


@pytest.mark.parametrize(
    ("plan", "engine", "message"),
    [
        (only(split_plan(), "prefill"), "vllm", "that read prompts have none beside them that write answers: r0, r1"),
        (only(split_plan(), "decode"), "vllm", "that write answers have none beside them that read prompts: w0, w1"),
        (split_plan(), "llamacpp", "which 'llamacpp' cannot do. Plan it with vllm or sglang"),
        (split_plan(), "openai", "which 'openai' cannot do"),
    ],
)
def test_a_plan_of_halves_that_do_not_fit_is_refused_with_advice(plan: Plan, engine: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        check_pairs(plan, lambda _replica: engine)


def test_engines_that_do_not_understand_one_another_are_no_pair() -> None:
    with pytest.raises(EngineError, match="read and written on sglang and vllm: they do not understand one another"):
        check_pairs(split_plan(), lambda replica: "sglang" if replica.role == "prefill" else "vllm")
    check_pairs(split_plan(), lambda _replica: "vllm")
    check_pairs(fake_plan(), lambda _replica: "llamacpp")
