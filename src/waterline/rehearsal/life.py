"""One replica in the event loop: what it is given, and what its steps do. Times are in picoseconds.

Between two events a replica does the same thing over and over: it decodes the same requests, whose context grows by one
token each, so that the time of its steps grows by a constant (`StepCost` is linear in what is cached, up to a window).
n such steps take n a + d n (n - 1) / 2, in whole numbers. They end at the first of

- the step in which a request has all its tokens, which is known when it begins to decode;
- the step for which the cache is full, and the one from which a window hides part of the context;
- the arrival of a request that can be admitted: at the first boundary not before it.

A head of the queue that cannot be admitted stays so meanwhile: the cache only fills. Steps that read prompts are taken
one by one; there are two or three for each request.
"""

from waterline.policy import dispatch
from waterline.rehearsal.blocks import hold, let_go, shrink
from waterline.rehearsal.heaps import ENDS, add_finish, push, remove_finish, reschedule
from waterline.rehearsal.jit import apart, inlined
from waterline.rehearsal.state import (
    ACCEPTED,
    ADMISSIONS,
    BEGIN_PS,
    BUSY_PS,
    CACHED,
    CLIENT,
    COMING,
    COST_GPU_S,
    DECODES,
    EXPECTED_OUTPUT,
    EXTRA,
    FINISH_AT,
    FINISHES,
    FIRST_PS,
    FIRST_TOKEN_AT,
    FIXED,
    FOUND,
    FREE,
    FREE_SLOT,
    GPUS,
    GROWTH_PS,
    HAS_LEFT,
    HEAD,
    ITERATION,
    KIND,
    LATEST_PS,
    LEAVING,
    LEFT_WITH,
    MAX_BATCH,
    MODEL,
    MODEL_FIELDS,
    NEVER_PS,
    NEXT,
    NONE,
    OUT_OF_TIME,
    OUTPUT,
    PREEMPTED,
    PREFILL,
    PRODUCED,
    PROMPT,
    READ,
    READ_BY,
    READ_SHARE,
    READER,
    READS_CACHED,
    REPLICA,
    REQUEST,
    RESULT,
    SENDS,
    SEQUENCE,
    SERVED_BY,
    SHARE,
    SLOT,
    SLOT_BITS,
    SLOT_MASK,
    STARTED_AT,
    STEP_TOKENS,
    STEPS,
    TAIL,
    TOKEN_PS,
    TRANSFER_PS,
    UNDER_WAY,
    UNDIVIDED_PS,
    UNFINISHED,
    UNREAD,
    Memory,
)
from waterline.rehearsal.steptime import decoding_ps, reading_ps, span, steps_until

MOST_PS = 4e17  # no skip is longer, so that nothing leaves 64 bits
S_PER_PS = 1e-12


# --- What it is given -------------------------------------------------------------------------------------------------


@inlined
def accept(memory: Memory, replica: int, slot: int, now: int, cached: int) -> None:
    """Queue a request that the desk gives to a replica, with so much of its prompt cached there, as the desk thinks."""
    row, at = replica * REPLICA, slot * SLOT
    result = memory.slots[at + REQUEST] * RESULT
    if memory.results[result + STARTED_AT] < 0:
        memory.results[result + STARTED_AT] = now
    memory.slots[at + UNREAD] = memory.slots[at + PROMPT] + memory.slots[at + PRODUCED] - cached
    queue(memory, row, replica, slot, now)


@inlined
def take_over(memory: Memory, replica: int, slot: int, now: int) -> None:
    """Queue a request that has been read elsewhere, at the arrival of its cache."""
    at = slot * SLOT
    memory.slots[at + UNREAD] = NONE
    memory.slots[at + READ] = memory.slots[at + PROMPT] + memory.slots[at + PRODUCED]
    queue(memory, replica * REPLICA, replica, slot, now)


