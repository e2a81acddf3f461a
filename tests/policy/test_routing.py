from collections import Counter

import numpy as np
import pytest
from desks import Router
from hypothesis import given
from hypothesis import strategies as st

from waterline.policy.decisions import NO_REPLICA, PREFIX_CACHED, SHORTEST_WAIT
from waterline.policy.routing import (
    FEW,
    HALF,
    MOST_DRAWN,
    NOBODY,
    Ready,
    lines,
    longest_prefix,
    make_ready,
    new_prefixes,
    new_ready,
    new_replicas,
    ready_at,
    remember,
)

NO_BLOCKS = np.zeros(0, np.int64)


def test_a_few_replicas_are_all_looked_at() -> None:
    router = Router([100.0] * FEW)
    for shortest in range(FEW):
        router.backlog[:] = 500
        router.backlog[shortest] = 100
        assert {router.route(draw=draw)[0] for draw in range(0, 10**7, 999983)} == {shortest}


def test_of_many_replicas_the_better_of_two_drawn_serves() -> None:
    router, dice = Router([100.0] * 1000), np.random.default_rng(1)
    router.backlog[::2] = 1e6
    chosen = [router.route(draw=int(draw))[0] for draw in dice.integers(MOST_DRAWN, size=4000)]
    assert len(set(chosen)) > 480, "all of the idle ones"
    assert np.mean(np.array(chosen) % 2 == 0) == pytest.approx(1 / 4, abs=0.03), "busy only where both draws were"


def test_of_two_that_would_be_done_together_the_first_in_the_fleet_serves() -> None:
    router = Router([100.0] * 16)
    draw_of = lambda one, other: (one << 27) | (other << 58)  # noqa: E731 - a sixteenth of half a draw, each
    assert [router.route(draw=draw_of(3, 9))[0], router.route(draw=draw_of(9, 3))[0]] == [3, 3]
    router.backlog[3] = 1
    assert [router.route(draw=draw_of(3, 9))[0], router.route(draw=draw_of(9, 3))[0]] == [9, 9]


def test_two_choices_keep_the_longest_queue_short() -> None:
    """Of a thousand balls in a thousand bins, one choice puts 5 to 7 into the fullest, two put 3 (Azar et al. 1994)."""
    router, dice = Router([100.0] * 1000), np.random.default_rng(2)
    for draw in dice.integers(MOST_DRAWN, size=1000):
        router.backlog[router.route(draw=int(draw))[0]] += 1
    assert router.backlog.max() <= 4


def test_replicas_are_drawn_as_often_as_they_are_fast() -> None:
    """Otherwise nine slow replicas of ten are both drawn too often for what they can do."""
    router, dice = Router([10.0] * 90 + [1000.0] * 10), np.random.default_rng(3)
    for draw in dice.integers(MOST_DRAWN, size=20_000):
        router.backlog[router.route(draw=int(draw), prompt_tokens=1)[0]] += 1
    done_s = router.backlog / router.rate
    fair_s = 20_000 / router.rate.sum()
    assert done_s.max() < 1.5 * fair_s
    assert done_s[90:].min() > 0.8 * fair_s
    assert done_s[:90].mean() > 0.8 * fair_s


def two_pools(rate: list[float]) -> Ready:
    """Return the tables of two pools, a replica of each speed in both: those of the second have odd numbers."""
    replicas, ready = new_replicas(2 * len(rate)), new_ready(2, 2 * len(rate))
    replicas.pool[:], replicas.free_slots[:] = [0, 1] * len(rate), 1
    replicas.tokens_per_s[:] = np.repeat(rate, 2)
    replicas.serves[:] = replicas.tokens_per_s > 0
    for pool in (0, 1, 0, 1):  # again, as whenever a replica comes or goes
        make_ready(replicas, ready, pool)
    return ready


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40))
def test_the_tables_to_draw_from_have_every_replica_of_the_pool_as_often_as_it_is_fast(rate: list[float]) -> None:
    ready, count = two_pools([*rate, 0.0]), len(rate)
    for pool, first in enumerate((0, len(ready.place))):
        columns = Counter[int]()
        for place in range(first, first + count):
            columns[int(ready.replicas[place])] += int(ready.threshold[place])
            columns[int(ready.replicas[first + ready.alias[place]])] += HALF - int(ready.threshold[place])
        assert sorted(columns) == list(range(pool, 2 * count, 2))
        for replica in range(count):
            fair = rate[replica] * count / sum(rate)
            assert columns[2 * replica + pool] / HALF == pytest.approx(fair, abs=count * 2 / HALF)
        assert ready.size[pool] == ready.frees[pool] == count
        assert ready.free[first : first + count].tolist() == list(range(pool, 2 * count, 2))


def test_half_a_draw_points_to_each_replica_of_its_pool_as_often_as_it_is_fast() -> None:
    ready, first = two_pools([1.0, 1.0, 6.0, 1.0, 3.0]), 10
    drawn = Counter(int(ready.replicas[first + ready_at(ready, first, 5, d)]) for d in range(0, HALF, HALF >> 10))
    assert {replica: round(12 * times / 1024, 1) for replica, times in drawn.items()} == {1: 1, 3: 1, 5: 6, 7: 1, 9: 3}


