"""Plans that no planner has made, for what people see of one and do with it."""

from functools import cache
from typing import Any

from msgspec.structs import replace

from examples import small_plan
from waterline.fleet import Pool, Tenant
from waterline.plan import EVERY_HOUR, HourPlan, Layout, Loan, Place, Plan, Replica, Share

ONE_CARD = Layout()
EVENING = tuple(range(19, 23))


def one_replica(
    engine: str = "vllm",
    gpu: str = "h100-sxm-80g",
    layout: Layout = ONE_CARD,
    nodes: int = 1,
    weights: str = "meta-llama/Llama-3.1-8B",
    precision: str = "bf16",
    name: str = "chat",
    own: tuple[str, ...] = (),
    **changes: Any,
) -> Plan:
    """Return a plan of one replica spread evenly over the nodes of a pool, on their first cards.

    `own` is what the owner of the fleet hands to its engine.
    """
    small = small_plan()
    cards = layout.gpus // nodes
    model = replace(
        small.fleet.models[0],
        name=name,
        weights=weights,
        engine=engine,
        precisions=(precision,),
        engine_arguments=own,
    )
    changed = replace(
        small.replicas[0],
        model=name,
        engine=engine,
        layout=layout,
        precision=precision,
        places=tuple(Place(node=node, gpus=tuple(range(cards))) for node in range(nodes)),
        **changes,
    )
    return replace(
        small,
        fleet=replace(
            small.fleet,
            pools=(Pool(name="box", gpu=gpu, nodes=nodes, gpus_per_node=8, usd_per_gpu_hour=2.0),),
            models=(model,),
            demand=(replace(small.fleet.demand[0], model=name),),
        ),
        models=(replace(small.models[0], model=name),),
        replicas=(changed,),
    )


