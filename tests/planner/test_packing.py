import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.small_problems import packs
from waterline.planner.packing import pack, stacked
from waterline.planner.problem import Option, Problem, oversold


def test_replicas_are_stacked_so_that_nobody_starts_while_another_stops() -> None:
    assert stacked([2, 2, 0, 3, 1]) == [((0, 1, 3, 4), 1), ((0, 1, 3), 1), ((3,), 1)]


def test_small_replicas_fill_a_node_before_they_open_the_next() -> None:
    placed = pack([(2, 4)], [(0, (2,))], np.array([[3]]))
    assert [(one.places[0].node, one.places[0].gpus) for one in placed] == [(0, (0, 1)), (0, (2, 3)), (1, (0, 1))]


def test_larger_groups_go_first_and_smaller_ones_leave_whole_nodes_free() -> None:
    placed = pack([(3, 4)], [(0, (1,)), (0, (2,)), (0, (4,))], np.array([[1], [1], [1]]))
    assert [one.places[0].node for one in placed] == [1, 1, 0]


def test_the_stages_of_a_pipeline_take_a_group_each() -> None:
    (one,) = pack([(3, 4)], [(0, (4, 4))], np.array([[1]]))
    assert [place.node for place in one.places] == [0, 1]


def test_two_replicas_have_the_same_gpus_at_different_hours() -> None:
    day, night = pack([(1, 2)], [(0, (2,)), (0, (2,))], np.array([[1, 0, 1], [0, 1, 0]]))
    assert day.places == night.places
    assert (day.hours, night.hours) == ((0, 2), (1,))


def test_a_replica_without_a_place_for_all_its_hours_moves_once() -> None:
    """Two GPUs; one is taken at hour 0, the other at hour 1, and a third replica wants both hours."""
    placed = pack([(1, 2)], [(0, (1,)), (0, (1,)), (0, (1,))], np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]]))
    assert sorted(hour for one in placed for hour in one.hours) == [0, 0, 1, 1, 2, 2]
    assert len(placed) == 4


SIZES = st.sampled_from([1, 2, 4, 8])


@given(
    nodes=st.integers(1, 3),
    gpus=st.sampled_from([1, 2, 3, 4, 6, 8]),
    wanted=st.lists(
        st.tuples(SIZES, st.integers(1, 2), st.lists(st.integers(0, 3), min_size=3, max_size=3)), min_size=1, max_size=5
    ),
)
def test_what_the_slots_of_a_pool_allow_is_placed_and_nothing_overlaps(
    nodes: int, gpus: int, wanted: list[tuple[int, int, list[int]]]
) -> None:
    """Counting slots says yes exactly when trying every placement does, and then packing finds one for every hour."""
    wanted = [(min(size, gpus), parts, counts) for size, parts, counts in wanted if size <= gpus or gpus in (3, 6)]
    wanted = [(size, parts if size == gpus else 1, counts) for size, parts, counts in wanted]
    if not wanted:
        return
    options = tuple(
        Option(model=0, pool=0, groups=(size,) * parts, requests_per_s=(1.0,) * 3, cost=1.0, start_cost=0.0)
        for size, parts, _ in wanted
    )
    nobody = np.zeros((1, 1, 3))
    problem = Problem(
        pools=((nodes, gpus),), options=options, demand=nobody, value=nobody, guarantee=nobody[0, 0, :1],
        deserved=nobody[0, 0, :1], limit=nobody[0, 0, :1], hours=(1, 1, 1),
    )  # fmt: skip
    replicas = np.array([counts for _, _, counts in wanted])
    over = oversold(problem, replicas)
    assert [not packs(problem, tuple(replicas[:, hour].tolist())) for hour in range(3)] == over.tolist()
    replicas[:, over] = 0
    placed = pack(problem.pools, [(0, option.groups) for option in options], replicas)
    serving = np.zeros_like(replicas)
    taken = set()
    for one in placed:
        serving[one.option, list(one.hours)] += 1
        assert [len(place.gpus) for place in one.places] == list(options[one.option].groups)
        for place in one.places:
            assert place.node < nodes
            assert max(place.gpus) < gpus
            for gpu in place.gpus:
                for hour in one.hours:
                    assert (place.node, gpu, hour) not in taken
                    taken.add((place.node, gpu, hour))
    assert (serving == replicas).all()


def test_no_size_divides_its_way_around_the_count() -> None:
    """A node of six holds one group of four and one of two, not two of four."""
    assert pytest.approx(1) == 6 // 4
