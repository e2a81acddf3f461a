"""SGLang, on CUDA and on ROCm: the command of one process, and the engine that runs it here."""

from dataclasses import replace

from waterline.catalog.engines import find_engine
from waterline.plan import Plan, Replica
from waterline.service.engines import seat as seats
from waterline.service.engines.dialect import SGLANG
from waterline.service.engines.hosted import Hosted, host
from waterline.service.engines.parsing import mark_of, own_arguments, parser_flags
from waterline.service.engines.seat import Command, Seat

QUICK_HEALTH = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}  # else a probe waits for a token in a full batch
WHILE_LOADING = {"fp8": "fp8", "nvfp4": "nvfp4_online"}  # what it makes of 16-bit weights
CACHE_DTYPES = {"fp8": "fp8_e4m3"}  # our words in its own, where they differ


def command(plan: Plan, replica: Replica, seat: Seat) -> Command:
    """Return how one process of a replica is started. Raises EngineError for what SGLang cannot do.

    Source of the flags: SGLang 0.5.23. --mem-fraction-static is SGLang's own choice, which the cost model follows.
    """
    fleet = plan.fleet
    model, gpu = fleet.model(replica.model), fleet.gpu_of(fleet.pool(replica.pool))
    llm, profile, layout = fleet.llm_of(model), find_engine("sglang").on(gpu), replica.layout
    seats.check_stack(gpu, replica, "SGLang")
    seats.check_even(replica, "SGLang")
    cache_dtype = profile.cache_dtype(replica.precision)
    arguments = (
        *("sglang", "serve", "--model-path", seats.checkpoint(model, llm)),
        *("--served-model-name", model.name),
        *seat.listening,
        *("--tp-size", str(layout.tp * layout.dp)),  # it counts the ranks of data-parallel attention in
        *(("--pp-size", str(layout.pp)) if layout.pp > 1 else ()),
        *(("--attn-dp-size", str(layout.dp)) if layout.dp > 1 else ()),
        *(("--ep-size", str(layout.ep)) if layout.ep > 1 else ()),
        *_nodes(replica, seat),
        *("--context-length", str(replica.max_context_tokens)),
        *("--max-running-requests", str(seats.batch_of_rank(replica) * layout.dp)),  # of all data-parallel ranks
        *("--chunked-prefill-size", str(profile.step_tokens * layout.dp)),  # likewise
        *seats.dtype_flags(replica.precision),
        *seats.quantization_flags(plan, replica, llm, "SGLang", WHILE_LOADING),
        *("--kv-cache-dtype", CACHE_DTYPES.get(cache_dtype, cache_dtype)),
        "--enable-priority-scheduling",
        "--schedule-low-priority-values-first",  # as vLLM does, so that the gateway need not know which it is
        *("--max-queued-requests", str(replica.max_batch)),  # the queue is in the gateway
        "--enable-metrics",
        "--enable-cache-report",  # how much of a prompt was cached, for the ledger
        *_role(replica),
        *parser_flags("sglang", model, llm),
        *own_arguments(model),
    )
    return arguments, seats.devices(gpu, replica, seat) | _aiter(gpu.target)


def prepare(plan: Plan, replica: Replica, seat: Seat | None = None) -> Hosted:
    """Return the engine of a replica, on this machine or where its seat is. Raises EngineError."""
    arguments, environment = command(plan, replica, seats.at(seat, replica))
    dialect = replace(SGLANG, end_of_thinking=mark_of("sglang", arguments))
    if replica.role == "prefill":
        dialect = replace(dialect, meeting_port=_meeting_port(replica))
    return host(replica, (arguments, environment | QUICK_HEALTH), dialect)


def _nodes(replica: Replica, seat: Seat) -> tuple[str, ...]:
    """Return how the processes of several nodes find each other; only the first of them answers requests."""
    meeting = ("--dist-init-addr", f"{seat.head_address}:{seats.inner_port(replica, 0, seats.MEETING)}")
    if len(replica.places) > 1:
        return ("--nnodes", str(len(replica.places)), "--node-rank", str(seat.rank), *meeting)
    return meeting if replica.layout.dp > 1 else ()  # its own choice of ports might be a neighbour's


def _role(replica: Replica) -> tuple[str, ...]:
    if replica.role == "both":
        return ()
    port = str(_meeting_port(replica))
    return (
        *("--disaggregation-mode", replica.role),
        *("--disaggregation-transfer-backend", "nixl"),
        *(("--disaggregation-bootstrap-port", port) if replica.role == "prefill" else ()),
    )


def _meeting_port(replica: Replica) -> int:
    """Return where one that reads prompts is found by those that write the answers."""
    return seats.inner_port(replica, 0, seats.TRANSFER)


def _aiter(target: str) -> dict[str, str]:
    return {"SGLANG_USE_AITER": "1"} if target in seats.AITER_TARGETS else {}
