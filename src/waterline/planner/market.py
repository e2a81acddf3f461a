"""What can be bought, and what a server can do: the cards considered, the hardest hours, every way to serve them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from waterline import catalog
from waterline.catalog.currencies import Amount
from waterline.catalog.export_rules import find_rule, for_data_centres, why_controlled
from waterline.catalog.price_list import Price
from waterline.catalog.servers import HOURS_PER_MONTH, Hosting, ServerPrice, server_price
from waterline.errors import InfeasibleError, InputError, UnknownNameError, nearest
from waterline.fleet import HOURS, Fleet, Model, Pool
from waterline.hardware import Gpu, Node
from waterline.llm import Llm
from waterline.planner.candidates import (
    Candidate,
    Rejection,
    Shape,
    Work,
    bound_requests_per_s,
    price_all,
    shapes,
)
from waterline.planner.needs import needs
from waterline.planner.offers import groups_of
from waterline.planner.purchase import Kind, Task, Way

MOST_NODES = 4  # that a pipeline of bought servers spans
MOST_SHOWN = 4
SCENARIOS = ("low", "median", "high")  # that are prices themselves; others are changes to the median
CHANGE = re.compile(r"(.+?)\s*([+-])\s*(\d+(?:\.\d+)?)\s*%")


class Wish(Struct, frozen=True, kw_only=True):
    """What a purchase must keep to; see `waterline buy --help`."""

    gpus: tuple[str, ...] = ()  # ids; empty: the catalogue
    budget_usd: float | None = None
    given: dict[str, Amount] = {}  # prices of one server, by id of its card
    data_centre: bool = False  # only cards sold for data centres
    new: bool = False  # what is owned does not count
    max_vendor_share: float = 1.0
    export_rule: str = ""
    scenarios: tuple[str, ...] = ("low", "high")
    tender: dict[str, tuple[int, int]] = {}  # servers and GPUs of each, by id of their card: exactly these


class LeftOut(Struct, frozen=True, kw_only=True):
    """A card that was not considered."""

    gpu: str
    reason: Literal["no price", "list price", "planning only", "no power", "not for it", "export rule", "runs nothing"]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A kind of server with what is known of it."""

    kind: Kind
    gpu: Gpu
    price: ServerPrice
    rent: Price | None
    usd_per_month: float  # electricity and hosting
    controlled: str = ""  # why the export rule covers it

    @property
    def owned(self) -> bool:
        return self.price.kind == "owned"

    @property
    def rent_usd_per_month(self) -> float:
        """What renting it costs; infinite where nobody rents it out, nothing where it is owned."""
        if self.owned:
            return 0.0
        return self.rent.usd * self.kind.gpus * HOURS_PER_MONTH if self.rent else math.inf

    def usd(self, scenario: str) -> float:
        """Return its price in a scenario, see `price_factors`."""
        paid = {"low": self.price.low_usd, "high": self.price.high_usd}.get(scenario, self.price.usd)
        factors = price_factors(scenario)
        return paid * factors.get(self.gpu.id, factors.get(self.kind.vendor, factors.get("all", 1.0)))


# --- What can be bought ---------------------------------------------------------------------------------------------


def offers(fleet: Fleet, wish: Wish, terms: Hosting) -> tuple[list[Offer], list[LeftOut]]:
    """Return what is owned and what can be bought, and the cards left out.

    Raises InputError for a card that was named and has no price.
    """
    owned = [] if wish.new else [_owned(pool, fleet.gpu_of(pool), terms) for pool in fleet.pools]
    named = tuple(wish.tender) or wish.gpus
    bought, left_out = [], []
    for id_ in named or [id_ for id_ in catalog.gpus() if id_ != "cpu"]:
        offer = _offer(catalog.find_gpu(id_), wish, terms)
        if isinstance(offer, LeftOut) and (named or id_ in wish.given):
            raise InputError(offer.why)
        unusual = None if named or isinstance(offer, LeftOut) else _unusual(offer, wish)
        if isinstance(offer, LeftOut):
            left_out.append(offer)
        elif unusual:
            left_out.append(unusual)
        else:
            bought.append(offer)
            if offer.controlled:
                left_out.append(LeftOut(gpu=id_, reason="export rule", why=f"{wish.export_rule}: {offer.controlled}"))
    return [*owned, *bought], left_out


def _owned(pool: Pool, gpu: Gpu, terms: Hosting) -> Offer:
    gpus = pool.gpus_per_node
    nothing = ServerPrice(gpu=gpu.id, gpus=gpus, usd=0, low_usd=0, high_usd=0, kind="owned", date="", source="owned")
    return Offer(
        kind=Kind(name=pool.name, vendor=gpu.vendor, gpus=gpus, most=pool.nodes, least=pool.nodes),
        gpu=gpu,
        price=nothing,
        rent=None,
        usd_per_month=0.0 if gpu.tdp_watts is None else terms.usd_per_month(gpu, gpus),
    )


