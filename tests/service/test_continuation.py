"""How another engine is asked to go on, and how its answer becomes the rest of the stream; no sockets."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.service.body import CHAT, COMPLETIONS, read_asked
from waterline.service.continuation import RefusedError, Resume, missing_reason, missing_usage, resume
from waterline.service.engines.dialect import LLAMACPP, OPENAI, SGLANG, VLLM, Dialect
from waterline.service.events import BadEventError, read_events
from waterline.service.said import Said
from waterline.service.weave import Weave

QUESTION = [{"role": "user", "content": "How deep?"}]
CONTEXT = 1000
STAMP = {"id": "chatcmpl-a", "object": "chat.completion.chunk", "created": 7, "model": "m"}


def encoded(*events: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events)


def chat(delta: dict[str, Any] | None = None, *, index: int = 0, **more: Any) -> dict[str, Any]:
    """Return an event of a chat; `id` and `prompt` are ids of a token and of the prompt."""
    choice = {"index": index, "delta": delta or {}, "finish_reason": more.get("finish")}
    if "id" in more:
        choice["token_ids"] = [more["id"]]
    if "logprobs" in more:
        choice["logprobs"] = more["logprobs"]
    beside = {"prompt_token_ids": more["prompt"]} if "prompt" in more else {}
    return {**STAMP, "choices": [choice], **beside}


def text(words: str, token: int = 0, **more: Any) -> dict[str, Any]:
    """Return an event of a completion."""
    choice = {"index": 0, "text": words, "finish_reason": more.get("finish"), "token_ids": [token]}
    return {"id": "cmpl-b", "object": "text_completion", "created": 9, "model": "n", "choices": [choice]}


def have_said(*events: dict[str, Any]) -> Said:
    said = Said()
    data = encoded(*events)
    said.first = data.partition(b"\n\n")[0]
    said.add(read_events(data))
    return said


def asked_to_go_on(fields: dict[str, Any], said: Said, dialect: Dialect = VLLM, path: str = CHAT) -> Resume:
    body = {"model": "m", "stream": True, **({"messages": QUESTION} if path == CHAT else {"prompt": "Deep"}), **fields}
    return resume(read_asked(path, orjson.dumps(body)), path, said, dialect, CONTEXT)


def woven(weave: Weave, *events: dict[str, Any]) -> list[dict[str, Any]]:
    data = weave.events(encoded(*events))
    return [orjson.loads(block[6:]) for block in data.split(b"\n\n")[:-1]]


ROLE = chat({"role": "assistant", "content": ""}, prompt=[11, 12, 13])
BEGUN = (ROLE, chat({"content": "The"}, id=1), chat({"content": " sea"}, id=2))


# --- What is asked --------------------------------------------------------------------------------------------------


def test_by_ids_the_next_engine_reads_what_the_first_one_wrote() -> None:
    going_on = asked_to_go_on({"max_tokens": 10, "min_tokens": 3, "top_p": 0.9, "user": "u"}, have_said(*BEGUN))
    assert going_on.path == COMPLETIONS
    assert going_on.fields == {
        "model": "m",
        "stream": True,
        "max_tokens": 8,
        "min_tokens": 1,
        "top_p": 0.9,
        "user": "u",
        "prompt": [11, 12, 13, 1, 2],
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }


def test_a_chat_without_a_limit_goes_on_to_the_end_of_its_context_and_not_to_that_of_completions() -> None:
    assert asked_to_go_on({}, have_said(*BEGUN)).fields["max_tokens"] == CONTEXT - 5
    said = have_said(*[text("a", 1)] * 6)
    said.prompt_ids = [11]
    assert asked_to_go_on({}, said, path=COMPLETIONS).fields["max_tokens"] == 16 - 6, "vLLM's own limit"


def test_ids_whose_text_nobody_has_seen_are_produced_again() -> None:
    half_a_letter = chat({}, id=3)
    said = have_said(*BEGUN, half_a_letter)
    assert asked_to_go_on({"max_tokens": 10}, said).fields["prompt"] == [11, 12, 13, 1, 2]
    assert said.tokens == 2
    whole = have_said(*BEGUN, half_a_letter, chat({"content": "é"}, id=4))
    assert asked_to_go_on({"max_tokens": 10}, whole).fields["prompt"] == [11, 12, 13, 1, 2, 3, 4]


def test_by_text_the_message_is_gone_on_with_as_each_engine_wants_it() -> None:
    thoughts = (ROLE, chat({"reasoning_content": "Hm"}), chat({"reasoning_content": "."}))
    said = have_said(*thoughts, chat({"content": "Deep"}))
    message = {"role": "assistant", "content": "Deep", "reasoning_content": "Hm."}
    limits = {"max_tokens": 10 - 4}  # three texts, and the mark that ended the thought
    for dialect, more in (
        (LLAMACPP, {}),
        (SGLANG, {"continue_final_message": True}),
        (VLLM, {"continue_final_message": True, "add_generation_prompt": False}),
    ):
        fields = asked_to_go_on({"max_tokens": 10}, said, dialect).fields
        assert fields["messages"] == [*QUESTION, message]
        assert {name: fields[name] for name in (*more, *limits)} == {**more, **limits}
    thinking = asked_to_go_on({}, have_said(*thoughts), LLAMACPP).fields["messages"][-1]
    assert thinking == {"role": "assistant", "content": "", "reasoning_content": "Hm."}
    with pytest.raises(RefusedError):
        asked_to_go_on({}, have_said(*thoughts), SGLANG)


def test_an_answer_the_client_has_begun_itself_is_one_message() -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "Sure: "}]
    fields = asked_to_go_on({"messages": messages}, have_said(chat({"content": "very"})), LLAMACPP).fields
    assert fields["messages"] == [*QUESTION, {"role": "assistant", "content": "Sure: very"}]


def test_with_stop_words_text_is_held_back_so_ids_are_not_enough() -> None:
    going_on = asked_to_go_on({"stop": ["END"]}, have_said(*BEGUN))
    assert (going_on.path, going_on.fields["messages"][-1]["content"]) == (CHAT, "The sea")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"tools": [{}], "tool_choice": "required"}, "tool_choice"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 2}, "2 answers"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused_and_says_why(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        asked_to_go_on(fields, have_said(*BEGUN))
    again = asked_to_go_on({**fields, "temperature": 0}, have_said(*BEGUN))
    assert again.path == CHAT, "but what is answered alike each time is asked once more"
    assert again.fields["messages"] == QUESTION
    only_role = asked_to_go_on(fields, have_said(ROLE))
    assert only_role.fields["messages"] == QUESTION, "and so is that of which nothing was said"


def test_of_an_engine_that_nobody_knows_only_what_is_greedy_goes_on() -> None:
    with pytest.raises(RefusedError, match="cannot be handed"):
        asked_to_go_on({}, have_said(*BEGUN), OPENAI)
    assert asked_to_go_on({"seed": 3}, have_said(*BEGUN), OPENAI).fields["messages"] == QUESTION


# --- What comes of the answer ---------------------------------------------------------------------------------------


def test_a_completion_becomes_the_rest_of_a_chat_under_its_first_name() -> None:
    said = have_said(*BEGUN)
    weave = asked_to_go_on({"max_tokens": 10}, said).weave
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    rest = woven(weave, text(" is", 3), text("", 4, finish="stop"), {**text(""), "choices": [], "usage": usage})
    assert [event["choices"][0]["delta"] for event in rest[:2]] == [{"content": " is"}, {}]
    assert rest[1]["choices"][0]["finish_reason"] == "stop"
    assert all({name: event[name] for name in STAMP} == STAMP for event in rest)
    total = {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert rest[2]["usage"] == total


@given(
    st.sampled_from(["</think>", "</mm:think>", "<channel|>"]),
    st.lists(st.integers(1, 12), min_size=1, max_size=30),
    st.booleans(),
)
def test_thoughts_end_at_their_mark_wherever_tokens_part_it(mark: str, sizes: list[int], ends: bool) -> None:
    thought, content = f"a < b {mark[:2]} {mark[:-1]}-", "\n\nSo <b> it is."
    whole = thought + (mark + content if ends else "")
    said = have_said(ROLE, chat({"reasoning": "Hm, "}, id=1))
    weave = asked_to_go_on({}, said, replace(VLLM, end_of_thinking=mark)).weave
    events, start = [], 0
    while start < len(whole):
        size = sizes[len(events) % len(sizes)]
        events.append(text(whole[start : start + size], 5))
        start += size
    rest = woven(weave, *events, text("", 6, finish="stop"))
    said.add(read_events(encoded(*rest)))
    assert said.text("reasoning") == "Hm, " + thought
    assert said.text("content") == (content if ends else "")
    assert said.finished == {0: "stop"}


def test_a_thought_that_ends_with_more_than_a_mark_is_not_gone_on_with_by_ids() -> None:
    harmony = replace(VLLM, end_of_thinking="")
    begun = (ROLE, chat({"reasoning": "Hm"}, id=1))
    with pytest.raises(RefusedError):
        asked_to_go_on({}, have_said(*begun), harmony)
    assert asked_to_go_on({"seed": 1}, have_said(*begun), harmony).path == CHAT  # from the beginning
    answering = (*begun, chat({"content": "Deep"}, id=2))
    assert asked_to_go_on({}, have_said(*answering), harmony).path == COMPLETIONS


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_an_answer_that_is_gone_on_with_is_no_thought_whatever_the_engine_takes_it_for(name: str) -> None:
    said = have_said(ROLE, chat({name: "Hm."}), chat({"content": "Deep"}))
    rest = woven(asked_to_go_on({}, said, SGLANG).weave, chat({name: " as"}), chat({"content": " the sea."}))
    assert [event["choices"][0]["delta"] for event in rest] == [{"content": " as"}, {"content": " the sea."}]


ANSWER = (  # two, as vLLM weaves them
    ROLE,
    chat({"role": "assistant", "content": ""}, index=1),
    chat({"content": "I"}, id=1),
    chat({"content": " look"}, id=2),
    chat({"content": "B"}, index=1, id=7),
    chat({"tool_calls": [{"index": 0, "id": "x", "type": "function", "function": {"name": "sea", "arguments": ""}}]}),
    chat({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}),
    chat({"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]}),
    chat({"content": "ye"}, index=1, id=8),
    chat({}, finish="tool_calls"),
    chat({}, index=1, finish="stop"),
)


@pytest.mark.parametrize("cut", range(1, len(ANSWER)))
def test_asked_once_more_the_client_gets_what_it_lacks_and_nothing_twice(cut: int) -> None:
    said, whole = have_said(*ANSWER[:cut]), have_said(*ANSWER)
    weave = asked_to_go_on({"n": 2, "temperature": 0, "tools": [{}]}, said).weave
    other = [{**event, "id": "chatcmpl-b", "created": 8} for event in ANSWER]
    other[5] = chat({"tool_calls": [{"index": 0, "id": "y", "function": {"name": "sea", "arguments": ""}}]})
    rest = woven(weave, *other)
    said.add(read_events(encoded(*rest)))
    assert {channel: "".join(texts) for channel, texts in said.texts.items()} == {
        channel: "".join(texts) for channel, texts in whole.texts.items()
    }
    assert said.finished == whole.finished
    choices = [choice for event in (*ANSWER[:cut], *rest) for choice in event["choices"]]
    assert sorted(choice["index"] for choice in choices if "role" in choice["delta"]) == [0, 1]
    assert sorted(choice["index"] for choice in choices if choice["finish_reason"]) == [0, 1]
    deltas = [choice["delta"] for event in rest for choice in event["choices"]]
    named = [call for delta in deltas for call in delta.get("tool_calls", ()) if "id" in call]
    assert len(named) == (cut <= 5), "a call that has an id keeps it"
    assert {event["id"] for event in rest} == {"chatcmpl-a"}


def test_another_answer_is_not_mixed_with_the_first() -> None:
    for other in (chat({"content": "A"}), chat({}, finish="stop")):
        weave = asked_to_go_on({"n": 2, "temperature": 0}, have_said(*BEGUN)).weave
        with pytest.raises(BadEventError, match="another answer"):
            woven(weave, other)


def test_who_has_all_tokens_is_told_why_they_ended_and_how_many_they_are() -> None:
    said = have_said(*BEGUN)
    [reason] = missing_reason(said).split(b"\n\n")[:-1]
    assert orjson.loads(reason[6:])["choices"][0]["finish_reason"] == "length"
    assert missing_reason(said) == b""
    usage = orjson.loads(missing_usage(said)[6:])
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert usage["choices"] == []
    ended = have_said(*BEGUN, chat(id=3, finish="stop"))  # the token that ends it, of which no text comes
    assert orjson.loads(missing_usage(ended)[6:])["usage"]["completion_tokens"] == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["choices", "delta", "index", "text", "content", "tool_calls", "function", "usage",
                                       "finish_reason", "token_ids", "role", "prompt_tokens", "name"]), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["choices", "usage", "id", "prompt_token_ids"]), json_values))
def test_whatever_an_event_holds_it_is_woven_or_called_bad(event: dict[str, Any]) -> None:
    data = encoded(event)
    for fields in ({}, {"n": 2, "temperature": 0}):
        said = have_said(*BEGUN)
        weave = asked_to_go_on(fields, said).weave
        with suppress(BadEventError):
            read_events(data)  # or it never gets that far
            said.add(read_events(weave.events(data) or b"data: {}\n\n"))
