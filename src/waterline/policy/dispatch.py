"""The desk of a fleet: whether a request is taken in, when it starts, and on which replica; for all models.

`admission` says whether and whose turn it is, `routing` says where; here they share what they know of the fleet.
Requests wait at the desk and nowhere else: one goes to a replica only when the replica has a slot for it. Tenants
have one account each for the whole fleet; who waits, waits for a model.

The caller keeps the requests themselves, those of each client to each model in the order they came, and tells the desk

- `arrive`: one has come. It starts at once, waits, or is refused; the answer says which, and why; `arrive_ahead` of
  replicas that are expected, where none is in service;
- `next_turn`, then `start`, while they name somebody: whenever a slot or a replica has come free, somebody has begun
  to wait while there were slots, and after each `tick`;
- `first_token`, `left` and `settle`: what becomes of it on its replica; `ended` is the last two together;
- `overtaken`, after each `tick` and what starts then, of each that has waited for `admission.waits_s` in vain, in the
  order in which they came: it is told;
- `gave_up`: it waits no longer; `come_back`: its replica failed, and it waits again, before its client's others;
- `put` and `set_in_service`: replicas come and go; `tick`, once a second.

**Where reading and writing are apart**, requests wait for the replicas that read. Those that write are a pool of their
own, which takes over what has been read (`take_over`) whether a slot is free or not: what has begun is not held up.

Everything is in arrays of numbers and in rows that the caller gives out. `plain` shows them to Python, where single
numbers come quicker that way.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterline.policy import admission, routing
from waterline.policy.admission import Accounts, FairQueue
from waterline.policy.decisions import NO_REPLICA, NOT_SERVED, SLOT_FREE, TOO_LATE, TOO_LONG, WAITS_FOR_SLOT
from waterline.policy.jit import compiled, swift
from waterline.policy.routing import NOBODY, Prefixes, Ready, Replicas

BOTH, READS, WRITES = 0, 1, 2  # what a replica does
PLACES = 1 << 16  # of the queue to each model
SLOTS_TO_WRITE = 1 << 40  # of a replica that takes over: it is never full
PREFIX_PLACES = 1 << 18


class Models(NamedTuple):
    """The replicas in service of each model, taken together; and what each can do, by row."""

    gpus: NDArray[np.float64]  # [model]
    prefill_tokens_per_s: NDArray[np.float64]  # [model] of those that read, together …
    reader_tokens_per_s: NDArray[np.float64]  # [model] … and the mean of one
    gpu_s_per_prompt_token: NDArray[np.float64]  # [model] when they are full
    gpu_s_per_output_token: NDArray[np.float64]  # [model]
    unread_tokens: NDArray[np.int64]  # [model]
    free_slots: NDArray[np.int64]  # [model] of those that read
    longest_tokens: NDArray[np.int64]  # [model] the longest request one of them may take
    ever_tokens: NDArray[np.int64]  # [model] the longest that any in a row may take, in service or not; or 0
    role: NDArray[np.int64]  # [replica] BOTH, READS or WRITES
    holds_tokens: NDArray[np.int64]  # [replica] the longest request it can hold
    gpus_of: NDArray[np.float64]  # [replica]
    block_tokens: NDArray[np.int64]  # [1] of the blocks of prompts
    counts_gpus: NDArray[np.int64]  # [1] 1 where shares are fractions of the GPUs in service, not of a given number


class Desk(NamedTuple):
    """All that the desk knows."""

    accounts: Accounts
    queue: FairQueue
    models: Models
    replicas: Replicas  # pool: the model, and for those that only write, the number of models more
    ready: Ready
    prefixes: Prefixes


class Arrival(NamedTuple):
    """What the desk says to a request.

    `rule`: SLOT_FREE, it has started; WAITS_FOR_SLOT, it waits; any other, it is refused.
    """

    rule: int
    replica: int  # on which it has started, or NOBODY
    cached_tokens: int  # of its prompt, known to be cached there
    seconds: float  # how long it should wait, or after how many it would be taken in
    gpu_s: float  # what it should cost: to be said again at `start`, and settled in the end


def new_desk(
    guarantee: Sequence[float],
    deserved: Sequence[float],
    limit: Sequence[float],
    tenant_of_client: Sequence[int] | NDArray[np.int64],
    *,
    models: int,
    rows: int,
    gpus: float = 0.0,
    block_tokens: int = 512,
    prefix_places: int = PREFIX_PLACES,
) -> Desk:
    """Return the desk of a fleet without replicas.

    Args:
        guarantee: [tenant] fraction of the GPU time.
        deserved: [tenant] likewise.
        limit: [tenant] likewise; 1 or more: none.
        tenant_of_client: [client] see also `with_clients`.
        models: how many there are.
        rows: for replicas, see `put` and `with_rows`.
        gpus: of which the shares are fractions, those of the fleet; 0: of those in service.
        block_tokens: of the blocks whose keys the prompts come with.
        prefix_places: how many blocks are remembered.
    """
    return Desk(
        accounts=admission.new_accounts(guarantee, deserved, limit, gpus),
        queue=admission.new_queue(len(guarantee), tenant_of_client, models),
        models=Models(
            gpus=np.zeros(models),
            prefill_tokens_per_s=np.zeros(models),
            reader_tokens_per_s=np.zeros(models),
            gpu_s_per_prompt_token=np.zeros(models),
            gpu_s_per_output_token=np.zeros(models),
            unread_tokens=np.zeros(models, np.int64),
            free_slots=np.zeros(models, np.int64),
            longest_tokens=np.zeros(models, np.int64),
            ever_tokens=np.zeros(models, np.int64),
            role=np.zeros(rows, np.int64),
            holds_tokens=np.zeros(rows, np.int64),
            gpus_of=np.zeros(rows),
            block_tokens=np.array([block_tokens], np.int64),
            counts_gpus=np.array([gpus == 0.0], np.int64),
        ),
        replicas=routing.new_replicas(rows),
        ready=routing.new_ready(2 * models, rows),
        prefixes=routing.new_prefixes(prefix_places),
    )


def with_clients(desk: Desk, tenant_of_client: Sequence[int] | NDArray[np.int64]) -> Desk:
    """Return the desk with more clients; those it had keep their numbers and tenants."""
    return desk._replace(queue=admission.with_clients(desk.queue, tenant_of_client))


def with_rows(desk: Desk, rows: int) -> Desk:
    """Return the desk with more rows for replicas; those it had keep their numbers."""
    more, known = rows - len(desk.models.role), len(desk.models.role)

    def longer(array: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([array, np.zeros(more, array.dtype)]) if len(array) == known else array

    pools = len(desk.ready.size)
    wide = Desk(
        accounts=desk.accounts,
        queue=desk.queue,
        models=desk.models._replace(
            **{name: longer(getattr(desk.models, name)) for name in ("role", "holds_tokens", "gpus_of")}
        ),
        replicas=routing.with_rows(desk.replicas, rows),
        ready=routing.new_ready(pools, rows),
        prefixes=desk.prefixes,
    )
    for name in ("replicas", "threshold", "alias", "free"):
        table, before = getattr(wide.ready, name)[: pools * rows], getattr(desk.ready, name)[: pools * known]
        table.reshape(pools, rows)[:, :known] = before.reshape(pools, known)
    for name in ("size", "frees"):
        getattr(wide.ready, name)[:] = getattr(desk.ready, name)
    wide.ready.place[:known] = desk.ready.place
    return wide


def plain(desk: Desk) -> Desk:
    """Return the same desk, the same memory, as Python reads it fastest: for callers without a compiler."""

    def view(arrays: Any) -> Any:
        return type(arrays)(*(memoryview(array) for array in arrays))

    return Desk(*(view(part) for part in desk))


# --- Replicas that come and go ----------------------------------------------------------------------------------------


def put(
    desk: Desk,
    replica: int,
    model: int,
    *,
    role: int = BOTH,
    gpus: float,
    slots: int,
    longest_tokens: int,
    tokens_per_s: float,
    prefill_tokens_per_s: float,
) -> None:
    """Give a row to a replica, out of service yet. Whoever had it must have gone, and is forgotten.

    Args:
        desk: is written.
        replica: the row.
        model: that it serves.
        role: READS and WRITES where they are apart, which is said of a whole model.
        gpus: it has.
        slots: requests it takes at once.
        longest_tokens: the longest request it can hold, prompt and output.
        tokens_per_s: the rate it sustains when it is full, above 0: prompt and output, or of a split what its role is.
        prefill_tokens_per_s: the rate at which it reads prompts, above 0.
    """
    models, replicas = desk.models, desk.replicas
    replicas.pool[replica] = model + (len(models.gpus) if role == WRITES else 0)
    replicas.born[replica] += 1
    replicas.serves[replica] = 0
    replicas.free_slots[replica] = SLOTS_TO_WRITE if role == WRITES else slots
    replicas.tokens_per_s[replica] = tokens_per_s
    replicas.prefill_tokens_per_s[replica] = prefill_tokens_per_s
    replicas.backlog_tokens[replica] = replicas.unread_tokens[replica] = 0
    models.role[replica] = role
    models.holds_tokens[replica] = longest_tokens
    models.gpus_of[replica] = gpus


def set_in_service(desk: Desk, rows: Iterable[int], *, serves: bool) -> None:
    """Let replicas get requests, or no more: because they drain, or have failed. What they have stays theirs."""
    pools = set()
    for row in rows:
        desk.replicas.serves[row] = int(serves)
        pools.add(int(desk.replicas.pool[row]))
    python = isinstance(desk.ready.size, memoryview)  # see `plain`
    for pool in pools:
        (routing.make_ready if python else compiled(routing.make_ready))(desk.replicas, desk.ready, pool)
    for model in {pool % len(desk.models.gpus) for pool in pools}:
        (recount if python else compiled(recount))(desk.models, desk.replicas, desk.accounts, model)


@swift
def recount(models: Models, replicas: Replicas, accounts: Accounts, model: int) -> None:
    """Add up what is in service of a model, and see what its readers may take: no more than one that writes can hold.

    Called when that has changed: after `put`, and by `set_in_service`.
    """
    count = len(models.gpus)
    ever_written = written = 0
    for row in range(len(models.role)):
        if replicas.pool[row] == model + count:
            replicas.longest_tokens[row] = models.holds_tokens[row]
            ever_written = max(ever_written, models.holds_tokens[row])
            if replicas.serves[row]:
                written = max(written, models.holds_tokens[row])
    gpus = read_gpus = write_gpus = prefill = tokens = write_tokens = 0.0
    readers = unread = free = longest = ever = 0
    for row in range(len(models.role)):
        writes, reads = replicas.pool[row] == model + count, replicas.pool[row] == model
        if reads and replicas.born[row] > 0:
            holds = models.holds_tokens[row]
            ever = max(ever, min(holds, ever_written) if models.role[row] == READS else holds)
            replicas.longest_tokens[row] = min(holds, written) if models.role[row] == READS else holds
        if not replicas.serves[row] or not (writes or reads):
            continue
        gpus += models.gpus_of[row]
        if models.role[row] != READS:
            write_gpus += models.gpus_of[row]
            write_tokens += replicas.tokens_per_s[row]
        if reads:
            readers += 1
            read_gpus += models.gpus_of[row]
            tokens += replicas.tokens_per_s[row]
            prefill += replicas.prefill_tokens_per_s[row]
            unread += replicas.unread_tokens[row]
            free += replicas.free_slots[row]
            longest = max(longest, replicas.longest_tokens[row])
    if models.counts_gpus[0]:
        accounts.gpus[0] += gpus - models.gpus[model]
    models.gpus[model] = gpus
    models.prefill_tokens_per_s[model] = prefill
    models.reader_tokens_per_s[model] = prefill / max(readers, 1)
    models.gpu_s_per_prompt_token[model] = read_gpus / tokens if tokens > 0.0 else 0.0
    models.gpu_s_per_output_token[model] = write_gpus / write_tokens if write_tokens > 0.0 else 0.0
    models.unread_tokens[model] = unread
    models.free_slots[model] = free
    models.longest_tokens[model] = longest
    models.ever_tokens[model] = ever


# --- Requests ---------------------------------------------------------------------------------------------------------


@swift
def arrive(
    desk: Desk,
    model: int,
    client: int,
    prompt_tokens: int,
    cached_tokens: int,
    output_tokens: int,
    tokens: int,
    ttft_s: float,
    blocks: NDArray[np.int64],
    draw: int,
) -> Arrival:
    """Decide about a request that has come.

    Args:
        desk: is written.
        model: that is asked.
        client: who asks.
        prompt_tokens: of the request.
        cached_tokens: of its prompt, on whatever replica.
        output_tokens: expected.
        tokens: the most it may come to, prompt and output; a replica must be able to hold as many.
        ttft_s: how long it may wait for its first token.
        blocks: [block] keys of its prompt, see `routing`; may be empty.
        draw: see `routing.route`.
    """
    if tokens > desk.models.longest_tokens[model]:
        if tokens > desk.models.ever_tokens[model] > 0:
            return Arrival(TOO_LONG, NOBODY, 0, 0.0, 0.0)
        return Arrival(NOT_SERVED, NOBODY, 0, ttft_s, 0.0)
    line = line_of(desk, model, client)
    gpu_s = expected_gpu_s(desk, model, prompt_tokens - cached_tokens, output_tokens)
    rule, seconds = admission.admit(
        desk.accounts,
        desk.queue,
        line,
        model,
        gpu_s,
        desk.models.free_slots[model],
        PLACES,
        desk.models.gpus[model],
        desk.models.unread_tokens[model] / desk.models.prefill_tokens_per_s[model],
        admission.start_within_s(ttft_s, prompt_tokens - cached_tokens, desk.models.reader_tokens_per_s[model]),
    )
    if rule == SLOT_FREE:
        replica, kept_tokens, _ = _route(desk, model, prompt_tokens, tokens, blocks, draw)
        if replica != NOBODY:
            admission.start_at_once(desk.accounts, desk.queue, line, gpu_s)
            kept_tokens = max(kept_tokens, cached_tokens)
            _give(desk, model, replica, prompt_tokens, prompt_tokens - kept_tokens, output_tokens, blocks)
            return Arrival(SLOT_FREE, replica, kept_tokens, seconds, gpu_s)
        rule = WAITS_FOR_SLOT  # the free slots are of replicas that cannot hold it
    return _answer(desk, model, line, gpu_s, desk.models.gpus[model], rule, seconds)


@swift
def arrive_ahead(
    desk: Desk,
    model: int,
    client: int,
    unread_tokens: int,
    gpu_s: float,
    ready_in_s: float,
    gpus: float,
    reader_tokens_per_s: float,
    ttft_s: float,
) -> Arrival:
    """Decide about a request to a model of which no replica is in service, though some are expected to be.

    It waits for them where it can start before its deadline, those ahead of it included; else it is refused.

    Args:
        desk: is written.
        model: that is asked.
        client: who asks.
        unread_tokens: of its prompt.
        gpu_s: what it should cost.
        ready_in_s: when replicas will be in service, as far as is known; 0: at any moment, infinite: nobody knows.
        gpus: of those replicas …
        reader_tokens_per_s: … and the rate at which one of them reads prompts.
        ttft_s: how long it may wait for its first token.
    """
    deadline_s = admission.start_within_s(ttft_s, unread_tokens, reader_tokens_per_s)
    if ready_in_s > deadline_s:
        return Arrival(NOT_SERVED, NOBODY, 0, ready_in_s, gpu_s)
    line = line_of(desk, model, client)
    rule, seconds = admission.admit(
        desk.accounts, desk.queue, line, model, gpu_s, 0, PLACES, gpus, ready_in_s, deadline_s
    )
    return _answer(desk, model, line, gpu_s, gpus, rule, seconds)


@swift
def next_turn(desk: Desk, model: int) -> tuple[int, int]:
    """Return the client whose oldest request to a model may start now, and why; or NOBODY."""
    if desk.queue.model_waiting[model] == 0 or desk.models.free_slots[model] <= 0:
        return NOBODY, NO_REPLICA
    line, rule = admission.next_line(desk.accounts, desk.queue, model)
    return line // len(desk.models.gpus) if line != NOBODY else NOBODY, rule


@swift
def start(
    desk: Desk,
    model: int,
    client: int,
    prompt_tokens: int,
    cached_tokens: int,
    output_tokens: int,
    tokens: int,
    gpu_s: float,
    blocks: NDArray[np.int64],
    draw: int,
) -> tuple[int, int, int]:
    """Start the oldest request of the client whose turn it is; return its replica, what is cached there, and the rule.

    NOBODY when no replica that can hold it has a slot: it keeps its turn; with NOT_SERVED as the rule, none that serves
    ever can: it must leave, see `gave_up`, or nobody starts. Arguments as at `arrive`; after a failure, `prompt_tokens`
    is all that has to be read, with what was produced before. `gpu_s` as `arrive` answered.
    """
    replica, kept_tokens, rule = _route(desk, model, prompt_tokens, tokens, blocks, draw)
    if replica == NOBODY:
        return NOBODY, 0, NOT_SERVED if 0 < desk.models.longest_tokens[model] < tokens else rule
    admission.take(desk.accounts, desk.queue, line_of(desk, model, client), model, gpu_s)
    kept_tokens = max(kept_tokens, cached_tokens)
    _give(desk, model, replica, prompt_tokens, prompt_tokens - kept_tokens, output_tokens, blocks)
    return replica, kept_tokens, rule


def hedge(
    desk: Desk,
    model: int,
    prompt_tokens: int,
    output_tokens: int,
    tokens: int,
    blocks: NDArray[np.int64],
    draw: int,
) -> tuple[int, int]:
    """Give a request that runs a second replica, on nobody's account; return that and what is cached there, or NOBODY.

    Arguments as at `arrive`. Whoever asks has seen to it that nobody waits, and that its own replica does not serve.
    Most of those who are asked second are left before they have read the prompt: see `hedge_won`.
    """
    replica, kept_tokens, _ = _route(desk, model, prompt_tokens, tokens, blocks, draw)
    if replica != NOBODY:
        _give(desk, model, replica, prompt_tokens, prompt_tokens - kept_tokens, output_tokens, blocks[:0])
    return replica, kept_tokens


def hedge_won(desk: Desk, replica: int, blocks: NDArray[np.int64]) -> None:
    """Note that the second replica of a request has it alone now, and keeps its prompt."""
    if len(blocks) > 0:
        routing.remember(desk.prefixes, desk.replicas.born, blocks, replica)


@swift
def take_over(desk: Desk, model: int, output_tokens: int, tokens: int, draw: int) -> int:
    """Choose the replica that writes what another has read; NOBODY while none that can hold it is in service."""
    pool = model + len(desk.models.gpus)
    replica, _, _ = routing.route(
        desk.replicas, desk.ready, desk.prefixes, pool, 0, tokens, desk.ready.size[:0], 1, draw
    )
    if replica != NOBODY:
        desk.replicas.backlog_tokens[replica] += output_tokens
    return replica


@swift
def first_token(desk: Desk, model: int, replica: int, prompt_tokens: int, unread_tokens: int) -> None:
    """A request's prompt has been read on its replica; tokens as they were when it started there."""
    desk.replicas.backlog_tokens[replica] -= prompt_tokens
    desk.replicas.unread_tokens[replica] -= unread_tokens
    if desk.replicas.serves[replica]:
        desk.models.unread_tokens[model] -= unread_tokens


