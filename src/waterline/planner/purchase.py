"""Which servers to buy: whole servers of several kinds, so that every hour's replicas find their GPUs.

The choice is a mixed-integer program, solved by HiGHS. It counts servers of each kind, and at each of the hardest hours
replicas of each way to run each model. Parts of a replica are whole on one server; because their sizes are powers of
two, or a server, they fit if and only if, for each size, the groups at least that large fit when counted in it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from waterline.errors import InfeasibleError
from waterline.plan import Layout

GAP = 1e-4  # of the objective, between what is returned and what could at best exist
TIME_LIMIT_S = 20.0
SEVERAL = 3.0
WHOLE = 1 - 1e-6  # a demand served to this fraction is served


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Servers that are alike."""

    name: str
    vendor: str
    gpus: int  # in one server
    most: int | None = None  # servers there can be; None: any number
    least: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run a model: a layout at a precision on a kind of server."""

    kind: int  # index
    layout: Layout
    precision: str
    requests_per_s: float  # of one replica, with the SLO held
    parts: tuple[int, ...]  # GPUs of each part of a replica that must stay on one server; all alike


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is asked of one model at one hour. Without requests it is one replica, for whoever may come."""

    model: str
    hour: int
    requests_per_s: float
    ways: tuple[Way, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Market:
    """The terms of one purchase, in dollars by kind of server."""

    prices: Sequence[float]  # [kind] what the budget pays; infinite: cannot be bought
    costs: Sequence[float]  # [kind] what is to be least: the price and what running it costs, over its lifetime
    usd_per_kind: float = 0.0  # for every kind of server that is bought, however many; part of the cost
    budget_usd: float = math.inf
    max_vendor_share: float = 1.0  # of the money spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Servers of each kind, and replicas of each way of each task."""

    servers: tuple[int, ...]  # [kind]
    replicas: Mapping[tuple[int, int], int]  # (task, way) -> replicas, where there are any
    served: tuple[float, ...]  # [task] requests per second
    gap: float  # the objective could at best be better by this fraction


def cheapest(kinds: Sequence[Kind], tasks: Sequence[Task], market: Market, gap: float = GAP) -> Choice | None:
    """Return the servers that serve every task at the least cost; None when the market does not allow it."""
    return _Program(kinds, tasks, market).solve("cheapest", gap)


def most(kinds: Sequence[Kind], tasks: Sequence[Task], market: Market, gap: float = GAP) -> Choice | None:
    """Return the servers that serve most requests within the market's budget, and of those the cheapest.

    None only when what must be kept (`Kind.least`) cannot be paid.
    """
    program = _Program(kinds, tasks, market)
    served = program.solve("most", gap)
    if served is None:
        return None
    return program.solve("cheapest", gap, least_served=math.fsum(served.served) * WHOLE) or served


@dataclass(slots=True)
class _Rows:
    """Rows of a sparse matrix, one after another."""

    starts: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    def add(self, entries: Iterator[tuple[int, float]], lower: float, upper: float) -> None:
        self.starts.append(len(self.columns))
        for column, value in entries:
            if value:
                self.columns.append(column)
                self.values.append(value)
        self.lower.append(lower)
        self.upper.append(upper)


class _Program:
    """The variables: servers by kind, replicas by task and way, the fraction served of each task, kinds bought."""

    def __init__(self, kinds: Sequence[Kind], tasks: Sequence[Task], market: Market) -> None:
        self.kinds, self.tasks, self.market = kinds, tasks, market
        self.pairs = [(task, way) for task, one in enumerate(tasks) for way in range(len(one.ways))]
        self.first_pair = len(kinds)
        self.first_task = self.first_pair + len(self.pairs)
        self.first_used = self.first_task + len(tasks)
        self.columns = self.first_used + (len(kinds) if market.usd_per_kind else 0)
        self.asked = math.fsum(task.requests_per_s for task in tasks)

    def solve(self, goal: Literal["cheapest", "most"], gap: float, least_served: float | None = None) -> Choice | None:
        rows = _Rows()
        self._serve(rows, everything=goal == "cheapest" and least_served is None)
        self._fit(rows)
        self._pay(rows)
        if least_served:
            rows.add(self._served(), least_served / self.asked, math.inf)
        objective = np.zeros(self.columns)
        if goal == "cheapest":
            scale = max((cost for cost in self.market.costs if math.isfinite(cost)), default=1.0) or 1.0
            objective[: self.first_pair] = [cost / scale if math.isfinite(cost) else 0.0 for cost in self.market.costs]
            objective[self.first_used :] = self.market.usd_per_kind / scale
        else:
            for column, weight in self._served():
                objective[column] = -weight
        return self._run(objective, rows, gap)

    def _served(self) -> Iterator[tuple[int, float]]:
        """Yield the weight of each task's served fraction in the fraction of all requests."""
        for index, task in enumerate(self.tasks):
            if self.asked:
                yield self.first_task + index, task.requests_per_s / self.asked

    def _serve(self, rows: _Rows, *, everything: bool) -> None:
        """A task is served as far as its replicas go."""
        for task, pairs in groupby(enumerate(self.pairs), key=lambda item: item[1][0]):
            asked, ways = self.tasks[task].requests_per_s, self.tasks[task].ways
            entries = [
                (self.first_pair + index, ways[way].requests_per_s / asked if asked else 1.0)
                for index, (_, way) in pairs
            ]
            rows.add(iter([*entries, (self.first_task + task, -1.0)]), 0.0, math.inf)
        if everything:
            for task in range(len(self.tasks)):
                rows.add(iter([(self.first_task + task, 1.0)]), 1.0, math.inf)

    def _fit(self, rows: _Rows) -> None:
        """The groups of every hour fit onto the servers, and no server is bought for nothing."""
        used: dict[int, list[tuple[int, float]]] = {}
        on: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # (kind, hour) -> (column, groups, size)
        for index, (task, way) in enumerate(self.pairs):
            one = self.tasks[task].ways[way]
            groups, size = len(one.parts), one.parts[0]
            on.setdefault((one.kind, self.tasks[task].hour), []).append((self.first_pair + index, groups, size))
            used.setdefault(one.kind, []).append((self.first_pair + index, float(groups)))
        for (kind, _), taken in on.items():
            gpus = self.kinds[kind].gpus
            for level in sorted({size for _, _, size in taken}):
                entries = [
                    (column, float(groups * (min(size, gpus) // level)))
                    for column, groups, size in taken
                    if size >= level
                ]
                rows.add(iter([*entries, (kind, -float(gpus // level))]), -math.inf, 0.0)
        for kind, servers in enumerate(self.kinds):
            if not servers.least:
                rows.add(iter([*used.get(kind, []), (kind, -1.0)]), 0.0, math.inf)
        if self.market.usd_per_kind:
            for kind, (servers, enough) in enumerate(zip(self.kinds, self._enough(), strict=True)):
                rows.add(iter([(kind, 1.0), (self.first_used + kind, -enough)]), -math.inf, float(servers.least))

    def _enough(self) -> list[float]:
        """Return for each kind how many servers nobody needs to exceed: each task alone, at the hour that takes most.

        To keep a vendor to its share of the money one may buy more of the others than one needs, up to several times
        what the dearest way to serve everything costs.
        """
        alone = [0.0 if one.least else self._alone(kind) for kind, one in enumerate(self.kinds)]
        if self.market.max_vendor_share >= 1:
            return alone
        pairs = [(count, price) for count, price in zip(alone, self.market.prices, strict=True) if math.isfinite(price)]
        dearest = max((count * price for count, price in pairs), default=0.0)
        return [
            count + (SEVERAL * dearest / price if 0 < price < math.inf else 0.0)
            for count, price in zip(alone, self.market.prices, strict=True)
        ]

    def _alone(self, kind: int) -> float:
        by_hour: dict[int, float] = {}
        for task in self.tasks:
            ways = [way for way in task.ways if way.kind == kind]
            if ways:
                slowest = min(way.requests_per_s * self.kinds[kind].gpus / way.layout.gpus for way in ways)
                needed = math.ceil(task.requests_per_s / slowest) + max(len(way.parts) for way in ways)
                by_hour[task.hour] = by_hour.get(task.hour, 0.0) + needed
        return max(by_hour.values(), default=0.0)

    def _pay(self, rows: _Rows) -> None:
        prices = [price if math.isfinite(price) else 0.0 for price in self.market.prices]
        scale = max(prices, default=1.0) or 1.0
        if math.isfinite(self.market.budget_usd):
            limit = self.market.budget_usd
            rows.add(((kind, price / limit) for kind, price in enumerate(prices)), -math.inf, 1.0)
        share = self.market.max_vendor_share
        if share < 1:
            for vendor in sorted({kind.vendor for kind in self.kinds}):
                entries = (
                    (index, price / scale * ((1.0 if self.kinds[index].vendor == vendor else 0.0) - share))
                    for index, price in enumerate(prices)
                )
                rows.add(entries, -math.inf, 0.0)

    def _run(self, objective: NDArray[np.float64], rows: _Rows, gap: float) -> Choice | None:
        import highspy  # noqa: PLC0415 - only a purchase needs it

        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = self.columns, len(rows.starts)
        lp.col_cost_ = objective
        lp.col_lower_ = np.array([*(kind.least for kind in self.kinds), *[0.0] * (self.columns - self.first_pair)])
        lp.col_upper_ = np.array(
            [*self._most(), *[math.inf] * len(self.pairs), *[1.0] * (self.columns - self.first_task)]
        )
        lp.row_lower_, lp.row_upper_ = np.array(rows.lower), np.array(rows.upper)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.array([*rows.starts, len(rows.columns)])
        lp.a_matrix_.index_ = np.array(rows.columns)
        lp.a_matrix_.value_ = np.array(rows.values)
        whole, real = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
        lp.integrality_ = [
            *[whole] * self.first_task, *[real] * len(self.tasks), *[whole] * (self.columns - self.first_used)
        ]  # fmt: skip
        highs: Any = highspy._Highs()  # type: ignore[attr-defined] # noqa: SLF001 - highspy.Highs prints a banner
        highs.setOptionValue("output_flag", False)  # noqa: FBT003 - its signature
        for option, value in (("mip_rel_gap", gap), ("time_limit", TIME_LIMIT_S), ("threads", 1)):
            highs.setOptionValue(option, value)
        highs.passModel(lp)
        highs.run()
        info, status = highs.getInfo(), highs.getModelStatus()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            if status == highspy.HighsModelStatus.kTimeLimit:
                raise InfeasibleError(
                    f"no purchase was found in {TIME_LIMIT_S:.0f} s. Name fewer cards with --gpu, or fewer models."
                )
            return None
        return self._choice(np.array(highs.getSolution().col_value), max(0.0, float(info.mip_gap)))

    def _most(self) -> Iterator[float]:
        for kind, price in zip(self.kinds, self.market.prices, strict=True):
            yield math.inf if kind.most is None and math.isfinite(price) else float(kind.most or 0)

    def _choice(self, values: NDArray[np.float64], gap: float) -> Choice:
        whole = [round(value) for value in values[: self.first_task]]
        replicas = dict(zip(self.pairs, whole[self.first_pair :], strict=True))
        served = tuple(self._trim(task, replicas) for task in range(len(self.tasks)))
        return Choice(
            servers=tuple(whole[: self.first_pair]),
            replicas={pair: count for pair, count in replicas.items() if count},
            served=served,
            gap=gap if math.isfinite(gap) else 0.0,
        )

    def _trim(self, task: int, replicas: dict[tuple[int, int], int]) -> float:
        """Take away the replicas a task does not need, the largest first, and return the requests it serves."""
        one = self.tasks[task]
        pairs = sorted((pair for pair in replicas if pair[0] == task), key=lambda pair: -one.ways[pair[1]].layout.gpus)
        able = math.fsum(replicas[pair] * one.ways[pair[1]].requests_per_s for pair in pairs)
        standing = sum(replicas[pair] for pair in pairs)
        for pair in pairs:
            rate = one.ways[pair[1]].requests_per_s
            idle = min(replicas[pair], standing - 1, int((able - one.requests_per_s) / rate)) if standing else 0
            if idle > 0:
                replicas[pair] -= idle
                standing -= idle
                able -= idle * rate
        return min(one.requests_per_s, able)
