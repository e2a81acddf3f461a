"""Purchases of real cards for real models. The choice itself is tested in test_purchase.py."""

import math

import pytest
from msgspec.structs import replace

from waterline.catalog.currencies import parse_amount
from waterline.catalog.servers import HOURS_PER_MONTH, hosting, server_price, servers
from waterline.errors import InfeasibleError, InputError, UnknownNameError
from waterline.fleet import Demand, Fleet, Model, Pool, Tenant
from waterline.planner import make_plan
from waterline.planner.buying import Advice, Purchase, buy
from waterline.planner.market import Wish, hard_hours, price_factors
from waterline.workload import Slo

LLAMA = "meta-llama/Llama-3.1-8B"
CARDS = ("h20-96g", "h200-sxm-141g", "mi300x")


def fleet(*rates: float | tuple[float, ...], **pool: object) -> Fleet:
    """Return a gaming box and a model for each demand."""
    models = tuple(
        Model(
            name=f"chat-{index}",
            weights=LLAMA,
            precisions=("bf16",),
            max_context_tokens=8192,
            slo=Slo(ttft_s=2.0, tpot_s=0.1),
            engine="vllm",
        )
        for index in range(len(rates))
    )
    owned: dict[str, object] = {
        "name": "box",
        "gpu": "rtx-4090",
        "nodes": 1,
        "gpus_per_node": 1,
        "usd_per_gpu_hour": 0.4,
    }
    return Fleet(
        name="test",
        pools=(Pool(**(owned | pool)),),  # type: ignore[arg-type]
        models=models,
        tenants=(Tenant(name="public", deserved=1.0),),
        demand=tuple(
            Demand(tenant="public", model=f"chat-{index}", requests_per_s=rate) for index, rate in enumerate(rates)
        ),
    )


def advise(asked: Fleet, **wish: object) -> Advice:
    wish = {"gpus": CARDS, "scenarios": ()} | wish
    return buy(asked, Wish(**wish), hosting())  # type: ignore[arg-type]


def bought(purchase: Purchase) -> dict[str, int]:
    return {one.gpu: one.servers for one in purchase.bought}


def usd(gpu: str) -> float:
    price = server_price(gpu)
    assert price is not None
    return price.usd


LARGE = fleet(900.0)


@pytest.fixture(scope="module")
def large() -> Advice:
    """A demand that takes several servers, with every safeguard and two scenarios."""
    scenarios = ("low", "high", "nvidia +30 %")
    return advise(LARGE, gpus=(*CARDS, "pro-w7900"), max_vendor_share=0.7, export_rule="2022-10", scenarios=scenarios)


@pytest.fixture(scope="module")
def free() -> Advice:
    return advise(LARGE)


# --- What is bought -------------------------------------------------------------------------------------------------


def test_what_is_owned_is_enough_for_little() -> None:
    advice = advise(fleet(1.0))
    assert bought(advice.best) == {}
    assert (advice.best.usd, advice.best.served_fraction, advice.best.whole) == (0.0, 1.0, True)
    assert [(one.name, one.owned) for one in advice.best.servers] == [("box", True)]
    assert advice.best.replicas[0].name == "box"


def test_with_new_nothing_owned_counts() -> None:
    advice = advise(fleet(1.0), new=True)
    assert sum(bought(advice.best).values()) == 1
    assert not any(one.owned for one in advice.best.servers)


def test_a_purchase_serves_the_demand_by_the_plan_of_its_fleet(free: Advice) -> None:
    pools = tuple(
        Pool(name=one.name, gpu=one.gpu, nodes=one.servers, gpus_per_node=one.gpus_per_server, usd_per_gpu_hour=1.0)
        for one in free.best.servers
    )
    plan = make_plan(replace(LARGE, pools=pools))
    assert plan.objective == "money"  # "goodput" where the fleet is too small
    assert plan.gpus <= sum(pool.gpus for pool in pools)


def test_the_money_adds_up(free: Advice) -> None:
    best = free.best
    assert best.usd == pytest.approx(sum(one.servers * usd(one.gpu) for one in best.bought))
    assert best.low_usd < best.usd < best.high_usd
    kinds_usd = (len(best.bought) - 1) * servers().usd_per_kind
    assert best.lifetime_usd == pytest.approx(best.usd + 48 * best.usd_per_month + kinds_usd)
    assert sum(best.vendor_shares.values()) == pytest.approx(1.0)


def test_renting_is_weighed_against_buying(free: Advice) -> None:
    assert free.rent is not None
    assert free.rent.usd_per_month > free.best.usd_per_month
    saved = free.rent.usd_per_month - free.best.usd_per_month
    assert free.rent.break_even_months == pytest.approx(free.best.usd / saved)
    for one in free.best.bought:
        if one.rent_usd_per_month is not None:
            hourly = one.rent_usd_per_month / HOURS_PER_MONTH / (one.servers * one.gpus_per_server)
            assert hourly == pytest.approx({"h200-sxm-141g": 4.59, "mi300x": 3.995}[one.gpu])


