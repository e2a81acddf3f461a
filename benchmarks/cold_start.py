"""How long a person waits for a rehearsal to say anything: the first time ever, and every time after.

    .venv/bin/python benchmarks/cold_start.py [RUNS]

Each is a fresh process. The first time compiles into an empty cache directory; the times after it find what was
compiled there. The rehearsal is short, so that what is measured is everything around it: Python, imports, planning,
loading compiled code, drawing the table. The best of some runs; CPU time is user and system time together.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOAL_S = 2.0
COMMANDS = (
    ("a plan of one replica", ["PLAN", "--duration", "60s"]),
    ("examples/box.toml", ["examples/box.toml", "--duration", "60s"]),
    ("examples/mixed.toml", ["examples/mixed.toml", "--duration", "60s"]),
    ("examples/mixed.toml --json", ["examples/mixed.toml", "--duration", "60s", "--json"]),
)


def run(arguments: list[str], cache: str) -> tuple[float, float]:
    """Return wall and CPU seconds of one command."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begun_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "waterline", *arguments],
        cwd=ROOT,
        env={**environment, "XDG_CACHE_HOME": cache},
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"waterline {' '.join(arguments)} ended with {process.returncode}")
    return time.perf_counter() - begun_s, usage.ru_utime + usage.ru_stime


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"{'waterline rehearse …':36} {'wall s':>8} {'CPU s':>8}   goal")
    with tempfile.TemporaryDirectory() as cache:
        plan = str(Path(cache) / "plan.json")
        run(["plan", "examples/box.toml", "-o", plan], cache)
        first = run(["rehearse", plan, "--duration", "60s"], cache)
        print(f"{'the first time ever, compiling':36} {first[0]:8.2f} {first[1]:8.2f}")
        for name, arguments in COMMANDS:
            times = [
                run(["rehearse", *(plan if one == "PLAN" else one for one in arguments)], cache) for _ in range(runs)
            ]
            wall_s, cpu_s = min(time[0] for time in times), min(time[1] for time in times)
            print(f"{name:36} {wall_s:8.2f} {cpu_s:8.2f}   {GOAL_S:g} s: {'met' if wall_s <= GOAL_S else 'missed'}")


if __name__ == "__main__":
    main()
