import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterline import catalog
from waterline.catalog.calibration import calibration_of
from waterline.catalog.engines import find_engine
from waterline.cost import Between, Estimate, Priced, estimate_replica, step_cost
from waterline.cost.estimate import Asked, estimate_at_rate
from waterline.errors import InfeasibleError, InputError
from waterline.plan import Layout

LLAMA, R1 = "meta-llama/Llama-3.1-8B", "deepseek-ai/DeepSeek-R1"
UNKNOWN = "an engine nobody measured"


def estimate(
    model: str = LLAMA,
    card: str = "h100-sxm-80g",
    layout: Layout = Layout(),  # noqa: B008 - frozen
    precision: str = "bf16",
    engine: str = "vllm",
    *,
    isl: int = 1000,
    osl: int = 200,
    concurrency: int = 8,
    prefix_hit: float = 0.0,
) -> Estimate:
    llm, gpu = catalog.find_model(model), catalog.find_gpu(card)
    profile = replace(find_engine("vllm").on(gpu), name=UNKNOWN) if engine == UNKNOWN else find_engine(engine).on(gpu)
    return estimate_replica(
        llm, gpu, layout, precision, profile, step_cost(llm, gpu, layout, precision, profile),
        prompt_tokens=isl, output_tokens=osl, concurrency=concurrency, prefix_hit=prefix_hit,
    )  # fmt: skip


def figures(found: Estimate) -> tuple[Between, Between, Between]:
    return found.ttft_s, found.tpot_s, found.tokens_per_s_per_gpu


def test_tokens_per_second_follow_from_the_times_of_a_closed_loop() -> None:
    found = estimate(concurrency=16, layout=Layout(tp=2))
    answer_s = found.ttft_s.value + 199 * found.tpot_s.value
    assert found.tokens_per_s_per_gpu.value == pytest.approx(16 * 200 / answer_s / 2)


def test_an_answer_of_one_token_has_a_first_one_and_no_others() -> None:
    found = estimate(osl=1, concurrency=1)
    assert found.tokens_per_s_per_gpu.value == pytest.approx(1 / found.ttft_s.value)


def test_what_cannot_run_at_once_waits_and_says_so() -> None:
    few, many = estimate(concurrency=8), estimate(concurrency=5000)
    assert (few.running, few.notes) == (8, ())
    assert many.notes[0] == f"{many.running} of 5000 requests run, the others wait"
    assert many.running < 5000
    assert many.ttft_s.value > 2 * few.ttft_s.value


def test_memory_grows_by_the_cache_of_those_that_run() -> None:
    one, two, three = (estimate(concurrency=concurrency).needed_bytes_per_gpu for concurrency in (1, 2, 3))
    context = 1000 + 100  # a request in the middle of its answer, in 32 layers of 8 heads of 128
    assert two - one == pytest.approx(2 * 32 * 8 * 128 * 2 * context, rel=0.05)  # in blocks of 16 tokens
    assert three - two == pytest.approx(two - one, rel=0.01)


