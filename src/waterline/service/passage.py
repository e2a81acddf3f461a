"""The way of one request to an engine and back: who is asked next when an engine fails, and what the client sees.

The client sees one answer. An engine that fails before anything was said is a reason to ask another; one that fails in
the middle of a stream, to have another go on from there (`continuation`). A failure is whatever keeps an answer from
going on: no connection, a 5xx, an answer of the wrong kind, an event that nobody can read or that tells of an error, an
end before the end, and silence (`silence`).

What decides about places is elsewhere and shows itself here as a `Placement`; nobody here knows of queues or shares.
"""

import asyncio
import math
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import orjson

from waterline.plan import Replica
from waterline.service.asgi import Headers, Reply
from waterline.service.body import COMPLETIONS, Asked
from waterline.service.connections import Connections, Response
from waterline.service.continuation import RefusedError, ended, missing_reason, missing_usage, resume, wishes
from waterline.service.counts import Counts
from waterline.service.engines import Engine
from waterline.service.engines.dialect import AT_ONCE
from waterline.service.errors import RejectedError
from waterline.service.events import DONE, BadEventError
from waterline.service.health import Health
from waterline.service.hedge import Race
from waterline.service.pairs import Handover, Pairs, Wanted, discreet, trial
from waterline.service.response_relay import Relay
from waterline.service.response_resume import Written, as_rest_of
from waterline.service.responses import RESPONSES
from waterline.service.said import Said
from waterline.service.silence import Watch, Watches
from waterline.service.stream import Stream
from waterline.service.supervisor import ReplicaState
from waterline.service.upstream import BrokenStreamError, Progress, UnansweredError, ask, passed_back, read_whole

ATTEMPTS = 3  # engines that may fail a request, one after the other without a token, before its client is told
DEATHS = 6  # … and engines that may die with it: each may be its doing, but rather that of one of many
PATIENCE_S = 30.0  # for a place where a stream goes on, while no replica is in service
PAUSE_S = 0.05  # before somebody is asked again who was full, or away; doubled each time
LONGEST_PAUSE_S = 1.0
LAST_BYTES_WITHIN_S = 0.2  # of a stream that is done
WAITS_LONGER = 4.0  # times, after each silence: perhaps it is the request that takes long
ABORT_WITHIN_S = 1.0
NEVER_S = 1e6
ALIVE = ("ready", "suspect", "draining")


