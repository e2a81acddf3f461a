"""Completions and summaries, against numbers worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.outcome import Completion, Status, percentiles, summarize
from waterline.workload import Slo

SLOS = {"small": Slo(ttft_s=1.0, tpot_s=0.1), "large": Slo(ttft_s=5.0, tpot_s=0.2)}


def done(
    *,
    tenant: str = "public",
    model: str = "small",
    status: Status = "ok",
    arrival_s: float = 0.0,
    ttft_s: float = 0.5,
    tpot_s: float = 0.05,
    output_tokens: int = 11,
    gpu_s: float = 0.0,
) -> Completion:
    first_token_s = arrival_s + ttft_s
    return Completion(
        tenant=tenant,
        model=model,
        replica=f"{model}/0",
        status=status,
        arrival_s=arrival_s,
        first_token_s=first_token_s,
        finish_s=first_token_s + tpot_s * max(0, output_tokens - 1),
        prompt_tokens=100,
        output_tokens=output_tokens,
        gpu_s=gpu_s,
    )


def refused(*, tenant: str = "public", model: str = "small", arrival_s: float = 0.0) -> Completion:
    return Completion(
        tenant=tenant,
        model=model,
        replica="",
        status="refused",
        arrival_s=arrival_s,
        first_token_s=math.nan,
        finish_s=arrival_s,
        prompt_tokens=100,
        output_tokens=0,
        reason="too long",
    )


def test_times_of_a_completion() -> None:
    completion = done(arrival_s=2.0, ttft_s=0.5, tpot_s=0.25, output_tokens=5)
    assert completion.ttft_s == 0.5
    assert completion.finish_s == 3.5
    assert completion.tpot_s == 0.25


def test_a_single_token_has_no_time_between_tokens() -> None:
    assert done(output_tokens=1).tpot_s == 0.0


def test_an_slo_is_met_only_when_both_times_hold() -> None:
    slo = Slo(ttft_s=0.5, tpot_s=0.25)
    assert done(ttft_s=0.5, tpot_s=0.25).meets(slo)
    assert not done(ttft_s=0.75, tpot_s=0.25).meets(slo)
    assert not done(ttft_s=0.5, tpot_s=0.5).meets(slo)
    assert not done(status="cancelled").meets(slo)
    assert not refused().meets(slo)


def test_percentiles_are_values_that_occurred() -> None:
    ten = percentiles([float(value) for value in range(10, 0, -1)])
    assert ten is not None
    assert (ten.mean, ten.p50, ten.p90, ten.p99) == (5.5, 5.0, 9.0, 10.0)
    hundred = percentiles([float(value) for value in range(1, 101)])
    assert hundred is not None
    assert (hundred.p50, hundred.p90, hundred.p99) == (50.0, 90.0, 99.0)
    one = percentiles([7.0])
    assert one is not None
    assert (one.mean, one.p50, one.p90, one.p99) == (7.0, 7.0, 7.0, 7.0)
    assert percentiles([]) is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_a_percentile_is_the_smallest_value_that_the_share_does_not_exceed(values: list[float]) -> None:
    found = percentiles(values)
    assert found is not None
    for percent, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
        assert sum(other <= value for other in values) * 100 >= percent * len(values)
        assert sum(other < value for other in values) * 100 < percent * len(values)


def test_a_summary_by_hand() -> None:
    completions = [
        done(tenant="public", ttft_s=0.5, gpu_s=3600.0),  # within
        done(tenant="public", ttft_s=2.0, gpu_s=1800.0),  # too late
        refused(tenant="public"),
        done(tenant="research", model="large", ttft_s=2.0, output_tokens=1, gpu_s=5400.0),  # within, on a dearer card
        done(tenant="research", model="large", status="failed", output_tokens=3),
    ]
    usd_per_hour = {"small/0": 360.0, "small/1": 360.0, "large/0": 1440.0}
    total, public, research = summarize(completions, SLOS, 10.0, usd_per_hour)

    assert (total.tenant, total.model, total.requests) == ("", "", 5)
    assert (total.completed, total.refused, total.failed, total.within_slo) == (3, 1, 1, 2)
    assert total.goodput_per_s == 0.2
    assert total.slo_fraction == 0.4
    assert total.gpu_hours == 3.0
    assert total.usd == pytest.approx(6.0)
    assert (total.prompt_tokens, total.output_tokens) == (500, 11 + 11 + 0 + 1 + 3)

    assert (public.tenant, public.model) == ("public", "small")
    assert (public.requests, public.completed, public.refused) == (3, 2, 1)
    assert public.ttft_s is not None
    assert (public.ttft_s.mean, public.ttft_s.p50, public.ttft_s.p99) == (1.25, 0.5, 2.0)
    assert public.slo_fraction == pytest.approx(1 / 3)
    assert public.usd == pytest.approx(1.0)  # all of small/0; nobody used small/1

    assert (research.tenant, research.model) == ("research", "large")
    assert research.tpot_s is None  # its only completion had a single token
    assert research.failed == 1
    assert research.usd == pytest.approx(4.0)


def test_without_gpu_time_the_bill_stays_in_the_total() -> None:
    total, part = summarize([refused()], SLOS, 3600.0, {"small/0": 5.0})
    assert (total.usd, part.usd) == (5.0, 0.0)
    assert (total.ttft_s, total.goodput_per_s, total.slo_fraction) == (None, 0.0, 0.0)


def test_a_completion_without_tokens_does_not_spoil_the_percentiles() -> None:
    nothing = Completion(
        tenant="public",
        model="small",
        replica="small/0",
        status="ok",
        arrival_s=0.0,
        first_token_s=math.nan,
        finish_s=1.0,
        prompt_tokens=1,
        output_tokens=0,
    )
    total = summarize([nothing, done(ttft_s=0.5)], SLOS, 1.0, {"small/0": 0.0})[0]
    assert total.ttft_s is not None
    assert total.ttft_s.mean == 0.5
    assert (total.completed, total.within_slo) == (2, 1)


def test_nothing_at_all_is_a_summary_too() -> None:
    (total,) = summarize([], SLOS, 0.0, {})
    assert (total.requests, total.ttft_s, total.usd) == (0, None, 0.0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1e5)), min_size=1), st.floats(0, 1e6))
def test_the_parts_add_up_to_the_bill(shares: list[tuple[str, float]], usd: float) -> None:
    total, *parts = summarize(
        [done(tenant=name, gpu_s=gpu_s) for name, gpu_s in shares], SLOS, 3600.0, {"small/0": usd}
    )
    used = any(gpu_s > 1e-9 for _, gpu_s in shares)
    if used:
        assert sum(part.usd for part in parts) == pytest.approx(total.usd)


def test_who_cancelled_counts_neither_for_nor_against_the_slo() -> None:
    total = summarize([done(ttft_s=0.5), done(status="cancelled"), done(status="failed")], SLOS, 1.0, {"small/0": 0.0})[
        0
    ]
    assert (total.requests, total.completed, total.failed, total.cancelled) == (3, 1, 1, 1)
    assert total.slo_fraction == 0.5
