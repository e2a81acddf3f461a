"""Which GPUs are freed for a replica: whose, on which node, by which rule, and at what loss.

Who gives: own surplus first; then the tenant with the most over what it deserves, and of its replicas the lowest
priority, the least lost work, the newest. Of several nodes, the one where the move loses the least: work that is
thrown away, grace, and the time *this* model takes to load on *this* node, each times the GPUs it keeps busy; and the
same once more where a victim will be needed, and takes the GPUs of another of its tenant. Whoever turns out not to be
needed is put back.
"""

import numpy as np

from waterline.policy.decisions import BORROW_IDLE, FREED_FOR_CLAIM, OUTBID_LOAN, OWN_IDLE, OWN_SURPLUS, RECLAIM
from waterline.policy.holdings import HOLD, NOBODY, READY, Layouts, Moves, Replicas, Services, Tenants
from waterline.policy.jit import jit
from waterline.policy.tally import (
    DUST,
    UNKNOWN,
    Tally,
    add_replica,
    loss_gpu_s,
    may_stop,
    misses_less,
    push_move,
    saturation,
    stop_replica,
)


@jit
def open_claim(
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
    replicas: Replicas,
    tally: Tally,
    moves: Moves,
    service: int,
    now_s: float,
) -> bool:
    """Free the GPUs of a node for a replica by stopping others, where that is legal; the cheapest node.

    First from the tenant that has the most too much; if it cannot give them alone, from all together.
    """
    claim = _first_closed(tally)
    donor = _most_over(tenants, services, replicas, tally, service, now_s)
    if claim == NOBODY or (donor == NOBODY and not _has_surplus(services, tally, service)):
        return False
    only = donor
    node, rule = _cheapest_node(tenants, services, layouts, replicas, tally, service, only, now_s)
    if node == NOBODY and donor != NOBODY:
        only = NOBODY
        node, rule = _cheapest_node(tenants, services, layouts, replicas, tally, service, only, now_s)
    if node == NOBODY:
        return False
    victims = _victims(tenants, services, layouts, replicas, tally, service, node, rule, only, now_s)
    held = min(tally.free[node], layouts.gpus[services.model[service], node])
    deadline_s = now_s
    for place in range(victims):
        grace_s = tenants.grace_s[services.tenant[replicas.service[tally.chosen[place]]]]
        deadline_s = max(deadline_s, now_s + grace_s)
    tally.open[claim] = 1
    tally.free[node] -= held
    tally.cost[:, node] = UNKNOWN
    push_move(tally, moves, HOLD, FREED_FOR_CLAIM, service, NOBODY, node, claim, held, 0.0, deadline_s, 0.0)
    for place in range(victims):
        victim = tally.chosen[place]
        own = services.tenant[replicas.service[victim]] == services.tenant[service]
        given = OWN_SURPLUS if own else rule
        stop_replica(tenants, services, replicas, tally, moves, victim, service, claim, given, now_s)
    add_replica(services, layouts, tally, service, node)
    return True


@jit
def _cheapest_node(
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
    replicas: Replicas,
    tally: Tally,
    service: int,
    only: int,
    now_s: float,
) -> tuple[int, int]:
    """Return the node where a claim loses the least, and the rule by which it is legal; NOBODY if it is nowhere.

    What a claim costs is remembered as long as nothing has moved on the node, and looked at again before a node is
    taken: what has been decided since may have made it dearer, or illegal. It counts as no less than was remembered.
    """
    if tally.donor[service] != only:
        tally.donor[service] = only
        tally.cost[service, :] = UNKNOWN
    _note_givers(tenants, services, tally, service, only)
    known, found = tally.cost[service], tally.found
    best, best_cost = NOBODY, np.inf
    for node in range(len(known)):
        if known[node] >= best_cost:
            continue  # UNKNOWN is below all costs
        cost, _ = _claim_cost(tenants, services, layouts, replicas, tally, service, node, only, now_s)
        known[node] = cost if known[node] == UNKNOWN else known[node]
        found[node] = max(cost, known[node])
        if found[node] < best_cost:
            best, best_cost = node, found[node]
    for node in range(len(known)):  # only of those that seemed better is it remembered that they are not
        if known[node] < best_cost or (known[node] == best_cost and node < best):
            known[node] = found[node]
    if best == NOBODY:
        return NOBODY, RECLAIM
    known[best] = best_cost
    _, rule = _claim_cost(tenants, services, layouts, replicas, tally, service, best, only, now_s)
    return best, rule


