"""The day hour by hour, as the plan tells it: who is served with how many GPUs, who lends them, what moves."""

from collections.abc import Iterator, Sequence
from math import fsum

import numpy as np

from waterline.fleet import Fleet
from waterline.plan import EVERY_HOUR, HourPlan, Loan, Replica, Share, TenantPlan
from waterline.planner.problem import SLACK, Figures
from waterline.units import HOUR_S


def hour_plans(
    fleet: Fleet, replicas: Sequence[Replica], asked: Figures, served: Figures, gpus: Figures
) -> tuple[HourPlan, ...]:
    """Return all 24 hours.

    Args:
        fleet: whose models and tenants they are.
        replicas: with their hours.
        asked: [model, tenant, hour] requests per second; the last tenant is nobody.
        served: likewise.
        gpus: [model, tenant, hour] that each tenant uses.
    """
    watts = {pool.name: fleet.gpu_of(pool).tdp_watts or 0.0 for pool in fleet.pools}
    at_hour: list[list[Replica]] = [[] for _ in EVERY_HOUR]
    for replica in replicas:
        for hour in replica.hours:
            at_hour[hour].append(replica)
    return tuple(
        _hour_plan(
            fleet,
            hour,
            at_hour[hour],
            at_hour[hour - 1],
            watts,
            asked[:, :, hour],
            served[:, :, hour],
            gpus[:, :, hour],
        )
        for hour in EVERY_HOUR
    )


def _hour_plan(
    fleet: Fleet,
    hour: int,
    now: Sequence[Replica],
    before: Sequence[Replica],
    watts: dict[str, float],
    asked: Figures,
    served: Figures,
    gpus: Figures,
) -> HourPlan:
    running, ran = {replica.id for replica in now}, {replica.id for replica in before}
    starting = [replica for replica in now if replica.id not in ran]
    return HourPlan(
        hour=hour,
        gpus=sum(replica.layout.gpus for replica in now),
        usd=fsum(replica.usd_per_hour for replica in now)
        + fsum(replica.usd_per_hour * replica.load_s / HOUR_S for replica in starting),
        watts=fsum(watts[replica.pool] * replica.layout.gpus for replica in now),
        shares=tuple(
            Share(
                tenant=tenant.name,
                model=model.name,
                asked_requests_per_s=float(asked[row, column]),
                served_requests_per_s=float(served[row, column]),
                gpus=float(gpus[row, column]),
            )
            for row, model in enumerate(fleet.models)
            for column, tenant in enumerate(fleet.tenants)
            if asked[row, column] > 0
        ),
        loans=tuple(loans(fleet, gpus.sum(axis=0)[:-1].tolist())),
        starts=tuple(replica.id for replica in starting),
        stops=tuple(replica.id for replica in before if replica.id not in running),
    )


def loans(fleet: Fleet, use: Sequence[float]) -> Iterator[Loan]:
    """Yield who borrows from whom, in proportion to what each leaves idle of what it deserves beyond its guarantee.

    What nobody deserves is lent by nobody, named "". There is always enough, because the sum over tenants of
    max(guarantee, use) is within the fleet.
    """
    deserved = [(tenant.deserved or 0.0) * fleet.gpus for tenant in fleet.tenants]
    guarantee = [tenant.guarantee * fleet.gpus for tenant in fleet.tenants]
    idle = {"": max(0.0, fleet.gpus - fsum(deserved))}
    for index, tenant in enumerate(fleet.tenants):
        idle[tenant.name] = max(0.0, deserved[index] - max(guarantee[index], use[index]))
    total = fsum(idle.values())
    for index, tenant in enumerate(fleet.tenants):
        over = use[index] - deserved[index]
        if over > SLACK * fleet.gpus and total > 0:
            for lender, gpus in idle.items():
                if gpus > 0:
                    yield Loan(lender=lender, borrower=tenant.name, gpus=over * gpus / total)


def tenant_plans(fleet: Fleet, gpus: Figures) -> tuple[TenantPlan, ...]:
    """Return what each tenant uses at its own peak, beside what it is entitled to."""
    peaks = np.max(gpus.sum(axis=0), axis=1)
    return tuple(
        TenantPlan(
            tenant=tenant.name,
            gpus=float(peaks[index]),
            guarantee_gpus=tenant.guarantee * fleet.gpus,
            deserved_gpus=(tenant.deserved or 0.0) * fleet.gpus,
            limit_gpus=tenant.limit * fleet.gpus,
        )
        for index, tenant in enumerate(fleet.tenants)
    )
