"""Clients that leave in the event loop: because they do not wait any longer, or go away in the middle of their answer.

`oracle` says what that means. Both are told by a timer. A request that waits in a line of the desk, or whose cache is
on its way, ends at once. One that is on a replica ends with the step under way there: then the steps are cut short at
the first boundary not before now, and at that `drop_left` takes it out.
"""

from typing import Any

from waterline.policy import dispatch
from waterline.policy.decisions import GAVE_UP
from waterline.rehearsal.heaps import ENDS, pop, push, reschedule
from waterline.rehearsal.jit import apart, inlined
from waterline.rehearsal.life import S_PER_PS, free_slot, is_idle, leave, stop_decoding
from waterline.rehearsal.state import (
    BEGIN_PS,
    CLIENT,
    COST_GPU_S,
    DECODES,
    EXTRA,
    FINISH_AT,
    FINISHES,
    FIRST_PS,
    FIXED,
    GPUS,
    GROWTH_PS,
    HAS_LEFT,
    HEAD,
    LEAVING,
    LEFT_WITH,
    MODEL,
    NEVER_PS,
    NEXT,
    NONE,
    PRODUCED,
    PROMPT,
    READ_BY,
    READ_SHARE,
    READER,
    REPLICA,
    REQUEST,
    RESULT,
    SEQUENCE,
    SERVED_BY,
    SLOT,
    SLOT_BITS,
    SLOT_MASK,
    STARTED_AT,
    STEPS,
    TAIL,
    TIMERS,
    UNDER_WAY,
    UNREAD,
    Memory,
)
from waterline.rehearsal.steptime import span, steps_until

# --- Times ------------------------------------------------------------------------------------------------------------


@inlined
def set_timer(memory: Memory, at: int, slot: int) -> int:
    """Let a request's time be up at a time; return the number of the timer, by which the request knows it again."""
    number: int = memory.counters[SEQUENCE]
    push(memory.timers, memory.counters[TIMERS], at, number, slot)
    memory.counters[TIMERS] += 1
    memory.counters[SEQUENCE] += 1
    return number


@inlined
def end_time(memory: Memory, now: int) -> int:
    """Let the client leave whose time is up, if that still matters; return the model that has room now, or NONE."""
    timer = -2 - (memory.timers[1] >> SLOT_BITS)
    slot = pop(memory.timers, memory.counters[TIMERS])
    memory.counters[TIMERS] -= 1
    request = memory.slots[slot * SLOT + REQUEST]
    if request < 0:
        return NONE
    waits = memory.results[request * RESULT + STARTED_AT] == timer
    if not waits and memory.extras[request * EXTRA + LEFT_WITH] != timer:
        return NONE
    if memory.results[request * RESULT + SERVED_BY] != NONE:
        return leave_replica(memory, memory.results[request * RESULT + SERVED_BY], request, now)
    if memory.extras[request * EXTRA + READ_BY] != NONE:
        return leave_on_the_way(memory, slot, now)
    return leave_line(memory, slot, now)


# --- Where they are ---------------------------------------------------------------------------------------------------


@inlined
def leave_line(memory: Memory, slot: int, now: int) -> int:
    """Take a request out of the line in which it waits at the desk."""
    request = memory.slots[slot * SLOT + REQUEST]
    client = memory.results[request * RESULT + CLIENT]
    for model in range(len(memory.ttft_s)):
        line = dispatch.line_of(memory.desk, model, client)
        if take_out(memory.slots, memory.line_heads, line, memory.line_tails, line, slot):
            dispatch.gave_up(memory.desk, model, client, memory.reals[2 * request + COST_GPU_S])
            gave_up(memory, slot, now)
            free_slot(memory, slot)
            return model
    return NONE


@inlined
def leave_on_the_way(memory: Memory, slot: int, now: int) -> int:
    """Settle what a request has cost that has been read; its slot is free when its cache has come, see `coming`."""
    request = memory.slots[slot * SLOT + REQUEST]
    reader = memory.extras[request * EXTRA + READ_BY]
    gpu_s = memory.extras[request * EXTRA + READ_SHARE] * S_PER_PS * memory.fixed[reader * FIXED + GPUS]
    model: int = memory.fixed[reader * FIXED + MODEL]
    client = memory.results[request * RESULT + CLIENT]
    dispatch.settle(memory.desk, model, client, gpu_s - memory.reals[2 * request + COST_GPU_S])
    gave_up(memory, slot, now)
    memory.slots[slot * SLOT + REQUEST] = NONE
    memory.counters[UNDER_WAY] -= 1
    return model


