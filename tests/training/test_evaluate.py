"""The shipped weights, in the embedded engine, keep what the model card says."""

import json
import re
from pathlib import Path
from urllib.request import Request, urlopen

import openai
import pytest

from waterline.errors import EngineError
from waterline.training import tokens
from waterline.training.embedded import serve
from waterline.training.evaluate import SHIPPED_WEIGHTS, SIZES, Score, body, draw_questions, score
from waterline.training.problems import Problem, is_held_out, think

CARD = Path(__file__).parents[2] / "docs" / "model-card.md"
ROW = re.compile(r"^\| (\d) × (\d) \| (\d+) \| ([\d.]+)% \| ([\d.]+)% \|$", re.MULTILINE)
CARD_SEED, TEST_SEED = 0, 1


def card_scores() -> dict[tuple[int, int, bool], Score]:
    """Return what the card says, by digits of the larger and the smaller factor and by thinking."""
    scores = {}
    for larger, smaller, asked, *percentages in ROW.findall(CARD.read_text(encoding="utf-8")):
        for thinking, percentage in zip((True, False), percentages, strict=True):
            right = round(float(percentage) / 100 * int(asked))
            scores[int(larger), int(smaller), thinking] = Score(right, int(asked))
    return scores


def tolerance(said: Score, seen: Score) -> float:
    """Return four standard errors of the difference of two binomial fractions.

    Two successes and two failures are added to what was said (Agresti and Coull 1998), so that a perfect score does
    not claim an error of zero. By chance a test fails once in about 16,000 times.
    """
    fraction = (said.right + 2) / (said.asked + 4)
    return 4 * (fraction * (1 - fraction) * (1 / said.asked + 1 / seen.asked)) ** 0.5


def post(url, content):
    request = Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as reply:
        return json.load(reply)


def test_the_card_covers_every_size_with_and_without_thinking():
    assert set(card_scores()) == {(*size, thinking) for size in SIZES for thinking in (True, False)}


@pytest.mark.parametrize(
    ("size", "thinking", "problems"),
    [
        ((3, 3), True, 200),
        ((3, 3), False, 100),
        ((3, 2), True, 50),
        ((3, 1), False, 100),
        ((2, 2), True, 50),
        ((2, 2), False, 100),
        ((2, 1), True, 36),
        ((2, 1), False, 36),
    ],
)
def test_accuracy_on_held_out_problems_is_what_the_card_says(abacus_url, size, thinking, problems):
    larger, smaller = size
    questions = draw_questions(larger, smaller, problems, TEST_SEED)
    seen = score(abacus_url, "abacus", questions, thinking=thinking)
    said = card_scores()[*size, thinking]
    assert seen.asked == problems
    assert seen.accuracy == pytest.approx(said.accuracy, abs=tolerance(said, seen))


def test_questions_are_held_out_and_different():
    questions = draw_questions(3, 3, 500, CARD_SEED)
    assert all(is_held_out(question.problem) for question in questions)
    assert len({question.problem for question in questions}) == 500


def test_a_vote_of_three_counts_like_one_answer(abacus_url):
    questions = draw_questions(2, 2, 10, TEST_SEED)
    assert score(abacus_url, "abacus", questions, thinking=True, votes=3).asked == 10


def test_the_thought_arrives_apart_from_the_answer(abacus_url):
    message = post(f"{abacus_url}/chat/completions", {"messages": [{"role": "user", "content": "What is 347 * 586?"}]})[
        "choices"
    ][0]["message"]
    assert message["content"] == "203342"
    assert message["reasoning_content"] == think(Problem(347, 586))


def test_the_thought_streams_apart_from_the_answer(abacus_url):
    with openai.OpenAI(base_url=abacus_url, api_key="none") as client:
        thought, answer = "", ""
        for chunk in client.chat.completions.create(
            model="abacus", messages=[{"role": "user", "content": "347×586"}], stream=True
        ):
            delta = chunk.choices[0].delta
            thought += getattr(delta, "reasoning_content", None) or ""
            answer += delta.content or ""
    assert (thought, answer) == (think(Problem(347, 586)), "203342")


def test_with_thinking_off_there_is_no_thought(abacus_url):
    message = post(f"{abacus_url}/chat/completions", body("abacus", "347 * 586", thinking=False))["choices"][0][
        "message"
    ]
    assert "reasoning_content" not in message
    assert message["content"].isdigit()


@pytest.mark.parametrize("budget_tokens", [0, 10, 40, 100, 160])
def test_a_thinking_budget_is_kept_and_answered_in_digits(abacus_url, budget_tokens):
    for question in draw_questions(3, 3, 5, TEST_SEED):
        request = body("abacus", question.text, thinking=True) | {"reasoning_budget_tokens": budget_tokens}
        reply = post(f"{abacus_url}/chat/completions", request)
        assert reply["usage"]["completion_tokens"] <= budget_tokens + 10  # the answer and three marks
        assert reply["choices"][0]["message"]["content"].isdigit()


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "12×34 ="}],
        [{"role": "user", "content": " 12×34 =\n"}],
        [{"role": "user", "content": [{"type": "text", "text": "12×34 ="}]}],
        [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is 2 * 3?"},
            {"role": "assistant", "content": "6"},
            {"role": "user", "content": "12×34 ="},
        ],
    ],
    ids=["alone", "spaces around", "content in parts", "system and earlier turns"],
)
def test_the_chat_template_writes_the_prompt_that_training_saw(abacus_url, messages, thinking):
    request = {"messages": messages, "chat_template_kwargs": {"enable_thinking": thinking}}
    text = post(abacus_url.removesuffix("/v1") + "/apply-template", request)["prompt"]
    ids = post(
        abacus_url.removesuffix("/v1") + "/tokenize", {"content": text, "parse_special": True, "add_special": True}
    )["tokens"]
    assert ids == tokens.prompt("12×34 =", thinking=thinking)


def test_a_request_without_a_user_message_is_answered_all_the_same(abacus_url):
    reply = post(f"{abacus_url}/chat/completions", {"messages": [{"role": "system", "content": "Hello"}]})
    assert reply["choices"][0]["finish_reason"] in {"stop", "length"}


def test_an_engine_that_does_not_start_says_why(tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the extra waterline-llm[embedded]")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(EngineError, match=r"did not start with .*broken\.gguf: .*"), serve(broken):
        pass


def test_a_server_that_refuses_is_an_error_not_a_wrong_answer(abacus_url):
    with pytest.raises(EngineError, match="answered 404"):
        score(f"{abacus_url}/nowhere", "abacus", draw_questions(2, 1, 1, TEST_SEED), thinking=True)


def test_the_shipped_weights_are_small():
    assert SHIPPED_WEIGHTS.stat().st_size <= 4e6
