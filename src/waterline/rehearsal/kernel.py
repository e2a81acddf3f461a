"""The rehearsal, event by event: what `oracle` does step by step, with the same integers, many steps at a time.

Between two events a replica does the same thing over and over: it decodes the same requests, whose context grows by one
token each, so that the time of its steps grows by a constant (`StepCost` is linear in what is cached, up to a window).
n such steps take n a + d n (n - 1) / 2, in whole numbers. They end at the first of

- the step in which a request has all its tokens, which is known when it begins to decode;
- the step for which the cache is full, and the one from which a window hides part of the context;
- the arrival of a request that can be admitted: at the first boundary not before it.

A head of the queue that cannot be admitted stays so meanwhile: the cache only fills. Steps that read prompts are taken
one by one; there are two or three for each request.

What the router sees of a replica changes with its events alone, so replicas run ahead to the next arrival one after
the other, in any order. Everything here is compiled when numba is there and must not need it: whole numbers in flat
arrays (see `state`), floats only where `policy` decides. Times are in picoseconds.
"""

import math
from typing import Any

from waterline.policy import admission
from waterline.rehearsal.jit import compiled, inlined
from waterline.rehearsal.state import (
    ACCEPTED,
    ADMISSIONS,
    ATTENTION_TABLE,
    BACKLOG,
    BEGIN_PS,
    BUSY_PS,
    CACHED,
    CLASS,
    CLASS_FIELDS,
    CLASSES,
    DECODES,
    EXPECTED_OUTPUT,
    EXPECTED_PROMPT,
    FINISH_AT,
    FINISHES,
    FIRST_PS,
    FIRST_TOKEN,
    FIRST_TOKEN_AT,
    FIXED,
    FREE,
    FREE_SLOT,
    GROWTH_PS,
    HEAD,
    HEAD_LAST,
    HEAD_TABLE,
    ITERATION,
    KIND,
    LATEST_PS,
    LEAF,
    LEAVES,
    LONGEST,
    MAX_BATCH,
    MEMBERS,
    MORE_PS_PER_TOKEN,
    NEVER_PS,
    NEXT,
    NONE,
    NOT_SERVED,
    OUT_OF_TIME,
    OUTPUT,
    PLAIN_TABLE,
    PREEMPTED,
    PREFILL,
    PRODUCED,
    PROMPT,
    QUEUED,
    RANKS,
    READ,
    READ_PS,
    READ_PS_PER_PAIR,
    READ_PS_PER_TOKEN,
    READER,
    READS_CACHED,
    READY,
    REPLICA,
    REQUEST,
    RESULT,
    SENDS,
    SERVED_BY,
    SHARE,
    SLOPE_TABLE,
    SLOT,
    SLOT_BITS,
    STEP_TOKENS,
    STEPS,
    TAIL,
    TOKEN_PS,
    TOKENS_LAST,
    TOKENS_TABLE,
    TOO_LATE,
    TOO_LONG,
    TREE,
    UNDIVIDED_PS,
    UNREAD,
    UNREAD_HERE,
    WINDOW,
    WINDOW_COUNT,
    WINDOW_PS_PER_PAIR,
    WINDOW_SLOPE_TABLE,
    WINDOW_TOKENS,
    WINDOWS,
    Memory,
)

SLOT_MASK = (1 << SLOT_BITS) - 1
MOST_STEPS = 1 << 20  # at once, and …
MOST_PS = 4e17  # … no longer than that, so that nothing leaves 64 bits
ADMIT = admission.ADMIT


# --- The router -----------------------------------------------------------------------------------------------------


@compiled
def run(
    memory: Memory,
    arrivals: Any,
    prompts: Any,
    outputs: Any,
    cached: Any,
    start: int,
    row: int,
    deadline_s: float,
    read: int,
) -> int:
    """Serve arrivals from `start` on; the first has the row `row` of the results. `read`: by prefill replicas already.

    Returns the number of arrivals that were dealt with: fewer than all when there is no free slot for the next one, or
    when time has run out.
    """
    for index in range(start, len(arrivals)):
        now = arrivals[index]
        advance(memory, now)
        if memory.counters[FREE_SLOT] == NONE or memory.counters[OUT_OF_TIME]:
            return index
        result = row + index
        chosen = choose(memory, prompts[index] + outputs[index], result, deadline_s, read)
        if chosen >= 0:
            accept(memory, chosen, now, result, prompts[index], outputs[index], cached[index], read)
        else:
            at = result * RESULT
            memory.results[at + FIRST_TOKEN_AT] = NONE
            memory.results[at + FINISH_AT] = now
            memory.results[at + SHARE] = 0
            memory.results[at + SERVED_BY] = chosen
    return len(arrivals)


