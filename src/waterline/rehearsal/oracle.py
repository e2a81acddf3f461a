"""Continuous batching, step by step: slow, small and obviously right.

This is what the word "rehearsal" means, exactly; a faster engine has to give the same integers. Time is in whole
picoseconds from the start of the trace. An arrival is taken to the nanosecond, which keeps the digits of a trace.

**A replica** works in steps, one after the other, as vLLM and SGLang do. A step that begins at time s knows every
request that was given to the replica up to and including s. In this order it takes:

1. *Decodes.* Each running request whose prompt has been read produces one token. Every token that has been read or
   produced occupies one token of cache, so each decode claims one. While the free cache is less than the decodes, the
   request admitted last is preempted: its cache is freed, it goes to the *front* of the queue, and its prompt and all
   it has produced will be read again.
2. *The prompt under way*, in a chunk as large as the step's token budget allows (`StepCost.step_tokens`, of which each
   decode has taken one).
3. *Waiting requests*, first come, first served, while there are a slot (`max_batch`), budget, and free cache for the
   whole of what is to be read plus one token. That cache is taken at once.

The step takes `StepCost.step_ps` and everything it does happens at its end: the step that reads the last of a prompt
produces a token too, the first one; a request that has all its tokens leaves and frees its cache. The next step begins
at that instant, or, when there is no work, with the next request. The step's time is shared among its requests by the
tokens they had processed, in whole picoseconds a token; what does not divide (less than a picosecond a token) waits for
the replica's next step. So shares of many steps add up whatever their number.

**There is no livelock.** Prompts are read one after the other, so the running requests are, in the order of their
admission, some that decode and at most one that reads. Room is made from the other end, and a single request always has
it, because whoever could outgrow the cache or the context is refused on arrival. Whoever is admitted takes budget, so
there are never more running requests than budget. So the oldest running request moves in every step, by a token or by a
chunk, and finishes; and when nobody runs, the cache is empty and the head of the queue is admitted. Nor can a preempted
request come back in the step that took its cache: it needs one token more than it held, and somebody has claimed at
least one of those.

**Part of a prompt may be in the cache already.** When a request is admitted, that part need not be read: its chunks
begin behind it, and see it. It occupies cache like all other tokens, for each request anew. Where an owner has measured
rates, they count cached tokens as read, and so does the replica (`Capacity.reads_cached`). How much is known

- because the trace says so (`Ask.cached_tokens`, less than all of the prompt), on whatever replica. After a preemption
  all is read again;
- because the prompt comes with the keys of its blocks (`Ask.blocks`). Then each replica has a prefix cache
  (`PrefixCache`): whenever a request is admitted it finds the blocks with which the prompt begins, up to the first that
  is not there, but never the prompt's last token. A block is there from the admission of a request that has it, or its
  joining. When nobody who runs has it any more it is idle, and lies in the part of the cache that is free. As that gets
  smaller, the blocks go that were used longest ago: of one prompt the last block first.

**Requests wait at the desk** (`policy.dispatch`) and not at replicas: one goes to a replica when that has a slot, of
which there are `Capacity.max_batch`. There it may still wait for cache. The desk is told of every first token and every
end at the end of the step, in the order in which the requests were admitted; it is charged what a request is expected
to cost when it starts, and what its shares of the steps come to when it ends. What it is told to expect of an output is
the mean of the plan. The output that a trace records stands for the limit a client would have sent along.

**Reading and writing may be apart.** A replica whose role is "prefill" reads prompts and produces first tokens; a
request that wants more leaves it then, freeing its cache. The cache arrives at the decode replicas
`Capacity.transfer_ps_per_token` times what was read later. Only then does the desk choose one of them. When none that
can hold it gets requests, the one that would drain first serves it all the same: what has begun is not refused; when
none is left at all, it asks again every second. There it waits its turn, first come, first served, and joins at the
beginning of a step, before the decodes claim their cache, when no prompt is under way, a slot is free, and cache for
what it brings and one token more. It has nothing to read unless it is preempted. Prefill replicas never wait for decode
replicas.

**Whoever is overtaken is told.** A request that was taken in and has not been given to a replica for
`admission.waits_s` is told at the desk's next second that its turn does not come, and when to come back.

**Clients leave.** One gives up when its request has not been given to a replica by the end of its patience
(`Ask.patience_ps`), and one goes away in the middle of its answer (`Ask.leaves_ps`), if that is not complete by then. A
request that waits at the desk, or whose cache is on its way, ends at once. One that is on a replica ends with the step
under way there, as engines drop requests between two steps: with what it has by then, the token of that step included,
and even when that was its last. First those end that decode or read, in the order of their admission, then those that
wait there. Their cache is free then; what a prefix cache has of their prompts stays, idle. The desk is told as of any
other end, and first that they read no more: it charges what they had, and gives their places away. When their replica
fails before the step has ended, they end with it.

**Replicas come and go.** One that drains gets nothing new and finishes what it has. One that fails loses its cache:
its requests go back to the desk, before all others of their clients and in the order in which they were admitted, and
what they have produced is read again with their prompt. The step under way is lost, and charged to nobody.

**At one instant** everything happens in this order: steps end, replica by replica, and as each has ended the desk gives
away the slots that it left; caches arrive; the desk's second strikes (accounts age, who was overtaken is told); clients
leave, those first whose requests came first, and the desk gives their places away; replicas come and go; requests
arrive; steps begin.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import groupby

import numpy as np

from waterline.policy import dispatch, why
from waterline.policy.decisions import (
    COMES_BACK,
    GAVE_UP,
    NOT_SERVED,
    REASONS,
    SLOT_FREE,
    TAKES_OVER,
    TOO_LATE,
    WAITS_FOR_SLOT,
)
from waterline.policy.dispatch import Desk
from waterline.policy.routing import NOBODY
from waterline.rehearsal.capacity import NEVER, Ask, Capacity, Change, Terms
from waterline.rehearsal.state import waits_ps
from waterline.rehearsal.stepped import Passage, Step, SteppedReplica
from waterline.units import PICOSECONDS_PER_S

MOST_STILL = 4000  # seconds; by then every account has forgotten everything, and who still waits waits for ever
ROLES = {"both": dispatch.BOTH, "prefill": dispatch.READS, "decode": dispatch.WRITES}


@dataclass
class Dice:
    """The draws of routing: two generators of Lehmer's, a half of a draw each."""

    state: tuple[int, int]

    def roll(self) -> int:
        prime = 2**31 - 1
        self.state = self.state[0] * 48_271 % prime, self.state[1] * 69_621 % prime
        return self.state[1] << 31 | self.state[0]


