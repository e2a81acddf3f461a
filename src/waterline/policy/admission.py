"""Whether a request is taken in or refused, whose turn it is when a slot is free, and what that costs whom.

**Tenants share GPU time, not requests.** `Accounts` holds what each tenant has used lately: GPU-seconds, of which half
is forgotten every `HALF_LIFE_S`. Its *share* is that over what all GPUs had to give in the same memory, from when they
began to serve. Who is below its guarantee goes first, then who is below what it deserves, then who borrows; of equal
standing, who has least of what it deserves. At its limit a tenant waits, even when GPUs idle.

**Clients share their tenant's turn by work.** Each has a *virtual counter* of the GPU-seconds it was served (Sheng et
al., "Fairness in Serving Large Language Models", OSDI 2024: there in weighted tokens); the lowest goes next. Who comes
back after a pause is lifted to the counter of whoever was served last (Goyal et al., "Start-time Fair Queueing",
SIGCOMM 1996), so that idling earns no credit, and asking for one thing at a time costs none. A thousand requests of one
client therefore delay another client's first request by about one request.

**A request is charged what it is expected to cost when it starts, and what it did cost when it ends** (`take`,
`settle`). It is taken in when the work ahead of it leaves time to start before its deadline; who is refused is told
when that work will have shrunk enough, and whoever has been told so before will have come back (`tell`). Work ahead is
the work of those whose turn comes first, so a greedy client is refused while a quiet one is taken in. How soon it is
done is seen from how soon work like it was begun lately.

The caller keeps one `Accounts` for the fleet and one `FairQueue` for all models, and the requests of each client to
each model, its *line*, in the order they came. It tells `enter` when one begins to wait, `take` when one starts,
`leave` when one gives up, and `settle` when one ends; `age` once a second or so.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterline.policy.decisions import (
    BELOW_DESERVED,
    BELOW_GUARANTEE,
    BORROWS,
    NOT_SERVED,
    OVER_LIMIT,
    QUEUE_FULL,
    SLOT_FREE,
    TOO_LATE,
    WAITS_FOR_SLOT,
)
from waterline.policy.jit import swift

ADMIT = 0.0
NOBODY = -1
HALF_LIFE_S = 60.0
PACE_S = 15.0  # half of the pace at which work began is forgotten
CAUTION = 0.7  # of its time a request should be expected to wait for its turn: turns scatter, and most must be in time
RETURNS = 0.5  # of its pace, that a tenant leaves to requests that were refused before
MOST_TOLD_S = 3600.0
PATIENCE = 3.0  # times its deadline a request waits for its turn that was taken in and then overtaken …
LEAST_DEADLINE_S = 10.0  # … which counts as so long at least
UNKNOWN_S = 2.0  # of waiting, after which what was seen counts for more than what is expected
MEMORY_S = HALF_LIFE_S * 1.4426950408889634  # what a GPU that never idles has on its account in the end: half-life/ln 2
LEAST_MEMORY_S = 15.0  # at first, because requests are charged for some time ahead


class Accounts(NamedTuple):
    """What tenants may use and have used of the fleet's GPU time."""

    guarantee: NDArray[np.float64]  # [tenant] fraction of the GPU time
    deserved: NDArray[np.float64]  # [tenant]
    limit: NDArray[np.float64]  # [tenant] 1 or more: none
    used_gpu_s: NDArray[np.float64]  # [tenant] half of it is forgotten every HALF_LIFE_S
    gpus: NDArray[np.float64]  # [1] that serve, of all models
    aged_s: NDArray[np.float64]  # [1] when `age` was called last
    memory_s: NDArray[np.float64]  # [1] what a GPU that never idled would have on its account: MEMORY_S in the end


