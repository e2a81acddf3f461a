from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.policy.decisions import (
    FIRST_FREE,
    NO_REPLICA,
    ONLY_FREE,
    ONLY_REPLICA,
    PLACES_WHY,
    PREFIX_BEHIND,
    PREFIX_BUSY,
    PREFIX_CACHED,
    SHORTEST_WAIT,
)
from waterline.policy.routing import (
    FEW,
    HALF,
    MOST_DRAWN,
    NOBODY,
    Choice,
    choose,
    longest_prefix,
    make_ready,
    new_prefixes,
    new_ready,
    new_replicas,
    note_slots,
    remember,
    route,
)

NO_BLOCKS = np.zeros(0, np.int64)


class Router:
    """Replicas that read ten times as fast as they serve, and what they remember."""

    def __init__(self, rate: list[float], slots: int = 10**6) -> None:
        self.replicas, self.ready, self.prefixes = new_replicas(len(rate)), new_ready(1, len(rate)), new_prefixes(64)
        self.replicas.serves[:] = np.array(rate) > 0
        self.replicas.free_slots[:], self.replicas.longest_tokens[:] = slots, 10**6
        self.rate, self.backlog, self.born = (
            self.replicas.tokens_per_s,
            self.replicas.backlog_tokens,
            self.replicas.born,
        )
        self.rate[:], self.replicas.prefill_tokens_per_s[:] = rate, np.array(rate) * 10
        make_ready(self.replicas, self.ready, 0)

    def route(
        self, blocks: np.ndarray = NO_BLOCKS, draw: int = 0, prompt_tokens: int = 1000, tokens: int = 2000
    ) -> tuple[int, int, int]:
        return route(self.replicas, self.ready, self.prefixes, 0, prompt_tokens, tokens, blocks, 100, draw)

    def choose(
        self, blocks: np.ndarray = NO_BLOCKS, draw: int = 0, prompt_tokens: int = 1000, tokens: int = 2000
    ) -> Choice:
        return choose(self.replicas, self.ready, self.prefixes, 0, prompt_tokens, tokens, blocks, 100, draw)

    def take_slots(self, replica: int, slots: int) -> None:
        self.replicas.free_slots[replica] -= slots
        note_slots(self.replicas, self.ready, replica)


def test_a_few_replicas_are_all_looked_at() -> None:
    router = Router([100.0] * FEW)
    router.backlog[:] = 500
    router.backlog[5] = 100
    assert {router.route(draw=draw)[0] for draw in range(0, 10**7, 99991)} == {5}


def test_of_many_replicas_the_better_of_two_drawn_serves() -> None:
    router, dice = Router([100.0] * 1000), np.random.default_rng(1)
    router.backlog[::2] = 1e6
    chosen = [router.route(draw=int(draw))[0] for draw in dice.integers(MOST_DRAWN, size=4000)]
    assert len(set(chosen)) > 480, "all of the idle ones"
    assert np.mean(np.array(chosen) % 2 == 0) == pytest.approx(1 / 4, abs=0.03), "busy only where both draws were"


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


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40))
def test_the_table_to_draw_from_has_every_replica_as_often_as_it_is_fast(rate: list[float]) -> None:
    ready, count = Router([*rate, 0.0]).ready, len(rate)
    columns = Counter[int]()
    for place in range(count):
        columns[int(ready.replicas[place])] += int(ready.threshold[place])
        columns[int(ready.replicas[ready.alias[place]])] += HALF - int(ready.threshold[place])
    assert ready.size[0] == count
    for replica in range(count):
        assert columns[replica] / HALF == pytest.approx(rate[replica] * count / sum(rate), abs=count * 2 / HALF)


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
    router.backlog[2] = 49  # 0.49 s
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


# --- Why ------------------------------------------------------------------------------------------------------------


def test_the_shorter_of_two_queues_is_told_with_both() -> None:
    router = Router([100.0, 50.0])  # they read 1,000 tokens in 1 and 2 s
    router.backlog[:] = 300, 50
    assert router.choose() == (1, 0, SHORTEST_WAIT, 3.0, 0, 4.0, 0)
    router.backlog[:] = 0, 50
    assert router.choose() == (0, 0, SHORTEST_WAIT, 1.0, 1, 3.0, 0)


def test_of_a_few_the_runner_up_is_told_whatever_the_order() -> None:
    router = Router([100.0] * 4)
    for backlog in ([100, 200, 300, 400], [400, 300, 200, 100], [200, 400, 100, 300]):
        router.backlog[:] = backlog
        choice = router.choose()
        assert (choice.replica, choice.other) == (backlog.index(100), backlog.index(200))
        assert (choice.done_s, choice.other_s) == (2.0, 3.0)


def test_who_is_alone_is_told_as_the_only_one_in_service_or_with_a_slot() -> None:
    router = Router([100.0, 0.0])
    router.backlog[0] = 50
    assert router.choose() == (0, 0, ONLY_REPLICA, 1.5, NOBODY, np.inf, 0)
    router = Router([100.0] * 3, slots=1)
    router.take_slots(0, 1)
    router.replicas.longest_tokens[2] = 1999
    assert router.choose() == (1, 0, ONLY_FREE, 1.0, NOBODY, np.inf, 0)
    router.take_slots(1, 1)
    assert router.choose() == (NOBODY, 0, NO_REPLICA, np.inf, NOBODY, np.inf, 0)


