"""Which engines Waterline can start or reach, and what each of them has to tell; one file per engine."""

from collections.abc import Callable, Mapping
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

    @property
    def command(self) -> tuple[str, ...]:
        """Of the child process; empty when there is none to start."""
        ...

    @property
    def environment(self) -> Mapping[str, str]:
        """Of the child process, on top of ours."""
        ...

    @property
    def url(self) -> str:
        """Of a server that runs already, with /v1; empty when a child will say it."""
        ...

    @property
    def start_within_s(self) -> float:
        """How long it may take until it is ready."""
        ...

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
    unknown = {replica.model: names[replica.id] for replica in plan.replicas if names[replica.id] not in STARTABLE}
    if unknown:
        models = ", ".join(f"'{model}' ({name})" for model, name in unknown.items())
        raise EngineError(
            f"Waterline can plan but not yet start: {models}. Start these servers yourself and "
            'attach to them with engine = "openai" and url = "http://…/v1" in the fleet file, or run the whole fleet '
            "in the time of the cost model with: waterline up --engine fake"
        )
    return {replica.id: _prepare(names[replica.id])(plan, replica) for replica in plan.replicas}


def _prepare(name: str) -> Callable[[Plan, Replica], Engine]:
    prepare: Callable[[Plan, Replica], Engine] = import_module(STARTABLE[name]).prepare
    return prepare


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
