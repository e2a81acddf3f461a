import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.errors import InputError
from waterline.ledger.records import day_of, nano_usd, new_request_id


@pytest.mark.parametrize(
    ("usd", "nano"), [("25", 25_000_000_000), ("0.1", 100_000_000), (0.3, 300_000_000), ("1e-9", 1), (0, 0)]
)
def test_money_is_exact_to_the_billionth(usd: float | str, nano: int) -> None:
    assert nano_usd(usd) == nano


@pytest.mark.parametrize("usd", ["a lot", "-1", "nan", "inf", "1e12", ""])
def test_what_is_no_amount_is_refused(usd: str) -> None:
    with pytest.raises(InputError, match="amount"):
        nano_usd(usd)


@given(st.integers(min_value=0, max_value=4_102_444_800))
def test_days_are_those_of_utc(clock_s: int) -> None:
    assert day_of(clock_s * 1_000_000 + 999_999) == time.strftime("%Y-%m-%d", time.gmtime(clock_s))


def test_ids_sort_as_they_are_made() -> None:
    ids = []
    for _ in range(3):
        ids.append(new_request_id())
        time.sleep(0.001)
    assert ids == sorted(ids)
    assert len(set(ids)) == 3
