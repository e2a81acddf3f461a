"""Why a replica, and whose turn, of requests at the desk of a fleet; see `desks`."""

import numpy as np
from desks import NO_BLOCKS, OTHER, PAID, PUBLIC, ask, desk, end, start_next
from hypothesis import given
from hypothesis import strategies as st

from waterline.policy import admission, dispatch, why
from waterline.policy.decisions import (
    BELOW_DESERVED,
    BELOW_GUARANTEE,
    BORROWS,
    LAST_RESORT,
    NONE,
    ONLY_REPLICA,
    PREFIX_BEHIND,
    REASONS,
    SHORTEST_WAIT,
    TURNS_WHY,
)
from waterline.policy.dispatch import BOTH, NOBODY, READS, WRITES, Desk


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
    turn = admission.whose_turn(books, queue, 0)
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
    assert admission.next_in_group(queue, turn.line) == (counters[1][1] if len(counters) > 1 else NOBODY)
