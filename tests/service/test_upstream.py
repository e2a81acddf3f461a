"""Engines that fail in the middle of something, and what the client sees of it."""

import asyncio
import time
from collections.abc import Mapping

import aiohttp
import openai
import orjson
import pytest
from aiohttp import web
from serving import QUESTION, Answer, engine_that, fake_plan, served, until

from waterline.service.engines.llamacpp import FAULTS
from waterline.service.engines.openai import Attached
from waterline.service.events import Events
from waterline.service.supervisor import ReplicaState
from waterline.service.upstream import Progress, engine_words

EVENT = b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"


def read_in_pieces(stream: bytes, size: int) -> tuple[list[bytes], Progress]:
    """Return what comes out of a stream that arrives in pieces of that size, and the progress it makes."""
    events, progress, out = Events(bytes.decode), Progress(), list[bytes]()
    for start in range(0, len(stream) + size, size):
        if data := events.feed(stream[start : start + size]):
            out.append(data)
            progress.saw(events.latest)
    assert not events.problem
    progress.done = events.done
    return out, progress


@pytest.mark.parametrize("size", [1, 2, 5, 7, 100_000])
def test_events_and_usage_are_counted_wherever_the_stream_is_cut(size: int) -> None:
    out, progress = read_in_pieces(EVENT * 50 + DONE, size)
    assert b"".join(out) == EVENT * 50
    assert all(data.endswith(b"\n\n") for data in out), "an event is whole when it goes on"
    assert progress.events == 50
    assert progress.output_tokens == 48, "50 events, of which one names the role and one ends it"
    _, exact = read_in_pieces(EVENT * 2 + USAGE + DONE, size)
    assert (exact.prompt_tokens, exact.output_tokens) == (5, 2)


def test_words_that_look_like_events_are_not_counted() -> None:
    said = rb'data: {"text": "\ndata: \"completion_tokens\": 7"}' + b"\n\n"
    out, progress = read_in_pieces(said + DONE, 100)
    assert out == [said]
    assert progress.events == 1
    assert progress.output_tokens == 0


def test_an_event_in_a_form_that_is_new_to_us_passes_as_it_is() -> None:
    new = b'data: {"choices":[{"delta":{"content":[{"type":"thinking"}]}}]}\n\n'
    assert read_in_pieces(EVENT + new + EVENT + DONE, 1000)[0] == [EVENT + new + EVENT]


def test_comments_other_fields_and_other_ends_of_lines_are_understood() -> None:
    stream = (
        b': ping\n\ndata: null\n\nevent: x\ndata: {"a":1}\n\ndata:{"b":2}\r\n\r\ndata: {\ndata: "c":3}\n\ndata:[DONE]'
    )
    out, progress = read_in_pieces(stream, 1000)
    assert b"".join(out) == b'event: x\ndata: {"a":1}\n\ndata:{"b":2}\n\ndata: {\ndata: "c":3}\n\n'
    assert (progress.events, progress.done) == (3, True)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (b'data: {"choices":[{"del\n\n', "nobody can read"),
        (b"data: {broken}\n\n", "nobody can read"),
        (b"data: 7\n\n", "nobody can read"),
        (b'data: {"id":"\xff"}\n\n', "nobody can read"),
        (b'data: {"id":\n"x"}\n\n', "nobody can read"),  # JSON, but for clients the line ends there
        (b'data: {"id":\r"x"}\n\n', "nobody can read"),
        (b'data: {"id":\r\n\r\n"x"}\n\n', "nobody can read"),
        (b'id: 1\rdata: {}\ndata: {"id":"x"}\n\n', "nobody can read"),
        (b'data: {"choices":7,"error":{"message":"too late"}}\n\n', "too late"),
        (b'data: {"error":{"message":"out of memory"}}\n\n', "out of memory"),
        (b'data: {"object":"error","message":"too bad"}\n\n', "too bad"),
        (b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"abort"}]}\n\n', "gave up"),
        (EVENT[:40], "broke off"),
        (b"", "broke off"),
    ],
)
def test_what_comes_before_a_wrong_event_is_kept_and_the_event_is_not(wrong: bytes, why: str) -> None:
    events = Events(bytes.decode)
    got = events.feed(EVENT * 3 + wrong)
    if not events.problem:
        got += events.feed(b"")
    assert why in events.problem
    assert got == EVENT * 3


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


