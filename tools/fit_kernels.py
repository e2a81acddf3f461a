"""Fit the surfaces of `waterline.cost.kernels_curves` to measured kernels, into `catalog/measured/kernels.npz`.

Run by hand where the measured points lie beside the checkout; `benchmarks/kernels.py` says how well it went::

    python tools/fit_kernels.py ../shared/data/kernels

For every card and kind of kernel the logarithm of measured over usual time is fitted, knot by knot, by least squares
with a penalty on curvature; points far from the surface count less (three rounds of reweighting).
"""

import csv
import gzip
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from waterline import catalog
from waterline.catalog.measurements import Measured, write_kernels
from waterline.cost.kernels import Kernels
from waterline.cost.kernels_curves import CURVES, Curve, Surface, weights_at

Numbers = NDArray[np.float64]

GPUS = {
    "a100_sxm": "a100-sxm-80g",
    "h100_sxm": "h100-sxm-80g",
    "h200_sxm": "h200-sxm-141g",
    "b200_sxm": "b200-sxm-180g",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx-pro-6000-server",
}
FORMS = {
    "bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4", "int4_wo": "int4",
    "w4a16_mxfp4": "mxfp4",
}  # fmt: skip
OPERATIONS = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}  # fmt: skip
UNGATED = {
    (layers.experts, layers.experts_per_token)
    for llm in catalog.models().values()
    for layers in llm.feed_forward
    if layers.experts and layers.matrices == 2
}
GATES_ALL = "0.14.0"  # the vLLM that gave every expert a gate
ELEMENT_BYTES = {"half": 2, "bfloat16": 2, "int8": 1}
PROVENANCE = {
    "source": "github.com/ai-dynamo/aiconfigurator, aic-core/src/aiconfigurator_core/systems/data, "
    "copyright NVIDIA CORPORATION & AFFILIATES; half of its shapes, as deviations from physics on a grid",
    "licence": "Apache-2.0",
    "version": "aiconfigurator-core 0.12.0 (vLLM 0.24.0; A100 0.14.0; nccl-tests)",
    "read": "2026-11-23",
}
OUTPUT = Path(__file__).parents[1] / "src" / "waterline" / "catalog" / "measured" / "kernels.npz"

CURVATURE = 0.3  # weight of the penalty, in points
LOOSE = {"head_dim": 0.03, "ep": 0.03, "gpus": 0.03}  # sizes that choose another kernel: neighbours say little
SLOPE = 0.003  # keeps what no point is near flat
SLOPE_FROM_START = 1.0  # … and a fit that starts from another one near it
HOST_BOUND = 1.5  # fp8_block: shapes whose plain fp8 takes less than so many launches show the launch, not the work
LEAST_POINTS = 100  # for a fit of its own


@dataclass(frozen=True)
class Points:
    """Measured times of one kind of kernel on one card."""

    kind: str  # of CURVES
    form: str
    cache: str
    sizes: dict[str, Numbers]  # as the curve names them
    arguments: dict[str, Numbers]  # as the method of `Kernels` names them
    took_s: Numbers
    shape: NDArray[np.int64]  # equal for points of one shape; shapes are held out whole
    trusted: NDArray[np.bool_]

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.kind, self.form, self.cache) if part)


@lru_cache(maxsize=8)
def read(file: Path) -> dict[str, NDArray]:
    """Return the columns of a gzipped CSV, as numbers where they are."""
    with gzip.open(file, "rt", newline="") as text:
        rows = csv.reader(text)
        header = next(rows)
        columns = [np.array(column) for column in zip(*rows, strict=True)]
    return {name: _numbers(column) for name, column in zip(header, columns, strict=True)}


def _numbers(column: NDArray) -> NDArray:
    try:
        return column.astype(np.float64)
    except ValueError:
        return column


def points_of(folder: Path, system: str) -> Iterator[Points]:
    """Yield every kind of kernel of one card."""
    for table, pick in TABLES.items():
        file = folder / f"{system}.{table}.csv.gz"
        if file.exists():
            yield from pick(read(file))


def _gemm(rows: dict[str, NDArray]) -> Iterator[Points]:
    for dtype in np.unique(rows["gemm_dtype"]):
        one = _where(rows, rows["gemm_dtype"] == dtype)
        trusted = None
        if dtype == "fp8_block":
            launch_ms = np.median(one["latency_ms"][one["m"] <= 8])
            plain = _where(rows, (rows["gemm_dtype"] == "fp8") & (rows["latency_ms"] > HOST_BOUND * launch_ms))
            busy = set(zip(plain["m"], plain["n"], plain["k"], strict=True))
            trusted = np.array([shape in busy for shape in zip(one["m"], one["n"], one["k"], strict=True)])
        sizes = {"tokens": one["m"], "outputs": one["n"], "inputs": one["k"]}
        yield _points("gemm", FORMS[dtype], "", one, sizes, sizes, ("n", "k"), trusted)


