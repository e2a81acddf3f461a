"""Which replicas start and stop, and on whose GPUs: the minutes clock.

The words are those of Volcano, Kueue and KAI. Of a tenant's GPUs the **guarantee** is kept for it even while it idles;
what it **deserves** beyond that is lent while it idles and always comes back; up to its **limit** it may borrow.

`plan_moves` looks at the fleet as it is and returns moves; it does not act, and remembers nothing but what services
needed lately (`Services.needed`). In this order:

1. *Claims.* A claim is a node's GPUs that are being freed for one replica. When they are complete, it starts; nobody
   else gets them before. If it has not been needed for `STABLE_S` by then, they are free for all.
2. *Take-over.* Tenants of the same model share its replicas, each of which counts as one tenant's GPUs. What one can
   spare and another needs passes to the other as it runs, as far as its limit allows; nothing is stopped or loaded.
3. *Hand-back.* What a service has not needed for `STABLE_S` is drained, when those that answer can do without it: what
   still loads is no reason to stop what serves. What falls within its tenant's guarantee stays, because nobody else may
   use it.
4. *Starts*, one replica at a time, for the service that is furthest behind: below the guarantee first, then below
   deserved, then borrowing; of each the highest priority, then the smallest part of what is due (KAI's fair share,
   filled up drop by drop). Each takes, in this order: GPUs that idle; else, if it has what it deserves, it becomes the
   **guest** of a tenant of the same model, which starts a replica in its idle guarantee; else GPUs of a service of its
   own tenant that can spare them or has lower priority; else it **reclaims** while it stays within what it deserves,
   from tenants that have more than they deserve and never below their guarantee; else, borrowing, it **outbids** a loan
   of lower priority, and leaves the victim what it deserves. A replica of the same model is taken over before others
   are stopped.

Who is never stopped: a replica that loads, and one that has not run for its tenant's minimum runtime. A drained replica
hands over by its deadline, which is its tenant's grace from now; its claimant serves a load time later.

A *service* is what one tenant asks of one model; research is a service too, one that wants all it can get (inf). Work
is in any unit, as long as `wanted`, `kept` and `Layouts.rate` share it. Nodes are places whose GPUs can be combined:
pass a pool as one node where a replica may span several. A model without a layout on a node never gets a GPU there.
"""

import numpy as np
from numpy.typing import NDArray

from waterline.policy.claims import open_claim, promised_gpus
from waterline.policy.decisions import BORROW_IDLE, CLAIM_DROPPED, CLAIM_KEPT, HOSTS, OWN_IDLE, RECLAIM, SPARED, SURPLUS
from waterline.policy.holdings import (
    DRAINING,
    HAND_BACK,
    NOBODY,
    READY,
    START,
    Claims,
    Layouts,
    Moves,
    Replicas,
    Services,
    Tenants,
)
from waterline.policy.jit import jit
from waterline.policy.takeover import take_over
from waterline.policy.tally import (
    DUST,
    Tally,
    add_replica,
    is_due,
    lacks,
    misses_less,
    needed_lately,
    new_moves,
    note_needs,
    push_move,
    stop_replica,
    take_stock,
)


@jit
def plan_moves(
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
    free_gpus: NDArray[np.int64],
    claims: Claims,
    replicas: Replicas,
    now_s: float,
) -> Moves:
    """Return what to do now; see the top of this file. Call it every step of the forecast, or when something ends.

    Args:
        tenants: what they are promised.
        services: what they need.
        layouts: where their models run, and how.
        free_gpus: [node] that no replica has, and that are held for no claim.
        claims: GPUs that are being freed; as many rows as there may be at a time.
        replicas: that load, run or drain.
        now_s: on the caller's clock.
    """
    note_needs(services, now_s)
    tally = take_stock(tenants, services, layouts, free_gpus, claims, replicas)
    moves = new_moves(len(replicas.state) + 2 * len(claims.service) + int(free_gpus.sum()))
    _end_claims(services, layouts, claims, replicas, tally, moves, now_s)
    _share(tenants, services, replicas, tally, moves, now_s)
    _hand_back(tenants, services, replicas, tally, moves, now_s)
    blocked = np.zeros(len(services.tenant), np.int64)
    while True:
        service = _neediest(tenants, services, tally, blocked)
        if service == NOBODY:
            break
        if not (
            _start_on_idle(tenants, services, layouts, tally, moves, service, now_s)
            or _be_guest(tenants, services, layouts, tally, moves, service, now_s)
            or take_over(tenants, services, replicas, tally, moves, service, RECLAIM, now_s)
            or open_claim(tenants, services, layouts, replicas, tally, moves, service, now_s)
        ):
            blocked[service] = 1
    made = tally.made[0]
    return Moves(
        moves.kind[:made],
        moves.rule[:made],
        moves.claimant[:made],
        moves.victim[:made],
        moves.node[:made],
        moves.claim[:made],
        moves.gpus[:made],
        moves.cost_gpu_s[:made],
        moves.deadline_s[:made],
        moves.rate[:made],
        moves.started[:made],
    )


