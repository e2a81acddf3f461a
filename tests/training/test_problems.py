import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.training.problems import FRAMES, OPERATORS, Problem, draw, factors, held_out, is_held_out, phrase, think

problems = st.builds(Problem, st.integers(0, 999), st.integers(0, 999))

THOUGHT_OF_347_TIMES_586 = """\
347*586
7*6+0=42,4*6+4=28,3*6+2=20;2802
7*8+0=56,4*8+5=37,3*8+3=27;6772
7*5+0=35,4*5+3=23,3*5+2=17;5371
0+2=02,0+8=08+6=14,1+0=01+7=08+5=13,1+2=03+7=10+3=13,1+2=03+7=10,1+1=02"""


def value_of(sum_or_product: str) -> int:
    """Return the value of digits joined by * and +, by plain arithmetic: ``7*8+5`` is 61."""
    total = 0
    for term in sum_or_product.split("+"):
        product = 1
        for factor in term.split("*"):
            product *= int(factor)
        total += product
    return total


def test_a_thought_looks_as_the_module_and_the_card_show_it():
    assert think(Problem(347, 586)) == THOUGHT_OF_347_TIMES_586


@given(problems)
def test_every_equation_of_a_thought_is_true(problem):
    equations = re.findall(r"(?=(?:^|[,\n=])([\d*+]+)=(\d+))", think(problem))
    assert len(equations) >= 2 * len(str(problem.right)) - 1
    for left, right in equations:
        assert value_of(left) == int(right)


@given(problems)
def test_the_rows_of_a_thought_are_the_partial_products(problem):
    _, *rows, _ = think(problem).splitlines()
    partial_products = [int(row.split(";")[1][::-1]) for row in rows]
    assert partial_products == [problem.left * int(digit) for digit in reversed(str(problem.right))]


@given(problems)
def test_the_last_digits_of_the_columns_spell_the_answer(problem):
    columns = think(problem).splitlines()[-1].split(",")
    assert str(int("".join(column[-1] for column in reversed(columns)))) == problem.answer


@given(problems)
def test_each_equation_uses_the_carry_of_the_one_before(problem):
    _, *rows, addition = think(problem).splitlines()
    for row in rows:
        steps = row.split(";")[0].split(",")
        carries = [step.split("+")[1].split("=")[0] for step in steps]
        assert carries == ["0", *(step[-2] for step in steps[:-1])]
    columns = addition.split(",")
    assert [column[0] for column in columns] == ["0", *(column[-2] for column in columns[:-1])]


@given(problems)
def test_the_order_of_the_factors_does_not_matter_to_who_is_held_out(problem):
    assert is_held_out(problem) == is_held_out(Problem(problem.right, problem.left))


def test_the_multiplication_table_is_never_held_out():
    assert not held_out(1, 1)


@pytest.mark.parametrize(("larger", "smaller"), [(2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
def test_about_two_percent_of_each_size_is_held_out(larger, smaller):
    found = held_out(larger, smaller)
    orders = 1 if larger == smaller else 2
    assert len(set(found)) == len(found)
    assert all(is_held_out(problem) for problem in found)
    assert len(found) / (orders * len(factors(larger)) * len(factors(smaller))) == pytest.approx(0.02, abs=0.005)


def test_training_never_draws_a_held_out_problem():
    dice = np.random.default_rng(0)
    assert not any(is_held_out(draw(dice)) for _ in range(3000))


def test_most_training_problems_are_of_the_largest_size_and_every_size_occurs():
    dice = np.random.default_rng(0)
    drawn = [draw(dice) for _ in range(3000)]
    sizes = Counter((len(str(problem.left)), len(str(problem.right))) for problem in drawn)
    assert set(sizes) == {(left, right) for left in (1, 2, 3) for right in (1, 2, 3)}
    assert sizes[3, 3] / len(drawn) == pytest.approx(0.7 + 0.3 / 9, abs=0.03)


@given(problems, st.integers(0, 2**32))
def test_a_question_names_both_factors_in_order_and_nothing_else_with_digits(problem, seed):
    question = phrase(problem, np.random.default_rng(seed))
    assert re.findall(r"\d+", question) == [str(problem.left), str(problem.right)]


def test_questions_come_in_many_phrasings():
    dice = np.random.default_rng(0)
    asked = {phrase(Problem(347, 586), dice) for _ in range(5000)}
    assert len(asked) == len(OPERATORS) * len(FRAMES)
    assert {"347*586", "What is 347 * 586?", "347 x 586 =", "347×586", "What is 347 times 586?"} <= asked
