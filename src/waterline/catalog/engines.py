"""What each engine adds to the arithmetic of a step, from `engines.toml`."""

from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib import resources

import msgspec

from waterline.errors import UnknownNameError, nearest
from waterline.units import GIGA, MIB, PICOSECONDS_PER_S

MICROSECOND_PS = PICOSECONDS_PER_S // 10**6


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    step_overhead_us: int
    memory_efficiency: float
    compute_efficiency: float
    collective_latency_us: int
    usable_memory_fraction: float
    memory_overhead_mib: int
    max_batch: int
    step_tokens: int
    load_gb_per_s: float
    start_s: float
    source: str
    read: date


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """One serving engine as the cost model sees it."""

    name: str
    step_overhead_ps: int  # host work of a step that the GPU waits for
    memory_efficiency: float  # share of the datasheet bandwidth
    compute_efficiency: float  # share of the datasheet rate
    collective_latency_ps: int  # of one all-reduce
    usable_memory_fraction: float  # of the card, weights and cache together
    memory_overhead_bytes: int  # context, graphs, workspace, on every GPU
    max_batch: int  # requests decoded together
    step_tokens: int  # prompt and output tokens of one step, at most
    load_bytes_per_s: float  # weights from storage to one card
    start_s: float  # everything before a replica answers, without loading its weights
    source: str
    read: str


@cache
def _profiles() -> dict[str, EngineProfile]:
    text = resources.files("waterline.catalog").joinpath("engines.toml").read_bytes()
    return {
        name: EngineProfile(
            name=name,
            step_overhead_ps=entry.step_overhead_us * MICROSECOND_PS,
            memory_efficiency=entry.memory_efficiency,
            compute_efficiency=entry.compute_efficiency,
            collective_latency_ps=entry.collective_latency_us * MICROSECOND_PS,
            usable_memory_fraction=entry.usable_memory_fraction,
            memory_overhead_bytes=entry.memory_overhead_mib * MIB,
            max_batch=entry.max_batch,
            step_tokens=entry.step_tokens,
            load_bytes_per_s=entry.load_gb_per_s * GIGA,
            start_s=entry.start_s,
            source=entry.source,
            read=entry.read.isoformat(),
        )
        for name, entry in msgspec.toml.decode(text, type=dict[str, _Entry], strict=False).items()
    }


def find_engine(name: str) -> EngineProfile:
    try:
        return _profiles()[name]
    except KeyError:
        raise UnknownNameError(f"no engine is called '{name}'. {nearest(name, _profiles())}") from None
