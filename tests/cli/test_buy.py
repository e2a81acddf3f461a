"""`waterline buy` as a person meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from waterline.cli.buy import buy as command
from waterline.errors import InputError
from waterline.fleet import load_fleet

EXAMPLES = Path(__file__).parents[2] / "examples"
TENDER = EXAMPLES / "tender.toml"
FEW = ("--gpu", "h20-141g", "--gpu", "H200 SXM", "--gpu", "mi300x")


def buy(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "waterline", "buy", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "250"},
    )


def test_json_has_everything_and_the_fleet_that_is_written_is_one(tmp_path: Path) -> None:
    written = tmp_path / "bought.toml"
    done = buy(TENDER, "--budget", "20M CNY", *FEW, "--max-vendor-share", "0.7", "--output", written, "--json")
    assert done.returncode == 0, done.stderr
    advice = json.loads(done.stdout)
    best = advice["best"]
    assert best["served_fraction"] == pytest.approx(1.0)
    assert best["usd"] <= advice["budget_usd"] == pytest.approx(20e6 / 7.2734)
    assert [one["name"] for one in advice["safeguards"]] == ["at most 70% to one vendor"]
    assert {"low_usd", "usd", "high_usd", "kind", "date", "source"} <= best["servers"][-1]["price"].keys()
    assert {"losses", "scenarios", "rent", "left_out", "hosting", "servers", "currency", "least"} <= advice.keys()
    fleet = load_fleet(written)
    bought = {one["name"]: one["servers"] for one in best["servers"]}
    assert {pool.name: pool.nodes for pool in fleet.pools} == bought
    assert fleet.models == load_fleet(TENDER).models
    assert fleet.demand == load_fleet(TENDER).demand


def test_a_budget_that_is_too_small_writes_a_fleet_that_serves_most(tmp_path: Path) -> None:
    written = tmp_path / "bought.toml"
    done = buy(TENDER, "--budget", "3M CNY", "--gpu", "mi300x", "--scenario", "low", "--output", written)
    assert done.returncode == 0, done.stderr
    assert "of the requests at their hardest hours" in done.stdout
    assert "To serve everything takes at least" in done.stdout
    assert load_fleet(written).objective == "goodput"


def test_the_tables_name_price_kinds_dates_rates_and_safeguards() -> None:
    done = buy(TENDER, "--currency", "CNY", *FEW, "--export-rule", "2023-10", "--scenario", "nvidia +30 %")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for part in (
        "export rule 2023-10",
        "nvidia +30 %",
        "1 USD = 7.2734 CNY (2025-02)",
        "h20-141g, 2025-12",
        "not legal advice",
        "Renting round the clock",
        "Left out, under the export rule: h200-sxm-141g, mi300x",
    ):
        assert part in said, part


def test_what_no_money_buys_has_its_own_exit_code() -> None:
    done = buy(TENDER, *FEW, "--export-rule", "2025-04", "--new")
    assert done.returncode == 3
    assert "no purchase serves the demand without cards under the export rule of 2025-04" in done.stderr


def test_without_a_fleet_a_budget_or_a_tender_is_worked_out() -> None:
    budget = buy("--budget", "5.2-6.4 M CNY", "--gpu", "a100-sxm-80g", "--json")
    assert budget.returncode == 0, budget.stderr
    (tender,) = json.loads(budget.stdout)["tenders"]
    assert (tender["servers"], tender["gpu"]) == (2, "a100-sxm-80g")
    done = buy("--tender", "2 nodes of 8 A100 SXM 80GB", "--currency", "CNY")
    assert done.returncode == 0, done.stderr
    assert "5.80 M CNY" in done.stdout
    assert "deepseek-ai/DeepSeek-R1" in done.stdout


def test_a_mistake_ends_with_its_exit_code() -> None:
    done = buy("--budget", "5 XYZ")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("waterline: no rate is known for the currency 'XYZ'.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a fleet file, a --budget, or a --tender"),
        (["--budget", "5 XYZ"], "no rate is known for the currency 'XYZ'. Known: USD, CNY"),
        (["--budget=-5 USD"], "is not an amount of money. Write a number above 0"),
        (["--budget", "20000000"], "does not say in which currency"),
        (["--tender", "some h100"], "Write how many of what"),
        (["--tender", "2 nodes of 8 mi350x"], '--price "mi350x=250000 USD"'),
        (["--budget", "5M USD", "--export-rule", "2023-10"], "Name its file"),
        ([TENDER, "--budget", "5-6M USD"], "is a range"),
        ([TENDER, "--gpu", "mi350x"], '--price "mi350x=250000 USD"'),
        ([TENDER, "--gpu", "h100"], "h100-pcie-80g"),
        ([TENDER, "--price", "mi350x"], "Write card and price of one server"),
        ([TENDER, "--export-rule", "1999"], "Known: 2022-10"),
        ([TENDER, "--scenario", "cheaper"], "Write low, high, or changes"),
        ([TENDER, "--currency", "DOGE"], "Known: USD, CNY"),
        ([TENDER, "--max-vendor-share", "1.5"], "--max-vendor-share"),
        ([TENDER, "--tender", "1 node of 8 mi300x", "--export-rule", "2023-10"], "a tender is judged as it is"),
        ([TENDER, *FEW, "--output", "/nowhere/bought.toml"], "cannot write /nowhere/bought.toml"),
        (["nowhere.toml"], "cannot read the fleet file"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str | Path], message: str) -> None:
    done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert isinstance(done.exception, InputError | SystemExit), done.exception
    said = str(done.exception) if isinstance(done.exception, InputError) else done.output
    assert message in " ".join(said.split())
    assert isinstance(done.exception, InputError) != bool(done.output)
