"""The way of one request to an engine and back: who is asked next when an engine fails, and what the client sees.

The client sees one answer. An engine that fails before anything was said is a reason to ask another; one that fails in
the middle of a stream, to have another go on from there (`continuation`). A failure is whatever keeps an answer from
going on: no connection, a 5xx, an answer of the wrong kind, an event that nobody can read or that tells of an error, an
end before the end, and silence (`silence`).

What decides about places is elsewhere and shows itself here as a `Placement`; nobody here knows of queues or shares.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from waterline.plan import Replica
from waterline.service.asgi import Reply
from waterline.service.asking import PATIENCE_S, Asker, Passage
from waterline.service.continuation import RefusedError, ended, missing_reason, missing_usage
from waterline.service.counts import Counts
from waterline.service.errors import RejectedError
from waterline.service.events import DONE
from waterline.service.health import Health
from waterline.service.hedge import Race
from waterline.service.response_resume import Written, as_rest_of
from waterline.service.responses import RESPONSES
from waterline.service.said import Said
from waterline.service.upstream import BrokenStreamError, UnansweredError

ATTEMPTS = 3  # engines that may fail a request, one after the other without a token, before its client is told
DEATHS = 6  # … and engines that may die with it: each may be its doing, but rather that of one of many
PAUSE_S = 0.05  # before somebody is asked again who was full, or away; doubled each time
LONGEST_PAUSE_S = 1.0
ALIVE = ("ready", "suspect", "draining")


@dataclass(slots=True, kw_only=True, eq=False)
class Failures:
    """What one request has met on its way, since the last token."""

    until_s: float  # when nobody waits any longer for an engine that is full, or away
    avoid: set[str] = field(default_factory=set)  # replicas that failed it
    accused: list[Replica] = field(default_factory=list)  # of failing it; or it is one that fails everybody
    fruitless: list[tuple[str, int | None]] = field(default_factory=list)  # replicas that count, by their process
    pause_s: float = PAUSE_S


class Passages:
    """All requests on their way to the engines.

    Args:
        asker: of the engines.
        replicas_of: returns the ids of those that do what a replica does, itself among them.
        now_s: the time since the service started.
    """

    def __init__(
        self, asker: Asker, *, replicas_of: Callable[[Replica], Iterable[str]], now_s: Callable[[], float]
    ) -> None:
        self.asker = asker
        self.health = asker.health
        self._replicas_of = replicas_of
        self._now_s = now_s

    async def carry(self, passage: Passage, reply: Reply) -> None:
        """Wait for a place and relay the answer, from as many engines as it takes.

        Raises:
            RejectedError: an engine has refused the request, nobody answers it (UnansweredError), or there is no place.
            BrokenStreamError: its engine broke off after the client got a part of the answer, and nobody can go on.
        """
        failures = Failures(until_s=self._now_s() + passage.patience_s)
        while True:
            passage.at = await passage.place.replica(passage.waits_s(reply))
            said, passage.pid, passage.handover = passage.said.pieces, self.asker.pid(passage.at.id), None
            try:
                await self._go(passage, failures, reply, last=len(failures.fruitless) >= ATTEMPTS - 1)
            except UnansweredError as error:
                if passage.said.pieces > said:
                    failures = Failures(until_s=self._now_s() + PATIENCE_S, accused=failures.accused)
                await self._bear(error, failures, *self._at_fault(passage), reply)
                if reply.begun and passage.endpoint == RESPONSES:
                    _go_on_as_chat(passage, reply, error)
                if reply.begun and await _end_alone(passage, reply):
                    break
                passage.place.move(frozenset(failures.avoid) | _asked_with_it(passage))
            except (RefusedError, RejectedError) as why:
                _bear_refusal(passage, why, reply)
            else:
                self.health.served(passage.at)
                break
        for other in failures.accused:  # somebody could answer: so it was not the request
            self.health.failed(other)

    async def _bear(
        self, error: UnansweredError, failures: "Failures", replica: Replica, pid: int | None, reply: Reply
    ) -> None:
        """Take a failure into account. Raises it when it was one too many, for the client to see."""
        self._blame(error, failures, replica, pid)
        others = set(self._replicas_of(replica)) - failures.avoid
        untried = any(self.asker.status(other) == "ready" for other in others)
        if not untried:
            failures.avoid = {replica.id}  # another round
        if error.busy or error.absent:  # that costs nobody anything: it is tried again as long as there is time
            if untried:
                return
            if self._now_s() + failures.pause_s > failures.until_s:
                raise BrokenStreamError(str(error)) if reply.begun else error
            await asyncio.sleep(failures.pause_s)
            failures.pause_s = min(2.0 * failures.pause_s, LONGEST_PAUSE_S)
            return
        died = sum(not self._lives(id_, known) for id_, known in failures.fruitless)
        if len(failures.fruitless) - died >= ATTEMPTS or died >= DEATHS:
            raise BrokenStreamError(str(error)) if reply.begun else error

    def _blame(self, error: UnansweredError, failures: Failures, replica: Replica, pid: int | None) -> None:
        """Note that a replica has failed a request."""
        failures.avoid.add(replica.id)
        if not error.certain:
            failures.accused += [replica] * (not error.busy)
        elif self.asker.status(replica.id) in ALIVE:  # else its death is known, and nobody's news
            self.health.failed(replica, silent=error.silent)
        if not (error.busy or error.absent):
            failures.fruitless.append((replica.id, pid))

    async def _go(self, passage: Passage, failures: Failures, reply: Reply, *, last: bool) -> None:
        """Have it answered where it is, or read there and answered elsewhere; then it is there."""
        try:
            if passage.hedge_after_s is None or reply.begun or passage.at.role != "both":
                await self.asker.ask(passage, passage.at, reply, last=last)
            else:
                await self._hedged(passage, passage.hedge_after_s, failures, reply, last=last)
            if handover := passage.handover:
                self.health.served(passage.at)
                passage.at = handover.writer or await passage.place.writer(passage.waits_s(reply))
                passage.pid = self.asker.pid(passage.at.id)
                await self.asker.ask(passage, passage.at, reply, last=last)
        finally:
            if passage.handover:
                passage.handover.close()

    async def _hedged(self, passage: Passage, after_s: float, failures: Failures, reply: Reply, *, last: bool) -> None:
        """Have it answered where it is, or where it is sent as well when no token comes for so long."""
        pair = _Pair(passage, lambda one, error: self._blame(error, failures, one.at, one.pid), self.health)

        def ask_second(second: Replica) -> Coroutine[Any, Any, None]:
            rival = pair.begin(second, self.asker.pid(second.id))
            return self.asker.ask(rival, second, reply, last=last)

        race = passage.race = pair.rival.race = Race(passage.place, pair)
        try:
            await race.run(self.asker.ask(passage, passage.at, reply, last=last), after_s, ask_second)
        finally:
            passage.race = None

    def _at_fault(self, passage: Passage) -> tuple[Replica, int | None]:
        """Return who has failed a request, and its process: where it is, unless the cache it needs is gone."""
        handover = passage.handover
        if handover and passage.at != handover.reader and not self._lives(handover.reader.id, handover.reader_pid):
            return handover.reader, handover.reader_pid
        return passage.at, passage.pid

    def _lives(self, replica_id: str, pid: int | None) -> bool:
        """Whether a replica is there, and is the process that it was."""
        return self.asker.pid(replica_id) == pid and self.asker.status(replica_id) in ALIVE


def _bear_refusal(passage: Passage, why: RefusedError | RejectedError, reply: Reply) -> None:
    """Have it asked in another way to go on, where it was the way that was refused. Raises what the client sees."""
    if not reply.begun:
        raise why
    if isinstance(why, RefusedError) or passage.said.refusal:
        raise BrokenStreamError(f"The engine broke off, and nobody can go on: {why}") from why
    passage.said.refusal = f"the next one refuses to: {str(why).rstrip('.')}"
    passage.place.move(frozenset())


class _Pair:
    """A request at its first engine, and the same at its second; a `hedge.Listener`.

    Args:
        passage: at the first; it goes on with what the one that speaks has said.
        blame: notes that one of the two has failed.
        health: of the replicas.
    """

    def __init__(self, passage: Passage, blame: Callable[[Passage, UnansweredError], None], health: Health) -> None:
        self.passage = passage
        self.rival = replace(passage, said=Said(), written=Written())
        self._blame = blame
        self._health = health
        self._begun_s = (_now_s(), _now_s())

    def begin(self, second: Replica, pid: int | None) -> Passage:
        """Return the request as its second engine is asked."""
        self.passage.hedge_after_s = None  # once is enough
        self.rival.at, self.rival.pid = second, pid
        self._begun_s = self._begun_s[0], _now_s()
        return self.rival

    def goes_second(self) -> None:
        self.passage.at, self.passage.pid = self.rival.at, self.rival.pid
        self.passage.said, self.passage.written = self.rival.said, self.rival.written

    def failed(self, error: UnansweredError, *, second: bool) -> None:
        self._blame(self.rival if second else self.passage, error)

    def was_beaten(self, *, second: bool) -> None:
        beaten = self.rival if second else self.passage
        self._health.was_beaten(beaten.at, self._begun_s[second], _now_s())


def _asked_with_it(passage: Passage) -> frozenset[str]:
    """Return who was asked at once with the one that failed: which of them it was, is not always to be seen."""
    writer = passage.handover.writer if passage.handover else None
    return frozenset({writer.id}) if writer else frozenset()


def _go_on_as_chat(passage: Passage, reply: Reply, error: UnansweredError) -> None:
    """Have the rest of a response made of a chat. Raises BrokenStreamError where that cannot be."""
    try:
        passage.asked, passage.said, reply.edit = as_rest_of(passage.written, passage.asked.body)
    except (RefusedError, RejectedError) as why:
        raise BrokenStreamError(f"{error} No other can go on with its response: {why}") from error
    passage.path = f"/v1{passage.asked.endpoint}"


async def _end_alone(passage: Passage, reply: Reply) -> bool:
    """End a stream that lacks its end only; False when it lacks more, or somebody has to be asked for the usage."""
    asked, said = passage.asked, passage.said
    if not ended(asked, said):
        return False
    if reason := missing_reason(said):
        await reply.chunk(reason)
    if asked.include_usage and not said.usage and said.prompt_ids is None:
        return False
    await reply.chunk(missing_usage(said))
    prompt_tokens = len(said.prompt_ids) if said.prompt_ids else passage.progress.prompt_tokens or asked.prompt_tokens
    passage.progress.told(Counts(prompt=prompt_tokens, output=said.tokens))
    passage.progress.done = True
    await reply.end(DONE)
    return True


def _now_s() -> float:
    return asyncio.get_running_loop().time()