@dataclass
class SteppedFleet:
    """Replicas behind their desk."""

    capacities: Sequence[Capacity]
    terms: Terms
    steps: list[Step] | None
    lines: dict[tuple[int, int], deque[Passage]] = field(default_factory=dict)  # who waits, by model and client
    coming: list[tuple[int, int, Passage]] = field(
        default_factory=list
    )  # caches, when, and in the order they were sent
    sent: int = 0
    timers: list[tuple[int, int, Passage]] = field(default_factory=list)  # when whose time is up, in which order
    timed: int = 0
    to_change: deque[Change] = field(default_factory=deque)
    to_come: deque[Passage] = field(default_factory=deque)
    next_tick_ps: int = PICOSECONDS_PER_S
    still: int = 0  # ticks in a row at which no replica had anything to do

    def __post_init__(self) -> None:
        self.desk = new_desk(self.terms, self.capacities)
        self.dice = Dice(self.terms.dice)
        self.reasons = np.zeros(len(REASONS), np.int64)  # of the decision that is being made
        self.replicas = [
            SteppedReplica(index, one, self.terms.block_tokens, self, self.steps)
            for index, one in enumerate(self.capacities)
        ]
        whole = {one.model for one in self.capacities if one.reads_cached}
        self.tells_cached = [model not in whole for model in range(len(self.terms.ttft_s))]

    # --- One instant, in this order -----------------------------------------------------------------------------------

    def next_ps(self) -> int:
        """Return when something happens next."""
        return min(
            self.next_tick_ps,
            *[one.end_ps for one in self.replicas if one.stepping],
            *[heap[0][0] for heap in (self.coming, self.timers) if heap],
            *[self.to_change[0].at_ps if self.to_change else self.next_tick_ps],
            *[self.to_come[0].ask.arrival_ps if self.to_come else self.next_tick_ps],
        )

    def end_steps(self, now_ps: int) -> None:
        for replica in self.replicas:
            if replica.stepping and replica.end_ps == now_ps and replica.end_step():
                self.start_waiting(replica.capacity.model, now_ps)

    def take_caches(self, now_ps: int) -> None:
        while self.coming and self.coming[0][0] == now_ps:
            passage = heappop(self.coming)[2]
            if passage.finish_ps == NEVER:
                self.arrive_to_be_written(passage, now_ps)

    def is_over(self, passages: Sequence[Passage]) -> bool:
        """Whether all have ended, or nobody else will ever start."""
        over = self.still >= MOST_STILL or all(passage.finish_ps != NEVER for passage in passages)
        return over and not self.to_change and not self.to_come

    def tick(self, now_ps: int) -> None:
        self.next_tick_ps += PICOSECONDS_PER_S
        self.still = 0 if any(replica.stepping or replica.busy for replica in self.replicas) else self.still + 1
        dispatch.tick(self.desk, float(now_ps // PICOSECONDS_PER_S))
        for model in range(len(self.terms.ttft_s)):
            self.start_waiting(model, now_ps)
        for model in range(len(self.terms.ttft_s)):
            self.tell_overtaken(model, now_ps)

    def end_times(self, now_ps: int) -> None:
        """Let those leave whose time is up: to wait for their first replica, or to be there at all."""
        while self.timers and self.timers[0][0] == now_ps:
            passage = heappop(self.timers)[2]
            leaves = now_ps == passage.ask.arrival_ps + passage.ask.leaves_ps
            if passage.finish_ps == NEVER and not passage.left and (leaves or passage.started_ps == NEVER):
                self.leave(passage, now_ps)

    def make_changes(self, now_ps: int) -> None:
        due = []
        while self.to_change and self.to_change[0].at_ps == now_ps:
            due.append(self.to_change.popleft())
        for kind, group in groupby(due, key=lambda change: change.kind):
            self.change(kind, [change.replica for change in group], now_ps)

    def take_arrivals(self, now_ps: int) -> None:
        while self.to_come and self.to_come[0].ask.arrival_ps == now_ps:
            passage = self.to_come.popleft()
            self.arrive(passage, now_ps)
            for after_ps in (passage.ask.patience_ps, passage.ask.leaves_ps):
                if after_ps != NEVER and passage.finish_ps == NEVER:
                    heappush(self.timers, (now_ps + after_ps, self.timed, passage))
                    self.timed += 1

    def begin_steps(self, now_ps: int) -> None:
        for replica in self.replicas:
            if not replica.stepping and replica.busy:
                replica.begin_step(now_ps)

    # --- What the desk is asked ---------------------------------------------------------------------------------------

    def arrive(self, passage: Passage, now_ps: int) -> None:
        ask, draw = passage.ask, self.dice.roll()
        self.explain(ask.model, passage, passage.tokens, draw)
        answer = dispatch.arrive(
            self.desk,
            ask.model,
            ask.client,
            ask.prompt_tokens,
            self._told(passage),
            self.terms.output_tokens[ask.model],
            ask.prompt_tokens + ask.output_tokens,
            self.terms.ttft_s[ask.model],
            np.array(ask.blocks, np.int64),
            draw,
        )
        passage.cost_gpu_s = answer.gpu_s
        if answer.rule == SLOT_FREE:
            self.write_down(passage, now_ps, SLOT_FREE, answer.replica)
            self.replicas[answer.replica].accept(passage, answer.cached_tokens, now_ps)
        elif answer.rule == WAITS_FOR_SLOT:
            self.lines.setdefault((ask.model, ask.client), deque()).append(passage)
            self.start_waiting(ask.model, now_ps)
        else:
            passage.refusal, passage.retry_s, passage.finish_ps = answer.rule, answer.seconds, now_ps

    def start_waiting(self, model: int, now_ps: int) -> None:
        """Give those who wait to replicas, while there are slots for them."""
        while True:
            client, _ = dispatch.next_turn(self.desk, model)
            if client == NOBODY:
                return
            line = self.lines[model, client]
            passage, draw = line[0], self.dice.roll()
            self.explain(model, passage, passage.tokens, draw)
            why.explain_turn(self.desk, model, self.reasons)
            replica, cached_tokens, rule = dispatch.start(
                self.desk,
                model,
                client,
                passage.tokens,
                self._told(passage),
                self.terms.output_tokens[model],
                passage.ask.prompt_tokens + passage.ask.output_tokens,
                passage.cost_gpu_s,
                np.array(passage.ask.blocks, np.int64),
                draw,
            )
            if replica != NOBODY:
                begun = passage.started_ps != NEVER
                self.write_down(passage, now_ps, COMES_BACK if begun else WAITS_FOR_SLOT, replica)
                self.replicas[replica].accept(line.popleft(), cached_tokens, now_ps)
            elif rule == NOT_SERVED:
                self.turn_away(line.popleft(), rule, now_ps)
            else:
                return

    def tell_overtaken(self, model: int, now_ps: int) -> None:
        """Tell those whose turn has not come for long, in the order in which they came."""
        ttft_s, waits = self.terms.ttft_s[model], waits_ps(self.terms.ttft_s[model])
        lines = [line for (other, _), line in self.lines.items() if other == model]
        waiting = [passage for line in lines for passage in line if passage.started_ps == NEVER]
        late = [passage for passage in waiting if passage.ask.arrival_ps + waits < now_ps]
        for passage in sorted(late, key=lambda one: one.number):
            client = passage.ask.client
            self.lines[model, client].remove(passage)
            passage.retry_s = dispatch.overtaken(self.desk, model, client, passage.cost_gpu_s, ttft_s)
            passage.refusal, passage.finish_ps = TOO_LATE, now_ps
        if late:
            self.start_waiting(model, now_ps)

    def turn_away(self, passage: Passage, rule: int, now_ps: int) -> None:
        """Let a request that waits wait no longer."""
        dispatch.gave_up(self.desk, passage.ask.model, passage.ask.client, passage.cost_gpu_s)
        passage.refusal, passage.finish_ps = rule, now_ps

    def leave(self, passage: Passage, now_ps: int) -> None:
        """The client of a request leaves; who is on a replica that is in a step waits for its end."""
        passage.left = True
        if passage in self.lines.get((passage.ask.model, passage.ask.client), ()):
            self.lines[passage.ask.model, passage.ask.client].remove(passage)
            self.turn_away(passage, GAVE_UP, now_ps)
        elif any(passage is other for _, _, other in self.coming):
            self.settle(passage)
            passage.replica, passage.refusal, passage.finish_ps = NOBODY, GAVE_UP, now_ps
        elif self.replicas[passage.replica].stepping:
            return
        else:
            self.replicas[passage.replica].drop_left(now_ps)
        self.start_waiting(passage.ask.model, now_ps)

    def explain(self, pool: int, passage: Passage, prompt_tokens: int, draw: int) -> None:
        """Ask why before it is done; where a prompt is read elsewhere, nothing of it is read here."""
        if self.terms.reasons:
            tokens = passage.ask.prompt_tokens + passage.ask.output_tokens
            blocks = np.array(passage.ask.blocks if prompt_tokens else (), np.int64)
            why.explain_place(self.desk, pool, prompt_tokens, tokens, blocks, draw, self.reasons)

    def write_down(self, passage: Passage, now_ps: int, rule: int, replica: int) -> None:
        if self.terms.reasons:
            passage.placed.append((now_ps, rule, replica, *self.reasons.tolist()))

    def _told(self, passage: Passage) -> int:
        return passage.cached_tokens if self.tells_cached[passage.ask.model] else 0

    # --- What the desk is told ----------------------------------------------------------------------------------------

    def has_read(self, replica: SteppedReplica, passage: Passage) -> None:
        model = replica.capacity.model
        dispatch.first_token(self.desk, model, replica.index, passage.tokens, passage.unread_tokens)
        passage.unread_tokens = NEVER

    def has_ended(self, replica: SteppedReplica, passage: Passage) -> None:
        model = replica.capacity.model
        difference_gpu_s = self._spent_gpu_s(passage) - passage.cost_gpu_s
        expected = self.terms.output_tokens[model]
        dispatch.ended(self.desk, model, replica.index, passage.ask.client, expected, difference_gpu_s)

    def is_sent(self, replica: SteppedReplica, passage: Passage) -> None:
        model = replica.capacity.model
        dispatch.left(self.desk, model, replica.index, self.terms.output_tokens[model])
        arrives_ps = replica.end_ps + (passage.tokens - 1) * replica.capacity.transfer_ps_per_token
        self._send(passage, arrives_ps)

    def _send(self, passage: Passage, arrives_ps: int) -> None:
        heappush(self.coming, (arrives_ps, self.sent, passage))
        self.sent += 1

    def _spent_gpu_s(self, passage: Passage) -> float:
        """Return the GPU time a request has had since it was given to replicas, who reads it and who writes it."""
        gpu_s = passage.busy_ps * 1e-12 * self.capacities[passage.replica].gpus
        if passage.read_by != NOBODY:
            gpu_s += passage.read_busy_ps * 1e-12 * self.capacities[passage.read_by].gpus
        return gpu_s

    # --- Replicas -----------------------------------------------------------------------------------------------------

    def arrive_to_be_written(self, passage: Passage, now_ps: int) -> None:
        """The cache of a request arrives; without anybody to write it, it asks again a second later."""
        model, expected = passage.ask.model, self.terms.output_tokens[passage.ask.model]
        tokens = passage.ask.prompt_tokens + passage.ask.output_tokens
        draw = self.dice.roll()
        self.explain(model + len(self.terms.ttft_s), passage, 0, draw)
        index = dispatch.take_over(self.desk, model, expected, tokens, draw)
        if index == NOBODY:
            able = [
                one.index
                for one in self.replicas
                if one.alive
                and one.capacity.role == "decode"
                and one.capacity.model == model
                and one.capacity.longest_tokens >= tokens
            ]
            if not able:
                self._send(passage, now_ps + PICOSECONDS_PER_S)
                return
            known = self.desk.replicas
            index = min(able, key=lambda one: (known.backlog_tokens[one] / known.tokens_per_s[one], one))
            why.explain_last_resort(self.desk, index, self.reasons)
            known.backlog_tokens[index] += expected
        self.write_down(passage, now_ps, TAKES_OVER, index)
        self.replicas[index].take_over(passage)

    def change(self, kind: str, rows: list[int], now_ps: int) -> None:
        """Let replicas come or go."""
        dispatch.set_in_service(self.desk, rows, serves=kind == "ready")
        if kind == "drain":
            return
        for row in rows:
            self.replicas[row].alive = kind == "ready"
        for row in rows if kind == "fail" else rows[:1]:
            if kind == "fail":
                for passage in reversed(self.replicas[row].fail()):
                    self.come_back(passage, now_ps)
            for model in range(len(self.terms.ttft_s)):
                self.start_waiting(model, now_ps)

    def settle(self, passage: Passage) -> None:
        difference_gpu_s = self._spent_gpu_s(passage) - passage.cost_gpu_s
        dispatch.settle(self.desk, passage.ask.model, passage.ask.client, difference_gpu_s)

    def come_back(self, passage: Passage, now_ps: int) -> None:
        """Put a request whose replica has failed before all others of its client; what it has produced is kept."""
        model, client = passage.ask.model, passage.ask.client
        self.settle(passage)
        passage.losses.append((passage.replica, passage.busy_ps, now_ps))
        if passage.read_by != NOBODY:
            passage.losses.append((passage.read_by, passage.read_busy_ps, now_ps))
        passage.read_by, passage.read_busy_ps, passage.busy_ps = NOBODY, 0, 0
        passage.read_tokens = passage.cached_tokens = 0
        if passage.produced_tokens == 0:
            passage.found_tokens = 0
        passage.unread_tokens = NEVER
        passage.restarts += 1
        if passage.left:
            passage.replica, passage.refusal, passage.finish_ps = NOBODY, GAVE_UP, now_ps
            return
        expected = self.terms.output_tokens[model]
        passage.cost_gpu_s = dispatch.expected_gpu_s(self.desk, model, passage.tokens, expected)
        dispatch.come_back(self.desk, model, client, passage.cost_gpu_s)
        self.lines.setdefault((model, client), deque()).appendleft(passage)


def new_desk(terms: Terms, capacities: Sequence[Capacity]) -> Desk:
    """Return a desk that knows the replicas, none of which is in service."""
    desk = dispatch.new_desk(
        terms.guarantee,
        terms.deserved,
        terms.limit,
        terms.tenant_of_client,
        models=len(terms.ttft_s),
        rows=len(capacities),
        gpus=terms.gpus,
        block_tokens=terms.block_tokens if terms.affinity else 0,
        prefix_places=terms.prefix_places,
    )
    for row, one in enumerate(capacities):
        dispatch.put(
            desk,
            row,
            one.model,
            role=ROLES[one.role],
            gpus=float(one.gpus),
            slots=one.max_batch,
            longest_tokens=one.longest_tokens,
            tokens_per_s=one.tokens_per_s,
            prefill_tokens_per_s=one.prefill_tokens_per_s,
        )
    for model in range(len(terms.ttft_s)):
        dispatch.recount(desk.models, desk.replicas, desk.accounts, model)
    return desk


def serve(
    capacities: Sequence[Capacity],
    requests: Iterable[Ask],
    terms: Terms,
    *,
    changes: Iterable[Change] | None = None,
    steps: list[Step] | None = None,
) -> list[Passage]:
    """Serve requests until the last one is done.

    Args:
        capacities: the replicas.
        requests: in the order of their arrival.
        terms: who asks, and what is promised.
        changes: when replicas become ready, drain and fail, in the order of time; None: all are ready from the start.
        steps: a list that gets every step, in the order they begin on each replica.

    Returns:
        What became of each request, in the same order: refused (and finished on arrival), gone, or finished.
    """
    fleet = SteppedFleet(capacities, terms, steps)
    passages = [
        Passage(number=number, ask=ask, tokens=ask.prompt_tokens, cached_tokens=ask.cached_tokens)
        for number, ask in enumerate(requests)
    ]
    if changes is None:
        changes = [Change(at_ps=0, kind="ready", replica=row) for row in range(len(capacities))]
    fleet.to_change, fleet.to_come = deque(changes), deque(passages)
    while True:
        now_ps = fleet.next_ps()
        fleet.end_steps(now_ps)
        fleet.take_caches(now_ps)
        if now_ps == fleet.next_tick_ps:
            if fleet.is_over(passages):
                break
            fleet.tick(now_ps)
        fleet.end_times(now_ps)
        fleet.make_changes(now_ps)
        fleet.take_arrivals(now_ps)
        fleet.begin_steps(now_ps)
    for passage in passages:
        if passage.finish_ps == NEVER:
            passage.refusal, passage.finish_ps = NOT_SERVED, fleet.next_tick_ps - PICOSECONDS_PER_S
    return passages
