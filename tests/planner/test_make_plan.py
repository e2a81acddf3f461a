import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from waterline import catalog
from waterline.errors import InfeasibleError
from waterline.fleet import Demand, Fleet, Model, Pool, Tenant, load_fleet
from waterline.hardware import Node
from waterline.plan import Place
from waterline.planner import make_plan
from waterline.planner.candidates import layouts
from waterline.planner.day import loans
from waterline.rehearsal import rehearse
from waterline.workload import Slo

EXAMPLES = Path(__file__).parents[2] / "examples"
LLAMA, R1 = "meta-llama/Llama-3.1-8B", "deepseek-ai/DeepSeek-R1"
EASY = Slo(ttft_s=2.0, tpot_s=0.1)


def fleet(requests_per_s: float = 1.0, limit: float = 1.0, **model: object) -> Fleet:
    """Return two pools, of which the second costs half as much an hour, and one model."""
    served = {
        "name": "chat",
        "weights": LLAMA,
        "precisions": ("bf16",),
        "max_context_tokens": 8192,
        "slo": EASY,
        "engine": "vllm",
    }
    return Fleet(
        name="test",
        pools=(
            Pool(name="h100", gpu="h100-sxm-80g", nodes=1, gpus_per_node=8, usd_per_gpu_hour=2.0),
            Pool(name="mi300x", gpu="mi300x", nodes=2, gpus_per_node=8, usd_per_gpu_hour=1.0),
        ),
        models=(Model(**(served | model)),),  # type: ignore[arg-type]
        tenants=(Tenant(name="public", deserved=limit, limit=limit),),
        demand=(Demand(tenant="public", model="chat", requests_per_s=requests_per_s),),
    )


def test_a_small_demand_gets_one_replica_on_the_cheapest_card() -> None:
    plan = make_plan(fleet())
    (replica,) = plan.replicas
    assert (replica.id, replica.pool, replica.layout.gpus, plan.usd_per_hour) == ("chat/0", "mi300x", 1, 1.0)
    assert replica.tpot_s <= EASY.tpot_s
    assert replica.ttft_s <= EASY.ttft_s


def test_enough_replicas_for_the_rate_and_not_one_more() -> None:
    plan = make_plan(fleet(requests_per_s=60.0))
    one = plan.replicas[0].requests_per_s
    assert len(plan.replicas) == math.ceil(60.0 / one) > 1


def test_a_model_without_demand_still_gets_a_replica() -> None:
    plan = make_plan(replace(fleet(), demand=()))
    assert len(plan.replicas) == 1
    assert plan.models[0].usd_per_million_tokens is None


def test_a_model_larger_than_a_node_spans_several() -> None:
    small_nodes = replace(
        fleet(), pools=(Pool(name="h100", gpu="h100-sxm-80g", nodes=4, gpus_per_node=8, usd_per_gpu_hour=2.0),)
    )
    r1 = Model(
        name="chat",
        weights=R1,
        precisions=("fp8",),
        max_context_tokens=8192,
        slo=Slo(ttft_s=5, tpot_s=0.2),
        engine="vllm",
    )
    (replica,) = make_plan(replace(small_nodes, models=(r1,))).replicas
    assert replica.layout.gpus == 16
    assert [place.node for place in replica.places] == [0, 1]


def test_a_rate_beyond_the_cheapest_pool_spreads_over_several() -> None:
    one_pool = make_plan(fleet(requests_per_s=1.0)).replicas[0].requests_per_s
    plan = make_plan(fleet(requests_per_s=one_pool * 17))
    assert {replica.pool for replica in plan.replicas} == {"h100", "mi300x"}


def test_what_fits_nowhere_is_answered_with_the_nearest_miss_and_a_remedy_that_works() -> None:
    cards = (Pool(name="gaming", gpu="rtx-4090", nodes=1, gpus_per_node=1, usd_per_gpu_hour=0.4),)
    wish = replace(fleet(weights="Qwen/Qwen3-14B", max_context_tokens=4096), pools=cards)
    with pytest.raises(
        InfeasibleError, match=r"on 'gaming' bf16 tp1: needs .* GiB .*one rtx-4090 offers 21.* GiB.*add \"fp8\""
    ):
        make_plan(wish)
    assert make_plan(replace(wish, models=(replace(wish.models[0], precisions=("bf16", "fp8")),))).replicas


