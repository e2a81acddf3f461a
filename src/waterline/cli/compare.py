"""Several rehearsals side by side, on the same traffic: plans, or policies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from waterline.cli.day import PUBLIC
from waterline.cli.rehearse_table import hours_text, kwh_text, per_million_text, percentiles_text
from waterline.cli.tables import console, draw
from waterline.errors import InputError
from waterline.units import usd_text

if TYPE_CHECKING:
    from waterline.cli.rehearse import Rehearsed
    from waterline.fleet import Demand
    from waterline.outcome import Summary
    from waterline.plan import Plan


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of all rehearsals."""

    about: str  # the tenant, or what else it is of
    figure: str
    values: tuple[str, ...]  # [rehearsal]
    change: str = ""  # from the first to the second, where there are two


def check_same_traffic(paths: Sequence[Path], plans: "Sequence[Plan]") -> None:
    """Raise InputError when two plans are not asked the same: then their figures could not be compared."""
    first, others = plans[0], plans[1:]
    for path, other in zip(paths[1:], others, strict=True):
        names, other_names = ({(row.tenant, row.model) for row in plan.fleet.demand} for plan in (first, other))
        for ours, theirs, ours_path, theirs_path in (
            (names, other_names, paths[0], path),
            (other_names, names, path, paths[0]),
        ):
            for tenant, model in sorted(ours - theirs):
                raise InputError(
                    f"{ours_path} and {theirs_path} cannot be compared: in {ours_path} tenant '{tenant}' asks for "
                    f"model '{model}', in {theirs_path} it does not. Give both the same [[demand]]."
                )
        for number, (ours_row, their_row) in enumerate(zip(first.fleet.demand, other.fleet.demand, strict=False), 1):
            if ours_row != their_row:
                raise InputError(
                    f"{paths[0]} and {path} cannot be compared: [[demand]] number {number}, of "
                    f"{ours_row.tenant}/{ours_row.model}, differs in {_differing(ours_row, their_row)}. Give both the "
                    "same, in the same order."
                )


def _differing(one: "Demand", other: "Demand") -> str:
    names = [name for name in one.__struct_fields__ if getattr(one, name) != getattr(other, name)]
    return ", ".join(names)


def tell(found: "Sequence[Rehearsed]", *, html: Path | None, as_json: bool) -> None:
    """Print and write what was asked for."""
    from waterline.cli import rehearse_files

    if as_json:
        data = {"rehearsals": {one.name: rehearse_files.as_data(one) for one in found}}
        click.echo(rehearse_files.to_json(data))
    else:
        show(found)
    if html:
        from waterline.cli.rehearse_page import write_page

        write_page(found, html)
        if not as_json:
            click.echo(f"Written to {html}. Open it in a browser.")


def show(found: "Sequence[Rehearsed]") -> None:
    screen = console()
    rows, before = [], ""
    for line in lines(found):
        rows.append((line.about if line.about != before else "", line.figure, *line.values, line.change))
        before = line.about
    heads = ["of", "figure", *(one.name for one in found), "change"]
    if len(found) != 2:  # a change is from one to another
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    draw(
        screen,
        f"Rehearsed on the same traffic: {', '.join(one.name for one in found)}",
        heads,
        rows,
        text_columns=2,
        spare=(),
    )
    for note in notes(found):
        screen.print(note)
    requests = sum(one.happened.summaries[0].requests for one in found)
    took_s = sum(one.took_s for one in found)
    screen.print(f"{requests / max(took_s, 1e-9):,.0f} requests per second rehearsed.", style="dim")


def notes(found: "Sequence[Rehearsed]") -> list[str]:
    """Return what was replayed, and where it was not the same."""
    first = found[0].happened.notes
    ones_own = [f"{one.name}: {note}" for one in found[1:] for note in one.happened.notes if note not in first]
    return [*first, *ones_own]


def lines(found: "Sequence[Rehearsed]") -> list[Line]:
    """Return the figures people compare: of each tenant, of all, and of the fleet."""
    made = []
    for tenant in dict.fromkeys(one.tenant for each in found for one in each.happened.by_tenant):
        summaries = [next((one for one in each.happened.by_tenant if one.tenant == tenant), None) for each in found]
        made += _of_requests(tenant, summaries)
    made += _of_requests("all", [each.happened.summaries[0] for each in found])
    return [*made, *_of_fleet(found)]


