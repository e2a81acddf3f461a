"""Rehearsals as one page for a browser: self-contained, and every chart is a table or words as well.

`rehearse.html` is the frame; what is filled in is made here. Several rehearsals are drawn one beneath the other, on
the same axes, after a table that compares them.
"""

import os
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

import waterline
from waterline.cli import charts, compare
from waterline.cli.charts import MOST_COLUMNS, Axis, fewer
from waterline.cli.day import IDLE, PUBLIC, SPARE, gpus_text
from waterline.cli.markup import fill, for_script, legend, table, write
from waterline.cli.rehearse_files import owned_gpu_hours
from waterline.cli.rehearse_table import (
    energy_said,
    hours_text,
    kwh_text,
    moves_said,
    per_million_text,
    percentiles_text,
    retries_said,
)
from waterline.policy.decisions import RULES
from waterline.units import usd_text

if TYPE_CHECKING:
    from waterline.cli.charts import Reals
    from waterline.cli.rehearse import Rehearsed
    from waterline.outcome import Summary
    from waterline.rehearsal.record import Move

COLOURS = 6  # of tenants besides the public
MOST_ROWS = 60  # of a heat map
MOST_MOVES = 500  # in the table
MOST_CLIENTS = 50
DOWN = " down"  # GPUs of nodes that have failed
SAID = {SPARE: "in replicas nobody asks", IDLE: "idle", DOWN: "down"}


