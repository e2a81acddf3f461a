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

**Part of a prompt may be in the cache already** (`Request.cached_tokens`, less than all of it). When a request is first
admitted, that part need not be read: its chunks begin behind it, and see it. It occupies cache like all other tokens,
for each request anew: which prompts begin alike is not known. After a preemption all is read again. Where an owner has
measured rates, they count cached tokens as read, and so does the replica (`Capacity.reads_cached`).

**Reading and writing may be apart.** A replica whose role is "prefill" reads prompts and produces first tokens; a
request that wants more leaves it then, freeing its cache. The cache arrives at the decode replicas
`Capacity.transfer_ps_per_token` times the prompt later. Only then is one of them chosen, by `policy.routing`, among
those that serve at this hour and can hold the request, or among all that can when there is none: what has begun is not
refused. There it waits its turn, first come, first served, and joins at the beginning of a step, before the decodes
claim their cache, when no prompt is under way, a slot is free, and cache for what it brings and one token more. It has
nothing to read unless it is preempted. Prefill replicas never wait for decode replicas, so all reading can be rehearsed
before any writing; and they accept only what some decode replica can hold.

**The router** sees, at the arrival of a request at time t, every token produced up to and including t. It does not know
how many tokens a request will ask for and expects the mean of the plan.

- `policy.routing` is shown the *backlog* of each replica: of a request its prompt, cached or not, and that mean, until
  its first token; then that mean, until it ends. On a prefill replica the mean is 1, the first token; on a decode
  replica there is no prompt.
- `policy.admission` is shown the work *before the first token* of a newcomer, on all replicas of the model together:
  prompts that have not been read, but for what is cached of them, and a mean request for each one beyond the slots,
  because a slot must come free for it. The deadline is the TTFT of the SLO.

Replicas on which the request can never fit are not shown; the output that a trace records stands for the limit a
client would have sent along. A replica that does not serve at this hour of the day is shown with a rate of 0, so that
it gets nothing new and its queue keeps nobody out; whom it has accepted it serves to the end.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from waterline.cost.step import StepCost, prefill_pairs
from waterline.fleet import HOURS
from waterline.plan import Role
from waterline.policy.admission import ADMIT, retry_after_s
from waterline.policy.routing import NOBODY, least_loaded
from waterline.units import GIGA, HOUR_S, PICOSECONDS_PER_S
from waterline.workload import Request