def test_an_slo_faster_than_physics_is_answered_with_one_that_holds() -> None:
    hurried = fleet(slo=Slo(ttft_s=0.5, tpot_s=0.0005))
    with pytest.raises(
        InfeasibleError, match=r"TPOT is .* even one at a time; the SLO allows 500 us.*loosen its slo to ttft_s = "
    ) as caught:
        make_plan(hurried)
    told = dict(
        part.split(" = ") for part in str(caught.value).split("loosen its slo to ")[1].split(" (")[0].split(", ")
    )
    assert make_plan(fleet(slo=Slo(ttft_s=float(told["ttft_s"]), tpot_s=float(told["tpot_s"])))).replicas


def test_more_than_the_fleet_can_do_is_served_as_far_as_it_goes_and_said_aloud() -> None:
    plan = make_plan(fleet(requests_per_s=2e3))
    assert plan.objective == "goodput"
    (share,) = plan.hours[12].shares
    assert 0.3 * share.asked_requests_per_s < share.served_requests_per_s < share.asked_requests_per_s == 2e3
    short, advice = plan.warnings
    assert "model 'chat' is not wholly served at 24 hours" in short
    assert "It runs on 'h100', 'mi300x', which lack about" in short
    assert advice.startswith("What would do: ")
    assert " more nodes of 'h100'" in advice
    assert all(hour.gpus == 24 for hour in plan.hours)


def test_the_nodes_that_are_said_to_do_do_and_one_fewer_does_not() -> None:
    wish = fleet(requests_per_s=2e3)
    nodes = int(re.findall(r"(\d+) more nodes of 'h100'", make_plan(wish).warnings[1])[0])

    def served(more: int) -> bool:
        pools = (replace(wish.pools[0], nodes=1 + more), wish.pools[1])
        return not make_plan(replace(wish, pools=pools)).warnings

    assert served(nodes)
    assert not served(nodes - 1)


def test_more_than_a_tenant_may_use_is_not_served() -> None:
    plan = make_plan(fleet(limit=0.001))
    assert plan.replicas == ()
    assert "Tenant 'public' would need about" in plan.warnings[0]
    assert "raise the limit of 'public' to 0.05" in plan.warnings[1]
    assert make_plan(fleet(limit=0.05)).replicas


def test_goodput_is_an_objective_that_warns_of_nothing() -> None:
    plan = make_plan(replace(fleet(requests_per_s=2e3), objective="goodput"))
    assert (plan.objective, plan.warnings) == ("goodput", ())


def test_energy_is_an_objective() -> None:
    """A card that costs more and draws less."""
    base = fleet()
    pools = (
        Pool(name="l4", gpu="l4", nodes=2, gpus_per_node=8, usd_per_gpu_hour=9.0),
        Pool(name="h100", gpu="h100-sxm-80g", nodes=2, gpus_per_node=8, usd_per_gpu_hour=0.1),
    )
    cheap, frugal = (make_plan(replace(base, pools=pools, objective=objective)) for objective in ("money", "energy"))
    assert {replica.pool for replica in cheap.replicas} == {"h100"}
    assert frugal.hours[0].watts < cheap.hours[0].watts
    assert frugal.hours[0].usd > cheap.hours[0].usd


def test_replicas_follow_the_day_and_keep_their_gpus() -> None:
    night, day = (1.0,) * 8, (90.0,) * 16
    plan = make_plan(replace(fleet(), demand=(Demand(tenant="public", model="chat", requests_per_s=night + day),)))
    assert plan.hours[3].gpus < plan.hours[12].gpus
    all_day = [replica for replica in plan.replicas if len(replica.hours) == 24]
    assert len(all_day) == len(plan.replicas_at(3))
    by_day = [replica for replica in plan.replicas if replica.hours == tuple(range(8, 24))]
    assert len(by_day) + len(all_day) == len(plan.replicas)
    assert plan.hours[8].starts == tuple(replica.id for replica in by_day)
    assert plan.hours[0].stops == tuple(replica.id for replica in by_day)
    running = sum(replica.usd_per_hour for replica in plan.replicas)
    loading = sum(replica.usd_per_hour * replica.load_s / 3600 for replica in by_day)
    assert plan.hours[8].usd == pytest.approx(running + loading)
    assert plan.hours[9].usd == pytest.approx(running)
    assert all(replica.load_s > 60 for replica in plan.replicas)


def test_loans_name_who_lends_in_proportion_to_what_is_idle() -> None:
    shares = [(0.0, 0.2), (0.1, 0.4), (0.0, 0.1), (0.0, 0.0)]
    wish = replace(
        fleet(),
        tenants=tuple(
            Tenant(name=name, guarantee=guarantee, deserved=deserved)
            for name, (guarantee, deserved) in zip(("public", "enterprise", "research", "guests"), shares, strict=True)
        ),
    )
    lent = list(loans(wish, [0.5 * 24, 0.2 * 24, 0.1 * 24, 0.0]))
    assert [(loan.lender, loan.borrower) for loan in lent] == [("", "public"), ("enterprise", "public")]
    assert [loan.gpus for loan in lent] == pytest.approx([0.3 * 24 * 3 / 5, 0.3 * 24 * 2 / 5])


