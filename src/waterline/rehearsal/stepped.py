"""One replica of the oracle, step by step; `oracle` says what its steps do, and in which order."""

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import Protocol

from waterline.cost.step import prefill_pairs
from waterline.policy.routing import NOBODY
from waterline.rehearsal.capacity import NEVER, Ask, Capacity


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

    number: int  # in the order of arrival
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
    losses: list[tuple[int, int, int]] = field(default_factory=list)  # a replica, what it spent, when that was lost
    restarts: int = 0
    found_tokens: int = 0  # of its prompt, in the cache when it was read
    placed: list[tuple[int, ...]] = field(default_factory=list)  # when, the rule, the replica, and `decisions.REASONS`
    left: bool = False  # its client has gone before it had all its tokens, or before it started


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


class Told(Protocol):
    """Who is told what becomes of requests: the fleet."""

    def has_read(self, replica: "SteppedReplica", passage: Passage) -> None:
        """A prompt has been read."""

    def has_ended(self, replica: "SteppedReplica", passage: Passage) -> None:
        """A request has all its tokens, or its client has left."""

    def is_sent(self, replica: "SteppedReplica", passage: Passage) -> None:
        """A prompt has been read, and the answer is written elsewhere."""


class SteppedReplica:
    """One replica, and the one place where its state changes."""

    def __init__(
        self, index: int, capacity: Capacity, block_tokens: int, fleet: Told, steps: list[Step] | None = None
    ) -> None:
        self.index, self.capacity, self.fleet, self.steps = index, capacity, fleet, steps
        self.alive = False  # from when it is ready until it fails
        self.free_tokens = capacity.cache_tokens
        self.prefixes = PrefixCache(block_tokens)
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
        """Return whether somebody is here no longer."""
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
        return self.drop_left(self.end_ps) or not all(stay)

    def drop_left(self, now_ps: int) -> bool:
        """Between two steps, let those go whose clients have left; return whether there were any."""
        gone = [passage for passage in (*self.decoding, *self.reading, *self.waiting) if passage.left]
        for passage in gone:
            if passage.unread_tokens != NEVER:
                self.fleet.has_read(self, passage)
            if passage not in self.waiting:
                self.prefixes.let_go(passage.ask)
                self.free_tokens += passage.tokens + (passage in self.reading)
            passage.finish_ps = now_ps
            self.fleet.has_ended(self, passage)
        self.decoding = [passage for passage in self.decoding if not passage.left]
        self.reading = [passage for passage in self.reading if not passage.left]
        self.waiting = deque(passage for passage in self.waiting if not passage.left)
        return bool(gone)

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
        elif self.capacity.role == "prefill" and not passage.left:
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
