from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.policy.admission import (
    ADMIT,
    CAUTION,
    HALF_LIFE_S,
    LEAST_MEMORY_S,
    MEMORY_S,
    NOBODY,
    PACE_S,
    UNKNOWN_S,
    Accounts,
    FairQueue,
    admit,
    age,
    enter,
    half_to_the,
    keep_pace,
    leave,
    new_accounts,
    new_queue,
    next_line,
    settle,
    share_of,
    start_at_once,
    start_within_s,
    take,
    tell,
    until_below_limit_s,
    until_turn_s,
    work_ahead_gpu_s,
)
from waterline.policy.decisions import (
    BELOW_DESERVED,
    BELOW_GUARANTEE,
    BORROWS,
    NOT_SERVED,
    OVER_LIMIT,
    QUEUE_FULL,
    SLOT_FREE,
    TOO_LATE,
    WAITS_FOR_SLOT,
)


def jain(served: list[float]) -> float:
    """Return Jain's fairness index: 1 when all are equal, 1/n when one has everything."""
    return sum(served) ** 2 / (len(served) * sum(one * one for one in served))


def accounts(*shares: tuple[float, float, float], gpus: float = 10.0) -> Accounts:
    """Return accounts that have been kept for long."""
    guarantee, deserved, limit = zip(*shares, strict=True)
    books = new_accounts(guarantee, deserved, limit, gpus)
    books.memory_s[:] = MEMORY_S
    return books


ONE = ((0.0, 1.0, 1.0),)

# --- Whether ---------------------------------------------------------------------------------------------------------


def ask(
    books: Accounts, queue: FairQueue, client: int, *, slots: int = 0, places: int = 100, unread_s: float = 0.0
) -> tuple[int, float]:
    """A request of 2 GPU-seconds on 10 GPUs that may wait for 5 s."""
    return admit(books, queue, client, 0, 2.0, slots, places, 10.0, unread_s, 5.0)


def test_a_request_starts_at_once_when_a_slot_is_free_and_nobody_waits() -> None:
    books, queue = accounts(*ONE), new_queue(1, [0])
    assert ask(books, queue, 0, slots=1) == (SLOT_FREE, 0.0)
    assert ask(books, queue, 0, slots=1, unread_s=4.0) == (SLOT_FREE, 4.0)
    assert ask(books, queue, 0, slots=1, unread_s=7.0) == (TOO_LATE, 2.0)
    enter(queue, 0, 0, 2.0)
    assert ask(books, queue, 0, slots=1)[0] == WAITS_FOR_SLOT, "somebody waits, who was there before"


def test_a_greedy_client_is_refused_while_a_quiet_one_is_taken_in() -> None:
    books, queue = accounts(*ONE), new_queue(1, [0, 0])
    for _ in range(18):
        assert ask(books, queue, 0)[0] == WAITS_FOR_SLOT
        enter(queue, 0, 0, 2.0)
    assert ask(books, queue, 0) == (TOO_LATE, pytest.approx(36 / 10 - 0.7 * 5)), "18 of its own are ahead"
    assert ask(books, queue, 1) == (WAITS_FOR_SLOT, pytest.approx(2 / 10)), "one of the other is ahead"


def test_a_refused_client_is_taken_in_when_it_comes_back_as_told() -> None:
    books, queue = accounts(*ONE), new_queue(1, [0])
    for _ in range(40):
        enter(queue, 0, 0, 2.0)
    rule, retry_s = ask(books, queue, 0)
    assert (rule, retry_s) == (TOO_LATE, pytest.approx(80 / 10 - 0.7 * 5))
    for _ in range(ceil(retry_s * 10 / 2.0)):  # what 10 GPUs serve in that time
        take(books, queue, next_line(books, queue, 0)[0], 0, 2.0)
    assert ask(books, queue, 0)[0] == WAITS_FOR_SLOT


def test_who_is_refused_is_told_to_come_back_after_those_who_were_told_before() -> None:
    queue, gpus = new_queue(2, [0, 1]), np.array([10.0])
    told = [tell(queue, 0, 0, 2.0, 10.0, 1.5) for _ in range(4)]
    assert told == pytest.approx([1.5 + 0.4 * before for before in range(4)]), "of 10 GPUs half are for them"
    assert tell(queue, 1, 0, 2.0, 10.0, 1.5) == 1.5, "those of another tenant are not ahead of it"
    keep_pace(queue, 1.0, gpus)
    assert tell(queue, 0, 0, 2.0, 10.0, 1.5) == pytest.approx(1.5 + (4 * 2.0 - 5.0) / 5.0), "a second later 5 are due"
    keep_pace(queue, 60.0, gpus)
    assert tell(queue, 0, 0, 1e6, 10.0, 1.5) == 1.5
    assert tell(queue, 0, 0, 2.0, 10.0, 1.5) == 3600.0, "nobody is told more than an hour"


