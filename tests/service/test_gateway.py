"""The API as clients meet it: the official `openai` package and plain HTTP against real engines on loopback."""

import asyncio
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import openai
import orjson
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion as TextCompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serving import QUESTION, Served, engine_that, fake_plan, laptop_plan, served, until

from waterline.service.asgi import Receive, Reply, Scope, Send, read_body
from waterline.service.errors import LONGEST_BODY_BYTES, RejectedError

CHAT = "/v1/chat/completions"
TOO_LONG = "context_length_exceeded"


async def post(service: Served, path: str, data: bytes) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    async with aiohttp.ClientSession() as session, session.post(service.url + path, data=io.BytesIO(data)) as reply:
        return reply.status, json.loads(await reply.read()), reply.headers


async def get(service: Served, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(service.url + path) as reply:
        return reply.status, await reply.text()


# --- The model in the package ---------------------------------------------------------------------------------------


def test_abacus_multiplies_through_llama_cpp() -> None:
    async def case() -> None:
        async with served(laptop_plan()) as service:
            raw = await service.openai.chat.completions.with_raw_response.create(
                model="abacus", messages=QUESTION, temperature=0
            )
            assert raw.headers["content-type"].startswith("application/json")
            assert "server" not in raw.headers
            reply = ChatCompletion.model_validate(json.loads(raw.content), strict=True)
            message = reply.choices[0].message.model_dump()
            assert message["content"] == str(347 * 586)
            assert message["reasoning_content"].startswith("347*586")
            assert reply.usage
            tokens = reply.usage.completion_tokens

            words = {"content": "", "reasoning_content": ""}
            stream = await service.openai.chat.completions.create(
                model="abacus", messages=QUESTION, temperature=0, stream=True
            )
            async for chunk in stream:
                for key, word in chunk.choices[0].delta.model_dump().items():
                    words[key] = words.get(key, "") + word if key in words and word else words.get(key, "")
            assert words["content"] == str(347 * 586)
            assert words["reasoning_content"] == message["reasoning_content"]

            text = await service.openai.completions.create(model="abacus", prompt="7*8", max_tokens=3)
            assert text.choices[0].finish_reason == "length"
            whole, streamed, _ = service.completions
            assert whole.output_tokens == tokens
            assert streamed.prompt_tokens == whole.prompt_tokens == reply.usage.prompt_tokens
            assert streamed.output_tokens == tokens, "the engine was asked for the usage, and the client was spared it"
            assert {one.status for one in service.completions} == {"ok"}
            with pytest.raises(openai.BadRequestError, match="2000 tokens") as caught:
                await service.openai.completions.create(model="abacus", prompt="1" * 2000)
            assert caught.value.code == TOO_LONG

    asyncio.run(case())


def test_when_the_client_goes_away_llama_cpp_stops_at_once() -> None:
    async def engine_says(session: aiohttp.ClientSession, service: Served) -> tuple[int, int]:
        """Return the requests the engine works on and the tokens it has produced for those that have ended."""
        engine = service.supervisor.states["abacus/0"].url.removesuffix("/v1")
        async with session.get(f"{engine}/metrics") as reply:
            lines = dict(line.split() for line in (await reply.text()).splitlines() if not line.startswith("#"))
        return int(lines["llamacpp:requests_processing"]), int(lines["llamacpp:tokens_predicted_total"])

    async def case(*, stream: bool) -> int:
        async with served(laptop_plan()) as service, aiohttp.ClientSession() as session:
            # Without its end token the model goes on until the context is full: 16 times 511 tokens.
            body = {"model": "abacus", "prompt": "1", "stream": stream, "logit_bias": [[256, False]], "n": 16}
            asking = asyncio.create_task(session.post(f"{service.url}/v1/completions", json=body).__aenter__())
            async with asyncio.timeout(30):
                while not (await engine_says(session, service))[0]:  # noqa: ASYNC110 - it is another process
                    await asyncio.sleep(0.01)
            if stream:
                (await asking).close()
            else:
                asking.cancel()
            await until(lambda: len(service.completions) == 1)
            assert service.completions[0].status == "cancelled"
            async with asyncio.timeout(30):
                while (await engine_says(session, service))[0]:  # noqa: ASYNC110 - as above
                    await asyncio.sleep(0.02)
            return (await engine_says(session, service))[1]

    assert asyncio.run(case(stream=True)) < 16 * 300
    assert asyncio.run(case(stream=False)) <= 16 * 511, "of an answer that comes whole it looks once a second"


# --- The shape of answers -------------------------------------------------------------------------------------------


def test_fake_answers_have_the_shape_the_openai_client_demands() -> None:
    async def case() -> None:
        async with served(fake_plan(output_tokens=5)) as service:
            chat = service.openai.chat.completions
            raw = await chat.with_raw_response.create(model="chat", messages=QUESTION)
            reply = ChatCompletion.model_validate(json.loads(raw.content), strict=True)
            assert (reply.choices[0].finish_reason, reply.usage and reply.usage.completion_tokens) == ("stop", 5)
            again = await chat.create(model="chat", messages=QUESTION)
            assert again.choices == reply.choices, "the words follow from the prompt"

            options = {"include_usage": True}
            stream = await chat.create(
                model="chat", messages=QUESTION, max_tokens=3, stream=True, stream_options=options
            )
            chunks = [ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True) async for chunk in stream]
            assert "".join(one.choices[0].delta.content or "" for one in chunks[:-1]) == " ".join(
                (reply.choices[0].message.content or "").split()[:3]
            )
            assert chunks[-2].choices[0].finish_reason == "length"
            assert chunks[-1].usage
            assert chunks[-1].usage.completion_tokens == 3

            text = await service.openai.completions.with_raw_response.create(model="chat", prompt="Hello")
            TextCompletion.model_validate(json.loads(text.content), strict=True)
            pieces = await service.openai.completions.create(model="chat", prompt="Hello", stream=True)
            assert len([piece async for piece in pieces]) == 6
            assert [one.output_tokens for one in service.completions] == [5, 5, 3, 5, 5]

    asyncio.run(case())


