"""The file the planner writes and the other two jobs read: which replica runs where, and at which hours of the day."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from waterline.errors import InputError, PlanFileError, nearest
from waterline.fleet import ENGINES, HOURS, Count, Fleet, Name, Objective, Pool, check_fleet
from waterline.llm import PRECISIONS
from waterline.workload import write_whole

VERSION = 3
WRITE_AGAIN = "Write it again with: waterline plan FLEET"
EVERY_HOUR = tuple(range(HOURS))
Limit = Literal["memory", "ttft", "tpot", "engine"]
Role = Literal["both", "prefill", "decode"]
Hour = Annotated[int, Meta(ge=0, lt=HOURS)]  # of the day, from midnight on
Index = Annotated[int, Meta(ge=0)]
Tokens = Annotated[int, Meta(ge=1)]  # worked out, not typed: a cache may hold more than any Count
Figure = Annotated[float, Meta(ge=0)]  # likewise


class Layout(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one copy of a model is spread over GPUs: tensor, pipeline, expert and data parallel degrees."""

    tp: Count = 1
    pp: Count = 1
    ep: Count = 1
    dp: Count = 1

    @property
    def gpus(self) -> int:
        """Expert parallelism reuses the GPUs of the other degrees, so it does not count."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        degrees = (("tp", self.tp), ("pp", self.pp), ("ep", self.ep), ("dp", self.dp))
        return " ".join(f"{name}{degree}" for name, degree in degrees if degree > 1) or "tp1"


class Place(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some GPUs of one node; nodes and GPUs count from 0 within the pool and the node."""

    node: Index
    gpus: tuple[Index, ...]


