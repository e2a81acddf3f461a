"""The choice of servers: against every possible purchase, and what must never happen."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterline.plan import Layout
from waterline.planner.purchase import Choice, Kind, Market, Task, Way, cheapest, most

VENDORS = ("nvidia", "amd")
MOST = 3  # servers of a kind that the exhaustive search tries


def kind(name: str, gpus: int = 8, vendor: str = "nvidia", **limits: int) -> Kind:
    return Kind(name=name, vendor=vendor, gpus=gpus, **limits)


def way(index: int, rate: float, tp: int = 1, pp: int = 1) -> Way:
    return Way(kind=index, layout=Layout(tp=tp, pp=pp), precision="bf16", requests_per_s=rate, parts=(tp,) * pp)


def task(rate: float, *ways: Way, model: str = "chat", hour: int = 0) -> Task:
    return Task(model=model, hour=hour, requests_per_s=rate, ways=ways)


def market(*prices: float, **terms: float) -> Market:
    return Market(prices=prices, costs=prices, **terms)


def cost(choice: Choice, terms: Market) -> float:
    return math.fsum(count * usd for count, usd in zip(choice.servers, terms.costs, strict=True))


# --- Cases worked out by hand ---------------------------------------------------------------------------------------


def test_enough_servers_for_the_rate_and_not_one_more() -> None:
    choice = cheapest([kind("a")], [task(33.0, way(0, 2.0))], market(100))  # 17 replicas, 8 to a server
    assert choice is not None
    assert (choice.servers, choice.replicas, choice.served) == ((3,), {(0, 0): 17}, (33.0,))


def test_a_small_rest_is_put_on_a_small_server() -> None:
    kinds = [kind("large"), kind("small", gpus=1)]
    choice = cheapest(kinds, [task(18.0, way(0, 2.0), way(1, 2.0))], market(100, 20))  # 9 replicas: 8 and 1
    assert choice is not None
    assert choice.servers == (1, 1)


def test_hours_share_the_servers_and_models_of_one_hour_do_not() -> None:
    day, night = task(16.0, way(0, 2.0), model="day", hour=12), task(16.0, way(0, 2.0), model="night", hour=0)
    apart = cheapest([kind("a")], [day, night], market(100))
    together = cheapest([kind("a")], [day, replace(night, hour=12)], market(100))
    assert apart is not None
    assert together is not None
    assert (apart.servers, together.servers) == ((1,), (2,))


def test_what_is_owned_serves_first_and_nothing_is_bought_when_it_is_enough() -> None:
    kinds = [kind("owned", most=1, least=1), kind("new")]
    choice = cheapest(kinds, [task(16.0, way(0, 2.0), way(1, 9.0))], Market(prices=(0, 100), costs=(0, 100)))
    assert choice is not None
    assert choice.servers == (1, 0)


def test_a_pipeline_takes_a_group_on_several_servers() -> None:
    choice = cheapest([kind("a")], [task(1.0, way(0, 1.0, tp=8, pp=2))], market(100))
    assert choice is not None
    assert choice.servers == (2,)


def test_groups_do_not_straddle_servers() -> None:
    """Three groups of four on servers of six need three servers, though 12 GPUs are only two servers' worth."""
    choice = cheapest([kind("odd", gpus=6)], [task(3.0, way(0, 1.0, tp=4))], market(100))
    assert choice is not None
    assert choice.servers == (3,)


def test_a_model_nobody_asks_anything_of_has_one_replica() -> None:
    choice = cheapest([kind("a")], [task(0.0, way(0, 2.0))], market(100))
    assert choice is not None
    assert (choice.servers, choice.replicas) == ((1,), {(0, 0): 1})


def test_too_small_a_budget_has_no_cheapest_but_serves_what_it_can() -> None:
    kinds, tasks, terms = [kind("a")], [task(48.0, way(0, 2.0))], market(100, budget_usd=250)
    assert cheapest(kinds, tasks, terms) is None
    choice = most(kinds, tasks, terms)
    assert choice is not None
    assert (choice.servers, choice.served) == ((2,), (32.0,))


def test_of_what_serves_as_much_the_cheaper_is_bought() -> None:
    kinds = [kind("dear"), kind("cheap")]
    choice = most(kinds, [task(48.0, way(0, 2.0), way(1, 2.0))], market(100, 90, budget_usd=205))
    assert choice is not None
    assert choice.servers == (0, 2)


def test_one_vendor_gets_at_most_its_share_of_the_money() -> None:
    kinds = [kind("green"), kind("red", vendor="amd")]
    tasks = [task(64.0, way(0, 2.0), way(1, 1.0))]
    free = cheapest(kinds, tasks, market(100, 100))
    held = cheapest(kinds, tasks, market(100, 100, max_vendor_share=0.5))
    assert free is not None
    assert held is not None
    assert (free.servers, held.servers) == ((4, 0), (3, 3))  # 3 x 16 + 3 x 8 = 72