def test_a_client_holds_no_more_places_than_are_free_so_there_is_one_for_the_next() -> None:
    books, queue = accounts(*ONE, gpus=1e6), new_queue(1, [0, 0, 0])
    held = []
    for client in (0, 1, 2):
        for _ in range(20):
            if admit(books, queue, client, 0, 0.0, 0, 8, 1e6, 0.0, 5.0)[0] == WAITS_FOR_SLOT:
                enter(queue, client, 0, 0.0)
        held.append(int(queue.waiting[client]))
    assert held == [4, 2, 1]
    assert admit(books, queue, 0, 0, 1.0, 0, 8, 1e6, 0.0, 5.0) == (QUEUE_FULL, pytest.approx(1e-6))


def test_who_finds_no_place_is_told_to_come_back_when_each_client_that_waits_has_had_its_turn() -> None:
    books, queue = accounts(*ONE), new_queue(1, [0, 0, 0])
    for _ in range(4):
        enter(queue, 0, 0, 3.0)
    enter(queue, 1, 0, 3.0)
    ask_for = lambda client, gpu_s, places: admit(books, queue, client, 0, gpu_s, 0, places, 10.0, 0.0, 1e4)  # noqa: E731
    assert ask_for(0, 1.0, 9) == (QUEUE_FULL, pytest.approx(3.0 * 2 / 10)), "4 of 9 places are free, and 4 are its own"
    assert ask_for(0, 7.0, 9) == (QUEUE_FULL, pytest.approx(7.0 / 10)), "no sooner than it would take itself"
    assert ask_for(1, 1.0, 6) == (QUEUE_FULL, pytest.approx(3.0 * 2 / 10)), "one is free, and one is its own"
    assert ask_for(0, 1.0, 10)[0] == WAITS_FOR_SLOT
    assert ask_for(2, 1.0, 5) == (QUEUE_FULL, pytest.approx(1.0 / 10)), "no place is free at all"


def test_who_is_too_late_is_told_when_its_prompt_could_be_read_and_its_turn_come_in_seven_tenths_of_its_time() -> None:
    books, queue = accounts(*ONE), new_queue(1, [0])
    for _ in range(20):
        enter(queue, 0, 0, 2.0)  # its turn comes in 4 s
    assert ask(books, queue, 0, unread_s=1.0) == (TOO_LATE, pytest.approx(4 - CAUTION * (5 - 1)))
    assert ask(books, queue, 0, unread_s=7.0) == (TOO_LATE, pytest.approx((7 - 5) + 4))
    for _ in range(17):
        leave(queue, 0, 0, 2.0)
    assert ask(books, queue, 0, unread_s=1.0) == (WAITS_FOR_SLOT, pytest.approx(1.0 + 0.6))


def test_who_may_wait_until_it_is_below_its_limit_again_waits_though_a_slot_is_free() -> None:
    books, queue = accounts((0.0, 0.2, 0.5)), new_queue(1, [0])
    books.used_gpu_s[0] = 2 ** (3 / HALF_LIFE_S) * 0.5 * 10 * MEMORY_S
    assert ask(books, queue, 0, slots=1) == (WAITS_FOR_SLOT, pytest.approx(3.0, rel=1e-6))
    assert ask(books, queue, 0, slots=1, unread_s=4.0) == (WAITS_FOR_SLOT, pytest.approx(4.0))


def test_without_a_replica_one_deadline_is_the_answer() -> None:
    assert admit(accounts(*ONE), new_queue(1, [0]), 0, 0, 1.0, 0, 8, 0.0, 0.0, 5.0) == (NOT_SERVED, 5.0)


