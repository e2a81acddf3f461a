"""The nodes of a fleet while the service runs: who is there, who is silent, who is gone."""

import asyncio
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import structlog

from waterline.service.child import Running
from waterline.service.engines import Engine
from waterline.service.jobs import Machines, Spot
from waterline.service.state import State
from waterline.snapshot import NodeState

LOOK_EVERY_S = 2.0

log = structlog.get_logger()


class Sight(NamedTuple):
    """How a node looks from here."""

    state: NodeState
    address: str = ""
    reason: str = ""  # why it is not up


class Nodes(Machines, Protocol):
    """The machines of a fleet, where they are not all this one."""

    async def launch(self, engine: Engine, state: State | None = None, replica: str = "") -> Running:
        """Start the processes of a replica. Raises EngineError."""
        ...

    async def look(self) -> None:
        """See which of them are there, and let them know that we are."""
        ...

    def sights(self) -> Mapping[Spot, Sight]:
        """Return how each looked the last time."""
        ...


async def watch(nodes: Nodes, on_away: Callable[[frozenset[Spot]], None]) -> None:
    """Look after the nodes until this is cancelled, and tell which cannot be used now, whenever that changes."""
    before: Mapping[Spot, Sight] = {}
    while True:
        try:
            await nodes.look()
            now = nodes.sights()
            _log_changes(before, now)
            if (away := away_of(now)) != away_of(before):
                on_away(away)
            before = now
        except Exception:
            log.exception("a bug in who looks after the nodes")
        await asyncio.sleep(LOOK_EVERY_S)


def away_of(sights: Mapping[Spot, Sight]) -> frozenset[Spot]:
    return frozenset(spot for spot, sight in sights.items() if sight.state != "up")


def _log_changes(before: Mapping[Spot, Sight], now: Mapping[Spot, Sight]) -> None:
    for (pool, node), sight in now.items():
        known = before.get((pool, node))
        if sight.state != (known.state if known else "up"):
            write = log.info if sight.state == "up" else log.warning
            details = {"address": sight.address, "reason": sight.reason}
            write(
                "node", state=sight.state, pool=pool, node=node, **{key: text for key, text in details.items() if text}
            )
