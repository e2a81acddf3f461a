"""The three heaps of the event loop: in which step requests finish, what happens to whom next, and what comes when."""

from typing import Any

from waterline.rehearsal.jit import inlined
from waterline.rehearsal.state import NEVER_PS, SLOT_BITS, SLOT_MASK, Memory

ENDS = 1 << 40  # of an entry of the heap of replicas: steps end; without it, some begin

# --- Finishes of a replica, a binary heap each ------------------------------------------------------------------------


@inlined
def add_finish(memory: Memory, heap: int, count: int, finish: int) -> None:
    place = count
    while place > 0:
        parent = (place - 1) >> 1
        if memory.finishes[heap + parent] <= finish:
            break
        memory.finishes[heap + place] = memory.finishes[heap + parent]
        place = parent
    memory.finishes[heap + place] = finish


@inlined
def remove_finish(memory: Memory, heap: int, count: int, place: int) -> None:
    """Take one out of `count`: put the last in its place, then where it belongs."""
    last = memory.finishes[heap + count - 1]
    count -= 1
    if place == count:
        return
    while True:
        child = 2 * place + 1
        if child >= count:
            break
        if child + 1 < count and memory.finishes[heap + child + 1] < memory.finishes[heap + child]:
            child += 1
        if memory.finishes[heap + child] >= last:
            break
        memory.finishes[heap + place] = memory.finishes[heap + child]
        place = child
    while place > 0:
        parent = (place - 1) >> 1
        if memory.finishes[heap + parent] <= last:
            break
        memory.finishes[heap + place] = memory.finishes[heap + parent]
        place = parent
    memory.finishes[heap + place] = last


# --- Replicas by what happens to them next; a node has four children --------------------------------------------------


@inlined
def reschedule(memory: Memory, replica: int, due: int, ends: int) -> None:
    """Move a replica to where it belongs: steps that begin before those that end, then in the order of their rows."""
    place, count, entry = memory.due_place[replica], len(memory.due_ps), replica + ends
    while place > 0:
        parent = (place - 1) >> 2
        above = memory.due_ps[parent]
        if above < due or (above == due and memory.due_replica[parent] < entry):
            break
        _hand_down(memory, parent, place)
        place = parent
    while True:
        child = 4 * place + 1
        if child >= count:
            break
        for other in range(child + 1, min(child + 4, count)):
            if memory.due_ps[other] < memory.due_ps[child] or (
                memory.due_ps[other] == memory.due_ps[child] and memory.due_replica[other] < memory.due_replica[child]
            ):
                child = other
        below = memory.due_ps[child]
        if below > due or (below == due and memory.due_replica[child] > entry):
            break
        _hand_down(memory, child, place)
        place = child
    memory.due_ps[place] = due
    memory.due_replica[place] = entry
    memory.due_place[replica] = place


@inlined
def _hand_down(memory: Memory, source: int, place: int) -> None:
    entry = memory.due_replica[source]
    memory.due_ps[place] = memory.due_ps[source]
    memory.due_replica[place] = entry
    memory.due_place[entry & (ENDS - 1)] = place


@inlined
def alone(memory: Memory, replica: int, due: int) -> bool:
    """Whether nothing happens at a time but to the replica it was due for."""
    if memory.due_replica[0] & (ENDS - 1) != replica:
        return False
    for child in range(1, min(5, len(memory.due_ps))):  # noqa: SIM110 - compiled code has no generators
        if memory.due_ps[child] <= due:
            return False
    return True


# --- What comes at a time: caches, and times that are up --------------------------------------------------------------


@inlined
def push(heap: Any, count: int, at: int, number: int, slot: int) -> None:
    """Add to a binary heap of `count` pairs; of equal times the lower number comes first."""
    place, what = count, (number << SLOT_BITS) | slot
    while place > 0:
        parent = (place - 1) >> 1
        if heap[2 * parent] < at or (heap[2 * parent] == at and heap[2 * parent + 1] < what):
            break
        heap[2 * place], heap[2 * place + 1] = heap[2 * parent], heap[2 * parent + 1]
        place = parent
    heap[2 * place], heap[2 * place + 1] = at, what


@inlined
def pop(heap: Any, count: int) -> int:
    """Take the first of `count` pairs out, and return its slot. The first of an empty heap comes never."""
    slot: int = heap[1] & SLOT_MASK
    count -= 1
    at, what = heap[2 * count], heap[2 * count + 1]
    heap[2 * count] = NEVER_PS
    if count == 0:
        return slot
    place = 0
    while True:
        child = 2 * place + 1
        if child >= count:
            break
        if child + 1 < count and (
            heap[2 * child + 2] < heap[2 * child]
            or (heap[2 * child + 2] == heap[2 * child] and heap[2 * child + 3] < heap[2 * child + 1])
        ):
            child += 1
        if heap[2 * child] > at or (heap[2 * child] == at and heap[2 * child + 1] > what):
            break
        heap[2 * place], heap[2 * place + 1] = heap[2 * child], heap[2 * child + 1]
        place = child
    heap[2 * place], heap[2 * place + 1] = at, what
    return slot
