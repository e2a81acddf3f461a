"""Which replica serves a request: what it remembers of the prompt first, then the shorter of two queues.

`route` looks at one replica that has the prompt's beginning in its cache and at two drawn by their speed, and takes
the one that would be done with everything before the request and with its prompt first. So it takes no longer with
7,500 replicas than with nine; up to `FEW` it looks at all of them. The dice are the caller's: a draw comes in.

The caller keeps two things, in arrays that never grow:

- `Prefixes`, a hash table of prompt blocks. A block's key is a hash of the prompt *up to and including* it (64 bits,
  not 0), so equal keys mean equal beginnings. A newer entry takes the place of an older one.
- `Ready`, the replicas that may be drawn, written again by `make_ready` whenever one comes, goes or drains.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterline.policy.decisions import NO_REPLICA, PREFIX_CACHED, SHORTEST_WAIT
from waterline.policy.jit import jit

NOBODY = -1
FEW = 8
SHARES = 65536  # in which a column of the alias table is cut
MOST_DRAWN = 2**62  # a draw is a whole number from 0 below this


class Prefixes(NamedTuple):
    """Which replica has read which beginning of a prompt last."""

    key: NDArray[np.int64]  # [place] of a block, 0 when empty; as many places as a power of two
    replica: NDArray[np.int64]  # [place]
    born: NDArray[np.int64]  # [place] how often that replica had been started by then


class Ready(NamedTuple):
    """The replicas in service, and a table to draw them by their speed."""

    replicas: NDArray[np.int64]  # [place] index of a replica; the first size[0] are meant
    threshold: NDArray[np.int64]  # [place] of SHARES; from there on the column belongs to its alias
    alias: NDArray[np.int64]  # [place] another place
    size: NDArray[np.int64]  # [1]


def new_prefixes(places: int) -> Prefixes:
    """Return an empty table; `places` is rounded up to a power of two."""
    size = 1 << max(0, int(places) - 1).bit_length()
    return Prefixes(np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.int64))


def new_ready(replicas: int) -> Ready:
    """Return a table without anybody; see `make_ready`."""
    empty = np.zeros(replicas, np.int64)
    return Ready(empty, empty.copy(), empty.copy(), np.zeros(1, np.int64))


@jit
def make_ready(ready: Ready, tokens_per_s: NDArray[np.float64]) -> None:
    """Fill in who may be drawn: each replica as often as it is fast.

    Vose's alias method, with the columns cut at whole `SHARES`.

    Args:
        ready: is written.
        tokens_per_s: [replica] the rate it sustains; 0 while it loads or drains, or when it has failed.
    """
    count, total = 0, 0.0
    for replica in range(len(tokens_per_s)):
        if tokens_per_s[replica] > 0.0:
            ready.replicas[count] = replica
            count += 1
            total += tokens_per_s[replica]
    ready.size[0] = count
    weight = np.empty(count, np.float64)
    small, large = np.empty(count, np.int64), np.empty(count, np.int64)
    smalls, larges = 0, 0
    for place in range(count):
        weight[place] = tokens_per_s[ready.replicas[place]] * count / total
        ready.threshold[place], ready.alias[place] = SHARES, place
        if weight[place] < 1.0:
            small[smalls] = place
            smalls += 1
        else:
            large[larges] = place
            larges += 1
    while smalls > 0 and larges > 0:
        smalls -= 1
        poor, rich = small[smalls], large[larges - 1]
        ready.threshold[poor], ready.alias[poor] = int(weight[poor] * SHARES), rich
        weight[rich] -= 1.0 - weight[poor]
        if weight[rich] < 1.0:
            larges -= 1
            small[smalls] = rich
            smalls += 1


@jit
def route(
    ready: Ready,
    prefixes: Prefixes,
    born: NDArray[np.int64],
    backlog_tokens: NDArray[np.float64],
    tokens_per_s: NDArray[np.float64],
    prefill_tokens_per_s: NDArray[np.float64],
    prompt_tokens: int,
    blocks: NDArray[np.int64],
    block_tokens: int,
    draw: int,
) -> tuple[int, int, int]:
    """Return the replica for a request, how many tokens of its prompt it has read before, and the rule.

    Args:
        ready: who may be drawn.
        prefixes: who has read what.
        born: [replica] how often it has been started: a replica that comes back has forgotten everything.
        backlog_tokens: [replica] accepted, not yet produced.
        tokens_per_s: [replica] the rate it sustains; 0 takes it out, whatever `ready` says.
        prefill_tokens_per_s: [replica] the rate at which it reads prompts.
        prompt_tokens: of the request.
        blocks: [block] keys of its prompt, see above; may be empty.
        block_tokens: tokens of a block.
        draw: a whole number below `MOST_DRAWN`, uniform.
    """
    best, best_s = NOBODY, np.inf
    count = ready.size[0]
    looks = count if count <= FEW else 2
    for look in range(looks):
        replica = ready.replicas[look if count <= FEW else _drawn(ready, draw, look)]
        done_s = _done_s(replica, backlog_tokens, tokens_per_s, prefill_tokens_per_s, prompt_tokens)
        if done_s < best_s or (done_s == best_s and replica < best):
            best, best_s = replica, done_s
    if best == NOBODY:  # both have gone since the table was made
        best = least_loaded(backlog_tokens, tokens_per_s)
        if best == NOBODY:
            return NOBODY, 0, NO_REPLICA
        best_s = _done_s(best, backlog_tokens, tokens_per_s, prefill_tokens_per_s, prompt_tokens)
    keeper, kept_tokens = longest_prefix(prefixes, born, blocks, block_tokens)
    kept_tokens = min(kept_tokens, prompt_tokens - 1)  # the last token is read again to produce one
    if keeper != NOBODY and kept_tokens > 0:
        kept_s = _done_s(keeper, backlog_tokens, tokens_per_s, prefill_tokens_per_s, prompt_tokens - kept_tokens)
        if kept_s <= best_s:
            return keeper, kept_tokens, PREFIX_CACHED
    return best, 0, SHORTEST_WAIT


@jit
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


@jit
def remember(prefixes: Prefixes, born: NDArray[np.int64], blocks: NDArray[np.int64], replica: int) -> None:
    """Note that a replica reads a prompt. Its blocks take the places of whatever was there."""
    for block in range(len(blocks)):
        place = _place(prefixes, blocks[block])
        prefixes.key[place], prefixes.replica[place] = blocks[block], replica
        prefixes.born[place] = born[replica]


@jit
def least_loaded(
    backlog_tokens: Sequence[float] | NDArray[np.float64], tokens_per_s: Sequence[float] | NDArray[np.float64]
) -> int:
    """Return the replica that would drain its backlog first, or NOBODY; looks at all of them.

    Args:
        backlog_tokens: [replica] accepted, not yet produced.
        tokens_per_s: [replica] the rate it sustains; 0 while it loads or drains, or when it has failed.

    Ties go to the lowest index, so that a rehearsal and a live gateway agree.
    """
    best, shortest_wait_s = NOBODY, np.inf
    for replica in range(len(backlog_tokens)):
        if tokens_per_s[replica] <= 0.0:
            continue
        wait_s = backlog_tokens[replica] / tokens_per_s[replica]
        if wait_s < shortest_wait_s:
            best, shortest_wait_s = replica, wait_s
    return best


@jit
def _place(prefixes: Prefixes, key: int) -> int:
    """Return where a key belongs; keys are hashes, so their low bits will do."""
    return int(key) & (len(prefixes.key) - 1)


@jit
def _drawn(ready: Ready, draw: int, look: int) -> int:
    """Return the place that a draw points to; the two looks use different digits of it."""
    faces = ready.size[0] * SHARES
    face = (draw // faces if look else draw) % faces
    place = face // SHARES
    return int(place if face % SHARES < ready.threshold[place] else ready.alias[place])


@jit
def _done_s(
    replica: int,
    backlog_tokens: NDArray[np.float64],
    tokens_per_s: NDArray[np.float64],
    prefill_tokens_per_s: NDArray[np.float64],
    unread_tokens: int,
) -> float:
    """Return when a replica would have served its backlog and read this prompt; never while it is out of service."""
    if tokens_per_s[replica] <= 0.0 or prefill_tokens_per_s[replica] <= 0.0:
        return np.inf
    return float(backlog_tokens[replica] / tokens_per_s[replica] + unread_tokens / prefill_tokens_per_s[replica])
