"""`waterline plan`: what runs where, and at which hour."""

from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from waterline.cli import day
from waterline.cli.day import IDLE, PUBLIC, SPARE, gpus_text
from waterline.cli.prices import read_prices
from waterline.cli.tables import console, draw, drawn_width
from waterline.errors import InputError
from waterline.fleet import load_fleet
from waterline.plan import Plan, is_plan, read_plan, write_plan
from waterline.planner import make_plan
from waterline.units import seconds_text, usd_text

if TYPE_CHECKING:
    from rich.console import Console

GLYPHS = "█▓▒░"  # one for each tenant, the public's the darkest
NOBODY = "·"  # spare and idle
LONGEST_BAR, SHORTEST_BAR = 48, 12


@click.command()
@click.argument("fleet", type=click.Path(path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE", help="Write plan.json here.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with charts here.")
@click.option("--price", "prices", multiple=True, metavar="CARD=USD", help="Of a card, an hour; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(fleet: Path, output: Path | None, html: Path | None, prices: tuple[str, ...], *, as_json: bool) -> None:
    """Plan FLEET: for each model the cheapest layout that meets its SLO, and enough replicas at every hour.

    A plan.json in the place of FLEET is shown as it is.

    \b
    waterline plan examples/mixed.toml
    waterline plan examples/mixed.toml -o plan.json && waterline rehearse plan.json
    waterline plan plan.json --html plan.html
    """  # noqa: D301 - click reads the backspace as: leave these lines alone
    for option, file in (("--output", output), ("--html", html)):
        if file == Path("-"):
            raise InputError(f"{option} names a file, and '-' is none. To print the plan: waterline plan FLEET --json")
    made = read_or_make(fleet, read_prices(prices))
    if output:
        write_plan(made, output)
    if html:
        from waterline.cli.page import write_page

        write_page(made, html)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(made), indent=2))
    else:
        show(made)
        if output:
            click.echo(f"Written to {output}. Try it: waterline rehearse {output}")
        if html:
            click.echo(f"Written to {html}. Open it in a browser.")


def read_or_make(path: Path, usd_per_gpu_hour: Mapping[str, float] | None = None) -> Plan:
    """Return the plan in a plan.json, or make one for a fleet file, at these prices by card."""
    if not is_plan(path):
        return make_plan(load_fleet(path, usd_per_gpu_hour))
    if usd_per_gpu_hour:
        raise InputError(f"{path} is a plan, and was made at its own prices. Give --price with the fleet file.")
    return read_plan(path)


def show(plan: Plan) -> None:
    """Draw the plan: the models, the tenants beside their entitlements, the waterline by hour."""
    from rich.text import Text

    screen = console()
    _draw_models(plan, screen)
    _draw_tenants(plan, screen)
    if day.differs_by_hour(plan):
        _draw_day(plan, screen)
    for model in plan.models:
        because = f": {model.reason}; a replica's load is limited by {model.limited_by}."
        screen.print(Text.assemble((model.model, "bold"), because))
    _say_waterline(plan, screen)
    _say_unserved(plan, screen)
    if plan.hours:
        a_day = day.usd_per_day(plan)
        busiest = f"{usd_text(plan.usd_per_hour)} in the busiest hour, {day.clock(plan.busiest_hour)}"
        screen.print(f"In all {usd_text(a_day)} a day ({busiest}), {usd_text(a_day * 30)} in 30 days.")
        screen.print(f"The GPUs that serve take {day.kwh_text(plan)} a day.")
    else:
        month = usd_text(plan.usd_per_hour * 24 * 30)
        screen.print(f"In all {usd_text(plan.usd_per_hour)} per hour, {month} in 30 days.")


def _say_waterline(plan: Plan, screen: "Console") -> None:
    public = [tenant for tenant in plan.tenants if tenant.tenant == PUBLIC]
    if public and plan.hours:
        low, high = (end(plan.hours, key=lambda hour: hour.gpus_of(PUBLIC)) for end in (min, max))
        least, most = (f"{gpus_text(hour.gpus_of(PUBLIC))} at {day.clock(hour.hour)}" for hour in (low, high))
        share = high.gpus_of(PUBLIC) / plan.fleet.gpus
        served = f"{least}, {most}" if low is not high else f"{gpus_text(high.gpus_of(PUBLIC))} all day"
        screen.print(f"Waterline: of {plan.fleet.gpus:,} GPUs {served} serve the public ({share:.0%} at most).")
        return
    for tenant in public:
        share = tenant.gpus / plan.fleet.gpus
        screen.print(f"Waterline: {tenant.gpus:.1f} of {plan.fleet.gpus} GPUs serve the public ({share:.0%}).")
    if not public and len(plan.tenants) > 1:
        names = ", ".join(tenant.tenant for tenant in plan.tenants)
        screen.print(f"No waterline: it is drawn for a tenant named '{PUBLIC}', here are {names}.", style="dim")


def _draw_models(plan: Plan, screen: "Console") -> None:
    rows, busiest = [], plan.busiest_hour
    groups: dict[str, list[day.Group]] = {model.model: [] for model in plan.models}
    for group in day.groups_of(plan.replicas):
        groups[group.first.model].append(group)
    for model in plan.models:
        if not groups[model.model]:  # the fleet is too small
            rows.append((model.model, "0", *["-"] * 3, f"{model.requests_per_s:.3g}", *["-"] * 3, usd_text(0), "-"))
        for index, group in enumerate(groups[model.model]):
            one = group.first
            per_million = "-" if model.usd_per_million_tokens is None else usd_text(model.usd_per_million_tokens)
            rows.append(
                (
                    model.model if index == 0 else "",
                    group.count,
                    one.pool,
                    one.precision,
                    group.layout,
                    f"{model.requests_per_s:.3g}" if index == 0 else "",
                    seconds_text(one.ttft_s),
                    seconds_text(one.tpot_s),
                    str(one.max_batch),
                    usd_text(usd) if (usd := group.usd_per_hour(busiest)) or not one.usd_per_hour else "-",
                    per_million if index == 0 else "",
                )
            )
    columns = ("model", "replicas", "pool", "precision", "layout", "peak req/s", "TTFT", "TPOT", "batch", "per hour")
    draw(
        screen,
        f"{plan.fleet.name}: {plan.gpus} of {plan.fleet.gpus} GPUs",
        (*columns, "per M tokens"),
        rows,
        text_columns=5,
        spare=("batch", "per M tokens", "peak req/s", "precision", "TPOT", "TTFT", "layout", "pool"),
    )
    screen.print("TTFT and TPOT: what the SLO's fraction of the requests is expected to keep to.", style="dim italic")


def _draw_tenants(plan: Plan, screen: "Console") -> None:
    rows = [
        (
            tenant.tenant,
            f"{tenant.guarantee_gpus:.1f}",
            f"{tenant.deserved_gpus:.1f}",
            f"{tenant.limit_gpus:.1f}",
            f"{tenant.gpus:.1f}",
            f"{tenant.borrowed_gpus:.1f}" if tenant.borrowed_gpus > 0 else "-",
        )
        for tenant in plan.tenants
    ]
    columns = ("tenant", "guarantee", "deserved", "limit", "needs", "borrows")
    draw(screen, "GPUs by tenant at the peak", columns, rows, text_columns=1, spare=("limit", "guarantee"))


def _draw_day(plan: Plan, screen: "Console") -> None:
    """Draw a row for each hour: GPUs by tenant, what it costs, and a bar of the whole fleet; then what moves."""
    shown = [
        tenant for tenant in day.tenants_of(plan) if any(hour.gpus_of(tenant) >= day.LEAST_GPUS for hour in plan.hours)
    ]
    room = len(GLYPHS) if len(shown) <= len(GLYPHS) else len(GLYPHS) - 1
    kinds = [(tenant, [tenant]) for tenant in shown[:room]] + ([("others", shown[room:])] if shown[room:] else [])
    kinds.append(("idle", [SPARE, IDLE]))
    glyphs = [*GLYPHS[: len(kinds) - 1], NOBODY]
    by_hour = [day.gpus_at(plan, hour) for hour in plan.hours]
    parts = [[sum(gpus[who] for who in whos) for _, whos in kinds] for gpus in by_hour]
    rows = [
        (day.clock(hour.hour), *map(gpus_text, part), usd_text(hour.usd))
        for hour, part in zip(plan.hours, parts, strict=True)
    ]
    heads = ["hour", *(f"{name} {glyph}" for (name, _), glyph in zip(kinds, glyphs, strict=True)), "cost"]
    length = min(LONGEST_BAR, max(SHORTEST_BAR, screen.width - drawn_width(heads, rows) - 3))
    bars = [bar(dict(zip(glyphs, part, strict=True)), length) for part in parts]
    draw(
        screen,
        "Waterline by hour: GPUs that serve",
        [*heads, "the fleet"],
        [(*row, drawn) for row, drawn in zip(rows, bars, strict=True)],
        text_columns=1,
        spare=("cost", "the fleet", *heads[3:-2]),
    )
    for loan in day.borrowings(plan):
        screen.print(f"{loan}.")
    for at, starts, stops in day.moves(plan):
        screen.print(f"{day.clock(at)} {day.moves_text(starts, stops)}.", style="dim")


def bar(parts: Mapping[str, float], length: int) -> str:
    """Return a bar in which each character stands for what `parts` gives it: ``███▓▓····``."""
    total = sum(parts.values())
    ends = (
        [0, *(round(length * end / total) for end in accumulate(parts.values()))] if total else [0] * (len(parts) + 1)
    )
    return "".join(character * (end - begin) for character, (begin, end) in zip(parts, pairwise(ends), strict=True))


def _say_unserved(plan: Plan, screen: "Console") -> None:
    if plan.objective == "goodput" and plan.fleet.objective != "goodput":
        screen.print("The fleet is too small for its demand: it serves as much as it can.", style="bold")
    for one in day.unserved(plan):
        screen.print(f"{one}.")
    for warning in plan.warnings:
        screen.print(warning)
