import csv
from pathlib import Path

import pytest

from waterline import catalog

COLLECTED = Path(__file__).parents[2].parent / "shared" / "data" / "gpu_prices.csv"
HOURS_OF_FOUR_YEARS = 35_064


@pytest.mark.skipif(not COLLECTED.exists(), reason="the collected data is not beside the checkout")
def test_every_collected_price_is_listed() -> None:
    listed = {(price.gpu, price.kind): price.usd for price in catalog.prices()}
    columns = {
        "on_demand": "on_demand_usd_gpu_h_median",
        "spot": "spot_usd_gpu_h_median",
        "community": "community_usd_gpu_h_median",
        "purchase": "purchase_usd",
    }
    with COLLECTED.open() as file:
        rows = list(csv.DictReader(file))
    expected = {
        (row["accelerator_id"], kind): float(row[column])
        for row in rows
        for kind, column in columns.items()
        if row[column]
    }
    assert len(rows) == 37
    assert listed == pytest.approx(expected)


@pytest.mark.parametrize("price", catalog.prices(), ids=lambda price: f"{price.gpu}-{price.kind}")
def test_a_price_is_ordered_dated_and_sourced(price: catalog.Price) -> None:
    assert price.gpu in catalog.gpus()
    assert 0 < price.low_usd <= price.usd <= price.high_usd
    assert price.verified + price.recalled >= 1
    assert price.date >= "2024"
    assert price.source


@pytest.mark.parametrize(
    ("gpu", "kind", "usd"),
    [
        ("h100-sxm-80g", "on_demand", 3.49),
        ("rtx-4090", "community", 0.395),
        ("rtx-4070", "purchase", 1070 / HOURS_OF_FOUR_YEARS),
        ("cpu", "own", 0.0),
    ],
)
def test_an_hour_costs_on_demand_else_community_else_its_purchase_spread(gpu: str, kind: str, usd: float) -> None:
    price = catalog.usd_per_gpu_hour(gpu)
    assert price is not None
    assert (price.kind, price.usd_per_gpu_hour) == (kind, pytest.approx(usd))


def test_a_card_without_a_price_has_none() -> None:
    assert catalog.usd_per_gpu_hour("mi50-16g") is None
