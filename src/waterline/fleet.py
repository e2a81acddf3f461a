"""The fleet file: what a person writes, checked, with every default derived.

`load_fleet` is the only way in. What it returns names only GPUs and models that exist, shares that fit the fleet, and
traces that are there; every error names the file, the key and what to write instead.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from waterline import catalog
from waterline.catalog.engine_flags import check_arguments
from waterline.errors import FleetFileError, UnknownNameError, WaterlineError, nearest
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, Llm
from waterline.units import DAY_S, GIGA
from waterline.workload import Slo
from waterline.workload.columns import parse_columns

HOURS = 24
DEFAULT_CONTEXT_TOKENS = 32_768
ENGINES = ("vllm", "sglang", "llamacpp", "openai", "fake")
PRICED_ENGINES = ("trtllm",)  # that `waterline fit` and `waterline estimate` know, and nothing starts

NO_PRICES: Mapping[str, float] = {}
Objective = Literal["money", "energy", "goodput"]
Anonymous = bool | Literal["local"]
MOST = 10**7  # of anything that is counted here; a slip of the finger, not a fleet, is larger
Count = Annotated[int, Meta(ge=1, le=MOST)]
Positive = Annotated[float, Meta(gt=0, le=MOST)]
Rate = Annotated[float, Meta(ge=0, le=MOST)]
Usd = Annotated[float, Meta(ge=0, le=MOST)]
Seconds = Annotated[float, Meta(ge=0, le=MOST)]
Name = Annotated[str, Meta(min_length=1)]


class Pool(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Identical nodes."""

    name: Name
    gpu: Name  # an id of the catalogue, or a name people type
    nodes: Count = 1
    gpus_per_node: Annotated[int, Meta(ge=0, le=1024)] = 0  # 0: what the catalogue says is usually in one node
    usd_per_gpu_hour: Usd | None = None  # None: the catalogue's price

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


