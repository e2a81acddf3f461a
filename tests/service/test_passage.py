"""Failures nobody sees: one of two replicas fails, and the client gets the answer it would have got."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from faulty import BEFORE, HARMLESS, QUESTION, WITHIN, Engine, listening, said_by
from msgspec.structs import replace
from serving import Served, engine_that, fake_plan, laptop_plan, served, until

from waterline.service.asking import Passage
from waterline.service.body import CHAT, COMPLETIONS
from waterline.service.engines.openai import Attached
from waterline.service.passage import ATTEMPTS
from waterline.service.silence import Watch

TOKENS = 50


@dataclass
class Got:
    """One stream as its client saw it."""

    text: str = ""
    texts: dict[int, str] = field(default_factory=dict)  # by answer
    thought: str = ""
    roles: int = 0
    finishes: list[str] = field(default_factory=list)
    usages: list[dict[str, int]] = field(default_factory=list)
    stamps: set[tuple[str, int, str, str]] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    dones: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    events: int = 0
    took_s: float = 0.0

    def read(self, data: bytes) -> None:
        """Read a whole stream as a strict client does."""
        *blocks, rest = data.split(b"\n\n")
        assert rest == b""
        for block in blocks:
            assert block.startswith(b"data: "), block
            if block == b"data: [DONE]":
                self.dones += 1
                continue
            assert not self.dones, "nothing comes after the end"
            event = orjson.loads(block[6:])
            if "error" in event:
                self.errors.append(event["error"])
                continue
            self.events += 1
            self.stamps.add((event["id"], event["created"], event["model"], event["object"]))
            self.usages += [event["usage"]] if event.get("usage") else []
            self.keys |= set(event)
            for choice in event["choices"]:
                self.keys |= set(choice)
                delta = choice.get("delta", {})
                self.roles += "role" in delta
                text = delta.get("content") or choice.get("text") or ""
                self.text += text
                self.texts[choice["index"]] = self.texts.get(choice["index"], "") + text
                self.thought += delta.get("reasoning_content") or ""
                self.finishes += [choice["finish_reason"]] if choice["finish_reason"] else []


async def ask(service: Served, fields: Mapping[str, Any], fault: str = "", path: str = CHAT) -> Got:
    """Ask for a stream, with a fault for those who are faulty, and read it as a strict client does."""
    got, begun_s = Got(), time.monotonic()
    async with (
        aiohttp.ClientSession(headers={"user-agent": fault or "none"}) as session,
        session.post(f"{service.url}/v1{path}", json={"model": "chat", "stream": True, **fields}) as reply,
    ):
        data = await reply.read()
        assert reply.status == 200, data
    got.read(data)
    got.took_s = time.monotonic() - begun_s
    return got


def check(got: Got, fields: Mapping[str, Any], engine: Engine, path: str = CHAT, tokens: int = TOKENS) -> None:
    """Fail unless a stream is the one a healthy engine gives."""
    assert got.errors == []
    assert got.text == said_by(fields, engine, path)
    assert got.finishes == ["length" if fields.get("max_tokens") == TOKENS else "stop"]
    assert got.roles == (path == CHAT)
    assert got.dones == 1
    assert len(got.stamps) == 1, "one name, one date, one model"
    assert not got.keys & {"token_ids", "prompt_token_ids"}, "nobody has asked for them"
    if (fields.get("stream_options") or {}).get("include_usage"):
        [usage] = got.usages
        assert usage["completion_tokens"] == tokens
        assert usage["total_tokens"] == usage["prompt_tokens"] + tokens
    else:
        assert got.usages == []


REQUEST: dict[str, Any] = {"model": "chat", "messages": QUESTION, "stream_options": {"include_usage": True}}
TEXT: dict[str, Any] = {
    "model": "chat",
    "prompt": "How deep",
    "max_tokens": 60,
    "stream_options": {"include_usage": True},
}


async def run(
    cases: list[tuple[str, dict[str, Any], str]], owner: str = "vllm", output_tokens: int = TOKENS
) -> tuple[list[Got], Served]:
    """Ask for all these at once, of a faulty engine and a healthy one, whose answers end by themselves so soon."""
    engines = [Engine(faulty=faulty, owner=owner, output_tokens=output_tokens) for faulty in (True, False)]
    async with (
        listening(*engines) as attached,
        served(fake_plan({"chat": 2}, max_batch=1000), engines=attached) as service,
    ):
        got = await asyncio.gather(*(ask(service, fields, fault, path) for fault, fields, path in cases))
        for one, (_, fields, path) in zip(got, cases, strict=True):
            check(one, fields, engines[1], path)
        assert {one.status for one in service.completions} == {"ok"}
        assert {one.output_tokens for one in service.completions} == {TOKENS}
        assert len({one.prompt_tokens for one in service.completions}) == len({path for _, _, path in cases})
        await until(lambda: not any(engine.running for engine in engines))
        return got, service


@pytest.mark.parametrize("fault", BEFORE)
def test_before_the_first_byte_nobody_sees_a_failure(fault: str) -> None:
    got, _ = asyncio.run(run([(fault, REQUEST, CHAT), (fault, TEXT, COMPLETIONS)] * 6))
    print(f"{fault}: 12 of 12, the slowest {max(one.took_s for one in got):.2f} s")


@pytest.mark.parametrize("fault", WITHIN)
def test_in_the_middle_of_a_stream_nobody_sees_a_failure(fault: str) -> None:
    cases = [(f"{fault}@{after}", REQUEST, CHAT) for after in (0, 0, 1, 1, 25, 25, 48, 48, 49, 49, 50, 50)]
    got, _ = asyncio.run(run(cases + [(case, TEXT, COMPLETIONS) for case, _, _ in cases]))
    print(f"{fault}: 24 of 24, the slowest {max(one.took_s for one in got):.2f} s")


@pytest.mark.parametrize("fault", HARMLESS)
def test_what_is_only_unusual_is_no_failure(fault: str) -> None:
    asyncio.run(run([(fault, REQUEST, CHAT)] * 4))


@pytest.mark.parametrize(("owner", "path"), [("vllm", CHAT), ("vllm", COMPLETIONS), ("sglang", CHAT)])
def test_wherever_a_stream_is_cut_it_is_the_same_stream(owner: str, path: str) -> None:
    fields = REQUEST if path == CHAT else TEXT
    asyncio.run(run([(f"cut@{after}", fields, path) for after in range(TOKENS + 1) for _ in range(2)], owner))


@pytest.mark.parametrize(
    ("owner", "path"), [("vllm", CHAT), ("vllm", COMPLETIONS), ("sglang", CHAT), ("sglang", COMPLETIONS)]
)
def test_the_limit_of_tokens_is_that_of_the_whole_answer(owner: str, path: str) -> None:
    fields = {**(REQUEST if path == CHAT else TEXT), "max_tokens": TOKENS}
    asyncio.run(run([(f"cut@{after}", fields, path) for after in range(0, TOKENS + 1, 7) for _ in range(2)], owner, 80))


async def with_engines(engines: tuple[Engine, ...], case: Callable[[Served], Awaitable[None]], **plan: Any) -> None:
    async with (
        listening(*engines) as attached,
        served(fake_plan({"chat": len(engines)}, **plan), engines=attached) as service,
    ):
        await case(service)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("fault", BEFORE)
def test_an_answer_that_comes_whole_is_asked_for_again(fault: str, path: str) -> None:
    fields = {**(REQUEST if path == CHAT else TEXT), "stream": False}
    del fields["stream_options"]
    engines = (Engine(faulty=True, output_tokens=3), Engine(output_tokens=3))

    async def case(service: Served) -> None:
        async def ask_whole(session: aiohttp.ClientSession) -> str:
            async with session.post(f"{service.url}/v1{path}", json=fields) as reply:
                [choice] = (await reply.json())["choices"]
                return str(choice["message"]["content"] if path == CHAT else choice["text"])

        async with aiohttp.ClientSession(headers={"user-agent": fault}) as session:
            texts = await asyncio.gather(*(ask_whole(session) for _ in range(6)))
        assert texts == [said_by(fields, engines[1], path)] * 6

    if fault == "hang":  # three tokens of an answer take no time, so it is missed soon
        fields["max_tokens"] = 4
    asyncio.run(with_engines(engines, case))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_nobody_can_go_on_with_ends_in_an_error_that_says_why_unless_nothing_was_said(
    more: dict[str, Any], why: str
) -> None:
    engines = (Engine(faulty=True), Engine())

    async def case(service: Served) -> None:
        fields = {**REQUEST, **more}
        broken = await ask(service, fields, "cut@20")
        assert (broken.errors[0]["type"], broken.dones) == ("server_error", 0)
        assert why in broken.errors[0]["message"]
        whole = said_by(fields, engines[1])
        assert whole.startswith(broken.text)
        check(await ask(service, fields, "cut@0"), fields, engines[1])
        greedy = {**fields, "temperature": 0}
        check(await ask(service, greedy, "cut@20"), greedy, engines[1])

    asyncio.run(with_engines(engines, case))


def test_what_fails_everybody_ends_after_a_few_and_nobody_is_blamed() -> None:
    engines = tuple(Engine(faulty=True) for _ in range(4))

    async def case(service: Served) -> None:
        for _ in range(5):
            async with (
                aiohttp.ClientSession(headers={"user-agent": "500"}) as session,
                session.post(f"{service.url}/v1{CHAT}", json=REQUEST) as reply,
            ):
                assert reply.status == 502
        assert sum(len(engine.bodies) for engine in engines) == 5 * ATTEMPTS
        assert {lane.doubted for lane in service.gateway.dispatcher.lanes.values()} == {False}

    asyncio.run(with_engines(engines, case))


@pytest.mark.parametrize("greedy", [True, False])
def test_where_the_next_engine_does_not_take_what_was_said_it_is_asked_once_more(greedy: bool) -> None:
    """vLLM refuses to go on with a message where the chat template changes what stands in it."""
    engines = (Engine(faulty=True), Engine(refuses="continue_final_message"))
    fields = {**REQUEST, "stop": ["zzz"], **({"temperature": 0} if greedy else {})}

    async def case(service: Served) -> None:
        for _ in range(4):
            got = await ask(service, fields, "cut@17")
            if greedy or not got.errors:
                check(got, fields, engines[1])
            else:
                assert "continue_final_message is not for me" in got.errors[0]["message"]
                assert said_by(fields, engines[1]).startswith(got.text)
        assert sum("continue_final_message" in body for body in engines[1].bodies) > 0, "it was asked so first"

    asyncio.run(with_engines(engines, case))


@pytest.mark.parametrize("fault", ["503", "429", "told 503"])
def test_who_is_merely_full_is_not_sick_and_is_waited_for(fault: str) -> None:
    engines = (Engine(faulty=True), Engine())

    async def case(service: Served) -> None:
        for got in await asyncio.gather(*(ask(service, REQUEST, fault) for _ in range(20))):
            check(got, REQUEST, engines[1])
        assert {lane.doubted for lane in service.gateway.dispatcher.lanes.values()} == {False}
        assert engines[0].bodies, "it was asked"
        engines[1].faulty = True  # now both are full, for a while
        asking = asyncio.create_task(ask(service, REQUEST, fault))
        await until(lambda: len(engines[1].bodies) > 20)
        engines[1].faulty = False
        check(await asking, REQUEST, engines[1])

    asyncio.run(with_engines(engines, case))


def test_a_storm_of_requests_that_are_refused_within_a_stream_ejects_nobody() -> None:
    """vLLM looks at the grammar of a stream once it has begun it: status 200, and its first event is the refusal."""
    said = {"message": "Grammar error: Invalid type: nonsense", "type": "BadRequestError", "code": 400}

    async def refuses(request: web.Request) -> web.StreamResponse:
        await request.read()
        data = b"data: " + orjson.dumps({"error": said}) + b"\n\ndata: [DONE]\n\n"
        return web.Response(body=data, content_type="text/event-stream")

    async def case() -> None:
        async with engine_that(refuses, model="chat") as url:
            engines = {f"chat/{number}": Attached(url=url, name="chat") for number in range(2)}
            async with (
                served(fake_plan({"chat": 2}), engines=engines) as service,
                aiohttp.ClientSession() as session,
            ):
                for _ in range(40):
                    async with session.post(f"{service.url}/v1{CHAT}", json={**REQUEST, "stream": True}) as reply:
                        assert (reply.status, reply.content_type) == (400, "application/json")
                        assert (await reply.json())["error"]["message"] == said["message"]
                assert {lane.doubted for lane in service.gateway.dispatcher.lanes.values()} == {False}
                assert {one.status for one in service.completions} == {"cancelled"}

    asyncio.run(case())


def test_a_storm_of_wrong_requests_ejects_nobody() -> None:
    engines = (Engine(), Engine())

    async def case(service: Served) -> None:
        async with aiohttp.ClientSession() as session:
            for _ in range(40):
                body = {**REQUEST, "messages": [{"role": "user", "content": "x" * 4 * 480}], "max_tokens": 4}
                async with session.post(f"{service.url}/v1{CHAT}", json=body) as reply:
                    assert reply.status == 400
        assert {lane.doubted for lane in service.gateway.dispatcher.lanes.values()} == {False}

    for engine in engines:
        engine.max_context_tokens = 400
    asyncio.run(with_engines(engines, case))


@pytest.mark.parametrize("stream", [False, True])
def test_when_the_client_leaves_the_engine_hears_of_it_at_once(stream: bool) -> None:
    engine = Engine(token_s=0.05, owner="sglang")

    async def case(service: Served) -> None:
        async with aiohttp.ClientSession() as session:
            asking = asyncio.create_task(session.post(f"{service.url}/v1{CHAT}", json={**REQUEST, "stream": stream}))
            await until(lambda: engine.running == 1)
            begun_s = time.monotonic()
            if stream:
                (await asking).close()
            asking.cancel()
            await until(lambda: engine.left == 1, 1.0)
            print(f"the engine heard of it after {time.monotonic() - begun_s:.3f} s")
            if not stream:
                await until(lambda: len(engine.bodies) == 2, 1.0)
                assert engine.bodies[1] == {"rid": engine.bodies[0]["rid"]}
        await until(lambda: [one.status for one in service.completions] == ["cancelled"])

    asyncio.run(with_engines((engine,), case))


def test_a_stream_meets_one_failure_after_the_other_and_nobody_sees_any() -> None:
    engines = tuple(Engine(faulty=number < 3) for number in range(4))

    async def case(service: Served) -> None:
        for got in await asyncio.gather(*(ask(service, REQUEST, "cut@9") for _ in range(20))):
            check(got, REQUEST, engines[3])

    asyncio.run(with_engines(engines, case, max_batch=100))


# --- A real engine --------------------------------------------------------------------------------------------------


def test_when_llama_cpp_is_killed_another_goes_on_with_the_very_answer() -> None:
    [replica] = laptop_plan().replicas
    plan = replace(laptop_plan(), replicas=tuple(replace(replica, id=f"abacus/{number}") for number in range(2)))
    common = {"model": "abacus", "temperature": 0, "stream_options": {"include_usage": True}}
    products = [(347, 586), (999, 888), (123, 45), (708, 691)]
    chats = [{**common, "messages": [{"role": "user", "content": f"What is {a} * {b}?"}]} for a, b in products]
    texts = [{**common, "prompt": f"<|user|>{a}*{b}<|assistant|><think>", "max_tokens": 150} for a, b in products]
    cases = [(fields, CHAT) for fields in chats] + [(fields, COMPLETIONS) for fields in texts]

    async def case() -> list[bool]:
        async with served(plan) as service:
            expected = [await ask(service, fields, path=path) for fields, path in cases]
            passages, pid = service.gateway._asker, service.supervisor.states["abacus/0"].pid or 0
            hear, kills = passages._heard, [pid]

            def kill_who_has_begun(passage: Passage, watch: Watch) -> None:
                hear(passage, watch)
                if watch.vitals.replica.id == "abacus/0" and kills:
                    os.kill(kills.pop(), signal.SIGKILL)

            passages._heard = kill_who_has_begun  # type: ignore[method-assign]
            got = await asyncio.gather(*(ask(service, fields, path=path) for fields, path in cases))
            assert not kills
            for mine, its in zip(got, expected, strict=True):
                assert (mine.errors, mine.dones) == ([], 1)
                assert (mine.text, mine.thought) == (its.text, its.thought)
                assert (mine.finishes, mine.roles) == (its.finishes, its.roles)
                assert len({stamp[0] for stamp in mine.stamps}) == 1  # its dates go on with the clock
                for usage in (*mine.usages, *its.usages):
                    del usage["prompt_tokens_details"]  # what was cached, which differs
                assert mine.usages == its.usages
            assert {one.status for one in service.completions} == {"ok"}
            return ["timings" not in one.keys for one in got]  # else its engine has told the whole answer

    moved = asyncio.run(case())
    print(f"{sum(moved)} of {len(moved)} streams moved")
    assert any(moved), "the kills came too late to matter"
