"""Tenders, with the one of the article as the golden case."""

import pytest

from waterline import catalog
from waterline.catalog.currencies import parse_amount
from waterline.catalog.servers import ServerPrice, server_price
from waterline.planner.tenders import for_budget, of_servers

PER_USD = 7.2734


def a100() -> ServerPrice:
    price = server_price("a100-sxm-80g")
    assert price is not None
    return price


def test_two_servers_of_the_article_cost_what_it_says() -> None:
    """Row 7: a server of eight A100 at 2.6 to 3.2 M CNY; two of them run the 671B model."""
    tender = of_servers(a100(), 2, every_model=True)
    assert tender.gpus == 16
    assert (tender.low_usd * PER_USD, tender.high_usd * PER_USD) == pytest.approx((5.2e6, 6.4e6))
    (r1,) = (one for one in tender.runs if one.model == "deepseek-ai/DeepSeek-R1")
    assert (r1.precision, r1.gpus, r1.replicas) == ("int8", 16, 1)
    assert r1.at_once >= 1


def test_the_budget_of_the_article_leads_back_to_two_servers() -> None:
    budget = parse_amount("5.2-6.4 M CNY", "--budget")
    tender = for_budget(a100(), budget.low_usd, budget.high_usd, every_model=False)
    assert (tender.fewest, tender.servers, tender.most) == (1, 2, 2)


@pytest.mark.parametrize("budget_usd", [0.0, 1e5, 4e5, 1e6, 1e7])
def test_more_money_buys_no_fewer_and_the_ends_hold_the_middle(budget_usd: float) -> None:
    tender = for_budget(a100(), budget_usd, budget_usd, every_model=False)
    assert tender.fewest <= tender.servers <= tender.most
    assert tender.usd <= budget_usd + 1e-6
    richer = for_budget(a100(), 2 * budget_usd, 2 * budget_usd, every_model=False)
    assert richer.servers >= 2 * tender.servers


def test_no_server_runs_nothing() -> None:
    tender = of_servers(a100(), 0, every_model=False)
    assert (tender.runs, tender.usd) == ((), 0)


def test_models_come_the_largest_first_and_one_of_each_size() -> None:
    runs = of_servers(a100(), 1, every_model=True).runs
    sizes = [one.parameters for one in runs]
    assert sizes == sorted(set(sizes), reverse=True)
    assert runs[0] == of_servers(a100(), 1, every_model=False).runs[0]
    assert all(one.gpus <= 8 and one.replicas * one.gpus <= 8 for one in runs)


def test_more_servers_run_everything_fewer_do() -> None:
    one, two = (of_servers(a100(), count, every_model=True) for count in (1, 2))
    assert {each.model for each in one.runs} <= {each.model for each in two.runs}
    largest = catalog.find_model(one.runs_not)
    assert all(largest.parameters > each.parameters for each in one.runs)
