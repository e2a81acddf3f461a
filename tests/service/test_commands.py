"""The commands that start engines, held against the engines' own flags.

`data/*.json` has the flags of vLLM, SGLang and llama-server with the values they take, recorded from the version it
names. Where vLLM itself is installed, its parser is asked too.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from plans import one_replica
from waterline.catalog.engine_flags import PARSERS, check_arguments, owned_flags
from waterline.catalog.parsers import families
from waterline.errors import EngineError
from waterline.plan import Layout, Plan
from waterline.service.engines import command_of, llamacpp, sglang, vllm
from waterline.service.engines.hosted import Hosted
from waterline.service.engines.seat import Command, Seat, api_port, environment_of

ALONE = Seat()
DATA = Path(__file__).with_name("data")
DEEPSEEK = "deepseek-ai/DeepSeek-R1"
ABACUS = str(Path(__file__).parents[2] / "src/waterline/catalog/weights/abacus-q8_0.gguf")
BEFORE_THE_OPTIONS = {"vllm": 3, "sglang": 2, "llamacpp": 1}


def recorded(engine: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((DATA / f"{engine}.json").read_text())
    return record


class MisuseError(Exception):
    pass


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise MisuseError(message)


def parser_of(engine: str) -> Parser:
    """Return a parser of an engine's flags that takes no abbreviations and wants every flag at most as recorded."""
    kinds = {"int": int, "float": float, "str": str, "json": json.loads}
    parser = Parser(allow_abbrev=False, add_help=False)
    for flag, facts in recorded(engine)["flags"].items():
        if not flag.startswith("--"):
            continue
        if facts["values"] == 0:
            parser.add_argument(flag, action="store_true")
        else:
            nargs = None if facts["values"] == 1 else facts["values"]
            kind = kinds[facts["type"]]
            choices = [kind(choice) for choice in facts["choices"]] if "choices" in facts else None
            parser.add_argument(flag, nargs=nargs, type=kind, choices=choices)
    return parser


def command(plan: Plan, seat: Seat = ALONE, replica: int = 0) -> Command:
    return command_of(plan, plan.replicas[replica], seat)


def parsed(plan: Plan, seat: Seat = ALONE) -> argparse.Namespace:
    engine = plan.replicas[0].engine
    arguments, _ = command(plan, seat)
    options = arguments[BEFORE_THE_OPTIONS[engine] :]
    assert len([word for word in options if word.startswith("--")]) == len({w for w in options if w.startswith("--")})
    return parser_of(engine).parse_args(options)


PLANS = {
    "one H100": one_replica,
    "tensor parallel on AMD": lambda engine: one_replica(
        engine, "mi300x", Layout(tp=8), weights=DEEPSEEK, precision="fp8"
    ),
    "quantised while loading": lambda engine: one_replica(engine, precision="fp8"),
    "two nodes in a pipeline": lambda engine: one_replica(
        engine, "h100-sxm-80g", Layout(tp=8, pp=2), 2, DEEPSEEK, "fp8"
    ),
    "wide expert parallelism": lambda engine: one_replica(
        engine, "h200-sxm", Layout(tp=1, dp=16, ep=16), 2, DEEPSEEK, "fp8", max_batch=500
    ),
    "reads prompts": lambda engine: one_replica(engine, role="prefill"),
    "writes answers": lambda engine: one_replica(engine, "mi300x", role="decode"),
    "half precision": lambda engine: one_replica(engine, precision="fp16"),
    "thinks and calls tools": lambda engine: one_replica(engine, weights="Qwen/Qwen3-8B"),
}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("case", PLANS)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_flag_is_one_of_the_engine_with_a_value_it_takes(engine: str, case: str, rank: int) -> None:
    plan = PLANS[case](engine)
    if rank < len(plan.replicas[0].places):
        parsed(plan, Seat(rank=rank, host="0.0.0.0", port=8100, address="box-1", head_address="box-0"))


