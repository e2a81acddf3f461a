"""Requests through the desk of a fleet; see `desks`."""

import numpy as np
import pytest
from desks import NO_BLOCKS, OTHER, PAID, PUBLIC, ask, desk, end, start_next

from waterline.policy import admission, dispatch
from waterline.policy.admission import CAUTION
from waterline.policy.decisions import (
    BELOW_DESERVED,
    BELOW_GUARANTEE,
    BORROWS,
    NO_REPLICA,
    NOT_SERVED,
    SLOT_FREE,
    TOO_LATE,
    TOO_LONG,
    WAITS_FOR_SLOT,
)
from waterline.policy.dispatch import BOTH, READS, WRITES, Desk
from waterline.policy.routing import NOBODY


def test_a_request_starts_while_there_is_a_slot_and_then_waits_at_the_desk() -> None:
    made = desk((0, BOTH), (0, BOTH))
    first, second, third = (ask(made, PUBLIC) for _ in range(3))
    assert (first.rule, first.replica, first.gpu_s) == (SLOT_FREE, 0, pytest.approx(2.0))
    assert (second.rule, second.replica) == (SLOT_FREE, 1), "the idle one"
    assert (third.rule, third.replica) == (WAITS_FOR_SLOT, NOBODY)
    assert dispatch.next_turn(made, 0) == (NOBODY, NO_REPLICA), "no slot has come free"
    end(made, 1, PUBLIC)
    assert start_next(made) == (PUBLIC, BELOW_DESERVED, 1)
    end(made, 1, PUBLIC)
    assert dispatch.next_turn(made, 0) == (NOBODY, NO_REPLICA), "nobody waits"


def test_a_replica_without_a_slot_gets_nothing_though_it_would_be_done_first() -> None:
    made = desk((0, BOTH), (0, BOTH))
    made.replicas.tokens_per_s[0] = made.replicas.prefill_tokens_per_s[0] = 1e9
    assert [ask(made, PUBLIC).replica for _ in range(2)] == [0, 1]


def test_every_slot_of_a_large_pool_is_found_before_anybody_waits() -> None:
    made = desk(*[(0, BOTH)] * 12, *[(1, BOTH)] * 20, models=2)
    assert sorted(ask(made, PUBLIC, model=1).replica for _ in range(20)) == list(range(12, 32))
    assert ask(made, PUBLIC, model=1).rule == WAITS_FOR_SLOT, "the free ones are of another model"
    dispatch.gave_up(made, 1, PUBLIC, 2.0)
    for replica in range(14, 30):
        end(made, replica, PUBLIC, model=1)
    dispatch.set_in_service(made, range(20, 32), serves=False)
    assert sorted(ask(made, PUBLIC, model=1).replica for _ in range(6)) == list(range(14, 20))
    assert ask(made, PUBLIC, model=1).rule == WAITS_FOR_SLOT


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

    def ask_ahead(ready_in_s: float) -> dispatch.Arrival:  # its prompt takes 0.1 s to read, so it may wait 5 s
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


def test_who_is_overtaken_loses_its_place_and_is_told_to_come_back_after_those_who_were_told_before() -> None:
    made = desk((0, BOTH))
    for client in (PUBLIC, PUBLIC, PUBLIC, OTHER):
        ask(made, client)
    assert admission.waits_s(2.0) == 30.0, "three times a deadline of 10 s at least"
    assert admission.waits_s(20.0) == 60.0
    assert dispatch.overtaken(made, 0, PUBLIC, 2.0, 5.0) == 5.0, "its deadline"
    assert dispatch.overtaken(made, 0, PUBLIC, 2.0, 5.0) == pytest.approx(9.0), "half a GPU brings 2 GPU-s back in 4 s"
    end(made, 0, PUBLIC)
    assert start_next(made)[0] == OTHER, "nobody else waits"
    dispatch.set_in_service(made, [0], serves=False)
    assert dispatch.overtaken(made, 0, PUBLIC, 2.0, 5.0) == 5.0, "where nobody serves there is no pace"


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
    for longer, before in zip(more.replicas, made.replicas, strict=True):
        assert longer.tolist() == [*before.tolist(), *[0] * (len(longer) - len(before))]
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


# --- The books, beside books kept by hand -----------------------------------------------------------------------------


