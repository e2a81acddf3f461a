"""What the desk keeps of replicas, models and requests: lanes, services and tickets.

Records that do what one of them can alone; whatever concerns several, or asks the policy, is the dispatcher's.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from waterline.plan import ModelPlan, Replica
from waterline.service.rows import Clients, Rows
from waterline.units import HOUR_S

Turn = Callable[[bool], None]  # True: go ahead; False: there is no replica left to wait for


@dataclass(slots=True, kw_only=True, eq=False)
class Lane:
    """One replica, with what it works on."""

    replica: Replica
    row: int
    rows: Rows = field(repr=False)
    up: bool = False  # its engine answers
    held: bool = False  # it drains, or did not answer lately: it gets nothing, but is not given up
    drains: bool = False  # for that reason: nobody waits for it
    doubted: bool = False  # likewise, because it failed requests
    back_s: float = math.inf  # when it should be up again, while it is neither
    ready: bool = False  # it gets work
    running: int = 0
    keeping: int = 0  # caches of prompts it has read, which others fetch
    share_s: float = 0.0  # time a request would have had that had run from the beginning, sharing it evenly
    settled_s: float = 0.0  # up to when that has been counted

    @property
    def backlog_tokens(self) -> int:
        return int(self.rows.desk.replicas.backlog_tokens[self.row])

    @property
    def there_s(self) -> float:
        """Since when it is there for requests, or when it should be; infinite: nobody knows."""
        return -math.inf if self.up or (self.held and not self.drains) else self.back_s

    @property
    def writes_only(self) -> bool:
        """Whether it takes requests over from those that read prompts, and gets none else."""
        return self.replica.role == "decode"

    def said(self, status: str) -> str:
        """Return how it is in a word, given how its engine is: a ready one may get no work all the same."""
        if status != "ready":
            return status
        return "draining" if self.drains else "ejected" if self.doubted else status

    def settle(self, now_s: float) -> None:
        """Count the time up to now; call it before `running` changes."""
        if self.running:
            self.share_s += (now_s - self.settled_s) / self.running
        self.settled_s = now_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Coming:
    """A replica that is to be started when others have made room for it."""

    replica: Replica
    there_s: float  # when it should be ready


@dataclass(slots=True, kw_only=True)
class Service:
    """One model."""

    row: int
    planned: ModelPlan
    ttft_s: float
    hedge_after_s: float | None = None  # without a first token, as its owner says; None: never
    lanes: list[Lane] = field(default_factory=list)
    coming: list[Coming] = field(default_factory=list)  # besides these
    max_context_tokens: int = 0  # of the replica that takes most, in service or not
    gpu_s_per_prompt_token: float = 0.0  # when all its replicas are full …
    gpu_s_per_output_token: float = 0.0  # … likewise; the same, unless prompts are read apart
    usd_per_gpu_s: float = 0.0
    lines: dict[int, deque["Ticket"]] = field(default_factory=dict)  # by client; those in which somebody waits
    returned: list["Ticket"] = field(default_factory=list)  # of these, who has begun before and goes first
    hedged: list["Ticket"] = field(default_factory=list)  # who has a second replica

    @property
    def waiting(self) -> int:
        return sum(map(len, self.lines.values()))

    @property
    def running(self) -> int:
        return sum(lane.running for lane in self.lanes)

    @property
    def ready(self) -> int:
        """How many replicas take requests; none where nobody is left to read, or nobody to write."""
        roles = [lane.replica.role for lane in self.lanes if lane.ready]
        return len(roles) if _are_whole(roles) else 0

    @property
    def expected(self) -> "list[Lane | Coming]":
        """Who is there, or may come."""
        return [*self.lanes, *self.coming]

    @property
    def has_hope(self) -> bool:
        """Whether who waits waits for somebody that is there: who reads, and who writes."""
        return self.there_s == -math.inf

    @property
    def there_s(self) -> float:
        """Since when, or from when on, somebody reads and somebody writes, as far as is known."""

        def first_s(role: str) -> float:
            return min((one.there_s for one in self.expected if one.replica.role == role), default=math.inf)

        return min(first_s("both"), max(first_s("prefill"), first_s("decode")))

    def ready_in_s(self, now_s: float) -> float:
        """Return when it should answer, infinite where nobody knows; what is late is taken to need as long again."""
        return 0.0 if self.has_hope else abs(self.there_s - now_s)

    def cost_gpu_s(self, prompt_tokens: int, output_tokens: int) -> float:
        """Return the GPU time that tokens cost, whatever else runs beside them."""
        return prompt_tokens * self.gpu_s_per_prompt_token + output_tokens * self.gpu_s_per_output_token

    def recount(self) -> None:
        """Sum up; called when a replica has come or gone. What is left of a model without any stays as it was."""
        if replicas := [lane.replica for lane in self.lanes]:
            gpus = sum(replica.layout.gpus for replica in replicas)
            self.max_context_tokens = max(replica.max_context_tokens for replica in replicas)
            if readers := [replica for replica in replicas if replica.role != "decode"]:
                self.gpu_s_per_prompt_token = _gpu_s_per_token(readers)
            if writers := [replica for replica in replicas if replica.role != "prefill"]:
                self.gpu_s_per_output_token = _gpu_s_per_token(writers)
            self.usd_per_gpu_s = sum(replica.usd_per_hour for replica in replicas) / gpus / HOUR_S


@dataclass(slots=True, kw_only=True, eq=False)
class Second:
    """The second replica of a request, until one of the two has spoken."""

    lane: Lane
    unread_tokens: int
    begun_share_s: float
    on_lost: Callable[[float], None]  # told when somebody else gets the place, and the GPU time that was for nothing
    unread: bool = True


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """One request that was taken in, until it leaves."""

    service: Service
    client: int  # its row
    clients: Clients  # among whom it has it
    tenant: str
    line: str
    prompt_tokens: int
    output_tokens: int  # expected, of all its answers
    tokens: int  # it may come to; at most what a replica holds
    blocks: NDArray[np.int64]
    arrival_s: float
    until_s: float  # it waits, when those who go first keep coming
    turn: Turn
    again_s: float | None = None  # after which it was told to try again, once it has waited until then
    id: str = ""  # by which the decision log knows it
    cost_gpu_s: float = 0.0  # expected, and charged while it runs
    lane: Lane | None = None  # where it runs, or ran last
    running: bool = False
    second: Second | None = None  # where it runs as well
    writer: Lane | None = None  # who takes it over, while its prompt is read elsewhere
    keeper: Lane | None = None  # who has read its prompt and keeps the cache, until it is fetched
    was_read: bool = False
    read_gpu_s: float = 0.0  # what that has taken
    unread: bool = False
    unread_tokens: int = 0
    avoids: frozenset[str] = frozenset()  # replicas where it failed
    begun_share_s: float = 0.0
    gpu_s: float = 0.0  # its part of the time of the replicas that worked on it, times their GPUs
    start_s: float = math.nan  # where it runs, or ran last

    @property
    def has_begun(self) -> bool:
        """Whether a replica has ever had it."""
        return not math.isnan(self.start_s)

    def waited_s(self, now_s: float) -> float:
        return now_s - self.arrival_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request was not taken in: a key of `decisions.RULES`."""

    rule: int
    retry_after_s: float


def most_tokens(replica: Replica) -> int:
    return min(replica.max_context_tokens, replica.cache_tokens)


def _are_whole(roles: Iterable[str]) -> bool:
    """Whether replicas of these roles answer requests together."""
    known = set(roles)
    return "both" in known or known == {"prefill", "decode"}


def works_per_s(replica: Replica) -> float:
    """Return the rate at which it does all its work; of one that reads prompts only, that is reading."""
    return replica.prefill_tokens_per_s if replica.role == "prefill" else replica.tokens_per_s


def reads_per_s(replica: Replica) -> float:
    """Return the rate at which it reads prompts; who only writes has none to read, at any rate."""
    return replica.tokens_per_s if replica.role == "decode" else replica.prefill_tokens_per_s


def _gpu_s_per_token(replicas: Sequence[Replica]) -> float:
    return sum(replica.layout.gpus for replica in replicas) / sum(map(works_per_s, replicas))
