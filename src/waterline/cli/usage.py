"""`waterline usage`: what was used, and what it costs."""

import csv
import sys
from datetime import date
from typing import TYPE_CHECKING

import click

from waterline.cli.ledger import ledger_option

if TYPE_CHECKING:
    from waterline.ledger import Usage

DAY = "YYYY-MM-DD"


@click.command()
@click.option(
    "--by",
    default="tenant",
    show_default=True,
    metavar="GROUPS",
    help="Of tenant, client, model, day and key, with commas.",
)
@click.option("--since", default="", metavar=DAY, help="The first day, in UTC.")
@click.option("--until", default="", metavar=DAY, help="The last day, included.")
@ledger_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, for spreadsheets.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def usage(by: str, since: str, until: str, ledger: str, *, as_csv: bool, as_json: bool) -> None:
    """Sum requests, tokens, GPU time and cost from the ledger.

    \b
    waterline usage
    waterline usage --by day,tenant --since 2026-11-01 --csv
    """  # noqa: D301 - click wants the character, not its name
    from waterline.ledger import connect, read_usage
    from waterline.ledger.usage import GROUPS, columns_of

    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other.")
    groups = [name.strip() for name in by.split(",")]
    if unknown := [name for name in groups if name not in GROUPS]:
        raise click.BadParameter(f"'{unknown[0]}' is not one of {', '.join(GROUPS)}.", param_hint="--by")
    first, last = _day(since, "--since"), _day(until, "--until")
    if first and last and first > last:
        raise click.BadParameter(f"{since} comes after --until {until}.", param_hint="--since")
    rows = read_usage(connect(ledger, create=False), groups, first, last)
    names = columns_of(groups)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode([_fields(row, names) for row in rows]).decode())
    elif as_csv:
        _write_csv(rows, names)
    else:
        _draw(rows, names)


def _day(text: str, option: str) -> str:
    try:
        return date.fromisoformat(text).isoformat() if text else ""
    except ValueError:
        raise click.BadParameter(f"'{text}' is no day. Write it like 2026-11-26.", param_hint=option) from None


def _fields(row: "Usage", names: list[str]) -> dict[str, object]:
    """Return the columns of one row; money in billionths, which are exact, and in dollars."""
    from waterline.ledger.tables import SUMS

    fields: dict[str, object] = {name: getattr(row, name) for name in (*names, *SUMS)}
    return {**fields, "gpu_s": row.gpu_s, "usd": row.usd}


def _write_csv(rows: "list[Usage]", names: list[str]) -> None:
    from waterline.ledger import Usage

    writer = csv.DictWriter(sys.stdout, list(_fields(Usage(), names)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**_fields(row, names), "usd": f"{row.usd:.9f}"} for row in rows)


def _draw(rows: "list[Usage]", names: list[str]) -> None:
    from waterline.cli.tables import console, draw

    if not rows:
        click.echo("Nothing was used in that time.")
        return
    columns = [
        *(name.removesuffix("_id") for name in names),
        *("requests", "ok", "refused", "failed", "cancelled", "interrupted"),
        *("tokens in", "cached", "tokens out", "thinking", "GPU hours", "USD"),
    ]
    cells = [
        [
            *(getattr(row, name) or "-" for name in names),
            *(f"{count:,}" for count in _counts(row)),
            f"{row.gpu_s / 3600:,.3f}",
            f"{row.usd:,.4f}",
        ]
        for row in rows
    ]
    if len(rows) > 1:
        sums = [f"{sum(counts):,}" for counts in zip(*map(_counts, rows), strict=True)]
        hours, usd = sum(row.gpu_us for row in rows) / 3.6e9, sum(row.nano_usd for row in rows) / 1e9
        blanks = [""] * (len(names) - 1)
        cells.append(["all", *blanks, *sums, f"{hours:,.3f}", f"{usd:,.4f}"])
    spare = ("interrupted", "thinking", "cached", "cancelled", "failed", "refused")
    title = "Usage, by the day of arrival (UTC)"
    draw(console(), title, columns, cells, text_columns=len(names), spare=spare, last_apart=len(rows) > 1)


def _counts(row: "Usage") -> tuple[int, ...]:
    return (
        *(row.requests, row.ok, row.refused, row.failed, row.cancelled, row.interrupted),
        *(row.prompt_tokens, row.cached_tokens, row.output_tokens, row.thinking_tokens),
    )