def vllm_parser() -> Any:
    """Return vLLM's own parser. It can be built only where vLLM finds a device it knows."""
    pytest.importorskip("vllm", reason="vLLM is not installed: its recorded flags are all there is")
    cli_args = pytest.importorskip("vllm.entrypoints.common.cli_args")
    utils = pytest.importorskip("vllm.utils.argparse_utils")
    try:
        return cli_args.make_arg_parser(utils.FlexibleArgumentParser())
    except RuntimeError as error:
        pytest.skip(f"vLLM does not build its parser on this machine: {error}")


def test_vllm_itself_takes_every_command() -> None:
    parser = vllm_parser()
    for case in PLANS.values():
        plan = case("vllm")
        for rank in range(len(plan.replicas[0].places)):
            arguments, _ = command(plan, Seat(rank=rank, port=8100))
            parser.parse_args(arguments[2:])


def test_sglang_itself_takes_every_command() -> None:
    pytest.importorskip("sglang", reason="SGLang is not installed: its recorded flags are all there is")
    parser = Parser(allow_abbrev=False)
    pytest.importorskip("sglang.srt.server_args").ServerArgs.add_cli_args(parser)
    for case in PLANS.values():
        plan = case("sglang")
        for rank in range(len(plan.replicas[0].places)):
            arguments, _ = command(plan, Seat(rank=rank, port=8100))
            parser.parse_args(arguments[2:])


@pytest.mark.parametrize(
    ("engine", "right", "wrong", "message"),
    [
        ("vllm", "--max-model-len", "--max-model-length", "unrecognized arguments: --max-model-length"),
        ("vllm", "priority", "prio", "invalid choice: 'prio'"),
        ("vllm", "16", "sixteen", "invalid int value: 'sixteen'"),
        ("vllm", "256", "", "expected one argument"),
        ("sglang", "--tp-size", "--tp", "unrecognized arguments: --tp"),
        ("sglang", "decode", "decoder", "invalid choice: 'decoder'"),
        ("llamacpp", "row", "rows", "invalid choice: 'rows'"),
        ("llamacpp", "--ctx-size", "--ctxsize", "unrecognized arguments: --ctxsize"),
    ],
)
def test_a_flag_that_is_misspelt_or_misused_is_noticed(engine: str, right: str, wrong: str, message: str) -> None:
    valid = {
        "vllm": ["--scheduling-policy", "priority", "--max-model-len", "16", "--max-num-seqs", "256"],
        "sglang": ["--disaggregation-mode", "decode", "--tp-size", "2"],
        "llamacpp": ["--split-mode", "row", "--ctx-size", "4096"],
    }[engine]
    parser_of(engine).parse_args(valid)
    with pytest.raises(MisuseError) as caught:
        parser_of(engine).parse_args([w for word in valid if (w := wrong if word == right else word)])
    assert message in str(caught.value)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp"])
def test_recorded_flags_say_of_which_version_they_are(engine: str) -> None:
    record = recorded(engine)
    assert record["version"]
    assert record["source"]
    assert len(record["flags"]) > 80


def test_vllm_is_told_what_was_planned() -> None:
    arguments, environment = command(one_replica(), Seat(port=8100))
    assert " ".join(arguments) == (
        "vllm serve meta-llama/Llama-3.1-8B --served-model-name chat --host 127.0.0.1 --port 8100 "
        "--tensor-parallel-size 1 --max-model-len 4096 --max-num-seqs 8 --max-num-batched-tokens 8192 "
        "--gpu-memory-utilization 0.9 --dtype bfloat16 --kv-cache-dtype auto --enable-prefix-caching "
        "--enable-prompt-tokens-details --scheduling-policy priority --max-num-queued-reqs 16 "
        "--tool-call-parser llama3_json --enable-auto-tool-choice"
    )
    assert environment == {"CUDA_VISIBLE_DEVICES": "0"}


