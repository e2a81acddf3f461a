"""Sweeps: what a person writes, what every point comes to, and that it is the same wherever it runs."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from waterline.cli.rehearse import Question, rehearse
from waterline.cli.sweep import Point, parse_sweep, rehearse_point, set_key
from waterline.errors import InputError, WaterlineError
from waterline.fleet import read_fleet_file

FLEET = """
name = "two"
[[pools]]
name = "a.100"
gpu = "a100-sxm-80g"
gpus_per_node = 1
[[models]]
name = "chat-3.1"
weights = "meta-llama/Llama-3.1-8B"
slo = { ttft_s = 2.0, tpot_s = 0.05 }
[[tenants]]
name = "public"
deserved = 0.5
[[tenants]]
name = "research"
[[demand]]
tenant = "public"
model = "chat-3.1"
requests_per_s = 2
[[demand]]
tenant = "research"
model = "chat-3.1"
requests_per_s = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    (tmp_path / "fleet.toml").write_text(FLEET)
    return tmp_path / "fleet.toml"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(rehearse, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("k=0.2:0.8:0.1", (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
        ("k=1:4", (1, 2, 3, 4)),
        ("k=10:30:10,100", (10, 20, 30, 100)),
        ("k=0.5,0.75", (0.5, 0.75)),
        ("k=x1.0:x2:x0.5", ("x1.0", "x1.5", "x2.0")),
        ("k=money,goodput", ("money", "goodput")),
        ("k=true,false", (True, False)),
        ("k=1:1.9:0.5", (1.0, 1.5)),
    ],
)
def test_values_are_ranges_and_lists(text: str, values: tuple[object, ...]) -> None:
    found = parse_sweep(text).values
    assert found == values
    assert [type(one) for one in found] == [type(one) for one in values]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tenants.public.limit", "'tenants.public.limit' is not a sweep. Write KEY=FROM:TO:STEP or KEY=A,B,C"),
        ("k=", "'k=' is not a sweep"),
        ("k=3:1", "'3:1' in 'k=3:1' is no range"),
        ("k=1:3:0", "is no range"),
        ("k=0.1:0.9", "'0.1:0.9' in 'k=0.1:0.9' needs a step. Write FROM:TO:STEP, like 0.1:0.9:0.1"),
        ("k=0:1:0.000001", "has more than 10,000 values. Take a larger step"),
        ("k=1,1", "names a value twice"),
    ],
)
def test_a_sweep_that_is_none_is_answered_with_what_to_write(text: str, complaint: str) -> None:
    with pytest.raises(InputError) as error:
        parse_sweep(text)
    assert complaint in str(error.value)


def test_a_key_is_found_by_the_names_of_the_file_dots_and_all(fleet: Path) -> None:
    data = read_fleet_file(fleet)
    set_key(data, "pools.a.100.nodes", 4, fleet)
    set_key(data, "models.chat-3.1.slo.ttft_s", 1.5, fleet)
    set_key(data, "tenants.public.limit", 0.75, fleet)
    set_key(data, "demand.1.requests_per_s", "x1.5", fleet)
    set_key(data, "demand.2.requests_per_s", "x2", fleet)
    set_key(data, "objective", "goodput", fleet)
    assert data["pools"][0]["nodes"] == 4
    assert data["models"][0]["slo"] == {"ttft_s": 1.5, "tpot_s": 0.05}
    assert data["tenants"][0]["limit"] == 0.75
    assert data["demand"][0]["requests_per_s"] == 3
    assert data["demand"][1]["requests_per_s"][:1] + data["demand"][1]["requests_per_s"][-1:] == [2, 4]
    assert data["objective"] == "goodput"


@pytest.mark.parametrize(
    ("sweep", "complaint"),
    [
        ("tenants.publik.limit=0.5", "fleet.toml has no [[tenants]] 'publik', which --sweep tenants.publik.limit=… would change. Did you mean 'public'?"),
        ("tennants.public.limit=0.5", "has no [[tennants]], which --sweep tennants.public.limit=… would change. Did you mean 'tenants'?"),
        ("jobs.train.gpus=8", "has no [[jobs]]"),
        ("demand.3.requests_per_s=1", "has no [[demand]] number '3'"),
        ("tenants.public=0.5", "--sweep tenants.public=… names no key of [[tenants]] 'public'"),
        ("tenants.public.limt=0.5", "unknown key 'limt'. Did you mean 'limit'?"),
        ("tenants.public.limit=2.5", "limit = 2.5 of the fleet"),
        ("pools.a.100.nodes=lots", "'nodes' of [[pools]] number 1 ('a.100')"),
        ("pools.a.100.name.first=x", "'name' in --sweep pools.a.100.name.first=… is no table"),
        ("pools.a.100.nodes=x2", "gives pools.a.100.nodes no number, of which"),
        ("objectiv=money", "unknown key 'objectiv'. Did you mean 'objective'?"),
    ],
)  # fmt: skip
def test_a_key_that_is_not_there_is_named_before_anything_runs(fleet: Path, sweep: str, complaint: str) -> None:
    result = run(fleet, "--sweep", sweep)
    assert isinstance(result.exception, WaterlineError)
    assert complaint in str(result.exception)


