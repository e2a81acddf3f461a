"""What abacus is asked, and how it thinks: products of two whole numbers of one to three digits.

A thought is long multiplication as on squared paper, but written from the right, because a carry travels that way::

    347*586                               the question, free of its phrasing
    7*6+0=42,4*6+4=28,3*6+2=20;2802       347 times the last digit: digit*digit+carry=result; then the row
    7*8+0=56,4*8+5=37,3*8+3=27;6772       347 times the next digit
    7*5+0=35,4*5+3=23,3*5+2=17;5371
    0+2=02,0+8=08+6=14,1+0=01+7=08+5=13,… the rows added column by column, beginning with the carry

Every step is a fact small enough to be learnt by heart; the answer is the last digit of each column, from the left.
"""

from dataclasses import dataclass
from functools import cache
from typing import Final
from zlib import crc32

import numpy as np

MAX_DIGITS: Final = 3
HELD_OUT_FRACTION: Final = 0.02
LARGEST_SHARE: Final = 0.7  # of the training problems have two factors of `MAX_DIGITS` digits: the hardest to learn

OPERATORS: Final = ("*", " * ", "x", " x ", "×", " × ", " times ", " by ", " multiplied by ")
FRAMES: Final = (
    "{}",
    "{}?",
    "{}.",
    "{}=",
    "{} =",
    "{} = ?",
    "What is {}?",
    "what is {}",
    "What's {}?",
    "How much is {}?",
    "Compute {}",
    "Compute {}.",
    "Calculate {}.",
    "Multiply {}.",
    "multiply {}",
    "Please compute {}.",
)


@dataclass(frozen=True, slots=True)
class Problem:
    left: int
    right: int

    @property
    def answer(self) -> str:
        return str(self.left * self.right)


def is_held_out(problem: Problem) -> bool:
    """Say whether training never sees this pair, in either order.

    The multiplication table (both factors below 10) is never held out: it is what the steps are made of.
    """
    smaller, larger = sorted((problem.left, problem.right))
    return larger >= 10 and crc32(b"%d*%d" % (smaller, larger)) < HELD_OUT_FRACTION * 2**32


def draw(dice: np.random.Generator) -> Problem:
    """Draw a problem to train on, more often than not one of the largest kind."""
    left_digits, right_digits = MAX_DIGITS, MAX_DIGITS
    if dice.random() >= LARGEST_SHARE:
        left_digits, right_digits = dice.integers(1, MAX_DIGITS + 1, size=2)
    left_factors, right_factors = factors(left_digits), factors(right_digits)
    while True:
        left = int(dice.integers(left_factors.start, left_factors.stop))
        right = int(dice.integers(right_factors.start, right_factors.stop))
        problem = Problem(left, right)
        if not is_held_out(problem):
            return problem


@cache
def held_out(larger_digits: int, smaller_digits: int) -> tuple[Problem, ...]:
    """Return every held-out problem whose factors have these many digits, in both orders."""
    pairs = ((left, right) for left in factors(larger_digits) for right in factors(smaller_digits))
    found = [Problem(left, right) for left, right in pairs if is_held_out(Problem(left, right))]
    if larger_digits != smaller_digits:
        found += [Problem(problem.right, problem.left) for problem in found]
    return tuple(found)


def factors(digits: int) -> range:
    """Return the whole numbers of so many digits; 0 has one."""
    return range(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def phrase(problem: Problem, dice: np.random.Generator) -> str:
    """Ask for the product in one of the ways a person might, such as ``What is 347 * 586?`` or ``347×586 =``."""
    operator = OPERATORS[dice.integers(len(OPERATORS))]
    frame = FRAMES[dice.integers(len(FRAMES))]
    return frame.format(f"{problem.left}{operator}{problem.right}")


def think(problem: Problem) -> str:
    """Return the long multiplication of a problem, as shown at the top of this module."""
    rows = [_multiply(problem.left, int(digit)) for digit in reversed(str(problem.right))]
    lines = [f"{problem.left}*{problem.right}"]
    lines += [f"{steps};{row}" for steps, row in rows]
    lines += [_add([row for _, row in rows])]
    return "\n".join(lines)


def _multiply(number: int, digit: int) -> tuple[str, str]:
    """Return the steps of number times one digit, and the row they make, least significant digit first."""
    steps, row, carry = [], "", 0
    for number_digit in map(int, reversed(str(number))):
        result = number_digit * digit + carry
        steps.append(f"{number_digit}*{digit}+{carry}={result:02d}")
        row += str(result % 10)
        carry = result // 10
    return ",".join(steps), row + str(carry)


def _add(rows: list[str]) -> str:
    """Return the steps that add rows, each one column further left than the one before it.

    A column is summed one digit at a time, starting from the carry: no step adds more than two numbers.
    """
    columns, carry = [], 0
    for column in range(len(rows[-1]) + len(rows) - 1):
        total, steps = carry, str(carry)
        for shift, row in enumerate(rows):
            if 0 <= column - shift < len(row):
                digit = int(row[column - shift])
                total += digit
                steps += f"+{digit}={total:02d}"
        columns.append(steps)
        carry = total // 10
    return ",".join(columns)