def _prefill(rows: dict[str, NDArray]) -> Iterator[Points]:
    rows.setdefault("window_size", np.zeros(len(rows["isl"])))
    for cache in np.unique(rows["kv_cache_dtype"]):
        for windowed in (False, True):
            one = _where(rows, (rows["kv_cache_dtype"] == cache) & ((rows["window_size"] > 0) == windowed))
            heads, kv_heads = one["num_heads"], one["num_key_value_heads"]
            sizes = {
                "rows": one["batch_size"] * heads, "new_tokens": one["isl"], "group": heads / kv_heads,
                "head_dim": one["head_dim"],
            }  # fmt: skip
            if windowed:
                sizes["window"] = one["window_size"]
            arguments = {
                "requests": one["batch_size"], "new_tokens": one["isl"], "cached_tokens": 0 * heads,
                "query_heads": heads, "kv_heads": kv_heads, "head_dim": one["head_dim"],
                "window_tokens": one["window_size"],
            }  # fmt: skip
            key = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim")
            kind = "prefill_window" if windowed else "prefill"
            yield _points(kind, "", FORMS[cache], one, sizes, arguments, key)


def _decode(rows: dict[str, NDArray]) -> Iterator[Points]:
    rows.setdefault("window_size", np.zeros(len(rows["step"])))
    for cache in np.unique(rows["kv_cache_dtype"]):
        for windowed in (False, True):
            one = _where(rows, (rows["kv_cache_dtype"] == cache) & ((rows["window_size"] > 0) == windowed))
            heads, kv_heads, context = one["num_heads"], one["num_key_value_heads"], one["step"]
            read_tokens = np.minimum(context + 1, one["window_size"]) if windowed else context + 1
            sizes = {
                "rows": one["batch_size"] * kv_heads, "read": read_tokens, "group": heads / kv_heads,
                "head_dim": one["head_dim"],
            }  # fmt: skip
            arguments = {
                "requests": one["batch_size"], "context_tokens": context, "query_heads": heads, "kv_heads": kv_heads,
                "head_dim": one["head_dim"], "window_tokens": one["window_size"],
            }  # fmt: skip
            key = ("batch_size", "step", "num_heads", "num_key_value_heads", "head_dim")
            kind = "decode_window" if windowed else "decode"
            yield _points(kind, "", FORMS[cache], one, sizes, arguments, key)


def _latent(kind: str, tokens: str, argument: str) -> Callable[[dict[str, NDArray]], Iterator[Points]]:
    def pick(rows: dict[str, NDArray]) -> Iterator[Points]:
        for form in np.unique(rows["gemm_type"]):
            for cache in np.unique(rows["kv_cache_dtype"]):
                one = _where(rows, (rows["gemm_type"] == form) & (rows["kv_cache_dtype"] == cache))
                one = _fastest(one, ("batch_size", "isl", "step", "num_heads"))
                if len(one["step"]) == 0:
                    continue
                sizes = {"requests": one["batch_size"], argument: one[tokens], "heads": one["num_heads"]}
                arguments = {**sizes, "cached_tokens": 0 * one["step"]} if kind == "latent_prefill" else sizes
                key = ("num_heads", "batch_size", "isl", "step")
                yield _points(kind, FORMS[form], FORMS[cache], one, sizes, arguments, key)

    return pick


def _experts(rows: dict[str, NDArray]) -> Iterator[Points]:
    """Of several implementations of one product the fastest; of the two uneven routings both."""
    key = ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    for dtype in set(np.unique(rows["moe_dtype"])) & set(FORMS):
        for kind in ("experts", "experts_balanced"):
            even = rows["distribution"] == "balanced"
            one = _where(rows, (rows["moe_dtype"] == dtype) & (even == (kind == "experts_balanced")))
            if len(one["topk"]) == 0:
                continue
            one = _fastest(one, (*key, "num_tokens", "distribution"))
            matrices = _matrices(one)
            matrix = one["hidden_size"] * one["inter_size"] / one["moe_tp_size"] * matrices / 3
            sizes = {
                "load": one["num_tokens"] * one["topk"] / one["num_experts"],
                "held": one["num_experts"] / one["moe_ep_size"], "ep": one["moe_ep_size"], "matrix": matrix,
            }  # fmt: skip
            arguments = {
                "tokens": one["num_tokens"], "hidden": one["hidden_size"], "intermediate": one["inter_size"],
                "experts_per_token": one["topk"], "experts": one["num_experts"], "tp": one["moe_tp_size"],
                "ep": one["moe_ep_size"], "matrices": matrices,
            }  # fmt: skip
            yield _points(kind, FORMS[dtype], "", one, sizes, arguments, key)


