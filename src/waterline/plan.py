"""The file the planner writes and the other two jobs read: which replica runs where."""

from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from waterline.errors import PlanFileError
from waterline.fleet import Fleet

VERSION = 1
Limit = Literal["memory", "ttft", "tpot", "engine"]


class Layout(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one copy of a model is spread over GPUs: tensor, pipeline, expert and data parallel degrees."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1

    @property
    def gpus(self) -> int:
        """Expert parallelism reuses the GPUs of the other degrees, so it does not count."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        degrees = (("tp", self.tp), ("pp", self.pp), ("ep", self.ep), ("dp", self.dp))
        return " ".join(f"{name}{degree}" for name, degree in degrees if degree > 1) or "tp1"


class Place(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some GPUs of one node; nodes and GPUs count from 0 within the pool and the node."""

    node: int
    gpus: tuple[int, ...]


class Replica(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One running engine for one model in one layout, with what the cost model expects of it."""

    id: str  # "r1/0": the model and a counter
    model: str
    pool: str
    places: tuple[Place, ...]
    precision: str
    layout: Layout
    engine: str
    max_context_tokens: int
    max_batch: int  # requests decoded together, at most: as many as its SLO's time per token allows
    cache_tokens: int  # tokens the KV cache holds, over all requests
    requests_per_s: float  # the most at which its SLO holds
    prefill_tokens_per_s: float  # the rate at which it reads prompts while others decode
    tokens_per_s: float  # prompt and output together, with `max_batch` requests all the time
    ttft_s: float  # what the SLO's fraction of the requests is expected to see at most, at the planned rate
    tpot_s: float
    usd_per_hour: float


class ModelPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a model's replicas are what they are."""

    model: str
    requests_per_s: float  # the demand planned for: the peak hour, over all tenants
    prompt_tokens: int  # mean of that demand: what a request is expected to be before it has told
    output_tokens: int
    replicas: int
    gpus: int
    usd_per_hour: float
    usd_per_million_tokens: float | None  # input and output together, at the planned demand; None without demand
    limited_by: Limit  # what keeps a replica from taking more
    reason: str


class TenantPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a tenant's demand takes at its peak, beside what it is entitled to, in GPUs."""

    tenant: str
    gpus: float  # a tenant's part of a shared replica is a fraction
    guarantee_gpus: float
    deserved_gpus: float
    limit_gpus: float

    @property
    def borrowed_gpus(self) -> float:
        return max(0.0, self.gpus - self.deserved_gpus)


class Plan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a rehearsal or a live service needs; the fleet file travels inside."""

    version: int = VERSION
    fleet: Fleet
    models: tuple[ModelPlan, ...]
    tenants: tuple[TenantPlan, ...]
    replicas: tuple[Replica, ...]

    @property
    def usd_per_hour(self) -> float:
        return sum(replica.usd_per_hour for replica in self.replicas)

    @property
    def gpus(self) -> int:
        return sum(replica.layout.gpus for replica in self.replicas)

    @property
    def replica_usd_per_hour(self) -> dict[str, float]:
        """By the id of the replica."""
        return {replica.id: replica.usd_per_hour for replica in self.replicas}

    def replicas_of(self, model: str) -> tuple[Replica, ...]:
        return tuple(replica for replica in self.replicas if replica.model == model)


def write_plan(plan: Plan, path: Path) -> None:
    """Write the plan as JSON, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PlanFileError(f"cannot write {path}: {error.strerror}. Choose another place with --output.") from error


def read_plan(path: Path) -> Plan:
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=Plan)
    except OSError as error:
        raise PlanFileError(f"cannot read {path}: {error.strerror}.") from error
    except msgspec.MsgspecError as error:
        raise PlanFileError(f"{path} is not a plan: {error}. Write it again with: waterline plan FLEET") from error
    if plan.version != VERSION:
        raise PlanFileError(
            f"{path} is a plan of version {plan.version}, this program reads {VERSION}. "
            "Write it again with: waterline plan FLEET"
        )
    return plan
