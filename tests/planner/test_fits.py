import re

import pytest

from waterline import catalog
from waterline.catalog.engines import find_engine
from waterline.cost.memory import memory_use
from waterline.errors import InputError
from waterline.llm.gguf_sizes import file_bytes
from waterline.plan import Layout
from waterline.planner.fits import Fit, default_fit_precisions, fits, whole_nodes


def fit(
    model: str, gpu: str, *precisions: str, context_tokens: int = 4096, concurrency: int = 1, engine: str = "vllm"
) -> Fit:
    llm = catalog.find_model(model)
    (found,) = fits(
        llm,
        [catalog.find_gpu(gpu)],
        precisions or default_fit_precisions(llm, engine),
        engine,
        context_tokens,
        concurrency,
    )
    return found


def test_a_small_model_runs_on_one_gaming_card() -> None:
    found = fit("deepseek-r1-distill-qwen-1.5b", "rtx-4090")
    assert (found.runs, found.gpus, found.precision) == (True, 1, "bf16")


def test_671_billion_parameters_in_sixteen_bits_do_not_fit_two_nodes_of_a100() -> None:
    assert fit("deepseek-r1", "a100-sxm-80g", "bf16").gpus > 16
    assert fit("deepseek-r1", "a100-sxm-80g", "int8").gpus == 16


def test_a_card_without_fp8_units_says_so() -> None:
    found = fit("deepseek-r1", "a100-sxm-80g", "fp8")
    assert not found.runs
    assert found.why_not == "fp8 tp1: a100-sxm-80g has no units for fp8"


def test_what_is_missing_is_said_in_numbers() -> None:
    found = fit("qwen3-32b", "l4", "bf16", context_tokens=131072 // 8, concurrency=1000)
    assert not found.runs
    said = re.fullmatch(
        r"bf16 tp8 pp4: 32 l4 hold the model and (\d+) requests of 16384 tokens, not 1000", found.why_not
    )
    assert said, found.why_not
    assert fit("qwen3-32b", "l4", "bf16", context_tokens=131072 // 8, concurrency=int(said[1])).runs


def test_seven_billion_parameters_on_eight_gibibytes_need_four_bits() -> None:
    found = fit("llama-2-7b-hf", "rtx-4060ti-8g", engine="llamacpp")
    assert (found.gpus, found.precision) == (1, "q4_k_m")
    assert fit("llama-2-7b-hf", "rtx-4060ti-16g", "q8_0", engine="llamacpp").gpus == 1


def test_more_requests_at_once_take_longer_a_token_and_yield_more() -> None:
    one, many = fit("qwen3-32b", "h100-sxm-80g"), fit("qwen3-32b", "h100-sxm-80g", concurrency=8, context_tokens=512)
    assert one.tpot_s is not None
    assert many.tpot_s is not None
    assert one.tpot_s < many.tpot_s
    assert (one.output_tokens_per_s or 0) < (many.output_tokens_per_s or 0)


def test_times_carry_an_interval_and_where_they_come_from() -> None:
    for gpu in ("h100-sxm-80g", "rtx-3090"):
        found = fit("qwen3-32b", gpu)
        assert 0 < (found.ttft_low_s or 0) < (found.ttft_s or 0) < (found.ttft_high_s or 0)
        assert 0 < (found.tpot_low_s or 0) < (found.tpot_s or 0) < (found.tpot_high_s or 0)
        assert found.provenance in {"measured", "interpolated", "transferred", "physics"}
    assert not fit("qwen3-32b", "cpu").provenance


def test_tensorrt_llm_runs_on_no_other_vendor_s_cards() -> None:
    found = fit("llama-3.1-8b", "mi300x", engine="trtllm")
    assert (found.runs, found.why_not) == (False, "trtllm runs on NVIDIA's cards alone")
    llm, cards = catalog.find_model("llama-3.1-8b"), [catalog.find_gpu(name) for name in ("mi300x", "h200_sxm")]
    assert [one.gpu for one in whole_nodes(llm, cards, ("bf16",), "trtllm", 4096, 1)] == ["h200-sxm-141g"]


def test_tensorrt_llm_is_priced_like_the_others_but_runs_no_gguf() -> None:
    assert fit("qwen3-32b", "h100-sxm-80g", engine="trtllm").runs
    with pytest.raises(InputError, match="q4_k_m is a format of llama.cpp, trtllm does not run it"):
        fit("qwen3-32b", "h100-sxm-80g", "q4_k_m", engine="trtllm")


def test_those_that_run_come_first_the_cheapest_on_top() -> None:
    llm = catalog.find_model("qwen3-32b")
    found = fits(llm, catalog.gpus().values(), ("bf16",), "vllm", 8192, 1)
    runs = [one.runs for one in found]
    assert runs == sorted(runs, reverse=True)
    for kinds in (("on_demand", "community", "own"), ("purchase",)):
        prices = [one.usd_per_hour or 0 for one in found if one.runs and one.price_kind in kinds]
        assert prices == sorted(prices)
    assert len(found) == len(catalog.gpus())


def test_a_whole_node_is_one_replica_on_all_its_cards() -> None:
    llm = catalog.find_model("deepseek-r1")
    cards = [catalog.find_gpu(name) for name in ("h200-sxm-141g", "l40s", "cpu")]
    (node,) = whole_nodes(llm, cards, ("fp8", "int4"), "vllm", 8192, 1)
    assert (node.gpu, node.gpus, str(node.layout), node.precision, node.whole_node) == (
        "h200-sxm-141g", 8, "tp8", "fp8", True,
    )  # fmt: skip
    (least,) = fits(llm, cards[:1], ("fp8", "int4"), "vllm", 8192, 1)
    assert least.gpus < node.gpus
    assert (least.usd_per_hour or 0) / least.gpus == pytest.approx((node.usd_per_hour or 0) / node.gpus)


def test_llama_cpp_s_mixes_weigh_what_its_files_do() -> None:
    llm, gpu = catalog.find_model("llama-2-7b-hf"), catalog.find_gpu("rtx-4060ti-8g")
    engine = find_engine("llamacpp").on(gpu)
    held = memory_use(llm, gpu, Layout(), "q4_k_m", engine).weights
    assert held is not None
    on_host = 32000 * 4096 * 4.5 / 8  # token_embd in Q4_K
    assert held.total_bytes + on_host == pytest.approx(file_bytes(llm, "q4_k_m"), rel=0.002)
    assert held.embedding_bytes == pytest.approx(32000 * 4096 * 6.5625 / 8, rel=1e-3)  # output in Q6_K


def test_llama_cpp_gets_formats_of_its_own_for_a_checkpoint_in_fp8() -> None:
    assert default_fit_precisions(catalog.find_model("deepseek-r1"), "llamacpp") == ("q8_0", "q4_k_m")
