"""The log of what the desk gives to which replica, and why: written by the event loop where it is wanted.

An entry is whole numbers in `Memory.log`, see `state`; the station takes them out after every call of the event loop.
Before the desk is asked, the next entry is written as it would be; it counts from when that has happened. The event
loop is compiled with all this and without (`Memory.logs`): a look at whether a log is kept would cost every request.
"""

from waterline.policy import dispatch, why
from waterline.policy.decisions import COMES_BACK, SLOT_FREE, WAITS_FOR_SLOT
from waterline.policy.routing import NOBODY
from waterline.rehearsal.jit import apart, inlined
from waterline.rehearsal.state import (
    ENTRY,
    ENTRY_AT,
    ENTRY_REASONS,
    ENTRY_REPLICA,
    ENTRY_REQUEST,
    ENTRY_RULE,
    FIRST_DICE,
    NONE,
    OUTPUT,
    PRODUCED,
    PROMPT,
    REQUEST,
    RESULT,
    SECOND_DICE,
    SLOT,
    STARTED_AT,
    Asked,
    Memory,
)

PRIME = 2**31 - 1  # of the dice, two generators of Lehmer's


@inlined
def next_draw(memory: Memory) -> int:
    """Return what `kernel.roll` will, and do not go on."""
    draw: int = memory.counters[SECOND_DICE] * 69_621 % PRIME << 31 | memory.counters[FIRST_DICE] * 48_271 % PRIME
    return draw


@apart
def explain_arrival(memory: Memory, asked: Asked, index: int, request: int) -> None:
    """Write the next entry: why a request that arrives would be given to its replica, if it is given to one at once."""
    prompt = asked.prompts[index]
    explain(memory, asked.models[index], request, prompt, prompt + asked.outputs[index], next_draw(memory))


@apart
def write_arrival(memory: Memory, request: int, now: int) -> None:
    """Count that entry, if the request has been given to its replica."""
    if memory.results[request * RESULT + STARTED_AT] >= 0:
        write_entry(memory, now, request, SLOT_FREE, memory.log[1 + ENTRY * memory.log[0] + ENTRY_REPLICA])


@apart
def explain_start(memory: Memory, model: int) -> None:
    """Write the next entry: whose turn it is at a model, and why a replica, if there is one, gets that request."""
    client, _ = dispatch.next_turn(memory.desk, model)
    if client == NOBODY:
        return
    slot = memory.line_heads[dispatch.line_of(memory.desk, model, client)]
    at, entry = slot * SLOT, 1 + ENTRY * memory.log[0]
    request, prompt = memory.slots[at + REQUEST], memory.slots[at + PROMPT]
    tokens, draw = prompt + memory.slots[at + OUTPUT], next_draw(memory)
    explain(memory, model, request, prompt + memory.slots[at + PRODUCED], tokens, draw)
    why.explain_turn(memory.desk, model, memory.log[entry + ENTRY_REASONS : entry + ENTRY])
    begun = memory.results[request * RESULT + STARTED_AT] >= 0
    memory.log[entry + ENTRY_REQUEST] = request
    memory.log[entry + ENTRY_RULE] = COMES_BACK if begun else WAITS_FOR_SLOT


@apart
def write_start(memory: Memory, now: int) -> None:
    """Count that entry."""
    entry = 1 + ENTRY * memory.log[0]
    request, rule = memory.log[entry + ENTRY_REQUEST], memory.log[entry + ENTRY_RULE]
    write_entry(memory, now, request, rule, memory.log[entry + ENTRY_REPLICA])


@apart
def explain(memory: Memory, pool: int, request: int, prompt_tokens: int, tokens: int, draw: int) -> None:
    """Write into the next entry which replica a request would be given to, and why; a `request` of NONE is read."""
    first = memory.first_block[request] if request != NONE else 0
    last = memory.first_block[request + 1] if request != NONE else 0
    blocks, entry = memory.blocks[first:last], 1 + ENTRY * memory.log[0]
    reasons = memory.log[entry + ENTRY_REASONS : entry + ENTRY]
    replica = why.explain_place(memory.desk, pool, prompt_tokens, tokens, blocks, draw, reasons)
    memory.log[entry + ENTRY_REPLICA] = replica


@apart
def explain_last_resort(memory: Memory, replica: int) -> None:
    """Write that nobody else was there, before the replica has the request; instead of what `explain` has written."""
    entry = 1 + ENTRY * memory.log[0]
    why.explain_last_resort(memory.desk, replica, memory.log[entry + ENTRY_REASONS : entry + ENTRY])


@inlined
def write_entry(memory: Memory, now: int, request: int, rule: int, replica: int) -> None:
    """Count the next entry: a request has been given to a replica, for the reasons that are there."""
    entry = 1 + ENTRY * memory.log[0]
    memory.log[entry + ENTRY_AT] = now
    memory.log[entry + ENTRY_REQUEST] = request
    memory.log[entry + ENTRY_RULE] = rule
    memory.log[entry + ENTRY_REPLICA] = replica
    memory.log[0] += 1
