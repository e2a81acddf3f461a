"""Fit engines on what the public measured: llama.cpp, and vLLM and SGLang on AMD; `measured/engines-public.toml`.

    python tools/fit_public.py ../shared/data/serving

Every row becomes one time: of a token (decode rates, TPOT, throughput of a full batch, end-to-end latency) or of a
prompt (TTFT, reading rates). A time per token is linear in the factors and overheads of `Calibration`, so it is fitted
as in tools/fit_serving.py, with fewer parts, as there are fewer rows. A card of llama.cpp, a configuration of the
others, weighs as the square root of its rows. Spreads come from rows left out: by card for llama.cpp, by configuration
for the others.
"""

import argparse
import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from fit_serving import most_line
from numpy.typing import NDArray

from waterline import catalog
from waterline.catalog import accelerators
from waterline.catalog.calibration import PHYSICS, Calibration, calibration_of
from waterline.catalog.engines import find_engine
from waterline.cost.estimate import closed_loop
from waterline.cost.memory import memory_use, most_sequences
from waterline.cost.serving import Pieces, pieces
from waterline.cost.step import StepCost, price_steps
from waterline.errors import WaterlineError
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, AttentionLayers, FeedForwardLayers, Llm
from waterline.plan import Layout
from waterline.units import GIGA, MIB, TERA

Numbers = NDArray[np.float64]
Row = dict[str, str]

KERNELS = ("products", "experts", "exchange", "attention", "latent", "small")
OVERHEADS = {"step_s": 1e-3, "layer_s": 1e-5, "token_s": 1e-5, "stage_s": 1e-3}  # and the unit each is priced in
PARTS = (*KERNELS, *OVERHEADS)
FOLDER = Path("../shared/data/serving")
TARGET = Path(__file__).parents[1] / "src/waterline/catalog/measured/engines-public.toml"

# --- Names the rows use ---------------------------------------------------------------------------------------------

MODELS = {
    "llama 8B": "Llama-3.1-8B", "Meta-Llama-3-8B-Instruct": "Llama-3.1-8B", "llama3.1-8b": "Llama-3.1-8B",
    "llama3_1-8b": "Llama-3.1-8B", "Meta-Llama-3-70B-Instruct": "Meta-Llama-3.1-70B", "llama 7B": "Llama-2-7b-hf",
    "llama2-70b-99": "Llama-2-70b-hf", "llama3.1-405b": "Meta-Llama-3.1-405B", "mixtral-8x7b": "Mixtral-8x7B-v0.1",
    "deepseek-r1": "DeepSeek-R1", "deepseek-ai/DeepSeek-V3.1": "DeepSeek-V3", "MiniMaxAI/MiniMax-M2.7": "MiniMax-M2.5",
    "moonshotai/Kimi-K2.6": "Kimi-K2.5", "Kimi-K2.5-NVFP4": "Kimi-K2.5", "Qwen/Qwen3-4B-Instruct-2507": "Qwen3-4B",
    "Qwen/Qwen3-235B-A22B-Instruct-2507": "Qwen3-235B-A22B",
}  # fmt: skip
OTHERS = {
    "llama 1B BF16": Llm(
        name="Llama-3.2-1B", architecture="llama", parameters=1_235_814_400, active_parameters=1_235_814_400,
        hidden=2048, vocabulary=128_256, max_context_tokens=131_072, precision="bf16", tied_embeddings=True,
        attention=(AttentionLayers(kind="full", layers=16, query_heads=32, kv_heads=8, head_dim=64),),
        feed_forward=(FeedForwardLayers(layers=16, intermediate=8192),),
    ),
    "baidu/ERNIE-4.5-21B-A3B-PT": Llm(
        name="ERNIE-4.5-21B-A3B-PT", architecture="ernie4_5_moe", parameters=21_825_437_888,
        active_parameters=3_200_000_000, hidden=2560, vocabulary=103_424, max_context_tokens=131_072,
        precision="bf16", tied_embeddings=True,
        attention=(AttentionLayers(kind="full", layers=28, query_heads=20, kv_heads=4, head_dim=128),),
        feed_forward=(
            FeedForwardLayers(layers=1, intermediate=12288),
            FeedForwardLayers(layers=27, intermediate=1536, experts=64, experts_per_token=6, shared_intermediate=3072),
        ),
    ),
}  # fmt: skip
GPUS = {
    "H100": "h100-sxm-80g", "H200": "h200-sxm-141g", "A100 80GB": "a100-sxm-80g",
    "Virtualized NVIDIA H200-SXM-141GB": "h200-sxm-141g", "AMD Instinct MI300X 192GB HBM3": "mi300x",
    "AMD Instinct MI325X 256GB HBM3e": "mi325x",
}  # fmt: skip
# Cards the catalogue does not list: one of the same generation, and theirs of MiB, GB/s and fp32 TFLOPS.
NOT_LISTED = {
    "3070 8GB": ("rtx-3080-10g", 8192, 448, 20.3), "4070 Ti 12GB": ("rtx-4070", 12282, 504, 40.1),
    "RTX 4000 Ada 20GB": ("rtx-6000-ada", 20475, 360, 26.7), "RTX 5000 Ada 32GB": ("rtx-6000-ada", 32760, 576, 65.3),
    "P40": ("t4", 24576, 346, 11.8),
}  # fmt: skip
PRECISION_WORDS = {"f16": "fp16", "fp4": "nvfp4", "uint4": "int4"}
# Mean tokens of a prompt and an answer of MLPerf's data sets. Answers as its accuracy checks state them (294.45,
# 144.84, 684.68, 3886.22 a sample); prompts from memory, good to a third.
MLPERF_TOKENS = {
    "llama2-70b-99": (294, 294), "mixtral-8x7b": (240, 145), "llama3.1-405b": (9428, 685),
    "llama3.1-8b": (778, 128), "llama3_1-8b": (778, 128), "deepseek-r1": (800, 3886),
}  # fmt: skip
RATES = {"decode_tok_s", "output_tok_s", "throughput_tok_s", "output_tok_s_per_gpu"}  # of output; prompts not counted


