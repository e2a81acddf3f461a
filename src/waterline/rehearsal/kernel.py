"""The rehearsal, event by event: what `oracle` does step by step, with the same integers, many steps at a time.

`run` is the loop over all that happens, in the order of time: steps end and begin (`life`), caches arrive, the desk's
second strikes, clients leave (`leaving`), requests arrive. Everything here is compiled when numba is there and must not
need it: whole numbers in flat arrays (see `state`), floats only where `policy` decides. Times are in picoseconds.
"""

from waterline.policy import dispatch
from waterline.policy.decisions import NOT_SERVED, SLOT_FREE, TAKES_OVER, TOO_LATE, WAITS_FOR_SLOT
from waterline.policy.routing import NOBODY
from waterline.rehearsal.entries import (
    PRIME,
    explain,
    explain_arrival,
    explain_last_resort,
    explain_start,
    write_arrival,
    write_entry,
    write_start,
)
from waterline.rehearsal.heaps import ENDS, alone, pop, push, reschedule
from waterline.rehearsal.jit import apart, compiled, inlined
from waterline.rehearsal.leaving import drop_left, end_time, gave_up, set_timer, take_out
from waterline.rehearsal.life import (
    accept,
    begin,
    end,
    free_slot,
    is_idle,
    latest,
    note_left,
    spent_gpu_s,
    stop_decoding,
    take_over,
)
from waterline.rehearsal.state import (
    ACCEPTED,
    ALIVE,
    BEGIN_PS,
    BUSY_PS,
    CLIENT,
    COMING,
    COST_GPU_S,
    DECODES,
    EXPECTED_OUTPUT,
    EXTRA,
    FINISH_AT,
    FIRST_DICE,
    FIRST_PS,
    FIRST_TOKEN_AT,
    FIXED,
    FOUND,
    FREE_SLOT,
    GROWTH_PS,
    HAS_LEFT,
    HEAD,
    LEAVING,
    LEFT_WITH,
    LOSS,
    LOSS_AT,
    LOSS_PS,
    LOSS_REPLICA,
    LOSS_REQUEST,
    MODEL,
    MODEL_FIELDS,
    NEVER_PS,
    NEXT,
    NEXT_TICK_PS,
    NONE,
    OUT_OF_TIME,
    OUTPUT,
    PREEMPTED,
    PRODUCED,
    PROMPT,
    READ,
    READ_BY,
    READ_SHARE,
    READER,
    REPLICA,
    REQUEST,
    RESTARTS,
    RESULT,
    RETRY_S,
    SECOND_DICE,
    SECONDS,
    SEQUENCE,
    SERVED_BY,
    SHARE,
    SLOT,
    STARTED_AT,
    STEPS,
    STILL,
    TAIL,
    TELLS,
    TELLS_CACHED,
    TICK_PS,
    TIMERS,
    TIMERS_EACH,
    UNDER_WAY,
    UNFINISHED,
    UNREAD,
    WAITS_PS,
    Asked,
    Memory,
)
from waterline.rehearsal.steptime import span, steps_until

MOST_STILL = 4000  # ticks; by then every account has forgotten everything, and who still waits waits for ever