def test_models_health_and_metrics() -> None:
    async def case() -> None:
        async with served(fake_plan({"chat": 1, "code": 2})) as service:
            assert [model.id async for model in service.openai.models.list()] == ["chat", "code"]
            code = (await service.openai.models.retrieve("code")).model_dump()
            assert (code["owned_by"], code["max_model_len"]) == ("waterline", 512)
            for model in ("chat", "code"):
                reply = await service.openai.chat.completions.create(model=model, messages=QUESTION, max_tokens=2)
                assert reply.model == model
            status, text = await get(service, "/health")
            assert status == 200
            assert json.loads(text)["models"] == {"chat": {"ready": 1, "total": 1}, "code": {"ready": 2, "total": 2}}
            for elsewhere in ({"x-forwarded-for": "192.0.2.7"}, {"host": "api.example.com"}):
                async with aiohttp.ClientSession() as session:
                    said = await session.get(f"{service.url}/health", headers=elsewhere)
                    assert (said.status, await said.json()) == (200, {"status": "ok"}), "no names"
            service.gateway.loopback = False
            assert await get(service, "/health") == (200, '{"status":"ok"}')
            text = service.gateway.metrics.text().decode()
            assert 'waterline_requests_total{model="code",status="ok",tenant="enterprise"} 1.0' in text
            assert 'waterline_tokens_total{kind="output",model="chat",tenant="enterprise"} 2.0' in text
            assert 'waterline_replicas{model="code",pool="box",state="ready"} 2.0' in text
            assert 'waterline_requests_queued{model="chat",tenant="enterprise"} 0.0' in text
            within = 'waterline_requests_within_slo_total{model="chat",tenant="enterprise"} 1.0'
            unseen = 'waterline_ttft_seconds_count{model="chat",tenant="enterprise"} 0.0'
            assert within in text
            assert unseen in text, "it came in one piece"

    asyncio.run(case())


