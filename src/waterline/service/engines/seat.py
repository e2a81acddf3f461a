"""Where one process of a replica runs, and what follows from it: which cards it sees, which ports it takes.

A replica on one node is one process; on several it is one a node, and the first of them answers requests. The command
of an engine is a pure function of plan, replica and seat, in the engine's own file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from waterline.errors import EngineError
from waterline.fleet import Model
from waterline.hardware import Gpu
from waterline.llm import Llm
from waterline.plan import Plan, Replica

VISIBLE_DEVICES = {"nvidia": "CUDA_VISIBLE_DEVICES", "amd": "HIP_VISIBLE_DEVICES"}
AITER_TARGETS = ("gfx942", "gfx950")  # AMD's kernels for inference are written for these, and are off by default
API_PORT = 8100  # of the replica whose first card on that node is number 0
INNER_PORT, INNER_PORTS = 20_000, 40  # likewise: a block of so many, for processes to talk among themselves
MEETING, MESSAGES, TRANSFER = 0, 7, 8  # ports of that block: SGLang takes six behind the first one for itself
FULL_WIDTH = ("fp32", "bf16", "fp16")

Command = tuple[tuple[str, ...], dict[str, str]]  # arguments, and the environment on top of what is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One process of a replica."""

    rank: int = 0  # which of the replica's places
    host: str = "127.0.0.1"  # what it listens on for requests
    port: int = 0  # 0: whoever starts it adds one
    address: str = "127.0.0.1"  # under which other nodes reach this one
    head_address: str = "127.0.0.1"  # … and the replica's first one

    @property
    def listening(self) -> tuple[str, ...]:
        return ("--host", self.host, *(("--port", str(self.port)) if self.port else ()))


def api_port(replica: Replica) -> int:
    """Return where a replica answers requests: none that serves at the same hour has its first card, nor its port."""
    return API_PORT + min(replica.places[0].gpus, default=0)


def inner_port(replica: Replica, rank: int, which: int) -> int:
    return INNER_PORT + INNER_PORTS * min(replica.places[rank].gpus, default=0) + which


def devices(gpu: Gpu, replica: Replica, seat: Seat) -> dict[str, str]:
    """Return the mask that leaves a process no cards but its own; nothing for cards without one."""
    if gpu.vendor not in VISIBLE_DEVICES:
        return {}
    return {VISIBLE_DEVICES[gpu.vendor]: ",".join(map(str, replica.places[seat.rank].gpus))}


def environment_of(wanted: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process: ours, with what it wants on top.

    Its mask counts among the cards that ours leaves us, be they numbers or UUIDs. HIP counts by itself among those that
    ROCR_VISIBLE_DEVICES leaves, and takes CUDA_VISIBLE_DEVICES for its own: a process on AMD cards gets none.

    Raises EngineError where ours leaves too few.
    """
    environment = {**ours, **wanted}
    for mask in VISIBLE_DEVICES.values():
        left = [one.strip() for one in ours.get(mask, "").split(",") if one.strip()]
        if mask in wanted and left:
            numbers = [int(number) for number in wanted[mask].split(",")]
            if max(numbers) >= len(left):
                raise EngineError(
                    f"{mask} is {ours[mask]} where waterline runs: that leaves {len(left)} cards, and number "
                    f"{max(numbers)} of them, counted from 0, is wanted. Unset it, or write that many as gpus_per_node."
                )
            environment[mask] = ",".join(left[number] for number in numbers)
    if VISIBLE_DEVICES["amd"] in wanted:
        environment.pop(VISIBLE_DEVICES["nvidia"], None)
    return environment


def checkpoint(model: Model, llm: Llm) -> str:
    """Return what an engine loads: what the fleet file says, or the id on the Hub of a name of the catalogue."""
    return model.weights if "/" in model.weights else llm.name


def check_stack(gpu: Gpu, replica: Replica, engine: str) -> None:
    """Raise EngineError for a card that neither CUDA nor ROCm runs on."""
    if gpu.stack not in {"cuda", "rocm"}:
        raise EngineError(
            f"replica '{replica.id}': {engine} is started on CUDA and on ROCm, and '{gpu.id}' of pool '{replica.pool}' "
            f'runs {gpu.stack}. Start a server for it yourself and attach to it with engine = "openai" and '
            'url = "http://…/v1".'
        )


def check_even(replica: Replica, engine: str) -> None:
    """Raise EngineError unless every node holds as many cards: engines count them off in equal parts."""
    if len({len(place.gpus) for place in replica.places}) > 1:
        parts = " + ".join(str(len(place.gpus)) for place in replica.places)
        raise EngineError(
            f"replica '{replica.id}' takes {parts} cards on its {len(replica.places)} nodes, and {engine} wants as "
            "many on each. Change gpus_per_node, or plan the model on another pool."
        )


def dtype_flags(precision: str) -> tuple[str, ...]:
    """Return the type of unquantised weights; both vLLM and SGLang would halve fp32 by themselves."""
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    return ("--dtype", names[precision]) if precision in names else ()


def quantization_flags(
    plan: Plan, replica: Replica, llm: Llm, engine: str, while_loading: dict[str, str]
) -> tuple[str, ...]:
    """Return nothing where the checkpoint is in the planned precision, for it says so itself; else what makes it so.

    `while_loading` has the engine's names for what it makes of 16-bit weights. Raises EngineError when it cannot.
    """
    if replica.precision == llm.precision or {replica.precision, llm.precision} <= set(FULL_WIDTH):
        return ()
    if llm.precision in FULL_WIDTH and replica.precision in while_loading:
        return ("--quantization", while_loading[replica.precision])
    raise EngineError(
        f"model '{replica.model}' is planned in {replica.precision}, but '{plan.fleet.model(replica.model).weights}' "
        f"is stored in {llm.precision}, and {engine} cannot turn one into the other while it loads. Write a "
        f"checkpoint in {replica.precision} as 'weights', or leave {replica.precision} out of 'precisions'."
    )


def batch_of_rank(replica: Replica) -> int:
    """Return the requests one data-parallel rank decodes together."""
    return math.ceil(replica.max_batch / replica.layout.dp)


def at(seat: Seat | None, replica: Replica) -> Seat:
    """Return where a replica's first process runs: on this machine, unless that is said. Raises EngineError."""
    if seat is None:
        check_here(replica)
    return seat or Seat()


def check_here(replica: Replica) -> None:
    """Raise EngineError for a replica that is not planned on this machine, which is the first node of its pool."""
    far = next((place.node for place in replica.places if place.node > 0), None)
    if far is not None:
        raise EngineError(
            f"replica '{replica.id}' is planned on node {far} of pool '{replica.pool}', but engines are started on "
            "this machine only. Let Ray start them on their nodes (waterline up … --ray ADDRESS), or start the server "
            'there yourself and attach to it with engine = "openai" and url = "http://…/v1".'
        )
