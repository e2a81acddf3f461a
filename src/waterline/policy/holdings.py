"""Who has which GPUs, and what a move changes about it.

Arrays that the caller keeps and hands in: what tenants are promised, what services need, what a replica is where, and
who has GPUs or waits for them. `lending` reads them and returns `Moves`; `apply_moves` writes those in.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterline.policy.jit import jit

NOBODY = -1
GONE, LOADING, READY, DRAINING = 0, 1, 2, 3  # states of a replica
START, DRAIN, HOLD, HAND_BACK, TAKE_OVER = 1, 2, 3, 4, 5  # kinds of moves
SLOTS = 11  # parts of the time for which needs are remembered: the last ten whole ones, and the one under way


class Tenants(NamedTuple):
    """What tenants are promised, in GPUs, and on which terms they lend and borrow."""

    guarantee_gpus: NDArray[np.float64]  # [tenant]
    deserved_gpus: NDArray[np.float64]  # [tenant]
    limit_gpus: NDArray[np.float64]  # [tenant]
    weight: NDArray[np.float64]  # [tenant] in sharing what is left over; as a rule what it deserves
    grace_s: NDArray[np.float64]  # [tenant] that its replicas get to drain or to checkpoint
    min_runtime_s: NDArray[np.float64]  # [tenant] that its replicas run before anybody may stop them


class Services(NamedTuple):
    """What each tenant asks of each model; tenants of the same model may take over each other's replicas."""

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
    rate: NDArray[np.float64]  # [replica] work a second it does


class Moves(NamedTuple):
    """What to do, in this order. Each row is one move."""

    kind: NDArray[np.int64]  # [move] START, DRAIN, HOLD, HAND_BACK or TAKE_OVER
    rule: NDArray[np.int64]  # [move] a key of decisions.RULES
    claimant: NDArray[np.int64]  # [move] service that gets the GPUs; of a HAND_BACK, that gives them
    victim: NDArray[np.int64]  # [move] replica that stops, or that is taken over as it runs; NOBODY
    node: NDArray[np.int64]  # [move]
    claim: NDArray[np.int64]  # [move] row of the claim that it opens, feeds or ends; NOBODY
    gpus: NDArray[np.int64]  # [move] of the replica; of a HOLD, those that idle on the node and are kept
    cost_gpu_s: NDArray[np.float64]  # [move] lost work and grace of a victim; load time of a start
    deadline_s: NDArray[np.float64]  # [move] when the replica serves (START) or the GPUs are handed over, at the latest
    rate: NDArray[np.float64]  # [move] work a second of the replica that starts
    started: NDArray[np.int64]  # [move] the row of that replica, once the moves have been applied; NOBODY


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
        np.zeros(rows),
    )


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
                close_claim(free_gpus, claims, replicas, claim)
            free_gpus[node] -= gpus
            replicas.service[row], replicas.node[row], replicas.gpus[row] = moves.claimant[move], node, gpus
            replicas.state[row], replicas.since_s[row] = LOADING, now_s
            replicas.lost_gpu_s[row], replicas.claim[row] = 0.0, NOBODY
            replicas.rate[row], moves.started[move] = moves.rate[move], row
        elif moves.kind[move] == TAKE_OVER:
            replicas.service[victim] = moves.claimant[move]
        elif moves.kind[move] == HOLD:
            claims.service[claim], claims.node[claim], claims.held_gpus[claim] = moves.claimant[move], node, gpus
            free_gpus[node] -= gpus
        elif victim != NOBODY:
            replicas.state[victim], replicas.since_s[victim], replicas.claim[victim] = DRAINING, now_s, claim
        else:
            close_claim(free_gpus, claims, replicas, claim)
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
def close_claim(free_gpus: NDArray[np.int64], claims: Claims, replicas: Replicas, claim: int) -> None:
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
