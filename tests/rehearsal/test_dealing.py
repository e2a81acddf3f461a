"""Recorded traffic in a rehearsal: who a request is from, surges by the clock, and what no row asks."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as replaced

from examples import small_plan
from waterline.errors import InputError, TraceError, UnknownNameError
from waterline.fleet import HOURS, Demand, Tenant
from waterline.plan import Plan
from waterline.rehearsal import rehearse
from waterline.rehearsal.arrivals import traffic
from waterline.rehearsal.dealing import deal, dealt
from waterline.workload import read_trace
from waterline.workload.files import open_trace
from waterline.workload.grammar import parse_surge, parse_traffic
from waterline.workload.stream import Names, Stream, chunk_of, cut

S = 10**9


def row(tenant: str, rate: float | tuple[float, ...] | None = 1.0, model: str = "chat", trace: str = "") -> Demand:
    return Demand(tenant=tenant, model=model, requests_per_s=rate, trace=trace)


def plan_with(*demand: Demand) -> Plan:
    plan = small_plan()
    tenants = tuple(Tenant(name=name) for name in dict.fromkeys(one.tenant for one in demand))
    return replaced(plan, fleet=replaced(plan.fleet, tenants=tenants, demand=demand))


def stream_of(names: list[str], models: list[str] | None = None, size: int = 4, clock_s: int = 0) -> Stream:
    """Make a stream of a request a second; `size` of them a chunk."""
    tenants, of = Names(), Names()
    count = len(names)
    whole = chunk_of(
        np.arange(count) * S,
        np.full(count, 10, np.int32),
        np.full(count, 5, np.int32),
        tenant=tenants.indices(names),
        model=of.indices(models or [""] * count),
        line=np.arange(2, 2 + count),
    )
    return Stream(name="given", read=lambda: cut(whole, size), tenants=tenants, models=of, clock_ns=clock_s * S)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any), st.lists(st.integers(0, 30), max_size=6))
def test_dealing_in_parts_is_dealing_at_once(rates: list[int], parts: list[int]) -> None:
    taken = np.zeros(len(rates), np.int64)
    weights = [float(rate) for rate in rates]
    in_parts = [row for part in parts for row in deal(part, weights, taken).tolist()]
    assert in_parts == deal(sum(parts), weights).tolist()


def test_requests_go_to_the_rows_of_the_tenant_and_model_they_name() -> None:
    rows = [row("a", model="x"), row("a", model="y"), row("b", model="x")]
    given_ = stream_of(["a", "a", "b", "", "a", "", "a"], ["x", "y", "", "y", "", "", ""], size=3)
    got = dealt(given_, rows, [1.0, 1.0, 1.0]).whole()
    assert got.model.tolist() == [0, 1, 2, 1, 0, 0, 1]
    assert [dealt(given_, rows, [1.0] * 3).tenants[index] for index in got.tenant.tolist()] == [*"aabaaaa"]


def test_a_name_that_no_row_has_is_answered_with_what_to_write() -> None:
    with pytest.raises(TraceError) as caught:
        dealt(stream_of(["a", "z"]), [row("a")], [1.0]).whole()
    assert str(caught.value) == (
        "given, line 3: no [[demand]] is of tenant 'z'; there are a/chat. Add one, or say who is meant: "
        "--traffic 'tenant by tenant z=… *=…'"
    )


def test_a_surge_of_a_tenant_multiplies_its_part_of_a_dealt_trace() -> None:
    plan = plan_with(row("a"), row("b"))
    asked = traffic(
        plan, stream_of([""] * 600, size=100), seed=0, duration_s=None, surges=[parse_surge("a:5x@00:02+1m")]
    )
    got = Counter((request.tenant, int(request.arrival_s) // 60) for request in asked.requests())
    assert [got["b", minute] for minute in range(10)] == [30] * 10
    assert [got["a", minute] for minute in range(10)] == [30, 30, 150, 30, 30, 30, 30, 30, 30, 30]
    assert asked.notes[-1] == "surging a:5x@00:02+1m; it begins at 00:00"


def test_drawn_arrivals_surge_by_their_rate_from_an_hour_before_to_an_hour_after() -> None:
    plan = plan_with(row("a", 0.5), row("b", 0.5))
    surge = parse_surge("a:10x@20:30+1h")
    asked = traffic(plan, None, seed=2, duration_s=None, surges=[surge])
    got = Counter((request.tenant, int(request.arrival_s) // 1800) for request in asked.requests())
    assert asked.first_hour == 19
    calm, surging = 900, 9000
    for half_hour, expected in enumerate([calm, calm, calm, surging, surging, calm, calm]):
        assert got["a", half_hour] == pytest.approx(expected, abs=4 * expected**0.5)
        assert got["b", half_hour] == pytest.approx(calm, abs=4 * calm**0.5)


def test_a_rows_own_trace_surges_by_the_clock_of_the_rehearsal(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{at},5,5\n" for at in range(7200)))
    plan = plan_with(row("a", None, trace=str(path)), row("b", 0.1))
    asked = traffic(plan, None, seed=0, duration_s=None, surges=[parse_surge("a:3x@06:30+10m")])
    got = Counter(int(r.arrival_s) // 600 for r in asked.requests() if r.tenant == "a")  # from 5:00 on
    assert [got[ten] for ten in range(12)] == [600] * 9 + [1800] + [600] * 2


def test_a_long_trace_runs_by_its_own_clock_and_a_short_one_at_the_busiest_hour() -> None:
    busy = tuple(2.0 if hour == 15 else 1.0 for hour in range(HOURS))
    plan = plan_with(row("a", busy))
    short, long = stream_of(["a"] * 60, clock_s=7 * 3600), stream_of(["a"] * 3700, clock_s=7 * 3600, size=1000)
    assert traffic(plan, short, seed=0, duration_s=None).first_hour == 15
    assert traffic(plan, long, seed=0, duration_s=None).first_hour == 7
    assert traffic(plan, short, seed=0, duration_s=None, surges=[parse_surge("2x@07:00+1h")]).first_hour == 7


def test_a_surge_outside_of_the_rehearsal_or_of_nobody_is_an_error() -> None:
    plan = plan_with(row("a"))
    with pytest.raises(
        InputError, match=r"the surge 10x@20:00\+2h lies outside of the rehearsal, which goes from 00:00"
    ):
        traffic(plan, stream_of(["a"] * 60), seed=0, duration_s=None, surges=[parse_surge("10x@20:00+2h")])
    with pytest.raises(UnknownNameError, match="the fleet has no tenant 'publik'"):
        traffic(plan, None, seed=0, duration_s=None, surges=[parse_surge("publik:10x@20:00+2h")])
    idle = replaced(plan, fleet=replaced(plan.fleet, tenants=(*plan.fleet.tenants, Tenant(name="idle"))))
    with pytest.raises(InputError, match=r"tenant 'idle' of the surge idle:10x@20:00\+2h asks for nothing. Give it a"):
        traffic(idle, None, seed=0, duration_s=None, surges=[parse_surge("idle:10x@20:00+2h")])


def test_a_trace_beyond_the_context_is_an_error_and_single_requests_are_counted() -> None:
    plan = plan_with(row("a"))
    longest = plan.fleet.models[0].max_context_tokens

    def with_prompts(*prompts: int) -> Stream:
        own = stream_of(["a"] * len(prompts), size=len(prompts))
        return replace(own, read=lambda: iter([replace(own.whole(), prompt_tokens=np.array(prompts, np.int32))]))

    with pytest.raises(TraceError) as caught:
        traffic(plan, with_prompts(longest, 2 * longest), seed=0, duration_s=None)
    assert str(caught.value) == (
        f"given, line 2: {longest:,} + 5 tokens are more than the {longest:,} that a model of the fleet may hold, and so "
        f"is every other request. Write --traffic 'cut {longest}' to shorten them, or raise max_context_tokens."
    )
    cut_to_fit = parse_traffic(f"cut {longest}").apply(with_prompts(longest, 2 * longest))
    assert len(traffic(plan, cut_to_fit, seed=0, duration_s=None).requests()) == 2
    asked = traffic(plan, with_prompts(longest, longest - 5, 10), seed=0, duration_s=None)
    assert len(asked.requests()) == 3
    assert asked.notes[-1] == "1 of its requests are longer than any model's context, and refused"


def test_a_stream_is_rehearsed_like_the_same_trace_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{at / 8},{at + 1},9\n" for at in range(200)))
    stream, plan = open_trace(path), small_plan()
    assert rehearse(plan, stream).completions == rehearse(plan, read_trace(path)).completions
