"""Steps of random-weight decoders, timed on the GPU at hand, beside what we say they take.

    python benchmarks/gpu_step.py [--seconds 600] [--json FILE] [--models NAME ...] [--gpu ID]
    python benchmarks/gpu_step.py --read FILE         # figures of an earlier run against today's estimates; no torch

A step is what a serving engine runs: one token of each of `batch` sequences with a context (decode), or a whole prompt
(prefill). Shapes are the catalogue's, of dense decoders with full attention that fit one card; weights are random, one
tensor a layer, so every step reads them all. Products are torch's: bf16, fp8 by `torch._scaled_mm`, int8 by
`torch._int_mm`, with one scale a tensor. Steps run as CUDA graphs where they can be captured, and small kernels are
fused by `torch.compile` where it works. A figure is the median of repeats between two events on the stream.

The estimate is the sum of kernels of `waterline.cost` on that card without anything an engine adds: a neutral
calibration. Not in a step, on either side: embedding, sampling, biases, norms of queries and keys.

What was run: this script on the CPU build of torch 2.13, all three precisions, by its tests; and once with fused
kernels there, whose logits agree to 0.5 %. What was not: any GPU. No figure of one has been published, and graphs,
events and the memory of a card have not been exercised. `--json FILE` writes figures with card, driver, torch and date,
in the form meant for `src/waterline/catalog/measured/steps-CARD.json`.
"""

import argparse
import os
import platform
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from waterline import catalog
from waterline.catalog.calibration import Calibration
from waterline.catalog.engines import find_engine
from waterline.cost import StepCost, sequence_cache_bytes, weights_bytes
from waterline.cost.memory import activation_bytes
from waterline.cost.step import prefill_pairs, price_steps
from waterline.errors import InfeasibleError, InputError, UnknownNameError, WaterlineError
from waterline.hardware import Gpu
from waterline.llm import Llm
from waterline.plan import Layout
from waterline.units import PICOSECONDS_PER_S, gib_text, seconds_text

try:
    import torch
    from torch.nn import functional
except ImportError:  # --read does without
    torch = functional = None

MODELS = ("Qwen/Qwen3-1.7B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B", "meta-llama/Meta-Llama-3.1-70B")
PRECISIONS = ("bf16", "fp8", "int8")
BATCHES = (1, 4, 16, 64, 256)
CONTEXTS = (512, 2048, 8192, 32_768)

MEMORY_SHARE = 0.9  # of what is free; the rest is for torch's own workspaces
ACTIVATION_COPIES = 3  # of the peak an engine has, with its fused kernels and buffers used twice
WARM_UPS, FEWEST, MOST = 3, 5, 100  # steps before timing, and repeats
POINT_S = 0.5  # of repeats for each point
LEAST_ROWS = 32  # torch._int_mm refuses 16 rows and fewer
WEIGHT_SCALE = 0.02  # keeps the residual stream finite; zeros would run cooler than real weights

Phase = Literal["decode", "prefill"]
Step = Callable[[], object]


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step: `batch` sequences of a context for a decode, one prompt of that many tokens for a prefill."""

    model: str
    precision: str
    phase: Phase
    batch: int
    context_tokens: int


class Timed(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step as measured; a tenth of the repeats took less than `low_s`, a tenth more than `high_s`."""

    step_s: float
    low_s: float
    high_s: float
    repeats: int
    graph: bool  # replayed as a CUDA graph; otherwise launches may count


