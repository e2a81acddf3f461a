"""Why a model runs on none of the pools, and what would change that."""

from collections.abc import Sequence
from dataclasses import replace

from waterline.fleet import Fleet
from waterline.hardware import Node
from waterline.llm import PRECISIONS
from waterline.planner.candidates import Candidate, Rejection, Work, expected, layouts, price
from waterline.planner.needs import Need
from waterline.workload import Slo


def why_not(need: Need, fleet: Fleet, rejections: Sequence[tuple[str, Rejection]]) -> str:
    """Say why a model runs on no pool: the nearest miss on each, then remedies that were tried and work."""
    nearest: dict[str, Rejection] = {}
    for pool, rejection in sorted(rejections, key=lambda pair: pair[1].shortfall):
        nearest.setdefault(pool, rejection)
    misses = "; ".join(f"on '{pool}' {miss.precision} {miss.layout}: {miss.reason}" for pool, miss in nearest.items())
    found = _remedies(need, fleet)
    late = any(miss.binding in {"ttft", "tpot"} for miss in nearest.values())
    nothing = "Loosen its slo, the fraction too" if late else "It needs cards with more memory, or more nodes"
    advice = "What would do: " + "; or ".join(found) if found else nothing
    return f"model '{need.model.name}' runs on none of the pools: {misses}. {advice}."


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
