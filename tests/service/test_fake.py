"""The fake engine keeps the time of the cost model, measured in its own loop, and answers as real ones do."""

import asyncio
import math
import time
from dataclasses import replace

import orjson
from serving import QUESTION, fake_plan, served

from waterline.cost import replica_step_cost
from waterline.cost.step import prefill_pairs
from waterline.service.body import CHAT, COMPLETIONS, read_asked
from waterline.service.engines.fake import Batch, Job
from waterline.service.engines.fake_answer import Answer, Part, answers_to, whole_of
from waterline.units import PICOSECONDS_PER_S

PLAN = fake_plan()
STEP = replace(replica_step_cost(PLAN.fleet, PLAN.replicas[0]), step_tokens=10)


async def finish_s(jobs: list[Job], max_batch: int) -> list[float]:
    """Return when each job has got its last token."""
    batch = Batch(STEP, max_batch)
    running = asyncio.create_task(batch.run())
    begun_s = time.monotonic()

    async def wait(job: Job) -> float:
        for _ in range(job.output_tokens):
            await job.produced.get()
        return time.monotonic() - begun_s

    for job in jobs:
        batch.add(job)
    ends = await asyncio.gather(*map(wait, jobs))
    running.cancel()
    assert not batch.running
    assert not batch.waiting
    return list(ends)


def test_steps_take_as_long_as_the_cost_model_says() -> None:
    [end_s] = asyncio.run(finish_s([Job(prompt_tokens=25, output_tokens=200)], max_batch=4))
    chunks = [(0, 10), (10, 10), (20, 5)]  # of the prompt; the last one gives the first token
    prompt_ps = sum(STEP.step_ps(tokens, prefill_pairs(first, tokens), 0, 0) for first, tokens in chunks)
    expected_s = (prompt_ps + sum(STEP.step_ps(0, 0, 1, 25 + n) for n in range(1, 200))) / PICOSECONDS_PER_S
    assert expected_s > 0.01, "or there is nothing to measure"
    assert expected_s - 0.002 <= end_s <= expected_s + 2, "late only by what the machine is busy with"


def test_requests_beyond_the_batch_wait_for_a_place_in_order() -> None:
    jobs = [Job(prompt_tokens=1, output_tokens=100) for _ in range(4)]
    ends_s = asyncio.run(finish_s(jobs, max_batch=2))
    assert ends_s == sorted(ends_s)
    assert ends_s[2] >= 200 * STEP.step_ps(0, 0, 2, 2) / PICOSECONDS_PER_S - 0.002, "the others began after the first"


# --- What it says -----------------------------------------------------------------------------------------------------

PART = Part(model="m", step=STEP, max_batch=4, max_context_tokens=512, expected_output_tokens=20)


def said(endpoint: str = CHAT, **fields: object) -> list[Answer]:
    prompt = {"messages": [{"role": "user", "content": "Hello"}]} if endpoint == CHAT else {"prompt": "Hello"}
    asked = read_asked(endpoint, orjson.dumps({"model": "m", **prompt, **fields}))
    return answers_to(asked, PART, chat=endpoint == CHAT)


def text(answer: Answer) -> str:
    return "".join(answer.texts)


def test_several_answers_to_several_prompts_differ_and_each_prompt_is_counted_once() -> None:
    answers = said(COMPLETIONS, prompt=["Hello", "Good bye"], n=2, max_tokens=8)
    assert len({text(answer) for answer in answers}) == 4
    assert text(answers[0]) == text(*said(COMPLETIONS, max_tokens=8)), (
        "the first is the one there is without the others"
    )
    whole = whole_of(answers)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert whole["usage"] == {"prompt_tokens": 2 + 2, "completion_tokens": 32, "total_tokens": 36}
    assert text(*said(COMPLETIONS, prompt=[1, 2])) == text(*said(COMPLETIONS, prompt=[[1, 2]]))


def test_a_stop_ends_an_answer_is_left_out_and_counted() -> None:
    words = said()[0].words
    [answer] = said(stop=["nowhere", words[5][:3]])
    assert (answer.finish, answer.words) == ("stop", words[:6])
    assert text(answer) == "".join(words[:5])
    [across] = said(stop=words[2][-1] + words[3])
    assert (text(across), across.output_tokens) == ("".join(words[:3])[:-1], 4), "a stop may lie across tokens"
    [begun] = said(
        messages=[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "".join(words[:3])}],
        continue_final_message=True,
        stop=words[2][-1] + words[3],
    )
    assert (text(begun), begun.output_tokens, begun.finish) == ("", 1, "stop"), "also where it has begun elsewhere"
    assert said(stop="nowhere")[0].words == words


def test_words_are_as_likely_as_one_another() -> None:
    likely = -math.log(14)
    [chat] = said(logprobs=True, top_logprobs=2, max_tokens=3)
    content = chat.choice()["logprobs"]["content"]
    assert [one["token"] for one in content] == chat.words
    assert {
        (one["logprob"], len(one["top_logprobs"]), one["top_logprobs"][0]["token"] == one["token"]) for one in content
    } == {(likely, 2, True)}
    event = orjson.loads(chat.event(1).removeprefix(b"data: "))
    assert event["choices"][0]["logprobs"]["content"] == content[1:2]
    [plain] = said(COMPLETIONS, logprobs=0, max_tokens=3)
    logprobs = plain.choice()["logprobs"]
    assert (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]) == (
        plain.words,
        [likely] * 3,
        [{}] * 3,
    )
    assert [
        text(plain)[at:].startswith(word) for at, word in zip(logprobs["text_offset"], plain.words, strict=True)
    ] == [True] * 3
    assert said()[0].choice()["logprobs"] is None


def test_who_ignores_the_end_gets_as_much_as_was_asked_for() -> None:
    assert [said(ignore_eos=True, max_tokens=most)[0].output_tokens for most in (7, 100)] == [7, 100]
    assert said(max_tokens=100)[0].output_tokens == 20


def test_a_stream_of_several_answers_has_all_their_tokens_and_one_count() -> None:
    async def case() -> None:
        async with served(fake_plan(output_tokens=5)) as service:
            asked = service.openai.chat.completions
            options = {"include_usage": True}
            stream = await asked.create(model="chat", messages=QUESTION, n=3, stream=True, stream_options=options)
            texts, ends = dict.fromkeys(range(3), ""), []
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                    ends += [choice.finish_reason] if choice.finish_reason else []
            assert chunk.usage
            assert chunk.usage.completion_tokens == 15
            assert ends == ["stop"] * 3
            whole = await asked.create(model="chat", messages=QUESTION, n=3)
            assert {choice.index: choice.message.content for choice in whole.choices} == texts
            assert len(set(texts.values())) == 3
            assert [one.output_tokens for one in service.completions] == [15, 15]

    asyncio.run(case())