@swift
def left(desk: Desk, model: int, replica: int, output_tokens: int) -> None:
    """A request has left its replica, after its first token: it has all its tokens, or is written elsewhere."""
    role = desk.models.role[replica]
    desk.replicas.backlog_tokens[replica] -= 1 if role == READS else output_tokens
    if role == WRITES:
        return
    desk.replicas.free_slots[replica] += 1
    if desk.replicas.serves[replica]:
        desk.models.free_slots[model] += 1
        if desk.replicas.free_slots[replica] == 1:
            routing.note_slots(desk.replicas, desk.ready, replica)


@swift
def settle(desk: Desk, model: int, client: int, difference_gpu_s: float) -> None:
    """Charge what a request has cost beyond what it was expected to; negative: what it has not."""
    admission.settle(desk.accounts, desk.queue, line_of(desk, model, client), difference_gpu_s)


@swift
def ended(desk: Desk, model: int, replica: int, client: int, output_tokens: int, difference_gpu_s: float) -> None:
    """A request has ended on its replica, after its first token; see `left` and `settle`."""
    left(desk, model, replica, output_tokens)
    settle(desk, model, client, difference_gpu_s)


@swift
def gave_up(desk: Desk, model: int, client: int, gpu_s: float) -> None:
    """A waiting request waits no longer, and has not started."""
    admission.leave(desk.queue, line_of(desk, model, client), model, gpu_s)


