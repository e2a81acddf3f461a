"""What a whole server costs to buy and draws: `node_prices.csv`, else its cards of `prices.csv` and `servers.toml`."""

import csv
import math
from functools import cache
from importlib import resources
from typing import Literal

import msgspec
from msgspec import Struct

from waterline.catalog.accelerators import table
from waterline.catalog.currencies import find_currency
from waterline.catalog.price_list import prices
from waterline.hardware import Gpu

PriceKind = Literal["server", "card", "list", "given", "owned"]


class ServerPrice(Struct, frozen=True, kw_only=True):
    """What one server with its cards costs to buy, and who says so.

    kind:
        ``server``  somebody asked this for whole servers
        ``card``    the cards as asked on a market, and a host around them
        ``list``    the cards at their maker's list price at launch, and a host around them
        ``given``   told by the person who asks
        ``owned``   bought already: nothing
    """

    gpu: str
    gpus: int
    usd: float  # the median of what was seen
    low_usd: float
    high_usd: float
    kind: PriceKind
    date: str
    source: str
    verified: int = 0  # prices seen somewhere …
    recalled: int = 0  # … and from memory


class _Host(Struct, frozen=True, forbid_unknown_fields=True):
    gpus: int
    usd: float
    source: str


class Servers(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`servers.toml`; its header says what the keys mean."""

    rated_over_tdp: float
    rated_source: str
    drawn_over_tdp: float
    drawn_source: str
    idle_over_tdp: float
    idle_source: str
    spread: float
    spread_source: str
    usd_per_kind: float
    kind_source: str
    host: tuple[_Host, ...]


@cache
def servers() -> Servers:
    """Return what is known of all servers."""
    text = resources.files("waterline.catalog").joinpath("servers.toml").read_bytes()
    return msgspec.toml.decode(text, type=Servers)


@cache
def node_prices() -> dict[str, ServerPrice]:
    """Return the prices of whole servers, by the id of their card; one each."""
    text = resources.files("waterline.catalog").joinpath("node_prices.csv").read_text(encoding="utf-8")
    return {row["gpu"]: _node_price(row) for row in csv.DictReader(text.splitlines())}


def _node_price(row: dict[str, str]) -> ServerPrice:
    per_usd = find_currency(row["currency"]).per_usd
    return ServerPrice(
        gpu=row["gpu"],
        gpus=int(row["gpus"]),
        usd=float(row["median"]) / per_usd,
        low_usd=float(row["low"]) / per_usd,
        high_usd=float(row["high"]) / per_usd,
        kind="server",
        date=row["date"],
        source=row["source"],
        verified=int(row["verified"]),
        recalled=int(row["recalled"]),
    )


def host_usd(gpus: int) -> float:
    """Return what a server costs without its cards; beyond the largest we know, in proportion to them."""
    hosts = sorted(servers().host, key=lambda host: host.gpus)
    for host in hosts:
        if gpus <= host.gpus:
            return host.usd
    return hosts[-1].usd * gpus / hosts[-1].gpus


def server_price(gpu_id: str) -> ServerPrice | None:
    """Return the price of the server a card is usually sold in, or None where nothing is known."""
    if gpu_id in node_prices():
        return node_prices()[gpu_id]
    gpu = table()[gpu_id]
    bought = next((price for price in prices() if price.gpu == gpu_id and price.kind == "purchase"), None)
    if bought is not None:
        return _around_cards(gpu, bought.usd, "card", bought.date, bought.source, bought.verified, bought.recalled)
    if gpu.msrp_usd is not None:
        return _around_cards(gpu, gpu.msrp_usd, "list", str(gpu.release_year or ""), gpu.source, 0, 1)
    return None


def _around_cards(
    gpu: Gpu, card_usd: float, kind: PriceKind, date: str, source: str, verified: int, recalled: int
) -> ServerPrice:
    usd, spread = gpu.gpus_per_node * card_usd + host_usd(gpu.gpus_per_node), servers().spread
    return ServerPrice(
        gpu=gpu.id,
        gpus=gpu.gpus_per_node,
        usd=usd,
        low_usd=usd * (1 - spread),
        high_usd=usd * (1 + spread),
        kind=kind,
        date=date,
        source=source,
        verified=verified,
        recalled=recalled,
    )


def rated_watts(gpu: Gpu, gpus: int) -> float | None:
    """Return the power a data centre holds ready for a server; None where the card's TDP is not known."""
    return None if gpu.tdp_watts is None else gpus * gpu.tdp_watts * servers().rated_over_tdp


def idle_watts(gpu: Gpu) -> float | None:
    """Return the power a card draws while a model waits in its memory; None where its TDP is not known."""
    return None if gpu.tdp_watts is None else gpu.tdp_watts * servers().idle_over_tdp


def drawn_watts(gpu: Gpu, gpus: int) -> float | None:
    """Return the power a server draws while it serves; None where the card's TDP is not known."""
    return None if gpu.tdp_watts is None else gpus * gpu.tdp_watts * servers().drawn_over_tdp


class Hosting(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it costs to run a server one owns: `hosting.toml`, each figure with its source."""

    lifetime_years: float
    lifetime_source: str
    usd_per_kwh: float
    usd_per_kwh_date: str
    usd_per_kwh_source: str
    usd_per_kw_month: float  # of rated power: space, cooling, staff; electricity apart
    usd_per_kw_month_date: str
    usd_per_kw_month_source: str
    pue: float  # power of the building over power of its servers
    pue_date: str
    pue_source: str

    @property
    def lifetime_months(self) -> float:
        return 12 * self.lifetime_years

    def usd_per_month(self, gpu: Gpu, gpus: int) -> float:
        """Return electricity and hosting of one server; a card of unknown TDP is not counted, so check before."""
        rated, drawn = rated_watts(gpu, gpus), drawn_watts(gpu, gpus)
        if rated is None or drawn is None:
            return math.nan
        energy_usd = drawn / 1000 * self.pue * HOURS_PER_MONTH * self.usd_per_kwh
        return energy_usd + rated / 1000 * self.usd_per_kw_month


HOURS_PER_MONTH = 365.25 * 24 / 12


@cache
def hosting() -> Hosting:
    """Return the usual terms."""
    text = resources.files("waterline.catalog").joinpath("hosting.toml").read_bytes()
    return msgspec.toml.decode(text, type=Hosting)
