"""Engines that fail in the middle of something, and what the client sees of it."""

import asyncio
import time

import aiohttp
import openai
import pytest
from aiohttp import web
from serving import QUESTION, Answer, engine_that, fake_plan, served

from waterline.service.upstream import Progress

EVENT = b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("size", [1, 2, 5, 7, 100_000])
def test_events_and_usage_are_counted_wherever_the_stream_is_cut(size: int) -> None:
    stream = EVENT * 50 + DONE
    progress, exact = Progress(), Progress()
    for start in range(0, len(stream), size):
        progress.saw(stream[start : start + size])
    assert progress.events == 51
    assert progress.output_tokens == 48, "50 events, of which one names the role and one ends it"
    for start in range(0, len(stream), size):
        exact.saw((EVENT * 2 + USAGE + DONE)[start : start + size])
    assert (exact.prompt_tokens, exact.output_tokens) == (5, 2)


def test_words_that_look_like_events_are_not_counted() -> None:
    progress = Progress()
    progress.saw(rb'data: {"text": "\ndata: \"completion_tokens\": 7"}' + b"\n\n")
    assert progress.events == 1


async def begin(request: web.Request) -> web.StreamResponse:
    await request.read()
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    return response


async def streams(request: web.Request) -> web.StreamResponse:
    response = await begin(request)
    await response.write(EVENT * 3 + DONE)
    return response


async def breaks_off(request: web.Request) -> web.StreamResponse:
    response = await begin(request)
    await response.write(EVENT * 3)
    assert request.transport
    request.transport.abort()
    return response


async def ends_early(request: web.Request) -> web.StreamResponse:
    response = await begin(request)
    await response.write(EVENT * 3)
    return response


async def breaks_off_within_an_event(request: web.Request) -> web.StreamResponse:
    response = await begin(request)
    await response.write(EVENT * 3 + EVENT[:40])
    return response


async def never_ends(request: web.Request) -> web.StreamResponse:
    response = await begin(request)
    while True:
        await response.write(EVENT * 1000)


async def hangs_up(request: web.Request) -> web.StreamResponse:
    assert request.transport
    request.transport.abort()
    return web.Response()


async def fails(_request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "out of memory", "type": "server_error"}}, status=500)


async def refuses(_request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "too long", "type": "context", "param": "messages"}}, status=400)


@pytest.mark.parametrize(("broken", "sent"), [(hangs_up, 3), (fails, 2)])  # who hangs up is asked once more
def test_before_the_first_byte_another_replica_takes_over(broken: Answer, sent: int) -> None:
    calls = 0

    async def first_breaks(request: web.Request) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        return await (broken if calls < sent else streams)(request)

    async def case() -> None:
        async with engine_that(first_breaks) as url:
            plan = fake_plan({"chat": 2}, engine="openai", urls=(url,))
            async with served(plan) as service:
                stream = await service.openai.chat.completions.create(model="chat", messages=QUESTION, stream=True)
                assert [chunk.choices[0].delta.content async for chunk in stream] == ["a"] * 3
                assert [one.replica for one in service.completions] == ["chat/1"]

    asyncio.run(case())
    assert calls == sent


def test_a_kept_connection_that_turns_out_to_be_dead_costs_nothing() -> None:
    calls = 0

    async def answers_once_a_connection(request: web.Request) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        if calls in {2, 3}:  # the second request finds its connection closed, and so would an impatient retry
            return await hangs_up(request)
        return await streams(request)

    async def case() -> None:
        async with (
            engine_that(answers_once_a_connection) as url,
            served(fake_plan(engine="openai", urls=(url,))) as service,
        ):
            for _ in range(2):
                stream = await service.openai.chat.completions.create(model="chat", messages=QUESTION, stream=True)
                assert len([chunk async for chunk in stream]) == 3

    asyncio.run(case())
    assert calls == 4


@pytest.mark.parametrize("broken", [hangs_up, fails])
def test_when_nobody_answers_the_client_is_told_so(broken: Answer) -> None:
    async def case() -> None:
        async with engine_that(broken) as url, served(fake_plan(engine="openai", urls=(url,))) as service:
            with pytest.raises(openai.InternalServerError) as caught:
                await service.openai.chat.completions.create(model="chat", messages=QUESTION)
            assert caught.value.status_code == 502
            assert [one.status for one in service.completions] == ["failed"]

    asyncio.run(case())


@pytest.mark.parametrize("broken", [breaks_off, ends_early, breaks_off_within_an_event])
def test_a_stream_that_breaks_off_ends_with_an_error_event(broken: Answer) -> None:
    async def case() -> None:
        async with engine_that(broken) as url, served(fake_plan(engine="openai", urls=(url,))) as service:
            stream = await service.openai.chat.completions.create(model="chat", messages=QUESTION, stream=True)
            assert [(await anext(stream)).choices[0].delta.content for _ in range(3)] == ["a"] * 3
            with pytest.raises(openai.APIError, match="The engine broke off"):
                await anext(stream)
            assert [one.status for one in service.completions] == ["failed"]

    asyncio.run(case())


def test_a_client_that_does_not_read_does_not_hold_up_the_end() -> None:
    async def case() -> float:
        async with engine_that(never_ends) as url, aiohttp.ClientSession(read_bufsize=1024) as session:
            async with served(fake_plan(engine="openai", urls=(url,))) as service:
                body = {"model": "chat", "messages": QUESTION, "stream": True}
                reply = await session.post(f"{service.url}/v1/chat/completions", json=body)
                await asyncio.sleep(0.3)  # until every buffer on the way is full
                begun_s = time.monotonic()
            reply.close()
            return time.monotonic() - begun_s

    assert asyncio.run(case()) < 2


def test_what_an_engine_refuses_is_the_clients_own_doing() -> None:
    async def case() -> None:
        async with engine_that(refuses) as url, served(fake_plan(engine="openai", urls=(url,))) as service:
            with pytest.raises(openai.BadRequestError, match="too long") as caught:
                await service.openai.chat.completions.create(model="chat", messages=QUESTION)
            assert (caught.value.param, caught.value.code) == ("messages", "context")
            assert service.supervisor.states["chat/0"].status == "ready"

    asyncio.run(case())


def test_an_attached_server_may_call_the_model_by_another_name() -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        assert request.headers["authorization"] == "Bearer none", "the key is for the attached server"
        return web.json_response(await request.json())

    async def case() -> None:
        async with engine_that(echo, model="Qwen/Qwen3-32B") as url:
            plan = fake_plan(engine="openai", urls=(url,))
            async with served(plan) as service, aiohttp.ClientSession() as session:
                body = {"model": "chat", "messages": QUESTION, "custom": {"kept": [1, None]}}
                headers = {"authorization": "Bearer none"}
                async with session.post(f"{service.url}/v1/chat/completions", json=body, headers=headers) as reply:
                    assert await reply.json() == {**body, "model": "Qwen/Qwen3-32B"}

    asyncio.run(case())
