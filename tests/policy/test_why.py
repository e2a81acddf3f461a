"""Why a replica, and whose turn, of requests at the desk of a fleet; see `desks`."""

import numpy as np
import pytest
from desks import NO_BLOCKS, OTHER, PAID, PUBLIC, Router, ask, desk, end, start_next
from hypothesis import given
from hypothesis import strategies as st

from waterline.policy import admission, dispatch, why
from waterline.policy.decisions import (
    BELOW_DESERVED,
    BELOW_GUARANTEE,
    BORROWS,
    FIRST_FREE,
    LAST_RESORT,
    NO_REPLICA,
    NONE,
    ONLY_FREE,
    ONLY_REPLICA,
    PLACES_WHY,
    PREFIX_BEHIND,
    PREFIX_BUSY,
    PREFIX_CACHED,
    REASONS,
    SHORTEST_WAIT,
    TURNS_WHY,
)
from waterline.policy.dispatch import BOTH, READS, WRITES, Desk
from waterline.policy.routing import FEW, MOST_DRAWN, NOBODY, make_ready, remember
from waterline.policy.why import Choice, choose


def reasons_of(made: Desk, *, model: int = 0, waits: bool = False, blocks: np.ndarray = NO_BLOCKS) -> dict[str, int]:
    """Return why a request of 100 + 100 tokens would go where it would; what there is none of is left out."""
    reasons = np.full(len(REASONS), 77, np.int64)
    why.explain_place(made, model, 100, 200, blocks, 0, reasons)
    if waits:
        why.explain_turn(made, model, reasons)
    return {name: value for name, value in zip(REASONS, reasons.tolist(), strict=True) if value != NONE}


def test_a_replica_is_explained_in_milliseconds_and_nothing_changes() -> None:
    made = desk(*[(0, BOTH)] * 2, slots=2)
    ask(made, PUBLIC)
    before = [array.tobytes() for part in made for array in part]
    assert reasons_of(made) == {"why": SHORTEST_WAIT, "done_ms": 100, "other": 0, "other_ms": 2100}
    assert [array.tobytes() for part in made for array in part] == before
    assert ask(made, PUBLIC).replica == 1


def test_what_is_kept_of_a_prompt_is_explained_too() -> None:
    made, blocks = desk(*[(0, BOTH)] * 2, slots=2), np.array([7, 8], np.int64)
    made.models.block_tokens[0] = 40
    ask(made, PUBLIC, blocks=blocks)
    assert reasons_of(made, blocks=blocks) == {
        "why": PREFIX_BEHIND, "done_ms": 100, "other": 0, "other_ms": 2020, "cached": 80,
    }  # fmt: skip


def test_a_turn_is_explained_by_the_tenants_first_then_by_their_clients() -> None:
    made = desk((0, BOTH))
    for client in (PUBLIC, PUBLIC, OTHER, PAID):
        ask(made, client)
    end(made, 0, PUBLIC)
    had_gpu_s = made.accounts.memory_s[0]  # a GPU, in service for so long: half of that is what each tenant deserves
    made.accounts.used_gpu_s[:] = had_gpu_s / 8, had_gpu_s / 2
    assert dispatch.next_turn(made, 0) == (PAID, BELOW_GUARANTEE)
    place = {"why": ONLY_REPLICA, "done_ms": 100}
    assert reasons_of(made) == place
    assert reasons_of(made, waits=True) == place | {
        "turn": BELOW_GUARANTEE, "used_ppm": 250_000, "counter_ms": 0,
        "next_tenant": 1, "next_turn": BORROWS, "next_ppm": 1_000_000,
    }  # fmt: skip
    start_next(made)
    end(made, 0, PAID)
    assert dispatch.next_turn(made, 0) == (OTHER, BORROWS)
    assert reasons_of(made, waits=True) == place | {
        "turn": BORROWS, "used_ppm": 1_000_000, "counter_ms": 0, "next_claimant": PUBLIC, "next_counter_ms": 2000,
    }  # fmt: skip
    start_next(made)
    end(made, 0, OTHER)
    assert reasons_of(made, waits=True)["counter_ms"] == 2000
    assert "next_claimant" not in reasons_of(made, waits=True)


def test_who_is_at_its_limit_is_nobody_s_rival() -> None:
    made = desk((0, BOTH))
    for client in (PUBLIC, PUBLIC, PAID):
        ask(made, client)
    end(made, 0, PUBLIC)
    made.accounts.limit[0], made.accounts.used_gpu_s[0] = 0.9, 1e6
    told = reasons_of(made, waits=True)
    assert told["turn"] == BELOW_DESERVED
    assert "next_tenant" not in told
    made.accounts.limit[1], made.accounts.used_gpu_s[1] = 0.9, 1e6
    assert "turn" not in reasons_of(made, waits=True), "it is nobody's"


def test_nobody_else_is_there_to_take_over_is_explained() -> None:
    made, reasons = desk((0, READS), (0, WRITES)), np.zeros(len(REASONS), np.int64)
    assert dispatch.take_over(made, 0, 100, 200, 0) == 1
    why.explain_last_resort(made, 1, reasons)
    assert reasons.tolist() == [LAST_RESORT, 1000, *[NONE] * (len(REASONS) - 2)]


shares = st.tuples(st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.0, 0.3, 0.5]), st.sampled_from([0.6, 1.0]))


