"""The choice: how many replicas of which option run at each hour, so that what is asked is served at the least cost.

For each hour h, with whole numbers y[c, h] of replicas of option c:

* every model is served: sum of y[c, h] x requests_per_s[c, h] over its options >= demand[m, h]; a pair of prefill and
  decode counts as much as the scarcer of the two: z <= either side;
* no pool is oversold: for each size of a group, see `Problem.slots`;
* entitlements hold: a tenant uses the GPU time of its requests, and of the idle time of the replicas that serve it
  whatever part it has room for; use <= limit, and the sum over tenants of max(guarantee, use) <= fleet;
* starts s[c, h] >= y[c, h] - y[c, h - 1] cost what loading takes; midnight follows the last hour.

Three steps, each taken only when the one before was not enough:

1. each model by itself; when that fits together, nothing is cheaper;
2. all models together, without entitlements; when those hold all the same, nothing is cheaper;
3. all models and entitlements.

Whatever was chosen then loses the starts that do not pay, see `moves`.

When the fleet is too small, goodput decides who is served: first everybody within what it deserves, then all. What it
serves is then served at the least cost.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from time import monotonic

import numpy as np

from waterline.planner.moves import settled
from waterline.planner.problem import (
    SLACK,
    Choice,
    Counts,
    Figures,
    Problem,
    cost_of,
    entitled,
    merged,
    oversold,
    shares_of,
    undominated,
    with_nodes,
)
from waterline.planner.program import Indices, Outcome, Program, Term
from waterline.planner.rounding import rounded

GAP = 0.01
TIME_LIMIT_S = 60.0
ODDER = (2.0, 1.2)  # see `rounded`: tidy first, then near
MANY_COLUMNS = 10_000  # of a problem too large for the solver to branch in
FEW_COLUMNS = 1000  # of a problem small enough to be searched for more than the gap asks
WHATEVER_IT_COSTS = 1e9
NEVER = 0.0  # instead of a time until which the solver may branch: rounding has to do
BRANCHES = 1000  # as many as the solver may try: a limit that gives the same plan on a slow machine, as time would not


def choose(problem: Problem, *, gap: float = GAP, time_limit_s: float = TIME_LIMIT_S) -> Choice | None:
    """Return the cheapest choice that serves all that is asked; None when the fleet is too small for it.

    Args:
        problem: what could run and what is asked.
        gap: how much dearer than the best it may be, as a fraction.
        time_limit_s: after which the best choice found counts, with its gap; None then also means: none was found.
            0: rounding has to do, without a search.
    """
    until_s = monotonic() + time_limit_s if time_limit_s > 0 else NEVER
    small, period = merged(problem)
    kept = undominated(small, gap / 10)
    small = small.only(kept)
    if small.rates.size > MANY_COLUMNS:  # so much that models compete, and that rounding does
        choice = _together(small, 0.0, gap, until_s)
        return None if choice is None else _widened(problem, _settled(small, choice), kept, period)
    enough = gap if small.rates.size > FEW_COLUMNS else gap / 10
    choice = _each_alone(small, inf, until_s)
    if choice is not None and _fits(small, choice) and choice.gap > enough:
        choice = _each_alone(small, enough, until_s)
    if choice is not None and not _fits(small, choice):
        choice = _together(small, choice.bound, enough, until_s)
    return None if choice is None else _widened(problem, _settled(small, choice), kept, period)


def least_cost(problem: Problem) -> float:
    """Return what serving all costs in fractions of replicas, entitlements left out; infinite where it cannot be."""
    found = fractions(problem)
    return inf if found is None else found[1]


def fractions(problem: Problem) -> tuple[Figures, float] | None:
    """Return [option, hour] fractions of replicas that serve all, and their cost; entitlements are left out."""
    small, period = merged(problem)
    kept = undominated(small, GAP / 10)
    program, y = _serving_all(small.only(kept))
    found = program.solve(relaxed=True)
    if found is None:
        return None
    values = np.zeros((len(problem.options), len(period)))
    values[kept] = found.values[y][:, period]
    return values, found.objective


def saved_by_a_node(problem: Problem, full: Sequence[int]) -> dict[int, float]:
    """Return what one more node saves a day, in fractions of replicas, of each of the pools that are `full`.

    The cost is convex in the room on the pools, so that what the first node saves is at most what the duals of the
    linear program say, and nothing where they say so. Where fractions take long, the duals are the answer: of many
    nodes, one more is as good as a hair more. Elsewhere it is found by planning with that node.
    """
    small, _ = merged(problem)
    small = small.only(undominated(small, GAP / 10))
    program, _ = _serving_all(small)
    found = program.solve(relaxed=True) if full else None
    if found is None:
        return dict.fromkeys(full, 0.0)
    of_room = iter(
        found.duals.reshape(-1, len(small.hours)).sum(axis=1)
    )  # rows of room come first, see `_add_replicas`
    saved = {}
    for pool, (_, gpus) in enumerate(small.pools):
        saved[pool] = -float(sum(next(of_room) * (gpus // size) for size in small.slots(pool)))
    if small.rates.size <= MANY_COLUMNS:
        for pool in full:
            if saved[pool] > 0:
                saved[pool] = max(0.0, found.objective - least_cost(with_nodes(problem, pool, 1)))
    return {pool: max(0.0, saved[pool]) for pool in full}


LITTLE_LESS = (0.0, 1e-5, 1e-3)  # of what was found to be served, where the solver's tolerances contradict each other


def serve_most(problem: Problem, *, gap: float = GAP, time_limit_s: float = TIME_LIMIT_S) -> Choice:
    """Return the choice that serves the most value at every hour, and what that costs at the least.

    Nobody gets more than it deserves before everybody has what it asks, or what it deserves of it. Where options and
    hours are very many, replicas are rounded down from fractions, which loses little of much and takes seconds.
    """
    small, period = merged(problem)
    until_s = NEVER if small.rates.size > MANY_COLUMNS else monotonic() + time_limit_s
    kept = undominated(small, WHATEVER_IT_COSTS)
    served = np.zeros_like(small.demand)
    replicas = np.zeros((len(small.options), len(small.hours)), dtype=np.int64)
    gpus = np.zeros_like(small.demand)
    for hour in range(len(small.hours)):
        now = small.at([hour])
        few, most, theirs = _serve_most_at(now.only(kept), gap / 10, until_s)
        replicas[kept, hour] = few[:, 0]
        most = np.where(most > (1 - SLACK) * now.demand, now.demand, (1 - SLACK) * most)
        most[most < 10 * SLACK * now.demand] = 0.0  # within the solver's tolerance of nothing
        before = replicas[:, hour - 1] if hour else None
        for less in LITTLE_LESS:
            asked = replace(now, demand=most * (1 - less))
            if best := _cheapest_entitled(asked, gap, until_s, before):
                break
        else:  # what serves most, as it was found
            best = replace(_choice(asked, replicas[:, [hour]], 0.0), gpus=theirs)
        served[:, :, [hour]], replicas[:, [hour]], gpus[:, :, [hour]] = best.served, best.replicas, best.gpus
    asked = replace(small, demand=served)
    choice = _choice(asked, replicas, 0.0)
    choice = replace(choice, gpus=gpus, bound=min(choice.cost, least_cost(asked)))
    return _widened(problem, _settled(asked, choice), range(len(small.options)), period)


# --- One model after another, or all together -----------------------------------------------------------------------


def _each_alone(problem: Problem, gap: float, until_s: float) -> Choice | None:
    """Return what each model would choose had it the fleet to itself; None when one cannot even then be served."""
    replicas = np.zeros((len(problem.options), len(problem.hours)), dtype=np.int64)
    bound = 0.0
    for model in range(problem.models):
        mine = [index for index, option in enumerate(problem.options) if option.model == model]
        alone, period = merged(problem.of(model))
        found = _cheapest(alone, gap, until_s)
        if found is None:
            return None
        replicas[mine] = found[0][:, period]
        bound += found[1]
    return _choice(problem, replicas, bound)


def _together(problem: Problem, bound: float, gap: float, until_s: float) -> Choice | None:
    """Return the cheapest choice within the pools, and within the entitlements where those matter."""
    found = _cheapest(problem, gap, until_s)
    if found is None:
        return None
    choice = _choice(problem, found[0], max(bound, found[1]))
    if entitled(problem, choice.gpus):
        return choice
    entitled_choice = _cheapest_entitled(problem, gap, until_s)
    return entitled_choice and replace(entitled_choice, bound=max(choice.bound, entitled_choice.bound))


def _cheapest(problem: Problem, gap: float, until_s: float) -> tuple[Counts, float] | None:
    """Return [option, hour] replicas that serve all at the least cost, and its bound; entitlements are left out."""
    program, y = _serving_all(problem)
    found = _search(program, problem, y, gap, until_s)
    return None if found is None else (found[0], found[2])


def _serving_all(problem: Problem) -> tuple[Program, Indices]:
    program = Program()
    y = _add_replicas(program, problem)
    for model in range(problem.models):
        _add_coverage(program, problem, model, y)
    return program, y


def _cheapest_entitled(problem: Problem, gap: float, until_s: float, before: Counts | None = None) -> Choice | None:
    """Return the cheapest choice within pools and entitlements, after [option] replicas of the hour before."""
    program = Program()
    y = _add_replicas(program, problem, before=before)
    _, use, _ = _add_tenants(program, problem, y, at_least=problem.demand)
    found = _search(program, problem, y, gap, until_s)
    if found is None:
        return None
    replicas, values, bound = found
    choice = _choice(problem, replicas, bound)
    return choice if entitled(problem, choice.gpus) else replace(choice, gpus=values[use])


def _search(
    program: Program, problem: Problem, y: Indices, gap: float, until_s: float
) -> tuple[Counts, Figures, float] | None:
    """Return [option, hour] replicas, the values of all columns and a bound of the cost.

    Rounding is enough where there is much of everything; where there is little, the solver branches.
    """
    relaxed = program.solve(relaxed=True)
    if relaxed is None:
        return None
    best: Outcome | None = None
    bound = relaxed.objective
    for odd in ODDER:
        replicas = None if _near(best, bound, gap) else rounded(problem, relaxed.values[y], odd)
        whole = None if replicas is None else program.solve(relaxed=True, fixed=(y, replicas.astype(float)))
        if whole is not None and (best is None or whole.objective < best.objective):
            best = whole
    if not _near(best, bound, gap) and until_s > NEVER and (best is None or y.size <= MANY_COLUMNS):
        most_nodes = BRANCHES if gap else None
        found = program.solve(gap=gap, time_limit_s=max(1.0, until_s - monotonic()), most_nodes=most_nodes)
        if found is not None:
            bound = max(bound, found.bound)
            best = found if best is None or found.objective <= best.objective else best
    return None if best is None else (_whole(best.values[y]), best.values, bound)


def _near(found: Outcome | None, bound: float, gap: float) -> bool:
    return found is not None and found.objective - bound <= gap * found.objective + 1e-9


def _serve_most_at(problem: Problem, gap: float, until_s: float) -> tuple[Counts, Figures, Figures]:
    """Return what serves most at the one hour of a problem.

    [option, 1] replicas, and [model, tenant, 1] the requests per second and the GPUs of each tenant.
    """
    program = Program()
    y = _add_replicas(program, problem, free=True)
    served, use, busy = _add_tenants(program, problem, y, value=problem.value)
    tenants = problem.demand.shape[1]
    deserved = program.add_rows([busy], shape=(tenants,), upper=problem.deserved)
    found = _most(program, y, gap, until_s)
    got = (problem.value * found.values[served]).sum(axis=0)[:, 0]
    program.set_upper(deserved, inf)
    by_tenant = np.moveaxis(served[:, :, 0], 0, 1)
    program.add_rows([(by_tenant, problem.value[:, :, 0].T)], shape=(tenants,), lower=got * (1 - SLACK))
    found = _most(program, y, gap, until_s, found)
    replicas = _whole(found.values[y])
    found = program.solve(relaxed=True, fixed=(y, replicas.astype(float))) or found  # of whole replicas, to the digit
    return replicas, np.clip(found.values[served], 0.0, problem.demand), found.values[use]


def _most(program: Program, y: Indices, gap: float, until_s: float, known: Outcome | None = None) -> Outcome:
    """Return the solution that serves most: rounded down where that is near enough to the best, else by branching."""
    relaxed = program.solve(relaxed=True)
    assert relaxed is not None  # noqa: S101 - to serve nobody is a solution
    down = program.solve(relaxed=True, fixed=(y, np.floor(relaxed.values[y] + SLACK)))
    best = min((one for one in (known, down) if one is not None), key=lambda one: one.objective, default=None)
    if best is None or (until_s > NEVER and best.objective - relaxed.objective > gap * abs(best.objective)):
        most_nodes = BRANCHES if gap else None
        found = program.solve(gap=gap, time_limit_s=max(1.0, until_s - monotonic()), most_nodes=most_nodes)
        if found is not None and (best is None or found.objective < best.objective):
            best = found
    assert best is not None  # noqa: S101 - as above: the solver finds at least that
    return best


# --- Columns and rows -----------------------------------------------------------------------------------------------


def _add_replicas(program: Program, problem: Problem, *, free: bool = False, before: Counts | None = None) -> Indices:
    """Add [option, hour] replicas that keep within the pools; their cost and that of their starts, unless `free`.

    The hour before the first is the last, or has the replicas `before`.
    """
    shape = (len(problem.options), len(problem.hours))
    running = np.array([option.cost for option in problem.options])[:, None] * np.array(problem.hours)
    y = program.add_columns(shape, cost=0.0 if free else running, integer=True)
    for pool in range(len(problem.pools)):
        here = [index for index, option in enumerate(problem.options) if option.pool == pool]
        for size, slots in problem.slots(pool).items():
            taken = np.array([problem.options[index].slots(size) for index in here])
            program.add_rows([(y[here].T, taken)], shape=shape[1:], upper=slots)
    if not free and (before is not None or len(problem.hours) > 1):
        starting = np.array([option.start_cost for option in problem.options])[:, None]
        starts = program.add_columns(shape, cost=starting)
        if before is None:
            program.add_rows([(starts, 1.0), (y, -1.0), (np.roll(y, 1, axis=1), 1.0)], shape=shape, lower=0.0)
        else:
            program.add_rows([(starts, 1.0), (y, -1.0)], shape=shape, lower=-before[:, None])
    return y


def _add_coverage(program: Program, problem: Problem, model: int, y: Indices) -> None:
    """Ask for enough replicas at every hour; in units of what is asked, as the solver's tolerance is absolute."""
    asked = problem.total[model]
    scale = np.where(asked > 0, asked, 1.0)

    def offered(options: list[int]) -> Term:
        enough = np.minimum(problem.rates[options].T, scale[:, None])  # more than all is no use: a tighter bound
        return y[options].T, enough / scale[:, None]

    terms = [offered(problem.of_model(model, "both"))]
    for pair in problem.pairs(model):
        both = program.add_columns(asked.shape)
        for side in pair:
            program.add_rows([offered(side), (both, -1.0)], shape=asked.shape, lower=0.0)
        terms.append((both, 1.0))
    program.add_rows(terms, shape=asked.shape, lower=asked / scale)


