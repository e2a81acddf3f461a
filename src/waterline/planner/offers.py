"""What a fleet could run, priced, and the planning problem that follows: from cards and models to plain numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from waterline.errors import InfeasibleError, InputError
from waterline.fleet import HOURS, Fleet, Model, Pool
from waterline.hardware import Node
from waterline.plan import Layout
from waterline.planner.candidates import Candidate, Rejection, Shape, Work, expected, price_all, shapes
from waterline.planner.needs import Asked, Need, needs
from waterline.planner.nowhere import why_not
from waterline.planner.problem import Figures, Option, Problem
from waterline.units import HOUR_S

ONE_REPLICA = 1.0  # what nobody asks of a model that nobody asks anything of, of replicas that do one each
HARDLY_ANY = 1e-6  # a request: the goodput of such a replica, so that it comes last


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A shape on a pool, priced for the work of each hour."""

    model: Model
    pool: Pool
    shape: Shape
    by_work: dict[Work, Candidate]  # without the work for which it does not hold the SLO

    @property
    def any(self) -> Candidate:
        return next(iter(self.by_work.values()))

    @property
    def groups(self) -> tuple[int, ...]:
        return groups_of(self.shape.layout, self.pool.gpus_per_node)

    @property
    def usd_per_hour(self) -> float:
        """Of one replica."""
        return self.shape.layout.gpus * (self.pool.usd_per_gpu_hour or 0.0)

    @property
    def load_s(self) -> float:
        """From a start to the first request: the engine, and the weights onto each card."""
        return self.any.engine.start_s + self.any.memory.weights_bytes / self.any.engine.load_bytes_per_s

    @property
    def watts(self) -> float:
        return self.shape.layout.gpus * (self.shape.node.gpu.tdp_watts or 0.0)

    def __str__(self) -> str:
        role = "" if self.shape.role == "both" else f" {self.shape.role}"
        return f"{self.shape.precision} {self.shape.layout}{role} on {self.pool.name}"


@dataclass(frozen=True, kw_only=True)
class Offers:
    """Everything a fleet could run for what is asked of it, and the same as a planning problem."""

    fleet: Fleet
    needs: tuple[tuple[Need, ...], ...]  # [model][hour]
    offers: tuple[Offer, ...]  # of the options of the problem, in their order
    problem: Problem
    asked: Figures  # [model, tenant, hour] requests per second; the last tenant is nobody and asks nothing
    gpu_time: Figures  # [model, tenant, hour] of a request, over that of the mixture its work was priced for