def test_sglang_is_told_what_was_planned() -> None:
    arguments, environment = command(one_replica("sglang"), Seat(port=8100))
    assert " ".join(arguments) == (
        "sglang serve --model-path meta-llama/Llama-3.1-8B --served-model-name chat "
        "--host 127.0.0.1 --port 8100 --tp-size 1 --context-length 4096 --max-running-requests 8 "
        "--chunked-prefill-size 8192 --dtype bfloat16 --kv-cache-dtype auto --enable-priority-scheduling "
        "--schedule-low-priority-values-first --max-queued-requests 8 --enable-metrics "
        "--enable-cache-report --tool-call-parser llama3"
    )
    assert environment == {"CUDA_VISIBLE_DEVICES": "0"}


def test_a_small_card_reads_fewer_tokens_a_step_as_was_planned() -> None:
    assert parsed(one_replica(gpu="rtx-4090")).max_num_batched_tokens == 2048
    assert parsed(one_replica("sglang", "rtx-4090")).chunked_prefill_size == 2048


@pytest.mark.parametrize(
    ("engine", "gpu", "environment"),
    [
        ("vllm", "h100-sxm-80g", {"CUDA_VISIBLE_DEVICES": "0,1"}),
        ("vllm", "mi300x", {"HIP_VISIBLE_DEVICES": "0,1", "VLLM_ROCM_USE_AITER": "1"}),
        ("vllm", "mi250x", {"HIP_VISIBLE_DEVICES": "0,1"}),  # AITER's kernels are for later ones
        ("sglang", "mi355x", {"HIP_VISIBLE_DEVICES": "0,1", "SGLANG_USE_AITER": "1"}),
        ("sglang", "rx-7900-xtx", {"HIP_VISIBLE_DEVICES": "0,1"}),
    ],
)
def test_each_vendor_has_its_mask_and_its_kernels(engine: str, gpu: str, environment: dict[str, str]) -> None:
    assert command(one_replica(engine, gpu, Layout(tp=2)))[1] == environment


def test_the_mask_has_the_cards_of_that_node() -> None:
    plan = one_replica("vllm", layout=Layout(tp=4, pp=2), nodes=2)
    assert command(plan, Seat(rank=1))[1] == {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}


def test_several_nodes_meet_at_the_first_which_alone_answers() -> None:
    plan = one_replica("vllm", layout=Layout(tp=8, pp=2), nodes=2, weights=DEEPSEEK, precision="fp8")
    first = parsed(plan, Seat(rank=0, head_address="box-0"))
    second = parsed(plan, Seat(rank=1, head_address="box-0"))
    for one in (first, second):
        assert (one.nnodes, one.master_addr, one.master_port) == (2, "box-0", 20000)
        assert one.distributed_executor_backend == "mp"
        assert (one.tensor_parallel_size, one.pipeline_parallel_size) == (8, 2)
    assert (first.node_rank, second.node_rank) == (0, 1)
    assert (first.headless, second.headless) == (False, True)

    plan = one_replica("sglang", layout=Layout(tp=8, pp=2), nodes=2, weights=DEEPSEEK, precision="fp8")
    second = parsed(plan, Seat(rank=1, head_address="box-0"))
    assert (second.nnodes, second.node_rank, second.dist_init_addr) == (2, 1, "box-0:20000")


def test_a_batch_is_dealt_to_the_data_parallel_ranks_as_each_engine_counts() -> None:
    layout = Layout(dp=16, ep=16)
    vllm = parsed(one_replica("vllm", "h200-sxm", layout, 2, DEEPSEEK, "fp8", max_batch=500))
    assert (vllm.data_parallel_size, vllm.enable_expert_parallel, vllm.max_num_seqs) == (16, True, 32)  # a rank
    sglang = parsed(one_replica("sglang", "h200-sxm", layout, 2, DEEPSEEK, "fp8", max_batch=500))
    assert (sglang.tp_size, sglang.attn_dp_size, sglang.ep_size) == (16, 16, 16)
    assert (sglang.max_running_requests, sglang.chunked_prefill_size) == (512, 16 * 8192)  # all ranks together