def _add_tenants(
    program: Program, problem: Problem, y: Indices, *, at_least: Figures | float = 0.0, value: Figures | float = 0.0
) -> tuple[Indices, Indices, Term]:
    """Add what each tenant is served and uses, within its entitlements.

    Returns:
        [model, tenant, hour] requests per second, [model, tenant, hour] GPUs, and the GPU time of each tenant's
        requests in the one hour of the problem, as a term of rows by tenant.
    """
    models, tenants, hours = shape = problem.demand.shape
    served = program.add_columns(shape, lower=at_least, upper=problem.demand, cost=-np.asarray(value))
    nobodys = np.zeros(shape, dtype=bool)
    nobodys[:, -1] = problem.total <= 0
    use = program.add_columns(shape, upper=np.where((problem.demand > 0) | nobodys, inf, 0.0))
    busy = []
    for model in range(models):
        options = [index for index, option in enumerate(problem.options) if option.model == model]
        rates = problem.rates[options]
        gpu_time = np.divide(problem.gpus[options][:, None], rates, out=np.zeros_like(rates), where=rates > 0)
        most = np.where((problem.demand[model] > 0) & (rates[:, None] > 0), inf, 0.0)
        x = program.add_columns((len(options), tenants, hours), upper=most)  # requests per second by option
        by_hour = np.moveaxis(x, 1, 2)
        program.add_rows([(by_hour, 1.0), (y[options], -rates)], shape=rates.shape, upper=0.0)
        by_option = np.moveaxis(x, 0, 2)
        roles = np.array([problem.options[index].role for index in options])
        answers = roles != "decode"
        program.add_rows(
            [(by_option[:, :, answers], 1.0), (served[model], -1.0)], shape=(tenants, hours), lower=0, upper=0
        )
        for pair in problem.pairs(model):
            reads, writes = (by_option[:, :, np.isin(options, side)] for side in pair)
            program.add_rows([(reads, 1.0), (writes, -1.0)], shape=(tenants, hours), lower=0, upper=0)
        taken = np.broadcast_to(gpu_time.T[None], by_option.shape)
        program.add_rows([(by_option, taken), (use[model], -1.0)], shape=(tenants, hours), upper=0.0)
        program.add_rows(
            [(use[model].T, 1.0), (y[options].T, -problem.gpus[options])], shape=(hours,), lower=0, upper=0
        )
        busy.append((by_option.reshape(tenants, -1), taken.reshape(tenants, -1)))
    by_tenant = np.moveaxis(use, 0, 2)
    program.add_rows([(by_tenant, 1.0)], shape=(tenants, hours), upper=problem.limit[:, None])
    beyond = program.add_columns((tenants, hours))
    program.add_rows([(by_tenant, 1.0), (beyond, -1.0)], shape=(tenants, hours), upper=problem.guarantee[:, None])
    free = problem.fleet_gpus - problem.guarantee.sum()
    program.add_rows([(beyond.T, 1.0)], shape=(hours,), upper=free)
    columns, times = (np.concatenate(parts, axis=1) for parts in zip(*busy, strict=True))
    return served, use, (columns, times)