def test_no_other_single_card_is_cheaper(free: Advice) -> None:
    for card in CARDS:
        assert advise(LARGE, gpus=(card,)).best.lifetime_usd >= free.best.lifetime_usd * (1 - 1e-4)


# --- Budgets --------------------------------------------------------------------------------------------------------


def test_more_money_never_serves_less_and_the_least_that_serves_all_does(free: Advice) -> None:
    assert free.least is not None
    assert free.least.usd <= free.best.usd
    budgets = [0.2 * free.least.usd, 0.5 * free.least.usd, 0.8 * free.least.usd, free.least.usd + 1, 2 * free.best.usd]
    found = [advise(LARGE, budget_usd=budget).best for budget in budgets]
    served = [one.served_fraction for one in found]
    assert served == sorted(served)
    assert [one.whole for one in found] == [False, False, False, True, True]
    assert all(one.usd <= budget * (1 + 1e-6) for one, budget in zip(found, budgets, strict=True))
    assert found[-1].lifetime_usd == pytest.approx(free.best.lifetime_usd, rel=1e-4)


def test_a_budget_below_every_server_buys_nothing() -> None:
    best = advise(LARGE, budget_usd=10.0).best
    assert bought(best) == {}
    assert 0 < best.served_fraction < 1  # the box serves on


def test_a_model_nobody_asks_anything_of_wants_one_replica_and_gets_none_for_nothing() -> None:
    idle = replace(fleet(1.0), demand=())
    assert advise(idle, new=True).best.whole
    poor = advise(idle, new=True, budget_usd=10.0).best
    assert (bought(poor), poor.served_fraction, poor.whole) == ({}, 0.0, False)


# --- Safeguards -----------------------------------------------------------------------------------------------------


def test_each_safeguard_says_what_it_costs(large: Advice) -> None:
    assert [one.name for one in large.safeguards] == ["at most 70% to one vendor", "export rule 2022-10"]
    for one in large.safeguards:
        assert one.lifetime_usd == pytest.approx(large.best.lifetime_usd - one.without.lifetime_usd)
        assert one.usd == pytest.approx(large.best.usd - one.without.usd)
        assert one.lifetime_usd >= -1e-4 * large.best.lifetime_usd


def test_without_any_safeguard_nothing_is_said_to_cost(free: Advice) -> None:
    assert free.safeguards == ()


def test_under_the_export_rule_only_free_cards_are_bought() -> None:
    advice = advise(LARGE, export_rule="2022-10")
    assert set(bought(advice.best)) == {"h20-96g"}
    assert {one.gpu for one in advice.left_out if one.reason == "export rule"} == {"h200-sxm-141g", "mi300x"}
    (safeguard,) = advice.safeguards
    assert set(bought(safeguard.without)) & {"h200-sxm-141g", "mi300x"}
    assert safeguard.lifetime_usd > 0


def test_a_vendor_gets_at_most_its_share_and_a_looser_one_costs_no_more() -> None:
    costs = []
    for share in (0.55, 0.7, 1.0):
        best = advise(LARGE, max_vendor_share=share).best
        assert max(best.vendor_shares.values()) <= share + 1e-6
        costs.append(best.lifetime_usd)
    assert costs[0] * (1 + 1e-4) >= costs[1]
    assert costs[1] * (1 + 1e-4) >= costs[2]