@inlined
def queue(memory: Memory, row: int, replica: int, slot: int, now: int) -> None:
    """Put a request at the end of a replica's own queue, and end its steps when it can join them."""
    memory.slots[slot * SLOT + NEXT] = NONE
    memory.results[memory.slots[slot * SLOT + REQUEST] * RESULT + SERVED_BY] = replica
    memory.replicas[row + ACCEPTED] += 1
    if memory.replicas[row + HEAD] != NONE:
        memory.slots[memory.replicas[row + TAIL] * SLOT + NEXT] = slot
        memory.replicas[row + TAIL] = slot
        return
    memory.replicas[row + HEAD] = slot
    memory.replicas[row + TAIL] = slot
    if memory.replicas[row + STEPS] == 0:
        memory.replicas[row + BEGIN_PS] = now
        reschedule(memory, replica, now + 1, 0)
    elif memory.replicas[row + STEPS] > 1:
        cut(memory, replica, now, memory.slots[slot * SLOT + PROMPT] + memory.slots[slot * SLOT + PRODUCED] + 1)


@inlined
def is_idle(memory: Memory, replica: int) -> bool:
    row = replica * REPLICA
    idle: bool = (
        memory.replicas[row + DECODES] == 0
        and memory.replicas[row + READER] == NONE
        and memory.replicas[row + HEAD] == NONE
    )
    return idle


@inlined
def cut(memory: Memory, replica: int, now: int, needed: int) -> None:
    """End the steps under way at the first boundary at or after `now`, if a request that needs so much fits in then."""
    row, fixed = replica * REPLICA, replica * FIXED
    decodes = memory.replicas[row + DECODES]
    if decodes >= memory.fixed[fixed + MAX_BATCH] or decodes >= memory.kinds[memory.fixed[fixed + KIND] + STEP_TOKENS]:
        return
    first, growth = memory.replicas[row + FIRST_PS], memory.replicas[row + GROWTH_PS]
    begin = memory.replicas[row + BEGIN_PS]
    steps = steps_until(now - begin, first, growth)
    if steps >= memory.replicas[row + STEPS] or memory.replicas[row + FREE] - decodes * (steps + 1) < needed:
        return
    memory.replicas[row + STEPS] = steps
    reschedule(memory, replica, begin + span(steps, first, growth), ENDS)


# --- How steps begin --------------------------------------------------------------------------------------------------