def test_a_server_that_runs_nothing_does_not_help_to_keep_a_share() -> None:
    kinds = [kind("green"), kind("red", vendor="amd")]
    assert cheapest(kinds, [task(16.0, way(0, 2.0))], market(100, 100, max_vendor_share=0.6)) is None


def test_a_further_kind_of_server_must_earn_its_keep() -> None:
    kinds = [kind("large"), kind("small", gpus=1)]
    tasks = [task(18.0, way(0, 2.0), way(1, 2.0))]
    choice = cheapest(kinds, tasks, market(100, 30, usd_per_kind=85))  # saves 70
    assert choice is not None
    assert choice.servers == (2, 0)


def test_what_cannot_be_bought_is_not() -> None:
    choice = cheapest([kind("a"), kind("b")], [task(16.0, way(0, 2.0), way(1, 1.0))], market(math.inf, 100))
    assert choice is not None
    assert choice.servers == (0, 2)


def test_solving_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    cheapest([kind("a")], [task(33.0, way(0, 2.0))], market(100))
    assert capfd.readouterr().out == ""


# --- Against every purchase there is --------------------------------------------------------------------------------


def fits(
    kinds: Sequence[Kind], tasks: Sequence[Task], servers: Sequence[int], replicas: dict[tuple[int, int], int]
) -> bool:
    """Put every group on the fullest server with room, the largest first, hour by hour."""
    for hour in {one.hour for one in tasks}:
        free = {index: [kinds[index].gpus] * count for index, count in enumerate(servers)}
        groups = []
        for (task_, way_), count in replicas.items():
            one = tasks[task_].ways[way_]
            if tasks[task_].hour == hour:
                number, size = len(one.parts), one.parts[0]
                groups += [(size, one.kind)] * number * count
        for size, index in sorted(groups, reverse=True):
            room = [place for place, left in enumerate(free[index]) if left >= size]
            if not room:
                return False
            place = min(room, key=lambda place: free[index][place])
            free[index][place] -= size
    return True