def test_embeddings_pass_and_their_tokens_are_counted() -> None:
    async def embeds(request: web.Request) -> web.Response:
        asked = await request.json()
        data = [{"object": "embedding", "index": n, "embedding": [0.5, n]} for n, _ in enumerate(asked["input"])]
        usage = {"prompt_tokens": 7, "total_tokens": 7}
        return web.json_response({"object": "list", "model": "chat", "data": data, "usage": usage})

    async def case() -> None:
        async with engine_that(embeds) as url, served(fake_plan(engine="openai", urls=(url,))) as service:
            asked = service.openai.embeddings
            reply = await asked.create(model="chat", input=["a", "b"], encoding_format="float")
            assert [one.embedding for one in reply.data] == [[0.5, 0.0], [0.5, 1.0]]
            [one] = service.completions
            assert (one.status, one.prompt_tokens, one.output_tokens) == ("ok", 7, 0)
            with pytest.raises(openai.BadRequestError, match="'input' is an empty list"):
                await asked.create(model="chat", input=[])

    asyncio.run(case())


def test_fields_that_nobody_here_knows_reach_the_engine_as_they_were_sent() -> None:
    seen: list[dict[str, Any]] = []

    async def keeps(request: web.Request) -> web.Response:
        seen.append(await request.json())
        return web.json_response({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    sent = {
        "model": "chat", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        "service_tier": "priority", "tools": [{"type": "function", "function": {"name": "look"}}], "logprobs": True,
        "response_format": {"type": "json_object"}, "seed": 7, "stop": ["x"], "guided_regex": "a+", "new": {"x": [1.5, None]},
    }  # fmt: skip

    async def case() -> None:
        async with engine_that(keeps) as url, served(fake_plan(engine="openai", urls=(url,))) as service:
            await post(service, CHAT, orjson.dumps(sent))

    asyncio.run(case())
    assert seen == [sent]


def test_other_applications_have_paths_of_their_own() -> None:
    async def hello(scope: Scope, _receive: Receive, send: Send) -> None:
        await Reply(send).whole(200, scope["path"].encode(), [])

    async def case() -> None:
        async with served(fake_plan(), start=False) as service:
            service.gateway.mount("/v1/audio", hello)
            assert await get(service, "/v1/audio/speech") == (200, "/v1/audio/speech")
            assert (await get(service, "/v1/audiobooks"))[0] == 404

    asyncio.run(case())


# --- Errors ---------------------------------------------------------------------------------------------------------


INSIDE, NO_URL = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}, "url_not_allowed"


def test_each_wrong_request_gets_its_status_and_openais_error() -> None:
    hello = {"model": "chat", "messages": QUESTION}
    cases = [
        (CHAT, b"{", 400, None, "bad_json"),
        (CHAT, orjson.dumps({**hello, "messages": []}), 400, "messages", "empty_array"),
        (CHAT, orjson.dumps({"messages": QUESTION}), 400, "model", "missing_parameter"),
        (CHAT, orjson.dumps({**hello, "stream": 1}), 400, "stream", "wrong_type"),
        (CHAT, orjson.dumps({**hello, "model": "chatt"}), 404, "model", "model_not_found"),
        (CHAT, b" " * (LONGEST_BODY_BYTES + 1), 413, None, "body_too_large"),
        (
            CHAT,
            orjson.dumps({**hello, "messages": [{"role": "user", "content": "x" * 2**21}]}),
            400,
            "messages",
            TOO_LONG,
        ),
        (
            CHAT,
            orjson.dumps({**hello, "messages": [{"role": "user", "content": [INSIDE]}]}),
            400,
            "image_url.url",
            NO_URL,
        ),
        ("/v1/audio/speech", orjson.dumps(hello), 404, None, "unknown_path"),
        ("/v1/models", b"{}", 405, None, "wrong_method"),
    ]

    async def case() -> None:
        async with served(fake_plan()) as service:
            for path, data, expected, param, code in cases:
                status, reply, headers = await post(service, path, data)
                assert (status, reply["error"]["param"], reply["error"]["code"]) == (expected, param, code), reply
                assert reply["error"]["type"] == "invalid_request_error"
                if status == 405:
                    assert headers["allow"] == "GET, HEAD"
            with pytest.raises(openai.NotFoundError, match="Did you mean 'chat'"):
                await service.openai.chat.completions.create(model="chatt", messages=QUESTION)
            with pytest.raises(openai.BadRequestError, match="'messages' is empty"):
                await service.openai.chat.completions.create(model="chat", messages=[])
            gzip = service.openai.with_options(default_headers={"content-encoding": "gzip"})
            with pytest.raises(openai.APIStatusError, match=r"compressed \(gzip\). Send it as it is") as caught:
                await gzip.chat.completions.create(model="chat", messages=QUESTION)
            assert (caught.value.status_code, caught.value.code) == (415, "unsupported_encoding")

    asyncio.run(case())


def test_a_long_body_is_refused_without_being_kept_whether_it_says_its_length_or_not() -> None:
    async def long_body() -> Any:
        for _ in range(20):
            yield b" " * 2**20

    async def case() -> None:
        async with served(fake_plan(), start=False) as service, aiohttp.ClientSession() as session:
            for data in (io.BytesIO(b" " * (20 * 2**20)), long_body()):
                async with session.post(service.url + CHAT, data=data) as reply:
                    assert reply.status == 413

    asyncio.run(case())


def test_whatever_is_posted_it_is_answered_in_openais_words_and_never_with_a_5xx() -> None:
    bodies = st.binary(max_size=80) | st.fixed_dictionaries(
        {
            "model": st.sampled_from(["chat", "other", 3]),
            "messages": st.just(QUESTION) | st.text() | st.lists(st.text()),
        },
        optional={"max_tokens": st.integers(-1, 2) | st.text(), "stream": st.booleans() | st.none(), "stop": st.text()},
    ).map(orjson.dumps)

    with asyncio.Runner() as runner:
        context = served(fake_plan())
        service = runner.run(context.__aenter__())

        async def ask(data: bytes) -> None:
            async with aiohttp.ClientSession() as session, session.post(service.url + CHAT, data=data) as reply:
                text = await reply.read()
                assert reply.status in {200, 400, 404}
                if reply.status != 200:
                    assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}

        @settings(max_examples=150)
        @given(bodies)
        def fuzz(data: bytes) -> None:
            runner.run(ask(data))

        try:
            fuzz()
        finally:
            runner.run(context.__aexit__(None, None, None))


