"""The memory of the compiled rehearsal: rows of whole numbers in flat arrays, and how they are laid out.

An event touches one replica, one request of its, and what the desk knows of both. Each of them lies in a row of its
own, so that a large fleet costs a few cache misses an event. Field names are offsets within a row.

The arrays are flat, and `Memory` may as well hold memoryviews of them: then the same code runs without numba.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterline.cost.step import StepCost
from waterline.policy import admission, dispatch
from waterline.policy.decisions import REASONS
from waterline.policy.dispatch import Desk
from waterline.policy.jit import compiled
from waterline.rehearsal.capacity import Capacity, Terms

Integers = NDArray[np.int64]
Reals = NDArray[np.float64]

NONE = -1  # no slot, no replica
NEVER_PS = 2**63 - 1
LATEST_PS = 100 * 86_400 * 10**12  # times are kept in 64 bits, which hold 106 days
LONGEST_WAIT_S = 500_000.0  # after LATEST_PS it ends within 64 bits
TICK_PS = 10**12  # between two ticks of the desk

# A replica. Between two events it is idle, in one step that reads prompts, or in several alike that only decode.
(
    BEGIN_PS,  # of the steps under way; when none are, when the next one may begin
    STEPS,  # under way; 0 when idle
    FIRST_PS,  # how long the first of them takes …
    GROWTH_PS,  # … and how much more each one after it
    PREFILL,  # prompt tokens of the step under way; 0 in steps that only decode
    DECODES,  # requests that decode
    CACHED,  # their context, all together, when the steps began
    FREE,  # cache, before the decodes of the steps under way claim theirs
    ITERATION,  # steps before those under way
    TOKEN_PS,  # what each token that was decoded since the start has been charged, summed over all steps
    UNDIVIDED_PS,
    HEAD,  # slot of the first request that waits …
    TAIL,  # … and of the last
    READER,  # slot of the first request whose prompt is being read
    ACCEPTED,  # requests that have not left it
    IDLE,  # blocks of prompts in its free cache, see `blocks`
) = range(16)
REPLICA = 16

# What seldom changes about a replica.
(
    KIND,  # where the row of its steps begins
    MAX_BATCH,
    FINISHES,  # where its heap of finishing steps begins
    MODEL,
    GPUS,
    SENDS,  # 1 when requests leave it with their first token
    TRANSFER_PS,  # for each token of them
    ALIVE,  # 1 from when it is ready until it fails
) = range(8)
FIXED = 8

# A request that has been taken in: one line of the cache.
(
    REQUEST,  # its row in the results; NONE or less of a free slot
    PROMPT,
    OUTPUT,
    BUSY_PS,  # its share of the steps so far; while it decodes, less the replica's TOKEN_PS when it began to
    UNREAD,  # tokens that the desk counts as unread; NONE once they have been read; at the desk, since when it waits
    NEXT,  # slot behind it: of those that wait, read, or are free; while it decodes, a number that grows with admission
    PRODUCED,  # tokens; while it decodes, when it began to
    READ,  # tokens since it was admitted; while it waits, those it brings, or below 0 those that are cached there
) = range(8)
SLOT = 8

# What became of a request.
(
    FIRST_TOKEN_AT,  # NONE when none came
    FINISH_AT,
    SHARE,
    SERVED_BY,  # or minus the rule by which it was refused, or gave up; meanwhile, the replica where it is, or NONE
    PREEMPTED,
    STARTED_AT,  # when it was first given to a replica; before, NONE, or -2 less the number of its patience's timer
    CLIENT,
    FOUND,  # tokens of its prompt in the cache, when it was read
) = range(8)
RESULT = 8
UNFINISHED = -2  # a finish that is no time yet
HAS_LEFT = -3  # likewise, of a request whose client has left its replica: it ends with the step under way there
RETRY_S, COST_GPU_S = range(2)  # when to come back; what it was charged when it started
(
    READ_BY,  # a split's reader
    READ_SHARE,
    RESTARTS,  # how many replicas failed that had it
    LEFT_WITH,  # tokens, when its client left; before, -2 less the number of the timer of that; NONE: it does not leave
) = range(4)
EXTRA = 4

# What a replica that failed, or that read for one, had spent on a request.
LOSS_REQUEST, LOSS_REPLICA, LOSS_PS, LOSS_AT = range(4)
LOSS = 4
LOSSES_EACH = 2  # a request has at most so many at once: read and written

# A request that the desk gives to a replica, and why: what is kept for the log of decisions, if that is wanted.
ENTRY_AT, ENTRY_REQUEST, ENTRY_RULE, ENTRY_REPLICA, ENTRY_REASONS = range(5)
ENTRY = ENTRY_REASONS + len(REASONS)
ENTRIES_EACH = 4  # a request has at most so many in one call of the event loop: read and written, and a failure between

# Steps of one kind of replica; tables are offsets into `Memory.tables`.
(
    TOKENS_TABLE,
    TOKENS_LAST,  # index of the last entry
    MORE_PS_PER_TOKEN,
    HEAD_TABLE,
    HEAD_LAST,
    RANKS,
    PLAIN_TABLE,  # [decodes] a step without prompts, but for what is cached
    ATTENTION_TABLE,  # [decodes] of it what attention takes
    SLOPE_TABLE,  # [decodes] by cached token, of layers that see the whole context
    READ_PS,  # for a step with prompts
    READ_PS_PER_TOKEN,
    READ_PS_PER_PAIR,  # of layers that see the whole context
    WINDOWS,  # where the first row of those that do not begins in `Memory.windows` …
    WINDOW_COUNT,  # … and how many there are
    STEP_TOKENS,
    READS_CACHED,  # 1 when what is cached of a prompt is read all the same
) = range(16)
KIND_FIELDS = 16
WINDOW_TOKENS, WINDOW_SLOPE_TABLE, WINDOW_PS_PER_PAIR = range(3)
WINDOW = 4

# A block of a prompt on a replica, and the ends of a replica's list of idle ones.
(
    KEY,
    OWNER,  # the replica
    USERS,  # requests that run there and have it in their prompts; 0: idle, NONE: of a free page
    OLDER,  # of idle ones: the page used before it, or NONE
    NEWER,  # … and after it
    BEHIND,  # the next one in its bucket, or of free ones
) = range(6)
PAGE = 8
SPREAD = 2_654_435_761  # for buckets: an odd number whose digits are all over the place
OLDEST, NEWEST = range(2)
CACHE = 2

# Of a model.
(
    EXPECTED_OUTPUT,
    TELLS_CACHED,  # 1 when the desk is told what is cached of a prompt
    WAITS_PS,  # how long who was taken in waits for its turn, before it is told that it does not come
) = range(3)
MODEL_FIELDS = 4

# Of all together.
(
    FREE_SLOT,
    ADMISSIONS,
    OUT_OF_TIME,
    NEXT_TICK_PS,
    SECONDS,  # ticks so far
    STILL,  # ticks in a row at which no replica had anything to do
    UNDER_WAY,  # requests taken in that have not ended
    COMING,  # caches on their way
    TIMERS,
    SEQUENCE,  # caches and timers so far; from 1 on
    FIRST_DICE,
    SECOND_DICE,
    FINISHES_USED,  # entries of `Memory.finishes` that have been given out
    BLOCK_TOKENS,  # of the blocks of prompts
    FREE_PAGE,
    LEAVING,  # requests that end with the step under way, on all replicas
) = range(16)
COUNTERS = 16

TIMERS_EACH = 2  # at most, of a request: of its patience, and of when its client leaves
STEP_BITS = 37  # a finish is one number: its step, and below it the slot; so are caches and timers
SLOT_BITS = 63 - STEP_BITS
SLOT_MASK = (1 << SLOT_BITS) - 1
TELLS = SLOT_MASK  # slot of a timer that is nobody's: perhaps some have to be told that their turn does not come


class Memory(NamedTuple):
    """Everything the event loop reads and writes."""

    desk: Desk
    replicas: Any  # [replica x REPLICA]
    fixed: Any  # [replica x FIXED]
    slots: Any  # [slot x SLOT]
    finishes: Any  # [all heaps] steps in which requests finish
    due_ps: Any  # [replica] a heap: when something happens to …
    due_replica: Any  # [replica] … that one; see `heaps.ENDS`
    due_place: Any  # [replica] where in the heap it is
    coming: Any  # [slot x 2] a heap: when a cache arrives, and its number and slot
    timers: Any  # [timer x 2] a heap: when somebody's time is up, and its number and slot
    leaving: Any  # [replica] requests there that end with the step under way, because their clients have left
    line_heads: Any  # [line] slot of the first that waits at the desk …
    line_tails: Any  # [line] … and of the last
    kinds: Any  # [kind x KIND_FIELDS]
    windows: Any  # [window x WINDOW]
    tables: Any
    models: Any  # [model x MODEL_FIELDS]
    ttft_s: Any  # [model]
    counters: Any
    results: Any  # [request x RESULT]
    reals: Any  # [request x 2]
    extras: Any  # [request x EXTRA]
    blocks: Any  # [all blocks] keys of prompts …
    first_block: Any  # [request and one more] … and where each one's begin
    caches: Any  # [replica x CACHE]
    pages: Any  # [page x PAGE]
    buckets: Any  # [a power of two] the first page of each, or NONE
    losses: Any  # [1 + losses x LOSS] how many there are, and they
    log: Any  # [1 + entries x ENTRY] how many entries there are, and they; empty where no log is kept
    remembers: Any  # () until prompts come with their blocks, then (1,): compiled code is another for either
    logs: Any  # () where no log is kept, else (1,): likewise, and who keeps one also remembers


class Asked(NamedTuple):
    """Requests in the order of their arrival; all [request]."""

    arrivals: Any
    prompts: Any
    outputs: Any
    cached: Any
    models: Any
    clients: Any
    patience: Any
    leaves: Any  # or none at all, where nobody does


def aligned(count: int, fill: int = 0) -> Integers:
    """Return so many whole numbers that begin on a line of the cache."""
    raw = np.full(count + 8, fill, np.int64)
    start = -(raw.ctypes.data // 8) % 8
    return raw[start : start + count]


def make_memory(terms: Terms, slots: int) -> Memory:
    """Return the memory of a fleet without replicas; see `with_replicas`."""
    models, lines = len(terms.ttft_s), len(terms.ttft_s) * len(terms.tenant_of_client)
    desk = dispatch.new_desk(
        terms.guarantee,
        terms.deserved,
        terms.limit,
        terms.tenant_of_client,
        models=models,
        rows=0,
        gpus=terms.gpus,
        block_tokens=terms.block_tokens if terms.affinity else 0,
        prefix_places=terms.prefix_places,
    )
    counters = aligned(COUNTERS)
    counters[FREE_SLOT] = NONE
    counters[FREE_PAGE], counters[BLOCK_TOKENS] = NONE, terms.block_tokens
    counters[NEXT_TICK_PS] = TICK_PS
    counters[FIRST_DICE], counters[SECOND_DICE] = terms.dice
    of_models = aligned(models * MODEL_FIELDS)
    of_models[EXPECTED_OUTPUT::MODEL_FIELDS] = terms.output_tokens
    of_models[TELLS_CACHED::MODEL_FIELDS] = 1
    of_models[WAITS_PS::MODEL_FIELDS] = [waits_ps(ttft_s) for ttft_s in terms.ttft_s]
    timers = aligned(2 * slots, NEVER_PS)
    timers[:2], counters[TIMERS], counters[SEQUENCE] = (TICK_PS, TELLS), 1, 1
    memory = Memory(
        desk=desk,
        replicas=aligned(0),
        fixed=aligned(0),
        slots=aligned(0),
        finishes=aligned(0),
        due_ps=aligned(0),
        due_replica=aligned(0),
        due_place=aligned(0),
        coming=aligned(0),
        timers=timers,
        leaving=aligned(0),
        line_heads=aligned(lines, NONE),
        line_tails=aligned(lines, NONE),
        kinds=aligned(0),
        windows=aligned(0),
        tables=aligned(0),
        models=of_models,
        ttft_s=np.array(terms.ttft_s, np.float64),
        counters=counters,
        results=aligned(0),
        reals=np.zeros(0),
        extras=aligned(0),
        blocks=aligned(0),
        first_block=aligned(1),
        caches=aligned(0),
        pages=aligned(0),
        buckets=aligned(1, NONE),
        losses=aligned(1),
        log=aligned(1 if terms.reasons else 0),
        remembers=(1,) if terms.reasons else (),
        logs=(1,) if terms.reasons else (),
    )
    return with_slots(memory, slots)


def waits_ps(ttft_s: float) -> int:
    """Return how long a request waits for its turn, before it is told that it does not come; days: NEVER_PS."""
    seconds = admission.waits_s(ttft_s)
    return round(seconds * TICK_PS) if seconds < LONGEST_WAIT_S else NEVER_PS


def with_slots(memory: Memory, slots: int) -> Memory:
    """Return the memory with room for more requests, which must have been full."""
    before = len(memory.slots) // SLOT
    grown = longer(memory.slots, slots * SLOT, NONE)
    grown[before * SLOT + NEXT :: SLOT][: slots - before] = [*range(before + 1, slots), NONE]
    memory.counters[FREE_SLOT] = before
    return memory._replace(slots=grown, coming=longer(memory.coming, 2 * slots, NEVER_PS))


def longer(array: Integers, count: int, fill: int = 0) -> Integers:
    """Return an array with more at its end."""
    grown = aligned(count, fill)
    grown[: len(array)] = array
    return grown


def with_replicas(
    memory: Memory, first: int, capacities: Sequence[Capacity], known: "dict[tuple[int, bool, int], Kind]"
) -> Memory:
    """Return the memory with more replicas, idle and out of service.

    Args:
        memory: before.
        first: row of the first who comes; all before it have been given out, and none from there on.
        capacities: of those who come.
        known: the kinds of steps there are; is written.
    """
    for one in capacities:
        memory = _with_kind(memory, one, known)
    heap = memory.counters[FINISHES_USED]
    finishes = heap + sum(one.slots for one in capacities)
    memory = _with_rows(memory, first + len(capacities))
    if finishes > len(memory.finishes):
        memory = memory._replace(finishes=longer(memory.finishes, max(finishes, 2 * heap)))
    for index, one in enumerate(capacities, first):
        row, at = index * REPLICA, index * FIXED
        memory.replicas[row + FREE] = one.cache_tokens
        memory.replicas[[row + HEAD, row + TAIL, row + READER]] = NONE
        memory.fixed[at + KIND] = known[kind_key(one)].at
        memory.fixed[at + MAX_BATCH] = one.max_batch
        memory.fixed[at + FINISHES] = heap
        memory.fixed[at + MODEL] = one.model
        memory.fixed[at + GPUS] = one.gpus
        memory.fixed[at + SENDS] = one.role == "prefill"
        memory.fixed[at + TRANSFER_PS] = one.transfer_ps_per_token
        if one.reads_cached:
            memory.models[one.model * MODEL_FIELDS + TELLS_CACHED] = 0
        heap += one.slots
        put(memory.desk, index, one)
    memory.counters[FINISHES_USED] = finishes
    for model in {one.model for one in capacities}:
        compiled(dispatch.recount)(memory.desk.models, memory.desk.replicas, memory.desk.accounts, model)
    return memory


def _with_rows(memory: Memory, rows: int) -> Memory:
    """Return the memory with rows for at least so many replicas; where there were too few, for half as many more."""
    before = len(memory.due_ps)
    if rows <= before:
        return memory
    rows = max(rows, before + before // 2)
    memory = memory._replace(
        desk=dispatch.with_rows(memory.desk, rows),
        replicas=longer(memory.replicas, rows * REPLICA),
        fixed=longer(memory.fixed, rows * FIXED),
        due_ps=longer(memory.due_ps, rows, NEVER_PS),
        due_replica=longer(memory.due_replica, rows),
        due_place=longer(memory.due_place, rows),
        leaving=longer(memory.leaving, rows),
        caches=longer(memory.caches, rows * CACHE, NONE),
    )
    memory.due_replica[before:] = memory.due_place[before:] = np.arange(before, rows)
    return memory


def pages_of(capacity: Capacity, block_tokens: int) -> int:
    """Return the most pages a replica has at a time.

    Those in use lie in the occupied part of the cache, but for the last of each request, which need not be whole; idle
    ones in the free part. Before room is made for a request that is admitted, its own come on top.
    """
    return (capacity.cache_tokens + capacity.longest_tokens) // block_tokens + capacity.max_batch + 2


def with_pages(memory: Memory, pages: int) -> Memory:
    """Return the memory with at least so many pages; when there are more, all are put into buckets anew."""
    if pages * PAGE <= len(memory.pages):
        return memory
    pages = 1 << (pages - 1).bit_length()
    grown, buckets = longer(memory.pages, pages * PAGE, NONE), aligned(2 * pages, NONE)
    rows = grown.reshape(-1, PAGE)
    free, used = np.flatnonzero(rows[:, USERS] == NONE), np.flatnonzero(rows[:, USERS] != NONE)
    rows[free, BEHIND] = [*free[1:], NONE]
    memory.counters[FREE_PAGE] = free[0]
    bucket = (rows[used, KEY] + rows[used, OWNER] * SPREAD) & (len(buckets) - 1)
    order = np.argsort(bucket, kind="stable")
    used, bucket = used[order], bucket[order]
    rows[used, BEHIND] = np.where(bucket == np.append(bucket[1:], NONE), np.append(used[1:], NONE), NONE)
    first = bucket != np.append(NONE, bucket[:-1])
    buckets[bucket[first]] = used[first]
    return memory._replace(pages=grown, buckets=buckets)


def put(desk: Desk, row: int, capacity: Capacity) -> None:
    """Tell the desk who is in a row."""
    dispatch.put(
        desk,
        row,
        capacity.model,
        role=ROLES[capacity.role],
        gpus=float(capacity.gpus),
        slots=capacity.max_batch,
        longest_tokens=capacity.longest_tokens,
        tokens_per_s=capacity.tokens_per_s,
        prefill_tokens_per_s=capacity.prefill_tokens_per_s,
    )


ROLES = {"both": dispatch.BOTH, "prefill": dispatch.READS, "decode": dispatch.WRITES}


class Kind(NamedTuple):
    """Replicas whose steps take alike."""

    step: StepCost
    at: int  # where its row begins


def kind_key(capacity: Capacity) -> tuple[int, bool, int]:
    return id(capacity.step), capacity.reads_cached, capacity.slots


def _with_kind(memory: Memory, capacity: Capacity, known: dict[tuple[int, bool, int], Kind]) -> Memory:
    """Return the memory with the tables of a replica's steps, if they are new."""
    if kind_key(capacity) in known:
        return memory
    step = capacity.step
    known[kind_key(capacity)] = Kind(step, len(memory.kinds))
    windows: list[int] = []
    tables: list[Integers] = [memory.tables]

    def table(values: Sequence[int] | Integers) -> int:
        at = sum(len(table) for table in tables)
        tables.append(np.array(values, np.int64))
        return at

    whole = [layers for layers in step.attention if not layers.window_tokens]
    parts = [layers for layers in step.attention if layers.window_tokens]
    per_rank = -(-np.arange(capacity.slots + 1) // step.ranks)
    by_decodes = [_entries(layers.decode_ps, per_rank) for layers in step.attention]
    attention = np.sum(by_decodes, axis=0, dtype=np.int64) * (per_rank > 0) + 0 * per_rank
    tokens = np.array([step.step_ps(0, 0, int(decodes), 0) for decodes in range(len(per_rank))], np.int64)
    slope = np.sum([_entries(layers.decode_ps_per_token, per_rank) for layers in whole], axis=0, dtype=np.int64)
    row = [0] * KIND_FIELDS
    row[TOKENS_TABLE] = table(step.tokens_ps)
    row[TOKENS_LAST] = len(step.tokens_ps) - 1
    row[MORE_PS_PER_TOKEN] = step.more_ps_per_token
    row[HEAD_TABLE] = table(step.head_ps)
    row[HEAD_LAST] = len(step.head_ps) - 1
    row[RANKS] = step.ranks
    row[PLAIN_TABLE] = table(tokens)
    row[ATTENTION_TABLE] = table(attention)
    row[SLOPE_TABLE] = table(slope + 0 * per_rank)
    row[READ_PS] = sum(layers.prefill_ps for layers in step.attention)
    row[READ_PS_PER_TOKEN] = sum(layers.prefill_ps_per_token for layers in step.attention)
    row[READ_PS_PER_PAIR] = sum(layers.prefill_ps_per_pair for layers in whole)
    row[WINDOWS] = len(memory.windows)
    row[WINDOW_COUNT] = len(parts)
    row[STEP_TOKENS] = step.step_tokens
    row[READS_CACHED] = capacity.reads_cached
    for layers in parts:
        slopes = table(_entries(layers.decode_ps_per_token, per_rank))
        windows += [layers.window_tokens, slopes, layers.prefill_ps_per_pair, 0]
    return memory._replace(
        kinds=np.concatenate([memory.kinds, np.array(row, np.int64)]),
        windows=np.concatenate([memory.windows, np.array(windows, np.int64)]),
        tables=np.concatenate(tables),
    )


def _entries(values: Sequence[int], rows: Integers) -> Integers:
    """Look up; the last entry stands for all beyond."""
    return np.array(values, np.int64)[np.minimum(rows, len(values) - 1)]