@cache
def model(name: str) -> Llm:
    return OTHERS.get(name) or catalog.load_model(MODELS.get(name, name), Path())


@cache
def card(name: str) -> Gpu:
    if name not in NOT_LISTED:
        return catalog.find_gpu(GPUS.get(name, name))
    like, memory_mib, gb_per_s, tflops = NOT_LISTED[name]
    gpu = catalog.find_gpu(like)
    scale = tflops * TERA / gpu.flops_per_s["fp32"]
    return replace(
        gpu, id=name, memory_bytes=memory_mib * MIB, memory_bytes_per_s=gb_per_s * GIGA,
        flops_per_s={key: rate * scale for key, rate in gpu.flops_per_s.items()},
    )  # fmt: skip


# --- Rows as times --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One row: the seconds it measured, of a token or of a prompt, and what it takes to price them."""

    entry: str  # of the calibration it belongs to
    kind: str  # decode, prefill; tpot, ttft, rate of a closed loop; batch, latency of all requests at once
    llm: Llm
    gpu: Gpu
    layout: Layout
    precision: str
    engine: str
    isl: int
    osl: int
    running: int
    concurrency: int
    measured_s: float
    source: str

    @property
    def fitted(self) -> bool:
        """Whether it is a time per token that does not hold the wait for a first one."""
        return self.kind in {"decode", "tpot", "batch", "latency"}

    @property
    def configuration(self) -> str:
        """What is left out together."""
        if self.entry.startswith("llamacpp"):
            return self.gpu.id
        return f"{self.engine} {self.llm.name.split('/')[-1]} {self.gpu.id} {self.precision} {self.layout}"

    def error(self, predicted_s: float) -> float:
        """Return estimated over measured, less one, of the figure the row states: a rate or a time."""
        is_rate = self.kind in {"decode", "prefill", "rate", "batch"}
        return (self.measured_s / predicted_s if is_rate else predicted_s / self.measured_s) - 1


