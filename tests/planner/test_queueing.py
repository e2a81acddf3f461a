"""The planner's estimate of what nearly every request sees, held against the step-by-step rehearsal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import PCG64, Generator

from waterline.cost import StepCost, serving_point
from waterline.cost.step import AttentionCost
from waterline.planner.queueing import pace_at, quantile_s, sustained_requests_per_s, usual_lengths
from waterline.rehearsal.arrivals import poisson_trace
from waterline.rehearsal.oracle import Capacity, Passage, serve
from waterline.workload import Slo

PROMPT, OUTPUT = 400, 80
LENGTHS = usual_lengths(PROMPT, OUTPUT)
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
    assert alone.late_tokens_fraction(alone.plain_s * 1.001) == 0.0
    assert alone.late_first_fraction(100 * alone.read_s) == 0.0
    assert 0.2 < alone.late_first_fraction(alone.read_s + alone.plain_s) < 0.5  # longer than the mean


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


@pytest.mark.parametrize(
    "slo",
    [
        Slo(ttft_s=0.2, tpot_s=0.01),
        Slo(ttft_s=0.1, tpot_s=0.02),
        Slo(ttft_s=0.5, tpot_s=0.006),
        Slo(ttft_s=0.5, tpot_s=0.006, fraction=0.9),
    ],
)
def test_at_the_sustained_rate_the_rehearsal_sees_no_more_than_half_as_many_late_again(slo: Slo) -> None:
    rate = sustained_requests_per_s(STEP, LENGTHS, 64, slo)
    late = 1 - share_within(STEP, rate, slo)
    assert late <= 1.5 * (1 - slo.fraction), (
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
    passages = serve(
        [replica], trace.requests, deadline_s=slo.ttft_s, expected_prompt_tokens=PROMPT, expected_output_tokens=OUTPUT
    )
    return sum(within(passage, slo) for passage in passages) / len(passages)


def within(passage: Passage, slo: Slo) -> bool:
    ttft_ps, later_tokens = passage.first_token_ps - passage.arrival_ps, max(1, passage.produced_tokens - 1)
    tpot_ps = (passage.finish_ps - passage.first_token_ps) / later_tokens
    return not passage.reason and ttft_ps <= slo.ttft_s * 1e12 and tpot_ps <= slo.tpot_s * 1e12
