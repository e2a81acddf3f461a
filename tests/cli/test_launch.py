"""What `waterline launch` prints: a script for each node that a shell reads as it was meant."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from examples import small_plan
from plans import a_day, one_replica
from waterline.cli.launch import launch
from waterline.errors import EngineError, InputError, UnknownNameError
from waterline.plan import Layout, Plan, write_plan

DEEPSEEK = "deepseek-ai/DeepSeek-R1"


def launched(folder: Path, plan: Plan, *arguments: str) -> Result:
    write_plan(plan, folder / "plan.json")
    return CliRunner().invoke(launch, [str(folder / "plan.json"), *arguments])


def printed(folder: Path, plan: Plan, *arguments: str) -> list[dict[str, Any]]:
    result = launched(folder, plan, "--json", *arguments)
    assert result.exception is None
    starts: list[dict[str, Any]] = json.loads(result.stdout)
    return starts


def with_engine(plan: Plan, engine: str) -> Plan:
    return replace(plan, replicas=tuple(replace(one, engine=engine) for one in plan.replicas))


def test_a_shell_reads_the_script_as_the_arguments_of_json(tmp_path: Path) -> None:
    plan = one_replica(name='it\'s a $(touch pwned) "name" & more', role="prefill")
    (start,) = printed(tmp_path, plan)
    script = launched(tmp_path, plan).stdout
    shown = 'vllm() { printf "%s\\0" "$VLLM_NIXL_SIDE_CHANNEL_PORT" vllm "$@"; }\n' + script
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, cwd=tmp_path, check=True)
    port, *arguments = done.stdout.removesuffix("\0").split("\0")
    assert arguments == start["command"]
    assert port == start["environment"]["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "20008"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


def test_only_the_replicas_that_serve_at_that_hour_are_started(tmp_path: Path) -> None:
    plan = with_engine(a_day(8), "vllm")
    assert len(printed(tmp_path, plan)) == 8  # the busiest hour
    assert len(printed(tmp_path, plan, "--hour", "20")) == 8
    assert [start["replica"] for start in printed(tmp_path, plan, "--hour", "3")] == ["chat/0", "chat/1"]
    script = launched(tmp_path, plan).stdout
    assert "# chat/1: bf16 tp2\n" in script
    assert "# chat/2: bf16 tp2; serves 19:00-23:00, loads in 90 s\n" in script


def test_a_node_is_one_block_and_may_be_asked_for_alone(tmp_path: Path) -> None:
    plan = with_engine(a_day(8), "vllm")
    script = launched(tmp_path, plan).stdout
    assert script.startswith("# small, hour 19: 8 replicas on 2 nodes\n\n# box/0 (box-0): 8 of its 8 rtx-4090\n")
    assert script.count("\nwait\n") == 2
    alone = printed(tmp_path, plan, "--node", "box/1")
    assert {start["node"] for start in alone} == {"box/1"}
    assert [start["url"] for start in alone] == [f"http://box-1:{port}/v1" for port in (8100, 8102, 8104, 8106)]
    assert [start["environment"]["CUDA_VISIBLE_DEVICES"] for start in alone] == ["0,1", "2,3", "4,5", "6,7"]


def test_a_replica_on_several_nodes_has_a_process_on_each_and_one_url(tmp_path: Path) -> None:
    plan = one_replica(layout=Layout(tp=8, pp=2), nodes=2, weights=DEEPSEEK, precision="fp8")
    first, second = printed(tmp_path, plan, "--address", "gpu-{node:02d}.lan")
    assert (first["node"], first["url"]) == ("box/0", "http://gpu-00.lan:8100/v1")
    assert (second["node"], second["url"]) == ("box/1", "")
    for start in (first, second):
        assert "--master-addr gpu-00.lan" in shlex.join(start["command"])
    assert "# chat/0: fp8 tp8 pp2, part 2 of 2\n" in launched(tmp_path, plan).stdout


@pytest.mark.parametrize(
    ("engine", "url", "said"),
    [("fake", "", "played by waterline up"), ("openai", "http://there/v1", "attached to at http://there/v1")],
)
def test_what_is_not_started_is_said(tmp_path: Path, engine: str, url: str, said: str) -> None:
    plan = one_replica(engine)
    plan = replace(plan, fleet=replace(plan.fleet, models=(replace(plan.fleet.models[0], url=url),)))
    script = launched(tmp_path, plan).stdout
    assert said in script
    assert "wait" not in script


def test_what_cannot_be_started_does_not_hide_the_others(tmp_path: Path) -> None:
    good = with_engine(a_day(4), "vllm")
    plan = replace(good, replicas=(*good.replicas[:3], replace(good.replicas[3], precision="int4")))
    result = launched(tmp_path, plan)
    assert isinstance(result.exception, EngineError)
    assert "planned in int4" in str(result.exception)
    assert result.stdout.count("vllm serve") == 3
    assert "# chat/3: int4 tp2; serves 19:00-23:00, loads in 90 s; model 'chat' is planned in int4" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--node", "bax/0"], UnknownNameError, "no pool is called 'bax'. Did you mean 'box'"),
        (["--node", "box"], UnknownNameError, "as in box/0"),
        (["--node", "box/1"], UnknownNameError, "pool 'box' has no node '1': it has 1, counted from 0"),
        (["--node", "box/-1"], UnknownNameError, "pool 'box' has no node '-1'"),
        (["--address", "{rack}"], InputError, "is no pattern: 'rack'"),
        (["--address", "{node"], InputError, "is no pattern"),
    ],
)
def test_a_mistake_is_one_clear_error(
    tmp_path: Path, arguments: list[str], error: type[Exception], message: str
) -> None:
    result = launched(tmp_path, one_replica(), *arguments)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


def test_a_fleet_file_is_planned_first() -> None:
    result = CliRunner().invoke(launch, [str(Path(__file__).parents[2] / "examples" / "box.toml")])
    assert result.exception is None
    assert "vllm serve meta-llama/Llama-3.1-8B" in result.stdout


def test_an_hour_without_replicas_is_an_empty_script(tmp_path: Path) -> None:
    plan = small_plan()
    result = launched(tmp_path, replace(plan, replicas=(replace(plan.replicas[0], hours=(4,)),)), "--hour", "5")
    assert result.exception is None
    assert result.stdout == "# small, hour 5: 0 replicas on 0 nodes\n"
