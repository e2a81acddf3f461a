"""vLLM, on CUDA and on ROCm: the command of one process, and the engine that runs it here."""

import json
from dataclasses import replace

from waterline.catalog.engines import find_engine
from waterline.plan import Plan, Replica
from waterline.service.engines import seat as seats
from waterline.service.engines.dialect import VLLM
from waterline.service.engines.hosted import Hosted, host
from waterline.service.engines.parsing import mark_of, own_arguments, parser_flags
from waterline.service.engines.seat import Command, Seat

WHILE_LOADING = {"fp8": "fp8_per_channel", "nvfp4": "nvfp4_per_token"}  # what it makes of 16-bit weights
KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


def command(plan: Plan, replica: Replica, seat: Seat) -> Command:
    """Return how one process of a replica is started. Raises EngineError for what vLLM cannot do.

    Source of the flags: vLLM 0.33.
    """
    fleet = plan.fleet
    model, gpu = fleet.model(replica.model), fleet.gpu_of(fleet.pool(replica.pool))
    llm, profile, layout = fleet.llm_of(model), find_engine("vllm").on(gpu), replica.layout
    seats.check_stack(gpu, replica, "vLLM")
    seats.check_even(replica, "vLLM")
    arguments = (
        *("vllm", "serve", seats.checkpoint(model, llm)),
        *("--served-model-name", model.name),
        *seat.listening,
        *("--tensor-parallel-size", str(layout.tp)),
        *(("--pipeline-parallel-size", str(layout.pp)) if layout.pp > 1 else ()),
        *(("--data-parallel-size", str(layout.dp)) if layout.dp > 1 else ()),
        *(("--enable-expert-parallel",) if layout.ep > 1 else ()),
        *_nodes(replica, seat),
        *("--max-model-len", str(replica.max_context_tokens)),
        *("--max-num-seqs", str(seats.batch_of_rank(replica))),  # of one data-parallel rank
        *("--max-num-batched-tokens", str(profile.step_tokens)),
        *("--gpu-memory-utilization", f"{profile.usable_memory_fraction:g}"),
        *seats.dtype_flags(replica.precision),
        *seats.quantization_flags(plan, replica, llm, "vLLM", WHILE_LOADING),
        *("--kv-cache-dtype", profile.cache_dtype(replica.precision)),
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",  # how much of a prompt was cached, for the ledger
        *("--scheduling-policy", "priority"),  # lower numbers first
        *("--max-num-queued-reqs", str(2 * replica.max_batch)),  # running ones count; the queue is in the gateway
        *_transfer(replica),
        *parser_flags("vllm", model, llm, with_tools=("--enable-auto-tool-choice",)),
        *own_arguments(model),
    )
    return arguments, seats.devices(gpu, replica, seat) | _aiter(gpu.target) | _side_channel(replica, seat)


def prepare(plan: Plan, replica: Replica, seat: Seat | None = None) -> Hosted:
    """Return the engine of a replica, on this machine or where its seat is. Raises EngineError."""
    arguments, environment = command(plan, replica, seats.at(seat, replica))
    dialect = replace(VLLM, end_of_thinking=mark_of("vllm", arguments))
    return host(replica, (arguments, environment), dialect)


def _nodes(replica: Replica, seat: Seat) -> tuple[str, ...]:
    """Return how the processes of several nodes find each other; only the first of them answers requests."""
    if len(replica.places) == 1:
        return ()
    messages = ("--data-parallel-rpc-port", str(seats.inner_port(replica, 0, seats.MESSAGES)))
    return (
        *("--distributed-executor-backend", "mp"),
        *("--nnodes", str(len(replica.places))),
        *("--node-rank", str(seat.rank)),
        *("--master-addr", seat.head_address),
        *("--master-port", str(seats.inner_port(replica, 0, seats.MEETING))),
        *(messages if replica.layout.dp > 1 else ()),
        *(("--headless",) if seat.rank else ()),
    )


def _transfer(replica: Replica) -> tuple[str, ...]:
    if replica.role not in KV_ROLES:
        return ()
    config = {"kv_connector": "NixlConnector", "kv_role": KV_ROLES[replica.role], "kv_load_failure_policy": "fail"}
    return ("--kv-transfer-config", json.dumps(config))  # a cache that is lost: the gateway has it read again


def _side_channel(replica: Replica, seat: Seat) -> dict[str, str]:
    """Return where decoders ask a reader of prompts for its cache; a data-parallel rank adds its number to the port."""
    if replica.role not in KV_ROLES:
        return {}
    port = seats.inner_port(replica, seat.rank, seats.TRANSFER)
    return {"VLLM_NIXL_SIDE_CHANNEL_HOST": seat.address, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}


def _aiter(target: str) -> dict[str, str]:
    return {"VLLM_ROCM_USE_AITER": "1"} if target in seats.AITER_TARGETS else {}
