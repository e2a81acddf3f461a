from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import CARD, DENSE, ENGINE, SPARSE
from waterline import catalog
from waterline.catalog.engines import EngineProfile, find_engine
from waterline.cost.memory import (
    activation_bytes,
    cache_tokens,
    gpu_weights,
    longest_context,
    memory_fit,
    memory_use,
    most_sequences,
    sequence_cache_bytes,
    weights_bytes,
)
from waterline.errors import InputError, UnknownNameError
from waterline.llm import PRECISIONS, AttentionLayers, FeedForwardLayers, Llm
from waterline.plan import Layout
from waterline.units import GIB

ONE = Layout()
HOPPER = {"step_tokens": 8192, "sequences": 1024}  # vLLM's defaults on cards of 70 GiB and more


def attending(*groups: AttentionLayers) -> Llm:
    return msgspec.structs.replace(DENSE, attention=groups)


# --- Weights --------------------------------------------------------------------------------------------------------


def test_weights_keep_embedding_and_head_in_sixteen_bits() -> None:
    assert weights_bytes(DENSE, "bf16") == 2_000_000_000
    assert weights_bytes(DENSE, "fp8") == 980_000_000 + 2 * 20_000_000
    llama = catalog.find_model("llama-2-7b-hf")
    assert weights_bytes(llama, "q8_0") == pytest.approx(6_738_415_616 * 8.5 / 8, rel=1e-3)  # a GGUF packs them too


def test_a_file_that_was_read_says_its_exact_size() -> None:
    stored = msgspec.structs.replace(DENSE, precision="q8_0", stored_bytes=1_065_432_100)
    assert weights_bytes(stored, "q8_0") == 1_065_432_100
    assert weights_bytes(stored, "bf16") == 2_000_000_000


@pytest.mark.parametrize("llm", [DENSE, SPARSE])
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4", "fp32", "q4_k_m"])
def test_one_gpu_holds_what_the_model_weighs(llm: Llm, precision: str) -> None:
    held = gpu_weights(llm, precision, ONE)
    assert held.total_bytes == pytest.approx(weights_bytes(llm, precision), abs=8)


def test_weights_that_mix_precisions_keep_their_size_and_their_experts_the_format() -> None:
    mixed = msgspec.structs.replace(SPARSE, precision="nvfp4", stored_bytes=600_000_000)
    held = gpu_weights(mixed, "nvfp4", ONE)
    assert held.total_bytes == pytest.approx(600_000_000, abs=8)
    assert held.experts_bytes == 960_000_000 * 4.5 / 8
    assert held.embedding_bytes == 2 * 10_000_000 * 2
    # Every shard of a card's worth of GPUs adds up to no less than the whole.
    assert 8 * gpu_weights(mixed, "nvfp4", Layout(tp=8)).total_bytes >= 600_000_000


def test_key_value_heads_are_copied_when_there_are_more_gpus() -> None:
    key_value = 10 * 1000 * 2 * 200  # layers, width, heads, key and value
    others = DENSE.parameters - 20_000_000 - 10 * 3 * 1000 * 4000  # attention, norms and what a test model leaves
    two, eight = (gpu_weights(DENSE, "bf16", Layout(tp=tp)).attention_bytes for tp in (2, 8))
    assert two == pytest.approx(2 * others / 2, abs=2)
    assert eight == pytest.approx(2 * ((others - key_value) / 8 + key_value / 2), abs=2)


def test_heads_that_do_not_divide_leave_one_gpu_with_more() -> None:
    three = gpu_weights(DENSE, "bf16", Layout(tp=3)).attention_bytes
    assert three > gpu_weights(DENSE, "bf16", Layout(tp=2)).attention_bytes * 2 / 3


def test_the_vocabulary_is_padded_to_sixty_four_entries_a_gpu() -> None:
    assert gpu_weights(DENSE, "bf16", Layout(tp=8)).embedding_bytes == 2 * 2 * 1280 * 1000  # 10,000 / 8 = 1250


def test_experts_are_spread_over_all_ranks_and_attention_only_over_its_own() -> None:
    wide = gpu_weights(SPARSE, "bf16", Layout(dp=4, ep=4))
    alone = gpu_weights(SPARSE, "bf16", ONE)
    assert wide.experts_bytes == alone.experts_bytes // 4
    assert wide.attention_bytes == alone.attention_bytes
    assert wide.embedding_bytes == alone.embedding_bytes
    # The same experts, each cut in two and four to a GPU.
    assert gpu_weights(SPARSE, "bf16", Layout(dp=4, ep=2)).experts_bytes == wide.experts_bytes


