"""Rehearsals side by side, as a person meets them."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from examples import small_plan
from waterline.cli.rehearse import rehearse
from waterline.errors import InputError, UnknownNameError
from waterline.fleet import Demand
from waterline.plan import Plan, write_plan


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(rehearse, [str(argument) for argument in arguments])


@pytest.fixture
def plans(tmp_path: Path) -> tuple[Path, Path]:
    """Return a plan of one replica with 8 slots, and one with 2."""
    plan = small_plan()
    write_plan(plan, tmp_path / "wide.json")
    write_plan(replace(plan, replicas=(replace(plan.replicas[0], max_batch=2),)), tmp_path / "narrow.json")
    return tmp_path / "wide.json", tmp_path / "narrow.json"


def asking(plan: Plan, *rows: Demand) -> Plan:
    return replace(plan, fleet=replace(plan.fleet, demand=rows))


def test_two_plans_stand_side_by_side_on_the_same_traffic(plans: tuple[Path, Path]) -> None:
    both = json.loads(run(*plans, "--duration", "10m", "--json").output)["rehearsals"]
    assert list(both) == ["wide", "narrow"]
    alone = json.loads(run(plans[1], "--duration", "10m", "--json").output)
    del alone["requests_per_s_simulated"], both["narrow"]["requests_per_s_simulated"]
    assert both["narrow"] == alone
    assert both["wide"]["requests"] == alone["requests"]
    assert both["wide"]["total"]["slo_fraction"] > alone["total"]["slo_fraction"]


def test_the_table_has_a_column_each_and_what_changes(plans: tuple[Path, Path]) -> None:
    result = run(*plans, "--duration", "10m")
    assert result.exception is None
    head = next(line for line in result.output.splitlines() if "wide" in line and "┃" in line)
    assert [cell.strip() for cell in head.split("┃")[3:-1]] == ["wide", "narrow", "change"]
    assert "TTFT p50/p90/p99" in result.output
    three = run(*plans, plans[0], "--duration", "1m")
    assert "change" not in three.output
    assert three.exception is None
    assert "(3)" in three.output  # the same file again has a name of its own


def test_both_are_one_page(plans: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(*plans, "--duration", "2m", "--html", tmp_path / "both.html")
    assert result.exception is None
    html = (tmp_path / "both.html").read_text()
    titles = ("GPUs by tenant", "Requests waiting", "Time to first token", "Time to last token", "Replicas over time")
    assert [html.count(f"<title>{title}</title>") for title in titles] == [2, 2, 2, 2, 2]
    assert "On the same traffic" in html


def test_plans_that_are_asked_different_things_are_refused_by_name(plans: tuple[Path, Path], tmp_path: Path) -> None:
    plan = small_plan()
    tenants = (*plan.fleet.tenants, replace(plan.fleet.tenants[0], name="research", deserved=0.0, anonymous=False))
    more = replace(plan, fleet=replace(plan.fleet, tenants=tenants))
    row = plan.fleet.demand[0]
    write_plan(asking(more, row, replace(row, tenant="research")), tmp_path / "more.json")
    error = run(plans[0], tmp_path / "more.json").exception
    assert isinstance(error, InputError)
    assert "more.json tenant 'research' asks for model 'chat'" in str(error)
    assert "Give both the same [[demand]]." in str(error)
    write_plan(asking(plan, replace(row, requests_per_s=9.0)), tmp_path / "busier.json")
    error = run(plans[0], tmp_path / "busier.json").exception
    assert isinstance(error, InputError)
    assert "[[demand]] number 1, of public/chat, differs in requests_per_s" in str(error)


def test_a_policy_that_is_none_is_refused_with_those_there_are(plans: tuple[Path, Path]) -> None:
    error = run(plans[0], "--policy", "statik").exception
    assert isinstance(error, UnknownNameError)
    assert str(error) == "no policy is called 'statik'. Did you mean 'static'?"
    error = run(plans[0], "--policy", "static,static").exception
    assert isinstance(error, InputError)
    assert "'static' is named twice" in str(error)


def test_what_is_of_one_rehearsal_is_not_asked_of_two(plans: tuple[Path, Path], tmp_path: Path) -> None:
    error = run(*plans, "--duration", "1m", "--output", tmp_path / "requests.csv").exception
    assert isinstance(error, InputError)
    assert "--output and --decisions are of one rehearsal" in str(error)
