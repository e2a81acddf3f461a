from datetime import date

import pytest

from waterline import catalog
from waterline.catalog.servers import (
    HOURS_PER_MONTH,
    drawn_watts,
    host_usd,
    hosting,
    node_prices,
    rated_watts,
    server_price,
    servers,
)

TODAY = date.today().isoformat()  # noqa: DTZ011 - a day more or less does not matter


@pytest.mark.parametrize("price", node_prices().values(), ids=lambda price: price.gpu)
def test_a_price_of_a_server_is_ordered_dated_and_sourced(price: object) -> None:
    found = server_price(price.gpu)  # type: ignore[attr-defined]
    assert found is not None
    assert found == price
    assert 0 < found.low_usd <= found.usd <= found.high_usd
    assert found.gpus == catalog.find_gpu(found.gpu).gpus_per_node
    assert "2023" <= found.date <= TODAY
    assert found.verified + found.recalled >= 1
    assert ("recalled" in found.source) == (found.recalled > 0) or found.verified


def test_a_server_of_eight_a100_costs_what_the_article_says() -> None:
    price = server_price("a100-sxm-80g")
    assert price is not None
    assert (price.gpus, price.date) == (8, "2025-05-14")
    assert (price.low_usd, price.high_usd) == pytest.approx((2.6e6 / 7.2734, 3.2e6 / 7.2734))
    assert (price.low_usd, price.high_usd) == pytest.approx((360_000, 440_000), rel=0.01)


def test_where_no_server_has_a_price_its_cards_and_a_host_make_one() -> None:
    price = server_price("rtx-4090")  # 3,130 USD a card, four in a server, host 16,000
    assert price is not None
    assert (price.kind, price.gpus, price.usd) == ("card", 4, 4 * 3130 + 16_000)
    assert (price.low_usd, price.high_usd) == pytest.approx((0.8 * price.usd, 1.2 * price.usd))
    listed = server_price("rx-7900xtx")
    assert listed is not None
    assert (listed.kind, listed.date) == ("list", "2022")
    assert server_price("mi350x") is None


def test_a_larger_server_has_a_dearer_host() -> None:
    assert [host_usd(gpus) for gpus in (1, 2, 3, 4, 8, 16)] == [2500, 5000, 16_000, 16_000, 32_000, 64_000]


def test_running_a_server_is_electricity_as_drawn_and_hosting_as_rated() -> None:
    gpu, terms = catalog.find_gpu("h100-sxm-80g"), hosting()
    rated, drawn = rated_watts(gpu, 8), drawn_watts(gpu, 8)
    assert rated == pytest.approx(10_192)  # NVIDIA says 10.2 kW of a DGX H100
    assert drawn == pytest.approx(7560)
    expected = 7.56 * terms.pue * HOURS_PER_MONTH * terms.usd_per_kwh + 10.192 * terms.usd_per_kw_month
    assert terms.usd_per_month(gpu, 8) == pytest.approx(expected)


def test_every_assumption_has_a_source() -> None:
    facts, terms = servers(), hosting()
    assert all((facts.rated_source, facts.drawn_source, facts.spread_source, facts.kind_source))
    assert all(host.source for host in facts.host)
    assert all((terms.lifetime_source, terms.usd_per_kwh_source, terms.usd_per_kw_month_source, terms.pue_source))
    assert 1 <= facts.drawn_over_tdp <= facts.rated_over_tdp
