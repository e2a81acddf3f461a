"""One request on two replicas: its prompt is read on one, the cache goes over, and another writes the answer.

The engines move the cache among themselves; whoever asks them only says between whom. There are two ways to say so.

- **In turn** (vLLM with its NixlConnector). The one that reads is asked for a single token and told that somebody else
  goes on (``kv_transfer_params.do_remote_decode``). Its answer says where the cache lies, and that is told to the one
  that writes, beside the whole request. A cache that nobody fetches is given up after half a minute.
- **At once** (SGLang). Both are asked the same and told where to meet: host and port of the one that reads, and a
  number that no other request has (``bootstrap_host``, ``bootstrap_port``, ``bootstrap_room``). Neither gets anywhere
  without the other, so when one part fails the other is given up.

Sources: vLLM's ``toy_proxy_server.py`` and ``docs/features/nixl_connector_usage.md``, SGLang's ``mini_lb.py`` and
``io_struct.py``. Who reads and who writes is the policy's choice, as in a rehearsal (`policy.dispatch`).
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from urllib.parse import urlsplit

import orjson

from waterline.errors import EngineError, WaterlineError
from waterline.plan import Plan, Replica
from waterline.service.asgi import Headers
from waterline.service.body import CHAT, COMPLETIONS
from waterline.service.connections import Response
from waterline.service.engines import Engine
from waterline.service.engines.dialect import AT_ONCE, Dialect
from waterline.service.supervisor import ReplicaState
from waterline.service.upstream import Progress, read_whole
from waterline.service.weave import Weave

ENGINES = ("vllm", "sglang", "fake")  # that can be started to read only, or to write only
WHOLE = {"stream": False}  # one token is no stream
FROM_HERE: Mapping[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
NOT_OF_READING = ("stream_options", "min_tokens", "min_completion_tokens")  # of a request for a single token
OF_THE_PROMPT = (b"echo", b"prompt_logprobs", b"best_of", b"use_beam_search")  # who writes would have to read it too
ROOMS = 2**63
NOBODY = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}  # SGLang's own name for a meeting with nobody, to be tried


@dataclass(slots=True, kw_only=True, eq=False)
class Wanted:
    """What an engine is asked, and how its answer becomes a part of the client's."""

    path: str  # below /v1
    body: bytes
    weave: Weave | None = None
    hides_ids: bool = False
    rid: Mapping[str, str] = field(default_factory=dict)  # by which its engine can be told to stop


class Post(Protocol):
    """Asks a replica, and returns its answer that has begun well."""

    def __call__(
        self, replica: Replica, wanted: Wanted, headers: Headers, *, stream: bool
    ) -> Coroutine[Any, Any, Response]: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Handover:
    """What is on its way from the one that reads to the one that writes."""

    reader: Replica
    reader_pid: int | None
    wanted: Wanted
    beside: Mapping[str, Any] = field(default_factory=dict)  # what the one that writes is told
    writer: Replica | None = None  # where both are asked at once
    answer: "asyncio.Task[Response] | None" = None  # of the writer, likewise

    def of_writer(self, served_name: str) -> Wanted:
        """Return what the one that writes is asked; it calls the model so."""
        body = {**orjson.loads(self.wanted.body), **self.beside, "model": served_name}
        return replace(self.wanted, body=orjson.dumps(body))

    def close(self) -> None:
        """Give up what nobody waits for any more; an answer that was taken is somebody else's."""
        if answer := self.answer:
            self.answer = None
            answer.add_done_callback(_close)
            answer.cancel()

    def take(self) -> "asyncio.Task[Response] | None":
        """Return the answer that has been asked for, if it has; it is the caller's now."""
        answer, self.answer = self.answer, None
        return answer


def _close(answer: "asyncio.Task[Response]") -> None:
    if not answer.cancelled() and not answer.exception():
        answer.result().close()


# --- What they are told ---------------------------------------------------------------------------------------------


def parts(wanted: Wanted, answers: int) -> bool:
    """Whether a request can be read on one replica and written on another where they are asked in turn.

    There is one cache for one answer, and what is asked about the prompt itself only who reads it can say. Other
    requests go whole to the one that writes, which can read as well.
    """
    asks = any(b'"%s"' % name in wanted.body for name in OF_THE_PROMPT)
    return wanted.path in {CHAT, COMPLETIONS} and answers == 1 and not asks


def reading(body: bytes, served_name: str) -> bytes:
    """Return what the one that reads is asked, in turn."""
    fields = {name: value for name, value in orjson.loads(body).items() if name not in NOT_OF_READING}
    limits = dict.fromkeys({"max_tokens", "max_completion_tokens"} & fields.keys() | {"max_tokens"}, 1)
    return orjson.dumps({**fields, **WHOLE, **limits, "model": served_name, "kv_transfer_params": FROM_HERE})


def where_it_lies(answer: bytes) -> Mapping[str, Any]:
    """Return what the one that writes is told beside the request; nothing when there is nothing to fetch."""
    said = orjson.loads(answer).get("kv_transfer_params")
    return {"kv_transfer_params": said} if said else {}