def mixed() -> Desk:
    """Return a desk of two models: three replicas that do both; two that read, and two that write, the other."""
    made = dispatch.new_desk([0.0], [1.0], [1.0], [0, 0], models=2, rows=8)
    for row, (model, role, slots, rate) in enumerate(
        [(0, BOTH, 2, 50.0)] * 3 + [(1, READS, 3, 400.0)] * 2 + [(1, WRITES, 1, 20.0)] * 2
    ):
        rates = {"tokens_per_s": rate, "prefill_tokens_per_s": 1000.0 + row}
        dispatch.put(made, row, model, role=role, gpus=1.0 + row, slots=slots, longest_tokens=500 + 10 * row, **rates)
    dispatch.set_in_service(made, range(7), serves=True)
    return made


def test_what_a_model_can_do_is_added_up_over_its_replicas_in_service() -> None:
    made = mixed()
    models = made.models
    assert models.gpus.tolist() == [1 + 2 + 3, 4 + 5 + 6 + 7]
    assert made.accounts.gpus[0] == 28
    assert models.prefill_tokens_per_s.tolist() == [3003.0, 2007.0]
    assert models.reader_tokens_per_s.tolist() == [1001.0, 1003.5]
    assert models.gpu_s_per_prompt_token.tolist() == pytest.approx([6 / 150, (4 + 5) / 800])
    assert models.gpu_s_per_output_token.tolist() == pytest.approx([6 / 150, (6 + 7) / 40])
    assert models.free_slots.tolist() == [6, 6]
    assert models.longest_tokens.tolist() == models.ever_tokens.tolist() == [520, 540]
    assert made.replicas.longest_tokens.tolist() == [500, 510, 520, 530, 540, 550, 560, 0]
    dispatch.set_in_service(made, [2, 3, 6], serves=False)
    assert models.gpus.tolist() == [1 + 2, 5 + 6]
    assert made.accounts.gpus[0] == 14
    assert models.longest_tokens.tolist() == [510, 540]
    assert models.ever_tokens.tolist() == [520, 540], "those that may come back"
    dispatch.set_in_service(made, [5], serves=False)
    assert models.longest_tokens.tolist() == [510, 0], "nobody would write it"
    assert models.gpu_s_per_output_token[1] == 0.0


def test_a_reader_takes_no_more_than_a_writer_in_service_can_hold() -> None:
    made = mixed()
    made.models.holds_tokens[5:7] = [300, 200]
    dispatch.set_in_service(made, [5], serves=False)
    assert made.replicas.longest_tokens[3:7].tolist() == [200, 200, 300, 200]
    assert (made.models.longest_tokens[1], made.models.ever_tokens[1]) == (200, 300)


def test_a_request_costs_what_is_read_and_what_is_written_of_it_each_at_its_price() -> None:
    made = mixed()
    answer = dispatch.arrive(made, 1, 0, 100, 60, 10, 200, 60.0, NO_BLOCKS, 0)
    assert (answer.cached_tokens, answer.gpu_s) == (60, pytest.approx(40 * 9 / 800 + 10 * 13 / 40))
    assert (made.replicas.unread_tokens[3:5].sum(), made.replicas.backlog_tokens[3:5].sum()) == (40, 100 + 1)


def test_a_row_that_is_given_out_again_is_empty_and_out_of_service() -> None:
    made = mixed()
    ask(made, PUBLIC)
    dispatch.put(made, 0, 0, gpus=1.0, slots=5, longest_tokens=9, tokens_per_s=1.0, prefill_tokens_per_s=1.0)
    replicas = made.replicas
    assert (replicas.serves[0], replicas.free_slots[0], replicas.born[0]) == (0, 5, 2)
    assert (replicas.backlog_tokens[0], replicas.unread_tokens[0]) == (0, 0)


def test_who_gives_up_leaves_the_line_to_its_own_model() -> None:
    made = desk((0, BOTH), (1, BOTH), models=2)
    for _ in range(3):
        ask(made, OTHER, model=1)
    dispatch.gave_up(made, 1, OTHER, 2.0)
    assert made.queue.model_waiting.tolist() == [0, 1]
    assert made.queue.waiting[dispatch.line_of(made, 1, OTHER)] == 1


def test_a_second_that_passes_is_one_second_whatever_the_clock_says() -> None:
    made = desk((0, BOTH))
    for _ in range(3):
        ask(made, PUBLIC)
    for now_s in (100.0, 101.0, 101.0):
        dispatch.tick(made, now_s)
    assert made.queue.queued_s[0] == 1.0, "nobody waited yet when the clock began"
    memory_s = made.accounts.memory_s[0]
    dispatch.set_in_service(made, [0], serves=False)
    dispatch.tick(made, 200.0)
    assert made.accounts.memory_s[0] == memory_s, "while nobody serves, nothing is given"
    dispatch.set_in_service(made, [0], serves=True)
    dispatch.tick(made, 300.0)
    assert made.accounts.memory_s[0] > memory_s


