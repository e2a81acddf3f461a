"""`waterline size` as a person meets it."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from waterline.cli.size import size
from waterline.errors import InputError, UnknownNameError

LOAD = ("--rate", "5", "--isl", "1000", "--osl", "200")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(size, arguments)


def test_json_has_the_answer_at_its_top_level() -> None:
    result = run("llama-3.1-8b", *LOAD, "--gpu", "l40s", "--ttft", "2", "--tpot", "0.05", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert {"gpus", "gpu", "layout", "replicas", "ttft_s", "tpot_s", "usd_per_hour", "precision"} <= answer.keys()
    assert answer["gpu"] == "l40s"
    assert answer["gpus"] == sum(part["gpus"] for part in answer["parts"])
    assert answer["alternatives"]


def test_a_name_of_several_cards_means_all_of_them() -> None:
    answer = json.loads(run("llama-3.1-8b", *LOAD, "--gpu", "h100", "--json").stdout)
    assert {one["gpu"] for one in (answer, *answer["alternatives"])} == {
        "h100-pcie-80g",
        "h100-sxm-80g",
        "h100-nvl-94g",
    }


def test_the_table_names_the_best_first_and_what_has_no_price() -> None:
    shown = run("llama-3.1-8b", *LOAD, "--gpu", "l40s", "--gpu", "h20-96g").stdout
    assert shown.startswith("2 x l40s, $")
    assert "No price is known for h20-96g: give one with --price h20-96g=USD" in shown


def test_a_price_of_ones_own_counts() -> None:
    answer = json.loads(run("llama-3.1-8b", *LOAD, "--gpu", "h20-96g", "--price", "h20-96g=0.5", "--json").stdout)
    assert answer["usd_per_hour"] == 0.5 * answer["gpus"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", "0"), "--rate = 0 should be a number above 0"),
        (("--rate", "-3"), "--rate = -3 should be a number above 0"),
        (("--rate", "nan"), "--rate = nan should be a number above 0"),
        (("--rate", "1e30"), "--rate = 1e+30 should be at most 10,000,000 requests a second"),
        (("--ttft", "0"), "--ttft = 0 should be a number above 0"),
        (("--tpot", "inf"), "--tpot = inf should be a number above 0"),
        (("--fraction", "1"), "--fraction = 1 should be a share between 0 and 1"),
        (("--prefix-hit", "1"), "--prefix-hit = 1 should be a share"),
        (("--isl", "0"), "--isl = 0 should be at least 1 token"),
        (("--isl", "400000"), "has a context of 131072"),
        (("--context", "100"), "--context 100 should lie between the 1200 tokens of a request and the 131072"),
        (("--gpu", "h1000"), "no GPU is called 'h1000'. Did you mean"),
        (("--precision", "fp9"), "no precision is called 'fp9'. Did you mean"),
        (("--precision", "q4_k_m"), "q4_k_m is a format of llama.cpp, vllm does not run it"),
        (("--engine", "vlm"), "no engine is called 'vlm'. Did you mean 'vllm'"),
        (("--price", "l40s"), "--price l40s should be a card and dollars an hour, as --price h100-sxm-80g=2.5"),
        (("--price", "l40s=-1"), "--price l40s=-1 should be"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: tuple[str, ...], message: str) -> None:
    result = run("llama-3.1-8b", *LOAD, *arguments)
    assert isinstance(result.exception, InputError | UnknownNameError)
    assert message in str(result.exception)


def test_json_needs_nothing_that_is_only_for_drawing_or_planning_fleets() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from waterline.cli.size import size;"
        "done = CliRunner().invoke(size, ['llama-3.1-8b', '--rate', '5', '--isl', '1000', '--osl', '200', '--gpu', 'l40s',"
        " '--json']); print(done.exit_code, *sys.modules)"
    )
    code, *loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert code == "0"
    assert not {"rich", "numba", "highspy", "aiohttp", "torch"} & set(loaded)
