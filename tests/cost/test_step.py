from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import CARD, DENSE, ENGINE, SPARSE
from waterline.cost import step_cost, weights_bytes
from waterline.cost.step import prefill_pairs
from waterline.errors import InfeasibleError
from waterline.llm import AttentionLayers, Llm
from waterline.plan import Layout
from waterline.units import PICOSECONDS_PER_S

ONE = Layout()
sizes = st.integers(0, 4096)


def test_decoding_one_token_takes_as_long_as_reading_the_weights() -> None:
    step = step_cost(DENSE, CARD, ONE, "bf16", ENGINE)
    # 2 GB less the input embedding (10,000 x 1,000 x 2 bytes: only a row is read) at 1 TB/s, then 8,000 bytes a token
    assert step.step_ps(0, 0, 1, 0) == 1_980_000_000
    assert step.step_ps(0, 0, 1, 1000) == 1_980_000_000 + 1000 * 8000


def test_a_long_prompt_takes_as_long_as_multiplying() -> None:
    step = step_cost(DENSE, CARD, ONE, "bf16", ENGINE)
    # 2 x 980 M a token, 2 x 10 M for the head once, and 4 x 100 x 8 x 10 a pair, at 1e14 FLOPs a second
    flops = 512 * 2 * 980e6 + 2 * 10e6 + prefill_pairs(0, 512) * 32_000
    assert step.step_ps(512, prefill_pairs(0, 512), 0, 0) == pytest.approx(flops / 1e14 * PICOSECONDS_PER_S, rel=1e-6)


def test_prompt_chunks_add_up_to_the_whole_triangle() -> None:
    assert prefill_pairs(0, 3) == 1 + 2 + 3
    assert prefill_pairs(0, 3) + prefill_pairs(3, 4) == prefill_pairs(0, 7)


def test_tensor_parallelism_halves_the_reading_and_pays_for_the_exchange() -> None:
    one = step_cost(DENSE, CARD, ONE, "bf16", ENGINE).step_ps(0, 0, 1, 0)
    two = step_cost(DENSE, CARD, Layout(tp=2), "bf16", ENGINE).step_ps(0, 0, 1, 0)
    latency = 2 * 10 * ENGINE.collective_latency_ps
    traffic = 2 * 10 * (2 * 1000) * 1 / 1e11 * PICOSECONDS_PER_S  # 20 all-reduces, 2 (n-1)/n = 1 times 2,000 bytes
    assert two == pytest.approx(one / 2 + latency + traffic, rel=1e-6)


def test_experts_are_read_by_the_tokens_that_choose_them() -> None:
    step = step_cost(SPARSE, CARD, ONE, "bf16", ENGINE)
    elsewhere = 1_980_000_000 - 1_920_000_000
    assert step.step_ps(0, 0, 1, 0) == pytest.approx(elsewhere + 1_920_000_000 / 4, rel=1e-6)  # 2 of 8
    two = 1 - (1 - 2 / 8) ** 2
    assert step.step_ps(0, 0, 2, 0) == pytest.approx(elsewhere + 1_920_000_000 * two, rel=1e-6)
    assert step.step_ps(0, 0, 64, 0) == pytest.approx(elsewhere + 1_920_000_000, rel=1e-6)


def test_a_window_limits_what_is_read() -> None:
    window = AttentionLayers(kind="window", layers=10, query_heads=8, kv_heads=2, head_dim=100, window_tokens=512)
    step = step_cost(msgspec.structs.replace(DENSE, attention=(window,)), CARD, ONE, "bf16", ENGINE)
    assert step.step_ps(0, 0, 1, 4000) == step.step_ps(0, 0, 1, 512)


def test_a_card_without_the_units_is_refused_by_name() -> None:
    old = replace(CARD, flops_per_s={"fp32": 1e13, "fp16": 1e14})
    with pytest.raises(InfeasibleError, match="card cannot compute in fp8: it has fp16, fp32"):
        step_cost(DENSE, old, ONE, "fp8", ENGINE)


@given(
    llm=st.sampled_from([DENSE, SPARSE]),
    precision=st.sampled_from(["bf16", "fp8"]),
    tp=st.sampled_from([1, 2, 4, 8]),
    prefill=sizes,
    decodes=st.integers(0, 64),
    context=sizes,
)
def test_a_step_is_never_faster_than_physics(
    llm: Llm, precision: str, tp: int, prefill: int, decodes: int, context: int
) -> None:
    if prefill + decodes == 0:
        return
    step = step_cost(llm, CARD, Layout(tp=tp), precision, ENGINE)
    took_s = step.step_ps(prefill, prefill_pairs(0, prefill), decodes, decodes * context) / PICOSECONDS_PER_S
    embedding = llm.vocabulary * llm.hidden * 2
    experts = llm.expert_parameters * (2 if precision == "bf16" else 1)
    chosen = 1.0 if llm is DENSE else 2 / 8
    read = weights_bytes(llm, precision) - embedding - experts * (1 - chosen)
    assert took_s >= read / tp / CARD.memory_bytes_per_s
    flops = 2 * (llm.active_parameters - 2 * llm.vocabulary * llm.hidden) * (prefill + decodes)
    assert took_s >= flops / tp / CARD.flops_per_s["bf16" if precision == "bf16" else "fp8"]


@given(sizes, sizes, st.integers(0, 63), sizes)
def test_more_work_never_takes_less_time(prefill: int, pairs: int, decodes: int, cached: int) -> None:
    step = step_cost(SPARSE, CARD, Layout(tp=2), "bf16", ENGINE)
    took = step.step_ps(prefill, pairs, decodes, cached)
    assert took <= step.step_ps(prefill + 1, pairs, decodes, cached)
    assert took <= step.step_ps(prefill, pairs + 1, decodes, cached)
    assert took <= step.step_ps(prefill, pairs, decodes + 1, cached)
    assert took <= step.step_ps(prefill, pairs, decodes, cached + 1)