@pytest.mark.parametrize(("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
def test_a_replica_with_one_role_hands_its_cache_on_or_takes_it(role: str, kv_role: str) -> None:
    arguments, environment = command(one_replica(role=role), Seat(address="box-0"))
    config = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    assert config == {"kv_connector": "NixlConnector", "kv_role": kv_role, "kv_load_failure_policy": "fail"}
    assert set(config) <= set(recorded("vllm")["flags"]["--kv-transfer-config"]["keys"])
    assert environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "box-0"
    sglang = parsed(one_replica("sglang", role=role))
    assert (sglang.disaggregation_mode, sglang.disaggregation_transfer_backend) == (role, "nixl")
    assert (sglang.disaggregation_bootstrap_port is not None) == (role == "prefill")


@pytest.mark.parametrize(("engine", "method"), [("vllm", "fp8_per_channel"), ("sglang", "fp8")])
def test_weights_are_quantised_while_they_load_only_where_the_checkpoint_is_not(engine: str, method: str) -> None:
    assert parsed(one_replica(engine, precision="fp8")).quantization == method
    assert parsed(one_replica(engine, weights=DEEPSEEK, precision="fp8")).quantization is None
    assert parsed(one_replica(engine)).quantization is None


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_an_engine_cannot_do_is_said_with_what_to_do_instead(engine: str) -> None:
    with pytest.raises(
        EngineError, match="planned in int8, but 'deepseek-ai/DeepSeek-R1' is stored in fp8.*checkpoint"
    ):
        command(one_replica(engine, "a100-sxm-80g", Layout(tp=8), 1, DEEPSEEK, "int8"))
    with pytest.raises(EngineError, match="is started on CUDA and on ROCm, and 'ascend-910b' .* runs cann"):
        command(one_replica(engine, "ascend-910b"))


def test_a_name_of_the_catalogue_becomes_an_id_of_the_hub_and_a_path_stays() -> None:
    assert command(one_replica(weights="qwen3-32b"))[0][2] == "Qwen/Qwen3-32B"
    assert command(one_replica(weights="meta-llama/Llama-3.1-8B-Instruct"))[0][2] == "meta-llama/Llama-3.1-8B-Instruct"


# --- Thoughts, tools, and an owner's own flags ------------------------------------------------------------------------


def choice(plan: Plan) -> tuple[str | None, str | None]:
    told = parsed(plan)
    return told.reasoning_parser, told.tool_call_parser


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_parser_of_the_catalogue_is_one_the_engine_registers(engine: str) -> None:
    flags = recorded(engine)["flags"]
    for family in families():
        for flag, name in zip(PARSERS, (family.reasoning[engine], family.tools[engine]), strict=True):
            assert name in {"", *flags[flag]["choices"]}, family
    assert "qwen-3" not in flags["--reasoning-parser"]["choices"]


def test_vllm_itself_registers_every_parser() -> None:
    reasoning = pytest.importorskip(
        "vllm.reasoning", reason="vLLM is not installed: its recorded names are all there is"
    )
    tools = pytest.importorskip("vllm.tool_parsers")
    for family in families():
        if family.reasoning["vllm"]:
            assert reasoning.ReasoningParserManager.get_reasoning_parser(family.reasoning["vllm"])
        if family.tools["vllm"]:
            assert tools.ToolParserManager.get_tool_parser(family.tools["vllm"])


def test_thoughts_and_tool_calls_are_told_apart_by_the_parsers_of_the_model() -> None:
    assert choice(one_replica(weights="qwen3-8b")) == ("qwen3", "hermes")
    assert choice(one_replica("sglang", weights="qwen3-8b")) == ("qwen3", "qwen")
    assert parsed(one_replica(weights="qwen3-8b")).enable_auto_tool_choice
    unknown = one_replica(weights="01-ai/Yi-34B")
    assert choice(unknown) == (None, None)
    assert not parsed(unknown).enable_auto_tool_choice


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_owners_flags_come_last_in_every_process(engine: str) -> None:
    plan = one_replica(engine, layout=Layout(tp=8, pp=2), nodes=2, own=("--trust-remote-code", "--seed", "3"))
    for rank in (0, 1):
        assert command(plan, Seat(rank=rank))[0][-3:] == ("--trust-remote-code", "--seed", "3")


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (("--reasoning-parser", "deepseek_r1"), ("deepseek_r1", "hermes")),
        (("--reasoning_parser=deepseek_r1", "--tool-call-parser", "pythonic"), ("deepseek_r1", "pythonic")),
        (("--reasoning-parser", "", "--seed", "3"), (None, "hermes")),
        (("--tool-call-parser=",), ("qwen3", None)),
    ],
)
def test_an_owners_choice_of_a_parser_takes_the_place_of_ours(
    own: tuple[str, ...], told: tuple[str | None, str | None]
) -> None:
    plan = one_replica(weights="Qwen/Qwen3-8B", own=own)
    assert choice(plan) == told
    assert parsed(plan).enable_auto_tool_choice == (told[1] is not None)


