"""Plans that no planner has made, for what people see of one and do with it."""

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
    **changes: Any,
) -> Plan:
    """Return a plan of one replica spread evenly over the nodes of a pool, on their first cards."""
    small = small_plan()
    cards = layout.gpus // nodes
    model = replace(small.fleet.models[0], name=name, weights=weights, engine=engine, precisions=(precision,))
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
        tenants=tuple(replace(small.tenants[0], tenant=tenant.name) for tenant in tenants),
        replicas=made,
        hours=tuple(_hour(hour, made, replicas) for hour in EVERY_HOUR),
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