def _offer(gpu: Gpu, wish: Wish, terms: Hosting) -> Offer | LeftOut:
    count, gpus = wish.tender.get(gpu.id, (0, gpu.gpus_per_node))
    priced = price_of_server(gpu.id, gpus, wish.given)
    if priced is None:
        return LeftOut(gpu=gpu.id, reason="no price", why=no_price(gpu.id, gpus))
    if gpu.tdp_watts is None:
        why = f"the power of '{gpu.id}' is not known, so neither is what it costs to run; it cannot be weighed"
        return LeftOut(gpu=gpu.id, reason="no power", why=why)
    rent = catalog.usd_per_gpu_hour(gpu.id)
    return Offer(
        kind=Kind(name=gpu.id, vendor=gpu.vendor, gpus=gpus, most=count or None, least=count),
        gpu=gpu,
        price=priced,
        rent=rent if rent is not None and rent.kind != "purchase" else None,
        usd_per_month=terms.usd_per_month(gpu, gpus),
        controlled=why_controlled(gpu, find_rule(wish.export_rule)) if wish.export_rule else "",
    )


def price_of_server(gpu: str, gpus: int, given: Mapping[str, Amount]) -> ServerPrice | None:
    """Return what a server with so many cards costs: as given, else the catalogue's, in proportion to the cards."""
    if gpu in given:
        low, high = given[gpu].low_usd, given[gpu].high_usd
        middle = (low + high) / 2
        return ServerPrice(
            gpu=gpu, gpus=gpus, usd=middle, low_usd=low, high_usd=high, kind="given", date="today", source="--price"
        )
    found = server_price(gpu)
    if found is None or found.gpus == gpus:
        return found
    part = gpus / found.gpus
    return replace(found, gpus=gpus, usd=found.usd * part, low_usd=found.low_usd * part, high_usd=found.high_usd * part)


def no_price(gpu: str, gpus: int) -> str:
    """Say that a price is missing, and how to give it."""
    server = f"a server of {gpus}" if gpus > 1 else "a server with one"
    return f"no purchase price of '{gpu}' is known. Give that of {server}: --price \"{gpu}=250000 USD\""


def _unusual(offer: Offer, wish: Wish) -> LeftOut | None:
    """Say why a card is considered only when it is named."""
    gpu, priced = offer.gpu, offer.price
    if wish.data_centre and not for_data_centres(gpu):
        return LeftOut(gpu=gpu.id, reason="not for it", why="not sold for data centres")
    if gpu.support != "full":
        return LeftOut(gpu=gpu.id, reason="planning only", why="no engine is started on it; --gpu considers it")
    if priced.kind == "list":
        why = f"only its list price at launch in {priced.date} is known; --gpu takes that, --price gives another"
        return LeftOut(gpu=gpu.id, reason="list price", why=why)
    return None


def price_factors(scenario: str) -> dict[str, float]:
    """Read ``nvidia +30 %``, ``mi300x -10 %`` or several with commas; return factors by vendor, card or ``all``.

    SCENARIOS have none. Raises InputError or UnknownNameError, which say what to write.
    """
    factors: dict[str, float] = {}
    for part in () if scenario in SCENARIOS else scenario.split(","):
        found = CHANGE.fullmatch(part.strip())
        if not found:
            raise InputError(
                f"--scenario '{scenario}' is not understood. Write low, high, or changes: 'nvidia +30 %, mi300x -10 %'."
            )
        factor = 1 + float(f"{found[2]}{found[3]}") / 100
        if factor <= 0:
            raise InputError(f"--scenario '{scenario}' leaves nothing of the price. A fall must stay below 100 %.")
        factors[_vendor_or_card(found[1])] = factor
    return factors


def _vendor_or_card(who: str) -> str:
    vendors = sorted({gpu.vendor for gpu in catalog.gpus().values()} - {"cpu"})
    if who.lower() in {"all", *vendors}:
        return who.lower()
    try:
        return catalog.find_gpu(who).id
    except UnknownNameError as error:
        offered = nearest(who, [*vendors, *catalog.gpus()])
        raise UnknownNameError(f"--scenario: '{who}' is no vendor and no card. {offered}") from error


# --- What is asked, and what can serve it ---------------------------------------------------------------------------


