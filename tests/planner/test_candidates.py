"""What is worth pricing, and what comes of it."""

from itertools import product
from pathlib import Path

import pytest

from waterline import catalog
from waterline.fleet import Measured
from waterline.hardware import Node
from waterline.llm import Llm
from waterline.plan import Layout
from waterline.planner.candidates import (
    Candidate,
    Rejection,
    Shape,
    Work,
    bound_requests_per_s,
    expected,
    expected_all,
    hold,
    price,
    price_all,
    shapes,
)
from waterline.planner.queueing import usual_lengths
from waterline.workload import Slo

R1, LLAMA, QWEN = "deepseek-ai/DeepSeek-R1", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-235B-A22B"
WORK = Work(lengths=usual_lengths(1000, 200), max_context_tokens=8192, slo=Slo(ttft_s=3.0, tpot_s=0.06))
PATIENT = Work(lengths=usual_lengths(4000, 500, 0.5), max_context_tokens=32_768, slo=Slo(ttft_s=20, tpot_s=0.5))


def llm_of(name: str) -> Llm:
    return catalog.load_model(name, Path())


def node_of(gpu: str, gpus: int = 8) -> Node:
    return Node(gpu=catalog.find_gpu(gpu), gpus=gpus)


def of(model: str, gpu: str, nodes: int = 8, **change: object) -> list[Shape]:
    llm = llm_of(model)
    return shapes(llm, node_of(gpu), nodes, [llm.precision], "vllm", **change)  # type: ignore[arg-type]


def text_of(found: list[Shape]) -> set[str]:
    return {f"{one.layout} {one.role}" for one in found}


def test_a_dense_model_is_divided_inside_a_node_and_split_where_the_fabric_is_fast() -> None:
    assert text_of(of(LLAMA, "l40s")) == {"tp1 both", "tp2 both", "tp4 both", "tp8 both"}
    roles = ("both", "prefill", "decode")
    assert text_of(of(LLAMA, "h200-sxm-141g")) == {f"tp{tp} {role}" for tp, role in product((1, 2, 4, 8), roles)}


def test_experts_are_spread_over_nodes_only_where_the_fabric_is_fast_and_the_nodes_are_there() -> None:
    wide = {f"ep{ep} dp{ep} both" for ep in (16, 32, 64)}
    assert wide <= text_of(of(R1, "h200-sxm-141g"))
    assert text_of(of(R1, "h200-sxm-141g", nodes=2)) & wide == {"ep16 dp16 both"}
    assert text_of(of(R1, "l40s")) & wide == set()
    assert {"tp8 ep8 both", "ep8 dp8 both"} <= text_of(of(R1, "l40s"))


def test_no_layout_leaves_a_node_but_pipelines_and_experts() -> None:
    for model, gpu in product((R1, LLAMA, QWEN), ("h200-sxm-141g", "l40s", "mi300x", "rtx-4090")):
        for shape in of(model, gpu):
            layout = shape.layout
            assert layout.tp <= shape.node.gpus
            assert layout.dp in {1, layout.ep}
            assert layout.gpus <= shape.node.gpus * shape.nodes


def test_many_shapes_for_many_works_are_priced_like_each_by_itself() -> None:
    wanted = [*of(LLAMA, "h100-sxm-80g", 1), *of(QWEN, "mi300x", 2)]
    for work, row in zip((WORK, PATIENT), price_all(wanted, [WORK, PATIENT]), strict=True):
        for shape, answer in zip(wanted, row, strict=True):
            by_itself = price(shape.llm, shape.node, shape.layout, shape.precision, "vllm", work, shape.role)
            assert type(by_itself) is type(answer)
            if isinstance(answer, Candidate) and isinstance(by_itself, Candidate):
                assert answer.requests_per_s == pytest.approx(by_itself.requests_per_s, rel=1e-9)
                assert answer.role == shape.role
            if isinstance(answer, Rejection) and isinstance(by_itself, Rejection):
                assert answer.reason == by_itself.reason


