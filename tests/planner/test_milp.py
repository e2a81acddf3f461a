from dataclasses import replace
from functools import cache
from itertools import count

import numpy as np
import pytest

from planner.small_problems import cheapest_by_trying, packs, small_problem
from waterline.planner.milp import choose, serve_most
from waterline.planner.problem import (
    Choice,
    Option,
    Problem,
    capacity_of,
    cost_of,
    entitled,
    merged,
    oversold,
    starts_of,
    undominated,
)

TRIED, FLEETS = 150, 300  # many more: benchmarks/more_fleets.py


def option(gpus: int = 1, rate: float = 1.0, cost: float | None = None, **keys: object) -> Option:
    known = {"model": 0, "pool": 0, "groups": (gpus,), "requests_per_s": (rate,), "start_cost": 0.0}
    return Option(**(known | {"cost": float(gpus) if cost is None else cost} | keys))  # type: ignore[arg-type]


def problem(
    *options: Option, demand: list[float] | np.ndarray, nodes: int = 1, gpus: int = 8, **keys: object
) -> Problem:
    """Return a fleet of one pool and one model, and what one tenant asks of it at each hour, or [tenant] several do."""
    asked = np.array([demand, [0.0] * len(demand)]) if isinstance(demand, list) else demand
    tenants, hours = asked.shape
    asked = asked[None]
    options = tuple(
        replace(one, requests_per_s=one.requests_per_s * (hours // len(one.requests_per_s))) for one in options
    )
    known = {
        "pools": ((nodes, gpus),),
        "options": options,
        "demand": asked,
        "value": np.ones_like(asked),
        "guarantee": np.zeros(tenants),
        "deserved": np.array([nodes * gpus] * (tenants - 1) + [np.inf]),
        "limit": np.full(tenants, np.inf),
        "hours": (1,) * hours,
    }
    return Problem(**(known | keys))  # type: ignore[arg-type]


def test_the_cheapest_option_is_taken_as_often_as_needed() -> None:
    choice = choose(problem(option(cost=3.0), option(2, 2.5, cost=4.0), demand=[6.0]))
    assert choice is not None
    assert choice.replicas.tolist() == [[1], [2]]  # 1 + 2 x 2.5 for 11, where three of the second cost 12
    assert choice.cost == choice.bound == 11.0


def test_a_replica_runs_on_when_its_start_costs_more_than_an_idle_hour() -> None:
    idle = choose(problem(option(start_cost=1.5), demand=[1.0, 0.0, 1.0]))
    stops = choose(problem(option(start_cost=0.5), demand=[1.0, 0.0, 1.0]))
    assert idle is not None
    assert stops is not None
    assert (idle.replicas.tolist(), idle.cost) == ([[1, 1, 1]], 3.0)
    assert (stops.replicas.tolist(), stops.cost) == ([[1, 0, 1]], 2.5)


def test_midnight_follows_the_last_hour() -> None:
    choice = choose(problem(option(start_cost=0.5), demand=[1.0, 0.0, 0.0, 1.0]))
    assert choice is not None
    assert starts_of(choice.replicas).tolist() == [[0, 0, 0, 1]]


def test_prefill_and_decode_count_as_much_as_the_scarcer() -> None:
    reads, writes = option(1, 4.0, role="prefill", partner="p"), option(2, 3.0, role="decode", partner="p")
    choice = choose(problem(reads, writes, demand=[6.0]))
    assert choice is not None
    assert choice.replicas.tolist() == [[2], [2]]
    assert choose(problem(reads, replace(writes, partner="q"), demand=[6.0])) is None


def test_a_tensor_group_never_spans_nodes() -> None:
    """Two nodes of three GPUs have six, but hold two groups of two."""
    assert choose(problem(option(2), demand=[2.0], nodes=2, gpus=3)) is not None
    assert choose(problem(option(2), demand=[3.0], nodes=2, gpus=3)) is None


def test_nobody_uses_more_than_its_limit() -> None:
    wide = option(4, 4.0)
    assert choose(problem(wide, demand=[1.0], limit=np.array([4.0, np.inf]))) is not None
    assert choose(problem(wide, demand=[1.0], limit=np.array([3.0, np.inf]))) is None


def test_a_guarantee_is_never_lent() -> None:
    """The second tenant asks nothing, and what it is guaranteed of eight GPUs stays free."""
    asked = np.array([[5.0], [0.0], [0.0]])
    assert choose(problem(option(), demand=asked, guarantee=np.array([0.0, 4.0, 0.0]))) is None
    assert choose(problem(option(), demand=asked, guarantee=np.array([0.0, 3.0, 0.0]))) is not None


def test_a_fleet_too_small_serves_each_tenant_what_it_deserves_before_anybody_else() -> None:
    """Eight GPUs, of which each tenant deserves half; one asks for two GPUs' worth, the other for twenty."""
    wish = problem(option(), demand=np.array([[2.0], [20.0], [0.0]]), deserved=np.array([4.0, 4.0, np.inf]))
    assert choose(wish) is None
    choice = serve_most(wish)
    assert choice.served[0, :, 0].tolist() == pytest.approx([2.0, 6.0, 0.0], abs=1e-4)
    assert choice.gpus[0, :, 0].tolist() == pytest.approx([2.0, 6.0, 0.0], abs=1e-4)


def test_what_one_tenant_pays_more_for_does_not_take_what_another_deserves() -> None:
    """Requests of the first count ten times in goodput."""
    asked = np.array([[20.0], [20.0], [0.0]])
    value = np.array([[[10.0], [1.0], [1.0]]])
    choice = serve_most(problem(option(), demand=asked, value=value, deserved=np.array([2.0, 3.0, np.inf])))
    assert choice.served[0, :, 0].tolist() == pytest.approx([5.0, 3.0, 0.0], abs=1e-4)


def test_equal_hours_are_one() -> None:
    small, period = merged(problem(option(), demand=[1.0, 1.0, 2.0, 1.0]))
    assert (small.hours, period) == ((2, 1, 1), [0, 0, 1, 2])


def test_two_small_replicas_make_a_wide_one_superfluous() -> None:
    narrow, wide = option(1, 1.0), option(2, 2.0)
    assert undominated(problem(wide, narrow, demand=[1.0]), 0.0) == [1]
    assert undominated(problem(replace(wide, requests_per_s=(2.1,)), narrow, demand=[1.0]), 0.0) == [0, 1]


def check(wish: Problem, choice: Choice) -> None:
    """Hold a choice against the problem, in the plainest way."""
    for hour in range(len(wish.hours)):
        assert packs(wish, choice.replicas[:, hour].tolist())
    assert not oversold(wish, choice.replicas).any()
    assert entitled(wish, choice.gpus)
    served = choice.served.sum(axis=1)
    assert (capacity_of(wish, choice.replicas) >= served * (1 - 1e-5) - 1e-9).all()
    assert choice.cost == pytest.approx(cost_of(wish, choice.replicas))
    gpus = np.zeros_like(choice.gpus.sum(axis=1))
    for one, replicas in zip(wish.options, choice.replicas, strict=True):
        gpus[one.model] += one.gpus * replicas
    assert choice.gpus.sum(axis=1) == pytest.approx(gpus, abs=1e-4)


def test_the_choice_costs_what_trying_everything_finds() -> None:
    """On small fleets, until `TRIED` of them could serve what is asked."""
    solved = 0
    for seed in count():
        if solved == TRIED:
            break
        wish = small_problem(seed)
        try:
            best = cheapest_by_trying(wish)
        except ValueError:
            continue
        choice = choose(wish, gap=0.0)
        assert (choice is None) == (best is None), seed
        if choice is not None:
            check(wish, choice)
            assert choice.cost == pytest.approx(best, abs=1e-6), seed
            solved += 1


@cache
def small_fleet(seed: int) -> tuple[Problem, Choice | None]:
    """Return a small fleet of shared models and what is chosen for it; solved once for all that is asked of it."""
    wish = small_problem(seed, shared=True)
    return wish, choose(wish, gap=0.0)


def test_entitlements_hold_with_shared_models_whether_the_fleet_is_large_enough_or_not() -> None:
    for seed in range(FLEETS):
        wish, choice = small_fleet(seed)
        most = serve_most(wish, gap=0.0)
        check(wish, most)
        assert (most.served <= wish.demand + 1e-9).all(), seed
        if choice is None:
            assert most.served.sum() < wish.demand.sum(), seed
        else:
            check(wish, choice)
            assert most.served == pytest.approx(wish.demand, rel=1e-5), seed
            assert most.cost >= choice.cost - 1e-6, seed  # hour by hour, where the other looks at the whole day


def more(wish: Problem, what: str) -> Problem:
    """Return a fleet that has more of something, and is otherwise the same."""
    if what == "nodes":
        return replace(wish, pools=tuple((nodes + 1, gpus) for nodes, gpus in wish.pools))
    if what == "limits":
        return replace(wish, limit=wish.limit * 1.5)
    if what == "cheaper":
        return replace(wish, options=tuple(replace(one, cost=one.cost * 0.9) for one in wish.options))
    if what == "faster":
        rates = [tuple(1.2 * rate for rate in one.requests_per_s) for one in wish.options]
        return replace(
            wish, options=tuple(map(lambda one, rate: replace(one, requests_per_s=rate), wish.options, rates))
        )
    return replace(wish, guarantee=wish.guarantee * 0.5)


@pytest.mark.parametrize(("number", "what"), list(enumerate(["nodes", "limits", "cheaper", "faster", "guarantees"])))
def test_more_of_anything_never_serves_less_nor_costs_more(number: int, what: str) -> None:
    for seed in range(number, FLEETS, 5):
        wish, before = small_fleet(seed)
        if before is None:
            continue
        after = choose(more(wish, what), gap=0.0)
        assert after is not None, seed
        assert after.cost <= before.cost + 1e-6, seed
