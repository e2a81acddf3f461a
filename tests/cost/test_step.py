import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from examples import CARD, DENSE, ENGINE, SPARSE, small_plan
from waterline import catalog
from waterline.catalog.calibration import Calibration
from waterline.catalog.engines import find_engine
from waterline.catalog.measurements import measured_gpus
from waterline.cost import StepCost, replica_step_cost, step_cost
from waterline.cost.kernels import find_kernels
from waterline.cost.layers import Shard, forms
from waterline.cost.memory import embedding_parameters, gpu_weights
from waterline.cost.step import AttentionCost, prefill_pairs, price_steps
from waterline.errors import InfeasibleError
from waterline.fleet import Pool
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, AttentionLayers, Llm
from waterline.llm.precision import SIXTEEN_BIT
from waterline.plan import Layout
from waterline.units import PICOSECONDS_PER_S

ONE = Layout()
ATTENTION = AttentionCost(
    window_tokens=0,
    decode_ps=(0, 500, 600),
    decode_ps_per_token=(0, 9, 8),
    prefill_ps=70,
    prefill_ps_per_token=3,
    prefill_ps_per_pair=2,
)
BY_HAND = StepCost(
    tokens_ps=(0, 1000, 1100, 1300),
    more_ps_per_token=150,
    head_ps=(0, 40, 50),
    attention=(ATTENTION, replace(ATTENTION, window_tokens=100)),
    step_tokens=512,
)

# --- By hand --------------------------------------------------------------------------------------------------------


def test_prompt_chunks_add_up_to_the_whole_triangle() -> None:
    assert prefill_pairs(0, 3) == 1 + 2 + 3
    assert prefill_pairs(0, 3) + prefill_pairs(3, 4) == prefill_pairs(0, 7)


def test_one_decode_pays_for_a_token_a_head_and_what_it_has_cached() -> None:
    # both kinds of layers read 60 tokens at 9 ps; of 160 the one with a window of 100 reads 100
    assert BY_HAND.step_ps(0, 0, 1, 60) == 1000 + 40 + 2 * (500 + 60 * 9)
    assert BY_HAND.step_ps(0, 0, 1, 160) == 1000 + 40 + (500 + 160 * 9) + (500 + 100 * 9)


def test_beyond_the_tables_their_ends_count() -> None:
    # 5 tokens: 2 more than the table; sequences beyond it cost what the last ones do
    assert BY_HAND.step_ps(0, 0, 5, 100) == (1300 + 2 * 150) + 50 + 2 * (600 + 100 * 8)


def test_a_prompt_pays_for_its_tokens_and_pairs_within_the_window_and_for_one_head() -> None:
    # 3 tokens that attend to 900: a window of 100 leaves 300 of those pairs
    assert BY_HAND.step_ps(3, 900, 0, 0) == 1300 + 40 + 2 * (70 + 3 * 3) + 900 * 2 + 300 * 2


def test_prompt_and_decodes_share_the_products_and_add_their_attention() -> None:
    assert BY_HAND.step_ps(1, 10, 2, 50) == 1300 + 50 + 2 * (600 + 50 * 8) + 2 * (70 + 3 + 20)


def test_what_an_engine_adds_is_added_to_the_picosecond() -> None:
    def took_ps(calibration: Calibration) -> int:
        return price_steps(DENSE, CARD, ONE, "bf16", ENGINE, calibration).step_ps(100, 5050, 28, 4000)

    kernels = took_ps(Calibration())
    assert took_ps(Calibration(step_s=1e-3)) - kernels == pytest.approx(10**9, abs=2)
    assert took_ps(Calibration(layer_s=1e-6)) - kernels == pytest.approx(10 * 10**6, abs=2)  # DENSE has ten layers
    assert took_ps(Calibration(token_s=1e-6)) - kernels == pytest.approx(128 * 10**6, abs=2)
    assert took_ps(Calibration(products=2, attention=2, small=2)) == pytest.approx(2 * kernels, rel=1e-3)
    assert took_ps(Calibration(chips={"another": 3.0})) == kernels


def test_what_a_first_token_waits_for_besides_is_in_no_step() -> None:
    plain, late = (
        price_steps(DENSE, CARD, ONE, "bf16", ENGINE, Calibration(request_s=request_s)) for request_s in (0.0, 0.0485)
    )
    assert (plain.first_token_ps, late.first_token_ps) == (0, 48_500_000_000)
    assert late.step_ps(100, 5050, 28, 4000) == plain.step_ps(100, 5050, 28, 4000)
    vllm = step_cost(catalog.find_model("meta-llama/Llama-3.1-8B"), CARD, ONE, "bf16", find_engine("vllm"))
    assert 0.01 < vllm.first_token_ps / PICOSECONDS_PER_S < 0.2


