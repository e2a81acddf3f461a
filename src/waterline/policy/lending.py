"""Which replicas start and stop, and on whose GPUs: the minutes clock.

The words are those of Volcano, Kueue and KAI. Of a tenant's GPUs the **guarantee** is kept for it even while it idles;
what it **deserves** beyond that is lent while it idles and always comes back; up to its **limit** it may borrow.

`plan_moves` looks at the fleet as it is and returns moves; it does not act, and remembers nothing but what services
needed lately (`Services.needed`). In this order:

1. *Claims.* A claim is a node's GPUs that are being freed for one replica. When they are complete, it starts; nobody
   else gets them before. If it has not been needed for `STABLE_S` by then, they are free for all.
2. *Hand-back.* What a service has not needed for `STABLE_S` is drained. What falls within its tenant's guarantee
   stays, because nobody else may use it.
3. *Starts*, one replica at a time, for the service that is furthest behind: below the guarantee first, then below
   deserved, then borrowing; of each the highest priority, then the smallest part of what is due (KAI's fair share,
   filled up drop by drop). Each takes, in this order: GPUs that idle; else GPUs of a service of its own tenant that can
   spare them; else it **reclaims** while it stays within what it deserves, from tenants that have more than they
   deserve and never below their guarantee; else, borrowing, it **outbids** a loan of lower priority, and leaves the
   victim what it deserves.

Who gives: own surplus first; then the tenant with the most over what it deserves, and of its replicas the lowest
priority, the least lost work, the newest. Of several nodes, the one where the move loses the least: work that is
thrown away, grace, and the time *this* model takes to load on *this* node, each times the GPUs it keeps busy. Whoever
turns out not to be needed is put back.

Who is never stopped: a replica that loads, and one that has not run for its tenant's minimum runtime. A drained replica
hands over by its deadline, which is its tenant's grace from now; its claimant serves a load time later.

A *service* is what one tenant asks of one model; research is a service too, one that wants all it can get (inf). Work
is in any unit, as long as `wanted`, `kept` and `Layouts.rate` share it. Nodes are places whose GPUs can be combined:
pass a pool as one node where a replica may span several. A model without a layout on a node never gets a GPU there.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterline.policy.decisions import (
    BORROW_IDLE,
    CLAIM_DROPPED,
    CLAIM_KEPT,
    FREED_FOR_CLAIM,
    OUTBID_LOAN,
    OWN_IDLE,
    OWN_SURPLUS,
    RECLAIM,
    SURPLUS,
)
from waterline.policy.jit import jit

NOBODY = -1
GONE, LOADING, READY, DRAINING = 0, 1, 2, 3  # states of a replica
START, DRAIN, HOLD, HAND_BACK = 1, 2, 3, 4  # kinds of moves
STABLE_S = 300.0  # a service must have been able to spare a replica for so long; what people know from Kubernetes' HPA
SLOT_S = STABLE_S / 10
SLOTS = 11  # the last ten whole ones, and the one under way
SLACK = 0.02  # of what must stay possible, on top, before anything is spare
DUST = 1e-9
UNKNOWN = -1.0


class Tenants(NamedTuple):
    """What tenants are promised, in GPUs, and on which terms they lend and borrow."""

    guarantee_gpus: NDArray[np.float64]  # [tenant]
    deserved_gpus: NDArray[np.float64]  # [tenant]
    limit_gpus: NDArray[np.float64]  # [tenant]
    weight: NDArray[np.float64]  # [tenant] in sharing what is left over; as a rule what it deserves
    grace_s: NDArray[np.float64]  # [tenant] that its replicas get to drain or to checkpoint
    min_runtime_s: NDArray[np.float64]  # [tenant] that its replicas run before anybody may stop them


class Services(NamedTuple):
    """What each tenant asks of each model."""

    tenant: NDArray[np.int64]  # [service]
    model: NDArray[np.int64]  # [service]
    priority: NDArray[np.int64]  # [service] higher outbids lower
    wanted: NDArray[np.float64]  # [service] work a second, one cold start from now
    kept: NDArray[np.float64]  # [service] the most from now until a replica stopped now could be back; at least wanted
    needed: NDArray[np.float64]  # [service, slot] the most it needed in each part of the last STABLE_S; written here
    slot: NDArray[np.int64]  # [1] the part that was written last; written here


class Layouts(NamedTuple):
    """What a replica of a model is on each node."""

    gpus: NDArray[np.int64]  # [model, node] it takes; 0: the model does not run there
    rate: NDArray[np.float64]  # [model, node] work a second it does
    load_s: NDArray[np.float64]  # [model, node] from the start to the first request


class Claims(NamedTuple):
    """GPUs of a node that are being freed, each time for one replica. Rows without a service are empty."""

    service: NDArray[np.int64]  # [claim] whose replica will start; NOBODY
    node: NDArray[np.int64]  # [claim]
    held_gpus: NDArray[np.int64]  # [claim] freed for it so far; nobody else gets them


class Replicas(NamedTuple):
    """Who has GPUs. Rows whose state is GONE are empty."""

    service: NDArray[np.int64]  # [replica]
    node: NDArray[np.int64]  # [replica]
    gpus: NDArray[np.int64]  # [replica]
    state: NDArray[np.int64]  # [replica]
    since_s: NDArray[np.float64]  # [replica] when that state began
    lost_gpu_s: NDArray[np.float64]  # [replica] work that is thrown away if it is stopped now: since the checkpoint
    claim: NDArray[np.int64]  # [replica] for which it drains; NOBODY


class Moves(NamedTuple):
    """What to do, in this order. Each row is one move."""

    kind: NDArray[np.int64]  # [move] START, DRAIN, HOLD or HAND_BACK
    rule: NDArray[np.int64]  # [move] a key of decisions.RULES
    claimant: NDArray[np.int64]  # [move] service that gets the GPUs; of a HAND_BACK, that gives them
    victim: NDArray[np.int64]  # [move] replica that stops; NOBODY
    node: NDArray[np.int64]  # [move]
    claim: NDArray[np.int64]  # [move] row of the claim that it opens, feeds or ends; NOBODY
    gpus: NDArray[np.int64]  # [move] of the replica; of a HOLD, those that idle on the node and are kept
    cost_gpu_s: NDArray[np.float64]  # [move] lost work and grace of a victim; load time of a start
    deadline_s: NDArray[np.float64]  # [move] when the replica serves (START) or the GPUs are handed over, at the latest


class Tally(NamedTuple):
    """The fleet as it will be when the moves so far have been made."""

    usage: NDArray[np.float64]  # [tenant] GPUs of replicas that stay, and of claims
    occupied: NDArray[np.float64]  # [tenant] the same and those that drain
    supply: NDArray[np.float64]  # [service] work a second of replicas that stay, and of claims
    spare: NDArray[np.float64]  # [service] work a second it can do without now; below 0: it cannot
    stable: NDArray[np.float64]  # [service] the same, of what it could do without all the last STABLE_S
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
    cost: NDArray[np.float64]  # [service, node] of a claim there when it was looked at; inf: not legal; UNKNOWN
    donor: NDArray[np.int64]  # [service] who alone might give, in those costs


def new_services(tenant: NDArray[np.int64], model: NDArray[np.int64], priority: NDArray[np.int64]) -> Services:
    """Return services that want nothing yet and, as nobody knows what they needed before, spare nothing for a while."""
    count = len(tenant)
    return Services(
        np.array(tenant, np.int64),
        np.array(model, np.int64),
        np.array(priority, np.int64),
        np.zeros(count),
        np.zeros(count),
        np.full((count, SLOTS), np.inf),
        np.full(1, NOBODY, np.int64),
    )


def new_claims(rows: int) -> Claims:
    """Return room for so many claims; as many as there are GPUs are always enough."""
    return Claims(np.full(rows, NOBODY, np.int64), np.zeros(rows, np.int64), np.zeros(rows, np.int64))


def new_replicas(rows: int) -> Replicas:
    """Return room for so many replicas; twice as many as there are GPUs are always enough."""
    return Replicas(
        np.zeros(rows, np.int64),
        np.zeros(rows, np.int64),
        np.zeros(rows, np.int64),
        np.zeros(rows, np.int64),
        np.zeros(rows),
        np.zeros(rows),
        np.full(rows, NOBODY, np.int64),
    )


# --- The plan ---------------------------------------------------------------------------------------------------------


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
    _note_needs(services, now_s)
    tally = _tally(tenants, services, layouts, free_gpus, claims, replicas)
    moves = _new_moves(len(replicas.state) + 2 * len(claims.service) + int(free_gpus.sum()))
    _end_claims(tenants, services, layouts, claims, replicas, tally, moves, now_s)
    _hand_back(tenants, services, layouts, replicas, tally, moves, now_s)
    blocked = np.zeros(len(services.tenant), np.int64)
    while True:
        service = _neediest(tenants, services, tally, blocked)
        if service == NOBODY:
            break
        if not (
            _start_on_idle(tenants, services, layouts, tally, moves, service, now_s)
            or _claim(tenants, services, layouts, replicas, tally, moves, service, now_s)
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
    )


@jit
def _end_claims(
    tenants: Tenants,
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
        needed = tally.supply[service] - rate < _needed_lately(services, service)
        if freed + coming[claim] < gpus or (coming[claim] == 0 and not needed):
            tally.usage[tenant] -= gpus
            tally.occupied[tenant] -= gpus
            tally.supply[service] -= rate
            tally.spare[service] -= rate
            if coming[claim] == 0:
                tally.free[node] += freed
                tally.open[claim] = 0
                _push(tally, moves, HAND_BACK, CLAIM_DROPPED, service, NOBODY, node, claim, freed, 0.0, now_s)
        elif freed >= gpus and tally.occupied[tenant] <= tenants.limit_gpus[tenant] + DUST:
            tally.free[node] += freed - gpus
            tally.open[claim] = 0
            load_s = layouts.load_s[model, node]
            _push(tally, moves, START, CLAIM_KEPT, service, NOBODY, node, claim, gpus, gpus * load_s, now_s + load_s)


@jit
def _hand_back(
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
    replicas: Replicas,
    tally: Tally,
    moves: Moves,
    now_s: float,
) -> None:
    """Drain what services have been able to spare all the last `STABLE_S`."""
    for service in range(len(services.tenant)):
        while tally.stable[service] > 0.0:
            replica = _least_missed(tenants, services, layouts, replicas, tally, service, now_s)
            if replica == NOBODY:
                break
            _stop(tenants, services, layouts, replicas, tally, moves, replica, service, NOBODY, SURPLUS, now_s)


@jit
def _least_missed(
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
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
        if layouts.rate[services.model[service], replicas.node[replica]] > tally.stable[service]:
            continue
        if tally.usage[tenant] - replicas.gpus[replica] < tenants.guarantee_gpus[tenant] - DUST:
            continue
        if best == NOBODY or _misses_less(replicas, replica, best):
            best = replica
    return best


# --- Starts -----------------------------------------------------------------------------------------------------------


@jit
def _neediest(tenants: Tenants, services: Services, tally: Tally, blocked: NDArray[np.int64]) -> int:
    """Return the service that starts a replica next; NOBODY when none needs one, or none can have one."""
    best, best_standing, best_priority, best_part = NOBODY, 0, 0, 0.0
    for service in range(len(services.tenant)):
        if blocked[service] or not services.wanted[service] > tally.supply[service] * (1.0 + DUST):
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
    """Start a replica on idle GPUs if there are some that may be used: where it loads fastest, then fits best."""
    tenant, model = services.tenant[service], services.model[service]
    free = tally.free.sum()
    own_promised = _promised(tenants, services, tally, tenant, OWN_IDLE)
    lent_promised = _promised(tenants, services, tally, tenant, BORROW_IDLE)
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
    if best == NOBODY:
        return False
    gpus = layouts.gpus[model, best]
    tally.free[best] -= gpus
    _add(services, layouts, tally, service, best)
    _push(tally, moves, START, best_rule, service, NOBODY, best, NOBODY, gpus, gpus * best_load_s, now_s + best_load_s)
    return True


@jit
def _promised(tenants: Tenants, services: Services, tally: Tally, claimant: int, rule: int) -> float:
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


@jit
def _claim(
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
    _push(tally, moves, HOLD, FREED_FOR_CLAIM, service, NOBODY, node, claim, held, 0.0, deadline_s)
    for place in range(victims):
        victim = tally.chosen[place]
        own = services.tenant[replicas.service[victim]] == services.tenant[service]
        given = OWN_SURPLUS if own else rule
        _stop(tenants, services, layouts, replicas, tally, moves, victim, service, claim, given, now_s)
    _add(services, layouts, tally, service, node)
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

    What a claim costs is remembered as long as nothing has moved on the node, and looked at again for the node that is
    taken: what has been decided since may have made it illegal.
    """
    if tally.donor[service] != only:
        tally.donor[service] = only
        tally.cost[service, :] = UNKNOWN
    while True:
        best, best_cost = NOBODY, np.inf
        for node in range(len(tally.free)):
            if tally.cost[service, node] == UNKNOWN:
                cost, _ = _claim_cost(tenants, services, layouts, replicas, tally, service, node, only, now_s)
                tally.cost[service, node] = cost
            if tally.cost[service, node] < best_cost:
                best, best_cost = node, tally.cost[service, node]
        if best == NOBODY:
            return NOBODY, RECLAIM
        cost, rule = _claim_cost(tenants, services, layouts, replicas, tally, service, best, only, now_s)
        if cost <= best_cost:
            return best, rule
        tally.cost[service, best] = cost


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
    tenant, gpus = services.tenant[service], layouts.gpus[services.model[service], node]
    if gpus == 0:
        return np.inf, RECLAIM
    idle_left = tally.free.sum() - min(tally.free[node], gpus) if tally.free[node] > 0 else 0
    for rule in (OWN_SURPLUS, RECLAIM, OUTBID_LOAN):
        promise = BORROW_IDLE if rule == OUTBID_LOAN else OWN_IDLE
        if tally.free[node] > 0 and idle_left < _promised(tenants, services, tally, tenant, promise) - DUST:
            continue
        victims = _victims(tenants, services, layouts, replicas, tally, service, node, rule, only, now_s)
        if victims > 0:
            cost = gpus * layouts.load_s[services.model[service], node]
            for place in range(victims):
                cost += _loss_gpu_s(tenants, services, replicas, tally.chosen[place])
            return float(cost), rule
    return np.inf, RECLAIM


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
            if not _may_stop(tenants, services, replicas, tally, replica, now_s) or _is_in(tally, count, replica):
                continue
            if _legal(tenants, services, layouts, replicas, tally, service, replica, rule, only) and (
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
        tally.left_spare[giver] -= layouts.rate[services.model[giver], node]
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
    """Whether another service of the same tenant can spare something."""
    for other in range(len(services.tenant)):
        if other != service and services.tenant[other] == services.tenant[service] and tally.spare[other] > 0.0:
            return True
    return False


@jit
def _legal(
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
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
        return bool(
            giver != service and tally.left_spare[giver] >= layouts.rate[services.model[giver], replicas.node[replica]]
        )
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
    for replica in range(len(replicas.state)):
        giver = replicas.service[replica]
        if replicas.state[replica] != READY or not tally.staying[replica]:
            continue
        if now_s - replicas.since_s[replica] < tenants.min_runtime_s[services.tenant[giver]]:
            continue
        if not reclaims and services.priority[giver] >= services.priority[service]:
            continue
        tenant = services.tenant[giver]
        part = tally.usage[tenant] / max(tenants.deserved_gpus[tenant], DUST)
        if tenant != own and part > 1.0 and (best == NOBODY or part > best_part):
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
    mine_part = _saturation(tenants, tally.left, services.tenant[mine])
    theirs_part = _saturation(tenants, tally.left, services.tenant[theirs])
    if mine_part != theirs_part and not mine_own:
        return bool(mine_part > theirs_part)
    if services.priority[mine] != services.priority[theirs]:
        return bool(services.priority[mine] < services.priority[theirs])
    return _misses_less(replicas, one, other)


# --- Small things -----------------------------------------------------------------------------------------------------


@jit
def _saturation(tenants: Tenants, usage: NDArray[np.float64], tenant: int) -> float:
    return float(usage[tenant] / max(tenants.deserved_gpus[tenant], DUST))


@jit
def _misses_less(replicas: Replicas, one: int, other: int) -> bool:
    """Whether stopping a replica loses less than stopping another; if the same, whether it is newer."""
    if replicas.lost_gpu_s[one] != replicas.lost_gpu_s[other]:
        return bool(replicas.lost_gpu_s[one] < replicas.lost_gpu_s[other])
    return bool(replicas.since_s[one] > replicas.since_s[other])


@jit
def _may_stop(
    tenants: Tenants, services: Services, replicas: Replicas, tally: Tally, replica: int, now_s: float
) -> bool:
    """Whether a replica has loaded and has run for its minimum runtime, and is not being stopped already."""
    if replicas.state[replica] != READY or not tally.staying[replica]:
        return False
    least_s = tenants.min_runtime_s[services.tenant[replicas.service[replica]]]
    return bool(now_s - replicas.since_s[replica] >= least_s)


@jit
def _loss_gpu_s(tenants: Tenants, services: Services, replicas: Replicas, replica: int) -> float:
    """Return what stopping a replica loses: work since its checkpoint, and its GPUs while it drains."""
    grace_s = tenants.grace_s[services.tenant[replicas.service[replica]]]
    return float(replicas.lost_gpu_s[replica] + replicas.gpus[replica] * grace_s)


@jit
def _stop(
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
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
    tenant, rate = services.tenant[service], layouts.rate[services.model[service], node]
    tally.staying[replica] = 0
    tally.usage[tenant] -= gpus
    tally.supply[service] -= rate
    tally.spare[service] -= rate
    tally.stable[service] -= rate
    loss = _loss_gpu_s(tenants, services, replicas, replica)
    kind = HAND_BACK if claim == NOBODY else DRAIN
    _push(tally, moves, kind, rule, claimant, replica, node, claim, gpus, loss, now_s + tenants.grace_s[tenant])


@jit
def _add(services: Services, layouts: Layouts, tally: Tally, service: int, node: int) -> None:
    tenant, model = services.tenant[service], services.model[service]
    tally.usage[tenant] += layouts.gpus[model, node]
    tally.occupied[tenant] += layouts.gpus[model, node]
    tally.supply[service] += layouts.rate[model, node]
    tally.spare[service] += layouts.rate[model, node]


@jit
def _needs(services: Services, service: int) -> float:
    return float(max(services.kept[service], services.wanted[service]))


@jit
def _needed_lately(services: Services, service: int) -> float:
    """Return the most a service needed in the last `STABLE_S`."""
    most = _needs(services, service)
    for slot in range(SLOTS):
        most = max(most, services.needed[service, slot])
    return float(most)


@jit
def _note_needs(services: Services, now_s: float) -> None:
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
def _tally(
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
        np.full((len(services.tenant), len(free_gpus)), UNKNOWN),
        np.full(len(services.tenant), NOBODY, np.int64),
    )
    for model in range(len(layouts.gpus)):
        for node in range(len(free_gpus)):
            if layouts.gpus[model, node] > 0:
                thrift = layouts.gpus[model, node] / layouts.rate[model, node]
                tally.thrift[model] = min(tally.thrift[model], thrift)
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
        tally.supply[service] += layouts.rate[services.model[service], replicas.node[replica]]
    _group_by_node(replicas, tally)
    for service in range(len(services.tenant)):
        tally.spare[service] = tally.supply[service] - _needs(services, service) * (1.0 + SLACK)
        tally.stable[service] = tally.supply[service] - _needed_lately(services, service) * (1.0 + SLACK)
    for claim in range(len(claims.service)):
        if claims.service[claim] != NOBODY:
            tally.open[claim] = 1
            _add(services, layouts, tally, claims.service[claim], claims.node[claim])
    return tally


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
def _new_moves(most: int) -> Moves:
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
    )


@jit
def _push(
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
) -> None:
    at = tally.made[0]
    moves.kind[at], moves.rule[at], moves.claimant[at], moves.victim[at] = kind, rule, claimant, victim
    moves.node[at], moves.claim[at], moves.gpus[at] = node, claim, gpus
    moves.cost_gpu_s[at], moves.deadline_s[at] = cost_gpu_s, deadline_s
    tally.made[0] = at + 1


# --- What the moves mean ----------------------------------------------------------------------------------------------


@jit
def apply_moves(moves: Moves, free_gpus: NDArray[np.int64], claims: Claims, replicas: Replicas, now_s: float) -> bool:
    """Write moves into the state: a caller that acts on them does this as well. False when rows for replicas run out.

    Later the caller tells `has_loaded` when a replica answers, and `has_ended` when one is gone: by its deadline.
    """
    for move in range(len(moves.kind)):
        node, victim, gpus, claim = moves.node[move], moves.victim[move], moves.gpus[move], moves.claim[move]
        if moves.kind[move] == START:
            row = _empty_row(replicas)
            if row == NOBODY:
                return False
            if claim != NOBODY:
                _close(free_gpus, claims, replicas, claim)
            free_gpus[node] -= gpus
            replicas.service[row], replicas.node[row], replicas.gpus[row] = moves.claimant[move], node, gpus
            replicas.state[row], replicas.since_s[row] = LOADING, now_s
            replicas.lost_gpu_s[row], replicas.claim[row] = 0.0, NOBODY
        elif moves.kind[move] == HOLD:
            claims.service[claim], claims.node[claim], claims.held_gpus[claim] = moves.claimant[move], node, gpus
            free_gpus[node] -= gpus
        elif victim != NOBODY:
            replicas.state[victim], replicas.since_s[victim], replicas.claim[victim] = DRAINING, now_s, claim
        else:
            _close(free_gpus, claims, replicas, claim)
    return True


@jit
def has_loaded(replicas: Replicas, replica: int, now_s: float) -> None:
    """A replica answers requests from now on."""
    replicas.state[replica], replicas.since_s[replica] = READY, now_s


@jit
def has_ended(free_gpus: NDArray[np.int64], claims: Claims, replicas: Replicas, replica: int) -> None:
    """A replica is gone, drained or failed: its GPUs go to the claim they were freed for, else to everybody."""
    claim = replicas.claim[replica]
    if claim == NOBODY:
        free_gpus[replicas.node[replica]] += replicas.gpus[replica]
    else:
        claims.held_gpus[claim] += replicas.gpus[replica]
    replicas.state[replica], replicas.claim[replica] = GONE, NOBODY


@jit
def _close(free_gpus: NDArray[np.int64], claims: Claims, replicas: Replicas, claim: int) -> None:
    """End a claim; what drains for it drains for everybody from now on."""
    for replica in range(len(replicas.state)):
        if replicas.claim[replica] == claim:
            replicas.claim[replica] = NOBODY
    free_gpus[claims.node[claim]] += claims.held_gpus[claim]
    claims.held_gpus[claim], claims.service[claim] = 0, NOBODY


@jit
def _empty_row(replicas: Replicas) -> int:
    for replica in range(len(replicas.state)):
        if replicas.state[replica] == GONE:
            return replica
    return NOBODY