@jit
def _note_givers(tenants: Tenants, services: Services, tally: Tally, service: int, only: int) -> None:
    """Write into the tally what is the same for all nodes: whose replicas may be stopped, and which idle GPUs are kept.

    Nobody gives who is not noted; who is may still have to keep what it has on a node. See `_legal`.
    """
    mine, deserved = services.tenant[service], tenants.deserved_gpus
    for giver in range(len(services.tenant)):
        tenant, lower = services.tenant[giver], services.priority[giver] < services.priority[service]
        over = tally.usage[tenant] > deserved[tenant] + DUST
        borrows = lower and tally.usage[tenant] >= deserved[tenant] - DUST
        if tenant == mine:
            spares = services.priority[giver] == services.priority[service] and tally.spare[giver] >= 0.0
            tally.gives[giver] = giver != service and (lower or spares)
        else:
            tally.gives[giver] = (only < 0 or only == tenant) and (over or borrows)  # below 0: NOBODY
    tally.idle[0] = tally.free.sum()
    tally.idle[1] = promised_gpus(tenants, services, tally, mine, OWN_IDLE)
    tally.idle[2] = promised_gpus(tenants, services, tally, mine, BORROW_IDLE)


@jit
def _somebody_gives(
    tenants: Tenants, services: Services, replicas: Replicas, tally: Tally, node: int, now_s: float
) -> bool:
    """Whether there is a replica on a node that might be stopped."""
    for row in range(tally.first[node], tally.first[node + 1]):
        replica = tally.rows[row]
        if tally.gives[replicas.service[replica]] and may_stop(tenants, services, replicas, tally, replica, now_s):
            return True
    return False


@jit
def _claim_cost(
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
    replicas: Replicas,
    tally: Tally,
    service: int,
    node: int,
    only: int,
    now_s: float,
) -> tuple[float, int]:
    """Return what a claim on a node would lose, and the first rule by which it is legal; inf if there is none."""
    gpus = layouts.gpus[services.model[service], node]
    if gpus == 0 or tally.free[node] >= gpus or not _somebody_gives(tenants, services, replicas, tally, node, now_s):
        return np.inf, RECLAIM
    idle_left = tally.idle[0] - min(tally.free[node], gpus) if tally.free[node] > 0 else 0
    for rule in (OWN_SURPLUS, RECLAIM, OUTBID_LOAN):
        if tally.free[node] > 0 and idle_left < tally.idle[2 if rule == OUTBID_LOAN else 1] - DUST:
            continue
        victims = _victims(tenants, services, layouts, replicas, tally, service, node, rule, only, now_s)
        if victims > 0:
            cost = gpus * layouts.load_s[services.model[service], node]
            for place in range(victims):
                victim = tally.chosen[place]
                cost += loss_gpu_s(tenants, services, replicas, victim)
                cost += _again_gpu_s(tenants, services, layouts, replicas, tally, victim)
            return float(cost), rule
    return np.inf, RECLAIM


@jit
def _again_gpu_s(
    tenants: Tenants, services: Services, layouts: Layouts, replicas: Replicas, tally: Tally, victim: int
) -> float:
    """Return what it costs that a victim is needed, and will start again in the place of one of lower priority."""
    service, gpus = replicas.service[victim], replicas.gpus[victim]
    if tally.spare[service] >= replicas.rate[victim]:
        return 0.0
    tenant = services.tenant[service]
    for other in range(len(services.tenant)):
        lower = services.priority[other] < services.priority[service]
        if services.tenant[other] == tenant and lower and tally.supply[other] > 0.0:
            load_s = layouts.load_s[services.model[service], replicas.node[victim]]
            return float(gpus * (tenants.grace_s[tenant] + load_s))
    return 0.0