def test_a_window_limits_what_is_read() -> None:
    window = AttentionLayers(kind="window", layers=10, query_heads=8, kv_heads=2, head_dim=100, window_tokens=512)
    step = step_cost(msgspec.structs.replace(DENSE, attention=(window,)), CARD, ONE, "bf16", ENGINE)
    assert step.step_ps(0, 0, 1, 511) < step.step_ps(0, 0, 1, 512) == step.step_ps(0, 0, 1, 4000)
    whole = step_cost(DENSE, CARD, ONE, "bf16", ENGINE)
    assert whole.step_ps(0, 0, 1, 512) < whole.step_ps(0, 0, 1, 4000)


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", "openai/gpt-oss-20b", "deepseek-ai/DeepSeek-R1"])
@pytest.mark.parametrize(("new", "cached"), [(2048, 0), (8192, 0), (2048, 8192), (2048, 32_768), (8192, 32_768)])
def test_reading_behind_a_prefix_costs_what_its_kernels_do(model: str, new: int, cached: int) -> None:
    llm, gpu = catalog.find_model(model), catalog.find_gpu("h100-sxm-80g")
    precision, layout, plain = llm.precision, Layout(tp=8), Calibration()
    kernels = find_kernels(gpu)
    shard = Shard(llm, gpu, layout, forms(llm, precision), kernels, "bf16", 0.0, plain.factors(gpu))
    took_s = sum(float(shard.prefill_s(group, np.array(1.0 * new), np.array(1.0 * cached))) for group in llm.attention)
    step = price_steps(llm, gpu, layout, precision, find_engine("vllm"), plain)
    alone = replace(step, tokens_ps=(0,), more_ps_per_token=0, head_ps=(0,))
    counted_s = alone.step_ps(new, prefill_pairs(cached, new), 0, 0) / PICOSECONDS_PER_S
    assert counted_s == pytest.approx(took_s, rel=0.15)


def test_sparse_attention_reads_behind_a_long_prefix_for_the_price_of_its_indexer() -> None:
    gpu, layout = catalog.find_gpu("h200-sxm-141g"), Layout(tp=8)

    def took_s(model: str, cached: int) -> float:
        step = step_cost(catalog.find_model(model), gpu, layout, "fp8", find_engine("vllm").on(gpu))
        return step.step_ps(2048, prefill_pairs(cached, 2048), 0, 0) / PICOSECONDS_PER_S

    dense, sparse = "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V3.2"
    added_s = took_s(sparse, 100_000) - took_s(sparse, 30_000)
    scored = 61 * 2048 * 70_000 * 2 * 64 * 128  # layers, queries, keys, and what a pair of each costs the indexer
    assert added_s == pytest.approx(scored / (0.65 * gpu.flops_per_s["fp8"]), rel=0.01)
    assert added_s < took_s(dense, 100_000) - took_s(dense, 30_000)


def test_experts_that_nobody_chose_are_not_read() -> None:
    step = step_cost(SPARSE, CARD, ONE, "bf16", ENGINE)
    one, most = step.step_ps(0, 0, 1, 0), step.step_ps(0, 0, 64, 0)
    dense = step_cost(DENSE, CARD, ONE, "bf16", ENGINE).step_ps(0, 0, 1, 0)
    assert one < dense, "2 of 8 experts weigh less than a dense model of the same size"
    assert most > 2 * one, "64 sequences choose all of them"


def test_more_cards_read_faster_and_pay_for_the_exchange() -> None:
    llm, gpu = catalog.find_model("meta-llama/Llama-3.1-8B"), catalog.find_gpu("h100-sxm-80g")
    one, two = (
        step_cost(llm, gpu, layout, "bf16", find_engine("vllm")).step_ps(0, 0, 1, 1000)
        for layout in (ONE, Layout(tp=2))
    )
    assert one / 2 < two < one


def test_a_card_without_the_units_is_refused_by_name() -> None:
    old = replace(CARD, flops_per_s={"fp32": 1e13, "fp16": 1e14})
    with pytest.raises(InfeasibleError, match="card cannot compute in fp8: it has fp16, fp32"):
        step_cost(DENSE, old, ONE, "fp8", ENGINE)


def test_a_planned_replica_has_the_limits_its_engine_sets_on_its_card() -> None:
    plan = small_plan()
    vllm = msgspec.structs.replace(plan.replicas[0], engine="vllm")
    assert replica_step_cost(plan.fleet, vllm).step_tokens == find_engine("vllm").step_tokens
    large = msgspec.structs.replace(
        plan.fleet, pools=(Pool(name="box", gpu="h100-sxm-80g", gpus_per_node=1, usd_per_gpu_hour=2.0),)
    )
    assert replica_step_cost(large, vllm).step_tokens == find_engine("vllm").large_step_tokens