class Measured(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an owner has measured of a model on some GPUs of a kind; it is believed instead of the cost model."""

    gpu: Name  # an id of the catalogue, or a name people type
    gpus: Count  # that reach these rates together: a whole node, say
    prompt_tokens_per_s: Annotated[float, Meta(gt=0)]  # while they only read; cached tokens count
    output_tokens_per_s: Annotated[float, Meta(gt=0)]  # while they only write


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model to be served."""

    name: Name
    weights: Name  # catalogue id, Hugging Face id, a folder with config.json, or a .gguf file
    precisions: tuple[str, ...] = ()  # what the owner accepts; empty: as published, and what keeps its quality
    max_context_tokens: Annotated[int, Meta(ge=0)] = 0  # 0: the model's own, at most DEFAULT_CONTEXT_TOKENS
    slo: Slo | None = None  # None: by the size of the model
    engine: str = ""  # "": llama.cpp for a .gguf, else vLLM
    url: str = ""  # of a running OpenAI-compatible server, for the engine "openai"
    api_key_env: str = ""  # the environment variable that holds that server's key
    engine_arguments: tuple[str, ...] = ()  # for every process of its engine, behind those we give
    measured: tuple[Measured, ...] = ()  # at most one for a kind of GPU
    hedge_after_s: Positive | None = None  # without a first token: a second replica is asked too; None: never


class Tenant(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who uses the fleet. A float is a fraction of the fleet's GPUs, an integer a number of them."""

    name: Name
    guarantee: int | float = 0.0  # never lent
    deserved: int | float | None = None  # lent when idle, always comes back; None: the guarantee
    limit: int | float = 1.0
    priority: Annotated[int, Meta(ge=-MOST, le=MOST)] = 0  # higher outbids lower, among those who borrow
    grace_s: Seconds = 30.0  # that its replicas and jobs get to drain or to save their work when they must stop
    min_runtime_s: Seconds = 300.0  # that they run, once loaded, before anybody may stop them
    anonymous: Anonymous = False  # requests without a key are its, of everybody or of this machine; of one at most


class Job(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Work of a tenant that no request asks for, research as a rule: it takes the GPUs it can get, and yields."""

    name: Name
    tenant: str = ""  # "": the only tenant
    command: tuple[str, ...] = ()  # that starts a run; empty: it is only rehearsed
    gpus: Annotated[int, Meta(ge=0, le=MOST)] = 0  # of one node, for one run; 0: a whole node of its smallest kind
    copies: Count = 1  # runs at a time, at most
    pools: tuple[str, ...] = ()  # where it runs; empty: all whose nodes are large enough
    checkpoint: str = ""  # a folder or a file, where its work is saved
    checkpoint_every_s: Positive = 600.0
    load_s: Seconds = 60.0  # from a start to the first step that is of use, reading the checkpoint included


class Demand(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a tenant asks of a model: a trace, or a rate with token lengths."""

    tenant: str = ""  # "": the only tenant
    model: str = ""  # "": the only model
    trace: str = ""  # a file beside the fleet file
    columns: str = ""  # which column of a trace is what; "": as its header says
    requests_per_s: Rate | tuple[Rate, ...] | None = None  # all day, or of each hour
    prompt_tokens: Count = 1000  # mean
    output_tokens: Count = 200  # mean
    prefix_hit: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # share of the prompts' tokens that are in the cache already

    @property
    def hourly_requests_per_s(self) -> tuple[float, ...]:
        """The rate of each hour of the day; empty when a trace says it."""
        if self.requests_per_s is None:
            return ()
        if isinstance(self.requests_per_s, tuple):
            return self.requests_per_s
        return (self.requests_per_s,) * HOURS


class Fleet(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pools, models, tenants and what is asked of them."""

    name: Name
    objective: Objective = "money"  # goodput: serve most, then cheapest
    pools: Annotated[tuple[Pool, ...], Meta(min_length=1)]
    models: Annotated[tuple[Model, ...], Meta(min_length=1)]
    tenants: tuple[Tenant, ...] = ()
    demand: tuple[Demand, ...] = ()
    jobs: tuple[Job, ...] = ()

    @property
    def gpus(self) -> int:
        return sum(pool.gpus for pool in self.pools)

    def pool(self, name: str) -> Pool:
        return _named("pool", name, self.pools)

    def model(self, name: str) -> Model:
        return _named("model", name, self.models)

    def tenant(self, name: str) -> Tenant:
        return _named("tenant", name, self.tenants)

    def job(self, name: str) -> Job:
        return _named("job", name, self.jobs)

    @property
    def slos(self) -> dict[str, Slo]:
        """By the name of the model."""
        return {model.name: model.slo or default_slo(self.llm_of(model)) for model in self.models}

    def llm_of(self, model: Model) -> Llm:
        return catalog.load_model(model.weights, Path())

    def gpu_of(self, pool: Pool) -> Gpu:
        return catalog.find_gpu(pool.gpu)


Part = TypeVar("Part", Pool, Model, Tenant, Job)


def _named(kind: str, name: str, parts: tuple[Part, ...]) -> Part:
    for part in parts:
        if part.name == name:
            return part
    known = [part.name for part in parts]
    raise UnknownNameError(f"the fleet has no {kind} '{name}'. {nearest(name, known)}")


def default_slo(llm: Llm) -> Slo:
    """Return what people expect of a model of this size: the smaller, the snappier.

    Reading speed is about 5 words a second (0.15 s a token); everything here is faster than that.
    """
    if llm.active_parameters < 15 * GIGA:
        return Slo(ttft_s=2.0, tpot_s=0.05)
    if llm.active_parameters < 80 * GIGA and llm.parameters < 300 * GIGA:
        return Slo(ttft_s=3.0, tpot_s=0.075)
    return Slo(ttft_s=5.0, tpot_s=0.1)


def default_precisions(llm: Llm) -> tuple[str, ...]:
    """Return the published precision, and for fp8 also int8: the same size on cards without fp8 units."""
    return (llm.precision, "int8") if llm.precision == "fp8" else (llm.precision,)


def load_fleet(path: str | PathLike[str], usd_per_gpu_hour: Mapping[str, float] | None = None) -> Fleet:
    """Read, check and complete a fleet file.

    Args:
        path: of the file.
        usd_per_gpu_hour: of cards by their id in the catalogue, in the place of what the file or the catalogue says.

    Raises:
        FleetFileError, UnknownNameError or ModelFormatError: what is wrong, and where.
    """
    return fleet_of(read_fleet_file(path), path, usd_per_gpu_hour)


def read_fleet_file(path: str | PathLike[str]) -> dict[str, Any]:
    """Return what stands in a fleet file, unchecked. Raises FleetFileError when it is no TOML."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise FleetFileError(f"cannot read the fleet file {path}: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise FleetFileError(f"{path} is not text in UTF-8: byte {error.start} is not. Is it a fleet file?") from error
    except tomllib.TOMLDecodeError as error:
        raise FleetFileError(f"{path} is not valid TOML: {error}. Mend that line.") from error
    if not data:
        raise FleetFileError(f"{path} is empty. A fleet needs at least name, [[pools]] and [[models]].")
    return data


def fleet_of(
    data: dict[str, Any], path: str | PathLike[str], usd_per_gpu_hour: Mapping[str, float] | None = None
) -> Fleet:
    """Check and complete what stood in a fleet file; see `load_fleet`."""
    path = Path(path)
    try:
        fleet = msgspec.convert(data, Fleet)
    except msgspec.ValidationError as error:
        raise FleetFileError(f"{path}: {_explain(str(error), data)}") from error
    checked = check_fleet(fleet, path, usd_per_gpu_hour or {})
    for demand in checked.demand:
        if demand.trace and not Path(demand.trace).is_file():  # a plan that was moved can do without
            raise FleetFileError(f"{path}: there is no trace {demand.trace}. Mend the 'trace' of that [[demand]].")
    return checked


# --- What msgspec says, in the words of the file --------------------------------------------------------------------

IN_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "null": "nothing",
}
TABLES: dict[str, type[Struct]] = {
    "pools": Pool,
    "models": Model,
    "measured": Measured,
    "tenants": Tenant,
    "demand": Demand,
    "jobs": Job,
    "slo": Slo,
}


def _explain(message: str, data: dict[str, Any]) -> str:
    """Turn a validation error into: where, which key, what is expected."""
    problem, _, where = message.partition(" - at `$")
    where = where.rstrip("`").lstrip(".")
    place = f"{_place(where, data)}: " if where else ""
    if unknown := re.search(r"unknown field `(.+)`", problem):
        table = TABLES.get(re.sub(r"\[.*\]", "", where).split(".")[-1], Fleet)
        return f"{place}unknown key '{unknown[1]}'. {nearest(unknown[1], table.__struct_fields__)}"
    if missing := re.search(r"missing required field `(.+)`", problem):
        return f"{place}the key '{missing[1]}' is missing. Add it: {missing[1]} = …"
    if other := re.fullmatch(r"Invalid enum value '(.*)'", problem):
        known = ", ".join(get_args(Objective)) if where.endswith("objective") else 'true, false, "local"'
        return f"{place}'{other[1]}' is none. Write one of: {known}."
    problem = re.sub(
        r"`([^`]+)`", lambda types: " or ".join(IN_WORDS.get(t, t) for t in types[1].split(" | ")), problem
    )
    return f"{place}{problem[0].lower()}{problem[1:]}."


def _place(where: str, data: dict[str, Any]) -> str:
    """Say ``'nodes' of [[pools]] number 1 ('a100')`` for ``pools[0].nodes``."""
    found = re.fullmatch(r"(\w+)\[(\d+|\.\.\.)\](?:\.(.+))?", where)
    if not found or found[2] == "...":
        return f"'{where}'"
    table, index, key = found[1], int(found[2]), found[3]
    entries = data.get(table)
    entry = entries[index] if isinstance(entries, list) and index < len(entries) else None
    name = f" ('{entry['name']}')" if isinstance(entry, dict) and "name" in entry else ""
    return (f"'{key}' of " if key else "") + f"[[{table}]] number {index + 1}{name}"


# --- Checks and defaults --------------------------------------------------------------------------------------------


def check_fleet(fleet: Fleet, path: Path, usd_per_gpu_hour: Mapping[str, float] = NO_PRICES) -> Fleet:
    """Check what a file cannot say by its form, and fill in every default; `path` is where the fleet was read.

    Checking twice changes nothing. Raises as `load_fleet` does.
    """
    for kind, parts in (
        ("pool", fleet.pools),
        ("model", fleet.models),
        ("tenant", fleet.tenants),
        ("job", fleet.jobs),
    ):
        _check_unique(path, kind, [part.name for part in parts])
    pools = tuple(_complete_pool(pool, path, usd_per_gpu_hour) for pool in fleet.pools)
    models = tuple(_complete_model(model, path) for model in fleet.models)
    tenants = fleet.tenants or (Tenant(name="public", deserved=1.0, anonymous="local"),)
    gpus = sum(pool.gpus for pool in pools)
    tenants = tuple(_complete_tenant(tenant, gpus, path) for tenant in tenants)
    _check_shares(tenants, gpus, path)
    _check_anonymous(tenants, path)
    complete = replace(fleet, pools=pools, models=models, tenants=tenants)
    demands = enumerate(fleet.demand, start=1)
    return replace(
        complete,
        demand=tuple(_complete_demand(one, number, complete, path) for number, one in demands),
        jobs=tuple(_complete_job(job, complete, path) for job in fleet.jobs),
    )


def _check_unique(path: Path, kind: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if not name.isprintable() or name != name.strip():
            raise FleetFileError(
                f"{path}: the name {name!r} of a {kind} has blanks around it, or what cannot be printed."
            )
        if name in seen:
            raise FleetFileError(f"{path}: two {kind}s are called '{name}'. Give each its own name.")
        seen.add(name)


def _complete_pool(pool: Pool, path: Path, prices: Mapping[str, float]) -> Pool:
    with _naming(path, f"'gpu' of pool '{pool.name}'"):
        gpu = catalog.find_gpu(pool.gpu)
    usd_per_gpu_hour = prices.get(gpu.id, pool.usd_per_gpu_hour)
    if usd_per_gpu_hour is None:
        price = catalog.usd_per_gpu_hour(gpu.id)
        if price is None:
            raise FleetFileError(
                f"{path}: no price is known for '{gpu.id}' of pool '{pool.name}'. Write usd_per_gpu_hour = … there; "
                f"`waterline plan` also takes --price {gpu.id}=USD."
            )
        usd_per_gpu_hour = price.usd_per_gpu_hour
    return replace(
        pool,
        gpu=gpu.id,
        gpus_per_node=pool.gpus_per_node or gpu.gpus_per_node,
        usd_per_gpu_hour=usd_per_gpu_hour,
    )


def _complete_model(model: Model, path: Path) -> Model:
    with _naming(path, f"'weights' of model '{model.name}'"):
        llm = catalog.load_model(model.weights, path.parent)
    _check_engine(model, path)
    engine = model.engine or ("llamacpp" if llm.weights_file else "vllm")
    with _naming(path, f"'engine_arguments' of model '{model.name}'"):
        check_arguments(engine, model.engine_arguments)
    for precision in model.precisions:
        if precision not in PRECISIONS:
            raise FleetFileError(
                f"{path}: '{precision}' in precisions of model '{model.name}' is not known. "
                f"{nearest(precision, PRECISIONS)}"
            )
        if PRECISIONS[precision].gguf and engine in {"vllm", "sglang"}:
            raise FleetFileError(
                f"{path}: '{precision}' in precisions of model '{model.name}' is a format of llama.cpp, and its engine "
                f'is {engine}. Write engine = "llamacpp" there, or another precision.'
            )
    slo = model.slo or default_slo(llm)
    for key, value, most in (
        ("ttft_s", slo.ttft_s, DAY_S),
        ("tpot_s", slo.tpot_s, DAY_S),
        ("fraction", slo.fraction, 1),
    ):
        if not 0 < value < most:
            raise FleetFileError(
                f"{path}: {key} = {value:g} in slo of model '{model.name}' must lie between 0 and {most}."
            )
    if model.max_context_tokens > llm.max_context_tokens:
        raise FleetFileError(
            f"{path}: max_context_tokens = {model.max_context_tokens} of model '{model.name}' is more than the model's "
            f"own {llm.max_context_tokens}. Write at most that."
        )
    measured = tuple(_complete_measured(one, model, path) for one in model.measured)
    for one in measured:
        if [other.gpu for other in measured].count(one.gpu) > 1:
            raise FleetFileError(
                f"{path}: model '{model.name}' was measured twice on '{one.gpu}'. Keep one of the two."
            )
    local = path.parent / Path(model.weights).expanduser()
    return replace(
        model,
        weights=str(local.resolve()) if local.exists() else model.weights,
        precisions=tuple(dict.fromkeys(model.precisions)) or default_precisions(llm),
        max_context_tokens=model.max_context_tokens or min(llm.max_context_tokens, DEFAULT_CONTEXT_TOKENS),
        slo=slo,
        engine=engine,
        measured=measured,
    )


def _complete_measured(measured: Measured, model: Model, path: Path) -> Measured:
    with _naming(path, f"'gpu' of what was measured of model '{model.name}'"):
        return replace(measured, gpu=catalog.find_gpu(measured.gpu).id)


def _check_engine(model: Model, path: Path) -> None:
    if model.engine in PRICED_ENGINES:
        raise FleetFileError(
            f"{path}: the engine '{model.engine}' of model '{model.name}' is priced by waterline fit and waterline "
            'estimate, but cannot be planned or started. Write engine = "vllm" or "sglang" there, or attach to a '
            'running server with engine = "openai" and url = "http://…/v1".'
        )
    if model.engine and model.engine not in ENGINES:
        raise FleetFileError(f"{path}: no engine is called '{model.engine}'. {nearest(model.engine, ENGINES)}")
    if model.url and not model.url.startswith(("http://", "https://")):
        raise FleetFileError(
            f"{path}: url = '{model.url}' of model '{model.name}' must begin with http:// or https://."
        )
    if (model.engine == "openai") != bool(model.url):
        raise FleetFileError(
            f'{path}: model \'{model.name}\' needs both engine = "openai" and url = "http://…/v1" to attach to a '
            "running server, or neither."
        )


def _complete_tenant(tenant: Tenant, gpus: int, path: Path) -> Tenant:
    """Turn counts into fractions, so that everybody after us reads one unit."""
    deserved = tenant.guarantee if tenant.deserved is None else tenant.deserved
    shares = {"guarantee": tenant.guarantee, "deserved": deserved, "limit": tenant.limit}
    fractions = {key: share / gpus if isinstance(share, int) else share for key, share in shares.items()}
    for key, fraction in fractions.items():
        if not 0 <= fraction <= 1:
            unit = "GPUs" if isinstance(shares[key], int) else "of the fleet"
            raise FleetFileError(
                f"{path}: {key} = {shares[key]} {unit} of tenant '{tenant.name}' is outside the fleet's {gpus} GPUs. "
                "Write a fraction from 0.0 to 1.0, or a whole number of GPUs."
            )
    if not fractions["guarantee"] <= fractions["deserved"] <= fractions["limit"]:
        raise FleetFileError(
            f"{path}: tenant '{tenant.name}' has guarantee = {tenant.guarantee}, deserved = {deserved}, limit = "
            f"{tenant.limit}. They must not fall: guarantee <= deserved <= limit."
        )
    return replace(tenant, **fractions)


def _check_shares(tenants: tuple[Tenant, ...], gpus: int, path: Path) -> None:
    for key in ("guarantee", "deserved"):
        total = sum(getattr(tenant, key) for tenant in tenants)
        if total > 1 + 1e-9:
            parts = " + ".join(f"{getattr(tenant, key):.3g} ({tenant.name})" for tenant in tenants)
            raise FleetFileError(
                f"{path}: the tenants' {key} add up to {total:.3g} of the fleet's {gpus} GPUs: {parts}. "
                "Lower them until they add up to 1.0 at most."
            )


def _check_anonymous(tenants: tuple[Tenant, ...], path: Path) -> None:
    names = [tenant.name for tenant in tenants if tenant.anonymous]
    if len(names) > 1:
        raise FleetFileError(
            f"{path}: requests without a key would be those of {' and of '.join(names)}: each is anonymous. "
            "Keep that of one tenant."
        )


def _complete_job(job: Job, fleet: Fleet, path: Path) -> Job:
    where = f"job '{job.name}'"
    if not job.tenant and len(fleet.tenants) > 1:
        names = ", ".join(tenant.name for tenant in fleet.tenants)
        raise FleetFileError(f"{path}: {where} does not say which tenant. Add tenant = one of: {names}")
    if job.name in {model.name for model in fleet.models}:
        raise FleetFileError(f"{path}: {where} is called like a model. Give it a name of its own.")
    with _naming(path, where):
        tenant = fleet.tenant(job.tenant or fleet.tenants[0].name)
        pools = [fleet.pool(name) for name in dict.fromkeys(job.pools)] or list(fleet.pools)
    gpus = job.gpus or min(pool.gpus_per_node for pool in pools)
    for pool in pools if job.pools else [max(pools, key=lambda pool: pool.gpus_per_node)]:
        if pool.gpus_per_node < gpus:
            raise FleetFileError(
                f"{path}: gpus = {gpus} of {where} are for one node, and those of pool '{pool.name}' have "
                f"{pool.gpus_per_node}. Write at most that, or take the pool out of its 'pools'."
            )
    if gpus > tenant.limit * fleet.gpus + 1e-9:
        raise FleetFileError(
            f"{path}: gpus = {gpus} of {where} are more than the limit of its tenant '{tenant.name}', "
            f"{tenant.limit * fleet.gpus:.6g} GPUs. Lower them, or raise the limit."
        )
    return replace(
        job,
        tenant=tenant.name,
        gpus=gpus,
        pools=tuple(pool.name for pool in pools if pool.gpus_per_node >= gpus),
        checkpoint=str((path.parent / Path(job.checkpoint).expanduser()).absolute()) if job.checkpoint else "",
    )


def _complete_demand(demand: Demand, number: int, fleet: Fleet, path: Path) -> Demand:
    where = f"[[demand]] number {number}"
    for kind, name, parts in (("tenant", demand.tenant, fleet.tenants), ("model", demand.model, fleet.models)):
        if not name and len(parts) > 1:
            names = ", ".join(part.name for part in parts)
            raise FleetFileError(f"{path}: {where} does not say which {kind}. Add {kind} = one of: {names}")
    tenant, model = demand.tenant or fleet.tenants[0].name, demand.model or fleet.models[0].name
    with _naming(path, where):
        fleet.tenant(tenant)
        fleet.model(model)
    if (demand.requests_per_s is None) == (not demand.trace):
        has = "both" if demand.trace else "neither"
        raise FleetFileError(
            f"{path}: {where} needs either requests_per_s or a trace; it has {has}. Write one of them."
        )
    if isinstance(demand.requests_per_s, tuple) and len(demand.requests_per_s) != HOURS:
        raise FleetFileError(
            f"{path}: requests_per_s of {where} lists {len(demand.requests_per_s)} rates. Write one number, or "
            f"{HOURS} of them, from midnight on."
        )
    if demand.columns:
        with _naming(path, f"'columns' of {where}"):
            parse_columns(demand.columns)
    trace = str((path.parent / Path(demand.trace).expanduser()).resolve()) if demand.trace else ""
    context = fleet.model(model).max_context_tokens
    if demand.prompt_tokens + demand.output_tokens > context:
        raise FleetFileError(
            f"{path}: {where} has requests of {demand.prompt_tokens} + {demand.output_tokens} tokens, but "
            f"max_context_tokens of model '{model}' is {context}. Raise it, or shorten the requests."
        )
    return replace(demand, tenant=tenant, model=model, trace=trace)


@contextmanager
def _naming(path: Path, where: str) -> Iterator[None]:
    """Put the file and the key in front of an error from below."""
    try:
        yield
    except WaterlineError as error:
        error.args = (f"{path}: {where}: {error}",)
        raise