# --- Back to choices ------------------------------------------------------------------------------------------------


def _whole(values: Figures) -> Counts:
    return np.rint(values).astype(np.int64)


def _fits(problem: Problem, choice: Choice) -> bool:
    return not oversold(problem, choice.replicas).any() and entitled(problem, choice.gpus)


def _choice(problem: Problem, replicas: Counts, bound: float) -> Choice:
    return Choice(
        replicas=replicas,
        served=problem.demand,
        gpus=shares_of(problem, replicas, problem.demand),
        cost=cost_of(problem, replicas),
        bound=bound,
    )


def _settled(problem: Problem, choice: Choice) -> Choice:
    """Return the choice without the starts that do not pay, where entitlements hold all the same."""
    found = _choice(problem, settled(problem, choice.replicas), choice.bound)
    return found if found.cost < choice.cost and _fits(problem, found) else choice


def _widened(problem: Problem, choice: Choice, kept: Sequence[int], period: list[int]) -> Choice:
    """Return the choice among all options and for all hours."""
    replicas = np.zeros((len(problem.options), len(period)), dtype=np.int64)
    replicas[list(kept)] = choice.replicas[:, period]
    return replace(choice, replicas=replicas, served=choice.served[:, :, period], gpus=choice.gpus[:, :, period])