def test_redundant_experts_take_their_place() -> None:
    plain = gpu_weights(SPARSE, "bf16", Layout(dp=4, ep=4)).experts_bytes  # 2 of 8 a layer
    assert gpu_weights(SPARSE, "bf16", Layout(dp=4, ep=4), redundant_experts=4).experts_bytes == plain * 3 // 2


def test_the_last_pipeline_stage_holds_the_head() -> None:
    half = gpu_weights(DENSE, "bf16", Layout(pp=2))
    assert half.embedding_bytes == 2 * 10_000 * 1000
    assert half.total_bytes == pytest.approx(2 * (490_000_000 + 10_000_000), abs=8)
    tied = msgspec.structs.replace(DENSE, tied_embeddings=True)
    assert gpu_weights(tied, "bf16", Layout(pp=2)).embedding_bytes == 2 * 10_000 * 1000  # a copy at both ends


def test_layers_that_do_not_divide_go_between_the_first_and_the_last_stage() -> None:
    third = gpu_weights(DENSE, "bf16", Layout(pp=3))  # 3, 4 and 3 of 10 layers of 98 M; a table is 10 M
    assert third.total_bytes == pytest.approx(2 * 4 * 98_000_000, abs=8)
    assert third.embedding_bytes == 0


def test_llama_cpp_looks_up_the_embedding_on_the_host() -> None:
    llm = catalog.find_model("llama-2-7b-hf")
    held = gpu_weights(llm, "q8_0", ONE, embedding_on_host=True)
    assert held.embedding_bytes == 32000 * 4096 * 8.5 / 8


# --- Cache ----------------------------------------------------------------------------------------------------------


def test_the_cache_of_grouped_query_attention_holds_keys_and_values_of_the_kv_heads() -> None:
    assert sequence_cache_bytes(DENSE, 1, ONE) == 10 * 2 * (100 + 100) * 2
    assert sequence_cache_bytes(DENSE, 1000, Layout(tp=2)) == 1000 * 8000 // 2


def test_more_gpus_than_kv_heads_replicate_them() -> None:
    assert sequence_cache_bytes(DENSE, 1000, Layout(tp=8)) == sequence_cache_bytes(DENSE, 1000, Layout(tp=2))


@pytest.mark.parametrize(
    ("group", "context", "elements"),
    [
        (
            AttentionLayers(kind="window", layers=1, query_heads=8, kv_heads=2, head_dim=100, window_tokens=512),
            4000,
            512 * 400,
        ),
        (AttentionLayers(kind="latent", layers=1, query_heads=8, latent_dim=512, rope_dim=64), 4000, 4000 * 576),
        (AttentionLayers(kind="state", layers=1, state_elements=12_345), 4000, 12_345),
    ],
)
def test_each_kind_of_attention_keeps_its_own_cache(group: AttentionLayers, context: int, elements: int) -> None:
    assert sequence_cache_bytes(attending(group), context, ONE) == 2 * elements


def test_blocks_are_taken_whole_and_a_window_lies_across_one_more() -> None:
    assert sequence_cache_bytes(DENSE, 17, ONE, block_tokens=16) == 32 * 8000
    window = attending(
        AttentionLayers(kind="window", layers=1, query_heads=8, kv_heads=2, head_dim=100, window_tokens=512)
    )
    assert sequence_cache_bytes(window, 4000, ONE, block_tokens=16) == 2 * (512 + 16) * 400


def test_an_eight_bit_cache_halves_all_but_states_and_indexes() -> None:
    assert sequence_cache_bytes(DENSE, 1000, ONE, element_bytes=1) == 1000 * 4000
    state = attending(AttentionLayers(kind="state", layers=1, state_elements=500))
    assert sequence_cache_bytes(state, 1000, ONE, element_bytes=1) == 1000
    sparse = AttentionLayers(kind="latent", layers=1, query_heads=8, latent_dim=512, rope_dim=64, index_dim=128)
    assert sequence_cache_bytes(attending(sparse), 1000, ONE) == 1000 * (2 * 576 + 132)
    assert sequence_cache_bytes(attending(sparse), 1000, ONE, element_bytes=1) == 1000 * (576 + 132)


