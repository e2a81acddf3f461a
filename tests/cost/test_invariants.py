"""What no estimate may break, over models, cards, layouts and precisions of the whole catalogue.

`test_step.py` has the same for the tables of a step; here are whole estimates, memory, and the catalogue's edge.
"""

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from waterline import catalog
from waterline.catalog import accelerators
from waterline.catalog.engines import find_engine
from waterline.cost import Asked, Estimate, Priced, estimate_at_rate, estimate_replica, step_cost
from waterline.cost.memory import (
    embedding_parameters,
    gpu_weights,
    longest_context,
    memory_fit,
    memory_use,
    most_sequences,
    sequence_cache_bytes,
)
from waterline.errors import InfeasibleError, InputError
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, Llm
from waterline.llm.precision import SIXTEEN_BIT
from waterline.plan import Layout

MODELS = sorted(catalog.models().values(), key=lambda llm: llm.name)
GPUS = sorted(catalog.gpus().values(), key=lambda gpu: gpu.id)
PRECISION_NAMES = ("bf16", "fp16", "fp8", "int8", "int4", "nvfp4", "mxfp4", "q8_0", "q4_k_m")

llms = st.sampled_from(MODELS)
gpus = st.sampled_from(GPUS)
engines = st.sampled_from(["vllm", "sglang", "trtllm", "llamacpp"])
precisions = st.sampled_from(PRECISION_NAMES)
layouts = st.sampled_from(
    [
        Layout(), Layout(tp=2), Layout(tp=4), Layout(tp=8), Layout(pp=2), Layout(tp=2, pp=3), Layout(tp=8, ep=8),
        Layout(dp=4, ep=4), Layout(tp=2, dp=2, ep=4),
    ]
)  # fmt: skip
contexts = st.one_of(st.integers(1, 64), st.integers(1, 60_000))
batches = st.one_of(st.integers(1, 8), st.integers(1, 600))
QUICK = settings(max_examples=150, suppress_health_check=[HealthCheck.filter_too_much])
SLOW = settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])


def ample(gpu: Gpu) -> Gpu:
    """Return the card with room for everything: what is asked here is how fast it is."""
    return replace(gpu, memory_bytes=10**16)


def priced(llm: Llm, gpu: Gpu, layout: Layout, precision: str, engine: str) -> Priced:
    assume(any(rate in gpu.flops_per_s for rate in PRECISIONS[precision].compute))
    profile = find_engine(engine).on(gpu)
    return Priced(llm, gpu, layout, precision, profile, step_cost(llm, gpu, layout, precision, profile))


def estimate(replica: Priced, prompt: int, output: int, clients: int) -> Estimate:
    assume(prompt + output <= replica.llm.max_context_tokens)
    return estimate_replica(
        replica.llm, replica.gpu, replica.layout, replica.precision, replica.engine, replica.step,
        prompt_tokens=prompt, output_tokens=output, concurrency=clients,
    )  # fmt: skip


# --- Physics --------------------------------------------------------------------------------------------------------


