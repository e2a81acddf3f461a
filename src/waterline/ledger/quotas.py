"""May a key spend this much? Arithmetic on balances; whoever asks sees to it that nobody else spends meanwhile."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from waterline.errors import QuotaError
from waterline.ledger.records import Key, Quotas, day_of
from waterline.units import GIGA, MEGA, seconds_text

TOTAL = "total"
UNLIMITED = Quotas()


@dataclass(slots=True, kw_only=True)
class Balance:
    """What a key has spent in one period, and what is reserved by requests that have not ended."""

    tokens: int = 0
    nano_usd: int = 0
    reserved_tokens: int = 0
    reserved_nano_usd: int = 0

    def add(self, other: "Balance") -> None:
        self.tokens += other.tokens
        self.nano_usd += other.nano_usd
        self.reserved_tokens += other.reserved_tokens
        self.reserved_nano_usd += other.reserved_nano_usd


Balances = dict[tuple[str, str], Balance]  # by key and period


def periods(key: Key | None, arrival_us: int) -> tuple[str, ...]:
    """Return the periods in which a key has a quota: a day, a month, the total."""
    if not key or key.quotas == UNLIMITED:
        return ()
    quotas, day = key.quotas, day_of(arrival_us)
    limited = {
        day: (quotas.tokens_per_day, quotas.nano_usd_per_day),
        day[:7]: (quotas.tokens_per_month, quotas.nano_usd_per_month),
        TOTAL: (quotas.tokens_total, quotas.nano_usd_total),
    }
    return tuple(period for period, limits in limited.items() if limits != (None, None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a quota still allows."""

    limit: int
    left: int
    anew_s: float | None  # until the next day or month begins; None: it never does


def tightest(key: Key, balances: Mapping[tuple[str, str], Balance], clock_us: int) -> tuple[Room | None, Room | None]:
    """Return the quotas of tokens and of nano-dollars that have least left; None where the key has none."""
    tokens, money = list[Room](), list[Room]()
    for period, token_limit, usd_limit, one in _limits(key, balances, clock_us):
        anew_s = None if period == TOTAL else _seconds_until_next(period, clock_us)
        if token_limit is not None:
            left = max(0, token_limit - one.tokens - one.reserved_tokens)
            tokens.append(Room(limit=token_limit, left=left, anew_s=anew_s))
        if usd_limit is not None:
            left = max(0, usd_limit - one.nano_usd - one.reserved_nano_usd)
            money.append(Room(limit=usd_limit, left=left, anew_s=anew_s))
    return _least(tokens), _least(money)


def _least(rooms: list[Room]) -> Room | None:
    return min(rooms, key=lambda room: room.left, default=None)


def fits(key: Key, balances: Mapping[tuple[str, str], Balance], tokens: int, nano_usd: int, arrival_us: int) -> bool:
    """Return whether every quota has room for so much more."""
    return next(_exceeded(key, balances, tokens, nano_usd, arrival_us), None) is None


def refusal(
    key: Key, balances: Mapping[tuple[str, str], Balance], tokens: int, nano_usd: int, arrival_us: int
) -> QuotaError | None:
    """Return why a request is refused, by the quota that takes longest to have room again; None when there is room."""
    exceeded = list(_exceeded(key, balances, tokens, nano_usd, arrival_us))
    if not exceeded:
        return None
    period, unit, limit, spent, reserved, asked = exceeded[-1]
    when = {TOTAL: "in all", day_of(arrival_us): "a day (UTC)"}.get(period, "a month (UTC)")
    if asked > limit:
        retry_after_s, advice = None, "It never will: ask for fewer tokens (max_tokens)"
    elif period == TOTAL:
        retry_after_s, advice = None, "Ask for fewer tokens (max_tokens), or for a key with more"
    else:
        retry_after_s = _seconds_until_next(period, arrival_us)
        advice = f"Ask for fewer tokens (max_tokens), or come back in {seconds_text(retry_after_s)}"
    return QuotaError(
        f"The quota of key {key.prefix}… has no room for this request, which may take {_said(asked, unit)}. It is "
        f"{_said(limit, unit)} {when}; spent are {_said(spent, unit)}, and reserved by requests under way "
        f"{_said(reserved, unit)}. {advice}.",
        retry_after_s,
    )


def _limits(
    key: Key, balances: Mapping[tuple[str, str], Balance], clock_us: int
) -> Iterator[tuple[str, int | None, int | None, Balance]]:
    """Yield period, limits of tokens and of nano-dollars, and balance where there is a limit; the longest last."""
    quotas, day = key.quotas, day_of(clock_us)
    for period, token_limit, usd_limit in (
        (day, quotas.tokens_per_day, quotas.nano_usd_per_day),
        (day[:7], quotas.tokens_per_month, quotas.nano_usd_per_month),
        (TOTAL, quotas.tokens_total, quotas.nano_usd_total),
    ):
        if token_limit is not None or usd_limit is not None:
            yield period, token_limit, usd_limit, balances.get((key.id, period)) or Balance()


def _exceeded(
    key: Key, balances: Mapping[tuple[str, str], Balance], tokens: int, nano_usd: int, arrival_us: int
) -> Iterator[tuple[str, str, int, int, int, int]]:
    """Yield period, unit, limit, spent, reserved and asked of each quota without room; the longest period last."""
    for period, token_limit, usd_limit, balance in _limits(key, balances, arrival_us):
        if token_limit is not None and balance.tokens + balance.reserved_tokens + tokens > token_limit:
            yield period, "tokens", token_limit, balance.tokens, balance.reserved_tokens, tokens
        if usd_limit is not None and balance.nano_usd + balance.reserved_nano_usd + nano_usd > usd_limit:
            yield period, "usd", usd_limit, balance.nano_usd, balance.reserved_nano_usd, nano_usd


def _said(amount: int, unit: str) -> str:
    return f"{amount:,} tokens" if unit == "tokens" else "$" + f"{amount / GIGA:,.9f}".rstrip("0").rstrip(".")


def _seconds_until_next(period: str, clock_us: int) -> float:
    if len(period) == len("2026-11"):
        following = (date.fromisoformat(f"{period}-28") + timedelta(days=4)).replace(day=1)
    else:
        following = date.fromisoformat(period) + timedelta(days=1)
    begins = datetime(following.year, following.month, following.day, tzinfo=UTC)
    return max(1.0, begins.timestamp() - clock_us / MEGA)
