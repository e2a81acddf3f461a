"""From a fleet to a plan: for each model the cheapest layout that holds it and meets its SLO, and enough replicas.

Models are placed one after another, the largest first, because it has the fewest places to go. A model that no single
layout can serve whole is spread over several, the cheapest first: a mixed fleet is the normal case.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from waterline.errors import InfeasibleError
from waterline.fleet import Fleet, Pool
from waterline.hardware import Node
from waterline.plan import ModelPlan, Plan, Replica, TenantPlan
from waterline.planner.candidates import Candidate, Expected, Rejection, Shape, expected, layouts, price_all
from waterline.planner.explain import why, why_not, why_not_enough, why_over_limit
from waterline.planner.needs import Need, needs
from waterline.planner.packing import FreeGpus
from waterline.units import HOUR_S, MEGA

__all__ = ["make_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A candidate on a pool."""

    pool: Pool
    candidate: Candidate

    @property
    def usd_per_hour(self) -> float:
        """Of one replica."""
        return self.candidate.layout.gpus * (self.pool.usd_per_gpu_hour or 0.0)

    def replicas_for(self, requests_per_s: float) -> int:
        return max(1, math.ceil(requests_per_s / self.candidate.requests_per_s))

    def total(self, requests_per_s: float) -> tuple[float, int]:
        """Return dollars an hour and GPUs for a rate: what options are compared by."""
        replicas = self.replicas_for(requests_per_s)
        return replicas * self.usd_per_hour, replicas * self.candidate.layout.gpus

    def __str__(self) -> str:
        return f"{self.candidate.precision} {self.candidate.layout} on {self.pool.name}"


def make_plan(fleet: Fleet) -> Plan:
    """Plan a fleet. Raises InfeasibleError naming what is short, by how much, and what would help."""
    free = FreeGpus(fleet)
    models: dict[str, ModelPlan] = {}
    replicas: dict[str, list[Replica]] = {}
    used = dict.fromkeys((tenant.name for tenant in fleet.tenants), 0.0)
    for model in sorted(fleet.models, key=lambda model: -fleet.llm_of(model).parameters):
        hours = [(need, _options(fleet, need)) for need in needs(fleet, model)]
        need, options = max(hours, key=lambda hour: hour[1][0].total(hour[0].requests_per_s))
        chosen = _choose(need, options, free)
        replicas[model.name] = _replicas(need, chosen, free)
        models[model.name] = _model_plan(need, options, chosen, replicas[model.name])
        for tenant, gpus in _gpus_by_tenant(need, chosen, models[model.name].gpus).items():
            used[tenant] += gpus
    return Plan(
        fleet=fleet,
        models=tuple(models[model.name] for model in fleet.models),
        tenants=_tenant_plans(fleet, used),
        replicas=tuple(replica for model in fleet.models for replica in replicas[model.name]),
    )


def _options(fleet: Fleet, need: Need) -> list[Option]:
    """Return every layout on every pool that does, the cheapest for the whole need first."""
    llm = fleet.llm_of(need.model)
    options, rejections = [], []
    for pool in fleet.pools:
        node = Node(gpu=fleet.gpu_of(pool), gpus=pool.gpus_per_node)
        wanted = [
            Shape(llm=llm, node=node, nodes=pool.nodes, layout=layout, precision=precision, engine=need.model.engine)
            for precision in need.model.precisions
            for layout in layouts(llm, node, pool.nodes)
        ]
        for priced in price_all(wanted, [need.work])[0]:
            if isinstance(priced, Rejection):
                rejections.append((pool.name, priced))
            else:
                options.append(Option(pool=pool, candidate=priced))
    if not options:
        raise InfeasibleError(why_not(need, fleet, rejections))
    return sorted(options, key=lambda option: option.total(need.requests_per_s))


def _choose(need: Need, options: Sequence[Option], free: FreeGpus) -> list[tuple[Option, int]]:
    """Return options with how many replicas of each: one option when one has the room, else several."""
    for option in options:
        replicas = option.replicas_for(need.requests_per_s)
        if free.room(option.pool.name, option.candidate.layout) >= replicas:
            return [(option, replicas)]
    chosen, missing = [], need.requests_per_s
    left = {option.pool.name: free.free(option.pool.name) for option in options}
    for option in sorted(options, key=lambda option: option.usd_per_hour / option.candidate.requests_per_s):
        pool, layout = option.pool.name, option.candidate.layout
        if left[pool] < free.free(pool):  # one layout a pool, so that the room counted is still there
            continue
        replicas = min(free.room(pool, layout), option.replicas_for(missing))
        if replicas > 0:
            chosen.append((option, replicas))
            left[pool] -= replicas * layout.gpus
            missing -= replicas * option.candidate.requests_per_s
        if missing <= 0:
            return chosen
    raise InfeasibleError(why_not_enough(need, [(str(option), replicas) for option, replicas in chosen], missing))


