"""What lending is worth when the public comes ten times over: four policies on one fleet, and many random surges.

    .venv/bin/python benchmarks/spring_festival.py [--surges N] [--first S] [--processes P] [--hours H] [--factor F]

`examples/spring-festival.toml`: 1,024 GPUs, an ordinary evening at which the public takes a twentieth of them, and F
= 10 times the public's requests from 20:00 for H = 2 hours. How much DeepSeek was asked for at the Spring Festival of
2025 was never published; daily users had doubled within a week when it stopped answering everybody, so ten is an
assumption, well beyond what was reported.
Rehearsed from 19:00 until an hour after the surge under each policy:

- waterline: lending, with the forecast;
- static: each tenant has what it deserves, for good;
- fcfs: one queue, no shares, reactive;
- priority: enterprise before public before research, reactive.

Goodput counts requests that met their SLO. Research counts in requests within their SLO and in GPU-hours of training
that were kept, each against what it has under static.

Then N surges are drawn (seeds from S = 1 on): factor 2 to 20, 10 to 60 minutes, at any time of the day. They are
rehearsed from one to two hours before to a quarter of an hour after. The table gives the distribution over them, of all
and by their factor: a surge that a fixed split can serve leaves nothing to win. F = 0 leaves the evening out.
"""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from waterline.fleet import load_fleet
from waterline.plan import Plan
from waterline.planner import make_plan
from waterline.rehearsal import Rehearsal, prepare, rehearse
from waterline.units import HOUR_S
from waterline.workload.grammar import parse_surge
from waterline.workload.operators import Surge

POLICIES = ("waterline", "static", "fcfs", "priority")
MINUTE_NS = 60 * 10**9
FLEET = "examples/spring-festival.toml"


def within_slo(done: Rehearsal, tenant: str) -> tuple[int, float]:
    """Return requests of a tenant that met their SLO, and which fraction that is of all of them."""
    summary = next(one for one in done.by_tenant if one.tenant == tenant)
    return summary.within_slo, summary.slo_fraction


def training_gpu_hours(done: Rehearsal) -> tuple[float, float]:
    """Return GPU-hours of training that were kept, and that were lost or spent loading."""
    return sum(job.gpu_hours for job in done.jobs), sum(job.lost_gpu_hours for job in done.jobs)


def research_gpu_hours(done: Rehearsal) -> float:
    """Return what research has done, in GPU-hours: requests at what they took, and training that was kept."""
    summary = next(one for one in done.by_tenant if one.tenant == "research")
    return summary.gpu_hours + training_gpu_hours(done)[0]


def evening(plan: Plan, factor: float, hours: float) -> dict[str, tuple[Rehearsal, float]]:
    """Return what becomes of the evening under each policy, and the CPU seconds it took to rehearse."""
    surge = parse_surge(f"public:{factor:g}x@20:00+{hours:g}h")
    found = {}
    for policy in POLICIES:
        began_s = time.process_time()
        length_s = (hours + 2) * HOUR_S
        done = rehearse(plan, policy=policy, surges=[surge], duration_s=length_s, keep=False)
        found[policy] = done, time.process_time() - began_s
    return found