def test_a_tenant_at_its_limit_is_told_when_it_will_be_below_it() -> None:
    books, queue = accounts((0.0, 0.2, 0.5), (0.0, 0.5, 1.0)), new_queue(2, [0, 1])
    books.used_gpu_s[0] = 2 * 0.5 * 10 * MEMORY_S
    rule, retry_s = ask(books, queue, 0, slots=1)
    assert (rule, retry_s + 5.0) == (OVER_LIMIT, pytest.approx(HALF_LIFE_S, rel=1e-6))
    assert until_below_limit_s(books, 1) == ADMIT
    enter(queue, 0, 0, 2.0)
    assert next_line(books, queue, 0) == (NOBODY, OVER_LIMIT), "even when GPUs idle: that is what a limit means"
    age(books, 60.001, serves=True)
    assert next_line(books, queue, 0)[0] == 0


def test_the_deadline_leaves_time_to_read_the_prompt() -> None:
    assert start_within_s(5.0, 10_000, 5_000) == 3.0
    assert start_within_s(5.0, 100_000, 5_000) == 2.5, "a prompt of 20 s is late by its own length, not by the queue"
    assert start_within_s(5.0, 100, 0.0) == 5.0


def test_tenants_that_go_first_are_ahead_and_those_that_borrow_are_not() -> None:
    books = accounts((0.3, 0.4, 1.0), (0.0, 0.2, 1.0), (0.0, 0.1, 1.0))
    queue = new_queue(3, [0, 1, 2])
    books.used_gpu_s[:] = np.array([0.1, 0.1, 0.5]) * 10 * MEMORY_S  # below guarantee, below deserved, borrows
    for client, requests in enumerate((10, 4, 7)):
        for _ in range(requests):
            enter(queue, client, 0, 1.0)
    assert work_ahead_gpu_s(books, queue, 0, 1.0) == (0, 10)
    assert work_ahead_gpu_s(books, queue, 1, 1.0) == (10, 4)
    assert work_ahead_gpu_s(books, queue, 2, 1.0) == (10 + 4, 7)


def test_of_tenants_of_equal_standing_as_much_is_ahead_as_they_deserve_beside_ones_own() -> None:
    books, queue = accounts((0.0, 0.4, 1.0), (0.0, 0.2, 1.0)), new_queue(2, [0, 1])
    for client in range(2):
        for _ in range(10):
            enter(queue, client, 0, 1.0)
    assert work_ahead_gpu_s(books, queue, 0, 1.0) == (0, 10 + 0.5 * (10 + 1))
    assert work_ahead_gpu_s(books, queue, 1, 1.0) == (0, 10 + 10), "twice as much would be, but there is no more"


def test_of_ones_own_tenant_each_other_client_is_ahead_with_as_much_as_one_has_and_asks_for() -> None:
    books, queue = accounts(*ONE), new_queue(1, [0, 0, 0, 0])
    for client, requests in enumerate((2, 10, 1)):
        for _ in range(requests):
            enter(queue, client, 0, 1.0)
    assert work_ahead_gpu_s(books, queue, 0, 1.5) == (0, 2 + 2 * (2 + 1.5)), "its own, and of two others as much each"
    assert work_ahead_gpu_s(books, queue, 1, 1.5) == (0, 13), "there is no more"
    assert work_ahead_gpu_s(books, queue, 2, 1.5) == (0, 1 + 2 * (1 + 1.5))
    assert work_ahead_gpu_s(books, queue, 3, 1.5) == (0, 3 * 1.5), "three others"


def test_work_of_tenants_that_go_first_is_done_at_the_whole_pace_and_the_rest_at_what_they_leave() -> None:
    books = accounts((0.5, 0.5, 1.0), (0.0, 0.1, 1.0), (0.0, 0.1, 1.0))
    queue = new_queue(3, [0, 1, 2], models=2)
    books.used_gpu_s[:] = np.array([0.1, 0.5, 0.5]) * 10 * MEMORY_S  # the first goes first, the others borrow
    enter(queue, 1, 1, 12.0)  # lines are client x models + model: of the first …
    enter(queue, 3, 1, 4.0)  # … and of the second, at the second model
    queue.started_gpu_s[:] = [99.0, 99.0, 99.0, 30.0, 8.0, 2.0]
    queue.queued_s[:] = [99.0, 10.0 - UNKNOWN_S]
    gpus = 10.0 / UNKNOWN_S
    assert until_turn_s(books, queue, 3, 1, 1.0, gpus) == pytest.approx(12 / ((40 + 10) / 10) + 4 / ((10 + 10) / 10))
    assert until_turn_s(books, queue, 1, 1, 1.0, gpus) == pytest.approx(12 / ((40 + 10) / 10))
    assert until_turn_s(books, queue, 2, 0, 1.0, gpus) == 0.0, "nobody waits for the first model"