def test_too_small_a_card_is_refused_with_numbers() -> None:
    with pytest.raises(InfeasibleError) as caught:
        estimate("meta-llama/Meta-Llama-3.1-70B", "l4")
    assert str(caught.value).startswith("meta-llama/Meta-Llama-3.1-70B in bf16 on 1 l4 (tp1) needs 1")
    assert re.search(r"1\d\d\.\d GiB of each before any cache; vllm can use (19|2\d)\.\d GiB", str(caught.value))
    assert "Take more cards or fewer bits" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"isl": 0}, "isl = 0 should be at least 1"),
        ({"osl": 0}, "osl = 0 should be at least 1"),
        ({"concurrency": -1}, "concurrency = -1 should be at least 1"),
        ({"prefix_hit": 1.2}, "prefix_hit = 1.2 should be a share from 0 to 1"),
        ({"prefix_hit": -0.1}, "prefix_hit = -0.1 should be"),
        ({"prefix_hit": float("nan")}, "prefix_hit = nan should be"),
        ({"isl": 131_072}, "isl \\+ osl = 131272 tokens; meta-llama/Llama-3.1-8B has a context of 131072"),
    ],
)
def test_a_number_out_of_range_is_named(changes: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        estimate(**changes)  # type: ignore[arg-type] # mypy does not know the names


def test_provenance_says_how_near_the_measurements_were() -> None:
    known = calibration_of("vllm").gpus
    assert known
    assert {estimate("Meta-Llama-3.1-70B", card, Layout(tp=4)).provenance for card in known} == {"measured"}
    assert estimate("Qwen3-14B", "h100-sxm-80g").provenance == "interpolated"  # no run was of this model
    assert estimate(card="a100-sxm-80g").provenance == "interpolated"  # nor any on this card
    assert estimate(card="rtx-3090").provenance == "transferred"
    assert estimate(card="rtx-3090", engine=UNKNOWN).provenance == "physics"


def test_what_is_worse_known_has_a_wider_interval() -> None:
    def width(found: Between) -> float:
        return found.high / found.low

    near, far = estimate(card="h100-sxm-80g"), estimate(card="rtx-3090", engine=UNKNOWN)
    assert width(near.tpot_s) < width(far.tpot_s)
    assert width(near.ttft_s) < width(far.ttft_s)


cards = st.sampled_from(["h100-sxm-80g", "h200-sxm-141g", "b200-sxm-180g", "a100-sxm-80g", "mi300x", "l40s"])
engines = st.sampled_from(["vllm", "sglang", "trtllm"])
shapes = {"isl": st.integers(1, 8000), "osl": st.integers(1, 2000)}


@settings(max_examples=100)
@given(card=cards, engine=engines, concurrency=st.integers(1, 300), **shapes)
def test_an_interval_contains_its_value(card: str, engine: str, isl: int, osl: int, concurrency: int) -> None:
    found = estimate(card=card, engine=engine, isl=isl, osl=osl, concurrency=concurrency)
    for between in figures(found):
        assert 0 < between.low <= between.value <= between.high
    assert found.running <= concurrency


@settings(max_examples=100)
@given(
    card=cards,
    engine=engines,
    isl=st.integers(1, 8000),
    osl=st.integers(16, 2000),
    concurrency=st.integers(1, 300),
    factor=st.integers(2, 8),
)
def test_more_clients_wait_longer_and_get_as_much_together(
    card: str, engine: str, isl: int, osl: int, concurrency: int, factor: int
) -> None:
    few = estimate(card=card, engine=engine, isl=isl, osl=osl, concurrency=concurrency)
    many = estimate(card=card, engine=engine, isl=isl, osl=osl, concurrency=concurrency * factor)
    assert many.ttft_s.value >= few.ttft_s.value
    assert many.tpot_s.value >= few.tpot_s.value
    assert many.tokens_per_s_per_gpu.value >= 0.8 * few.tokens_per_s_per_gpu.value


@settings(max_examples=100)
@given(card=cards, engine=engines, low=st.floats(0, 1), high=st.floats(0, 1), **shapes)
def test_a_prefix_in_the_cache_is_never_slower(
    card: str, engine: str, isl: int, osl: int, low: float, high: float
) -> None:
    cold, warm = (estimate(card=card, engine=engine, isl=isl, osl=osl, prefix_hit=hit) for hit in sorted((low, high)))
    assert warm.ttft_s.value <= cold.ttft_s.value
    assert warm.tpot_s.value <= cold.tpot_s.value


def test_most_of_a_long_prompt_in_the_cache_saves_most_of_its_reading() -> None:
    cold, warm = (estimate(isl=8000, concurrency=1, prefix_hit=hit) for hit in (0.0, 0.9))
    assert warm.ttft_s.value < 0.6 * cold.ttft_s.value


def test_a_mixture_of_experts_is_estimated_over_data_parallel_ranks() -> None:
    ranks = Layout(dp=8, ep=8)
    found = estimate(R1, "h200-sxm-141g", ranks, "fp8", "sglang", concurrency=64)
    assert found.running == 64
    more = estimate(R1, "h200-sxm-141g", ranks, "fp8", "sglang", concurrency=256)
    assert more.tokens_per_s_per_gpu.value > found.tokens_per_s_per_gpu.value


def test_a_profile_with_fewer_places_runs_fewer() -> None:
    llm, gpu = catalog.find_model(LLAMA), catalog.find_gpu("h100-sxm-80g")
    profile = replace(find_engine("vllm"), max_batch=5)
    step = step_cost(llm, gpu, Layout(), "bf16", profile)
    found = estimate_replica(
        llm, gpu, Layout(), "bf16", profile, step, prompt_tokens=100, output_tokens=100, concurrency=20
    )
    assert found.running == 5


def test_a_request_that_comes_alone_is_read_as_that_of_one_client() -> None:
    llm, gpu, layout = catalog.find_model("deepseek-ai/DeepSeek-R1"), catalog.find_gpu("h200_sxm"), Layout(dp=8, ep=8)
    engine = find_engine("vllm").on(gpu)
    replica = Priced(llm, gpu, layout, "fp8", engine, step_cost(llm, gpu, layout, "fp8", engine))
    asked = Asked(prompt_tokens=8000, output_tokens=100)
    client = estimate_replica(
        llm, gpu, layout, "fp8", engine, replica.step, prompt_tokens=8000, output_tokens=100, concurrency=1
    )
    lone = estimate_at_rate(replica, asked, 1e-6)
    assert lone.ttft_s.value == pytest.approx(client.ttft_s.value, rel=0.15)


def test_beyond_twice_what_was_measured_it_says_so() -> None:
    llm, gpu = catalog.find_model("meta-llama/Llama-3.1-8B"), catalog.find_gpu("h200_sxm")
    engine = find_engine("vllm").on(gpu)
    step = step_cost(llm, gpu, Layout(), "bf16", engine)

    def notes(isl: int) -> tuple[str, ...]:
        found = estimate_replica(
            llm, gpu, Layout(), "bf16", engine, step, prompt_tokens=isl, output_tokens=100, concurrency=1
        )
        return found.notes

    assert notes(8192) == ()
    assert notes(32_768) == (
        "isl 32768 is beyond twice what was measured, 8192",
        "context 32868 is beyond twice what was measured, 10000",
    )


@pytest.mark.parametrize(
    ("card", "engine", "layout", "said"),
    [
        ("h200_sxm", "vllm", Layout(tp=8, pp=4), "gpus 32 is beyond twice what was measured, 8"),
        ("mi300x", "vllm", Layout(tp=8), "context 60200 is beyond twice what was measured, 4224"),
        ("mi300x", "sglang", Layout(tp=8), "isl 60000 is beyond twice what was measured, 4194"),
        ("rtx-5090", "llamacpp", Layout(pp=8), "concurrency 8 is beyond twice what was measured, 1"),
    ],
)
def test_every_engine_knows_how_far_its_runs_reach(card: str, engine: str, layout: Layout, said: str) -> None:
    llm, gpu = catalog.find_model("meta-llama/Meta-Llama-3.1-70B"), catalog.find_gpu(card)
    profile = find_engine(engine).on(gpu)
    step = step_cost(llm, gpu, layout, "bf16", profile)
    found = estimate_replica(
        llm, gpu, layout, "bf16", profile, step, prompt_tokens=60_000, output_tokens=200, concurrency=8
    )
    assert said in found.notes
