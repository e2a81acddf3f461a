"""What engines say of tokens, each in its own way, and what of it stands in the ledger."""

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from serving import QUESTION, engine_that, fake_plan, laptop_plan, served

from waterline.ledger import Ledger, Usage, connect, read_usage
from waterline.service import events
from waterline.service.body import CHAT, COMPLETIONS, read_asked
from waterline.service.counts import Counts, of_all, read_counts, sum_of
from waterline.service.events import Choice, Delta, Event
from waterline.service.upstream import Progress


def asked(**fields: Any) -> Any:
    endpoint = CHAT if "messages" in fields else COMPLETIONS
    return read_asked(endpoint, orjson.dumps({"model": "chat", **fields}))


def used(folder: Path) -> Usage:
    [row] = read_usage(connect(str(folder / "ledger.db")), ["tenant"])
    return row


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 5}, Counts(9, 5)),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 8},
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
            Counts(9, 5, 8, 3),
        ),
        ({"prompt_tokens": 9, "completion_tokens": 5, "reasoning_tokens": 3}, Counts(9, 5, None, 3)),
        (
            {
                "input_tokens": 9,
                "output_tokens": 5,
                "input_tokens_details": {"cached_tokens": 8},
                "output_tokens_details": {"reasoning_tokens": 3},
            },
            Counts(9, 5, 8, 3),
        ),
        (
            {"prompt_tokens": "9", "completion_tokens": True, "prompt_tokens_details": [1], "reasoning_tokens": -3},
            Counts(),
        ),
    ],
    ids=["bare", "openai", "sglang", "responses", "nonsense"],
)
def test_a_usage_is_read_wherever_an_engine_has_put_it(usage: dict[str, Any], counts: Counts) -> None:
    assert read_counts(usage) == counts


def test_usages_of_each_answer_are_added_up_and_a_prompt_counts_once() -> None:
    three = [Counts(20, 7, 0), Counts(20, 9, 19), Counts(20, 8, 19)]
    assert sum_of(three, asked(messages=QUESTION, n=3)) == Counts(20, 24, 0)
    two_prompts = [Counts(4, 7), Counts(4, 7), Counts(30, 5), Counts(30, 5)]
    assert sum_of(two_prompts, asked(prompt=["1*1=", "a longer one"], n=2)) == Counts(34, 24)
    assert sum_of([Counts(8, 7), Counts(9, 7)], asked(prompt=["1*1=", 5, 6])) == Counts(17, 14)
    assert sum_of([Counts(20, 24)], asked(messages=QUESTION, n=3)) == Counts(20, 24), "of an engine that counts all"


def test_who_leaves_when_the_first_of_two_answers_has_ended_is_charged_for_what_came_of_the_other() -> None:
    progress = Progress(asked=asked(messages=QUESTION, n=2))
    of_first = [Event(choices=[Choice(index=0, delta=Delta(content="a"))]) for _ in range(7)]
    progress.saw([*of_first, Event(choices=[], usage=events.Usage(prompt_tokens=20, completion_tokens=7))])
    assert progress.output_tokens == 7
    progress.saw([Event(choices=[Choice(index=1, delta=Delta(content="a"))]) for _ in range(100)])
    assert progress.output_tokens == 107
    progress.saw([Event(choices=[], usage=events.Usage(prompt_tokens=20, completion_tokens=100))])
    progress.done = True
    assert (progress.prompt_tokens, progress.output_tokens) == (20, 107)


def test_of_a_usage_of_the_first_answer_the_others_are_worked_out_from_their_length() -> None:
    choices = [{"text": "four"}, {"text": "and eight"}, {"text": ""}, {"text": "xyz"}]
    data = orjson.dumps({"choices": choices})
    four = asked(prompt=["1", "a prompt of 24 letters, s", "3", "4"])
    assert of_all(data, Counts(3, 4), {"predicted_n": 4}, four) == Counts(3 + 7 + 1 + 1, 16, None, 0)
    assert of_all(data, Counts(12, 40), {"predicted_n": 4}, four) == Counts(12, 40), "it has counted them all"
    assert of_all(data, Counts(12, 40), None, four) == Counts(12, 40)
    odd = orjson.dumps({"choices": [{"message": 7}]})
    assert of_all(odd, Counts(3, 4), {"predicted_n": 4}, four) == Counts(3, 4, None, 0), "a form that we do not know"