def test_a_pace_is_seen_while_somebody_waits_and_is_served_and_half_of_it_is_forgotten_in_15_s() -> None:
    books, queue, gpus = accounts(*ONE), new_queue(1, [0], models=3), np.array([10.0, 0.0, 10.0])

    def pass_s(seconds: float) -> list[float]:
        keep_pace(queue, seconds, gpus)
        return queue.queued_s.tolist()

    for model in (0, 1):
        for _ in range(3):
            enter(queue, model, model, 2.0)
    take(books, queue, 0, 0, 2.0)
    assert (pass_s(1.0), queue.started_gpu_s.tolist()) == ([0, 0, 0], [0, 0, 0]), "they have only come"
    take(books, queue, 0, 0, 2.0)
    assert pass_s(PACE_S) == pytest.approx([PACE_S, 0, 0]), "nobody serves the second, nobody waits for the third"
    assert queue.started_gpu_s.tolist() == pytest.approx([1.0, 0, 0])
    leave(queue, 0, 0, 2.0)
    assert pass_s(PACE_S) == pytest.approx([1.5 * PACE_S, 0, 0]), "somebody waited in that time"
    assert pass_s(PACE_S) == pytest.approx([0.75 * PACE_S, 0, 0]), "and in this nobody did"


def test_the_wait_follows_the_pace_at_which_work_was_begun_and_what_goes_first_leaves_of_it() -> None:
    """Ten GPUs that begin 8 GPU-seconds a second, 6 of them of a tenant that goes first."""
    books, queue = accounts((0.5, 0.5, 1.0), (0.0, 0.1, 1.0)), new_queue(2, [0, 1])
    books.used_gpu_s[:] = np.array([0.1, 0.5]) * 10 * MEMORY_S
    for _ in range(100):
        enter(queue, 1, 0, 1.0)
    assert until_turn_s(books, queue, 1, 0, 1.0, 10.0) == 10.0, "as long as nothing is known"
    keep_pace(queue, 1.0, np.array([10.0]))
    for _ in range(120):
        for _ in range(6):
            enter(queue, 0, 0, 1.0)
            take(books, queue, 0, 0, 1.0)
        for _ in range(2):
            take(books, queue, 1, 0, 1.0)
            enter(queue, 1, 0, 1.0)
        books.used_gpu_s[:] = np.array([0.1, 0.5]) * 10 * MEMORY_S
        keep_pace(queue, 1.0, np.array([10.0]))
    assert until_turn_s(books, queue, 1, 0, 1.0, 10.0) == pytest.approx(100 / 2, rel=0.3)
    enter(queue, 0, 0, 1.0)
    assert until_turn_s(books, queue, 0, 0, 1.0, 10.0) == pytest.approx(1 / 8, rel=0.05)


# --- Whose turn ------------------------------------------------------------------------------------------------------


def test_below_the_guarantee_goes_first_then_below_deserved_then_who_borrows_least() -> None:
    books = accounts((0.3, 0.4, 1.0), (0.0, 0.2, 1.0), (0.0, 0.1, 1.0))
    queue = new_queue(3, [0, 1, 2])
    for client in (2, 1, 0):
        enter(queue, client, 0, 1.0)
    assert next_line(books, queue, 0) == (0, BELOW_GUARANTEE)
    books.used_gpu_s[0] = 0.39 * 10 * MEMORY_S
    assert next_line(books, queue, 0) == (1, BELOW_DESERVED)
    books.used_gpu_s[:] = np.array([0.41, 0.3, 0.2]) * 10 * MEMORY_S  # 1.03, 1.5 and 2 times what they deserve
    assert next_line(books, queue, 0) == (0, BORROWS)


def test_of_two_below_their_guarantee_the_one_with_the_smaller_part_of_it_goes_first() -> None:
    books, queue = accounts((0.6, 0.6, 1.0), (0.2, 0.2, 1.0)), new_queue(2, [0, 1])
    books.used_gpu_s[:] = np.array([0.3, 0.15]) * 10 * MEMORY_S  # a half, and three quarters
    for client in (0, 1):
        enter(queue, client, 0, 1.0)
    assert next_line(books, queue, 0) == (0, BELOW_GUARANTEE)


