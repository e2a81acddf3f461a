"""A plan as one page for a browser: self-contained, readable without scripts, and every chart is a table as well.

`page.html` is the frame; what is filled in is made here, every name escaped.
"""

import os
from collections.abc import Mapping, Sequence
from html import escape

import waterline
from waterline.cli import day
from waterline.cli.day import IDLE, PUBLIC, SPARE, STARTS, clock, gpus_text
from waterline.cli.markup import bar, count, fill, for_script, legend, points, table, write
from waterline.fleet import HOURS
from waterline.plan import EVERY_HOUR, Plan
from waterline.units import seconds_text, usd_text

WIDTH, HEIGHT = 760, 300  # of the chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 60, 10, 12, 26  # margins
STEP = (WIDTH - LEFT - RIGHT) / HOURS  # of an hour
COLOURS = 6  # of tenants besides the public
SAID = {SPARE: "in replicas nobody asks", IDLE: "idle", STARTS: "starting replicas"}


def write_page(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all. Raises InputError when it cannot be written."""
    write(page(plan), path)


def page(plan: Plan) -> str:
    colours = _colours(plan)
    return fill(
        "page.html",
        name=escape(plan.fleet.name),
        version=escape(waterline.__version__),
        lead=escape(_lead(plan)),
        warnings="\n".join(f'<p class="warn">{escape(text)}</p>' for text in _warnings(plan)),
        figures=_figures(plan),
        day=_day(plan, colours) if plan.hours else "",
        pools=_pools(plan, colours),
        cost_note=escape(_cost_note(plan)),
        costs=_costs(plan, colours),
        tenants=_tenants(plan),
        replicas=_replicas(plan),
        why="\n".join(
            f"<dt>{escape(model.model)}</dt><dd>{escape(model.reason)}; a replica's load is limited by "
            f"{escape(model.limited_by)}.</dd>"
            for model in plan.models
        ),
        data=_data(plan),
    )


def _lead(plan: Plan) -> str:
    goal = {"money": "costs least", "energy": "takes least energy", "goodput": "serves most"}[plan.objective]
    models, tenants = len(plan.fleet.models), len(plan.fleet.tenants)
    return (
        f"{count(models, 'model')} for {count(tenants, 'tenant')} on {plan.fleet.gpus:,} GPUs in "
        f"{count(len(plan.fleet.pools), 'pool')}; of the plans that hold, the one that {goal}."
    )


def _warnings(plan: Plan) -> list[str]:
    small = plan.objective == "goodput" and plan.fleet.objective != "goodput"
    first = ["The fleet is too small for its demand: the plan serves as much as it can."] if small else []
    return [*first, *(f"{one}." for one in day.unserved(plan)), *plan.warnings]


def _figures(plan: Plan) -> str:
    a_day, at = day.usd_per_day(plan), plan.busiest_hour
    figures = [
        ("cost a day", usd_text(a_day), f"{usd_text(30 * a_day)} in 30 days"),
        *([("energy a day", day.kwh_text(plan), "of the GPUs that serve")] if plan.hours else []),
        ("GPUs that serve", f"{plan.gpus:,}", f"of {plan.fleet.gpus:,}, in the busiest hour, {clock(at)}"),
        ("replicas", f"{len(plan.replicas_at(at)):,}", f"in that hour; {len(plan.replicas):,} in the plan"),
    ]
    if plan.hours and PUBLIC in day.tenants_of(plan):
        low, high = (end(plan.hours, key=lambda hour: hour.gpus_of(PUBLIC)) for end in (min, max))
        share = high.gpus_of(PUBLIC) / plan.fleet.gpus
        least = (
            f"from {gpus_text(low.gpus_of(PUBLIC))} GPUs to {gpus_text(high.gpus_of(PUBLIC))}, at {clock(high.hour)}"
        )
        figures.append(("waterline, at most", f"{share:.1%}", least))
    return "\n".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for what, value, more in figures
    )


# --- The day --------------------------------------------------------------------------------------------------------


def _colours(plan: Plan) -> dict[str, str]:
    """Return a colour of the style sheet for each tenant, spare and idle."""
    others = [tenant for tenant in day.tenants_of(plan) if tenant != PUBLIC]
    named = {tenant: f"--t{index % COLOURS + 1}" for index, tenant in enumerate(others)}
    return {PUBLIC: "--public", **named, SPARE: "--spare", IDLE: "--idle", STARTS: "--soft"}


def _day(plan: Plan, colours: Mapping[str, str]) -> str:
    by_hour = [day.gpus_at(plan, hour) for hour in plan.hours]
    layers = _layers(plan, by_hour)
    sentences = [*(f"{one}." for one in day.borrowings(plan))]
    sentences += [f"{clock(at)} {day.moves_text(starts, stops)}." for at, starts, stops in day.moves(plan)]
    told = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    moved = f"<details open><summary>Loans, starts and stops</summary><ul>{told}</ul></details>" if told else ""
    return f"""<h2>The waterline by hour</h2>
<p class="soft">GPUs by whom they serve. The public is the tip on top; the line beneath it is the waterline, and it
drops when more is asked.</p>
{legend(reversed(layers), colours, SAID)}
<div class="scroll" tabindex="0" role="region" aria-label="Chart: GPUs by tenant and hour">
{_chart(plan, by_hour, layers, colours)}
</div>
<div class="hour" hidden><label for="hour">Hour</label>
<input id="hour" type="range" min="0" max="23" value="{plan.busiest_hour}">
<output id="reading" for="hour"></output></div>
<details><summary>The same as a table</summary>
{_day_table(plan, by_hour, layers)}
</details>
{moved}"""


def _layers(plan: Plan, by_hour: Sequence[Mapping[str, float]]) -> list[str]:
    """Return who is drawn, from the bottom up: who uses most, what lies idle, and the public on top."""
    others = [tenant for tenant in reversed(day.tenants_of(plan)) if tenant != PUBLIC]
    order = [*reversed(others), SPARE, IDLE, PUBLIC]
    return [who for who in order if any(gpus.get(who, 0.0) >= day.LEAST_GPUS for gpus in by_hour)]


def _chart(
    plan: Plan, by_hour: Sequence[Mapping[str, float]], layers: Sequence[str], colours: Mapping[str, str]
) -> str:
    top = max(plan.fleet.gpus, 1)
    floor = [0.0] * HOURS
    drawn = [_grid(top)]
    surface = ""
    for who in layers:
        ceiling = [low + gpus.get(who, 0.0) for low, gpus in zip(floor, by_hour, strict=True)]
        outline = [*_steps(ceiling, top), *reversed(_steps(floor, top))]
        drawn.append(f'<polygon points="{points(outline)}" style="fill: var({colours[who]})"/>')
        if who == PUBLIC:
            surface = f'<polyline class="surface" points="{points(_steps(floor, top))}"/>'
        floor = ceiling
    peak = max(plan.hours, key=lambda hour: hour.gpus)
    said = f"Stacked areas over 24 hours, up to {top:,} GPUs. {_sentence(plan, by_hour[peak.hour], peak.hour)}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="chart-title chart-said">'
        f'<title id="chart-title">GPUs by tenant and hour</title><desc id="chart-said">{escape(said)}</desc>'
        f'{"".join(drawn)}{surface}<line id="marker" class="marker" visibility="hidden" x1="0" x2="0" y1="{TOP}" '
        f'y2="{HEIGHT - BOTTOM}"/></svg>'
    )


def _grid(top: float) -> str:
    lines = []
    for part in range(5):
        gpus = top * part / 4
        y = _y(gpus, top)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{gpus_text(gpus)}</text>')
    for hour in range(0, HOURS + 1, 4):
        anchor = "start" if hour == 0 else "end" if hour == HOURS else "middle"
        x = LEFT + hour * STEP
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{clock(hour)}</text>')
    return "".join(lines)


def _y(gpus: float, top: float) -> float:
    return HEIGHT - BOTTOM - gpus / top * (HEIGHT - TOP - BOTTOM)


def _steps(gpus: Sequence[float], top: float) -> list[tuple[float, float]]:
    """Return the corners of a line that stays level through each hour."""
    return [(LEFT + (hour + end) * STEP, _y(gpus[hour], top)) for hour in EVERY_HOUR for end in (0, 1)]


def _sentence(plan: Plan, gpus: Mapping[str, float], hour: int) -> str:
    parts = [f"{SAID.get(who, who)} {gpus_text(count)}" for who, count in gpus.items() if count >= day.LEAST_GPUS]
    loans = [str(one) for one in day.borrowings(plan) if hour in one.hours]
    return "; ".join([f"{clock(hour)}: {', '.join(parts)}", *loans]) + "."


def _data(plan: Plan) -> str:
    sentences = [_sentence(plan, day.gpus_at(plan, hour), hour.hour) for hour in plan.hours]
    return for_script({"left": LEFT, "step": STEP, "sentences": sentences})


def _day_table(plan: Plan, by_hour: Sequence[Mapping[str, float]], layers: Sequence[str]) -> str:
    order = list(reversed(layers))
    rows = [
        [
            clock(hour.hour),
            *(gpus_text(gpus.get(who, 0.0)) for who in order),
            str(len(hour.starts)),
            str(len(hour.stops)),
            usd_text(hour.usd),
        ]
        for hour, gpus in zip(plan.hours, by_hour, strict=True)
    ]
    heads = ["hour", *(SAID.get(who, who) for who in order), "starts", "stops", "cost"]
    return table("GPUs by tenant and hour", heads, rows)


# --- Tables ---------------------------------------------------------------------------------------------------------


def _pools(plan: Plan, colours: Mapping[str, str]) -> str:
    at = plan.busiest_hour
    if not plan.hours:
        return _idle_pools(plan)
    by_pool = day.gpus_by_pool(plan, plan.hours[at])
    order = [
        who for who in (*day.tenants_of(plan), SPARE, IDLE) if any(row.get(who, 0.0) > 0 for row in by_pool.values())
    ]
    heads = ["pool", "card", "GPUs", *(SAID.get(who, who) for who in order)]
    rows, bars = [], []
    for pool in plan.fleet.pools:
        row = by_pool[pool.name]
        rows.append([pool.name, pool.gpu, f"{pool.gpus:,}", *(gpus_text(row.get(who, 0.0)) for who in order)])
        bars.append(bar([(row.get(who, 0.0), colours[who]) for who in order], pool.gpus))
    caption = f"In the busiest hour, {clock(at)}; a model's GPUs are divided among those who use it"
    return legend(order, colours, SAID) + table(caption, heads, rows, text_columns=2, bars=bars)


def _idle_pools(plan: Plan) -> str:
    """Return the pools of a plan without hours, which does not say who uses what."""
    rows, bars = [], []
    for pool in plan.fleet.pools:
        serving = sum(replica.layout.gpus for replica in plan.replicas if replica.pool == pool.name)
        rows.append([pool.name, pool.gpu, f"{pool.gpus:,}", f"{serving:,}", f"{pool.gpus - serving:,}"])
        bars.append(bar([(serving, "--public")], pool.gpus))
    return table("All day", ["pool", "card", "GPUs", "serve", "idle"], rows, text_columns=2, bars=bars)


def _cost_note(plan: Plan) -> str:
    return (
        f"{usd_text(day.usd_per_day(plan))} a day: GPU-hours of the replicas that serve, at their pools' prices"
        + (", and what starting them adds" if plan.hours else "")
        + ". Cards that serve nobody are not counted."
    )


def _costs(plan: Plan, colours: Mapping[str, str]) -> str:
    found = {
        "tenant": day.usd_by_tenant(plan) if plan.hours else {},
        "pool": day.usd_by(plan, lambda replica: replica.pool),
        "model": day.usd_by(plan, lambda replica: replica.model),
    }
    whole = day.usd_per_day(plan)
    tables = []
    for by, usd in found.items():
        of = colours if by == "tenant" else {}
        rows = [[SAID.get(name, name), usd_text(cost), f"{cost / whole:.1%}"] for name, cost in usd.items()]
        bars = [bar([(cost, of.get(name, "--public"))], whole) for name, cost in usd.items()]
        if rows:
            tables.append(f"<div>{table(f'By {by}', [by, 'a day', 'share'], rows, bars=bars)}</div>")
    return "".join(tables)


def _tenants(plan: Plan) -> str:
    rows = [
        [
            tenant.tenant,
            *(
                gpus_text(gpus)
                for gpus in (tenant.guarantee_gpus, tenant.deserved_gpus, tenant.limit_gpus, tenant.gpus)
            ),
            gpus_text(tenant.borrowed_gpus) if tenant.borrowed_gpus >= day.LEAST_GPUS else "-",
        ]
        for tenant in plan.tenants
    ]
    heads = ["tenant", "guarantee", "deserved", "limit", "needs", "borrows"]
    return table("GPUs by tenant, each at its own peak", heads, rows)


def _replicas(plan: Plan) -> str:
    heads = [
        "model",
        "pool",
        "precision",
        "layout",
        "engine",
        "serves",
        "replicas",
        "GPUs each",
        "TTFT",
        "TPOT",
        "batch",
    ]
    rows = []
    for group in day.groups_of(plan.replicas):
        one = group.first
        rows.append(
            [
                *(one.model, one.pool, one.precision, group.layout, one.engine, day.span(group.hours)),
                *(group.count, str(one.layout.gpus), seconds_text(one.ttft_s), seconds_text(one.tpot_s)),
                *(
                    str(one.max_batch),
                    f"{one.requests_per_s:.3g}",
                    seconds_text(one.load_s),
                    usd_text(one.usd_per_hour),
                ),
            ]
        )
    heads += ["req/s each", "loads in", "an hour each"]
    return table("Replicas that are alike, with how many serve at once", heads, rows, text_columns=6)
