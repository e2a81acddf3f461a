"""The planning problem in plain numbers: what could run, what is asked, who may use how much, hour by hour.

Nothing here knows a card or a model. `milp` chooses, and whoever can add up can check the choice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from waterline.plan import Role

Figures = NDArray[np.float64]
Counts = NDArray[np.int64]
SIMPLER = 0.03  # of the cost: what a model run by one kind of replica may cost more than by two
SLACK = 1e-6  # a plan may be short of a rate, or over a share, by this fraction: the solver's own tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to run a replica of one model on one pool."""

    model: int
    pool: int
    groups: tuple[int, ...]  # GPUs of each part that must stay inside a node: a power of two, or the whole node
    requests_per_s: tuple[float, ...]  # [hour] of that hour's mixture of requests; 0: not within the SLO
    cost: float  # of an hour: dollars or watt-hours
    start_cost: float  # of a start, likewise
    role: Role = "both"
    partner: str = ""  # prefill works with decode of the same model and partner, and the other way round

    @property
    def gpus(self) -> int:
        return sum(self.groups)

    def slots(self, size: int) -> int:
        """Return the slots of `size` GPUs a replica takes from a pool, see `Problem.slots`."""
        return sum(group // size for group in self.groups if group >= size)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One day; hours that are alike may stand for several.

    The last tenant is nobody: it asks for a replica of each model that nobody asks anything of, and owns those that are
    kept running through an hour without requests.

    Requests are counted by the GPU time they take, so that those of all tenants of a model and hour are alike: one that
    takes twice the mean counts as two.
    """

    pools: tuple[tuple[int, int], ...]  # nodes, and GPUs of a node
    options: tuple[Option, ...]
    demand: Figures  # [model, tenant, hour] requests per second
    value: Figures  # [model, tenant, hour] of a request, in goodput
    guarantee: Figures  # [tenant] in GPUs
    deserved: Figures  # [tenant]
    limit: Figures  # [tenant]
    hours: tuple[int, ...] = (1,) * 24  # [hour] how many hours of the day it stands for

    @property
    def models(self) -> int:
        return len(self.demand)

    @cached_property
    def fleet_gpus(self) -> int:
        return sum(nodes * gpus for nodes, gpus in self.pools)

    @cached_property
    def rates(self) -> Figures:
        """[option, hour]."""
        return np.array([option.requests_per_s for option in self.options]).reshape(len(self.options), len(self.hours))

    @cached_property
    def gpus(self) -> Counts:
        """[option]."""
        return np.array([option.gpus for option in self.options], dtype=np.int64)

    @cached_property
    def total(self) -> Figures:
        """[model, hour] requests per second of all tenants."""
        total: Figures = self.demand.sum(axis=1)
        return total

    def of_model(self, model: int, role: Role) -> list[int]:
        """Return the indices of the options of a model with a role."""
        return [i for i, option in enumerate(self.options) if option.model == model and option.role == role]

    def pairs(self, model: int) -> list[tuple[list[int], list[int]]]:
        """Return the options that read and those that write the same requests, for each partner of a model."""
        sides: dict[str, tuple[list[int], list[int]]] = {}
        for index, option in enumerate(self.options):
            if option.model == model and option.role != "both":
                sides.setdefault(option.partner, ([], []))[option.role == "decode"].append(index)
        return [pair for pair in sides.values() if all(pair)]

    def slots(self, pool: int) -> dict[int, int]:
        """Return for each size of a group on the pool how many such groups its nodes hold.

        Replicas fit onto a pool if and only if, for each size s among their groups, the groups of s GPUs and more take
        at most nodes x floor(GPUs of a node / s) slots, where a group of size s' takes floor(s' / s).

        They must: a group of s' GPUs in a node holds floor(s' / s) groups of s GPUs, and a node holds floor(g / s) of
        them. It is enough: place the groups in the order of falling size, each at a multiple of its size. When a group
        of s GPUs is placed, all before it are as large or larger and sizes divide one another (a whole node, which
        need not be a power of two, covers all slots of its node), so each slot of s GPUs is wholly taken or wholly
        free; taken are those of the sum, and as the group itself belongs to it, one is free.
        """
        nodes, gpus = self.pools[pool]
        sizes = {group for option in self.options if option.pool == pool for group in option.groups}
        return {size: nodes * (gpus // size) for size in sorted(sizes)}

    @cached_property
    def slot_rows(self) -> tuple[Counts, Counts]:
        """[row] slots of one size on one pool, and [row, option] how many of them a replica takes."""
        rows = [(pool, size, slots) for pool in range(len(self.pools)) for size, slots in self.slots(pool).items()]
        taken = [
            [option.slots(size) if option.pool == pool else 0 for option in self.options] for pool, size, _ in rows
        ]
        return (
            np.array([slots for *_, slots in rows], dtype=np.int64),
            np.array(taken, dtype=np.int64).reshape(len(rows), len(self.options)),
        )

    def at(self, hours: Sequence[int], lengths: Sequence[int] | None = None) -> "Problem":
        """Return the problem of some of the hours."""
        return replace(
            self,
            options=tuple(
                replace(option, requests_per_s=tuple(option.requests_per_s[hour] for hour in hours))
                for option in self.options
            ),
            demand=self.demand[:, :, hours],
            value=self.value[:, :, hours],
            hours=tuple(lengths or (self.hours[hour] for hour in hours)),
        )

    def only(self, options: Iterable[int]) -> "Problem":
        """Return the problem with these options alone."""
        return replace(self, options=tuple(self.options[index] for index in options))

    def of(self, model: int) -> "Problem":
        """Return the problem of one model, all by itself; its index is 0."""
        return replace(
            self,
            options=tuple(replace(option, model=0) for option in self.options if option.model == model),
            demand=self.demand[model : model + 1],
            value=self.value[model : model + 1],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How many replicas of what at each hour, and whom they serve."""

    replicas: Counts  # [option, hour]
    served: Figures  # [model, tenant, hour] requests per second
    gpus: Figures  # [model, tenant, hour] GPUs of the model's replicas by whose requests they serve
    cost: float  # of the day
    bound: float  # no choice that serves as much costs less

    @property
    def gap(self) -> float:
        return max(0.0, self.cost - self.bound) / max(self.cost, 1e-9)


