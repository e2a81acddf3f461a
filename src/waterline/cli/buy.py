"""`waterline buy`: what to buy for a demand, for a budget, or for a tender."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from waterline import catalog
from waterline.catalog.currencies import Amount, find_currency, parse_amount
from waterline.catalog.export_rules import find_rule
from waterline.catalog.servers import ServerPrice, hosting, servers
from waterline.cli.purchases import Money, show, show_tenders
from waterline.errors import InputError
from waterline.fleet import Fleet, Pool, load_fleet
from waterline.planner.buying import Advice
from waterline.planner.buying import buy as advise
from waterline.planner.market import Wish, no_price, price_factors, price_of_server
from waterline.planner.tenders import Tender, for_budget, of_servers
from waterline.workload import write_whole

TENDER = re.compile(r"(\d+)\s*(?:x\s*)?(?:nodes?|servers?)?\s*of\s*(\d+)\s*(?:x\s*)?(\S.*)", re.IGNORECASE)


@click.command("buy")
@click.argument("fleet", required=False, type=click.Path(path_type=Path))
@click.option("--budget", metavar="AMOUNT", help="What servers may cost: '20M CNY'; without FLEET also '5-6 M CNY'.")
@click.option("--tender", "tenders", multiple=True, metavar="TEXT", help="Exactly this: '2 nodes of 8 a100-sxm-80g'.")
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="Only this card; repeatable.")
@click.option("--price", "prices", multiple=True, metavar="CARD=AMOUNT", help="Of one whole server with that card.")
@click.option("--data-centre", is_flag=True, help="Only cards that are sold for data centres.")
@click.option("--new", is_flag=True, help="Count on nothing of what the pools of FLEET own.")
@click.option("--max-vendor-share", type=click.FloatRange(0, 1, min_open=True), default=1.0, metavar="FRACTION",
              help="Safeguard: of the money spent, at most this to one vendor.")  # fmt: skip
@click.option("--export-rule", default="", metavar="NAME", help="Safeguard: no card under this rule, like 2023-10.")
@click.option("--scenario", "scenarios", multiple=True, metavar="TEXT", default=("low", "high"),
              help="Other prices: low, high or 'nvidia +30 %'; repeatable.  [default: low, high]")  # fmt: skip
@click.option("--years", type=click.FloatRange(0, 30, min_open=True), help="Lifetime of servers.  [default: 4]")
@click.option(
    "--kwh", "usd_per_kwh", type=click.FloatRange(0, 10), metavar="USD", help="For electricity.  [default: 0.083]"
)
@click.option("--hosting", "usd_per_kw_month", type=click.FloatRange(0, 10_000), metavar="USD",
              help="Of a rated kW for a month, electricity apart.  [default: 184.06]")  # fmt: skip
@click.option("--currency", metavar="CODE", help="Show amounts in it.  [default: that of the budget]")
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE", help="Write fleet and purchase here.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def buy(
    fleet: Path | None,
    budget: str | None,
    tenders: tuple[str, ...],
    gpus: tuple[str, ...],
    prices: tuple[str, ...],
    max_vendor_share: float,
    export_rule: str,
    scenarios: tuple[str, ...],
    years: float | None,
    usd_per_kwh: float | None,
    usd_per_kw_month: float | None,
    currency: str | None,
    output: Path | None,
    *,
    data_centre: bool,
    new: bool,
    as_json: bool,
) -> None:
    """Say what to buy so that the demand of FLEET is served, and what every safeguard costs.

    With a budget: the cheapest servers over their lifetime that serve all, or those that serve most. Without FLEET:
    what a tender costs, or how many servers a budget buys, and the models they run.

    \b
    waterline buy examples/tender.toml --budget "20M CNY"
    waterline buy examples/tender.toml --max-vendor-share 0.6 --scenario "nvidia +30 %"
    waterline buy --budget "5.2-6.4 M CNY" --gpu a100-sxm-80g
    waterline buy --tender "2 nodes of 8 a100-sxm-80g" --currency CNY
    """  # noqa: D301 - click reads the backspace as: leave these lines alone
    amount = parse_amount(budget, "--budget") if budget else None
    shown = find_currency(currency) if currency else amount.currency if amount else find_currency("USD")
    asked = dict(_tender(text) for text in tenders)
    given = dict(_given(text) for text in prices)
    named = tuple(dict.fromkeys(catalog.find_gpu(name).id for name in gpus))
    for one in scenarios:
        price_factors(one)
    if fleet is None:
        if max_vendor_share < 1 or export_rule or output or new:
            raise InputError(
                "--max-vendor-share, --export-rule, --new and --output are for the purchase of a fleet. Name its file."
            )
        found = _without_demand(amount, asked, named, given)
        if as_json:
            _print_json({"tenders": found, "currency": shown})
        else:
            show_tenders(found, amount, Money(shown))
        return
    if asked and (max_vendor_share < 1 or export_rule):
        raise InputError(
            "a tender is judged as it is: leave out --max-vendor-share and --export-rule, or the --tender."
        )
    if amount is not None and amount.is_range:
        raise InputError(
            f"--budget '{budget}' is a range, and a purchase for a fleet has one budget. Write its upper end."
        )
    usual = hosting()
    terms = msgspec.structs.replace(
        usual,
        lifetime_years=usual.lifetime_years if years is None else years,
        usd_per_kwh=usual.usd_per_kwh if usd_per_kwh is None else usd_per_kwh,
        usd_per_kw_month=usual.usd_per_kw_month if usd_per_kw_month is None else usd_per_kw_month,
    )
    wish = Wish(
        gpus=named,
        budget_usd=amount.high_usd if amount else None,
        given=given,
        data_centre=data_centre,
        new=new,
        max_vendor_share=max_vendor_share,
        export_rule=export_rule if not export_rule or find_rule(export_rule) else "",
        scenarios=scenarios,
        tender=asked,
    )
    loaded = load_fleet(fleet)
    advice = advise(loaded, wish, terms)
    if output:
        _write(output, fleet_text(with_purchase(loaded, advice, new=new)))
    if as_json:
        _print_json({**msgspec.to_builtins(advice), "currency": shown, "servers": servers()})
        return
    show(advice, Money(shown))
    if output:
        click.echo(f"Written to {output}. Plan it: waterline plan {output}")


def _print_json(item: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(item), indent=2))


# --- What was typed -------------------------------------------------------------------------------------------------


def _tender(text: str) -> tuple[str, tuple[int, int]]:
    found = TENDER.fullmatch(text.strip())
    if not found or not 0 < int(found[1]) <= 10**6 or not 0 < int(found[2]) <= 1024:
        raise InputError(f"--tender '{text}' is not understood. Write how many of what: '2 nodes of 8 a100-sxm-80g'.")
    return catalog.find_gpu(found[3]).id, (int(found[1]), int(found[2]))


def _given(text: str) -> tuple[str, Amount]:
    card, equals, amount = text.partition("=")
    if not equals:
        raise InputError(
            f"--price '{text}' is not understood. Write card and price of one server: 'mi350x=250000 USD'."
        )
    plain = re.fullmatch(r"[\d,._ ]+", amount.strip())
    return catalog.find_gpu(card.strip()).id, parse_amount(f"{amount} USD" if plain else amount, "--price")


def _without_demand(
    amount: Amount | None, asked: dict[str, tuple[int, int]], named: Sequence[str], given: dict[str, Amount]
) -> list[Tender]:
    if asked:
        found = [(_named_price(gpu, gpus, given), count) for gpu, (count, gpus) in asked.items()]
        return [of_servers(priced, count, every_model=len(found) == 1) for priced, count in found]
    if amount is None:
        raise InputError(
            "say what to weigh: a fleet file, a --budget, or a --tender. For example: waterline buy --budget '20M CNY'"
        )
    usual = [gpu for gpu in catalog.gpus().values() if gpu.support == "full" and gpu.id != "cpu"]
    offered = [_named_price(gpu, catalog.find_gpu(gpu).gpus_per_node, given) for gpu in named] or [
        priced
        for gpu in usual
        if (priced := price_of_server(gpu.id, gpu.gpus_per_node, given)) and priced.kind != "list"
    ]
    return [for_budget(one, amount.low_usd, amount.high_usd, every_model=len(offered) == 1) for one in offered]


def _named_price(gpu: str, gpus: int, given: dict[str, Amount]) -> ServerPrice:
    priced = price_of_server(gpu, gpus, given)
    if priced is None:
        raise InputError(no_price(gpu, gpus))
    return priced


# --- The fleet with what is bought ----------------------------------------------------------------------------------


def with_purchase(fleet: Fleet, advice: Advice, *, new: bool) -> Fleet:
    """Return the fleet with the servers as pools, at what an hour of theirs costs over the lifetime."""
    hours = advice.years * 365.25 * 24
    owned = () if new else fleet.pools
    taken = {pool.name for pool in owned}
    bought = tuple(
        Pool(
            name=one.gpu if one.gpu not in taken else f"{one.gpu}-new",
            gpu=one.gpu,
            nodes=one.servers,
            gpus_per_node=one.gpus_per_server,
            usd_per_gpu_hour=round(
                (one.usd + one.usd_per_month * 12 * advice.years) / (one.servers * one.gpus_per_server * hours), 6
            ),
        )
        for one in advice.best.bought
    )
    if not owned + bought:
        raise InputError("nothing is bought and nothing is owned, so there is no fleet to write. Raise the budget.")
    objective = fleet.objective if advice.best.whole else "goodput"
    return msgspec.structs.replace(fleet, pools=owned + bought, objective=objective)


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}. Name another --output.") from error


def fleet_text(fleet: Fleet) -> str:
    """Return a fleet as the TOML that `load_fleet` reads."""
    tables = msgspec.to_builtins(fleet)
    lines = [f"{key} = {_toml(value)}" for key, value in tables.items() if not _is_tables(value) and _says(value)]
    for key, value in tables.items():
        if _is_tables(value):
            for one in value:
                lines += ["", f"[[{key}]]", *(f"{name} = {_toml(item)}" for name, item in one.items() if _says(item))]
    return "\n".join(lines) + "\n"


def _is_tables(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], dict)


def _says(value: object) -> bool:
    return value is not None and value not in ("", (), [])


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items() if _says(item)) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)