NEVER = -1  # no time: times are never negative
PICOSECONDS_PER_NS = PICOSECONDS_PER_S // GIGA
PICOSECONDS_PER_HOUR = PICOSECONDS_PER_S * HOUR_S
NOT_IN_SERVICE = "no replica of the model is in service"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a replica can take, and how long its steps are."""

    replica: str  # its id
    gpus: int
    step: StepCost
    max_batch: int  # requests running together, at most
    cache_tokens: int
    max_context_tokens: int
    prefill_tokens_per_s: float  # at which it reads what has to be read of prompts, planned
    tokens_per_s: float  # prompt and output with all slots taken, planned; 0 takes it out of routing
    hours: tuple[int, ...] = tuple(range(HOURS))  # of the day, at which it gets requests
    role: Role = "both"
    transfer_ps_per_token: int = 0  # of a prompt that a prefill replica has read, to the decode replicas
    reads_cached: bool = False  # its steps count cached tokens as read

    @property
    def longest_tokens(self) -> int:
        """The longest request it can hold, prompt and output."""
        return min(self.cache_tokens, self.max_context_tokens)

    @property
    def slots(self) -> int:
        """Requests that can decode together: each takes a token of the step."""
        return min(self.max_batch, self.step.step_tokens)

    def serves(self, hour: int) -> bool:
        return self.tokens_per_s > 0 and hour in self.hours


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

    request: Request
    arrival_ps: int
    replica: str = ""
    reason: str = ""  # why it was refused
    retry_s: float = 0.0  # after which it was told to come back, when it was refused for the deadline
    tokens: int  # of its prompt, and produced
    read_tokens: int = 0  # of them, by the chunks since it was admitted last, or found in the cache then
    produced_tokens: int = 0
    first_token_ps: int = NEVER
    finish_ps: int = NEVER
    busy_ps: int = 0  # its shares of the replica's steps
    preemptions: int = 0
    read_by: str = ""  # the prefill replica, where reading and writing are apart; the times above are the other's
    read_busy_ps: int = 0


class SteppedReplica:
    """One replica, and the one place where its state changes."""

    def __init__(self, capacity: Capacity, expected_output_tokens: int, steps: list[Step] | None = None) -> None:
        self.capacity = capacity
        self.expected_output_tokens = 1 if capacity.role == "prefill" else expected_output_tokens
        self.steps = steps
        self.longest_tokens = capacity.longest_tokens
        self.sent: list[tuple[int, Passage]] = []  # on their way to a decode replica, and when they arrive
        self.free_tokens = capacity.cache_tokens
        self.waiting: deque[Passage] = deque()
        self.decoding: list[Passage] = []  # in the order of their admission, as are those below, who came after them
        self.reading: list[Passage] = []  # between steps at most one
        self.chunks: list[int] = []  # [reading] tokens in the step under way
        self.stepping = False
        self.begin_ps = 0  # of the step under way or the last one
        self.boundary_ps = 0  # when it ends, or when the next one may begin
        self.undivided_ps = 0  # of the steps so far
        self.accepted = 0  # requests that have not ended
        self.unread_tokens = 0  # of the prompts of those without a first token, but for what is cached
        self.backlog_tokens = 0  # expected, accepted and not yet produced

    @property
    def queued(self) -> int:
        """Requests accepted beyond the slots."""
        return max(0, self.accepted - self.capacity.max_batch)

    def accept(self, passage: Passage) -> None:
        """Queue a request at its arrival, up to which the replica has been advanced."""
        self._queue(passage, passage.arrival_ps)
        self.unread_tokens += passage.tokens - self._cached_tokens(passage)
        self.backlog_tokens += passage.tokens + self.expected_output_tokens

    def take_over(self, passage: Passage, at_ps: int) -> None:
        """Queue a request that has been read elsewhere, at the arrival of its cache."""
        self._queue(passage, at_ps)
        passage.read_tokens = passage.tokens
        self.backlog_tokens += self.expected_output_tokens

    def _cached_tokens(self, passage: Passage) -> int:
        return 0 if self.capacity.reads_cached else passage.request.cached_tokens

    def _queue(self, passage: Passage, at_ps: int) -> None:
        if not self.stepping:
            self.boundary_ps = at_ps
        passage.replica = self.capacity.replica
        self.waiting.append(passage)
        self.accepted += 1

    def advance(self, now_ps: float) -> None:
        """End every step that ends up to and including `now_ps`; begin every step that begins before it.

        A step that would begin at `now_ps` itself is left for later: more requests may arrive at this instant.
        """
        while True:
            if self.stepping:
                if self.boundary_ps > now_ps:
                    return
                self._end_step()
            if self.boundary_ps >= now_ps or not (self.decoding or self.reading or self.waiting):
                return
            self._begin_step()

    def _begin_step(self) -> None:
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

        prefill_tokens = sum(self.chunks)
        pairs = sum(
            [
                prefill_pairs(passage.read_tokens, chunk)
                for passage, chunk in zip(self.reading, self.chunks, strict=True)
            ]
        )
        context_tokens = sum([passage.tokens for passage in self.decoding])
        self.stepping = True
        self.begin_ps = self.boundary_ps
        self.boundary_ps += step.step_ps(prefill_tokens, pairs, decodes, context_tokens)
        if self.steps is not None:
            self.steps.append(self._under_way(prefill_tokens))

    def _preempt_latest(self) -> None:
        if self.reading:
            passage = self.reading.pop()
            self.free_tokens += passage.tokens + 1
        else:
            passage = self.decoding.pop()
            self.free_tokens += passage.tokens
        passage.read_tokens = 0
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
        self.free_tokens -= needed_tokens
        passage = self.waiting.popleft()
        passage.read_tokens = 0 if passage.preemptions else self._cached_tokens(passage)
        self.reading.append(passage)
        return True

    def _end_step(self) -> None:
        self.stepping = False
        step_ps = self.boundary_ps - self.begin_ps + self.undivided_ps
        token_ps, self.undivided_ps = divmod(step_ps, len(self.decoding) + sum(self.chunks))
        for passage in self.decoding:
            passage.busy_ps += token_ps
        for passage, chunk in zip(self.reading, self.chunks, strict=True):
            passage.read_tokens += chunk
            passage.busy_ps += token_ps * chunk
        self.decoding += [passage for passage in self.reading if passage.read_tokens == passage.tokens]
        self.reading = [passage for passage in self.reading if passage.read_tokens < passage.tokens]
        for passage in self.decoding:
            self._produce(passage)
        sent = [passage for _, passage in self.sent]
        self.decoding = [one for one in self.decoding if one.finish_ps == NEVER and one not in sent]

    def _produce(self, passage: Passage) -> None:
        """Give a request its next token; its cache was claimed before."""
        passage.tokens += 1
        passage.produced_tokens += 1
        if passage.produced_tokens == 1:
            passage.first_token_ps = self.boundary_ps
            self.unread_tokens -= passage.request.prompt_tokens - self._cached_tokens(passage)
            self.backlog_tokens -= passage.request.prompt_tokens
        if passage.produced_tokens == passage.request.output_tokens:
            passage.finish_ps = self.boundary_ps
        elif self.capacity.role == "prefill":
            passage.read_by, passage.read_busy_ps, passage.busy_ps = passage.replica, passage.busy_ps, 0
            takes_ps = passage.request.prompt_tokens * self.capacity.transfer_ps_per_token
            self.sent.append((self.boundary_ps + takes_ps, passage))
        else:
            return
        self.free_tokens += passage.tokens
        self.accepted -= 1
        self.backlog_tokens -= self.expected_output_tokens

    def _under_way(self, prefill_tokens: int) -> Step:
        return Step(
            replica=self.capacity.replica,
            begin_ps=self.begin_ps,
            end_ps=self.boundary_ps,
            decodes=len(self.decoding),
            prefill_tokens=prefill_tokens,
            running=len(self.decoding) + len(self.reading),
            occupied_tokens=self.capacity.cache_tokens - self.free_tokens,
        )


def arrival_ps(request: Request) -> int:
    """Return when a request arrives; the one place where seconds become picoseconds."""
    return round(request.arrival_s * GIGA) * PICOSECONDS_PER_NS


def too_long(request_tokens: int, longest_tokens: int) -> str:
    return f"{request_tokens} tokens, of which no replica of the model holds more than {longest_tokens}"


def too_late(deadline_s: float, retry_s: float) -> str:
    return f"would not start within {deadline_s:g} s; retry after {retry_s:.3g} s"


def serve(
    capacities: Sequence[Capacity],
    requests: Iterable[Request],
    *,
    deadline_s: float,
    expected_prompt_tokens: int,
    expected_output_tokens: int,
    first_hour: int = 0,
    steps: list[Step] | None = None,
) -> list[Passage]:
    """Serve requests to one model on its replicas until the last one is done.

    Args:
        capacities: the replicas; ties in routing go to the first.
        requests: in the order of their arrival.
        deadline_s: longest expected wait with which a request is still taken in: the TTFT of the model's SLO.
        expected_prompt_tokens: the mean of the plan.
        expected_output_tokens: likewise; it stands for what no request tells.
        first_hour: of the day, which begins with the trace.
        steps: a list that gets every step, in the order they begin on each replica.

    Returns:
        What became of each request, in the same order: refused (with a reason, and finished on arrival) or finished.
    """
    writers = [SteppedReplica(one, expected_output_tokens, steps) for one in capacities if one.role == "decode"]
    readers = [SteppedReplica(one, expected_output_tokens, steps) for one in capacities if one.role != "decode"]
    for reader, tokens in zip(readers, accepted_tokens(capacities), strict=True):
        reader.longest_tokens = tokens

    def hour(time_ps: int) -> int:
        return (first_hour + time_ps // PICOSECONDS_PER_HOUR) % HOURS

    passages = []
    for request in requests:
        passage = Passage(request=request, arrival_ps=arrival_ps(request), tokens=request.prompt_tokens)
        passages.append(passage)
        for replica in readers:
            replica.advance(passage.arrival_ps)
        chosen = _dispatch(passage, readers, hour(passage.arrival_ps), deadline_s, expected_prompt_tokens)
        if chosen:
            chosen.accept(passage)
        else:
            passage.finish_ps = passage.arrival_ps
    for replica in readers:
        replica.advance(math.inf)
    order = {id(passage): number for number, passage in enumerate(passages)}
    sent = [arriving for reader in readers for arriving in reader.sent]
    for at_ps, passage in sorted(sent, key=lambda arriving: (arriving[0], order[id(arriving[1])])):
        for replica in writers:
            replica.advance(at_ps)
        _writer(passage, writers, hour(at_ps)).take_over(passage, at_ps)
    for replica in writers:
        replica.advance(math.inf)
    assert all(passage.finish_ps != NEVER for passage in passages)  # noqa: S101 - see "There is no livelock"
    return passages


def accepted_tokens(capacities: Sequence[Capacity]) -> list[int]:
    """Return the longest request that each replica which reads may accept; a prefill replica has to pass it on."""
    writable = max(
        (one.longest_tokens for one in capacities if one.role == "decode" and one.tokens_per_s > 0), default=0
    )
    return [
        min(one.longest_tokens, writable) if one.role == "prefill" else one.longest_tokens
        for one in capacities
        if one.role != "decode"
    ]


def _writer(passage: Passage, writers: Sequence[SteppedReplica], hour: int) -> SteppedReplica:
    """Return the decode replica for a request that has been read."""
    tokens = passage.request.prompt_tokens + passage.request.output_tokens
    able = [one for one in writers if one.longest_tokens >= tokens and one.capacity.tokens_per_s > 0]
    able = [one for one in able if one.capacity.serves(hour)] or able
    return able[least_loaded([one.backlog_tokens for one in able], [one.capacity.tokens_per_s for one in able])]


def _dispatch(
    passage: Passage, replicas: Sequence[SteppedReplica], hour: int, deadline_s: float, expected_prompt_tokens: int
) -> SteppedReplica | None:
    """Return the replica for a request, or None and the reason with the request."""
    request_tokens = passage.request.prompt_tokens + passage.request.output_tokens
    candidates = [replica for replica in replicas if request_tokens <= replica.longest_tokens]
    if not candidates:
        longest_tokens = max((replica.longest_tokens for replica in replicas), default=0)
        passage.reason = too_long(request_tokens, longest_tokens)
        return None
    ready = [replica for replica in candidates if replica.capacity.serves(hour)]
    tokens_per_s = [replica.capacity.tokens_per_s if replica in ready else 0.0 for replica in candidates]
    retry_s = retry_after_s(
        sum([replica.unread_tokens for replica in ready]),
        math.fsum(replica.capacity.prefill_tokens_per_s for replica in ready),
        sum([replica.queued * (expected_prompt_tokens + replica.expected_output_tokens) for replica in ready]),
        math.fsum(tokens_per_s),
        deadline_s,
    )
    if retry_s > ADMIT:
        passage.retry_s = retry_s
        passage.reason = too_late(deadline_s, retry_s)
        return None
    chosen = least_loaded([replica.backlog_tokens for replica in candidates], tokens_per_s)
    if chosen == NOBODY:
        passage.reason = NOT_IN_SERVICE
        return None
    return candidates[chosen]
