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
async def serving(*engines: Answer) -> AsyncIterator[Served]:
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(engine_that(no_chats, responses=one)) for one in engines]
        plan = fake_plan({"chat": len(urls)}, engine="openai", urls=(urls[0],))
        service = await stack.enter_async_context(served(plan, start=False))
        for number, url in enumerate(urls):
            attached = service.supervisor.engines[f"chat/{number}"]
            object.__setattr__(attached, "url", url)
        await service.supervisor.start()
        yield service


def test_what_the_engine_makes_itself_passes_as_it_came_to_the_byte() -> None:
    asked: list[bytes] = []

    async def case() -> None:
        async with serving(engine(BEGUN, *SAID, DONE, asked=asked)) as service:
            body = b'{"model": "chat",  "input":"hi", "stream":true, "tools":[{"type":"web_search"}], "store": true}'
            async with aiohttp.ClientSession() as session:
                async with session.post(f"{service.url}/v1/responses", data=body) as reply:
                    assert await reply.read() == b"".join((BEGUN, *SAID, DONE))
                async with session.post(f"{service.url}/v1/responses", json={"model": "chat", "input": "hi"}) as reply:
                    assert orjson.loads(await reply.read()) == response("completed", usage=USAGE)
            assert asked[0] == body
            await until(lambda: len(service.completions) == 2)
            assert [(one.status, one.prompt_tokens, one.output_tokens) for one in service.completions] == [
                ("ok", 7, 3)
            ] * 2

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
