"""The way of one request to an engine and back: which engine is asked next when one fails, and what the client sees.

What decides about places is elsewhere and shows itself here as a `Placement`; nobody here knows of queues or shares.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import orjson

from waterline.plan import Replica
from waterline.service.asgi import Headers, Reply
from waterline.service.body import Asked
from waterline.service.engines import Engine
from waterline.service.supervisor import ReplicaState
from waterline.service.upstream import BrokenStreamError, Connections, Progress, UnansweredError, relay

ATTEMPTS = 2  # engines that may fail a request before its client is told
NEVER_S = 1e6


class Placement(Protocol):
    """The place of one request among the replicas of its model."""

    async def replica(self) -> Replica:
        """Wait for its turn and return where it may go. Raises RejectedError when there is nobody to wait for."""
        ...

    def move(self) -> None:
        """Its replica could not serve it: give that place up for one elsewhere; `replica` waits for it."""
        ...

    def first_token(self) -> None:
        """Its prompt has been read; told again, this changes nothing."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Passage:
    """One request that was taken in, on its way."""

    asked: Asked
    path: str  # with /v1
    headers: Headers  # the client's
    place: Placement
    progress: Progress = field(default_factory=Progress)


class Passages:
    """All requests on their way to the engines.

    Args:
        engines: of the replicas by id.
        states: of the replicas by id; somebody else keeps them up to date, and calls `cut` for one that is gone.
        connections: to the engines.
        now_s: the time since the service started.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        states: Mapping[str, ReplicaState],
        connections: Connections,
        now_s: Callable[[], float],
    ) -> None:
        self._engines = engines
        self._states = states
        self._connections = connections
        self._now_s = now_s
        self._under_way: dict[str, set[asyncio.Timeout]] = {}  # by replica

    def cut(self, replica_id: str) -> None:
        """End what is under way on a replica that is gone, as if it had broken off."""
        for within in self._under_way.pop(replica_id, set()):
            within.reschedule(0.0)

    async def carry(self, passage: Passage, reply: Reply) -> None:
        """Wait for a place and relay the answer; when an engine fails before the first byte, try another.

        Raises:
            RejectedError: an engine has refused the request, nobody answers it (UnansweredError), or there is no place.
            BrokenStreamError: its engine broke off after the client got a part of the answer.
        """
        for attempt in range(1, ATTEMPTS + 1):
            replica = await passage.place.replica()
            try:
                return await self._relay(passage, replica, reply)
            except UnansweredError:
                if attempt == ATTEMPTS:
                    raise
                passage.place.move()
        return None

    async def _relay(self, passage: Passage, replica: Replica, reply: Reply) -> None:
        asked, place, progress = passage.asked, passage.place, passage.progress
        state = self._states[replica.id]
        body = asked.body
        if state.served_name != asked.model:
            body = orjson.dumps({**asked.fields, "model": state.served_name})

        def on_first_token() -> None:
            progress.first_token_s = self._now_s()
            place.first_token()

        # An answer that comes whole does not show when its prompt was read; the plan knows how long that takes.
        reading = asyncio.get_running_loop().call_later(NEVER_S if asked.stream else replica.ttft_s, place.first_token)
        under_way = self._under_way.setdefault(replica.id, set())
        try:
            async with asyncio.timeout(None) as within:  # `cut` sets an end to it
                under_way.add(within)
                await relay(
                    self._connections,
                    self._engines[replica.id],
                    state.url + passage.path.removeprefix("/v1"),
                    body,
                    passage.headers,
                    stream=asked.stream,
                    reply=reply,
                    progress=progress,
                    on_first_token=on_first_token,
                )
        except TimeoutError:
            raise (BrokenStreamError if reply.begun else UnansweredError)("The engine broke off.") from None
        finally:
            under_way.discard(within)
            reading.cancel()