class Replica(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One running engine for one model in one layout, with what the cost model expects of it."""

    id: Name  # "r1/0": the model and a counter
    model: Name
    pool: Name
    places: tuple[Place, ...]
    precision: str
    layout: Layout
    engine: str
    max_context_tokens: Tokens
    max_batch: Count  # requests decoded together, at most: as many as its SLO's time per token allows
    cache_tokens: Tokens  # tokens the KV cache holds, over all requests
    requests_per_s: Figure  # the most at which its SLO holds
    prefill_tokens_per_s: Figure  # the rate at which it reads prompts while others decode
    tokens_per_s: Figure  # prompt and output, with `max_batch` requests all the time; of a split what its role sustains
    ttft_s: Figure  # what the SLO's fraction of the requests is expected to see at most, at the planned rate
    tpot_s: Figure
    usd_per_hour: Figure
    role: Role = "both"  # "prefill" reads prompts and sends their cache on, "decode" writes the answers
    hours: tuple[Hour, ...] = EVERY_HOUR  # at which it serves; it is loaded before the first of them
    load_s: Figure = 0.0  # from its start to its first request: the engine, and the weights onto that node


class Shape(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a replica of a model is on a pool, wherever one is started there that the plan has not placed."""

    model: Name
    pool: Name
    precision: str
    layout: Layout
    engine: str
    max_context_tokens: Tokens
    max_batch: Count
    cache_tokens: Tokens
    requests_per_s: Figure  # the most at which its SLO holds, with the requests of its busiest hour
    prefill_tokens_per_s: Figure
    tokens_per_s: Figure
    ttft_s: Figure  # at that rate
    tpot_s: Figure
    usd_per_hour: Figure
    load_s: Figure

    def replica(self, id_: str, places: tuple[Place, ...]) -> Replica:
        """Return a replica of this shape, which serves at any hour."""
        return Replica(id=id_, places=places, **{name: getattr(self, name) for name in self.__struct_fields__})


class ModelPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a model's replicas are what they are."""

    model: Name
    requests_per_s: Figure  # the demand planned for: the peak hour, over all tenants
    prompt_tokens: Count  # mean of that demand: what a request is expected to be before it has told
    output_tokens: Count
    replicas: Index  # at the hour at which it has most GPUs; 0 where the fleet is too small
    gpus: Index
    usd_per_hour: Figure  # at that hour
    usd_per_million_tokens: Figure | None  # input and output together, over the day; None where nothing is served
    limited_by: Limit  # what keeps a replica from taking more
    reason: str
    slo_hour_usd: Figure = 0.0  # saved a day if the SLO did not have to hold at the busiest hour


class PoolPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of a pool is used, and what more of it would be worth."""

    pool: Name
    gpus: Index  # in use at the hour at which most are
    worth_usd_per_gpu_hour: Figure  # what one more GPU of this kind would save; 0 where there is room


class TenantPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a tenant's demand takes at its peak, beside what it is entitled to, in GPUs."""

    tenant: Name
    gpus: Figure  # a tenant's part of a shared replica is a fraction
    guarantee_gpus: Figure
    deserved_gpus: Figure
    limit_gpus: Figure

    @property
    def borrowed_gpus(self) -> float:
        return max(0.0, self.gpus - self.deserved_gpus)


class Share(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tenant's part of one model at one hour."""

    tenant: Name
    model: Name
    asked_requests_per_s: Figure
    served_requests_per_s: Figure  # the same, but where the fleet is too small
    gpus: Figure  # of the model's: the GPU time of its requests, and idle time that it has room for


class Loan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """GPUs a tenant uses beyond what it deserves, and who deserves them. They come back within the hour."""

    lender: str  # "": deserved by nobody
    borrower: Name
    gpus: Figure


class HourPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One hour of the day: who is served with how many GPUs, from whom they come, and what moves."""

    hour: Hour
    gpus: Index  # that serve
    usd: Figure  # for this hour, starts of replicas included
    watts: Figure  # of the GPUs that serve
    shares: tuple[Share, ...]
    loans: tuple[Loan, ...] = ()
    starts: tuple[Name, ...] = ()  # replicas that serve from this hour on and did not before; midnight follows 23
    stops: tuple[Name, ...] = ()  # replicas that served until this hour

    def gpus_of(self, tenant: str) -> float:
        return math.fsum(share.gpus for share in self.shares if share.tenant == tenant)


class Plan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a rehearsal or a live service needs; the fleet file travels inside."""

    version: int = VERSION
    fleet: Fleet
    objective: Objective = "money"  # "goodput" where the fleet is too small for its demand
    models: tuple[ModelPlan, ...]
    tenants: tuple[TenantPlan, ...]
    replicas: tuple[Replica, ...]
    hours: tuple[HourPlan, ...] = ()  # all 24; empty in a plan whose replicas serve all day
    pools: tuple[PoolPlan, ...] = ()
    shapes: tuple[Shape, ...] = ()  # at most one of a model on a pool: the best that is whole, prompts and answers
    warnings: tuple[str, ...] = ()  # where the fleet is too small: what is not served, why, and what would help

    @property
    def busiest_hour(self) -> int:
        """The hour at which most GPUs serve; the first of several."""
        gpus = [sum(replica.layout.gpus for replica in self.replicas_at(hour)) for hour in EVERY_HOUR]
        return gpus.index(max(gpus))

    def replicas_at(self, hour: int) -> tuple[Replica, ...]:
        return tuple(replica for replica in self.replicas if hour in replica.hours)

    @property
    def together(self) -> tuple[Replica, ...]:
        """Replicas that can serve side by side: those of the busiest hour, and others whose GPUs they leave free."""
        busiest = self.replicas_at(self.busiest_hour)
        taken: set[tuple[str, int, int]] = set()
        chosen = []
        for replica in (*busiest, *(other for other in self.replicas if self.busiest_hour not in other.hours)):
            gpus = {(replica.pool, place.node, gpu) for place in replica.places for gpu in place.gpus}
            if not gpus & taken:
                taken |= gpus
                chosen.append(replica)
        return tuple(chosen)

    @property
    def usd_per_hour(self) -> float:
        """At the busiest hour."""
        return math.fsum(replica.usd_per_hour for replica in self.replicas_at(self.busiest_hour))

    @property
    def gpus(self) -> int:
        """At the busiest hour."""
        return sum(replica.layout.gpus for replica in self.replicas_at(self.busiest_hour))

    @property
    def replica_usd_per_hour(self) -> dict[str, float]:
        """By the id of the replica."""
        return {replica.id: replica.usd_per_hour for replica in self.replicas}

    def replicas_of(self, model: str) -> tuple[Replica, ...]:
        return tuple(replica for replica in self.replicas if replica.model == model)


class _Versioned(Struct, frozen=True, kw_only=True):
    """What every version of a plan says first."""

    version: int = VERSION


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write the plan as JSON, whole or not at all."""
    if not isinstance(plan, Plan):
        raise TypeError(f"write_plan writes a Plan, as make_plan returns it, not a {type(plan).__name__}.")
    try:
        write_whole(path, msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n")
    except OSError as error:
        raise PlanFileError(f"cannot write {path}: {error.strerror}. Choose another place with --output.") from error


def is_plan(path: str | os.PathLike[str]) -> bool:
    """Tell a plan from a fleet file by its first character, whatever its name.

    False for what cannot be read, and for a pipe, which can be read only once.
    """
    path = Path(path)
    try:
        return path.is_file() and path.read_bytes().lstrip().startswith(b"{")
    except OSError:
        return False


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan and check that it makes sense: people edit it. Raises PlanFileError naming the place."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PlanFileError(f"cannot read {path}: {error.strerror}.") from error
    try:
        version = msgspec.json.decode(data, type=_Versioned).version  # another version has other keys
        plan = msgspec.json.decode(data, type=Plan) if version == VERSION else None
    except msgspec.ValidationError as error:
        raise PlanFileError(f"{path} is not a plan: {_explain(str(error), data)}. {WRITE_AGAIN}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PlanFileError(f"{path} is not a plan: {error}. {WRITE_AGAIN}") from error
    if plan is None:
        raise PlanFileError(f"{path} is a plan of version {version}, this program reads {VERSION}. {WRITE_AGAIN}")
    try:
        plan = replace(plan, fleet=check_fleet(plan.fleet, path))
    except InputError as error:
        raise PlanFileError(f"{path}: fleet: {str(error).removeprefix(f'{path}: ')} {WRITE_AGAIN}") from error
    for problem in _problems(plan):
        raise PlanFileError(f"{path}: {problem} {WRITE_AGAIN}")
    return plan


# --- What can be wrong with a plan ----------------------------------------------------------------------------------


def _explain(message: str, data: bytes) -> str:
    """Put the place in front of what msgspec says, as people find it: ``replica 'r1/0': layout.tp = 0``."""
    problem, _, where = message.partition(" - at `$")
    if not where:
        return problem
    where = where.rstrip("`")
    found = re.fullmatch(r"\.replicas\[(\d+)\]\.?(.*)", where)
    value: Any = json.loads(data)  # which reads 1e999 too
    named = f"${where}"
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", where):
        value = value[key] if key else value[int(index)]
        if found and index == found[1] and isinstance(value, dict) and "id" in value:
            named = f"replica '{value['id']}'" + (f": {found[2]}" if found[2] else "")
    shown = f" = {value!r}" if isinstance(value, int | float | str) else ""
    return f"{named}{shown}: {problem[0].lower()}{problem[1:]}"


def _problems(plan: Plan) -> Iterator[str]:
    """Hold the plan against its own fleet."""
    models = [model.name for model in plan.fleet.models]
    planned = [model.model for model in plan.models]
    for name in planned:
        yield from _unknown("models: model", name, models)
    for name in models:
        if planned.count(name) != 1:
            yield f"models: '{name}' is there {planned.count(name)} times, not once."
        if not plan.replicas_of(name) and plan.objective != "goodput":
            yield f"replicas: model '{name}' has none."
    for tenant in plan.tenants:
        yield from _unknown("tenants: tenant", tenant.tenant, [known.name for known in plan.fleet.tenants])
    for id_, count in Counter(replica.id for replica in plan.replicas).items():
        if count > 1:
            yield f"replica '{id_}': {count} replicas have this id."
    pools = {pool.name: pool for pool in plan.fleet.pools}
    for replica in plan.replicas:
        where = f"replica '{replica.id}'"
        yield from _unknown(f"{where}: model", replica.model, models)
        yield from _unknown(f"{where}: pool", replica.pool, pools)
        yield from _unknown(f"{where}: precision", replica.precision, PRECISIONS)
        yield from _unknown(f"{where}: engine", replica.engine, ENGINES)
        if not replica.hours or list(replica.hours) != sorted(set(replica.hours)):
            yield f"{where}: hours = {list(replica.hours)} must be hours of the day in their order, at least one."
    yield from _misplaced(plan.replicas, pools)
    yield from _wrong_shapes(plan, pools)
    yield from _wrong_hours(plan)


def _wrong_shapes(plan: Plan, pools: Mapping[str, Pool]) -> Iterator[str]:
    models = [model.name for model in plan.fleet.models]
    for (model, pool), count in Counter((shape.model, shape.pool) for shape in plan.shapes).items():
        where = f"shape of '{model}' on '{pool}'"
        yield from _unknown(f"{where}: model", model, models)
        yield from _unknown(f"{where}: pool", pool, pools)
        if count > 1:
            yield f"shapes: there are {count} of '{model}' on '{pool}'. Keep one."
    for shape in plan.shapes:
        where = f"shape of '{shape.model}' on '{shape.pool}'"
        yield from _unknown(f"{where}: precision", shape.precision, PRECISIONS)
        yield from _unknown(f"{where}: engine", shape.engine, ENGINES)
        taken, there = shape.layout.gpus, pools[shape.pool].gpus
        if taken > there:
            yield f"{where}: layout {shape.layout} takes {taken} GPUs, and the pool has {there}."


def _wrong_hours(plan: Plan) -> Iterator[str]:
    numbers = [hour.hour for hour in plan.hours]
    if numbers and numbers != list(EVERY_HOUR):
        yield f"hours: they are {numbers}, and must be 0 to {HOURS - 1} in their order, or none at all."
    tenants = {tenant.name for tenant in plan.fleet.tenants}
    models = {model.name for model in plan.fleet.models}
    ids = {replica.id for replica in plan.replicas}
    for hour in plan.hours:
        named = [
            *(("tenant of a share", share.tenant, tenants) for share in hour.shares),
            *(("model of a share", share.model, models) for share in hour.shares),
            *(("borrower of a loan", loan.borrower, tenants) for loan in hour.loans),
            *(("lender of a loan", loan.lender, tenants) for loan in hour.loans if loan.lender),
            *(("starts: replica", id_, ids) for id_ in hour.starts),
            *(("stops: replica", id_, ids) for id_ in hour.stops),
        ]
        for what, name, known in named:
            if name not in known:
                yield from _unknown(f"hour {hour.hour}: {what}", name, known)


def _unknown(where: str, name: str, known: Iterable[str]) -> Iterator[str]:
    if name not in (names := list(known)):
        yield f"{where} = '{name}' is not known. {nearest(name, names)}"


def _misplaced(replicas: Iterable[Replica], pools: Mapping[str, Pool]) -> Iterator[str]:
    taken: dict[tuple[str, int, int], list[Replica]] = {}  # (pool, node, GPU) -> replicas, at different hours
    for replica in replicas:
        where, pool = f"replica '{replica.id}': places", pools[replica.pool]
        places = [(place.node, gpu) for place in replica.places for gpu in place.gpus]
        if len(places) != replica.layout.gpus:
            yield f"{where}: {len(places)} GPUs, but layout {replica.layout} takes {replica.layout.gpus}."
        for node, gpu in places:
            if node >= pool.nodes or gpu >= pool.gpus_per_node:
                yield (
                    f"{where}: GPU {gpu} of node {node} is not in pool '{pool.name}', which has {pool.nodes} x "
                    f"{pool.gpus_per_node} GPUs, counted from 0."
                )
            there = taken.setdefault((pool.name, node, gpu), [])
            for other in there:
                if both := set(other.hours) & set(replica.hours):
                    yield (
                        f"{where}: GPU {gpu} of node {node} in pool '{pool.name}' is taken by '{other.id}' already, "
                        f"at hour {min(both)}."
                    )
            there.append(replica)