def test_data_parallel_ranks_have_a_cache_each() -> None:
    use = memory_use(DENSE, CARD, ONE, "bf16", ENGINE)
    assert cache_tokens(DENSE, Layout(dp=4), use, 4096) == 4 * cache_tokens(DENSE, ONE, use, 4096)


# --- Answers --------------------------------------------------------------------------------------------------------


def test_every_gibibyte_is_accounted_for() -> None:
    use = memory_use(DENSE, CARD, ONE, "bf16", ENGINE)
    assert use.usable_bytes == 9 * GIB
    assert use.overhead_bytes == GIB
    assert use.needed_bytes + use.cache_bytes == use.usable_bytes
    assert sum(size for _, size in use.parts) == use.usable_bytes
    assert cache_tokens(DENSE, ONE, use, 4096) == use.cache_bytes // 8000


def test_a_model_too_large_leaves_no_cache() -> None:
    large = msgspec.structs.replace(DENSE, parameters=6_000_000_000)
    use = memory_use(large, CARD, ONE, "bf16", ENGINE)
    assert use.cache_bytes < 0
    assert cache_tokens(large, ONE, use, 4096) == most_sequences(large, ONE, use, 4096) == 0
    assert longest_context(large, ONE, use) == 0
    fit = memory_fit(large, use, ONE, 4096)
    assert not fit.fits
    assert fit.margin_bytes == use.cache_bytes - 4096 * 8000
    assert cache_tokens(large, Layout(tp=2), memory_use(large, CARD, Layout(tp=2), "bf16", ENGINE), 4096) > 0


def test_a_cache_smaller_than_one_context_counts_as_none() -> None:
    use = memory_use(DENSE, CARD, ONE, "bf16", ENGINE)
    too_long = use.cache_bytes // 8000 + 1
    assert cache_tokens(DENSE, ONE, use, too_long) == 0


def test_context_and_concurrency_answer_each_other() -> None:
    use = memory_use(DENSE, CARD, ONE, "bf16", ENGINE)
    most = most_sequences(DENSE, ONE, use, 4096)
    assert most == use.cache_bytes // (4096 * 8000)
    assert memory_fit(DENSE, use, ONE, 4096, most).fits
    assert not memory_fit(DENSE, use, ONE, 4096, most + 1).fits
    assert longest_context(DENSE, ONE, use, most) == 4096  # all the model takes
    assert longest_context(DENSE, ONE, use, 2 * most) == use.cache_bytes // (2 * most) // 8000


def test_the_rules_of_engines_share_out_a_card_differently() -> None:
    whole = memory_use(DENSE, CARD, ONE, "bf16", ENGINE)
    left = memory_use(DENSE, CARD, ONE, "bf16", replace(ENGINE, memory_rule="left"))
    static = memory_use(DENSE, CARD, ONE, "bf16", replace(ENGINE, memory_rule="static"), usable_fraction=0.8)
    assert left.cache_bytes == int((10 * GIB - whole.needed_bytes) * 0.9)
    assert static.cache_bytes == 8 * GIB - static.weights_bytes
    assert whole.cache_bytes == 9 * GIB - whole.needed_bytes


def test_communication_never_makes_a_small_model_larger_than_on_one_gpu() -> None:
    engine = replace(ENGINE, communication_bytes=4 * GIB)
    one, two = (memory_use(DENSE, CARD, Layout(tp=tp), "bf16", engine) for tp in (1, 2))
    assert one.communication_bytes == 0
    assert two.weights_bytes + two.communication_bytes == one.weights_bytes


def test_an_unknown_cache_type_or_version_is_named() -> None:
    with pytest.raises(InputError, match="no cache type is called 'fp3'"):
        memory_use(DENSE, CARD, ONE, "bf16", ENGINE, cache_dtype="fp3")
    with pytest.raises(InputError, match="'newest' has no numbers"):
        find_engine("vllm", "newest")
    with pytest.raises(UnknownNameError, match="no engine is called 'vlm'"):
        find_engine("vlm")


def test_an_older_version_has_what_was_different_then() -> None:
    newest, newer, old = find_engine("vllm"), find_engine("vllm", "v0.19.0"), find_engine("vllm", "0.16.1rc2")
    assert newest.graphs_bytes > newer.graphs_bytes == 0
    assert old.logits_bytes > newer.logits_bytes == newest.logits_bytes
    assert find_engine("vllm", "1.0") == newest