@jit
def _end_claims(
    services: Services,
    layouts: Layouts,
    claims: Claims,
    replicas: Replicas,
    tally: Tally,
    moves: Moves,
    now_s: float,
) -> None:
    """Start what was waited for; let go of what is no longer needed or cannot be completed."""
    coming = np.zeros(len(claims.service), np.int64)
    for replica in range(len(replicas.state)):
        if replicas.state[replica] == DRAINING and replicas.claim[replica] != NOBODY:
            coming[replicas.claim[replica]] += replicas.gpus[replica]
    for claim in range(len(claims.service)):
        service, node, freed = claims.service[claim], claims.node[claim], claims.held_gpus[claim]
        if service == NOBODY:
            continue
        model, tenant = services.model[service], services.tenant[service]
        gpus, rate = layouts.gpus[model, node], layouts.rate[model, node]
        needed = tally.supply[service] - rate < needed_lately(services, service)
        if freed + coming[claim] < gpus or (coming[claim] == 0 and not needed):
            tally.usage[tenant] -= gpus
            tally.occupied[tenant] -= gpus
            tally.supply[service] -= rate
            tally.spare[service] -= rate
            if coming[claim] == 0:
                tally.free[node] += freed
                tally.open[claim] = 0
                push_move(tally, moves, HAND_BACK, CLAIM_DROPPED, service, NOBODY, node, claim, freed, 0.0, now_s, 0.0)
        elif freed >= gpus:  # within its limit: what was stopped of its own tenant for it is gone by now
            tally.free[node] += freed - gpus
            tally.open[claim] = 0
            load_s = layouts.load_s[model, node]
            push_move(
                tally, moves, START, CLAIM_KEPT, service, NOBODY, node, claim, gpus, gpus * load_s, now_s + load_s, rate
            )


@jit
def _share(tenants: Tenants, services: Services, replicas: Replicas, tally: Tally, moves: Moves, now_s: float) -> None:
    """Let services that need a replica have those that another tenant of the same model can spare."""
    blocked = np.zeros(len(services.tenant), np.int64)
    while True:
        service = _neediest(tenants, services, tally, blocked)
        if service == NOBODY:
            break
        if not take_over(tenants, services, replicas, tally, moves, service, SPARED, now_s):
            blocked[service] = 1


@jit
def _hand_back(
    tenants: Tenants,
    services: Services,
    replicas: Replicas,
    tally: Tally,
    moves: Moves,
    now_s: float,
) -> None:
    """Drain what services have been able to spare all the last `STABLE_S`."""
    for service in range(len(services.tenant)):
        while tally.stable[service] > 0.0:
            replica = _least_missed(tenants, services, replicas, tally, service, now_s)
            if replica == NOBODY:
                break
            stop_replica(tenants, services, replicas, tally, moves, replica, service, NOBODY, SURPLUS, now_s)


@jit
def _least_missed(
    tenants: Tenants,
    services: Services,
    replicas: Replicas,
    tally: Tally,
    service: int,
    now_s: float,
) -> int:
    """Return the replica a service hands back first: least lost work, then newest; NOBODY if it must keep them all."""
    tenant, best = services.tenant[service], NOBODY
    ready_by_s = now_s - tenants.min_runtime_s[tenant]
    for replica in range(len(replicas.state)):
        if replicas.service[replica] != service or replicas.state[replica] != READY:
            continue
        if not tally.staying[replica] or replicas.since_s[replica] > ready_by_s:
            continue
        if replicas.rate[replica] > min(tally.stable[service], tally.answering[services.model[service]]):
            continue
        if tally.usage[tenant] - replicas.gpus[replica] < tenants.guarantee_gpus[tenant] - DUST:
            continue
        if best == NOBODY or misses_less(replicas, replica, best):
            best = replica
    return best