class FairQueue(NamedTuple):
    """Who waits for the replicas of which model.

    The line of a client at a model is number client x models + model. Tenants have their turn at each model: the group
    of a tenant there is number model x tenants + tenant.
    """

    tenant: NDArray[np.int64]  # [line] whose client it is
    group: NDArray[np.int64]  # [line]
    counter_gpu_s: NDArray[np.float64]  # [line] served, or lifted to
    waiting: NDArray[np.int64]  # [line] requests
    waiting_gpu_s: NDArray[np.float64]  # [line] their expected work
    place: NDArray[np.int64]  # [line] in the heap of its group; NOBODY when nobody waits in it
    heap: NDArray[np.int64]  # [all heaps] lines in which somebody waits, the lowest counter first; one for each group …
    first: NDArray[np.int64]  # [group] … that begins here
    lines: NDArray[np.int64]  # [group] in which somebody waits
    group_waiting: NDArray[np.int64]  # [group] requests
    group_gpu_s: NDArray[np.float64]  # [group] their expected work
    floor_gpu_s: NDArray[np.float64]  # [group] highest counter with which a line was served
    model_waiting: NDArray[np.int64]  # [model] requests
    started_gpu_s: NDArray[np.float64]  # [group] work begun while somebody waited; half is forgotten every PACE_S …
    queued_s: NDArray[np.float64]  # [model] … and for how long somebody did, likewise
    was_waiting: NDArray[np.int64]  # [model] 1 if somebody waited when `keep_pace` was called last
    told_gpu_s: NDArray[np.float64]  # [group] work of those who were told to come back, and are not due yet


def new_accounts(
    guarantee: Sequence[float] | NDArray[np.float64],
    deserved: Sequence[float] | NDArray[np.float64],
    limit: Sequence[float] | NDArray[np.float64],
    gpus: float,
) -> Accounts:
    """Return accounts on which nothing has been used; arguments are those of the fields."""
    return Accounts(
        np.array(guarantee, np.float64),
        np.array(deserved, np.float64),
        np.array(limit, np.float64),
        np.zeros(len(guarantee)),
        np.array([float(gpus)]),
        np.zeros(1),
        np.array([LEAST_MEMORY_S]),
    )


def new_queue(tenants: int, tenant_of_client: Sequence[int] | NDArray[np.int64], models: int = 1) -> FairQueue:
    """Return an empty queue."""
    of_client = np.array(tenant_of_client, np.int64)
    tenant = np.repeat(of_client, models)
    groups, lines = models * tenants, len(tenant)
    clients = np.bincount(of_client, minlength=tenants)
    return FairQueue(
        tenant=tenant,
        group=np.tile(np.arange(models, dtype=np.int64), len(of_client)) * tenants + tenant,
        counter_gpu_s=np.zeros(lines),
        waiting=np.zeros(lines, np.int64),
        waiting_gpu_s=np.zeros(lines),
        place=np.full(lines, NOBODY, np.int64),
        heap=np.full(lines, NOBODY, np.int64),
        first=np.concatenate([[0], np.cumsum(np.tile(clients, models))[:-1]]).astype(np.int64),
        lines=np.zeros(groups, np.int64),
        group_waiting=np.zeros(groups, np.int64),
        group_gpu_s=np.zeros(groups),
        floor_gpu_s=np.zeros(groups),
        model_waiting=np.zeros(models, np.int64),
        started_gpu_s=np.zeros(groups),
        queued_s=np.zeros(models),
        was_waiting=np.zeros(models, np.int64),
        told_gpu_s=np.zeros(groups),
    )


