"""Which engines Waterline can start or reach, and what each of them has to tell; one file per engine."""

import os
import shutil
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Protocol

import aiohttp

from waterline.errors import EngineError
from waterline.plan import Plan, Replica
from waterline.service.engines.dialect import Dialect
from waterline.service.engines.seat import Command, Seat

ANSWER_S = 1.0  # a probe costs an engine nothing, so its answer is a matter of milliseconds


class NotReadyError(EngineError):
    """The engine does not answer yet, or no longer."""


class Engine(Protocol):
    """How to run or reach the engine of one replica.

    A child process says where it listens with one line of JSON on its standard output, ``{"url": "http://…/v1"}``, and
    has to end by itself when its standard input does, which begins with `input`; see `lifeline`.
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
    def input(self) -> bytes:
        """What the child process reads first, where a command line has no room for it: up to 128 KiB on Linux."""
        ...

    @property
    def url(self) -> str:
        """Of a server that runs already, with /v1; empty when a child will say it."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Sent with every request to it; where a key is needed, it is here."""
        ...

    @property
    def faults(self) -> Mapping[str, str]:
        """Words of its errors, in small letters, that mean: the request is wrong, even with 500; and OpenAI's code."""
        ...

    @property
    def dialect(self) -> Dialect:
        """What it understands beyond OpenAI's API."""
        ...

    @property
    def start_within_s(self) -> float:
        """How long a child may take until it is ready."""
        ...

    async def served_name(self, session: aiohttp.ClientSession, url: str) -> str:
        """Return what the engine calls the model, once it answers requests. Raises NotReadyError."""
        ...


# name -> the file that knows it; its `prepare(plan, replica, seat)` returns an Engine
STARTABLE = {
    "vllm": "waterline.service.engines.vllm",
    "sglang": "waterline.service.engines.sglang",
    "llamacpp": "waterline.service.engines.llamacpp",
    "openai": "waterline.service.engines.openai",
    "fake": "waterline.service.engines.fake",
}
# of these, `command(plan, replica, seat)` returns what starts one process on one node
COMMANDED = ("vllm", "sglang", "llamacpp")
PROGRAMS = {"vllm": "pip install vllm", "sglang": "pip install sglang"}  # looked for on the path, and how to get them


def prepare_engines(
    plan: Plan, instead: str = "", *, fleet: str = "FLEET", seat_of: Callable[[Replica], Seat] | None = None
) -> dict[str, Engine]:
    """Return an engine for each replica of the plan, by its id; `instead` of what was planned where it is given.

    `fleet` is what the person has called the fleet, for the remedy in the message. `seat_of` says where the first
    process of a replica runs; None: all of them on this machine.

    Raises EngineError or MissingExtraError before anything is started.
    """
    names = {replica.id: instead or replica.engine for replica in plan.replicas}
    absent = {
        replica.model: names[replica.id]
        for replica in plan.replicas
        if seat_of is None and names[replica.id] in PROGRAMS and shutil.which(names[replica.id]) is None
    }
    if absent:
        models = ", ".join(f"'{model}' ({name})" for model, name in absent.items())
        install = "; ".join(dict.fromkeys(PROGRAMS[name] for name in absent.values()))
        raise EngineError(
            f"not on the path of this machine is what is to serve {models}. Install it ({install}; for ROCm as its own "
            f"guide says). Or start these servers elsewhere (waterline launch {fleet} prints how) and attach to them "
            'with engine = "openai" and url = "http://…/v1" in the fleet file. Or run the whole fleet in the time of '
            f"the cost model: waterline up {fleet} --engine fake"
        )
    return {
        replica.id: _prepare(names[replica.id])(plan, replica, seat_of(replica) if seat_of else None)
        for replica in plan.replicas
    }


def all_pretend(engines: Mapping[str, Engine]) -> bool:
    """Whether there is no engine but fakes: then the whole fleet, however large, is this machine."""
    return all(type(engine).__module__ == STARTABLE["fake"] for engine in engines.values())


def command_of(plan: Plan, replica: Replica, seat: Seat) -> Command:
    """Return how one process of a replica is started. Raises EngineError where its engine cannot do what is planned."""
    command: Command = import_module(STARTABLE[replica.engine]).command(plan, replica, seat)
    return command


def _prepare(name: str) -> Callable[[Plan, Replica, Seat | None], Engine]:
    prepare: Callable[[Plan, Replica, Seat | None], Engine] = import_module(STARTABLE[name]).prepare
    return prepare


async def ask(session: aiohttp.ClientSession, url: str, path: str, headers: Mapping[str, str] | None = None) -> bytes:
    """Return what the engine at `url` answers to GET. Raises NotReadyError unless that is a 200, within ANSWER_S."""
    try:
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with session.get(url + path, timeout=timeout, headers=headers) as response:
            data = await response.read()
            if response.status != 200:
                raise NotReadyError(f"{url} answers {response.status}: {data[:200].decode(errors='replace')}")
            return data
    except (aiohttp.ClientError, OSError) as error:
        raise NotReadyError(f"{url} does not answer: {_problem(error)}.") from error


def _problem(error: aiohttp.ClientError | OSError) -> str:
    """Say what went wrong as the system does; aiohttp would tell of its own affairs."""
    if isinstance(error, TimeoutError):
        return f"nothing within {ANSWER_S:g} s"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"no such host, {error.host}"
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__
