"""The command line as a person meets it: real processes, real exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import waterline as api

EXAMPLES = Path(__file__).parents[2] / "examples"


def waterline(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "waterline", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_lists_every_command() -> None:
    done = waterline("--help")
    assert done.returncode == 0
    for command in ("fit", "plan", "rehearse", "up", "catalog"):
        assert f"  {command}" in done.stdout


@pytest.mark.parametrize("command", ["fit", "plan", "rehearse", "up", "catalog"])
def test_every_command_helps_with_an_example(command: str) -> None:
    done = waterline(command, "--help")
    assert done.returncode == 0
    assert f"waterline {command} " in done.stdout


def test_importing_waterline_loads_nothing_heavy() -> None:
    heavy = {"numba", "torch", "ray", "aiohttp", "rich", "numpy", "click", "xllamacpp"}
    code = "import sys, waterline; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & set(loaded)


def test_the_command_line_loads_nothing_heavy_before_a_command_runs() -> None:
    heavy = {"numba", "torch", "ray", "aiohttp", "rich", "numpy", "xllamacpp", "msgspec"}
    code = "import sys, waterline.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & set(loaded)


def test_the_promised_api_is_there() -> None:
    assert all(getattr(api, name) is not None for name in api.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'fleets'"):
        api.fleets  # noqa: B018 - the access is the test


def test_plan_prints_json_that_the_plan_file_holds_too(tmp_path: Path) -> None:
    done = waterline("plan", EXAMPLES / "mixed.toml", "--json", "--output", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan == json.loads((tmp_path / "plan.json").read_text())
    assert {replica["model"] for replica in plan["replicas"]} == {"r1", "coder", "small"}


def test_fit_prints_json_with_units_in_the_names() -> None:
    done = waterline("fit", "qwen3-32b", "--gpu", "4090", "--gpu", "MI300X", "--json")
    assert done.returncode == 0, done.stderr
    by_gpu = {one["gpu"]: one for one in json.loads(done.stdout)}
    assert by_gpu["mi300x"]["gpus"] == 1
    assert {"ttft_s", "tpot_s", "usd_per_hour", "max_context_tokens"} <= by_gpu["rtx-4090"].keys()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "nowhere.toml"], 2, "cannot read the fleet file nowhere.toml: No such file"),
        (["fit", "deepseek-r9"], 2, "'deepseek-r9'"),
        (
            ["estimate", "qwen3-32b", "--gpu", "h100", "--isl", "9", "--osl", "9", "--concurrency", "1"],
            2,
            "h100-pcie-80g, h100-sxm-80g, h100-nvl-94g",
        ),
        (["fit", "qwen3-32b", "--precision", "fp9"], 2, "no precision is called 'fp9'. Did you mean"),
        (["fit", "qwen3-32b", "--engine", "vlm"], 2, "no engine is called 'vlm'. Did you mean 'vllm'"),
        (["fit", "qwen3-32b", "--context", "9999999"], 2, "reads at most"),
        (["plan", "--outptu"], 2, "--outptu"),
        (["plna"], 2, "plna"),
    ],
)
def test_a_mistake_is_one_message_and_its_exit_code(arguments: list[str], code: int, message: str) -> None:
    done = waterline(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_what_cannot_be_done_has_its_own_exit_code(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    text = (EXAMPLES / "mixed.toml").read_text()
    fleet.write_text(text.replace("slo = { ttft_s = 3.0", "slo = { ttft_s = 0.001"))
    done = waterline("plan", fleet, "--output", tmp_path / "plan.json")
    assert done.returncode == 3
    assert "runs on none of the pools" in done.stderr
    assert not (tmp_path / "plan.json").exists()
