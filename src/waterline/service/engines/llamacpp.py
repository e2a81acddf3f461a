"""llama.cpp, from the `xllamacpp` wheel: the engine, and its process.

It gets a process of its own because it cannot be stopped otherwise while a request is in flight, and because only a
process's standard error says why it did not start.
"""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import aiohttp
import click

from waterline.errors import EngineError, MissingExtraError
from waterline.plan import Plan, Replica
from waterline.service.engines import ask
from waterline.service.engines.lifeline import announce, end_with_parent
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
VISIBLE_DEVICES = {"nvidia": "CUDA_VISIBLE_DEVICES", "amd": "HIP_VISIBLE_DEVICES"}


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
    start_within_s: float = 900.0  # hundreds of gigabytes from a disk; a failure shows at once, by the exit

    async def served_name(self, session: aiohttp.ClientSession, url: str) -> str:
        await ask(session, url.removesuffix("/v1"), "/health")  # 503 while it loads
        return self.name


def prepare(plan: Plan, replica: Replica) -> LlamaCpp:
    """Return the server of a replica. Raises MissingExtraError, or EngineError for a model without a GGUF file."""
    if find_spec("xllamacpp") is None:
        raise MissingExtraError(f"The engine 'llamacpp' of model '{replica.model}'", extra="embedded")
    fleet = plan.fleet
    weights = fleet.llm_of(fleet.model(replica.model)).weights_file
    if not weights:
        raise EngineError(f"llama.cpp needs a .gguf file; write it as 'weights' of model '{replica.model}'.")
    far = next((place.node for place in replica.places if place.node > 0), None)
    if far is not None:
        raise EngineError(
            f"replica '{replica.id}' is planned on node {far} of pool '{replica.pool}', but engines are started on "
            "this machine only. Write nodes = 1 there, or start the server on that node yourself and attach to it with "
            'engine = "openai" and url = "http://…/v1".'
        )
    gpu = fleet.gpu_of(fleet.pool(replica.pool))
    slots = max(1, min(replica.max_batch, replica.cache_tokens // replica.max_context_tokens))
    return LlamaCpp(
        name=replica.model,
        command=(
            *(sys.executable, "-m", "waterline.service.engines.llamacpp"),
            *("--model", weights),
            *("--alias", replica.model),
            *("--slots", str(slots)),
            *("--context", str(replica.max_context_tokens)),
        ),
        environment=(
            {VISIBLE_DEVICES[gpu.vendor]: ",".join(str(gpu) for place in replica.places for gpu in place.gpus)}
            if gpu.vendor in VISIBLE_DEVICES
            else {}
        ),
    )


@click.command()
@click.option("--model", required=True, help="A GGUF file.")
@click.option("--alias", required=True, help="What requests call the model.")
@click.option("--slots", required=True, type=int, help="Requests decoded together.")
@click.option("--context", required=True, type=int, help="Tokens of one request, prompt and output.")
def main(model: str, alias: str, slots: int, context: int) -> None:
    """Serve one model on a free port of this machine until standard input ends."""
    end_with_parent()
    import xllamacpp  # noqa: PLC0415 - an extra, and only this process needs it

    threads = max(1, min(os.cpu_count() or 1, Path(model).stat().st_size // BYTES_PER_THREAD))
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.model_alias = {alias}
    parameters.n_parallel = slots
    parameters.n_ctx = slots * context  # shared out evenly among the slots
    parameters.n_threads_http = 2 * slots + 4  # each connection holds one, and idle ones stay a while
    parameters.hostnames = ["127.0.0.1"]
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
