"""Who decides in a rehearsal: Waterline's policy, and what people do without it, on the same fleet.

- `waterline`: what the live service runs.
- `plan`: replicas come and go at the hours of the plan, whatever is asked.
- `static`: a fixed split. Each tenant has what it deserves all day, for replicas and jobs of its own; nobody lends.
- `fcfs`: one queue, first come, first served, and no shares; requests go to whoever has least to do, whatever was read
  there before. Replicas start on idle GPUs when the load has grown, and stop when it has fallen; jobs keep theirs.
- `priority`: whoever has the higher priority comes first, at the desk and in taking GPUs, and nobody is promised
  anything. It reacts to the load as it is.

The last three are the tide with other numbers: what they lack cannot happen in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from msgspec.structs import replace

from waterline.fleet import Demand
from waterline.plan import Plan, Replica
from waterline.policy.tide import FIXED, REACT
from waterline.roster import Roster

Policy = Literal["waterline", "plan", "static", "fcfs", "priority"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
ALL = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a rehearsal under a policy begins with."""

    plan: Plan  # as its house is to see it
    rows: tuple[Demand, ...]  # of the demand, likewise
    roster: Roster
    shares: tuple[tuple[float, float, float], ...] | None = None  # of each tenant at the desk; None: the fleet's
    one_queue: bool = False  # everybody is one client of one tenant
    affinity: bool = True  # requests go where the beginning of their prompt has been read
    warm: bool = False  # what is started at the beginning has loaded before
    names: dict[str, str] = field(default_factory=dict)  # of models, where the plan has others than the fleet

    def shown(self, replica: Replica) -> Replica:
        """Return a replica under the name that the fleet has for its model."""
        return replace(replica, model=self.names.get(replica.model, replica.model))


def setting(policy: Policy, plan: Plan, rows: tuple[Demand, ...], hour: int) -> Setting:
    """Return what a rehearsal begins with at an hour of the day; `rows`: who asks."""
    if policy == "static":
        return _static(plan, rows)
    roster = Roster(plan, plan.replicas_at(hour), hour=hour)
    if policy == "fcfs":
        return _fcfs(plan, rows, roster)
    if policy == "priority":
        return _priority(plan, rows, roster)
    return Setting(plan=plan, rows=rows, roster=roster)


def _static(plan: Plan, rows: tuple[Demand, ...]) -> Setting:
    """Give each tenant its own models, and what it deserves for good."""
    own = _own_models(plan, rows)
    roster = Roster(own, ())
    tide = roster.tide
    deserved = tide.tenants.deserved_gpus
    tide.tenants.guarantee_gpus[:], tide.tenants.limit_gpus[:] = deserved, deserved
    for service, one in enumerate(roster.services):
        if not one.job:
            tide.source[service], tide.fixed[service], tide.floor[service] = FIXED, 0.0, 0.0
    for number, tenant in enumerate(roster.tenants):
        has_jobs = any(job.tenant == tenant for job in plan.fleet.jobs)
        mine = [
            service
            for service, one in enumerate(roster.services)
            if one.tenant == tenant and not one.job and roster.asked[service].any()
        ]
        _fill(roster, mine, float(deserved[number]), all_of_it=not has_jobs)
    names = {f"{row.model}@{row.tenant}": row.model for row in rows}
    return Setting(plan=own, rows=_own_rows(rows), roster=roster, warm=True, names=names)


def _fill(roster: Roster, services: Sequence[int], gpus: float, *, all_of_it: bool) -> None:
    """Fix how many replicas each service of a tenant has: one after the other, for whoever has least of its peak.

    Up to its peaks, or, where it has no jobs for what is left, to all of its GPUs.
    """
    tide, left = roster.tide, gpus
    kinds = {}
    for service in services:
        model = tide.services.model[service]
        berths = np.flatnonzero(tide.layouts.gpus[model])
        if len(berths):
            thrift = tide.layouts.gpus[model, berths] / tide.layouts.rate[model, berths]
            best = berths[int(thrift.argmin())]
            kinds[service] = int(tide.layouts.gpus[model, best]), float(tide.layouts.rate[model, best])
    peaks = {service: float(roster.asked[service].max()) for service in kinds}
    while True:
        fitting = [service for service in kinds if kinds[service][0] <= left + 1e-9]
        if not all_of_it:
            fitting = [service for service in fitting if tide.fixed[service] < peaks[service]]
        if not fitting:
            return
        service = min(fitting, key=lambda service: tide.fixed[service] / peaks[service])
        tide.fixed[service] += kinds[service][1]
        left -= kinds[service][0]


def _own_models(plan: Plan, rows: Sequence[Demand]) -> Plan:
    """Return a plan in which no two tenants ask for the same model, and no replica is placed."""
    pairs = list(dict.fromkeys((row.tenant, row.model) for row in rows))
    fleet = plan.fleet
    return replace(
        plan,
        fleet=replace(
            fleet,
            models=tuple(replace(fleet.model(model), name=f"{model}@{tenant}") for tenant, model in pairs),
            demand=_own_rows(fleet.demand),
        ),
        models=tuple(
            replace(one, model=f"{one.model}@{tenant}") for tenant, model in pairs for one in plan.models
            if one.model == model
        ),
        shapes=tuple(
            replace(shape, model=f"{shape.model}@{tenant}") for tenant, model in pairs for shape in plan.shapes
            if shape.model == model
        ),
        replicas=(),
        hours=(),
    )  # fmt: skip


def _own_rows(rows: Sequence[Demand]) -> tuple[Demand, ...]:
    return tuple(replace(row, model=f"{row.model}@{row.tenant}") for row in rows)


def _fcfs(plan: Plan, rows: tuple[Demand, ...], roster: Roster) -> Setting:
    """Forget who is who: all is one tenant's, which has all GPUs."""
    tide, tenants = roster.tide, roster.tide.tenants
    tide.source[tide.source != FIXED] = REACT
    tide.services.tenant[:], tide.services.priority[:] = 0, 0
    tenants.guarantee_gpus[:] = 0.0
    tenants.deserved_gpus[:], tenants.limit_gpus[:] = 0.0, 0.0
    tenants.deserved_gpus[0] = tenants.limit_gpus[0] = float(tide.free_gpus.sum() + tide.replicas.gpus.sum())
    shares = ((0.0, ALL, ALL),) * len(roster.tenants)
    return Setting(plan=plan, rows=rows, roster=roster, shares=shares, one_queue=True, affinity=False)


def _priority(plan: Plan, rows: tuple[Demand, ...], roster: Roster) -> Setting:
    """Promise nothing, and let priority decide.

    The desk knows three classes: below the guarantee, below deserved, and borrowing. The highest priority is always in
    the first, the next in the second, all others in the third.
    """
    tide, tenants = roster.tide, roster.tide.tenants
    tide.source[tide.source != FIXED] = REACT
    tenants.guarantee_gpus[:], tenants.deserved_gpus[:] = 0.0, 0.0
    tenants.limit_gpus[:] = float(tide.free_gpus.sum() + tide.replicas.gpus.sum())
    ranks = sorted({tenant.priority for tenant in plan.fleet.tenants}, reverse=True)
    classes = ((ALL, ALL, ALL), (0.0, ALL, ALL), (0.0, 0.0, ALL))
    shares = tuple(classes[min(ranks.index(tenant.priority), 2)] for tenant in plan.fleet.tenants)
    return Setting(plan=plan, rows=rows, roster=roster, shares=shares)