@inlined
def gave_up(memory: Memory, slot: int, now: int) -> None:
    """Write down that a client has left whose request is on no replica."""
    request = memory.slots[slot * SLOT + REQUEST]
    memory.results[request * RESULT + FINISH_AT] = now
    memory.results[request * RESULT + SERVED_BY] = -GAVE_UP
    memory.extras[request * EXTRA + LEFT_WITH] = memory.slots[slot * SLOT + PRODUCED]


@inlined
def leave_replica(memory: Memory, replica: int, request: int, now: int) -> int:
    """Let a request end with the step under way on its replica; at once where there is none."""
    memory.results[request * RESULT + FINISH_AT] = HAS_LEFT
    memory.leaving[replica] += 1
    memory.counters[LEAVING] += 1
    row = replica * REPLICA
    if memory.replicas[row + STEPS] > 0:
        first, growth = memory.replicas[row + FIRST_PS], memory.replicas[row + GROWTH_PS]
        began = memory.replicas[row + BEGIN_PS]
        steps = steps_until(now - began, first, growth)
        if steps < memory.replicas[row + STEPS]:
            memory.replicas[row + STEPS] = steps
            reschedule(memory, replica, began + span(steps, first, growth), ENDS)
        return NONE
    drop_left(memory, replica, now)
    if is_idle(memory, replica):
        reschedule(memory, replica, NEVER_PS, 0)
    model: int = memory.fixed[replica * FIXED + MODEL]
    return model


# --- Between two steps ------------------------------------------------------------------------------------------------


@apart
def drop_left(memory: Memory, replica: int, now: int) -> None:
    """Let those go whose clients have left: in the order of their admission, then those that wait here."""
    row = replica * REPLICA
    while memory.leaving[replica] > 0:
        place = first_to_leave(memory, replica)
        if place != NONE:
            slot = stop_decoding(memory, replica, place)
            held = memory.slots[slot * SLOT + PROMPT] + memory.slots[slot * SLOT + PRODUCED]
        elif has_left(memory, memory.replicas[row + READER]):
            slot = memory.replicas[row + READER]
            memory.replicas[row + READER] = NONE  # between two steps it is the only one
            held = memory.slots[slot * SLOT + PROMPT] + memory.slots[slot * SLOT + PRODUCED] + 1
        else:
            slot, held = memory.replicas[row + HEAD], 0
            while not has_left(memory, slot):
                slot = memory.slots[slot * SLOT + NEXT]
            take_out(memory.slots, memory.replicas, row + HEAD, memory.replicas, row + TAIL, slot)
        at = slot * SLOT
        if memory.slots[at + UNREAD] != NONE:
            tokens = memory.slots[at + PROMPT] + memory.slots[at + PRODUCED]
            model = memory.fixed[replica * FIXED + MODEL]
            dispatch.first_token(memory.desk, model, replica, tokens, memory.slots[at + UNREAD])
        leave(memory, replica, slot, now, held)


@inlined
def has_left(memory: Memory, slot: int) -> bool:
    left: bool = slot != NONE and (memory.results[memory.slots[slot * SLOT + REQUEST] * RESULT + FINISH_AT] == HAS_LEFT)
    return left


@inlined
def first_to_leave(memory: Memory, replica: int) -> int:
    """Return the place, among those that decode, of the one that was admitted first of those that leave; or NONE."""
    heap, place, first = memory.fixed[replica * FIXED + FINISHES], NONE, NEVER_PS
    for other in range(memory.replicas[replica * REPLICA + DECODES]):
        slot = memory.finishes[heap + other] & SLOT_MASK
        if has_left(memory, slot) and memory.slots[slot * SLOT + NEXT] < first:
            place, first = other, memory.slots[slot * SLOT + NEXT]
    return place


@inlined
def take_out(slots: Any, heads: Any, head: int, tails: Any, tail: int, slot: int) -> bool:
    """Take a slot out of a queue, whose first and last are written there; return whether it was in it."""
    before, other = NONE, heads[head]
    while other not in (slot, NONE):
        before, other = other, slots[other * SLOT + NEXT]
    if other == NONE:
        return False
    behind = slots[slot * SLOT + NEXT]
    if before == NONE:
        heads[head] = behind
    else:
        slots[before * SLOT + NEXT] = behind
    if behind == NONE:
        tails[tail] = before
    return True
