"""Replicas that several tenants use: as whose GPUs each of them counts.

Requests of all tenants go to the replicas of their model, whoever these count for; to share their time among tenants
is the business of `admission`. When what a tenant needs of a model changes, a replica may pass to it as it runs. That
costs nothing, so it is done first where the giver can spare it; otherwise by the rules by which it might be stopped.
"""

import numpy as np

from waterline.policy.decisions import OUTBID_LOAN, RECLAIM, SPARED
from waterline.policy.holdings import NOBODY, TAKE_OVER, Moves, Replicas, Services, Tenants
from waterline.policy.jit import jit
from waterline.policy.tally import DUST, Tally, may_stop, push_move, saturation


@jit
def take_over(
    tenants: Tenants,
    services: Services,
    replicas: Replicas,
    tally: Tally,
    moves: Moves,
    service: int,
    by: int,
    now_s: float,
) -> bool:
    """Let a service have a replica of its model that counts for another tenant, if one may pass to it.

    `by` says how: SPARED, only what its giver can do without; RECLAIM, what may be reclaimed or outbid. From the tenant
    with the most over what it deserves.
    """
    best, best_rule, best_part = NOBODY, SPARED, -np.inf
    gives = np.zeros(len(services.tenant), np.int64)
    for giver in range(len(services.tenant)):
        gives[giver] = _might_give(tenants, services, tally, service, giver, by)
    for replica in range(len(replicas.state) if gives.any() else 0):
        if not gives[replicas.service[replica]]:
            continue
        rule = _rule(tenants, services, replicas, tally, service, replica, by, now_s)
        if rule == NOBODY:
            continue
        part = saturation(tenants, tally.usage, services.tenant[replicas.service[replica]])
        if part > best_part:
            best, best_rule, best_part = replica, rule, part
    if best == NOBODY:
        return False
    giver, gpus, rate = replicas.service[best], replicas.gpus[best], replicas.rate[best]
    for usage in (tally.usage, tally.occupied):
        usage[services.tenant[giver]] -= gpus
        usage[services.tenant[service]] += gpus
    for work in (tally.supply, tally.spare, tally.stable):
        work[giver] -= rate
        work[service] += rate
    tally.staying[best] = 0  # it stays, but nobody decides about it again this time
    push_move(tally, moves, TAKE_OVER, best_rule, service, best, replicas.node[best], NOBODY, gpus, 0.0, now_s, 0.0)
    return True


@jit
def _might_give(tenants: Tenants, services: Services, tally: Tally, service: int, giver: int, by: int) -> bool:
    """Whether it is worth looking at the replicas of a service."""
    owner, mine = services.tenant[giver], services.tenant[service]
    if services.model[giver] != services.model[service] or owner == mine or not tally.supply[giver] > 0.0:
        return False
    if by == SPARED:
        return bool(tally.spare[giver] > 0.0)
    over = tally.usage[owner] > tenants.deserved_gpus[owner]
    below = tally.usage[mine] < tenants.deserved_gpus[mine]
    return bool(over and (below or services.priority[giver] < services.priority[service]))


@jit
def _rule(
    tenants: Tenants,
    services: Services,
    replicas: Replicas,
    tally: Tally,
    service: int,
    replica: int,
    by: int,
    now_s: float,
) -> int:
    """Return the rule by which a replica of who might give may pass to a service; NOBODY if it may not."""
    giver = replicas.service[replica]
    owner, mine, gpus = services.tenant[giver], services.tenant[service], replicas.gpus[replica]
    if not tally.staying[replica]:
        return NOBODY
    left, after = tally.usage[owner] - gpus, tally.usage[mine] + gpus
    if left < tenants.guarantee_gpus[owner] - DUST or tally.occupied[mine] + gpus > tenants.limit_gpus[mine] + DUST:
        return NOBODY
    deserved = tenants.deserved_gpus
    if by == SPARED:
        return SPARED if tally.spare[giver] >= replicas.rate[replica] else NOBODY
    rule = NOBODY
    if may_stop(tenants, services, replicas, tally, replica, now_s):
        if tally.usage[owner] > deserved[owner] + DUST and after <= deserved[mine] + DUST:
            rule = RECLAIM
        elif left >= deserved[owner] - DUST and services.priority[giver] < services.priority[service]:
            rule = OUTBID_LOAN
    return rule