@compiled
def advance(memory: Memory, now: int) -> None:
    """Let everything happen that happens up to and including `now`, but for steps that begin then."""
    if len(memory.due_ps) == 0:
        return
    while memory.due_ps[0] <= now:
        replica = memory.due_replica[0]
        reschedule(memory, replica, catch_up(memory, replica, memory.due_ps[0], now))


@inlined
def choose(memory: Memory, tokens: int, result: int, deadline_s: float, read: int) -> int:
    """Decide about a request of so many tokens: return its replica, or why it is refused. The one place of policy.

    The shortest wait of a tree is what `policy.routing.least_loaded` finds by looking at every replica.
    What has been `read` elsewhere is never refused.
    """
    unread = queued = 0
    last = NONE
    for number in range(memory.counters[CLASSES]):
        at = number * CLASS_FIELDS
        if memory.classes[at + LONGEST] < tokens:
            break
        last = number
        unread += memory.classes[at + UNREAD]
        queued += memory.classes[at + QUEUED]
    if last == NONE:
        return TOO_LONG
    if not read:
        retry_s = admission.retry_after_s(unread, memory.prefill_rates[last], queued, memory.rates[last], deadline_s)
        if retry_s > ADMIT:
            memory.retries_s[result] = retry_s
            return TOO_LATE
    best, shortest_wait_s = NOT_SERVED, math.inf
    for number in range(last + 1):
        wait_s = memory.waits_s[memory.classes[number * CLASS_FIELDS + TREE] + 1]
        if wait_s < shortest_wait_s or (wait_s == shortest_wait_s and best >= 0):
            found = least_waiting(memory, number * CLASS_FIELDS)
            if wait_s < shortest_wait_s or found < best:
                best, shortest_wait_s = found, wait_s
    return choose_anybody(memory, tokens) if read and best < 0 else best


@inlined
def choose_anybody(memory: Memory, tokens: int) -> int:
    """Return the replica that would drain its backlog first, of all that can hold so many tokens, ready or not."""
    best, shortest_wait_s = NOT_SERVED, math.inf
    for replica in range(len(memory.due_ps)):
        rate = memory.tokens_per_s[replica]
        if rate > 0 and memory.classes[memory.fixed[replica * FIXED + CLASS] + LONGEST] >= tokens:
            wait_s = memory.replicas[replica * REPLICA + BACKLOG] / rate
            if wait_s < shortest_wait_s:
                best, shortest_wait_s = replica, wait_s
    return best


@inlined
def least_waiting(memory: Memory, at: int) -> int:
    """Return the first replica of a class with its shortest wait."""
    tree, leaves = memory.classes[at + TREE], memory.classes[at + LEAVES]
    wait_s = memory.waits_s[tree + 1]
    node = 1
    while node < leaves:
        node *= 2
        if memory.waits_s[tree + node] != wait_s:
            node += 1
    replica: int = memory.members[memory.classes[at + MEMBERS] + node - leaves]
    return replica


@inlined
def reckon(memory: Memory, replica: int) -> None:
    """Take the backlog of a replica into its tree, where those are who get requests."""
    fixed = replica * FIXED
    if not memory.fixed[fixed + READY]:
        return
    tree = memory.classes[memory.fixed[fixed + CLASS] + TREE]
    node = memory.fixed[fixed + LEAF]
    wait_s = memory.replicas[replica * REPLICA + BACKLOG] / memory.tokens_per_s[replica]
    memory.waits_s[tree + node] = wait_s
    while node > 1:
        other_s = memory.waits_s[tree + (node ^ 1)]
        wait_s = min(wait_s, other_s)
        node >>= 1
        if memory.waits_s[tree + node] == wait_s:
            return
        memory.waits_s[tree + node] = wait_s