@compiled
def run(  # noqa: C901, PLR0912 - all that can happen, in one place
    memory: Memory, asked: Asked, start: int, row: int, last: int, changed: int, failed: int, draining: int
) -> int:
    """Let everything happen up to and including `last`, but for steps that begin then.

    Of what happens at one time, steps end first; then caches arrive, a second ends, clients leave, requests arrive, and
    replicas change.

    Args:
        memory: of the fleet.
        asked: who arrives, in this order.
        start: the first of them that has not been dealt with.
        row: of the results, for request 0.
        last: when to stop.
        changed: whether replicas have come or gone then.
        failed: the one that has lost all it had; or NONE.
        draining: whether to stop as soon as all have ended, or nobody else will ever start.

    Returns:
        The number of requests that were dealt with: fewer than all where there is no room for the next one, or when
        time has run out.
    """
    index, count = start, len(asked.arrivals)
    while True:
        arrival = asked.arrivals[index] if index < count else last
        at = min(arrival, memory.counters[NEXT_TICK_PS], memory.coming[0], memory.timers[0])
        if len(memory.due_ps) > 0 and memory.due_ps[0] <= at:
            step(memory, at)
        elif memory.coming[0] == at:
            arrive_to_be_written(memory, at)
        elif memory.counters[NEXT_TICK_PS] == at:
            if draining and (memory.counters[UNDER_WAY] == 0 or memory.counters[STILL] >= MOST_STILL):
                return count
            tick(memory)
            start_all_waiting(memory, at)
        elif memory.timers[0] == at:
            leave_in_time(memory, at)
        elif index < count:
            if not has_room(memory):
                return index
            if len(memory.logs) > 0:
                explain_arrival(memory, asked, index, row + index)
            waits = arrive(memory, asked, index, row + index)
            if len(memory.logs) > 0:
                write_arrival(memory, row + index, at)
            if waits:
                start_waiting(memory, asked.models[index], at)
            index += 1
        elif changed:
            changed = False
            if failed != NONE:
                fail(memory, failed, at)
            start_all_waiting(memory, at)
        else:
            return count


@inlined
def step(memory: Memory, at: int) -> None:
    """Let the steps of the replica that is due end, and its next ones begin; nothing else happens before `at`."""
    now, entry = memory.due_ps[0], memory.due_replica[0]
    replica = entry & (ENDS - 1)
    if entry >= ENDS:
        accepted = memory.replicas[replica * REPLICA + ACCEPTED]
        end(memory, replica, now)
        if memory.counters[LEAVING] > 0 and memory.leaving[replica] > 0:
            drop_left(memory, replica, now)
        if memory.replicas[replica * REPLICA + ACCEPTED] != accepted:
            start_waiting(memory, memory.fixed[replica * FIXED + MODEL], now)
        if is_idle(memory, replica):
            reschedule(memory, replica, NEVER_PS, 0)
            return
        # Somebody may still come at this instant, unless it is certain that nothing else happens at it.
        if now >= min(at, memory.coming[0]) or not alone(memory, replica, now):
            reschedule(memory, replica, now + 1, 0)
            return
    reschedule(memory, replica, begin(memory, replica), ENDS)


@inlined
def has_room(memory: Memory) -> bool:
    """Whether another request can be taken in, and there is time left for it."""
    room: bool = (
        memory.counters[OUT_OF_TIME] == 0
        and memory.counters[FREE_SLOT] != NONE
        and 2 * (memory.counters[TIMERS] + TIMERS_EACH) <= len(memory.timers)
    )
    return room


# --- Requests ---------------------------------------------------------------------------------------------------------