@pytest.mark.parametrize(
    ("gpus", "share", "message"),
    [
        (("h20-96g", "h200-sxm-141g"), 0.9, "come from nvidia"),
        (CARDS, 0.5, "come from amd and nvidia. Allow more than 0.50"),
    ],
)
def test_a_share_that_leaves_no_room_is_refused(gpus: tuple[str, ...], share: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        advise(LARGE, gpus=gpus, max_vendor_share=share)


def test_a_vendor_whose_cards_do_not_run_the_model_cannot_keep_the_share() -> None:
    cards = ("h20-96g", "rx-7600xt")  # which reads 16 GB of weights in 56 ms
    given = {"rx-7600xt": parse_amount("5000 USD", "--price")}
    hurried = replace(LARGE, models=(replace(LARGE.models[0], slo=Slo(ttft_s=2.0, tpot_s=0.03)),))
    with pytest.raises(InfeasibleError, match="with at most 70% of its money to one vendor"):
        advise(hurried, gpus=cards, given=given, max_vendor_share=0.7)
    advice = advise(hurried, gpus=cards, given=given, max_vendor_share=0.7, budget_usd=1e6)
    assert advice.why_not.startswith("no purchase serves the demand with at most 70%")
    assert not advice.best.whole


def test_if_a_card_cannot_be_had_another_is_named(free: Advice) -> None:
    assert [one.gpu for one in free.losses] == [one.gpu for one in free.best.bought]
    for loss in free.losses:
        assert loss.instead is not None
        assert loss.gpu not in bought(loss.instead)
        assert loss.lifetime_usd >= -1e-4 * free.best.lifetime_usd


# --- Prices ---------------------------------------------------------------------------------------------------------


def test_scenarios_price_the_same_servers_and_choose_again(large: Advice) -> None:
    low, high, dearer = large.scenarios
    assert (low.same_usd, high.same_usd) == pytest.approx((large.best.low_usd, large.best.high_usd))
    nvidia = math.fsum(one.usd for one in large.best.bought if one.vendor == "nvidia")
    assert dearer.same_usd == pytest.approx(large.best.usd + 0.3 * nvidia)
    for one in large.scenarios:
        assert one.best is not None
        assert one.best.whole


def test_a_price_that_is_given_is_believed() -> None:
    advice = advise(LARGE, given={"mi300x": parse_amount("2000-4000 USD", "--price")})
    assert set(bought(advice.best)) == {"mi300x"}
    (one,) = advice.best.bought
    assert (one.price.kind, one.price.low_usd, one.price.usd, one.price.high_usd) == ("given", 2000, 3000, 4000)


def test_a_named_card_without_a_price_says_which_and_how_to_give_one() -> None:
    with pytest.raises(
        InputError, match=r"'mi350x' is known. Give that of a server of 8: --price \"mi350x=250000 USD\""
    ):
        advise(LARGE, gpus=("mi350x",))


def test_the_catalogue_leaves_out_what_has_no_price_today_and_says_so() -> None:
    advice = advise(fleet(1.0), gpus=(), data_centre=True)
    why = {one.gpu: one.reason for one in advice.left_out}
    assert why["mi350x"] == "no price"
    assert why["mi100"] == "list price"
    assert why["gaudi3"] == "planning only"
    assert why["rtx-4090"] == "not for it"
    assert "h200-sxm-141g" not in why


def test_gaming_cards_come_with_their_licence() -> None:
    advice = advise(fleet(30.0), gpus=("rtx-4090",))
    assert "licence of GeForce" in advice.notes[0]


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("low", {}),
        ("nvidia +30 %", {"nvidia": 1.3}),
        ("AMD-10%, H200 SXM + 5 %", {"amd": 0.9, "h200-sxm-141g": 1.05}),
        ("all +20%", {"all": 1.2}),
    ],
)
def test_a_scenario_names_vendors_cards_or_all(text: str, factors: dict[str, float]) -> None:
    assert price_factors(text) == pytest.approx(factors)


def test_a_scenario_nobody_understands_is_answered_with_what_to_write() -> None:
    with pytest.raises(InputError, match=r"Write low, high, or changes: 'nvidia \+30 %"):
        price_factors("nvidia up a bit")
    with pytest.raises(InputError, match="must stay below 100 %"):
        price_factors("nvidia -100 %")
    with pytest.raises(UnknownNameError, match="'nvidea' is no vendor and no card. Did you mean 'nvidia'"):
        price_factors("nvidea +3 %")


# --- Tenders, and demands by hour -----------------------------------------------------------------------------------


def test_a_tender_is_judged_as_it_is() -> None:
    advice = advise(LARGE, gpus=(), tender={"mi300x": (1, 8)})
    assert bought(advice.best) == {"mi300x": 1}
    assert 0 < advice.best.served_fraction < 1
    two = advise(LARGE, gpus=(), tender={"mi300x": (2, 8)}).best.served_fraction
    assert two > advice.best.served_fraction


def test_peaks_at_different_hours_share_servers() -> None:
    day, night = (0.0,) * 12 + (600.0,) * 12, (600.0,) * 12 + (0.0,) * 12
    apart, together = fleet(day, night), fleet(day, day)
    assert hard_hours(apart) == [0, 12]
    assert hard_hours(together) == [12]
    assert advise(apart).best.usd < advise(together).best.usd


def test_an_hour_that_another_covers_is_not_hard() -> None:
    morning = (1.0, 5.0, 3.0) + (0.0,) * 21
    evening = (9.0, 5.0, 4.0) + (0.0,) * 21
    assert hard_hours(fleet(morning, evening)) == [0, 1]
    assert hard_hours(replace(fleet(1.0), demand=())) == [0]


def test_a_model_no_card_runs_is_answered_with_the_nearest_misses() -> None:
    huge = replace(fleet(1.0), models=(replace(fleet(1.0).models[0], slo=Slo(ttft_s=2.0, tpot_s=1e-5)),))
    with pytest.raises(InfeasibleError, match=r"runs on none of the 4 kinds of servers.*TPOT is .*loosen its slo"):
        advise(huge)
