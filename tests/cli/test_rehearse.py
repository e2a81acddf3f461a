"""`waterline rehearse`, as a person meets it."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numba
import pytest
from click.testing import CliRunner, Result

from examples import small_plan
from waterline import rehearsal
from waterline.cli.rehearse import rehearse
from waterline.errors import FleetFileError, InputError, TraceError
from waterline.plan import write_plan
from waterline.rehearsal import Progress, Rehearsal

rehearse_module = import_module("waterline.cli.rehearse")
EXAMPLES = Path(__file__).parents[2] / "examples"
OFFICE_HOUR = EXAMPLES / "traces" / "office-hour.csv"


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    write_plan(small_plan(), tmp_path / "plan.json")
    return tmp_path / "plan.json"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(rehearse, [str(argument) for argument in arguments])


def test_a_fleet_file_is_planned_and_rehearsed() -> None:
    result = run(EXAMPLES / "mixed.toml", "--duration", "60s")
    assert result.exception is None
    for word in ("enterprise", "coder", "TTFT p50/p90/p99", "in SLO", "GPU-h", "$", "drawn with seed 0, over 1 min"):
        assert word in result.output
    assert "requests per second" in result.output


def test_gpu_hours_of_owners_add_up_to_the_fleets_and_what_is_lent_is_borrowed() -> None:
    said = json.loads(run(EXAMPLES / "mixed.toml", "--duration", "3m", "--json").output)
    hours, end_h = said["gpu_hours"], said["timeline"]["end_s"] / 3600
    assert hours["fleet"] == pytest.approx(24 * end_h)
    assert hours["by_owner"]["enterprise"]["deserved"] == pytest.approx(12 * end_h)
    parts = [sum(one[part] for part in ("used", "lent", "idle")) for one in hours["by_owner"].values()]
    assert parts == pytest.approx([one["deserved"] for one in hours["by_owner"].values()])
    assert sum(parts) == pytest.approx(hours["fleet"])
    assert min(value for one in hours["by_owner"].values() for value in one.values()) > -1e-9
    lent = sum(one["lent"] for one in hours["by_owner"].values())
    assert lent == pytest.approx(sum(hours["by_borrower"].values()))
    assert lent > 0.01


def test_a_trace_is_replayed_against_a_plan(plan_file: Path) -> None:
    result = run(plan_file, "--trace", OFFICE_HOUR, "--duration", "10m")
    assert result.exception is None
    assert "office-hour.csv: " in result.output
    assert "dealt in turn to public/chat" in result.output
    assert "per hour for the plan" in result.output


def test_json_says_the_same_every_time_with_units(plan_file: Path) -> None:
    first, again = (run(plan_file, "--trace", OFFICE_HOUR, "--json") for _ in range(2))
    assert first.exception is None
    said, said_again = json.loads(first.output), json.loads(again.output)
    assert said.pop("requests_per_s_simulated") > 0
    del said_again["requests_per_s_simulated"]
    assert said == said_again
    assert list(said) == [
        "fleet", "policy", "replayed", "first_hour", "duration_s", "gpus", "usd_per_hour", "usd", "kwh", "requests", "total",
        "by_tenant", "by_client", "by_model", "by_pool", "parts", "gpu_hours", "lent", "jobs", "moves", "decisions_sha256", "timeline",
    ]  # fmt: skip
    assert said["by_model"]["chat"]["requests"] == 1471
    assert said["by_pool"]["box"]["requests"] == said["total"]["completed"]  # whom a replica of it took
    line = said["timeline"]
    assert len(line["at_s"]) == len(line["waterline"]) == len(line["tenants"]["public"]["waiting"])
    assert sum(line["tenants"]["public"]["asked_per_s"][:-1]) * line["step_s"] == pytest.approx(1471, abs=5)
    assert [(one["model"], one["pool"], one["replicas"]) for one in line["replicas"]] == [("chat", "box", 1)]
    assert said["requests"] == 1471
    assert said["by_tenant"]["public"]["requests"] == 1471
    assert said["total"]["requests"] == 1471
    assert said["total"]["completed"] + said["total"]["refused"] == 1471
    assert set(said["total"]["ttft_s"]) == {"mean", "p50", "p90", "p99"}
    assert [(part["tenant"], part["model"]) for part in said["parts"]] == [("public", "chat")]


def test_every_request_can_be_written_down(plan_file: Path, tmp_path: Path) -> None:
    result = run(plan_file, "--trace", OFFICE_HOUR, "--output", tmp_path / "requests.csv", "--json")
    assert result.exception is None
    with (tmp_path / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1471
    assert {row["status"] for row in rows} <= {"ok", "refused"}
    assert all((row["first_token_s"] == "") == (row["status"] == "refused") for row in rows)


def test_where_a_file_cannot_be_written_a_person_learns_before_the_rehearsal(
    plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_, **__: pytest.fail("it was rehearsed"))
    for option in ("--output", "--decisions", "--html"):
        error = run(plan_file, option, tmp_path / "nowhere" / "file").exception
        assert str(error).endswith(f"there is no such folder. Choose another place with {option}.")
        assert "it is a folder" in str(run(plan_file, option, tmp_path).exception)
    both = run(plan_file, "--html", tmp_path / "one", "--output", tmp_path / "one").exception
    assert "--output and --html both name" in str(both)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk here that is always full")
def test_a_disk_that_is_full_costs_the_file_and_not_what_was_learnt(plan_file: Path) -> None:
    for option in ("--output", "--decisions", "--html"):
        result = run(plan_file, "--duration", "10s", option, "/dev/full")
        assert "in SLO" in result.output
        assert isinstance(result.exception, InputError)
        assert "No space left on device. Choose another place" in str(result.exception)


def test_a_plan_is_known_by_its_content_not_its_name(plan_file: Path, tmp_path: Path) -> None:
    result = run(plan_file.rename(tmp_path / "plan.txt"), "--trace", OFFICE_HOUR, "--json")
    assert result.exception is None
    (tmp_path / "fleet.json").write_text((EXAMPLES / "mixed.toml").read_text())
    assert run(tmp_path / "fleet.json", "--duration", "5s", "--json").exception is None


def test_requests_are_not_written_to_a_dash(plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(plan_file, "--output", "-")
    assert isinstance(result.exception, InputError)
    assert "--output /dev/stdout" in str(result.exception)
    assert not (tmp_path / "-").exists()


def test_a_duration_without_bounds_is_refused_with_numbers(plan_file: Path) -> None:
    result = run(plan_file, "--duration", "99999999999h")
    assert isinstance(result.exception, InputError)
    assert "a rehearsal holds 100 days, and this one would take 4,166,666,667" in str(result.exception)


def test_ctrl_c_prints_what_has_been_learnt_so_far(plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rehearsal.rehearse

    def interrupted(*arguments: Any, watch: Callable[[Progress], bool], **options: Any) -> Rehearsal:
        def watching(progress: Progress) -> bool:
            if progress.at_s > 2 * 3600:
                os.kill(os.getpid(), signal.SIGINT)
            return watch(progress)

        return whole(*arguments, watch=watching, **options)

    monkeypatch.setattr(rehearsal, "rehearse", interrupted)
    before = signal.getsignal(signal.SIGINT)
    result = run(plan_file, "--duration", "2000h", "--json")
    assert result.exception is None
    assert signal.getsignal(signal.SIGINT) is before
    said = json.loads(result.output)
    assert re.fullmatch(r"stopped after [\d,]+ requests, 1[2-8]\d\.\d of 120,000\.0 min", said["replayed"][-1])
    assert 2 * 3600 < said["duration_s"] < 3.1 * 3600
    assert said["requests"] == pytest.approx(3 * 3600 * 0.5, rel=0.1)


def test_without_numba_it_runs_and_says_so(plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "130")
    arguments = ["rehearse", str(plan_file), "--trace", str(OFFICE_HOUR), "--duration", "10m"]
    code = "import sys; sys.modules['numba'] = None; from waterline.cli import main; main()"
    slow = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout
    quick = run(*arguments[1:]).output
    assert "pip install 'waterline-llm[rehearse]'" in " ".join(slow.split())
    assert slow.split("Rehearsed in")[0] == quick.split("Rehearsed in")[0]


def test_a_person_at_a_terminal_sees_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with rehearse_module.watching() as watch:
        assert watch(Progress(requests=1234, at_s=600.0, of_s=1200.0))
    assert "1,234 requests" in capsys.readouterr().err
    with rehearse_module.telling_of_compilation():
        for _ in range(2):
            numba.njit(lambda: 1)()
        assert (
            capsys.readouterr().err == "Compiling the rehearsal for this machine, once; that takes a minute or so …\n"
        )


def test_mistakes_are_named(plan_file: Path, tmp_path: Path) -> None:
    result = run(plan_file, "--trace", tmp_path / "none.csv")
    assert isinstance(result.exception, TraceError)
    result = run(tmp_path / "none.toml")
    assert isinstance(result.exception, FleetFileError)
    for duration in ("0", "fast", "3d"):
        result = run(plan_file, "--duration", duration)
        assert result.exit_code == 2
        assert "is not a duration. Write one like 90s, 15m or 2h." in result.output


def test_a_table_is_replayed_by_its_columns_changed_and_surging(plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("t,p,o\n" + "".join(f"{at},50,5\n" for at in range(60)))
    trace = ("--trace", tmp_path / "log.csv", "--columns", "arrival=t,prompt=p,output=o", "--json")
    result = run(plan_file, *trace, "--traffic", "x2, repeat 2 every 60s", "--surge", "3x@00:01+1m")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["requests"] == 2 * 60 + 3 * 2 * 60


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ("--columns", "arrival=t,prompt=p,output=o"),
            "--columns and --traffic are about a trace. Name it with --trace",
        ),
        (("--traffic", "x2"), "--columns and --traffic are about a trace"),
        (("--surge", "10x"), "'10x' needs a factor, an hour of the day and how long. Write it like surge 10x@20:00+2h"),
        (("--surge", "nobody:10x@20:00+2h"), "the fleet has no tenant 'nobody'"),
    ],
)
def test_a_mistake_in_the_traffic_is_answered_with_what_to_write(
    plan_file: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    result = run(plan_file, *arguments)
    assert isinstance(result.exception, InputError)
    assert complaint in str(result.exception)


HEADER = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("trace", "complaint"),
    [
        ("", "log.csv: it is empty. Expected a first line"),
        (HEADER, "log.csv: it holds no requests, only the header"),
        (f"{HEADER}-1,100,10\n", "log.csv, line 2: "),
        (f"{HEADER}0,0,10\n", "log.csv, line 2: "),
        (f"{HEADER}0,100,0\n", "log.csv, line 2: "),
        (f"{HEADER}0,100,nan\n", "log.csv, line 2: "),
        (f"{HEADER}0,5000,10\n", "log.csv, line 2: 5,000 + 10 tokens are more than the 4,096 that a model of the fleet may hold"),
        ("arrival_s,prompt_tokens,output_tokens,tenant\n0,100,10,nobody\n", "no [[demand]] is of tenant 'nobody'; there are public/chat"),
    ],
)  # fmt: skip
def test_a_trace_with_a_mistake_is_answered_with_its_line(
    plan_file: Path, tmp_path: Path, trace: str, complaint: str
) -> None:
    (tmp_path / "log.csv").write_text(trace)
    result = run(plan_file, "--trace", tmp_path / "log.csv")
    assert isinstance(result.exception, InputError)
    assert complaint in str(result.exception)


def test_rows_out_of_order_are_put_in_order(plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(f"{HEADER}9,100,10\n0,100,10\n3,100,10\n")
    said = json.loads(run(plan_file, "--trace", tmp_path / "log.csv", "--json").output)
    assert said["requests"] == 3
    assert said["timeline"]["tenants"]["public"]["asked_per_s"][:4] == [1, 0, 0, 1]


def test_a_page_is_written_or_the_place_is_refused(plan_file: Path, tmp_path: Path) -> None:
    result = run(plan_file, "--duration", "60s", "--html", tmp_path / "page.html")
    assert result.exception is None
    assert "Open it in a browser." in result.output
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    refusal = run(plan_file, "--duration", "60s", "--html", tmp_path / "nowhere" / "page.html")
    assert isinstance(refusal.exception, InputError)
    assert "Choose another place with --html" in str(refusal.exception)


def test_a_client_that_comes_back_when_told_is_counted(plan_file: Path, tmp_path: Path) -> None:
    rows = [f"{at / 10},3000,1000,{'ann' if at % 2 else 'bob'}" for at in range(2000)]
    (tmp_path / "log.csv").write_text("arrival_s,prompt_tokens,output_tokens,client\n" + "\n".join(rows) + "\n")
    result = run(plan_file, "--trace", tmp_path / "log.csv")
    assert re.search(
        r"Of [\d,]+ refused and told when to come back, [\d,]+ did within an hour of that time", result.output
    )
    said = json.loads(run(plan_file, "--trace", tmp_path / "log.csv", "--json").output)["total"]
    assert 0 <= said["honoured"] <= said["returned"] <= said["told"] <= said["refused"]
    assert said["returned"] > 0


def test_who_gave_up_and_who_left_midway_are_told_apart_everywhere(plan_file: Path, tmp_path: Path) -> None:
    rows = [f"0.{at:03},2000,50,{0.01 if at % 2 else ''}" for at in range(900)]  # before their prompt is read
    rows += [f"{at},500,400,1.5" for at in (3000, 3010)]
    (tmp_path / "log.csv").write_text("arrival_s,prompt_tokens,output_tokens,leaves_after_s\n" + "\n".join(rows) + "\n")
    files = {kind: tmp_path / f"found.{kind}" for kind in ("csv", "html")}
    asked = (plan_file, "--trace", tmp_path / "log.csv", "--output", files["csv"], "--html", files["html"])
    result = CliRunner(env={"COLUMNS": "130"}).invoke(rehearse, [str(argument) for argument in asked])
    assert result.exception is None
    with files["csv"].open() as file:
        reasons = Counter(row["reason"] for row in csv.DictReader(file) if row["status"] == "cancelled")
    assert reasons["the client went away"] == 2
    assert reasons["gave up"] > 5
    said = json.loads(run(plan_file, "--trace", tmp_path / "log.csv", "--json").output)
    for one in (said["total"], *said["by_tenant"].values()):
        assert (one["cancelled"], one["left_midway"]) == (reasons.total(), 2)
    head, total = (line for line in result.output.splitlines() if line.startswith(("┃        ┃", "│ all")))
    assert re.search(r"┃ +gave ┃ +left ┃", head)
    assert re.search(rf"│ +{reasons['gave up']} │ +2 │", total)
    assert f">{reasons['gave up']:,}</td>" in files["html"].read_text()
    assert "left midway" in files["html"].read_text()


def test_decisions_are_lines_with_a_digest(plan_file: Path, tmp_path: Path) -> None:
    result = run(plan_file, "--duration", "60s", "--decisions", tmp_path / "log.jsonl")
    assert result.exception is None
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert all(json.loads(line)["rule"] for line in lines)
    assert f"{len(lines):,} decisions written to" in result.output
    assert {json.loads(line)["claimant"] for line in lines} == {"public/chat"}
    digest = re.search(r"sha256 of those about replicas: ([0-9a-f]{64})", result.output)
    assert digest is not None
    assert json.loads(run(plan_file, "--duration", "60s", "--json").output)["decisions_sha256"] == digest[1]


def test_decisions_name_clients_replicas_and_nodes_as_the_table_of_requests_does(
    plan_file: Path, tmp_path: Path
) -> None:
    rows = [f"{at / 10},3000,1000,{'ann' if at % 2 else 'bob'}" for at in range(2000)]
    (tmp_path / "log.csv").write_text("arrival_s,prompt_tokens,output_tokens,client\n" + "\n".join(rows) + "\n")
    run(
        plan_file, "--trace", tmp_path / "log.csv", "--decisions", tmp_path / "log.jsonl",
        "--output", tmp_path / "requests.csv",
    )  # fmt: skip
    with (tmp_path / "requests.csv").open() as file:
        became = sorted((row["tenant"], row["client"], row["replica"]) for row in csv.DictReader(file))
    said = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    requests = [one for one in said if one["claimant"] in {"ann", "bob"}]
    assert sorted((one["tenant"], one["claimant"], one.get("place", "")) for one in requests) == became
    assert {place for _, _, place in became} > {""}, "some were refused"
