"""What to buy for a demand, or for a budget: the cheapest servers over their lifetime, and what each safeguard costs.

The pools of a fleet are owned and serve first; what is missing is bought as whole servers, of every card of the
catalogue that somebody asks a price for today, or of those that are named. A budget pays the servers; what is made
least is their price and what they cost to run (electricity, hosting) over their lifetime, and something for each
further kind of server.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import Struct
from msgspec.structs import replace

from waterline import catalog
from waterline.catalog.servers import Hosting, ServerPrice, drawn_watts, rated_watts, servers
from waterline.errors import InfeasibleError, InputError
from waterline.fleet import Fleet
from waterline.plan import Layout
from waterline.planner.market import LeftOut, Offer, Wish, offers, tasks
from waterline.planner.purchase import GAP, WHOLE, Choice, Kind, Market, Task, cheapest, most

NOTABLE = 0.1  # of the money: a card whose loss is looked into


# --- The answer -----------------------------------------------------------------------------------------------------


class Servers(Struct, frozen=True, kw_only=True):
    """Servers of one kind in a purchase."""

    name: str  # of the card, or of the pool that is owned
    gpu: str
    vendor: str
    servers: int
    gpus_per_server: int
    owned: bool
    price: ServerPrice
    usd: float  # for all of them, at the prices of the purchase …
    low_usd: float  # … and at the lowest and highest seen
    high_usd: float
    rated_kw: float
    drawn_kw: float
    usd_per_month: float  # electricity and hosting
    rent_usd_per_month: float | None = None  # of as many such cards round the clock; None: no rent known
    rent_kind: str = ""
    rent_date: str = ""
    break_even_months: float | None = None  # after which renting them would have cost more; None: never, or unknown


class Replicas(Struct, frozen=True, kw_only=True):
    """Replicas that are alike, at one of the hardest hours."""

    model: str
    hour: int
    name: str  # of the card or the pool
    precision: str
    layout: Layout
    replicas: int
    gpus: int


class Serving(Struct, frozen=True, kw_only=True):
    """What becomes of a model's demand at one of the hardest hours."""

    model: str
    hour: int
    asked_requests_per_s: float
    served_requests_per_s: float

    @property
    def fraction(self) -> float:
        return self.served_requests_per_s / self.asked_requests_per_s if self.asked_requests_per_s else 1.0


class Purchase(Struct, frozen=True, kw_only=True):
    """Servers to buy beside those that are owned, and what they do."""

    servers: tuple[Servers, ...]
    replicas: tuple[Replicas, ...]
    serving: tuple[Serving, ...]  # every model at every hard hour
    served_fraction: float  # of all requests at the hardest hours
    usd: float  # to buy
    low_usd: float
    high_usd: float
    usd_per_month: float  # to run
    kinds_usd: float  # for each kind of server beyond the first: to qualify it, and spare parts
    lifetime_usd: float  # all three, over the lifetime
    gpus: int  # bought
    rated_kw: float
    vendor_shares: dict[str, float]  # of the money spent
    gap: float  # a cheaper purchase could at best be cheaper by this fraction

    @property
    def whole(self) -> bool:
        """Whether everything asked is served."""
        return self.served_fraction >= WHOLE

    @property
    def bought(self) -> tuple[Servers, ...]:
        return tuple(one for one in self.servers if not one.owned)


class Safeguard(Struct, frozen=True, kw_only=True):
    """One safeguard, and the best purchase without it."""

    name: str
    without: Purchase
    usd: float  # it adds to the price
    lifetime_usd: float  # it adds over the lifetime
    served_fraction: float  # it takes from what is served


class Loss(Struct, frozen=True, kw_only=True):
    """What becomes of the purchase when one of its cards cannot be had."""

    gpu: str
    instead: Purchase | None  # None: nothing else serves
    usd: float = 0.0
    lifetime_usd: float = 0.0
    served_fraction: float = 0.0


class Scenario(Struct, frozen=True, kw_only=True):
    """Other prices: what the same servers would cost, and what would be bought then."""

    name: str
    same_usd: float
    best: Purchase | None


class Rent(Struct, frozen=True, kw_only=True):
    """The cheapest servers to rent round the clock for the whole demand, of the cards one may buy."""

    servers: dict[str, int]
    usd_per_month: float
    break_even_months: float | None  # after which the purchase has cost less; None: never, or it serves less


