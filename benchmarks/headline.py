"""A day of 10^8 requests on 60,000 GPUs in 7,500 replicas and jobs, three tenants, lending on: time and memory.

    .venv/bin/python benchmarks/headline.py [--part F] [--html FILE]

7,500 nodes of eight H800 serve a reasoning model, a node each replica; what idles trains. The day is DeepSeek's of
27 February 2025 (open-infra-index, day 6, CC0-1.0) for the public and enterprises; research samples at night. `--part
0.01` takes a hundredth of nodes and requests; `--html FILE` writes the page that `waterline rehearse --html` would.
Goal: 300 s and 6 GB on two cores. The first run on a machine compiles for a minute; the next ones are measured.
"""

import os
import resource
import sys
import time
from pathlib import Path

from rich.console import Console

from waterline.cli.rehearse import Rehearsed
from waterline.cli.rehearse_page import write_page
from waterline.fleet import Demand, Fleet, Job, Model, Pool, Tenant, check_fleet
from waterline.planner import make_plan
from waterline.rehearsal import prepare, rehearse
from waterline.units import HOUR_S

REQUESTS, NODES = 1e8, 7500
DAY_S = 24 * HOUR_S
DAY = (
    0.700, 0.578, 0.423, 0.256, 0.204, 0.204, 0.256, 0.441, 0.745, 0.948, 0.981, 0.963,
    0.870, 0.919, 0.981, 0.996, 0.981, 0.896, 0.863, 0.952, 0.989, 0.993, 1.000, 0.959,
)  # fmt: skip
NIGHT = (1.0,) * 8 + (0.7,) * 11 + (0.85,) * 3 + (1.0,) * 2
PARTS = {"public": (0.45, DAY), "enterprise": (0.25, DAY), "research": (0.30, NIGHT)}


def fleet(part: float) -> Fleet:
    """Return the fleet, or a part of it."""
    nodes = max(8, round(NODES * part))
    demand = tuple(
        Demand(
            tenant=tenant,
            model="reasoner",
            requests_per_s=tuple(share * REQUESTS * part / DAY_S * rate * 24 / sum(day) for rate in day),
            prompt_tokens=2000,
            output_tokens=16_000,
        )
        for tenant, (share, day) in PARTS.items()
    )
    return Fleet(
        name="headline",
        pools=(Pool(name="h800", gpu="h800-sxm-80g", nodes=nodes, gpus_per_node=8, usd_per_gpu_hour=2.0),),
        models=(
            Model(
                name="reasoner", weights="deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", max_context_tokens=32_768,
            ),
        ),
        tenants=(
            Tenant(name="public", guarantee=0.1, deserved=0.3, priority=1),
            Tenant(name="enterprise", guarantee=0.2, deserved=0.3, priority=2),
            Tenant(name="research", deserved=0.4, grace_s=90.0),
        ),
        demand=demand,
        jobs=(Job(name="training", tenant="research", gpus=8, copies=nodes, checkpoint_every_s=1800.0),),
    )  # fmt: skip


def main() -> None:
    part = float(sys.argv[sys.argv.index("--part") + 1]) if "--part" in sys.argv else 1.0
    console = Console(width=110)
    prepare()
    began_s = time.process_time()
    plan = make_plan(check_fleet(fleet(part), Path("headline")))
    planned_s = time.process_time() - began_s
    began_s, wall_s = time.process_time(), time.perf_counter()
    done = rehearse(plan, duration_s=DAY_S, keep=False)
    cpu_s, took_s = time.process_time() - began_s, time.perf_counter() - wall_s
    total = done.summaries[0]
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    console.print(
        f"{total.requests:,} requests on {plan.fleet.gpus:,} GPUs; {plan.gpus // 8:,} replicas at the peak of the plan "
        f"({planned_s:.1f} CPU-s to plan)"
    )
    console.print(
        f"{took_s:,.0f} s, {cpu_s:,.0f} CPU-s, {total.requests / cpu_s:,.0f} requests a CPU-s, peak {peak_gb:.2f} GB; "
        f"load of the machine {os.getloadavg()[1]:.1f}"
    )
    console.print(f"{len(done.moves):,} moves, digest {done.digest[:16]}")
    for one in done.by_tenant:
        console.print(f"{one.tenant}: {one.requests:,} requests, {one.slo_fraction:.3%} in SLO")
    for job in done.jobs:
        console.print(
            f"{job.job}: {job.gpu_hours:,.0f} GPU-h kept, {job.lost_gpu_hours:,.0f} lost, {job.stops:,} times"
        )
    if "--html" in sys.argv:
        page = Path(sys.argv[sys.argv.index("--html") + 1])
        write_page([Rehearsed(name="headline", plan=plan, policy="waterline", happened=done, took_s=took_s)], page)
        console.print(f"Written to {page}: {page.stat().st_size / 1e6:.2f} MB.")


if __name__ == "__main__":
    main()
