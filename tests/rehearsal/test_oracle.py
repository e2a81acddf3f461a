"""The oracle against steps worked out by hand, against queueing theory, and against what must always hold.

A step of n tokens takes 1000 + n picoseconds here, so that every time can be added up in the head. Arrivals are whole
nanoseconds, that is thousands of picoseconds.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterline.cost.step import AttentionCost, StepCost, prefill_pairs
from waterline.policy.admission import CAUTION
from waterline.policy.decisions import GAVE_UP, NOT_SERVED, TOO_LATE, TOO_LONG
from waterline.policy.routing import NOBODY
from waterline.rehearsal.capacity import Ask, Capacity, Change, Terms, asks
from waterline.rehearsal.oracle import serve
from waterline.rehearsal.stepped import Passage, Step
from waterline.workload import Request

ROUND = StepCost(tokens_ps=(0, 1001), more_ps_per_token=1, head_ps=(0,), attention=(), step_tokens=8)
LENGTHY = replace(  # every term of a step counts
    ROUND,
    tokens_ps=(0, 1703, 1715, 1722, 1727),
    more_ps_per_token=3,
    head_ps=(0, 11, 19),
    attention=(
        AttentionCost(
            window_tokens=0,
            decode_ps=(0, 50, 70, 80),
            decode_ps_per_token=(0, 5, 4, 3),
            prefill_ps=13,
            prefill_ps_per_token=2,
            prefill_ps_per_pair=2,
        ),
        AttentionCost(
            window_tokens=5,
            decode_ps=(0, 20, 30),
            decode_ps_per_token=(0, 7, 7),
            prefill_ps=17,
            prefill_ps_per_token=1,
            prefill_ps_per_pair=1,
        ),
    ),
)


def capacity(name: str = "a/0", **changes: object) -> Capacity:
    usual = Capacity(
        replica=name,
        gpus=1,
        step=ROUND,
        max_batch=4,
        cache_tokens=100,
        max_context_tokens=100,
        prefill_tokens_per_s=1e9,
        tokens_per_s=1e9,
    )
    if "tokens_per_s" in changes:  # one rate for both, unless a case tells them apart
        changes.setdefault("prefill_tokens_per_s", changes["tokens_per_s"])
    return replace(usual, **changes)  # type: ignore[arg-type] # mypy does not know the names


def request(arrival_ns: int, prompt_tokens: int, output_tokens: int, cached_tokens: int = 0) -> Ask:
    return Ask(
        arrival_ps=arrival_ns * 1000,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        cached_tokens=cached_tokens,
    )


def served(
    capacities: Sequence[Capacity],
    requests: Sequence[Ask],
    *,
    deadline_s: float = math.inf,
    changes: Sequence[Change] | None = None,
) -> tuple[list[Passage], list[Step]]:
    steps: list[Step] = []
    terms = Terms(ttft_s=(deadline_s,), output_tokens=(10,))
    return serve(capacities, requests, terms, changes=changes, steps=steps), steps


# --- By hand --------------------------------------------------------------------------------------------------------


def test_what_is_cached_of_a_prompt_is_seen_and_held_but_not_read() -> None:
    (one,), steps = served([capacity(step=LENGTHY)], [request(0, 10, 2, cached_tokens=6)])
    read_ps = LENGTHY.step_ps(4, 4 * 6 + 4 * 5 // 2, 0, 0)  # its last 4 tokens, each of which sees the 6 before them
    assert [(step.prefill_tokens, step.decodes, step.occupied_tokens) for step in steps] == [(4, 0, 11), (0, 1, 12)]
    assert (one.first_token_ps, one.finish_ps) == (read_ps, read_ps + LENGTHY.step_ps(0, 0, 1, 11))


def test_after_a_preemption_what_was_cached_is_read_too() -> None:
    pair = [request(0, 4, 6), request(0, 4, 4, cached_tokens=3)]
    (_, late), steps = served([capacity(cache_tokens=12)], pair)
    assert late.preemptions == 1
    # 4 + 1 to begin with; of a cache of 12 each holds 6 when the second must go, with its prompt and 2 tokens
    assert [step.prefill_tokens for step in steps if step.prefill_tokens] == [5, 6]


def test_where_rates_count_cached_tokens_all_is_read() -> None:
    _, steps = served([capacity(reads_cached=True)], [request(0, 8, 1, cached_tokens=6)])
    assert [step.prefill_tokens for step in steps] == [8]


def test_who_waits_behind_cached_prompts_waits_for_what_is_read_of_them() -> None:
    """At 10^9 tokens a second 4 are read in 4 ns: with 60 of its 64 cached the first keeps nobody out, whole it does."""
    for cached, refused in ((60, False), (0, True)):
        (_, second), _ = served(
            [capacity()], [request(0, 64, 1, cached_tokens=cached), request(1, 1, 1)], deadline_s=10e-9
        )
        assert bool(second.refusal) is refused


def test_two_requests_share_steps_in_chunks() -> None:
    (a, b), steps = served([capacity()], [request(0, 10, 3), request(0, 5, 2)])
    # begins  ends   what
    #      0  1008   8 of a's 10 prompt tokens
    #   1008  2015   2 of a, 5 of b: both have their first token
    #   2015  3017   a and b decode; b is done
    #   3017  4018   a decodes and is done
    assert [(step.begin_ps, step.end_ps, step.prefill_tokens, step.decodes) for step in steps] == [
        (0, 1008, 8, 0),
        (1008, 2015, 7, 0),
        (2015, 3017, 0, 2),
        (3017, 4018, 0, 1),
    ]
    assert (a.first_token_ps, a.finish_ps) == (2015, 4018)
    assert (b.first_token_ps, b.finish_ps) == (2015, 3017)
    # a picosecond count a token: 1008/8 = 126; 1007/7 = 143, 6 left; (1002 + 6)/2 = 504; 1001
    assert a.busy_ps == 8 * 126 + 2 * 143 + 504 + 1001
    assert b.busy_ps == 5 * 143 + 504


def test_decodes_come_before_the_prompts_of_others() -> None:
    (a, b), steps = served([capacity()], [request(0, 4, 3), request(1, 16, 1)])
    # a is read from 0 to 1004; b arrives at 1000 and gets the 7 tokens a's decode leaves, twice, then its last 2
    assert [(step.end_ps, step.prefill_tokens, step.decodes) for step in steps] == [
        (1004, 4, 0),
        (2012, 7, 1),
        (3020, 7, 1),
        (4022, 2, 0),
    ]
    assert (a.finish_ps, b.first_token_ps, b.finish_ps) == (3020, 4022, 4022)


def test_a_preemption_by_hand() -> None:
    (a, b), steps = served([capacity(cache_tokens=12)], [request(0, 4, 5), request(0, 4, 4)])
    # begins  ends   what                                                                   cache occupied
    #      0  1008   both prompts are read, with room for the first token of each            5 + 5
    #   1008  2010   both decode                                                            6 + 6
    #   2010  3011   2 decodes, no cache: b goes; it would need 7 tokens to come back       7
    #   3011  4012   a decodes, 4 tokens are free                                           8
    #   4012  5013   a decodes and is done                                                  9
    #   5013  6019   b's prompt and 2 tokens are read again, which makes its third          7
    #   6019  7020   b decodes its fourth token and is done                                 8
    assert [(step.end_ps, step.prefill_tokens, step.decodes, step.occupied_tokens) for step in steps] == [
        (1008, 8, 0, 10),
        (2010, 0, 2, 12),
        (3011, 0, 1, 7),
        (4012, 0, 1, 8),
        (5013, 0, 1, 9),
        (6019, 6, 0, 7),
        (7020, 0, 1, 8),
    ]
    assert (a.first_token_ps, a.finish_ps, a.preemptions) == (1008, 5013, 0)
    assert (b.first_token_ps, b.finish_ps, b.preemptions) == (1008, 7020, 1)


def test_a_prompt_under_way_is_the_first_to_be_preempted() -> None:
    (a, b), steps = served([capacity(cache_tokens=24)], [request(0, 4, 20), request(0, 18, 1)])
    # a needs 5 of the cache and b 19: full. a's first decode takes the cache of b, of which 4 tokens have been read.
    # a ends at 24 tokens, and b is read from the beginning: 8, 8, 2.
    assert steps[0].occupied_tokens == 24
    assert [step.prefill_tokens for step in steps] == [8, *[0] * 19, 8, 8, 2]
    assert (a.preemptions, b.preemptions) == (0, 1)
    assert a.finish_ps == 1008 + 19 * 1001
    assert b.finish_ps == a.finish_ps + 1008 + 1008 + 1002


def test_the_latest_of_three_goes_first_and_comes_back_behind_the_other() -> None:
    passages, steps = served(
        [capacity(cache_tokens=9)], [request(0, 2, 7), request(0, 2, 6), request(0, 2, 5), request(0, 1, 1)]
    )
    # All three prompts fill the cache (3 each). The first decodes cost c its place, the next ones b. When a is done, b
    # and c return in this order and fill the cache (5 + 4), so b's next decode takes c's once more. When b is done, c
    # returns, and d after it, who has waited since the start.
    assert [passage.preemptions for passage in passages] == [0, 1, 2, 0]
    assert [(step.prefill_tokens, step.decodes) for step in steps] == [
        (6, 0),
        (0, 2),
        *[(0, 1)] * 5,
        (4 + 3, 0),
        *[(0, 1)] * 3,
        (4 + 1, 0),
        *[(0, 1)] * 2,
    ]
    assert passages[3].finish_ps == steps[-3].end_ps
    assert max(step.occupied_tokens for step in steps) == 9


def test_a_step_knows_who_arrives_at_the_instant_it_begins() -> None:
    wide = capacity(step=replace(ROUND, step_tokens=2000), cache_tokens=5000, max_context_tokens=5000)
    (a, b, c), steps = served([wide], [request(0, 1000, 1), request(2, 5, 1), request(2, 6, 1)])
    # a's step ends at 2000, exactly when b and c arrive: one step of 11 tokens for both
    assert a.finish_ps == 2000
    assert [(step.begin_ps, step.end_ps) for step in steps] == [(0, 2000), (2000, 3011)]
    assert b.finish_ps == c.finish_ps == 3011


def test_the_router_sees_what_is_finished_at_the_arrival() -> None:
    wide = replace(ROUND, step_tokens=2000)
    pair = [capacity("a/0", step=wide, cache_tokens=5000, max_context_tokens=5000)]
    pair.append(replace(pair[0], replica="a/1"))
    passages, _ = served(pair, [request(0, 1000, 1), request(1, 10, 1), request(2, 10, 1)])
    # at 1000 the first replica is busy; at 2000 its step has just ended, and of two idle ones the first is taken
    assert [passage.replica for passage in passages] == [0, 1, 0]


def test_a_replica_twice_as_fast_takes_twice_the_backlog() -> None:
    pair = [capacity("slow", tokens_per_s=1e6), capacity("fast", tokens_per_s=2e6)]
    passages, _ = served(pair, [request(0, 10, 10)] * 6)
    # until its prompt would be read, in units of 20 tokens over the slow rate, before each choice, of the slow and the
    # fast one: ½ ¼, ½ ¾, 3/2 ¾, 3/2 5/4, 3/2 7/4, 5/2 7/4
    assert [passage.replica for passage in passages] == [1, 0, 1, 1, 0, 1]


def test_a_request_that_can_never_fit_is_refused_with_a_reason() -> None:
    small, large = capacity("small", cache_tokens=20), capacity("large", cache_tokens=50, max_context_tokens=40)
    passages, _ = served([small, large], [request(0, 30, 11), request(0, 30, 10), request(0, 1, 1)])
    assert passages[0].refusal == TOO_LONG
    assert (passages[0].finish_ps, passages[0].produced_tokens) == (0, 0)
    assert [passage.replica for passage in passages] == [NOBODY, 1, 0]


def test_without_a_replica_everybody_is_refused() -> None:
    (passage,), _ = served([], [request(0, 1, 1)], deadline_s=2.0)
    assert (passage.refusal, passage.retry_s, passage.finish_ps) == (NOT_SERVED, 2.0, 0)
    (passage,), _ = served([capacity()], [request(0, 1, 1)], deadline_s=2.0, changes=[])
    assert (passage.refusal, passage.retry_s, passage.finish_ps) == (NOT_SERVED, 2.0, 0)


def test_admission_counts_unread_prompts_and_requests_that_wait_for_a_slot() -> None:
    # 10 tokens/s, prompts of 5, read in 0.5 s. The first four get the slots, and wait for what is read before them: 0, 0.5,
    # 1 and 1.5 s. The others wait for all four, 2 s, and for the 15 tokens that each of those before them should take: 0,
    # 1.5, 3 s, which with caution may be 3.5 s, and 4.5 s.
    passages, _ = served([capacity(tokens_per_s=10.0)], [request(0, 5, 50)] * 9, deadline_s=2.5 + 3.5 / CAUTION)
    assert [passage.refusal for passage in passages] == [0] * 7 + [TOO_LATE] * 2
    assert passages[7].retry_s == pytest.approx(1.0)


def test_requests_that_are_being_decoded_hold_nobody_up() -> None:
    busy = [request(arrival_ns, 1, 90) for arrival_ns in (0, 2, 4)]
    passages, _ = served([capacity(tokens_per_s=1.0)], [*busy, request(6, 1, 1)], deadline_s=0.5)
    assert not any(passage.refusal for passage in passages)


def test_the_desk_does_not_know_how_long_an_answer_will_be() -> None:
    pair = [capacity("a/0", tokens_per_s=1e3), capacity("a/1", tokens_per_s=1e3)]
    short, _ = served(pair, [request(0, 5, 1)] * 14, deadline_s=0.025 + 0.025 / CAUTION)
    long, _ = served(pair, [request(0, 5, 90)] * 14, deadline_s=0.025 + 0.025 / CAUTION)
    assert [one.refusal for one in short] == [one.refusal for one in long] == [0] * 12 + [TOO_LATE] * 2
    assert [one.replica for one in short][:8] == [one.replica for one in long][:8] == [0, 1] * 4


def test_requests_wait_at_the_desk_until_any_replica_has_a_slot() -> None:
    """The first replica gets a long answer and a short one, the second likewise; the third waits for who is first."""
    pair = [capacity("a/0", max_batch=1), capacity("a/1", max_batch=1)]
    (_, _, third, fourth), _ = served(pair, [request(0, 1, 9), request(0, 1, 3), request(0, 1, 4), request(1, 1, 1)])
    assert [(one.replica, one.started_ps) for one in (third, fourth)] == [(1, 3003), (1, 7007)]


def test_a_prompt_is_read_here_and_its_answer_written_there() -> None:
    pair = [capacity("read", role="prefill", transfer_ps_per_token=100), capacity("write", role="decode")]
    (a, b), steps = served(pair, [request(0, 4, 3), request(0, 2, 1)])
    # begins  ends   where   what
    #      0  1006   read    both prompts; b wants no more than its first token
    #   1406  2407   write   a's cache of 4 tokens has come, and it decodes its second
    #   2407  3408   write   and its third
    assert [(step.replica, step.begin_ps, step.end_ps, step.prefill_tokens, step.decodes) for step in steps] == [
        ("read", 0, 1006, 6, 0),
        ("write", 1406, 2407, 0, 1),
        ("write", 2407, 3408, 0, 1),
    ]
    assert (a.read_by, a.replica, a.first_token_ps, a.finish_ps) == (0, 1, 1006, 3408)
    assert (b.read_by, b.replica, b.first_token_ps, b.finish_ps) == (NOBODY, 0, 1006, 1006)
    assert (a.read_busy_ps, a.busy_ps, b.busy_ps) == (4 * 167, 2002, 2 * 167)  # 1006 = 6 x 167 + 4
    assert steps[1].occupied_tokens == 4 + 1 + 1  # prompt, first token, and the claim of the second


def test_who_was_preempted_while_writing_is_read_again_where_it_writes() -> None:
    pair = [capacity("read", role="prefill"), capacity("write", role="decode", cache_tokens=12)]
    (a, b), steps = served(pair, [request(0, 4, 5), request(0, 4, 4)])
    # begins  ends   what                                                           cache occupied
    #   1008  2010   both have come, with 5 tokens each, and decode                 6 + 6
    #   2010  3011   2 decodes, no cache: b goes; to come back it would need 7      7
    #   3011  4012   a decodes, 4 tokens are free                                   8
    #   4012  5013   a decodes and is done                                          9
    #   5013  6019   b's prompt and 2 tokens are read, here                         7
    #   6019  7020   b decodes its fourth token and is done                         8
    assert [(step.end_ps, step.prefill_tokens, step.decodes, step.occupied_tokens) for step in steps[1:]] == [
        (2010, 0, 2, 12),
        (3011, 0, 1, 7),
        (4012, 0, 1, 8),
        (5013, 0, 1, 9),
        (6019, 6, 0, 7),
        (7020, 0, 1, 8),
    ]
    assert (a.preemptions, b.preemptions, b.finish_ps) == (0, 1, 7020)


def test_a_prefill_replica_accepts_only_what_can_be_written_somewhere() -> None:
    reader = capacity("read", role="prefill")
    assert served([reader], [request(0, 1, 1)])[0][0].refusal == NOT_SERVED, "nobody writes"
    passages, _ = served(
        [reader, capacity("write", role="decode", cache_tokens=20)], [request(0, 18, 3), request(0, 18, 2)]
    )
    assert passages[0].refusal == TOO_LONG
    assert passages[1].replica == 1


def change(at_ps: int, kind: str, replica: int) -> Change:
    return Change(at_ps=at_ps, kind=kind, replica=replica)  # type: ignore[arg-type] # mypy does not know the kind


def test_what_has_begun_is_written_even_when_no_decode_replica_gets_requests() -> None:
    pair = [capacity("read", role="prefill"), capacity("write", role="decode")]
    changes = [change(0, "ready", 0), change(0, "ready", 1), change(1, "drain", 1)]
    ((passage,), _) = served(pair, [request(0, 4, 3)], changes=changes)
    assert (passage.replica, passage.produced_tokens) == (1, 3)


def test_a_cache_that_nobody_can_take_asks_again_every_second() -> None:
    pair = [capacity("read", role="prefill"), capacity("write", role="decode"), capacity("later", role="decode")]
    changes = [
        *[change(0, "ready", row) for row in (0, 1)],
        change(1, "fail", 1),
        change(1_500_000_000_000, "ready", 2),
    ]
    ((passage,), _) = served(pair, [request(0, 4, 3)], changes=changes)
    assert (passage.replica, passage.finish_ps) == (2, 1004 + 2 * 10**12 + 2 * 1001)


def test_a_replica_gets_requests_until_it_drains_and_serves_them_to_the_end() -> None:
    changes = [change(0, "ready", 0), change(3000, "drain", 0), change(3000, "ready", 1), change(6000, "drain", 1)]
    asked = [request(0, 1, 9), request(2, 1, 1), request(3, 1, 1), request(6, 1, 1)]
    passages, _ = served([capacity("first"), capacity("second")], asked, deadline_s=1e9, changes=changes)
    assert [passage.replica for passage in passages] == [0, 0, 1, NOBODY]
    assert passages[0].finish_ps == 9 * 1001 + 1, "one of the steps has two tokens"
    assert passages[3].refusal == NOT_SERVED


def test_who_was_on_a_replica_that_failed_goes_first_and_keeps_its_tokens() -> None:
    pair = [capacity("a/0", max_batch=2), capacity("a/1", max_batch=2)]
    changes = [change(0, "ready", 0), change(2500, "fail", 0), change(4000, "ready", 1)]
    asked = [request(0, 2, 5), request(0, 2, 4), request(1, 1, 1)]
    (a, b, c), steps = served(pair, asked, changes=changes)
    # begins  ends   what
    #      0  1004   both prompts are read
    #   1004  2006   both decode
    #   2006         fails at 2500 with this step: both go back to the desk, before c, with two tokens each
    #   4000  5008   all that is known of both is read again, 2 x 4 tokens, and makes a third token each
    #   5008  6010   both decode; b is done, and c, who has waited since 1000, gets its slot
    #   6010  7012   a decodes and is done, c's prompt is read
    assert [(step.begin_ps, step.end_ps, step.prefill_tokens, step.decodes) for step in steps[3:]] == [
        (4000, 5008, 8, 0),
        (5008, 6010, 0, 2),
        (6010, 7012, 1, 1),
    ]
    assert [(one.replica, one.restarts, one.first_token_ps) for one in (a, b, c)] == [
        (1, 1, 1004),
        (1, 1, 1004),
        (1, 0, 7012),
    ]
    assert (a.produced_tokens, a.finish_ps, a.losses) == (5, 7012, [(0, 502 + 501, 2500)])


@pytest.mark.parametrize(("leaves_ps", "tokens", "finish_ps"), [(2009, 2, 2010), (2010, 2, 2010), (2011, 3, 3012)])
def test_who_leaves_in_the_middle_of_its_answer_ends_with_the_step_under_way(
    leaves_ps: int, tokens: int, finish_ps: int
) -> None:
    pair = [replace(request(0, 4, 5), leaves_ps=leaves_ps), request(0, 4, 4), request(0, 2, 1)]
    (a, b, c), steps = served([capacity(max_batch=2)], pair)
    # begins  ends   what
    #      0  1008   both prompts are read, and make a token each; c waits at the desk for a slot
    #   1008  2010   both decode
    #   2010  3012   both decode, where a is still there; c has its place after this step, else in it
    assert (a.left, a.produced_tokens, a.finish_ps, a.refusal) == (True, tokens, finish_ps, 0)
    assert a.busy_ps == 4 * 126 + (tokens - 1) * 501  # 1008 = 8 x 126, 1002 = 2 x 501
    assert c.started_ps == finish_ps, "its place is the next one's"
    assert [step.prefill_tokens for step in steps] == [8, *[0] * (tokens - 1), 2, *[0] * (3 - tokens)]
    assert (b.left, b.produced_tokens, c.produced_tokens) == (False, 4, 1)
    assert steps[tokens].occupied_tokens == (4 + tokens + 1) + (2 + 1), "of the cache only b and c have something"


def test_an_answer_that_is_complete_when_its_client_leaves_is_served_and_a_token_too_late_is_not() -> None:
    for leaves_ps, left in ((1004, False), (1003, True)):
        ((one,), _) = served([capacity()], [replace(request(0, 4, 1), leaves_ps=leaves_ps)])
        assert (one.left, one.produced_tokens, one.finish_ps) == (left, 1, 1004)


def test_who_leaves_while_its_prompt_is_read_has_no_token_and_whoever_waits_behind_it_is_read() -> None:
    asked = [replace(request(0, 20, 5), leaves_ps=1500), request(0, 3, 1)]
    (a, b), steps = served([capacity()], asked)
    # 8 and 8 of the 20 are read by 2016; then a is gone, and b is read
    assert [(step.end_ps, step.prefill_tokens) for step in steps] == [(1008, 8), (2016, 8), (3019, 3)]
    assert (a.left, a.produced_tokens, a.first_token_ps, a.finish_ps) == (True, 0, -1, 2016)
    assert (b.left, b.finish_ps) == (False, 3019)


def test_a_cache_on_its_way_is_written_by_nobody_when_its_client_has_left() -> None:
    pair = [capacity("read", role="prefill", transfer_ps_per_token=100), capacity("write", role="decode")]
    (a,), steps = served(pair, [replace(request(0, 4, 3), leaves_ps=1200)])
    assert [step.replica for step in steps] == ["read"], "it was read at 1004, and came at 1404"
    assert (a.refusal, a.produced_tokens, a.read_by, a.finish_ps) == (GAVE_UP, 1, 0, 1200)


def test_who_leaves_a_replica_that_fails_does_not_come_back() -> None:
    changes = [change(0, "ready", 0), change(2500, "fail", 0), change(4000, "ready", 1)]
    asked = [replace(request(0, 2, 5), leaves_ps=2200), request(0, 2, 4)]
    (a, b), _ = served([capacity("a/0"), capacity("a/1")], asked, changes=changes)
    assert (a.refusal, a.produced_tokens, a.finish_ps, a.losses) == (GAVE_UP, 2, 2500, [(0, 502 + 501, 2500)])
    assert (b.replica, b.restarts, b.produced_tokens) == (1, 1, 4)


# --- Closed forms ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 80), st.integers(1, 30), st.integers(1, 20), st.sampled_from([ROUND, LENGTHY]))
def test_a_single_request_takes_the_sum_of_its_steps(prompt: int, output: int, budget: int, step: StepCost) -> None:
    step = replace(step, step_tokens=budget)
    (passage,), _ = served(
        [capacity(step=step, cache_tokens=200, max_context_tokens=200)], [request(7, prompt, output)]
    )
    chunks = [(first, min(budget, prompt - first)) for first in range(0, prompt, budget)]
    read_ps = sum(step.step_ps(chunk, prefill_pairs(first, chunk), 0, 0) for first, chunk in chunks)
    decode_ps = sum(step.step_ps(0, 0, 1, prompt + produced) for produced in range(1, output))
    assert passage.first_token_ps == 7000 + read_ps
    assert passage.finish_ps == 7000 + read_ps + decode_ps
    assert 0 <= read_ps + decode_ps - passage.busy_ps < chunks[-1][1]  # a picosecond a token waits for the next step


def test_a_full_batch_sustains_batch_over_step_time() -> None:
    passages, steps = served([capacity(cache_tokens=1000)], [request(0, 1, 50)] * 200)
    # 4 slots, always full; each request takes 50 steps of 1004 ps
    assert {step.decodes + step.prefill_tokens for step in steps} == {4}
    assert max(passage.finish_ps for passage in passages) == 200 // 4 * 50 * 1004


def test_one_slot_waits_as_queueing_theory_says() -> None:
    """M/D/1 at load ρ: the mean wait is ρ / (2 (1 - ρ)) services (Pollaczek and Khinchine)."""
    generator = np.random.Generator(np.random.PCG64(7))
    alone = capacity(max_batch=1, step=replace(ROUND, tokens_ps=(0, 10**9 - 4)))  # 5 prompt tokens: exactly 1 ms
    arrivals_s = np.cumsum(generator.exponential(2e-3, 20_000)).tolist()  # ρ = 1/2
    requests = [Request(arrival_s=at_s, prompt_tokens=5, output_tokens=1) for at_s in arrivals_s]
    passages, _ = served([alone], asks(requests))
    waits_ms = [(passage.started_ps - passage.ask.arrival_ps) / 1e9 for passage in passages]
    assert sum(waits_ms) / len(waits_ms) == pytest.approx(0.5, rel=0.05)


# --- Always ---------------------------------------------------------------------------------------------------------

capacities = st.lists(
    st.builds(
        capacity,
        step=st.builds(replace, st.sampled_from([ROUND, LENGTHY]), step_tokens=st.integers(1, 12)),
        max_batch=st.integers(1, 6),
        cache_tokens=st.integers(16, 40),
        max_context_tokens=st.integers(16, 60),
        tokens_per_s=st.sampled_from([1e6, 2e6, 5e6]),
    ),
    min_size=1,
    max_size=3,
).map(lambda made: [replace(one, replica=f"a/{index}") for index, one in enumerate(made)])

workloads = st.lists(
    st.builds(request, st.integers(0, 20), st.integers(1, 12), st.integers(1, 14)), min_size=5, max_size=30
).map(lambda made: sorted(made, key=lambda one: one.arrival_ps))


@settings(max_examples=300)
@given(capacities, workloads, st.sampled_from([math.inf, 2e-5]))
def test_what_always_holds(fleet: list[Capacity], requests: list[Ask], deadline_s: float) -> None:
    passages, steps = served(fleet, requests, deadline_s=deadline_s)

    # every request ends once: refused on arrival, or with every token it asked for
    assert [passage.ask for passage in passages] == requests
    for passage in passages:
        if passage.refusal:
            assert (passage.replica, passage.produced_tokens, passage.busy_ps) == (NOBODY, 0, 0)
            assert passage.finish_ps == passage.ask.arrival_ps
        else:
            assert passage.produced_tokens == passage.ask.output_tokens
            assert passage.ask.arrival_ps <= passage.started_ps < passage.first_token_ps <= passage.finish_ps

    for index, one in enumerate(fleet):
        own_steps = [step for step in steps if step.replica == one.replica]
        own = [passage for passage in passages if passage.replica == index]
        # limits, and time never runs backwards
        for step in own_steps:
            assert step.occupied_tokens <= one.cache_tokens
            assert 1 <= step.running <= one.max_batch
            assert 1 <= step.decodes + step.prefill_tokens <= one.step.step_tokens
            assert step.begin_ps < step.end_ps
        assert all(before.end_ps <= after.begin_ps for before, after in pairwise(own_steps))
        # busy time is shared, but for less than a picosecond a token of the last step
        busy_ps = sum(step.end_ps - step.begin_ps for step in own_steps)
        last_tokens = own_steps[-1].decodes + own_steps[-1].prefill_tokens if own_steps else 1
        assert 0 <= busy_ps - sum(passage.busy_ps for passage in own) < last_tokens
        # a step computes each token once, and again after a preemption
        computed = sum(step.decodes + step.prefill_tokens for step in own_steps)
        asked = sum(passage.ask.prompt_tokens + passage.ask.output_tokens - 1 for passage in own)
        assert computed >= asked
        if not any(passage.preemptions for passage in own):
            assert computed == asked
            starts = sorted((passage.started_ps, passage.first_token_ps) for passage in own)
            assert [first for _, first in starts] == sorted(first for _, first in starts)

    # without a deadline only those are refused who fit nowhere
    if deadline_s == math.inf:
        longest = max(min(one.cache_tokens, one.max_context_tokens) for one in fleet)
        for passage in passages:
            too_long = passage.ask.prompt_tokens + passage.ask.output_tokens > longest
            assert passage.refusal == (TOO_LONG if too_long else 0)

    # and the same input gives the same output
    again, _ = served(fleet, requests, deadline_s=deadline_s)
    assert [asdict(passage) for passage in again] == [asdict(passage) for passage in passages]


@given(st.integers(2, 40), st.integers(1, 8), st.lists(st.integers(1, 39), min_size=1, max_size=40))
def test_no_livelock_when_every_request_could_fill_the_cache(cache: int, batch: int, prompts: list[int]) -> None:
    """The oldest running request moves in every step, so the steps are bounded by the tokens of all requests."""
    requests = [request(0, min(prompt, cache - 1), cache - min(prompt, cache - 1)) for prompt in prompts]
    passages, steps = served([capacity(cache_tokens=cache, max_batch=batch)], requests)
    assert not any(passage.refusal for passage in passages)
    # all but preempted work is useful, and each step does some for the oldest: a request holds at most `cache` tokens,
    # is read in at most that many steps, and becomes the oldest once
    assert len(steps) <= len(requests) * cache * 2


def test_under_heavy_cache_pressure_everybody_finishes() -> None:
    requests = [request(10 * index, 20 + index % 17, 30 + index % 23) for index in range(1000)]
    passages, _ = served([capacity(cache_tokens=100, max_batch=64)], requests)
    assert all(passage.produced_tokens == passage.ask.output_tokens for passage in passages)
    assert sum(passage.preemptions for passage in passages) > 500


def test_arrivals_keep_the_digits_of_a_trace() -> None:
    def arrival_ps(arrival_s: float) -> int:
        return asks([Request(arrival_s=arrival_s, prompt_tokens=1, output_tokens=1)])[0].arrival_ps

    assert arrival_ps(3435.948056) == 3_435_948_056_000_000
    assert arrival_ps(1_209_600.0000001) == 1_209_600_000_000_100_000