@inlined
def arrive(memory: Memory, asked: Asked, index: int, request: int) -> bool:
    """Ask the desk about a request; return whether it waits although a slot may be free."""
    now, model, client = asked.arrivals[index], asked.models[index], asked.clients[index]
    prompt, output, cached = asked.prompts[index], asked.outputs[index], asked.cached[index]
    answer = dispatch.arrive(
        memory.desk,
        model,
        client,
        prompt,
        cached if memory.models[model * MODEL_FIELDS + TELLS_CACHED] else 0,
        memory.models[model * MODEL_FIELDS + EXPECTED_OUTPUT],
        prompt + output,
        memory.ttft_s[model],
        memory.blocks[memory.first_block[request] : memory.first_block[request + 1]],
        roll(memory),
    )
    taken = answer.rule == SLOT_FREE or answer.rule == WAITS_FOR_SLOT  # noqa: PLR1714 - compiled code has no sets
    write_result(memory, request, client, now if not taken else UNFINISHED, -answer.rule if not taken else NONE)
    memory.reals[2 * request + RETRY_S] = 0.0 if taken else answer.seconds
    memory.reals[2 * request + COST_GPU_S] = answer.gpu_s
    if not taken:
        return False
    slot = memory.counters[FREE_SLOT]
    at = slot * SLOT
    memory.counters[FREE_SLOT] = memory.slots[at + NEXT]
    memory.counters[UNDER_WAY] += 1
    memory.slots[at + REQUEST] = request
    memory.slots[at + PROMPT] = prompt
    memory.slots[at + OUTPUT] = output
    memory.slots[at + BUSY_PS] = 0
    memory.slots[at + PRODUCED] = 0
    memory.slots[at + READ] = -cached
    if len(asked.leaves) > 0 and asked.leaves[index] < NEVER_PS - now:
        number = set_timer(memory, now + asked.leaves[index], slot)
        memory.extras[request * EXTRA + LEFT_WITH] = -2 - number
    if answer.rule == SLOT_FREE:
        accept(memory, answer.replica, slot, now, answer.cached_tokens)
        return False
    line = dispatch.line_of(memory.desk, model, client)
    memory.slots[at + UNREAD] = now
    memory.slots[at + NEXT] = NONE
    if memory.line_heads[line] == NONE:
        memory.line_heads[line] = slot
    else:
        memory.slots[memory.line_tails[line] * SLOT + NEXT] = slot
    memory.line_tails[line] = slot
    patience = asked.patience[index]
    if patience < NEVER_PS - now:
        memory.results[request * RESULT + STARTED_AT] = -2 - set_timer(memory, now + patience, slot)
    return True


@inlined
def write_result(memory: Memory, request: int, client: int, finish: int, served_by: int) -> None:
    """Write down what is known of a request when it has arrived."""
    result, extra = request * RESULT, request * EXTRA
    memory.results[result + FIRST_TOKEN_AT] = NONE
    memory.results[result + FINISH_AT] = finish
    memory.results[result + SHARE] = 0
    memory.results[result + SERVED_BY] = served_by
    memory.results[result + PREEMPTED] = 0
    memory.results[result + STARTED_AT] = NONE
    memory.results[result + CLIENT] = client
    memory.results[result + FOUND] = 0
    memory.extras[extra + READ_BY] = NONE
    memory.extras[extra + READ_SHARE] = 0
    memory.extras[extra + RESTARTS] = 0
    memory.extras[extra + LEFT_WITH] = NONE


@inlined
def start_waiting(memory: Memory, model: int, now: int) -> None:
    """Give those who wait at the desk to replicas, while there are slots for them."""
    if memory.desk.queue.model_waiting[model] > 0 and memory.desk.models.free_slots[model] > 0:
        start_those(memory, model, now)


@inlined
def leave_in_time(memory: Memory, now: int) -> None:
    """Let the client leave whose time is up, and others have its room; or tell those whose turn does not come."""
    if memory.timers[1] == TELLS:
        pop(memory.timers, memory.counters[TIMERS])
        memory.counters[TIMERS] -= 1
        tell_overtaken(memory, now)
        return
    model = end_time(memory, now)
    if model != NONE:
        start_waiting(memory, model, now)


@inlined
def start_all_waiting(memory: Memory, now: int) -> None:
    """Do so for all models."""
    for model in range(len(memory.ttft_s)):
        start_waiting(memory, model, now)


