"""What runs where at this moment, and how it becomes what it should be: replicas start, drain, and give way.

`Shore` is the one place that knows which GPUs are taken. It starts a replica only on GPUs that nobody has, and counts
them as free when the last process on them is gone.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import structlog
from msgspec.structs import replace

from waterline.plan import Place, Plan, Replica
from waterline.service.engines import Engine
from waterline.service.gateway import Gateway
from waterline.service.supervisor import Supervisor
from waterline.units import HOUR_S

LOOK_EVERY_S = 0.05
NOT_YET = ("stopped", "starting", "backing off")  # of a replica that has not been ready

log = structlog.get_logger()

Gpu = tuple[str, int, int]  # pool, node, and the number of the card
Prepare = Callable[[Plan], Mapping[str, Engine]]


def gpus_of(pool: str, places: Iterable[Place]) -> frozenset[Gpu]:
    return frozenset((pool, place.node, gpu) for place in places for gpu in place.gpus)


class Shore:
    """The replicas of a service, and the GPUs they have.

    Args:
        plan: what runs at first.
        supervisor, gateway: who act on it.
        prepare: returns an engine for each replica of a plan, or raises EngineError.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        plan: Plan,
        supervisor: Supervisor,
        gateway: Gateway,
        prepare: Prepare,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self.replicas = {replica.id: replica for replica in plan.replicas}
        self._supervisor = supervisor
        self._gateway = gateway
        self._prepare = prepare
        self._drains: dict[str, asyncio.Task[None]] = {}
        self._clock = clock
        self._paid_usd: dict[str, float] = {}  # by replica, gone or not …
        self._paid_s = dict.fromkeys(self.replicas, clock())  # … up to when, of those that are there

    @property
    def taken(self) -> frozenset[Gpu]:
        """The GPUs of all replicas, those that drain included."""
        return frozenset().union(*(gpus_of(one.pool, one.places) for one in self.replicas.values()))

    def usd(self) -> dict[str, float]:
        """Return what each replica has cost so far, from when it took its GPUs until they were free again."""
        for replica_id in self.replicas:
            self._pay(replica_id)
        return dict(self._paid_usd)

    def _pay(self, replica_id: str) -> None:
        since_s, self._paid_s[replica_id] = self._paid_s[replica_id], self._clock()
        usd = self.replicas[replica_id].usd_per_hour * (self._paid_s[replica_id] - since_s) / HOUR_S
        self._paid_usd[replica_id] = self._paid_usd.get(replica_id, 0.0) + usd

    def start(self, replica: Replica, engine: Engine | None = None) -> None:
        """Start a replica on GPUs that nobody has. Raises EngineError when its engine cannot be run here."""
        engine = engine or self._prepare(replace(self.plan, replicas=(replica,)))[replica.id]
        self.replicas[replica.id] = replica
        self._paid_s[replica.id] = self._clock()
        self._supervisor.begin(replica.id, engine)
        self._gateway.admit(replica)

    def drain(self, replica_id: str, within_s: float) -> "asyncio.Task[None]":
        """Begin to drain a replica; the task ends when its GPUs are free. Asked again, it is the same task."""
        if replica_id not in self._drains:
            self._drains[replica_id] = asyncio.create_task(self._drain(replica_id, within_s))
        return self._drains[replica_id]

    async def _drain(self, replica_id: str, within_s: float) -> None:
        try:
            await self._supervisor.drain(replica_id, within_s)
        finally:
            self._gateway.dismiss(replica_id)
            self._pay(replica_id)
            del self.replicas[replica_id], self._drains[replica_id]

    def free_name(self, model: str) -> str:
        """Return an id that no replica has, by the model and the lowest number."""
        number = 0
        while f"{model}/{number}" in self.replicas:
            number += 1
        return f"{model}/{number}"

    def check(self, plan: Plan) -> None:
        """Raise EngineError when an engine of a plan cannot be run here."""
        self._prepare(plan)

    async def settle(self) -> None:
        """Return when nothing drains any more."""
        await asyncio.gather(*self._drains.values(), return_exceptions=True)

    async def move_to(self, plan: Plan, *, by_load: bool = False) -> None:
        """Make what runs what a plan says, without a model that is in both going out of service where GPUs allow that.

        Who is in both stays, with the new figures. New replicas start first, on GPUs that are free; when they are
        ready, those that are gone drain, and the rest start on their GPUs. May be cancelled, and begun again with
        another plan. Raises EngineError, before anything has changed, when an engine cannot be run here.

        Args:
            plan: the new one.
            by_load: replicas follow the load, and the plan says what they are: who is of its shapes stays as well, and
                only models without a replica get theirs.
        """
        engines = self._prepare(plan)
        stay = {replica.id: replica for replica in self._unchanged(plan.replicas, engines)}
        coming = [replica for replica in plan.replicas if replica.id not in stay]
        if by_load:
            shaped = self._of_shapes(plan)
            prepared = self._prepare(replace(plan, replicas=tuple(shaped)))
            stay = {replica.id: replica for replica in self._unchanged(shaped, prepared)} | stay
            served = {replica.model for replica in stay.values()}
            coming = [replica for replica in coming if replica.model not in served]
        self.plan = plan
        self._gateway.use_plan(plan)
        for replica in stay.values():
            self._pay(replica.id)  # at the price it had
            self.replicas[replica.id] = replica
            self._gateway.update(replica)
        gone = [replica_id for replica_id in self.replicas if replica_id not in stay]
        log.info("moves to the new plan", stay=len(stay), start=len(coming), drain=len(gone))
        try:
            coming = await self._start_where_free(coming, engines)
            drains = {self.drain(replica_id, self._grace_s(replica_id)) for replica_id in gone}
            while coming and drains:
                self._expect(coming)
                _, drains = await asyncio.wait(drains, return_when=asyncio.FIRST_COMPLETED)
                coming = await self._start_where_free(coming, engines)
            if drains:
                await asyncio.wait(drains)
        finally:
            self._gateway.expect(())
        self._gateway.forget_models()
        log.info("runs the new plan")

    def _unchanged(self, replicas: Iterable[Replica], engines: Mapping[str, Engine]) -> Iterator[Replica]:
        """Yield those that run already, as they are to run."""
        for replica in replicas:
            known = self.replicas.get(replica.id)
            stays = known and replica.id not in self._drains and _same_place(known, replica)
            if stays and self._supervisor.engines[replica.id] == engines[replica.id]:
                yield replica

    def _of_shapes(self, plan: Plan) -> list[Replica]:
        """Return the replicas that run, as the shapes of a plan would have them."""
        shapes = {(shape.model, shape.pool): shape for shape in plan.shapes}
        return [
            shapes[one.model, one.pool].replica(one.id, one.places)
            for one in self.replicas.values()
            if (one.model, one.pool) in shapes
        ]

    async def _start_where_free(self, coming: list[Replica], engines: Mapping[str, Engine]) -> list[Replica]:
        """Start those whose GPUs nobody has, wait until they are ready, and return the others."""
        started, others = [], []
        for replica in coming:
            if gpus_of(replica.pool, replica.places) & self.taken:
                others.append(replica)
                continue
            named = replica if replica.id not in self.replicas else replace(replica, id=self.free_name(replica.model))
            self.start(named, engines[replica.id])
            started.append(named.id)
        self._expect(others)
        states = self._supervisor.states
        while any(states[one].status in NOT_YET for one in started):  # noqa: ASYNC110 - states are looked at, as by all
            await asyncio.sleep(LOOK_EVERY_S)
        return others

    def _expect(self, coming: Iterable[Replica]) -> None:
        """Say when those should be ready that wait for GPUs: who has these ends its work first, then they load."""
        self._gateway.expect([(one, self._room_in_s(one) + one.load_s) for one in coming])

    def _room_in_s(self, replica: Replica) -> float:
        wanted = gpus_of(replica.pool, replica.places)
        inside = [id_ for id_, one in self.replicas.items() if wanted & gpus_of(one.pool, one.places)]
        return max((min(self._gateway.ends_in_s(id_), self._grace_s(id_)) for id_ in inside), default=0.0)

    def _grace_s(self, replica_id: str) -> float:
        """Return how long a replica gets to drain: the longest grace of those who ask its model."""
        fleet, model = self.plan.fleet, self.replicas[replica_id].model
        asking = {demand.tenant for demand in fleet.demand if demand.model == model}
        return max(tenant.grace_s for tenant in fleet.tenants if not asking or tenant.name in asking)


def _same_place(one: Replica, other: Replica) -> bool:
    return one.pool == other.pool and gpus_of(one.pool, one.places) == gpus_of(other.pool, other.places)
