"""A plan and the state that the minutes clock begins with."""

import numpy as np
import pytest
from msgspec.structs import replace

from waterline.fleet import Job, load_fleet
from waterline.plan import Plan
from waterline.planner import make_plan
from waterline.policy import forecast
from waterline.policy import tide as tides
from waterline.policy.holdings import READY, START
from waterline.roster import Roster, Run, token_costs

FESTIVAL = make_plan(load_fleet("examples/spring-festival.toml"))
MIXED = make_plan(load_fleet("examples/mixed.toml"))


def with_jobs(plan: Plan, *jobs: Job) -> Plan:
    return replace(plan, fleet=replace(plan.fleet, jobs=jobs))


def checked(roster: Roster) -> Roster:
    """Hold the GPUs of the roster against the numbers of its tide."""
    held = roster.tide.replicas
    taken = np.zeros(len(roster.berths), np.int64)
    seen: set[tuple[str, int, int]] = set()
    for row, one in roster.has.items():
        gpus = {(one.pool, place.node, gpu) for place in one.places for gpu in place.gpus}
        assert len(gpus) == held.gpus[row]
        assert not gpus & seen
        assert {roster.berth_of(pool, node) for pool, node, _ in gpus} == {held.node[row]}
        seen |= gpus
        taken[held.node[row]] += len(gpus)
    there = [sum(len(gpus) for gpus in free.values()) for free in roster.free]
    assert roster.tide.free_gpus.tolist() == there
    return roster


def test_a_plan_begins_with_the_replicas_of_an_hour_each_counted_for_who_needs_it() -> None:
    roster = checked(Roster(FESTIVAL, FESTIVAL.replicas_at(19), hour=19))
    assert len(roster.berths) == 64  # a replica of r1 spans two of 128 nodes
    state, service = roster.tide.replicas.state, roster.tide.replicas.service
    assert (state == READY).sum() == len(FESTIVAL.replicas_at(19))
    counted = {
        (one.tenant, one.target): int(((service == number) & (state == READY)).sum())
        for number, one in enumerate(roster.services)
    }
    assert counted["research", "rollouts"] == 77
    assert counted["public", "r1"] < counted["enterprise", "r1"]
    assert counted["research", "r1"] == 0


def test_the_day_of_the_plan_is_what_is_expected_on_the_first_day() -> None:
    roster = Roster(FESTIVAL, FESTIVAL.replicas_at(5), hour=5)
    row = roster.service("enterprise", "r1")
    assert 59.3 < roster.asked[row, 20] < 1.1 * 59.3  # its prompts are longer than the mean of all tenants'
    step = int(5 * 3600 // roster.step_s)
    for number in range(3):
        tides.note_load(roster.tide, row, step + number, roster.asked[row, 5])
    expected = [forecast.forecast(roster.tide.series, row, step + 3, ahead * 60)[0] for ahead in (1, 9)]
    assert expected[1] > 1.02 * expected[0]


def test_of_the_tokens_of_a_planned_request_the_mean_costs_one() -> None:
    for plan, model in ((FESTIVAL, "r1"), (MIXED, "small")):
        planned = next(one for one in plan.models if one.model == model)
        read, write = token_costs(plan, model)
        assert planned.prompt_tokens * read + planned.output_tokens * write == pytest.approx(1.0)
        assert 0 < read <= write


def test_what_starts_has_gpus_of_its_berth_and_what_ends_gives_them_back() -> None:
    plan = with_jobs(MIXED, Job(name="train", tenant="research", gpus=2, copies=9, pools=("h100", "gaming")))
    roster = checked(Roster(plan, plan.together, hour=12))
    free = roster.tide.free_gpus.copy()
    moves = tides.decide(roster.tide, 12 * 3600.0)
    for move in np.flatnonzero(moves.kind == START).tolist():
        one = roster.start(moves, move)
        assert one is not None
        tides.has_loaded(roster.tide, int(moves.started[move]), 12 * 3600.0 + 60)
    runs = [one for one in roster.has.values() if isinstance(one, Run)]
    assert sorted(run.id for run in runs)[:2] == ["train/0", "train/1"]
    assert {run.pool for run in runs} == {"h100", "gaming"}
    checked(roster)
    for row in list(roster.has):
        if isinstance(roster.has[row], Run):
            roster.end(row)
            tides.has_ended(roster.tide, row)
    assert checked(roster).tide.free_gpus.sum() <= free.sum()


def test_a_node_that_failed_has_no_gpus_until_it_is_back() -> None:
    roster = checked(Roster(FESTIVAL, FESTIVAL.replicas_at(19), hour=19))
    rows = roster.rows_on("h800", 0)
    assert len(rows) == 1
    for row in rows:
        roster.end(row)
        tides.has_ended(roster.tide, row)
    tides.node_down(roster.tide, *roster.fail("h800", 0))
    assert len(roster.free[0]) == 1
    checked(roster)
    tides.node_up(roster.tide, *roster.repair("h800", 0))
    assert sum(len(gpus) for gpus in checked(roster).free[0].values()) == 16


def test_replicas_that_only_read_or_write_keep_to_the_plan_and_promises_shrink_by_them() -> None:
    first, second, *others = FESTIVAL.replicas
    split = replace(FESTIVAL, replicas=(replace(first, role="prefill"), replace(second, role="decode"), *others))
    roster = checked(Roster(split, split.replicas_at(19), hour=19))
    assert {first.id, second.id} <= {one.id for one in roster.kept}
    assert not {first.id, second.id} & {one.id for one in roster.has.values()}
    whole = Roster(FESTIVAL, FESTIVAL.replicas_at(19), hour=19)
    assert roster.tide.tenants.deserved_gpus.sum() < whole.tide.tenants.deserved_gpus.sum()
    assert roster.tide.carried.sum() > 0 == whole.tide.carried.sum()
