"""A fixed split: what each tenant has of a small fleet, worked out by hand."""

from msgspec.structs import replace

from examples import small_plan
from waterline.fleet import Pool
from waterline.plan import Layout, Shape
from waterline.rehearsal.fixed_split import Nodes, Share, kinds_of, shape_of, split

POOLS = (
    Pool(name="large", gpu="h100-sxm-80g", nodes=1, gpus_per_node=8, usd_per_gpu_hour=2.0),
    Pool(name="small", gpu="rtx-4090", nodes=2, gpus_per_node=2, usd_per_gpu_hour=0.4),
)


def kind(pool: str, gpus: int, requests_per_s: float) -> Shape:
    (replica,) = small_plan().replicas
    return replace(shape_of(replica), pool=pool, layout=Layout(tp=gpus), requests_per_s=requests_per_s)


def share(tenant: str, model: str, peak: float, deserves_gpus: float, *kinds: Shape) -> Share:
    return Share(tenant=tenant, model=f"{model}@{tenant}", peak=peak, kinds=kinds, deserves_gpus=deserves_gpus)


def placed(one: Share) -> list[tuple[str, int]]:
    return [(replica.pool, replica.layout.gpus) for replica in one.has]


def test_everybody_has_one_of_each_model_before_anybody_has_two_and_whoever_deserves_more_goes_first() -> None:
    wide, chat = kind("large", 4, 1.0), kind("small", 1, 1.0)
    firm, lab = share("firm", "r1", 4.0, 8.0, wide), share("lab", "r1", 0.1, 5.0, wide)
    public, talk = share("public", "r1", 1.0, 4.0, wide), share("public", "chat", 1.0, 4.0, chat)
    told = list(split(POOLS, [public, talk, lab, firm], fill={"firm", "lab", "public"}))
    assert [placed(one) for one in (firm, lab)] == [[("large", 4)], [("large", 4)]]
    assert placed(talk) == [("small", 1)] * 4  # to all of its GPUs
    assert placed(public) == []
    assert told == [
        "a fixed split serves public no r1: one replica takes 4 GPUs, and of the 4 it deserves its other models leave 3"
    ]


def test_what_does_not_fit_is_said_in_words() -> None:
    wide = kind("large", 8, 1.0)
    shares = [
        share("a", "r1", 1.0, 8.0, wide),
        share("b", "r1", 1.0, 8.0, wide),
        share("c", "r1", 1.0, 7.5, wide),
        share("d", "r1", 1.0, 8.0),
    ]
    assert list(split(POOLS, shares, fill=set())) == [
        "a fixed split serves d no r1: the plan runs it nowhere as one replica",
        "a fixed split serves b no r1: one replica takes 8 GPUs of large, and others have those",
        "a fixed split serves c no r1: one replica takes 8 GPUs, more than the 7.5 it deserves",
    ]


def test_who_has_jobs_serves_its_peaks_and_the_model_furthest_behind_gets_the_next_replica() -> None:
    one = kind("large", 1, 1.0)
    busy, calm = share("lab", "busy", 3.5, 8.0, one), share("lab", "calm", 0.5, 8.0, one)
    assert list(split(POOLS, [calm, busy], fill=set())) == []
    assert (len(busy.has), len(calm.has)) == (4, 1)
    filled = [share("lab", "busy", 3.5, 8.0, one), share("lab", "calm", 0.5, 8.0, one)]
    assert list(split(POOLS, filled, fill={"lab"})) == []
    assert [len(each.has) for each in filled] == [7, 1]


def test_replicas_are_what_the_plan_has_before_what_it_might_have() -> None:
    plan = small_plan()
    (replica,) = plan.replicas
    pair = replace(replica, id="chat/1", layout=Layout(tp=2), requests_per_s=4.0)
    reader = replace(replica, id="chat/2", layout=Layout(tp=4), role="prefill")
    thrifty = replace(shape_of(replica), layout=Layout(tp=8), requests_per_s=100.0)
    plan = replace(plan, replicas=(replica, pair, reader), shapes=(thrifty,))
    assert [one.layout.gpus for one in kinds_of(plan, "chat")] == [2, 1, 8]


def test_nodes_are_filled_up_and_no_gpu_is_given_twice() -> None:
    nodes = Nodes(POOLS)
    whole = nodes.take("small", 4)
    assert [(place.node, place.gpus) for place in whole] == [(0, (0, 1)), (1, (0, 1))]
    assert nodes.take("small", 1) == ()
    parts = [nodes.take("large", gpus) for gpus in (1, 4, 3, 1)]
    assert [[(place.node, place.gpus) for place in places] for places in parts] == [
        [(0, (0,))],
        [(0, (1, 2, 3, 4))],
        [(0, (5, 6, 7))],
        [],
    ]
