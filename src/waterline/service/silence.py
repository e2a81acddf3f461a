"""Silence: a request whose engine says nothing for too long is ended there, where somebody else could go on with it.

What is too long follows from what is usual of the replica, see `health.Vitals`.
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from waterline.plan import Replica
from waterline.service.health import Vitals

LOOK_EVERY_S = 0.1
WHILE_OTHERS_SPEAK = 4.0  # times what is allowed: an engine makes room by setting one request aside for a while


@dataclass(slots=True, kw_only=True, eq=False)
class Watch:
    """One request at one replica, and the silence it is in."""

    vitals: Vitals
    patience: float  # times what is usual
    within: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))
    whole_tokens: int = 0  # at most, of an answer that comes whole
    since_s: float = math.inf  # when the silence began; inf before we listen, and when it was ended
    heard: bool = False
    writing: bool = False  # what has come, to a client: we do not listen
    silent: bool = False  # too long

    def allowed_s(self, now_s: float) -> float:
        vitals = self.vitals
        if self.whole_tokens:
            return vitals.whole_within_s(self.whole_tokens) * self.patience
        within_s = (vitals.next_within_s if self.heard else vitals.first_within_s) * self.patience
        return within_s * WHILE_OTHERS_SPEAK if now_s - vitals.heard_s < within_s else within_s


class Watches:
    """All requests at engines, while we listen.

    Args:
        has_others: whether somebody else could go on with what a replica does.
    """

    def __init__(self, has_others: Callable[[Replica], bool]) -> None:
        self._has_others = has_others
        self._of: dict[str, set[Watch]] = {}  # by replica
        self._looking: asyncio.TimerHandle | None = None
        self._looked_s = 0.0

    def begin(self, watch: Watch) -> None:
        self._of.setdefault(watch.vitals.replica.id, set()).add(watch)
        self._look_soon()

    def end(self, watch: Watch) -> None:
        self._of.get(watch.vitals.replica.id, set()).discard(watch)

    def cut(self, replica_id: str) -> None:
        """End what is under way on a replica that is gone."""
        for watch in self._of.get(replica_id, ()):
            watch.within.reschedule(0.0)

    def forget(self, replica_id: str) -> None:
        """A replica is gone for good, and nobody is on it any more."""
        self._of.pop(replica_id, None)

    def close(self) -> None:
        """Look no more."""
        if self._looking:
            self._looking.cancel()

    def _look_soon(self) -> None:
        if self._looking is None:
            loop = asyncio.get_running_loop()
            self._looked_s = loop.time()
            self._looking = loop.call_later(LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        """End what has been silent for too long, where somebody else could go on."""
        now_s = asyncio.get_running_loop().time()
        late_s = now_s - self._looked_s - LOOK_EVERY_S  # we ourselves were busy, and may not have read what has come
        self._looking = None
        for watches in self._of.values():
            if not watches:
                continue
            self._look_soon()
            if late_s > LOOK_EVERY_S:
                for watch in watches:
                    watch.since_s += late_s
                continue
            others = self._has_others(next(iter(watches)).vitals.replica)
            for watch in watches:
                if watch.writing or watch.since_s == math.inf:
                    continue
                watch.silent = others and now_s - watch.since_s > watch.allowed_s(now_s)
                if watch.silent:
                    watch.since_s = math.inf
                    watch.within.reschedule(0.0)
