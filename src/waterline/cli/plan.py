"""`waterline plan`: what runs where."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from waterline.cli.tables import console, draw
from waterline.errors import InputError
from waterline.fleet import load_fleet
from waterline.plan import Plan, write_plan
from waterline.planner import make_plan
from waterline.units import seconds_text, usd_text

if TYPE_CHECKING:
    from rich.console import Console

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
    if output == Path("-"):
        raise InputError("--output names a file, and '-' is none. To print the plan: waterline plan FLEET --json")
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
    from rich.text import Text

    screen = console()
    _draw_models(plan, screen)
    _draw_tenants(plan, screen)
    for model in plan.models:
        because = f": {model.reason}; a replica's load is limited by {model.limited_by}."
        screen.print(Text.assemble((model.model, "bold"), because))
    public = [tenant for tenant in plan.tenants if tenant.tenant == PUBLIC]
    for tenant in public:
        share = tenant.gpus / plan.fleet.gpus
        screen.print(f"Waterline: {tenant.gpus:.1f} of {plan.fleet.gpus} GPUs serve the public ({share:.0%}).")
    if not public and len(plan.tenants) > 1:
        names = ", ".join(tenant.tenant for tenant in plan.tenants)
        screen.print(f"No waterline: it is drawn for a tenant named '{PUBLIC}', here are {names}.", style="dim")
    screen.print(f"In all {usd_text(plan.usd_per_hour)} per hour, {usd_text(plan.usd_per_hour * 24 * 30)} in 30 days.")


def _draw_models(plan: Plan, screen: "Console") -> None:
    rows = []
    for model in plan.models:
        replicas = plan.replicas_of(model.model)
        groups = dict.fromkeys((r.pool, r.precision, str(r.layout)) for r in replicas)
        for index, (pool, precision, layout) in enumerate(groups):
            alike = [r for r in replicas if (r.pool, r.precision, str(r.layout)) == (pool, precision, layout)]
            per_million = "-" if model.usd_per_million_tokens is None else usd_text(model.usd_per_million_tokens)
            rows.append(
                (
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
