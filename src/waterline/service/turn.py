"""The place of one request: when its turn comes, where it may go, and how it moves elsewhere."""

import asyncio
import math
from asyncio import Future
from collections.abc import Callable

from waterline.plan import Replica
from waterline.policy.decisions import NOT_SERVED, TOO_LATE
from waterline.service.dispatcher import Dispatcher
from waterline.service.errors import RejectedError
from waterline.service.lines import Ticket

NO_WRITER_S = 1.0  # until who can write is looked for again: as long as in a rehearsal


class Turn:
    """The place of one request, as the dispatcher gives it: a `passage.Placement`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        now_s: Callable[[], float],
        nobody: Callable[[int, float], RejectedError],
        on_hedge: Callable[[str, str, float], None],
    ) -> None:
        self._dispatcher = dispatcher
        self._on_hedge = on_hedge  # told of the model, what became of it, and the GPU time that was for nothing
        self._now_s = now_s
        self._nobody = nobody
        self._come: Future[bool] = asyncio.get_running_loop().create_future()
        self.replicas: list[str] = []  # that worked on it
        self.ticket: Ticket  # once it was taken in

    def call(self, go: bool) -> None:  # noqa: FBT001 - a callback of one argument
        """End the wait; nobody waits any more when the client has left."""
        if not self._come.done():
            self._come.set_result(go)

    async def replica(self, within_s: float = 0.0) -> Replica:
        """Wait for its turn and return where it may go; while the model has no replica no longer than `within_s`.

        Raises RejectedError when there was none in that time, or its turn did not come long after it should have.
        """
        nobody_s = math.inf  # since when there is nobody
        while not (self._come.done() and self._come.result()):
            hope = self.ticket.service.has_hope
            nobody_s = math.inf if hope else min(nobody_s, self._now_s())
            if not self._come.done():
                left_s = max(0.0, nobody_s + within_s - self._now_s())
                await asyncio.wait((self._come,), timeout=None if hope else left_s)
                if not self._come.done() and not self.ticket.service.has_hope:
                    raise self._not_ready()
            elif self.ticket.again_s is not None:
                raise self._nobody(TOO_LATE, self.ticket.again_s)
            else:  # the last replica is gone
                self._come = asyncio.get_running_loop().create_future()
        assert self.ticket.lane  # noqa: S101 - its turn has come
        replica = self.ticket.lane.replica
        self.replicas.append(replica.id)
        return replica

    async def writer(self, within_s: float) -> Replica:
        """Return where the answer is written to a prompt that is read elsewhere; wait for somebody so long.

        Raises RejectedError when there was nobody in that time.
        """
        until_s = self._now_s() + within_s
        while not (lane := self._dispatcher.hand_over(self.ticket, self._now_s())):
            if self._now_s() >= until_s:
                raise self._not_ready()
            await asyncio.sleep(NO_WRITER_S)
        self.replicas.append(lane.replica.id)
        return lane.replica

    def _not_ready(self) -> RejectedError:
        return self._nobody(NOT_SERVED, self.ticket.service.ready_in_s(self._now_s()))

    def has_read(self) -> None:
        self._dispatcher.has_read(self.ticket, self._now_s())

    def move(self, avoid: frozenset[str] = frozenset()) -> None:
        """Give its place up for one elsewhere; without names it is its own replica that is to be avoided."""
        avoid = avoid or frozenset(self.replicas[-1:])
        self._come = asyncio.get_running_loop().create_future()
        self._dispatcher.move(self.ticket, avoid, self._now_s())

    def first_token(self, replica_id: str) -> None:
        self._dispatcher.first_token(self.ticket, replica_id)

    def second(self, on_lost: Callable[[], None]) -> Replica | None:
        def lost(gpu_s: float) -> None:
            self._hedged("lost", gpu_s)
            on_lost()

        replica = self._dispatcher.hedge(self.ticket, lost, self._now_s())
        if not replica:
            self._hedged("none free", 0.0)
        return replica

    def take_second(self) -> None:
        self._hedged("won", self._dispatcher.take_second(self.ticket, self._now_s()))
        assert self.ticket.lane  # noqa: S101 - it runs there now
        self.replicas.append(self.ticket.lane.replica.id)

    def drop_second(self) -> None:
        self._hedged("lost", self._dispatcher.drop_second(self.ticket, self._now_s()))

    def _hedged(self, outcome: str, lost_gpu_s: float) -> None:
        self._on_hedge(self.ticket.service.planned.model, outcome, lost_gpu_s)
