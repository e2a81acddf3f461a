"""Plain and compiled, decisions are the same to the bit, and nobody pays for a compiler who does not use it."""

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from waterline.policy import admission, decisions, dispatch, effort, forecast, routing, why
from waterline.policy.jit import compiled, jit

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed: nothing to compare with")

Form = Callable[[Callable[..., Any]], Callable[..., Any]]  # of a decision: plain, or compiled


@jit
def half(number: float) -> float:
    """Return a half."""
    return number / 2


@jit
def quarter(number: float) -> float:
    return half(half(number))


def test_importing_the_policy_imports_no_numba() -> None:
    modules = "admission, decisions, dispatch, effort, forecast, jit, lending, routing, why"
    code = f"import sys; from waterline.policy import {modules}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_decorated_function_stays_what_it_is() -> None:
    assert quarter(8.0) == 2.0
    assert half.__doc__ == "Return a half."


@needs_numba
def test_compiled_functions_call_each_other_and_are_called_by_others() -> None:
    import numba  # noqa: PLC0415 - where it is installed

    @numba.njit
    def kernel(number: float) -> float:
        return quarter(number) + half(number)

    assert compiled(quarter)(8.0) == 2.0
    assert kernel(8.0) == 6.0


def test_without_numba_the_compiled_form_is_the_function_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waterline.policy.jit.find_spec", lambda _: None)
    assert compiled(half)(3.0) == 1.5


def test_what_is_not_decorated_cannot_be_compiled() -> None:
    with pytest.raises(TypeError, match="sorted is not decorated"):
        compiled(sorted)


def bits(arrays: tuple[np.ndarray, ...]) -> list[bytes]:
    return [array.tobytes() for array in arrays]


def admissions(form: Form) -> list[Any]:
    """Let five hundred requests come, wait, start, give up and end; return every answer and the state."""
    dice = np.random.default_rng(5)
    books = admission.new_accounts([0.2, 0.0, 0.1], [0.5, 0.3, 0.2], [1.0, 0.4, 1.0], 16.0)
    queue = admission.new_queue(3, dice.integers(0, 3, 12))
    admit, following, age = form(admission.admit), form(admission.next_line), form(admission.age)
    enter, take, settle, leave = (form(getattr(admission, name)) for name in ("enter", "take", "settle", "leave"))
    answers: list[Any] = []
    for step in range(500):
        client, cost = int(dice.integers(12)), float(dice.exponential(2.0))
        answers.append(admit(books, queue, client, 0, cost, int(step % 3 == 0), 40, 16.0, float(dice.random()), 3.0))
        if answers[-1][0] == decisions.WAITS_FOR_SLOT:
            enter(queue, client, 0, 1.0)
        answers.append(following(books, queue, 0))
        if answers[-1][0] >= 0 and step % 2:
            take(books, queue, answers[-1][0], 0, 1.0)
            settle(books, queue, answers[-1][0], cost - 1.0)
        elif answers[-1][0] >= 0 and step % 7 == 0:
            leave(queue, answers[-1][0], 0, 1.0)
        age(books, step * 0.37, step > 20)
    return [*answers, *bits(books), *bits(queue)]


def desks(form: Form) -> list[Any]:
    """Let requests of five clients go through a fleet of two models, one of them split, whose replicas come and go."""
    dice = np.random.default_rng(6)
    desk = dispatch.new_desk([0.2, 0.0], [0.5, 0.3], [1.0, 0.4], [0, 0, 1, 1, 1], models=2, rows=40, prefix_places=256)
    for row in range(40):
        role = dispatch.BOTH if row < 20 else dispatch.READS if row < 30 else dispatch.WRITES
        rate = float(dice.choice([50.0, 200.0]))
        rates = {"tokens_per_s": rate, "prefill_tokens_per_s": rate * 10}
        dispatch.put(desk, row, row // 20, role=role, gpus=1.0, slots=2, longest_tokens=900 + row % 3, **rates)
    dispatch.set_in_service(desk, range(40), serves=True)
    arrive, turn, start, take_over = (form(getattr(dispatch, name)) for name in DECISIONS[:4])
    first_token, left, settle, tick = (form(getattr(dispatch, name)) for name in DECISIONS[4:])
    explain_place, explain_turn = form(why.explain_place), form(why.explain_turn)
    reasons = np.zeros(len(decisions.REASONS), np.int64)
    answers: list[Any] = []
    waiting: dict[tuple[int, int], list[tuple[object, ...]]] = {}
    running: list[tuple[int, ...]] = []
    for step in range(1500):
        model, client, prompt = int(dice.integers(2)), int(dice.integers(5)), int(dice.integers(1, 800))
        blocks, draw = np.cumsum(dice.integers(1, 4, 6)) * 7919, int(dice.integers(routing.MOST_DRAWN))
        request = prompt, 0, 100, prompt + 100
        explain_place(desk, model, prompt, prompt + 100, blocks, draw, reasons)
        explain_turn(desk, model, reasons)
        answers.append(reasons.tolist())
        answer = arrive(desk, model, client, *request, 3.0, blocks, draw)
        answers.append(tuple(answer))
        if answer[0] == decisions.SLOT_FREE:
            running.append((model, answer[1], client, prompt, prompt - answer[2]))
        elif answer[0] == decisions.WAITS_FOR_SLOT:
            waiting.setdefault((model, client), []).append((*request, answer[4], blocks, draw))
        if running and dice.random() < 0.9:
            model, row, client, prompt, unread = running.pop(int(dice.integers(len(running))))
            first_token(desk, model, row, prompt, unread)
            left(desk, model, row, 100)
            settle(desk, model, client, float(dice.normal()))
            if model == 1:
                answers.append(take_over(desk, model, 100, prompt + 100, draw))
            whose, _ = turn(desk, model)
            if whose >= 0:
                asked = waiting[model, int(whose)].pop(0)
                answers.append(start(desk, model, int(whose), *asked))
                running.append((model, answers[-1][0], int(whose), asked[0], asked[0] - answers[-1][1]))
        if step % 100 == 0:
            dispatch.set_in_service(desk, dice.choice(40, 5, replace=False), serves=bool(step % 200))
        tick(desk, step * 0.1)
    assert len({answer[0] for answer in answers if isinstance(answer, tuple)}) > 10
    return [*answers, *(one for part in desk for one in bits(part))]


DECISIONS = "arrive", "next_turn", "start", "take_over", "first_token", "left", "settle", "tick"


def forecasts(form: Form) -> list[Any]:
    dice, series = np.random.default_rng(7), forecast.new_series([4, 9], 600.0, 48)
    observe, ahead, needs = form(forecast.observe), form(forecast.forecast), form(forecast.needs)
    answers: list[Any] = []
    for step in range(600):
        if step % 11:
            observe(series, step % 2, step, float(dice.poisson(40 + 30 * np.sin(step * np.pi / 72))))
        answers += [ahead(series, step % 2, step, 4), needs(series, step % 2, step)]
    return [*answers, *bits(series)]


def efforts(form: Form) -> list[Any]:
    decide, dice = form(effort.effort), np.random.default_rng(8)
    return [decide(float(load), bool(load > 1.9), 9000, 500, 7) for load in dice.random(200) * 2]


@needs_numba
@pytest.mark.parametrize("life", [admissions, desks, forecasts, efforts])
def test_decisions_are_the_same_with_and_without_numba(life: Callable[..., list[Any]]) -> None:
    assert life(lambda function: function) == life(compiled)