@pytest.mark.parametrize("broken", [hangs_up, fails])
def test_before_the_first_byte_another_replica_takes_over(broken: Answer) -> None:
    calls = 0

    async def first_breaks(request: web.Request) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        return await (broken if calls == 1 else streams)(request)

    async def case() -> None:
        async with engine_that(first_breaks) as url:
            plan = fake_plan({"chat": 2}, engine="openai", urls=(url,))
            async with served(plan) as service:
                stream = await service.openai.chat.completions.create(model="chat", messages=QUESTION, stream=True)
                assert [chunk.choices[0].delta.content async for chunk in stream] == ["a"] * 3
                assert [one.replica for one in service.completions] == ["chat/1"]

    asyncio.run(case())
    assert calls == 2


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


def test_a_client_that_reads_now_and_then_gets_every_byte_and_its_engine_waits_for_it() -> None:
    said = b"".join(EVENT.replace(b'"a"', b'"%d %b"' % (number, b"x" * 8000)) for number in range(4000))  # 33 MB
    sent = 0

    async def speaks(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = await begin(request)
        while sent < len(said):
            await response.write(said[sent : sent + 50_000])
            sent += 50_000
        await response.write(DONE)
        return response

    async def case() -> bytes:
        async with engine_that(speaks) as url, served(fake_plan(engine="openai", urls=(url,))) as service:
            body = orjson.dumps({"model": "chat", "messages": QUESTION, "stream": True})
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", int(service.url.rpartition(":")[2]), limit=2**16
            )
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
                + body
            )
            await reader.readuntil(b"\r\n\r\n")
            await until(lambda: sent >= 2_000_000)
            before = 0
            while before != sent:  # until the buffers of the system are full
                before = sent
                await asyncio.sleep(0.1)
            assert sent < len(said), "it is held back"
            got: list[bytes] = []
            while size := int(await reader.readuntil(b"\r\n"), 16):
                got.append((await reader.readexactly(size + 2))[:-2])
                if len(got) % 50 == 0:
                    await asyncio.sleep(0.001)
            writer.close()
            assert [one.status for one in service.completions] == ["ok"]
            return b"".join(got)

    assert asyncio.run(case()) == said + DONE


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
            assert [(one.status, one.reason) for one in service.completions] == [("cancelled", "invalid request")]
            assert service.supervisor.states["chat/0"].status == "ready"

    asyncio.run(case())


def test_an_attached_server_may_call_the_model_by_another_name() -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        assert "authorization" not in request.headers, "the client's key is not for the attached server"
        return web.json_response(await request.json())

    async def case() -> None:
        async with engine_that(echo, model="Qwen/Qwen3-32B") as url:
            plan = fake_plan(engine="openai", urls=(url,))
            async with served(plan) as service, aiohttp.ClientSession() as session:
                body = {"model": "chat", "messages": QUESTION, "custom": {"kept": [1, None]}}
                headers = {"authorization": "Bearer its-own"}
                async with session.post(f"{service.url}/v1/chat/completions", json=body, headers=headers) as reply:
                    assert await reply.json() == {**body, "model": "Qwen/Qwen3-32B"}

    asyncio.run(case())


async def asked_of(
    answer: Answer, *, stream: bool = False, faults: Mapping[str, str] | None = None
) -> tuple[int, str, str | None]:
    """Return status, body and Retry-After of a request to the only replica, whose engine answers so."""
    async with engine_that(answer) as url:
        plan = fake_plan(engine="openai", urls=(url,), ttft_s=0.3)
        engines = {"chat/0": Attached(url=url, name="chat", faults=faults or {})}
        async with served(plan, engines=engines) as service, aiohttp.ClientSession() as session:
            body = {"model": "chat", "messages": QUESTION, "stream": stream}
            async with session.post(f"{service.url}/v1/chat/completions", json=body) as reply:
                return reply.status, await reply.text(), reply.headers.get("retry-after")


@pytest.mark.parametrize("stream", [False, True])
def test_a_200_that_is_no_answer_is_a_failure_of_the_engine(stream: bool) -> None:
    async def login(_request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>Log in</html>", content_type="text/html")

    status, text, _ = asyncio.run(asked_of(login, stream=stream))
    assert status == 502
    assert "text/html" in text


def test_an_engine_that_is_busy_stays_so_and_its_time_to_come_back_is_kept() -> None:
    async def loading(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "Loading"}}, status=503, headers={"retry-after": "7"})

    status, text, again = asyncio.run(asked_of(loading))
    assert (status, again) == (503, "7")
    assert "Loading" in text


