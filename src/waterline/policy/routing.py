"""Which replica serves a request: what it remembers of the prompt first, then the shorter of two queues.

`route` looks at one replica that has the prompt's beginning in its cache and at two drawn by their speed, and takes
the one that would be done with everything before the request and with its prompt first. So it takes no longer with
7,500 replicas than with nine; up to `FEW` it looks at all of them. The dice are the caller's: a draw comes in.

Only a replica with a free slot is chosen: requests wait where they can still go anywhere. When a few draws meet none,
one is taken from the list of those that have one.

The caller keeps three things, in arrays that never grow:

- `Replicas`, what is known of each. Those that may serve the same requests are a *pool*.
- `Prefixes`, a hash table of prompt blocks. A block's key is a hash of the prompt *up to and including* it (64 bits,
  not 0), so equal keys mean equal beginnings. A newer entry takes the place of an older one.
- `Ready`, the replicas of each pool that may be drawn, written again by `make_ready` whenever one comes or goes.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterline.policy.decisions import NO_REPLICA, PREFIX_CACHED, SHORTEST_WAIT
from waterline.policy.jit import swift

NOBODY = -1
FEW = 8
LOOKS = 2
MOST_DRAWS = 6  # to look at that many
FEWEST = 2  # rows of a table: a column of one row lies together, and what is compiled for others does not take it
HALF_BITS = 31
HALF = 1 << HALF_BITS  # in which a column of the alias table is cut, and half a draw
MOST_DRAWN = 1 << 2 * HALF_BITS  # a draw is a whole number from 0 below this


class Replicas(NamedTuple):
    """The replicas of all models, a row each."""

    pool: NDArray[np.int64]  # [replica]
    born: NDArray[np.int64]  # [replica] how often its row was given out: who comes back has forgotten everything
    serves: NDArray[np.int64]  # [replica] 1 while it gets requests; not while it loads or drains, or when it has failed
    free_slots: NDArray[np.int64]  # [replica]
    longest_tokens: NDArray[np.int64]  # [replica] the longest request that it may take, prompt and output
    tokens_per_s: NDArray[np.float64]  # [replica] the rate it sustains
    prefill_tokens_per_s: NDArray[np.float64]  # [replica] the rate at which it reads prompts
    backlog_tokens: NDArray[np.int64]  # [replica] accepted, not yet produced
    unread_tokens: NDArray[np.int64]  # [replica] of prompts, accepted and not yet read, but for what is cached


class Prefixes(NamedTuple):
    """Which replica has read which beginning of a prompt last."""

    key: NDArray[np.int64]  # [place] of a block, 0 when empty; as many places as a power of two
    replica: NDArray[np.int64]  # [place]
    born: NDArray[np.int64]  # [place] how often the row of that replica had been given out by then


class Ready(NamedTuple):
    """Who may be drawn. Each pool has a table to draw its replicas by their speed, and a list of free ones."""

    replicas: NDArray[np.int64]  # [pool x replicas] in service; the first size[pool] are meant
    threshold: NDArray[np.int64]  # [pool x replicas] of HALF; from there on the column belongs to its alias
    alias: NDArray[np.int64]  # [pool x replicas] another place
    size: NDArray[np.int64]  # [pool]
    free: NDArray[np.int64]  # [pool x replicas] in service, with a free slot, in no order; the first frees[pool]
    frees: NDArray[np.int64]  # [pool]
    place: NDArray[np.int64]  # [replica] in that list, or NOBODY
    weight: NDArray[np.float64]  # [replica] for `make_ready` to work with
    stacks: NDArray[np.int64]  # [replica] likewise


def new_replicas(rows: int) -> Replicas:
    """Return rows for so many replicas, nobody in them.

    What is known of a replica lies side by side: to look at one costs a line of the cache, not one for each field.
    """
    whole = lines(rows)
    real = whole.view(np.float64)
    return Replicas(
        pool=whole[:, 0],
        born=np.zeros(rows, np.int64),
        serves=whole[:, 1],
        free_slots=whole[:, 2],
        longest_tokens=whole[:, 3],
        tokens_per_s=real[:, 4],
        prefill_tokens_per_s=real[:, 5],
        backlog_tokens=whole[:, 6],
        unread_tokens=whole[:, 7],
    )


def with_rows(replicas: Replicas, rows: int) -> Replicas:
    """Return the same with more rows."""
    more = new_replicas(rows)
    for longer, before in zip(more, replicas, strict=True):
        longer[: len(before)] = before
    return more


def lines(count: int) -> NDArray[np.int64]:
    """Return so many rows of 64 bytes, each of which is a line of the cache."""
    count = max(count, FEWEST)
    raw = np.zeros(8 * count + 8, np.int64)
    begin = -(raw.ctypes.data // 8) % 8
    return raw[begin : begin + 8 * count].reshape(count, 8)


def new_prefixes(places: int) -> Prefixes:
    """Return an empty table; `places` is rounded up to a power of two."""
    size = 1 << max(0, int(places) - 1).bit_length()
    return Prefixes(np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.int64))


def new_ready(pools: int, replicas: int) -> Ready:
    """Return tables without anybody; see `make_ready`."""
    table = np.zeros((max(pools * replicas, FEWEST), 4), np.int64)
    return Ready(
        replicas=table[:, 0],
        threshold=table[:, 1],
        alias=table[:, 2],
        size=np.zeros(pools, np.int64),
        free=table[:, 3],
        frees=np.zeros(pools, np.int64),
        place=np.full(replicas, NOBODY, np.int64),
        weight=np.zeros(replicas),
        stacks=np.zeros(replicas, np.int64),
    )


@swift
def make_ready(replicas: Replicas, ready: Ready, pool: int) -> None:
    """Fill in who may be drawn of a pool: each replica as often as it is fast.

    Vose's alias method, with the columns cut at whole parts of `HALF`.
    """
    rows = len(ready.place)
    first, count, total = pool * rows, 0, 0.0
    ready.frees[pool] = 0
    for replica in range(rows):
        if replicas.pool[replica] != pool:
            continue
        ready.place[replica] = NOBODY
        if replicas.serves[replica]:
            ready.replicas[first + count] = replica
            count += 1
            total += replicas.tokens_per_s[replica]
            note_slots(replicas, ready, replica)
    ready.size[pool] = count
    weight, stacks, poors, rich_from = ready.weight, ready.stacks, 0, count
    for place in range(count):
        weight[place] = replicas.tokens_per_s[ready.replicas[first + place]] * count / total
        ready.threshold[first + place], ready.alias[first + place] = HALF, place
        if weight[place] < 1.0:
            stacks[poors] = place
            poors += 1
        else:
            rich_from -= 1
            stacks[rich_from] = place
    while poors > 0 and rich_from < count:
        poors -= 1
        poor, rich = stacks[poors], stacks[rich_from]
        ready.threshold[first + poor], ready.alias[first + poor] = int(weight[poor] * HALF), rich
        weight[rich] -= 1.0 - weight[poor]
        if weight[rich] < 1.0:
            rich_from += 1
            stacks[poors] = rich
            poors += 1


@swift
def note_slots(replicas: Replicas, ready: Ready, replica: int) -> None:
    """Put a replica on the list of free ones, or take it off; called when its slots or its service have changed."""
    pool, place = replicas.pool[replica], ready.place[replica]
    first = pool * len(ready.place)
    if replicas.serves[replica] and replicas.free_slots[replica] > 0:
        if place == NOBODY:
            ready.free[first + ready.frees[pool]] = replica
            ready.place[replica] = ready.frees[pool]
            ready.frees[pool] += 1
    elif place != NOBODY:
        ready.frees[pool] -= 1
        last = ready.free[first + ready.frees[pool]]
        ready.free[first + place] = last
        ready.place[last] = place
        ready.place[replica] = NOBODY


@swift
def route(
    replicas: Replicas,
    ready: Ready,
    prefixes: Prefixes,
    pool: int,
    prompt_tokens: int,
    tokens: int,
    blocks: NDArray[np.int64],
    block_tokens: int,
    draw: int,
) -> tuple[int, int, int]:
    """Return the replica for a request, how many tokens of its prompt it has read before, and the rule.

    Args:
        replicas: of all pools.
        ready: who may be drawn.
        prefixes: who has read what.
        pool: whose replicas may serve.
        prompt_tokens: of the request.
        tokens: prompt and output, which the replica must be able to hold.
        blocks: [block] keys of its prompt, see above; may be empty.
        block_tokens: tokens of a block.
        draw: a whole number below `MOST_DRAWN`, uniform.
    """
    best = _shortest(replicas, ready, pool, prompt_tokens, tokens, draw)
    if best == NOBODY:
        return NOBODY, 0, NO_REPLICA
    if len(blocks) > 0:
        keeper, kept_tokens = longest_prefix(prefixes, replicas.born, blocks, block_tokens)
        kept_tokens = min(kept_tokens, prompt_tokens - 1)  # the last token is read again to produce one
        if kept_tokens > 0 and replicas.pool[keeper] == pool and can_take(replicas, keeper, tokens):
            best_s = serves_in_s(replicas, best, prompt_tokens)
            if serves_in_s(replicas, keeper, prompt_tokens - kept_tokens) <= best_s:
                return keeper, kept_tokens, PREFIX_CACHED
    return best, 0, SHORTEST_WAIT


@swift
def longest_prefix(
    prefixes: Prefixes, born: NDArray[np.int64], blocks: NDArray[np.int64], block_tokens: int
) -> tuple[int, int]:
    """Return who has read most of a prompt, and how many tokens; NOBODY and 0 when nobody has.

    By halving: whoever has read a block has read those before it. Where an entry has been overwritten this finds less
    than there is, never more.
    """
    keeper, first, last = NOBODY, 0, len(blocks)
    while first < last:
        middle = (first + last) // 2
        place = _place(prefixes, blocks[middle])
        replica = prefixes.replica[place]
        if prefixes.key[place] == blocks[middle] and prefixes.born[place] == born[replica]:
            keeper, first = replica, middle + 1
        else:
            last = middle
    return keeper, first * block_tokens if keeper != NOBODY else 0


@swift
def remember(prefixes: Prefixes, born: NDArray[np.int64], blocks: NDArray[np.int64], replica: int) -> None:
    """Note that a replica reads a prompt. Its blocks take the places of whatever was there."""
    for block in range(len(blocks)):
        place = _place(prefixes, blocks[block])
        prefixes.key[place], prefixes.replica[place] = blocks[block], replica
        prefixes.born[place] = born[replica]


@swift
def _shortest(replicas: Replicas, ready: Ready, pool: int, prompt_tokens: int, tokens: int, draw: int) -> int:
    """Return the replica that would be done first of those looked at: all of a few, else two drawn that can take it."""
    first, size = pool * len(ready.place), ready.size[pool]
    best, best_s, looked = NOBODY, np.inf, 0
    digits, later = draw & (HALF - 1), draw >> HALF_BITS
    for look in range(size if size <= FEW else MOST_DRAWS):
        replica = ready.replicas[first + (look if size <= FEW else ready_at(ready, first, size, digits))]
        digits, later = later, (digits * 1103515245 + 12345) & (HALF - 1)
        if not can_take(replicas, replica, tokens):
            continue
        done_s = serves_in_s(replicas, replica, prompt_tokens)
        if done_s < best_s or (done_s == best_s and replica < best):
            best, best_s = replica, done_s
        looked += 1
        if looked == LOOKS and size > FEW:
            break
    if best == NOBODY and size > FEW:
        count = ready.frees[pool]
        begin = (digits * count) >> HALF_BITS
        for step in range(count):
            replica = ready.free[first + (begin + step if begin + step < count else begin + step - count)]
            if can_take(replicas, replica, tokens):
                return int(replica)
    return int(best)


@swift
def can_take(replicas: Replicas, replica: int, tokens: int) -> bool:
    return bool(
        replicas.serves[replica] and replicas.free_slots[replica] > 0 and tokens <= replicas.longest_tokens[replica]
    )


@swift
def _place(prefixes: Prefixes, key: int) -> int:
    """Return where a key belongs; keys are hashes, so their low bits will do."""
    return int(key) & (len(prefixes.key) - 1)


@swift
def ready_at(ready: Ready, first: int, size: int, digits: int) -> int:
    """Return the place that half a draw points to."""
    scaled = digits * size
    place = scaled >> HALF_BITS
    return int(place if (scaled & (HALF - 1)) < ready.threshold[first + place] else ready.alias[first + place])


@swift
def serves_in_s(replicas: Replicas, replica: int, unread_tokens: int) -> float:
    """Return when a replica would have served its backlog and read this prompt."""
    return float(
        replicas.backlog_tokens[replica] / replicas.tokens_per_s[replica]
        + unread_tokens / replicas.prefill_tokens_per_s[replica]
    )