def _of_requests(about: str, summaries: "Sequence[Summary | None]") -> list[Line]:
    def line(figure: str, say: "Callable[[Summary], str]", value: "Callable[[Summary], float] | None" = None) -> Line:
        change = _change([None if one is None else value(one) for one in summaries]) if value else ""
        return Line(about, figure, tuple("-" if one is None else say(one) for one in summaries), change)

    made = [
        line("requests", lambda one: f"{one.requests:,}", lambda one: one.requests),
        line("refused", lambda one: f"{one.refused:,}", lambda one: one.refused),
        line("in SLO", lambda one: f"{one.slo_fraction:.2%}"),
        line("TTFT p50/p90/p99", lambda one: percentiles_text(one.ttft_s)),
        line("TPOT p50/p90/p99", lambda one: percentiles_text(one.tpot_s)),
        line("goodput/s", lambda one: f"{one.goodput_per_s:.3g}", lambda one: one.goodput_per_s),
        line("cost", lambda one: usd_text(one.usd), lambda one: one.usd),
        line("per M tokens", per_million_text, lambda one: one.usd_per_million_tokens or 0.0),
    ]
    if any(one and one.returned for one in summaries):
        made.insert(2, line("retry times honoured", _honoured))
    if any(one and one.left_midway for one in summaries):
        made.insert(2, line("left midway", lambda one: f"{one.left_midway:,}", lambda one: one.left_midway))
    if any(one and one.gave_up for one in summaries):
        made.insert(2, line("gave up", lambda one: f"{one.gave_up:,}", lambda one: one.gave_up))
    return made


def _honoured(one: "Summary") -> str:
    return f"{one.honoured / one.returned:.1%}" if one.returned else "-"


def _of_fleet(found: "Sequence[Rehearsed]") -> list[Line]:
    made = []

    def add(figure: str, values: Sequence[float | None], say: Callable[[float], str]) -> None:
        if any(values):
            said = tuple("-" if value is None else say(value) for value in values)
            made.append(Line("fleet", figure, said, _change(values)))

    happened = [one.happened for one in found]
    public = [
        one.timeline.gpus[one.timeline.tenants.index(PUBLIC)] for one in happened if PUBLIC in one.timeline.tenants
    ]
    if len(public) == len(found) and len(happened[0].timeline.tenants) > 1:
        most = [float(gpus.max()) / one.plan.fleet.gpus for gpus, one in zip(public, found, strict=True)]
        add("waterline, at most", most, lambda value: f"{value:.1%}")
    for tenant in dict.fromkeys(name for one in happened for name in one.timeline.tenants):
        hours = [one.timeline.gpu_hours_of(tenant) if tenant in one.timeline.tenants else None for one in happened]
        add(f"GPU-h of {tenant}", hours, hours_text)
    add("GPU-h lent", [sum(lent.gpu_hours for lent in one.lent) for one in happened], hours_text)
    add("job GPU-h kept", [sum(job.gpu_hours for job in one.jobs) for one in happened], hours_text)
    add(
        "job GPU-h lost",
        [sum(job.lost_gpu_hours for job in one.jobs) for one in happened],
        lambda value: f"{value:,.3g}",
    )
    add("moves", [len(one.moves) for one in happened], lambda value: f"{value:,.0f}")
    add("preempted", [one.preempted for one in happened], lambda value: f"{value:,.0f}")
    energy = [(one.summaries[0].kwh, one.jobs_kwh, one.idle_kwh) for one in happened]
    add("energy", [None if None in kwh else sum(part or 0.0 for part in kwh) for kwh in energy], kwh_text)
    return made


def _change(values: Sequence[float | None]) -> str:
    """Say by how much the second of two is more than the first: ``+12.5%``; nothing where that says nothing."""
    if len(values) != 2 or not values[0] or values[1] is None or values[1] == values[0]:
        return ""
    return f"{values[1] / values[0] - 1:+.1%}"
