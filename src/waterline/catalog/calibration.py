"""How an engine differs from its kernels, fitted on serving runs: `measured/engines.toml`."""

import math
from collections.abc import Mapping
from functools import cache
from importlib import resources

import msgspec

from waterline.hardware import Gpu
from waterline.llm import Llm

Ratios = tuple[float, float]  # measured over estimated; a tenth of the runs lies below the first, and above the second


class Spread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far serving runs lay from estimates they had no part in."""

    ttft: Ratios
    tpot: Ratios


AS = {"openai": "vllm", "fake": "vllm"}  # a server behind a URL is mostly one; the fake engine keeps its time
FILES = ("engines.toml", "engines-public.toml")  # NVIDIA's data-centre runs; llama.cpp, AMD and whatever people publish

# Of estimates without any measurement near: wide, and said to be.
PHYSICS = Spread(ttft=(0.4, 4.0), tpot=(0.6, 2.5))


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: factors on the time of its kernels, what its host adds, and what a client sees on top."""

    products: float = 1.0
    experts: float = 1.0
    exchange: float = 1.0
    attention: float = 1.0
    latent: float = 1.0  # of MLA, projections included
    small: float = 1.0
    step_s: float = 0.0  # of every step, whatever it does
    layer_s: float = 0.0  # of every layer: launches, gaps between kernels
    token_s: float = 0.0  # of every token of a step: scheduling, sampling, detokenising
    stage_s: float = 0.0  # of every stage of a pipeline after the first
    chips: Mapping[str, float] = {}  # chip, as the catalogue names it -> one more factor on products and attention
    own_kernels: bool = False  # not like those that were measured: factors are on the usual share of the card's peaks
    vector_flops: float = 0.0  # a byte read costs so many operations of the 32-bit vector units besides
    request_s: float = 0.0  # of every request: HTTP, tokenising, the first token's way back
    reading: float = 1.0  # how often a prompt's own reading counts in its first token: it waits for a step, and is one
    steps: float = 0.0  # of the others that a first token waits for besides
    together: float = 0.0  # share of the requests of a run that start at the same moment
    gpus: tuple[str, ...] = ()  # the runs were on
    parameters: Mapping[str, tuple[int, ...]] = {}  # card -> of the models that ran there; none: any that runs there
    most: Mapping[str, int] = {}  # the largest isl, osl, context, concurrency and number of GPUs of the runs
    spread: Mapping[str, Spread] = {}  # by provenance
    source: str = ""

    def vector_s_per_byte(self, gpu: Gpu) -> float:
        """Return what a byte of weights costs on the vector units, on top of being read.

        Kernels that multiply there reach less of a fast memory. A card of which no such rate is known has enough.
        """
        return self.products * self.vector_flops / gpu.flops_per_s.get("fp32", math.inf)

    def factors(self, gpu: Gpu) -> Mapping[str, float]:
        """Return the factors on the kernels of a step by part."""
        there = self.chips.get(gpu.chip, 1.0)
        return {
            "products": self.products * there,
            "experts": self.experts * there,
            "exchange": self.exchange,
            "attention": self.attention * there,
            "latent": self.latent * there,
            "small": self.small,
        }

    def ran(self, gpu: Gpu, llm: Llm) -> bool:
        """Return whether runs of this model, told by its number of parameters, on this card were among those fitted."""
        return gpu.id in self.gpus and (not self.parameters or llm.parameters in self.parameters.get(gpu.id, ()))

    def spread_of(self, provenance: str) -> Spread:
        return self.spread.get(provenance, PHYSICS)


@cache
def _calibrations() -> dict[str, Calibration]:
    found: dict[str, Calibration] = {}
    for name in FILES:
        text = resources.files("waterline.catalog").joinpath("measured", name).read_bytes()
        found |= msgspec.toml.decode(text, type=dict[str, Calibration], strict=False)
    return found


def calibration_of(engine: str, stack: str = "cuda") -> Calibration:
    """Return the calibration of an engine on a software stack; one without any takes its kernels as they are."""
    found, engine = _calibrations(), AS.get(engine, engine)
    return found.get(f"{engine}-{stack}") or found.get(engine) or Calibration()