@swift
def overtaken(desk: Desk, model: int, client: int, gpu_s: float, ttft_s: float) -> float:
    """A waiting request is told that its turn does not come; return after how many seconds it should come back.

    After its deadline again, and after those of its tenant who have been told to come back before.
    """
    line, gpus = line_of(desk, model, client), desk.models.gpus[model]
    admission.leave(desk.queue, line, model, gpu_s)
    return admission.tell(desk.queue, line, model, gpu_s, gpus, ttft_s) if gpus > 0.0 else ttft_s


@swift
def come_back(desk: Desk, model: int, client: int, gpu_s: float) -> None:
    """A request that had started waits again, because its replica failed; nobody is refused who has begun."""
    admission.enter(desk.queue, line_of(desk, model, client), model, gpu_s)


@swift
def tick(desk: Desk, now_s: float) -> None:
    """Let the accounts forget. Call it once a second, and then see who may start: a limit may have been left."""
    passed_s = now_s - desk.accounts.aged_s[0]
    if passed_s > 0.0:
        serves = False
        for model in range(len(desk.models.gpus)):
            serves = serves or desk.models.gpus[model] > 0.0
        admission.age(desk.accounts, now_s, serves)
        admission.keep_pace(desk.queue, passed_s, desk.models.gpus)


@swift
def expected_gpu_s(desk: Desk, model: int, unread_tokens: int, output_tokens: int) -> float:
    """Return what a request should cost in GPU-seconds, on the replicas in service when they are full."""
    return float(
        unread_tokens * desk.models.gpu_s_per_prompt_token[model]
        + output_tokens * desk.models.gpu_s_per_output_token[model]
    )