def show_evening(console: Console, found: dict[str, tuple[Rehearsal, float]], title: str) -> None:
    """Print one row a policy."""
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    for name in (
        "public in SLO", "public goodput", "x static", "enterprise in SLO", "research in SLO", "research GPU-h",
        "of static", "training lost", "moves", "USD", "CPU s",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    static = found["static"][0]
    for policy, (done, took_s) in found.items():
        public, fraction = within_slo(done, "public")
        table.add_row(
            policy,
            f"{fraction:.1%}",
            f"{public / done.duration_s:.1f}/s",
            f"{public / within_slo(static, 'public')[0]:.2f}",
            f"{within_slo(done, 'enterprise')[1]:.3%}",
            f"{within_slo(done, 'research')[1]:.2%}",
            f"{research_gpu_hours(done):,.0f}",
            f"{research_gpu_hours(done) / research_gpu_hours(static):.0%}",
            f"{training_gpu_hours(done)[1]:,.1f}",
            f"{len(done.moves):,}",
            f"{done.usd:,.0f}",
            f"{took_s:,.0f}",
        )
    console.print(table)


def random_surge(seed: int) -> Surge:
    """Draw a surge."""
    dice = np.random.default_rng(seed)
    minute = int(dice.integers(60, 22 * 60))
    length = int(dice.integers(10, 61))
    factor = float(np.round(np.exp(dice.uniform(np.log(2.0), np.log(20.0))), 1))
    return Surge(tenant="public", factor=factor, begin_ns=minute * MINUTE_NS, length_ns=length * MINUTE_NS)


class Outcome(NamedTuple):
    """What became of one random surge, under our policy and under the static split."""

    factor: float
    goodput: float  # of the public, over that of the static split
    public: float  # in SLO
    public_static: float
    enterprise: float
    research: float  # of what it does under the static split


def live(seed: int) -> Outcome:
    """Rehearse a random surge."""
    plan, surge = make_plan(load_fleet(FLEET)), random_surge(seed)
    first_hour = (surge.begin_ns // (60 * MINUTE_NS) - 1) % 24
    end_s = (surge.begin_ns + surge.length_ns) / 1e9 - first_hour * HOUR_S + 900.0
    ours, static = (
        rehearse(plan, policy=policy, surges=[surge], duration_s=end_s, seed=seed, keep=False)
        for policy in ("waterline", "static")
    )
    return Outcome(
        surge.factor,
        within_slo(ours, "public")[0] / within_slo(static, "public")[0],
        within_slo(ours, "public")[1],
        within_slo(static, "public")[1],
        within_slo(ours, "enterprise")[1],
        research_gpu_hours(ours) / research_gpu_hours(static),
    )


def show_surges(console: Console, found: Sequence[Outcome]) -> None:
    """Print the distribution of each figure, and that of goodput by the factor of the surge."""
    table = Table(title=f"{len(found)} random surges, waterline against static", title_justify="left")
    for name in ("", "min", "p10", "median", "p90", "max"):
        table.add_column(name, justify="right" if name else "left")

    def add(name: str, values: Sequence[float], digits: int) -> None:
        table.add_row(name, *(f"{one:.{digits}f}" for one in np.quantile(values, (0.0, 0.1, 0.5, 0.9, 1.0))))

    add("public goodput, x static", [one.goodput for one in found], 2)
    for low, high in ((2.0, 4.0), (4.0, 8.0), (8.0, 20.1)):
        some = [one.goodput for one in found if low <= one.factor < high]
        if some:
            add(f"… of {len(some)} surges of {low:g} to {high:.0f}x", some, 2)
    add("public in SLO", [one.public for one in found], 4)
    add("public in SLO, static", [one.public_static for one in found], 4)
    add("enterprise in SLO", [one.enterprise for one in found], 5)
    add("research, of static", [one.research for one in found], 3)
    console.print(table)
    lost = sum(one.goodput < 1.0 for one in found)
    console.print(f"The public has less goodput than under the static split in {lost} of {len(found)}.")


def argument(name: str, default: float) -> float:
    return float(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else default


def main() -> None:
    count, hours, factor = int(argument("--surges", 50)), argument("--hours", 2.0), argument("--factor", 10.0)
    first, console = int(argument("--first", 1)), Console(width=150)
    prepare()
    if factor:
        title = f"Spring festival: the public {factor:g}x from 20:00 for {hours:g} h"
        show_evening(console, evening(make_plan(load_fleet(FLEET)), factor, hours), title)
    if count:
        with ProcessPoolExecutor(int(argument("--processes", 1)), get_context("spawn")) as pool:
            found = []
            for seed, one in enumerate(pool.map(live, range(first, first + count)), start=first):
                found.append(one)
                print(seed, *(f"{name}={value:.5g}" for name, value in one._asdict().items()), file=sys.stderr)
            show_surges(console, found)


if __name__ == "__main__":
    main()
