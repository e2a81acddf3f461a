"""Planning problems small enough to be solved by trying everything, and that trying."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice, product
from random import Random

import numpy as np

from waterline.planner.problem import Option, Problem

MOST_STATES = 60


def small_problem(seed: int, *, shared: bool = False) -> Problem:
    """Draw a fleet of a few GPUs; each model has its own tenant, or two tenants share all models."""
    dice = Random(seed)
    pools = tuple((dice.choice([1, 2, 2]), dice.choice([2, 2, 3, 4])) for _ in range(dice.choice([1, 2])))
    models, hours = dice.choice([1, 2, 2]), dice.choice([1, 2, 3])
    options = [option for model in range(models) for option in _options(dice, model, pools, hours)]
    tenants = 2 if shared else models
    demand = np.zeros((models, tenants + 1, hours))
    for model in range(models):
        for tenant in range(tenants) if shared else [model]:
            demand[model, tenant] = [dice.choice([0, 0.5, 1, 1.5, 2]) for _ in range(hours)]
        if not demand[model].any():
            demand[model, -1] = 1.0
    fleet = sum(nodes * gpus for nodes, gpus in pools)
    guarantee = [dice.choice([0, 0, 0.25, 0.5]) * fleet / tenants for _ in range(tenants)]
    deserved = [max(least, dice.choice([0.5, 1.0]) * fleet / tenants) for least in guarantee]
    limit = [max(share, dice.choice([0.5, 1, 1, 1]) * fleet) for share in deserved]
    return Problem(
        pools=pools,
        options=tuple(options),
        demand=demand,
        value=np.where(np.arange(tenants + 1) < tenants, 1.0, 1e-6)[None, :, None] * np.ones_like(demand),
        guarantee=np.array([*guarantee, 0.0]),
        deserved=np.array([*deserved, np.inf]),
        limit=np.array([*limit, np.inf]),
        hours=tuple(dice.choice([1, 2, 8]) for _ in range(hours)),
    )


def _options(dice: Random, model: int, pools: Sequence[tuple[int, int]], hours: int) -> Iterator[Option]:
    for _ in range(dice.choice([1, 1, 2])):
        pool = dice.randrange(len(pools))
        nodes, gpus = pools[pool]
        sizes = [(size,) for size in (1, 2, 4) if size <= gpus] + [(gpus,) * 2] * (nodes > 1)
        split = dice.choice([False, False, False, True])
        for role in ("prefill", "decode") if split else ("both",):
            groups = dice.choice(sizes)
            rates = [dice.choice([1.0, 1.0, 1.5]) * sum(groups) ** dice.choice([0.8, 1.0, 1.2]) for _ in range(hours)]
            yield Option(
                model=model,
                pool=pool,
                groups=groups,
                requests_per_s=tuple(rates),
                cost=sum(groups) * dice.choice([0.5, 1.0, 1.5]),
                start_cost=sum(groups) * dice.choice([0.0, 0.1, 1.0]),
                role=role,
                partner="" if role == "both" else "pair",
            )


def cheapest_by_trying(problem: Problem) -> float | None:
    """Return the cost of the cheapest choice that serves all; each model must have its own tenant."""
    states = []
    for hour in range(len(problem.hours)):
        found = list(islice(_states(problem, hour), MOST_STATES + 1))
        if len(found) > MOST_STATES:
            raise ValueError(f"more than {MOST_STATES} states at an hour: too many to try all of them")
        states.append(np.array(found).reshape(-1, len(problem.options)))
    if not all(len(state) for state in states):
        return None
    costs = np.array([option.cost for option in problem.options])
    starts = np.array([option.start_cost for option in problem.options])
    path = np.where(np.eye(len(states[0]), dtype=bool), 0.0, np.inf)  # [first hour, hour so far]
    for hour, now in enumerate(states):
        path = path + now @ costs * problem.hours[hour]
        then = states[(hour + 1) % len(states)]
        moves = np.maximum(0, then[None] - now[:, None]) @ starts
        path = np.min(path[:, :, None] + moves[None], axis=1)
    return float(np.diagonal(path).min())


def _states(problem: Problem, hour: int) -> Iterator[tuple[int, ...]]:
    """Yield what can run at one hour and serves all."""
    most = [problem.pools[one.pool][0] * problem.pools[one.pool][1] // one.gpus for one in problem.options]
    for counts in product(*(range(count + 1) for count in most)):
        if _serves(problem, hour, counts) and _may(problem, hour, counts) and packs(problem, counts):
            yield counts


def _serves(problem: Problem, hour: int, counts: Sequence[int]) -> bool:
    for model in range(problem.models):
        offered = {"both": 0.0, "prefill": 0.0, "decode": 0.0}
        for option, count in zip(problem.options, counts, strict=True):
            if option.model == model:
                offered[option.role] += count * option.requests_per_s[hour]
        if offered["both"] + min(offered["prefill"], offered["decode"]) < problem.demand[model, :, hour].sum() - 1e-6:
            return False
    return True


def _may(problem: Problem, hour: int, counts: Sequence[int]) -> bool:
    use = np.zeros(len(problem.limit))
    for option, count in zip(problem.options, counts, strict=True):
        asked = problem.demand[option.model, :, hour]
        use[int(np.argmax(asked)) if asked.any() else -1] += count * option.gpus
    fleet = sum(nodes * gpus for nodes, gpus in problem.pools)
    return bool((use <= problem.limit + 1e-9).all() and np.maximum(use, problem.guarantee).sum() <= fleet + 1e-9)


@cache
def _fits(free: tuple[int, ...], groups: tuple[int, ...]) -> bool:
    if not groups:
        return True
    for node in range(len(free)):
        if free[node] >= groups[0] and (node == 0 or free[node] != free[node - 1]):
            left = sorted((*free[:node], free[node] - groups[0], *free[node + 1 :]))
            if _fits(tuple(left), groups[1:]):
                return True
    return False


def packs(problem: Problem, counts: Sequence[int]) -> bool:
    """Return whether replicas fit into the nodes, by trying to place every group everywhere."""
    for pool, (nodes, gpus) in enumerate(problem.pools):
        groups = [
            group
            for option, count in zip(problem.options, counts, strict=True)
            if option.pool == pool
            for group in option.groups * count
        ]
        if not _fits((gpus,) * nodes, tuple(sorted(groups, reverse=True))):
            return False
    return True


def without_entitlements(problem: Problem) -> Problem:
    tenants = len(problem.limit)
    return replace(problem, guarantee=np.zeros(tenants), limit=np.full(tenants, np.inf))
