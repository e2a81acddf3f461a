"""What an operator sees of a running service and may do to it; the listener for operators calls this."""

import asyncio
import dataclasses
import math
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import msgspec
import structlog

from waterline.errors import UnknownNameError, WaterlineError, nearest
from waterline.ledger import Ledger, read_keys, read_usage, revoke_key
from waterline.service.gateway import Gateway
from waterline.service.minutes import since_midnight_s
from waterline.service.supervisor import ReplicaState
from waterline.snapshot import Snapshot

BY = ("day", "tenant", "client", "key", "model")  # usage is summed
TOLD_EVERY_S = 0.2  # decisions
MOST_UNTOLD = 10_000  # lines of them that wait for a reader: about 4 MB

log = structlog.get_logger()


class NotOfferedError(WaterlineError):
    """This service cannot do that."""

    http_status = 501


class Operator:
    """The service in an operator's hands.

    Args:
        gateway: whose requests they are.
        states: of the replicas by id; somebody else keeps them up to date and calls `replica_changed`.
        ledger: of keys and usage, if there is one.
    """

    def __init__(self, gateway: Gateway, states: Mapping[str, ReplicaState], ledger: Ledger | None = None) -> None:
        self.stopping = asyncio.Event()
        self.hangup: asyncio.Event | None = None  # has the plan file read again; None: there is none
        self._gateway = gateway
        self._states = states
        self._ledger = ledger
        self._drained: set[str] = set()

    def replica_changed(self, replica: str, state: ReplicaState) -> None:
        """Tell the gateway of a replica's new state; one that is drained gets nothing, however well it is."""
        if replica in self._drained:
            if state.status in {"ready", "suspect"}:
                state = dataclasses.replace(state, status="draining")
            else:  # however soon it is there
                state = dataclasses.replace(state, delay_s=math.inf)
        self._gateway.replica_changed(replica, state)

    def snapshot(self) -> Snapshot:
        return self._gateway.snapshot()

    def metrics(self) -> bytes:
        return self._gateway.metrics.text()

    def drain(self, replica: str) -> None:
        self._check(replica)
        if replica not in self._drained:
            self._drained.add(replica)
            log.info("an operator drains a replica", id=replica)
            self.replica_changed(replica, self._states[replica])

    def undrain(self, replica: str) -> None:
        self._check(replica)
        if replica in self._drained:
            self._drained.discard(replica)
            log.info("an operator takes a replica back", id=replica)
            self.replica_changed(replica, self._states[replica])

    async def reload(self) -> str:
        if not self.hangup:
            raise NotOfferedError("This service was started without a fleet or plan file that could have changed.")
        self.hangup.set()
        return "The file is read again; the log says what changes, or what is wrong with it."

    async def decisions(self) -> AsyncIterator[bytes]:
        """Yield what is decided about requests from now on, lines of the decision log, until the service stops.

        Who reads so slowly that lines would be lost is left: a log has no holes.
        """
        lines: deque[bytes] = deque(maxlen=MOST_UNTOLD)
        begun = datetime.now().astimezone() - timedelta(seconds=self._gateway.now_s())
        listeners, listener = self._gateway.dispatcher.log.listeners, lines.append
        self._gateway.dispatcher.log.tell(listener, since_midnight_s(begun))
        try:
            while len(lines) < MOST_UNTOLD:
                if lines:
                    told = b"".join(lines)
                    lines.clear()
                    yield told
                elif self.stopping.is_set():
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(TOLD_EVERY_S):
                        await self.stopping.wait()
            log.warning("decisions are read too slowly, and not told any more to that reader")
        finally:
            listeners.remove(listener)

    async def keys(self) -> Any:
        return await asyncio.to_thread(read_keys, self._books().engine)

    async def revoke(self, key: str) -> None:
        await asyncio.to_thread(revoke_key, self._books().engine, key)
        log.info("an operator revokes a key", id=key)

    async def usage(self, since: str, until: str) -> Any:
        rows = await asyncio.to_thread(read_usage, self._books().engine, BY, since, until)
        return [msgspec.structs.asdict(row) for row in rows]  # with what is zero, for programs that count on it

    def _books(self) -> Ledger:
        if not self._ledger:
            raise NotOfferedError("This service keeps no ledger, and so no keys and no usage.")
        return self._ledger

    def _check(self, replica: str) -> None:
        if replica not in self._states:
            raise UnknownNameError(f"no replica is called '{replica[:60]}'. {nearest(replica[:60], self._states)}")
