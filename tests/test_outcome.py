"""Completions and summaries, against numbers worked out by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.outcome import (
    MOST_CLIENTS,
    NO_CLIENT,
    NOWHERE,
    OK,
    OTHERS,
    REFUSED,
    Completion,
    Returns,
    Spent,
    Status,
    Tally,
    Where,
    percentiles,
    summarize,
)
from waterline.sketch import RELATIVE_ERROR
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
    whole = replace(done(ttft_s=2.5, tpot_s=0.0, output_tokens=9), whole=True)
    assert whole.meets(slo), "2.5 s, where 0.5 and 8 x 0.25 are due"
    assert not replace(whole, finish_s=whole.finish_s + 0.25).meets(slo)
    [total, _] = summarize([whole], {whole.model: slo}, 60.0, {"": 0.0})
    assert total.within_slo == 1
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
    assert (total.prompt_tokens, total.output_tokens) == (400, 11 + 11 + 0 + 1 + 3)  # who was refused had nothing read

    assert (public.tenant, public.model) == ("public", "small")
    assert (public.requests, public.completed, public.refused) == (3, 2, 1)
    assert public.ttft_s is not None
    assert public.ttft_s.mean == 1.25
    assert (public.ttft_s.p50, public.ttft_s.p99) == pytest.approx((0.5, 2.0), rel=RELATIVE_ERROR)
    assert public.latency_s is not None
    assert public.latency_s.mean == pytest.approx(1.25 + 10 * 0.05)
    assert public.slo_fraction == pytest.approx(1 / 3)
    assert public.usd == pytest.approx(1.0)  # all of small/0; nobody used small/1
    assert public.usd_per_million_tokens == pytest.approx(1.0 / (2 * 111) * 1e6)  # who was refused got none
    assert total.kwh is None

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


def test_who_cancelled_counts_neither_for_nor_against_the_slo_however_much_of_an_answer_there_was() -> None:
    some = [
        done(ttft_s=0.5),
        done(status="cancelled"),
        done(status="cancelled", output_tokens=0),
        done(status="failed"),
    ]
    total = summarize(some, SLOS, 1.0, {"small/0": 0.0})[0]
    assert (total.requests, total.completed, total.failed, total.cancelled) == (4, 1, 1, 2)
    assert (total.left_midway, total.gave_up) == (1, 1)
    assert total.slo_fraction == 0.5


def tally() -> Tally:
    """Return one of two tenants, two models and two pools; a replica of a GPU in each pool for each model."""
    found = Tally(SLOS, ["public", "research"], ["small", "large"], ["old", "new"])
    for model in ("small", "large"):
        for pool in ("old", "new"):
            found.add_replica(Where(f"{model}/{pool}", model, pool, 1))
    return found


def asked(count: int, **columns: Any) -> dict[str, Any]:
    """Return so many requests to the small model, answered at once on its old replica, but for what is said."""
    ones = np.ones(count, np.int64)
    usual = {
        "tenant": 0 * ones, "client": NO_CLIENT * ones, "model": 0 * ones, "status": OK * ones, "replica": 0 * ones,
        "arrival_s": np.arange(count, dtype=np.float64), "ttft_s": 0.5 * ones, "tpot_s": 0.05 * ones,
        "latency_s": 1.0 * ones, "prompt_tokens": 100 * ones, "output_tokens": 11 * ones, "busy_s": 0.25 * ones,
        "retry_s": 0.0 * ones,
        "cached_tokens": np.full(count, 3),
    }  # fmt: skip
    return usual | {name: np.broadcast_to(np.asarray(value), count) for name, value in columns.items()}


SPENT = Spent(
    duration_s=10.0,
    usd={"small/old": 1.0, "small/new": 2.0, "large/old": 4.0, "large/new": 8.0},
    kwh={"small/old": 10.0, "small/new": 20.0, "large/old": 40.0, "large/new": 80.0},
)


def test_the_same_requests_are_told_by_tenant_client_model_and_pool() -> None:
    counted = tally()
    names = ["ann", "bob"]
    counted.add(names, **asked(3, client=[0, 0, 1]))
    counted.add(names, **asked(2, tenant=1, model=1, replica=3, client=[NO_CLIENT, 1], ttft_s=4.0))
    counted.add(names, **asked(1, status=REFUSED, replica=NOWHERE, output_tokens=0, client=0, arrival_s=9.0))
    told = {fields: counted.by(SPENT, *fields) for fields in (("tenant",), ("tenant", "client"), ("model",), ("pool",))}
    assert [(one.tenant, one.requests, one.refused) for one in told["tenant",]] == [
        ("public", 4, 1),
        ("research", 2, 0),
    ]
    clients = [(one.tenant, one.client, one.requests, one.usd) for one in told["tenant", "client"]]
    # ann did two thirds of the public's work, bob a third; research paid for its replica, half of it for bob
    assert clients == [
        ("public", "ann", 3, pytest.approx(2 / 3)), ("public", "bob", 1, pytest.approx(1 / 3)), ("research", "bob", 1, 4.0),
    ]  # fmt: skip
    # what nobody used is on the account of its model and its pool
    assert [(one.model, one.requests, one.usd, one.kwh) for one in told["model",]] == [
        ("large", 2, 12.0, 120.0), ("small", 4, 3.0, 30.0),
    ]  # fmt: skip
    assert [(one.pool, one.requests, one.usd) for one in told["pool",]] == [("new", 2, 10.0), ("old", 3, 5.0)]
    total = counted.total(SPENT)
    assert (total.requests, total.completed, total.refused, total.usd, total.kwh) == (6, 5, 1, 15.0, 150.0)
    assert total.gpu_hours == pytest.approx(5 * 0.25 / 3600)


def test_clients_beyond_the_first_few_hundred_share_a_line() -> None:
    counted = tally()
    many = [f"client {number}" for number in range(MOST_CLIENTS + 100)]
    for begin in range(0, len(many), 100):
        counted.add(many[: begin + 100], **asked(100, client=np.arange(begin, begin + 100)))
    lines = counted.by(SPENT, "tenant", "client")
    assert len(lines) == MOST_CLIENTS + 1
    assert sum(line.requests for line in lines) == len(many)
    assert [line.requests for line in lines if line.client == OTHERS] == [100]
    assert math.fsum(line.usd for line in lines) == pytest.approx(1.0)


def test_what_was_read_elsewhere_is_on_the_account_of_that_pool() -> None:
    counted = tally()
    counted.add([], **asked(1, replica=1, busy_s=3.0))
    counted.use(
        [], tenant=np.zeros(1, np.int64), client=np.full(1, NO_CLIENT), model=np.zeros(1, np.int64),
        replica=np.zeros(1, np.int64), busy_s=np.array([1.0]),
    )  # fmt: skip
    assert [(one.pool, one.requests, one.gpu_hours * 3600) for one in counted.by(SPENT, "pool")] == [
        ("new", 1, pytest.approx(3.0)), ("old", 0, pytest.approx(1.0)),
    ]  # fmt: skip
    assert counted.by(SPENT, "tenant")[0].usd == pytest.approx(3.0)


def test_a_hundred_times_the_requests_take_no_more_memory() -> None:
    few, many = tally(), tally()
    few.add([], **asked(1000))
    for _ in range(100):
        many.add([], **asked(1000))
    assert many.total(SPENT).requests == 100_000
    assert few._ttft_s.counts.nbytes == many._ttft_s.counts.nbytes
    assert few._counts.nbytes == many._counts.nbytes


def returns(*pieces: list[tuple[int, float, bool, float]]) -> tuple[int, int, int]:
    """Return how many were told, came back and were taken, of pieces of (who, when, taken, told to come back in)."""
    watching, counts = Returns(), np.zeros(3, np.int64)
    for piece in pieces:
        who, arrival_s, taken, retry_s = (np.array(column) for column in zip(*piece, strict=True))
        arrival_us = np.rint(arrival_s * 1e6).astype(np.int64)
        counts += [len(cells) for cells in watching.add(who, arrival_us, taken, retry_s, who)]
    return tuple(counts.tolist())


def test_who_comes_back_when_told_and_is_taken_has_been_told_the_truth() -> None:
    no, yes = (7, 0.0, False, 10.0), (7, 10.0, True, 0.0)
    assert returns([no, yes]) == (1, 1, 1)
    assert returns([no], [yes]) == (1, 1, 1)
    assert returns([no, (7, 10.0, False, 5.0)]) == (2, 1, 0)  # it is refused again, and told again
    assert returns([no, (7, 9.9, True, 0.0)]) == (1, 0, 0)  # too early says nothing
    assert returns([no, (7, 9.9, False, 0.0), yes]) == (1, 1, 1)
    assert returns([no, (8, 10.0, True, 0.0)]) == (1, 0, 0)  # another client
    assert returns([no], [(7, 3611.0, True, 0.0)]) == (1, 0, 0)  # an hour later is another visit
    assert returns([no, (7, 1.0, False, 9.0), yes]) == (2, 2, 2)
    assert returns([(7, 0.0, True, 0.0)]) == (0, 0, 0)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 30), st.booleans(), st.sampled_from([0.0, 1.5, 4.0])),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 5),
)
def test_returns_are_the_same_a_piece_at_a_time(asks: list[tuple[int, int, bool, float]], size: int) -> None:
    ordered = [
        (who, float(at), taken, 0.0 if taken else retry)
        for who, at, taken, retry in sorted(asks, key=lambda one: one[1])
    ]
    told = [one for one in ordered if one[3] > 0]
    first = [
        next((one[2] for one in ordered if one[0] == who and one[1] >= at + retry), None) for who, at, _, retry in told
    ]
    expected = len(told), sum(one is not None for one in first), sum(one is True for one in first)
    assert returns(ordered) == expected
    assert returns(*(ordered[begin : begin + size] for begin in range(0, len(ordered), size))) == expected