def cost_of(problem: Problem, replicas: Counts | Figures) -> float:
    """Return what replicas, or fractions of them, cost in a day with their starts; midnight follows the last hour."""
    running = np.array([option.cost for option in problem.options]) @ (replicas @ np.array(problem.hours))
    return float(running + (starts_of(replicas) @ np.ones(len(problem.hours))) @ _start_costs(problem))


def starts_of(replicas: Counts | Figures) -> Counts | Figures:
    """[option, hour] replicas that serve from that hour on and did not before."""
    starts: Counts | Figures = np.maximum(0, replicas - np.roll(replicas, 1, axis=1))
    return starts


def _start_costs(problem: Problem) -> Figures:
    return np.array([option.start_cost for option in problem.options])


def capacity_of(problem: Problem, replicas: Counts) -> Figures:
    """[model, hour] requests per second that replicas sustain; prefill and decode as much as the scarcer of the two."""
    offered = problem.rates * replicas
    capacity = np.zeros((problem.models, len(problem.hours)))
    for model in range(problem.models):
        capacity[model] += offered[problem.of_model(model, "both")].sum(axis=0)
        for reads, writes in problem.pairs(model):
            capacity[model] += np.minimum(offered[reads].sum(axis=0), offered[writes].sum(axis=0))
    return capacity


def rather_whole(problem: Problem) -> Problem:
    """Return the problem with prefill and decode apart counted as `SIMPLER` dearer: a tie-break.

    Two kinds of engine and a cache that travels are more to run than one kind, so that a model is only split where that
    saves more than this. A choice that is best here costs at most that much more than the best of the problem itself.
    """
    dearer = 1 + SIMPLER
    return replace(
        problem,
        options=tuple(
            option
            if option.role == "both"
            else replace(option, cost=dearer * option.cost, start_cost=dearer * option.start_cost)
            for option in problem.options
        ),
    )


def oversold(problem: Problem, replicas: Counts) -> NDArray[np.bool_]:
    """[hour] whether replicas do not fit onto their pools."""
    slots, taken = problem.slot_rows
    over: NDArray[np.bool_] = np.any(taken @ replicas > slots[:, None], axis=0)
    return over


def shares_of(problem: Problem, replicas: Counts, served: Figures) -> Figures:
    """[model, tenant, hour] each model's GPUs by the GPU time of whom it serves; nobody's where it serves nobody."""
    gpus = np.zeros((problem.models, len(problem.hours)))
    np.add.at(gpus, [option.model for option in problem.options], problem.gpus[:, None] * replicas)
    total = served.sum(axis=1, keepdims=True)
    parts = np.divide(served, total, out=np.zeros_like(served), where=total > 0)
    parts[:, -1] += total[:, 0] <= 0
    shares: Figures = parts * gpus[:, None]
    return shares