def test_thoughts_that_nobody_has_counted_have_their_share_of_the_tokens() -> None:
    data = orjson.dumps({"choices": [{"message": {"content": "42", "reasoning_content": "6*7=42"}}]})
    assert of_all(data, Counts(9, 8), None, asked(messages=QUESTION)) == Counts(9, 8, None, 6)
    assert of_all(data, Counts(9, 8, None, 0), None, asked(messages=QUESTION)).thinking == 6, "as vLLM says of R1"
    assert of_all(data, Counts(9, 8, None, 5), None, asked(messages=QUESTION)).thinking == 5


def test_what_was_cached_and_thought_stands_in_the_ledger(tmp_path: Path) -> None:
    usage = {
        "prompt_tokens": 20,
        "completion_tokens": 9,
        "total_tokens": 29,
        "prompt_tokens_details": {"cached_tokens": 16},
        "completion_tokens_details": {"reasoning_tokens": 6},
    }

    async def answer(request: web.Request) -> web.StreamResponse:
        if not (await request.json()).get("stream"):
            message = {"role": "assistant", "content": "42"}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            return web.json_response({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in (
            {"choices": [{"index": 0, "delta": {"content": "42"}, "finish_reason": "stop"}]},
            {"choices": [], "usage": usage},
        ):
            await response.write(b"data: " + orjson.dumps(event) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def case() -> None:
        with Ledger.open(str(tmp_path / "ledger.db")) as ledger:
            async with (
                engine_that(answer) as url,
                served(fake_plan(engine="openai", urls=(url,)), ledger=ledger) as service,
            ):
                create = service.openai.chat.completions.create
                await create(model="chat", messages=QUESTION)  # type: ignore[call-overload]
                async for _ in await create(model="chat", messages=QUESTION, stream=True):  # type: ignore[call-overload]
                    pass

    asyncio.run(case())
    row = used(tmp_path)
    assert (row.ok, row.prompt_tokens, row.cached_tokens) == (2, 40, 32)
    assert (row.output_tokens, row.thinking_tokens) == (18, 12)


def test_llama_cpp_is_charged_for_every_answer_and_its_thoughts_are_counted(tmp_path: Path) -> None:
    async def case() -> None:
        with Ledger.open(str(tmp_path / "ledger.db")) as ledger:
            async with served(laptop_plan(), ledger=ledger) as service:
                spent = [0]

                def since() -> int:
                    spent.append(used(tmp_path).output_tokens)
                    return spent[-1] - spent[-2]

                chat, complete = service.openai.chat.completions.create, service.openai.completions.create
                three: dict[str, Any] = {"model": "abacus", "messages": QUESTION, "n": 3, "max_tokens": 7}
                await chat(**three)
                assert since() == 21
                async for _ in await chat(**three, stream=True):
                    pass
                assert since() == 21
                sums = ["12*34=", "99*99="]
                await complete(model="abacus", prompt=sums, max_tokens=5)
                assert since() == 10
                stream = await complete(model="abacus", prompt=sums, max_tokens=5, stream=True)
                assert {chunk.choices[0].index async for chunk in stream} == {0, 1}
                assert since() == 10
                assert used(tmp_path).thinking_tokens == 42, "of what was said in chats, all"
                before = used(tmp_path)
                for stream_ in (False, True):
                    reply = await chat(model="abacus", messages=QUESTION, temperature=0, stream=stream_)  # type: ignore[call-overload]
                    async for _ in reply if stream_ else _nothing():
                        pass
                row = used(tmp_path)
                whole = (row.output_tokens - before.output_tokens) // 2
                assert 0.9 * whole < (row.thinking_tokens - before.thinking_tokens) / 2 < whole
                assert row.cached_tokens > before.cached_tokens

    asyncio.run(case())


async def _nothing() -> Any:
    for nobody in ():
        yield nobody
