"""`waterline plan`: what runs where."""

import sys
from pathlib import Path

import click
import msgspec

from waterline.fleet import load_fleet
from waterline.plan import Plan, write_plan
from waterline.planner import make_plan
from waterline.units import seconds_text, usd_text

PUBLIC = "public"  # the tenant whose GPUs are the waterline


@click.command()
@click.argument("fleet", type=click.Path(path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE", help="Write plan.json here.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(fleet: Path, output: Path | None, *, as_json: bool) -> None:
    """Plan FLEET: for each model the cheapest layout that meets its SLO, and enough replicas.

    \b
    waterline plan examples/mixed.toml
    waterline plan examples/mixed.toml -o plan.json && waterline rehearse plan.json
    """  # noqa: D301 - click reads the backspace as: leave these lines alone
    made = make_plan(load_fleet(fleet))
    if output:
        write_plan(made, output)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(made), indent=2))
    else:
        show(made)
        if output:
            click.echo(f"Written to {output}. Try it: waterline rehearse {output}")


def show(plan: Plan) -> None:
    """Draw the plan: the models, the tenants beside their entitlements, the waterline."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 130)
    models = Table(title=f"{plan.fleet.name}: {plan.gpus} of {plan.fleet.gpus} GPUs", title_justify="left")
    for name in ("model", "replicas", "pool", "precision", "layout"):
        models.add_column(name, no_wrap=True)
    for name in ("peak req/s", "TTFT", "TPOT", "batch", "per hour", "per M tokens"):
        models.add_column(name, justify="right")
    for model in plan.models:
        groups = dict.fromkeys((r.pool, r.precision, str(r.layout)) for r in plan.replicas_of(model.model))
        for index, (pool, precision, layout) in enumerate(groups):
            alike = [
                r
                for r in plan.replicas_of(model.model)
                if (r.pool, r.precision, str(r.layout)) == (pool, precision, layout)
            ]
            per_million = "-" if model.usd_per_million_tokens is None else usd_text(model.usd_per_million_tokens)
            models.add_row(
                model.model if index == 0 else "",
                str(len(alike)),
                pool,
                precision,
                layout,
                f"{model.requests_per_s:.3g}" if index == 0 else "",
                seconds_text(alike[0].ttft_s),
                seconds_text(alike[0].tpot_s),
                str(alike[0].max_batch),
                usd_text(sum(replica.usd_per_hour for replica in alike)),
                per_million if index == 0 else "",
            )
    models.caption = "TTFT and TPOT: what the SLO's fraction of the requests is expected to keep to."
    models.caption_justify = "left"
    console.print(models)

    tenants = Table(title="GPUs by tenant at the peak", title_justify="left")
    for name in ("tenant", "guarantee", "deserved", "limit", "needs", "borrows"):
        tenants.add_column(name, justify="left" if name == "tenant" else "right")
    for tenant in plan.tenants:
        tenants.add_row(
            tenant.tenant,
            f"{tenant.guarantee_gpus:.1f}",
            f"{tenant.deserved_gpus:.1f}",
            f"{tenant.limit_gpus:.1f}",
            f"{tenant.gpus:.1f}",
            f"{tenant.borrowed_gpus:.1f}" if tenant.borrowed_gpus > 0 else "-",
        )
    console.print(tenants)
    for model in plan.models:
        console.print(
            f"[bold]{model.model}[/]: {model.reason}; a replica's load is limited by {model.limited_by}.",
            highlight=False,
        )
    for tenant in plan.tenants:
        if tenant.tenant == PUBLIC:
            share = tenant.gpus / plan.fleet.gpus
            console.print(f"Waterline: {tenant.gpus:.1f} of {plan.fleet.gpus} GPUs serve the public ({share:.0%}).")
    console.print(f"In all {usd_text(plan.usd_per_hour)} per hour, {usd_text(plan.usd_per_hour * 24 * 30)} in 30 days.")