def test_a_500_that_is_the_requests_fault_is_a_400_where_the_engine_says_so() -> None:
    async def parses(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "Failed to parse grammar", "code": 500}}, status=500)

    assert asyncio.run(asked_of(parses))[0] == 502
    status, text, _ = asyncio.run(asked_of(parses, faults=FAULTS))
    assert status == 400
    assert '"code":"invalid_value"' in text


def test_what_an_engine_cannot_do_is_no_failure_of_its() -> None:
    async def cannot(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "This server does not support embeddings"}}, status=501)

    status, message = asyncio.run(asked_of(cannot))[:2]
    assert (status, "does not support embeddings" in message) == (400, True), "no other would, and nobody is sick"


def test_a_key_that_is_refused_is_not_the_clients_doing() -> None:
    async def refuses_key(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "who are you?"}}, status=401)

    assert asyncio.run(asked_of(refuses_key))[0] == 502


def test_an_error_that_comes_in_pieces_is_read_to_its_end() -> None:
    async def in_pieces(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=400, headers={"content-type": "application/json"})
        await response.prepare(request)
        await response.write(b'{"error": {"message": "far ')
        await asyncio.sleep(0.05)
        await response.write(b'too long"}}')
        return response

    status, text, _ = asyncio.run(asked_of(in_pieces))
    assert status == 400
    assert "far too long" in text


def test_done_needs_no_blank_and_timings_stand_in_for_usage() -> None:
    timings = b'data: {"choices":[],"timings":{"cache_n":30,"prompt_n":12,"predicted_n":3}}\n\n'
    _, progress = read_in_pieces(EVENT * 4 + timings + b"data:[DONE]\n\n", 100)
    assert (progress.prompt_tokens, progress.output_tokens) == (42, 3)


def test_what_hangs_on_a_server_that_no_longer_answers_is_cut_and_moved() -> None:
    hung = asyncio.Event()

    async def hangs(request: web.Request) -> web.StreamResponse:
        if not hung.is_set():
            hung.set()
            await asyncio.sleep(60)
        return await streams(request)

    async def case() -> float:
        async with (
            engine_that(hangs) as url,
            served(fake_plan({"chat": 2}, engine="openai", urls=(url,))) as service,
        ):
            chat = service.openai.chat.completions
            asking = asyncio.create_task(chat.create(model="chat", messages=QUESTION, stream=True))
            await hung.wait()
            begun_s = time.monotonic()
            service.supervisor._change("chat/0", ReplicaState(status="backing off"))
            stream = await asking
            assert [chunk.choices[0].delta.content async for chunk in stream] == ["a"] * 3
            assert [(one.status, one.replica) for one in service.completions] == [("ok", "chat/1")]
            return time.monotonic() - begun_s

    print(f"cut and moved within {asyncio.run(case()):.3f} s")


def test_a_stream_under_way_ends_with_an_error_when_its_replica_goes() -> None:
    async def stalls(request: web.Request) -> web.StreamResponse:
        response = await begin(request)
        await response.write(EVENT)
        await asyncio.sleep(60)
        return response

    async def case() -> bytes:
        async with (
            engine_that(stalls) as url,
            served(fake_plan(engine="openai", urls=(url,))) as service,
            aiohttp.ClientSession() as session,
        ):
            body = {"model": "chat", "messages": QUESTION, "stream": True}
            async with session.post(f"{service.url}/v1/chat/completions", json=body) as reply:
                await reply.content.readany()
                service.supervisor._change("chat/0", ReplicaState(status="backing off"))
                return await reply.read()

    end = asyncio.run(case())
    assert end.startswith(b'data: {"error":{"message":"The engine broke off, and nobody can go on'), end
    assert b'"code":"server_error"' in end


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b'{"error": {"message": "cannot open /srv/models/chat.gguf: no such file"}}', "cannot open …: no such file"),
        (b'Boom\nTraceback (most recent call last):\n  File "/usr/lib/python3/engine.py", line 1', "Boom"),
        (
            b'{"message": "see https://docs.example/a/b or POST /v1/chat/completions"}',
            "see https://docs.example/a/b or POST /v1/chat/completions",
        ),
        (b'{"error": "1/2 of n/a"}', "1/2 of n/a"),
    ],
)
def test_what_an_engine_says_of_its_own_inside_is_kept_from_clients(said: bytes, words: str) -> None:
    assert engine_words(said)[0] == words
