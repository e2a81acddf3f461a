"""How each engine shares out a card, and the limits it works within, from `engines.toml`."""

from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from importlib import resources
from typing import Any, Literal, Self

import msgspec

from waterline.errors import InputError, UnknownNameError, nearest
from waterline.hardware import Gpu
from waterline.llm.precision import PRECISIONS
from waterline.units import GIB, GIGA, MIB

LARGE_BYTES = 69 * GIB  # engines take cards of 70 GiB and more, as sold, for data-centre cards: 80 GB of HBM and up

MemoryRule = Literal["whole", "static", "left"]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    usable_memory_fraction: float
    memory_overhead_mib: int
    max_batch: int
    step_tokens: int
    load_gb_per_s: float
    start_s: float
    source: str
    read: date
    memory_rule: MemoryRule = "whole"
    driver_mib: int = 0
    context_mib: int = 0
    communication_mib: int = 0
    bus_communication_mib: int = 0
    graphs_mib: int = 0
    logits_bytes: float = 8.0
    reserve_mib_per_step_token: float = 0.0
    cache_block_tokens: int = 1
    embedding_on_host: bool = False
    expert_workspace: bool = True
    mxfp4_width_multiple: int = 1
    memory_source: str = ""
    large_step_tokens: int = 0
    large_max_batch: int = 0
    large_except: tuple[str, ...] = ()
    fp8_cache_with: tuple[str, ...] = ()
    versions: tuple[dict[str, Any], ...] = ()  # {before = "0.17", and the keys in which earlier versions differ}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """One serving engine as the cost model sees it.

    memory_rule says what `usable_memory_fraction` is a share of:
        ``whole``   the card; it covers weights, activations, overhead and cache (vLLM, llama.cpp)
        ``static``  the card; it covers weights and cache, the rest is for activations and overhead (SGLang)
        ``left``    what weights, activations and overhead leave; it is the cache (TensorRT-LLM)
    """

    name: str
    usable_memory_fraction: float  # see memory_rule
    memory_overhead_bytes: int  # libraries and workspace, on every GPU
    max_batch: int  # requests decoded together
    step_tokens: int  # prompt and output tokens of one step, at most
    load_bytes_per_s: float  # weights from storage to one card
    start_s: float  # everything before a replica answers, without loading its weights
    source: str
    read: str
    memory_rule: MemoryRule = "whole"
    driver_bytes: int = 0  # of what nvidia-smi shows, not offered to programs
    context_bytes: int = 0  # the CUDA or HIP context: outside what the fraction covers, but on the card
    communication_bytes: int = 0  # NCCL or RCCL and all-reduce buffers, when GPUs exchange within a layer …
    bus_communication_bytes: int = 0  # … and the same where they have nothing but a bus to do it
    graphs_bytes: int = 0  # captured CUDA graphs, where the engine counts them
    logits_bytes: float = 8.0  # a sampled sequence and vocabulary entry, at the peak of sampling
    reserve_bytes_per_step_token: int = 0  # kept free for activations by the ``static`` rule
    cache_block_tokens: int = 1
    embedding_on_host: bool = False  # the input embedding stays in the host's memory
    expert_workspace: bool = True  # routed tokens are gathered into buffers of their own
    mxfp4_width_multiple: int = 1  # experts in MXFP4 are padded to a width its kernels like
    memory_source: str = ""
    large_step_tokens: int = 0  # the same two where the card is LARGE, 0: no different
    large_max_batch: int = 0
    large_except: tuple[str, ...] = ()  # chips it does not take for large, whatever their memory
    fp8_cache_with: tuple[str, ...] = ()  # precisions of weights whose checkpoints ask this engine for a cache in fp8

    def cache_dtype(self, precision: str) -> str:
        """Return the type of the cache this engine chooses by itself for weights of a precision."""
        return "fp8" if precision in self.fp8_cache_with else "auto"

    def on(self, gpu: Gpu) -> Self:
        """Return the profile with the limits this engine sets by itself on such a card."""
        if gpu.memory_bytes < LARGE_BYTES or gpu.chip in self.large_except:
            return self
        return replace(
            self,
            step_tokens=self.large_step_tokens or self.step_tokens,
            max_batch=self.large_max_batch or self.max_batch,
        )


def check_runs(engine: str, precision: str, gpu: Gpu) -> None:
    """Raise InputError when an engine does not read weights of a precision, or does not run on such cards at all."""
    if PRECISIONS[precision].gguf and engine in {"vllm", "sglang", "trtllm"}:
        raise InputError(
            f"{precision} is a format of llama.cpp, {engine} does not run it. Take the engine llamacpp, or another "
            "precision."
        )
    if not runs_on(engine, gpu):
        raise InputError(f"{engine} does not run on {gpu.id}, but on NVIDIA's cards alone. Take another engine.")


def runs_on(engine: str, gpu: Gpu) -> bool:
    """Return whether an engine runs on such cards at all: TensorRT-LLM is NVIDIA's own."""
    return engine != "trtllm" or gpu.stack == "cuda"