@given(st.lists(shares, min_size=3, max_size=3), st.lists(st.tuples(st.integers(0, 8), st.floats(0, 200)), max_size=40))
def test_whose_turn_it_is_has_the_smaller_numbers(
    of_tenants: list[tuple[float, float, float]], events: list[tuple[int, float]]
) -> None:
    guarantee, deserved, limit = zip(*of_tenants, strict=True)
    books = admission.new_accounts(guarantee, deserved, limit, 4.0)
    queue = admission.new_queue(3, [client % 3 for client in range(9)])
    for client, gpu_s in events:
        admission.enter(queue, client, 0, 1.0)
        admission.settle(books, queue, client, gpu_s)
    turn = why.whose_turn(books, queue, 0)
    assert turn[:2] == admission.next_line(books, queue, 0)
    if turn.line == NOBODY:
        assert turn.other == NOBODY
        return
    waiting = [line for line in range(9) if queue.waiting[line]]
    tenant = int(queue.tenant[turn.line])
    assert {tenant, turn.other} - {NOBODY} <= {line % 3 for line in waiting}
    assert turn.other != tenant
    assert turn.rule in TURNS_WHY
    if turn.other != NOBODY:
        assert (TURNS_WHY.index(turn.rule), turn.used) <= (TURNS_WHY.index(turn.other_rule), turn.other_used)
    else:
        rivals = {line % 3 for line in waiting} - {tenant}
        assert all(limit[one] < 1 and admission.share_of(books, one) >= limit[one] for one in rivals)
    counters = sorted((queue.counter_gpu_s[line], line) for line in waiting if line % 3 == tenant)
    assert turn.line == counters[0][1]
    assert why.next_in_group(queue, turn.line) == (counters[1][1] if len(counters) > 1 else NOBODY)


# --- Why that replica -----------------------------------------------------------------------------------------------


def chosen(router: Router, blocks: np.ndarray = NO_BLOCKS, draw: int = 0) -> Choice:
    return choose(router.replicas, router.ready, router.prefixes, 0, 1000, 2000, blocks, 100, draw)


def test_the_shorter_of_two_queues_is_told_with_both() -> None:
    router = Router([100.0, 50.0])  # they read 1,000 tokens in 1 and 2 s
    router.backlog[:] = 300, 50
    assert chosen(router) == (1, 0, SHORTEST_WAIT, 3.0, 0, 4.0, 0)
    router.backlog[:] = 0, 50
    assert chosen(router) == (0, 0, SHORTEST_WAIT, 1.0, 1, 3.0, 0)


def test_of_a_few_the_runner_up_is_told_whatever_the_order() -> None:
    router = Router([100.0] * 4)
    for backlog in ([100, 200, 300, 400], [400, 300, 200, 100], [200, 400, 100, 300]):
        router.backlog[:] = backlog
        choice = chosen(router)
        assert (choice.replica, choice.other) == (backlog.index(100), backlog.index(200))
        assert (choice.done_s, choice.other_s) == (2.0, 3.0)


def test_who_is_alone_is_told_as_the_only_one_in_service_or_with_a_slot() -> None:
    router = Router([100.0, 0.0])
    router.backlog[0] = 50
    assert chosen(router) == (0, 0, ONLY_REPLICA, 1.5, NOBODY, np.inf, 0)
    router = Router([100.0] * 3, slots=1)
    router.take_slots(0, 1)
    router.replicas.longest_tokens[2] = 1999
    assert chosen(router) == (1, 0, ONLY_FREE, 1.0, NOBODY, np.inf, 0)
    router.take_slots(1, 1)
    assert chosen(router) == (NOBODY, 0, NO_REPLICA, np.inf, NOBODY, np.inf, 0)


def test_when_no_draw_meets_a_free_one_the_first_on_the_list_is_told() -> None:
    router, dice = Router([100.0] * 400, slots=1), np.random.default_rng(4)
    for replica in range(399):
        router.take_slots(replica, 1)
    router.backlog[399] = 200
    told = {chosen(router, draw=int(draw)) for draw in dice.integers(MOST_DRAWN, size=300)}
    first_free, only_free = ((399, 0, rule, 3.0, NOBODY, np.inf, 0) for rule in (FIRST_FREE, ONLY_FREE))
    assert first_free in told
    assert told <= {first_free, only_free}


def test_a_prefix_is_told_with_what_it_saves_or_why_it_was_given_up() -> None:
    router, blocks = Router([100.0] * 3, slots=2), np.array([101, 102, 103, 104, 105])
    remember(router.prefixes, router.born, blocks, 2)  # 500 of 1,000 tokens: 0.5 s of reading
    assert chosen(router, blocks) == (2, 500, PREFIX_CACHED, 0.5, 0, 1.0, 500)
    router.backlog[:] = 30, 10, 51
    assert chosen(router, blocks) == (2, 500, PREFIX_CACHED, pytest.approx(1.01), 1, 1.1, 500)
    router.backlog[2] = 100
    assert chosen(router, blocks) == (1, 0, PREFIX_BEHIND, 1.1, 2, 1.5, 500)
    router.take_slots(2, 2)
    assert chosen(router, blocks) == (1, 0, PREFIX_BUSY, 1.1, 2, np.inf, 500)
    router.take_slots(2, -2)
    router.backlog[:] = 30, 10, 0
    assert chosen(router, blocks) == (2, 500, PREFIX_CACHED, 0.5, 1, 1.1, 500), "it would be done first anyhow"


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
    choice = chosen(router, blocks, draw)
    able = [at for at, (_, _, slots, longest, serves) in enumerate(fleet) if serves and slots and longest >= 2000]
    replica, cached_tokens, rule = router.route(blocks, draw)
    assert (choice.replica, choice.cached_tokens) == (replica, cached_tokens), "what is told is what is done"
    assert (choice.rule in {PREFIX_CACHED, NO_REPLICA}) == (choice.rule == rule != SHORTEST_WAIT)
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