def test_every_combination_is_a_point_in_its_order(
    fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    sweeps = ("--sweep", "pools.a.100.nodes=1,2", "--sweep", "demand.1.requests_per_s=x1,x2", "--duration", "30s")
    result = run(fleet, *sweeps, "--json", "--output", tmp_path / "points.csv")
    assert result.exception is None
    said = json.loads(result.output)
    assert said["keys"] == ["pools.a.100.nodes", "demand.1.requests_per_s"]
    assert [list(point["set"].values()) for point in said["points"]] == [[1, "x1"], [1, "x2"], [2, "x1"], [2, "x2"]]
    requests = [point["summaries"][0]["requests"] for point in said["points"]]
    assert requests[0] == requests[2] < requests[1] == requests[3]  # the same traffic, whatever the cards
    with (tmp_path / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3  # all, public and research
    assert [row["tenant"] for row in rows[:3]] == ["", "public", "research"]
    assert rows[0]["requests"] == str(requests[0])
    table = run(fleet, *sweeps[:2], "--duration", "30s")
    assert "public in SLO" in table.output


def test_a_point_that_cannot_be_says_why_and_the_others_are_rehearsed(
    fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    sweep = ("--sweep", "models.chat-3.1.slo.tpot_s=0.05,1e-6", "--duration", "10s")
    good, bad = json.loads(run(fleet, *sweep, "--json").output)["points"]
    assert good["summaries"][0]["requests"] > 0
    assert "chat-3.1" in bad["error"]
    assert "models.chat-3.1.slo.tpot_s = 1e-06: " in run(fleet, *sweep).output


def test_a_sweep_is_of_a_fleet_file_and_of_no_page(fleet: Path, tmp_path: Path) -> None:
    assert "waterline: " not in run(fleet, "--sweep", "pools.a.100.nodes=1", "--html", tmp_path / "x.html").output
    error = run(fleet, "--sweep", "pools.a.100.nodes=1", "--html", tmp_path / "x.html").exception
    assert "a sweep is of one fleet file" in str(error)
    assert "a sweep is of one fleet file" in str(run(fleet, "--ray", "local").exception)
    twice = ("--sweep", "pools.a.100.nodes=1", "--sweep", "pools.a.100.nodes=2")
    assert "--sweep pools.a.100.nodes=… is given 2 times. Give it once" in str(run(fleet, *twice).exception)
    (tmp_path / "plan.json").write_text("{}")
    error = run(tmp_path / "plan.json", "--sweep", "pools.a.100.nodes=1").exception
    assert "is a plan, and a sweep changes the fleet file it was made from" in str(error)


def points(fleet: Path) -> list[Point]:
    asked = Question(trace=None, columns="", traffic="", surges=(), failures=(), duration_s=20.0, seed=3)
    changed = []
    for nodes in (1, 2):
        data = read_fleet_file(fleet)
        set_key(data, "pools.a.100.nodes", nodes, fleet)
        changed.append(Point(data, fleet, "waterline", asked))
    return changed


def answers(fleet: Path, *more: str) -> list[bytes]:
    """Return what each point of a sweep comes to, worked out by the command in a process of its own."""
    command = [sys.executable, "-m", "waterline", "rehearse", str(fleet), "--sweep", "pools.a.100.nodes=1,2"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [*command, "--duration", "20s", "--seed", "3", "--json", *more],
        capture_output=True,
        env=environment,
        check=True,
    )
    said = json.loads(done.stdout)["points"]
    return [json.dumps({key: value for key, value in one.items() if key != "set"}).encode() for one in said]


def here(fleet: Path) -> list[bytes]:
    return [json.dumps(json.loads(rehearse_point(point))).encode() for point in points(fleet)]


def test_other_processes_give_the_same_bytes(fleet: Path) -> None:
    assert answers(fleet) == here(fleet)


def test_a_ray_cluster_gives_the_same_bytes(fleet: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'waterline-llm[ray]'")
    assert answers(fleet, "--ray", "local") == here(fleet)


def test_where_nobody_listens_a_person_learns_it_within_seconds(fleet: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'waterline-llm[ray]'")
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    for address in (f"127.0.0.1:{free}", f"ray://127.0.0.1:{free}", "127.0.0.1:lots"):
        error = run(fleet, "--sweep", "pools.a.100.nodes=1,2", "--ray", address).exception
        assert isinstance(error, InputError)
        assert f"no Ray cluster answers at '{address}'" in str(error)


def test_without_ray_a_person_is_told_what_to_install(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    error = run(fleet, "--sweep", "pools.a.100.nodes=1,2", "--ray", "local").exception
    assert isinstance(error, WaterlineError)
    assert "pip install 'waterline-llm[ray]'" in str(error)