def test_the_gateway_is_told_how_a_thought_ends() -> None:
    gemma, own = (
        one_replica(weights="google/gemma-4-26B-A4B", own=own) for own in ((), ("--reasoning-parser", "mine"))
    )
    for engine in (vllm, sglang):
        assert engine.prepare(gemma, gemma.replicas[0]).dialect.end_of_thinking == "<channel|>"
        assert engine.prepare(own, own.replicas[0]).dialect.end_of_thinking == "</think>"


def test_other_flags_make_another_engine_so_that_a_replica_starts_anew() -> None:
    plans = [one_replica(own=own) for own in ((), (), ("--enable-lora",))]
    first, same, changed = (vllm.prepare(plan, plan.replicas[0]) for plan in plans)
    assert first == same
    assert first != changed


def test_every_flag_we_set_is_ours_alone_or_yields_to_the_owners() -> None:
    plans = [case(engine) for case in PLANS.values() for engine in ("vllm", "sglang")]
    plans.append(one_replica("llamacpp", "mi300x", Layout(tp=2), 1, ABACUS, "q8_0"))
    yielding = {*PARSERS, "--enable-auto-tool-choice", "--no-webui"}
    for plan in plans:
        engine = plan.replicas[0].engine
        for rank in range(len(plan.replicas[0].places)):
            arguments, _ = command(plan, Seat(rank=rank, port=8100))
            flags = {word for word in arguments if word.startswith("--")}
            assert flags - yielding <= set(owned_flags(engine))


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp"])
def test_what_is_ours_are_flags_of_the_engine_and_every_other_one_is_handed_on(engine: str) -> None:
    flags, ours = set(recorded(engine)["flags"]), set(owned_flags(engine))
    assert ours <= flags
    negated = {f"--no-{flag[2:]}" for flag in ours}
    for flag in flags - ours - negated:
        check_arguments(engine, [flag, "x"])


def test_llama_server_takes_an_owners_flags_and_the_wheel_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp", reason="the wheel with llama.cpp's library is not installed")
    on_cards, without = (
        one_replica("llamacpp", gpu, Layout(), 1, ABACUS, "q8_0", own=("--flash-attn", "on"))
        for gpu in ("mi300x", "cpu")
    )
    assert command(on_cards)[0][-2:] == ("--flash-attn", "on")
    (tmp_path / "llama-server").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert isinstance(llamacpp.prepare(on_cards, on_cards.replicas[0]), Hosted)
    with pytest.raises(EngineError, match="has engine_arguments, and the llama.cpp of the package xllamacpp has none"):
        llamacpp.prepare(without, without.replicas[0])


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def test_llama_cpp_is_told_what_was_planned() -> None:
    plan = one_replica("llamacpp", "mi300x", Layout(tp=2), 1, ABACUS, "q8_0", name="abacus")
    arguments, environment = command(plan, Seat(port=8100))
    assert " ".join(arguments) == (
        f"llama-server --model {ABACUS} --alias abacus --host 127.0.0.1 --port 8100 --parallel 7 --ctx-size 28672 "
        "--ubatch-size 512 --n-gpu-layers all --split-mode row --fit off --cache-ram 256 --threads-http 18 "
        "--no-webui --metrics"
    )
    assert environment == {"HIP_VISIBLE_DEVICES": "0,1"}
    parsed(plan)


