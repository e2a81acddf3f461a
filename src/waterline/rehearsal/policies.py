"""Who decides in a rehearsal: Waterline's policy, and what people do without it, on the same fleet.

- `waterline`: what the live service runs.
- `plan`: replicas come and go at the hours of the plan, whatever is asked.
- `static`: a fixed split. Each tenant has what it deserves all day, for replicas and jobs of its own; nobody lends.
  See `fixed_split`.
- `fcfs`: one queue, first come, first served, and no shares; requests go to whoever has least to do, whatever was read
  there before. Replicas start on idle GPUs when the load has grown, and stop when it has fallen; jobs keep theirs.
- `priority`: whoever has the higher priority comes first, at the desk and in taking GPUs, and nobody is promised
  anything. It reacts to the load as it is.

The last three are the tide with other numbers: what they lack cannot happen in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from msgspec.structs import replace

from waterline.fleet import Demand
from waterline.plan import Plan, Replica
from waterline.policy.tide import FIXED, REACT
from waterline.rehearsal.fixed_split import Share, kinds_of, shape_of, split
from waterline.roster import ANYTHING, Roster

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
    apart: bool = False  # each replica is one tenant's alone
    notes: tuple[str, ...] = ()  # on what it cannot do

    def shown(self, replica: Replica) -> Replica:
        """Return a replica under the name that the fleet has for its model."""
        return replace(replica, model=self.names.get(replica.model, replica.model))


def setting(policy: Policy, plan: Plan, rows: tuple[Demand, ...], hour: int) -> Setting:
    """Return what a rehearsal begins with at an hour of the day; `rows`: who asks."""
    roster = Roster(plan, plan.replicas_at(hour), hour=hour)
    if policy == "static":
        return _static(plan, rows, roster)
    if policy == "fcfs":
        return _fcfs(plan, rows, roster)
    if policy == "priority":
        return _priority(plan, rows, roster)
    return Setting(plan=plan, rows=rows, roster=roster)


def _static(plan: Plan, rows: tuple[Demand, ...], asked: Roster) -> Setting:
    """Give each tenant its own models, and what it deserves for good; `asked`: knows how much of what."""
    tenants = {tenant.name: float(tenant.deserved or 0.0) * plan.fleet.gpus for tenant in plan.fleet.tenants}
    pairs = dict.fromkeys((row.tenant, row.model) for row in rows)
    shares = [
        Share(
            tenant=tenant,
            model=f"{model}@{tenant}",
            peak=max(float(asked.asked[asked.service(tenant, model)].max()), ANYTHING),
            kinds=kinds_of(plan, model),
            deserves_gpus=tenants[tenant],
        )
        for tenant, model in pairs
    ]
    working = {job.tenant for job in plan.fleet.jobs}
    notes = tuple(split(plan.fleet.pools, shares, fill=tenants.keys() - working))
    own = _own_models(plan, rows, shares)
    roster = Roster(own, own.replicas)
    tide = roster.tide
    tide.tenants.guarantee_gpus[:], tide.tenants.limit_gpus[:] = tide.tenants.deserved_gpus, tide.tenants.deserved_gpus
    for service, one in enumerate(roster.services):
        if not one.job:
            tide.source[service], tide.fixed[service], tide.floor[service] = FIXED, 0.0, 0.0
    owner = {share.model: share.tenant for share in shares}
    for row, replica in roster.has.items():
        if isinstance(replica, Replica):
            tide.replicas.service[row] = roster.service(owner[replica.model], replica.model)
            tide.fixed[tide.replicas.service[row]] += tide.replicas.rate[row]
    names = {f"{row.model}@{row.tenant}": row.model for row in rows}
    return Setting(plan=own, rows=_own_rows(rows), roster=roster, warm=True, names=names, apart=True, notes=notes)


def _own_models(plan: Plan, rows: Sequence[Demand], shares: Sequence[Share]) -> Plan:
    """Return a plan in which no two tenants ask for the same model, and each has its share."""
    pairs = list(dict.fromkeys((row.tenant, row.model) for row in rows))
    fleet, replicas = plan.fleet, tuple(replica for share in shares for replica in share.has)
    kinds = {(replica.model, replica.pool): replica for replica in reversed(replicas)}  # the first of each
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
        shapes=tuple(map(shape_of, kinds.values())),
        replicas=replicas,
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
