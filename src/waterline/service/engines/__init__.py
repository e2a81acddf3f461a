"""Which engines Waterline can start or reach, and what each of them has to tell; one file per engine."""

from collections.abc import Mapping
from importlib import import_module
from typing import Protocol

import aiohttp

from waterline.errors import EngineError
from waterline.plan import Plan, Replica


class NotReadyError(EngineError):
    """The engine does not answer yet, or no longer."""


class Engine(Protocol):
    """How to run or reach the engine of one replica.

    A child process says where it listens with one line of JSON on its standard output, ``{"url": "http://…/v1"}``, and
    has to end by itself when its standard input does; see `lifeline`.
    """

    command: tuple[str, ...]  # of the child process; empty when there is none to start
    environment: Mapping[str, str]  # on top of ours
    url: str  # of a server that runs already; empty when a child will say it
    start_within_s: float  # how long it may take until it is ready

    async def served_name(self, session: aiohttp.ClientSession, url: str) -> str:
        """Return what the engine calls the model, once it answers requests. Raises NotReadyError."""
        ...


# name -> the file that knows it; its `prepare(plan, replica)` returns an Engine
STARTABLE = {
    "llamacpp": "waterline.service.engines.llamacpp",
    "openai": "waterline.service.engines.openai",
    "fake": "waterline.service.engines.fake",
}


def prepare_engines(plan: Plan, instead: str = "") -> dict[str, Engine]:
    """Return an engine for each replica of the plan, by its id; `instead` of what was planned where it is given.

    Raises EngineError or MissingExtraError before anything is started.
    """
    names = {replica.id: instead or replica.engine for replica in plan.replicas}
    _check_startable(plan, names)
    return {replica.id: import_module(STARTABLE[names[replica.id]]).prepare(plan, replica) for replica in plan.replicas}


def _check_startable(plan: Plan, names: Mapping[str, str]) -> None:
    unknown: dict[str, str] = {}
    for replica in plan.replicas:
        name = names[replica.id]
        if name not in STARTABLE:
            unknown[replica.model] = f"'{replica.model}' ({name})"
        elif name == "llamacpp" and any(place.node > 0 for place in replica.places):
            unknown[replica.model] = f"'{replica.model}' ({name} on node {replica.places[-1].node} of '{replica.pool}')"
    if unknown:
        raise EngineError(
            f"Waterline can plan but not yet start: {', '.join(unknown.values())}. Start these servers yourself and "
            'attach to them with engine = "openai" and url = "http://…/v1" in the fleet file, or run the whole fleet '
            "in the time of the cost model with: waterline up --engine fake"
        )


async def ask(session: aiohttp.ClientSession, url: str) -> bytes:
    """Return what an engine answers to GET. Raises NotReadyError unless that is a 200, within a few seconds."""
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=5.0)) as response:
            data = await response.read()
            if response.status != 200:
                raise NotReadyError(f"{url} answers {response.status}: {data[:200].decode(errors='replace')}")
            return data
    except (aiohttp.ClientError, OSError) as error:
        raise NotReadyError(f"{url} does not answer: {error or type(error).__name__}") from error


__all__ = ["STARTABLE", "Engine", "NotReadyError", "Replica", "ask", "prepare_engines"]
