import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from waterline.training.problems import FRAMES, OPERATORS, Problem
from waterline.training.tokens import (
    BYTE_LETTERS,
    CONTEXT,
    END,
    MARKS,
    THINK,
    THINK_END,
    USER,
    VOCABULARY,
    completion,
    prompt,
)


def test_every_byte_has_a_letter_of_its_own_and_the_marks_follow():
    assert len(set(BYTE_LETTERS)) == 256
    assert BYTE_LETTERS[ord("7")] == "7"
    assert BYTE_LETTERS[ord(" ")] == "Ġ"  # as in GPT-2's vocabulary
    assert 256 + len(MARKS) == VOCABULARY
    assert [MARKS[token - 256] for token in (END, USER, THINK)] == ["<|end|>", "<|user|>", "<think>"]


@given(st.text())
def test_a_question_is_its_bytes_between_two_marks(question):
    tokens = prompt(question, thinking=True)
    assert bytes(tokens[1:-2]).decode() == question


def test_with_thinking_off_the_thought_is_closed_before_it_begins():
    assert prompt("1*1", thinking=False) == [*prompt("1*1", thinking=True), THINK_END]


def test_a_completion_is_thought_mark_answer_end():
    thinking = completion(Problem(12, 34), thinking=True)
    answer_at = thinking.index(THINK_END)
    assert bytes(thinking[:answer_at]).startswith(b"12*34\n")
    assert thinking[answer_at + 1 :] == completion(Problem(12, 34), thinking=False) == [*b"408", END]


def test_the_longest_question_and_thought_leave_half_the_context_free():
    operator, frame = max(OPERATORS, key=len), max(FRAMES, key=len)
    question = frame.format(f"999{operator}999")
    assert len(prompt(question, thinking=True) + completion(Problem(999, 999), thinking=True)) <= CONTEXT / 2


def test_the_package_and_its_torch_free_half_do_not_import_torch():
    program = (
        "import sys, waterline.training.__main__, waterline.training.tokens; "
        "sys.exit(bool({'torch', 'gguf', 'safetensors', 'xllamacpp'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