@SLOW
@given(llms, gpus, layouts, precisions, engines, contexts, st.integers(2, 1000), batches)
def test_no_token_is_faster_than_bytes_over_bandwidth_or_operations_over_peak(
    llm: Llm, gpu: Gpu, layout: Layout, precision: str, engine: str, prompt: int, output: int, clients: int
) -> None:
    replica = priced(llm, ample(gpu), layout, precision, engine)
    found = estimate(replica, prompt, output, clients)
    slack = 0.98  # norms and routers are not told apart
    of_rank = found.running // layout.dp
    read_bytes = weights_read(llm, precision, layout) + of_rank * cache_read(replica, prompt + output // 2)
    assert found.tpot_s.value >= slack * read_bytes / gpu.memory_bytes_per_s
    flops = 2 * (llm.active_parameters - embedding_parameters(llm)) * found.running
    usable = set(gpu.flops_per_s) & {*PRECISIONS[precision].compute, *SIXTEEN_BIT}
    peak = max(gpu.flops_per_s[rate] for rate in usable)
    assert found.tpot_s.value >= 0.98 * flops / (layout.tp * layout.dp) / peak


@SLOW
@given(llms, gpus, layouts, precisions, engines, st.integers(1, 20_000))
def test_no_prompt_is_read_faster_than_its_operations(
    llm: Llm, gpu: Gpu, layout: Layout, precision: str, engine: str, prompt: int
) -> None:
    found = estimate(priced(llm, ample(gpu), layout, precision, engine), prompt, 1, 1)
    flops = 2 * (llm.active_parameters - embedding_parameters(llm)) * prompt
    usable = set(gpu.flops_per_s) & {*PRECISIONS[precision].compute, *SIXTEEN_BIT}
    peak = max(gpu.flops_per_s[rate] for rate in usable)
    assert found.ttft_s.value >= 0.98 * flops / (layout.tp * layout.dp) / peak


def weights_read(llm: Llm, precision: str, layout: Layout) -> float:
    """Return what a token needs of one GPU's weights at least: of experts those a single token passes."""
    held = gpu_weights(llm, precision, Layout(tp=layout.tp, dp=layout.dp, ep=layout.ep))  # stages follow one another
    read = float(held.attention_bytes + held.dense_bytes)
    if layout.ep == layout.dp == 1:  # else they may be those of other GPUs
        chosen = (group.experts_per_token / group.experts for group in llm.feed_forward if group.experts)
        read += held.experts_bytes * min(chosen, default=0.0)
    return read


def cache_read(replica: Priced, context_tokens: int) -> float:
    """Return the cache a sequence's token needs of one GPU; sparse attention and states read what they choose."""
    read = [group for group in replica.llm.attention if not group.selected_tokens and group.kind != "state"]
    llm = msgspec.structs.replace(replica.llm, attention=tuple(read))
    narrow = replica.engine.cache_dtype(replica.precision) == "fp8" and "fp8" in replica.gpu.flops_per_s
    return sequence_cache_bytes(llm, context_tokens, Layout(tp=replica.layout.tp), element_bytes=1 if narrow else 2)


# --- More is never less ---------------------------------------------------------------------------------------------


@QUICK
@given(llms, gpus, layouts, precisions, engines, contexts, batches, st.integers(1, 5000), st.integers(1, 300))
def test_memory_grows_with_context_and_batch(
    llm: Llm, gpu: Gpu, layout: Layout, precision: str, engine: str, context: int, batch: int, more: int, others: int
) -> None:
    memory = memory_use(llm, gpu, layout, precision, find_engine(engine).on(gpu))
    assume(memory.cache_bytes > 0)

    def needed(tokens: int, sequences: int) -> int:
        return memory_fit(llm, memory, layout, tokens, sequences).needed_bytes

    assert needed(context, batch) <= needed(context + more, batch)
    assert needed(context, batch) <= needed(context, batch + others)
    assert most_sequences(llm, layout, memory, context) >= most_sequences(llm, layout, memory, context + more)
    longest = [longest_context(llm, layout, memory, sequences) for sequences in (batch, batch + others)]
    assert longest[0] >= longest[1]
    if longest[1]:
        assert memory_fit(llm, memory, layout, longest[1], batch + others).fits


@QUICK
@given(llms, gpus, layouts, precisions, engines, batches, st.integers(1, 300), st.integers(1, 20_000))
def test_activations_grow_with_the_tokens_and_sequences_of_a_step(
    llm: Llm, gpu: Gpu, layout: Layout, precision: str, engine: str, sequences: int, more: int, tokens: int
) -> None:
    profile = find_engine(engine).on(gpu)

    def activations(tokens: int, sequences: int) -> int:
        use = memory_use(llm, gpu, layout, precision, profile, step_tokens=tokens, sequences=sequences)
        return use.activations_bytes

    assert activations(tokens, sequences) <= activations(tokens + more, sequences)
    assert activations(tokens, sequences) <= activations(tokens, sequences + more)


@QUICK
@given(llms, gpus, precisions, engines, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), contexts)
def test_a_model_split_over_more_gpus_never_needs_more_of_each(
    llm: Llm, gpu: Gpu, precision: str, engine: str, tp: int, pp: int, context: int
) -> None:
    profile = find_engine(engine).on(gpu)
    assume(pp < llm.layers)

    def needed(layout: Layout) -> tuple[int, int]:
        use = memory_use(llm, gpu, layout, precision, profile)
        return use.needed_bytes, memory_fit(llm, use, layout, context).needed_bytes

    for wider in (Layout(tp=2 * tp, pp=pp), Layout(tp=tp, pp=pp + 1), Layout(tp=2 * tp, pp=pp, ep=2 * tp)):
        for less, more in zip(needed(wider), needed(Layout(tp=tp, pp=pp)), strict=True):
            assert less <= more, wider


