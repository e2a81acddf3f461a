"""What is told of a plan's day, worked out by hand."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from examples import small_plan
from plans import a_day, an_iceberg
from waterline.cli import day
from waterline.cli.day import IDLE, SPARE, STARTS
from waterline.plan import EVERY_HOUR, HourPlan, Loan


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (EVERY_HOUR, "all day"),
        ((19, 20, 21, 22), "19:00-23:00"),
        ((22, 23, 0, 1), "22:00-02:00"),
        ((23,), "23:00-24:00"),
        ((0,), "00:00-01:00"),
        ((1, 2, 9), "01:00-03:00 and 09:00-10:00"),
        ((), ""),
    ],
)
def test_hours_are_told_as_spans_and_midnight_does_not_cut_them(hours: tuple[int, ...], text: str) -> None:
    assert day.span(hours) == text


@given(st.sets(st.integers(0, 23)))
def test_runs_hold_every_hour_once_and_never_touch(hours: set[int]) -> None:
    runs = day.runs(hours)
    assert sorted(hour for run in runs for hour in run) == sorted(hours)
    if len(runs) > 1:
        assert all((run[-1] + 1) % 24 not in hours for run in runs)


def test_every_gpu_is_accounted_for_at_every_hour() -> None:
    for plan in (a_day(8), an_iceberg()):
        for hour in plan.hours:
            gpus = day.gpus_at(plan, hour)
            assert math.fsum(gpus.values()) == pytest.approx(plan.fleet.gpus)
            by_pool = day.gpus_by_pool(plan, hour)
            assert [math.fsum(row.values()) for row in by_pool.values()] == pytest.approx(
                [pool.gpus for pool in plan.fleet.pools]
            )


def test_gpus_of_replicas_nobody_asks_are_spare() -> None:
    plan = a_day(8)
    (night, *rest) = plan.hours
    unasked = replace(night, shares=night.shares[:1])  # research, which had 1 of 4, asks nothing
    plan = replace(plan, hours=(unasked, *rest))
    assert day.gpus_at(plan, unasked) == {"public": 3.0, "research": 0.0, SPARE: 1.0, IDLE: 28.0}
    assert day.gpus_by_pool(plan, unasked)["box"] == {"public": 3.0, SPARE: 1.0, IDLE: 28.0}


def test_a_loan_is_told_once_with_its_hours_and_its_size() -> None:
    assert [str(one) for one in day.borrowings(a_day(8))] == ["public borrows 8.8 from research 19:00-23:00"]
    (growing,) = day.borrowings(an_iceberg())
    assert str(growing) == "public borrows 300 to 700 from research 18:00-23:00"


def test_loans_of_nearly_nothing_are_not_told_and_lenders_may_be_nobody() -> None:
    plan = a_day(8)
    hours = tuple(
        replace(hour, loans=(Loan(lender="", borrower="public", gpus=0.01 if hour.hour else 2.0),))
        for hour in plan.hours
    )
    (only,) = day.borrowings(replace(plan, hours=hours))
    assert str(only) == "public borrows 2 from what nobody deserves 00:00-01:00"


def test_what_moves_is_counted_by_model() -> None:
    assert day.moves(a_day(8)) == [(19, Counter(chat=6), Counter()), (23, Counter(), Counter(chat=6))]
    assert day.moves_text({"r1": 3, "small": 1}, {"coder": 2}) == "starts 3 r1, 1 small; stops 2 coder"
    many = {f"m{index}": 10 - index for index in range(7)}
    assert day.moves_text(many, {}) == "starts 10 m0, 9 m1, 8 m2, 7 m3 and 15 of 3 other models"


def test_what_is_not_served_names_the_worst_hour() -> None:
    plan = an_iceberg()
    (only,) = day.unserved(plan)
    assert only.served_fraction == pytest.approx(239 / 240)
    assert str(only) == ("Not served: 0.4% of what public asks of model-03 in a day; at 20:00 it gets 9 of 10 req/s")
    assert not day.unserved(a_day())


def test_a_day_costs_the_same_however_it_is_divided() -> None:
    plan = an_iceberg()
    whole = day.usd_per_day(plan)
    by_model = day.usd_by(plan, lambda replica: replica.model)
    by_tenant = day.usd_by_tenant(plan)
    for usd in (by_model, by_tenant):
        assert math.fsum(usd.values()) == pytest.approx(whole)
        assert usd[STARTS] == pytest.approx(whole * 0.02 / 1.02)
    assert by_tenant["enterprise"] == pytest.approx(0.3 * whole / 1.02)


def test_energy_is_that_of_the_gpus_that_serve() -> None:
    # 300 W a GPU: 4 GPUs in 20 hours, 16 in 4
    assert day.kwh_text(a_day(8)) == "43.2 kWh"
    assert day.kwh_text(an_iceberg()) == "153,601 kWh"  # 512,004 GPU-hours


def test_a_plan_without_hours_costs_a_day_of_all_its_replicas() -> None:
    plan = small_plan()
    assert day.usd_per_day(plan) == pytest.approx(24 * 0.4)
    assert day.usd_by(plan, lambda replica: replica.pool) == pytest.approx({"box": 24 * 0.4})
    assert not day.differs_by_hour(plan)


def test_a_plan_whose_hours_are_alike_does_not_differ() -> None:
    plan = a_day(8)
    same = tuple(replace(plan.hours[3], hour=hour) for hour in EVERY_HOUR)
    assert not day.differs_by_hour(replace(plan, hours=same))
    assert day.differs_by_hour(plan)


def test_the_public_comes_first_and_then_who_uses_most() -> None:
    assert day.tenants_of(a_day(8)) == ("public", "research")
    assert day.tenants_of(an_iceberg())[0] == "public"


def test_alike_replicas_are_one_group_with_how_many_serve_at_once() -> None:
    (group,) = day.groups_of(a_day(8).replicas)
    assert (group.count, group.layout, len(group.replicas)) == ("2-8", "tp2", 8)
    assert group.usd_per_hour(3) == pytest.approx(1.6)
    assert group.usd_per_hour(20) == pytest.approx(6.4)
    split = [replace(one, role="prefill") for one in group.replicas[:2]]
    assert [one.layout for one in day.groups_of([*split, *group.replicas[2:]])] == ["tp2 prefill", "tp2"]


def test_rounding_of_shares_never_makes_more_than_the_replicas_have() -> None:
    plan = a_day(8)
    hour: HourPlan = plan.hours[20]
    swollen = replace(hour, shares=tuple(replace(share, gpus=share.gpus * 1.001) for share in hour.shares))
    for fractions in day.tenant_fractions(plan, swollen).values():
        assert math.fsum(fractions.values()) == pytest.approx(1.0)