def test_who_has_exactly_its_guarantee_what_it_deserves_or_its_limit_is_not_below_it() -> None:
    books, queue = accounts((0.125, 0.25, 0.5), (0.0, 0.0, 1.0)), new_queue(2, [0, 1])
    enter(queue, 0, 0, 1.0)
    for share, turn in ((0.125, (0, BELOW_DESERVED)), (0.25, (0, BORROWS)), (0.5, (NOBODY, OVER_LIMIT))):
        books.used_gpu_s[0] = share * 10 * MEMORY_S
        assert share_of(books, 0) == share
        assert next_line(books, queue, 0) == turn
    assert until_below_limit_s(books, 0) > ADMIT
    books.used_gpu_s[:] = np.array([0.499, 1.5]) * 10 * MEMORY_S
    assert until_below_limit_s(books, 0) == ADMIT
    assert until_below_limit_s(books, 1) == ADMIT, "a limit of 1 is none"


def test_who_was_served_least_is_next_among_many_though_others_give_up() -> None:
    """At the second of two models; the clients of three tenants in turn, twenty each."""
    books, dice = accounts(*[(0.0, 0.3, 1.0)] * 3), np.random.default_rng(5)
    queue = new_queue(3, [0, 1, 2] * 20, models=2)
    lines = np.arange(1, 120, 2)
    served_gpu_s = dice.permutation(60).astype(float)
    queue.counter_gpu_s[lines] = served_gpu_s
    for line in dice.permutation(lines):
        enter(queue, int(line), 1, 1.0)
    gone = dice.choice(lines, 25, replace=False).tolist()
    for line in gone:
        leave(queue, line, 1, 1.0)
    for tenant in range(3):
        books.used_gpu_s[:] = 9.0
        books.used_gpu_s[tenant] = 0.0
        mine = [line for line in lines.tolist() if queue.tenant[line] == tenant and line not in gone]
        turns = []
        for _ in mine:
            turns.append(next_line(books, queue, 1)[0])
            leave(queue, turns[-1], 1, 1.0)
        assert turns == sorted(mine, key=lambda line: queue.counter_gpu_s[line])
    assert next_line(books, queue, 1)[0] == NOBODY


def test_who_starts_at_once_after_a_pause_is_lifted_to_who_was_served_last() -> None:
    books, queue = accounts(*ONE), new_queue(1, [0, 0])
    for client, gpu_s, counters in (
        (0, 2.0, [2.0, 0.0]),
        (0, 3.0, [5.0, 0.0]),  # served last with a counter of 2
        (1, 1.0, [5.0, 3.0]),
        (0, 1.0, [6.0, 3.0]),  # with a counter of 5
        (1, 1.0, [6.0, 6.0]),
        (0, 1.0, [7.0, 6.0]),
    ):
        start_at_once(books, queue, client, gpu_s)
        assert queue.counter_gpu_s.tolist() == counters


def test_work_that_waits_is_counted_and_leaves_no_dust() -> None:
    queue = new_queue(1, [0, 0])
    for client, gpu_s in ((0, 0.1), (0, 0.2), (0, 0.3), (1, 0.4)):
        enter(queue, client, 0, gpu_s)
    leave(queue, 0, 0, 0.2)
    assert (queue.waiting_gpu_s.tolist(), queue.group_gpu_s.tolist()) == (
        pytest.approx([0.4, 0.4]),
        pytest.approx([0.8]),
    )
    for client, gpu_s in ((0, 0.1), (0, 0.3), (1, 0.4)):
        leave(queue, client, 0, gpu_s)
    assert (queue.waiting_gpu_s.tolist(), queue.group_gpu_s.tolist()) == ([0.0, 0.0], [0.0])


def serve(
    books: Accounts, queue: FairQueue, costs: list[float], *, always: range, seconds: float, gpus: int = 10
) -> np.ndarray:
    """Serve clients that always have requests waiting, one after the other; return the GPU-seconds each got."""
    served, now_s = np.zeros(len(costs)), 0.0
    for client in always:
        enter(queue, client, 0, costs[client])
    while now_s < seconds:
        client, _ = next_line(books, queue, 0)
        take(books, queue, client, 0, costs[client])
        enter(queue, client, 0, costs[client])
        served[client] += costs[client]
        now_s += costs[client] / gpus
        age(books, now_s, serves=True)
    return served


