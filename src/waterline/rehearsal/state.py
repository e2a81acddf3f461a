"""The memory of the compiled rehearsal: rows of whole numbers in flat arrays, and how they are laid out.

An event touches one replica, one request of its, and a path in two trees. Each of them lies in a row of its own, so
that a large fleet costs a few cache misses an event. Field names are offsets within a row.

The arrays are flat, and `Memory` may as well hold memoryviews of them: then the same code runs without numba.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterline.cost.step import StepCost
from waterline.rehearsal.oracle import Capacity

Integers = NDArray[np.int64]
Reals = NDArray[np.float64]

NONE = -1  # no slot, no replica
NEVER_PS = 2**63 - 1
LATEST_PS = 100 * 86_400 * 10**12  # times are kept in 64 bits, which hold 106 days

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
    ACCEPTED,  # requests that have not ended
    BACKLOG,  # tokens, as the router counts them
) = range(16)
REPLICA = 16

# What seldom changes about a replica, or is seldom needed.
(
    KIND,  # where the row of its steps begins
    MAX_BATCH,
    CLASS,  # of the replicas that hold as long a request
    LEAF,  # in the router's tree
    FINISHES,  # where its heap of finishing steps begins
    READY,  # 1 when it gets requests
    UNREAD_HERE,  # prompt tokens of those without a first token, but for what is cached
    SENDS,  # 1 when requests leave it with their first token
) = range(8)
FIXED = 8

# A request that has been accepted: one line of the cache.
(
    REQUEST,  # its row in the results
    PROMPT,
    OUTPUT,
    BUSY_PS,  # its share of the steps so far; while it decodes, less the replica's TOKEN_PS when it began to
    FIRST_TOKEN,  # when it came; before, NONE less the tokens of its prompt that are cached
    NEXT,  # slot behind it: of those that wait, read, or are free; while it decodes, a number that grows with admission
    PRODUCED,  # tokens; while it decodes, when it began to
    READ,  # tokens since it was admitted; while it waits, those it brings, or below 0 those that are cached here
) = range(8)
SLOT = 8

# What became of a request.
FIRST_TOKEN_AT, FINISH_AT, SHARE, SERVED_BY, PREEMPTED = range(5)
RESULT = 5
TOO_LONG, TOO_LATE, NOT_SERVED = -1, -2, -3  # instead of a replica

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

# Replicas that hold as long a request.
LONGEST, UNREAD, QUEUED, TREE, LEAVES, MEMBERS = range(6)  # QUEUED: expected tokens of requests beyond the slots
CLASS_FIELDS = 8

# Of all replicas together.
FREE_SLOT, ADMISSIONS, OUT_OF_TIME, CLASSES, EXPECTED_PROMPT, EXPECTED_OUTPUT = range(6)
COUNTERS = 8

STEP_BITS = 37  # a finish is one number: its step, and below it the slot
SLOT_BITS = 63 - STEP_BITS


class Memory(NamedTuple):
    """Everything the event loop reads and writes."""

    replicas: Any  # [replica x REPLICA]
    fixed: Any  # [replica x FIXED]
    slots: Any  # [slot x SLOT]
    finishes: Any  # [all heaps] steps in which requests finish
    due_ps: Any  # [replica] a heap: when something happens to …
    due_replica: Any  # [replica] … that one
    due_place: Any  # [replica] where in the heap it is
    waits_s: Any  # [nodes of all trees] the shortest wait below
    members: Any  # [leaf] replicas by class
    tokens_per_s: Any  # [replica]
    kinds: Any  # [kind x KIND_FIELDS]
    windows: Any  # [window x WINDOW]
    tables: Any
    classes: Any  # [class x CLASS_FIELDS] longest first
    prefill_rates: Any  # [class] of it and all before it
    rates: Any  # likewise
    counters: Any
    results: Any  # [request x RESULT]
    retries_s: Any  # [request]


def aligned(count: int, fill: int = 0) -> Integers:
    """Return so many whole numbers that begin on a line of the cache."""
    raw = np.full(count + 8, fill, np.int64)
    start = -(raw.ctypes.data // 8) % 8
    return raw[start : start + count]


def make_memory(
    capacities: Sequence[Capacity],
    longest_tokens: Sequence[int],
    expected_prompt_tokens: int,
    expected_output_tokens: int,
    slots: int,
) -> Memory:
    """Return the memory of idle replicas, none of them ready; see `make_ready`."""
    count = len(capacities)
    replicas, fixed = aligned(count * REPLICA), aligned(count * FIXED)
    kinds, windows, tables, kind_of = _steps(capacities)
    classes, members, class_of, leaf_of, nodes = _classes(longest_tokens)
    heap_sizes = [one.slots for one in capacities]
    heaps = [0, *accumulate(heap_sizes)]
    for index, one in enumerate(capacities):
        row, at = index * REPLICA, index * FIXED
        replicas[row + FREE] = one.cache_tokens
        replicas[[row + HEAD, row + TAIL, row + READER]] = NONE
        fixed[at + KIND] = kind_of[index]
        fixed[at + MAX_BATCH] = one.max_batch
        fixed[at + CLASS] = class_of[index] * CLASS_FIELDS
        fixed[at + LEAF] = leaf_of[index]
        fixed[at + FINISHES] = heaps[index]
        fixed[at + SENDS] = one.role == "prefill"
    counters = aligned(COUNTERS)
    counters[FREE_SLOT] = NONE
    counters[EXPECTED_PROMPT] = expected_prompt_tokens
    counters[EXPECTED_OUTPUT] = expected_output_tokens
    counters[CLASSES] = len(classes) // CLASS_FIELDS
    memory = Memory(
        replicas=replicas,
        fixed=fixed,
        slots=aligned(0),
        finishes=aligned(heaps[-1]),
        due_ps=aligned(count, NEVER_PS),
        due_replica=np.arange(count, dtype=np.int64),
        due_place=np.arange(count, dtype=np.int64),
        waits_s=nodes,
        members=members,
        tokens_per_s=np.array([one.tokens_per_s for one in capacities], np.float64),
        kinds=kinds,
        windows=windows,
        tables=tables,
        classes=classes,
        prefill_rates=np.zeros(len(classes) // CLASS_FIELDS),
        rates=np.zeros(len(classes) // CLASS_FIELDS),
        counters=counters,
        results=aligned(0),
        retries_s=np.zeros(0),
    )
    return with_slots(memory, slots)


def with_slots(memory: Memory, slots: int) -> Memory:
    """Return the memory with room for more requests, which must have been full."""
    before = len(memory.slots) // SLOT
    grown = aligned(slots * SLOT, NONE)
    grown[: len(memory.slots)] = memory.slots
    grown[before * SLOT + NEXT :: SLOT][: slots - before] = [*range(before + 1, slots), NONE]
    memory.counters[FREE_SLOT] = before
    return memory._replace(slots=grown)


def _steps(capacities: Sequence[Capacity]) -> tuple[Integers, Integers, Integers, list[int]]:
    """Return kinds, windows and tables of the steps, and where the kind of each replica begins."""
    most_decodes: dict[tuple[int, bool], int] = {}
    steps: dict[tuple[int, bool], StepCost] = {}
    keys = [(id(one.step), one.reads_cached) for one in capacities]
    for key, one in zip(keys, capacities, strict=True):
        steps[key] = one.step
        most_decodes[key] = max(one.slots, most_decodes.get(key, 0))
    kinds: list[int] = []
    windows: list[int] = []
    tables: list[Integers] = []
    where: dict[tuple[int, bool], int] = {}

    def table(values: Sequence[int] | Integers) -> int:
        at = sum(len(table) for table in tables)
        tables.append(np.array(values, np.int64))
        return at

    for key, step in steps.items():
        where[key] = len(kinds)
        whole = [layers for layers in step.attention if not layers.window_tokens]
        parts = [layers for layers in step.attention if layers.window_tokens]
        per_rank = -(-np.arange(most_decodes[key] + 1) // step.ranks)
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
        row[WINDOWS] = len(windows)
        row[WINDOW_COUNT] = len(parts)
        row[STEP_TOKENS] = step.step_tokens
        row[READS_CACHED] = key[1]
        for layers in parts:
            slopes = table(_entries(layers.decode_ps_per_token, per_rank))
            windows += [layers.window_tokens, slopes, layers.prefill_ps_per_pair, 0]
        kinds += row
    flat = np.concatenate(tables) if tables else aligned(0)
    return np.array(kinds, np.int64), np.array(windows, np.int64), flat, [where[key] for key in keys]


def _entries(values: Sequence[int], rows: Integers) -> Integers:
    """Look up; the last entry stands for all beyond."""
    return np.array(values, np.int64)[np.minimum(rows, len(values) - 1)]


def _classes(longest_tokens: Sequence[int]) -> tuple[Integers, Integers, list[int], list[int], Reals]:
    """Return the classes, their members, class and leaf of each replica, and the trees of waits.

    A class has a complete binary tree, in the order of its replicas; the parent of node n is n // 2, the root 1.
    """
    longest = sorted(set(longest_tokens), reverse=True)
    rows: list[int] = []
    members: list[int] = []
    trees: list[Reals] = []
    class_of, leaf_of = [0] * len(longest_tokens), [0] * len(longest_tokens)
    for number, tokens in enumerate(longest):
        own = [index for index, held in enumerate(longest_tokens) if held == tokens]
        leaves = 1 << (len(own) - 1).bit_length()
        tree = np.full(2 * leaves, math.inf)
        for place, index in enumerate(own):
            class_of[index], leaf_of[index] = number, leaves + place
        rows += [tokens, 0, 0, sum(len(tree) for tree in trees), leaves, len(members), 0, 0]
        members += own
        trees.append(tree)
    waits_s = np.concatenate(trees) if trees else np.zeros(0)
    return np.array(rows, np.int64), np.array(members, np.int64), class_of, leaf_of, waits_s


def make_ready(memory: Memory, capacities: Sequence[Capacity], hour: int) -> None:
    """Write down who gets requests at this hour, and what the router sees of them."""
    ready = [index for index, one in enumerate(capacities) if one.serves(hour)]
    memory.fixed[READY::FIXED] = 0
    memory.fixed[np.array(ready, np.int64) * FIXED + READY] = 1
    memory.classes[UNREAD::CLASS_FIELDS] = 0
    memory.classes[QUEUED::CLASS_FIELDS] = 0
    memory.waits_s[:] = math.inf
    members: list[list[Capacity]] = [[] for _ in memory.rates]
    for index in ready:
        of_class, row = int(memory.fixed[index * FIXED + CLASS]), memory.replicas[index * REPLICA :]
        members[of_class // CLASS_FIELDS].append(capacities[index])
        memory.classes[of_class + UNREAD] += memory.fixed[index * FIXED + UNREAD_HERE]
        queued = max(0, int(row[ACCEPTED]) - capacities[index].max_batch)
        output = 1 if capacities[index].role == "prefill" else memory.counters[EXPECTED_OUTPUT]
        memory.classes[of_class + QUEUED] += queued * (memory.counters[EXPECTED_PROMPT] + output)
        leaf = memory.classes[of_class + TREE] + memory.fixed[index * FIXED + LEAF]
        memory.waits_s[leaf] = int(row[BACKLOG]) / capacities[index].tokens_per_s
    for number in range(len(members)):
        known = [one for own in members[: number + 1] for one in own]
        memory.prefill_rates[number] = math.fsum(one.prefill_tokens_per_s for one in known)
        memory.rates[number] = math.fsum(one.tokens_per_s for one in known)
        tree, leaves = (int(memory.classes[number * CLASS_FIELDS + name]) for name in (TREE, LEAVES))
        while leaves > 1:
            below = memory.waits_s[tree + leaves : tree + 2 * leaves]
            leaves //= 2
            memory.waits_s[tree + leaves : tree + 2 * leaves] = below.reshape(-1, 2).min(axis=1)