def discreet(answer: bytes) -> bytes:
    """Return an answer that comes whole without what engines tell one another about caches: that is no client's."""
    if b'"kv_transfer_params"' not in answer:
        return answer
    return orjson.dumps({name: value for name, value in orjson.loads(answer).items() if name != "kv_transfer_params"})


def where_to_meet(dialect: Dialect, url: str) -> Mapping[str, Any]:
    """Return what both are told, at once; `dialect` and `url` are of the one that reads."""
    address = urlsplit(url)
    host = address.hostname or ""
    return {
        "bootstrap_host": f"[{host}]" if ":" in host else host,
        "bootstrap_port": dialect.meeting_port or address.port,
        "bootstrap_room": random.randrange(ROOMS),  # noqa: S311 - a number, not a secret
    }


def met(body: bytes, beside: Mapping[str, Any], served_name: str) -> bytes:
    """Return what the one that reads is asked, at once: the same as the other, but its answer is of no use."""
    fields = {name: value for name, value in orjson.loads(body).items() if name != "stream_options"}
    return orjson.dumps({**fields, **WHOLE, **beside, "model": served_name})


def trial(dialect: Dialect, role: str) -> Mapping[str, Any]:
    """Return what a request says that tries one replica alone."""
    return NOBODY if role != "both" and dialect.hand_over == AT_ONCE else {}


# --- How they are asked ---------------------------------------------------------------------------------------------


class Pairs:
    """Asks those that read, and at once with them those that write.

    Args:
        engines, states: of the replicas by id.
        post: asks a replica, and returns its answer that has begun well.
    """

    def __init__(self, engines: Mapping[str, Engine], states: Mapping[str, ReplicaState], post: Post) -> None:
        self._engines = engines
        self._states = states
        self._post = post

    async def read(self, handover: Handover, headers: Headers, *, answers: int, stream: bool) -> None:
        """Have the prompt read, and note what its writer is told; return when it is the writer's turn.

        Raises what the reader's failure is. That of a writer that is asked at once is the writer's answer.
        """
        reader, wanted = handover.reader, handover.wanted
        dialect, state = self._engines[reader.id].dialect, self._states[reader.id]
        if handover.writer:
            handover.beside = where_to_meet(dialect, state.url)
            theirs = handover.of_writer(self._states[handover.writer.id].served_name)
            writes = self._post(handover.writer, theirs, headers, stream=stream)
            handover.answer = asyncio.get_running_loop().create_task(writes)
            body = met(wanted.body, handover.beside, state.served_name)
            await read_while(self._read(reader, replace(wanted, body=body), headers), handover.answer)
        elif parts(wanted, answers):
            answer = await self._read(reader, replace(wanted, body=reading(wanted.body, state.served_name)), headers)
            handover.beside = where_it_lies(answer)

    async def _read(self, reader: Replica, wanted: Wanted, headers: Headers) -> bytes:
        response = await self._post(reader, wanted, headers, stream=False)
        try:
            return await read_whole(response, Progress())  # the client has got nothing by that
        finally:
            response.close()


async def read_while(reads: Awaitable[Any], writes: "asyncio.Task[Any]") -> None:
    """Wait for a prompt to be read, or for the one that should fetch its cache to fail: its task has the reason.

    Raises what `reads` does; then nobody waits for the other any more.
    """
    reader = asyncio.ensure_future(reads)
    try:
        waits: set[asyncio.Future[Any]] = {reader, writes}
        while not reader.done() and waits:
            done, waits = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if writes in done and (writes.cancelled() or writes.exception()):
                return
        await reader
    finally:
        if not reader.done():
            reader.cancel()
            with suppress(asyncio.CancelledError, WaterlineError):
                await reader


# --- What is planned ------------------------------------------------------------------------------------------------


def check_pairs(plan: Plan, engine_of: Callable[[Replica], str]) -> None:
    """Raise EngineError for a plan whose replicas read for nobody, or write for nobody, or cannot hand over.

    Args:
        plan: whose replicas run together.
        engine_of: says the engine of a replica.
    """
    for model in plan.models:
        apart = [replica for replica in plan.replicas_of(model.model) if replica.role != "both"]
        engines = sorted({engine_of(replica) for replica in apart})
        if unable := [name for name in engines if name not in ENGINES]:
            raise EngineError(
                f"model '{model.model}' is planned to be read on some replicas and written on others, which "
                f"'{unable[0]}' cannot do. Plan it with vllm or sglang, or try it in the time of the cost model: "
                "--engine fake"
            )
        if len(engines) > 1:
            raise EngineError(
                f"model '{model.model}' is planned to be read and written on {' and '.join(engines)}: they do not "
                "understand one another. Plan it with one engine."
            )
        roles = {replica.role for replica in apart}
        if len(roles) == 1:
            (role,) = roles
            does, lacks = ("read prompts", "write answers") if role == "prefill" else ("write answers", "read prompts")
            raise EngineError(
                f"the replicas of model '{model.model}' that {does} have none beside them that {lacks}: "
                f"{_named(apart)}. Plan the fleet again: waterline plan FLEET"
            )


def _named(replicas: Iterable[Replica]) -> str:
    return ", ".join(replica.id for replica in replicas)
