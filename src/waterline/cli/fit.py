"""`waterline fit`: which cards run a model."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import msgspec
from msgspec.structs import replace

from waterline import catalog
from waterline.cli.tables import console, draw
from waterline.cost.estimate import MEANING
from waterline.errors import InputError, UnknownNameError, nearest
from waterline.llm import PRECISIONS
from waterline.planner.fits import Fit, default_fit_precisions, example_lengths, fits, whole_nodes
from waterline.units import parameters_text, seconds_text, usd_text


@click.command()
@click.argument("model")
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="Only this card; may be given several times.")
@click.option("--precision", "precisions", multiple=True, metavar="NAME", help="Only this precision; repeatable.")
@click.option("--context", "context_tokens", type=click.IntRange(min=16), metavar="TOKENS", help="Of one request.")
@click.option("--concurrency", type=click.IntRange(min=1), default=1, show_default=True, help="Requests at once.")
@click.option("--engine", default="vllm", show_default=True, metavar="NAME", help="vllm, sglang, trtllm or llamacpp.")
@click.option("--nodes", is_flag=True, help="Also a whole node of each card, as one replica.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fit(
    model: str,
    gpus: tuple[str, ...],
    precisions: tuple[str, ...],
    context_tokens: int | None,
    concurrency: int,
    engine: str,
    *,
    nodes: bool,
    as_json: bool,
) -> None:
    """Show which cards run MODEL: how many, at which precision, how fast, at what price.

    Of each card the smallest number that does; with --nodes also a whole node of it, as one replica. MODEL is an id of
    the catalogue, a Hugging Face id, a folder with config.json, or a .gguf file.

    \b
    waterline fit deepseek-r1
    waterline fit qwen3-32b --gpu 4090 --gpu mi300x --nodes --context 32768 --concurrency 8
    """  # noqa: D301 - click reads the backspace as: leave these lines alone
    llm = catalog.load_model(model, Path())
    for precision in precisions:
        if precision not in PRECISIONS:
            raise UnknownNameError(f"no precision is called '{precision}'. {nearest(precision, PRECISIONS)}")
    context_tokens = context_tokens or min(8192, llm.max_context_tokens)
    if context_tokens > llm.max_context_tokens:
        raise InputError(f"{llm.name} reads at most {llm.max_context_tokens} tokens. Write --context at most that.")
    cards = [gpu for name in gpus for gpu in catalog.find_gpus(name)] or list(catalog.gpus().values())
    precisions = precisions or default_fit_precisions(llm, engine)
    found = fits(llm, cards, precisions, engine, context_tokens, concurrency)
    if nodes:
        whole = whole_nodes(llm, cards, precisions, engine, context_tokens, concurrency)
        found += [one for one in whole if replace(one, whole_node=False) not in found]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
    else:
        title = f"{llm.name}: {parameters_text(llm.parameters)} parameters"
        show(found, f"{title}; {concurrency} at once, {context_tokens} tokens of context, {engine}", context_tokens)


def show(found: Sequence[Fit], title: str, context_tokens: int) -> None:
    """Draw the cards that run the model as a table, then a line for each that does not."""
    from rich.text import Text

    rows = [
        (
            f"{one.gpu} node" if one.whole_node else one.gpu,
            str(one.gpus),
            one.precision,
            str(one.layout),
            one.provenance,
            str(one.max_context_tokens),
            str(one.max_concurrency),
            seconds_text(one.ttft_s or 0.0),
            seconds_text(one.tpot_s or 0.0),
            f"{one.output_tokens_per_s:.0f}",
            _price(one, one.usd_per_hour),
            _price(one, one.usd_per_million_tokens),
        )
        for one in found
        if one.runs
    ]
    screen = console()
    if rows:
        columns = (
            "card",
            "cards",
            "precision",
            "layout",
            "times",
            "longest context",
            "most at once",
            "TTFT",
            "TPOT",
            "tokens/s",
            "per hour",
        )
        spare = (
            "longest context",
            "times",
            "most at once",
            "per M tokens",
            "layout",
            "TPOT",
            "TTFT",
            "tokens/s",
            "precision",
        )
        draw(screen, title, (*columns, "per M tokens"), rows, text_columns=5, spare=spare)
    for one in found:
        if not one.runs:
            screen.print(Text.assemble((one.gpu, "bold"), f" no: {one.why_not}"))
    prompt_tokens, output_tokens = example_lengths(context_tokens)
    screen.print("? no price known; + from its purchase price over four years, power and housing apart.", style="dim")
    if rows:
        asked = f"a prompt of {prompt_tokens} tokens and {output_tokens} back"
        lines = [
            f"Times are means for {asked}; four of five measurements lie within so many times them:",
            *_worth(found),
            "A price per M tokens counts prompts and answers, with as many requests at once as a replica holds.",
        ]
        screen.print("\n".join(lines), style="dim")


def _worth(found: Sequence[Fit]) -> list[str]:
    """Say for each provenance how wide its intervals are, and what the word means."""
    lines = []
    for provenance, meaning in MEANING.items():
        if rows := [one for one in found if one.provenance == provenance]:
            ttft = _ratios((one.ttft_low_s, one.ttft_s, one.ttft_high_s) for one in rows)
            tpot = _ratios((one.tpot_low_s, one.tpot_s, one.tpot_high_s) for one in rows)
            lines.append(f"  {provenance:<12}  TTFT {ttft}  TPOT {tpot}  {meaning}")
    return lines


def _ratios(times_s: Iterable[tuple[float | None, float | None, float | None]]) -> str:
    known = [(low / value, high / value) for low, value, high in times_s if low and value and high]
    return f"{min(low for low, _ in known):.2f}-{max(high for _, high in known):.2f}"


def _price(fit: Fit, amount_usd: float | None) -> str:
    if amount_usd is None:
        return "?"
    return usd_text(amount_usd) + ("+" if fit.price_kind == "purchase" else "")