def servable(kinds: Sequence[Kind], tasks: Sequence[Task], servers: Sequence[int]) -> float:
    """Return the most requests these servers serve, by trying every set of replicas; -1 where a model finds no place."""
    total = 0.0
    for hour in {one.hour for one in tasks}:
        here = [(index, one) for index, one in enumerate(tasks) if one.hour == hour]
        pairs = [(index, number) for index, one in here for number in range(len(one.ways))]
        limits = []
        for index, number in pairs:
            one = tasks[index].ways[number]
            count, size = len(one.parts), one.parts[0]
            limits.append(servers[one.kind] * (kinds[one.kind].gpus // size) // count)
        best = -1.0
        for counts in itertools.product(*(range(limit + 1) for limit in limits)):
            replicas = dict(zip(pairs, counts, strict=True))
            if fits(kinds, tasks, servers, replicas):
                able = [
                    sum(replicas[index, number] * one.ways[number].requests_per_s for number in range(len(one.ways)))
                    for index, one in here
                ]
                best = max(best, sum(min(got, one.requests_per_s) for got, (_, one) in zip(able, here, strict=True)))
        total += best
    return total


@st.composite
def problems(draw: st.DrawFn, *, most_kinds: int = 2, most_gpus: int = 4) -> tuple[list[Kind], list[Task], list[float]]:
    sizes = [size for size in (1, 2, 4, 8) if size <= most_gpus]
    kinds = [
        kind(str(index), gpus=draw(st.sampled_from(sizes)), vendor=draw(st.sampled_from(VENDORS)))
        for index in range(draw(st.integers(1, most_kinds)))
    ]
    tasks = []
    for number in range(draw(st.integers(1, 2))):
        ways = []
        for index, one in enumerate(kinds):
            tp = draw(st.sampled_from([size for size in sizes if size <= one.gpus]))
            ways.append(way(index, draw(st.integers(1, 9)), tp=tp, pp=draw(st.sampled_from((1, 1, 2)))))
        tasks.append(task(draw(st.integers(1, 20)), *ways, model=str(number), hour=draw(st.integers(0, 1))))
    prices = [float(draw(st.integers(1, 30))) for _ in kinds]
    return kinds, tasks, prices


@given(problems())
@settings(max_examples=500)
def test_no_purchase_is_cheaper(problem: tuple[list[Kind], list[Task], list[float]]) -> None:
    kinds, tasks, prices = problem
    limited = [replace(one, most=MOST) for one in kinds]
    terms = market(*prices)
    asked = sum(one.requests_per_s for one in tasks)
    choice = cheapest(limited, tasks, terms, gap=0.0)
    possible = [
        math.fsum(count * price for count, price in zip(servers, prices, strict=True))
        for servers in itertools.product(range(MOST + 1), repeat=len(kinds))
        if servable(kinds, tasks, servers) >= asked - 1e-9
    ]
    assert (choice is None) == (not possible)
    if choice is not None:
        assert cost(choice, terms) == pytest.approx(min(possible))
        assert fits(kinds, tasks, choice.servers, dict(choice.replicas))


@given(problems(), st.integers(0, 60))
@settings(max_examples=150)
def test_no_purchase_within_the_budget_serves_more(
    problem: tuple[list[Kind], list[Task], list[float]], budget: int
) -> None:
    kinds, tasks, prices = problem
    limited = [replace(one, most=MOST) for one in kinds]
    choice = most(limited, tasks, market(*prices, budget_usd=budget + 0.5), gap=0.0)
    assert choice is not None
    possible = [
        servable(kinds, tasks, servers)
        for servers in itertools.product(range(MOST + 1), repeat=len(kinds))
        if math.fsum(count * price for count, price in zip(servers, prices, strict=True)) <= budget + 0.5
    ]
    assert math.fsum(choice.served) == pytest.approx(max(possible), abs=1e-4)


# --- What must never happen -----------------------------------------------------------------------------------------


@given(problems(most_kinds=4, most_gpus=8), st.integers(1, 200), st.integers(0, 200), st.sampled_from((1.0, 0.7, 0.5)))
@settings(max_examples=60)
def test_more_money_never_serves_less(
    problem: tuple[list[Kind], list[Task], list[float]], budget: int, more: int, share: float
) -> None:
    kinds, tasks, prices = problem
    poor = most(kinds, tasks, market(*prices, budget_usd=budget, max_vendor_share=share), gap=0.0)
    rich = most(kinds, tasks, market(*prices, budget_usd=budget + more, max_vendor_share=share), gap=0.0)
    assert poor is not None
    assert rich is not None
    assert math.fsum(rich.served) >= math.fsum(poor.served) * (1 - 1e-5)
    assert math.fsum(count * price for count, price in zip(poor.servers, prices, strict=True)) <= budget * (1 + 1e-6)


@given(problems(most_kinds=4, most_gpus=8), st.floats(0.3, 1.0), st.floats(0.0, 0.5))
@settings(max_examples=60)
def test_a_looser_safeguard_never_costs_more(
    problem: tuple[list[Kind], list[Task], list[float]], share: float, looser: float
) -> None:
    kinds, tasks, prices = problem
    held_terms = market(*prices, max_vendor_share=share)
    held = cheapest(kinds, tasks, held_terms, gap=0.0)
    freer = cheapest(kinds, tasks, market(*prices, max_vendor_share=min(1.0, share + looser)), gap=0.0)
    if held is None:
        return
    assert freer is not None
    assert cost(freer, held_terms) <= cost(held, held_terms) * (1 + 1e-6)
    spent = cost(held, held_terms)
    for vendor in VENDORS:
        part = math.fsum(
            count * price for one, count, price in zip(kinds, held.servers, prices, strict=True) if one.vendor == vendor
        )
        assert part <= share * spent + 1e-4 or share >= 1


@given(problems(most_kinds=4, most_gpus=8), st.sampled_from((0.0, 5.0)))
@settings(max_examples=60)
def test_another_card_to_choose_from_never_makes_it_worse(
    problem: tuple[list[Kind], list[Task], list[float]], usd_per_kind: float
) -> None:
    kinds, tasks, prices = problem
    fewer = [math.inf if index == len(kinds) - 1 and index else price for index, price in enumerate(prices)]
    few = cheapest(kinds, tasks, market(*fewer, usd_per_kind=usd_per_kind), gap=0.0)
    many = cheapest(kinds, tasks, market(*prices, usd_per_kind=usd_per_kind), gap=0.0)
    if few is None:
        return
    assert many is not None

    def whole_cost(choice: Choice) -> float:
        bought = sum(1 for count in choice.servers if count)
        return usd_per_kind * bought + math.fsum(n * p for n, p in zip(choice.servers, prices, strict=True) if n)

    assert whole_cost(many) <= whole_cost(few) * (1 + 1e-6)


@given(problems(most_kinds=4, most_gpus=8))
@settings(max_examples=60)
def test_every_replica_finds_its_gpus_and_none_is_idle(
    problem: tuple[list[Kind], list[Task], list[float]],
) -> None:
    kinds, tasks, prices = problem
    choice = cheapest(kinds, tasks, market(*prices), gap=0.0)
    assert choice is not None
    assert fits(kinds, tasks, choice.servers, dict(choice.replicas))
    for index, one in enumerate(tasks):
        mine = {pair: count for pair, count in choice.replicas.items() if pair[0] == index}
        able = sum(count * one.ways[number].requests_per_s for (_, number), count in mine.items())
        assert able >= one.requests_per_s
        assert all(able - one.ways[number].requests_per_s < one.requests_per_s for _, number in mine)