def test_when_no_draw_meets_a_free_one_the_first_on_the_list_is_told() -> None:
    router, dice = Router([100.0] * 400, slots=1), np.random.default_rng(4)
    for replica in range(399):
        router.take_slots(replica, 1)
    router.backlog[399] = 200
    told = {router.choose(draw=int(draw)) for draw in dice.integers(MOST_DRAWN, size=300)}
    first_free, only_free = ((399, 0, rule, 3.0, NOBODY, np.inf, 0) for rule in (FIRST_FREE, ONLY_FREE))
    assert first_free in told
    assert told <= {first_free, only_free}


def test_a_prefix_is_told_with_what_it_saves_or_why_it_was_given_up() -> None:
    router, blocks = Router([100.0] * 3, slots=2), np.array([101, 102, 103, 104, 105])
    remember(router.prefixes, router.born, blocks, 2)  # 500 of 1,000 tokens: 0.5 s of reading
    assert router.choose(blocks) == (2, 500, PREFIX_CACHED, 0.5, 0, 1.0, 500)
    router.backlog[:] = 30, 10, 51
    assert router.choose(blocks) == (2, 500, PREFIX_CACHED, pytest.approx(1.01), 1, 1.1, 500)
    router.backlog[2] = 100
    assert router.choose(blocks) == (1, 0, PREFIX_BEHIND, 1.1, 2, 1.5, 500)
    router.take_slots(2, 2)
    assert router.choose(blocks) == (1, 0, PREFIX_BUSY, 1.1, 2, np.inf, 500)
    router.take_slots(2, -2)
    router.backlog[:] = 30, 10, 0
    assert router.choose(blocks) == (2, 500, PREFIX_CACHED, 0.5, 1, 1.1, 500), "it would be done first anyhow"


replicas_of_all_kinds = st.lists(
    st.tuples(
        st.sampled_from([50.0, 100.0, 400.0]),  # rate
        st.integers(0, 400),  # backlog
        st.integers(0, 2),  # free slots
        st.sampled_from([1500, 10**6]),  # the longest request
        st.booleans(),  # serves
    ),
    min_size=1,
    max_size=40,
)


@given(replicas_of_all_kinds, st.integers(0, MOST_DRAWN - 1), st.integers(0, 39), st.integers(0, 6))
def test_the_numbers_told_are_those_of_the_choice(
    fleet: list[tuple[float, int, int, int, bool]], draw: int, keeper: int, kept: int
) -> None:
    router = Router([rate for rate, *_ in fleet])
    known = router.replicas
    for replica, (_, backlog, slots, longest, serves) in enumerate(fleet):
        known.backlog_tokens[replica], known.longest_tokens[replica] = backlog, longest
        known.serves[replica], known.free_slots[replica] = serves, slots
    make_ready(known, router.ready, 0)
    blocks = np.arange(101, 107)
    remember(router.prefixes, router.born, blocks[:kept], keeper % len(fleet))
    choice = router.choose(blocks, draw)
    able = [at for at, (_, _, slots, longest, serves) in enumerate(fleet) if serves and slots and longest >= 2000]
    assert choice[:3] == router.route(blocks, draw)
    assert (choice.replica == NOBODY) == (not able) == (choice.rule == NO_REPLICA)
    if not able:
        return
    alone_s = {at: fleet[at][1] / fleet[at][0] + 1000 / (fleet[at][0] * 10) for at in range(len(fleet))}
    assert choice.replica in able
    assert choice.rule in PLACES_WHY
    assert choice.other != choice.replica
    assert (choice.rule == PREFIX_CACHED) == (choice.cached_tokens > 0)
    if choice.rule == PREFIX_CACHED:
        assert choice.replica == keeper % len(fleet)
        assert choice.done_s == pytest.approx(alone_s[choice.replica] - 100 * kept / (fleet[choice.replica][0] * 10))
    else:
        assert choice.done_s == pytest.approx(alone_s[choice.replica])
        assert (kept > 0 and keeper % len(fleet) != choice.replica) == (choice.rule in {PREFIX_BEHIND, PREFIX_BUSY})
    if choice.rule in {PREFIX_BEHIND, PREFIX_BUSY}:
        assert (choice.other, choice.kept_tokens) == (keeper % len(fleet), 100 * kept)
        assert (choice.other in able) == (choice.rule == PREFIX_BEHIND)
    elif choice.other != NOBODY:
        assert choice.other in able
        assert choice.other_s == pytest.approx(alone_s[choice.other])
    if choice.other != NOBODY:
        assert choice.done_s <= choice.other_s
    if sum(serves for *_, serves in fleet) <= FEW and choice.rule == SHORTEST_WAIT:
        first, second = sorted(alone_s[at] for at in able)[:2]
        assert (choice.done_s, choice.other_s) == pytest.approx((first, second))
