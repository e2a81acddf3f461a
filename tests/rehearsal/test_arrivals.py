"""Who asks what: a trace dealt to the demand, or arrivals drawn for each row of it."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from examples import small_plan
from waterline.errors import InputError, TraceError
from waterline.fleet import HOURS, Demand, Model, Tenant
from waterline.plan import Plan
from waterline.rehearsal.arrivals import busiest_hour, traffic
from waterline.rehearsal.dealing import deal
from waterline.workload import Request, Trace, read_trace, write_trace
from waterline.workload.files import open_trace
from waterline.workload.operators import shift
from waterline.workload.stream import Stream

ROOT = Path(__file__).parents[2]


def requests(count: int) -> list[Request]:
    return [Request(arrival_s=float(index), prompt_tokens=10, output_tokens=5) for index in range(count)]


def row(
    tenant: str, requests_per_s: float | tuple[float, ...] | None = 1.0, model: str = "chat", trace: str = ""
) -> Demand:
    return Demand(tenant=tenant, model=model, requests_per_s=requests_per_s, trace=trace)


def plan_with(*demand: Demand) -> Plan:
    plan = small_plan()
    tenants = tuple(Tenant(name=name) for name in dict.fromkeys(one.tenant for one in demand)) or plan.fleet.tenants
    return replace(plan, fleet=replace(plan.fleet, tenants=tenants, demand=demand))


def test_requests_are_dealt_in_proportion_and_evenly_in_time() -> None:
    assert deal(8, [3.0, 1.0]).tolist() == [0, 0, 1, 0, 0, 0, 1, 0]


def test_rows_without_rates_get_equal_parts() -> None:
    assert deal(7, [0.0, 0.0, 0.0]).tolist() == [0, 1, 2, 0, 1, 2, 0]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any), st.integers(1, 200))
def test_no_row_is_ever_more_than_a_round_away_from_its_share(rates: list[int], count: int) -> None:
    taken = [0] * len(rates)
    for number, taker in enumerate(deal(count, [float(rate) for rate in rates]).tolist(), start=1):
        taken[taker] += 1
        for got, rate in zip(taken, rates, strict=True):
            assert abs(got - number * rate / sum(rates)) < max(2, len(rates))


def test_without_a_trace_every_row_draws_from_its_own_stream() -> None:
    asked = traffic(plan_with(row("a", 2.0)), None, seed=3, duration_s=None)
    one = asked.requests()
    two = traffic(plan_with(row("a", 2.0), row("b", 1.0)), None, seed=3, duration_s=None).requests()
    assert [request for request in two if request.tenant == "a"] == one
    assert one != traffic(plan_with(row("a", 2.0)), None, seed=4, duration_s=None).requests()
    assert one[-1].arrival_s < 900
    assert [request.arrival_s for request in two] == sorted(request.arrival_s for request in two)
    assert asked.notes[-1] == "drawn with seed 3, over 15 min from 0:00, the busiest hour"


def test_a_long_day_comes_in_pieces_of_the_same_stream() -> None:
    rates = tuple(40.0 if hour % 2 else 10.0 for hour in range(HOURS))
    asked = traffic(plan_with(row("a", rates), row("b", 5.0)), None, seed=3, duration_s=4 * 3600.0)
    pieces = list(asked.pieces())
    assert len(pieces) >= 6
    assert max(map(len, pieces)) <= 1 << 16
    arrivals_ps = [arrival_ps for piece in pieces for arrival_ps in piece.arrival_ps.tolist()]
    assert arrivals_ps == sorted(arrivals_ps)
    assert arrivals_ps[-1] < 4 * 3600 * 10**12
    hours = Counter(arrival_ps // (3600 * 10**12) for arrival_ps in arrivals_ps)
    for hour, rate in enumerate((45, 15, 45, 15)):  # from 1:00, the busiest hour
        assert hours[hour] == pytest.approx(3600 * rate, abs=4 * (3600 * rate) ** 0.5)
    assert (
        asked.notes[0]
        == f"a/chat: Poisson arrivals at 40/s: {len(arrivals_ps) - asked._counts[1]:,} requests in 240 min"
    )
    shorter = traffic(plan_with(row("a", rates), row("b", 5.0)), None, seed=3, duration_s=3600.0).requests()
    assert [round(request.arrival_s * 1e12) for request in shorter] == arrivals_ps[: len(shorter)]
    assert len(shorter) == hours[0]


def test_drawing_starts_in_the_hour_that_is_busiest_for_all_rows_together() -> None:
    morning = tuple(3.0 if hour == 9 else 1.0 for hour in range(HOURS))
    evening = tuple(2.5 if hour in {9, 20} else 0.0 for hour in range(HOURS))
    assert busiest_hour([row("a", morning), row("b", evening)]) == 9
    assert busiest_hour([row("a", None, trace="x.csv")]) == 0


def test_a_row_replays_its_own_trace_and_others_draw_as_long(tmp_path: Path) -> None:
    write_trace(Trace(name="own", requests=requests(40)), tmp_path / "own.csv")
    plan = plan_with(row("a", None, trace=str(tmp_path / "own.csv")), row("b", 5.0))
    whole = traffic(plan, None, seed=0, duration_s=None).requests()
    assert sum(request.tenant == "a" for request in whole) == 40
    assert 30 < max(request.arrival_s for request in whole if request.tenant == "b") < 39
    assert [request.arrival_s for request in whole] == sorted(request.arrival_s for request in whole)
    cut = traffic(plan, None, seed=0, duration_s=10).requests()
    assert sum(request.tenant == "a" for request in cut) == 10
    assert max(request.arrival_s for request in cut) < 10
    with pytest.raises(TraceError, match=r"gone\.csv: No such file"):
        traffic(plan_with(row("a", None, trace=str(tmp_path / "gone.csv"))), None, seed=0, duration_s=None)


def test_a_given_trace_is_dealt_by_the_rates_of_the_busiest_hour(tmp_path: Path) -> None:
    write_trace(Trace(name="own", requests=requests(31)), tmp_path / "own.csv")  # 31 in 30 s
    late = tuple(62 / 30 if hour == 20 else 0.1 for hour in range(HOURS))
    plan = plan_with(row("a", late), row("b", None, trace=str(tmp_path / "own.csv")))
    asked = traffic(plan, Trace(name="given", requests=requests(300)), seed=0, duration_s=None)
    assert Counter(request.tenant for request in asked.requests()) == {"a": 200, "b": 100}
    assert asked.notes == ("given: 300 requests in 4.98 min", "dealt in turn to a/chat 200, b/chat 100")
    assert len(traffic(plan, Trace(name="given", requests=requests(300)), seed=0, duration_s=12.5).requests()) == 13


def test_without_demand_a_trace_goes_to_all_models_and_nothing_is_drawn() -> None:
    plan = small_plan()
    models = (*plan.fleet.models, Model(name="code", weights="x"))
    plan = replace(
        plan,
        fleet=replace(plan.fleet, demand=(), models=models),
        models=(*plan.models, replace(plan.models[0], model="code")),
    )
    asked = traffic(plan, Trace(name="given", requests=requests(10)), seed=0, duration_s=None)
    assert Counter((request.tenant, request.model) for request in asked.requests()) == {
        ("public", "chat"): 5,
        ("public", "code"): 5,
    }
    with pytest.raises(InputError, match="asks for nothing in that time. Give a"):
        traffic(plan, None, seed=0, duration_s=None).requests()


@pytest.mark.parametrize("duration_s", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_rehearsal_of_no_time_is_an_error(duration_s: float) -> None:
    with pytest.raises(InputError, match=f"a rehearsal of {duration_s:g} s is none"):
        traffic(small_plan(), None, seed=0, duration_s=duration_s)


def test_a_rehearsal_too_long_to_draw_says_how_long_it_may_be() -> None:
    with pytest.raises(InputError, match=r"a rehearsal holds 100 days, and this one would take 1,157.40"):
        traffic(plan_with(row("a", 1.5), row("b", 0.5)), None, seed=0, duration_s=100_000_001)
    message = (
        r"a rehearsal of 8,000,000 s would draw up to 8e\+09 requests, more than 2,000,000,000. Ask for 2,000,000 s"
    )
    with pytest.raises(InputError, match=message):
        traffic(plan_with(row("a", 1000.0)), None, seed=0, duration_s=8e6)
    late = Trace(name="late", requests=[Request(arrival_s=101 * 86_400.0, prompt_tokens=1, output_tokens=1)])
    with pytest.raises(InputError, match="a rehearsal holds 100 days, but 'late' goes on for 101"):
        traffic(small_plan(), late, seed=0, duration_s=None)


def test_a_negative_seed_is_an_error() -> None:
    with pytest.raises(InputError, match="seed = -1 is negative"):
        traffic(small_plan(), None, seed=-1, duration_s=None)


def test_one_request_is_said_in_the_singular() -> None:
    asked = traffic(small_plan(), Trace(name="given", requests=requests(1)), seed=0, duration_s=None)
    assert len(asked.requests()) == 1
    assert asked.notes[0] == "given: 1 request"


def test_the_length_of_a_trace_of_days_is_a_number_of_minutes() -> None:
    two = Trace(name="given", requests=[*requests(1), Request(arrival_s=90_000.0, prompt_tokens=10, output_tokens=5)])
    asked = traffic(small_plan(), two, seed=0, duration_s=None)
    assert len(asked.requests()) == 2
    assert asked.notes[0] == "given: 2 requests in 1,500 min"


def test_few_long_requests_make_an_hour_busier_than_many_short_ones() -> None:
    day = Demand(
        tenant="a", model="chat", requests_per_s=(0.0,) * 12 + (5.0,) * 12, prompt_tokens=100, output_tokens=20
    )
    night = Demand(tenant="b", model="chat", requests_per_s=(2.0,) * 6 + (0.0,) * 18, prompt_tokens=4000)
    assert busiest_hour([day, night]) == 0


# --- What is cached of prompts --------------------------------------------------------------------------------------


def cached(plan: Plan, trace: Trace | Stream | None = None, **changes: float) -> tuple[list[tuple[int, int]], str]:
    """Return prompt and cached tokens of each request, and the notes."""
    asked = traffic(plan, trace, seed=1, duration_s=changes.get("duration_s"))
    return [(one.prompt_tokens, one.cached_tokens) for one in asked.requests()], "\n".join(asked.notes)


def test_of_drawn_prompts_the_share_of_the_demand_is_cached_but_never_all() -> None:
    for hit in (0.0, 0.4, 0.9999):
        pairs, _ = cached(plan_with(replace(row("public"), prefix_hit=hit)), duration_s=200)
        assert len(pairs) > 100
        assert pairs == [(prompt, min(round(hit * prompt), prompt - 1)) for prompt, _ in pairs]


def test_where_a_trace_tells_what_was_cached_it_is_believed_and_else_the_demand(tmp_path: Path) -> None:
    told, untold = tmp_path / "told.csv", tmp_path / "untold.csv"
    told.write_text("arrival_s,prompt_tokens,output_tokens,cached_tokens\n0,10,5,0\n1,10,5,3\n2,10,5,10\n")
    untold.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,1,5\n2,20,5\n")
    expected = {
        told: (
            [(10, 0), (10, 3), (10, 9)],
            "% of its prompts' tokens had been asked before, and are not read again",
        ),
        untold: ([(10, 4), (1, 0), (20, 8)], "does not tell what was cached of its prompts: taken from prefix_hit"),
    }
    demand = replace(row("public"), prefix_hit=0.4)
    for path, (pairs, note) in expected.items():
        replayed = plan_with(replace(demand, trace=str(path), requests_per_s=None))
        for plan, trace in (
            (replayed, None),
            (plan_with(demand), open_trace(path)),
            (plan_with(demand), read_trace(path)),
        ):
            found, notes = cached(plan, trace)
            assert found == pairs
            assert note in notes


def test_a_prompt_that_is_cached_whole_is_refused() -> None:
    with pytest.raises(TraceError, match="request 1 of the trace 'whole' has 10 cached tokens of a prompt of 10"):
        Trace(name="whole", requests=[Request(arrival_s=0.0, prompt_tokens=10, output_tokens=1, cached_tokens=10)])


def test_a_trace_of_which_nothing_is_left_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,10,5\n")
    late = shift(open_trace(path), 3600 * 10**9)
    with pytest.raises(TraceError, match="log.csv: none of its requests is left of that time. Take more of it with"):
        traffic(plan_with(row("public")), late, seed=0, duration_s=60.0)