def test_a_trace_is_planned_for_its_busiest_five_minutes(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [
        f"2026-11-23 10:{minute:02d}:{second:02d}.0000000,500,50" for minute in (0, 20, 21, 40) for second in range(60)
    ]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    (model,) = make_plan(replace(fleet(), demand=(Demand(tenant="public", model="chat", trace=str(trace)),))).models
    assert model.requests_per_s == 120 / 300
    assert (model.prompt_tokens, model.output_tokens) == (500, 50)


def test_the_mixed_example_uses_both_vendors_and_names_every_tenant() -> None:
    mixed = load_fleet(EXAMPLES / "mixed.toml")
    plan = make_plan(mixed)
    vendors = {mixed.gpu_of(mixed.pool(replica.pool)).vendor for replica in plan.replicas}
    assert vendors == {"nvidia", "amd"}
    assert [tenant.tenant for tenant in plan.tenants] == ["public", "enterprise", "research"]
    assert all(tenant.gpus > 0 for tenant in plan.tenants)


@settings(max_examples=25)
@given(
    nodes=st.integers(1, 3),
    per_node=st.sampled_from([1, 2, 4, 8]),
    rates=st.tuples(st.floats(0, 80), st.floats(0, 20)),
)
def test_no_gpu_is_given_twice_and_no_card_holds_more_than_it_can(
    nodes: int, per_node: int, rates: tuple[float, float]
) -> None:
    base = fleet()
    wish = replace(
        base,
        pools=(
            replace(base.pools[0], nodes=nodes, gpus_per_node=per_node),
            Pool(name="gaming", gpu="rtx-4090", nodes=nodes, gpus_per_node=4, usd_per_gpu_hour=0.4),
        ),
        models=(
            base.models[0],
            replace(base.models[0], name="coder", weights="Qwen/Qwen3-32B", precisions=("bf16", "fp8", "int4")),
        ),
        demand=tuple(
            Demand(tenant="public", model=name, requests_per_s=rate)
            for name, rate in zip(("chat", "coder"), rates, strict=True)
        ),
    )
    try:
        plan = make_plan(wish)
    except InfeasibleError:  # a single card of 24 GB holds no model of 32 B
        return
    taken = [
        (replica.pool, place.node, gpu) for replica in plan.replicas for place in replica.places for gpu in place.gpus
    ]
    assert len(taken) == len(set(taken)) == plan.gpus
    for replica in plan.replicas:
        pool = wish.pool(replica.pool)
        assert all(place.node < pool.nodes and max(place.gpus) < pool.gpus_per_node for place in replica.places)
        assert len(replica.places) == replica.layout.pp
        assert replica.cache_tokens >= replica.max_context_tokens
        assert replica.tpot_s <= EASY.tpot_s
    assert plan.warnings or {replica.model for replica in plan.replicas} == {"chat", "coder"}


def day_and_night(day: float, night: float) -> Fleet:
    """Return many short requests by day and few long ones by night."""
    base = fleet()
    return replace(
        base,
        tenants=(Tenant(name="day", deserved=0.5), Tenant(name="night", deserved=0.5)),
        demand=(
            Demand(
                tenant="day", model="chat", requests_per_s=(0.0,) * 9 + (day,) * 15, prompt_tokens=200, output_tokens=50
            ),
            Demand(
                tenant="night",
                model="chat",
                requests_per_s=(night,) * 6 + (0.0,) * 18,
                prompt_tokens=4000,
                output_tokens=1000,
            ),
        ),
    )


def test_the_hardest_hour_is_planned_for_not_the_one_with_most_requests() -> None:
    by_night = 1.5 * make_plan(day_and_night(day=0.0, night=0.1)).replicas[0].requests_per_s  # more than one replica
    by_day = 1.1 * by_night  # more requests, of a twentieth of the length
    both = make_plan(day_and_night(day=by_day, night=by_night))
    night = make_plan(day_and_night(day=0.0, night=by_night))
    assert both.gpus == night.gpus > make_plan(day_and_night(day=by_day, night=0.0)).gpus


def test_gpus_are_shared_by_gpu_time_not_by_requests() -> None:
    base = fleet()
    wish = replace(
        base,
        tenants=(Tenant(name="light", deserved=0.5), Tenant(name="heavy", deserved=0.5)),
        demand=(
            Demand(tenant="light", model="chat", requests_per_s=10.0, prompt_tokens=50, output_tokens=10),
            Demand(tenant="heavy", model="chat", requests_per_s=2.0, prompt_tokens=3000, output_tokens=400),
        ),
    )
    plan = make_plan(wish)
    light, heavy = plan.tenants
    assert heavy.gpus > 5 * light.gpus  # a fifth of the requests, and more than forty times the tokens
    assert light.gpus + heavy.gpus == pytest.approx(plan.gpus)


def test_replicas_are_numbered_without_a_gap_or_a_double() -> None:
    one_pool = make_plan(fleet(requests_per_s=1.0)).replicas[0].requests_per_s
    plan = make_plan(fleet(requests_per_s=one_pool * 17))
    assert [replica.id for replica in plan.replicas] == [f"chat/{number}" for number in range(len(plan.replicas))]


def test_short_answers_are_not_dearer_than_long_ones() -> None:
    def gpus(output_tokens: int) -> int:
        demand = Demand(tenant="public", model="chat", requests_per_s=20.0, output_tokens=output_tokens)
        return make_plan(replace(fleet(), demand=(demand,))).gpus

    assert gpus(1) <= gpus(2) <= gpus(200)


def test_layouts_divide_heads_and_layers() -> None:
    node = Node(gpu=catalog.find_gpu("l4"), gpus=8)
    qwen = catalog.find_model("qwen2.5-7b-instruct")  # 28 heads
    assert [str(layout) for layout in layouts(qwen, node, 1)] == ["tp1", "tp2", "tp4", "tp4 pp2"]
    assert max(layout.pp for layout in layouts(qwen, node, 1000)) == 8


def test_the_sides_of_a_split_are_given_requests_in_proportion_to_what_each_replica_sustains() -> None:
    """One decode replica is half as large as the other and holds a fifth of its requests: routers must know."""
    hours = tuple([8.0] * 7 + [40.0] * 17)
    wide = Fleet(
        name="wide",
        pools=(Pool(name="h200", gpu="h200-sxm-141g", nodes=24, gpus_per_node=8, usd_per_gpu_hour=4.59),),
        models=(
            Model(
                name="chat",
                weights="deepseek-ai/DeepSeek-V3.2",
                precisions=("fp8",),
                max_context_tokens=32768,
                slo=Slo(ttft_s=4.0, tpot_s=0.05),
                engine="vllm",
            ),
        ),
        tenants=(Tenant(name="public", deserved=1.0),),
        demand=(Demand(tenant="public", model="chat", requests_per_s=hours, prompt_tokens=4000, output_tokens=1000),),
    )
    plan = make_plan(wide)
    served = plan.replicas_at(plan.busiest_hour)
    writing = [replica for replica in served if replica.role == "decode"]
    assert len({replica.layout.gpus for replica in writing}) == 2
    for replica in served:
        tokens = {"both": 0, "prefill": 4000, "decode": 1000}[replica.role]
        assert replica.tokens_per_s == pytest.approx(replica.requests_per_s * tokens)
    assert rehearse(plan, duration_s=120.0, keep=False).summaries[0].slo_fraction >= 0.99


def test_a_guarantee_that_lies_idle_is_named_when_another_tenant_goes_short() -> None:
    base = fleet()
    wish = replace(
        base,
        pools=(replace(base.pools[0], nodes=1, gpus_per_node=8),),
        tenants=(Tenant(name="public", deserved=0.25, limit=0.5), Tenant(name="ent", guarantee=0.75, deserved=0.75)),
        models=base.models[:1],
        demand=(
            Demand(tenant="public", model="chat", requests_per_s=150.0),
            Demand(tenant="ent", model="chat", requests_per_s=0.1),
        ),
    )
    plan = make_plan(wish)
    assert plan.objective == "goodput"
    assert "2.0 are left beside what is guaranteed to others and lies idle: 'ent'" in plan.warnings[0]


def test_a_shape_is_the_smallest_of_those_that_take_nearly_the_fewest_gpus_a_request() -> None:
    plan = make_plan(load_fleet("examples/mixed.toml"))
    shapes = {(shape.model, shape.pool): shape for shape in plan.shapes}
    assert ("r1", "gaming") not in shapes  # 671 GB do not fit
    for replica in plan.replicas:
        shape = shapes[replica.model, replica.pool]
        thrift = shape.layout.gpus / shape.requests_per_s
        assert thrift <= 1.1 * replica.layout.gpus / replica.requests_per_s
        assert shape.ttft_s <= plan.fleet.slos[shape.model].ttft_s
    one = shapes["small", "h100"].replica("small/9", (Place(node=0, gpus=(3,)),))
    assert (one.id, one.role, len(one.hours), one.layout.gpus) == ("small/9", "both", 24, 1)
