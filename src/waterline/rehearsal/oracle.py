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

**Replicas come and go.** One that drains gets nothing new and finishes what it has. One that fails loses its cache:
its requests go back to the desk, before all others of their clients and in the order in which they were admitted, and
what they have produced is read again with their prompt. The step under way is lost, and charged to nobody.

**At one instant** everything happens in this order: steps end, replica by replica, and as each has ended the desk gives
away the slots that it left; caches arrive; the desk's second strikes (accounts age); patience ends; replicas come and
go; requests arrive; steps begin.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import groupby

import numpy as np

from waterline.cost.step import prefill_pairs
from waterline.policy import dispatch
from waterline.policy.decisions import GAVE_UP, NOT_SERVED, SLOT_FREE, WAITS_FOR_SLOT
from waterline.policy.dispatch import Desk
from waterline.policy.routing import NOBODY
from waterline.rehearsal.capacity import NEVER, Ask, Capacity, Change, Terms
from waterline.units import PICOSECONDS_PER_S

MOST_STILL = 4000  # seconds; by then every account has forgotten everything, and who still waits waits for ever
ROLES = {"both": dispatch.BOTH, "prefill": dispatch.READS, "decode": dispatch.WRITES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step that was taken, for those who want to look inside."""

    replica: str
    begin_ps: int
    end_ps: int
    decodes: int
    prefill_tokens: int
    running: int  # requests, decoding and reading
    occupied_tokens: int  # of the cache, claims for the tokens of this step included


@dataclass(slots=True, kw_only=True, eq=False)
class Passage:
    """One request on its way through the fleet, and in the end what became of it."""

    ask: Ask
    tokens: int  # of its prompt, and produced
    cached_tokens: int  # of its prompt, where it is read for the first time
    replica: int = NOBODY  # that serves it, or did; an index
    refusal: int = 0  # the rule by which it was refused, or gave up
    retry_s: float = 0.0  # after which it was told to come back
    cost_gpu_s: float = 0.0  # that it has been charged
    read_tokens: int = 0  # by the chunks since it was admitted last, or found in the cache then
    unread_tokens: int = NEVER  # as the desk counts them, until they have been read
    produced_tokens: int = 0
    started_ps: int = NEVER
    first_token_ps: int = NEVER
    finish_ps: int = NEVER
    busy_ps: int = 0  # its shares of the replica's steps
    preemptions: int = 0
    read_by: int = NOBODY  # the prefill replica, where reading and writing are apart; the shares above are the other's
    read_busy_ps: int = 0
    lost_gpu_ps: int = 0  # that it had had on replicas that failed
    restarts: int = 0
    found_tokens: int = 0  # of its prompt, in the cache when it was read


class PrefixCache:
    """The blocks of prompts that a replica still has."""

    def __init__(self, block_tokens: int) -> None:
        """Begin without any."""
        self.block_tokens = block_tokens
        self.users: Counter[int] = Counter()  # of each block, requests that run
        self.idle: OrderedDict[int, None] = OrderedDict()  # blocks that nobody uses, in the order of their last use

    def blocks(self, ask: Ask) -> tuple[int, ...]:
        """Return the blocks of a prompt; what lies behind its end is none of it."""
        return ask.blocks[: -(-ask.prompt_tokens // self.block_tokens)]

    def hold(self, ask: Ask) -> int:
        """Let a request use its blocks; return how many tokens of its prompt were there."""
        there = [key in self.idle or self.users[key] > 0 for key in self.blocks(ask)]
        for key in self.blocks(ask):
            self.idle.pop(key, None)
            self.users[key] += 1
        found = [*there, False].index(False)
        return min(found * self.block_tokens, ask.prompt_tokens - 1)

    def let_go(self, ask: Ask) -> None:
        """Let a request use its blocks no longer."""
        for key in reversed(self.blocks(ask)):
            self.users[key] -= 1
            if self.users[key] == 0:
                self.idle[key] = None

    def shrink(self, free_tokens: int) -> None:
        """Forget the idle blocks that do not fit any more."""
        while len(self.idle) * self.block_tokens > free_tokens:
            self.idle.popitem(last=False)


class SteppedReplica:
    """One replica, and the one place where its state changes."""

    def __init__(self, index: int, capacity: Capacity, fleet: "SteppedFleet", steps: list[Step] | None = None) -> None:
        self.index, self.capacity, self.fleet, self.steps = index, capacity, fleet, steps
        self.alive = False  # from when it is ready until it fails
        self.free_tokens = capacity.cache_tokens
        self.prefixes = PrefixCache(fleet.terms.block_tokens)
        self.waiting: deque[Passage] = deque()
        self.decoding: list[Passage] = []  # in the order of their admission, as are those below, who came after them
        self.reading: list[Passage] = []  # between steps at most one
        self.chunks: list[int] = []  # [reading] tokens in the step under way
        self.stepping = False
        self.begin_ps = 0  # of the step under way or the last one
        self.end_ps = 0
        self.undivided_ps = 0  # of the steps so far

    @property
    def busy(self) -> bool:
        return bool(self.decoding or self.reading or self.waiting)

    def accept(self, passage: Passage, cached_tokens: int, now_ps: int) -> None:
        """Queue a request that the desk gives to this replica, with so much of it cached here, as the desk thinks."""
        if passage.started_ps == NEVER:
            passage.started_ps = now_ps
        passage.unread_tokens = passage.tokens - cached_tokens
        passage.replica = self.index
        self.waiting.append(passage)

    def take_over(self, passage: Passage) -> None:
        """Queue a request that has been read elsewhere, at the arrival of its cache."""
        passage.read_tokens = passage.tokens
        passage.replica = self.index
        self.waiting.append(passage)

    def begin_step(self, now_ps: int) -> None:
        step = self.capacity.step
        while len(self.decoding) > self.free_tokens:
            self._preempt_latest()
        while self._join_next():
            pass
        decodes = len(self.decoding)
        self.free_tokens -= decodes

        budget = step.step_tokens - decodes
        self.chunks = []
        while budget > 0 and (len(self.chunks) < len(self.reading) or self._admit_next()):
            passage = self.reading[len(self.chunks)]
            self.chunks.append(min(budget, passage.tokens - passage.read_tokens))
            budget -= self.chunks[-1]
        self.prefixes.shrink(self.free_tokens)

        prefill_tokens = sum(self.chunks)
        pairs = sum(
            [
                prefill_pairs(passage.read_tokens, chunk)
                for passage, chunk in zip(self.reading, self.chunks, strict=True)
            ]
        )
        context_tokens = sum([passage.tokens for passage in self.decoding])
        self.stepping = True
        self.begin_ps = now_ps
        self.end_ps = now_ps + step.step_ps(prefill_tokens, pairs, decodes, context_tokens)
        if self.steps is not None:
            self.steps.append(self._under_way(prefill_tokens))

    def _preempt_latest(self) -> None:
        if self.reading:
            passage = self.reading.pop()
            self.free_tokens += passage.tokens + 1
        else:
            passage = self.decoding.pop()
            self.free_tokens += passage.tokens
        self.prefixes.let_go(passage.ask)
        passage.read_tokens = passage.cached_tokens = 0
        if passage.produced_tokens == 0:
            passage.found_tokens = 0
        passage.preemptions += 1
        self.waiting.appendleft(passage)

    def _join_next(self) -> bool:
        """Let the head of the queue decode, if it has been read elsewhere and there is a slot and cache for it."""
        if not self.waiting or self.waiting[0].read_tokens == 0 or self.reading:
            return False
        if len(self.decoding) >= self.capacity.slots:
            return False
        tokens = self.waiting[0].tokens
        if tokens + 1 > self.free_tokens - len(self.decoding):
            return False
        self._hold(self.waiting[0])
        self.free_tokens -= tokens
        self.decoding.append(self.waiting.popleft())
        return True

    def _admit_next(self) -> bool:
        """Admit the head of the queue, if there is one that has to be read, and a slot and cache for it."""
        if (
            not self.waiting
            or self.waiting[0].read_tokens
            or len(self.decoding) + len(self.reading) >= self.capacity.max_batch
        ):
            return False
        needed_tokens = self.waiting[0].tokens + 1
        if needed_tokens > self.free_tokens:
            return False
        passage = self.waiting.popleft()
        cached_tokens = max(passage.cached_tokens, self._hold(passage))
        self.free_tokens -= needed_tokens
        passage.read_tokens = 0 if self.capacity.reads_cached else cached_tokens
        if passage.produced_tokens == 0:
            passage.found_tokens = cached_tokens
        self.reading.append(passage)
        return True

    def _hold(self, passage: Passage) -> int:
        self.prefixes.shrink(self.free_tokens)
        return self.prefixes.hold(passage.ask)

    def end_step(self) -> bool:
        """Return whether somebody has left."""
        self.stepping = False
        step_ps = self.end_ps - self.begin_ps + self.undivided_ps
        token_ps, self.undivided_ps = divmod(step_ps, len(self.decoding) + sum(self.chunks))
        for passage in self.decoding:
            passage.busy_ps += token_ps
        for passage, chunk in zip(self.reading, self.chunks, strict=True):
            passage.read_tokens += chunk
            passage.busy_ps += token_ps * chunk
        self.decoding += [passage for passage in self.reading if passage.read_tokens == passage.tokens]
        self.reading = [passage for passage in self.reading if passage.read_tokens < passage.tokens]
        stay = [self._produce(passage) for passage in self.decoding]
        self.decoding = [passage for passage, stays in zip(self.decoding, stay, strict=True) if stays]
        return not all(stay)

    def _produce(self, passage: Passage) -> bool:
        """Give a request its next token, its cache was claimed before; return whether it stays."""
        if passage.unread_tokens != NEVER:
            self.fleet.has_read(self, passage)
        passage.tokens += 1
        passage.produced_tokens += 1
        if passage.produced_tokens == 1:
            passage.first_token_ps = self.end_ps
        if passage.produced_tokens == passage.ask.output_tokens:
            passage.finish_ps = self.end_ps
            self.fleet.has_ended(self, passage)
        elif self.capacity.role == "prefill":
            passage.read_by, passage.read_busy_ps, passage.busy_ps = self.index, passage.busy_ps, 0
            self.fleet.is_sent(self, passage)
        else:
            return True
        self.prefixes.let_go(passage.ask)
        self.free_tokens += passage.tokens
        return False

    def fail(self) -> list[Passage]:
        """Lose everything; return the requests that were here, in the order of their admission."""
        lost = [*self.decoding, *self.reading, *self.waiting]
        self.decoding, self.reading, self.stepping = [], [], False
        self.waiting.clear()
        return lost

    def _under_way(self, prefill_tokens: int) -> Step:
        return Step(
            replica=self.capacity.replica,
            begin_ps=self.begin_ps,
            end_ps=self.end_ps,
            decodes=len(self.decoding),
            prefill_tokens=prefill_tokens,
            running=len(self.decoding) + len(self.reading),
            occupied_tokens=self.capacity.cache_tokens - self.free_tokens,
        )


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
    patient: list[tuple[int, int, Passage]] = field(default_factory=list)  # when who gives up, and in which order
    patients: int = 0
    to_change: deque[Change] = field(default_factory=deque)
    to_come: deque[Passage] = field(default_factory=deque)
    next_tick_ps: int = PICOSECONDS_PER_S
    still: int = 0  # ticks in a row at which no replica had anything to do

    def __post_init__(self) -> None:
        self.desk = new_desk(self.terms, self.capacities)
        self.dice = Dice(self.terms.dice)
        self.replicas = [SteppedReplica(index, one, self, self.steps) for index, one in enumerate(self.capacities)]
        whole = {one.model for one in self.capacities if one.reads_cached}
        self.tells_cached = [model not in whole for model in range(len(self.terms.ttft_s))]

    # --- One instant, in this order -----------------------------------------------------------------------------------

    def next_ps(self) -> int:
        """Return when something happens next."""
        return min(
            self.next_tick_ps,
            *[one.end_ps for one in self.replicas if one.stepping],
            *[heap[0][0] for heap in (self.coming, self.patient) if heap],
            *[self.to_change[0].at_ps if self.to_change else self.next_tick_ps],
            *[self.to_come[0].ask.arrival_ps if self.to_come else self.next_tick_ps],
        )

    def end_steps(self, now_ps: int) -> None:
        for replica in self.replicas:
            if replica.stepping and replica.end_ps == now_ps and replica.end_step():
                self.start_waiting(replica.capacity.model, now_ps)

    def take_caches(self, now_ps: int) -> None:
        while self.coming and self.coming[0][0] == now_ps:
            self.arrive_to_be_written(heappop(self.coming)[2], now_ps)

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

    def end_patience(self, now_ps: int) -> None:
        while self.patient and self.patient[0][0] == now_ps:
            self.give_up(heappop(self.patient)[2], now_ps)

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
            if passage.ask.patience_ps != NEVER and passage.started_ps == NEVER and passage.finish_ps == NEVER:
                heappush(self.patient, (now_ps + passage.ask.patience_ps, self.patients, passage))
                self.patients += 1

    def begin_steps(self, now_ps: int) -> None:
        for replica in self.replicas:
            if not replica.stepping and replica.busy:
                replica.begin_step(now_ps)

    # --- What the desk is asked ---------------------------------------------------------------------------------------

    def arrive(self, passage: Passage, now_ps: int) -> None:
        ask = passage.ask
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
            self.dice.roll(),
        )
        passage.cost_gpu_s = answer.gpu_s
        if answer.rule == SLOT_FREE:
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
            passage = line[0]
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
                self.dice.roll(),
            )
            if replica != NOBODY:
                self.replicas[replica].accept(line.popleft(), cached_tokens, now_ps)
            elif rule == NOT_SERVED:
                self.leave(line.popleft(), rule, now_ps)
            else:
                return

    def leave(self, passage: Passage, rule: int, now_ps: int) -> None:
        """Let a request that waits leave."""
        dispatch.gave_up(self.desk, passage.ask.model, passage.ask.client, passage.cost_gpu_s)
        passage.refusal, passage.finish_ps = rule, now_ps

    def give_up(self, passage: Passage, now_ps: int) -> None:
        """The patience of a request ends, if it still waits for its first replica."""
        if passage.started_ps == NEVER and passage.finish_ps == NEVER:
            self.lines[passage.ask.model, passage.ask.client].remove(passage)
            self.leave(passage, GAVE_UP, now_ps)

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
        index = dispatch.take_over(self.desk, model, expected, tokens, self.dice.roll())
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
            known.backlog_tokens[index] += expected
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
                    self.come_back(passage)
            for model in range(len(self.terms.ttft_s)):
                self.start_waiting(model, now_ps)

    def come_back(self, passage: Passage) -> None:
        """Put a request whose replica has failed before all others of its client; what it has produced is kept."""
        model, client = passage.ask.model, passage.ask.client
        dispatch.settle(self.desk, model, client, self._spent_gpu_s(passage) - passage.cost_gpu_s)
        passage.lost_gpu_ps += passage.busy_ps * self.capacities[passage.replica].gpus
        if passage.read_by != NOBODY:
            passage.lost_gpu_ps += passage.read_busy_ps * self.capacities[passage.read_by].gpus
        passage.read_by, passage.read_busy_ps, passage.busy_ps = NOBODY, 0, 0
        passage.read_tokens = passage.cached_tokens = 0
        if passage.produced_tokens == 0:
            passage.found_tokens = 0
        passage.unread_tokens = NEVER
        passage.restarts += 1
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
    passages = [Passage(ask=ask, tokens=ask.prompt_tokens, cached_tokens=ask.cached_tokens) for ask in requests]
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
        fleet.end_patience(now_ps)
        fleet.make_changes(now_ps)
        fleet.take_arrivals(now_ps)
        fleet.begin_steps(now_ps)
    for passage in passages:
        if passage.finish_ps == NEVER:
            passage.refusal, passage.finish_ps = NOT_SERVED, fleet.next_tick_ps - PICOSECONDS_PER_S
    return passages
