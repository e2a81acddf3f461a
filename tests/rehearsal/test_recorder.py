"""Notes of a rehearsal: what replicas cost and draw while they serve, load and idle."""

import numpy as np
import pytest
from msgspec.structs import replace

from examples import small_plan
from plans import a_day
from waterline.catalog import find_gpu
from waterline.plan import Plan
from waterline.rehearsal.recorder import HOUR_PS, Recorder

SECOND = 10**12


def recorder(plan: Plan) -> Recorder:
    found = Recorder(plan, length_s=3600.0)
    for one in plan.replicas:
        found.add_replica(one)
    return found


def served(notes: Recorder, replica: int, arrival_ps: int, finish_ps: int, busy_ps: int) -> None:
    one = np.ones(1, np.int64)
    notes.add(
        tenant=0 * one, model=0 * one, arrival_ps=arrival_ps * one, prompt_tokens=1000 * one, output_tokens=200 * one,
        first_token_ps=(arrival_ps + 1) * one, finish_ps=finish_ps * one, replica=replica * one, busy_ps=busy_ps * one,
        preemptions=0 * one, retry_s=np.zeros(1), cached_tokens=0 * one, read_by=-1 * one, read_busy_ps=0 * one,
    )  # fmt: skip


def test_a_replica_draws_its_tdp_while_it_computes_and_a_part_of_it_while_it_waits() -> None:
    notes = recorder(small_plan())
    served(notes, 0, 0, HOUR_PS, HOUR_PS // 4)
    notes.run_as_planned(0)
    report = notes.report()
    tdp = find_gpu("rtx-4090").tdp_watts
    assert tdp == 450
    total = report.summaries[0]
    assert total.kwh == pytest.approx(0.450 * 0.25 + 0.15 * 0.450 * 0.75)
    assert report.by_pool[0].kwh == report.by_tenant[0].kwh == pytest.approx(total.kwh)
    assert (report.idle_kwh, report.jobs_kwh) == (0.0, 0.0)
    assert report.usd == pytest.approx(0.4)
    assert report.timeline.gpu_hours_of("public") == pytest.approx(1.0)


def test_gpus_in_no_replica_idle_those_of_jobs_work_and_those_that_failed_are_down() -> None:
    plan = small_plan()
    pool = replace(plan.fleet.pools[0], nodes=4)
    notes = recorder(replace(plan, fleet=replace(plan.fleet, pools=(pool,))))
    served(notes, 0, 0, HOUR_PS, HOUR_PS)
    notes.works(0, "box", 2, 0, HOUR_PS // 2)
    notes.down("box", 1, HOUR_PS // 4, HOUR_PS // 2)
    notes.run_as_planned(0)
    report = notes.report()
    assert report.jobs_kwh == pytest.approx(0.450)
    assert report.idle_kwh == pytest.approx(0.15 * 0.450 * (4 - 1 - 1 - 0.25)), "what has failed draws nothing"
    assert report.timeline.gpus.max() == pytest.approx(3)
    assert report.timeline.down_gpus @ report.timeline.lengths_s == pytest.approx(900.0)


def test_replicas_are_paid_for_the_hours_they_serve_and_to_be_loaded_before() -> None:
    plan = a_day(8)
    begins = next(replica for replica in plan.replicas if len(replica.hours) < 24)
    before = begins.hours[0] - 1
    one = replace(plan, replicas=(replace(begins, load_s=600.0),))
    notes = recorder(one)
    served(notes, 0, 0, 4 * HOUR_PS, SECOND)
    notes.run_as_planned(before)  # the hour before it serves, in which it loads, and as many more as it serves
    hours = sum((before + hour) % 24 in begins.hours for hour in range(4))
    assert notes.report().usd == pytest.approx(begins.usd_per_hour * (hours + 600 / 3600))
    present = notes.report().timeline.present[0] @ notes.report().timeline.lengths_s
    assert present == pytest.approx(hours * 3600)


def test_nothing_at_all_has_a_report() -> None:
    notes = recorder(small_plan())
    notes.run_as_planned(0)
    report = notes.report()
    assert (report.summaries[0].requests, report.duration_s, report.usd, report.by_client) == (0, 0.0, 0.0, ())
    assert report.summaries[0].ttft_s is None
    assert report.summaries[0].slo_fraction == 0.0
