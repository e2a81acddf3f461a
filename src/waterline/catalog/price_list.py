"""`prices.csv`: what an accelerator costs, one row a card and kind of price."""

import csv
from functools import cache
from importlib import resources

from msgspec import Struct

LIFETIME_YEARS = 4
LIFETIME_HOURS = LIFETIME_YEARS * 365.25 * 24


class Price(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one accelerator costs, and who says so.

    kind:
        ``on_demand``  rented by the hour from a provider
        ``spot``       the same, but taken away at short notice
        ``community``  rented by the hour from another person's machine
        ``purchase``   bought
        ``own``        the processor of this machine: nothing
    """

    gpu: str
    kind: str
    usd: float  # the median of what was seen
    low_usd: float
    high_usd: float
    unit: str  # "usd_per_gpu_hour", or "usd" for a purchase
    date: str  # ISO date, or its year where no more is known
    source: str
    verified: int = 0  # prices seen in a price list …
    recalled: int = 0  # … and prices from memory

    @property
    def usd_per_gpu_hour(self) -> float:
        """The price of an hour; of a purchase, its price over LIFETIME_YEARS at full time, power and housing apart."""
        return self.usd / LIFETIME_HOURS if self.kind == "purchase" else self.usd


@cache
def prices() -> tuple[Price, ...]:
    """Return every price of the catalogue."""
    text = resources.files("waterline.catalog").joinpath("prices.csv").read_text(encoding="utf-8")
    return tuple(
        Price(
            gpu=row["gpu"],
            kind=row["kind"],
            usd=float(row["median"]),
            low_usd=float(row["low"]),
            high_usd=float(row["high"]),
            unit=row["unit"],
            date=row["date"],
            source=row["source"],
            verified=int(row["verified"]),
            recalled=int(row["recalled"]),
        )
        for row in csv.DictReader(text.splitlines())
    )


def hourly(gpu_id: str) -> Price | None:
    """Return the hourly price of an id; see `waterline.catalog.usd_per_gpu_hour`."""
    if gpu_id == "cpu":
        return Price(
            gpu=gpu_id,
            kind="own",
            usd=0.0,
            low_usd=0.0,
            high_usd=0.0,
            unit="usd_per_gpu_hour",
            date="",
            source="your own machine, counted as free",
        )
    kinds = {price.kind: price for price in prices() if price.gpu == gpu_id}
    return kinds.get("on_demand") or kinds.get("community") or kinds.get("purchase")
