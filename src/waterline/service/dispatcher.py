"""The decisions about the requests to one model: taken in or not, by which replica, whose turn it is.

No socket and no clock: what happens is told by calls, time comes in as an argument, and the answers are values or calls
of a request's `turn`. So a rehearsal can be fed the same events and must decide alike. What `policy` is shown:

- *backlog* of a replica: of each request its prompt and the expected output, until its first token; then the expected
  output, until it leaves.
- *work before the first token* of a newcomer, over all ready replicas: prompts not yet read, and an expected request
  for each one beyond the slots, because a slot must come free for it.

Engines are kept shallow: a replica gets `max_batch` requests at a time, the others wait here, first come, first served.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from waterline.plan import Replica
from waterline.policy.admission import ADMIT, retry_after_s
from waterline.policy.routing import NOBODY, least_loaded

Turn = Callable[[bool], None]  # True: go ahead; False: the replica is gone and there is no other


@dataclass(slots=True, kw_only=True, eq=False)
class Lane:
    """One replica, with what it has accepted."""

    replica: Replica
    ready: bool = False
    running: int = 0
    waiting: deque["Ticket"] = field(default_factory=deque)
    unread_tokens: int = 0  # of the prompts of requests without a first token
    backlog_tokens: int = 0
    share_s: float = 0.0  # time a request would have had that had run from the beginning, sharing it evenly
    settled_s: float = 0.0  # up to when that has been counted

    @property
    def tokens_per_s(self) -> float:
        return self.replica.tokens_per_s if self.ready else 0.0

    @property
    def queued(self) -> int:
        """Requests accepted beyond the slots."""
        return max(0, self.running + len(self.waiting) - self.replica.max_batch)

    def settle(self, now_s: float) -> None:
        """Count the time up to now; call it before `running` changes."""
        if self.running:
            self.share_s += (now_s - self.settled_s) / self.running
        self.settled_s = now_s


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """One request that was taken in, until it leaves."""

    prompt_tokens: int
    output_tokens: int  # expected
    turn: Turn
    lane: Lane
    running: bool = False
    unread: bool = True
    begun_share_s: float = 0.0
    gpu_s: float = 0.0  # its part of the time of the replicas that worked on it, times their GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request was not taken in."""

    retry_after_s: float
    replicas_ready: int  # 0: the model is starting, or has failed; else: the wait is too long


