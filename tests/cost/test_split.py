from pathlib import Path

import pytest

from waterline import catalog
from waterline.catalog.engines import find_engine
from waterline.cost.serving import pieces
from waterline.cost.split import Side, split_point
from waterline.cost.step import StepCost, step_cost
from waterline.errors import InfeasibleError
from waterline.plan import Layout

PROMPT, OUTPUT, HIT = 4096, 1024, 0.563


def deepseek(ranks: int) -> StepCost:
    """DeepSeek-V3 as its makers served it in 2025: attention data-parallel, experts spread over all GPUs (H800)."""
    gpu = catalog.find_gpu("h800 sxm")
    llm = catalog.load_model("deepseek-ai/DeepSeek-V3", Path())
    return step_cost(llm, gpu, Layout(dp=ranks, ep=ranks), "fp8", find_engine("sglang").on(gpu))


PREFILL = Side(step=deepseek(32), replicas=1, most=10_000)
DECODE = Side(step=deepseek(144), replicas=1, most=144 * 128)


def reads(requests_per_s: float) -> bool:
    try:
        split_point(
            PREFILL, DECODE, requests_per_s, PROMPT, 2, cached_tokens=round(HIT * PROMPT)
        )  # fmt: skip
    except InfeasibleError:
        return False
    return True


def test_deepseek_s_own_figures_come_out() -> None:
    # open-infra-index, 2025-02-28: a node of 8 reads 73.7 k tokens a second, hits included, or writes 14.8 k at 20 to 22
    # a second and user; a token is written with 4,989 in the cache. Nothing of it was fitted.
    most = max(rate for rate in range(1, 400) if reads(rate))
    assert most * PROMPT / 4 == pytest.approx(73_700, rel=0.3)
    ample = Side(step=PREFILL.step, replicas=100, most=1)
    decode = split_point(ample, DECODE, 14_800 * 18 / OUTPUT, 4989 - OUTPUT // 2, OUTPUT)
    assert 1 / decode.tpot_s == pytest.approx(21, rel=0.3)


def test_a_lone_prompt_is_not_held_up_by_ranks_that_read_nothing() -> None:
    own = pieces(PREFILL.step, 1, PROMPT, PROMPT)
    found = split_point(PREFILL, DECODE, 1e-6, PROMPT, 64)
    assert own.lone_s < 0.5 * own.alone_s
    assert found.ttft_s == pytest.approx(own.lone_s + found.tpot_s, rel=1e-3)


def test_waiting_grows_with_the_rate_and_ends_in_an_error() -> None:
    times = [split_point(PREFILL, DECODE, rate, PROMPT, 64).ttft_s for rate in (1, 10, 30)]
    assert times == sorted(times)
    with pytest.raises(InfeasibleError, match=r"1 prefill replicas read .* Take at least \d+\."):
        split_point(PREFILL, DECODE, 100_000, PROMPT, 64)


def test_too_many_answers_are_refused_by_the_other_side() -> None:
    small = Side(step=DECODE.step, replicas=1, most=2)
    with pytest.raises(InfeasibleError, match=r"1 decode replicas of 2 requests finish .* 20 arrive"):
        split_point(PREFILL, small, 20, PROMPT, 4096)