def test_llama_cpp_itself_knows_every_flag_by_name() -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="the wheel with llama.cpp's library is not installed")
    (library,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    known = library.read_bytes()
    arguments, _ = command(one_replica("llamacpp", "mi300x", Layout(tp=2), 1, ABACUS, "q8_0"), Seat(port=8100))
    for flag in arguments:
        assert not flag.startswith("--") or b"\0" + flag.encode() + b"\0" in known
    assert b"\0--ctxsize\0" not in known


def test_llama_cpp_splits_as_the_layout_says_and_not_at_all_without_cards() -> None:
    for layout, split in ((Layout(), "none"), (Layout(pp=2), "layer"), (Layout(tp=2), "row")):
        assert parsed(one_replica("llamacpp", "rtx-4090", layout, 1, ABACUS, "q8_0")).split_mode == split
    on_cpu = parsed(one_replica("llamacpp", "cpu", Layout(), 1, ABACUS, "q8_0"))
    assert (on_cpu.split_mode, on_cpu.n_gpu_layers) == (None, None)


def test_llama_cpp_wants_a_file_and_one_node() -> None:
    with pytest.raises(EngineError, match="llama.cpp needs a .gguf file"):
        command(one_replica("llamacpp"))
    with pytest.raises(EngineError, match="planned as pp2 on 2 nodes for role 'both', and llama.cpp runs one copy"):
        command(one_replica("llamacpp", "rtx-4090", Layout(pp=2), 2, ABACUS, "q8_0"))


def test_neighbours_on_a_node_share_no_port() -> None:
    plan = one_replica()
    first = plan.replicas[0]
    second = replace(first, id="chat/1", places=(replace(first.places[0], gpus=(4,)),))
    assert (api_port(first), api_port(second)) == (8100, 8104)


@pytest.mark.parametrize(
    ("wanted", "ours", "given"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1"}, {}, {"CUDA_VISIBLE_DEVICES": "1"}),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1"},
            {"CUDA_VISIBLE_DEVICES": "5, GPU-8a3f"},
            {"CUDA_VISIBLE_DEVICES": "5,GPU-8a3f"},
        ),
        (
            {"HIP_VISIBLE_DEVICES": "1"},
            {"ROCR_VISIBLE_DEVICES": "2,3", "CUDA_VISIBLE_DEVICES": "0"},
            {"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"},
        ),
        ({"HIP_VISIBLE_DEVICES": "1"}, {"HIP_VISIBLE_DEVICES": "6,7"}, {"HIP_VISIBLE_DEVICES": "7"}),
        ({"A": "b"}, {"CUDA_VISIBLE_DEVICES": "3"}, {"A": "b", "CUDA_VISIBLE_DEVICES": "3"}),
    ],
)
def test_cards_are_counted_among_those_that_are_left_to_the_service(
    wanted: dict[str, str], ours: dict[str, str], given: dict[str, str]
) -> None:
    assert environment_of(wanted, ours) == given


def test_a_mask_that_leaves_too_few_cards_is_named_with_what_to_do() -> None:
    with pytest.raises(
        EngineError, match="CUDA_VISIBLE_DEVICES is 4,5 where waterline runs: that leaves 2 cards.*Unset"
    ):
        environment_of({"CUDA_VISIBLE_DEVICES": "2,3"}, {"CUDA_VISIBLE_DEVICES": "4,5"})