@inlined
def accept(
    memory: Memory, replica: int, now: int, result: int, prompt: int, output: int, cached: int, read: int
) -> None:
    """Queue a request at its arrival, or at that of its cache, with its first token, when it was `read` elsewhere."""
    row, fixed = replica * REPLICA, replica * FIXED
    slot = memory.counters[FREE_SLOT]
    at = slot * SLOT
    if memory.fixed[fixed + SENDS]:
        output = 1
    if memory.kinds[memory.fixed[fixed + KIND] + READS_CACHED]:
        cached = 0
    unread, produced, held = (0, 1, prompt + 1) if read else (prompt - cached, 0, -cached)
    memory.counters[FREE_SLOT] = memory.slots[at + NEXT]
    memory.slots[at + REQUEST] = result
    memory.slots[at + PROMPT] = prompt
    memory.slots[at + OUTPUT] = output
    memory.slots[at + BUSY_PS] = 0
    memory.slots[at + FIRST_TOKEN] = NONE - cached
    memory.slots[at + NEXT] = NONE
    memory.slots[at + PRODUCED] = produced
    memory.slots[at + READ] = held

    if memory.fixed[fixed + READY]:
        of_class = memory.fixed[fixed + CLASS]
        memory.classes[of_class + UNREAD] += unread
        if memory.replicas[row + ACCEPTED] >= memory.fixed[fixed + MAX_BATCH]:
            memory.classes[of_class + QUEUED] += memory.counters[EXPECTED_PROMPT] + expected_output(memory, fixed)
    memory.fixed[fixed + UNREAD_HERE] += unread
    memory.replicas[row + ACCEPTED] += 1
    memory.replicas[row + BACKLOG] += (0 if read else prompt) + expected_output(memory, fixed)
    reckon(memory, replica)

    if memory.replicas[row + HEAD] != NONE:
        memory.slots[memory.replicas[row + TAIL] * SLOT + NEXT] = slot
        memory.replicas[row + TAIL] = slot
        return
    memory.replicas[row + HEAD] = slot
    memory.replicas[row + TAIL] = slot
    if memory.replicas[row + STEPS] == 0:
        memory.replicas[row + BEGIN_PS] = now
        reschedule(memory, replica, now + 1)
    elif memory.replicas[row + STEPS] > 1:
        cut(memory, replica, now, prompt + produced + 1)


@inlined
def expected_output(memory: Memory, fixed: int) -> int:
    """Return how many tokens a request is expected to produce on a replica."""
    if memory.fixed[fixed + SENDS]:
        return 1
    tokens: int = memory.counters[EXPECTED_OUTPUT]
    return tokens


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
    reschedule(memory, replica, begin + span(steps, first, growth))


