"""Tenders without a fleet file: what servers cost, how many a budget buys, and which models they run."""

from collections.abc import Iterable

from msgspec import Struct

from waterline import catalog
from waterline.catalog.servers import ServerPrice
from waterline.cost import weights_bytes
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, Llm
from waterline.plan import Layout
from waterline.planner.fits import default_fit_precisions, fits

CONTEXT_TOKENS = 8192  # that one request must be able to have


class Runs(Struct, frozen=True, kw_only=True):
    """A model on the servers of a tender, at the precision of most bits that they hold."""

    model: str
    parameters: int
    precision: str
    layout: Layout
    gpus: int  # of one replica, the fewest
    replicas: int  # that the servers hold, if they run nothing else
    at_once: int  # requests of CONTEXT_TOKENS, over all of them


class Tender(Struct, frozen=True, kw_only=True):
    """So many servers of one card: what they cost and run."""

    gpu: str
    vendor: str
    servers: int
    fewest: int  # for the lowest of the budget at the highest price …
    most: int  # … and the highest of the budget at the lowest price
    gpus_per_server: int
    memory_bytes: int  # of all their cards
    price: ServerPrice  # of one
    usd: float
    low_usd: float
    high_usd: float
    runs: tuple[Runs, ...]  # the largest model first, one of each size
    runs_not: str  # the smallest model that is too large; "" when there is none

    @property
    def gpus(self) -> int:
        return self.servers * self.gpus_per_server


def for_budget(price: ServerPrice, low_usd: float, high_usd: float, *, every_model: bool) -> Tender:
    """Return the tender a budget suggests: its middle at the median price, and what the ends of both allow."""
    servers = int((low_usd + high_usd) / 2 / price.usd + 1e-9)
    return of_servers(
        price,
        servers,
        every_model=every_model,
        fewest=int(low_usd / price.high_usd + 1e-9),
        most=int(high_usd / price.low_usd + 1e-9),
    )


def of_servers(
    price: ServerPrice, servers: int, *, every_model: bool, fewest: int | None = None, most: int | None = None
) -> Tender:
    """Return a tender for so many servers.

    Args:
        price: of one server.
        servers: how many.
        every_model: look at all models of the catalogue; else only for the largest that runs.
        fewest: see Tender; the servers themselves when left out.
        most: likewise.
    """
    gpu = catalog.find_gpu(price.gpu)
    runs, runs_not = _runs(gpu, servers, price.gpus, every_model=every_model)
    return Tender(
        gpu=gpu.id,
        vendor=gpu.vendor,
        servers=servers,
        fewest=servers if fewest is None else fewest,
        most=servers if most is None else most,
        gpus_per_server=price.gpus,
        memory_bytes=servers * price.gpus * gpu.memory_bytes,
        price=price,
        usd=servers * price.usd,
        low_usd=servers * price.low_usd,
        high_usd=servers * price.high_usd,
        runs=runs,
        runs_not=runs_not,
    )


def _runs(gpu: Gpu, servers: int, gpus_per_server: int, *, every_model: bool) -> tuple[tuple[Runs, ...], str]:
    runs: list[Runs] = []
    runs_not = ""
    for llm in _one_of_each_size(catalog.models().values()):
        found = _best(llm, gpu, servers, gpus_per_server)
        if found is not None:
            runs.append(found)
            if not every_model:
                break
        elif not runs:
            runs_not = llm.name
    return tuple(runs), runs_not


def _one_of_each_size(llms: Iterable[Llm]) -> list[Llm]:
    """Return the models, the largest first, without those that weigh the same as one before."""
    sizes: dict[int, Llm] = {}
    for llm in llms:
        sizes.setdefault(llm.parameters, llm)
    return sorted(sizes.values(), key=lambda llm: -llm.parameters)


def _best(llm: Llm, gpu: Gpu, servers: int, gpus_per_server: int) -> Runs | None:
    """Return a model at the precision of most bits that the servers run, on the fewest GPUs."""
    memory = servers * gpus_per_server * gpu.memory_bytes
    for precision in default_fit_precisions(llm, "vllm"):
        if PRECISIONS[precision].gguf or weights_bytes(llm, precision) >= memory:
            continue  # which saves asking how it would be laid out
        (fit,) = fits(llm, [gpu], (precision,), "vllm", min(CONTEXT_TOKENS, llm.max_context_tokens), 1)
        if fit.layout is None or fit.layout.tp > gpus_per_server:
            continue
        replicas = servers * (gpus_per_server // fit.layout.tp) // fit.layout.pp
        if replicas:
            return Runs(
                model=llm.name,
                parameters=llm.parameters,
                precision=fit.precision,
                layout=fit.layout,
                gpus=fit.gpus,
                replicas=replicas,
                at_once=replicas * fit.max_concurrency,
            )
    return None
