"""A rehearsal as tables: who asked, who waited how long and what it cost; who had which GPUs; what moved and why."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from waterline.cli.day import PUBLIC, gpus_text
from waterline.cli.tables import console, draw
from waterline.units import seconds_text, usd_text

if TYPE_CHECKING:
    from rich.console import Console

    from waterline.cli.rehearse import Rehearsed
    from waterline.outcome import Percentiles, Summary
    from waterline.rehearsal import Rehearsal
    from waterline.rehearsal.record import Reals

LEVELS = "▁▂▃▄▅▆▇█"
LINE = 32  # characters of a line over time
MOST_CLIENTS = 8  # in a table


def show(found: "Rehearsed") -> None:
    """Draw what became of the requests, then what was replayed."""
    from waterline.rehearsal import COMPILED, POLICIES

    plan, happened, screen = found.plan, found.happened, console()
    total, *parts = happened.summaries
    under = "" if found.policy == POLICIES[0] else f" under {found.policy}"
    _draw_summaries(screen, f"{plan.fleet.name}: {plan.gpus} of {plan.fleet.gpus} GPUs, rehearsed{under}", parts, total)
    _draw_clients(screen, happened.by_client)
    _draw_gpus(screen, found)
    _draw_jobs(screen, happened)
    for sentence in (*moves_said(happened), *retries_said(total), *energy_said(happened)):
        screen.print(sentence)
    for note in happened.notes:
        screen.print(note)
    screen.print(
        f"{happened.duration_s / 60:,.1f} min from the first arrival to the last token, at "
        f"{usd_text(plan.usd_per_hour)} per hour for the plan; {happened.preempted:,} "
        f"{'request was' if happened.preempted == 1 else 'requests were'} preempted.",
    )
    slow = "" if COMPILED else " Without numba; with it hundreds of times more: pip install 'waterline-llm[rehearse]'"
    screen.print(
        f"Rehearsed in {seconds_text(found.took_s)}, {found.requests_per_s:,.0f} requests per second.{slow}",
        style="dim",
    )


def _draw_summaries(screen: "Console", title: str, parts: "Sequence[Summary]", total: "Summary") -> None:
    ttft, tpot = "TTFT p50/p90/p99", "TPOT p50/p90/p99"
    heads = ["tenant", "model", "requests", "refused", "gave up", "left midway", "cached", ttft, tpot, "in SLO"]
    heads += ["goodput/s", "GPU-h", "cost", "per M tokens"]
    rare = {"gave up": total.gave_up, "left midway": total.left_midway, "cached": total.cached_tokens}
    nothing = {name for name, sum_ in rare.items() if not sum_}
    shown = [index for index, head in enumerate(heads) if head not in nothing]
    spare = (
        "GPU-h", "per M tokens", "goodput/s", "left midway", "gave up", tpot, "cost", "cached", "refused", ttft
    )  # fmt: skip
    rows = [
        (
            summary.tenant or "all",
            summary.model,
            f"{summary.requests:,}",
            f"{summary.refused:,}",
            f"{summary.gave_up:,}",
            f"{summary.left_midway:,}",
            f"{summary.cached_fraction:.1%}",
            percentiles_text(summary.ttft_s),
            percentiles_text(summary.tpot_s),
            f"{summary.slo_fraction:.1%}",
            f"{summary.goodput_per_s:.3g}",
            f"{summary.gpu_hours:.3g}",
            usd_text(summary.usd),
            per_million_text(summary),
        )
        for summary in (*parts, total)
    ]
    draw(
        screen,
        title,
        [heads[index] for index in shown],
        [[row[index] for index in shown] for row in rows],
        text_columns=2,
        spare=[name for name in spare if name not in nothing],
        last_apart=True,
    )


def _draw_clients(screen: "Console", clients: "Sequence[Summary]") -> None:
    if not clients:
        return
    most = sorted(clients, key=lambda one: (-one.gpu_hours, one.tenant, one.client))[:MOST_CLIENTS]
    rows = [
        (
            one.client,
            one.tenant,
            f"{one.requests:,}",
            f"{one.refused:,}",
            percentiles_text(one.ttft_s),
            f"{one.slo_fraction:.1%}",
            f"{one.gpu_hours:.3g}",
            usd_text(one.usd),
        )
        for one in most
    ]
    heads = ("client", "tenant", "requests", "refused", "TTFT p50/p90/p99", "in SLO", "GPU-h", "cost")
    left = len(clients) - len(most)
    title = f"Clients that used most; {left:,} more with --json" if left else "Clients"
    draw(screen, title, heads, rows, text_columns=2, spare=("GPU-h", "refused", "tenant"))


def _draw_gpus(screen: "Console", found: "Rehearsed") -> None:
    """Draw who had how many GPUs over time, where there is more than one to have them, or anything moved."""
    happened, fleet = found.happened, found.plan.fleet
    line = happened.timeline
    if len(line.tenants) < 2 and not happened.moves:
        return
    rows = []
    for index in sorted(range(len(line.tenants)), key=lambda index: line.tenants[index] != PUBLIC):
        tenant, gpus = line.tenants[index], line.gpus[index]
        borrowed, given = (
            math.fsum(one.gpu_hours for one in happened.lent if getattr(one, side) == tenant)
            for side in ("borrower", "lender")
        )
        rows.append(
            (
                tenant,
                gpus_text(float(fleet.tenant(tenant).deserved or 0.0) * fleet.gpus),
                gpus_text(line.gpu_hours_of(tenant) * 3600 / max(1e-9, line.end_s)),
                gpus_text(float(gpus.max())),
                over_time(gpus, LINE),
                hours_text(line.gpu_hours_of(tenant)),
                hours_text(borrowed),
                hours_text(given),
                f"{most:,.0f}" if (most := float(line.waiting[index].max())) >= 10 else f"{most:.1f}",
            )
        )
    heads = ("tenant", "deserves", "mean", "most", "over time", "GPU-h", "borrowed", "lent", "most waiting")
    title = "GPUs by tenant: of its replicas and jobs, those of shared replicas by use"
    draw(
        screen, title, heads, rows, text_columns=1, spare=("lent", "most waiting", "deserves", "borrowed", "over time")
    )


def _draw_jobs(screen: "Console", happened: "Rehearsal") -> None:
    rows = [
        (one.job, one.tenant, hours_text(one.gpu_hours), hours_text(one.lost_gpu_hours), f"{one.stops:,}")
        for one in happened.jobs
    ]
    if rows:
        draw(screen, "Jobs, in GPU-hours", ("job", "tenant", "kept", "lost", "stops"), rows, text_columns=2, spare=())


def moves_said(happened: "Rehearsal") -> list[str]:
    """Return a sentence on what moved and why, if anything did: ``Moves: 3 start (own, idle 3).``."""
    if not happened.moves:
        return []
    kinds: dict[str, Counter[str]] = {}
    for move in happened.moves:
        kinds.setdefault(move.kind, Counter())[move.rule] += 1
    parts = []
    for kind, rules in sorted(kinds.items()):
        why = "; ".join(
            f"{rule} {count:,}" for rule, count in sorted(rules.items(), key=lambda item: (-item[1], item[0]))
        )
        parts.append(f"{rules.total():,} {kind} ({why})")
    return [f"Moves: {', '.join(parts)}."]


def retries_said(total: "Summary") -> list[str]:
    """Return a sentence on whether those came in who came back when they were told to, if anybody did."""
    if not total.returned:
        return []
    told = f"Of {total.told:,} refused and told when to come back, {total.returned:,} did within an hour of that time; "
    return [f"{told}{total.honoured:,} of them were taken ({total.honoured / total.returned:.1%})."]


def energy_said(happened: "Rehearsal") -> list[str]:
    kwh = happened.summaries[0].kwh
    if kwh is None or happened.idle_kwh is None or happened.jobs_kwh is None:
        return []
    jobs = f", {kwh_text(happened.jobs_kwh)} for jobs" if happened.jobs_kwh else ""
    return [f"The GPUs took {kwh_text(kwh)} in replicas{jobs}, {kwh_text(happened.idle_kwh)} idle in none."]


def kwh_text(kwh: float) -> str:
    return f"{kwh:,.0f} kWh" if kwh >= 100 or kwh < 1e-9 else f"{kwh:.3g} kWh"


def over_time(values: "Reals", length: int) -> str:
    """Return a line of blocks as high as the values are, from nothing to the most of them: ``▁▂▅█▇``."""
    ends = np.linspace(0, len(values), min(length, len(values)) + 1).astype(int)
    means = [float(values[begin:end].mean()) for begin, end in pairwise(ends.tolist())]
    top = max(means)
    return "".join(
        LEVELS[min(len(LEVELS) - 1, int(mean / top * len(LEVELS)))] if top > 0 else LEVELS[0] for mean in means
    )


def per_million_text(summary: "Summary") -> str:
    return "-" if summary.usd_per_million_tokens is None else usd_text(summary.usd_per_million_tokens)


def percentiles_text(times_s: "Percentiles | None") -> str:
    """Say three times in one unit, that of the first: ``12/40/310 ms``, ``0.43/1.77/12.1 s``."""
    if times_s is None:
        return "-"
    scale, unit = (1e3, "ms") if times_s.p50 < 0.1 else (1.0, "s")
    values = [time_s * scale for time_s in (times_s.p50, times_s.p90, times_s.p99)]
    digits = [max(0, (1 if unit == "ms" else 2) - (value >= 10) - (value >= 100)) for value in values]
    return "/".join(f"{value:.{places}f}" for value, places in zip(values, digits, strict=True)) + f" {unit}"


def hours_text(gpu_hours: float) -> str:
    return "-" if gpu_hours < 0.0005 else f"{gpu_hours:,.0f}" if gpu_hours >= 100 else f"{gpu_hours:.3g}"
