"""Requests through the desk of a fleet: two tenants, the first guaranteed a half; replicas of one GPU.

A replica of these serves 100 tokens a second with all its slots taken, so a request of 100 + 100 tokens costs 2
GPU-seconds, and reads 1,000 tokens a second.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.policy import admission, dispatch
from waterline.policy.admission import CAUTION
from waterline.policy.decisions import (
    BELOW_DESERVED,
    BELOW_GUARANTEE,
    BORROWS,
    LAST_RESORT,
    NO_REPLICA,
    NONE,
    NOT_SERVED,
    ONLY_REPLICA,
    PREFIX_BEHIND,
    REASONS,
    SHORTEST_WAIT,
    SLOT_FREE,
    TOO_LATE,
    TOO_LONG,
    TURNS_WHY,
    WAITS_FOR_SLOT,
)
from waterline.policy.dispatch import BOTH, NOBODY, READS, WRITES, Arrival, Desk

NO_BLOCKS = np.zeros(0, np.int64)
PAID, PUBLIC, OTHER = 0, 1, 2  # clients; the first is of the tenant with a guarantee


def desk(*rows: tuple[int, int], models: int = 1, slots: int = 1, ready: bool = True) -> Desk:
    """Return a desk with a replica for each (model, role)."""
    made = dispatch.new_desk([0.5, 0.0], [0.5, 0.5], [1.0, 1.0], [0, 1, 1], models=models, rows=len(rows))
    for row, (model, role) in enumerate(rows):
        rates = {"tokens_per_s": 100.0, "prefill_tokens_per_s": 1000.0}
        dispatch.put(made, row, model, role=role, gpus=1.0, slots=slots, longest_tokens=1000, **rates)
    dispatch.set_in_service(made, range(len(rows)), serves=ready)
    return made


def ask(
    made: Desk, client: int, *, model: int = 0, tokens: int = 200, ttft_s: float = 60.0, blocks: np.ndarray = NO_BLOCKS
) -> Arrival:
    return dispatch.arrive(made, model, client, tokens - 100, 0, 100, tokens, ttft_s, blocks, 0)


def start_next(made: Desk, model: int = 0) -> tuple[int, int, int]:
    """Return client, rule and replica of the next start of a request of 100 + 100 tokens."""
    client, rule = dispatch.next_turn(made, model)
    if client == NOBODY:
        return NOBODY, rule, NOBODY
    return client, rule, dispatch.start(made, model, client, 100, 0, 100, 200, 2.0, NO_BLOCKS, 0)[0]


def end(made: Desk, replica: int, client: int, *, model: int = 0, gpu_s: float = 2.0) -> None:
    dispatch.first_token(made, model, replica, 100, 100)
    dispatch.ended(made, model, replica, client, 100, gpu_s - 2.0)


def test_a_request_starts_while_there_is_a_slot_and_then_waits_at_the_desk() -> None:
    made = desk((0, BOTH), (0, BOTH))
    first, second, third = (ask(made, PUBLIC) for _ in range(3))
    assert (first.rule, first.replica, first.gpu_s) == (SLOT_FREE, 0, pytest.approx(2.0))
    assert (second.rule, second.replica) == (SLOT_FREE, 1), "the idle one"
    assert (third.rule, third.replica) == (WAITS_FOR_SLOT, NOBODY)
    assert dispatch.next_turn(made, 0) == (NOBODY, NO_REPLICA), "no slot has come free"
    end(made, 1, PUBLIC)
    assert start_next(made) == (PUBLIC, BELOW_DESERVED, 1)
    assert dispatch.next_turn(made, 0)[0] == NOBODY


def test_a_replica_without_a_slot_gets_nothing_though_it_would_be_done_first() -> None:
    made = desk((0, BOTH), (0, BOTH))
    made.replicas.tokens_per_s[0] = made.replicas.prefill_tokens_per_s[0] = 1e9
    assert [ask(made, PUBLIC).replica for _ in range(2)] == [0, 1]


def test_whose_turn_it_is_depends_on_the_tenant_then_on_the_client() -> None:
    made = desk((0, BOTH))
    for client in (PUBLIC, PUBLIC, PUBLIC, OTHER, PAID):
        ask(made, client)
    made.accounts.used_gpu_s[1] = 100.0
    turns = []
    for _ in range(4):
        end(made, 0, PUBLIC)
        turns.append(start_next(made)[:2])
    assert turns == [(PAID, BELOW_GUARANTEE), (OTHER, BORROWS), (PUBLIC, BORROWS), (PUBLIC, BORROWS)]


def test_accounts_are_of_the_fleet_and_queues_of_a_model() -> None:
    made = desk((0, BOTH), (1, BOTH), models=2)
    assert made.accounts.gpus[0] == 2.0
    assert [ask(made, PUBLIC, model=0).rule for _ in range(3)] == [SLOT_FREE, WAITS_FOR_SLOT, WAITS_FOR_SLOT]
    assert ask(made, PUBLIC, model=1).rule == SLOT_FREE, "nobody waits for that one"
    assert made.accounts.used_gpu_s[1] == pytest.approx(4.0), "what waits is not charged yet"
    end(made, 0, PUBLIC, gpu_s=3.5)
    assert made.accounts.used_gpu_s[1] == pytest.approx(5.5)
    assert made.queue.model_waiting.tolist() == [2, 0]


def test_who_cannot_start_in_time_is_told_when_it_could() -> None:
    made = desk((0, BOTH))
    answers = [ask(made, PUBLIC, ttft_s=5.1) for _ in range(6)]  # 0.1 s to read the prompt; 2 s each
    assert [one.rule for one in answers] == [SLOT_FREE, *[WAITS_FOR_SLOT] * 2, *[TOO_LATE] * 3]
    first_s = 4 - CAUTION * 4.9
    told_s = [first_s, first_s + 4, first_s + 8]  # one after the other: every second turn is for those who come back
    assert [one.seconds for one in answers] == pytest.approx([0.0, 0.1, 2.1, *told_s])
    end(made, 0, PUBLIC)
    assert start_next(made)[2] == 0
    assert ask(made, PUBLIC, ttft_s=5.1).rule == WAITS_FOR_SLOT, "2 s later"


def test_what_nobody_can_hold_is_too_long_and_what_nobody_in_service_can_is_not_served() -> None:
    made = desk((0, BOTH))
    assert ask(made, PUBLIC, tokens=1001).rule == TOO_LONG
    dispatch.set_in_service(made, [0], serves=False)
    assert ask(made, PUBLIC, tokens=1001).rule == TOO_LONG
    refused = ask(made, PUBLIC, ttft_s=5.0)
    assert (refused.rule, refused.seconds) == (NOT_SERVED, 5.0)
    assert made.accounts.gpus[0] == 0.0


def test_where_nobody_serves_a_request_waits_for_who_is_expected_in_time() -> None:
    made = desk((0, BOTH), ready=False)

    def ask_ahead(ready_in_s: float) -> Arrival:  # its prompt takes 0.1 s to read, so it may wait 5 s
        return dispatch.arrive_ahead(made, 0, PUBLIC, 100, 2.0, ready_in_s, 1.0, 1000.0, 5.1)

    for ready_in_s in (5.01, float("inf")):
        refused = ask_ahead(ready_in_s)
        assert (refused.rule, refused.seconds) == (NOT_SERVED, ready_in_s)
    assert (ask_ahead(5.0).rule, ask_ahead(2.0).rule) == (WAITS_FOR_SLOT, WAITS_FOR_SLOT)
    late = ask_ahead(2.0)
    assert (late.rule, late.seconds) == (TOO_LATE, pytest.approx(4 - CAUTION * 3)), "4 GPU-seconds wait before it"
    for now_s in range(1, 61):
        dispatch.tick(made, float(now_s))
    assert ask_ahead(0.0).seconds == pytest.approx(4 - CAUTION * 5 + 4.0), "a minute without anybody is no slow pace"
    dispatch.set_in_service(made, [0], serves=True)
    assert start_next(made) == (PUBLIC, BELOW_DESERVED, 0)


def test_a_replica_that_drains_gets_nothing_and_one_that_comes_gets_who_waits() -> None:
    made = desk((0, BOTH), (0, BOTH), ready=False)
    dispatch.set_in_service(made, [0], serves=True)
    assert [ask(made, PUBLIC).rule for _ in range(2)] == [SLOT_FREE, WAITS_FOR_SLOT]
    dispatch.set_in_service(made, [0], serves=False)
    end(made, 0, PUBLIC)
    assert start_next(made)[0] == NOBODY
    dispatch.set_in_service(made, [1], serves=True)
    assert start_next(made)[2] == 1
    assert made.models.unread_tokens.tolist() == [100]


def test_who_comes_back_after_a_failure_is_not_refused() -> None:
    made = desk((0, BOTH))
    answer = ask(made, PUBLIC)
    dispatch.set_in_service(made, [0], serves=False)
    dispatch.settle(made, 0, PUBLIC, 0.5 - answer.gpu_s)  # what it had used
    dispatch.come_back(made, 0, PUBLIC, 1.0)
    dispatch.put(made, 0, 0, gpus=1, slots=1, longest_tokens=1000, tokens_per_s=100.0, prefill_tokens_per_s=1000.0)
    dispatch.set_in_service(made, [0], serves=True)
    assert dispatch.next_turn(made, 0)[0] == PUBLIC
    assert dispatch.start(made, 0, PUBLIC, 150, 0, 100, 200, 1.0, NO_BLOCKS, 0)[0] == 0
    assert made.accounts.used_gpu_s[1] == pytest.approx(1.5)
    assert made.replicas.backlog_tokens[0] == 250


def test_who_gives_up_leaves_the_queue_to_the_others() -> None:
    made = desk((0, BOTH))
    for client in (PUBLIC, PUBLIC, OTHER):
        ask(made, client)
    dispatch.gave_up(made, 0, PUBLIC, 2.0)
    end(made, 0, PUBLIC)
    assert start_next(made)[0] == OTHER


def test_reading_and_writing_apart_are_two_pools_and_what_was_read_is_taken_over_whatever_is_full() -> None:
    made = desk((0, READS), (0, WRITES), (0, WRITES))
    assert made.models.gpus[0] == 3.0
    assert made.models.gpu_s_per_output_token[0] == pytest.approx(2 / 200)
    assert ask(made, PUBLIC).replica == 0
    assert ask(made, PUBLIC).rule == WAITS_FOR_SLOT, "the replicas that write are not for it"
    assert [dispatch.take_over(made, 0, 100, 200, 0) for _ in range(4)] == [1, 2, 1, 2]
    dispatch.set_in_service(made, [1], serves=False)
    assert dispatch.take_over(made, 0, 100, 200, 0) == 2
    dispatch.left(made, 0, 2, 100)
    dispatch.set_in_service(made, [2], serves=False)
    assert dispatch.take_over(made, 0, 100, 200, 0) == NOBODY
    assert ask(made, PUBLIC).rule == NOT_SERVED, "nobody would write it"


def test_a_prompt_goes_where_its_beginning_is_cached_while_there_is_a_slot() -> None:
    made, blocks = desk(*[(0, BOTH)] * 3, slots=2), np.array([7, 8], np.int64)
    made.models.block_tokens[0] = 40
    assert [ask(made, PUBLIC, blocks=blocks).replica, ask(made, PUBLIC).replica, ask(made, PUBLIC).replica] == [0, 1, 2]
    made.replicas.backlog_tokens[0] += 5  # 0.05 s more to wait, 0.08 s less to read
    again = ask(made, PUBLIC, blocks=blocks)
    assert (again.replica, again.cached_tokens) == (0, 80)
    assert made.replicas.unread_tokens.tolist() == [120, 100, 100]
    full = ask(made, PUBLIC, blocks=blocks)
    assert (full.replica, full.cached_tokens) == (1, 0)


def test_clients_and_rows_are_added_while_requests_wait() -> None:
    made = desk((0, BOTH))
    for client in (PUBLIC, PUBLIC, OTHER):
        ask(made, client)
    more = dispatch.with_rows(dispatch.with_clients(made, [0, 1, 1, 0, 1]), 3)
    assert ask(more, 3).rule == WAITS_FOR_SLOT
    dispatch.put(more, 2, 0, gpus=1.0, slots=3, longest_tokens=1000, tokens_per_s=100.0, prefill_tokens_per_s=1000.0)
    dispatch.set_in_service(more, [2], serves=True)
    assert [start_next(more)[0] for _ in range(4)] == [3, OTHER, PUBLIC, NOBODY]


def test_python_reads_the_same_desk_faster_in_memory_views() -> None:
    made = desk((0, BOTH))
    shown = dispatch.plain(made)
    assert ask(shown, PUBLIC)[:3] == (SLOT_FREE, 0, 0)
    assert ask(shown, PUBLIC).rule == WAITS_FOR_SLOT
    dispatch.set_in_service(shown, [0], serves=False)
    assert made.queue.model_waiting[0] == 1
    assert made.models.gpus[0] == 0.0


# --- Why ------------------------------------------------------------------------------------------------------------


def reasons_of(made: Desk, *, model: int = 0, waits: bool = False, blocks: np.ndarray = NO_BLOCKS) -> dict[str, int]:
    """Return why a request of 100 + 100 tokens would go where it would; what there is none of is left out."""
    reasons = np.full(len(REASONS), 77, np.int64)
    dispatch.explain_place(made, model, 100, 200, blocks, 0, reasons)
    if waits:
        dispatch.explain_turn(made, model, reasons)
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
    dispatch.explain_last_resort(made, 1, reasons)
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
