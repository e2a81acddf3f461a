"""`waterline size`: how many GPUs a load takes."""

import math
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from waterline import catalog
from waterline.catalog.engines import find_engine
from waterline.cli.prices import read_prices
from waterline.errors import InputError, UnknownNameError, nearest
from waterline.fleet import DEFAULT_CONTEXT_TOKENS, MOST, default_precisions, default_slo
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, Llm
from waterline.planner.candidates import Work
from waterline.planner.queueing import usual_lengths
from waterline.planner.sizing import Choice, Question, Sizing
from waterline.planner.sizing import size as find_size
from waterline.units import fraction_text, parameters_text, seconds_text, usd_text
from waterline.workload import Slo

RENTED = ("on_demand", "community")


@click.command()
@click.argument("model")
@click.option("--rate", "requests_per_s", type=float, required=True, metavar="R", help="Requests a second.")
@click.option("--isl", "prompt_tokens", type=int, required=True, metavar="TOKENS", help="Of a prompt, mean.")
@click.option("--osl", "output_tokens", type=int, required=True, metavar="TOKENS", help="Of an answer, mean.")
@click.option(
    "--ttft", "ttft_s", type=float, metavar="S", help="To the first token; by the size of the model if absent."
)
@click.option("--tpot", "tpot_s", type=float, metavar="S", help="For each token after it; likewise.")
@click.option("--fraction", type=float, default=0.99, show_default=True, help="Of the requests that keep to both.")
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="Only this card, or all called so; repeatable.")
@click.option("--precision", "precisions", multiple=True, metavar="NAME", help="Only this precision; repeatable.")
@click.option("--context", "context_tokens", type=int, metavar="TOKENS", help="Of one request, at most.")
@click.option("--prefix-hit", type=float, default=0.0, help="Share of the prompts' tokens that are in the cache.")
@click.option("--engine", default="", metavar="NAME", help="vllm, sglang, trtllm or llamacpp.")
@click.option("--price", "prices", multiple=True, metavar="CARD=USD", help="Of a card, an hour; repeatable.")
@click.option("--fewest", is_flag=True, help="The fewest GPUs, not the cheapest ones.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def size(
    model: str,
    requests_per_s: float,
    prompt_tokens: int,
    output_tokens: int,
    ttft_s: float | None,
    tpot_s: float | None,
    fraction: float,
    gpus: tuple[str, ...],
    precisions: tuple[str, ...],
    context_tokens: int | None,
    prefix_hit: float,
    engine: str,
    prices: tuple[str, ...],
    *,
    fewest: bool,
    as_json: bool,
) -> None:
    """Say how many GPUs a load on MODEL takes: which card, layout and replicas, at what cost.

    The cheapest, across every card that can be rented; or of the ones given, or the fewest. Queueing is included: the
    fraction of the requests that --fraction says keeps to both times.

    \b
    waterline size qwen3-32b --rate 50 --isl 4000 --osl 500 --ttft 2 --tpot 0.03
    waterline size deepseek-r1 --rate 20 --isl 4000 --osl 500 --gpu h200 --gpu mi300x --fewest
    """  # noqa: D301 - click reads the backspace as: leave these lines alone
    llm = catalog.load_model(model, Path())
    usual = default_slo(llm)
    slo = Slo(
        ttft_s=usual.ttft_s if ttft_s is None else _above_zero("--ttft", ttft_s),
        tpot_s=usual.tpot_s if tpot_s is None else _above_zero("--tpot", tpot_s),
        fraction=_between("--fraction", fraction, least_included=False),
    )
    context_tokens = _context(llm, prompt_tokens, output_tokens, context_tokens)
    hit = _between("--prefix-hit", prefix_hit, least_included=True)
    engine = engine or ("llamacpp" if llm.weights_file else "vllm")
    find_engine(engine)
    given = read_prices(prices)
    cards = [gpu for name in gpus for gpu in catalog.find_gpus(name)] or _rentable(given)
    answer = find_size(
        Question(
            llm=llm,
            requests_per_s=_rate(requests_per_s),
            work=Work(
                lengths=usual_lengths(prompt_tokens, output_tokens, hit), max_context_tokens=context_tokens, slo=slo
            ),
            gpus=list({gpu.id: gpu for gpu in cards}.values()),
            precisions=_precisions(precisions, llm, engine),
            engine=engine,
            aim="fewest" if fewest else "cheapest",
            usd_per_gpu_hour=_known_prices(cards) | given,
        )
    )
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(answer), indent=2))
    else:
        show(answer, llm)


# --- What was asked -------------------------------------------------------------------------------------------------