@QUICK
@given(llms, gpus, precisions, engines, st.sampled_from([2, 4, 8, 16, 72]))
def test_experts_spread_over_more_gpus_never_weigh_more_on_each(
    llm: Llm, gpu: Gpu, precision: str, engine: str, ranks: int
) -> None:
    few, many = (gpu_weights(llm, precision, Layout(dp=dp, ep=dp)) for dp in (ranks, 2 * ranks))
    assert many.experts_bytes <= few.experts_bytes
    assert many.total_bytes <= few.total_bytes
    assert engine
    assert gpu


@SLOW
@given(llms, gpus, layouts, precisions, engines, contexts, batches, st.integers(1, 2000), st.integers(1, 200))
def test_longer_requests_and_more_clients_never_make_a_token_faster(
    llm: Llm, gpu: Gpu, layout: Layout, precision: str, engine: str, context: int, clients: int, more: int, others: int
) -> None:
    replica = priced(llm, ample(gpu), layout, precision, engine)
    few = estimate(replica, context, 200, clients)
    longer = estimate(replica, context + more, 200, clients)
    # As many more on each rank of attention: a prompt delays nobody where it joins the rank that has one request fewer,
    # so that 237 on two ranks are faster than 236, by a ten-millionth.
    crowded = estimate(replica, context, 200, clients + others * layout.dp)
    assert longer.tpot_s.value >= few.tpot_s.value * (1 - 1e-9)
    assert crowded.tpot_s.value >= few.tpot_s.value * (1 - 1e-9)
    assert longer.needed_bytes_per_gpu >= few.needed_bytes_per_gpu


@SLOW
@given(llms, gpus, layouts, precisions, engines, st.integers(1, 8000), batches, st.floats(1, 4), st.floats(1, 4))
def test_more_bandwidth_or_flops_is_never_slower_but_for_what_the_fits_leave(
    llm: Llm,
    gpu: Gpu,
    layout: Layout,
    precision: str,
    engine: str,
    prompt: int,
    clients: int,
    bandwidth: float,
    rate: float,
) -> None:
    """Planes are laid through the attention of prompts; where both limits play a part they tilt, by 5 % at most.

    Of Hopper cards the ratio of bandwidth to arithmetic chooses the curves, those of an H100 or of an H200: 3 %.
    """
    card = ample(gpu)
    better = replace(
        card,
        memory_bytes_per_s=card.memory_bytes_per_s * bandwidth,
        flops_per_s={name: flops * rate for name, flops in card.flops_per_s.items()},
    )
    before = estimate(priced(llm, card, layout, precision, engine), prompt, 200, clients)
    after = estimate(priced(llm, better, layout, precision, engine), prompt, 200, clients)
    assert after.ttft_s.value <= 1.05 * before.ttft_s.value
    assert after.tpot_s.value <= 1.05 * before.tpot_s.value


@SLOW
@given(
    llms,
    st.sampled_from([gpu for gpu in GPUS if {"fp8", "bf16"} <= set(gpu.flops_per_s)]),
    layouts,
    engines,
    st.integers(1, 8000),
    batches,
)
def test_eight_bits_are_at_most_a_fifth_slower_than_sixteen(
    llm: Llm, gpu: Gpu, layout: Layout, engine: str, prompt: int, clients: int
) -> None:
    card = ample(gpu)
    sixteen, eight = (
        estimate(priced(llm, card, layout, precision, engine), prompt, 200, clients) for precision in ("bf16", "fp8")
    )
    assert eight.tpot_s.value <= 1.2 * sixteen.tpot_s.value
    assert eight.ttft_s.value <= 1.2 * sixteen.ttft_s.value


