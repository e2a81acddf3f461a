"""The fleet file: what a person writes, checked, with every default derived.

`load_fleet` is the only way in. What it returns names only GPUs and models that exist, shares that fit the fleet, and
traces that are there; every error names the file, the key and what to write instead.
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from waterline import catalog
from waterline.errors import FleetFileError, UnknownNameError, WaterlineError, nearest
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, Llm
from waterline.workload import Slo

HOURS = 24
DEFAULT_CONTEXT_TOKENS = 32_768
ENGINES = ("vllm", "sglang", "llamacpp", "openai", "fake")

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
Rate = Annotated[float, Meta(ge=0)]
Name = Annotated[str, Meta(min_length=1)]


class Pool(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Identical nodes."""

    name: Name
    gpu: Name  # an id of the catalogue, or a name people type
    nodes: Count = 1
    gpus_per_node: Annotated[int, Meta(ge=0)] = 0  # 0: what the catalogue says is usually in one node
    usd_per_gpu_hour: Annotated[float, Meta(ge=0)] | None = None  # None: the catalogue's price

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model to be served."""

    name: Name
    weights: Name  # catalogue id, Hugging Face id, a folder with config.json, or a .gguf file
    precisions: tuple[str, ...] = ()  # what the owner accepts; empty: as published, and what keeps its quality
    max_context_tokens: Annotated[int, Meta(ge=0)] = 0  # 0: the model's own, at most DEFAULT_CONTEXT_TOKENS
    slo: Slo | None = None  # None: by the size of the model
    engine: str = ""  # "": llama.cpp for a .gguf, else vLLM
    url: str = ""  # of a running OpenAI-compatible server, for the engine "openai"


class Tenant(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who uses the fleet. A float is a fraction of the fleet's GPUs, an integer a number of them."""

    name: Name
    guarantee: int | float = 0.0  # never lent
    deserved: int | float | None = None  # lent when idle, always comes back; None: the guarantee
    limit: int | float = 1.0


class Demand(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a tenant asks of a model: a trace, or a rate with token lengths."""

    tenant: str = ""  # "": the only tenant
    model: str = ""  # "": the only model
    trace: str = ""  # a file beside the fleet file
    requests_per_s: Rate | Annotated[tuple[Rate, ...], Meta(min_length=HOURS, max_length=HOURS)] | None = None
    prompt_tokens: Count = 1000  # mean
    output_tokens: Count = 200  # mean

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
    pools: Annotated[tuple[Pool, ...], Meta(min_length=1)]
    models: Annotated[tuple[Model, ...], Meta(min_length=1)]
    tenants: tuple[Tenant, ...] = ()
    demand: tuple[Demand, ...] = ()

    @property
    def gpus(self) -> int:
        return sum(pool.gpus for pool in self.pools)

    def pool(self, name: str) -> Pool:
        return _named("pool", name, self.pools)

    def model(self, name: str) -> Model:
        return _named("model", name, self.models)

    def tenant(self, name: str) -> Tenant:
        return _named("tenant", name, self.tenants)

    def llm_of(self, model: Model) -> Llm:
        return catalog.load_model(model.weights, Path())

    def gpu_of(self, pool: Pool) -> Gpu:
        return catalog.find_gpu(pool.gpu)


Part = TypeVar("Part", Pool, Model, Tenant)


def _named(kind: str, name: str, parts: tuple[Part, ...]) -> Part:
    for part in parts:
        if part.name == name:
            return part
    known = [part.name for part in parts]
    raise UnknownNameError(f"the fleet has no {kind} '{name}'. {nearest(name, known)}")
