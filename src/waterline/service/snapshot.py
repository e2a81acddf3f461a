"""How the service is at this moment: `waterline.snapshot.Snapshot`, filled from the parts that know."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime

from waterline.ledger import Lag, Ledger
from waterline.plan import Plan
from waterline.service.dispatcher import Dispatcher
from waterline.service.lines import Lane, Service
from waterline.service.nodes import Sight
from waterline.service.recent import Recent
from waterline.service.supervisor import ReplicaState
from waterline.snapshot import (
    BatchNow,
    Health,
    JobNow,
    Kind,
    LatencyNow,
    LedgerNow,
    ModelNow,
    NodeNow,
    QueueNow,
    ReplicaNow,
    Snapshot,
    TenantNow,
    Use,
)
from waterline.workload import Slo

KINDS: Mapping[str, Kind] = {  # of GPUs, by the state of the replica on them; without it they are idle
    "ready": "serving",
    "suspect": "serving",
    "ejected": "serving",
    "starting": "starting",
    "backing off": "starting",
    "draining": "draining",
}
LOST = ("silent", "down")  # states of nodes
FEW = 20  # requests, of which nothing is concluded
DRAINED = "An operator drains it."
EJECTED = "It failed requests. It is tried again after a pause."


def take_snapshot(
    plan: Plan,
    dispatcher: Dispatcher,
    states: Mapping[str, ReplicaState],
    recent: Recent,
    *,
    jobs: tuple[JobNow, ...] = (),
    nodes: Mapping[tuple[str, int], Sight] | None = None,
    batches: tuple[BatchNow, ...] = (),
    ledger: Ledger | None = None,
    now_s: float,
    stopping: bool = False,
) -> Snapshot:
    """Return what is known now.

    Args:
        plan: what is served.
        dispatcher: whose queues there are.
        states: of the replicas by id.
        recent: what ended lately.
        jobs: how their runs are.
        nodes: how they look, by pool and number; those that are not told of are not used.
        batches: that are run here.
        ledger: what is written down, if anything is.
        now_s: on the clock of the service, which began at 0.
        stopping: whether it has begun to end.
    """
    services = dispatcher.services
    shares = {model: _shares(plan, model, recent, now_s) for model in services}
    replicas = tuple(_replica(lane, states[lane.replica.id]) for lane in dispatcher.lanes.values())
    models = tuple(_model(service, plan.fleet.slos[model]) for model, service in services.items())
    latencies = recent.latencies(now_s)
    seen = tuple(sorted(_nodes(plan, dispatcher, states, jobs, nodes or {}), key=lambda node: node.state not in LOST))
    uses = _uses(plan, replicas, shares, jobs, seen)
    written = _ledger(ledger.lag()) if ledger else None
    return Snapshot(
        at_s=time.time(),
        uptime_s=now_s,
        fleet=plan.fleet.name,
        health=_health(models, stopping=stopping),
        gpus=plan.fleet.gpus,
        uses=uses,
        tenants=tuple(_tenants(plan, uses, dispatcher)),
        models=models,
        latencies=latencies,
        queues=tuple(
            QueueNow(
                model=model,
                tenant=line[0].tenant,
                client=line[0].line,
                waiting=len(line),
                oldest_s=line[0].waited_s(now_s),
            )
            for model, service in services.items()
            for line in service.lines.values()
        ),
        replicas=replicas,
        replica_states=dict(Counter(replica.state for replica in replicas)),
        nodes=seen,
        node_states=dict(Counter(node.state for node in seen)),
        jobs=jobs,
        job_states=dict(Counter(job.state for job in jobs)),
        batches=batches,
        moves=tuple(recent.moves),
        ejections=tuple(recent.ejections),
        ledger=written,
        problems=(*_problems(models, replicas, seen, written), *_missed(plan, latencies)),
    )


def _health(models: Iterable[ModelNow], *, stopping: bool) -> Health:
    if stopping:
        return "stopping"
    return "ok" if all(model.ready for model in models) else "not ready"


def _shares(plan: Plan, model: str, recent: Recent, now_s: float) -> dict[str, float]:
    """Return each tenant's part of a model's replicas: as they used it lately, else as it is planned for this hour."""
    used = recent.gpu_s(model, now_s)
    if not used and plan.hours:
        hour = plan.hours[datetime.now().astimezone().hour]
        used = {share.tenant: share.gpus for share in hour.shares if share.model == model and share.gpus > 0}
    total = sum(used.values())
    return {name: part / total for name, part in used.items()} if total else {_expected(plan, model): 1.0}


def _expected(plan: Plan, model: str) -> str:
    """Return the tenant that asks most for a model; while nobody has asked, it is taken for theirs."""
    return next((demand.tenant for demand in plan.fleet.demand if demand.model == model), "public")


def _replica(lane: Lane, state: ReplicaState) -> ReplicaNow:
    replica, said = lane.replica, lane.said(state.status)
    reason = {"draining": DRAINED, "ejected": EJECTED}.get(said, "") if state.status == "ready" else state.reason
    return ReplicaNow(
        id=replica.id,
        model=replica.model,
        tenant="",
        pool=replica.pool,
        node=replica.places[0].node,
        gpus=replica.layout.gpus,
        state=said,
        reason=reason,
        running=lane.running,
        slots=replica.max_batch,
        backlog_tokens=lane.backlog_tokens,
        restarts=state.restarts,
    )


def _model(service: Service, slo: Slo) -> ModelNow:
    ready = [lane for lane in service.lanes if lane.ready]
    return ModelNow(
        model=service.planned.model,
        ready=service.ready,
        replicas=len(service.lanes),
        running=service.running,
        slots=sum(lane.replica.max_batch for lane in ready),
        waiting=service.waiting,
        ttft_slo_s=slo.ttft_s,
        tpot_slo_s=slo.tpot_s,
    )


def _uses(
    plan: Plan,
    replicas: Iterable[ReplicaNow],
    shares: Mapping[str, Mapping[str, float]],
    jobs: Iterable[JobNow],
    nodes: Iterable[NodeNow],
) -> tuple[Use, ...]:
    """Return who has which GPUs for what; what is left of a pool is nobody's."""
    gpus: dict[tuple[str, str, Kind], float] = defaultdict(float)
    for replica in replicas:
        if kind := KINDS.get(replica.state):
            parts = {replica.tenant: 1.0} if replica.tenant else shares[replica.model]
            for tenant, part in parts.items():
                gpus[replica.pool, tenant, kind] += replica.gpus * part
    for job in jobs:
        if job.gpus:
            gpus[job.pool, job.tenant, "job"] += job.gpus
    for node in nodes:
        if node.state in LOST and node.gpus > node.used_gpus:
            gpus[node.pool, "", "lost"] += node.gpus - node.used_gpus
    for pool in plan.fleet.pools:
        idle = pool.gpus - sum(count for (name, _, _), count in gpus.items() if name == pool.name)
        if idle > 1e-9:
            gpus[pool.name, "", "idle"] += idle
    return tuple(Use(pool=pool, tenant=tenant, kind=kind, gpus=count) for (pool, tenant, kind), count in gpus.items())


