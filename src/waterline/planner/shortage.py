"""What a fleet that is too small does not serve, why, and what would help.

Each remedy that is offered was planned with, and does.
"""

from collections.abc import Callable, Iterator
from functools import partial
from time import process_time

import numpy as np
from msgspec.structs import replace

from waterline.errors import InfeasibleError
from waterline.fleet import Fleet, Model
from waterline.llm import PRECISIONS
from waterline.planner.milp import MANY_COLUMNS, TIME_LIMIT_S, choose
from waterline.planner.offers import Offers, offers_of
from waterline.planner.problem import SLACK, Choice, Figures, Problem, with_limits, with_nodes
from waterline.workload import Slo

ENOUGH = 1.0  # of a gap: whether anything does, not what is cheapest
MOST_TIMES_LARGER = 64  # a pool; beyond that it is another fleet
SLOWER = (1.5, 2.0, 4.0)
TIME_S = 20.0  # of this process, to look for remedies; a fleet of thousands of cards asks a second for each try


def warnings(offers: Offers, choice: Choice) -> tuple[str, ...]:
    """Return a sentence for each model that is not wholly served, and one of what would help."""
    missing = np.maximum(0.0, offers.problem.demand - choice.served)
    missing[missing < 1e-4 * offers.problem.demand] = 0.0
    short = [model for model in range(len(offers.fleet.models)) if missing[model].any()]
    said = [_not_served(offers, choice, missing, model) for model in short]
    tenants = [tenant for tenant in range(missing.shape[1] - 1) if missing[:, tenant].any()]
    found: list[str] = []
    until_s, untried = process_time() + TIME_S, ""
    for what, tried in remedies(offers, short, tenants):
        if process_time() > until_s:
            untried = f" Not tried, as {TIME_S:.0f} s of computing had passed: {what}, and what comes after it."
            break
        found += tried()
    if found:
        return (*said, "What would do: " + "; or ".join(found) + "." + untried)
    return (*said, f"No single change was found that would do: lower the demand, or plan a larger fleet.{untried}")


def _not_served(offers: Offers, choice: Choice, missing: Figures, model: int) -> str:
    name = offers.fleet.models[model].name
    by_hour = missing[model].sum(axis=0)
    hour = int(np.argmax(by_hour))
    if missing[model, -1].any():
        return f"model '{name}' has no replica: nobody asks anything of it, and there is no room left."
    asked = offers.asked[model, :, hour]
    served = np.minimum(asked, choice.served[model, :, hour] / offers.gpu_time[model, :, hour])
    who = ", ".join(
        f"{tenant.name} {served[index]:.3g} of {asked[index]:.3g}"
        for index, tenant in enumerate(offers.fleet.tenants)
        if missing[model, index, hour] > 0
    )
    hours = f"{int((by_hour > 0).sum())} hours, most at {hour}:00"
    why = _why(offers, choice, model, hour)
    return f"model '{name}' is not wholly served at {hours}: requests/s {who}. {why}"


def _why(offers: Offers, choice: Choice, model: int, hour: int) -> str:
    """Name the limit or the guarantees that bind, or else the pools, and by how many GPUs it is too little."""
    problem = offers.problem
    use = choice.gpus[:, :, hour].sum(axis=0)
    missing = problem.demand[model, :, hour] - choice.served[model, :, hour]
    per_request = min(
        (
            option.gpus / option.requests_per_s[hour]
            for option in problem.options
            if option.model == model and option.role == "both" and option.requests_per_s[hour] > 0
        ),
        default=0.0,
    )
    for index, tenant in enumerate(offers.fleet.tenants):
        needed = missing[index] * per_request
        idle = np.maximum(0.0, problem.guarantee - use)
        idle[index] = 0.0
        left = problem.fleet_gpus - float(np.delete(np.maximum(problem.guarantee, use), index).sum())
        if missing[index] > 0 and idle.sum() > SLACK and left < problem.limit[index] and use[index] + needed > left:
            holders = " and ".join(
                f"'{other.name}' ({idle[place]:.1f})"
                for place, other in enumerate(offers.fleet.tenants)
                if idle[place] > SLACK
            )
            return (
                f"Tenant '{tenant.name}' would need about {use[index] + needed:.1f} GPUs, {left:.1f} are left beside "
                f"what is guaranteed to others and lies idle: {holders}."
            )
        bounded = problem.limit[index] < problem.fleet_gpus - SLACK
        if missing[index] > 0 and bounded and use[index] + max(1.0, needed) > problem.limit[index] + SLACK:
            return (
                f"Tenant '{tenant.name}' would need about {use[index] + needed:.1f} GPUs, its limit is "
                f"{problem.limit[index]:.1f}."
            )
    pools = sorted({offers.fleet.pools[option.pool].name for option in problem.options if option.model == model})
    named = ", ".join(f"'{pool}'" for pool in pools)
    return f"It runs on {named}, which lack about {float(missing.sum()) * per_request:.1f} GPUs."