@jit
def _victims(
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
    replicas: Replicas,
    tally: Tally,
    service: int,
    node: int,
    rule: int,
    only: int,
    now_s: float,
) -> int:
    """Put into `tally.chosen` whom to stop on a node for a replica, as few as will do, and return how many.

    0 when that would not be legal. Own surplus may serve with any rule, others by the rule alone; `only` names the one
    other tenant that may give.
    """
    tenant, gpus = services.tenant[service], layouts.gpus[services.model[service], node]
    after = tally.usage[tenant] + gpus
    if not _has_surplus(services, tally, service) and (
        rule == OWN_SURPLUS or (rule == RECLAIM and after > tenants.deserved_gpus[tenant] + DUST)
    ):
        return 0
    tally.left[:] = tally.usage
    tally.left_spare[:] = tally.spare
    count, freed = 0, tally.free[node]
    while freed < gpus:
        best = NOBODY
        for row in range(tally.first[node], tally.first[node + 1]):
            replica = tally.rows[row]
            if not may_stop(tenants, services, replicas, tally, replica, now_s) or _is_in(tally, count, replica):
                continue
            if _legal(tenants, services, replicas, tally, service, replica, rule, only) and (
                best == NOBODY or _gives_first(tenants, services, replicas, tally, tenant, replica, best)
            ):
                best = replica
        if best == NOBODY:
            return 0
        tally.chosen[count] = best
        count += 1
        freed += replicas.gpus[best]
        giver = replicas.service[best]
        tally.left[services.tenant[giver]] -= replicas.gpus[best]
        tally.left_spare[giver] -= replicas.rate[best]
    count = _put_back(replicas, tally, count, freed - gpus)
    own = 0
    for place in range(count):
        victim = tally.chosen[place]
        own += replicas.gpus[victim] if services.tenant[replicas.service[victim]] == tenant else 0
    legal = rule == OUTBID_LOAN or own >= gpus or after - own <= tenants.deserved_gpus[tenant] + DUST
    if not legal or tally.occupied[tenant] - own + gpus > tenants.limit_gpus[tenant] + DUST:
        return 0
    return count


@jit
def _put_back(replicas: Replicas, tally: Tally, count: int, too_many: int) -> int:
    """Put back whom a later victim has made unnecessary, the last chosen first; return how many are left."""
    chosen = tally.chosen
    for late in range(count - 2, -1, -1):
        if replicas.gpus[chosen[late]] <= too_many:
            too_many -= replicas.gpus[chosen[late]]
            for place in range(late, count - 1):
                chosen[place] = chosen[place + 1]
            count -= 1
    return count


@jit
def _is_in(tally: Tally, count: int, replica: int) -> bool:
    found = False
    for place in range(count):
        found = found or tally.chosen[place] == replica
    return found


@jit
def _first_closed(tally: Tally) -> int:
    """Return an empty row for a claim; NOBODY when there is none."""
    for claim in range(len(tally.open)):
        if not tally.open[claim]:
            return claim
    return NOBODY


@jit
def _has_surplus(services: Services, tally: Tally, service: int) -> bool:
    """Whether another service of the same tenant and priority can spare something, or one of less has anything."""
    for other in range(len(services.tenant)):
        if other == service or services.tenant[other] != services.tenant[service]:
            continue
        if services.priority[other] < services.priority[service] and tally.supply[other] > 0.0:
            return True
        if services.priority[other] == services.priority[service] and tally.spare[other] > 0.0:
            return True
    return False


@jit
def _legal(
    tenants: Tenants,
    services: Services,
    replicas: Replicas,
    tally: Tally,
    service: int,
    replica: int,
    rule: int,
    only: int,
) -> bool:
    """Whether a replica may be stopped for a service by a rule, with what tenants and services have left by now."""
    giver = replicas.service[replica]
    tenant, gpus = services.tenant[giver], replicas.gpus[replica]
    if tenant == services.tenant[service]:
        if services.priority[giver] != services.priority[service]:
            return bool(services.priority[giver] < services.priority[service])
        spare = min(tally.left_spare[giver], tally.answering[services.model[giver]])
        return bool(giver != service and spare >= replicas.rate[replica])
    if rule == OWN_SURPLUS or (only != NOBODY and only != tenant):  # noqa: PLR1714 - numba has no mixed tuples
        return False
    deserved, guarantee = tenants.deserved_gpus[tenant], tenants.guarantee_gpus[tenant]
    if rule == RECLAIM:
        return bool(tally.left[tenant] > deserved + DUST and tally.left[tenant] - gpus >= guarantee - DUST)
    return bool(tally.left[tenant] - gpus >= deserved - DUST and services.priority[giver] < services.priority[service])


