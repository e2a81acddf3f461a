import pytest

from waterline.ledger.quotas import Balance, fits, periods, refusal
from waterline.ledger.records import Key, Quotas

NOON_US = 1_795_694_400_000_000  # 2026-11-26 12:00 UTC
HOUR_S = 3600


def key(**quotas: int) -> Key:
    return Key(id="k", prefix="wl-abc", tenant="public", client="alice", quotas=Quotas(**quotas), created_us=0)


def test_only_periods_with_a_quota_are_kept() -> None:
    assert periods(key(), NOON_US) == ()
    assert periods(key(tokens_per_day=1), NOON_US) == ("2026-11-26",)
    assert periods(key(nano_usd_total=1, tokens_per_month=1), NOON_US) == ("2026-11", "total")
    assert periods(None, NOON_US) == ()


@pytest.mark.parametrize(
    ("spent", "reserved", "asked", "there_is_room"),
    [(60, 30, 10, True), (60, 30, 11, False), (0, 0, 100, True), (0, 0, 101, False)],
)
def test_what_is_reserved_counts_like_what_is_spent(spent: int, reserved: int, asked: int, there_is_room: bool) -> None:
    balances = {("k", "2026-11-26"): Balance(tokens=spent, reserved_tokens=reserved)}
    assert fits(key(tokens_per_day=100), balances, asked, 0, NOON_US) is there_is_room


def test_yesterday_costs_nothing_today() -> None:
    balances = {("k", "2026-11-25"): Balance(tokens=100)}
    assert fits(key(tokens_per_day=100), balances, 100, 0, NOON_US)


@pytest.mark.parametrize(
    ("quotas", "period", "retry_after_s"),
    [
        ({"tokens_per_day": 100}, "2026-11-26", 12 * HOUR_S),
        ({"tokens_per_month": 100}, "2026-11", (4 * 24 + 12) * HOUR_S),
        ({"tokens_total": 100}, "total", None),
    ],
)
def test_who_is_refused_may_come_back_when_the_period_ends(
    quotas: dict[str, int], period: str, retry_after_s: float | None
) -> None:
    error = refusal(key(**quotas), {("k", period): Balance(tokens=95)}, 10, 0, NOON_US)
    assert error is not None
    assert error.retry_after_s == retry_after_s
    assert "spent are 95 tokens" in str(error)


def test_of_two_spent_quotas_the_longer_one_says_when() -> None:
    balances = {("k", "2026-11-26"): Balance(tokens=100), ("k", "total"): Balance(nano_usd=5_000_000_000)}
    error = refusal(key(tokens_per_day=100, nano_usd_total=5_000_000_000), balances, 1, 1, NOON_US)
    assert error is not None
    assert error.retry_after_s is None
    assert "It is $5 in all; spent are $5" in str(error)


def test_a_request_beyond_the_whole_quota_is_not_told_to_come_back() -> None:
    error = refusal(key(tokens_per_day=100), {}, 101, 0, NOON_US)
    assert error is not None
    assert error.retry_after_s is None
    assert "It never will" in str(error)