def test_a_client_with_longer_requests_gets_fewer_of_them_not_more_time() -> None:
    served = serve(accounts(*ONE), new_queue(1, [0] * 3), [1.0, 5.0, 20.0], always=range(3), seconds=300)
    assert jain(served.tolist()) > 0.999


def flood(quiet_requests_per_s: float) -> tuple[list[float], list[float]]:
    """One client asks ten times a second, four others ask less, of 10 GPUs that serve five requests a second.

    Return how many requests of each were served in 20 minutes, and how long those of the quiet ones waited.
    """
    books, queue, dice = accounts(*ONE), new_queue(1, [0] * 5), np.random.default_rng(1)
    served, waits, now_s, free_s = np.zeros(5), [], 0.0, 0.0
    waiting: list[list[float]] = [[] for _ in range(5)]
    while now_s < 1200:
        now_s += 0.1
        for client in range(5):
            for _ in range(dice.poisson(0.1 * (quiet_requests_per_s if client else 10.0))):
                if ask(books, queue, client, places=200)[0] == WAITS_FOR_SLOT:
                    enter(queue, client, 0, 2.0)
                    waiting[client].append(now_s)
        while free_s < now_s:
            client, _ = next_line(books, queue, 0)
            if client == NOBODY:
                free_s = now_s
                break
            take(books, queue, client, 0, 2.0)
            waits += [now_s - waiting[client].pop(0)] if client else []
            served[client] += 1
            free_s += 0.2
        age(books, now_s, serves=True)
    return served.tolist(), waits


def test_a_client_that_floods_the_queue_takes_nothing_from_those_who_ask_for_their_part() -> None:
    served, _ = flood(quiet_requests_per_s=1.0)
    assert jain(served) >= 0.95, served


def test_who_asks_for_less_than_its_part_starts_before_its_deadline_in_a_flood() -> None:
    served, waits = flood(quiet_requests_per_s=0.8)
    assert np.mean(served[1:]) == pytest.approx(0.8 * 1200, rel=0.05), "none to speak of is refused"
    assert served[0] == pytest.approx(1.8 * 1200, rel=0.05), "and the flood gets what is left"
    assert np.percentile(waits, 99) < 5.0


def test_under_saturation_tenants_get_what_they_deserve() -> None:
    books = accounts((0.3, 0.5, 1.0), (0.0, 0.3, 1.0), (0.0, 0.2, 1.0))
    served = serve(books, new_queue(3, [0, 1, 2]), [2.0, 3.0, 0.5], always=range(3), seconds=600)
    assert served / served.sum() == pytest.approx([0.5, 0.3, 0.2], abs=0.01)


def test_a_guarantee_does_not_take_a_fleet_that_has_just_started_for_itself() -> None:
    books = new_accounts((0.3, 0.0, 0.0), (0.5, 0.3, 0.2), (1.0, 1.0, 1.0), 10.0)
    age(books, 90.0, serves=False)  # while the replicas load
    assert books.memory_s[0] == LEAST_MEMORY_S
    books.aged_s[0] = 0.0
    served = serve(books, new_queue(3, [0, 1, 2]), [2.0, 3.0, 0.5], always=range(3), seconds=30)
    assert served / served.sum() == pytest.approx([0.5, 0.3, 0.2], abs=0.05)


def test_what_idle_tenants_leave_is_shared_by_what_is_deserved() -> None:
    books = accounts((0.3, 0.5, 1.0), (0.0, 0.3, 1.0), (0.0, 0.2, 1.0))
    served = serve(books, new_queue(3, [0, 1, 2]), [2.0, 2.0, 2.0], always=range(1, 3), seconds=600)
    assert served / served.sum() == pytest.approx([0.0, 0.6, 0.4], abs=0.01)


def test_idling_earns_no_credit() -> None:
    books, queue = accounts(*ONE), new_queue(1, [0, 0])
    for _ in range(100):
        enter(queue, 0, 0, 1.0)
        take(books, queue, 0, 0, 1.0)
    enter(queue, 0, 0, 1.0)
    enter(queue, 1, 0, 1.0)  # comes after a long pause
    turns = []
    for _ in range(6):
        client, _ = next_line(books, queue, 0)
        take(books, queue, client, 0, 1.0)
        enter(queue, client, 0, 1.0)
        turns.append(client)
    assert turns.count(1) == 3, "it shares evenly from now on; it does not get a hundred turns"


