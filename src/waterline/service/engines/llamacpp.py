"""llama.cpp: the command of its server, and the engine from the `xllamacpp` wheel with its process.

The wheel's engine gets a process of its own because it cannot be stopped otherwise while a request is in flight, and
because only a process's standard error says why it did not start.
"""

import os
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import aiohttp
import click

from waterline.catalog.engines import find_engine
from waterline.errors import EngineError, MissingExtraError
from waterline.plan import Plan, Replica
from waterline.service.engines import ask
from waterline.service.engines import seat as seats
from waterline.service.engines.dialect import LLAMACPP, Dialect
from waterline.service.engines.hosted import Hosted, host
from waterline.service.engines.lifeline import announce, end_with_parent
from waterline.service.engines.seat import Command, Seat
from waterline.units import MIB

BYTES_PER_THREAD = 32 * MIB  # threads wait for one another many times a token: below this, more of them are slower
PROMPT_CACHE_MIB = 256  # kept of prompts whose slot was given away; llama.cpp would take 8 GiB
ERRORS = 1  # of llama.cpp's levels of verbosity; at 0 it dies without a word
FAULTS = {  # it says some of them with 500
    "exceeds the available context size": "context_length_exceeded",
    "failed to parse": "invalid_value",
    "not supported": "unsupported_value",
    "unsupported": "unsupported_value",
    "unknown": "invalid_value",
    "invalid": "invalid_value",
}


@dataclass(frozen=True, kw_only=True)
class LlamaCpp:
    """One llama.cpp server with one GGUF file."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    name: str
    input: bytes = b""
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=lambda: FAULTS)
    dialect: Dialect = LLAMACPP
    start_within_s: float = 900.0  # hundreds of gigabytes from a disk; a failure shows at once, by the exit

    async def served_name(self, session: aiohttp.ClientSession, url: str) -> str:
        await ask(session, url.removesuffix("/v1"), "/health")  # 503 while it loads
        return self.name


def command(plan: Plan, replica: Replica, seat: Seat) -> Command:
    """Return how llama-server is started, built for CUDA, for ROCm or for none. Raises EngineError for what it cannot.

    Source of the flags: llama.cpp at 00dc8057.
    """
    fleet, layout, slots = plan.fleet, replica.layout, _slots(replica)
    gpu, profile = fleet.gpu_of(fleet.pool(replica.pool)), find_engine("llamacpp")
    if len(replica.places) > 1 or layout.dp > 1 or replica.role != "both":
        raise EngineError(
            f"replica '{replica.id}' is planned as {layout} on {len(replica.places)} nodes for role '{replica.role}', "
            "and llama.cpp runs one copy on one node, for both roles. Plan the model with another engine."
        )
    split = "none" if layout.gpus == 1 else "row" if layout.tp > 1 else "layer"
    arguments = (
        *("llama-server", "--model", _weights_file(plan, replica)),
        *("--alias", replica.model),
        *seat.listening,
        *("--parallel", str(slots)),
        *("--ctx-size", str(slots * replica.max_context_tokens)),  # shared out evenly among the slots
        *("--ubatch-size", str(profile.step_tokens)),
        *(("--n-gpu-layers", "all", "--split-mode", split) if gpu.vendor in seats.VISIBLE_DEVICES else ()),
        *("--fit", "off"),  # what was planned fits; it would rather shrink than say so if not
        *("--cache-ram", str(PROMPT_CACHE_MIB)),
        *("--threads-http", str(_http_threads(slots))),
        *("--no-webui", "--metrics"),
        *fleet.model(replica.model).engine_arguments,
    )
    return arguments, seats.devices(gpu, replica, seat)


def _weights_file(plan: Plan, replica: Replica) -> str:
    file = plan.fleet.llm_of(plan.fleet.model(replica.model)).weights_file
    if not file:
        raise EngineError(f"llama.cpp needs a .gguf file; write it as 'weights' of model '{replica.model}'.")
    return file


def _slots(replica: Replica) -> int:
    return max(1, min(replica.max_batch, replica.cache_tokens // replica.max_context_tokens))


def _http_threads(slots: int) -> int:
    """Each connection holds one, and idle ones stay a while."""
    return 2 * slots + 4


def prepare(plan: Plan, replica: Replica, seat: Seat | None = None) -> LlamaCpp | Hosted:
    """Return the server of a replica: on cards llama-server where it is installed, else the wheel's.

    Raises MissingExtraError, or EngineError for a model without a GGUF file, or with arguments for the wheel's.
    """
    vendor = plan.fleet.gpu_of(plan.fleet.pool(replica.pool)).vendor
    if vendor in seats.VISIBLE_DEVICES and shutil.which("llama-server"):
        return host(replica, command(plan, replica, seats.at(seat, replica)), LLAMACPP)
    if find_spec("xllamacpp") is None:
        raise MissingExtraError(f"The engine 'llamacpp' of model '{replica.model}'", extra="embedded")
    if plan.fleet.model(replica.model).engine_arguments:
        raise EngineError(
            f"model '{replica.model}' has engine_arguments, and the llama.cpp of the package xllamacpp has none: they "
            "are for llama-server, which is started on cards where it is on the path. Install it, or leave them out."
        )
    weights = _weights_file(plan, replica)
    seat = seats.at(seat, replica)
    return LlamaCpp(
        name=replica.model,
        command=(
            *(sys.executable, "-m", "waterline.service.engines.llamacpp"),
            *("--model", weights),
            *("--alias", replica.model),
            *("--slots", str(_slots(replica))),
            *("--context", str(replica.max_context_tokens)),
            *("--host", seat.host),
        ),
        environment=seats.devices(plan.fleet.gpu_of(plan.fleet.pool(replica.pool)), replica, seat),
    )


@click.command()
@click.option("--model", required=True, help="A GGUF file.")
@click.option("--alias", required=True, help="What requests call the model.")
@click.option("--slots", required=True, type=int, help="Requests decoded together.")
@click.option("--context", required=True, type=int, help="Tokens of one request, prompt and output.")
@click.option("--host", required=True, help="The address to listen on.")
def main(model: str, alias: str, slots: int, context: int, host: str) -> None:
    """Serve one model on a free port of this machine until standard input ends."""
    end_with_parent()
    try:
        import xllamacpp  # noqa: PLC0415 - an extra, and only this process needs it
    except ImportError as error:  # of a library that slim systems leave out
        sys.exit(f"{error}. llama.cpp needs OpenMP; on Debian and Ubuntu: apt-get install libgomp1")
    threads = max(1, min(os.cpu_count() or 1, Path(model).stat().st_size // BYTES_PER_THREAD))
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.model_alias = {alias}
    parameters.n_parallel = slots
    parameters.n_ctx = slots * context  # shared out evenly among the slots
    parameters.n_threads_http = _http_threads(slots)
    parameters.hostnames = [host]
    parameters.port = 0
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    parameters.cache_ram_mib = PROMPT_CACHE_MIB
    parameters.fit_params = False
    parameters.ui = False
    parameters.endpoint_metrics = True
    parameters.endpoint_props = False
    parameters.verbosity = ERRORS
    try:
        server = xllamacpp.Server(parameters)  # returns when it is ready
    except RuntimeError as error:
        sys.exit(str(error))  # what it means, llama.cpp has said before
    announce(f"{server.listening_address}/v1")
    signal.pause()  # SIGTERM is left to the system: it ends the process whatever llama.cpp is doing


if __name__ == "__main__":
    main()