def groups_of(layout: Layout, gpus_per_node: int) -> tuple[int, ...]:
    """Return the GPUs of each part of a replica that must stay inside a node.

    A stage of a pipeline is one part; experts that are spread over more cards than a node has take whole nodes. A part
    that is no power of two takes the room of the next one, so that parts of a node never overlap.
    """
    stage = layout.tp * layout.dp
    if stage > gpus_per_node:
        return (gpus_per_node,) * (-(-stage // gpus_per_node) * layout.pp)
    return (min(gpus_per_node, 1 << (stage - 1).bit_length()),) * layout.pp


def offers_of(fleet: Fleet) -> Offers:
    """Price all that could run. Raises InfeasibleError where a model runs on none of the pools."""
    by_model = tuple(needs(fleet, model) for model in fleet.models)
    offers = [offer for hours in by_model for offer in _offers_of_model(fleet, hours)]
    asked, gpu_time = _asked(fleet, by_model), _gpu_time(fleet, by_model, offers)
    return Offers(
        fleet=fleet,
        needs=by_model,
        offers=tuple(offers),
        asked=asked,
        gpu_time=gpu_time,
        problem=_problem(fleet, by_model, offers, asked, gpu_time),
    )


def _offers_of_model(fleet: Fleet, hours: Sequence[Need]) -> list[Offer]:
    """Return every shape on every pool that does for the work of some hour.

    Prefill and decode apart are for pools of several nodes: inside one node, what they share is not worth two engines.
    """
    model = hours[0].model
    llm = fleet.llm_of(model)
    works = list(dict.fromkeys(need.work for need in hours))
    wanted = [
        (pool, shape)
        for pool in fleet.pools
        for node in [Node(gpu=fleet.gpu_of(pool), gpus=pool.gpus_per_node)]
        for shape in shapes(llm, node, pool.nodes, model.precisions, model.engine, model.measured)
        if shape.role == "both" or pool.nodes > 1
    ]
    priced = price_all([shape for _, shape in wanted], works)
    found, rejections = [], []
    for index, (pool, shape) in enumerate(wanted):
        answers = [(work, of_work[index]) for work, of_work in zip(works, priced, strict=True)]
        does = {work: answer for work, answer in answers if isinstance(answer, Candidate)}
        if does:
            found.append(Offer(model=model, pool=pool, shape=shape, by_work=does))
        rejections += [(pool.name, answer) for _, answer in answers if isinstance(answer, Rejection)]
    roles = {offer.shape.role for offer in found}
    if "both" not in roles and roles != {"prefill", "decode"}:
        raise InfeasibleError(why_not(max(hours, key=lambda need: need.requests_per_s), fleet, rejections))
    return found


def _gpu_time(fleet: Fleet, by_model: Sequence[Sequence[Need]], offers: Sequence[Offer]) -> Figures:
    """Return the GPU time of each tenant's mean request: reading, and writing in a batch."""
    tenants = [tenant.name for tenant in fleet.tenants]
    times = np.ones((len(by_model), len(tenants) + 1, HOURS))
    for model, hours in enumerate(by_model):
        known: dict[Work, tuple[float, float]] = {}
        for hour, need in enumerate(hours):
            if need.work not in known:
                known[need.work] = _seconds_per_token(need, offers)
            if not need.asked:
                continue
            mean_s = _mean_s(need.asked, *known[need.work])
            for tenant in {one.tenant for one in need.asked}:
                mine_s = _mean_s([one for one in need.asked if one.tenant == tenant], *known[need.work])
                times[model, tenants.index(tenant), hour] = mine_s / mean_s
    return times


def _mean_s(asked: Sequence[Asked], reading_s: float, writing_s: float) -> float:
    """Return the GPU time of a mean request, from that of a token to read and of one to write."""
    times_s = [one.prompt_tokens * (1 - one.prefix_hit) * reading_s + one.output_tokens * writing_s for one in asked]
    rates = [one.requests_per_s for one in asked]
    return float(np.average(times_s, weights=rates))


def _seconds_per_token(need: Need, offers: Sequence[Offer]) -> tuple[float, float]:
    """Return the time of a token to read and of one to write, in a batch, on the offer that costs least a request."""
    of_work = [
        (offer.usd_per_hour / candidate.requests_per_s, candidate)
        for offer in offers
        if offer.model is need.model and offer.shape.role == "both" and (candidate := offer.by_work.get(need.work))
    ]
    if not of_work:
        return 1.0, 1.0
    _, best = min(of_work, key=lambda one: one[0])
    pace = expected(best, best.requests_per_s)
    read_tokens = best.lengths.prompt_tokens - best.lengths.cached_tokens
    return pace.read_s / read_tokens, pace.plain_s / max(1.0, pace.batch)


def _problem(
    fleet: Fleet, by_model: Sequence[Sequence[Need]], offers: Sequence[Offer], asked: Figures, gpu_time: Figures
) -> Problem:
    demand = asked * gpu_time
    value = 1.0 / gpu_time
    nobody = demand.sum(axis=(1, 2)) <= 0
    demand[nobody, -1, :] = ONE_REPLICA
    value[:, -1, :] = HARDLY_ANY
    models = [model.name for model in fleet.models]
    pools = [pool.name for pool in fleet.pools]
    options = []
    for offer in offers:
        model = models.index(offer.model.name)
        cost, hours_to_load = _cost(fleet, offer), offer.load_s / HOUR_S
        options.append(
            Option(
                model=model,
                pool=pools.index(offer.pool.name),
                groups=offer.groups,
                requests_per_s=(ONE_REPLICA,) * HOURS if nobody[model] else _rates(offer, by_model[model]),
                cost=cost,
                start_cost=cost * hours_to_load,
                role=offer.shape.role,
                partner=partner_of(offer.shape),
            )
        )
    shares = np.array([(tenant.guarantee, tenant.deserved or 0.0, tenant.limit) for tenant in fleet.tenants])
    guarantee, deserved, limit = np.vstack([shares * fleet.gpus, (0.0, inf, inf)]).T
    return Problem(
        pools=tuple((pool.nodes, pool.gpus_per_node) for pool in fleet.pools),
        options=tuple(options),
        demand=demand,
        value=value,
        guarantee=guarantee,
        deserved=deserved,
        limit=limit,
    )


def _asked(fleet: Fleet, by_model: Sequence[Sequence[Need]]) -> Figures:
    tenants = [tenant.name for tenant in fleet.tenants]
    asked = np.zeros((len(by_model), len(tenants) + 1, HOURS))
    for model, hours in enumerate(by_model):
        for hour, need in enumerate(hours):
            for one in need.asked:
                asked[model, tenants.index(one.tenant), hour] += one.requests_per_s
    return asked


def partner_of(shape: Shape) -> str:
    """Return what prefill and decode must have in common: who makes the cards, and the precision of the cache."""
    return "" if shape.role == "both" else f"{shape.node.gpu.vendor} {shape.precision}"


def _rates(offer: Offer, hours: Sequence[Need]) -> tuple[float, ...]:
    return tuple(candidate.requests_per_s if (candidate := offer.by_work.get(need.work)) else 0.0 for need in hours)


def _cost(fleet: Fleet, offer: Offer) -> float:
    if fleet.objective != "energy":
        return offer.usd_per_hour
    if offer.shape.node.gpu.tdp_watts is None:
        raise InputError(
            f"the catalogue does not know the power of '{offer.pool.gpu}' in pool '{offer.pool.name}', so energy "
            'cannot be planned for. Write objective = "money", or take that pool out.'
        )
    return offer.watts
