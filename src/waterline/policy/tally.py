"""The fleet as it will be when the moves so far have been made: what `lending` counts on while it decides."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterline.policy.holdings import (
    DRAIN,
    DRAINING,
    GONE,
    HAND_BACK,
    NOBODY,
    READY,
    SLOTS,
    Claims,
    Layouts,
    Moves,
    Replicas,
    Services,
    Tenants,
)
from waterline.policy.jit import jit

STABLE_S = 300.0  # a service must have been able to spare a replica for so long; what people know from Kubernetes' HPA
SLOT_S = STABLE_S / 10
SLACK = 0.02  # of what must stay possible, on top, before anything is spare
DUST = 1e-9
UNKNOWN = -1.0


class Tally(NamedTuple):
    """The fleet as it will be when the moves so far have been made."""

    usage: NDArray[np.float64]  # [tenant] GPUs of replicas that stay, and of claims
    occupied: NDArray[np.float64]  # [tenant] the same and those that drain
    supply: NDArray[np.float64]  # [service] work a second of replicas that stay, and of claims
    spare: NDArray[np.float64]  # [service] work a second it can do without now; below 0: it cannot
    stable: NDArray[np.float64]  # [service] the same, of what it could do without all the last STABLE_S
    answering: NDArray[np.float64]  # [model] work a second that can be done without of replicas that answer already
    hosted: NDArray[np.float64]  # [service] work a second that replicas of other tenants do for it, see `_host`
    free: NDArray[np.int64]  # [node]
    open: NDArray[np.int64]  # [claim] 1 if the row is taken
    staying: NDArray[np.int64]  # [replica] 1 if it stays
    first: NDArray[np.int64]  # [node] where its replicas begin in `rows`, and a last entry where they end
    rows: NDArray[np.int64]  # replicas by node
    made: NDArray[np.int64]  # [1] moves so far
    chosen: NDArray[np.int64]  # [place] victims of the claim that is looked at
    left: NDArray[np.float64]  # [tenant] usage without them
    left_spare: NDArray[np.float64]  # [service] what can be spared without them
    thrift: NDArray[np.float64]  # [model] fewest GPUs for a unit of work a second, of all nodes; inf: it runs nowhere
    least: NDArray[np.float64]  # [model] GPUs of its smallest replica; inf: it runs nowhere
    cost: NDArray[np.float64]  # [service, node] of a claim there when it was looked at; inf: not legal; UNKNOWN
    found: NDArray[np.float64]  # [node] the same of the claim that is looked at, as things are
    donor: NDArray[np.int64]  # [service] who alone might give, in those costs
    gives: NDArray[np.int64]  # [service] 1 if replicas of it might be stopped for the claim that is looked at
    idle: NDArray[np.float64]  # [3] GPUs, then: of them kept for others from who is in its right, and from who borrows


@jit
def take_stock(
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
    free_gpus: NDArray[np.int64],
    claims: Claims,
    replicas: Replicas,
) -> Tally:
    count = len(replicas.state)
    tally = Tally(
        np.zeros(len(tenants.deserved_gpus)),
        np.zeros(len(tenants.deserved_gpus)),
        np.zeros(len(services.tenant)),
        np.zeros(len(services.tenant)),
        np.zeros(len(services.tenant)),
        np.zeros(len(layouts.gpus)),
        np.zeros(len(services.tenant)),
        free_gpus.copy(),
        np.zeros(len(claims.service), np.int64),
        np.zeros(count, np.int64),
        np.zeros(len(free_gpus) + 1, np.int64),
        np.zeros(count, np.int64),
        np.zeros(1, np.int64),
        np.zeros(count, np.int64),
        np.zeros(len(tenants.deserved_gpus)),
        np.zeros(len(services.tenant)),
        np.full(len(layouts.gpus), np.inf),
        np.full(len(layouts.gpus), np.inf),
        np.full((len(services.tenant), len(free_gpus)), UNKNOWN),
        np.zeros(len(free_gpus)),
        np.full(len(services.tenant), NOBODY, np.int64),
        np.zeros(len(services.tenant), np.int64),
        np.zeros(3),
    )
    _measure(layouts, tally)
    for replica in range(count):
        if replicas.state[replica] == GONE:
            continue
        if replicas.state[replica] == DRAINING:
            tally.occupied[services.tenant[replicas.service[replica]]] += replicas.gpus[replica]
            continue
        tally.staying[replica] = 1
        service, tenant = replicas.service[replica], services.tenant[replicas.service[replica]]
        tally.usage[tenant] += replicas.gpus[replica]
        tally.occupied[tenant] += replicas.gpus[replica]
        tally.supply[service] += replicas.rate[replica]
        if replicas.state[replica] == READY:
            tally.answering[services.model[service]] += replicas.rate[replica]
    _group_by_node(replicas, tally)
    for service in range(len(services.tenant)):
        needed = _needs(services, service) * (1.0 + SLACK)
        tally.spare[service] = tally.supply[service] - needed
        tally.answering[services.model[service]] -= min(needed, tally.supply[service])
        tally.stable[service] = tally.supply[service] - needed_lately(services, service) * (1.0 + SLACK)
    for claim in range(len(claims.service)):
        if claims.service[claim] != NOBODY:
            tally.open[claim] = 1
            add_replica(services, layouts, tally, claims.service[claim], claims.node[claim])
    for service in range(len(services.tenant)):
        _host(tenants, services, tally, service, _bound(tenants, services, replicas, tally, service))
    return tally


@jit
def _measure(layouts: Layouts, tally: Tally) -> None:
    """Fill in `thrift` and `least`."""
    for model in range(len(layouts.gpus)):
        for node in range(len(tally.free)):
            if layouts.gpus[model, node] > 0:
                thrift = layouts.gpus[model, node] / layouts.rate[model, node]
                tally.thrift[model] = min(tally.thrift[model], thrift)
                tally.least[model] = min(tally.least[model], layouts.gpus[model, node])


@jit
def _bound(tenants: Tenants, services: Services, replicas: Replicas, tally: Tally, service: int) -> float:
    """Return work a second of replicas that a service could spare, and that nobody else may have: its guarantee."""
    tenant, room = services.tenant[service], tally.spare[service]
    if not room > 0.0 or tenants.guarantee_gpus[tenant] == 0.0:
        return 0.0
    left, bound = tally.usage[tenant], 0.0
    for replica in range(len(replicas.state)):
        rate = replicas.rate[replica]
        if not tally.staying[replica] or replicas.service[replica] != service or rate > room:
            continue
        room -= rate
        if left - replicas.gpus[replica] >= tenants.guarantee_gpus[tenant] - DUST:
            left -= replicas.gpus[replica]  # this one may pass to others, or be handed back
        else:
            bound += rate
    return float(bound)


@jit
def _host(tenants: Tenants, services: Services, tally: Tally, host: int, work: float) -> None:
    """Let what a service has to spare count for others of its model that lack it, the highest priority first."""
    while work > 0.0:
        guest = NOBODY
        for other in range(len(services.tenant)):
            if services.model[other] != services.model[host] or services.tenant[other] == services.tenant[host]:
                continue
            if (
                not is_due(tenants, services, tally, other)
                and lacks(tenants, services, tally, other) > 0.0
                and (guest == NOBODY or services.priority[other] > services.priority[guest])
            ):
                guest = other
        if guest == NOBODY:
            return
        done = min(work, lacks(tenants, services, tally, guest))
        tally.hosted[guest] += done
        work -= done


@jit
def lacks(tenants: Tenants, services: Services, tally: Tally, service: int) -> float:
    """Return how much more work a second a service wants than is done for it; 0 for the dust of rounding.

    Who is due a replica has a right to one of its own, and does not count on being a guest.
    """
    has = tally.supply[service] + (0.0 if is_due(tenants, services, tally, service) else tally.hosted[service])
    return float(services.wanted[service] - has) if services.wanted[service] > has * (1.0 + DUST) else 0.0


@jit
def is_due(tenants: Tenants, services: Services, tally: Tally, service: int) -> bool:
    """Whether one more replica of a service lies within what its tenant deserves."""
    tenant = services.tenant[service]
    return bool(tally.usage[tenant] + tally.least[services.model[service]] <= tenants.deserved_gpus[tenant] + DUST)


@jit
def _group_by_node(replicas: Replicas, tally: Tally) -> None:
    """Fill in `first` and `rows`, by counting."""
    for replica in range(len(replicas.state)):
        if replicas.state[replica] != GONE:
            tally.first[replicas.node[replica] + 1] += 1
    for node in range(len(tally.first) - 1):
        tally.first[node + 1] += tally.first[node]
    filled = tally.first.copy()
    for replica in range(len(replicas.state)):
        if replicas.state[replica] != GONE:
            tally.rows[filled[replicas.node[replica]]] = replica
            filled[replicas.node[replica]] += 1


@jit
def new_moves(most: int) -> Moves:
    return Moves(
        np.zeros(most, np.int64),
        np.zeros(most, np.int64),
        np.zeros(most, np.int64),
        np.zeros(most, np.int64),
        np.zeros(most, np.int64),
        np.zeros(most, np.int64),
        np.zeros(most, np.int64),
        np.zeros(most),
        np.zeros(most),
        np.zeros(most),
        np.full(most, NOBODY, np.int64),
    )


@jit
def push_move(
    tally: Tally,
    moves: Moves,
    kind: int,
    rule: int,
    claimant: int,
    victim: int,
    node: int,
    claim: int,
    gpus: int,
    cost_gpu_s: float,
    deadline_s: float,
    rate: float,
) -> None:
    at = tally.made[0]
    moves.kind[at], moves.rule[at], moves.claimant[at], moves.victim[at] = kind, rule, claimant, victim
    moves.node[at], moves.claim[at], moves.gpus[at] = node, claim, gpus
    moves.cost_gpu_s[at], moves.deadline_s[at], moves.rate[at] = cost_gpu_s, deadline_s, rate
    tally.made[0] = at + 1


@jit
def stop_replica(
    tenants: Tenants,
    services: Services,
    replicas: Replicas,
    tally: Tally,
    moves: Moves,
    replica: int,
    claimant: int,
    claim: int,
    rule: int,
    now_s: float,
) -> None:
    """Drain a replica for a claim, or, without one, hand it back."""
    service, node, gpus = replicas.service[replica], replicas.node[replica], replicas.gpus[replica]
    tenant, rate = services.tenant[service], replicas.rate[replica]
    tally.staying[replica] = 0
    tally.usage[tenant] -= gpus
    tally.supply[service] -= rate
    tally.spare[service] -= rate
    tally.stable[service] -= rate
    tally.answering[services.model[service]] -= rate
    loss = loss_gpu_s(tenants, services, replicas, replica)
    kind = HAND_BACK if claim == NOBODY else DRAIN
    push_move(
        tally, moves, kind, rule, claimant, replica, node, claim, gpus, loss, now_s + tenants.grace_s[tenant], 0.0
    )


@jit
def add_replica(services: Services, layouts: Layouts, tally: Tally, service: int, node: int) -> None:
    tenant, model = services.tenant[service], services.model[service]
    tally.usage[tenant] += layouts.gpus[model, node]
    tally.occupied[tenant] += layouts.gpus[model, node]
    tally.supply[service] += layouts.rate[model, node]
    tally.spare[service] += layouts.rate[model, node]


@jit
def _needs(services: Services, service: int) -> float:
    return float(max(services.kept[service], services.wanted[service]))


@jit
def needed_lately(services: Services, service: int) -> float:
    """Return the most a service needed in the last `STABLE_S`."""
    most = _needs(services, service)
    for slot in range(SLOTS):
        most = max(most, services.needed[service, slot])
    return float(most)


@jit
def note_needs(services: Services, now_s: float) -> None:
    """Remember what services need now, and forget what lies further back than `STABLE_S`."""
    slot, last = int(now_s // SLOT_S), services.slot[0]
    fresh = slot - last if last != NOBODY else 1
    for service in range(len(services.tenant)):
        for passed in range(min(fresh, SLOTS)):
            services.needed[service, (slot - passed) % SLOTS] = 0.0
        now = services.needed[service, slot % SLOTS]
        services.needed[service, slot % SLOTS] = max(now, _needs(services, service))
    services.slot[0] = slot


@jit
def loss_gpu_s(tenants: Tenants, services: Services, replicas: Replicas, replica: int) -> float:
    """Return what stopping a replica loses: work since its checkpoint, and its GPUs while it drains."""
    grace_s = tenants.grace_s[services.tenant[replicas.service[replica]]]
    return float(replicas.lost_gpu_s[replica] + replicas.gpus[replica] * grace_s)


@jit
def may_stop(
    tenants: Tenants, services: Services, replicas: Replicas, tally: Tally, replica: int, now_s: float
) -> bool:
    """Whether a replica has loaded and has run for its minimum runtime, and is not being stopped already."""
    if replicas.state[replica] != READY or not tally.staying[replica]:
        return False
    least_s = tenants.min_runtime_s[services.tenant[replicas.service[replica]]]
    return bool(now_s - replicas.since_s[replica] >= least_s)


@jit
def misses_less(replicas: Replicas, one: int, other: int) -> bool:
    """Whether stopping a replica loses less than stopping another; if the same, whether it is newer."""
    if replicas.lost_gpu_s[one] != replicas.lost_gpu_s[other]:
        return bool(replicas.lost_gpu_s[one] < replicas.lost_gpu_s[other])
    return bool(replicas.since_s[one] > replicas.since_s[other])


@jit
def saturation(tenants: Tenants, usage: NDArray[np.float64], tenant: int) -> float:
    return float(usage[tenant] / max(tenants.deserved_gpus[tenant], DUST))
