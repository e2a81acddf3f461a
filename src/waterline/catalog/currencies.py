"""`currencies.csv`: what a dollar is worth elsewhere at a dated rate, and amounts of money as people write them."""

import csv
import re
from functools import cache
from importlib import resources

from msgspec import Struct

from waterline.errors import InputError, UnknownNameError

SIGNS = {"$": "USD", "€": "EUR", "£": "GBP", "₹": "INR", "₩": "KRW"}
MULTIPLES = {
    "": 1.0, "k": 1e3, "m": 1e6, "mn": 1e6, "mio": 1e6, "million": 1e6, "g": 1e9, "b": 1e9, "bn": 1e9, "billion": 1e9,
    "万": 1e4, "亿": 1e8,
}  # fmt: skip
NUMBER = r"(\d[\d,_ ]*(?:\.\d+)?|\.\d+)\s*(k|m|mn|mio|million|g|b|bn|billion|万|亿)?"
AMOUNT = re.compile(
    rf"([$€£₹₩])?\s*{NUMBER}(?:\s*(?:-|–|to|\.\.)\s*{NUMBER})?\s*([a-z]{{3}})?", re.IGNORECASE | re.ASCII
)
EXAMPLES = "Write a number above 0 and a currency, like '2500000 USD', '2.5M USD' or '20M CNY'"


class Currency(Struct, frozen=True, kw_only=True):
    """A currency, and how much of it a US dollar buys."""

    code: str
    name: str
    per_usd: float
    date: str  # of the rate; "" for the dollar itself
    recalled: bool  # from memory
    source: str

    def text(self, usd: float) -> str:
        """Say an amount of dollars in this currency: ``5.80 M CNY``, ``$361,000``."""
        amount = usd * self.per_usd
        if self.code == "USD":
            return f"${amount:,.0f}" if abs(amount) < 1e6 else f"${amount / 1e6:,.2f} M"
        return f"{amount:,.0f} {self.code}" if abs(amount) < 1e6 else f"{amount / 1e6:,.2f} M {self.code}"


class Amount(Struct, frozen=True, kw_only=True):
    """An amount of money, or a range of it, as somebody wrote it."""

    low_usd: float
    high_usd: float
    currency: Currency

    @property
    def is_range(self) -> bool:
        return self.low_usd < self.high_usd


@cache
def currencies() -> dict[str, Currency]:
    """Return every currency by its code, the dollar first."""
    text = resources.files("waterline.catalog").joinpath("currencies.csv").read_text(encoding="utf-8")
    return {
        row["code"]: Currency(
            code=row["code"],
            name=row["name"],
            per_usd=float(row["per_usd"]),
            date=row["date"],
            recalled=row["recalled"] == "1",
            source=row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    }


def find_currency(code: str) -> Currency:
    """Return the currency of an ISO code. Raises UnknownNameError that lists those we have a rate of."""
    found = currencies().get(code.upper())
    if found is None:
        known = ", ".join(currencies())
        raise UnknownNameError(
            f"no rate is known for the currency '{code}'. Known: {known}. Or convert it and write USD."
        )
    return found


def parse_amount(text: str, what: str) -> Amount:
    """Read ``20000000 CNY``, ``2.5M USD``, ``$2.5M`` or a range, ``5.2-6.4 M CNY``.

    Args:
        text: what somebody wrote.
        what: what it is, for the error: ``--budget``.

    Raises InputError, or UnknownNameError for the currency; each says what to write.
    """
    found = AMOUNT.fullmatch(text.strip())
    if not found:
        raise InputError(f"{what} '{text}' is not an amount of money. {EXAMPLES}; a range is '5.2-6.4 M CNY'.")
    sign, low, low_multiple, high, high_multiple, code = found.groups()
    if code is None and sign is None:
        raise InputError(f"{what} '{text}' does not say in which currency. {EXAMPLES}.")
    currency = find_currency(code or SIGNS[sign])
    first = _number(low, low_multiple or (high_multiple if high else None))
    last = _number(high, high_multiple) if high else first
    if not 0 < first <= last:
        raise InputError(f"{what} '{text}' must be above 0, and a range must rise. {EXAMPLES}.")
    return Amount(low_usd=first / currency.per_usd, high_usd=last / currency.per_usd, currency=currency)


def _number(digits: str, multiple: str | None) -> float:
    return float(re.sub(r"[,_ ]", "", digits)) * MULTIPLES[(multiple or "").lower()]