class Advice(Struct, frozen=True, kw_only=True):
    """What to buy, and everything it was weighed against."""

    fleet: str
    years: float
    hosting: Hosting
    budget_usd: float | None
    best: Purchase
    least: Purchase | None  # the least money that serves everything; None: nothing serves everything
    safeguards: tuple[Safeguard, ...]
    losses: tuple[Loss, ...]
    scenarios: tuple[Scenario, ...]
    rent: Rent | None
    left_out: tuple[LeftOut, ...]
    why_not: str  # nothing serves everything; "" where something does
    notes: tuple[str, ...]


def buy(fleet: Fleet, wish: Wish, terms: Hosting) -> Advice:
    """Advise on a purchase. Raises InfeasibleError or InputError, each saying what would help."""
    found, left_out = offers(fleet, wish, terms)
    _check_share(found, wish.max_vendor_share)
    desk = Desk(found, tasks(fleet, found), wish, terms)
    least = desk.least() if not wish.tender else None
    best = desk.best(enough=least is not None and desk.affords(least))
    if least is None and wish.budget_usd is None and not wish.tender:
        raise InfeasibleError(desk.why_not())
    assert best is not None  # noqa: S101 - without a budget it serves everything, with one it may serve nothing
    useless = _useless(desk)
    return Advice(
        fleet=fleet.name,
        years=terms.lifetime_years,
        hosting=terms,
        budget_usd=wish.budget_usd,
        best=best,
        least=least,
        safeguards=desk.safeguards(best),
        losses=desk.losses(best),
        scenarios=tuple(desk.scenario(name, best) for name in (() if wish.tender else wish.scenarios)),
        rent=desk.rented(best),
        left_out=(*left_out, *useless),
        why_not=desk.why_not() if least is None and not best.whole and not wish.tender else "",
        notes=_notes(best),
    )


def _check_share(found: Sequence[Offer], share: float) -> None:
    """Refuse a share that could only be kept by money split to the cent. Raises InputError."""
    vendors = sorted({one.kind.vendor for one in found if not one.owned and not one.controlled})
    if share < 1 and 0 < share * len(vendors) <= 1 + 1e-9:
        raise InputError(
            f"a largest share of {share:g} leaves no room to choose: the cards considered come from "
            f"{' and '.join(vendors)}. Allow more than {1 / len(vendors):.2f}, or "
            "consider more vendors with --gpu."
        )


def _useless(desk: "Desk") -> list[LeftOut]:
    used = {way.kind for task in desk.tasks for way in task.ways}
    return [
        LeftOut(gpu=one.gpu.id, reason="runs nothing", why="runs none of the models within their SLO")
        for index, one in enumerate(desk.offers)
        if index not in used and not one.owned
    ]


def _notes(best: Purchase) -> tuple[str, ...]:
    gaming = [one.gpu for one in best.bought if "geforce" in catalog.find_gpu(one.gpu).name.lower()]
    if not gaming:
        return ()
    named = ", ".join(gaming)
    licence = "NVIDIA's licence of GeForce drivers excludes data centres"
    return (f"{named}: {licence}; --data-centre leaves out cards that are not sold for them.",)