def entitled(problem: Problem, gpus: Figures) -> bool:
    """Return whether [model, tenant, hour] GPUs keep every limit and leave every guarantee free that is not used."""
    use = gpus.sum(axis=0)  # [tenant, hour]
    slack = SLACK * max(1, problem.fleet_gpus)
    within = use <= problem.limit[:, None] + slack
    reserved = np.maximum(use, problem.guarantee[:, None]).sum(axis=0)
    return bool(within.all() and (reserved <= problem.fleet_gpus + slack).all())


# --- Nearly the same problem ------------------------------------------------------------------------------------------


def with_nodes(problem: Problem, pool: int, more: int) -> Problem:
    """Return the problem with more nodes of a pool; shares of the fleet grow with it."""
    pools = tuple((nodes + more * (index == pool), gpus) for index, (nodes, gpus) in enumerate(problem.pools))
    grown = replace(problem, pools=pools)
    growth = grown.fleet_gpus / problem.fleet_gpus
    return replace(
        grown, guarantee=problem.guarantee * growth, deserved=problem.deserved * growth, limit=problem.limit * growth
    )


def with_limits(problem: Problem, tenants: Iterable[int], limit: float) -> Problem:
    """Return the problem with the limit of some tenants raised to so many GPUs."""
    limits = problem.limit.copy()
    for tenant in tenants:
        limits[tenant] = max(limits[tenant], limit)
    return replace(problem, limit=limits)


# --- The same problem, smaller --------------------------------------------------------------------------------------


def merged(problem: Problem) -> tuple[Problem, list[int]]:
    """Return the problem with each run of equal hours as one, and [hour] which one.

    Nothing is lost: where two neighbouring hours are equal, what is better of the two does for both, and to start and
    stop in between costs at least as much as to go straight on.
    """
    rates, period = problem.rates, [0]
    for hour in range(1, len(problem.hours)):
        same = (
            (problem.demand[:, :, hour] == problem.demand[:, :, hour - 1]).all()
            and (problem.value[:, :, hour] == problem.value[:, :, hour - 1]).all()
            and (rates[:, hour] == rates[:, hour - 1]).all()
        )
        period.append(period[-1] + (not same))
    firsts = [period.index(number) for number in range(period[-1] + 1)]
    lengths = [0] * len(firsts)
    for hour, number in enumerate(period):
        lengths[number] += problem.hours[hour]
    return problem.at(firsts, lengths), period


def undominated(problem: Problem, tolerance: float) -> list[int]:
    """Return the options that no other replaces: as many requests from the same pool, for no more GPUs and money.

    Several replicas of the other may stand for one: two of one GPU for one of two GPUs. Of equals the first is kept.
    `tolerance` is the fraction by which the other may be dearer all the same.

    Nothing better is lost. In any choice put k replicas of A for each of B, where k is what `_dominates` compares: they
    serve at least as much at every hour and take no more slots of any size, so what was served and fitted still is and
    does. Running them costs no more, and k times the starts of B cost no more than B's running and starting saved, as
    each start is followed by an hour of running at least. GPUs do not rise, so that entitlements hold as before.
    """
    kept: dict[tuple[int, int, str, str], list[int]] = {}
    sizes = [tuple(problem.slots(pool)) for pool in range(len(problem.pools))]
    order = sorted(
        range(len(problem.options)),
        key=lambda i: (problem.options[i].gpus, problem.options[i].cost, -sum(problem.options[i].requests_per_s)),
    )
    for index in order:
        option = problem.options[index]
        alike = kept.setdefault((option.model, option.pool, option.role, option.partner), [])
        if not any(_dominates(problem.options[i], option, sizes[option.pool], tolerance) for i in alike):
            alike.append(index)
    return sorted(index for alike in kept.values() for index in alike)


def _dominates(one: Option, other: Option, sizes: Iterable[int], tolerance: float) -> bool:
    """Return whether as many replicas of `one` as the GPUs of `other` hold do no worse, started each hour or never."""
    times, dearer = max(1, other.gpus // one.gpus), 1 + tolerance + 1e-12
    return (
        times * one.cost <= other.cost * dearer
        and times * (one.cost + one.start_cost) <= (other.cost + other.start_cost) * dearer
        and all(times * a >= b for a, b in zip(one.requests_per_s, other.requests_per_s, strict=True))
        and all(times * one.slots(size) <= other.slots(size) for size in sizes)
    )