class Placement(Protocol):
    """The place of one request among the replicas of its model."""

    async def replica(self, within_s: float) -> Replica:
        """Wait for its turn and return where it may go.

        While no replica of the model is in service it waits no longer than `within_s`; then RejectedError.
        """
        ...

    async def writer(self, within_s: float) -> Replica:
        """Return where the answer is written to a prompt that is read where it is now; wait for somebody so long.

        Raises RejectedError when there was nobody in that time.
        """
        ...

    def has_read(self) -> None:
        """Its prompt has been read there; where it is written, `first_token` says that its cache has been fetched."""
        ...

    def move(self, avoid: frozenset[str]) -> None:
        """Give its place up for one elsewhere, at the front, and not at these replicas while there is another."""
        ...

    def first_token(self) -> None:
        """Its prompt has been read; told again, this changes nothing."""
        ...

    def second(self, give_up: Callable[[], None]) -> Replica | None:
        """Take a second replica, where one has a slot to spare.

        `give_up` is called when others come to need it; it calls `drop_second`.
        """
        ...

    def take_second(self) -> None:
        """Be there alone from now on."""
        ...

    def drop_second(self) -> None:
        """Be where it was before alone; it may have been given up."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Passage:
    """One request that was taken in, on its way."""

    asked: Asked
    path: str  # with /v1
    headers: Headers  # the client's
    place: Placement
    patience_s: float  # for a place, while no replica is in service and nothing was said
    progress: Progress = field(default_factory=Progress)
    said: Said = field(default_factory=Said)
    written: Written = field(default_factory=Written)  # of a response that an engine makes itself
    silences: int = 0  # engines that let it wait in vain
    at: Replica = field(init=False)  # where it is
    pid: int | None = None  # … and the process of that
    handover: Handover | None = None  # from who reads its prompt, where another writes the answer
    hedge_after_s: float | None = None  # without a first token, a second engine is asked; None: never, or no more
    race: Race | None = None  # of the two

    @property
    def endpoint(self) -> str:
        return self.path.removeprefix("/v1")


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
        engines: of the replicas by id.
        states: of the replicas by id; somebody else keeps them up to date, and calls `cut` for one that is gone.
        connections: to the engines.
        replicas_of: returns the ids of those that do what a replica does, itself among them.
        on_doubt: told that a replica should get no new work, or may get it again.
        now_s: the time since the service started.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        states: Mapping[str, ReplicaState],
        connections: Connections,
        *,
        replicas_of: Callable[[Replica], Iterable[str]],
        on_doubt: Callable[[str, bool], None],
        now_s: Callable[[], float],
    ) -> None:
        self._engines = engines
        self._states = states
        self._connections = connections
        self._replicas_of = replicas_of
        self._now_s = now_s
        self.health = Health(replicas_of, on_doubt, self._probe, clock=now_s)
        self._watches = Watches(self._has_others)
        self._pairs = Pairs(engines, states, self._post)
        self._chores: set[asyncio.Task[None]] = set()

    def make_responses(self, replicas: Iterable[Replica]) -> bool:
        """Whether all these replicas make OpenAI's responses themselves; no two of them do so together."""
        known = list(replicas)
        return bool(known) and all(one.role == "both" and self._engines[one.id].dialect.responses for one in known)

    def cut(self, replica_id: str) -> None:
        """End what is under way on a replica that is gone, as if it had broken off."""
        self.health.forget(replica_id)
        self._watches.cut(replica_id)

    def forget(self, replica_id: str) -> None:
        """A replica is gone for good, and nobody is on it any more."""
        self.health.forget(replica_id)
        self._watches.forget(replica_id)

    def close(self) -> None:
        """Stop watching; what is under way is left to whoever carries it."""
        self.health.close()
        for chore in self._chores:
            chore.cancel()
        self._watches.close()

    async def carry(self, passage: Passage, reply: Reply) -> None:
        """Wait for a place and relay the answer, from as many engines as it takes.

        Raises:
            RejectedError: an engine has refused the request, nobody answers it (UnansweredError), or there is no place.
            BrokenStreamError: its engine broke off after the client got a part of the answer, and nobody can go on.
        """
        failures = Failures(until_s=self._now_s() + passage.patience_s)
        while True:
            passage.at = await passage.place.replica(_patience_s(passage, reply))
            said, passage.pid, passage.handover = passage.said.pieces, self._pid(passage.at.id), None
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
        untried = any(self._status(other) == "ready" for other in others)
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
        died = sum(self._pid(id_) != known or self._status(id_) not in ALIVE for id_, known in failures.fruitless)
        if len(failures.fruitless) - died >= ATTEMPTS or died >= DEATHS:
            raise BrokenStreamError(str(error)) if reply.begun else error

    def _blame(self, error: UnansweredError, failures: Failures, replica: Replica, pid: int | None) -> None:
        """Note that a replica has failed a request."""
        failures.avoid.add(replica.id)
        if not error.certain:
            failures.accused += [replica] * (not error.busy)
        elif self._status(replica.id) in ALIVE:  # else its death is known, and nobody's news
            self.health.failed(replica, silent=error.silent)
        if not (error.busy or error.absent):
            failures.fruitless.append((replica.id, pid))

    async def _go(self, passage: Passage, failures: Failures, reply: Reply, *, last: bool) -> None:
        """Have it answered where it is, or read there and answered elsewhere; then it is there."""
        try:
            if passage.hedge_after_s is None or reply.begun or passage.at.role != "both":
                await self._ask(passage, passage.at, reply, last=last)
            else:
                await self._hedged(passage, passage.hedge_after_s, failures, reply, last=last)
            if handover := passage.handover:
                self.health.served(passage.at)
                passage.at = handover.writer or await passage.place.writer(_patience_s(passage, reply))
                passage.pid = self._pid(passage.at.id)
                await self._ask(passage, passage.at, reply, last=last)
        finally:
            if passage.handover:
                passage.handover.close()

    async def _hedged(self, passage: Passage, after_s: float, failures: Failures, reply: Reply, *, last: bool) -> None:
        """Have it answered where it is, or where it is sent as well when no token comes for so long."""
        rival = replace(passage, said=Said(), written=Written())  # what is said goes to the one that says it

        def ask_second(second: Replica) -> Coroutine[Any, Any, None]:
            passage.hedge_after_s = None  # once is enough
            rival.at, rival.pid = second, self._pid(second.id)
            return self._ask(rival, second, reply, last=last)

        def on_second() -> None:
            passage.at, passage.pid = rival.at, rival.pid
            passage.said, passage.written = rival.said, rival.written

        def on_failure(error: UnansweredError, *, second: bool) -> None:
            failed = rival if second else passage
            self._blame(error, failures, failed.at, failed.pid)

        race = passage.race = rival.race = Race(passage.place, on_second, on_failure)
        try:
            await race.run(self._ask(passage, passage.at, reply, last=last), after_s, ask_second)
        finally:
            passage.race = None

    def _at_fault(self, passage: Passage) -> tuple[Replica, int | None]:
        """Return who has failed a request, and its process: where it is, unless the cache it needs is gone."""
        handover = passage.handover
        if handover and passage.at != handover.reader:
            id_ = handover.reader.id
            if self._pid(id_) != handover.reader_pid or self._status(id_) not in ALIVE:
                return handover.reader, handover.reader_pid
        return passage.at, passage.pid

    # --- One engine -------------------------------------------------------------------------------------------------

    async def _ask(self, passage: Passage, replica: Replica, reply: Reply, *, last: bool) -> None:
        asked, place, vitals = passage.asked, passage.place, self.health.of(replica)
        # An answer that comes whole does not show when its prompt was read; the plan knows how long that takes.
        shows = asked.stream or replica.role != "both"
        reading = asyncio.get_running_loop().call_later(NEVER_S if shows else replica.ttft_s, place.first_token)
        vitals.unread_tokens += _unread_tokens(asked, replica)
        watch = Watch(vitals=vitals, patience=math.inf if last else WAITS_LONGER**passage.silences)
        self._watches.begin(watch)
        try:
            async with asyncio.timeout(None) as watch.within:  # `cut` and silence set an end to it
                if replica.role == "prefill":
                    await self._read(passage, replica, reply, watch)
                elif asked.stream and asked.endpoint == RESPONSES:
                    await self._relay(passage, replica, reply, watch)
                elif asked.stream:
                    await self._stream(passage, replica, reply, watch)
                else:
                    await self._whole(passage, replica, reply, watch)
        except TimeoutError:
            passage.silences += watch.silent
            problem = "The engine fell silent." if watch.silent else "The engine broke off."
            raise UnansweredError(problem, silent=watch.silent) from None
        except BadEventError as error:
            raise UnansweredError(str(error)) from error
        finally:
            self._watches.end(watch)
            vitals.unread_tokens -= 0 if watch.heard else _unread_tokens(asked, replica)
            reading.cancel()

    async def _stream(self, passage: Passage, replica: Replica, reply: Reply, watch: Watch) -> None:
        wanted = self._wanted(passage, replica, reply)
        watch.since_s = begun_s = _now_s()
        response = await self._begun(passage, replica, wanted, stream=True)
        weave, hides_ids = wanted.weave, wanted.hides_ids
        faults = self._engines[replica.id].faults
        stream = Stream(
            response, passage.said, passage.progress, reply, weave=weave, hides_ids=hides_ids, faults=faults
        )
        await self._to_its_end(passage, response, stream, watch, begun_s)

    async def _relay(self, passage: Passage, replica: Replica, reply: Reply, watch: Watch) -> None:
        """Pass on the stream of an engine that makes responses itself."""
        engine, state = self._engines[replica.id], self._states[replica.id]
        watch.since_s = begun_s = _now_s()
        body = _body(passage.asked, state.served_name, {})
        response = await ask(self._connections, engine, state.url + RESPONSES, body, passage.headers, stream=True)
        passage.written, may_go_on = Written(), engine.dialect.prefill is not None
        relay = Relay(response, passage.progress, passage.written, reply, may_go_on=may_go_on)
        await self._to_its_end(passage, response, relay, watch, begun_s)

    async def _to_its_end(
        self, passage: Passage, response: Response, relay: Stream | Relay, watch: Watch, begun_s: float
    ) -> None:
        try:
            await relay.relay(watch, lambda: self._heard(passage, watch))
            self._let_go(watch)
            await relay.end()
            watch.vitals.took(*relay.pace(begun_s))
        except BaseException:
            response.close()
            raise
        response.close_unless_ended(LAST_BYTES_WITHIN_S)

    async def _whole(self, passage: Passage, replica: Replica, reply: Reply, watch: Watch) -> None:
        asked, wanted = passage.asked, self._wanted(passage, replica, reply)
        watch.whole_tokens = replica.max_context_tokens if asked.most_tokens is None else max(1, asked.most_tokens)
        watch.since_s = asyncio.get_running_loop().time()
        response = await self._begun(passage, replica, wanted, stream=False)
        try:
            data = await read_whole(response, passage.progress)
        finally:
            response.close()
        watch.since_s = math.inf
        self._heard(passage, watch)
        if passage.handover:
            data = discreet(data)
        self._let_go(watch)
        await reply.whole(200, data, passed_back(response))

    def _let_go(self, watch: Watch) -> None:
        """Its engine has said all: what becomes of that while its client gets the end of it is nobody's business."""
        self._watches.end(watch)
        watch.within.reschedule(None)

    def _wanted(self, passage: Passage, replica: Replica, reply: Reply) -> Wanted:
        """Return what an engine is asked: the client's request, or the rest of its answer. Raises RefusedError."""
        asked, path, dialect = passage.asked, passage.endpoint, self._engines[replica.id].dialect
        name = self._states[replica.id].served_name
        if passage.handover:
            return passage.handover.of_writer(name)
        named = dialect.abort and (not asked.stream or replica.role == "prefill")
        rid = {"rid": f"waterline-{uuid.uuid4().hex}"} if named else {}
        if not asked.stream:
            return Wanted(path=path, body=_body(asked, name, rid), rid=rid)
        wished = wishes(asked, path, dialect)
        if not reply.begun:
            passage.said = Said()
            return Wanted(path=path, body=_body(asked, name, wished | rid), hides_ids=bool(wished), rid=rid)
        going_on = resume(asked, path, passage.said, dialect, replica.max_context_tokens)
        body = orjson.dumps({**going_on.fields, **rid, "model": name})
        hides_ids = bool(wished) or b'"return_token_ids"' not in asked.body
        return Wanted(path=going_on.path, body=body, weave=going_on.weave, hides_ids=hides_ids, rid=rid)

    async def _begun(self, passage: Passage, replica: Replica, wanted: Wanted, *, stream: bool) -> Response:
        """Return the answer of an engine that has begun well: of one that was asked already, or is asked now."""
        if passage.handover and (answer := passage.handover.take()):
            return await answer
        return await self._post(replica, wanted, passage.headers, stream=stream)

    async def _post(self, replica: Replica, wanted: Wanted, headers: Headers, *, stream: bool) -> Response:
        engine, url = self._engines[replica.id], self._states[replica.id].url
        try:
            return await ask(self._connections, engine, url + wanted.path, wanted.body, headers, stream=stream)
        except asyncio.CancelledError:  # the client has left, or it took too long
            if wanted.rid:
                self._abort(engine, url, wanted.rid)
            raise

    async def _read(self, passage: Passage, replica: Replica, reply: Reply, watch: Watch) -> None:
        """Have a prompt read, and leave in the passage what the one is told that writes the answer."""
        wanted = self._wanted(passage, replica, reply)
        handover = passage.handover = Handover(reader=replica, reader_pid=self._pid(replica.id), wanted=wanted)
        watch.since_s = _now_s()
        if self._engines[replica.id].dialect.hand_over == AT_ONCE:
            handover.writer = await passage.place.writer(_patience_s(passage, reply))
        await self._pairs.read(handover, passage.headers, answers=passage.asked.answers, stream=passage.asked.stream)
        passage.place.has_read()

    def _heard(self, passage: Passage, watch: Watch) -> None:
        if passage.race:
            passage.race.spoke()
        watch.heard = True
        watch.vitals.unread_tokens -= _unread_tokens(passage.asked, watch.vitals.replica)
        if math.isnan(passage.progress.first_token_s):
            passage.progress.first_token_s = self._now_s()
        passage.place.first_token()

    def _abort(self, engine: Engine, url: str, rid: Mapping[str, str]) -> None:
        async def abort() -> None:
            with suppress(OSError, ValueError):
                async with asyncio.timeout(ABORT_WITHIN_S):
                    address = url.removesuffix("/v1") + engine.dialect.abort
                    (await self._connections.post(address, orjson.dumps(rid), engine.headers)).close()

        self._later(abort())

    def _later(self, chore: Coroutine[Any, Any, None]) -> None:
        """Do what nobody waits for."""
        task = asyncio.get_running_loop().create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _probe(self, replica: Replica) -> bool:
        """Whether a replica answers a request of one token; that it refuses it is an answer too."""
        engine, state = self._engines[replica.id], self._states[replica.id]
        beside = trial(engine.dialect, replica.role)
        body = orjson.dumps({"model": state.served_name, "prompt": "1", "max_tokens": 1, **beside})
        try:
            async with asyncio.timeout(self.health.of(replica).first_within_s):
                url = state.url + COMPLETIONS
                (await ask(self._connections, engine, url, body, [], stream=False)).close()
        except UnansweredError as error:
            return error.busy
        except TimeoutError:
            return False
        except RejectedError:
            return True
        return True

    def _has_others(self, replica: Replica) -> bool:
        return any(self._status(other) == "ready" for other in self._replicas_of(replica) if other != replica.id)

    def _pid(self, replica_id: str) -> int | None:
        return self._states[replica_id].pid if replica_id in self._states else None

    def _status(self, replica_id: str) -> str:
        return self._states[replica_id].status if replica_id in self._states else ""