def _replicas(need: Need, chosen: Sequence[tuple[Option, int]], free: FreeGpus) -> list[Replica]:
    """Take the GPUs and write the replicas down, each expected to get its part of the rate."""
    capacity = sum(option.candidate.requests_per_s * replicas for option, replicas in chosen)
    replicas: list[Replica] = []
    for option, count in chosen:
        candidate, work = option.candidate, need.work
        pace = _pace(need, option, capacity)
        first = len(replicas)
        replicas += [
            Replica(
                id=f"{need.model.name}/{first + index}",
                model=need.model.name,
                pool=option.pool.name,
                places=free.take(option.pool.name, candidate.layout),
                precision=candidate.precision,
                layout=candidate.layout,
                engine=candidate.engine.name,
                max_context_tokens=work.max_context_tokens,
                max_batch=candidate.full.batch,
                cache_tokens=candidate.cache_tokens,
                requests_per_s=candidate.requests_per_s,
                prefill_tokens_per_s=work.lengths.prompt_tokens / pace.read_s,
                tokens_per_s=candidate.full.requests_per_s * (work.lengths.prompt_tokens + work.lengths.output_tokens),
                ttft_s=pace.ttft_s,
                tpot_s=pace.tpot_s,
                usd_per_hour=option.usd_per_hour,
            )
            for index in range(count)
        ]
    return replicas


def _pace(need: Need, option: Option, capacity_requests_per_s: float) -> Expected:
    """Return the pace of a replica that gets its part of the rate."""
    part = min(1.0, need.requests_per_s / capacity_requests_per_s)
    return expected(option.candidate, option.candidate.requests_per_s * part)


def _model_plan(
    need: Need, options: Sequence[Option], chosen: Sequence[tuple[Option, int]], replicas: Sequence[Replica]
) -> ModelPlan:
    usd_per_hour = sum(replica.usd_per_hour for replica in replicas)
    lengths = need.work.lengths
    tokens_per_hour = need.requests_per_s * (lengths.prompt_tokens + lengths.output_tokens) * HOUR_S
    priced = [(option.total(need.requests_per_s)[0], str(option)) for option in options]
    return ModelPlan(
        model=need.model.name,
        requests_per_s=need.requests_per_s,
        prompt_tokens=lengths.prompt_tokens,
        output_tokens=lengths.output_tokens,
        replicas=len(replicas),
        gpus=sum(replica.layout.gpus for replica in replicas),
        usd_per_hour=usd_per_hour,
        usd_per_million_tokens=usd_per_hour / tokens_per_hour * MEGA if tokens_per_hour else None,
        limited_by=chosen[0][0].candidate.limited_by,
        reason=why(priced, [(options.index(option), replicas) for option, replicas in chosen]),
    )


def _gpus_by_tenant(need: Need, chosen: Sequence[tuple[Option, int]], gpus: int) -> dict[str, float]:
    """Share a model's GPUs among its tenants by the GPU time of their requests: reading, and writing in a batch."""
    option = chosen[0][0]
    capacity = sum(option.candidate.requests_per_s * count for option, count in chosen)
    pace = _pace(need, option, capacity)
    per_prompt_token_s = pace.read_s / need.work.lengths.prompt_tokens
    per_output_token_s = pace.plain_s / max(1.0, pace.batch)
    times: dict[str, float] = {}
    for one in need.asked:
        time = one.prompt_tokens * per_prompt_token_s + one.output_tokens * per_output_token_s
        times[one.tenant] = times.get(one.tenant, 0.0) + one.requests_per_s * time
    return {tenant: gpus * time / sum(times.values()) for tenant, time in times.items()}


def _tenant_plans(fleet: Fleet, used: Mapping[str, float]) -> tuple[TenantPlan, ...]:
    """Hold what each tenant uses against its limit."""
    plans = tuple(
        TenantPlan(
            tenant=tenant.name,
            gpus=used[tenant.name],
            guarantee_gpus=tenant.guarantee * fleet.gpus,
            deserved_gpus=(tenant.deserved or 0.0) * fleet.gpus,
            limit_gpus=tenant.limit * fleet.gpus,
        )
        for tenant in fleet.tenants
    )
    for plan in plans:
        if plan.gpus > plan.limit_gpus + 1e-9:
            raise InfeasibleError(why_over_limit(plan, fleet.gpus))
    return plans
