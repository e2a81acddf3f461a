"""What engines add to their kernels: the tables of fits, and that none of them outruns a card."""

import runpy
import sys
from pathlib import Path

import msgspec
import pytest

from waterline import catalog
from waterline.catalog import accelerators
from waterline.catalog.calibration import PHYSICS, Calibration, calibration_of
from waterline.catalog.engines import find_engine
from waterline.cost.serving import pieces
from waterline.cost.step import step_cost
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS
from waterline.plan import Layout
from waterline.units import PICOSECONDS_PER_S

ENTRIES = ("vllm", "sglang", "trtllm", "llamacpp", "llamacpp-rocm", "vllm-rocm", "sglang-rocm")
PROVENANCES = {"measured", "interpolated", "transferred"}
FITTED = {"llamacpp-cuda", "llamacpp-rocm", "vllm-rocm", "sglang-rocm"}  # engine and stack in engines-public.toml
SERVED = [gpu for gpu in accelerators.table().values() if gpu.stack in {"cuda", "rocm"}]


def llamacpp_token_s(gpu: Gpu, precision: str, stages: int = 1, model: str = "Llama-3.1-8B") -> float:
    llm = catalog.find_model(model)
    step = step_cost(llm, gpu, Layout(pp=stages), precision, find_engine("llamacpp"))
    return step.step_ps(0, 0, 1, 512) / PICOSECONDS_PER_S


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_is_complete(name: str) -> None:
    found = calibration_of(*name.split("-")) if "-" in name else calibration_of(name)
    assert found.source
    assert found.gpus
    assert set(found.gpus) <= set(accelerators.table())
    assert found.spread
    assert set(found.spread) <= PROVENANCES
    for spread in found.spread.values():
        for low, high in (spread.ttft, spread.tpot):
            assert 0.1 < low < 1 < high < 10


def test_amd_has_entries_of_its_own_and_other_stacks_take_the_general_one() -> None:
    assert calibration_of("vllm", "rocm") != calibration_of("vllm", "cuda")
    assert calibration_of("vllm", "cuda") == calibration_of("vllm")
    assert calibration_of("llamacpp", "metal") == calibration_of("llamacpp")


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_runs_of_another_card_model_or_source_are_foreseen_less_well(engine: str) -> None:
    spread = calibration_of(engine).spread
    for figure in ("ttft", "tpot"):
        (low, high), (wide_low, wide_high) = (getattr(spread[name], figure) for name in ("measured", "interpolated"))
        assert wide_low < low
        assert wide_high > high


def test_a_model_ran_on_a_card_only_if_it_did() -> None:
    vllm, llamacpp, h100 = calibration_of("vllm"), calibration_of("llamacpp"), catalog.find_gpu("h100-sxm-80g")
    assert vllm.ran(h100, catalog.find_model("Meta-Llama-3.1-70B"))
    assert not vllm.ran(h100, catalog.find_model("DeepSeek-R1"))
    assert not vllm.ran(catalog.find_gpu("l40s"), catalog.find_model("Meta-Llama-3.1-70B"))
    assert llamacpp.ran(catalog.find_gpu("rtx-4090"), catalog.find_model("Qwen3-14B"))  # its runs are not told apart


def test_a_server_behind_a_url_and_the_fake_engine_are_taken_to_be_vllm() -> None:
    for stack in ("cuda", "rocm"):
        assert calibration_of("openai", stack) == calibration_of("fake", stack) == calibration_of("vllm", stack)
    assert calibration_of("fake").source


def test_an_engine_nobody_measured_takes_its_kernels_as_they_are() -> None:
    found = calibration_of("ascend-engine")
    assert found == Calibration()
    assert found.spread_of("transferred") == PHYSICS


@pytest.mark.parametrize(
    ("engine", "gpu"),
    [(engine, gpu) for gpu in SERVED for engine in ("llamacpp", "vllm", "sglang") if f"{engine}-{gpu.stack}" in FITTED],
    ids=lambda value: getattr(value, "id", value),
)
def test_no_token_comes_faster_than_the_weights_can_be_read(engine: str, gpu: Gpu) -> None:
    llm = catalog.find_model("Llama-3.1-8B")
    read = llm.active_parameters - llm.input_embedding_parameters
    for precision in ("q4_k_m", "fp16") if engine == "llamacpp" else ("bf16", "fp8"):
        if not any(rate in gpu.flops_per_s for rate in PRECISIONS[precision].compute):
            continue
        took_s = step_cost(llm, gpu, Layout(), precision, find_engine(engine)).step_ps(0, 0, 1, 512) / PICOSECONDS_PER_S
        floor_s = read * PRECISIONS[precision].bits / 8 / gpu.memory_bytes_per_s
        assert took_s >= floor_s, f"{took_s * 1e3:.2f} ms a token, {floor_s * 1e3:.2f} ms to read {precision} weights"


