"""What lending is worth when the public comes ten times over: four policies on one fleet, and many random surges.

    .venv/bin/python benchmarks/spring_festival.py [--surges N] [--hours H] [--factor F]

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

Then N surges are drawn (seeds 1 to N): factor 2 to 20, 10 to 60 minutes, at any time of the day, and rehearsed from a
quarter of an hour before to one after it. The table gives the distribution over them.
"""

import sys
import time

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


def surges(plan: Plan, count: int) -> dict[str, list[float]]:
    """Return figures of each random surge, under our policy and under the static split."""
    figures: dict[str, list[float]] = {
        name: []
        for name in (
            "public goodput, x static", "public in SLO", "public in SLO, static", "enterprise in SLO",
            "research, of static",
        )
    }  # fmt: skip
    for seed in range(1, count + 1):
        surge = random_surge(seed)
        first_hour = (surge.begin_ns // (60 * MINUTE_NS) - 1) % 24
        end_s = (surge.begin_ns + surge.length_ns) / 1e9 - first_hour * HOUR_S + 900.0
        ours, static = (
            rehearse(plan, policy=policy, surges=[surge], duration_s=end_s, seed=seed, keep=False)
            for policy in ("waterline", "static")
        )
        figures["public goodput, x static"].append(within_slo(ours, "public")[0] / within_slo(static, "public")[0])
        figures["public in SLO"].append(within_slo(ours, "public")[1])
        figures["public in SLO, static"].append(within_slo(static, "public")[1])
        figures["enterprise in SLO"].append(within_slo(ours, "enterprise")[1])
        figures["research, of static"].append(research_gpu_hours(ours) / research_gpu_hours(static))
    return figures


def show_surges(console: Console, figures: dict[str, list[float]], count: int) -> None:
    """Print the distribution of each figure."""
    table = Table(title=f"{count} random surges, waterline against static", title_justify="left")
    for name in ("", "min", "p10", "median", "p90", "max"):
        table.add_column(name, justify="right" if name else "left")
    for name, values in figures.items():
        digits = 2 if "x static" in name else 4
        table.add_row(name, *(f"{one:.{digits}f}" for one in np.quantile(values, (0.0, 0.1, 0.5, 0.9, 1.0))))
    console.print(table)


def argument(name: str, default: float) -> float:
    return float(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else default


def main() -> None:
    count, hours, factor = int(argument("--surges", 50)), argument("--hours", 2.0), argument("--factor", 10.0)
    console = Console(width=150)
    plan = make_plan(load_fleet("examples/spring-festival.toml"))
    prepare()
    title = f"Spring festival: the public {factor:g}x from 20:00 for {hours:g} h"
    show_evening(console, evening(plan, factor, hours), title)
    if count:
        show_surges(console, surges(plan, count), count)


if __name__ == "__main__":
    main()