@apart
def start_those(memory: Memory, model: int, now: int) -> None:
    """Start one after the other, as long as there is a slot for the one whose turn it is."""
    while True:
        if len(memory.logs) > 0:
            explain_start(memory, model)
        client, _ = dispatch.next_turn(memory.desk, model)
        if client == NOBODY:
            return
        line = dispatch.line_of(memory.desk, model, client)
        slot = memory.line_heads[line]
        at = slot * SLOT
        request = memory.slots[at + REQUEST]
        replica, cached, rule = dispatch.start(
            memory.desk,
            model,
            client,
            memory.slots[at + PROMPT] + memory.slots[at + PRODUCED],
            -memory.slots[at + READ] if memory.models[model * MODEL_FIELDS + TELLS_CACHED] else 0,
            memory.models[model * MODEL_FIELDS + EXPECTED_OUTPUT],
            memory.slots[at + PROMPT] + memory.slots[at + OUTPUT],
            memory.reals[2 * request + COST_GPU_S],
            memory.blocks[memory.first_block[request] : memory.first_block[request + 1]],
            roll(memory),
        )
        if replica == NOBODY and rule != NOT_SERVED:
            return
        memory.line_heads[line] = memory.slots[at + NEXT]
        if replica == NOBODY:
            dispatch.gave_up(memory.desk, model, client, memory.reals[2 * request + COST_GPU_S])
            memory.results[request * RESULT + FINISH_AT] = now
            memory.results[request * RESULT + SERVED_BY] = -NOT_SERVED
            free_slot(memory, slot)
        else:
            accept(memory, replica, slot, now, cached)
            if len(memory.logs) > 0:
                write_start(memory, now)