# --- Always ---------------------------------------------------------------------------------------------------------

engines = st.sampled_from(["vllm", "sglang", "trtllm", "llamacpp", "fake"])
llms = st.sampled_from(
    [
        "deepseek-ai/DeepSeek-R1",
        "deepseek-ai/DeepSeek-V3.2",
        "google/gemma-3-4b-it",
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        "meta-llama/Meta-Llama-3.1-70B",
        "mistralai/Mixtral-8x7B-v0.1",
        "nvidia/DeepSeek-V3.1-NVFP4",
        "nvidia/Nemotron-H-56B-Base-8K",
        "openai/gpt-oss-20b",
        "Qwen/Qwen2.5-0.5B",
        "Qwen/Qwen3-30B-A3B",
        "Qwen/Qwen3-32B-FP8",
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "XiaomiMiMo/MiMo-V2-Flash",
    ]
).map(catalog.find_model)
gpus = st.sampled_from(sorted(catalog.gpus())).map(catalog.find_gpu)
FASTER_IN_EIGHT_BITS = [
    name
    for name, gpu in sorted(catalog.gpus().items())
    if gpu.flops_per_s.get("fp8", 0) > 1.5 * gpu.flops_per_s.get("bf16", math.inf)
]
precisions = st.sampled_from(["bf16", "fp16", "fp8", "int8", "int4", "nvfp4", "mxfp4", "q8_0", "q4_k_m"])
layouts = st.sampled_from([ONE, Layout(tp=2), Layout(tp=8), Layout(tp=4, pp=2), Layout(tp=8, ep=8)])
spread = st.sampled_from([Layout(dp=8, ep=8), Layout(tp=2, dp=4, ep=8), Layout(dp=2)])
tokens = st.one_of(st.integers(0, 40), st.integers(0, 20_000))
decodes = st.one_of(st.integers(0, 20), st.integers(0, 1500))
contexts = st.integers(0, 40_000)


@dataclass(frozen=True)
class Case:
    """A replica that can be priced."""

    llm: Llm
    gpu: Gpu
    layout: Layout
    precision: str
    engine: str

    def step(self, **changes: object) -> StepCost:
        case = replace(self, **changes)  # type: ignore[arg-type] # mypy does not know the names
        return step_cost(case.llm, case.gpu, case.layout, case.precision, find_engine(case.engine).on(case.gpu))

    def __repr__(self) -> str:
        return f"{self.llm.name} in {self.precision} on {self.gpu.id}, {self.layout}, {self.engine}"


def computes(gpu: Gpu, precision: str) -> bool:
    return any(rate in gpu.flops_per_s for rate in PRECISIONS[precision].compute)


cases = st.builds(Case, llms, gpus, st.one_of(layouts, spread), precisions, engines).filter(
    lambda case: computes(case.gpu, case.precision)
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])
@given(cases, tokens, decodes, contexts)
def test_a_step_is_never_faster_than_physics(case: Case, prompt: int, running: int, context: int) -> None:
    llm, gpu, layout, precision = case.llm, case.gpu, case.layout, case.precision
    step = case.step()
    prompt, running = in_one_step(step, prompt, running)
    assume(prompt + running > 0)
    took_s = step.step_ps(prompt, prefill_pairs(0, prompt), running, running * context) / PICOSECONDS_PER_S
    held = gpu_weights(llm, precision, Layout(tp=layout.tp, dp=layout.dp, ep=layout.ep))  # stages follow one another
    read_bytes = held.attention_bytes + held.dense_bytes
    if layout.ep == layout.dp == 1:  # else they may be those of other GPUs
        read_bytes += held.experts_bytes * chosen_share(llm)
    assert took_s >= 0.98 * read_bytes / gpu.memory_bytes_per_s  # norms, routers and biases are not told apart
    flops = 2 * (llm.active_parameters - embedding_parameters(llm)) * (prompt + running)
    best = max(gpu.flops_per_s[rate] for rate in usable_rates(gpu, precision))
    assert took_s >= 0.98 * flops / (layout.tp * layout.dp) / best


def in_one_step(step: StepCost, prompt: int, running: int) -> tuple[int, int]:
    """Return as much of it as an engine puts into a step."""
    prompt = min(prompt, step.step_tokens)
    return prompt, min(running, step.step_tokens - prompt)


def chosen_share(llm: Llm) -> float:
    """Return the part of the routed experts a single token passes."""
    return min((group.experts_per_token / group.experts for group in llm.feed_forward if group.experts), default=0.0)


