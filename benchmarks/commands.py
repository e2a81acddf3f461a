"""Wall time, CPU time and memory of whole commands, cold: a fresh process each time, after one that is not counted.

    .venv/bin/python benchmarks/commands.py [RUNS]

The peer's figures are aiconfigurator 0.12's for the nearest question, measured on 2 vCPU EPYC (Zen 4), 2026-11-23,
median of 3: they are printed, not run.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = [
    ("waterline --help", ["--help"], ""),
    ("waterline fit deepseek-r1 (78 cards)", ["fit", "deepseek-r1"], "estimate, one point: 3.94 CPU-s, 201 MB"),
    ("waterline plan examples/mixed.toml", ["plan", "examples/mixed.toml"], "recommend, one model: 11.5 CPU-s, 398 MB"),
    ("waterline catalog gpus", ["catalog", "gpus"], "support: 1.36 CPU-s, 158 MB"),
]


def measure(arguments: list[str]) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and peak resident megabytes of one run."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "waterline", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"waterline {' '.join(arguments)} ended with {process.returncode}")
    return time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    print(f"| command | wall s (median of {runs}) | CPU s | peak RSS MB | the peer |\n|---|---|---|---|---|")
    for name, arguments, peer in COMMANDS:
        measure(arguments)
        walls, cpus, memories = zip(*(measure(arguments) for _ in range(runs)), strict=True)
        wall = f"{statistics.median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})"
        print(f"| `{name}` | {wall} | {statistics.median(cpus):.2f} | {max(memories):.0f} | {peer} |")


if __name__ == "__main__":
    main()
