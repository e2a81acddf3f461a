"""`waterline size` on five questions, cold: CPU seconds, wall time and peak memory of a fresh process.

    .venv/bin/python benchmarks/size.py [RUNS]

The peer is aiconfigurator 0.12 on the nearest of its commands, measured on 2 vCPU EPYC (Zen 4), 2026-11-23, median of
3: its figures are printed, not run. The last row has no peer: every card of the catalogue.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# As people run it: modules are compiled once, by the run that is not counted, and not again by each.
COMPILED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
LOAD = ["--isl", "4000", "--osl", "500"]
CASES = [  # arguments, the peer's command, its CPU seconds and megabytes
    (
        ["meta-llama/Meta-Llama-3.1-70B", "--gpu", "h100-sxm-80g", "--rate", "10", *LOAD],
        "recommend Llama-3.1-70B h100", 11.5, 398,
    ),
    (
        ["Qwen/Qwen3-32B", "--precision", "fp8", "--gpu", "h200-sxm-141g", "--rate", "50", *LOAD],
        "recommend Qwen3-32B-FP8 h200", 11.6, 398,
    ),
    (
        ["Qwen/Qwen3-32B", "--precision", "fp8", "--gpu", "h200-sxm-141g", "--rate", "30", "--engine", "trtllm", *LOAD],
        "default Qwen3-32B-FP8 32x h200 trtllm", 9.3, 286,
    ),
    (
        ["Qwen/Qwen3-235B-A22B", "--precision", "fp8", "--gpu", "b200-sxm-180g", "--rate", "20", *LOAD],
        "default Qwen3-235B-FP8 16x b200", 26.9, 378,
    ),
    (
        ["Qwen/Qwen3-8B", "--gpu", "l40s", "--rate", "10", *LOAD],
        "default Qwen3-8B 8x l40s, all backends", 30.3, 459,
    ),
    (["deepseek-ai/DeepSeek-R1", "--rate", "50", *LOAD], "", None, None),
]  # fmt: skip


def measure(arguments: list[str]) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and peak resident megabytes of one run."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "waterline", "size", *arguments, "--json"],
        cwd=ROOT,
        env=COMPILED,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"waterline size {' '.join(arguments)} ended with {process.returncode}")
    return time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    print(f"| question | wall s (median of {runs}) | CPU s (median, least) | peak RSS MB | the peer: CPU s, MB |")
    print("|---|---|---|---|---|")
    for arguments, peer, peer_cpu_s, peer_mb in CASES:
        measure(arguments)  # which fills the caches of the disk
        walls, cpus, memories = zip(*(measure(arguments) for _ in range(runs)), strict=True)
        cpu = f"{statistics.median(cpus):.2f}, {min(cpus):.2f}"
        other = f"{peer}: {peer_cpu_s}, {peer_mb}" if peer else "-"
        words = " ".join(arguments[:-4])
        print(f"| {words} | {statistics.median(walls):.2f} | {cpu} | {max(memories):.0f} | {other} |", flush=True)


if __name__ == "__main__":
    main()
