"""What a machine can do: accelerators, the links between them, nodes."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How the accelerators of one node reach each other."""

    kind: str  # "nvlink4", "xgmi", "pcie", "none" …
    topology: str  # "nvswitch": any pair gets the full rate; "8-gpu-full-mesh": a pair gets its own wire only
    bytes_per_s: float  # each way, per GPU, to all its neighbours together
    pair_bytes_per_s: float  # each way, between two GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator of the catalogue.

    Rates are dense peaks of the datasheet. A precision the card has no units for is absent from `flops_per_s`.
    """

    id: str
    name: str
    vendor: str  # "nvidia", "amd", "intel", "apple", "huawei" or "cpu"
    architecture: str
    stack: str  # "cuda", "rocm", "metal" …
    support: str  # "full", or "planning": plan and rehearse only, no engine is started on it
    memory_bytes: int  # what the driver offers
    memory_bytes_per_s: float
    flops_per_s: Mapping[str, float]  # precision ("bf16", "fp8", "int8", "fp4" …) -> dense FLOPs or operations
    tdp_watts: float | None
    link: Link
    pcie_bytes_per_s: float | None  # each way
    gpus_per_node: int  # what is usually sold in one chassis
    release_year: int | None
    source: str
    read: str  # ISO date
    doubtful: tuple[str, ...] = ()  # "cell" or "cell: why", for the cells of the catalogue our sources disagree on
    notes: str = ""
    aliases: tuple[str, ...] = ()  # other names people and drivers use
    chip: str = ""
    target: str = ""  # what kernels are compiled for: "8.9" of CUDA, "gfx942" of ROCm …
    pcie: str = ""  # "4.0 x16"
    msrp_usd: float | None = None  # list price at launch
    tpp: float | None = None  # total processing performance of the export rules: dense rate in T/s x bits, at its best
    die_mm2: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine with `gpus` equal accelerators."""

    gpu: Gpu
    gpus: int

    @property
    def memory_bytes(self) -> int:
        return self.gpus * self.gpu.memory_bytes