class Dispatcher:
    """The replicas of one model, and the one place where their queues change."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        expected_prompt_tokens: int,
        expected_output_tokens: int,
        deadline_s: float,
    ) -> None:
        self.lanes = [Lane(replica=replica) for replica in replicas]
        self.expected_tokens = expected_prompt_tokens + expected_output_tokens
        self.expected_output_tokens = expected_output_tokens
        self.deadline_s = deadline_s

    def expect(self, like: "Dispatcher") -> None:
        """Expect of requests from now on what another one does."""
        self.expected_tokens, self.expected_output_tokens = like.expected_tokens, like.expected_output_tokens
        self.deadline_s = like.deadline_s

    def add(self, replica: Replica) -> None:
        """A replica has come into being, and is not ready yet."""
        self.lanes.append(Lane(replica=replica))

    def update(self, replica: Replica) -> None:
        """A replica has other figures."""
        self._lane(replica.id).replica = replica

    def remove(self, replica_id: str) -> None:
        """A replica is gone; nobody waits for it or runs on it any more."""
        self.lanes.remove(self._lane(replica_id))

    def running(self, replica_id: str) -> int:
        return self._lane(replica_id).running

    def enter(
        self, prompt_tokens: int, most_tokens: int | None, turn: Turn, now_s: float, *, answers: int = 1
    ) -> Ticket | Refusal:
        """Decide about a newcomer. `most_tokens` is the limit of each of its answers, if any."""
        ready = [lane for lane in self.lanes if lane.ready]
        wait_s = retry_after_s(
            sum([lane.unread_tokens for lane in ready]),
            sum([lane.replica.prefill_tokens_per_s for lane in ready]),
            self.expected_tokens * sum([lane.queued for lane in ready]),
            sum([lane.tokens_per_s for lane in ready]),
            self.deadline_s,
        )
        chosen = self._choose()
        if wait_s > ADMIT or chosen == NOBODY:
            return Refusal(retry_after_s=wait_s, replicas_ready=len(ready))
        expected = self.expected_output_tokens
        ticket = Ticket(
            prompt_tokens=prompt_tokens,
            output_tokens=answers * (expected if most_tokens is None else min(most_tokens, expected)),
            turn=turn,
            lane=self.lanes[chosen],
        )
        self._join(ticket, now_s)
        return ticket

    def first_token(self, ticket: Ticket) -> None:
        """Its prompt has been read; told again, this changes nothing."""
        if ticket.unread:
            ticket.unread = False
            ticket.lane.unread_tokens -= ticket.prompt_tokens
            ticket.lane.backlog_tokens -= ticket.prompt_tokens

    def leave(self, ticket: Ticket, now_s: float) -> None:
        """A request has ended, in whatever way; its place goes to the next."""
        lane = ticket.lane
        lane.backlog_tokens -= ticket.output_tokens
        if ticket.unread:
            lane.unread_tokens -= ticket.prompt_tokens
            lane.backlog_tokens -= ticket.prompt_tokens
        if ticket.running:
            lane.settle(now_s)
            lane.running -= 1
            ticket.running = False
            ticket.gpu_s += (lane.share_s - ticket.begun_share_s) * lane.replica.layout.gpus
        else:
            lane.waiting.remove(ticket)
        self._advance(lane, now_s)

    def move(self, ticket: Ticket, turn: Turn, now_s: float) -> bool:
        """Send a request that its replica could not serve to another; False when none is ready.

        It goes to the front there, because it has waited before. When only its own replica is ready, it tries again.
        """
        chosen = self._choose(but=ticket.lane)
        if chosen == NOBODY:
            chosen = self._choose()
        if chosen == NOBODY:
            return False
        self.leave(ticket, now_s)
        ticket.lane, ticket.turn, ticket.unread = self.lanes[chosen], turn, True
        self._join(ticket, now_s, front=True)
        return True

    def set_ready(self, replica_id: str, *, ready: bool, now_s: float) -> None:
        """A replica has come up, or gone: who waits for it moves to the others, or is told that there is none."""
        lane = self._lane(replica_id)
        if ready:
            lane.ready = True
            self._advance(lane, now_s)
            return
        self.hold(replica_id, now_s)
        for ticket in tuple(lane.waiting):
            ticket.turn(False)  # noqa: FBT003 - a callback of one argument

    def hold(self, replica_id: str, now_s: float) -> None:
        """A replica is in doubt and gets no more work: who waits for it moves, or waits on when there is no other."""
        lane = self._lane(replica_id)
        lane.ready = False
        for ticket in reversed(tuple(lane.waiting)):  # each goes to the front
            self.move(ticket, ticket.turn, now_s)

    def _lane(self, replica_id: str) -> Lane:
        return next(lane for lane in self.lanes if lane.replica.id == replica_id)

    def _choose(self, but: Lane | None = None) -> int:
        return least_loaded(
            [lane.backlog_tokens for lane in self.lanes],
            [0.0 if lane is but else lane.tokens_per_s for lane in self.lanes],
        )

    def _join(self, ticket: Ticket, now_s: float, *, front: bool = False) -> None:
        lane = ticket.lane
        lane.unread_tokens += ticket.prompt_tokens
        lane.backlog_tokens += ticket.prompt_tokens + ticket.output_tokens
        if front:
            lane.waiting.appendleft(ticket)
        else:
            lane.waiting.append(ticket)
        self._advance(lane, now_s)

    def _advance(self, lane: Lane, now_s: float) -> None:
        while lane.ready and lane.waiting and lane.running < lane.replica.max_batch:
            ticket = lane.waiting.popleft()
            lane.settle(now_s)
            lane.running += 1
            ticket.running = True
            ticket.begun_share_s = lane.share_s
            ticket.turn(True)  # noqa: FBT003 - a callback of one argument
