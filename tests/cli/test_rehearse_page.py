"""The page of a rehearsal: self-contained, escaped, and readable without eyes or scripts."""

import json
import re
from dataclasses import replace as with_

import numpy as np
import pytest
from msgspec.structs import replace

from examples import small_plan
from pages import NASTY, Reader, named
from plans import a_day
from waterline.cli import charts
from waterline.cli.charts import Axis, fewer, nice
from waterline.cli.rehearse import Rehearsed
from waterline.cli.rehearse_page import heat_rows, page
from waterline.plan import Plan
from waterline.rehearsal import rehearse
from waterline.rehearsal.record import JobRecord, Move


def rehearsed(plan: Plan, name: str = "plan") -> Rehearsed:
    happened = rehearse(plan, duration_s=60.0)
    return Rehearsed(name=name, plan=plan, policy="static", happened=happened, took_s=1.0)


def with_moves(one: Rehearsed, name: str) -> Rehearsed:
    moves = (
        Move(at_s=3.0, kind="drain", rule="reclaim", tenant=name, target=name, victim=name, victim_tenant=name, pool=name,
             node=2, gpus=4, cost_gpu_s=7200.0, deadline_s=33.0, done_s=30.0),
        Move(at_s=30.0, kind="start", rule="claim kept", tenant=name, target=name, pool=name, node=2, gpus=4),
    )  # fmt: skip
    jobs = (JobRecord(job=name, tenant=name, gpu_hours=12.0, lost_gpu_hours=0.5, stops=1),)
    return with_(one, happened=with_(one.happened, moves=moves, jobs=jobs))


def test_a_page_loads_nothing_and_closes_what_it_opens() -> None:
    html = page([with_moves(rehearsed(small_plan()), "lab")])
    reader = Reader(html)
    assert not {tag for tag, _ in reader.tags} & {"link", "img", "iframe", "object", "a"}
    assert not any(attribute in {"src", "href"} for _, attributes in reader.tags for attribute in attributes)
    assert not re.search(r"url\(|@import|https?://", html)
    policy = next(one for one in reader.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")
    assert "$" not in re.sub(r"\$[\d,.]+", "", html)  # every placeholder is filled in


def test_a_name_is_text_wherever_it_stands() -> None:
    plan = named(small_plan(), NASTY)
    demand = tuple(replace(row, tenant=NASTY, model=NASTY) for row in plan.fleet.demand)
    reader = Reader(page([with_moves(rehearsed(replace(plan, fleet=replace(plan.fleet, demand=demand))), NASTY)]))
    assert not reader.all("img")
    assert len(reader.all("script")) == 1
    assert "".join(reader.text).count("onerror=alert(1)") > 10


def test_moves_and_jobs_are_told_with_their_reasons() -> None:
    text = " ".join("".join(Reader(page([with_moves(rehearsed(small_plan()), "lab")])).text).split())
    assert "Moves: 1 drain (reclaim 1), 1 start (claim kept 1)." in text
    assert "00:00:03drainreclaimlablablab of lablab 24200:00:3300:00:30" in text
    assert "reclaimThe claimant stays within what it deserves; the victim's tenant has more than it deserves." in text
    assert "work of jobs kept12 GPU-h0.5 GPU-h lost to stops" in text


def test_the_slider_says_a_sentence_for_every_column() -> None:
    one = rehearsed(small_plan())
    html = page([one])
    data = json.loads(html.split("const page = ", 1)[1].split(";\n", 1)[0])
    (slider,) = Reader(html).all("input")
    assert int(str(slider["max"])) == len(data["steps"]) - 1 == one.happened.timeline.steps - 1
    assert re.fullmatch(r"00:00:01 public 1 GPUs, [\d,]+ waiting\.", data["steps"][1][1])
    places = [x for x, _ in data["steps"]]
    assert places == sorted(places)
    assert charts.LEFT < places[0] < places[-1] < charts.WIDTH - charts.RIGHT + 5


def test_charts_have_words_and_can_be_reached_with_the_keyboard() -> None:
    reader = Reader(page([rehearsed(a_day(2))]))
    drawn = reader.all("svg")
    assert len(drawn) >= 4
    assert all(one["role"] == "img" and len(str(one["aria-label"])) > 20 for one in drawn)
    scrolling = [one for one in reader.all("div") if one.get("class") == "scroll"]
    assert all(one.get("tabindex") == "0" and one.get("aria-label") for one in scrolling)
    assert all(one.get("scope") in {"col", "row"} for one in reader.all("th"))


def test_two_rehearsals_are_compared_on_one_page_on_the_same_axes() -> None:
    html = page([rehearsed(small_plan(), "one"), rehearsed(small_plan(), "two")])
    text = "".join(Reader(html).text)
    assert "rehearsed 2 times" in text
    assert text.count("On the same traffic") == 1
    assert html.count("<h3>one</h3>") == html.count("<h3>two</h3>") == 5


def test_the_stack_fills_the_fleet_at_every_step() -> None:
    one = rehearsed(small_plan())
    line = one.happened.timeline
    down = with_(line, gpus=0.0 * line.gpus, spare_gpus=0.0 * line.spare_gpus, down_gpus=np.ones(line.steps))
    assert "down" in Reader(page([with_(one, happened=with_(one.happened, timeline=down))])).text
    assert "down" not in Reader(page([one])).text
    html = page([one])
    outlines = re.findall(r'<polygon points="([^"]+)"', html)
    top = [float(point.split(",")[1]) for point in outlines[-1].split()]
    steps = one.happened.timeline.steps
    assert top[: 2 * steps] == pytest.approx([charts.TOP] * (2 * steps), abs=0.11)


@pytest.mark.parametrize("replicas", [1, 7, 60, 61, 7500])
def test_thousands_of_replicas_are_a_few_rows_of_a_heat_map(replicas: int) -> None:
    kinds = [("chat", "old") if number % 3 else ("code", "new") for number in range(replicas)]
    rows = heat_rows(kinds, 60)
    assert len(rows) <= 62
    assert sorted(index for _, own in rows for index in own) == list(range(replicas))
    assert all(kinds[index] == kind for kind, own in rows for index in own)


def test_fewer_columns_are_means_of_their_steps() -> None:
    assert fewer(np.array([[1.0, 3.0, 5.0, 7.0, 9.0]]), 3).tolist() == [[2.0, 6.0, 9.0]]
    assert fewer(np.arange(4.0), 240).tolist() == [0, 1, 2, 3]


def test_axes_end_at_round_numbers() -> None:
    assert [nice(value) for value in (0.0, 0.7, 1.0, 3.0, 12.0, 4100.0)] == [1.0, 0.8, 1.0, 4.0, 20.0, 5000.0]
    assert Axis(90.0).ticks(260).count("<text") == 7
    assert ">00:01:30<" in Axis(90.0).ticks(260)
    assert ">day 2 00:00<" in Axis(86_400.0).ticks(260)
    evening = Axis(3 * 3600.0, first_hour=19)
    assert ">20:00<" in evening.ticks(260), "a surge at 20:00 is seen at 20:00"
    assert (evening.clock(3661.0), evening.clock(6 * 3600.0)) == ("20:01:01", "day 2 01:00:00")
