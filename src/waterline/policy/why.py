"""Why a request is given to its replica, and whose turn it is, with the numbers that decide: for whoever keeps a log.

Such a caller asks here before it asks the desk: what will be decided is said from the same numbers and by the same
code. Nothing is changed by it, so what is decided is the same without a log; and who keeps none pays nothing.
"""

import numpy as np
from numpy.typing import NDArray

from waterline.policy import admission, routing
from waterline.policy.decisions import LAST_RESORT, NONE
from waterline.policy.dispatch import Desk
from waterline.policy.jit import swift
from waterline.policy.routing import NOBODY

# As `decisions.REASONS` has them; from TURN on they are of requests that have waited.
WHY, DONE_MS, OTHER, OTHER_MS, CACHED, TURN, USED_PPM, NEXT_TENANT, NEXT_TURN, NEXT_PPM = range(10)
COUNTER_MS, NEXT_CLAIMANT, NEXT_COUNTER_MS = range(10, 13)
MOST_TOLD = 1e15  # what is more is not told: 64 bits do not hold its thousandths


@swift
def explain_place(
    desk: Desk,
    pool: int,
    prompt_tokens: int,
    tokens: int,
    blocks: NDArray[np.int64],
    draw: int,
    reasons: NDArray[np.int64],
) -> None:
    """Write why a request would be given to its replica now, as of one that has not waited.

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
    choice = routing.choose(
        desk.replicas, desk.ready, desk.prefixes, pool, prompt_tokens, tokens, blocks, block_tokens, draw
    )
    reasons[WHY] = choice.rule
    reasons[DONE_MS] = _thousandths(choice.done_s)
    reasons[OTHER] = choice.other
    reasons[OTHER_MS] = _thousandths(choice.other_s)
    reasons[CACHED] = choice.kept_tokens if choice.kept_tokens > 0 else NONE
    for reason in range(TURN, len(reasons)):
        reasons[reason] = NONE


@swift
def explain_turn(desk: Desk, model: int, reasons: NDArray[np.int64]) -> None:
    """Write why it is the turn of whoever `next_turn` names now; call `explain_place` before this, which says nobody's.

    Arguments as there.
    """
    turn = admission.whose_turn(desk.accounts, desk.queue, model)
    if turn.line == NOBODY:
        return
    reasons[TURN] = turn.rule
    reasons[USED_PPM] = _thousandths(turn.used * 1000)
    if turn.other != NOBODY:
        reasons[NEXT_TENANT] = turn.other
        reasons[NEXT_TURN] = turn.other_rule
        reasons[NEXT_PPM] = _thousandths(turn.other_used * 1000)
    reasons[COUNTER_MS] = _thousandths(desk.queue.counter_gpu_s[turn.line])
    behind = admission.next_in_group(desk.queue, turn.line)
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