def usable_rates(gpu: Gpu, precision: str) -> set[str]:
    return set(gpu.flops_per_s) & {*PRECISIONS[precision].compute, *SIXTEEN_BIT}


@settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])
@given(cases, tokens, st.integers(1, 300), decodes, contexts)
def test_more_work_never_takes_less_time(case: Case, prompt: int, more: int, running: int, context: int) -> None:
    step = case.step()
    pairs, running, added = prefill_pairs(0, prompt), running * step.ranks, more * step.ranks  # as many on every rank
    took_ps = step.step_ps(prompt, pairs, running, running * context)
    assert took_ps <= step.step_ps(prompt + more, pairs, running, running * context)
    assert took_ps <= step.step_ps(prompt, pairs + more, running, running * context)
    assert took_ps <= step.step_ps(prompt, pairs, running + added, (running + added) * context)
    assert took_ps <= step.step_ps(prompt, pairs, running, running * (context + more))


@settings(max_examples=200, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    cases.filter(lambda case: case.gpu.id in measured_gpus()),
    st.floats(1, 4),
    st.floats(1, 4),
    st.sampled_from([0, 64, 500, 2000]),
    decodes,
    contexts,
)
def test_a_better_card_is_never_slower_but_for_what_the_fits_leave(
    case: Case, bandwidth: float, rate: float, prompt: int, running: int, context: int
) -> None:
    """Lines and planes are laid through attention kernels; where both limits play a part they tilt."""
    better = replace(
        case.gpu,
        memory_bytes_per_s=case.gpu.memory_bytes_per_s * bandwidth,
        flops_per_s={name: flops * rate for name, flops in case.gpu.flops_per_s.items()},
    )
    before, after = case.step(), case.step(gpu=better)
    assert all(new <= old for new, old in zip(after.tokens_ps, before.tokens_ps, strict=True))
    assert all(new <= old for new, old in zip(after.head_ps, before.head_ps, strict=True))
    prompt, running = in_one_step(before, prompt, running)
    work = prompt, prefill_pairs(0, prompt), running, running * context
    assert after.step_ps(*work) <= (1.2 if prompt else 1.02) * before.step_ps(*work)


@settings(max_examples=200, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    st.sampled_from(["meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B", "meta-llama/Meta-Llama-3.1-70B"]),
    st.sampled_from(FASTER_IN_EIGHT_BITS),
    engines,
    st.sampled_from([0, 1, 64, 500, 2000]),
    decodes,
    contexts,
)
def test_eight_bits_are_hardly_ever_slower_than_sixteen(
    model: str, card: str, engine: str, prompt: int, running: int, context: int
) -> None:
    """Matrices narrower than 1500 are left out: kernels were measured whose fp8 takes twice as long as bf16."""
    case = Case(catalog.find_model(model), catalog.find_gpu(card), ONE, "bf16", engine)
    prompt, running = in_one_step(case.step(), prompt, running)
    work = prompt, prefill_pairs(0, prompt), running, running * context
    assert case.step(precision="fp8").step_ps(*work) <= 1.2 * case.step().step_ps(*work)


@pytest.mark.parametrize("card", ["h200-sxm-141g", "gh200-144g", "h20-141g", "b200-sxm-180g"])
@pytest.mark.parametrize("model", ["zai-org/GLM-5.2", "Qwen/Qwen3-30B-A3B", "openai/gpt-oss-120b"])
def test_experts_quantised_to_eight_bits_are_not_slower_than_in_sixteen(model: str, card: str) -> None:
    """Of the kernels measured for fp8 the better one counts, and int8 was measured nowhere."""
    case = Case(catalog.find_model(model), catalog.find_gpu(card), Layout(tp=2, dp=2, ep=4), "bf16", "vllm")
    for work in ((64, prefill_pairs(0, 64), 0, 0), (2048, prefill_pairs(0, 2048), 0, 0), (0, 0, 64, 64 * 1100)):
        sixteen = case.step().step_ps(*work)
        assert case.step(precision="fp8").step_ps(*work) <= 1.05 * sixteen
        assert case.step(precision="int8").step_ps(*work) <= 1.2 * sixteen


@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
@given(cases)
def test_every_coefficient_is_a_whole_number_so_that_sums_are_exact(case: Case) -> None:
    found = list(numbers(case.step()))
    assert {type(number) for number in found} == {int}
    assert min(found) >= 0


def numbers(part: Any) -> Iterator[Any]:
    if is_dataclass(part):
        for field in fields(part):
            yield from numbers(getattr(part, field.name))
    elif isinstance(part, Sequence):
        for one in part:
            yield from numbers(one)
    else:
        yield part
