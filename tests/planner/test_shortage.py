"""Remedies are remedies, and what is said to be enough is the least that is."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.small_problems import small_problem
from waterline.planner.problem import with_limits, with_nodes
from waterline.planner.shortage import MOST_TIMES_LARGER, does, fewest_nodes, lowest_limit, share_text


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_every_remedy_offered_makes_the_fleet_large_enough(seed: int) -> None:
    wish = small_problem(seed, shared=True)
    if does(wish):
        return
    for pool, (nodes, _) in enumerate(wish.pools):
        more = fewest_nodes(wish, pool)
        if more is None:
            assert not does(with_nodes(wish, pool, MOST_TIMES_LARGER * nodes))
        else:
            assert does(with_nodes(wish, pool, more))
            assert more == 1 or not does(with_nodes(wish, pool, more - 1))
    limit = lowest_limit(wish, [0, 1])
    if limit is not None:
        assert does(with_limits(wish, [0, 1], limit))


def test_shares_of_the_fleet_grow_with_it() -> None:
    wish = small_problem(1, shared=True)
    grown = with_nodes(wish, 0, 3)
    assert np.allclose(grown.limit[:-1] / grown.fleet_gpus, wish.limit[:-1] / wish.fleet_gpus)
    assert grown.pools[0][0] == wish.pools[0][0] + 3


def test_a_limit_of_whole_hundredths_is_offered_as_it_is_and_others_rounded_up() -> None:
    offered = [share_text(hundredth * 8 / 100, 8) for hundredth in range(1, 101)]
    assert offered == [f"{hundredth / 100:.2f}" for hundredth in range(1, 101)]
    assert [share_text(hundredth * (8 / 100), 8) for hundredth in (7, 28, 57)] == ["0.07", "0.28", "0.57"]
    assert share_text(1.0, 24) == "0.05"