def hard_hours(fleet: Fleet) -> list[int]:
    """Return the hours that no other hour is at least as hard as, in every demand; of equal ones the first."""
    rates = [
        demand.hourly_requests_per_s or (1.0,) * HOURS for demand in fleet.demand
    ]  # a trace is planned at its peak
    by_hour = [tuple(row[hour] for row in rates) for hour in range(HOURS)]
    distinct = [hour for hour in range(HOURS) if by_hour[hour] not in by_hour[:hour]]

    def covered(hour: int) -> bool:
        return any(
            other != hour and all(a >= b for a, b in zip(by_hour[other], by_hour[hour], strict=True))
            for other in distinct
        )

    return [hour for hour in distinct if not covered(hour)]


def tasks(fleet: Fleet, found: Sequence[Offer]) -> list[Task]:
    """Return the work of the hardest hours with every way to do it. Raises InfeasibleError where there is none."""
    hours = hard_hours(fleet)
    asked_of = {demand.model for demand in fleet.demand}
    made = []
    for model in fleet.models:
        by_hour = {hour: needs(fleet, model)[hour] for hour in hours}
        kept = {hour: need for hour, need in by_hour.items() if need.requests_per_s > 0 or model.name not in asked_of}
        works = list(dict.fromkeys(need.work for need in kept.values()))
        ways = dict(zip(works, _ways(fleet.llm_of(model), model, works, found), strict=True))
        made += [
            Task(model=model.name, hour=hour, requests_per_s=need.requests_per_s, ways=ways[need.work])
            for hour, need in kept.items()
        ]
    return made


def _ways(llm: Llm, model: Model, works: Sequence[Work], found: Sequence[Offer]) -> list[tuple[Way, ...]]:
    """Return, for each work, the ways to run a model that no other way on the same kind of server replaces.

    Shapes are priced the smallest first. What could not be worth its GPUs even at the rate no hardware exceeds, beside
    what was priced already, is not priced.
    """
    wanted = [
        (index, shape)
        for index, offer in enumerate(found)
        for shape in shapes(
            llm,
            Node(gpu=offer.gpu, gpus=offer.kind.gpus),
            MOST_NODES if offer.kind.most is None else offer.kind.most,
            model.precisions,
            model.engine,
            model.measured,
        )
        if shape.role == "both"
    ]
    ways: dict[Work, list[Way]] = {work: [] for work in works}
    for gpus in sorted({shape.layout.gpus for _, shape in wanted}):
        for work in works:
            worth = []
            for index, shape in wanted:
                if shape.layout.gpus == gpus and (bound := bound_requests_per_s(shape, work)) > 0:
                    at_best = _way(index, shape, bound)
                    if not any(_replaces(way, at_best) for way in ways[work]):
                        worth.append((index, shape))
            (priced,) = price_all([shape for _, shape in worth], [work])
            ways[work] += [
                _way(index, shape, one.requests_per_s)
                for (index, shape), one in zip(worth, priced, strict=True)
                if isinstance(one, Candidate)
            ]
    for work, known in ways.items():
        if not known:
            raise InfeasibleError(
                _why_nowhere(model, work, [(found[index].kind.name, shape) for index, shape in wanted])
            )
    return [
        tuple(way for way in known if not any(_replaces(other, way) for other in known if other is not way))
        for known in ways.values()
    ]


def _way(index: int, shape: Shape, requests_per_s: float) -> Way:
    return Way(
        kind=index,
        layout=shape.layout,
        precision=shape.precision,
        requests_per_s=requests_per_s,
        parts=groups_of(shape.layout, shape.node.gpus),
    )


def _replaces(other: Way, way: Way) -> bool:
    """Whether copies of the other, on the same GPUs, serve at least as much; of equals one stays."""
    if other.kind != way.kind or max(other.parts) > max(way.parts) or other.layout.gpus > way.layout.gpus:
        return False
    copies = way.layout.gpus // other.layout.gpus
    if copies == 1 and other.requests_per_s == way.requests_per_s and other.layout.gpus == way.layout.gpus:
        return (other.precision, str(other.layout)) < (way.precision, str(way.layout))
    return copies * other.requests_per_s >= way.requests_per_s


def _why_nowhere(model: Model, work: Work, wanted: Sequence[tuple[str, Shape]]) -> str:
    (priced,) = price_all([shape for _, shape in wanted], [work])
    missed = [(name, one) for (name, _), one in zip(wanted, priced, strict=True) if isinstance(one, Rejection)]
    nearest_miss: dict[str, Rejection] = {}
    for name, rejection in sorted(missed, key=lambda pair: pair[1].shortfall):
        nearest_miss.setdefault(name, rejection)
    shown = list(nearest_miss.items())[:MOST_SHOWN]
    told = "; ".join(f"on {name} {miss.precision} {miss.layout}: {miss.reason}" for name, miss in shown)
    return (
        f"model '{model.name}' runs on none of the {len(nearest_miss)} kinds of servers considered. The nearest "
        f"misses: {told}. Allow a smaller precision, loosen its slo, or consider other cards with --gpu."
    )
