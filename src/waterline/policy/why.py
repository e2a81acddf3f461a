"""Why a request is given to its replica, and whose turn it is, with the numbers that decide: for whoever keeps a log.

Such a caller asks here before it asks the desk. What is said comes from the same numbers by the same rules, and changes
nothing: what is decided is the same without a log. `choose` decides as `routing.route`, and `whose_turn` as
`admission.next_line`; they look for the runner-up as well, which would cost a rehearsal of millions of requests a
second too much. Tests hold the two against each other.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterline.policy.admission import OVER_LIMIT_STANDING, Accounts, FairQueue, goes_first, standing_of
from waterline.policy.decisions import (
    BELOW_DESERVED,
    BELOW_GUARANTEE,
    BORROWS,
    FIRST_FREE,
    LAST_RESORT,
    NO_REPLICA,
    NONE,
    ONLY_FREE,
    ONLY_REPLICA,
    OVER_LIMIT,
    PREFIX_BEHIND,
    PREFIX_BUSY,
    PREFIX_CACHED,
    SHORTEST_WAIT,
)
from waterline.policy.dispatch import Desk
from waterline.policy.jit import swift
from waterline.policy.routing import (
    FEW,
    HALF,
    HALF_BITS,
    LOOKS,
    MOST_DRAWS,
    NOBODY,
    Prefixes,
    Ready,
    Replicas,
    can_take,
    longest_prefix,
    ready_at,
    serves_in_s,
)

# As `decisions.REASONS` has them; from TURN on they are of requests that have waited.
WHY, DONE_MS, OTHER, OTHER_MS, CACHED, TURN, USED_PPM, NEXT_TENANT, NEXT_TURN, NEXT_PPM = range(10)
COUNTER_MS, NEXT_CLAIMANT, NEXT_COUNTER_MS = range(10, 13)
MOST_TOLD = 1e15  # what is more is not told: 64 bits do not hold its thousandths


class Choice(NamedTuple):
    """A replica for a request, and why."""

    replica: int  # or NOBODY
    cached_tokens: int  # of the prompt, that it has read before
    rule: int  # of `decisions.PLACES_WHY`, or NO_REPLICA
    done_s: float  # when it would have served its backlog and read the prompt
    other: int  # the runner-up of those looked at; who keeps the prompt's beginning, where that was not taken; NOBODY
    other_s: float  # likewise `done_s`; infinite where it is not known
    kept_tokens: int  # of the prompt, by whoever keeps most of it


class Turn(NamedTuple):
    """Whose turn it is, and why."""

    line: int  # or NOBODY
    rule: int  # of `decisions.TURNS_WHY`, or OVER_LIMIT
    used: float  # by its tenant: of its guarantee while it is below that, else of what it deserves
    other: int  # the tenant that would be the next of those that wait below their limit, or NOBODY
    other_rule: int
    other_used: float


@swift
def explain_place(
    desk: Desk,
    pool: int,
    prompt_tokens: int,
    tokens: int,
    blocks: NDArray[np.int64],
    draw: int,
    reasons: NDArray[np.int64],
) -> int:
    """Return the replica that a request would be given to now, and write why, as of one that has not waited.

    Args:
        desk: is not changed.
        pool: the model, and of `take_over` the number of models more.
        prompt_tokens: as at `arrive` and `start`; 0 where it is taken over.
        tokens: likewise.
        blocks: likewise.
        draw: likewise: the same one.
        reasons: [reason] of `decisions.REASONS`, is written.
    """
    block_tokens = desk.models.block_tokens[0]
    choice = choose(desk.replicas, desk.ready, desk.prefixes, pool, prompt_tokens, tokens, blocks, block_tokens, draw)
    reasons[WHY] = choice.rule
    reasons[DONE_MS] = _thousandths(choice.done_s)
    reasons[OTHER] = choice.other
    reasons[OTHER_MS] = _thousandths(choice.other_s)
    reasons[CACHED] = choice.kept_tokens if choice.kept_tokens > 0 else NONE
    for reason in range(TURN, len(reasons)):
        reasons[reason] = NONE
    return choice.replica


@swift
def explain_turn(desk: Desk, model: int, reasons: NDArray[np.int64]) -> None:
    """Write why it is the turn of whoever `next_turn` names now; call `explain_place` before this, which says nobody's.

    Arguments as there.
    """
    turn = whose_turn(desk.accounts, desk.queue, model)
    if turn.line == NOBODY:
        return
    reasons[TURN] = turn.rule
    reasons[USED_PPM] = _thousandths(turn.used * 1000)
    if turn.other != NOBODY:
        reasons[NEXT_TENANT] = turn.other
        reasons[NEXT_TURN] = turn.other_rule
        reasons[NEXT_PPM] = _thousandths(turn.other_used * 1000)
    reasons[COUNTER_MS] = _thousandths(desk.queue.counter_gpu_s[turn.line])
    behind = next_in_group(desk.queue, turn.line)
    if behind != NOBODY:
        reasons[NEXT_CLAIMANT] = behind // len(desk.models.gpus)
        reasons[NEXT_COUNTER_MS] = _thousandths(desk.queue.counter_gpu_s[behind])


@swift
def explain_last_resort(desk: Desk, replica: int, reasons: NDArray[np.int64]) -> None:
    """Write why a replica that gets no more requests takes one over: nobody else is there. Before that, as above."""
    for reason in range(len(reasons)):
        reasons[reason] = NONE
    reasons[WHY] = LAST_RESORT
    reasons[DONE_MS] = _thousandths(desk.replicas.backlog_tokens[replica] / desk.replicas.tokens_per_s[replica])


@swift
def _thousandths(number: float) -> int:
    """Return thousandths of a number from 0 on, rounded; NONE where they are endless, or too many."""
    return int(max(number, 0.0) * 1000 + 0.5) if number < MOST_TOLD else NONE


@swift
def choose(
    replicas: Replicas,
    ready: Ready,
    prefixes: Prefixes,
    pool: int,
    prompt_tokens: int,
    tokens: int,
    blocks: NDArray[np.int64],
    block_tokens: int,
    draw: int,
) -> Choice:
    """Return what `routing.route` does, with the numbers that decided; arguments as there."""
    best, best_s, other, other_s, rule = _two_shortest(replicas, ready, pool, prompt_tokens, tokens, draw)
    if best == NOBODY or len(blocks) == 0:
        return Choice(best, 0, rule, best_s, other, other_s, 0)
    keeper, kept_tokens = longest_prefix(prefixes, replicas.born, blocks, block_tokens)
    kept_tokens = min(kept_tokens, prompt_tokens - 1)  # the last token is read again to produce one
    if kept_tokens <= 0 or replicas.pool[keeper] != pool:
        return Choice(best, 0, rule, best_s, other, other_s, 0)
    if not can_take(replicas, keeper, tokens):
        return Choice(best, 0, PREFIX_BUSY, best_s, keeper, np.inf, kept_tokens)
    keeper_s = serves_in_s(replicas, keeper, prompt_tokens - kept_tokens)
    if keeper_s > best_s:
        return Choice(best, 0, PREFIX_BEHIND, best_s, keeper, keeper_s, kept_tokens)
    if keeper != best:
        other, other_s = best, best_s
    return Choice(keeper, kept_tokens, PREFIX_CACHED, keeper_s, other, other_s, kept_tokens)


@swift
def _two_shortest(
    replicas: Replicas,
    ready: Ready,
    pool: int,
    prompt_tokens: int,
    tokens: int,
    draw: int,
) -> tuple[int, float, int, float, int]:
    """Return the replica that would be done first of those looked at, when, the runner-up likewise, and the rule.

    Looked at are all of a few, else two drawn that can take it.
    """
    first, size = pool * len(ready.place), ready.size[pool]
    best, best_s, other, other_s, looked = NOBODY, np.inf, NOBODY, np.inf, 0
    digits, later = draw & (HALF - 1), draw >> HALF_BITS
    for look in range(size if size <= FEW else MOST_DRAWS):
        replica = ready.replicas[first + (look if size <= FEW else ready_at(ready, first, size, digits))]
        digits, later = later, (digits * 1103515245 + 12345) & (HALF - 1)
        if not can_take(replicas, replica, tokens):
            continue
        done_s = serves_in_s(replicas, replica, prompt_tokens)
        if done_s < best_s or (done_s == best_s and replica < best):
            best, best_s, other, other_s = replica, done_s, best, best_s
        elif replica != best and done_s < other_s:
            other, other_s = replica, done_s
        looked += 1
        if looked == LOOKS and size > FEW:
            break
    if best != NOBODY:
        rule = SHORTEST_WAIT if other != NOBODY else ONLY_REPLICA if size == 1 else ONLY_FREE
        return int(best), float(best_s), int(other), float(other_s), rule
    if size > FEW:
        count = ready.frees[pool]
        begin = (digits * count) >> HALF_BITS
        for step in range(count):
            replica = ready.free[first + (begin + step if begin + step < count else begin + step - count)]
            if can_take(replicas, replica, tokens):
                return int(replica), serves_in_s(replicas, replica, prompt_tokens), NOBODY, np.inf, FIRST_FREE
    return NOBODY, np.inf, NOBODY, np.inf, NO_REPLICA


@swift
def whose_turn(
    accounts: Accounts,
    queue: FairQueue,
    model: int,
) -> Turn:
    """Return what `admission.next_line` does, with the numbers that decided between tenants."""
    tenants = len(accounts.used_gpu_s)
    best, best_standing, best_used = NOBODY, OVER_LIMIT_STANDING, 0.0
    other, other_standing, other_used = NOBODY, OVER_LIMIT_STANDING, 0.0
    for tenant in range(tenants):
        if queue.lines[model * tenants + tenant] == 0:
            continue
        standing, used = standing_of(accounts, tenant)
        if standing < best_standing or (standing == best_standing and best != NOBODY and used < best_used):
            other, other_standing, other_used = best, best_standing, best_used
            best, best_standing, best_used = tenant, standing, used
        elif standing < other_standing or (standing == other_standing and other != NOBODY and used < other_used):
            other, other_standing, other_used = tenant, standing, used
    if best == NOBODY:
        return Turn(NOBODY, OVER_LIMIT, 0.0, NOBODY, OVER_LIMIT, 0.0)
    line = int(queue.heap[queue.first[model * tenants + best]])
    other_rule = _rule_of(other_standing) if other != NOBODY else OVER_LIMIT
    return Turn(line, _rule_of(best_standing), best_used, other, other_rule, other_used)


@swift
def next_in_group(queue: FairQueue, line: int) -> int:
    """Return the line that would be the next of its tenant at its model, if this one, which is, had not come."""
    group = queue.group[line]
    first, count = queue.first[group], queue.lines[group]
    if count < 2:
        return NOBODY
    one = queue.heap[first + 1]
    if count > 2 and goes_first(queue, queue.heap[first + 2], one):
        one = queue.heap[first + 2]
    return int(one)


@swift
def _rule_of(standing: int) -> int:
    """Return the rule by which a tenant goes first that is not at its limit."""
    return BELOW_GUARANTEE if standing == 0 else BELOW_DESERVED if standing == 1 else BORROWS
