"""The log of what the desk gives to which replica, and why: written by the event loop where it is wanted.

An entry is whole numbers in `Memory.log`, see `state`; the station takes them out after every call of the event loop.
"""

from waterline.policy import why
from waterline.rehearsal.jit import apart, inlined
from waterline.rehearsal.state import (
    ENTRIES_EACH,
    ENTRY,
    ENTRY_AT,
    ENTRY_REASONS,
    ENTRY_REPLICA,
    ENTRY_REQUEST,
    ENTRY_RULE,
    NONE,
    REASON_COUNT,
    UNDER_WAY,
    Memory,
)


@inlined
def has_entries(memory: Memory) -> bool:
    """Whether the log has room for all that may be written before somebody empties it, should one more come."""
    entries = memory.log[0] + ENTRIES_EACH * (memory.counters[UNDER_WAY] + 1)
    enough: bool = 1 + ENTRY * entries <= len(memory.log)
    return enough


@apart
def explain(memory: Memory, pool: int, request: int, prompt_tokens: int, tokens: int, draw: int) -> None:
    """Write why a request would be given to its replica now where the next entry will be; a `request` of NONE is read.

    The desk is asked the same again afterwards: what is decided does not depend on whether a log is kept.
    """
    first = memory.first_block[request] if request != NONE else 0
    last = memory.first_block[request + 1] if request != NONE else 0
    blocks, begin = memory.blocks[first:last], first_reason(memory)
    reasons = memory.log[begin : begin + REASON_COUNT]
    why.explain_place(memory.desk, pool, prompt_tokens, tokens, blocks, draw, reasons)


@apart
def explain_turn(memory: Memory, model: int) -> None:
    """Write whose turn it is; after `explain`."""
    begin = first_reason(memory)
    why.explain_turn(memory.desk, model, memory.log[begin : begin + REASON_COUNT])


@apart
def explain_last_resort(memory: Memory, replica: int) -> None:
    """Write that nobody else was there, before the replica has the request; instead of what `explain` has written."""
    begin = first_reason(memory)
    why.explain_last_resort(memory.desk, replica, memory.log[begin : begin + REASON_COUNT])


@inlined
def first_reason(memory: Memory) -> int:
    """Return where the reasons of the next entry begin."""
    begin: int = 1 + ENTRY * memory.log[0] + ENTRY_REASONS
    return begin


@apart
def write_entry(memory: Memory, now: int, request: int, rule: int, replica: int) -> None:
    """A request is given to a replica, for the reasons that have been written."""
    entry = 1 + ENTRY * memory.log[0]
    memory.log[entry + ENTRY_AT] = now
    memory.log[entry + ENTRY_REQUEST] = request
    memory.log[entry + ENTRY_RULE] = rule
    memory.log[entry + ENTRY_REPLICA] = replica
    memory.log[0] += 1
