"""OpenAI's responses, through the official client against the fake engine, and their translation by itself."""

import asyncio
import json
from typing import Any

import openai
import orjson
import pytest
from aiohttp import web
from openai.types.responses import Response
from serving import engine_that, fake_plan, served, until

from waterline.errors import EngineError
from waterline.service.errors import RejectedError
from waterline.service.response_stream import ResponseStream
from waterline.service.responses import Answer, as_chat


def chat_of(**asked: Any) -> dict[str, Any]:
    chat: dict[str, Any] = orjson.loads(as_chat(orjson.dumps({"model": "m", "input": "hi", **asked}))[0])
    return chat


def events_of(stream: ResponseStream, *deltas: dict[str, Any], finish: str = "stop") -> list[dict[str, Any]]:
    said = b"".join(stream.chunk(chunk_of(delta)) for delta in deltas)
    said += stream.chunk(b'data: {"choices":[{"delta":{},"finish_reason":"%s"}]}\n\n' % finish.encode())
    said += stream.chunk(b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n')
    return parsed(said + stream.last(b"data: [DONE]\n\n"))


def chunk_of(delta: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}) + b"\n\n"


def parsed(said: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in said.decode().splitlines() if line.startswith("data: ")]


def new_stream() -> ResponseStream:
    return ResponseStream(Answer({"model": "m", "input": "hi"}, "1"))


def test_the_official_client_gets_a_response_whole_and_streamed() -> None:
    async def case() -> None:
        async with served(fake_plan(output_tokens=5)) as service:
            asked = {"model": "chat", "instructions": "Be brief.", "input": "How deep is the sea?"}
            raw = await service.openai.responses.with_raw_response.create(**asked)
            response = Response.model_validate(json.loads(raw.content), strict=True)
            assert (response.status, response.model, response.instructions) == ("completed", "chat", "Be brief.")
            assert len(response.output_text.split()) == 5
            assert response.usage
            assert response.usage.output_tokens == 5
            assert response.usage.total_tokens == response.usage.input_tokens + 5

            kinds, text = [], ""
            async with service.openai.responses.stream(**asked) as stream:
                async for event in stream:
                    kinds.append(event.type)
                    text += event.delta if event.type == "response.output_text.delta" else ""
                final = await stream.get_final_response()
            assert kinds[:4] == [
                "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
            ]  # fmt: skip
            assert kinds.count("response.output_text.delta") == 5
            assert kinds[-4:] == [
                "response.output_text.done", "response.content_part.done", "response.output_item.done",
                "response.completed",
            ]  # fmt: skip
            assert text == final.output_text == response.output_text
            assert final.usage == response.usage

            cut = await service.openai.responses.create(**asked, max_output_tokens=2)
            assert (cut.status, cut.incomplete_details and cut.incomplete_details.reason) == (
                "incomplete",
                "max_output_tokens",
            )
            await until(lambda: len(service.completions) == 3)
            assert [one.output_tokens for one in service.completions] == [5, 5, 2]

    asyncio.run(case())


def test_the_input_becomes_messages() -> None:
    turns = [
        {"role": "developer", "content": "Use the tool."},
        {"role": "user", "content": [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": "data:,"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "hear", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "blue"},
    ]  # fmt: skip
    system, user, assistant, tool = chat_of(input=turns)["messages"]
    assert system == {"role": "system", "content": "Use the tool."}
    assert user["content"] == [
        {"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:,", "detail": "auto"}},
    ]  # fmt: skip
    assert assistant["content"] == [{"type": "text", "text": "ok"}]
    assert [(call["id"], call["function"]["name"]) for call in assistant["tool_calls"]] == [
        ("c1", "look"),
        ("c2", "hear"),
    ]
    assert tool == {"role": "tool", "tool_call_id": "c1", "content": "blue"}


def test_options_get_the_names_that_chat_completions_have_for_them() -> None:
    function = {"name": "look", "parameters": {"type": "object"}, "strict": True}
    chat = chat_of(
        instructions="Be brief.",
        max_output_tokens=7,
        reasoning={"effort": "low"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {}}, "verbosity": "low"},
        tools=[{"type": "function", **function}],
        tool_choice={"type": "function", "name": "look"},
        top_logprobs=2,
        stream=True,
        temperature=0.5,
        an_engines_own="x",
        store=True,
    )
    assert chat == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 7,
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        "verbosity": "low",
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "an_engines_own": "x",
    }


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"previous_response_id": "resp_1"}, "'previous_response_id' is not supported. Nothing is remembered here"),
        ({"background": True}, "'background' is not supported"),
        ({"tools": [{"type": "web_search"}]}, "'web_search' run nowhere here"),
        ({"input": []}, "'input' is missing"),
        ({"input": 3}, "'input' is a int"),
        ({"input": [3]}, "'input[0]' should be an object"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "'input[0]' is a 'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "'input[0].content[0]' is a 'input_file'"),
        ({"input": [{"role": "user", "content": [{"type": [{}]}]}]}, "'input[0].content[0]' is a '[{}]'"),
        ({"text": "short"}, "'text' is a str"),
        ({"tools": ["look"]}, "'look' run nowhere"),
    ],
)
def test_what_needs_a_memory_or_a_tool_of_ours_is_refused_by_name(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RejectedError) as caught:
        chat_of(**asked)
    assert says in str(caught.value)
    assert caught.value.status == 400


def test_thoughts_words_and_calls_are_items_of_their_own() -> None:
    calls = [
        {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "look", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"at":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
        {"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "hear", "arguments": "{}"}}]},
    ]
    deltas = ({"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "I "}, {"content": "look"})
    events = events_of(new_stream(), *deltas, *calls, finish="tool_calls")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    done = events[-1]
    assert done["type"] == "response.completed"
    output = done["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert output[1]["content"][0]["text"] == "I look"
    assert [(item["call_id"], item["name"], item["arguments"]) for item in output[2:]] == [
        ("c1", "look", '{"at":1}'), ("c2", "hear", "{}"),
    ]  # fmt: skip
    assert len({item["id"] for item in output}) == 4
    added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    assert added == [item["id"] for item in output]
    assert done["response"]["usage"]["total_tokens"] == 5


def test_an_engine_may_say_anything() -> None:
    odd: tuple[Any, ...] = (None, 5, [], {}, [{}], "x")
    for value in odd:
        deltas = [{"content": value}, {"reasoning_content": value}, {"refusal": value}, {"tool_calls": value}]
        deltas += [{"tool_calls": [{"index": 0, "id": value, "function": {"name": value, "arguments": value}}]}]
        done = events_of(new_stream(), *deltas)[-1]
        assert done["type"] == "response.completed"


def test_a_stream_that_breaks_ends_as_a_failed_response() -> None:
    stream = new_stream()
    stream.chunk(chunk_of({"content": "so far"}))
    failed, error = parsed(stream.broken(EngineError("The engine broke off.")))
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert (error["type"], error["message"]) == ("error", "The engine broke off.")


def test_a_refused_response_is_an_error_as_all_others() -> None:
    async def full(_request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "too hot", "param": "temperature"}}, status=400)

    async def case() -> None:
        async with engine_that(full) as url, served(fake_plan(engine="openai", urls=(url,))) as service:
            with pytest.raises(openai.BadRequestError, match="too hot"):
                await service.openai.responses.create(model="chat", input="hi")

    asyncio.run(case())