def with_clients(queue: FairQueue, tenant_of_client: Sequence[int] | NDArray[np.int64]) -> FairQueue:
    """Return the queue with more clients; the tenants of those it had stay as they are, and so do their lines."""
    models = len(queue.model_waiting)
    more = new_queue(len(queue.lines) // models, tenant_of_client, models)
    known = len(queue.tenant)
    for name in ("counter_gpu_s", "waiting", "waiting_gpu_s", "place"):
        getattr(more, name)[:known] = getattr(queue, name)
    for name in (
        "lines",
        "group_waiting",
        "group_gpu_s",
        "floor_gpu_s",
        "model_waiting",
        "started_gpu_s",
        "queued_s",
        "was_waiting",
        "told_gpu_s",
    ):
        getattr(more, name)[:] = getattr(queue, name)
    for group, count in enumerate(queue.lines):
        before, now = int(queue.first[group]), int(more.first[group])
        more.heap[now : now + count] = queue.heap[before : before + count]
    return more


# --- Whether ----------------------------------------------------------------------------------------------------------


@swift
def admit(
    accounts: Accounts,
    queue: FairQueue,
    line: int,
    model: int,
    request_gpu_s: float,
    free_slots: int,
    places: int,
    gpus: float,
    unread_s: float,
    deadline_s: float,
) -> tuple[int, float]:
    """Return the rule, and for a request that is taken in how long it should wait, else when to come back, in s.

    SLOT_FREE: start it at once. WAITS_FOR_SLOT: `enter` it. All others refuse it.

    Args:
        accounts: of the tenants.
        queue: of all models.
        line: of the client who asks.
        model: that is asked.
        request_gpu_s: what the request should cost, see `dispatch.expected_gpu_s`.
        free_slots: of the replicas of the model, over all.
        places: of the queue; a client holds at most as many as are free, so that there is always one for the next.
        gpus: that serve the model, in replicas in service.
        unread_s: how long the replicas need to read the prompts they have taken already.
        deadline_s: how long the request may wait, see `start_within_s`.
    """
    if gpus <= 0.0:
        return NOT_SERVED, deadline_s
    tenant, group, waiting = queue.tenant[line], queue.group[line], queue.model_waiting[model]
    blocked_s = until_below_limit_s(accounts, tenant)
    if blocked_s > deadline_s:
        return OVER_LIMIT, blocked_s - deadline_s
    at_once = waiting == 0 and free_slots > 0 and blocked_s == ADMIT
    turn_s = 0.0 if at_once else until_turn_s(accounts, queue, line, model, request_gpu_s, gpus)
    if max(blocked_s, unread_s + turn_s / CAUTION) > deadline_s:
        beyond_s = max(turn_s - CAUTION * max(deadline_s - unread_s, 0.0), 0.0)
        return TOO_LATE, max(blocked_s - deadline_s, max(unread_s - deadline_s, 0.0) + beyond_s)
    wait_s = max(blocked_s, unread_s + turn_s)
    if at_once:
        return SLOT_FREE, wait_s
    if queue.waiting[line] >= places - waiting:
        turn_gpu_s = queue.waiting_gpu_s[line] / max(queue.waiting[line], 1) * max(queue.lines[group], 1)
        return QUEUE_FULL, max(turn_gpu_s, request_gpu_s) / gpus
    return WAITS_FOR_SLOT, wait_s


@swift
def waits_s(ttft_s: float) -> float:
    """Return how long a request that was taken in waits for its turn, before it is told that it does not come.

    Others of its tenant or its client may have come above their share since, so that more goes before it than did.
    """
    return PATIENCE * max(ttft_s, LEAST_DEADLINE_S)


@swift
def tell(queue: FairQueue, line: int, model: int, request_gpu_s: float, gpus: float, seconds: float) -> float:
    """Return when somebody who is refused should come back, and count on it.

    After `seconds`, when the work ahead would leave time for it, and after those of its tenant who have been told to
    come back before: half of the pace is for them, the other half for those who come for the first time.
    """
    group = queue.group[line]
    due_s = queue.told_gpu_s[group] / max(_returns_per_s(queue, group, model, gpus), LEAST_SHARE)
    queue.told_gpu_s[group] += request_gpu_s
    return float(min(seconds + due_s, MOST_TOLD_S))


@swift
def _returns_per_s(queue: FairQueue, group: int, model: int, gpus: float) -> float:
    """Return the work a second that those of a group may bring who come back; all `gpus`, until a pace is known."""
    return float(RETURNS * (queue.started_gpu_s[group] + gpus * UNKNOWN_S) / (queue.queued_s[model] + UNKNOWN_S))


@swift
def start_within_s(ttft_s: float, prompt_tokens: float, prefill_tokens_per_s: float) -> float:
    """Return how long a request may wait for its prompt to be begun, if its first token is to come in time.

    A prompt that takes more than half of that time to be read is late by its own length; it may still wait the half.
    """
    if prefill_tokens_per_s <= 0.0:
        return ttft_s
    return max(ttft_s - prompt_tokens / prefill_tokens_per_s, ttft_s / 2)


@swift
def until_turn_s(
    accounts: Accounts, queue: FairQueue, line: int, model: int, request_gpu_s: float, gpus: float
) -> float:
    """Return how long the work ahead of a newcomer will take to be begun.

    It is begun at the pace at which it was lately, while somebody waited: that knows how much requests take indeed, and
    what is left to a tenant by those that go first. What tenants begin that come after the newcomer's counts as its
    own, because it would take their turns. Until there is such a pace, all `gpus` work on what waits.
    """
    if queue.model_waiting[model] == 0:
        return 0.0
    first_gpu_s, with_it_gpu_s = work_ahead_gpu_s(accounts, queue, line, request_gpu_s)
    tenants = len(accounts.used_gpu_s)
    standing, _ = standing_of(accounts, queue.tenant[line])
    begun_gpu_s = goes_first_gpu_s = 0.0
    for other in range(tenants):
        started_gpu_s = queue.started_gpu_s[model * tenants + other]
        begun_gpu_s += started_gpu_s
        if started_gpu_s > 0.0:
            others_standing, _ = standing_of(accounts, other)
            if others_standing < standing:
                goes_first_gpu_s += started_gpu_s
    known_s = queue.queued_s[model] + UNKNOWN_S
    pace = (begun_gpu_s + gpus * UNKNOWN_S) / known_s
    own_pace = (begun_gpu_s - goes_first_gpu_s + gpus * UNKNOWN_S) / known_s
    return float(first_gpu_s / pace + with_it_gpu_s / own_pace)


@swift
def work_ahead_gpu_s(accounts: Accounts, queue: FairQueue, line: int, request_gpu_s: float) -> tuple[float, float]:
    """Return the work that would be started before a newcomer, in GPU-seconds: of tenants that go first, and the rest.

    Of tenants that go first: everything. Of its own tenant: what it has waiting itself, and of every other client about
    as much again, at most all of it. Of tenants of equal standing: as much as their deserved shares are worth against
    its own. Of tenants that borrow while it does not: nothing.
    """
    tenant, group = queue.tenant[line], queue.group[line]
    own_gpu_s = queue.waiting_gpu_s[line]
    others = queue.lines[group] - (1 if queue.waiting[line] > 0 else 0)
    inside_gpu_s = own_gpu_s + min(queue.group_gpu_s[group] - own_gpu_s, others * (own_gpu_s + request_gpu_s))
    first_gpu_s, with_it_gpu_s = 0.0, inside_gpu_s
    standing, _ = standing_of(accounts, tenant)
    for other in range(len(accounts.used_gpu_s)):
        others_group = group - tenant + other
        if other == tenant or queue.group_waiting[others_group] == 0:
            continue
        others_standing, _ = standing_of(accounts, other)
        if others_standing < standing:
            first_gpu_s += queue.group_gpu_s[others_group]
        elif others_standing == standing:
            worth = accounts.deserved[other] / max(accounts.deserved[tenant], LEAST_SHARE)
            with_it_gpu_s += min(queue.group_gpu_s[others_group], worth * (inside_gpu_s + request_gpu_s))
    return float(first_gpu_s), float(with_it_gpu_s)


# --- Whose turn -------------------------------------------------------------------------------------------------------


@swift
def next_line(accounts: Accounts, queue: FairQueue, model: int) -> tuple[int, int]:
    """Return the line of a model whose oldest request starts next, and the rule by which its tenant goes first.

    NOBODY when nobody waits, or only tenants at their limit do. Ties go to the lowest index.
    """
    tenants = len(accounts.used_gpu_s)
    best, best_standing, best_share = NOBODY, OVER_LIMIT_STANDING, 0.0
    for tenant in range(tenants):
        if queue.lines[model * tenants + tenant] == 0:
            continue
        standing, share = standing_of(accounts, tenant)
        if standing < best_standing or (standing == best_standing and best != NOBODY and share < best_share):
            best, best_standing, best_share = tenant, standing, share
    if best == NOBODY:
        return NOBODY, OVER_LIMIT
    rule = BELOW_GUARANTEE if best_standing == 0 else BELOW_DESERVED if best_standing == 1 else BORROWS
    return int(queue.heap[queue.first[model * tenants + best]]), rule


@swift
def enter(queue: FairQueue, line: int, model: int, request_gpu_s: float) -> None:
    """A request begins to wait. Its client is lifted when none of its requests waited before."""
    group = queue.group[line]
    if queue.waiting[line] == 0:
        queue.counter_gpu_s[line] = max(queue.counter_gpu_s[line], queue.floor_gpu_s[group])
        queue.place[line] = queue.lines[group]
        queue.heap[queue.first[group] + queue.lines[group]] = line
        queue.lines[group] += 1
        _sift(queue, line)
    queue.waiting[line] += 1
    queue.waiting_gpu_s[line] += request_gpu_s
    queue.group_waiting[group] += 1
    queue.group_gpu_s[group] += request_gpu_s
    queue.model_waiting[model] += 1


@swift
def take(accounts: Accounts, queue: FairQueue, line: int, model: int, request_gpu_s: float) -> None:
    """A waiting request starts, and is charged what it should cost; `request_gpu_s` as at `enter`."""
    group = queue.group[line]
    queue.floor_gpu_s[group] = max(queue.floor_gpu_s[group], queue.counter_gpu_s[line])
    if queue.was_waiting[model]:
        queue.started_gpu_s[group] += request_gpu_s
    leave(queue, line, model, request_gpu_s)
    settle(accounts, queue, line, request_gpu_s)


@swift
def start_at_once(accounts: Accounts, queue: FairQueue, line: int, request_gpu_s: float) -> None:
    """A request starts without having waited (SLOT_FREE), and is charged what it should cost."""
    group = queue.group[line]
    queue.counter_gpu_s[line] = max(queue.counter_gpu_s[line], queue.floor_gpu_s[group])
    queue.floor_gpu_s[group] = queue.counter_gpu_s[line]
    settle(accounts, queue, line, request_gpu_s)


@swift
def leave(queue: FairQueue, line: int, model: int, request_gpu_s: float) -> None:
    """A request waits no longer: it starts (see `take`), or has given up."""
    group = queue.group[line]
    queue.waiting[line] -= 1
    queue.waiting_gpu_s[line] -= request_gpu_s
    queue.group_waiting[group] -= 1
    queue.group_gpu_s[group] -= request_gpu_s
    queue.model_waiting[model] -= 1
    if queue.group_waiting[group] == 0:
        queue.group_gpu_s[group] = 0.0  # no dust of rounding
    if queue.waiting[line] > 0:
        return
    queue.waiting_gpu_s[line] = 0.0
    queue.lines[group] -= 1
    first = queue.first[group]
    last = queue.heap[first + queue.lines[group]]
    queue.heap[first + queue.place[line]] = last
    queue.place[last] = queue.place[line]
    queue.place[line] = NOBODY
    if last != line:
        _sift(queue, last)


@swift
def settle(accounts: Accounts, queue: FairQueue, line: int, difference_gpu_s: float) -> None:
    """Charge what a request has cost beyond what it was charged before; a negative difference is paid back."""
    tenant = queue.tenant[line]
    accounts.used_gpu_s[tenant] = max(accounts.used_gpu_s[tenant] + difference_gpu_s, 0.0)
    queue.counter_gpu_s[line] += difference_gpu_s
    if queue.place[line] != NOBODY:
        _sift(queue, line)


# --- Accounts ---------------------------------------------------------------------------------------------------------

LEAST_SHARE = 1e-9  # a tenant that deserves nothing comes after all that do
OVER_LIMIT_STANDING = 3
LN_2 = 0.6931471805599453


@swift
def age(accounts: Accounts, now_s: float, serves: bool) -> None:  # noqa: FBT001 - compiled code has no keyword-only arguments
    """Let the accounts forget what lies back; `serves`: whether anybody has been there to serve."""
    passed_s = now_s - accounts.aged_s[0]
    if passed_s <= 0.0:
        return
    kept = half_to_the(passed_s / HALF_LIFE_S)
    for tenant in range(len(accounts.used_gpu_s)):
        accounts.used_gpu_s[tenant] *= kept
    accounts.memory_s[0] = _memory_s(accounts, kept if serves else 1.0)
    accounts.aged_s[0] = now_s


@swift
def keep_pace(queue: FairQueue, passed_s: float, gpus: NDArray[np.float64]) -> None:
    """Note for how long somebody waited, and let the pace at which work began forget what lies back.

    What began counts when somebody waited at the last call already, and so does the time until this one. Whoever was
    told to come back in this time is not waited for any longer; `gpus` that serve each model, see `admit`.
    """
    kept = half_to_the(passed_s / PACE_S)
    tenants = len(queue.started_gpu_s) // len(queue.queued_s)
    for group in range(len(queue.told_gpu_s)):
        if queue.told_gpu_s[group] > 0.0:
            model = group // tenants
            due_gpu_s = passed_s * _returns_per_s(queue, group, model, gpus[model])
            queue.told_gpu_s[group] = max(queue.told_gpu_s[group] - due_gpu_s, 0.0)
    for model in range(len(queue.queued_s)):
        queue.queued_s[model] *= kept
        if queue.was_waiting[model] and gpus[model] > 0.0:  # while nobody serves, there is no pace
            queue.queued_s[model] += passed_s
        queue.was_waiting[model] = 1 if queue.model_waiting[model] > 0 else 0
    for group in range(len(queue.started_gpu_s)):
        queue.started_gpu_s[group] *= kept


@swift
def share_of(accounts: Accounts, tenant: int) -> float:
    """Return the fraction of the fleet's GPU time a tenant has used lately."""
    return _share_when(accounts, tenant, 1.0)


@swift
def _share_when(accounts: Accounts, tenant: int, kept: float) -> float:
    """Return the share of a tenant that idles until no more than a part of what it has used is remembered."""
    had_gpu_s = max(accounts.gpus[0], LEAST_SHARE) * _memory_s(accounts, kept)
    return float(accounts.used_gpu_s[tenant] * kept / had_gpu_s)


@swift
def _memory_s(accounts: Accounts, kept: float) -> float:
    return float(MEMORY_S + (accounts.memory_s[0] - MEMORY_S) * kept)


@swift
def until_below_limit_s(accounts: Accounts, tenant: int) -> float:
    """Return in how many seconds of idling a tenant would be below its limit again; 0 when it is."""
    limit = accounts.limit[tenant]
    if limit >= 1.0 or share_of(accounts, tenant) < limit:
        return ADMIT
    shortest, longest = 0.0, 64.0  # half-lives; then nothing is left of anything
    for _ in range(30):
        middle = (shortest + longest) / 2
        if _share_when(accounts, tenant, half_to_the(middle)) < limit:
            longest = middle
        else:
            shortest = middle
    return longest * HALF_LIFE_S


@swift
def half_to_the(exponent: float) -> float:
    """Return 0.5**exponent for exponents from 0 on, to nine digits; the same bits everywhere, see `jit`."""
    whole = int(min(exponent, 1100.0))
    left = (min(exponent, 1100.0) - whole) * LN_2
    series = 1.0
    for term in range(12, 0, -1):
        series = 1.0 - series * left / term
    for _ in range(whole):
        series *= 0.5
    return series


@swift
def standing_of(accounts: Accounts, tenant: int) -> tuple[int, float]:
    """Return 0 below the guarantee, 1 below deserved, 2 below the limit, 3 at it; and how much of its due it has."""
    share = share_of(accounts, tenant)
    if share < accounts.guarantee[tenant]:
        return 0, share / accounts.guarantee[tenant]
    due = share / max(accounts.deserved[tenant], LEAST_SHARE)
    if share < accounts.deserved[tenant]:
        return 1, due
    if accounts.limit[tenant] >= 1.0 or share < accounts.limit[tenant]:
        return 2, due
    return OVER_LIMIT_STANDING, due


@swift
def goes_first(queue: FairQueue, one: int, other: int) -> bool:
    """Whether a line goes before another: by counter, then by index."""
    mine, theirs = queue.counter_gpu_s[one], queue.counter_gpu_s[other]
    return bool(mine < theirs or (mine == theirs and one < other))


@swift
def _sift(queue: FairQueue, line: int) -> None:
    """Move a line up or down the binary heap of its group to where its counter belongs."""
    first, place = queue.first[queue.group[line]], queue.place[line]
    size = queue.lines[queue.group[line]]
    while place > 0 and goes_first(queue, line, queue.heap[first + (place - 1) // 2]):
        other = queue.heap[first + (place - 1) // 2]
        queue.heap[first + place] = other
        queue.place[other] = place
        place = (place - 1) // 2
    while True:
        child = 2 * place + 1
        if child + 1 < size and goes_first(queue, queue.heap[first + child + 1], queue.heap[first + child]):
            child += 1
        if child >= size or not goes_first(queue, queue.heap[first + child], line):
            break
        other = queue.heap[first + child]
        queue.heap[first + place] = other
        queue.place[other] = place
        place = child
    queue.heap[first + place] = line
    queue.place[line] = place