@jit
def _most_over(
    tenants: Tenants, services: Services, replicas: Replicas, tally: Tally, service: int, now_s: float
) -> int:
    """Return the other tenant with the most over what it deserves, of those with a replica it may take."""
    best, best_part = NOBODY, 0.0
    own = services.tenant[service]
    reclaims = tally.usage[own] + 1.0 <= tenants.deserved_gpus[own] + DUST
    gives, nobody_gives = np.zeros(len(services.tenant), np.int64), True
    for giver in range(len(services.tenant)):
        tenant = services.tenant[giver]
        over = tenant != own and tally.usage[tenant] > tenants.deserved_gpus[tenant]
        if over and (reclaims or services.priority[giver] < services.priority[service]):
            gives[giver], nobody_gives = 1, False
    if nobody_gives:
        return NOBODY
    for replica in range(len(replicas.state)):
        giver = replicas.service[replica]
        if not gives[giver]:
            continue
        if replicas.state[replica] != READY or not tally.staying[replica]:
            continue
        if now_s - replicas.since_s[replica] < tenants.min_runtime_s[services.tenant[giver]]:
            continue
        tenant = services.tenant[giver]
        part = tally.usage[tenant] / max(tenants.deserved_gpus[tenant], DUST)
        if part > 1.0 and (best == NOBODY or part > best_part):
            best, best_part = tenant, part
    return best


@jit
def _gives_first(
    tenants: Tenants,
    services: Services,
    replicas: Replicas,
    tally: Tally,
    claimant: int,
    one: int,
    other: int,
) -> bool:
    """Whether a replica is stopped rather than another; see the top of this file for the order."""
    mine, theirs = replicas.service[one], replicas.service[other]
    mine_own, theirs_own = services.tenant[mine] == claimant, services.tenant[theirs] == claimant
    if mine_own != theirs_own:
        return bool(mine_own)
    mine_part = saturation(tenants, tally.left, services.tenant[mine])
    theirs_part = saturation(tenants, tally.left, services.tenant[theirs])
    if mine_part != theirs_part and not mine_own:
        return bool(mine_part > theirs_part)
    if services.priority[mine] != services.priority[theirs]:
        return bool(services.priority[mine] < services.priority[theirs])
    return misses_less(replicas, one, other)


@jit
def promised_gpus(tenants: Tenants, services: Services, tally: Tally, claimant: int, rule: int) -> float:
    """Return the idle GPUs that are kept for other tenants.

    Their guarantees; and, before anybody borrows, what they will need soon of what they deserve: to lend what is about
    to be reclaimed would load a model for nothing.
    """
    promised = 0.0
    for tenant in range(len(tally.usage)):
        if tenant == claimant:
            continue
        due = max(tenants.guarantee_gpus[tenant] - tally.usage[tenant], 0.0)
        if rule == BORROW_IDLE:
            soon = _needed_gpus(services, tally, tenant)
            due = max(due, min(tenants.deserved_gpus[tenant] - tally.usage[tenant], soon))
        promised += due
    return promised


@jit
def _needed_gpus(services: Services, tally: Tally, tenant: int) -> float:
    """Return how many GPUs more a tenant will need soon, at the rate of the best node for each model."""
    needed = 0.0
    for service in range(len(services.tenant)):
        short = services.kept[service] - tally.supply[service]
        if services.tenant[service] != tenant or not short > 0.0:
            continue
        thrift = tally.thrift[services.model[service]]
        needed += short * thrift if thrift < np.inf else 0.0
    return needed
