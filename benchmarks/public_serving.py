"""Estimates against what the public measured: llama.cpp, AMD, and engines on NVIDIA as an outside check.

    python benchmarks/public_serving.py ../shared/data/serving [--rows]

llama.cpp is predicted by a fit that had no row of the card, vLLM and SGLang on AMD by one that had none of the
configuration (engine, model, card, precision, layout). Rows of NVIDIA's data-centre cards are an outside check of what
ships: nothing was fitted on them. What people send in is unverified, so each card counts with its median only.
Beside us the rule of llmfit, tokens/s = 0.55 x bandwidth / bytes of the model, where one answer is written at a time.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from fit_public import FOLDER, Point, community, fit_all, predicted_s, read_points

from waterline.catalog.calibration import calibration_of
from waterline.cost.memory import weights_bytes

Numbers = NDArray[np.float64]
ONE_CONSTANT = 0.55
NAMES = {
    "decode": "decode", "prefill": "reading a prompt", "ttft": "TTFT", "tpot": "TPOT", "rate": "tokens/s",
    "batch": "tokens/s of a full batch", "latency": "latency of a batch",
}  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--rows", action="store_true", help="also a line for each row that was fitted")
    arguments = parser.parse_args()
    points, refused = read_points(arguments.folder)
    fits = {fitted.name: fitted for fitted in fit_all(arguments.folder)}
    print("error of the estimate, estimated / measured - 1 of the figure published, in %")
    print(f"{'':60}{'rows':>5}{'median':>8}{'p90':>6}{'MAPE':>6}{'bias':>6}{'in 80 %':>9}{'one constant, MAPE':>20}")
    llamacpp = [point for point in points if point.entry.startswith("llamacpp")]
    found = {
        _key(point): float(seconds)
        for fitted in fits.values()
        for point, seconds in zip(fitted.points, fitted.left_out_s, strict=True)
    }
    print("llama.cpp, each card left out in turn")
    in_turn = np.array([found[_key(point)] for point in llamacpp])
    kinds(llamacpp, in_turn)
    decode = [index for index, point in enumerate(llamacpp) if point.kind == "decode"]
    groups = {
        "  decode, tables of 2024-05": lambda point: "XiongjieDai" in point.source,
        "  decode, pull requests since": lambda point: "XiongjieDai" not in point.source,
        "  decode, 16 bits": lambda point: point.precision in {"fp16", "bf16"},
        "  decode, 4 bits": lambda point: point.precision.startswith("q4"),
        "  decode, HBM": lambda point: point.gpu.id.startswith(("a100", "h100")),
        "  decode, AMD": lambda point: point.gpu.stack == "rocm",
    }
    some(groups, [llamacpp[index] for index in decode], in_turn[decode])
    own = [point for point in points if point.entry in {"vllm-rocm", "sglang-rocm"}]
    seconds = np.array([found[_key(point)] for point in own])
    print("AMD, each configuration left out in turn")
    line(" all", own, seconds)
    for engine in ("vllm-rocm", "sglang-rocm"):
        chosen = [index for index, point in enumerate(own) if point.entry == engine]
        print(f" {engine}")
        kinds([own[index] for index in chosen], seconds[chosen])
    print("NVIDIA data centre, outside check of what ships: not fitted")
    for engine in ("vllm", "sglang", "trtllm"):
        own = [point for point in points if point.entry == engine]
        print(f" {engine}")
        kinds(own, shipped(own))
        for name in sorted({_setup(point) for point in own}):
            for kind in ("ttft", "tpot", "batch"):
                same = [point for point in own if (_setup(point), point.kind) == (name, kind)]
                if same:
                    line(f"  {name} {NAMES[kind]}", same, shipped(same))
    print("sent in by people, llama.cpp: the median of each card")
    sent = community(arguments.folder)
    for card in sorted({point.gpu.id for point in sent}):
        own = [point for point in sent if point.gpu.id == card]
        line(f"  {card}", own, shipped(own))
    print("not answered")
    for reason, count in sorted(refused.items()):
        print(f"  {count:4} {reason}")
    if arguments.rows:
        for fitted in fits.values():
            rows(fitted.points, fitted.left_out_s)


def _setup(point: Point) -> str:
    return f"{point.llm.name.split('/')[-1][:24]} {point.gpu.id} {point.layout}"


def _key(point: Point) -> tuple[str, ...]:
    return (point.entry, point.kind, point.configuration, point.llm.name, point.precision, str(point.layout),
            str(point.isl), str(point.osl), str(point.concurrency), f"{point.measured_s:.9g}")  # fmt: skip


def shipped(points: Sequence[Point]) -> Numbers:
    """Return the estimates of the calibrations the package ships."""
    return np.array([predicted_s(point, calibration_of(point.engine, point.gpu.stack)) for point in points])


def kinds(points: Sequence[Point], seconds: Numbers) -> None:
    """Print a line for each kind of figure."""
    for kind, name in NAMES.items():
        chosen = [index for index, point in enumerate(points) if point.kind == kind]
        if chosen:
            line(f"  {name}", [points[index] for index in chosen], seconds[chosen])


def some(groups: dict[str, Callable[[Point], bool]], points: Sequence[Point], seconds: Numbers) -> None:
    """Print a line for each group."""
    for name, belongs in groups.items():
        chosen = [index for index, point in enumerate(points) if belongs(point)]
        if chosen:
            line(name, [points[index] for index in chosen], seconds[chosen])


def line(name: str, points: Sequence[Point], seconds: Numbers) -> None:
    """Print the errors of some points."""
    error = np.array([100 * point.error(float(value)) for point, value in zip(points, seconds, strict=True)])
    size = np.abs(error)
    held = np.mean([_held(point, float(value)) for point, value in zip(points, seconds, strict=True)])
    constant = ""
    if all(point.kind == "decode" for point in points):
        rule = [
            point.error(weights_bytes(point.llm, point.precision) / point.gpu.memory_bytes_per_s / ONE_CONSTANT)
            for point in points
        ]
        constant = f"{100 * np.mean(np.abs(rule)):.1f}"
    print(
        f"{name[:60]:60}{len(points):5}{np.median(size):8.1f}{np.quantile(size, 0.9):6.0f}{size.mean():6.1f}"
        f"{np.median(error):+6.0f}{100 * held:9.0f}{constant:>20}"
    )


def _held(point: Point, seconds: float) -> bool:
    """Whether the interval that ships holds what was measured; a rate's is that of its tokens.

    llama.cpp and AMD are predicted by fits that had no such card or configuration, so theirs is the wide one.
    """
    calibration = calibration_of(point.engine, point.gpu.stack)
    own = point.entry in {"vllm", "sglang", "trtllm"} and calibration.ran(point.gpu, point.llm)
    spread = calibration.spread_of("measured" if own else "transferred")
    low, high = spread.ttft if point.kind in {"ttft", "prefill"} else spread.tpot
    return low <= point.measured_s / seconds <= high


def rows(points: Sequence[Point], seconds: Numbers) -> None:
    """Print every row."""
    for point, value in zip(points, seconds, strict=True):
        print(
            f"{point.entry:13} {point.kind:8} {point.llm.name.split('/')[-1][:24]:24} {point.precision:7}"
            f"{point.gpu.id[:18]:18} {point.layout!s:8} {point.isl:6} {point.osl:5} {point.concurrency:5}"
            f"{1e3 * point.measured_s:11.2f} ms {1e3 * value:11.2f} ms {100 * point.error(float(value)):+7.1f} %"
        )


if __name__ == "__main__":
    main()
