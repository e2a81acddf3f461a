"""A plan as the minutes clock sees it: who asks for what, which GPUs may be combined, and which replica has which.

`policy.tide` decides in numbers of services, nodes and rows; this says what they stand for, and makes of a plan the
state that a rehearsal and the live service both begin with. A *service* is what a tenant asks of a model, or a job of a
tenant. A *berth* is some nodes of a pool whose GPUs can be combined: one node, or as many as one replica spans there.

Replicas that only read or only write keep to the hours of the plan, as do those that use their GPUs at other hours:
nobody borrows those GPUs, and tenants are promised that much less of the others.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from waterline.fleet import HOURS, Demand, Job
from waterline.plan import Place, Plan, Replica, Shape
from waterline.policy import forecast
from waterline.policy import tide as tides
from waterline.policy.holdings import NOBODY, READY, Layouts, Moves, Tenants, new_services
from waterline.policy.tide import FIXED, Tide

ANYTHING = 1e-6  # planned requests a second: that something may be asked, so that one replica stays

Figures = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Service:
    """What a tenant asks for."""

    tenant: str
    target: str  # the name of a model or of a job
    job: Job | None = None


@dataclass(frozen=True, slots=True)
class Berth:
    """Nodes of a pool whose GPUs can be combined."""

    pool: str
    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """A job on some GPUs."""

    id: str  # "train/0": the job and which of its copies
    job: Job
    pool: str
    places: tuple[Place, ...]

    @property
    def gpus(self) -> int:
        return self.job.gpus


class Roster:
    """The names behind the numbers of a tide, and the GPUs of every row."""

    def __init__(self, plan: Plan, running: Sequence[Replica], *, hour: int = 0) -> None:
        """Begin with some replicas of the plan running, as at an hour; no job runs yet.

        `running` has no two replicas on the same GPU. Those that keep to the plan are passed over.
        """
        fleet = plan.fleet
        self.plan = plan
        self.pools = {pool.name: pool for pool in fleet.pools}
        self.tenants = [tenant.name for tenant in fleet.tenants]
        self.models = [model.name for model in fleet.models]
        self.services = tuple(
            [Service(tenant, model) for tenant in self.tenants for model in self.models]
            + [Service(job.tenant, job.name, job) for job in fleet.jobs]
        )
        self.kept = tuple(_kept_to_plan(plan.replicas))  # replicas that keep to the plan's hours
        kept = {replica.id for replica in self.kept}
        self._taken = {(one.pool, place.node, gpu) for one in self.kept for place in one.places for gpu in place.gpus}
        running = [replica for replica in running if replica.id not in kept]
        self.berths = tuple(_berths(plan, running))
        self._berth_of = {
            (berth.pool, node): number for number, berth in enumerate(self.berths) for node in berth.nodes
        }
        self.free = [self._whole(berth) for berth in self.berths]  # [berth] node -> GPUs that nobody has
        self.down: dict[tuple[str, int], int] = {}  # (pool, node) -> GPUs of it that are in its berth
        self.finished: set[str] = set()  # runs that are done for good: their copies are not started again
        self.has: dict[int, Replica | Run] = {}  # by the row of the tide
        self._copies = {job.name: [0] for job in fleet.jobs}  # a heap: those that do not run, the last stands for more
        self._numbers = dict.fromkeys(self.models, 0)
        for replica in plan.replicas:
            number = replica.id.rpartition("/")[2]
            self._numbers[replica.model] = max(self._numbers[replica.model], int(number) + 1 if number.isdigit() else 0)
        self._shapes = {(shape.model, shape.pool): shape for shape in plan.shapes}
        self.asked = _asked(plan)  # [service, hour] planned requests a second
        self.tide = self._new_tide(running, hour)

    # --- Names --------------------------------------------------------------------------------------------------------

    def service(self, tenant: str, target: str) -> int:
        """Return the row of what a tenant asks of a model, or of its job."""
        return [(one.tenant, one.target) for one in self.services].index((tenant, target))

    def tenant_of(self, row: int) -> str:
        """Return for whom a replica counts."""
        return self.services[int(self.tide.replicas.service[row])].tenant

    def row_of(self, id_: str) -> int:
        """Return the row of a replica, or of a run of a job; raises KeyError."""
        for row, one in self.has.items():
            if one.id == id_:
                return row
        raise KeyError(id_)

    @property
    def names(self) -> dict[str, Sequence[str]]:
        """Return what numbers in the decision log stand for, but for victims: those are rows, as they are then."""
        return {
            "tenant": self.tenants,
            "claimant": [f"{one.tenant}/{one.target}" for one in self.services],
            "place": [f"{berth.pool}/{berth.nodes[0]}" for berth in self.berths],
        }

    # --- GPUs ---------------------------------------------------------------------------------------------------------

    def start(self, moves: Moves, move: int) -> Replica | Run | None:
        """Give a replica that is to start its GPUs, and return it; None when they lie too scattered in the berth."""
        row, node = int(moves.started[move]), int(moves.node[move])
        service, pool = self.services[moves.claimant[move]], self.berths[node].pool
        places = self._take(node, int(moves.gpus[move]))
        if places is None:
            return None
        one: Replica | Run
        if service.job:
            one = Run(self._copy_of(service.target), service.job, pool, places)
        else:
            number = self._numbers[service.target]
            self._numbers[service.target] += 1
            one = self._shapes[service.target, pool].replica(f"{service.target}/{number}", places)
        self.has[row] = one
        return one

    def _copy_of(self, job: str) -> str:
        """Return the id of the first copy of a job that neither runs nor is done for good."""
        while True:
            copy = heapq.heappop(self._copies[job])
            if not self._copies[job]:
                self._copies[job].append(copy + 1)
            if (id_ := f"{job}/{copy}") not in self.finished:
                return id_

    def end(self, row: int) -> Replica | Run:
        """Take the GPUs of a row back: its replica is gone."""
        one = self.has.pop(row)
        if isinstance(one, Run):
            heapq.heappush(self._copies[one.job.name], int(one.id.rpartition("/")[2]))
        berth = self.berth_of(one.pool, one.places[0].node)
        for place in one.places:
            if (one.pool, place.node) not in self.down:
                self.free[berth][place.node] |= set(place.gpus)
        return one

    def rows_on(self, pool: str, node: int) -> list[int]:
        """Return the rows that have GPUs of a node."""
        return [
            row for row, one in self.has.items() if one.pool == pool and any(place.node == node for place in one.places)
        ]

    def fail(self, pool: str, node: int) -> tuple[int, int]:
        """Take a node out, whose replicas have ended, and return its berth and how many GPUs that is."""
        number = self.berth_of(pool, node)
        gpus = len(self.free[number].pop(node, ()))
        self.down[pool, node] = gpus
        return number, gpus

    def repair(self, pool: str, node: int) -> tuple[int, int]:
        """Put a node back, and return its berth and how many GPUs that is."""
        number, gpus = self.berth_of(pool, node), self.down.pop((pool, node))
        self.free[number][node] = self._whole(self.berths[number])[node]
        return number, gpus

    def berth_of(self, pool: str, node: int) -> int:
        """Return the number of the berth that a node is in."""
        return self._berth_of[pool, node]

    def _whole(self, berth: Berth) -> dict[int, set[int]]:
        """Return the GPUs of a berth by node, but for those that keep to the plan."""
        gpus = range(self.pools[berth.pool].gpus_per_node)
        return {node: {gpu for gpu in gpus if (berth.pool, node, gpu) not in self._taken} for node in berth.nodes}

    def _take(self, number: int, gpus: int) -> tuple[Place, ...] | None:
        """Take whole nodes for a large replica; for a small one, part of the node that it fills best."""
        free, a_node = self.free[number], self.pools[self.berths[number].pool].gpus_per_node
        if gpus <= a_node:
            fitting = [node for node, there in free.items() if len(there) >= gpus]
            chosen = {min(fitting, key=lambda node: (len(free[node]), node)): gpus} if fitting else {}
        else:
            nodes = [node for node in sorted(free) if len(free[node]) == a_node][: -(-gpus // a_node)]
            parts = [min(a_node, gpus - a_node * index) for index in range(len(nodes))]
            chosen = dict(zip(nodes, parts, strict=True))
        if sum(chosen.values()) < gpus:
            return None
        places = tuple(Place(node=node, gpus=tuple(sorted(free[node])[:part])) for node, part in chosen.items())
        for place in places:
            free[place.node] -= set(place.gpus)
        return places

    # --- The beginning ------------------------------------------------------------------------------------------------

    def _new_tide(self, running: Sequence[Replica], hour: int) -> Tide:
        gpus = np.array([sum(len(there) for there in free.values()) for free in self.free], np.int64)
        layouts = self._layouts(gpus)
        index = {name: number for number, name in enumerate(self.tenants)}
        priority = {tenant.name: tenant.priority for tenant in self.plan.fleet.tenants}
        services = new_services(
            np.array([index[one.tenant] for one in self.services]),
            np.array(
                [
                    self.models.index(one.target) if not one.job else len(self.models) + number
                    for number, one in enumerate(self.services, start=-len(self.tenants) * len(self.models))
                ]
            ),
            np.array([2 * priority[one.tenant] + (one.job is None) for one in self.services]),  # who asks outbids jobs
        )
        tide = tides.new_tide(
            self._promises(), services, layouts, gpus, self.step_s, running_gpus=[one.layout.gpus for one in running]
        )
        for number, one in enumerate(self.services):
            if one.job:
                tide.source[number], tide.fixed[number] = FIXED, one.job.copies
            else:
                forecast.expect_day(tide.series, number, self.asked[number])
                tide.floor[number] = ANYTHING if self.asked[number].any() else 0.0
        tide.carried[:] = self._carried()
        self._give(tide, running, hour)
        return tide

    @cached_property
    def step_s(self) -> float:
        """How often to decide."""
        loads_s = [shape.load_s for shape in self.plan.shapes] + [replica.load_s for replica in self.plan.replicas]
        return tides.step_length_s(load_s for load_s in loads_s if load_s > 0)

    def _layouts(self, berth_gpus: NDArray[np.int64]) -> Layouts:
        """Return what a replica of each model, and a run of each job, is in each berth."""
        jobs = self.plan.fleet.jobs
        size = (len(self.models) + len(jobs), len(self.berths))
        gpus, rate, load_s = np.zeros(size, np.int64), np.zeros(size), np.zeros(size)
        largest = np.array([max((len(there) for there in free.values()), default=0) for free in self.free])
        of_pool = {name: np.array([berth.pool == name for berth in self.berths]) for name in self.pools}
        for shape in self.plan.shapes:
            takes, model = shape.layout.gpus, self.models.index(shape.model)
            room = largest if takes <= self.pools[shape.pool].gpus_per_node else berth_gpus
            where = of_pool[shape.pool] & (room >= takes)
            gpus[model, where], rate[model, where], load_s[model, where] = takes, shape.requests_per_s, shape.load_s
        for number, job in enumerate(jobs, start=len(self.models)):
            for pool in job.pools:
                where = of_pool[pool] & (largest >= job.gpus)
                gpus[number, where], rate[number, where], load_s[number, where] = job.gpus, 1.0, job.load_s
        return Layouts(gpus, rate, load_s)

    def _promises(self) -> Tenants:
        """Return what tenants are promised of the GPUs that are not kept to the plan."""
        fleet, taken = self.plan.fleet, np.zeros(len(self.tenants))
        for replica in self.kept:
            model = [one.target == replica.model for one in self.services]
            asked = self.asked[model, :].max(axis=1)
            parts = asked / asked.sum() if asked.any() else np.ones(len(asked)) / len(asked)
            taken += parts * replica.layout.gpus * len(replica.hours) / HOURS

        def left(share: Figures) -> Figures:
            return np.maximum(share * fleet.gpus - taken, 0.0)

        deserved = left(np.array([tenant.deserved or 0.0 for tenant in fleet.tenants]))
        return Tenants(
            left(np.array([tenant.guarantee for tenant in fleet.tenants])),
            deserved,
            left(np.array([tenant.limit for tenant in fleet.tenants])),
            deserved,
            np.array([tenant.grace_s for tenant in fleet.tenants]),
            np.array([tenant.min_runtime_s for tenant in fleet.tenants]),
        )

    def _carried(self) -> Figures:
        """Return by service and hour what replicas that keep to the plan do; of a split, its slower side."""
        carried = np.zeros((len(self.services), HOURS))
        for model in self.models:
            by_role = {role: np.zeros(HOURS) for role in ("both", "prefill", "decode")}
            for replica in self.kept:
                if replica.model == model:
                    by_role[replica.role][list(replica.hours)] += replica.requests_per_s
            done = by_role["both"] + np.minimum(by_role["prefill"], by_role["decode"])
            mine = np.array([one.target == model for one in self.services])
            asked = self.asked * mine[:, None]
            total = asked.sum(axis=0)
            carried += done * np.divide(asked, total, out=np.zeros_like(asked), where=total > 0)
        return carried

    def _give(self, tide: Tide, running: Sequence[Replica], hour: int) -> None:
        """Write the replicas that run into the tide; each counts for whoever lacks most of what it needs."""
        given = np.zeros(len(self.services))
        usage = np.zeros(len(self.tenants))
        for row, replica in enumerate(running):
            mine = [number for number, one in enumerate(self.services) if one.target == replica.model]
            gpus = replica.layout.gpus
            allowed = [
                number for number in mine
                if usage[tide.services.tenant[number]] + gpus <= tide.tenants.limit_gpus[tide.services.tenant[number]]
            ]  # fmt: skip
            service = max(allowed or mine, key=lambda number: self.asked[number, hour] - given[number])
            given[service] += replica.requests_per_s
            usage[tide.services.tenant[service]] += gpus
            berth = self.berth_of(replica.pool, replica.places[0].node)
            held = tide.replicas
            held.service[row], held.node[row], held.gpus[row] = service, berth, gpus
            held.state[row], held.rate[row], held.claim[row] = READY, replica.requests_per_s, NOBODY
            held.since_s[row] = np.inf if replica.engine == "openai" else -np.inf  # never stopped, and at any time
            tide.free_gpus[berth] -= gpus
            self.has[row] = replica
            for place in replica.places:
                self.free[berth][place.node] -= set(place.gpus)


# --- What is read off a plan ------------------------------------------------------------------------------------------


def _kept_to_plan(replicas: Sequence[Replica]) -> Iterable[Replica]:
    """Yield the replicas that only read or write, and all that have GPUs of theirs, or of those, at some hour."""
    gpus_of = {
        replica.id: {(replica.pool, place.node, gpu) for place in replica.places for gpu in place.gpus}
        for replica in replicas
    }
    on: dict[tuple[str, int, int], list[Replica]] = {}
    for replica in replicas:
        for gpu in gpus_of[replica.id]:
            on.setdefault(gpu, []).append(replica)
    pending = [replica for replica in replicas if replica.role != "both"]
    kept = {replica.id for replica in pending}
    while pending:
        for gpu in gpus_of[pending.pop().id]:
            for other in on[gpu]:
                if other.id not in kept:
                    kept.add(other.id)
                    pending.append(other)
    return (replica for replica in replicas if replica.id in kept)


def _berths(plan: Plan, running: Sequence[Replica]) -> Iterable[Berth]:
    """Yield the nodes of each pool in groups, as many as a replica spans there; what spans nodes already is in one."""
    for pool in plan.fleet.pools:
        spans = [shape.layout.gpus for shape in plan.shapes if shape.pool == pool.name]
        size = max((-(-gpus // pool.gpus_per_node) for gpus in spans), default=1)
        group = list(range(pool.nodes))  # [node] the first node of its group
        for replica in running:
            if replica.pool == pool.name and len(replica.places) > 1:
                joined = {group[place.node] for place in replica.places}
                group = [min(joined) if one in joined else one for one in group]
        members: dict[int, list[int]] = {}
        for node, first in enumerate(group):
            members.setdefault(first, []).append(node)
        small: list[int] = []
        for nodes in members.values():
            if len(nodes) > 1:
                yield Berth(pool.name, tuple(nodes))
            else:
                small += nodes
        for begin in range(0, len(small), size):
            yield Berth(pool.name, tuple(small[begin : begin + size]))


def token_costs(plan: Plan, model: str) -> tuple[float, float]:
    """Return what a prompt token and an output token cost, in planned requests.

    The mean request of the plan costs 1. Of the time that a replica takes for it, reading is what its rate of reading
    says, and writing the rest.
    """
    planned = next(one for one in plan.models if one.model == model)
    whole: list[Replica | Shape] = [one for one in plan.replicas_of(model) if one.role == "both"]
    whole += [shape for shape in plan.shapes if shape.model == model]
    prompt, output = planned.prompt_tokens, planned.output_tokens
    if not whole or not whole[0].prefill_tokens_per_s or not whole[0].tokens_per_s:
        return 1.0 / (prompt + output), 1.0 / (prompt + output)
    all_s = (prompt + output) / whole[0].tokens_per_s
    read_s = min(prompt / whole[0].prefill_tokens_per_s, all_s * prompt / (prompt + output))
    return read_s / prompt / all_s, (all_s - read_s) / output / all_s


def expected_output_tokens(plan: Plan, row: Demand) -> int:
    """Return how long the answers of a row of the demand are expected to be; of a trace, those of its model."""
    planned = next(one for one in plan.models if one.model == row.model)
    return planned.output_tokens if row.trace else row.output_tokens


def _asked(plan: Plan) -> Figures:
    """Return planned requests a second by service and hour; of a trace, what the plan's shares say of its rate."""
    fleet = plan.fleet
    pairs = [(tenant.name, model.name) for tenant in fleet.tenants for model in fleet.models]
    asked = np.zeros((len(pairs) + len(fleet.jobs), HOURS))
    costs = {model.name: token_costs(plan, model.name) for model in fleet.models}
    for demand in fleet.demand:
        row = pairs.index((demand.tenant, demand.model))
        read, write = costs[demand.model]
        one = demand.prompt_tokens * read + demand.output_tokens * write
        asked[row] += np.array(demand.hourly_requests_per_s or np.zeros(HOURS)) * one
    traced = {(demand.tenant, demand.model) for demand in fleet.demand if demand.trace}
    for hour in plan.hours:
        for share in hour.shares:
            if (share.tenant, share.model) in traced:
                asked[pairs.index((share.tenant, share.model)), hour.hour] = share.asked_requests_per_s
    return asked
