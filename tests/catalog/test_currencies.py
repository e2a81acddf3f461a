import pytest

from waterline.catalog.currencies import currencies, find_currency, parse_amount
from waterline.errors import InputError, UnknownNameError


@pytest.mark.parametrize(
    ("text", "usd"),
    [
        ("2500000 USD", 2_500_000),
        ("$2.5M", 2_500_000),
        ("2,500,000 usd", 2_500_000),
        ("2.5 million USD", 2_500_000),
        ("72734 CNY", 10_000),
        ("7.2734万 CNY", 10_000),
        ("0.072734 M CNY", 10_000),
        ("200k GBP", 200_000 / 0.78635),
    ],
)
def test_an_amount_is_read_as_people_write_it(text: str, usd: float) -> None:
    amount = parse_amount(text, "--budget")
    assert amount.low_usd == amount.high_usd == pytest.approx(usd)
    assert not amount.is_range


@pytest.mark.parametrize("text", ["5.2-6.4 M CNY", "5.2M-6.4M CNY", "5.2M to 6.4M CNY", "5200000..6400000 CNY"])
def test_a_range_has_two_ends_and_one_multiple_will_do(text: str) -> None:
    amount = parse_amount(text, "--budget")
    assert (amount.low_usd, amount.high_usd) == pytest.approx((5.2e6 / 7.2734, 6.4e6 / 7.2734))
    assert amount.is_range


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-5 USD", "is not an amount of money. Write a number above 0"),
        ("0 USD", "must be above 0"),
        ("6-5 USD", "a range must rise"),
        ("lots", "is not an amount of money"),
        ("20000000", "does not say in which currency"),
        ("1e400 USD", "is not an amount of money"),
        ("5 USD extra", "is not an amount of money"),
        ("٥ USD", "is not an amount of money"),
    ],
)
def test_what_is_no_amount_is_answered_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_amount(text, "--budget")


def test_an_unknown_currency_is_answered_with_all_we_know() -> None:
    with pytest.raises(UnknownNameError, match=r"'XYZ'.*USD, CNY, EUR.*convert it and write USD"):
        parse_amount("5 XYZ", "--budget")


@pytest.mark.parametrize("currency", currencies().values(), ids=lambda currency: currency.code)
def test_a_rate_is_positive_dated_and_sourced(currency: object) -> None:
    one = find_currency(currency.code.lower())  # type: ignore[attr-defined]
    assert one.per_usd > 0
    assert one.source
    assert one.date or one.code == "USD"
    assert one.recalled == ("recalled" in one.source)


def test_an_amount_is_said_in_its_currency() -> None:
    assert find_currency("CNY").text(1e6) == "7.27 M CNY"
    assert find_currency("USD").text(361_000) == "$361,000"
    assert find_currency("USD").text(2.5e6) == "$2.50 M"