class Books:
    """What each replica has, kept by hand: of each request what is to be read, of that what is not cached, its output."""

    def __init__(self, made: Desk) -> None:
        self.made, self.has = made, [list[list[int]]() for _ in range(7)]
        self.waits: dict[tuple[int, int], list[list[int]]] = {
            (model, client): [] for model in (0, 1) for client in (0, 1)
        }
        self.slots = made.replicas.free_slots.tolist()

    def arrive(self, model: int, client: int, prompt: int, cached: int, output: int) -> None:
        answer = dispatch.arrive(self.made, model, client, prompt, cached, output, 500, 1e9, NO_BLOCKS, 0)
        if answer.rule == SLOT_FREE:
            self.has[answer.replica].append([prompt, prompt - cached, output])
        elif answer.rule == WAITS_FOR_SLOT:
            self.waits[model, client].append([prompt, prompt - cached, output])

    def start(self, model: int) -> None:
        while (client := dispatch.next_turn(self.made, model)[0]) != NOBODY:
            prompt, unread, output = self.waits[model, client][0]
            asked = model, client, prompt, prompt - unread, output, 500, 2.0, NO_BLOCKS, 0
            replica, cached, _ = dispatch.start(self.made, *asked)
            if replica == NOBODY:  # nobody in service writes
                return
            assert cached == prompt - unread
            self.has[replica].append(self.waits[model, client].pop(0))

    def go_on(self, replica: int, dice: np.random.Generator) -> None:
        """Let a request of a replica have its first token, or leave; what was read of the second model is taken over."""
        number = int(dice.integers(len(self.has[replica])))
        prompt, unread, output = self.has[replica][number]
        model, role = (0, BOTH) if replica < 3 else (1, READS if replica < 5 else WRITES)
        if prompt > 0:
            dispatch.first_token(self.made, model, replica, prompt, unread)
            self.has[replica][number][:2] = 0, 0
            return
        writer = dispatch.take_over(self.made, 1, output, 500, 0) if role == READS else NOBODY
        if role == READS and writer == NOBODY:
            return
        if role == READS:
            self.has[writer].append([0, 0, output])
        dispatch.left(self.made, model, replica, output)
        del self.has[replica][number]

    def agree(self) -> None:
        made, replicas = self.made, self.made.replicas
        written = [[1 if row in (3, 4) else one[2] for one in has] for row, has in enumerate(self.has)]
        backlog = [sum(one[0] for one in has) + sum(more) for has, more in zip(self.has, written, strict=True)]
        assert replicas.backlog_tokens[:7].tolist() == backlog
        unread = np.array([sum(one[1] for one in has) for has in self.has])
        free = np.array([self.slots[row] - (len(has) if row < 5 else 0) for row, has in enumerate(self.has)])
        assert replicas.unread_tokens[:7].tolist() == unread.tolist()
        assert replicas.free_slots[:7].tolist() == free.tolist()
        serves = replicas.serves[:7] > 0
        for model, rows in enumerate((slice(0, 3), slice(3, 5))):
            assert made.models.unread_tokens[model] == unread[rows][serves[rows]].sum()
            assert made.models.free_slots[model] == free[rows][serves[rows]].sum()
            listed = made.ready.free[8 * model :][: made.ready.frees[model]].tolist()
            assert sorted(listed) == [row for row in range(rows.start, rows.stop) if serves[row] and free[row] > 0]
            assert made.queue.model_waiting[model] == sum(len(self.waits[model, client]) for client in (0, 1))


def test_the_desk_keeps_its_books_whatever_happens() -> None:
    books, dice = Books(mixed()), np.random.default_rng(6)
    for _ in range(400):
        event, model, row = dice.integers(10), int(dice.integers(2)), int(dice.integers(7))
        if event < 4:
            prompt = int(dice.integers(20, 200))
            books.arrive(model, int(dice.integers(2)), prompt, int(dice.integers(20)), int(dice.integers(1, 50)))
        elif event < 8 and books.has[row]:
            books.go_on(row, dice)
        elif event == 8:
            books.start(model)
        elif event == 9:
            dispatch.set_in_service(books.made, [row], serves=not books.made.replicas.serves[row])
        books.agree()
    assert sum(len(waits) for waits in books.waits.values()) > 5