class Figures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run on one card."""

    gpu: str  # id of the catalogue
    device: str  # as the driver calls it
    driver: str
    torch: str
    runtime: str  # "CUDA 13.0", "HIP 7.0", "CPU"
    date: str
    fused: bool  # small kernels by torch.compile
    points: tuple[Timed, ...]


# --- What we say ----------------------------------------------------------------------------------------------------


@cache
def _steps(model: str, gpu: str, precision: str) -> StepCost:
    engine = replace(find_engine("vllm"), step_tokens=max(CONTEXTS))  # a prompt is read in one step
    llm = catalog.load_model(model, Path())
    return price_steps(llm, catalog.find_gpu(gpu), Layout(), precision, engine, Calibration())


def estimate_s(point: Point, gpu: str) -> float:
    """Return the kernels of a step on a card, without an engine."""
    step = _steps(point.model, gpu, point.precision)
    if point.phase == "decode":
        took_ps = step.step_ps(0, 0, point.batch, point.batch * point.context_tokens)
    else:
        took_ps = step.step_ps(point.context_tokens, prefill_pairs(0, point.context_tokens), 0, 0)
    return took_ps / PICOSECONDS_PER_S


# --- The model ------------------------------------------------------------------------------------------------------


def why_not(llm: Llm) -> str:
    """Say why this script cannot run a model; nothing if it can."""
    if any(group.experts for group in llm.feed_forward):
        return "has experts, and torch has no kernel of theirs that engines use"
    if any(group.kind != "full" or group.selected_tokens for group in llm.attention):
        return "has attention other than full"
    if any(group.value_head_dim not in {0, group.head_dim} for group in llm.attention):
        return "has values of another width than keys"
    return ""


class Product:
    """A matrix product by random weights kept in a precision."""

    def __init__(self, outputs: int, inputs: int, precision: str, device: str, quantise: Callable[..., Any]) -> None:
        self.precision, self.quantise = precision, quantise
        weights = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=device).normal_()
        if precision == "bf16":
            self.weights = weights.mul_(WEIGHT_SCALE)
            return
        steps = 32.0 if precision == "int8" else 1.0  # steps of a standard deviation; a float needs none
        self.form = torch.int8 if precision == "int8" else fp8_form(device)
        self.weights = weights.mul_(steps).clamp_(-127, 127).to(self.form).t()
        self.into = torch.tensor(1 / steps, device=device)  # scale of the inputs …
        self.scale = torch.tensor(WEIGHT_SCALE / steps, device=device)  # … of the weights …
        self.both = self.into * self.scale  # … and of the product

    def __call__(self, inputs: Any) -> Any:  # [token, input] -> [token, output]
        if self.precision == "bf16":
            return functional.linear(inputs, self.weights)
        packed = self.quantise(inputs, self.into, self.form)
        if self.precision == "fp8":
            return torch._scaled_mm(  # noqa: SLF001 - torch has no other name for it
                packed, self.weights, self.into, self.scale, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        rows = len(packed)
        if rows < LEAST_ROWS:
            packed = functional.pad(packed, (0, 0, 0, LEAST_ROWS - rows))
        return (torch._int_mm(packed, self.weights)[:rows] * self.both).to(torch.bfloat16)  # noqa: SLF001 - likewise


def fp8_form(device: str) -> Any:
    """Return the 8-bit float of the device: MI300 has its own."""
    if device == "cuda" and torch.version.hip and "gfx94" in torch.cuda.get_device_properties(0).gcnArchName:
        return torch.float8_e4m3fnuz
    return torch.float8_e4m3fn


def quantise(inputs: Any, into: Any, form: Any) -> Any:
    scaled = inputs / into
    return scaled.round().clamp(-127, 127).to(form) if form == torch.int8 else scaled.clamp(-240, 240).to(form)


def add_norm(residual: Any, added: Any, weight: Any) -> tuple[Any, Any]:
    """Return the residual stream and its normed copy."""
    residual = residual + added
    return residual, functional.rms_norm(residual, (residual.shape[-1],), weight, 1e-6)


def rotate(heads: Any, cosine: Any, sine: Any) -> Any:  # [token, head, dim], [token, 1, dim] twice
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-second, first), dim=-1) * sine


def gate(both: Any) -> Any:
    gated, up = both.chunk(2, dim=-1)
    return functional.silu(gated) * up


class Decoder:
    """A dense decoder with random weights in a precision; the head stays in 16 bits, as checkpoints keep it."""

    def __init__(self, llm: Llm, precision: str, device: str, *, fused: bool) -> None:
        self.llm, self.device = llm, device

        def fuse(function: Callable[..., Any]) -> Any:
            return torch.compile(function, dynamic=True) if fused else function

        self.add_norm, self.rotate, self.gate = fuse(add_norm), fuse(rotate), fuse(gate)
        pack = fuse(quantise)

        def product(outputs: int, inputs: int) -> Product:
            return Product(outputs, inputs, precision, device, pack)

        attention = [group for group in llm.attention for _ in range(group.layers)]
        networks = [group for group in llm.feed_forward for _ in range(group.layers)]
        self.layers = [
            (
                group,
                product((group.query_heads + 2 * group.kv_heads) * group.head_dim, llm.hidden),
                product(llm.hidden, group.query_heads * group.head_dim),
                product((network.matrices - 1) * network.intermediate, llm.hidden),
                product(llm.hidden, network.intermediate),
                network.matrices == 3,
            )
            for group, network in zip(attention, networks, strict=True)
        ]
        self.norm = torch.ones(llm.hidden, dtype=torch.bfloat16, device=device)
        self.head = Product(llm.vocabulary, llm.hidden, "bf16", device, pack)

    def step(self, point: Point) -> Step:
        """Return a function that runs one step; cache and inputs are made now and stay where they are."""
        decode = point.phase == "decode"
        sequences = point.batch if decode else 1
        tokens = sequences if decode else point.context_tokens
        caches = [self._cache(group, sequences, point.context_tokens) for group, *_ in self.layers]
        hidden = torch.randn(tokens, self.llm.hidden, dtype=torch.bfloat16, device=self.device)
        widest = max(group.head_dim for group, *_ in self.layers)
        cosine, sine = torch.rand(2, tokens, 1, widest, dtype=torch.bfloat16, device=self.device)

        def run() -> object:
            residual, added = hidden, torch.zeros_like(hidden)
            for (group, into, out, up, down, gated), (keys, values) in zip(self.layers, caches, strict=True):
                residual, normed = self.add_norm(residual, added, self.norm)
                heads = into(normed).view(tokens, -1, group.head_dim)
                query, key, value = heads.split((group.query_heads, group.kv_heads, group.kv_heads), dim=1)
                at = (cosine[..., : group.head_dim], sine[..., : group.head_dim])
                attend = attend_decode if decode else attend_prefill
                attended = attend(self.rotate(query, *at), self.rotate(key, *at), value, keys, values)
                residual, normed = self.add_norm(residual, out(attended), self.norm)
                wide = up(normed)
                added = down(self.gate(wide) if gated else functional.gelu(wide))
            _, normed = self.add_norm(residual, added, self.norm)
            return self.head(normed if decode else normed[-1:])

        return run

    def _cache(self, group: Any, sequences: int, context_tokens: int) -> Any:
        """Return keys and values: [2, sequence, kv head, token, dim]."""
        shape = (2, sequences, group.kv_heads, context_tokens, group.head_dim)
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_()


def attend_decode(query: Any, key: Any, value: Any, keys: Any, values: Any) -> Any:
    """Attend from one new token of each sequence; the queries that share a key form one block, so it is read once."""
    keys[:, :, -1], values[:, :, -1] = key, value
    blocks = query.view(len(query), keys.shape[1], -1, query.shape[-1])
    return functional.scaled_dot_product_attention(blocks, keys, values).reshape(len(query), -1)


def attend_prefill(query: Any, key: Any, value: Any, keys: Any, values: Any) -> Any:
    """Attend within one prompt."""
    query, key, value = (heads.transpose(0, 1).unsqueeze(0) for heads in (query, key, value))
    keys.copy_(key)
    values.copy_(value)
    found = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )
    return found[0].transpose(0, 1).reshape(query.shape[2], -1)


# --- The clock ------------------------------------------------------------------------------------------------------


def time_step(run: Step, device: str, seconds: float) -> tuple[list[float], bool]:
    """Return how long each repeat took, and whether a graph was replayed."""
    with torch.inference_mode():
        if device != "cuda":
            return _repeat_cpu(run, seconds), False
        replay = _captured(run)
        return _repeat_cuda(replay or run, seconds), replay is not None


def _captured(run: Step) -> Step | None:
    """Return the replay of a CUDA graph of the step; None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        print(f"not captured as a graph: {_first_line(error)}", file=sys.stderr)
        torch.cuda.synchronize()
        return None
    replay: Step = graph.replay
    return replay