def _bear_refusal(passage: Passage, why: RefusedError | RejectedError, reply: Reply) -> None:
    """Have it asked in another way to go on, where it was the way that was refused. Raises what the client sees."""
    if not reply.begun:
        raise why
    if isinstance(why, RefusedError) or passage.said.refusal:
        raise BrokenStreamError(f"The engine broke off, and nobody can go on: {why}") from why
    passage.said.refusal = f"the next one refuses to: {str(why).rstrip('.')}"
    passage.place.move(frozenset())


# --- What an engine is asked beside what the client wants -----------------------------------------------------------


def _body(asked: Asked, served_name: str, wished: Mapping[str, Any]) -> bytes:
    """Return the client's body with the model's name as the engine knows it, and our wishes."""
    if served_name != asked.model:
        return orjson.dumps({**asked.fields, **wished, "model": served_name})
    if not wished:
        return asked.body
    return orjson.dumps(wished)[:-1] + b"," + asked.body.lstrip()[1:]


def _patience_s(passage: Passage, reply: Reply) -> float:
    """Return how long it waits for a place while there is none."""
    return PATIENCE_S if reply.begun else passage.patience_s


def _unread_tokens(asked: Asked, replica: Replica) -> int:
    """Return what a replica has to read of a prompt, as far as is known."""
    return 0 if replica.role == "decode" else asked.prompt_tokens


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