def write_page(found: "Sequence[Rehearsed]", path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all. Raises InputError when it cannot be written."""
    write(page(found), path)


def page(found: "Sequence[Rehearsed]") -> str:
    axis = Axis(max(1e-9, *(one.happened.timeline.end_s for one in found)), found[0].happened.first_hour)
    colours = _colours(found)
    steps = _readings(found, axis)
    first = found[0]
    names = f": {', '.join(one.name for one in found)}" if len(found) > 1 else ""
    return fill(
        "rehearse.html",
        name=escape(f"{first.plan.fleet.name}{names}"),
        version=escape(waterline.__version__),
        lead=escape(_lead(found)),
        top=_figures(first) if len(found) == 1 else _comparison(found),
        last=str(max(0, len(steps) - 1)),
        charts="\n".join(_charts(found, axis, colours)),
        tables="\n".join(part for one in found for part in _tables(one, axis, several=len(found) > 1)),
        notes="<ul>" + "".join(f"<li>{escape(note)}</li>" for note in compare.notes(found)) + "</ul>",
        data=for_script({"steps": steps}),
    )


def _lead(found: "Sequence[Rehearsed]") -> str:
    total = found[0].happened.summaries[0]
    what = f"{total.requests:,} requests in {found[0].happened.duration_s / 60:,.1f} minutes"
    under = f", under the policy {found[0].policy}"
    return f"{what}, rehearsed{under}." if len(found) == 1 else f"{what}, rehearsed {len(found)} times."


def _figures(one: "Rehearsed") -> str:
    happened, fleet = one.happened, one.plan.fleet
    total, line = happened.summaries[0], happened.timeline
    figures = [
        ("in SLO", f"{total.slo_fraction:.2%}", f"{total.refused:,} refused of {total.requests:,}"),
        ("cost", usd_text(happened.usd), f"{per_million_text(total)} per M tokens"),
        ("goodput", f"{total.goodput_per_s:,.3g}/s", "requests within their SLO"),
    ]
    if PUBLIC in line.tenants and len(line.tenants) > 1:
        public = line.gpus[line.tenants.index(PUBLIC)]
        figures.append(
            (
                "waterline, at most",
                f"{float(public.max()) / fleet.gpus:.1%}",
                f"from {gpus_text(float(public.min()))} to {gpus_text(float(public.max()))} of {fleet.gpus:,} GPUs",
            )
        )
    if total.kwh is not None:
        figures.append(("energy", kwh_text(total.kwh), f"{kwh_text(happened.idle_kwh or 0.0)} more idle"))
    if happened.jobs:
        kept, lost = (sum(getattr(job, name) for job in happened.jobs) for name in ("gpu_hours", "lost_gpu_hours"))
        figures.append(("work of jobs kept", f"{hours_text(kept)} GPU-h", f"{hours_text(lost)} GPU-h lost to stops"))
    drawn = "\n".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for what, value, more in figures
    )
    sentences = [*moves_said(happened), *retries_said(total), *energy_said(happened)]
    return f'<dl class="figures">\n{drawn}\n</dl>' + "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def _comparison(found: "Sequence[Rehearsed]") -> str:
    lines = compare.lines(found)
    heads = ["of", "figure", *(one.name for one in found), *(["change"] if len(found) == 2 else [])]
    rows = [[line.about, line.figure, *line.values, *([line.change] if len(found) == 2 else [])] for line in lines]
    return table("On the same traffic", heads, rows, text_columns=2)


# --- Charts -----------------------------------------------------------------------------------------------------------


def _colours(found: "Sequence[Rehearsed]") -> dict[str, str]:
    """Return a colour of the style sheet for each tenant, spare, idle and down; the same in all rehearsals."""
    tenants = dict.fromkeys(name for one in found for name in one.happened.timeline.tenants if name != PUBLIC)
    named = {tenant: f"--t{index % COLOURS + 1}" for index, tenant in enumerate(tenants)}
    return {PUBLIC: "--public", **named, SPARE: "--spare", IDLE: "--idle", DOWN: "--warn"}


def _layers(one: "Rehearsed") -> "dict[str, Reals]":
    """Return who has GPUs, from the bottom up: who has most, what lies idle, and the public on top."""
    line, fleet_gpus = one.happened.timeline, one.plan.fleet.gpus
    gpus = dict(zip(line.tenants, line.gpus, strict=True))
    others = sorted((name for name in gpus if name != PUBLIC), key=lambda name: -float(gpus[name].sum()))
    idle = np.maximum(0.0, fleet_gpus - line.gpus.sum(axis=0) - line.spare_gpus - line.down_gpus)
    layers = {name: gpus[name] for name in others} | {DOWN: line.down_gpus, SPARE: line.spare_gpus, IDLE: idle}
    if PUBLIC in gpus:
        layers[PUBLIC] = gpus[PUBLIC]
    return {who: fewer(values, MOST_COLUMNS) for who, values in layers.items() if values.any()}


def _charts(found: "Sequence[Rehearsed]", axis: Axis, colours: dict[str, str]) -> Iterable[str]:
    tenants = [name for name in colours if name not in SAID]
    several = len(found) > 1
    yield "<h2>GPUs over time</h2>"
    yield (
        '<p class="soft">GPUs by whom they serve. The public is the tip on top; the line beneath it is the waterline, '
        "and it drops when more is asked.</p>"
    )
    yield legend(
        [who for who in (PUBLIC, *tenants[1:], IDLE, SPARE, DOWN) if any(who in _layers(one) for one in found)],
        colours,
        SAID,
    )
    for one in found:
        layers, step_s = _layers(one), _step_s(one)
        yield _titled(
            one.name if several else "",
            charts.stacked(
                "GPUs by tenant", _sentence(one, 0), axis, step_s, layers, max(1, one.plan.fleet.gpus), colours, PUBLIC
            ),
        )
    asking = [name for name in tenants if any(_asks(one, name) for one in found)]
    yield from _lines(
        found, axis, colours, asking, "waiting", "Requests waiting", "Taken, and without a first token yet."
    )
    if any(one.happened.summaries[0].refused for one in found):
        yield from _lines(found, axis, colours, asking, "refused_per_s", "Requests refused", "Each second.")
    for heading, name in (("Time to first token", "ttft"), ("Time to last token", "latency")):
        yield from _shares(found, heading, name, colours)
    yield (
        '<h2>Replicas</h2><p class="soft">A row a replica, or a few alike: the darker, the more it computed; '
        "nothing while it was away.</p>"
    )
    for one in found:
        yield _heat(one, axis, several=several)


def _lines(
    found: "Sequence[Rehearsed]",
    axis: Axis,
    colours: dict[str, str],
    tenants: Sequence[str],
    name: str,
    heading: str,
    note: str,
) -> Iterable[str]:
    """Draw what of a timeline `name` says, a line for each tenant; the same scale for all rehearsals."""
    drawn = []
    for one in found:
        line = one.happened.timeline
        rows = zip(line.tenants, getattr(line, name), strict=True)
        drawn.append({tenant: fewer(values, MOST_COLUMNS) for tenant, values in rows if tenant in tenants})
    top = charts.nice(max((float(values.max()) for rows in drawn for values in rows.values()), default=0.0))
    yield f'<h2>{heading}</h2><p class="soft">{note}</p>'
    yield legend(tenants, colours, SAID)
    for one, of_tenants in zip(found, drawn, strict=True):
        most = ", ".join(f"{tenant} {values.max():,.1f}" for tenant, values in of_tenants.items())
        said = f"At most, in the mean over a step: {most or 'none'}."
        chart = charts.lines(heading, said, axis, _step_s(one), of_tenants, top, colours)
        yield _titled(one.name if len(found) > 1 else "", chart)


def _shares(found: "Sequence[Rehearsed]", heading: str, name: str, colours: dict[str, str]) -> Iterable[str]:
    of_all = [getattr(one.happened, f"{name}_shares") for one in found]
    times = [time_s for of_one in of_all for steps in of_one.values() for time_s, _ in (steps[0], steps[-1])]
    if not times:
        return
    yield f'<h2>{heading}</h2><p class="soft">The share of completed requests that took no longer.</p>'
    yield legend(dict.fromkeys(tenant for of_one in of_all for tenant in of_one), colours, SAID)
    for one, rows in zip(found, of_all, strict=True):
        summaries = {summary.tenant: getattr(summary, f"{name}_s") for summary in one.happened.by_tenant}
        said = "; ".join(f"{tenant} p50/p90/p99 {percentiles_text(summaries[tenant])}" for tenant in rows)
        chart = charts.shares(heading, f"{said}.", rows, colours, (min(times), max(times)))
        yield _titled(one.name if len(found) > 1 else "", chart)


def _heat(one: "Rehearsed", axis: Axis, *, several: bool) -> str:
    line = one.happened.timeline
    groups = heat_rows([(where.model, where.pool) for where in one.happened.replicas], MOST_ROWS)
    present, busy = (
        fewer(np.array([values[own].mean(axis=0) for _, own in groups] or line.busy), MOST_COLUMNS // 2)
        for values in (line.present, line.busy)
    )
    step_s = line.step_s * -(-line.steps // (MOST_COLUMNS // 2))
    labels, before = [], ""
    for (model, _), _own in groups:
        labels.append(model[:12] if model != before else "")
        before = model
    rows = []
    for (model, pool), own in _runs(groups):
        there, computes = (float(values[own].sum(axis=0) @ line.lengths_s) for values in (line.present, line.busy))
        rows.append([model, pool, f"{len(own):,}", f"{computes / there:.0%}" if there else "-"])
    said = "; ".join(f"{model} on {pool} {share} busy" for model, pool, _, share in rows)
    chart = charts.heat("Replicas over time", f"{said}.", axis, step_s, labels, present, busy)
    heads = ["model", "pool", "replicas", "busy while there"]
    words = f"<details><summary>The same as a table</summary>{table('Replicas', heads, rows, text_columns=2)}</details>"
    return _titled(one.name if several else "", chart) + words


def heat_rows(kinds: Sequence[tuple[str, str]], most: int) -> list[tuple[tuple[str, str], list[int]]]:
    """Put replicas of one kind together, in their order, so that there are about so many rows at most."""
    by_kind: dict[tuple[str, str], list[int]] = {}
    for index, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(index)
    size = max(1, -(-len(kinds) // most))
    return [
        (kind, own[begin:end])
        for kind, own in by_kind.items()
        for begin, end in pairwise([*range(0, len(own), size), len(own)])
    ]


def _runs(groups: Sequence[tuple[tuple[str, str], list[int]]]) -> list[tuple[tuple[str, str], list[int]]]:
    whole: dict[tuple[str, str], list[int]] = {}
    for kind, own in groups:
        whole.setdefault(kind, []).extend(own)
    return list(whole.items())


def _asks(one: "Rehearsed", tenant: str) -> bool:
    line = one.happened.timeline
    return tenant in line.tenants and bool(line.asked_per_s[line.tenants.index(tenant)].any())


def _step_s(one: "Rehearsed") -> float:
    """Return how long a column of a chart over time is."""
    line = one.happened.timeline
    return line.step_s * -(-line.steps // MOST_COLUMNS)


def _titled(title: str, chart: str) -> str:
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    label = escape(title or "chart")
    return f'{heading}<div class="scroll" tabindex="0" role="region" aria-label="{label}">{chart}</div>'


def _readings(found: "Sequence[Rehearsed]", axis: Axis) -> list[tuple[float, str]]:
    """Return for each column where it is, and what is to be said of it."""
    longest = max(found, key=lambda one: one.happened.timeline.end_s)
    step_s = _step_s(longest)
    count = -(-longest.happened.timeline.steps // -(-longest.happened.timeline.steps // MOST_COLUMNS))
    readings = []
    for number in range(count):
        at_s = number * step_s
        parts = [
            f"{one.name}: {_sentence(one, at_s)}" if len(found) > 1 else _sentence(one, at_s)
            for one in found
            if at_s < one.happened.timeline.end_s
        ]
        readings.append((round(axis.x(at_s + step_s / 2), 1), f"{axis.clock(at_s)} {' '.join(parts)}"))
    return readings


def _sentence(one: "Rehearsed", at_s: float) -> str:
    line = one.happened.timeline
    step = min(line.steps - 1, int(at_s // line.step_s))
    parts = [
        f"{name} {gpus_text(float(line.gpus[index, step]))} GPUs, {line.waiting[index, step]:,.0f} waiting"
        + (f", {refused:,.2g} refused/s" if (refused := float(line.refused_per_s[index, step])) else "")
        for index, name in enumerate(line.tenants)
    ]
    return "; ".join(parts) + "."


# --- Tables -----------------------------------------------------------------------------------------------------------


def _tables(one: "Rehearsed", axis: Axis, *, several: bool) -> Iterable[str]:
    happened = one.happened
    after = f": {escape(one.name)}" if several else ""
    yield f"<h2>Who asked{after}</h2>"
    total, *parts = happened.summaries
    if len(parts) > len(happened.by_tenant) > 1:
        yield _summaries("By tenant", ["tenant"], happened.by_tenant)
    yield _summaries("By tenant and model", ["tenant", "model"], [*parts, total])
    if len(happened.by_model) > 1:
        yield _summaries("By model", ["model"], happened.by_model)
    if len(happened.by_pool) > 1:
        yield _summaries("By pool, of requests that were served there", ["pool"], happened.by_pool)
    if happened.by_client:
        most = sorted(happened.by_client, key=lambda summary: (-summary.gpu_hours, summary.client))[:MOST_CLIENTS]
        caption = f"Clients, the {len(most)} of {len(happened.by_client):,} that used most"
        yield _summaries(caption, ["client", "tenant"], most)
    if len(happened.timeline.tenants) > 1:
        yield f"<h2>GPU-hours{after}</h2>" + _gpu_hours(one)
    if happened.jobs:
        rows = [
            [job.job, job.tenant, hours_text(job.gpu_hours), hours_text(job.lost_gpu_hours), f"{job.stops:,}"]
            for job in happened.jobs
        ]
        heads = ["job", "tenant", "GPU-h kept", "GPU-h lost", "stops"]
        yield f"<h2>Jobs{after}</h2>" + table("Work that yields", heads, rows, text_columns=2)
    if happened.moves:
        yield f"<h2>Moves{after}</h2>" + _moves(happened.moves, axis)


def _gpu_hours(one: "Rehearsed") -> str:
    """Return a table of whose GPU-hours were used by whom; a row adds up to what its owner deserves."""
    tenants = one.happened.timeline.tenants
    owned = owned_gpu_hours(one.happened, one.plan.fleet)
    lent = {(loan.lender, loan.borrower): loan.gpu_hours for loan in one.happened.lent}
    rows = []
    for owner, hours in owned.items():
        used = [hours["used"] if user == owner else lent.get((owner, user), 0.0) for user in tenants]
        figures = [hours["deserved"], *used, hours["idle"]]
        if any(figure > 1e-6 for figure in figures):
            rows.append([owner or "(nobody's)", *map(hours_text, figures)])
    heads = ["whose", "GPU-h", *(f"used by {tenant}" for tenant in tenants), "left idle"]
    return table("Whose they were by what tenants deserve, and who used them", heads, rows)


def _summaries(caption: str, names: Sequence[str], summaries: "Sequence[Summary]") -> str:
    gave_up, left = any(one.gave_up for one in summaries), any(one.left_midway for one in summaries)
    heads = [
        *names, "requests", "refused", *(["gave up"] if gave_up else []), *(["left midway"] if left else []),
        "TTFT p50/p90/p99", "TPOT p50/p90/p99", "latency p50/p90/p99", "in SLO",
        "goodput/s", "GPU-h", "cost", "per M tokens",
    ]  # fmt: skip
    rows = [
        [
            *(getattr(one, name) or ("all" if index == 0 else "") for index, name in enumerate(names)),
            f"{one.requests:,}",
            f"{one.refused:,}",
            *([f"{one.gave_up:,}"] if gave_up else []),
            *([f"{one.left_midway:,}"] if left else []),
            *(percentiles_text(times_s) for times_s in (one.ttft_s, one.tpot_s, one.latency_s)),
            f"{one.slo_fraction:.2%}",
            f"{one.goodput_per_s:,.3g}",
            hours_text(one.gpu_hours),
            usd_text(one.usd),
            per_million_text(one),
        ]
        for one in summaries
    ]
    return table(caption, heads, rows, text_columns=len(names))


def _moves(moves: "Sequence[Move]", axis: Axis) -> str:
    rows = [
        [
            axis.clock(move.at_s),
            move.kind,
            move.rule,
            move.tenant,
            move.target,
            f"{move.victim} of {move.victim_tenant}" if move.victim else "-",
            f"{move.pool} {move.node}" if move.node >= 0 else move.pool,
            f"{move.gpus:,}",
            hours_text(move.cost_gpu_s / 3600),
            *("-" if time_s != time_s else axis.clock(time_s) for time_s in (move.deadline_s, move.done_s)),  # noqa: PLR0124 - NaN
        ]
        for move in moves[:MOST_MOVES]
    ]
    heads = ["at", "what", "why", "for", "what for", "makes room", "node", "GPUs", "GPU-h lost", "deadline", "done"]
    left = f"; {len(moves) - MOST_MOVES:,} more with --json" if len(moves) > MOST_MOVES else ""
    sentences = dict(RULES.values())
    why = "".join(
        f"<dt>{escape(rule)}</dt><dd>{escape(sentences.get(rule, ''))}</dd>"
        for rule in sorted({move.rule for move in moves})
    )
    meaning = f'<details><summary>What the reasons mean</summary><dl class="why">{why}</dl></details>'
    return table(f"Each with its reason{left}", heads, rows, text_columns=7) + meaning