# --- The choice, and what it is weighed against ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Desk:
    """Weighs purchases: the same offers and tasks on different terms."""

    offers: Sequence[Offer]
    tasks: Sequence[Task]
    wish: Wish
    terms: Hosting
    gap: float = GAP

    @property
    def kinds(self) -> list[Kind]:
        return [offer.kind for offer in self.offers]

    def affords(self, purchase: Purchase) -> bool:
        """Return whether the budget pays for a purchase, or nearly."""
        return self.wish.budget_usd is None or purchase.usd <= self.wish.budget_usd * (1 + 2 * self.gap)

    def best(
        self, scenario: str = "median", *, wish: Wish | None = None, banned: str = "", enough: bool = True
    ) -> Purchase | None:
        """Return the purchase that is cheapest over its lifetime; where the budget is too small, what serves most.

        Args:
            scenario: see `price_factors`.
            wish: another than that of the desk.
            banned: a card that cannot be had.
            enough: whether the budget might do; it is known not to where a milder wish was out of reach already.
        """
        wish = wish or self.wish
        market = self._market(scenario, wish, banned)
        choice = cheapest(self.kinds, self.tasks, market, self.gap) if enough and not wish.tender else None
        if choice is None and (wish.tender or wish.budget_usd is not None):
            choice = most(self.kinds, self.tasks, market, self.gap)
        return self._purchase(choice, scenario) if choice else None

    def least(self) -> Purchase | None:
        """Return the purchase that serves everything for the least money, whatever it costs to run."""
        market = self._market("median", replace(self.wish, budget_usd=None))
        prices_only = Market(prices=market.prices, costs=market.prices, max_vendor_share=market.max_vendor_share)
        choice = cheapest(self.kinds, self.tasks, prices_only, self.gap)
        return self._purchase(choice, "median") if choice else None

    def safeguards(self, best: Purchase) -> tuple[Safeguard, ...]:
        """Return for each safeguard the purchase without it."""
        found = []
        if self.wish.max_vendor_share < 1:
            name = f"at most {self.wish.max_vendor_share:.0%} to one vendor"
            found.append(self._safeguard(name, best, self.best(wish=replace(self.wish, max_vendor_share=1.0))))
        if self.wish.export_rule:
            name = f"export rule {self.wish.export_rule}"
            found.append(self._safeguard(name, best, self.best(wish=replace(self.wish, export_rule=""))))
        return tuple(found)

    def _safeguard(self, name: str, best: Purchase, without: Purchase | None) -> Safeguard:
        assert without is not None  # noqa: S101 - what is bought with a safeguard can be bought without it
        return Safeguard(
            name=name,
            without=without,
            usd=best.usd - without.usd,
            lifetime_usd=best.lifetime_usd - without.lifetime_usd,
            served_fraction=without.served_fraction - best.served_fraction,
        )

    def losses(self, best: Purchase) -> tuple[Loss, ...]:
        """Return for each card that a good part of the money goes to what would be bought instead."""
        if self.wish.tender:
            return ()
        return tuple(self._loss(one.gpu, best) for one in best.bought if one.usd >= NOTABLE * best.usd)

    def _loss(self, gpu: str, best: Purchase) -> Loss:
        instead = self.best(banned=gpu, enough=best.whole)
        if instead is None:
            return Loss(gpu=gpu, instead=None)
        return Loss(
            gpu=gpu,
            instead=instead,
            usd=instead.usd - best.usd,
            lifetime_usd=instead.lifetime_usd - best.lifetime_usd,
            served_fraction=best.served_fraction - instead.served_fraction,
        )

    def scenario(self, name: str, best: Purchase) -> Scenario:
        """Return what other prices make of a purchase."""
        prices = {offer.kind.name: offer.usd(name) for offer in self.offers}
        return Scenario(
            name=name,
            same_usd=math.fsum(one.servers * prices[one.name] for one in best.bought),
            best=self.best(name),
        )

    def rented(self, best: Purchase) -> Rent | None:
        """Return the cheapest rental that serves everything; None where there is none."""
        rents = [offer.rent_usd_per_month for offer in self.offers]
        kinds = [
            offer.kind if offer.owned else Kind(name=offer.gpu.id, vendor=offer.kind.vendor, gpus=offer.kind.gpus)
            for offer in self.offers
        ]
        choice = cheapest(kinds, self.tasks, Market(prices=rents, costs=rents), self.gap)
        if choice is None:
            return None
        bought = {
            offer.kind.name: count
            for offer, count in zip(self.offers, choice.servers, strict=True)
            if count and not offer.owned
        }
        usd = math.fsum(rents[index] * count for index, count in enumerate(choice.servers) if count)
        saved = usd - best.usd_per_month
        return Rent(
            servers=bought,
            usd_per_month=usd,
            break_even_months=best.usd / saved if best.whole and best.usd and saved > 0 else None,
        )

    def why_not(self) -> str:
        """Say why nothing serves everything."""
        share = self.wish.max_vendor_share
        if share < 1 and self.best(wish=replace(self.wish, max_vendor_share=1.0)) is not None:
            return (
                f"no purchase serves the demand with at most {share:.0%} of its money to one vendor. Consider more "
                "cards of the others with --gpu, or allow a larger share."
            )
        if self.wish.export_rule and self.best(wish=replace(self.wish, export_rule="")) is not None:
            return (
                f"no purchase serves the demand without cards under the export rule of {self.wish.export_rule}. Accept "
                "smaller precisions, or do without the rule."
            )
        return "no purchase of the cards considered serves the demand. Consider others with --gpu."

    def _market(self, scenario: str, wish: Wish, banned: str = "") -> Market:
        prices = [
            math.inf
            if not offer.owned and (offer.gpu.id == banned or (wish.export_rule and offer.controlled))
            else offer.usd(scenario)
            for offer in self.offers
        ]
        costs = [
            0.0 if offer.owned else paid + offer.usd_per_month * self.terms.lifetime_months
            for offer, paid in zip(self.offers, prices, strict=True)
        ]
        return Market(
            prices=prices,
            costs=costs,
            usd_per_kind=servers().usd_per_kind,
            budget_usd=math.inf if wish.budget_usd is None or wish.tender else wish.budget_usd,
            max_vendor_share=wish.max_vendor_share,
        )

    def _purchase(self, choice: Choice, scenario: str) -> Purchase:
        lines = tuple(
            self._servers(offer, count, scenario)
            for offer, count in zip(self.offers, choice.servers, strict=True)
            if count
        )
        bought = [one for one in lines if not one.owned]
        usd = math.fsum(one.usd for one in bought)
        usd_per_month = math.fsum(one.usd_per_month for one in bought)
        kinds_usd = max(0, len(bought) - 1) * servers().usd_per_kind
        asked = math.fsum(task.requests_per_s for task in self.tasks)
        vendors = sorted({one.vendor for one in bought})
        return Purchase(
            servers=lines,
            replicas=self._replicas(choice),
            serving=self._serving(choice),
            served_fraction=math.fsum(choice.served) / asked if asked else self._running_fraction(choice),
            usd=usd,
            low_usd=math.fsum(one.low_usd for one in bought),
            high_usd=math.fsum(one.high_usd for one in bought),
            usd_per_month=usd_per_month,
            kinds_usd=kinds_usd,
            lifetime_usd=usd + usd_per_month * self.terms.lifetime_months + kinds_usd,
            gpus=sum(one.servers * one.gpus_per_server for one in bought),
            rated_kw=math.fsum(one.rated_kw for one in bought),
            vendor_shares={
                vendor: math.fsum(one.usd for one in bought if one.vendor == vendor) / usd for vendor in vendors if usd
            },
            gap=choice.gap,
        )

    def _servers(self, offer: Offer, count: int, scenario: str) -> Servers:
        usd, running = count * offer.usd(scenario), count * offer.usd_per_month
        rent = count * offer.rent_usd_per_month if offer.rent else None
        return Servers(
            name=offer.kind.name,
            gpu=offer.gpu.id,
            vendor=offer.kind.vendor,
            servers=count,
            gpus_per_server=offer.kind.gpus,
            owned=offer.owned,
            price=offer.price,
            usd=usd,
            low_usd=count * offer.price.low_usd,
            high_usd=count * offer.price.high_usd,
            rated_kw=count * (rated_watts(offer.gpu, offer.kind.gpus) or 0.0) / 1000,
            drawn_kw=count * (drawn_watts(offer.gpu, offer.kind.gpus) or 0.0) / 1000,
            usd_per_month=running,
            rent_usd_per_month=rent,
            rent_kind=offer.rent.kind if offer.rent else "",
            rent_date=offer.rent.date if offer.rent else "",
            break_even_months=usd / (rent - running) if rent is not None and rent > running else None,
        )

    def _running_fraction(self, choice: Choice) -> float:
        """Return the fraction of models that have a replica, where nobody asks anything of any."""
        return len({task for task, _ in choice.replicas}) / len(self.tasks)

    def _replicas(self, choice: Choice) -> tuple[Replicas, ...]:
        return tuple(
            Replicas(
                model=self.tasks[task].model,
                hour=self.tasks[task].hour,
                name=self.offers[one.kind].kind.name,
                precision=one.precision,
                layout=one.layout,
                replicas=count,
                gpus=count * one.layout.gpus,
            )
            for (task, way), count in choice.replicas.items()
            for one in [self.tasks[task].ways[way]]
        )

    def _serving(self, choice: Choice) -> tuple[Serving, ...]:
        return tuple(
            Serving(
                model=task.model, hour=task.hour, asked_requests_per_s=task.requests_per_s, served_requests_per_s=served
            )
            for task, served in zip(self.tasks, choice.served, strict=True)
        )
