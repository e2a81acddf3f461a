"""`waterline fit`: which cards run a model."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from waterline import catalog
from waterline.errors import InputError, UnknownNameError, nearest
from waterline.llm import PRECISIONS
from waterline.planner.fits import OUTPUT_TOKENS, PROMPT_TOKENS, Fit, default_fit_precisions, fits
from waterline.units import parameters_text, seconds_text, usd_text


@click.command()
@click.argument("model")
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="Only this card; may be given several times.")
@click.option("--precision", "precisions", multiple=True, metavar="NAME", help="Only this precision; repeatable.")
@click.option("--context", "context_tokens", type=click.IntRange(min=16), metavar="TOKENS", help="Of one request.")
@click.option("--concurrency", type=click.IntRange(min=1), default=1, show_default=True, help="Requests at once.")
@click.option("--engine", default="vllm", show_default=True, metavar="NAME", help="vllm, sglang or llamacpp.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fit(
    model: str,
    gpus: tuple[str, ...],
    precisions: tuple[str, ...],
    context_tokens: int | None,
    concurrency: int,
    engine: str,
    *,
    as_json: bool,
) -> None:
    """Show which cards run MODEL: how many, at which precision, how fast, at what price.

    MODEL is an id of the catalogue, a Hugging Face id, a folder with config.json, or a .gguf file.

    \b
    waterline fit deepseek-r1
    waterline fit qwen3-32b --gpu 4090 --gpu mi300x --context 32768 --concurrency 8
    """  # noqa: D301 - click reads the backspace as: leave these lines alone
    llm = catalog.load_model(model, Path())
    for precision in precisions:
        if precision not in PRECISIONS:
            raise UnknownNameError(f"no precision is called '{precision}'. {nearest(precision, PRECISIONS)}")
    context_tokens = context_tokens or min(8192, llm.max_context_tokens)
    if context_tokens > llm.max_context_tokens:
        raise InputError(f"{llm.name} reads at most {llm.max_context_tokens} tokens. Write --context at most that.")
    cards = [catalog.find_gpu(name) for name in gpus] or list(catalog.gpus().values())
    found = fits(llm, cards, precisions or default_fit_precisions(llm, engine), engine, context_tokens, concurrency)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
    else:
        title = f"{llm.name}: {parameters_text(llm.parameters)} parameters"
        show(found, f"{title}; {concurrency} at once, {context_tokens} tokens of context, {engine}")


def show(found: Sequence[Fit], title: str) -> None:
    """Draw the cards that run the model as a table, then a line for each that does not."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in ("card", "cards", "precision", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("most at once", "TTFT", "TPOT", "tokens/s", "per hour", "per M tokens"):
        table.add_column(name, justify="right")
    for one in found:
        if one.runs:
            table.add_row(
                one.gpu,
                str(one.gpus),
                one.precision,
                str(one.layout),
                str(one.max_concurrency),
                seconds_text(one.ttft_s or 0.0),
                seconds_text(one.tpot_s or 0.0),
                f"{one.output_tokens_per_s:.0f}",
                _price(one, one.usd_per_hour),
                _price(one, one.usd_per_million_tokens),
            )
    console = Console(width=None if sys.stdout.isatty() else 130)
    if table.row_count:
        console.print(table)
    for one in found:
        if not one.runs:
            console.print(f"[bold]{one.gpu}[/] no: {one.why_not}", highlight=False)
    console.print(
        "[dim]? no price known; + from its purchase price over four years, power and housing apart.[/]\n"
        f"[dim]Times are for a prompt of {PROMPT_TOKENS} tokens and {OUTPUT_TOKENS} back: the catalogue's peaks and "
        "assumed efficiencies, not yet calibrated.[/]",
        highlight=False,
    )


def _price(fit: Fit, amount_usd: float | None) -> str:
    if amount_usd is None:
        return "?"
    return usd_text(amount_usd) + ("+" if fit.price_kind == "purchase" else "")
