"""What each replica still has of the prompts it has read: its prefix cache, in blocks. `oracle` says what that means.

A page is one block on one replica: in use by requests that run there, or idle. Idle ones lie in the free part of the
cache, in a list by the time of their last use; those used longest ago go first when it gets small. A table of buckets
finds a page by its replica and its key. All of it is whole numbers in flat arrays, see `state`.
"""

from waterline.rehearsal.jit import apart, inlined
from waterline.rehearsal.state import (
    BEHIND,
    BLOCK_TOKENS,
    CACHE,
    FREE_PAGE,
    IDLE,
    KEY,
    NEWER,
    NEWEST,
    NONE,
    OLDER,
    OLDEST,
    OWNER,
    PAGE,
    PROMPT,
    REPLICA,
    REQUEST,
    SLOT,
    SPREAD,
    USERS,
    Memory,
)


@apart
def hold(memory: Memory, replica: int, slot: int) -> int:
    """A request is admitted: it uses its blocks from now on; return how many tokens of its prompt are there already."""
    first = memory.first_block[memory.slots[slot * SLOT + REQUEST]]
    found, looking = 0, True
    for place in range(first, first + blocks_of(memory, slot)):
        page = page_of(memory, replica, memory.blocks[place])
        if page == NONE:
            page = new_page(memory, replica, memory.blocks[place])
            looking = False
        elif memory.pages[page * PAGE + USERS] == 0:
            unlink(memory, page)
        if looking:
            found += 1
        memory.pages[page * PAGE + USERS] += 1
    tokens: int = min(found * memory.counters[BLOCK_TOKENS], memory.slots[slot * SLOT + PROMPT] - 1)
    return tokens


@apart
def let_go(memory: Memory, replica: int, slot: int) -> None:
    """A request runs no longer. Of its blocks the first has been used last: without it the others are worth nothing."""
    first = memory.first_block[memory.slots[slot * SLOT + REQUEST]]
    for block in range(blocks_of(memory, slot) - 1, -1, -1):
        page = page_of(memory, replica, memory.blocks[first + block])
        memory.pages[page * PAGE + USERS] -= 1
        if memory.pages[page * PAGE + USERS] == 0:
            link(memory, page)


@apart
def shrink(memory: Memory, replica: int, free: int) -> None:
    """Forget the idle blocks used longest ago that do not fit into what is free of the cache, in tokens."""
    most = max(free, 0) // memory.counters[BLOCK_TOKENS]
    while memory.replicas[replica * REPLICA + IDLE] > most:
        page = memory.caches[replica * CACHE + OLDEST]
        unlink(memory, page)
        bucket = bucket_of(memory, replica, memory.pages[page * PAGE + KEY])
        other, before = memory.buckets[bucket], NONE
        while other != page:
            before, other = other, memory.pages[other * PAGE + BEHIND]
        if before == NONE:
            memory.buckets[bucket] = memory.pages[page * PAGE + BEHIND]
        else:
            memory.pages[before * PAGE + BEHIND] = memory.pages[page * PAGE + BEHIND]
        memory.pages[page * PAGE + USERS] = NONE
        memory.pages[page * PAGE + BEHIND] = memory.counters[FREE_PAGE]
        memory.counters[FREE_PAGE] = page


@inlined
def blocks_of(memory: Memory, slot: int) -> int:
    """Return how many blocks a request has; what lies behind the end of its prompt is none of it."""
    request = memory.slots[slot * SLOT + REQUEST]
    given = memory.first_block[request + 1] - memory.first_block[request]
    blocks: int = min(given, -(-memory.slots[slot * SLOT + PROMPT] // memory.counters[BLOCK_TOKENS]))
    return blocks


@inlined
def bucket_of(memory: Memory, replica: int, key: int) -> int:
    bucket: int = (key + replica * SPREAD) & (len(memory.buckets) - 1)
    return bucket


@inlined
def page_of(memory: Memory, replica: int, key: int) -> int:
    page: int = memory.buckets[bucket_of(memory, replica, key)]
    while page != NONE and (memory.pages[page * PAGE + KEY] != key or memory.pages[page * PAGE + OWNER] != replica):
        page = memory.pages[page * PAGE + BEHIND]
    return page


@inlined
def new_page(memory: Memory, replica: int, key: int) -> int:
    """Return a page for a block that is not there, used by nobody; there is always a free one, see `state.pages_of`."""
    page: int = memory.counters[FREE_PAGE]
    at, bucket = page * PAGE, bucket_of(memory, replica, key)
    memory.counters[FREE_PAGE] = memory.pages[at + BEHIND]
    memory.pages[at + KEY] = key
    memory.pages[at + OWNER] = replica
    memory.pages[at + USERS] = 0
    memory.pages[at + BEHIND] = memory.buckets[bucket]
    memory.buckets[bucket] = page
    return page


@inlined
def link(memory: Memory, page: int) -> None:
    """Put a page among the idle ones, as the one that was used last."""
    at = page * PAGE
    replica = memory.pages[at + OWNER]
    newest = memory.caches[replica * CACHE + NEWEST]
    memory.pages[at + OLDER], memory.pages[at + NEWER] = newest, NONE
    if newest == NONE:
        memory.caches[replica * CACHE + OLDEST] = page
    else:
        memory.pages[newest * PAGE + NEWER] = page
    memory.caches[replica * CACHE + NEWEST] = page
    memory.replicas[replica * REPLICA + IDLE] += 1


@inlined
def unlink(memory: Memory, page: int) -> None:
    """Take a page out of the idle ones."""
    at = page * PAGE
    replica, older, newer = memory.pages[at + OWNER], memory.pages[at + OLDER], memory.pages[at + NEWER]
    if older == NONE:
        memory.caches[replica * CACHE + OLDEST] = newer
    else:
        memory.pages[older * PAGE + NEWER] = newer
    if newer == NONE:
        memory.caches[replica * CACHE + NEWEST] = older
    else:
        memory.pages[newer * PAGE + OLDER] = older
    memory.replicas[replica * REPLICA + IDLE] -= 1
