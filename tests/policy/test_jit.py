"""Plain and compiled, decisions are the same to the bit, and nobody pays for a compiler who does not use it."""

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest

from waterline.policy import admission, effort, forecast, routing
from waterline.policy.jit import compiled, jit

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed: nothing to compare with")


@jit
def half(number: float) -> float:
    """Return a half."""
    return number / 2


@jit
def quarter(number: float) -> float:
    return half(half(number))


def test_importing_the_policy_imports_no_numba() -> None:
    modules = "admission, decisions, effort, forecast, jit, lending, routing"
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


def admissions(form: Callable[[Callable[..., object]], Callable[..., object]]) -> list[object]:
    """Let five hundred requests come, wait, start, give up and end; return every answer and the state."""
    dice = np.random.default_rng(5)
    books = admission.new_accounts([0.2, 0.0, 0.1], [0.5, 0.3, 0.2], [1.0, 0.4, 1.0], 16.0)
    queue = admission.new_queue(3, dice.integers(0, 3, 12), 40)
    admit, following, age = form(admission.admit), form(admission.next_client), form(admission.age)
    enter, take, settle, leave = (form(getattr(admission, name)) for name in ("enter", "take", "settle", "leave"))
    answers: list[object] = []
    for step in range(500):
        client, cost = int(dice.integers(12)), float(dice.exponential(2.0))
        answers.append(admit(books, queue, client, cost, int(step % 3 == 0), 40, 16.0, float(dice.random()), 3.0))
        if answers[-1][0] == admission.WAITS_FOR_SLOT:
            enter(queue, client, 1.0)
        answers.append(following(books, queue))
        if answers[-1][0] >= 0 and step % 2:
            take(books, queue, answers[-1][0], 1.0)
            settle(books, queue, answers[-1][0], cost - 1.0)
        elif answers[-1][0] >= 0 and step % 7 == 0:
            leave(queue, answers[-1][0], 1.0)
        age(books, step * 0.37)
    return [*answers, *bits(books), *bits(queue)]


def routes(form: Callable[[Callable[..., object]], Callable[..., object]]) -> list[object]:
    dice = np.random.default_rng(6)
    rates, ready, prefixes = dice.choice([0.0, 50.0, 200.0], 40), routing.new_ready(40), routing.new_prefixes(256)
    born, backlog = np.zeros(40, np.int64), np.zeros(40)
    route, remember = form(routing.route), form(routing.remember)
    form(routing.make_ready)(ready, rates)
    answers: list[object] = []
    for _ in range(400):
        blocks = np.cumsum(dice.integers(1, 4, 6)) * 7919
        draw = int(dice.integers(routing.MOST_DRAWN))
        answers.append(route(ready, prefixes, born, backlog, rates, rates * 10, 600, blocks, 100, draw))
        remember(prefixes, born, blocks, answers[-1][0])
        backlog[answers[-1][0]] += 300
        backlog *= 0.97
    return [*answers, *bits(ready), *bits(prefixes)]


def forecasts(form: Callable[[Callable[..., object]], Callable[..., object]]) -> list[object]:
    dice, series = np.random.default_rng(7), forecast.new_series([4, 9], 600.0, 48)
    observe, ahead, needs = form(forecast.observe), form(forecast.forecast), form(forecast.needs)
    answers: list[object] = []
    for step in range(600):
        if step % 11:
            observe(series, step % 2, step, float(dice.poisson(40 + 30 * np.sin(step * np.pi / 72))))
        answers += [ahead(series, step % 2, step, 4), needs(series, step % 2, step)]
    return [*answers, *bits(series)]


def efforts(form: Callable[[Callable[..., object]], Callable[..., object]]) -> list[object]:
    decide, dice = form(effort.effort), np.random.default_rng(8)
    return [decide(float(load), bool(load > 1.9), 9000, 500, 7) for load in dice.random(200) * 2]


@needs_numba
@pytest.mark.parametrize("life", [admissions, routes, forecasts, efforts])
def test_decisions_are_the_same_with_and_without_numba(life: Callable[..., list[object]]) -> None:
    assert life(lambda function: function) == life(compiled)