def _repeat_cuda(run: Step, seconds: float) -> list[float]:
    def between(repeats: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]

    return between(_repeats(between(1)[0], seconds))


def _repeat_cpu(run: Step, seconds: float) -> list[float]:
    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return [once() for _ in range(_repeats(once(), seconds))]


def _repeats(step_s: float, seconds: float) -> int:
    return max(FEWEST, min(MOST, int(seconds / step_s)))


# --- What fits ------------------------------------------------------------------------------------------------------


def free_bytes(device: str) -> int:
    """Return the memory a run may take now."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0] * MEMORY_SHARE)
    pages = os.sysconf("SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES")
    return int(pages * os.sysconf("SC_PAGE_SIZE") * MEMORY_SHARE)


def point_bytes(llm: Llm, point: Point) -> int:
    """Return what a step needs beside the weights: cache, activations, logits."""
    decode = point.phase == "decode"
    sequences, tokens = (point.batch, point.batch) if decode else (1, point.context_tokens)
    cache = sequences * sequence_cache_bytes(llm, point.context_tokens, Layout())
    return cache + ACTIVATION_COPIES * activation_bytes(llm, Layout(), tokens, sequences)


def unsupported(precision: str, device: str) -> str:
    """Say why this device cannot multiply in a precision; nothing if it can."""
    try:
        Product(64, 64, precision, device, quantise)(torch.zeros(64, 64, dtype=torch.bfloat16, device=device))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return _first_line(error)
    return ""


def can_fuse(device: str) -> bool:
    """Return whether torch.compile works here: it needs Triton, and a compiler."""
    if device != "cuda":
        return False
    try:
        torch.compile(gate, dynamic=True)(torch.zeros(2, 64, dtype=torch.bfloat16, device=device))
    except Exception as error:  # noqa: BLE001 - whatever is wrong there, steps run without it
        print(f"small kernels are not fused: {_first_line(error)}", file=sys.stderr)
        return False
    return True


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# --- A run ----------------------------------------------------------------------------------------------------------


def grid(model: str, precision: str, batches: Sequence[int], contexts: Sequence[int]) -> list[Point]:
    """Return the points in an order of chance, always the same, so that a run cut short still covers the grid."""
    points = [
        Point(model=model, precision=precision, phase="decode", batch=batch, context_tokens=context)
        for batch in batches
        for context in contexts
    ]
    points += [
        Point(model=model, precision=precision, phase="prefill", batch=1, context_tokens=context)
        for context in contexts
    ]
    random.Random(0).shuffle(points)
    return points


def run_model(
    llm: Llm, points: Sequence[Point], gpu: Gpu, device: str, deadline: float, *, fused: bool
) -> Iterator[Timed | str]:
    """Yield a figure for each point, or why it was left out."""
    precision, limit = points[0].precision, llm.max_context_tokens
    needs, offers = weights_bytes(llm, precision), free_bytes(device)
    if needs > offers:
        yield f"{llm.name} in {precision} needs {gib_text(needs)}, {gib_text(offers)} are free"
        return
    decoder = Decoder(llm, precision, device, fused=fused)
    for point in points:
        expected_s = 2 * estimate_s(point, gpu.id) * (WARM_UPS + FEWEST)
        if point.context_tokens > limit:
            yield f"contexts beyond the {limit:,} tokens of {llm.name}"
        elif point_bytes(llm, point) > free_bytes(device):
            yield "cache and activations do not fit in what is free"
        elif time.perf_counter() + expected_s > deadline:
            yield "no time left"
        else:
            yield _run_point(decoder, point, device)


def _run_point(decoder: Decoder, point: Point, device: str) -> Timed | str:
    try:
        took_s, graph = time_step(decoder.step(point), device, POINT_S)
    except torch.OutOfMemoryError:
        return "out of memory while running"
    except (RuntimeError, NotImplementedError) as error:
        return _first_line(error)
    return Timed(
        **msgspec.structs.asdict(point), step_s=float(np.median(took_s)), low_s=float(np.percentile(took_s, 10)),
        high_s=float(np.percentile(took_s, 90)), repeats=len(took_s), graph=graph,
    )  # fmt: skip


def measure(arguments: argparse.Namespace) -> Figures:
    """Run models, precisions and points for as long as there is time; each model and precision has an equal share."""
    device = _device(arguments.device)
    gpu = find_card(arguments.gpu, device)
    fused = can_fuse(device)
    jobs = list(_jobs(arguments.models, arguments.precisions, gpu, device))
    end = time.perf_counter() + arguments.seconds
    timed: list[Timed] = []
    left_out: Counter[str] = Counter()
    print(HEADINGS)
    for index, (model, llm, precision) in enumerate(jobs):
        now = time.perf_counter()
        share_s = (end - now) / (len(jobs) - index)
        points = grid(model, precision, arguments.batches, arguments.contexts)
        for found in run_model(llm, points, gpu, device, now + share_s, fused=fused):
            if isinstance(found, str):
                left_out[found] += 1
                continue
            timed.append(found)
            print(row_text(found, gpu.id), flush=True)
    for reason, count in left_out.items():
        print(f"left out, {count}: {reason}", file=sys.stderr)
    return Figures(
        gpu=gpu.id, device=_device_name(device), driver=driver_version(), torch=str(torch.__version__),
        runtime=_runtime(device), date=datetime.now(UTC).date().isoformat(), fused=fused, points=tuple(timed),
    )  # fmt: skip


def _jobs(models: Sequence[str], precisions: Sequence[str], gpu: Gpu, device: str) -> Iterator[tuple[str, Llm, str]]:
    """Yield the models and precisions that can run here, and say of the others why not."""
    for precision in precisions:
        if reason := unsupported(precision, device):
            print(f"{precision} does not run here: {reason}", file=sys.stderr)
            continue
        for model in models:
            llm = catalog.load_model(model, Path())
            if reason := why_not(llm):
                raise InputError(f"{llm.name} {reason}. Take a dense model, such as {MODELS[1]}.")
            try:
                _steps(model, gpu.id, precision)
            except InfeasibleError as error:
                print(f"no estimate: {error}", file=sys.stderr)
                continue
            yield model, llm, precision


def _device(wanted: str) -> str:
    if torch is None:
        raise InputError("This needs torch, a build for CUDA or ROCm: pip install torch. --read FILE does without.")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(f"torch {torch.__version__} sees no GPU. --device cpu tries the script without one.")
    return wanted


def _device_name(device: str) -> str:
    return str(torch.cuda.get_device_name()) if device == "cuda" else platform.processor() or platform.machine()


def find_card(name: str, device: str) -> Gpu:
    """Return the catalogue's card: the one named, or the one that torch found."""
    if device != "cuda":
        if name:
            raise InputError("--device cpu only tries the script; its figures belong to no card. Leave --gpu out.")
        return catalog.find_gpu("cpu")
    if name:
        return catalog.find_gpu(name)
    try:
        return catalog.find_gpu(_device_name(device))
    except UnknownNameError as error:
        raise UnknownNameError(
            f"The catalogue has no card of the name torch gives. {error} Pass --gpu with an id of `waterline catalog "
            "gpus`, of a card with the same memory and rates."
        ) from error


