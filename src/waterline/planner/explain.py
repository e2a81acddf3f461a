"""Why a plan is as it is: what each choice won against, what holds it back, what more of something would be worth.

Everything here is found by planning again with one thing changed.
"""

from dataclasses import dataclass, replace

import numpy as np

from waterline.fleet import HOURS
from waterline.plan import Limit, PoolPlan
from waterline.planner.candidates import Candidate, price_all
from waterline.planner.milp import choose, fractions, saved_by_a_node
from waterline.planner.offers import Offers
from waterline.planner.problem import Choice, Counts, Figures, Problem, cost_of, rather_whole
from waterline.units import usd_text
from waterline.workload import Slo

NEAR = 0.01  # a choice that costs this fraction more than another costs as much
ANY_TIME_S = 1e9
MANY = 20  # replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a model runs as it does."""

    limited_by: Limit
    text: str
    slo_hour_usd: float  # saved a day by not holding the SLO at the busiest hour


def reasons(offers: Offers, choice: Choice) -> list[Reason]:
    """Return a reason for each model of the fleet."""
    return [_reason(offers, choice, model) for model in range(len(offers.fleet.models))]


def _reason(offers: Offers, choice: Choice, model: int) -> Reason:
    mine = [index for index, option in enumerate(offers.problem.options) if option.model == model]
    counts = choice.replicas[mine]
    used = [position for position in range(len(mine)) if counts[position].any()]
    if not used:
        return Reason(limited_by=offers.offers[mine[0]].any.limited_by, text="the fleet is too small", slo_hour_usd=0.0)
    alone = replace(offers.problem, demand=choice.served).of(model)
    used.sort(key=lambda position: -(alone.gpus[position] * counts[position]).sum())
    names = [str(offers.offers[index]) for index in mine]
    parts = [_against_all(offers, alone, names, counts), _against_the_next(offers, alone, names, used)]
    return Reason(
        limited_by=offers.offers[mine[used[0]]].any.limited_by,
        text="; ".join(part for part in parts if part),
        slo_hour_usd=_slo_hour_usd(offers, alone, model, mine, counts),
    )


def _against_all(offers: Offers, alone: Problem, names: list[str], counts: Counts) -> str:
    """Say what was taken, and what keeps it from being what the model would take had it the fleet to itself."""
    used = np.flatnonzero(counts.any(axis=1)).tolist()
    used.sort(key=lambda position: -(alone.gpus[position] * counts[position]).sum())
    best = _cheapest(alone)
    taken = ", ".join(names[position] for position in used[:3]) + (f" and {len(used) - 3} more" if used[3:] else "")
    tied = rather_whole(alone)
    if best is None or cost_of(tied, counts) <= cost_of(tied, best) * (1 + NEAR) + 1e-9:
        if len(names) == 1:
            return "the only layout that does"
        if len(used) == 1:
            return f"cheapest of {len(names)} layouts that do"
        return f"cheapest of {len(names)} layouts that do: {taken}"
    wanted = _main(alone, best)
    there = offers.fleet.pools[alone.options[wanted].pool].name
    return (
        f"{taken}, because others need '{there}' more: alone it would take {names[wanted]}, "
        f"{_cost_text(offers, cost_of(alone, counts) - cost_of(alone, best))} cheaper"
    )


def _against_the_next(offers: Offers, alone: Problem, names: list[str], used: list[int]) -> str:
    """Say what the model would run as without what it does, and what that would cost."""
    others = [position for position in range(len(names)) if position not in used]
    rest = alone.only(others)
    second = _cheapest(rest) if others else None
    if second is None:
        return "nothing else would do" if others else ""
    return f"next: {names[others[_main(rest, second)]]} at {_cost_text(offers, cost_of(rest, second))}"


def _cheapest(alone: Problem) -> Figures | None:
    """Return [option, hour] replicas of one model by itself; of very many, fractions tell as much."""
    tied = rather_whole(alone)
    if alone.total.max() > MANY * np.median(alone.rates[alone.rates > 0]):
        found = fractions(tied)
        return None if found is None else found[0]
    choice = choose(tied, gap=NEAR)
    return None if choice is None else choice.replicas.astype(float)


def _main(problem: Problem, replicas: Figures) -> int:
    return int(np.argmax((problem.gpus[:, None] * replicas).sum(axis=1)))


def _cost_text(offers: Offers, cost: float) -> str:
    if offers.fleet.objective == "energy":
        return f"{cost / HOURS / 1000:.3g} kW"
    return f"{usd_text(cost / HOURS)}/h"


def _slo_hour_usd(offers: Offers, alone: Problem, model: int, mine: list[int], counts: Counts) -> float:
    """Return what a model that may be slow at its busiest hour saves at that hour, with what it runs then."""
    hour = int(np.argmax(alone.total[0]))
    used = [position for position in range(len(mine)) if counts[position, hour]]
    need = offers.needs[model][hour]
    if not need.asked or offers.fleet.objective == "energy":
        return 0.0
    patient = replace(need.work, slo=Slo(ttft_s=ANY_TIME_S, tpot_s=ANY_TIME_S, fraction=need.work.slo.fraction))
    (answers,) = price_all([offers.offers[mine[position]].shape for position in used], [patient])
    options = []
    for position, answer in zip(used, answers, strict=True):
        rates = list(alone.options[position].requests_per_s)
        rates[hour] = max(rates[hour], answer.requests_per_s if isinstance(answer, Candidate) else 0.0)
        options.append(replace(alone.options[position], requests_per_s=tuple(rates)))
    now = alone.at([hour])
    before, after = _cheapest(now.only(used)), _cheapest(replace(alone, options=tuple(options)).at([hour]))
    return (
        0.0
        if before is None or after is None
        else max(0.0, cost_of(now.only(used), before) - cost_of(now.only(used), after))
    )


def pool_plans(offers: Offers, choice: Choice) -> tuple[PoolPlan, ...]:
    """Return what is used of each pool, and what one more GPU of it would save, bought as whole nodes.

    Savings are those of fractions of replicas: what a long row of such nodes saves each.
    """
    problem = replace(offers.problem, demand=choice.served)
    full = [pool for pool in range(len(problem.pools)) if _full(problem, pool, choice.replicas)]
    saved = saved_by_a_node(problem, full) if full and offers.fleet.objective != "energy" else {}
    plans = []
    for index, pool in enumerate(offers.fleet.pools):
        here = [i for i, option in enumerate(problem.options) if option.pool == index]
        used = int((problem.gpus[here, None] * choice.replicas[here]).sum(axis=0).max(initial=0))
        worth = saved.get(index, 0.0) / HOURS / pool.gpus_per_node
        plans.append(PoolPlan(pool=pool.name, gpus=used, worth_usd_per_gpu_hour=worth))
    return tuple(plans)


def _full(problem: Problem, pool: int, replicas: Counts) -> bool:
    """Return whether there is no room on a pool, at some hour, for a group as large as the largest that is there."""
    here = [i for i, option in enumerate(problem.options) if option.pool == pool and replicas[i].any()]
    largest = max((group for i in here for group in problem.options[i].groups), default=0)
    if not largest:
        return False
    nodes, gpus = problem.pools[pool]
    taken = np.array([problem.options[i].slots(largest) for i in here]) @ replicas[here]
    small = problem.gpus[here] @ replicas[here]
    return bool((taken >= nodes * (gpus // largest)).any() or (small > nodes * gpus - largest).any())
