"""Why a plan is as it is, and what would change it."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from waterline.fleet import Fleet
from waterline.hardware import Node
from waterline.llm import PRECISIONS
from waterline.plan import TenantPlan
from waterline.planner.candidates import Candidate, Rejection, Work, expected, layouts, price
from waterline.planner.needs import Need
from waterline.units import usd_text
from waterline.workload import Slo


def why(options: Sequence[tuple[float, str]], chosen: Sequence[tuple[int, int]]) -> str:
    """Say what a choice won against.

    Args:
        options: dollars an hour and name of each option, the cheapest first.
        chosen: index into `options` and replicas of what was taken.
    """
    if len(chosen) > 1:
        return "no single layout has the room: " + ", ".join(
            f"{count} x {options[index][1]}" for index, count in chosen
        )
    index = chosen[0][0]
    reason = f"cheapest of {len(options)} layouts that do" if index == 0 else "cheapest that still has room"
    if index + 1 == len(options):
        return reason if len(options) > 1 else "the only layout that does"
    usd, runner_up = options[index + 1]
    return f"{reason}; next: {runner_up} at {usd_text(usd)}/h"


def why_not(need: Need, fleet: Fleet, rejections: Sequence[tuple[str, Rejection]]) -> str:
    """Say why a model runs on no pool: the nearest miss on each, then remedies that were tried and work."""
    nearest: dict[str, Rejection] = {}
    for pool, rejection in sorted(rejections, key=lambda pair: pair[1].shortfall):
        nearest.setdefault(pool, rejection)
    misses = "; ".join(f"on '{pool}' {miss.precision} {miss.layout}: {miss.reason}" for pool, miss in nearest.items())
    found = _remedies(need, fleet)
    advice = "What would do: " + "; or ".join(found) if found else "It needs cards with more memory, or more nodes"
    return f"model '{need.model.name}' runs on none of the pools: {misses}. {advice}."


def why_not_enough(need: Need, chosen: Sequence[tuple[str, int]], missing_requests_per_s: float) -> str:
    have = ", ".join(f"{count} x {option}" for option, count in chosen) or "no room for a single replica"
    return (
        f"model '{need.model.name}' needs {need.requests_per_s:.3g} requests/s at its peak; what is left of the fleet "
        f"({have}) falls short by {missing_requests_per_s:.3g}. Add nodes, lower its demand, or loosen its slo."
    )


def why_over_limit(plan: TenantPlan, fleet_gpus: int) -> str:
    return (
        f"tenant '{plan.tenant}' needs {plan.gpus:.1f} GPUs at its peak, its limit is {plan.limit_gpus:.3g} of "
        f"{fleet_gpus}. Raise its limit to {ceil(100 * plan.gpus / fleet_gpus) / 100:.2f} or more, or lower its demand."
    )


def _remedies(need: Need, fleet: Fleet) -> list[str]:
    """Return changes to one line of the fleet file, each checked to make the model run somewhere."""
    found = []
    others = [name for name, form in PRECISIONS.items() if not form.gguf and name not in need.model.precisions]
    for precision in sorted(others, key=lambda name: -PRECISIONS[name].bits):
        if runs := _first(need, fleet, need.work, (precision,)):
            found.append(f"add \"{precision}\" to its precisions ({runs[1].layout} on '{runs[0]}')")
            break
    patient = replace(need.work, slo=Slo(ttft_s=1e9, tpot_s=1e9, fraction=need.work.slo.fraction))
    if runs := _first(need, fleet, patient, need.model.precisions):
        alone = expected(runs[1], 0.0)
        slo = f"ttft_s = {alone.ttft_s * 1.2:.2g}, tpot_s = {alone.tpot_s * 1.2:.2g}"
        found.append(f"loosen its slo to {slo} ({runs[1].layout} on '{runs[0]}')")
    return found


def _first(need: Need, fleet: Fleet, work: Work, precisions: Sequence[str]) -> tuple[str, Candidate] | None:
    """Return a pool and the fastest candidate on it."""
    llm = fleet.llm_of(need.model)
    runs = [
        (pool.name, priced)
        for pool in fleet.pools
        for node in [Node(gpu=fleet.gpu_of(pool), gpus=pool.gpus_per_node)]
        for precision in precisions
        for layout in layouts(llm, node, pool.nodes)
        if isinstance(priced := price(llm, node, layout, precision, need.model.engine, work), Candidate)
    ]
    return min(runs, key=lambda run: run[1].step.step_ps(0, 0, 1, work.lengths.context_tokens), default=None)
