"""What the gateway reads of a body, and what it says about a wrong one."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.errors import LedgerError
from waterline.service.body import CHAT, COMPLETIONS, EMBEDDINGS, STEERING, read_asked
from waterline.service.errors import RejectedError, error_headers, error_json, http_status, retry_after
from waterline.service.response_relay import read_own
from waterline.service.responses import RESPONSES

HELLO = [{"role": "user", "content": "Hello, engine!"}]


def body(**fields: Any) -> bytes:
    return orjson.dumps(fields)


def test_a_chat_request_tells_model_stream_limit_and_an_estimate_of_its_prompt() -> None:
    asked = read_asked(CHAT, body(model="chat", messages=HELLO, stream=True, max_tokens=7, top_k=3))
    assert (asked.model, asked.stream, asked.most_tokens) == ("chat", True, 7)
    assert asked.prompt_tokens == 4 + 4, "14 bytes are four tokens, and a message has marks around it"
    assert asked.fields["top_k"] == 3


def test_the_newer_name_of_the_limit_wins() -> None:
    assert read_asked(CHAT, body(model="m", messages=HELLO, max_tokens=7, max_completion_tokens=5)).most_tokens == 5


def test_parts_of_a_message_are_added_up_and_pictures_left_out() -> None:
    parts = [{"type": "text", "text": "x" * 40}, {"type": "image_url", "image_url": {"url": "data:" + "y" * 400}}]
    assert read_asked(CHAT, body(model="m", messages=[{"role": "user", "content": parts}])).prompt_tokens == 14


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("x" * 40, 10), ("é" * 40, 20), ("", 1), ([1, 2, 3], 3), ([[1, 2], [3]], 3), (["x" * 8, "y" * 8], 4)],
)
def test_a_prompt_is_text_or_tokens(prompt: Any, tokens: int) -> None:
    assert read_asked(COMPLETIONS, body(model="m", prompt=prompt)).prompt_tokens == tokens


@pytest.mark.parametrize(
    ("prompt", "n", "answers", "fewest_tokens"),
    [("x" * 1280, None, 1, 10), (["a", "b"], 3, 6, 0), ([1, 2, 3], 2, 2, 3), ([[1, 2], [3]], None, 2, 2)],
)
def test_each_prompt_of_a_batch_gets_n_answers(prompt: Any, n: int | None, answers: int, fewest_tokens: int) -> None:
    asked = read_asked(COMPLETIONS, body(model="m", prompt=prompt, n=n))
    assert (asked.answers, asked.fewest_tokens) == (answers, fewest_tokens)


def test_what_no_tokenizer_could_fit_into_the_context_is_refused() -> None:
    asked = read_asked(COMPLETIONS, body(model="m", prompt=[7] * 512))
    asked.check_context(513)
    with pytest.raises(RejectedError, match="maximum context length is 512 tokens.* at least 512") as caught:
        asked.check_context(512)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


def test_a_body_nested_without_end_is_refused() -> None:
    with pytest.raises(RejectedError):
        read_asked(CHAT, b'{"model": "m", "x": ' + b"[" * 500_000)


@pytest.mark.parametrize(
    ("data", "param", "said"),
    [
        (b"", None, "line 1, column 1"),
        (b'{"model": "m",', None, "not valid JSON"),
        (b'{"model": "\xff"}', None, "not UTF-8 text: invalid start byte at byte 11"),
        (b"[1]", None, "should be a JSON object, not list"),
        (body(messages=HELLO), "model", "'model' is missing"),
        (body(model=3, messages=HELLO), "model", "'model' is wrong: expected"),
        (body(model="m"), "messages", "'messages' is missing"),
        (body(model="m", messages=[]), "messages", "'messages' is empty"),
        (body(model="m", messages="hi"), "messages", "'messages' is wrong"),
        (body(model="m", messages=[{"content": "hi"}]), "messages[0].role", "'messages[0].role' is missing"),
        (body(model="m", messages=[{"role": "user", "content": 3}]), "messages[0].content", "wrong"),
        (body(model="m", messages=HELLO, stream="yes"), "stream", "'stream' is wrong"),
        (body(model="m", messages=HELLO, max_tokens="many"), "max_tokens", "'max_tokens' is wrong"),
        (body(model="m", messages=HELLO, max_tokens=-1), "max_tokens", "'max_tokens' is wrong"),
    ],
)
def test_a_wrong_body_is_refused_with_its_place(data: bytes, param: str | None, said: str) -> None:
    with pytest.raises(RejectedError) as caught:
        read_asked(CHAT, data)
    error = json.loads(error_json(caught.value))["error"]
    assert http_status(caught.value) == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert said in error["message"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["model", "messages", "prompt", "stream", "max_tokens", "stream_options", "role", "content"])


@given(st.binary(max_size=60) | st.dictionaries(keys, anything, max_size=6).map(lambda one: json.dumps(one).encode()))
def test_whatever_is_sent_it_is_understood_or_refused(data: bytes) -> None:
    for endpoint in (CHAT, COMPLETIONS):
        try:
            assert read_asked(endpoint, data).prompt_tokens >= 1
        except RejectedError as error:
            assert http_status(error) == 400
            assert json.loads(error_json(error))["error"]["message"]


@pytest.mark.parametrize("name", [*STEERING, "pri\\u006frity"])
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES])
def test_a_client_does_not_steer_engines(name: str, endpoint: str) -> None:
    prompts = {CHAT: '"messages":[{"role":"user","content":"x"}]', COMPLETIONS: '"prompt":"x"'}
    prompt = prompts.get(endpoint, '"input":"x"')
    for field in (f'"{name}":7', f'"{name}":null,"vllm_xargs":{{"{name}":7}}', f'"vllm_xargs":{{}},"{name}":["a"]'):
        body = f'{{"model":"m",{prompt},{field}}}'.encode()
        with pytest.raises(RejectedError, match="is not for clients") as caught:
            read_own(body) if endpoint == RESPONSES else read_asked(endpoint, body)
        assert caught.value.param in STEERING


def test_what_steers_nothing_passes() -> None:
    nothing = b'"priority":0,"kv_transfer_params":null,"id_slot":-1,"lora":[],"vllm_xargs":{"mine":1}'
    assert read_asked(COMPLETIONS, b'{"model":"m","prompt":"x",' + nothing + b"}").stream is False
    with pytest.raises(RejectedError, match="'n_predict' is not for clients. Say max_tokens"):
        read_asked(COMPLETIONS, b'{"model":"m","prompt":"x","max_tokens":1,"n_predict":-1}')  # which would go before it


def test_of_a_name_that_is_said_twice_the_last_counts_as_it_does_for_engines() -> None:
    said = b'{"prompt":"x","model":"a","model":"b","max_tokens":1,"max_tokens":9,"priority":-1,"priority":0}'
    asked = read_asked(COMPLETIONS, said)
    assert (asked.model, asked.most_tokens) == ("b", 9)
    with pytest.raises(RejectedError, match="'priority' is not for clients"):
        read_asked(COMPLETIONS, said.replace(b'"priority":0', b'"priority":-1'))


def test_a_completion_is_as_long_as_the_longer_of_its_limits() -> None:
    both = read_asked(COMPLETIONS, body(model="m", prompt="x", max_tokens=1, max_completion_tokens=900))
    assert both.most_tokens == 900, "engines do not agree which of them counts"
    assert read_asked(COMPLETIONS, body(model="m", prompt="x")).most_tokens is None


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        ({"input": "x" * 8}, 2),
        ({"messages": HELLO}, 4),
        ({"input": [{"text": "x" * 8}, {"image": "data:image/png;base64,AA"}]}, 2),
    ],
)
def test_embeddings_are_of_texts_messages_and_pictures(asked: dict[str, Any], tokens: int) -> None:
    assert read_asked(EMBEDDINGS, body(model="m", **asked)).prompt_tokens == tokens
    with pytest.raises(RejectedError, match="'input' is missing"):
        read_asked(EMBEDDINGS, body(model="m"))


@pytest.mark.parametrize(("seconds", "may_retry"), [(0.2, True), (60.0, True), (60.1, False), (600.0, False)])
def test_clients_that_wait_a_minute_at_most_are_told_where_that_is_in_vain(seconds: float, may_retry: bool) -> None:
    headers = retry_after(seconds)
    assert int(headers.pop("retry-after")) >= seconds
    assert headers == ({} if may_retry else {"x-should-retry": "false"})


def test_where_the_ledger_is_is_nothing_to_clients() -> None:
    error = LedgerError("the ledger postgresql://waterline@10.0.0.7/waterline does not answer as it should")
    assert b"10.0.0.7" not in error_json(error)
    assert (http_status(error), error_headers(error)) == (503, [(b"retry-after", b"5")])