def driver_version() -> str:
    """Return the version of the kernel module of NVIDIA or AMD; "unknown" without."""
    for path, pattern in (
        ("/proc/driver/nvidia/version", r"Kernel Module.*?(\d+\.\d+[.\d]*)"),
        ("/sys/module/amdgpu/version", r"(\S+)"),
    ):
        try:
            if found := re.search(pattern, Path(path).read_text()):
                return found[1]
        except OSError:
            continue
    return "unknown"


def _runtime(device: str) -> str:
    if device != "cuda":
        return "CPU"
    return f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"


# --- What is printed ------------------------------------------------------------------------------------------------


def row_text(timed: Timed, gpu: str) -> str:
    ours_s = estimate_s(timed, gpu)
    return (
        f"{timed.model:<32} {timed.precision:<5} {timed.phase:<8} {timed.batch:>5} {timed.context_tokens:>7,} "
        f"{seconds_text(timed.step_s):>9} {seconds_text(ours_s):>9} {(ours_s / timed.step_s - 1) * 100:>+7.1f} %"
        + ("" if timed.graph else "  no graph")
    )


HEADINGS = f"{'model':<32} {'form':<5} {'step':<8} {'batch':>5} {'context':>7} {'measured':>9} {'ours':>9} {'error':>9}"