@inlined
def begin(memory: Memory, replica: int) -> int:
    """Begin a step, or several that only decode; return when they end."""
    row, fixed = replica * REPLICA, replica * FIXED
    while memory.replicas[row + DECODES] > memory.replicas[row + FREE]:
        preempt_latest(memory, replica)
    join(memory, replica)
    decodes = memory.replicas[row + DECODES]
    prefill, pairs = fill_step(memory, replica)
    memory.replicas[row + PREFILL] = prefill
    if prefill:
        steps, growth = 1, 0
        first = reading_ps(memory, memory.fixed[fixed + KIND], prefill, pairs, decodes, memory.replicas[row + CACHED])
    elif decodes:
        first, growth, steps = decoding_ps(memory, memory.fixed[fixed + KIND], decodes, memory.replicas[row + CACHED])
        finish = memory.finishes[memory.fixed[fixed + FINISHES]] >> SLOT_BITS
        steps = min(steps, finish - memory.replicas[row + ITERATION], memory.replicas[row + FREE] // decodes)
        if (first + 1.0 * growth * steps) * steps > MOST_PS:
            steps = 1
    else:
        return NEVER_PS
    memory.replicas[row + STEPS] = steps
    memory.replicas[row + FIRST_PS] = first
    memory.replicas[row + GROWTH_PS] = growth
    ends: int = memory.replicas[row + BEGIN_PS] + span(steps, first, growth)
    if ends > LATEST_PS:
        memory.counters[OUT_OF_TIME] = 1
        return NEVER_PS
    return ends


@inlined
def join(memory: Memory, replica: int) -> None:
    """Let those decode that have been read elsewhere, in the order of the queue, while there are slots and cache."""
    row, fixed = replica * REPLICA, replica * FIXED
    slots = min(memory.fixed[fixed + MAX_BATCH], memory.kinds[memory.fixed[fixed + KIND] + STEP_TOKENS])
    slot = memory.replicas[row + HEAD]
    while (
        slot != NONE
        and memory.slots[slot * SLOT + READ] > 0
        and memory.replicas[row + READER] == NONE
        and memory.replicas[row + DECODES] < slots
    ):
        at = slot * SLOT
        held = memory.slots[at + READ]
        if held + 1 > memory.replicas[row + FREE] - memory.replicas[row + DECODES]:
            return
        if len(memory.remembers) > 0:
            shrink(memory, replica, memory.replicas[row + FREE])
            hold(memory, replica, slot)
        memory.replicas[row + FREE] -= held
        memory.replicas[row + HEAD] = memory.slots[at + NEXT]
        memory.slots[at + NEXT] = NONE
        decode(memory, replica, slot)
        slot = memory.replicas[row + HEAD]


@inlined
def decode(memory: Memory, replica: int, slot: int) -> None:
    """Put a request with everything read, and its last token to come some steps from now, among those that decode."""
    row, at = replica * REPLICA, slot * SLOT
    produced, decodes = memory.slots[at + PRODUCED], memory.replicas[row + DECODES]
    memory.slots[at + NEXT] = memory.counters[ADMISSIONS]  # they begin to decode in the order of their admission
    memory.counters[ADMISSIONS] += 1
    memory.slots[at + BUSY_PS] -= memory.replicas[row + TOKEN_PS]
    memory.replicas[row + CACHED] += memory.slots[at + PROMPT] + produced
    finish = memory.replicas[row + ITERATION] + memory.slots[at + OUTPUT] - produced
    add_finish(memory, memory.fixed[replica * FIXED + FINISHES], decodes, (finish << SLOT_BITS) | slot)
    memory.replicas[row + DECODES] = decodes + 1


@inlined
def fill_step(memory: Memory, replica: int) -> tuple[int, int]:
    """Give what the decodes leave of a step to prompts, and admit; return the tokens read, and their pairs."""
    row, fixed = replica * REPLICA, replica * FIXED
    decodes, free = memory.replicas[row + DECODES], memory.replicas[row + FREE]
    budget = memory.kinds[memory.fixed[fixed + KIND] + STEP_TOKENS] - decodes
    max_batch = memory.fixed[fixed + MAX_BATCH]
    prefill = pairs = 0
    running = decodes
    slot, before = memory.replicas[row + READER], NONE
    while budget > 0:
        if slot == NONE:
            slot = memory.replicas[row + HEAD]
            if slot == NONE or running >= max_batch or memory.slots[slot * SLOT + READ] > 0:
                break
            at = slot * SLOT
            needed = memory.slots[at + PROMPT] + memory.slots[at + PRODUCED] + 1
            if needed > free - decodes:
                break
            memory.replicas[row + HEAD] = memory.slots[at + NEXT]
            memory.slots[at + NEXT] = NONE
            memory.slots[at + READ] = find_cached(memory, replica, slot, free - decodes)
            free -= needed
            if before == NONE:
                memory.replicas[row + READER] = slot
            else:
                memory.slots[before * SLOT + NEXT] = slot
        at = slot * SLOT
        read = memory.slots[at + READ]
        chunk = min(budget, memory.slots[at + PROMPT] + memory.slots[at + PRODUCED] - read)
        prefill += chunk
        pairs += chunk * read + chunk * (chunk + 1) // 2
        budget -= chunk
        running += 1
        before, slot = slot, memory.slots[at + NEXT]
    memory.replicas[row + FREE] = free
    return prefill, pairs


@inlined
def find_cached(memory: Memory, replica: int, slot: int, free: int) -> int:
    """Return how much of what a request would read is cached where it is admitted, and need not be read.

    `free` of the cache before that, in which idle blocks are.
    """
    at = slot * SLOT
    cached = -memory.slots[at + READ]
    if len(memory.remembers) > 0:
        shrink(memory, replica, free)
        cached = max(cached, hold(memory, replica, slot))
    if cached and memory.slots[at + PRODUCED] == 0:
        memory.results[memory.slots[at + REQUEST] * RESULT + FOUND] = cached
    return 0 if memory.kinds[memory.fixed[replica * FIXED + KIND] + READS_CACHED] else cached


@apart
def preempt_latest(memory: Memory, replica: int) -> None:
    """Send the request that was admitted last back to the front of the queue, with nothing read."""
    row = replica * REPLICA
    slot = memory.replicas[row + READER]
    if slot != NONE:
        memory.replicas[row + READER] = NONE
        at = slot * SLOT
        memory.replicas[row + FREE] += memory.slots[at + PROMPT] + memory.slots[at + PRODUCED] + 1
    else:
        slot = stop_decoding(memory, replica, latest(memory, replica))
        at = slot * SLOT
        memory.replicas[row + FREE] += memory.slots[at + PROMPT] + memory.slots[at + PRODUCED]
    if len(memory.remembers) > 0:
        let_go(memory, replica, slot)
    memory.slots[at + READ] = 0
    result = memory.slots[at + REQUEST] * RESULT
    memory.results[result + PREEMPTED] += 1
    if memory.slots[at + PRODUCED] == 0:
        memory.results[result + FOUND] = 0
    memory.slots[at + NEXT] = memory.replicas[row + HEAD]
    if memory.replicas[row + HEAD] == NONE:
        memory.replicas[row + TAIL] = slot
    memory.replicas[row + HEAD] = slot


@inlined
def latest(memory: Memory, replica: int) -> int:
    """Return the place of the request that was admitted last, among those that decode."""
    heap, place, last = memory.fixed[replica * FIXED + FINISHES], 0, NONE
    for other in range(memory.replicas[replica * REPLICA + DECODES]):
        admitted = memory.slots[(memory.finishes[heap + other] & SLOT_MASK) * SLOT + NEXT]
        if admitted > last:
            place, last = other, admitted
    return place


@inlined
def stop_decoding(memory: Memory, replica: int, place: int) -> int:
    """Take a request from those that decode; return its slot, with what it has produced."""
    row = replica * REPLICA
    heap, count = memory.fixed[replica * FIXED + FINISHES], memory.replicas[row + DECODES]
    finish = memory.finishes[heap + place]
    slot: int = finish & SLOT_MASK
    at = slot * SLOT
    left = (finish >> SLOT_BITS) - memory.replicas[row + ITERATION]
    memory.slots[at + PRODUCED] = memory.slots[at + OUTPUT] - left
    memory.slots[at + BUSY_PS] += memory.replicas[row + TOKEN_PS]
    memory.replicas[row + CACHED] -= memory.slots[at + PROMPT] + memory.slots[at + PRODUCED]
    memory.replicas[row + DECODES] = count - 1
    remove_finish(memory, heap, count, place)
    return slot


# --- How they end -----------------------------------------------------------------------------------------------------


@inlined
def end(memory: Memory, replica: int, now: int) -> None:
    """Do what the steps under way have come to: tokens, first tokens, finishes."""
    row, fixed = replica * REPLICA, replica * FIXED
    decodes, steps = memory.replicas[row + DECODES], memory.replicas[row + STEPS]
    iteration = memory.replicas[row + ITERATION] + steps
    memory.replicas[row + ITERATION] = iteration
    memory.replicas[row + CACHED] += decodes * steps
    memory.replicas[row + FREE] -= decodes * steps
    if len(memory.remembers) > 0:
        shrink(memory, replica, memory.replicas[row + FREE])
    divided = now - memory.replicas[row + BEGIN_PS] + memory.replicas[row + UNDIVIDED_PS]
    tokens = decodes + memory.replicas[row + PREFILL]  # of each step; several have no prompts
    token_ps = divided // tokens
    memory.replicas[row + UNDIVIDED_PS] = divided - token_ps * tokens
    memory.replicas[row + TOKEN_PS] += token_ps
    memory.replicas[row + STEPS] = 0
    memory.replicas[row + BEGIN_PS] = now

    heap = memory.fixed[fixed + FINISHES]
    while decodes > 0 and memory.finishes[heap] >> SLOT_BITS == iteration:
        slot = next_to_finish(memory, heap, decodes, iteration)
        decodes -= 1
        at = slot * SLOT
        memory.replicas[row + CACHED] -= memory.slots[at + PROMPT] + memory.slots[at + OUTPUT]
        memory.slots[at + BUSY_PS] += memory.replicas[row + TOKEN_PS]
        memory.slots[at + PRODUCED] = memory.slots[at + OUTPUT]
        leave(memory, replica, slot, now, memory.slots[at + PROMPT] + memory.slots[at + OUTPUT])
    memory.replicas[row + DECODES] = decodes
    if memory.replicas[row + READER] != NONE:
        end_reading(memory, replica, now, token_ps)


@inlined
def next_to_finish(memory: Memory, heap: int, decodes: int, iteration: int) -> int:
    """Take the request that was admitted first out of those that finish in this step, and return its slot."""
    place, ties = 0, decodes > 1 and memory.finishes[heap + 1] >> SLOT_BITS == iteration
    ties = ties or (decodes > 2 and memory.finishes[heap + 2] >> SLOT_BITS == iteration)
    if ties:
        first = NEVER_PS
        for other in range(decodes):
            if memory.finishes[heap + other] >> SLOT_BITS == iteration:
                admitted = memory.slots[(memory.finishes[heap + other] & SLOT_MASK) * SLOT + NEXT]
                if admitted < first:
                    place, first = other, admitted
    slot: int = memory.finishes[heap + place] & SLOT_MASK
    remove_finish(memory, heap, decodes, place)
    return slot


@inlined
def end_reading(memory: Memory, replica: int, now: int, token_ps: int) -> None:
    """Let those whose prompt has been read produce a token; at most one, the last, has more to read."""
    row, fixed = replica * REPLICA, replica * FIXED
    slot, prefill = memory.replicas[row + READER], memory.replicas[row + PREFILL]
    memory.replicas[row + READER] = NONE
    while slot != NONE:
        at = slot * SLOT
        behind = memory.slots[at + NEXT]
        tokens = memory.slots[at + PROMPT] + memory.slots[at + PRODUCED]
        chunk = min(prefill, tokens - memory.slots[at + READ])
        prefill -= chunk
        memory.slots[at + READ] += chunk
        memory.slots[at + BUSY_PS] += token_ps * chunk
        if memory.slots[at + READ] < tokens:
            memory.replicas[row + READER] = slot
        else:
            produced = memory.slots[at + PRODUCED] + 1
            memory.slots[at + PRODUCED] = produced
            if memory.slots[at + UNREAD] != NONE:
                dispatch.first_token(
                    memory.desk, memory.fixed[fixed + MODEL], replica, tokens, memory.slots[at + UNREAD]
                )
                memory.slots[at + UNREAD] = NONE
            result = memory.slots[at + REQUEST] * RESULT
            if produced == 1:
                memory.results[result + FIRST_TOKEN_AT] = now
            if produced == memory.slots[at + OUTPUT]:
                leave(memory, replica, slot, now, memory.slots[at + PROMPT] + produced)
            elif memory.fixed[fixed + SENDS] and memory.results[result + FINISH_AT] == UNFINISHED:
                send(memory, replica, slot, now, tokens)
            else:
                decode(memory, replica, slot)
        slot = behind


@inlined
def send(memory: Memory, replica: int, slot: int, now: int, tokens: int) -> None:
    """Let a request go to where it is written: its cache, of so many tokens, is on its way."""
    row, fixed, at = replica * REPLICA, replica * FIXED, slot * SLOT
    extra = memory.slots[at + REQUEST] * EXTRA
    memory.results[memory.slots[at + REQUEST] * RESULT + SERVED_BY] = NONE
    memory.extras[extra + READ_BY] = replica
    memory.extras[extra + READ_SHARE] = memory.slots[at + BUSY_PS]
    memory.slots[at + BUSY_PS] = 0
    memory.slots[at + NEXT] = NONE
    if len(memory.remembers) > 0:
        let_go(memory, replica, slot)
    memory.replicas[row + FREE] += memory.slots[at + PROMPT] + memory.slots[at + PRODUCED]
    memory.replicas[row + ACCEPTED] -= 1
    model = memory.fixed[fixed + MODEL]
    dispatch.left(memory.desk, model, replica, memory.models[model * MODEL_FIELDS + EXPECTED_OUTPUT])
    arrives = now + tokens * memory.fixed[fixed + TRANSFER_PS]
    push(memory.coming, memory.counters[COMING], arrives, memory.counters[SEQUENCE], slot)
    memory.counters[COMING] += 1
    memory.counters[SEQUENCE] += 1


@inlined
def leave(memory: Memory, replica: int, slot: int, now: int, held: int) -> None:
    """Write down what became of a request that has all its tokens, or whose client has left; free what it `held`."""
    row, fixed, at = replica * REPLICA, replica * FIXED, slot * SLOT
    request = memory.slots[at + REQUEST]
    result = request * RESULT
    if memory.results[result + FINISH_AT] == HAS_LEFT:
        note_left(memory, replica, slot)
    memory.results[result + FINISH_AT] = now
    memory.results[result + SHARE] = memory.slots[at + BUSY_PS]
    if len(memory.remembers) > 0 and held > 0:
        let_go(memory, replica, slot)
    memory.replicas[row + FREE] += held
    memory.replicas[row + ACCEPTED] -= 1
    model = memory.fixed[fixed + MODEL]
    dispatch.ended(
        memory.desk,
        model,
        replica,
        memory.results[result + CLIENT],
        memory.models[model * MODEL_FIELDS + EXPECTED_OUTPUT],
        spent_gpu_s(memory, replica, slot) - memory.reals[2 * request + COST_GPU_S],
    )
    free_slot(memory, slot)


@inlined
def note_left(memory: Memory, replica: int, slot: int) -> None:
    """Write down with how many tokens a client has left, whose request ends now that the step there is over."""
    at = slot * SLOT
    memory.extras[memory.slots[at + REQUEST] * EXTRA + LEFT_WITH] = memory.slots[at + PRODUCED]
    memory.leaving[replica] -= 1
    memory.counters[LEAVING] -= 1


@inlined
def spent_gpu_s(memory: Memory, replica: int, slot: int) -> float:
    """Return the GPU time a request has had since it was given to replicas, this one and who read it before."""
    at = slot * SLOT
    gpu_s: float = memory.slots[at + BUSY_PS] * S_PER_PS * memory.fixed[replica * FIXED + GPUS]
    extra = memory.slots[at + REQUEST] * EXTRA
    if memory.desk.models.role[replica] == dispatch.WRITES:
        reader = memory.extras[extra + READ_BY]
        gpu_s += memory.extras[extra + READ_SHARE] * S_PER_PS * memory.fixed[reader * FIXED + GPUS]
    return gpu_s


@inlined
def free_slot(memory: Memory, slot: int) -> None:
    memory.slots[slot * SLOT + REQUEST] = NONE
    memory.slots[slot * SLOT + NEXT] = memory.counters[FREE_SLOT]
    memory.counters[FREE_SLOT] = slot
    memory.counters[UNDER_WAY] -= 1