def remedies(offers: Offers, short: list[int], tenants: list[int]) -> Iterator[tuple[str, Callable[[], Iterator[str]]]]:
    """Yield kinds of change to one part of the fleet file, the quickest to try first, and what tries them.

    Each try yields what makes the fleet large enough, or nothing.
    """
    fleet = offers.fleet
    if any(offers.problem.limit[tenant] < offers.problem.fleet_gpus for tenant in tenants):
        yield "a higher limit", partial(_higher_limit, offers, tenants)
    for pool in range(len(fleet.pools)):
        yield f"more nodes of '{fleet.pools[pool].name}'", partial(_more_nodes, offers, pool)
    for model in short:
        yield f"other precisions of '{fleet.models[model].name}'", partial(_other_precisions, fleet, model)
    yield "a looser slo", partial(_slower, fleet, short)


def _more_nodes(offers: Offers, pool: int) -> Iterator[str]:
    if nodes := fewest_nodes(offers.problem, pool):
        yield f"{nodes} more node{'s' * (nodes > 1)} of '{offers.fleet.pools[pool].name}'"


def _higher_limit(offers: Offers, tenants: list[int]) -> Iterator[str]:
    if limit := lowest_limit(offers.problem, tenants):
        names = " and ".join(f"'{offers.fleet.tenants[tenant].name}'" for tenant in tenants)
        yield f"raise the limit of {names} to {share_text(limit, offers.fleet.gpus)}"


def fewest_nodes(problem: Problem, pool: int) -> int | None:
    """Return how many more nodes of a pool would do; None when no number up to `MOST_TIMES_LARGER` does."""
    return _fewest(lambda more: does(with_nodes(problem, pool, more)), MOST_TIMES_LARGER * problem.pools[pool][0])


def lowest_limit(problem: Problem, tenants: list[int]) -> float | None:
    """Return the GPUs to which the limits of these tenants must rise, in hundredths of the fleet; None: no use."""
    step = problem.fleet_gpus / 100
    lowest = int(min((problem.limit[tenant] / step for tenant in tenants), default=100))
    if lowest >= 100:
        return None
    more = _fewest(lambda more: does(with_limits(problem, tenants, (lowest + more) * step)), 100 - lowest)
    return None if more is None else (lowest + more) * step


def share_text(gpus: float, fleet_gpus: int) -> str:
    """Say GPUs as a fraction of the fleet, in hundredths, rounded up; what is whole hundredths stays so."""
    return f"{np.ceil(100 * gpus / fleet_gpus - SLACK) / 100:.2f}"


def does(problem: Problem) -> bool:
    """Return whether a fleet serves all that is asked of it; of a large one, whether rounding finds that it does."""
    large = problem.rates.size > MANY_COLUMNS
    return choose(problem, gap=ENOUGH, time_limit_s=0.0 if large else TIME_LIMIT_S) is not None


def _fewest(enough: Callable[[int], bool], most: int) -> int | None:
    """Return the smallest number from 1 to `most` that is enough, as every larger one is; None: none is."""
    high = 1
    while not enough(high):
        if high == most:
            return None
        high = min(most, 2 * high)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _other_precisions(fleet: Fleet, model: int) -> Iterator[str]:
    """Yield the precision with most bits that would do, of those the owner does not accept yet."""
    mine = fleet.models[model]
    bits = min(PRECISIONS[name].bits for name in mine.precisions)
    others = [
        name
        for name, form in PRECISIONS.items()
        if form.gguf == (mine.engine == "llamacpp") and name not in mine.precisions and form.bits <= bits
    ]
    for name in sorted(others, key=lambda name: -PRECISIONS[name].bits):
        models = list(fleet.models)
        models[model] = replace(mine, precisions=(*mine.precisions, name))
        if _replanned(fleet, models):
            yield f"add \"{name}\" to the precisions of '{mine.name}'"
            return


def _slower(fleet: Fleet, short: list[int]) -> Iterator[str]:
    for times in SLOWER:
        models, said = list(fleet.models), []
        for index in short:
            slo = fleet.slos[models[index].name]
            slow = Slo(ttft_s=slo.ttft_s * times, tpot_s=slo.tpot_s * times, fraction=slo.fraction)
            said.append(f"'{models[index].name}' to ttft_s = {slow.ttft_s:.3g}, tpot_s = {slow.tpot_s:.3g}")
            models[index] = replace(models[index], slo=slow)
        if _replanned(fleet, models):
            yield "loosen the slo of " + ", and of ".join(said)
            return


def _replanned(fleet: Fleet, models: list[Model]) -> bool:
    """Return whether the fleet does with these models instead."""
    try:
        return does(offers_of(replace(fleet, models=tuple(models))).problem)
    except InfeasibleError:
        return False
