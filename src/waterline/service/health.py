"""How well replicas serve, as real traffic shows: who is left out for a while, and what is usual of each.

A replica that fails requests is *ejected*: it gets no new work until a request of our own has been answered there,
which is tried after pauses that grow each time. At most half of a model's replicas are out at once: where all fail, the
fault is elsewhere. A client's own mistakes and an engine that is merely full count for nothing.

How long a silence may last follows from what the plan says of the replica and what it has shown since: nothing here is
a number of seconds that somebody has to know.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import structlog

from waterline.plan import Replica

IN_A_ROW = 3  # failures that eject
SILENT = 2  # failures that one counts for in which somebody waited in vain
OFTEN, OF_AT_LEAST = 0.5, 10.0  # … or this share of so many requests
REMEMBERED_S = 10.0  # of failures and successes, all but 1/e fades in this time
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
LEARNT = 0.1  # weight of one more measurement

# A silence is one when it is so many times as long as what is usual, and longer than a machine may take a break
# (collecting garbage, moving pages). Too short costs a prompt read twice, and nobody sees it; too long, a client waits.
USUAL_FIRST = 8.0
USUAL_NEXT = 25.0
BREAK_S = 1.0

log = structlog.get_logger()


@dataclass(slots=True, kw_only=True, eq=False)
class Vitals:
    """What one replica has shown."""

    replica: Replica
    ttft_s: float = 0.0  # usual, as measured; 0 before anything was
    tpot_s: float = 0.0
    heard_s: float = -math.inf  # when any of its streams last said something
    unread_tokens: int = 0  # of prompts that are under way and have no answer yet
    in_a_row: int = 0  # failures
    failures: float = 0.0  # that have not faded
    requests: float = 0.0
    faded_s: float = 0.0
    ejected: bool = False
    pause_s: float = field(default=FIRST_PAUSE_S)
    on_trial: bool = False  # back after an ejection, and nothing served since
    mute_s: float = 0.0  # time in which requests waited here in vain that others answered, since it last spoke …
    mute_until_s: float = -math.inf  # … up to when that has been counted

    @property
    def reading_s(self) -> float:
        """How long it takes to read the prompts that are under way."""
        return self.unread_tokens / max(1.0, self.replica.prefill_tokens_per_s)

    @property
    def first_within_s(self) -> float:
        """How long the first token of a request may take that is under way."""
        return BREAK_S + USUAL_FIRST * max(self.replica.ttft_s, self.ttft_s, self.reading_s)

    @property
    def next_within_s(self) -> float:
        """How long the next token may take; prompts may be read in between."""
        return BREAK_S + USUAL_NEXT * max(self.replica.tpot_s, self.tpot_s) + self.reading_s

    def whole_within_s(self, tokens: int) -> float:
        """How long an answer may take that comes whole and has at most so many tokens."""
        return self.first_within_s + USUAL_FIRST * tokens * max(self.replica.tpot_s, self.tpot_s)

    def took(self, ttft_s: float, tpot_s: float) -> None:
        """Learn from a stream that went well; NaN where there is nothing to learn."""
        if not math.isnan(ttft_s):
            self.ttft_s += (ttft_s - self.ttft_s) * (LEARNT if self.ttft_s else 1.0)
        if not math.isnan(tpot_s):
            self.tpot_s += (tpot_s - self.tpot_s) * (LEARNT if self.tpot_s else 1.0)


class Health:
    """The replicas as their traffic shows them.

    Args:
        replicas_of: returns the ids of those that do what a replica does, itself among them.
        on_doubt: told that a replica is ejected, or back.
        probe: asks a replica something, and says whether it has answered.
        clock, sleep: of the event loop, or of a test.
    """

    def __init__(
        self,
        replicas_of: Callable[[Replica], Iterable[str]],
        on_doubt: Callable[[str, bool], None],
        probe: Callable[[Replica], Awaitable[bool]],
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._replicas_of = replicas_of
        self._on_doubt = on_doubt
        self._probe = probe
        self._clock = clock
        self._sleep = sleep
        self._vitals: dict[str, Vitals] = {}
        self._trials: dict[str, asyncio.Task[None]] = {}

    def of(self, replica: Replica) -> Vitals:
        vitals = self._vitals.get(replica.id)
        if vitals is None:
            vitals = self._vitals[replica.id] = Vitals(replica=replica, faded_s=self._clock())
        return vitals

    def served(self, replica: Replica) -> None:
        vitals = self._faded(replica)
        vitals.requests += 1.0
        vitals.in_a_row, vitals.mute_s = 0, 0.0
        if vitals.on_trial:
            vitals.on_trial, vitals.pause_s = False, FIRST_PAUSE_S

    def failed(self, replica: Replica, *, silent: bool = False) -> None:
        """Count a failure of its own, not of the request's."""
        vitals = self._faded(replica)
        vitals.requests += 1.0
        vitals.failures += 1.0
        vitals.in_a_row += SILENT if silent else 1
        often = vitals.requests >= OF_AT_LEAST and vitals.failures >= OFTEN * vitals.requests
        if (often or vitals.on_trial or vitals.in_a_row >= IN_A_ROW) and not vitals.ejected:
            self._eject(vitals)

    def was_beaten(self, replica: Replica, since_s: float, now_s: float) -> None:
        """Count that it said nothing to a request since then, until another answered; times as of `Vitals.heard_s`.

        That is no failure; but where it says nothing to anybody, it falls silent, though nobody waits for so long.
        """
        vitals = self.of(replica)
        if vitals.heard_s > vitals.mute_until_s:
            vitals.mute_s = 0.0
        vitals.mute_s += max(0.0, now_s - max(since_s, vitals.heard_s, vitals.mute_until_s))
        vitals.mute_until_s = now_s
        if vitals.mute_s > vitals.first_within_s:
            vitals.mute_s = 0.0
            self.failed(replica, silent=True)

    def forget(self, replica_id: str) -> None:
        """A replica has gone or begun anew: what it was like before counts for nothing."""
        if trial := self._trials.pop(replica_id, None):
            trial.cancel()
        if (vitals := self._vitals.pop(replica_id, None)) and vitals.ejected:
            self._on_doubt(replica_id, False)  # noqa: FBT003 - a callback

    def close(self) -> None:
        """Try nobody any more."""
        for trial in self._trials.values():
            trial.cancel()
        self._trials.clear()

    def _faded(self, replica: Replica) -> Vitals:
        vitals, now_s = self.of(replica), self._clock()
        left = math.exp((vitals.faded_s - now_s) / REMEMBERED_S)
        vitals.failures, vitals.requests, vitals.faded_s = vitals.failures * left, vitals.requests * left, now_s
        return vitals

    def _eject(self, vitals: Vitals) -> None:
        replica = vitals.replica
        all_ids = list(self._replicas_of(replica))
        out = sum(id_ in self._vitals and self._vitals[id_].ejected for id_ in all_ids)
        if 2 * (out + 1) > len(all_ids):
            return
        vitals.ejected = True
        log.warning("replica", status="ejected", id=replica.id, again_in_s=vitals.pause_s)
        self._on_doubt(replica.id, True)  # noqa: FBT003 - a callback
        self._trials[replica.id] = asyncio.get_running_loop().create_task(self._try_again(vitals))

    async def _try_again(self, vitals: Vitals) -> None:
        while True:
            await self._sleep(vitals.pause_s)
            vitals.pause_s = min(2.0 * vitals.pause_s, LONGEST_PAUSE_S)
            if await self._probe(vitals.replica):
                break
        vitals.ejected, vitals.on_trial, vitals.in_a_row = False, True, 0
        vitals.failures = vitals.requests = 0.0
        del self._trials[vitals.replica.id]
        log.info("replica", status="back", id=vitals.replica.id)
        self._on_doubt(vitals.replica.id, False)  # noqa: FBT003 - a callback
