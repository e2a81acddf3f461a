"""What a purchase costs to work out: processor seconds and memory of whole commands, and of their parts.

    python benchmarks/buying.py [RUNS]

Processor seconds, not wall seconds, and the least of several runs: they hardly change with what else the machine does.
No peer chooses what to buy; NVIDIA's aiconfigurator takes 11.5 CPU-s to count GPUs of one card for one model.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from waterline.catalog.servers import hosting
from waterline.fleet import load_fleet
from waterline.planner.buying import Desk
from waterline.planner.market import Wish, offers, tasks

ROOT = Path(__file__).parents[1]
TENDER = "examples/tender.toml"
COMMANDS = (
    ["buy", TENDER],
    ["buy", TENDER, "--budget", "20M CNY", "--data-centre", "--max-vendor-share", "0.7"],
    ["buy", TENDER, "--budget", "3M CNY"],
    ["buy", TENDER, "--gpu", "h20-141g", "--gpu", "h200-sxm-141g", "--gpu", "mi300x"],
    ["buy", "examples/mixed.toml", "--new"],
    ["buy", "--budget", "5.2-6.4 M CNY"],
    ["buy", "--tender", "2 nodes of 8 a100-sxm-80g"],
)


def measure(arguments: list[str]) -> tuple[float, float]:
    """Return processor seconds and peak resident megabytes of one run."""
    command = [sys.executable, "-m", "waterline", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"waterline {' '.join(arguments)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def parts() -> None:
    """Time pricing and each choice of the first command."""
    wish = Wish()
    fleet = load_fleet(ROOT / TENDER)
    begun = time.process_time()
    found, _ = offers(fleet, wish, hosting())
    asked = tasks(fleet, found)
    print(f"pricing {len(found)} kinds of servers: {time.process_time() - begun:.2f} CPU-s")
    desk = Desk(found, asked, wish, hosting())
    ways = sum(len(task.ways) for task in asked)
    for name, choose in (("cheapest over the lifetime", desk.best), ("least money", desk.least)):
        begun = time.process_time()
        choose()
        print(f"{name}, {len(asked)} tasks with {ways} ways: {time.process_time() - begun:.2f} CPU-s")


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"| command | CPU s (least of {runs}) | peak RSS MB |\n|---|---|---|")
    for arguments in COMMANDS:
        seconds, megabytes = zip(*(measure(arguments) for _ in range(runs)), strict=True)
        print(f"| `waterline {' '.join(arguments)}` | {min(seconds):.2f} | {max(megabytes):.0f} |")
    parts()


if __name__ == "__main__":
    main()
