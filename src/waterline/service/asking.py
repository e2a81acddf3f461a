"""One engine is asked, and what it says goes to the client: in a stream, whole, or to another that writes the answer.

Who is asked, and what follows from a failure, is for `passage` to say. Here it is found out: whatever keeps an answer
from going on is an UnansweredError, silence included (`silence`).
"""

import asyncio
import math
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from waterline.plan import Replica
from waterline.service.asgi import Headers, Reply
from waterline.service.body import COMPLETIONS, Asked
from waterline.service.connections import Connections, Response
from waterline.service.continuation import resume, wishes
from waterline.service.engines import Engine
from waterline.service.engines.dialect import AT_ONCE
from waterline.service.errors import RejectedError
from waterline.service.events import BadEventError
from waterline.service.health import Health
from waterline.service.hedge import Race
from waterline.service.pairs import Handover, Pairs, Wanted, discreet, trial
from waterline.service.response_relay import Relay
from waterline.service.response_resume import Written
from waterline.service.responses import RESPONSES
from waterline.service.said import Said
from waterline.service.silence import Watch, Watches
from waterline.service.stream import Stream
from waterline.service.supervisor import ReplicaState
from waterline.service.upstream import Progress, UnansweredError, ask, passed_back, read_whole

PATIENCE_S = 30.0  # for a place where a stream goes on, while no replica is in service
LAST_BYTES_WITHIN_S = 0.2  # of a stream that is done
WAITS_LONGER = 4.0  # times, after each silence: perhaps it is the request that takes long
ABORT_WITHIN_S = 1.0
NEVER_S = 1e6


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

    def first_token(self, replica_id: str) -> None:
        """Its prompt has been read by that replica; told again, this changes nothing."""
        ...

    def second(self, on_lost: Callable[[], None]) -> Replica | None:
        """Take a second replica, where one has a slot to spare; `on_lost` is called when somebody else gets that."""
        ...

    def take_second(self) -> None:
        """Be there alone from now on."""
        ...

    def drop_second(self) -> None:
        """Be where it was before alone."""
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

    def waits_s(self, reply: Reply) -> float:
        """Return how long it waits for a place while there is none."""
        return PATIENCE_S if reply.begun else self.patience_s


class Asker:
    """The engines, each with its health and the silence that it is in.

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

    def pid(self, replica_id: str) -> int | None:
        return self._states[replica_id].pid if replica_id in self._states else None

    def status(self, replica_id: str) -> str:
        return self._states[replica_id].status if replica_id in self._states else ""

    async def ask(self, passage: Passage, replica: Replica, reply: Reply, *, last: bool) -> None:
        """Have one engine answer, or read what another is to answer.

        Raises UnansweredError where it does not, RejectedError where it refuses, RefusedError where it cannot go on.

        Args:
            passage: of the request.
            replica: that is asked.
            reply: to the client.
            last: nobody is left to ask: it is waited for, however long it takes.
        """
        asked, place, vitals = passage.asked, passage.place, self.health.of(replica)
        # An answer that comes whole does not show when its prompt was read; the plan knows how long that takes.
        shows = asked.stream or replica.role != "both"
        reading = asyncio.get_running_loop().call_later(
            NEVER_S if shows else replica.ttft_s, place.first_token, replica.id
        )
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
        handover = passage.handover = Handover(reader=replica, reader_pid=self.pid(replica.id), wanted=wanted)
        watch.since_s = _now_s()
        if self._engines[replica.id].dialect.hand_over == AT_ONCE:
            handover.writer = await passage.place.writer(passage.waits_s(reply))
        await self._pairs.read(handover, passage.headers, answers=passage.asked.answers, stream=passage.asked.stream)
        passage.place.has_read()

    def _heard(self, passage: Passage, watch: Watch) -> None:
        if passage.race:
            passage.race.spoke()
        watch.heard = True
        watch.vitals.unread_tokens -= _unread_tokens(passage.asked, watch.vitals.replica)
        if math.isnan(passage.progress.first_token_s):
            passage.progress.first_token_s = self._now_s()
        passage.place.first_token(watch.vitals.replica.id)

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
        return any(self.status(other) == "ready" for other in self._replicas_of(replica) if other != replica.id)


# --- What an engine is asked beside what the client wants -----------------------------------------------------------


def _body(asked: Asked, served_name: str, wished: Mapping[str, Any]) -> bytes:
    """Return the client's body with the model's name as the engine knows it, and our wishes."""
    if served_name != asked.model:
        return orjson.dumps({**asked.fields, **wished, "model": served_name})
    if not wished:
        return asked.body
    return orjson.dumps(wished)[:-1] + b"," + asked.body.lstrip()[1:]


def _unread_tokens(asked: Asked, replica: Replica) -> int:
    """Return what a replica has to read of a prompt, as far as is known."""
    return 0 if replica.role == "decode" else asked.prompt_tokens


def _now_s() -> float:
    return asyncio.get_running_loop().time()