@cache
def _entries() -> dict[str, dict[str, Any]]:
    text = resources.files("waterline.catalog").joinpath("engines.toml").read_bytes()
    entries: dict[str, dict[str, Any]] = msgspec.toml.decode(text)
    return entries


@cache
def find_engine(name: str, version: str = "") -> EngineProfile:
    """Return the profile of an engine: the newest version we know, or one of which memory is known to differ.

    Raises:
        UnknownNameError: no engine is called so.
        InputError: the version is not numbers and dots.
    """
    try:
        keys = dict(_entries()[name])
    except KeyError:
        raise UnknownNameError(f"no engine is called '{name}'. {nearest(name, _entries())}") from None
    wanted = _numbers(version) if version else ()
    for older in keys.get("versions", ()):  # newest first, each telling what was different before it
        if wanted and wanted < _numbers(older["before"]):
            keys |= {key: value for key, value in older.items() if key != "before"}
    return _profile(name, msgspec.convert(keys, _Entry, strict=False))


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers: (0, 9) of ``v0.9``, (1, 2, 0) of ``1.2.0rc6.post1``."""
    numbers = []
    for part in version.removeprefix("v").split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if digits:
            numbers.append(int(digits))
        if digits != part:
            break
    if not numbers:
        raise InputError(f"engine version '{version[:40]}' has no numbers. Write it as 0.19 or 0.5.6.")
    return tuple(numbers)


def _profile(name: str, entry: _Entry) -> EngineProfile:
    return EngineProfile(
        name=name,
        usable_memory_fraction=entry.usable_memory_fraction,
        memory_overhead_bytes=entry.memory_overhead_mib * MIB,
        max_batch=entry.max_batch,
        step_tokens=entry.step_tokens,
        load_bytes_per_s=entry.load_gb_per_s * GIGA,
        start_s=entry.start_s,
        large_step_tokens=entry.large_step_tokens,
        large_max_batch=entry.large_max_batch,
        large_except=entry.large_except,
        fp8_cache_with=entry.fp8_cache_with,
        source=entry.source,
        read=entry.read.isoformat(),
        memory_rule=entry.memory_rule,
        driver_bytes=entry.driver_mib * MIB,
        context_bytes=entry.context_mib * MIB,
        communication_bytes=entry.communication_mib * MIB,
        bus_communication_bytes=entry.bus_communication_mib * MIB,
        graphs_bytes=entry.graphs_mib * MIB,
        logits_bytes=entry.logits_bytes,
        reserve_bytes_per_step_token=round(entry.reserve_mib_per_step_token * MIB),
        cache_block_tokens=entry.cache_block_tokens,
        embedding_on_host=entry.embedding_on_host,
        expert_workspace=entry.expert_workspace,
        mxfp4_width_multiple=entry.mxfp4_width_multiple,
        memory_source=entry.memory_source,
    )