def summary(figures: Figures) -> str:
    """Return the size of the error by kind of step: median and 90th of a hundred."""
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for timed in figures.points:
        error = abs(estimate_s(timed, figures.gpu) / timed.step_s - 1)
        for key in ((timed.precision, timed.phase), ("all", "all")):
            errors[key].append(error)
    lines = [f"{figures.device} as {figures.gpu}; driver {figures.driver}, torch {figures.torch}, {figures.runtime}"]
    for (precision, phase), found in sorted(errors.items(), reverse=True):
        median, high = np.percentile(found, (50, 90))
        lines.append(f"{precision:<5} {phase:<8} {len(found):>4} points, error median {median:.1%}, p90 {high:.1%}")
    return "\n".join(lines)


def read_figures(path: Path) -> Figures:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Figures)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except msgspec.DecodeError as error:
        raise InputError(f"{path} was not written by --json: {error}.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or read figures, and print both sides; return an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="of the catalogue, or a config")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, metavar="TOKENS")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no point is begun (600)")
    parser.add_argument("--gpu", default="", metavar="ID", help="the catalogue's id, where torch's name is not in it")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cuda means ROCm as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--read", type=Path, metavar="FILE", help="compare figures of an earlier run instead")
    arguments = parser.parse_args(argv)
    if min(*arguments.batches, *arguments.contexts) < 1:
        parser.error("--batches and --contexts should be at least 1")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no such folder")
    try:
        if arguments.read:
            figures = read_figures(arguments.read)
            print("\n".join((HEADINGS, *(row_text(timed, figures.gpu) for timed in figures.points))))
        else:
            figures = measure(arguments)
        if not figures.points:
            raise InfeasibleError("No point was measured; the lines above say why. Give more --seconds, or --models.")
    except WaterlineError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(figures))
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
