"""The benchmark of steps, on the processor: the same lines as on a GPU, but for graphs, events and fused kernels."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from waterline import catalog
from waterline.errors import InputError, UnknownNameError
from waterline.plan import Layout

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_step.py"
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_step"] = module  # where msgspec looks up the types of the fields
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def torch(script: ModuleType) -> ModuleType:
    if script.torch is None:
        pytest.skip("needs torch: pip install waterline-llm[training]")
    script.torch.manual_seed(0)
    return script.torch


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path)


@pytest.fixture
def run(script: ModuleType, tiny: str) -> Callable[..., int]:
    def measured(*arguments: str) -> int:
        sizes = ("--batches", "1", "4", "--contexts", "16", "64", "--seconds", "30")
        return script.main(["--device", "cpu", "--models", tiny, *sizes, *arguments])

    return measured


def figures_of(script: ModuleType, *points: object) -> object:
    return script.Figures(
        gpu="h100-sxm-80g", device="NVIDIA H100 80GB HBM3", driver="580.65", torch="2.13.0", runtime="CUDA 13.0",
        date="2026-11-24", fused=True, points=points,
    )  # fmt: skip


def timed(script: ModuleType, point: object, factor: float) -> object:
    step_s = factor * script.estimate_s(point, "h100-sxm-80g")
    return script.Timed(
        **msgspec.structs.asdict(point), step_s=step_s, low_s=step_s, high_s=step_s, repeats=9, graph=True
    )


# --- Without torch --------------------------------------------------------------------------------------------------


def test_figures_of_an_earlier_run_are_held_against_todays_estimates(script, tmp_path, capsys) -> None:
    points = script.grid("meta-llama/Llama-3.1-8B", "bf16", (1, 64), (512, 8192))
    figures = figures_of(script, *(timed(script, point, 1.25) for point in points))
    path = tmp_path / "steps.json"
    path.write_bytes(msgspec.json.encode(figures))
    assert script.main(["--read", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("  -20.0 %") == 6  # four decodes and two prompts, each a fifth too fast
    assert "all   all         6 points, error median 20.0%, p90 20.0%" in printed


def test_a_file_of_something_else_is_refused(script, tmp_path, capsys) -> None:
    path = tmp_path / "steps.json"
    path.write_text('{"gpu": "h100-sxm-80g"}')
    assert script.main(["--read", str(path)]) == 2
    assert "was not written by --json" in capsys.readouterr().err


def test_the_estimate_has_nothing_of_an_engine_in_it(script) -> None:
    """A small model on a fast card: its weights at full bandwidth, and not the milliseconds a host adds."""
    point = script.Point(model="Qwen/Qwen3-1.7B", precision="bf16", phase="decode", batch=1, context_tokens=512)
    card, llm = catalog.find_gpu("h100-sxm-80g"), catalog.find_model("Qwen/Qwen3-1.7B")
    fastest_s = 2 * llm.parameters / card.memory_bytes_per_s
    assert fastest_s <= script.estimate_s(point, card.id) <= 3 * fastest_s


def test_every_shape_is_in_the_grid_once_and_in_the_same_order_each_time(script) -> None:
    points = script.grid("any", "fp8", (1, 16), (512, 2048))
    assert points == script.grid("any", "fp8", (1, 16), (512, 2048))
    assert len(set(points)) == len(points) == 6
    assert {point.batch for point in points if point.phase == "prefill"} == {1}


def test_the_models_it_takes_by_default_are_dense_and_one_fits_a_small_card(script) -> None:
    models = [catalog.find_model(name) for name in script.MODELS]
    assert not any(script.why_not(llm) for llm in models)
    assert 2 * min(llm.parameters for llm in models) < 6e9


@pytest.mark.parametrize(("model", "reason"), [("deepseek-r1", "experts"), ("gemma-2-9b", "other than full")])
def test_a_model_it_cannot_run_is_refused_by_what_is_missing(script, model: str, reason: str) -> None:
    assert reason in script.why_not(catalog.find_model(model))


def test_a_card_that_is_not_in_the_catalogue_is_named_and_gpu_is_asked_for(script, monkeypatch) -> None:
    monkeypatch.setattr(script, "_device_name", lambda _: "Voodoo 5 6000")
    with pytest.raises(UnknownNameError, match=r"Voodoo 5 6000.*Pass --gpu"):
        script.find_card("", "cuda")
    assert script.find_card("mi300x", "cuda").id == "mi300x"


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H200", "h200-sxm-141g"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm-80g"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_cards_are_found_by_the_name_their_driver_gives(script, monkeypatch, name: str, card: str) -> None:
    monkeypatch.setattr(script, "_device_name", lambda _: name)
    assert script.find_card("", "cuda").id == card


def test_figures_of_a_processor_cannot_pass_for_those_of_a_card(script) -> None:
    with pytest.raises(InputError, match="belong to no card"):
        script.find_card("h100-sxm-80g", "cpu")


def test_without_torch_it_says_what_to_install(script, monkeypatch, capsys) -> None:
    monkeypatch.setattr(script, "torch", None)
    assert script.main(["--device", "cpu"]) == 2
    assert "pip install torch" in capsys.readouterr().err


# --- With torch -----------------------------------------------------------------------------------------------------


def test_a_run_prints_both_sides_and_its_file_reads_the_same(script, torch, run, tmp_path, capsys) -> None:
    path = tmp_path / "steps.json"
    assert run("--json", str(path)) == 0
    printed = capsys.readouterr().out
    figures = script.read_figures(path)
    assert {point.precision for point in figures.points} == {"bf16", "int8"}  # a processor has no rate for fp8
    assert len(figures.points) == 2 * (2 * 2 + 2)
    assert all(0 < point.low_s <= point.step_s <= point.high_s for point in figures.points)
    assert (figures.gpu, figures.runtime, figures.torch) == ("cpu", "CPU", torch.__version__)
    assert script.main(["--read", str(path)]) == 0
    read = capsys.readouterr().out
    assert sorted(read.splitlines()) == sorted(printed.splitlines())


@pytest.mark.usefixtures("torch")
def test_contexts_beyond_the_model_and_no_time_are_said(run, capsys) -> None:
    assert run("--precisions", "bf16", "--contexts", "64", "512") == 0
    assert "left out, 3: contexts beyond the 256 tokens" in capsys.readouterr().err
    assert run("--precisions", "bf16", "--seconds", "0") == 2
    said = capsys.readouterr().err
    assert "left out, 6: no time left" in said
    assert "No point was measured" in said


@pytest.mark.usefixtures("torch")
def test_what_does_not_fit_in_free_memory_is_left_out(script, run, monkeypatch, capsys) -> None:
    monkeypatch.setattr(script, "free_bytes", lambda _: 1000)
    assert run("--precisions", "bf16") == 2
    assert "in bf16 needs 1 MiB, 0 MiB are free" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_packed_product_is_near_the_one_it_stands_for(script, torch, precision: str) -> None:
    if reason := script.unsupported(precision, "cpu"):
        pytest.skip(f"this torch cannot on a processor: {reason}")
    product = script.Product(64, 128, precision, "cpu", script.quantise)
    inputs = torch.randn(5, 128).to(torch.bfloat16)
    exact = inputs.float() @ (product.weights.float() * product.scale)
    error = (product(inputs).float() - exact).norm() / exact.norm()
    assert error < 0.05


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_step_ends_in_the_logits_of_what_samples(script, torch, tiny: str, precision: str, phase: str) -> None:
    if reason := script.unsupported(precision, "cpu"):
        pytest.skip(f"this torch cannot on a processor: {reason}")
    decoder = script.Decoder(catalog.load_model(tiny, Path()), precision, "cpu", fused=False)
    batch = 3 if phase == "decode" else 1
    point = script.Point(model=tiny, precision=precision, phase=phase, batch=batch, context_tokens=32)
    logits = decoder.step(point)()
    assert tuple(logits.shape) == (batch, 512)
    assert torch.isfinite(logits).all()


def test_the_last_token_of_a_prompt_attends_like_a_decode(script, torch) -> None:
    tokens, heads, kv_heads, dim = 9, 8, 2, 16
    query, key, value = (torch.randn(tokens, count, dim) for count in (heads, kv_heads, kv_heads))
    keys, values = torch.zeros(2, 1, kv_heads, tokens, dim)
    prompt = script.attend_prefill(query, key, value, keys, values)
    alone = script.attend_decode(query[-1:], key[-1:], value[-1:], keys, values)
    torch.testing.assert_close(prompt[-1:], alone)
    repeated = key.repeat_interleave(heads // kv_heads, dim=1), value.repeat_interleave(heads // kv_heads, dim=1)
    scores = torch.einsum("hd,thd->ht", query[-1], repeated[0]) / dim**0.5
    by_hand = torch.einsum("ht,thd->hd", scores.softmax(-1), repeated[1]).reshape(1, -1)
    torch.testing.assert_close(alone, by_hand)


def test_memory_is_counted_for_what_a_step_holds(script, tiny: str) -> None:
    llm = catalog.load_model(tiny, Path())
    one, many = (
        script.point_bytes(
            llm, script.Point(model=tiny, precision="bf16", phase="decode", batch=batch, context_tokens=128)
        )
        for batch in (1, 64)
    )
    cache = 63 * script.sequence_cache_bytes(llm, 128, Layout())
    assert many - one >= cache