@pytest.mark.parametrize("count", [4, 60])
def test_full_draining_and_short_replicas_are_never_chosen_whatever_is_drawn(count: int) -> None:
    router, dice = Router([100.0] * count, slots=3), np.random.default_rng(4)
    for replica in range(count - 1):
        if replica % 3 == 0:
            router.take_slots(replica, 3)
        elif replica % 3 == 1:
            router.replicas.serves[replica] = 0
        else:
            router.replicas.longest_tokens[replica] = 1999
    router.replicas.longest_tokens[count - 1] = 2000  # just as many as the request may come to
    blocks = np.array([11, 12, 13])
    remember(router.prefixes, router.born, blocks, 0)
    chosen = {router.route(blocks, draw=int(draw))[0] for draw in dice.integers(MOST_DRAWN, size=200)}
    assert chosen == {count - 1}
    router.take_slots(count - 1, 3)
    assert router.route(blocks) == (NOBODY, 0, NO_REPLICA)
    router.take_slots(count - 1, -1)
    assert router.route(blocks)[0] == count - 1


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(-2, 2)), max_size=60))
def test_the_list_of_free_replicas_is_right_whatever_happens(events: list[tuple[int, int]]) -> None:
    router = Router([100.0] * 12, slots=2)
    for replica, slots in events:
        if slots == 0:
            router.replicas.serves[replica] ^= 1
        router.take_slots(replica, slots)
        free = router.ready.free[: router.ready.frees[0]].tolist()
        replicas = router.replicas
        assert sorted(free) == [one for one in range(12) if replicas.serves[one] and replicas.free_slots[one] > 0]
        assert [int(router.ready.place[one]) for one in free] == list(range(len(free)))


def test_who_has_read_the_beginning_of_a_prompt_reads_the_rest() -> None:
    router = Router([100.0] * 4)
    conversation = np.array([101, 102, 103, 104, 105])
    remember(router.prefixes, router.born, conversation[:3], 2)
    assert router.route(conversation) == (2, 300, PREFIX_CACHED)
    assert router.route(np.array([101, 999])) == (2, 100, PREFIX_CACHED)
    assert router.route(np.array([201, 202])) == (0, 0, SHORTEST_WAIT)


def test_a_queue_that_costs_more_than_the_prefix_saves_is_avoided() -> None:
    router, blocks = Router([100.0] * 4), np.array([101, 102, 103, 104, 105])
    remember(router.prefixes, router.born, blocks, 2)  # saves 500 tokens of reading at 1000 a second
    router.backlog[2] = 50  # 0.5 s: the same
    assert router.route(blocks)[0] == 2
    router.backlog[2] = 51
    assert router.route(blocks)[0] == 0


def test_the_last_token_of_a_prompt_is_read_again() -> None:
    router, blocks = Router([100.0] * 2), np.array([101, 102])
    remember(router.prefixes, router.born, blocks, 1)
    assert router.route(blocks, prompt_tokens=200) == (1, 199, PREFIX_CACHED)


def test_a_replica_that_was_started_again_has_forgotten() -> None:
    router, blocks = Router([100.0] * 4), np.array([101, 102])
    remember(router.prefixes, router.born, blocks, 2)
    router.born[2] += 1
    assert router.route(blocks) == (0, 0, SHORTEST_WAIT)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), max_size=60), st.integers(0, 3), st.integers(1, 20))
def test_a_prefix_that_is_found_has_been_read_by_that_replica(
    read: list[tuple[int, int]], story: int, length: int
) -> None:
    prefixes, born = new_prefixes(16), np.zeros(5, np.int64)  # far too small for all of them
    blocks_of = lambda story, length: np.arange(1, length + 1, dtype=np.int64) * 1009 + story * 2**40  # noqa: E731
    for number, (which, until) in enumerate(read):
        remember(prefixes, born, blocks_of(which, until), number % 5)
    keeper, tokens = longest_prefix(prefixes, born, blocks_of(story, length), 10)
    assert (keeper == NOBODY) == (tokens == 0)
    if keeper != NOBODY:
        longest = max((u for n, (s, u) in enumerate(read) if s == story and n % 5 == keeper), default=0)
        assert tokens <= 10 * min(longest, length)


def test_choices_depend_on_nothing_but_what_is_shown() -> None:
    first, second = Router([100.0] * 500), Router([100.0] * 500)
    draws = np.random.default_rng(9).integers(MOST_DRAWN, size=300)
    assert [first.route(draw=int(d)) for d in draws] == [second.route(draw=int(d)) for d in draws]


def test_a_prompt_is_not_sent_to_who_has_read_it_for_another_model() -> None:
    router, blocks = Router([100.0] * 4), np.array([101, 102])
    remember(router.prefixes, router.born, blocks, 2)
    router.replicas.pool[2] = 1
    make_ready(router.replicas, router.ready, 0)
    assert router.route(blocks) == (0, 0, SHORTEST_WAIT)


def test_a_table_of_prompts_has_as_many_places_as_the_next_power_of_two() -> None:
    assert [len(new_prefixes(places).key) for places in (1, 2, 16, 17)] == [1, 2, 16, 32]


def test_to_look_at_a_replica_costs_one_line_of_the_cache() -> None:
    kept = [lines(count) for count in range(1, 40)]  # each lies elsewhere
    assert {one.ctypes.data % 64 for one in kept} == {0}
    assert {one.strides[0] for one in kept} == {64}


def test_a_fleet_of_one_replica_has_arrays_of_the_same_kind_as_any_other() -> None:
    """Compiled code tells columns, whose numbers lie apart, from arrays: of a single row they would seem to be those."""
    assert not any(one[:, 0].flags.contiguous for one in (lines(1), lines(2)))
    assert not any(one.replicas.flags.contiguous for one in (new_ready(1, 1), new_ready(1, 2)))