# --- Golden: what engines logged ------------------------------------------------------------------------------------

# model, card, precision, layout, version, settings, weights and cache of one GPU in GiB. Sources: vLLM issues 13061 (the
# cache is that of the rank that samples: 81,536 tokens), 21348; llm-d-planner accuracy report; llm-d-benchmark
# empirical-vllm-memory-results.md; a log of a 3090 with vLLM 0.6. Read 2026-11-24.
LOGS: list[tuple[str, str, str, Layout, str, dict[str, Any], float | None, float | None]] = [
    ("DeepSeek-R1-Distill-Qwen-14B", "rtx-4090", "bf16", Layout(tp=2), "0.7", {"usable_fraction": 0.98}, 13.95, 7.465),
    ("Qwen3-235B-A22B", "h100-sxm-80g", "fp8", Layout(tp=4), "0.9", HOPPER, None, 8.11),
    ("Llama-3.1-8B", "rtx-3090", "bf16", ONE, "0.6", {"step_tokens": 20000}, 14.99, 3.81),
    ("Llama-3.1-8B", "rtx-3090", "bf16", ONE, "0.6", {"step_tokens": 29000}, 14.99, 2.89),
    ("gpt-oss-20b", "h100-sxm-80g", "mxfp4", ONE, "0.12", HOPPER, 13.47, 50.28),
    ("gpt-oss-120b", "h100-sxm-80g", "mxfp4", ONE, "0.14", {**HOPPER, "usable_fraction": 0.95}, 64.38, 3.33),
    ("Meta-Llama-3.1-70B", "h100-sxm-80g", "fp8", Layout(tp=2), "0.12", HOPPER, 33.88, 32.0),
    ("Qwen3-0.6B", "h100-sxm-80g", "bf16", ONE, "0.12", HOPPER, 1.12, 64.45),
    ("Qwen3-32B", "h100-sxm-80g", "bf16", ONE, "0.12", HOPPER, 61.03, 4.45),
    ("Llama-3.1-8B", "h100-sxm-80g", "bf16", ONE, "0.19", {**HOPPER, "usable_fraction": 0.95}, 14.99, 58.11),
    ("Llama-3.1-8B", "h100-sxm-80g", "bf16", Layout(pp=4), "0.19", HOPPER, 4.26, None),
    ("Qwen3-14B", "h100-sxm-80g", "bf16", ONE, "0.17", {**HOPPER, "usable_fraction": 0.95}, 27.52, 45.34),
]


@pytest.mark.parametrize(("model", "card", "precision", "layout", "version", "settings", "weights", "cache"), LOGS)
def test_weights_and_cache_are_as_logged(
    model: str,
    card: str,
    precision: str,
    layout: Layout,
    version: str,
    settings: dict[str, Any],
    weights: float | None,
    cache: float | None,
) -> None:
    engine = find_engine("vllm", version)
    use = memory_use(catalog.find_model(model), catalog.find_gpu(card), layout, precision, engine, **settings)
    assert weights is None or use.weights_bytes / GIB == pytest.approx(weights, rel=0.015)
    assert cache is None or use.cache_bytes / GIB == pytest.approx(cache, rel=0.10)


@pytest.mark.parametrize(
    ("model", "card", "precision", "engine", "layout", "runs"),
    [  # llama.cpp rows: XiongjieDai/GPU-Benchmarks-on-LLM-Inference; the others: InferenceX, aiconfigurator's sample
        ("Llama-3.1-8B", "rtx-4080", "fp16", "llamacpp", ONE, True),
        ("Llama-3.1-8B", "rtx-4070", "fp16", "llamacpp", ONE, False),
        ("Meta-Llama-3.1-70B", "rtx-3090", "fp16", "llamacpp", Layout(pp=6), True),
        ("Meta-Llama-3.1-70B", "rtx-3090", "fp16", "llamacpp", Layout(pp=4), False),
        ("DeepSeek-R1", "b200-sxm-180g", "fp8", "sglang", Layout(tp=4), True),
        ("DeepSeek-R1", "h200-sxm-141g", "fp8", "trtllm", Layout(dp=8, ep=8), True),
        ("Qwen3-235B-A22B", "h200-sxm-141g", "fp8", "vllm", Layout(tp=2), True),
        ("Meta-Llama-3.1-70B", "a100-sxm-80g", "fp16", "vllm", ONE, False),
    ],
)
def test_what_ran_fits_and_what_ran_out_of_memory_does_not(
    model: str, card: str, precision: str, engine: str, layout: Layout, runs: bool
) -> None:
    llm = catalog.find_model(model)
    use = memory_use(llm, catalog.find_gpu(card), layout, precision, find_engine(engine))
    assert memory_fit(llm, use, layout, 2048).fits == runs