def test_each_path_takes_its_methods_and_no_other() -> None:
    cases = [
        ("DELETE", "/v1/models/chat", 405),
        ("HEAD", "/v1/models/chat", 200),
        ("HEAD", "/health", 503),
        ("GET", "/v1/models/", 200),
        ("GET", CHAT, 405),
    ]

    async def case() -> None:
        async with served(fake_plan(), start=False) as service, aiohttp.ClientSession() as session:
            for method, path, status in cases:
                async with session.request(method, service.url + path) as reply:
                    assert (reply.status, method, path) == (status, method, path)

    asyncio.run(case())


def test_a_name_without_end_is_not_said_back() -> None:
    async def case() -> None:
        async with served(fake_plan(), start=False) as service:
            status, reply, _ = await post(service, CHAT, orjson.dumps({"model": "a" * 2**20, "messages": QUESTION}))
            message = reply["error"]["message"]
            assert status == 404
            assert message.endswith("aaa…' here. Known: chat.")
            assert len(message) < 120

    asyncio.run(case())


def test_a_body_that_does_not_come_is_waited_for_no_longer_than_a_while() -> None:
    async def never() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    with pytest.raises(RejectedError, match=r"within 0\.01 s") as caught:
        asyncio.run(read_body({"headers": []}, never, within_s=0.01))
    assert caught.value.status == 408


def test_before_its_engine_is_ready_a_model_asks_for_patience() -> None:
    async def case() -> None:
        async with served(fake_plan(ttft_s=2.0), start=False) as service:
            with pytest.raises(openai.InternalServerError, match="chat/0 is stopped") as caught:
                await service.openai.chat.completions.create(model="chat", messages=QUESTION)
            assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "30")

    asyncio.run(case())