@swift
def line_of(desk: Desk, model: int, client: int) -> int:
    """Return the line of a client at a model, see `FairQueue`."""
    return client * len(desk.models.gpus) + model


@swift
def _answer(desk: Desk, model: int, line: int, gpu_s: float, gpus: float, rule: int, seconds: float) -> Arrival:
    """Put a request that has not started into its line, or say when it should come back."""
    if rule == WAITS_FOR_SLOT:
        admission.enter(desk.queue, line, model, gpu_s)
    if rule == TOO_LATE:
        seconds = admission.tell(desk.queue, line, model, gpu_s, gpus, seconds)
    return Arrival(rule, NOBODY, 0, seconds, gpu_s)


@swift
def _route(
    desk: Desk, model: int, prompt_tokens: int, tokens: int, blocks: NDArray[np.int64], draw: int
) -> tuple[int, int, int]:
    block_tokens = desk.models.block_tokens[0]
    return routing.route(
        desk.replicas, desk.ready, desk.prefixes, model, prompt_tokens, tokens, blocks, block_tokens, draw
    )


@swift
def _give(
    desk: Desk,
    model: int,
    replica: int,
    prompt_tokens: int,
    unread_tokens: int,
    output_tokens: int,
    blocks: NDArray[np.int64],
) -> None:
    """Note that a replica gets a request."""
    replicas = desk.replicas
    replicas.backlog_tokens[replica] += prompt_tokens + (1 if desk.models.role[replica] == READS else output_tokens)
    replicas.unread_tokens[replica] += unread_tokens
    replicas.free_slots[replica] -= 1
    desk.models.unread_tokens[model] += unread_tokens
    desk.models.free_slots[model] -= 1
    if replicas.free_slots[replica] == 0:
        routing.note_slots(replicas, desk.ready, replica)
    if len(blocks) > 0:
        routing.remember(desk.prefixes, replicas.born, blocks, replica)