def read_points(folder: Path) -> tuple[list[Point], dict[str, int]]:
    """Return the points of `e2e_public.csv`, and how many rows were left out by reason."""
    points: list[Point] = []
    refused: dict[str, int] = {}
    with (folder / "e2e_public.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                points += _points(row)
            except (WaterlineError, KeyError) as error:
                if row["kind"] in {"vllm_memory_log", "fit", "community_decode"}:
                    continue
                reason = re.sub(r"[?.].*", "", str(error))[:70]
                refused[reason] = refused.get(reason, 0) + 1
    return points, refused


def _points(row: Row) -> Iterator[Point]:
    kind, metric, value = row["kind"], row["metric"], float(row["value"])
    if kind == "llamacpp_bench" and metric in {"decode_tok_s", "prefill_tok_s"}:
        yield _llamacpp(row)
    elif kind == "serving_bench" and row["model"] != "moonshotai/Kimi-K2.6":  # its rows repeat those of K2.5
        form = "ttft" if metric.startswith("ttft") else "tpot" if metric.startswith("tpot") else "rate"
        layout, clients = _layout(row), int(float(row["concurrency"] or 0))
        if not clients or not row["isl"]:
            raise KeyError("lengths or clients not stated")
        if form == "rate":
            value = clients / (value * (layout.gpus if metric.endswith("per_gpu") else 1))
        elif metric.endswith("_ms"):
            value /= 1e3
        yield _point(row, form, layout, int(row["isl"]), int(row["osl"]), clients, value)
    elif kind == "offline_latency" and metric == "e2e_latency_s":
        isl, osl, clients = int(row["isl"]), int(row["osl"]), int(row["concurrency"])
        yield _point(row, "latency", _layout(row), isl, osl, clients, value / osl)
    elif kind == "offline_throughput":
        clients = int(row["concurrency"]) if row["concurrency"].isdigit() else 256  # max: vLLM's own limit then
        yield _batch(row, _layout(row), int(row["isl"]), int(row["osl"]), clients, value)
    elif kind.startswith("mlperf") and row["concurrency"] == "Offline":
        isl, osl = MLPERF_TOKENS[row["model"]]
        layout = _roomy(row, isl + osl)
        yield _batch(row, layout, isl, osl, 1024, value * layout.gpus / int(row["n_gpu"]))


def _batch(row: Row, layout: Layout, isl: int, osl: int, limit: int, tokens_per_s: float) -> Point:
    """A batch as large as the cache: everybody gets a token in the time all of them take for one."""
    point = _point(row, "batch", layout, isl, osl, limit, 1.0)
    return replace(point, concurrency=point.running, measured_s=point.running / tokens_per_s)


def _point(row: Row, kind: str, layout: Layout, isl: int, osl: int, clients: int, measured_s: float) -> Point:
    llm, gpu = model(row["model"]), card(row["gpu"])
    precision = _precision(row, llm)
    name = _engine(row["engine"])
    engine = find_engine(name).on(gpu)
    memory = memory_use(llm, gpu, layout, precision, engine)
    places = most_sequences(llm, layout, memory, isl + osl // 2) if memory.cache_bytes > 0 else 0
    stack = f"{name}-{gpu.stack}"
    return Point(
        entry=stack if gpu.stack != "cuda" else name, kind=kind, llm=llm, gpu=gpu, layout=layout, precision=precision,
        engine=name, isl=isl, osl=osl, running=min(clients, places or clients), concurrency=clients,
        measured_s=measured_s, source=row["source"],
    )  # fmt: skip


def _llamacpp(row: Row) -> Point:
    """`isl` is the depth a decode starts at, or the prompt that is read; half the answer is in the cache on average."""
    gpus = int(row["n_gpu"])
    layout = Layout(pp=gpus) if row["tp"] == "layer-split" else Layout()
    isl, osl = int(row["isl"] or 0), int(row["osl"] or 128)
    noted = re.search(r"pp(\d+)@d(\d+) ub(\d+)", row["note"])
    if row["metric"] == "prefill_tok_s":
        if noted or "decode-like" in row["note"]:
            raise KeyError("a prompt read behind another, or token by token")
        return _point(row, "prefill", layout, isl, 1, 1, isl / float(row["value"]))
    return _point(row, "decode", layout, max(1, isl), osl, 1, 1 / float(row["value"]))


def _precision(row: Row, llm: Llm) -> str:
    word = row["precision"].split()[0].split("/")[0].lower()
    word = llm.precision if word == "checkpoint" else PRECISION_WORDS.get(word, word)
    PRECISIONS[word]
    return word


def _engine(text: str) -> str:
    words = {"llama.cpp": "llamacpp", "sglang": "sglang", "tensorrt": "trtllm"}
    return next((engine for word, engine in words.items() if word in text.lower()), "vllm")


def _layout(row: Row) -> Layout:
    gpus = int(row["n_gpu"])
    experts, ranks = re.search(r"ep=?(\d+)", row["note"]), re.search(r"dp=?(\d+)", row["note"])
    ep, dp = (int(found.group(1)) if found else 1 for found in (experts, ranks))
    if "dep" in row["engine"]:
        ep = dp = gpus
    elif "tep" in row["engine"]:
        ep = gpus
    return Layout(tp=gpus // dp, dp=dp, ep=ep)


def _roomy(row: Row, tokens: int) -> Layout:
    """Return the fewest GPUs a replica for throughput takes: those that hold 256 requests."""
    llm, gpu = model(row["model"]), card(row["gpu"])
    engine, precision = find_engine(_engine(row["engine"])).on(gpu), _precision(row, llm)
    degrees = [degree for degree in (1, 2, 4, 8) if degree <= int(row["n_gpu"])]
    for tp in degrees:
        memory = memory_use(llm, gpu, Layout(tp=tp), precision, engine)
        if memory.cache_bytes > 0 and most_sequences(llm, Layout(tp=tp), memory, tokens) >= 256:
            return Layout(tp=tp)
    return Layout(tp=degrees[-1])


# --- Pricing --------------------------------------------------------------------------------------------------------


_STEPS: dict[tuple[str, ...], StepCost] = {}  # priced once for all points of a replica


def priced(point: Point, calibration: Calibration) -> Pieces:
    """Return the pieces of a point as the command would price them."""
    replica = (point.llm.name, point.gpu.id, str(point.layout), point.precision, point.engine)
    key = (*replica, msgspec.json.encode(calibration).decode())
    if key not in _STEPS:
        engine = find_engine(point.engine).on(point.gpu)
        _STEPS[key] = price_steps(point.llm, point.gpu, point.layout, point.precision, engine, calibration)
    return pieces(_STEPS[key], point.running, point.isl, point.isl + point.osl // 2)


def token_s(point: Point, found: Pieces) -> float:
    """Return the seconds of a token without any wait for the first one; linear in the pieces."""
    if point.kind == "decode":
        return found.plain_s
    if point.kind == "latency":  # all prompts are read, then all answers are written
        return ((point.osl - 1) * found.plain_s + point.running * found.alone_s) / point.osl
    return found.plain_s + point.running / point.osl * found.delay_s


def predicted_s(point: Point, calibration: Calibration) -> float:
    """Return the estimate of what the point measured."""
    found = priced(point, calibration)
    if point.fitted:
        return token_s(point, found)
    if point.kind == "prefill":
        return found.alone_s * calibration.reading
    ttft_s, tpot_s = closed_loop(found, calibration, point.running, point.osl, point.concurrency)
    return ttft_s if point.kind == "ttft" else (ttft_s + (point.osl - 1) * tpot_s) / point.osl


def by_part(point: Point, *, own_kernels: bool) -> Iterator[Pieces]:
    """Price a point for each of PARTS alone."""
    for name in PARTS:
        nothing: dict[str, Any] = dict.fromkeys(PARTS, 0.0)
        yield priced(point, Calibration(**nothing | {name: OVERHEADS.get(name, 1.0), "own_kernels": own_kernels}))


def token_columns(point: Point, *, own_kernels: bool) -> Numbers:
    """Return the seconds a token takes, by part."""
    return np.array([token_s(point, found) for found in by_part(point, own_kernels=own_kernels)])


def values(calibration: Calibration, gpu: Gpu) -> Numbers:
    """Return what multiplies the columns of a point on that card."""
    factors = calibration.factors(gpu)
    return np.array(
        [*(factors[name] for name in KERNELS), *(getattr(calibration, n) / unit for n, unit in OVERHEADS.items())]
    )


# --- Fitting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Form:
    """What of a calibration is fitted for an entry; the rest is taken from `base`."""

    free: tuple[str, ...]  # parts of PARTS with a factor of their own; "one+another" have one together
    base: Calibration = field(default_factory=Calibration)
    vector: bool = False  # and what the vector units add
    pull: float = 1e-4  # weight, in shares of all rows', of lying near the kernels as they are and without overhead
    alike: float = 0.03  # relative errors below it count as squares, larger ones as they are


READS = ("products", "experts", "attention", "latent")
LEAST = 0.8  # of a factor on them: kernels are seldom further from what the card allows, and none gets below that
REQUEST = ("reading", "steps")  # of a first token; so few rows tell no more apart
ALL_READS = "+".join(READS)
LLAMACPP = Form(free=(ALL_READS, "stage_s"), vector=True, base=Calibration(own_kernels=True), alike=0.3)
ROCM = Form(free=("products", "experts", "exchange", "attention+latent", "layer_s", "token_s"))


def fit(points: list[Point], form: Form) -> Calibration:
    """Fit the time per token, then what a first token takes besides."""
    tokens = [point for point in points if point.fitted]
    measured = np.array([point.measured_s for point in tokens])
    rest = measured - np.array([_fixed(point, form) for point in tokens])
    names = _names(form)
    prior = np.array([1.0 if name.split("+")[0] in KERNELS else 0.0 for name in names])
    floor = np.array([LEAST if name.split("+")[0] in READS else 0.0 for name in names])
    columns = np.array([_columns(point, form) for point in tokens])
    found = least(columns, rest, measured, weights(tokens), prior, floor, form)
    fitted = dict(zip(names, found.tolist(), strict=True))
    changes = {part: fitted[name] * OVERHEADS.get(part, 1.0) for name in form.free for part in name.split("+")}
    if "vector" in fitted:
        changes["vector_flops"] = fitted["vector"] / fitted[ALL_READS]
    calibration = msgspec.structs.replace(form.base, **changes)
    return msgspec.structs.replace(calibration, **_first_tokens(points, calibration, form))


def _names(form: Form) -> tuple[str, ...]:
    return (*form.free, "vector") if form.vector else form.free


def _columns(point: Point, form: Form) -> Numbers:
    """Return the seconds of a token that one of each fitted value adds."""
    seconds = dict(zip(PARTS, token_columns(point, own_kernels=form.base.own_kernels).tolist(), strict=True))
    ratio = point.gpu.memory_bytes_per_s / point.gpu.flops_per_s.get("fp32", np.inf)
    for name in READS:
        seconds[name] *= 1 + form.base.vector_flops * ratio
    seconds["vector"] = ratio * sum(seconds[name] for name in READS)
    return np.array([sum(seconds[part] for part in name.split("+")) for name in _names(form)])


def _fixed(point: Point, form: Form) -> float:
    """Return the seconds of a token that are not fitted."""
    fitted = {part for name in form.free for part in name.split("+")}
    kept = np.array([0.0 if name in fitted else 1.0 for name in PARTS])
    return float(token_columns(point, own_kernels=form.base.own_kernels) @ (kept * values(form.base, point.gpu)))


def _first_tokens(points: list[Point], calibration: Calibration, form: Form) -> dict[str, float]:
    """Fit what a first token takes, on those who need not wait for a place; reading takes at least what it takes."""
    prompts = [point for point in points if point.kind == "prefill"]
    if prompts:
        plain = msgspec.structs.replace(calibration, reading=1.0)
        ratio = np.array([point.measured_s / predicted_s(point, plain) for point in prompts])
        return {"reading": max(1.0, float(np.median(ratio)))}
    first = [point for point in points if point.kind == "ttft" and point.running == point.concurrency]
    if not first:
        return {}
    columns = np.array([_first(point, calibration) for point in first])
    measured = np.array([point.measured_s for point in first])
    scale = np.median(columns / measured[:, None], axis=0)
    none, once = np.zeros(len(REQUEST)), np.array([1.0, 0.0])
    found = least(columns / scale, measured, measured, weights(first), none, once * scale, form) / scale
    return dict(zip(REQUEST, found.tolist(), strict=True))


def _first(point: Point, calibration: Calibration) -> list[float]:
    found = priced(point, calibration)
    return [found.lone_s, found.plain_s + point.running / point.osl * found.delay_s]


def weights(points: list[Point]) -> Numbers:
    names = [point.configuration for point in points]
    return np.array([names.count(name) ** -0.5 for name in names])


def least(
    columns: Numbers, wanted: Numbers, measured: Numbers, weight: Numbers, prior: Numbers, floor: Numbers, form: Form
) -> Numbers:
    """Return coefficients, none below its floor, with the least weighted sum of errors relative to `measured`.

    Iteratively reweighted least squares; `form.pull` of all rows' weight is on the squared distance from `prior`.
    """
    relative, target = columns / measured[:, None], (wanted - columns @ floor) / measured
    towards = np.maximum(0.0, prior - floor)
    pull = form.pull * np.where(prior > 0, 1.0, 0.04)  # overheads lie five times as far from none as factors from one
    found, now = towards.copy(), weight.copy()
    for _ in range(60):
        kept = list(range(len(prior)))
        found = np.zeros(len(prior))
        while kept:
            some, ridge = relative[:, kept], np.diag(pull[kept]) * now.sum()
            solved = np.linalg.solve(
                some.T @ (some * now[:, None]) + ridge, some.T @ (now * target) + ridge @ towards[kept]
            )
            if (solved >= 0).all():
                found[kept] = solved
                break
            kept.pop(int(np.argmin(solved)))
        now = weight / np.maximum(np.abs(relative @ found - target), form.alike)
    return floor + found


def left_out(points: list[Point], form: Form, by: Callable[[Point], str]) -> Numbers:
    """Return every point's seconds as fitted without its group; without any other group, as `form.base` has it."""
    groups = np.array([by(point) for point in points])
    found = np.zeros(len(points))
    for group in np.unique(groups):
        others = [point for point, name in zip(points, groups, strict=True) if name != group]
        calibration = fit(others, form) if any(point.fitted for point in others) else form.base
        for index in np.flatnonzero(groups == group):
            found[index] = predicted_s(points[index], calibration)
    return found


# --- The table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fitted:
    """One entry of the table and what it was fitted on."""

    name: str
    points: list[Point]
    form: Form
    calibration: Calibration
    predicted_s: Numbers  # [point]
    left_out_s: Numbers  # [point] as fitted without its configuration; llama.cpp: without its card


def fit_all(folder: Path) -> list[Fitted]:
    """Fit every entry."""
    points, _ = read_points(folder)

    def entry(name: str, form: Form, more: Sequence[Point] = ()) -> Fitted:
        own = [*(point for point in points if point.entry == name), *more]
        calibration = fit(own, form)
        predicted = np.array([predicted_s(point, calibration) for point in own])
        return Fitted(name, own, form, calibration, predicted, left_out(own, form, lambda point: point.configuration))

    llamacpp = entry("llamacpp", LLAMACPP)
    medians = [
        replace(point, entry="llamacpp-rocm")
        for point in community_medians(folder, llamacpp.calibration)
        if point.gpu.stack == "rocm"
    ]
    vllm = calibration_of("vllm")  # no run on AMD states a first token: what HTTP and waiting add is not the card's
    request = {name: getattr(vllm, name) for name in ("request_s", "reading", "together", "steps")}
    return [
        llamacpp,
        entry("llamacpp-rocm", replace(LLAMACPP, free=(ALL_READS,), vector=False, base=llamacpp.calibration), medians),
        entry("vllm-rocm", replace(ROCM, base=Calibration(**request))),
        entry("sglang-rocm", ROCM),
    ]


def community(folder: Path) -> list[Point]:
    """Return the single-card decode rows people sent in, of cards and models the catalogue has."""
    found = []
    with (folder / "e2e_public.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            decodes = row["kind"] == "community_decode" and "prefill" not in row["metric"] and row["n_gpu"] == "1"
            if not decodes or "llama" not in row["engine"] or row["precision"].lower() not in PRECISIONS:
                continue
            name = re.sub(r"([-_](UD-)?I?Q\d.*|[-_]GGUF.*|\.gguf)$", "", row["model"])
            name = name.removeprefix("Meta-").removesuffix("-Instruct") if "Llama-3.1-8B" in name else name
            try:
                found.append(
                    _point({**row, "model": name}, "decode", Layout(), 1, int(row["osl"]), 1, 1 / float(row["value"]))
                )
            except (WaterlineError, KeyError):
                continue
    return found


def community_medians(folder: Path, calibration: Calibration, rows: int = 5) -> list[Point]:
    """Return of each card with so many rows the one that lies in the middle, by measured over estimated."""
    by_card: dict[str, list[Point]] = {}
    for point in community(folder):
        by_card.setdefault(point.gpu.id, []).append(point)
    return [
        sorted(own, key=lambda point: point.measured_s / predicted_s(point, calibration))[len(own) // 2]
        for own in by_card.values()
        if len(own) >= rows
    ]


def ratios(points: list[Point], predicted: Numbers, kinds: set[str]) -> list[float]:
    """Return the 10th and 90th percentile of measured over predicted, none of fewer than ten rows."""
    found = [
        point.measured_s / seconds for point, seconds in zip(points, predicted, strict=True) if point.kind in kinds
    ]
    return [round(float(edge), 3) for edge in np.quantile(found, [0.1, 0.9])] if len(found) >= 10 else []


def lines(fitted: Fitted) -> Iterator[str]:
    """Write one entry."""
    calibration, points = fitted.calibration, fitted.points
    yield ""
    yield f"[{fitted.name}]"
    for name in (*KERNELS, *OVERHEADS, "vector_flops", "request_s", "reading", "together", "steps"):
        value, default = getattr(calibration, name), getattr(Calibration(), name)
        if value != default:
            yield f"{name} = {value:.4g}"
    if calibration.own_kernels:
        yield "own_kernels = true"
    cards = sorted({point.gpu.id for point in points} & set(accelerators.table()))
    yield f"gpus = {cards}".replace("'", '"')
    yield f'source = "{len(points)} rows"'
    yield most_line(points)
    spreads = {"transferred": fitted.left_out_s}
    if fitted.name == "llamacpp":
        spreads["interpolated"] = fitted.left_out_s
        spreads["measured"] = left_out(
            points, fitted.form, lambda point: f"{point.gpu.id} {point.llm.name} {point.layout}"
        )
    for provenance, predicted in spreads.items():
        ttft = ratios(points, predicted, {"ttft", "prefill"}) or list(PHYSICS.ttft)
        tpot = ratios(points, predicted, {"tpot"}) or ratios(points, predicted, {"decode", "batch", "latency"})
        tpot = tpot or list(PHYSICS.tpot)
        yield f"spread.{provenance} = {{ ttft = {ttft}, tpot = {tpot} }}"


def main() -> None:
    """Fit every entry and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    text = [
        "# What engines add to their kernels, as the public measured. Written by tools/fit_public.py; do not edit.",
        "# llama.cpp: benchmark tables of 2024-05 and of pull requests since. AMD: MLPerf Inference v5.1, AMD's and",
        f"# SGLang's own pages. Rows and sources in e2e_public.csv; fitted {date.today().isoformat()}.",  # noqa: DTZ011
    ]
    for fitted in fit_all(parser.parse_args().folder):
        text += lines(fitted)
    TARGET.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
