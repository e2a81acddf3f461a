"""The planner's estimate of what nearly every request sees, held against the step-by-step rehearsal."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import PCG64, Generator

from waterline.cost import StepCost, serving_point
from waterline.cost.step import AttentionCost
from waterline.planner.queueing import (
    Lengths,
    Load,
    Slos,
    late_fractions,
    normal_fraction,
    pace_at,
    paces,
    quantile_s,
    sustained,
    sustained_requests_per_s,
    usual_lengths,
)
from waterline.rehearsal.capacity import Capacity, Terms, asks
from waterline.rehearsal.drawing import poisson_trace
from waterline.rehearsal.oracle import serve
from waterline.rehearsal.stepped import Passage
from waterline.workload import Slo

PROMPT, OUTPUT = 400, 80
LENGTHS = usual_lengths(PROMPT, OUTPUT)
LENGTHS_OF = {
    "prompt_tokens": PROMPT, "output_tokens": OUTPUT, "prompt_sigma": 1.0, "output_sigma": 1.0,
    "context_tokens": LENGTHS.context_tokens,
}  # fmt: skip
STEP = StepCost(  # weights are read in 2 ms, a token multiplied in 20 us, and one of the cache read in 8 ns
    tokens_ps=tuple(max(2_000_000_000, 20_000_000 * tokens) for tokens in range(513)),
    more_ps_per_token=20_000_000,
    head_ps=(0, 200_000),
    attention=(
        AttentionCost(
            window_tokens=0,
            decode_ps=(0,),
            decode_ps_per_token=(8_000,),
            prefill_ps=0,
            prefill_ps_per_token=0,
            prefill_ps_per_pair=320,
        ),
    ),
    step_tokens=512,
)


def test_a_lone_request_is_never_interrupted() -> None:
    alone = pace_at(STEP, 0.0, LENGTHS)
    assert alone is not None
    assert alone.batch == 0
    assert alone.late_tokens_fraction(alone.plain_s * 1.001) == pytest.approx(0.0, abs=1e-9)
    assert alone.late_first_fraction(100 * alone.own_s) == 0.0
    assert 0.2 < alone.late_first_fraction(alone.own_s + alone.plain_s) < 0.5  # longer than the mean


@given(st.floats(0.1, 100), st.floats(1.0, 1.5), st.floats(1e-3, 1))
def test_a_higher_rate_is_never_in_better_time(requests_per_s: float, more: float, time_s: float) -> None:
    slower, faster = (pace_at(STEP, rate, LENGTHS) for rate in (requests_per_s * more, requests_per_s))
    assert faster is not None
    if slower is not None:
        assert slower.late_first_fraction(time_s) >= faster.late_first_fraction(time_s) - 1e-9
        assert slower.batch >= faster.batch * (1 - 1e-9)


def test_more_than_it_can_read_falls_behind() -> None:
    assert pace_at(STEP, 1e4, LENGTHS) is None


def test_an_slo_below_a_lone_request_sustains_nothing() -> None:
    assert sustained_requests_per_s(STEP, LENGTHS, 64, Slo(ttft_s=1.0, tpot_s=0.001)) == 0.0


def test_full_all_the_time_is_an_upper_bound() -> None:
    sustained = sustained_requests_per_s(STEP, LENGTHS, 64, Slo(ttft_s=10.0, tpot_s=10.0))
    assert 0 < sustained < serving_point(STEP, 64, PROMPT, OUTPUT).requests_per_s


def test_a_quantile_is_where_the_late_fraction_says() -> None:
    pace = pace_at(STEP, 20.0, LENGTHS)
    assert pace is not None
    ttft_s = quantile_s(pace.late_first_fraction, 0.05, pace.read_s)
    assert pace.late_first_fraction(ttft_s) <= 0.05 < pace.late_first_fraction(ttft_s * 0.98)


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(st.integers(20, 4000), st.integers(1, 800), st.floats(0.05, 2), st.floats(0.003, 0.05)), min_size=1
    )
)
def test_many_replicas_at_once_are_priced_like_each_by_itself(asked: list[tuple[int, int, float, float]]) -> None:
    lengths = [usual_lengths(prompt, output) for prompt, output, *_ in asked]
    slos = [Slo(ttft_s=ttft_s, tpot_s=tpot_s) for *_, ttft_s, tpot_s in asked]
    together = sustained(Load([STEP] * len(asked), lengths), np.full(len(asked), 64), Slos(slos)).requests_per_s
    alone = [sustained_requests_per_s(STEP, length, 64, slo) for length, slo in zip(lengths, slos, strict=True)]
    assert together.tolist() == pytest.approx(alone, rel=1e-9)


@settings(max_examples=40)
@given(st.floats(0.05, 2), st.floats(0.004, 0.05), st.sampled_from([0.9, 0.99]))
def test_the_sustained_rate_is_the_largest_at_which_few_enough_are_late(
    ttft_s: float, tpot_s: float, fraction: float
) -> None:
    load, slos, most = Load([STEP], [LENGTHS]), Slos([Slo(ttft_s=ttft_s, tpot_s=tpot_s, fraction=fraction)]), 64
    rate = sustained(load, np.array([most]), slos).requests_per_s
    if rate[0] == 0.0:
        return
    late = [
        float(np.sum(late_fractions(paces(load, rate * part)[0], np.array([most]), slos, reads=True)))
        for part in (0.99, 1.01)
    ]
    allowed = float(slos.late_fraction[0])
    assert late[0] <= allowed * 1.001
    assert late[1] >= allowed * 0.999 or paces(load, rate)[0].batch[0] > 0.98 * most


def test_prompts_found_in_the_cache_leave_room_for_more_requests() -> None:
    slo = Slo(ttft_s=0.5, tpot_s=0.01)
    rates = [
        sustained_requests_per_s(STEP, Lengths(**(LENGTHS_OF | {"prefix_hit": hit})), 64, slo)
        for hit in (0.0, 0.5, 0.9)
    ]
    assert rates[0] * 1.2 < rates[1] < rates[2]


def test_the_normal_distribution_is_that_of_the_standard_library() -> None:
    values = np.linspace(-9, 9, 1001)
    assert normal_fraction(values) == pytest.approx([NormalDist().cdf(value) for value in values], abs=2e-12)


@pytest.mark.parametrize(
    "slo",
    [
        Slo(ttft_s=0.2, tpot_s=0.01),
        Slo(ttft_s=0.1, tpot_s=0.02),
        Slo(ttft_s=0.5, tpot_s=0.006),
        Slo(ttft_s=0.5, tpot_s=0.006, fraction=0.9),
    ],
)
def test_at_the_sustained_rate_the_rehearsal_sees_no_more_late_than_the_slo_allows(slo: Slo) -> None:
    rate = sustained_requests_per_s(STEP, LENGTHS, 64, slo)
    late = 1 - share_within(STEP, rate, slo)
    assert late <= 1.1 * (1 - slo.fraction), (  # five thousand requests, give or take
        f"{late:.4f} late at {rate:.2f} requests/s, {1 - slo.fraction:.4f} promised"
    )


def share_within(step: StepCost, requests_per_s: float, slo: Slo) -> float:
    """Rehearse five thousand requests on one replica; return the share that met the SLO."""
    trace = poisson_trace(
        "drawn",
        [requests_per_s] * 24,
        prompt_tokens=PROMPT,
        output_tokens=OUTPUT,
        max_context_tokens=16_384,
        duration_s=5000 / requests_per_s,
        first_hour=0,
        generator=Generator(PCG64(7)),
    )
    reading = pace_at(step, requests_per_s, LENGTHS)
    assert reading is not None
    replica = Capacity(
        replica="chat/0",
        gpus=1,
        step=step,
        max_batch=64,
        cache_tokens=1_000_000,
        max_context_tokens=16_384,
        prefill_tokens_per_s=PROMPT / reading.read_s,
        tokens_per_s=serving_point(step, 64, PROMPT, OUTPUT).requests_per_s * (PROMPT + OUTPUT),
    )
    passages = serve([replica], asks(trace.requests), Terms(ttft_s=(slo.ttft_s,), output_tokens=(OUTPUT,)))
    return sum(within(passage, slo) for passage in passages) / len(passages)


def within(passage: Passage, slo: Slo) -> bool:
    ttft_ps, later_tokens = passage.first_token_ps - passage.ask.arrival_ps, max(1, passage.produced_tokens - 1)
    tpot_ps = (passage.finish_ps - passage.first_token_ps) / later_tokens
    return not passage.refusal and ttft_ps <= slo.ttft_s * 1e12 and tpot_ps <= slo.tpot_s * 1e12
