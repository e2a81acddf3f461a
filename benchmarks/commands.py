"""Wall time, CPU time and memory of whole commands, cold: a fresh process each time, after one that is not counted.

    .venv/bin/python benchmarks/commands.py [RUNS]

The peer's figures are aiconfigurator 0.12's for the nearest question, measured on 2 vCPU EPYC (Zen 4), 2026-11-23,
median of 3: they are printed, not run.
"""

import csv
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# As people run it: modules are compiled once, by the run that is not counted, and not again by each.
COMPILED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
POINTS = 10_000
COMMANDS = [
    ("waterline --help", ["--help"], ""),
    ("waterline fit deepseek-r1 (78 cards)", ["fit", "deepseek-r1"], "estimate, one point: 3.94 CPU-s, 201 MB"),
    ("waterline plan examples/mixed.toml", ["plan", "examples/mixed.toml"], "recommend, one model: 11.5 CPU-s, 398 MB"),
    (f"waterline estimate ({POINTS:,} points, 288 replicas)", ["estimate", "--points", "LOOP"], ""),
    (f"waterline estimate ({POINTS:,} at a rate)", ["estimate", "--points", "RATE"], ""),
    (f"waterline estimate ({POINTS:,} split)", ["estimate", "--points", "SPLIT"], ""),
    (
        "waterline estimate (one point)",
        ["estimate", "qwen3-32b", "--gpu", "h200_sxm", "--isl", "1000", "--osl", "200", "--concurrency", "8"],
        "estimate, one point: 3.94 CPU-s, 201 MB",
    ),
    ("waterline catalog gpus", ["catalog", "gpus"], "support: 1.36 CPU-s, 158 MB"),
]


def measure(arguments: list[str]) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and peak resident megabytes of one run."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "waterline", *arguments],
        cwd=ROOT,
        env=COMPILED,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"waterline {' '.join(arguments)} ended with {process.returncode}")
    return time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def write_points(folder: Path) -> dict[str, str]:
    """Write points as a what-if has them: a few hundred replicas, each at many lengths and loads; return the files."""
    models = ("Qwen/Qwen3-32B", "meta-llama/Llama-3.1-8B", "deepseek-ai/DeepSeek-R1", "openai/gpt-oss-120b")
    replicas = itertools.product(
        models,
        ("h100_sxm", "h200_sxm", "b200_sxm", "rtx_pro_6000_server", "rtx-4090", "mi300x"),
        ("vllm", "sglang", "trtllm"),
        (1, 2, 4, 8),
    )
    work = itertools.product((128, 1024, 4096, 16384), (32, 256, 1024), (1, 8, 64))
    points = list(itertools.islice(itertools.product(replicas, work), POINTS))
    columns = {
        "LOOP": ("tp", "isl", "osl", "concurrency"),
        "RATE": ("tp", "isl", "osl", "request_rate"),
        "SPLIT": ("prefill_tp", "isl", "osl", "concurrency"),
    }
    files = {}
    for kind, names in columns.items():
        files[kind] = str(folder / f"{kind}.csv")
        with Path(files[kind]).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["model", "gpu", "engine", *names, *(["decode_tp"] if kind == "SPLIT" else [])])
            writer.writerows([*replica, *one, *([8] if kind == "SPLIT" else [])] for replica, one in points)
    return files


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    with tempfile.TemporaryDirectory() as folder:
        report(runs, write_points(Path(folder)))


def report(runs: int, files: dict[str, str]) -> None:
    print(
        f"| command | wall s (median of {runs}) | CPU s (median, least) | peak RSS MB | the peer |",
        "|---|---|---|---|---|",
        sep="\n",
    )
    for name, words, peer in COMMANDS:
        arguments = [files.get(word, word) for word in words]
        measure(arguments)
        walls, cpus, memories = zip(*(measure(arguments) for _ in range(runs)), strict=True)
        wall = f"{statistics.median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})"
        cpu = f"{statistics.median(cpus):.2f}, {min(cpus):.2f}"
        print(f"| `{name}` | {wall} | {cpu} | {max(memories):.0f} | {peer} |", flush=True)


if __name__ == "__main__":
    main()
