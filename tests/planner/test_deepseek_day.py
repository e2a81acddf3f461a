"""DeepSeek's day as they published it: 226.75 nodes in the mean, 278 at the peak, 87,072 USD.

`benchmarks/deepseek_day.py` prints all of it, hour by hour.
"""

from pathlib import Path

import pytest
from msgspec.structs import replace

import waterline
from waterline.plan import Plan

FLEET = waterline.load_fleet(Path(__file__).parents[2] / "examples" / "deepseek-day.toml")
NODE = 8


def nodes(plan: Plan) -> list[float]:
    return [hour.gpus / NODE for hour in plan.hours]


def test_given_their_throughput_a_plan_has_their_nodes() -> None:
    plan = waterline.make_plan(FLEET)
    assert sum(nodes(plan)) / 24 == pytest.approx(226.75, rel=0.05)
    assert max(nodes(plan)) == pytest.approx(278, rel=0.15)
    assert sum(hour.usd for hour in plan.hours) == pytest.approx(87_072, rel=0.05)


def test_our_own_cost_model_splits_prompts_from_answers_and_comes_near_their_throughput() -> None:
    plan = waterline.make_plan(replace(FLEET, models=tuple(replace(model, measured=()) for model in FLEET.models)))
    demand, at_peak = FLEET.demand[0], plan.replicas_at(plan.busiest_hour)
    assert {replica.role for replica in at_peak} == {"prefill", "decode"}
    for role, tokens, theirs in (("prefill", demand.prompt_tokens, 73_700), ("decode", demand.output_tokens, 14_800)):
        replicas = [replica for replica in at_peak if replica.role == role]
        gpus = sum(replica.layout.gpus for replica in replicas)
        tokens_per_s = sum(replica.requests_per_s for replica in replicas) * tokens / gpus * NODE
        assert tokens_per_s == pytest.approx(theirs, rel=0.15)
    assert sum(nodes(plan)) / 24 == pytest.approx(226.75, rel=0.1)