# --- Queues ---------------------------------------------------------------------------------------------------------


def test_the_engine_gets_max_batch_requests_and_the_others_wait_in_order() -> None:
    async def case() -> None:
        async with served(fake_plan(max_batch=1, output_tokens=200)) as service:
            order: list[int] = []

            async def ask(number: int) -> None:
                await service.openai.chat.completions.create(model="chat", messages=QUESTION)
                order.append(number)

            chat = service.gateway.dispatcher.services["chat"]
            asking = []
            for number in range(5):
                asking.append(asyncio.create_task(ask(number)))
                await until(lambda number=number: chat.running + chat.waiting == number + 1)
            assert chat.running == 1
            asking[2].cancel()
            await until(lambda: chat.waiting <= 3)
            await asyncio.gather(*asking, return_exceptions=True)
            assert order == [0, 1, 3, 4]
            assert [one.status for one in service.completions].count("cancelled") == 1
            assert (chat.running, chat.waiting, chat.lanes[0].backlog_tokens) == (0, 0, 0)

    asyncio.run(case())


def test_all_replicas_get_work() -> None:
    async def case() -> None:
        async with served(fake_plan({"chat": 3})) as service:
            asked = [service.openai.chat.completions.create(model="chat", messages=QUESTION) for _ in range(9)]
            await asyncio.gather(*asked)
            replicas = [one.replica for one in service.completions]
            assert {replica: replicas.count(replica) for replica in replicas} == {f"chat/{n}": 3 for n in range(3)}
            assert sum(one.gpu_s for one in service.completions) > 0

    asyncio.run(case())


def test_who_cannot_be_served_in_time_is_refused_with_an_honest_time() -> None:
    async def case() -> None:
        plan = fake_plan(max_batch=1, output_tokens=200, tokens_per_s=20.0, ttft_s=1.0)
        async with served(plan) as service:
            chat = service.gateway.dispatcher.services["chat"]
            first = [
                asyncio.create_task(service.openai.chat.completions.create(model="chat", messages=QUESTION))
                for _ in range(2)
            ]
            await until(lambda: chat.waiting == 1)
            with pytest.raises(openai.RateLimitError) as caught:  # 200 and 8 or 16 of prompts, at 20 a second
                await service.openai.chat.completions.create(model="chat", messages=QUESTION)
            assert caught.value.response.headers["retry-after"] in {"10", "11"}
            assert caught.value.code == "rate_limit_exceeded"
            await asyncio.gather(*first)
            assert sorted(one.status for one in service.completions) == ["ok", "ok", "refused"]

    asyncio.run(case())


def test_when_the_client_goes_away_the_fake_stops_too() -> None:
    async def case() -> None:
        async with served(fake_plan(output_tokens=400)) as service:
            engine = service.supervisor.states["chat/0"].url.removesuffix("/v1")
            stream = await service.openai.chat.completions.create(model="chat", messages=QUESTION, stream=True)
            async for _ in stream:
                break
            async with aiohttp.ClientSession() as session:

                async def running() -> int:
                    async with session.get(f"{engine}/health") as reply:
                        return int((await reply.json())["running"])

                assert await running() == 1
                await stream.close()
                await until(lambda: len(service.completions) == 1)
                assert await running() == 0
            [one] = service.completions
            assert (one.status, one.reason) == ("cancelled", "the client went away")
            assert 1 <= one.output_tokens < 400

    asyncio.run(case())


def test_nothing_of_a_prompt_is_logged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    async def case() -> None:
        async with served(fake_plan()) as service:
            secret = [{"role": "user", "content": f"a secret about {tmp_path}"}]
            await service.openai.chat.completions.create(model="chat", messages=secret)
            await post(service, CHAT, b'{"a secret')

    asyncio.run(case())
    captured = capsys.readouterr()
    assert "secret" not in captured.out + captured.err
