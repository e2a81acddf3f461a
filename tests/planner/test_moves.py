"""Hour to hour a plan moves only what pays."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.small_problems import small_problem
from planner.test_milp import option, problem
from waterline.planner.milp import choose
from waterline.planner.moves import settled
from waterline.planner.problem import SLACK, capacity_of, cost_of, oversold, rather_whole


def test_one_layout_is_not_swapped_for_another_that_is_no_cheaper() -> None:
    """Two of one GPU serve as much as one of two and cost the same: a swap would bring nothing but starts."""
    wish = problem(option(start_cost=0.01), option(2, 2.0, start_cost=0.02), demand=[2.0, 2.0, 2.0])
    swapped = np.array([[2, 0, 2], [0, 1, 0]])
    kept = settled(wish, swapped)
    assert cost_of(wish, swapped) > cost_of(wish, kept) == 6.0
    assert (kept == kept[:, :1]).all()


def test_a_start_that_saves_more_than_it_costs_stays() -> None:
    wish = problem(option(start_cost=0.5), demand=[2.0, 1.0, 1.0])
    day = np.array([[2, 1, 1]])
    assert settled(wish, day).tolist() == [[2, 1, 1]]  # an hour of rest saves 1 and costs 0.5
    dear = problem(option(start_cost=2.5), demand=[2.0, 1.0, 1.0])
    assert settled(dear, day).tolist() == [[2, 2, 2]]  # two hours save 2 and cost 2.5


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6))
def test_fewer_moves_cost_no_more_and_serve_as_much(seed: int) -> None:
    wish = small_problem(seed)
    choice = choose(wish, gap=0.2)
    if choice is None:
        return
    asked = wish.total
    for replicas in (choice.replicas, settled(wish, choice.replicas)):
        assert (capacity_of(wish, replicas) >= asked * (1 - SLACK)).all()
        assert not oversold(wish, replicas).any()
    assert cost_of(wish, settled(wish, choice.replicas)) <= cost_of(wish, choice.replicas) + 1e-9


def test_what_is_saved_by_a_split_must_be_worth_it() -> None:
    """A split 1 % cheaper is not taken, and one 10 % cheaper is."""
    for saved, split in ((0.01, False), (0.10, True)):
        sides = [
            option(2, 1.0, cost=1 - saved, role="prefill", partner="p"),
            option(2, 1.0, cost=1 - saved, role="decode", partner="p"),
        ]
        choice = choose(rather_whole(problem(option(4, 1.0, cost=2.0), *sides, demand=[1.0])))
        assert choice is not None
        assert choice.replicas[1:].any() == split
