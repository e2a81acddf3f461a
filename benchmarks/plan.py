"""How long a plan takes, how near to the best it is, and how much memory it needs; one fleet file, each part apart.

    .venv/bin/python benchmarks/plan.py [FLEET]

CPU seconds, because a shared machine stretches wall time. Goals for examples/iceberg-60000.toml, the default: 10 s to a
gap of 1 %, the first plan that holds 1 s after pricing, 500 MB. No peer plans a day of a mixed fleet; aiconfigurator
0.12 takes 11.5 s and 398 MB for one model on one kind of card (2 vCPU EPYC, 2026-11-23).
"""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from waterline import load_fleet
from waterline.planner import make_plan
from waterline.planner.milp import choose, serve_most
from waterline.planner.offers import offers_of
from waterline.planner.problem import rather_whole

T = TypeVar("T")
ROOT = Path(__file__).parents[1]


def timed(name: str, work: Callable[[], T], told: Callable[[T], str]) -> T:
    begun_s = time.process_time()
    done = work()
    took_s = time.process_time() - begun_s
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(f"| {name} | {took_s:.2f} | {megabytes:.0f} | {told(done)} |", flush=True)
    return done


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples" / "iceberg-60000.toml"
    print("| part | CPU s | peak MB so far | result |\n|---|---|---|---|")
    fleet = timed("load", lambda: load_fleet(path), lambda fleet: f"{fleet.gpus:,} GPUs, {len(fleet.models)} models")
    offers = timed("price", lambda: offers_of(fleet), lambda offers: f"{len(offers.offers):,} options")
    problem = rather_whole(offers.problem)
    timed(
        "choose, the first plan that holds",
        lambda: choose(problem, gap=1.0),
        lambda choice: f"gap {choice.gap:.2%}" if choice else "none",
    )
    first = timed(
        "choose",
        lambda: choose(problem) or serve_most(problem),
        lambda choice: (
            f"gap {choice.gap:.2%}, {choice.cost:,.0f} a day, {len(set(choice.replicas.nonzero()[0]))} in use"
        ),
    )
    used = (problem.gpus[:, None] * first.replicas).sum(axis=0)
    print(f"| GPUs by hour | | | {min(used):,} to {max(used):,} |")
    timed("the whole plan", lambda: make_plan(fleet), lambda plan: f"{len(plan.replicas):,} replicas written")


if __name__ == "__main__":
    main()
