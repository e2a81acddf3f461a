"""How a purchase is drawn: the servers, what they serve, what they cost, and what they were weighed against."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from waterline.catalog.currencies import Amount, Currency
from waterline.catalog.servers import servers
from waterline.cli.tables import console, draw
from waterline.planner.buying import Advice, Loss, Purchase, Safeguard, Servers
from waterline.planner.tenders import CONTEXT_TOKENS, Tender
from waterline.units import GIB, parameters_text

if TYPE_CHECKING:
    from rich.console import Console

MOST_MODELS = 10  # shown of those a tender runs; --json has all
PROVED = 2e-4  # what is nearer to the bound than that is as good as the best
MOST_CARDS = 6  # named of those left out for one reason
PRICE_KINDS = {
    "server": "asked for whole servers",
    "card": "cards as asked on a market, and a host around them",
    "list": "cards at their list price at launch, and a host around them",
    "given": "given with --price",
}
LEFT_OUT = {
    "no price": "without a price, --price gives one",
    "list price": "with no more than a list price at launch, --gpu takes it",
    "planning only": "that no engine is started on, --gpu considers them",
    "no power": "of unknown power",
    "not for it": "not sold for data centres",
    "export rule": "under the export rule",
    "runs nothing": "that run none of the models within their SLO",
}


@dataclass(frozen=True, slots=True)
class Money:
    """Says amounts in one currency."""

    currency: Currency

    def __call__(self, usd: float) -> str:
        return self.currency.text(usd)

    def more(self, usd: float) -> str:
        """Say a difference with its sign."""
        return ("+" if usd >= 0 else "-") + self(abs(usd))

    def rate(self) -> str:
        one = self.currency
        if one.code == "USD":
            return ""
        return f"1 USD = {one.per_usd:,.6g} {one.code} ({one.date}{', recalled' if one.recalled else ''})."


def show(advice: Advice, money: Money) -> None:
    """Draw the purchase, what it serves, what it costs and what it was weighed against."""
    screen = console()
    _draw_servers(advice, money, screen)
    _draw_models(advice.best, screen)
    screen.print("\n".join(_money_lines(advice, money)))
    _draw_safeguards(advice, money, screen)
    _draw_losses(advice, money, screen)
    _draw_prices(advice, money, screen)
    screen.print("\n".join(_sources(advice, money)), style="dim")


def _draw_servers(advice: Advice, money: Money, screen: "Console") -> None:
    best = advice.best
    count = sum(one.servers for one in best.bought)
    title = f"{advice.fleet}: buy {counted(count, 'server')} with {best.gpus} GPUs" if count else "buy nothing"
    columns = (
        "servers of",
        "vendor",
        "number",
        "each",
        "price",
        "of",
        "in all",
        "rated kW",
        "to run a month",
        "to rent a month",
        "pays back in months",
    )
    spare = ("of", "price", "vendor", "rated kW", "pays back in months", "to rent a month")
    draw(screen, title, columns, [_server_row(one, money) for one in best.servers], text_columns=3, spare=spare)


def _server_row(one: Servers, money: Money) -> tuple[str, ...]:
    number, rated, to_run = f"{one.servers} x {one.gpus_per_server}", f"{one.rated_kw:.1f}", money(one.usd_per_month)
    if one.owned:
        return one.name, one.vendor, number, "owned", "", "", "-", rated, to_run, "-", "-"
    return (
        one.gpu,
        one.vendor,
        number,
        money(one.price.usd),
        one.price.kind,
        one.price.date,
        money(one.usd),
        rated,
        to_run,
        "-" if one.rent_usd_per_month is None else money(one.rent_usd_per_month),
        "-" if one.break_even_months is None else f"{one.break_even_months:.0f}",
    )


def _draw_models(best: Purchase, screen: "Console") -> None:
    rows = []
    for model in dict.fromkeys(one.model for one in best.serving):
        hard = max((one for one in best.serving if one.model == model), key=lambda one: one.asked_requests_per_s)
        served = f"{hard.fraction:.0%}" if hard.asked_requests_per_s else "-"
        first: tuple[str, ...] = (model, f"{hard.hour}:00", f"{hard.asked_requests_per_s:,.3g}", served)
        alike = [
            (str(each.replicas), each.name, each.precision, str(each.layout))
            for each in best.replicas
            if (each.model, each.hour) == (model, hard.hour)
        ]
        for cells in alike or [("-",) * 4]:
            rows.append((*first, *cells))
            first = ("",) * 4
    columns = ("model", "hour", "asked req/s", "served", "replicas", "on", "precision", "layout")
    draw(
        screen,
        "What it serves, each model at the hour most is asked of it",
        columns,
        rows,
        text_columns=1,
        spare=("hour",),
    )


def _money_lines(advice: Advice, money: Money) -> Iterator[str]:
    best = advice.best
    what = "the whole demand" if best.whole else f"{best.served_fraction:.1%} of the requests at their hardest hours"
    yield f"It serves {what}, for {money(best.usd)} ({_range(best.low_usd, best.high_usd, money)})."
    if best.gap > PROVED:
        yield f"It is not proved to be the best: another could at best be better by {best.gap:.1%}."
    yield from _budget_lines(advice, money)
    kinds = f", and {money(best.kinds_usd)} for further kinds of servers" if best.kinds_usd else ""
    yield (
        f"Over {advice.years:g} years it costs {money(best.lifetime_usd)}: {money(best.usd)} to buy, "
        f"{money(best.usd_per_month)} a month to run ({best.rated_kw:.1f} kW rated){kinds}."
    )
    if advice.rent is not None and best.bought:
        listed = ", ".join(f"{count} x {name}" for name, count in advice.rent.servers.items())
        yield f"Renting round the clock ({listed}): {money(advice.rent.usd_per_month)} a month; {_verdict(advice)}."


def _budget_lines(advice: Advice, money: Money) -> Iterator[str]:
    best, least, budget = advice.best, advice.least, advice.budget_usd
    if budget is not None:
        left = budget - best.usd
        if left >= 0:
            warned = "" if best.high_usd <= budget else " At the highest prices seen the budget would not reach."
            yield f"Of the budget of {money(budget)}, {money(left)} is left.{warned}"
        else:
            yield f"That is {money(-left)} more than the budget of {money(budget)}."
    if advice.why_not:
        yield f"No budget would serve everything: {advice.why_not}"
    if least is None:
        return
    if not best.whole:
        yield f"To serve everything takes at least {money(least.usd)}: {_told(least)}."
    elif least.usd < best.usd:
        later = money(least.lifetime_usd - best.lifetime_usd)
        yield f"It can be served for {money(least.usd)}: {_told(least)}, {later} dearer over the lifetime."


def _verdict(advice: Advice) -> str:
    if advice.rent is None or not advice.best.whole:
        return "that is for the whole demand"
    months = advice.rent.break_even_months
    if months is None:
        return "never dearer than running what is bought"
    if months > 12 * advice.years:
        return f"buying costs less only after {months:.0f} months"
    return f"buying has cost less after {months:.0f} months"


def _range(low_usd: float, high_usd: float, money: Money) -> str:
    return f"{money(low_usd)} to {money(high_usd)} at the lowest and highest prices seen"


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _told(purchase: Purchase | None) -> str:
    """Name the servers of a purchase in a few words."""
    if purchase is None:
        return "nothing does"
    return ", ".join(f"{one.servers} x {one.gpu}" for one in purchase.bought) or "nothing"


ADDS = ("price", "lifetime", "served")


def _draw_safeguards(advice: Advice, money: Money, screen: "Console") -> None:
    rows = [(one.name, _told(advice.best), _told(one.without), *_differences(one, money)) for one in advice.safeguards]
    if rows:
        columns = ("safeguard", "with it", "without it", *ADDS)
        draw(screen, "What each safeguard costs: it changes", columns, rows, text_columns=3, spare=())


def _draw_losses(advice: Advice, money: Money, screen: "Console") -> None:
    rows = [
        (one.gpu, _told(one.instead), *(_differences(one, money) if one.instead else ("-",) * 3))
        for one in advice.losses
    ]
    if rows:
        columns = ("without any", "one would buy", *ADDS)
        draw(screen, "If a card cannot be had, that changes", columns, rows, text_columns=2, spare=())


def _differences(one: Safeguard | Loss, money: Money) -> tuple[str, ...]:
    taken = f"{-one.served_fraction:+.1%}" if abs(one.served_fraction) > 5e-4 else "-"
    return money.more(one.usd), money.more(one.lifetime_usd), taken


def _draw_prices(advice: Advice, money: Money, screen: "Console") -> None:
    best = advice.best
    rows = [("median, as above", money(best.usd), _told(best), money(best.usd), _served(best))]
    for one in advice.scenarios:
        price = money(one.best.usd) if one.best else "-"
        rows.append((one.name, money(one.same_usd), _told(one.best), price, _served(one.best)))
    columns = ("prices", "the same servers", "the best then", "for", "serves")
    if best.bought and advice.scenarios:
        draw(screen, "At other prices", columns, rows, text_columns=1, spare=("serves",))


def _served(purchase: Purchase | None) -> str:
    return "-" if purchase is None else "all" if purchase.whole else f"{purchase.served_fraction:.1%}"


def _sources(advice: Advice, money: Money) -> Iterator[str]:
    terms, facts = advice.hosting, servers()
    for kind in dict.fromkeys(one.price.kind for one in advice.best.bought):
        yield f"Price {kind}: {PRICE_KINDS[kind]}."
    for one in advice.best.bought:
        yield f"  {one.gpu}, {one.price.date}: {one.price.source}."
    yield (
        f"To run: {terms.usd_per_kwh:g} USD/kWh at {facts.drawn_over_tdp:g} x TDP and a PUE of {terms.pue:g}; "
        f"{terms.usd_per_kw_month:g} USD a month for a rated kW of {facts.rated_over_tdp:g} x TDP."
    )
    yield from advice.notes
    if rate := money.rate():
        yield rate
    if any(one.reason == "export rule" for one in advice.left_out):
        yield "The export filter reads published figures and is not legal advice."
    yield from _left_out(advice)


def _left_out(advice: Advice) -> list[str]:
    """Say which cards were not considered, by reason."""
    lines = []
    for reason, told in LEFT_OUT.items():
        if cards := [one.gpu for one in advice.left_out if one.reason == reason]:
            more = f" and {len(cards) - MOST_CARDS} more" if len(cards) > MOST_CARDS else ""
            lines.append(f"Left out, {told}: {', '.join(cards[:MOST_CARDS])}{more}.")
    return lines


def show_tenders(found: list[Tender], amount: Amount | None, money: Money) -> None:
    """Draw tenders: what they cost or how many a budget buys, and the models they run."""
    screen = console()
    rows = [
        (
            one.gpu,
            f"{one.servers} x {one.gpus_per_server}",
            f"{one.fewest} to {one.most}" if one.fewest < one.most else "",
            f"{one.memory_bytes / GIB:,.0f}",
            f"{money(one.price.low_usd)} to {money(one.price.high_usd)}",
            f"{one.price.kind}, {one.price.date}",
            money(one.usd),
            f"{one.runs[0].model.split('/')[-1]} ({one.runs[0].precision})" if one.runs else "-",
        )
        for one in sorted(found, key=lambda one: -one.memory_bytes)
    ]
    columns = ("servers of", "number", "could be", "memory GiB", "a server", "price, of", "in all", "largest model")
    title = "What the tender costs"
    if amount is not None:
        spread = f"{money(amount.low_usd)} to {money(amount.high_usd)}" if amount.is_range else money(amount.high_usd)
        title = f"What {spread} buys, of one card"
    draw(screen, title, columns, rows, text_columns=2, spare=("memory GiB", "price, of", "could be"))
    if len(found) == 1:
        _draw_runs(found[0], screen)
    notes = [f"{one.gpu}: {one.price.source}." for one in found] if len(found) <= 3 else []
    if amount is not None:
        notes.insert(0, "number: for the middle of the budget at the median price; could be: at the ends of both.")
    if rate := money.rate():
        notes.append(rate)
    screen.print("\n".join(notes), style="dim")


def _draw_runs(tender: Tender, screen: "Console") -> None:
    rows = [
        (one.model, parameters_text(one.parameters), one.precision, str(one.layout), str(one.gpus), str(one.replicas),
         f"{one.at_once:,}")
        for one in tender.runs[:MOST_MODELS]
    ]  # fmt: skip
    columns = ("model", "parameters", "precision", "layout", "GPUs", "replicas", "at once")
    title = f"Models it runs with {CONTEXT_TOKENS:,} tokens a request, the largest of {len(tender.runs)} sizes"
    draw(screen, title, columns, rows, text_columns=1, spare=("layout",))
    if tender.runs_not:
        screen.print(f"Too large at any usual precision: {tender.runs_not}.", style="dim")
