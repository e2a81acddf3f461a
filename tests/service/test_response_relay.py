"""Responses of engines that make them themselves: the official client, a real gateway, engines on loopback."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import openai
import orjson
import pytest
from aiohttp import web
from msgspec.structs import replace
from serving import Answer, Served, engine_that, fake_plan, served, until

from waterline.service.errors import RejectedError
from waterline.service.response_relay import read_own

USAGE = {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10, "a_field_of_its_own": {"odd": True}}


def response(status: str, **more: Any) -> dict[str, Any]:
    return {"id": "resp_engine", "object": "response", "created_at": 1, "model": "chat", "status": status, "output": [],
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "an_engines_own": 1, **more}  # fmt: skip


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def delta(text: str) -> bytes:
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
    return event("response.output_text.delta", delta=text, sequence_number=2, **place)


BEGUN = event("response.created", sequence_number=0, response=response("in_progress"))
MUSED = event("response.reasoning_text.delta", delta="Hm", sequence_number=1, item_id="rs_1", output_index=0)
SAID = [delta("one "), delta("two "), delta("three")]
DONE = event("response.completed", sequence_number=5, response=response("completed", usage=USAGE))


def engine(*events: bytes, asked: list[bytes], crlf: bool = False) -> Answer:
    """Return an engine that streams these events, and breaks off where they have no end."""

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if body == b"{}":
            return web.json_response({"error": {"message": "input: field required"}}, status=400)
        asked.append(body)
        if not json.loads(body).get("stream"):
            return web.json_response(response("completed", usage=USAGE))
        reply = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await reply.prepare(request)
        for one in events:
            await reply.write(one.replace(b"\n", b"\r\n") if crlf else one)
            await asyncio.sleep(0.005)
        if events[-1:] != (DONE,):
            assert request.transport
            request.transport.abort()
        return reply

    return answer


async def no_chats(_request: web.Request) -> web.StreamResponse:
    raise AssertionError("it was asked for a chat completion")


@asynccontextmanager
async def serving(
    *engines: Answer, chats: Answer = no_chats, owner: str = "nobody", hedge_after_s: float | None = None
) -> AsyncIterator[Served]:
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(engine_that(chats, responses=one, owner=owner)) for one in engines]
        plan = fake_plan({"chat": len(urls)}, engine="openai", urls=(urls[0],))
        models = tuple(replace(model, hedge_after_s=hedge_after_s) for model in plan.fleet.models)
        plan = replace(plan, fleet=replace(plan.fleet, models=models))
        service = await stack.enter_async_context(served(plan, start=False))
        for number, url in enumerate(urls):
            attached = service.supervisor.engines[f"chat/{number}"]
            object.__setattr__(attached, "url", url)
        await service.supervisor.start()
        yield service


def test_what_the_engine_makes_itself_passes_as_it_came_to_the_byte() -> None:
    asked: list[bytes] = []

    async def case() -> None:
        async with serving(engine(BEGUN, MUSED, *SAID, DONE, asked=asked)) as service:
            body = b'{"model": "chat",  "input":"hi", "stream":true, "tools":[{"type":"web_search"}], "store": true}'
            async with aiohttp.ClientSession() as session:
                async with session.post(f"{service.url}/v1/responses", data=body) as reply:
                    assert await reply.read() == b"".join((BEGUN, MUSED, *SAID, DONE))
                async with session.post(f"{service.url}/v1/responses", json={"model": "chat", "input": "hi"}) as reply:
                    assert orjson.loads(await reply.read()) == response("completed", usage=USAGE)
            assert asked[0] == body
            await until(lambda: len(service.completions) == 2)
            assert [(one.status, one.prompt_tokens, one.output_tokens) for one in service.completions] == [
                ("ok", 7, 3)
            ] * 2
            assert [one.thinking_tokens for one in service.completions] == [1, 0]  # though the usage is silent

    asyncio.run(case())


def test_the_official_client_reads_a_stream_that_was_passed_on() -> None:
    async def case() -> None:
        async with serving(engine(BEGUN, *SAID, DONE, asked=[], crlf=True)) as service:
            stream = await service.openai.responses.create(model="chat", input="hi", stream=True)
            kinds = [one.type async for one in stream]
            assert kinds == ["response.created", *["response.output_text.delta"] * 3, "response.completed"]

    asyncio.run(case())


@pytest.mark.parametrize(
    "before",
    [(BEGUN,), (BEGUN, event("response.failed", response=response("failed", error={"message": "out of memory"}))),
     (b"data: {\n\n",)],
)  # fmt: skip
def test_an_engine_that_fails_before_it_said_anything_is_nobodys_news(before: tuple[bytes, ...]) -> None:
    async def case() -> None:
        first: list[bytes] = []
        async with serving(engine(*before, asked=first), engine(BEGUN, *SAID, DONE, asked=[])) as service:
            while not first:
                stream = await service.openai.responses.create(model="chat", input="hi", stream=True)
                assert [one.type async for one in stream].count("response.created") == 1
            await until(lambda: not service.gateway.under_way("chat/0"))
            assert {one.status for one in service.completions} == {"ok"}

    asyncio.run(case())


def test_one_that_says_only_that_it_has_begun_is_late_and_a_second_makes_the_response() -> None:
    asked: list[bytes] = []
    probes: list[bytes] = []
    says_all, done = engine(BEGUN, *SAID, DONE, asked=[]), asyncio.Event()

    async def first_late(request: web.Request) -> web.StreamResponse:
        asked.append(await request.read())
        if asked[-1] == b"{}" or len(asked) > len(probes) + 1:
            return await says_all(request)
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        await reply.write(BEGUN.replace(b"resp_engine", b"resp_of_the_first"))
        await done.wait()
        return reply

    async def case() -> None:
        async with serving(first_late, first_late, hedge_after_s=0.05) as service:
            probes[:] = asked
            body = {"model": "chat", "input": "hi", "stream": True}
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{service.url}/v1/responses", json=body) as reply,
            ):
                assert await reply.read() == b"".join((BEGUN, *SAID, DONE))
            done.set()
            await until(lambda: len(service.completions) == 1)
            assert (service.completions[0].status, len(asked) - len(probes)) == ("ok", 2)

    asyncio.run(case())


def test_one_that_breaks_off_later_ends_with_an_error_that_the_client_understands() -> None:
    async def case() -> None:
        async with serving(engine(BEGUN, *SAID, asked=[])) as service:
            stream = await service.openai.responses.create(model="chat", input="hi", stream=True)
            events = [one async for one in stream]
            assert [one.type for one in events[1:4]] == ["response.output_text.delta"] * 3
            assert (events[-1].type, len(events)) == ("error", 5)
            assert "The engine broke off. No other can go on" in str(events[-1])
            await until(lambda: len(service.completions) == 1)
            assert (service.completions[0].status, service.completions[0].output_tokens) == ("failed", 3)

    asyncio.run(case())


# --- From the middle of a response ----------------------------------------------------------------------------------

PLACE = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
PART = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
OPENED = (
    BEGUN,
    event("response.output_item.added", sequence_number=1, output_index=0, item=MESSAGE),
    event("response.content_part.added", sequence_number=2, part=PART, **PLACE),
)
HALF = tuple(
    event("response.output_text.delta", sequence_number=number, delta=text, logprobs=[], **PLACE)
    for number, text in ((3, "one "), (4, "two "))
)
FAILED = event("response.failed", sequence_number=5, response=response("failed", error={"message": "out of memory"}))


def chats(asked: list[dict[str, Any]]) -> Answer:
    """Return an engine that goes on with "three"."""

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(await request.json())
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        for choices, more in (
            ([{"index": 0, "delta": {"role": "assistant", "content": "three"}}], {}),
            ([{"index": 0, "delta": {}, "finish_reason": "stop"}], {}),
            ([], {"usage": usage}),
        ):
            chunk = {"id": "c", "object": "chat.completion.chunk", "created": 2, "model": "chat", "choices": choices}
            await reply.write(b"data: " + orjson.dumps(chunk | more) + b"\n\n")
        await reply.write(b"data: [DONE]\n\n")
        return reply

    return answer


@pytest.mark.parametrize("end", [(), (FAILED,), (HALF[1] + FAILED,)], ids=["cut", "failed", "failed at once"])
def test_in_the_middle_of_a_text_another_engine_goes_on_and_nobody_sees_it(end: tuple[bytes, ...]) -> None:
    asked: list[dict[str, Any]] = []
    said = (*OPENED, *HALF, *end) if end != (HALF[1] + FAILED,) else (*OPENED, HALF[0], *end)

    async def case() -> None:
        broken = engine(*said, asked=[])
        async with serving(broken, broken, chats=chats(asked), owner="vllm") as service:
            stream = await service.openai.responses.create(
                model="chat", input="count", instructions="Be brief.", max_output_tokens=10, stream=True
            )
            events = [one async for one in stream]
            await until(lambda: len(service.completions) == 1)
            done = service.completions[0]
            assert (done.status, done.prompt_tokens, done.output_tokens) == ("ok", 7, 3)
        assert [one.type.removeprefix("response.") for one in events] == [
            *("created", "output_item.added", "content_part.added", *["output_text.delta"] * 3),
            *("output_text.done", "content_part.done", "output_item.done", "completed"),
        ]
        assert [one.sequence_number for one in events] == list(range(10))
        assert {one.item_id for one in events if hasattr(one, "item_id")} == {"msg_1"}
        last = events[-1].response  # type: ignore[union-attr]
        assert (last.id, last.status, last.output_text, last.output[0].id) == (
            *("resp_engine", "completed", "one two three", "msg_1"),
        )
        assert (last.usage.input_tokens, last.usage.output_tokens, last.an_engines_own) == (7, 3, 1)

    asyncio.run(case())
    [chat] = asked
    assert [(one["role"], one["content"]) for one in chat["messages"]] == [
        *(("system", "Be brief."), ("user", "count"), ("assistant", "one two ")),
    ]
    assert (chat["continue_final_message"], chat["max_completion_tokens"]) == (True, 8)


def reasoning(kind: str, **more: Any) -> bytes:
    return event(kind, output_index=0, **more)


THOUGHT = reasoning("response.output_item.added", item={"id": "rs_1", "type": "reasoning", "encrypted_content": "x"})
CALL = reasoning("response.output_item.added", item={"id": "fc_1", "type": "function_call", "name": "look"})
FORM = {"format": {"type": "json_schema", "name": "n", "schema": {}}}


@pytest.mark.parametrize(
    ("said", "asks", "why"),
    [
        ((BEGUN, THOUGHT, *OPENED[1:], *HALF), {}, "'response.output_item.added' has been sent"),
        ((BEGUN, CALL), {}, "'response.output_item.added' has been sent"),
        ((*OPENED, *HALF, event("response.output_text.done", text="one two ", **PLACE)), {}, "text.done' has been"),
        ((*OPENED, *HALF), {"text": FORM}, "its form is guided by response_format"),
        ((*OPENED, *HALF), {"tools": [{"type": "web_search"}]}, "'web_search' run nowhere here"),
    ],
    ids=["thought", "call", "done", "form", "tool"],
)
def test_what_nobody_could_go_on_with_ends_with_an_error(said: tuple[bytes, ...], asks: Any, why: str) -> None:
    async def case() -> None:
        broken = engine(*said, asked=[])
        async with serving(broken, broken, owner="vllm") as service:
            stream = await service.openai.responses.create(model="chat", input="hi", stream=True, extra_body=asks)
            events = [one async for one in stream]
            assert [one.type for one in events].count("error") == 1
            assert (events[-1].type, why in str(events[-1])) == ("error", True), events[-1]

    asyncio.run(case())


def test_what_needs_a_memory_is_refused_whoever_would_make_the_response() -> None:
    async def case() -> None:
        async with serving(engine(DONE, asked=[])) as service:
            for name, value in (("previous_response_id", "resp_1"), ("background", True), ("conversation", "c")):
                with pytest.raises(openai.BadRequestError, match=f"'{name}' is not supported") as caught:
                    await service.openai.responses.create(model="chat", input="hi", extra_body={name: value})
                assert caught.value.code == "unsupported_parameter"

    asyncio.run(case())


def test_the_size_of_what_is_asked_is_that_of_its_texts() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "x" * 400}]},
        {"type": "odd", "output": "y" * 40},
    ]
    asked = read_own(orjson.dumps({"model": "m", "input": items, "instructions": "z" * 60, "max_output_tokens": 9}))
    assert (asked.prompt_tokens, asked.most_tokens, asked.stream) == (500 // 4 + 2 * 4, 9, False)
    with pytest.raises(RejectedError, match="'input' is missing"):
        read_own(b'{"model": "m"}')