@inlined
def span(steps: int, first: int, growth: int) -> int:
    """Return how long so many steps take."""
    return steps * first + growth * (steps * (steps - 1) // 2)


@inlined
def steps_until(elapsed: int, first: int, growth: int) -> int:
    """Return the least number of steps that take `elapsed` or more; a float guesses, whole numbers decide."""
    half = first - growth / 2
    steps = max(1, math.ceil(2 * elapsed / (half + math.sqrt(half * half + 2.0 * growth * elapsed))))
    while span(steps, first, growth) < elapsed:
        steps += 1
    while steps > 1 and span(steps - 1, first, growth) >= elapsed:
        steps -= 1
    return steps


# --- One replica ----------------------------------------------------------------------------------------------------


@inlined
def catch_up(memory: Memory, replica: int, due: int, now: int) -> int:
    """Let everything happen to a replica up to and including `now`, but for steps that begin then; return what is next.

    A step that begins at s is due at s + 1: more requests may arrive at s itself.
    """
    row = replica * REPLICA
    while due <= now:
        if memory.replicas[row + STEPS]:
            end(memory, replica, due)
            memory.replicas[row + STEPS] = 0
            memory.replicas[row + BEGIN_PS] = due
            if due == now:
                idle = (
                    memory.replicas[row + DECODES] == 0
                    and memory.replicas[row + READER] == NONE
                    and memory.replicas[row + HEAD] == NONE
                )
                return NEVER_PS if idle else due + 1
        due = begin(memory, replica)
    return due


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
            free -= needed
            memory.replicas[row + HEAD] = memory.slots[at + NEXT]
            memory.slots[at + NEXT] = NONE
            memory.slots[at + READ] = -memory.slots[at + READ]  # what is cached
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
def preempt_latest(memory: Memory, replica: int) -> None:
    """Send the request that was admitted last back to the front of the queue, with nothing read."""
    row = replica * REPLICA
    slot = memory.replicas[row + READER]
    if slot != NONE:
        memory.replicas[row + READER] = NONE
        at = slot * SLOT
        memory.replicas[row + FREE] += memory.slots[at + PROMPT] + memory.slots[at + PRODUCED] + 1
    else:
        heap, count = memory.fixed[replica * FIXED + FINISHES], memory.replicas[row + DECODES]
        place, latest = 0, NONE
        for other in range(count):
            admitted = memory.slots[(memory.finishes[heap + other] & SLOT_MASK) * SLOT + NEXT]
            if admitted > latest:
                place, latest = other, admitted
        finish = memory.finishes[heap + place]
        slot = finish & SLOT_MASK
        at = slot * SLOT
        left = (finish >> SLOT_BITS) - memory.replicas[row + ITERATION]
        memory.slots[at + PRODUCED] = memory.slots[at + OUTPUT] - left
        memory.slots[at + BUSY_PS] += memory.replicas[row + TOKEN_PS]
        context = memory.slots[at + PROMPT] + memory.slots[at + PRODUCED]
        memory.replicas[row + FREE] += context
        memory.replicas[row + CACHED] -= context
        memory.replicas[row + DECODES] = count - 1
        remove_finish(memory, heap, count, place)
    memory.slots[at + READ] = 0
    memory.results[memory.slots[at + REQUEST] * RESULT + PREEMPTED] += 1
    memory.slots[at + NEXT] = memory.replicas[row + HEAD]
    if memory.replicas[row + HEAD] == NONE:
        memory.replicas[row + TAIL] = slot
    memory.replicas[row + HEAD] = slot


@inlined
def end(memory: Memory, replica: int, now: int) -> None:
    """Do what the steps under way have come to: tokens, first tokens, finishes."""
    row, fixed = replica * REPLICA, replica * FIXED
    decodes, steps = memory.replicas[row + DECODES], memory.replicas[row + STEPS]
    iteration = memory.replicas[row + ITERATION] + steps
    memory.replicas[row + ITERATION] = iteration
    memory.replicas[row + CACHED] += decodes * steps
    memory.replicas[row + FREE] -= decodes * steps
    divided = now - memory.replicas[row + BEGIN_PS] + memory.replicas[row + UNDIVIDED_PS]
    tokens = decodes + memory.replicas[row + PREFILL]  # of each step; several have no prompts
    token_ps = divided // tokens
    memory.replicas[row + UNDIVIDED_PS] = divided - token_ps * tokens
    memory.replicas[row + TOKEN_PS] += token_ps

    backlog = memory.replicas[row + BACKLOG]
    heap = memory.fixed[fixed + FINISHES]
    while decodes > 0 and memory.finishes[heap] >> SLOT_BITS == iteration:
        slot = memory.finishes[heap] & SLOT_MASK
        remove_finish(memory, heap, decodes, 0)
        decodes -= 1
        at = slot * SLOT
        memory.replicas[row + CACHED] -= memory.slots[at + PROMPT] + memory.slots[at + OUTPUT]
        memory.slots[at + BUSY_PS] += memory.replicas[row + TOKEN_PS]
        leave(memory, replica, slot, now)
    memory.replicas[row + DECODES] = decodes
    if memory.replicas[row + READER] != NONE:
        end_reading(memory, replica, now, token_ps)
    if memory.replicas[row + BACKLOG] != backlog:
        reckon(memory, replica)


@inlined
def end_reading(memory: Memory, replica: int, now: int, token_ps: int) -> None:
    """Let those whose prompt has been read produce a token; at most one, the last, has more to read."""
    row, fixed = replica * REPLICA, replica * FIXED
    slot, prefill = memory.replicas[row + READER], memory.replicas[row + PREFILL]
    memory.replicas[row + READER] = NONE
    while slot != NONE:
        at = slot * SLOT
        behind = memory.slots[at + NEXT]
        prompt, output, produced = memory.slots[at + PROMPT], memory.slots[at + OUTPUT], memory.slots[at + PRODUCED]
        chunk = min(prefill, prompt + produced - memory.slots[at + READ])
        prefill -= chunk
        memory.slots[at + READ] += chunk
        memory.slots[at + BUSY_PS] += token_ps * chunk
        if memory.slots[at + READ] < prompt + produced:
            memory.replicas[row + READER] = slot
        else:
            produced += 1
            memory.slots[at + PRODUCED] = produced
            if produced == 1:
                unread = prompt - (NONE - memory.slots[at + FIRST_TOKEN])
                memory.slots[at + FIRST_TOKEN] = now
                memory.fixed[fixed + UNREAD_HERE] -= unread
                if memory.fixed[fixed + READY]:
                    memory.classes[memory.fixed[fixed + CLASS] + UNREAD] -= unread
                memory.replicas[row + BACKLOG] -= prompt
            if produced == output:
                leave(memory, replica, slot, now)
            else:
                decode(memory, replica, slot)
        slot = behind


@inlined
def leave(memory: Memory, replica: int, slot: int, now: int) -> None:
    """Write down what became of a request that has all its tokens, and free its cache and its slot."""
    row, fixed, at = replica * REPLICA, replica * FIXED, slot * SLOT
    result = memory.slots[at + REQUEST] * RESULT
    memory.results[result + FIRST_TOKEN_AT] = memory.slots[at + FIRST_TOKEN]
    memory.results[result + FINISH_AT] = now
    memory.results[result + SHARE] = memory.slots[at + BUSY_PS]
    memory.results[result + SERVED_BY] = replica
    memory.replicas[row + FREE] += memory.slots[at + PROMPT] + memory.slots[at + OUTPUT]
    memory.replicas[row + BACKLOG] -= expected_output(memory, fixed)
    if memory.replicas[row + ACCEPTED] > memory.fixed[fixed + MAX_BATCH] and memory.fixed[fixed + READY]:
        memory.classes[memory.fixed[fixed + CLASS] + QUEUED] -= memory.counters[EXPECTED_PROMPT] + expected_output(
            memory, fixed
        )
    memory.replicas[row + ACCEPTED] -= 1
    memory.slots[at + NEXT] = memory.counters[FREE_SLOT]
    memory.counters[FREE_SLOT] = slot


# --- The time of steps, see `StepCost.step_ps` ----------------------------------------------------------------------


@inlined
def reading_ps(memory: Memory, kind: int, prefill: int, pairs: int, decodes: int, cached: int) -> int:
    """Return the time of a step with prompts."""
    ranks = memory.kinds[kind + RANKS]
    tokens, last = -(-(prefill + decodes) // ranks), memory.kinds[kind + TOKENS_LAST]
    took: int = memory.tables[memory.kinds[kind + TOKENS_TABLE] + min(tokens, last)]
    took += memory.kinds[kind + MORE_PS_PER_TOKEN] * max(0, tokens - last)
    sampled = min(-(-decodes // ranks) + 1, memory.kinds[kind + HEAD_LAST])
    took += memory.tables[memory.kinds[kind + HEAD_TABLE] + sampled]
    took += memory.tables[memory.kinds[kind + ATTENTION_TABLE] + decodes]
    took += memory.tables[memory.kinds[kind + SLOPE_TABLE] + decodes] * cached
    took += memory.kinds[kind + READ_PS] + memory.kinds[kind + READ_PS_PER_TOKEN] * prefill
    took += memory.kinds[kind + READ_PS_PER_PAIR] * pairs
    for number in range(memory.kinds[kind + WINDOW_COUNT]):
        window = memory.kinds[kind + WINDOWS] + number * WINDOW
        tokens = memory.windows[window + WINDOW_TOKENS]
        kept = min(cached, -(-decodes // ranks) * ranks * tokens)
        took += memory.tables[memory.windows[window + WINDOW_SLOPE_TABLE] + decodes] * kept
        took += memory.windows[window + WINDOW_PS_PER_PAIR] * min(pairs, prefill * tokens)
    return took


@inlined
def decoding_ps(memory: Memory, kind: int, decodes: int, cached: int) -> tuple[int, int, int]:
    """Return the time of the next step that only decodes, what each one after it takes more, and for how many."""
    slope = memory.tables[memory.kinds[kind + SLOPE_TABLE] + decodes]
    first = memory.tables[memory.kinds[kind + PLAIN_TABLE] + decodes] + slope * cached
    steps = MOST_STEPS
    ranks = memory.kinds[kind + RANKS]
    for number in range(memory.kinds[kind + WINDOW_COUNT]):
        window = memory.kinds[kind + WINDOWS] + number * WINDOW
        most = -(-decodes // ranks) * ranks * memory.windows[window + WINDOW_TOKENS]
        more = memory.tables[memory.windows[window + WINDOW_SLOPE_TABLE] + decodes]
        first += more * min(cached, most)
        if cached < most:
            slope += more
            steps = min(steps, (most - cached) // decodes + 1)
    return first, slope * decodes, steps


# --- Heaps ----------------------------------------------------------------------------------------------------------


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


@inlined
def reschedule(memory: Memory, replica: int, due: int) -> None:
    """Move a replica to where it belongs in the heap of all of them; a node has four children."""
    place, count = memory.due_place[replica], len(memory.due_ps)
    while place > 0:
        parent = (place - 1) >> 2
        if memory.due_ps[parent] <= due:
            break
        hand_down(memory, parent, place)
        place = parent
    while True:
        child = 4 * place + 1
        if child >= count:
            break
        for other in range(child + 1, min(child + 4, count)):
            if memory.due_ps[other] < memory.due_ps[child]:
                child = other
        if memory.due_ps[child] >= due:
            break
        hand_down(memory, child, place)
        place = child
    memory.due_ps[place] = due
    memory.due_replica[place] = replica
    memory.due_place[replica] = place


@inlined
def hand_down(memory: Memory, source: int, place: int) -> None:
    replica = memory.due_replica[source]
    memory.due_ps[place] = memory.due_ps[source]
    memory.due_replica[place] = replica
    memory.due_place[replica] = place
