"""What the ledger keeps, as others see it: keys with their quotas, and one settlement for every request.

Clock times are microseconds since 1970 in UTC, money is in billionths of a dollar: integers, so that sums are exact.
"""

import os
import secrets
import time
from collections.abc import Collection
from datetime import date
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from operator import attrgetter
from typing import Literal, get_args

from msgspec import Struct
from msgspec.structs import replace

from waterline.errors import InputError
from waterline.outcome import Status
from waterline.units import DAY_S, GIGA, MEGA

Outcome = Literal[Status, "interrupted"]  # interrupted: its gateway died; charged what was last noted of it
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
MOST = 2**63 - 1  # what a column holds
MOST_OF_A_REQUEST = 10**15  # tokens, microseconds of GPUs, billionths of a dollar: no request comes near
EPOCH = date(1970, 1, 1).toordinal()


class Quotas(Struct, frozen=True, kw_only=True):
    """What a key may use; None is without end. Days and months are those of UTC."""

    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    tokens_total: int | None = None
    nano_usd_per_day: int | None = None
    nano_usd_per_month: int | None = None
    nano_usd_total: int | None = None


class Key(Struct, frozen=True, kw_only=True):
    """What a client shows to be let in. The secret itself is kept nowhere."""

    id: str
    prefix: str  # how its secret begins: for people, to tell keys apart
    tenant: str
    client: str
    models: tuple[str, ...] = ()  # it may use; () is all of them
    quotas: Quotas = Quotas()
    created_us: int
    revoked_us: int | None = None  # not valid from then on

    def trouble(self, tenants: Collection[str], models: Collection[str]) -> str:
        """Return why it is good for nothing where these are served; "" when it is good for something."""
        if self.tenant not in tenants:
            return f"no tenant '{self.tenant}'"
        if self.models and not set(self.models) & set(models):
            return f"no model {' or '.join(map(repr, self.models))}"
        return ""


class Settlement(Struct, frozen=True, kw_only=True):
    """What became of one request, and what it is charged: one row of the ledger."""

    request_id: str
    tenant: str
    client: str
    key_id: str = ""  # "" when it came without a key
    model: str
    replicas: tuple[str, ...] = ()  # that worked on it, in their order
    prompt_tokens: int
    cached_tokens: int = 0  # of the prompt, not read again
    output_tokens: int  # produced, thinking included
    thinking_tokens: int = 0
    arrival_us: int
    first_token_us: int | None = None
    finish_us: int
    gpu_us: int = 0  # time of its replicas, times their GPUs
    nano_usd: int = 0
    outcome: Outcome
    reason: str = ""


def storable(settlement: Settlement) -> Settlement:
    """Return it with what a column can hold: engines and their messages say anything."""
    amounts = _amounts(settlement)
    if min(amounts) >= 0 and max(amounts) <= MOST_OF_A_REQUEST and settlement.reason.isprintable():
        return settlement
    held = {name: min(max(0, amount), MOST_OF_A_REQUEST) for name, amount in zip(_AMOUNTS, amounts, strict=True)}
    reason = "".join(letter if letter.isprintable() else " " for letter in settlement.reason)
    return replace(settlement, **held, reason=reason)


_AMOUNTS = ("prompt_tokens", "cached_tokens", "output_tokens", "thinking_tokens", "gpu_us", "nano_usd")
_amounts = attrgetter(*_AMOUNTS)


def utc_us() -> int:
    """Return the time now."""
    return time.time_ns() // 1000


def day_of(clock_us: int) -> str:
    """Return the day in UTC, such as ``2026-11-26``."""
    return _day(clock_us // (DAY_S * MEGA))


@lru_cache(maxsize=8)  # today, and whatever ends late
def _day(days: int) -> str:
    return date.fromordinal(EPOCH + days).isoformat()


def nano_usd(usd: float | str | Decimal) -> int:
    """Return dollars in billionths, rounded half to even. Raises InputError for what is no amount."""
    try:
        amount = int((Decimal(str(usd)) * GIGA).to_integral_value())
    except (InvalidOperation, ValueError, OverflowError):
        raise InputError(f"'{usd}' is no amount of dollars. Write it like 25 or 0.50.") from None
    if not 0 <= amount <= MOST:
        raise InputError(f"{usd} dollars: an amount lies between 0 and {MOST // GIGA:,}.")
    return amount


def new_request_id() -> str:
    """Return an id that nobody else makes. Later ids sort after earlier ones, so that rows are written side by side."""
    try:
        random = _RANDOM.pop()
    except IndexError:
        many = secrets.token_hex(9 * 256)  # to ask the system for each costs more than the rest
        _RANDOM.extend(many[start : start + 18] for start in range(0, len(many), 18))
        random = _RANDOM.pop()
    return f"{utc_us():014x}{random}"


_RANDOM: list[str] = []  # the second halves of ids to come; a thread takes one in one step
os.register_at_fork(after_in_child=_RANDOM.clear)