@apart
def tell_overtaken(memory: Memory, now: int) -> None:
    """Tell those whose turn has not come for long, and set a timer for when somebody may have to be told again.

    Whoever comes from now on waits until then at least. It is the first of its instant, and one at which a second ends.
    """
    tell_at = NEVER_PS
    for model in range(len(memory.ttft_s)):
        if memory.models[model * MODEL_FIELDS + WAITS_PS] < NEVER_PS:
            tell_at = min(tell_at, tell_overtaken_of(memory, model, now))
    if tell_at < NEVER_PS:
        push(memory.timers, memory.counters[TIMERS], (tell_at // TICK_PS + 1) * TICK_PS, 0, TELLS)
        memory.counters[TIMERS] += 1


@inlined
def tell_overtaken_of(memory: Memory, model: int, now: int) -> int:
    """Do so for one model, in the order in which they came; return until when the next one waits."""
    queue, tenants, late = memory.desk.queue, len(memory.desk.accounts.used_gpu_s), NONE
    waits = memory.models[model * MODEL_FIELDS + WAITS_PS]
    until: int = now + waits
    for group in range(model * tenants, (model + 1) * tenants):
        for place in range(queue.first[group], queue.first[group] + queue.lines[group]):
            late, since = take_late(memory, queue.heap[place], now - waits, late)
            if since != NONE:
                until = min(until, since + waits)
    told = late != NONE
    while late != NONE:
        slot, late = late, memory.slots[late * SLOT + NEXT]
        request = memory.slots[slot * SLOT + REQUEST]
        result = request * RESULT
        cost_gpu_s = memory.reals[2 * request + COST_GPU_S]
        memory.reals[2 * request + RETRY_S] = dispatch.overtaken(
            memory.desk, model, memory.results[result + CLIENT], cost_gpu_s, memory.ttft_s[model]
        )
        memory.results[result + FINISH_AT] = now
        memory.results[result + SERVED_BY] = -TOO_LATE
        free_slot(memory, slot)
    if told:
        start_waiting(memory, model, now)
    return until


@inlined
def take_late(memory: Memory, line: int, before: int, late: int) -> tuple[int, int]:
    """Move those from a line that have waited since before a time, and never begun, to the list of such.

    Return the first of the list, which is in the order of their arrival, and since when the next one waits, or NONE.
    """
    slot, after, other = memory.line_heads[line], NONE, late
    while slot != NONE:
        at = slot * SLOT
        if memory.results[memory.slots[at + REQUEST] * RESULT + STARTED_AT] >= 0:  # it came back, and goes first
            slot = memory.slots[at + NEXT]
            continue
        if memory.slots[at + UNREAD] >= before:
            return late, memory.slots[at + UNREAD]
        behind = memory.slots[at + NEXT]
        take_out(memory.slots, memory.line_heads, line, memory.line_tails, line, slot)
        while other != NONE and memory.slots[other * SLOT + REQUEST] < memory.slots[at + REQUEST]:
            after, other = other, memory.slots[other * SLOT + NEXT]
        memory.slots[at + NEXT] = other
        if after == NONE:
            late = slot
        else:
            memory.slots[after * SLOT + NEXT] = slot
        after, slot = slot, behind
    return late, NONE


@apart
def arrive_to_be_written(memory: Memory, now: int) -> None:
    """The cache of a request arrives; without anybody to write it, it asks again a second later."""
    slot = pop(memory.coming, memory.counters[COMING])
    memory.counters[COMING] -= 1
    at = slot * SLOT
    if memory.slots[at + REQUEST] < 0:  # nobody waits for it any more
        memory.slots[at + NEXT] = memory.counters[FREE_SLOT]
        memory.counters[FREE_SLOT] = slot
        return
    reader = memory.extras[memory.slots[at + REQUEST] * EXTRA + READ_BY]
    model = memory.fixed[reader * FIXED + MODEL]
    expected = memory.models[model * MODEL_FIELDS + EXPECTED_OUTPUT]
    tokens = memory.slots[at + PROMPT] + memory.slots[at + OUTPUT]
    draw = roll(memory)
    if len(memory.logs) > 0:
        explain(memory, model + len(memory.ttft_s), NONE, 0, tokens, draw)
    replica = dispatch.take_over(memory.desk, model, expected, tokens, draw)
    if replica == NOBODY:
        replica = find_anybody(memory, model, tokens)
        if replica == NOBODY:
            push(memory.coming, memory.counters[COMING], now + TICK_PS, memory.counters[SEQUENCE], slot)
            memory.counters[COMING] += 1
            memory.counters[SEQUENCE] += 1
            return
        if len(memory.logs) > 0:
            explain_last_resort(memory, replica)
        memory.desk.replicas.backlog_tokens[replica] += expected
    if len(memory.logs) > 0:
        write_entry(memory, now, memory.slots[at + REQUEST], TAKES_OVER, replica)
    take_over(memory, replica, slot, now)


@inlined
def find_anybody(memory: Memory, model: int, tokens: int) -> int:
    """Return the replica that would drain first, of all that write and can hold so much, but get no more."""
    best, shortest_wait_s = NOBODY, 1e300
    replicas = memory.desk.replicas
    for replica in range(len(memory.due_ps)):
        if not memory.fixed[replica * FIXED + ALIVE] or replicas.pool[replica] != model + len(memory.ttft_s):
            continue
        wait_s = replicas.backlog_tokens[replica] / replicas.tokens_per_s[replica]
        if memory.desk.models.holds_tokens[replica] >= tokens and wait_s < shortest_wait_s:
            best, shortest_wait_s = replica, wait_s
    return best


@inlined
def tick(memory: Memory) -> None:
    memory.counters[SECONDS] += 1
    memory.counters[NEXT_TICK_PS] += TICK_PS
    still = len(memory.due_ps) == 0 or memory.due_ps[0] == NEVER_PS
    memory.counters[STILL] = memory.counters[STILL] + 1 if still else 0
    dispatch.tick(memory.desk, float(memory.counters[SECONDS]))


@inlined
def roll(memory: Memory) -> int:
    """Return the next draw of routing: two halves of 31 digits."""
    memory.counters[FIRST_DICE] = memory.counters[FIRST_DICE] * 48_271 % PRIME
    memory.counters[SECOND_DICE] = memory.counters[SECOND_DICE] * 69_621 % PRIME
    draw: int = memory.counters[SECOND_DICE] << 31 | memory.counters[FIRST_DICE]
    return draw


# --- Replicas ---------------------------------------------------------------------------------------------------------


@apart
def fail(memory: Memory, replica: int, now: int) -> None:
    """A replica loses all it has. Its requests wait again, before the others of their clients, in their order."""
    row = replica * REPLICA
    if memory.replicas[row + STEPS] > 0:
        began, first = memory.replicas[row + BEGIN_PS], memory.replicas[row + FIRST_PS]
        growth = memory.replicas[row + GROWTH_PS]
        steps = steps_until(now - began + 1, first, growth) - 1  # that have ended by now
        if steps > 0:
            memory.replicas[row + STEPS] = steps
            end(memory, replica, began + span(steps, first, growth))
        memory.replicas[row + STEPS] = 0
    behind, slot, last_read = NONE, memory.replicas[row + READER], memory.replicas[row + HEAD]
    if slot == NONE:
        slot, last_read = last_read, NONE
    while slot != NONE:  # turn the list of those that read and of those that wait round
        following = memory.slots[slot * SLOT + NEXT]
        memory.slots[slot * SLOT + NEXT] = behind
        if following == NONE:
            following, last_read = last_read, NONE
        behind, slot = slot, following
    while behind != NONE:
        following = memory.slots[behind * SLOT + NEXT]
        come_back(memory, replica, behind, now)
        behind = following
    while memory.replicas[row + DECODES] > 0:
        come_back(memory, replica, stop_decoding(memory, replica, latest(memory, replica)), now)
    memory.replicas[row + READER] = memory.replicas[row + HEAD] = memory.replicas[row + TAIL] = NONE
    memory.replicas[row + ACCEPTED] = 0
    reschedule(memory, replica, NEVER_PS, 0)


@inlined
def write_loss(memory: Memory, request: int, replica: int, busy_ps: int, now: int) -> None:
    """Write down what a replica had spent on a request that has to begin again; the station has made room."""
    loss = 1 + LOSS * memory.losses[0]
    memory.losses[loss + LOSS_REQUEST] = request
    memory.losses[loss + LOSS_REPLICA] = replica
    memory.losses[loss + LOSS_PS] = busy_ps
    memory.losses[loss + LOSS_AT] = now
    memory.losses[0] += 1


@inlined
def come_back(memory: Memory, replica: int, slot: int, now: int) -> None:
    """Put a request whose replica has failed before all others of its client; what it has produced is kept.

    Unless its client has left since the step began that was under way: then it ends here.
    """
    at, model = slot * SLOT, memory.fixed[replica * FIXED + MODEL]
    request = memory.slots[at + REQUEST]
    client, extra = memory.results[request * RESULT + CLIENT], request * EXTRA
    spent = spent_gpu_s(memory, replica, slot) - memory.reals[2 * request + COST_GPU_S]
    dispatch.settle(memory.desk, model, client, spent)
    write_loss(memory, request, replica, memory.slots[at + BUSY_PS], now)
    reader = memory.extras[extra + READ_BY]
    if reader != NONE:
        write_loss(memory, request, reader, memory.extras[extra + READ_SHARE], now)
        memory.extras[extra + READ_BY] = NONE
        memory.extras[extra + READ_SHARE] = 0
    memory.extras[extra + RESTARTS] += 1
    memory.slots[at + BUSY_PS] = 0
    memory.slots[at + READ] = 0
    if memory.slots[at + PRODUCED] == 0:
        memory.results[request * RESULT + FOUND] = 0
    if memory.results[request * RESULT + FINISH_AT] == HAS_LEFT:
        note_left(memory, replica, slot)
        gave_up(memory, slot, now)
        free_slot(memory, slot)
        return
    memory.results[request * RESULT + SERVED_BY] = NONE
    unread = memory.slots[at + PROMPT] + memory.slots[at + PRODUCED]
    cost_gpu_s = dispatch.expected_gpu_s(
        memory.desk, model, unread, memory.models[model * MODEL_FIELDS + EXPECTED_OUTPUT]
    )
    memory.reals[2 * request + COST_GPU_S] = cost_gpu_s
    dispatch.come_back(memory.desk, model, client, cost_gpu_s)
    line = dispatch.line_of(memory.desk, model, client)
    memory.slots[at + NEXT] = memory.line_heads[line]
    if memory.line_heads[line] == NONE:
        memory.line_tails[line] = slot
    memory.line_heads[line] = slot