def _matrices(rows: dict[str, NDArray]) -> Numbers:
    """Return 2 for the experts of models that have no gate, which no column says, and 3 for all others.

    With three matrices their points would be up to a quarter faster than the card's memory. The vLLM that measured the
    A100 did not know such experts: its points take twice as long as there are bytes for.
    """
    found = np.full(len(rows["topk"]), 3.0)
    for experts, chosen in UNGATED:
        found[(rows["num_experts"] == experts) & (rows["topk"] == chosen) & (rows["version"] != GATES_ALL)] = 2.0
    return found


def _nccl(rows: dict[str, NDArray]) -> Iterator[Points]:
    for operation in np.unique(rows["op_name"]):
        one = _where(rows, rows["op_name"] == operation)
        yield _exchange(OPERATIONS[operation], one, "nccl_dtype", ("num_gpus", "message_size"))


def _custom(rows: dict[str, NDArray]) -> Iterator[Points]:
    """Within a graph, as steps run; outside of one the host's launches are measured."""
    one = _where(rows, rows["backend"] == "vllm_graph")
    yield _exchange("custom_all_reduce", one, "allreduce_dtype", ("num_gpus", "message_size"))


def _exchange(kind: str, rows: dict[str, NDArray], dtype: str, key: tuple[str, ...]) -> Points:
    width = np.array([ELEMENT_BYTES[name] for name in rows[dtype]])
    sizes = {"gpus": rows["num_gpus"], "bytes": rows["message_size"] * width}
    arguments = {"message_bytes": sizes["bytes"], "gpus": sizes["gpus"]}
    return _points(kind, "", "", rows, sizes, arguments, key)


TABLES: dict[str, Callable[[dict[str, NDArray]], Iterator[Points]]] = {
    "gemm": _gemm,
    "context_attention": _prefill,
    "generation_attention": _decode,
    "mla_context": _latent("latent_prefill", "isl", "new_tokens"),
    "mla_generation": _latent("latent_decode", "step", "context_tokens"),
    "moe": _experts,
    "nccl": lambda rows: (yield from _nccl(rows)),
    "custom_allreduce": _custom,
}


def _where(rows: dict[str, NDArray], keep: NDArray[np.bool_]) -> dict[str, NDArray]:
    return {name: column[keep] for name, column in rows.items()}


def _fastest(rows: dict[str, NDArray], key: tuple[str, ...]) -> dict[str, NDArray]:
    order = np.argsort(rows["latency_ms"], kind="stable")
    _, first = np.unique(_ids(rows, key)[order], return_index=True)
    return _where(rows, np.isin(np.arange(len(order)), order[first]))


def _ids(rows: dict[str, NDArray], key: tuple[str, ...]) -> NDArray[np.int64]:
    ids = np.zeros(len(rows["latency_ms"]), dtype=np.int64)
    for name in key:
        _, codes = np.unique(rows[name], return_inverse=True)
        ids = ids * (int(codes.max(initial=0)) + 1) + codes
    return ids


def _points(
    kind: str,
    form: str,
    cache: str,
    rows: dict[str, NDArray],
    sizes: dict[str, Numbers],
    arguments: dict[str, Numbers],
    key: tuple[str, ...],
    trusted: NDArray[np.bool_] | None = None,
) -> Points:
    took_s = rows["latency_ms"] / 1e3
    # A key that is the same on every card and in every form, so that a shape is held out everywhere at once.
    shape = np.array([hash(tuple(values)) for values in zip(*(rows[name].tolist() for name in key), strict=True)])
    shape = shape.astype(np.int64) if len(took_s) else np.zeros(0, dtype=np.int64)
    if trusted is None:
        trusted = np.ones(len(took_s), dtype=bool)
    return Points(kind, form, cache, sizes, arguments, took_s, shape, trusted)


def fold_of(points: Points, folds: int = 5) -> NDArray[np.int64]:
    """Return the fold of each point, by its shape."""
    mixed = points.shape.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(40)) % np.uint64(folds)).astype(np.int64)


def fit(points: Points, gpu: str, keep: NDArray[np.bool_], start: Numbers | None = None) -> Numbers:
    """Return the correction at every knot of the curve, from the points in `keep`; beyond the last they share its own.

    What lies below the card's datasheet was read from the cache of the chip, which a model of many layers has long
    replaced: such points count as what the datasheet allows.
    """
    curve, keep = CURVES[points.kind], keep & points.trusted
    kernels = Kernels(catalog.find_gpu(gpu), (gpu,), ({},))
    sizes = [points.sizes[name][keep] for name in curve.sizes]
    peaks = kernels.peaks_of(points.kind, points.form, points.cache)
    knots = [np.array(values, dtype=np.float64) for values in curve.sizes.values()]
    nodes = np.meshgrid(*knots, indexing="ij")
    usual = np.log(np.broadcast_to(curve.usual_s(peaks, *nodes), curve.shape))
    index, weight = weights_at(knots, sizes)
    least = kernels.limit_s(
        points.kind, points.form, points.cache, {name: values[keep] for name, values in points.arguments.items()}
    )
    aim = np.log(np.maximum(points.took_s[keep], least) / Surface(curve, peaks, start)(*sizes))
    found = _solve(curve, index, weight, aim, SLOPE if start is None else SLOPE_FROM_START)
    if start is not None:
        found = found + start
    return _ordered(curve, np.clip(found, -4, 4), usual)