def test_starting_at_once_is_charged_like_waiting() -> None:
    books, queue = accounts(*ONE), new_queue(1, [0, 0])
    for _ in range(3):
        start_at_once(books, queue, 0, 1.0)
    enter(queue, 0, 0, 1.0)
    enter(queue, 1, 0, 1.0)
    assert next_line(books, queue, 0)[0] == 1


def test_what_a_request_did_cost_counts_in_the_end() -> None:
    books, queue = accounts(*ONE), new_queue(1, [0, 0])
    for client in (0, 1):
        enter(queue, client, 0, 1.0)
        take(books, queue, client, 0, 1.0)
        enter(queue, client, 0, 1.0)
    assert next_line(books, queue, 0)[0] == 0
    settle(books, queue, 0, 9.0)  # it was ten times as long as expected
    assert next_line(books, queue, 0)[0] == 1
    assert books.used_gpu_s[0] == 11
    settle(books, queue, 0, -9.5)
    assert next_line(books, queue, 0)[0] == 0


def test_what_is_paid_back_after_it_was_forgotten_leaves_no_credit() -> None:
    books, queue = accounts(*ONE), new_queue(1, [0])
    start_at_once(books, queue, 0, 8.0)
    age(books, HALF_LIFE_S, serves=True)
    settle(books, queue, 0, -6.0)
    assert books.used_gpu_s[0] == 0.0


# --- Accounts --------------------------------------------------------------------------------------------------------


def test_half_of_what_was_used_is_forgotten_in_a_half_life_however_often_it_ages() -> None:
    books = accounts(*ONE)
    books.used_gpu_s[0] = 100.0
    for second in range(1, 61):
        age(books, float(second), serves=True)
    assert books.used_gpu_s[0] == pytest.approx(50.0, rel=1e-6)
    age(books, 30.0, serves=True)
    assert books.aged_s[0] == 60.0, "time does not run backwards"


def test_what_gpus_had_to_give_is_remembered_as_long_as_what_was_used_once_they_serve() -> None:
    books = new_accounts([0.0], [1.0], [1.0], 10.0)
    age(books, 40.0, serves=False)
    assert books.memory_s[0] == LEAST_MEMORY_S
    age(books, 40.0 + HALF_LIFE_S, serves=True)
    assert books.memory_s[0] == pytest.approx((LEAST_MEMORY_S + MEMORY_S) / 2)
    books.used_gpu_s[0] = 100.0
    assert share_of(books, 0) == pytest.approx(100.0 / (10 * books.memory_s[0]))
    age(books, 40.0 + 2 * HALF_LIFE_S, serves=False)
    assert books.memory_s[0] == pytest.approx((LEAST_MEMORY_S + MEMORY_S) / 2), "while nobody serves nothing is given"


@given(st.floats(0, 2000))
def test_powers_of_a_half_are_right(exponent: float) -> None:
    assert half_to_the(exponent) == pytest.approx(0.5**exponent, rel=1e-8, abs=1e-300)


def test_a_tenant_that_uses_all_gpus_all_the_time_has_a_share_of_one() -> None:
    books = accounts(*ONE)
    for second in range(1, 1200):
        books.used_gpu_s[0] += 10.0
        age(books, float(second), serves=True)
    assert share_of(books, 0) == pytest.approx(1.0, abs=0.01)


@given(st.lists(st.tuples(st.sampled_from(["enter", "take", "leave", "settle"]), st.integers(0, 7)), max_size=60))
def test_the_lowest_counter_is_always_first_whatever_happens(events: list[tuple[str, int]]) -> None:
    books, queue = accounts(*ONE, (0.0, 0.0, 1.0)), new_queue(2, [0, 0, 0, 0, 0, 1, 1, 1])
    for number, (event, client) in enumerate(events):
        cost = 1.0 + number % 3
        if event == "enter":
            enter(queue, client, 0, 1.0)
        elif event == "settle":
            settle(books, queue, client, cost - 2.0)
        elif queue.waiting[client]:
            (leave(queue, client, 0, 1.0) if event == "leave" else take(books, queue, client, 0, 1.0))
        for tenant in range(2):
            mine = [one for one in range(8) if queue.tenant[one] == tenant and queue.waiting[one]]
            assert queue.lines[tenant] == len(mine)
            assert queue.group_waiting[tenant] == sum(queue.waiting[one] for one in mine)
            if mine:
                lowest = min(mine, key=lambda one: (queue.counter_gpu_s[one], one))
                assert queue.heap[queue.first[tenant]] == lowest
