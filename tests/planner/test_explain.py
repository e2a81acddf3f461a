from pathlib import Path

from msgspec.structs import replace

from waterline.fleet import load_fleet
from waterline.planner import make_plan

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_choice_names_what_it_won_against_and_what_more_would_be_worth() -> None:
    mixed = load_fleet(EXAMPLES / "mixed.toml")
    plan = make_plan(mixed)
    r1, coder, small = (model.reason for model in plan.models)
    assert "cheapest of" in r1
    assert "because others need 'mi300x' more: alone it would take fp8 tp1 on mi300x" in coder
    assert all("; next: " in reason for reason in (r1, coder, small))
    assert [pool.pool for pool in plan.pools] == ["h100", "mi300x", "gaming"]
    assert all(pool.worth_usd_per_gpu_hour == 0.0 for pool in plan.pools if pool.gpus < 8)


def test_a_full_pool_is_named_and_more_of_it_is_worth_something() -> None:
    """The small model would like the node of MI300X, which the large one fills."""
    mixed = load_fleet(EXAMPLES / "mixed.toml")
    demand = tuple(
        replace(one, requests_per_s=tuple(20 * rate for rate in one.hourly_requests_per_s))
        if one.model == "small"
        else one
        for one in mixed.demand
    )
    plan = make_plan(replace(mixed, demand=demand))
    assert not plan.warnings
    (small,) = [model for model in plan.models if model.model == "small"]
    worth = {pool.pool: pool.worth_usd_per_gpu_hour for pool in plan.pools}
    assert "because others need 'mi300x' more" in small.reason
    assert worth["mi300x"] > 0
    assert small.slo_hour_usd > 0