@pytest.mark.parametrize(
    ("model", "card", "layout", "fraction", "cache"),
    [  # vllm issue 21348 (K and V of 367,404 tokens); sglang pull 18263; aisimulate pull 263 (509 k tokens); 2026-11-24
        ("Qwen3-235B-A22B", "h100-sxm-80g", Layout(tp=4), 0.93, 16.46),
        ("Qwen3-30B-A3B", "mi350x", ONE, 0.911, 204.63),
        ("DeepSeek-R1", "h200-sxm-141g", Layout(tp=8), 0.82, 33.3),
    ],
)
def test_the_cache_of_sglang_is_as_logged(model: str, card: str, layout: Layout, fraction: float, cache: float) -> None:
    llm, gpu = catalog.find_model(model), catalog.find_gpu(card)
    precision = "bf16" if card == "mi350x" else "fp8"
    use = memory_use(llm, gpu, layout, precision, find_engine("sglang"), usable_fraction=fraction)
    assert use.cache_bytes / GIB == pytest.approx(cache, rel=0.05)


def test_the_same_model_fits_with_fewer_sequences_and_shorter_steps() -> None:
    llm, gpu, engine = (
        catalog.find_model("Meta-Llama-3.1-70B"),
        catalog.find_gpu("h100-sxm-80g"),
        find_engine("vllm", "0.12"),
    )
    served = memory_use(llm, gpu, ONE, "fp8", engine, **HOPPER)
    assert served.cache_bytes / GIB == pytest.approx(-1.44, abs=0.2)  # llm-d-benchmark: no room for the cache
    assert memory_use(llm, gpu, ONE, "fp8", engine, step_tokens=2048, sequences=64).cache_bytes > 0


# --- Properties -----------------------------------------------------------------------------------------------------


@st.composite
def llms(draw: st.DrawFn) -> Llm:
    """Any stack of attention and feed-forward layers, dense or sparse, with heads that need not divide."""
    layers = draw(st.integers(1, 90))
    hidden = draw(st.integers(1, 120)) * 64
    kind = draw(st.sampled_from(["full", "window", "latent", "state"]))
    heads = draw(st.integers(1, 128))
    group = AttentionLayers(
        kind=kind,
        layers=layers,
        query_heads=heads,
        kv_heads=draw(st.integers(1, heads)),
        head_dim=128,
        window_tokens=draw(st.integers(1, 5000)) if kind == "window" else 0,
        latent_dim=512 if kind == "latent" else 0,
        rope_dim=64 if kind == "latent" else 0,
        state_elements=draw(st.integers(1, 10**6)) if kind == "state" else 0,
        index_dim=draw(st.sampled_from([0, 128])) if kind == "latent" else 0,
    )
    full = AttentionLayers(kind="full", layers=1, query_heads=heads, kv_heads=1, head_dim=64)
    attention = (group, full) if draw(st.booleans()) else (group,)
    count = sum(one.layers for one in attention)
    dense = draw(st.integers(0, count))
    experts = draw(st.integers(2, 300))
    feed_forward = tuple(
        one
        for one in (
            FeedForwardLayers(layers=dense, intermediate=draw(st.integers(1, 30000))),
            FeedForwardLayers(
                layers=count - dense,
                intermediate=draw(st.integers(1, 4000)),
                experts=experts,
                experts_per_token=draw(st.integers(1, min(8, experts))),
                shared_intermediate=draw(st.sampled_from([0, 1000])),
            ),
        )
        if one.layers
    )
    llm = Llm(
        name="any",
        architecture="any",
        parameters=1,
        active_parameters=1,
        hidden=hidden,
        vocabulary=draw(st.integers(2, 300_000)),
        max_context_tokens=draw(st.integers(1, 10**6)),
        precision="bf16",
        attention=attention,
        feed_forward=feed_forward,
        tied_embeddings=draw(st.booleans()),
        vision_parameters=draw(st.sampled_from([0, 10**9])),
    )
    attending = count * (4 * heads * 128 * hidden + hidden * (512 + 64))
    dense_parameters = sum(
        one.layers * 3 * hidden * (one.shared_intermediate if one.experts else one.intermediate) for one in feed_forward
    )
    embeddings = llm.vocabulary * hidden * (1 if llm.tied_embeddings else 2)
    return msgspec.structs.replace(llm, parameters=attending + dense_parameters + llm.expert_parameters + embeddings)


