"""The fewest or cheapest GPUs for a load, against planning a fleet with one pool, and against pricing everything."""

from pathlib import Path
from typing import Any

import pytest

from waterline import catalog
from waterline.errors import InfeasibleError
from waterline.fleet import Demand, Fleet, Model, Pool, check_fleet
from waterline.planner import make_plan, sizing
from waterline.planner.candidates import Work
from waterline.planner.queueing import usual_lengths
from waterline.planner.sizing import Question, Sizing, size
from waterline.workload import Slo

LLAMA, QWEN, R1 = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B", "deepseek-ai/DeepSeek-R1"
PRICES = {"h200-sxm-141g": 4.0, "l40s": 1.5, "mi300x": 3.0, "h100-sxm-80g": 2.5, "l4": 0.7, "rtx-4090": 0.4}


def question(model: str, gpus: tuple[str, ...], requests_per_s: float = 20.0, **change: Any) -> Question:
    llm = catalog.load_model(model, Path())
    asked = {"ttft_s": 2.0, "tpot_s": 0.05, "isl": 2000, "osl": 300, "context": 32_768} | change
    return Question(
        llm=llm,
        requests_per_s=requests_per_s,
        work=Work(
            lengths=usual_lengths(asked["isl"], asked["osl"]),
            max_context_tokens=asked["context"],
            slo=Slo(ttft_s=asked["ttft_s"], tpot_s=asked["tpot_s"]),
        ),
        gpus=[catalog.find_gpu(gpu) for gpu in gpus],
        precisions=asked.get("precisions", (llm.precision,)),
        engine="vllm",
        aim=asked.get("aim", "cheapest"),
        usd_per_gpu_hour=asked.get("prices", PRICES),
    )


def told(answer: Sizing) -> list[tuple[str, str, int, float | None]]:
    return [(one.gpu, one.layout, one.gpus, one.usd_per_hour) for one in (answer, *answer.alternatives)]


def capacity(answer: Sizing, role: str) -> float:
    return sum(part.replicas * part.requests_per_s for part in answer.parts if part.role == role)


@pytest.mark.parametrize(
    ("model", "gpu", "requests_per_s"),
    [
        (LLAMA, "l40s", 3.0),
        (LLAMA, "h100-sxm-80g", 9.0),
        (LLAMA, "h200-sxm-141g", 150.0),
        (QWEN, "h100-sxm-80g", 20.0),
        (QWEN, "mi300x", 2.0),
    ],
)
def test_a_fleet_with_one_pool_is_planned_alike(model: str, gpu: str, requests_per_s: float) -> None:
    answer = size(question(model, (gpu,), requests_per_s))
    plan = make_plan(
        check_fleet(
            Fleet(
                name="one pool",
                pools=(Pool(name="pool", gpu=gpu, nodes=40, usd_per_gpu_hour=PRICES[gpu]),),
                models=(Model(name="m", weights=model, slo=Slo(ttft_s=2.0, tpot_s=0.05)),),
                demand=(Demand(requests_per_s=requests_per_s, prompt_tokens=2000, output_tokens=300),),
            ),
            Path("fleet.toml"),
        )
    )
    assert (answer.gpus, answer.usd_per_hour) == (plan.gpus, pytest.approx(plan.usd_per_hour))


def test_the_answer_has_room_for_the_load_and_keeps_to_the_slo() -> None:
    for model, gpu in ((LLAMA, "l4"), (QWEN, "mi300x"), (R1, "h200-sxm-141g")):
        answer = size(question(model, (gpu,), tpot_s=0.1, ttft_s=5.0))
        able = [capacity(answer, role) for role in ("both", "prefill", "decode") if capacity(answer, role)]
        assert min(able) >= 20.0 * (1 - 1e-9)
        assert answer.ttft_s <= 5.0 * 1.01
        assert answer.tpot_s <= 0.1 * 1.01
        assert answer.gpus == sum(part.gpus for part in answer.parts)
        assert answer.ttft_low_s < answer.ttft_s < answer.ttft_high_s


def test_what_is_not_priced_could_not_have_been_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (*PRICES, "b200-sxm-180g", "a100-sxm-80g", "l40", "a10", "rtx-5090")
    prices = PRICES | {"b200-sxm-180g": 6.0, "a100-sxm-80g": 2.6, "l40": 1.0, "a10": 2.0, "rtx-5090": 0.6}
    pruned = told(size(question(QWEN, cards, prices=prices)))
    monkeypatch.setattr(sizing, "bound_requests_per_s", lambda *_: 1e9)
    assert pruned == told(size(question(QWEN, cards, prices=prices)))


def test_alternatives_come_in_order_and_none_is_better() -> None:
    answer = size(question(QWEN, tuple(PRICES)))
    prices = [one.usd_per_hour or 0.0 for one in (answer, *answer.alternatives)]
    assert prices == sorted(prices)
    assert len({one.gpu for one in answer.alternatives}) > 2


def test_the_fewest_gpus_are_no_more_than_the_cheapest_and_no_cheaper() -> None:
    cards = {"l4": 0.1, "h200-sxm-141g": 40.0}
    cheapest, fewest = (size(question(LLAMA, tuple(cards), aim=aim, prices=cards)) for aim in ("cheapest", "fewest"))
    assert fewest.gpus < cheapest.gpus
    assert (fewest.usd_per_hour or 0.0) > (cheapest.usd_per_hour or 0.0)


def test_a_looser_slo_or_a_smaller_load_never_takes_more() -> None:
    gpus = [size(question(QWEN, ("h200-sxm-141g",), tpot_s=tpot_s)).gpus for tpot_s in (0.02, 0.03, 0.05, 0.1)]
    assert gpus == sorted(gpus, reverse=True)
    gpus = [size(question(QWEN, ("h200-sxm-141g",), rate)).gpus for rate in (0.1, 1.0, 10.0, 100.0)]
    assert gpus == sorted(gpus)


def test_without_any_price_the_fewest_gpus_are_named_and_the_cards_that_have_none() -> None:
    answer = size(question(LLAMA, ("h20-96g",), prices={}))
    assert (answer.aim, answer.usd_per_hour, answer.unpriced) == ("fewest", None, ("h20-96g",))


def test_a_card_without_a_price_cannot_be_the_cheapest() -> None:
    answer = size(question(LLAMA, ("h20-96g", "l40s")))
    assert (answer.gpu, answer.unpriced) == ("l40s", ("h20-96g",))


def test_what_cannot_be_served_says_why_and_what_was_found_to_do() -> None:
    with pytest.raises(
        InfeasibleError, match=r"l4, bf16 tp8: TPOT is .* the SLO allows 2 ms.*do: --tpot ([\d.]+)"
    ) as told:
        size(question(LLAMA, ("l4",), tpot_s=0.002))
    tpot_s = float(str(told.value).split("--tpot ")[1].split(" ")[0])
    assert size(question(LLAMA, ("l4",), tpot_s=tpot_s)).gpus > 0
    with pytest.raises(InfeasibleError, match=r"needs .* GiB .*--precision (\w+) \(") as told:
        size(question(R1, ("rtx-4090",), precisions=("bf16",), tpot_s=0.5, ttft_s=60.0))
    precision = str(told.value).split("--precision ")[1].split(" ")[0]
    assert size(question(R1, ("rtx-4090",), precisions=(precision,), tpot_s=0.5, ttft_s=60.0)).gpus > 0