# Llama 3 8B, tokens/s of llama.cpp on one card: XiongjieDai's GPU-Benchmarks-on-LLM-Inference, 2024-05, to a quarter
@pytest.mark.parametrize(
    ("gpu", "precision", "published"),
    [("rtx-4080", "q4_k_m", 106.2), ("rtx-4080", "fp16", 40.3), ("rtx-a6000", "q4_k_m", 102.2),
     ("rtx-3090", "fp16", 46.5), ("a40", "fp16", 34.0)],
)  # fmt: skip
def test_llamacpp_decodes_as_published(gpu: str, precision: str, published: float) -> None:
    assert 1 / llamacpp_token_s(catalog.find_gpu(gpu), precision) == pytest.approx(published, rel=0.25)


def test_llamacpp_reaches_less_of_a_memory_its_vector_units_cannot_follow() -> None:
    def share(name: str) -> float:
        gpu = catalog.find_gpu(name)
        read = catalog.find_model("Meta-Llama-3.1-70B").parameters * PRECISIONS["q4_k_m"].bits / 8
        return read / gpu.memory_bytes_per_s / llamacpp_token_s(gpu, "q4_k_m", model="Meta-Llama-3.1-70B")

    assert share("a100-sxm-80g") < share("h100-pcie-80g") < share("l40s")  # measured: 0.51, 0.52 and 0.76
    assert share("a100-sxm-80g") == pytest.approx(0.51, rel=0.15)
    assert share("l40s") == pytest.approx(0.76, rel=0.15)


def test_a_card_without_a_known_vector_rate_is_taken_to_have_enough() -> None:
    gpu = next(gpu for gpu in accelerators.table().values() if "fp32" not in gpu.flops_per_s)
    assert Calibration(vector_flops=9.0).vector_s_per_byte(gpu) == 0.0


def prompt_s(gpu: str, precision: str, tokens: int = 1024) -> float:
    llm, engine = catalog.find_model("Llama-3.1-8B"), find_engine("llamacpp")
    step = step_cost(llm, catalog.find_gpu(gpu), Layout(), precision, engine)
    return pieces(step, 1, tokens, tokens).lone_s * calibration_of("llamacpp").reading


# Seconds for 1024 tokens of Llama 3 8B, same source; a third either way
@pytest.mark.parametrize(
    ("gpu", "precision", "published"),
    [("rtx-4080", "q4_k_m", 0.202), ("rtx-4080", "fp16", 0.152), ("rtx-3090", "fp16", 0.242),
     ("rtx-a6000", "q4_k_m", 0.283), ("rtx-a6000", "fp16", 0.237), ("a40", "q4_k_m", 0.316), ("a40", "fp16", 0.253)],
)  # fmt: skip
def test_llamacpp_reads_prompts_as_published(gpu: str, precision: str, published: float) -> None:
    assert prompt_s(gpu, precision) == pytest.approx(published, rel=0.34)


def test_quantised_weights_slow_llamacpp_down_where_it_writes_them_out_first() -> None:
    for gpu, slower in (("rtx-a6000", 1.19), ("a40", 1.25), ("rtx-4080", 1.33)):  # published
        assert prompt_s(gpu, "q4_k_m") / prompt_s(gpu, "fp16") == pytest.approx(slower, rel=0.15), gpu
        assert llamacpp_token_s(catalog.find_gpu(gpu), "q4_k_m") < llamacpp_token_s(catalog.find_gpu(gpu), "fp16") / 2


def test_stages_of_a_pipeline_follow_one_another() -> None:
    gpu = catalog.find_gpu("rtx-a6000")
    alone, four = llamacpp_token_s(gpu, "q4_k_m"), llamacpp_token_s(gpu, "q4_k_m", stages=4)
    assert alone < four < 1.5 * alone  # published: 102.2 tokens/s on one, 93.7 on four


FOLDER = Path(__file__).parents[2].parent / "shared" / "data" / "serving"


@pytest.mark.skipif(not FOLDER.exists(), reason="the collected runs are not beside the checkout")
def test_the_public_table_is_near_what_its_tool_writes_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = Path(__file__).parents[2] / "tools"
    monkeypatch.syspath_prepend(tools)
    main = runpy.run_path(str(tools / "fit_public.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["fit_public.py", str(FOLDER)])
    monkeypatch.setitem(main.__globals__, "TARGET", tmp_path / "written.toml")
    main()
    written = msgspec.toml.decode((tmp_path / "written.toml").read_bytes(), type=dict[str, Calibration], strict=False)
    assert set(written) == set(ENTRIES) - {"vllm", "sglang", "trtllm"}
    for name, now in written.items():
        shipped = calibration_of(*name.split("-"))
        assert shipped.products == pytest.approx(now.products, rel=0.2), f"{name}: run tools/fit_public.py again"
        assert shipped.gpus == now.gpus