def a_day(replicas: int = 4) -> Plan:
    """Return a plan whose replicas, all but the first of four, serve in the evening only, on cards lent by research.

    Cards are two a replica; there are as many again that never serve. The public is asked for all, half at other hours.
    """
    small = small_plan()
    always = replicas // 4
    cards = 2 * replicas
    tenants = (Tenant(name="public", guarantee=0.1, deserved=0.1), Tenant(name="research", deserved=0.9))
    made = tuple(
        replace(
            small.replicas[0],
            id=f"chat/{index}",
            layout=Layout(tp=2),
            places=(Place(node=index // 4, gpus=(2 * (index % 4), 2 * (index % 4) + 1)),),
            usd_per_hour=0.8,
            hours=EVERY_HOUR if index < always else EVENING,
            load_s=90.0,
        )
        for index in range(replicas)
    )
    return replace(
        small,
        fleet=replace(
            small.fleet,
            pools=(Pool(name="box", gpu="rtx-4090", nodes=replicas // 2, gpus_per_node=8, usd_per_gpu_hour=0.4),),
            tenants=tenants,
        ),
        models=(replace(small.models[0], replicas=replicas, gpus=cards),),
        tenants=(
            replace(small.tenants[0], tenant="public", gpus=1.5 * replicas, deserved_gpus=0.4 * replicas),
            replace(small.tenants[0], tenant="research", gpus=0.5 * replicas, deserved_gpus=3.6 * replicas),
        ),
        replicas=made,
        hours=tuple(_hour(hour, made, replicas) for hour in EVERY_HOUR),
    )


@cache
def an_iceberg() -> Plan:
    """Return a plan of 60,000 cards, 20 models and 8,000 replicas, most of which serve at some hours only."""
    small = small_plan()
    cards = ("h100-sxm-80g", "mi300x", "a100-sxm-80g", "h20-96g", "mi250x", "l40s")
    pools = tuple(
        Pool(name=f"pool-{card}", gpu=card, nodes=1250, gpus_per_node=8, usd_per_gpu_hour=1 + index / 2)
        for index, card in enumerate(cards)
    )
    names = [f"model-{index:02d}" for index in range(20)]
    tenants = (("public", 0.1), ("enterprise", 0.3), ("research", 0.6))
    replicas = tuple(
        replace(
            small.replicas[0],
            id=f"{names[index % 20]}/{index // 20}",
            model=names[index % 20],
            pool=pools[index % 6].name,
            layout=Layout(tp=4),
            places=(Place(node=index // 12, gpus=tuple(range(4 * (index // 6 % 2), 4 * (index // 6 % 2) + 4))),),
            usd_per_hour=4 * (1 + index % 6 / 2),
            hours=EVERY_HOUR if index % 3 == 0 else tuple(range(7 + index % 5, 18 + index % 6)),
            load_s=300.0,
            engine="vllm",
        )
        for index in range(8000)
    )
    return replace(
        small,
        fleet=replace(
            small.fleet,
            name="iceberg",
            pools=pools,
            models=tuple(replace(small.fleet.models[0], name=name) for name in names),
            tenants=tuple(Tenant(name=name, deserved=deserved) for name, deserved in tenants),
            demand=(),
        ),
        models=tuple(
            replace(small.models[0], model=name, replicas=400, gpus=1600, limited_by="tpot") for name in names
        ),
        tenants=tuple(
            replace(small.tenants[0], tenant=name, deserved_gpus=60_000 * part, gpus=20_000.0, limit_gpus=60_000.0)
            for name, part in tenants
        ),
        replicas=replicas,
        hours=tuple(_iceberg_hour(hour, replicas, names) for hour in EVERY_HOUR),
    )


def _iceberg_hour(hour: int, replicas: tuple[Replica, ...], names: list[str]) -> HourPlan:
    serving = [replica for replica in replicas if hour in replica.hours]
    stopped = [replica for replica in replicas if hour not in replica.hours and (hour - 1) % 24 in replica.hours]
    cards = {name: 4.0 * sum(replica.model == name for replica in serving) for name in names}
    public = 0.2 + 0.4 * (18 <= hour < 23)
    parts = {"public": public, "enterprise": 0.3, "research": 0.7 - public}
    return HourPlan(
        hour=hour,
        gpus=4 * len(serving),
        usd=sum(replica.usd_per_hour for replica in serving) * 1.02,
        watts=300.0 * 4 * len(serving),
        shares=tuple(
            Share(
                tenant=tenant,
                model=name,
                asked_requests_per_s=10,
                served_requests_per_s=9 if (name, tenant, hour) == ("model-03", "public", 20) else 10,
                gpus=cards[name] * part,
            )
            for name in names
            for tenant, part in parts.items()
        ),
        loans=(Loan(lender="research", borrower="public", gpus=100.0 * (hour - 15)),) if 18 <= hour < 23 else (),
        starts=tuple(one.id for one in serving if (hour - 1) % 24 not in one.hours),
        stops=tuple(one.id for one in stopped),
    )


def _hour(hour: int, replicas: tuple[Replica, ...], most: int) -> HourPlan:
    serving = [replica for replica in replicas if hour in replica.hours]
    before = [replica for replica in replicas if (hour - 1) % 24 in replica.hours]
    cards = sum(replica.layout.gpus for replica in serving)
    public = cards * 0.75
    deserved = 0.1 * 4 * most
    return HourPlan(
        hour=hour,
        gpus=cards,
        usd=sum(replica.usd_per_hour for replica in serving),
        watts=300.0 * cards,
        shares=(
            Share(tenant="public", model="chat", asked_requests_per_s=3, served_requests_per_s=3, gpus=public),
            Share(
                tenant="research", model="chat", asked_requests_per_s=1, served_requests_per_s=1, gpus=cards - public
            ),
        ),
        loans=(Loan(lender="research", borrower="public", gpus=public - deserved),) if public > deserved else (),
        starts=tuple(replica.id for replica in serving if replica not in before),
        stops=tuple(replica.id for replica in before if replica not in serving),
    )