def _solve(
    curve: Curve, index: NDArray[np.intp], weight: Numbers, aim: Numbers, slope: float, rounds: int = 3
) -> Numbers:
    """Least squares by conjugate gradients, three times: points further off than 3 % count less each time."""
    counts = np.ones(len(aim))
    found = np.zeros(int(np.prod(curve.shape)))
    penalties = [LOOSE.get(name, CURVATURE) for name in curve.sizes]
    for _ in range(rounds):
        target = np.bincount(index.ravel(), (weight * (counts * aim)).ravel(), len(found))

        def normal(values: Numbers, counts: Numbers = counts) -> Numbers:
            errors = counts * (weight * values[index]).sum(axis=0)
            result = np.bincount(index.ravel(), (weight * errors).ravel(), len(values))
            grid = values.reshape(curve.shape)
            for axis, penalty in enumerate(penalties):
                result += slope * _differences(grid, axis, 1).ravel()
                if grid.shape[axis] > 2:
                    result += penalty * _differences(grid, axis, 2).ravel()
            return result + 1e-4 * values

        scale = np.bincount(index.ravel(), (weight**2 * counts).ravel(), len(found)) + 6 * sum(penalties) + 4 * slope
        found = _conjugate_gradients(normal, target, found, scale)
        off = np.abs((weight * found[index]).sum(axis=0) - aim)
        counts = 0.03 / np.maximum(off, 0.03)
    return found.reshape(curve.shape)


def _differences(grid: Numbers, axis: int, order: int) -> Numbers:
    """Return the product of a difference operator's transpose with itself and the grid."""
    result = np.diff(grid, n=order, axis=axis)
    width = [(1, 1) if other == axis else (0, 0) for other in range(grid.ndim)]
    for _ in range(order):
        result = -np.diff(np.pad(result, width), axis=axis)
    return result


def _conjugate_gradients(
    normal: Callable[[Numbers], Numbers], target: Numbers, start: Numbers, scale: Numbers, rounds: int = 200
) -> Numbers:
    found, left = start.copy(), target - normal(start)
    step = left / scale
    length = float(left @ step)
    for _ in range(rounds):
        if length < 1e-9:
            break
        moved = normal(step)
        along = length / float(step @ moved)
        found, left = found + along * step, left - along * moved
        scaled = left / scale
        length, before = float(left @ scaled), length
        step = scaled + length / before * step
    return found


def _ordered(curve: Curve, correction: Numbers, usual: Numbers) -> Numbers:
    """Make times rise along the sizes that should: halfway between the least and the most change that does it."""
    log_s = usual + correction
    for axis, name in enumerate(curve.sizes):
        if name in curve.growing:
            above = np.maximum.accumulate(log_s, axis=axis)
            below = np.flip(np.minimum.accumulate(np.flip(log_s, axis), axis=axis), axis)
            log_s = (above + below) / 2
    return log_s - usual


def fit_all(folder: Path, system: str, keep: Callable[[Points], NDArray[np.bool_]]) -> dict[str, Measured]:
    """Fit every kind of kernel of one card; block-scaled fp8 starts from plain fp8, as little of it can be trusted."""
    fits: dict[str, Measured] = {}
    for points in points_of(folder, system):
        kept = keep(points)
        if (kept & points.trusted).sum() < (LEAST_POINTS if points.form == "fp8_block" else 20):
            continue
        plain = fits.get("gemm/fp8") if points.name == "gemm/fp8_block" else None
        start = None if plain is None else plain.correction
        correction = fit(points, GPUS[system], kept, start)
        measured = {name: (float(values.min()), float(values.max())) for name, values in points.sizes.items()}
        fits[points.name] = Measured(correction, measured)
    return fits


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data/kernels")
    gpus = {}
    for system, gpu in GPUS.items():
        gpus[gpu] = fit_all(folder, system, lambda points: np.ones(len(points.took_s), dtype=bool))
        print(gpu, len(gpus[gpu]), "kinds", sum(one.correction.size for one in gpus[gpu].values()), "knots", flush=True)
    write_kernels(OUTPUT, PROVENANCE, gpus)
    print(OUTPUT, OUTPUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