def _tenants(plan: Plan, uses: Iterable[Use], dispatcher: Dispatcher) -> Iterator[TenantNow]:
    total = plan.fleet.gpus
    uses = tuple(uses)
    waiting = Counter(
        ticket.tenant for service in dispatcher.services.values() for line in service.lines.values() for ticket in line
    )
    for tenant in plan.fleet.tenants:
        yield TenantNow(
            tenant=tenant.name,
            gpus=sum(use.gpus for use in uses if use.tenant == tenant.name),
            guarantee_gpus=tenant.guarantee * total,
            deserved_gpus=(tenant.deserved or 0.0) * total,
            limit_gpus=tenant.limit * total,
            running=dispatcher.under_way(tenant.name) - waiting[tenant.name],
            waiting=waiting[tenant.name],
        )


def _missed(plan: Plan, latencies: Iterable[LatencyNow]) -> Iterator[str]:
    for one in latencies:
        part = one.within_slo / one.requests
        if one.requests >= FEW and part < plan.fleet.slos[one.model].fraction:
            yield (
                f"{part:.0%} of {one.tenant}'s last {one.requests} requests to '{one.model}' were within their SLO; "
                f"{one.requests - one.ok} {'was' if one.requests - one.ok == 1 else 'were'} refused or failed."
            )


def _ledger(lag: Lag) -> LedgerNow:
    return LedgerNow(waiting_rows=lag.waiting_rows, lag_s=lag.lag_s, problem=lag.problem)


def _nodes(
    plan: Plan,
    dispatcher: Dispatcher,
    states: Mapping[str, ReplicaState],
    jobs: Iterable[JobNow],
    sights: Mapping[tuple[str, int], Sight],
) -> Iterator[NodeNow]:
    """Yield each node, with who has GPUs of it."""
    gpus: dict[tuple[str, int], int] = defaultdict(int)
    users: dict[tuple[str, int], list[str]] = defaultdict(list)
    for lane in dispatcher.lanes.values():
        if lane.said(states[lane.replica.id].status) in KINDS:
            for place in lane.replica.places:
                gpus[lane.replica.pool, place.node] += len(place.gpus)
                users[lane.replica.pool, place.node].append(lane.replica.id)
    for job in jobs:
        if job.gpus:
            gpus[job.pool, job.node] += job.gpus
            users[job.pool, job.node].append(job.job)
    of_pool = {pool.name: pool.gpus_per_node for pool in plan.fleet.pools}
    for (pool, node), sight in sights.items():
        yield NodeNow(
            pool=pool,
            node=node,
            state=sight.state,
            reason=sight.reason,
            address=sight.address,
            gpus=of_pool[pool],
            used_gpus=gpus.get((pool, node), 0),
            users=tuple(users.get((pool, node), ())),
        )


def _problems(
    models: Iterable[ModelNow], replicas: Iterable[ReplicaNow], nodes: Iterable[NodeNow], ledger: LedgerNow | None
) -> Iterator[str]:
    if ledger and ledger.problem:
        yield f"The ledger cannot be written: {ledger.problem}"
    for model in models:
        if not model.ready:
            yield f"No replica of '{model.model}' is ready."
    for node in nodes:
        if node.state in LOST:
            yield f"Node {node.pool}/{node.node} is {node.state}, nobody gets its {node.gpus} GPUs: {node.reason}"
    for replica in replicas:
        if replica.state in {"suspect", "ejected", "backing off"}:
            yield f"Replica '{replica.id}' is {replica.state}: {replica.reason}"
