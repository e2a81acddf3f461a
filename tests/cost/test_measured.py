"""What an owner has measured is believed wherever the steps of a replica are priced."""

from msgspec.structs import replace

from examples import small_plan
from waterline.cost import replica_step_cost
from waterline.fleet import Fleet, Measured


def measured_on(gpu: str) -> Fleet:
    fleet = small_plan().fleet
    rates = Measured(gpu=gpu, gpus=1, prompt_tokens_per_s=10_000.0, output_tokens_per_s=500.0)
    return replace(fleet, models=(replace(fleet.models[0], measured=(rates,)),))


def test_a_measured_replica_reads_and_writes_at_its_rates() -> None:
    plan = small_plan()
    step = replica_step_cost(measured_on(plan.fleet.pools[0].gpu), plan.replicas[0])
    assert step.step_ps(10_000, 0, 0, 0) == 10**12
    assert step.step_ps(0, 0, 50, 12_345) == 10**11
    assert step.step_ps(1000, 500_500, 50, 0) == 2 * 10**11


def test_what_was_measured_on_other_cards_changes_nothing() -> None:
    plan = small_plan()
    assert replica_step_cost(measured_on("b200-sxm-180g"), plan.replicas[0]) == replica_step_cost(
        plan.fleet, plan.replicas[0]
    )