@jit
def _neediest(tenants: Tenants, services: Services, tally: Tally, blocked: NDArray[np.int64]) -> int:
    """Return the service that starts a replica next; NOBODY when none needs one, or none can have one."""
    best, best_standing, best_priority, best_part = NOBODY, 0, 0, 0.0
    for service in range(len(services.tenant)):
        if blocked[service] or lacks(tenants, services, tally, service) == 0.0:
            continue
        tenant, priority = services.tenant[service], services.priority[service]
        usage = tally.usage[tenant]
        if usage < tenants.guarantee_gpus[tenant] - DUST:
            standing, part = 0, usage / tenants.guarantee_gpus[tenant]
        elif usage < tenants.deserved_gpus[tenant] - DUST:
            standing, part = 1, usage / tenants.deserved_gpus[tenant]
        else:
            standing, part = 2, (usage - tenants.deserved_gpus[tenant]) / max(tenants.weight[tenant], DUST)
        if best != NOBODY:
            if standing > best_standing:
                continue
            if standing == best_standing and priority < best_priority:
                continue
            if standing == best_standing and priority == best_priority and part >= best_part:
                continue
        best, best_standing, best_priority, best_part = service, standing, priority, part
    return best


@jit
def _start_on_idle(
    tenants: Tenants, services: Services, layouts: Layouts, tally: Tally, moves: Moves, service: int, now_s: float
) -> bool:
    """Start a replica on idle GPUs if there are some that may be used."""
    node, rule = _idle_node(tenants, services, layouts, tally, service)
    if node != NOBODY:
        _start(services, layouts, tally, moves, service, node, rule, now_s)
    return bool(node != NOBODY)


@jit
def _be_guest(
    tenants: Tenants, services: Services, layouts: Layouts, tally: Tally, moves: Moves, service: int, now_s: float
) -> bool:
    """Let another tenant of the same model start a replica on idle GPUs of its guarantee, which would idle otherwise.

    It is the host's, whose requests go first there; what it does not use of it the guest does.
    """
    tenant, model = services.tenant[service], services.model[service]
    if is_due(tenants, services, tally, service):
        return False
    for host in range(len(services.tenant)):
        if services.model[host] != model or not _may_host(tenants, services, tally, host, tenant):
            continue
        node, rule = _idle_node(tenants, services, layouts, tally, host)
        if node == NOBODY or rule != OWN_IDLE:
            continue
        if tally.occupied[tenant] + layouts.gpus[model, node] > tenants.limit_gpus[tenant] + DUST:
            continue
        _start(services, layouts, tally, moves, host, node, HOSTS, now_s)
        tally.hosted[service] += layouts.rate[model, node]
        return True
    return False


@jit
def _may_host(tenants: Tenants, services: Services, tally: Tally, host: int, guest_tenant: int) -> bool:
    """Whether a tenant has idle GPUs in its guarantee for a replica of a model, and nothing else to use them for.

    To others of its services that replica would be in the way: it would have to run its minimum runtime, and drain.
    """
    tenant = services.tenant[host]
    if tenant == guest_tenant or not tally.usage[tenant] < tenants.guarantee_gpus[tenant] - DUST:
        return False
    for other in range(len(services.tenant)):
        if other != host and services.tenant[other] == tenant and needed_lately(services, other) > 0.0:
            return False
    return True


@jit
def _idle_node(tenants: Tenants, services: Services, layouts: Layouts, tally: Tally, service: int) -> tuple[int, int]:
    """Return where a service may use idle GPUs, and the rule: where it loads fastest, then fits best, or NOBODY."""
    tenant, model = services.tenant[service], services.model[service]
    free = tally.free.sum()
    own_promised = promised_gpus(tenants, services, tally, tenant, OWN_IDLE)
    lent_promised = promised_gpus(tenants, services, tally, tenant, BORROW_IDLE)
    best, best_load_s, best_left, best_rule = NOBODY, np.inf, 0, OWN_IDLE
    for node in range(len(tally.free)):
        gpus = layouts.gpus[model, node]
        if gpus == 0 or tally.free[node] < gpus:
            continue
        if tally.occupied[tenant] + gpus > tenants.limit_gpus[tenant] + DUST:
            continue
        rule = OWN_IDLE if tally.usage[tenant] + gpus <= tenants.deserved_gpus[tenant] + DUST else BORROW_IDLE
        if free - gpus < (own_promised if rule == OWN_IDLE else lent_promised) - DUST:
            continue
        load_s, left = layouts.load_s[model, node], tally.free[node] - gpus
        if load_s < best_load_s or (load_s == best_load_s and left < best_left):
            best, best_load_s, best_left, best_rule = node, load_s, left, rule
    return best, best_rule


@jit
def _start(
    services: Services,
    layouts: Layouts,
    tally: Tally,
    moves: Moves,
    service: int,
    node: int,
    rule: int,
    now_s: float,
) -> None:
    """Start a replica on idle GPUs of a node."""
    model = services.model[service]
    gpus, load_s, rate = layouts.gpus[model, node], layouts.load_s[model, node], layouts.rate[model, node]
    tally.free[node] -= gpus
    add_replica(services, layouts, tally, service, node)
    push_move(tally, moves, START, rule, service, NOBODY, node, NOBODY, gpus, gpus * load_s, now_s + load_s, rate)