@SLOW
@given(llms, gpus, layouts, engines, st.integers(1, 4000), st.integers(1, 1000), st.floats(0.05, 0.95))
def test_a_rate_below_the_sustained_one_is_answered_whole(
    llm: Llm, gpu: Gpu, layout: Layout, engine: str, prompt: int, output: int, share: float
) -> None:
    precision = "bf16" if "bf16" in gpu.flops_per_s else "fp16"
    replica = priced(llm, ample(gpu), layout, precision, engine)
    assume(prompt + output <= llm.max_context_tokens)
    asked = Asked(prompt_tokens=prompt, output_tokens=output)
    slow = estimate_at_rate(replica, asked, 1e-9)
    assert slow.sustained_requests_per_s is not None
    most = slow.sustained_requests_per_s.value
    found = estimate_at_rate(replica, asked, share * most)
    assert found.tokens_per_s_per_gpu.value == pytest.approx(share * most * output / layout.gpus)
    assert found.ttft_s.value >= slow.ttft_s.value * (1 - 1e-6)
    assert found.tpot_s.value >= slow.tpot_s.value * (1 - 0.01)
    for between in (found.ttft_s, found.tpot_s, found.tokens_per_s_per_gpu):
        assert 0 < between.low <= between.value <= between.high
    with pytest.raises(InfeasibleError, match="and fall behind"):
        estimate_at_rate(replica, asked, 1.001 * most)


# --- The catalogue's edge -------------------------------------------------------------------------------------------


def entry(**changes: Any) -> dict[str, Any]:
    """Return the table of an H200 as the file has it, with keys changed."""
    known = accelerators.entries()["h200-sxm-141g"]
    return {**msgspec.to_builtins(known), **changes}


def test_every_card_of_the_catalogue_is_within_the_limits() -> None:
    assert accelerators.decoded({"h200": entry()})["h200"].memory_gb_per_s == 4800
    assert len(accelerators.entries()) == len(GPUS)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("memory_gb_per_s", 4.8, "memory_gb_per_s = 4.8, which should be from 10 to 100,000: gigabytes a second"),
        ("memory_gb_per_s", 4.8e12, "memory_gb_per_s = 4.8e+12, which should be"),
        ("memory_gb_per_s", -1.0, "memory_gb_per_s = -1, which should be"),
        ("memory_gb_per_s", math.nan, "memory_gb_per_s = nan, which should be"),
        ("memory_mib", 141, "memory_mib = 141, which should be from 1,024 to 4,194,304: mebibytes"),
        ("memory_mib", 150754820096, "memory_mib = 150,754,820,096, which should be"),
        ("link_gb_per_s", 450e9, "link_gb_per_s = 4.5e+11, which should be"),
        ("link_gb_per_s", 0.45, "link_gb_per_s = 0.45, which should be"),
        ("pcie_gb_per_s", 6.4e10, "pcie_gb_per_s = 6.4e+10, which should be"),
        ("dense_tflops", {"bf16": 989e12}, "dense_tflops.bf16 = 9.89e+14"),
        ("dense_tflops", {"bf16": 0.989}, "dense_tflops.bf16 = 0.989"),
        ("dense_tflops", {"bf16": 989_000.0}, "dense_tflops.bf16 = 989000"),
        ("dense_tflops", {"bf16": 0.0}, "dense_tflops.bf16 = 0"),
        ("tdp_watts", 0.7, "tdp_watts = 0.7, which should be"),
    ],
)
def test_a_figure_in_another_unit_is_refused_by_name(key: str, value: object, said: str) -> None:
    with pytest.raises(InputError) as caught:
        accelerators.decoded({"h200": entry(**{key: value})})
    assert str(caught.value).startswith("gpus.toml: [gpu.h200] ")
    assert said in str(caught.value)