def test_no_shape_does_more_than_its_bound() -> None:
    for model, gpu in product((R1, LLAMA, QWEN), ("h200-sxm-141g", "l4", "mi325x")):
        wanted = of(model, gpu)
        for work, row in zip((WORK, PATIENT), price_all(wanted, [WORK, PATIENT]), strict=True):
            for shape, answer in zip(wanted, row, strict=True):
                rate = answer.requests_per_s if isinstance(answer, Candidate) else 0.0
                assert rate <= bound_requests_per_s(shape, work), f"{model} {gpu} {shape.layout} {shape.role}"


def test_a_side_of_a_split_does_more_of_its_part_than_a_replica_that_does_both() -> None:
    wanted = [one for one in of(LLAMA, "h200-sxm-141g") if one.layout == Layout(tp=1)]
    rates = {one.role: one.requests_per_s for one in price_all(wanted, [WORK])[0] if isinstance(one, Candidate)}
    assert rates["both"] < min(rates["prefill"], rates["decode"])


def test_what_is_expected_at_a_rate_is_within_the_slo_and_grows_with_the_rate() -> None:
    found = [one for one in price_all(of(LLAMA, "h200-sxm-141g"), [WORK])[0] if isinstance(one, Candidate)]
    full = expected_all(found, [one.requests_per_s for one in found])
    half = expected_all(found, [one.requests_per_s / 2 for one in found])
    for one, busy, idle in zip(found, full, half, strict=True):
        assert busy.ttft_s <= WORK.slo.ttft_s * 1.01, f"{one.layout} {one.role}"
        assert busy.tpot_s <= WORK.slo.tpot_s * 1.01
        assert idle.ttft_s <= busy.ttft_s * 1.01
        assert idle.tpot_s <= busy.tpot_s * 1.01
        assert idle.batch <= busy.batch


def test_measured_rates_are_believed_whatever_fits() -> None:
    measured = Measured(gpu="h800-sxm-80g", gpus=8, prompt_tokens_per_s=73_700, output_tokens_per_s=14_800)
    wanted = of(R1, "h800-sxm-80g", measured=[measured])
    assert text_of(wanted) == {"ep8 dp8 both", "ep8 dp8 prefill", "ep8 dp8 decode"}
    patient = Work(lengths=usual_lengths(4000, 1000, 0.56), max_context_tokens=32_768, slo=Slo(ttft_s=60, tpot_s=0.5))
    both, prefill, decode = price_all(wanted, [patient])[0]
    assert isinstance(both, Candidate)
    assert isinstance(prefill, Candidate)
    assert isinstance(decode, Candidate)
    assert prefill.requests_per_s == pytest.approx(73_700 / 4000, rel=0.1)  # tokens found in the cache count
    assert decode.requests_per_s == pytest.approx(14_800 / 1000, rel=0.01)
    assert both.requests_per_s == pytest.approx(1 / (4000 / 73_700 + 1000 / 14_800), rel=0.1)


def test_what_holds_the_model_is_known_without_its_rate() -> None:
    shape = of(LLAMA, "h100-sxm-80g")[0]
    held = hold(shape, WORK)
    assert isinstance(held, Candidate)
    assert held.requests_per_s == 0.0
    assert held.full.batch == held.places


def test_a_lone_request_that_is_late_says_by_how_much() -> None:
    hurried = Work(lengths=WORK.lengths, max_context_tokens=8192, slo=Slo(ttft_s=3.0, tpot_s=1e-4))
    answer = price(llm_of(LLAMA), node_of("h100-sxm-80g"), Layout(tp=1), "bf16", "vllm", hurried)
    assert isinstance(answer, Rejection)
    assert answer.binding == "tpot"
    assert "even one at a time; the SLO allows 100 us" in answer.reason
    found = price(llm_of(LLAMA), node_of("h100-sxm-80g"), Layout(tp=1), "bf16", "vllm", WORK)
    assert isinstance(found, Candidate)
    assert answer.shortfall == pytest.approx(expected(found, 0.0).tpot_s - 1e-4, rel=0.01)