def _above_zero(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise InputError(f"{name} = {value:g} should be a number above 0.")
    return value


def _rate(requests_per_s: float) -> float:
    """Return the rate, if a fleet file could ask for it too."""
    if _above_zero("--rate", requests_per_s) > MOST:
        raise InputError(f"--rate = {requests_per_s:g} should be at most {MOST:,} requests a second.")
    return requests_per_s


def _between(name: str, value: float, *, least_included: bool) -> float:
    if not (0 < value < 1 or (least_included and value == 0)):
        raise InputError(f"{name} = {value:g} should be a share between 0 and 1, as 0.9.")
    return value


def _context(llm: Llm, prompt_tokens: int, output_tokens: int, context_tokens: int | None) -> int:
    """Return the context of a request: as asked, or what a fleet file would take, and room for the longer ones."""
    for name, tokens in (("--isl", prompt_tokens), ("--osl", output_tokens)):
        if tokens < 1:
            raise InputError(f"{name} = {tokens} should be at least 1 token.")
    together, most = prompt_tokens + output_tokens, llm.max_context_tokens
    if together > most:
        raise InputError(
            f"--isl {prompt_tokens} and --osl {output_tokens} are {together} tokens; {llm.name} has a context of "
            f"{most}. Shorten the requests, or take another model."
        )
    if context_tokens is None:
        return min(most, max(DEFAULT_CONTEXT_TOKENS, 2 * together))
    if not together <= context_tokens <= most:
        raise InputError(
            f"--context {context_tokens} should lie between the {together} tokens of a request and the {most} of "
            f"{llm.name}."
        )
    return context_tokens


def _precisions(names: Sequence[str], llm: Llm, engine: str) -> tuple[str, ...]:
    for name in names:
        if name not in PRECISIONS:
            raise UnknownNameError(f"no precision is called '{name}'. {nearest(name, PRECISIONS)}")
        if PRECISIONS[name].gguf and engine != "llamacpp":
            raise InputError(
                f"{name} is a format of llama.cpp, {engine} does not run it. Add --engine llamacpp, or take another "
                "--precision."
            )
    return tuple(dict.fromkeys(names)) or default_precisions(llm)


def _rentable(given: dict[str, float]) -> list[Gpu]:
    """Return the cards an engine runs on, and that somebody rents out or you have a price for."""
    return [
        gpu
        for gpu in catalog.gpus().values()
        if gpu.id in given
        or (gpu.support == "full" and (price := catalog.usd_per_gpu_hour(gpu.id)) and price.kind in RENTED)
    ]


def _known_prices(cards: Sequence[Gpu]) -> dict[str, float]:
    return {gpu.id: price.usd_per_gpu_hour for gpu in cards if (price := catalog.usd_per_gpu_hour(gpu.id))}


# --- The answer -----------------------------------------------------------------------------------------------------


def show(answer: Sizing, llm: Llm) -> None:
    """Draw the best choice in a sentence, then it and the others in a table."""
    from waterline.cli.tables import console, draw

    screen = console()
    cost = "" if answer.usd_per_hour is None else f", {usd_text(answer.usd_per_hour)} an hour"
    parts = " + ".join(f"{part.replicas} x {part.layout} {part.role}".removesuffix(" both") for part in answer.parts)
    screen.print(f"{answer.gpus} x {answer.gpu}{cost}: {parts} in {answer.precision}", style="bold")
    asked = f"{answer.requests_per_s:g} requests/s of {answer.prompt_tokens} + {answer.output_tokens} tokens"
    slo = answer.slo
    within = f"TTFT {seconds_text(slo.ttft_s)} and TPOT {seconds_text(slo.tpot_s)}"
    promise = f"{fraction_text(slo.fraction)} of them within {within}"
    title = f"{llm.name} ({parameters_text(llm.parameters)}): {asked}, {promise}"
    columns = (
        "card", "layout", "precision", "limit", "times", "replicas", "GPUs", "TTFT", "TPOT", "per hour", "per M tokens",
    )  # fmt: skip
    rows = [_row(one) for one in (answer, *answer.alternatives)]
    spare = ("times", "limit", "per M tokens", "replicas", "TTFT", "TPOT")
    draw(screen, title, columns, rows, text_columns=5, spare=spare)
    first = "Cheapest first" if answer.aim == "cheapest" else "Fewest GPUs first"
    notes = [f"{first}; TTFT and TPOT: what {fraction_text(slo.fraction)} of the requests keep to. {_worth(answer)}"]
    if any(len(one.parts) > 1 for one in (answer, *answer.alternatives)):
        notes.append(
            "prefill + decode: prompts are read on some replicas and their cache is sent to others, which write; for "
            "that each GPU is taken to have a 400 Gb/s port of its own."
        )
    if answer.unpriced:
        cards = ", ".join(answer.unpriced)
        notes.append(f"No price is known for {cards}: give one with --price {answer.unpriced[0]}=USD")
    screen.print("\n".join(notes), style="dim")


def _row(choice: Choice) -> tuple[str, ...]:
    parts = choice.parts
    return (
        choice.gpu,
        choice.layout,
        choice.precision,
        " + ".join(part.limited_by for part in parts),
        choice.provenance,
        " + ".join(str(part.replicas) for part in parts),
        str(choice.gpus),
        seconds_text(choice.ttft_s),
        seconds_text(choice.tpot_s),
        "?" if choice.usd_per_hour is None else usd_text(choice.usd_per_hour),
        "?" if choice.usd_per_million_tokens is None else usd_text(choice.usd_per_million_tokens),
    )


def _worth(choice: Choice) -> str:
    ttft = f"TTFT {seconds_text(choice.ttft_low_s)} to {seconds_text(choice.ttft_high_s)}"
    tpot = f"TPOT {seconds_text(choice.tpot_low_s)} to {seconds_text(choice.tpot_high_s)}"
    return f"Of the first, {choice.provenance}, four of five measurements lie within {ttft}, {tpot}."