engines = st.sampled_from(["vllm", "sglang", "trtllm", "llamacpp"]).map(find_engine)
precisions = st.sampled_from(sorted(PRECISIONS))
degrees = st.sampled_from([1, 2, 3, 4, 6, 8, 16])
cards = st.sampled_from(["h100-sxm-80g", "l4", "mi300x"]).map(catalog.find_gpu)


@given(llms(), st.integers(1, 10**6), st.integers(0, 10**5), st.integers(1, 500), degrees, st.sampled_from([1, 16]))
def test_memory_grows_with_context_and_batch(
    llm: Llm, context: int, more: int, batch: int, tp: int, block: int
) -> None:
    layout = Layout(tp=tp)
    shorter, longer = (
        sequence_cache_bytes(llm, tokens, layout, block_tokens=block) for tokens in (context, context + more)
    )
    assert 0 < shorter <= longer
    use = memory_use(llm, CARD, layout, "bf16", ENGINE)
    few, many = (memory_fit(llm, use, layout, context, sequences).needed_bytes for sequences in (batch, batch + 1))
    assert few < many


@given(llms(), precisions, engines, cards, degrees, degrees, st.sampled_from(["tp", "pp", "ep", "tp with ep"]))
def test_a_model_split_over_more_gpus_never_needs_more_on_each(
    llm: Llm, precision: str, engine: EngineProfile, card: Any, gpus: int, times: int, kind: str
) -> None:
    def split(count: int) -> Layout:
        match kind:
            case "tp":
                return Layout(tp=count)
            case "pp":
                return Layout(pp=count, tp=2)
            case "ep":
                return Layout(dp=count, ep=count)
            case _:
                return Layout(tp=count, ep=count)

    fewer, more = (memory_use(llm, card, split(count), precision, engine) for count in (gpus, gpus * times))
    slack = 16  # bytes: each part is rounded up
    assert more.needed_bytes <= fewer.needed_bytes + slack
    cache = [sequence_cache_bytes(llm, 4096, split(count)) for count in (gpus, gpus * times)]
    assert cache[1] <= cache[0]


@given(llms(), precisions, engines, cards, degrees, degrees)
def test_never_less_than_the_weights_is_needed(
    llm: Llm, precision: str, engine: EngineProfile, card: Any, tp: int, pp: int
) -> None:
    layout = Layout(tp=tp, pp=pp)
    use = memory_use(llm, card, layout, precision, engine)
    assert use.needed_bytes >= use.weights_bytes
    assert use.needed_bytes + use.cache_bytes == use.usable_bytes <= card.memory_bytes
    on_host = llm.vocabulary * llm.hidden * 4 if engine.embedding_on_host else 0
    assert use.weights_bytes * layout.gpus >= weights_bytes(llm, precision) - on_host - 16
    assert memory_fit(llm, use, layout, 1).needed_bytes >= use.needed_bytes


@given(llms(), engines, st.integers(1, 300), st.sampled_from([1, 2, 8]))
def test_the_longest_context_fits_and_a_longer_one_does_not(
    llm: Llm, engine: EngineProfile, concurrency: int, dp: int
) -> None:
    layout = Layout(dp=dp)
    use = memory_use(llm, catalog.find_gpu("h100-sxm-80g"), layout, "bf16", engine)
    longest = longest_context(llm, layout, use, concurrency)
    if longest:
        assert memory_fit(llm, use, layout, longest, concurrency).fits
    if longest < llm.max_context_tokens:
        block = use.block_tokens
        assert not memory_fit(llm, use, layout, longest + block, concurrency).fits


@given(llms(), st.integers(1, 20000), st.integers(0, 20000), st.integers(1, 1024))
def test_activations_grow_with_the_tokens_of_a_step(llm: Llm, tokens: int, more: int, sequences: int) -> None:
    peaks = [activation_bytes(llm, ONE, count, sequences) for count in (tokens, tokens + more)]
    assert 0 < peaks[0] <= peaks[1]
