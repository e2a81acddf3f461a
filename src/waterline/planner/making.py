"""From a fleet to a plan: what runs where through the day, and what it costs.

`needs` says what is asked at each hour, `offers` prices what could run and states the problem in plain numbers, `milp`
chooses, `packing` gives each replica its GPUs, `day` tells the hours, and `explain` why it came out so.
"""

from collections.abc import Iterator, Sequence
from math import fsum

import numpy as np
from msgspec.structs import replace

from waterline.fleet import Fleet
from waterline.plan import EVERY_HOUR, ModelPlan, Place, Plan, Replica, Shape
from waterline.planner.candidates import Candidate, Expected, expected_all
from waterline.planner.day import hour_plans, tenant_plans
from waterline.planner.explain import Reason, pool_plans, reasons
from waterline.planner.milp import choose, serve_most
from waterline.planner.needs import Need
from waterline.planner.offers import Offer, Offers, offers_of
from waterline.planner.packing import Placed, pack
from waterline.planner.problem import Choice, Figures, capacity_of, rather_whole
from waterline.planner.shortage import warnings as warnings_of
from waterline.units import HOUR_S, MEGA

NEARLY_BEST = 1.1  # times the fewest GPUs a request: a smaller replica is worth that much


def make_plan(fleet: Fleet) -> Plan:
    """Plan a fleet.

    A fleet too small for its demand gets the plan that serves most, which says what is not served and what would help.

    Raises:
        InfeasibleError: a model runs on none of the pools; says what is short, by how much, and what would help.
        InputError: the objective is energy, and the power of a card is not known.
    """
    offers = offers_of(fleet)
    problem = rather_whole(offers.problem)
    choice = choose(problem)
    warnings: tuple[str, ...] = ()
    if choice is None:
        choice = serve_most(problem)
        if fleet.objective != "goodput":
            warnings = warnings_of(offers, choice)
    return _plan(offers, choice, warnings)


def _plan(offers: Offers, choice: Choice, warnings: tuple[str, ...]) -> Plan:
    fleet = offers.fleet
    rates = _rates(offers, choice)
    placed = pack(offers.problem.pools, [(o.pool, o.groups) for o in offers.problem.options], choice.replicas)
    replicas = _replicas(offers, placed, rates)
    asked = offers.asked
    served = np.minimum(asked, choice.served / offers.gpu_time)
    served = np.where(served > asked * (1 - 1e-5), asked, served)
    hours = hour_plans(fleet, replicas, asked, served, choice.gpus)
    return Plan(
        fleet=fleet,
        objective="goodput" if warnings or fleet.objective == "goodput" else fleet.objective,
        models=tuple(
            _model_plan(offers, reason, index, replicas, served) for index, reason in enumerate(reasons(offers, choice))
        ),
        tenants=tenant_plans(fleet, choice.gpus),
        replicas=tuple(replicas),
        hours=hours,
        pools=pool_plans(offers, choice),
        shapes=tuple(_shapes(offers)),
        warnings=warnings,
    )


def _rates(offers: Offers, choice: Choice) -> Figures:
    """[option, hour] requests per second of each replica; all of a model at an hour are loaded alike."""
    capacity = capacity_of(offers.problem, choice.replicas)
    asked = choice.served[:, :-1].sum(axis=1)
    load = np.divide(asked, capacity, out=np.zeros_like(capacity), where=capacity > 0)
    models = [option.model for option in offers.problem.options]
    rates: Figures = offers.problem.rates * np.minimum(1.0, load[models])
    return rates


def _replicas(offers: Offers, placed: Sequence[Placed], rates: Figures) -> list[Replica]:
    """Write the replicas down, numbered by model; those that serve alike expect alike."""
    kinds = {(one.option, one.hours): one for one in placed}
    busiest = [_busiest(offers, one, rates[one.option]) for one in kinds.values()]
    expected = expected_all([candidate for candidate, _ in busiest], [rate for _, rate in busiest])
    alike = {
        key: _replica(offers.offers[key[0]], candidate, times, key[1])
        for key, (candidate, _), times in zip(kinds, busiest, expected, strict=True)
    }
    replicas, numbers = [], dict.fromkeys((model.name for model in offers.fleet.models), 0)
    for one in sorted(placed, key=lambda one: offers.problem.options[one.option].model):
        replica = alike[one.option, one.hours]
        number = numbers[replica.model]
        numbers[replica.model] += 1
        places = _cut(one.places, replica.layout.gpus)
        replicas.append(replace(replica, id=f"{replica.model}/{number}", places=places))
    return replicas


def _busiest(offers: Offers, placed: Placed, rates: Figures) -> tuple[Candidate, float]:
    """Return a replica as priced for the hour at which it is busiest, and its requests/s; `rates` are by hour."""
    offer = offers.offers[placed.option]
    needs = offers.needs[offers.problem.options[placed.option].model]
    return max(
        (
            (candidate, min(float(rates[hour]), candidate.requests_per_s) if needs[hour].asked else 0.0)
            for hour in placed.hours
            if (candidate := offer.by_work.get(needs[hour].work))
        ),
        key=lambda one: one[1] / one[0].requests_per_s,
        default=(offer.any, 0.0),
    )


def _replica(offer: Offer, candidate: Candidate, times: Expected, hours: tuple[int, ...]) -> Replica:
    """Return a replica without a place."""
    lengths = candidate.work.lengths
    return Replica(
        id="-",
        model=offer.model.name,
        pool=offer.pool.name,
        places=(),
        precision=candidate.precision,
        layout=candidate.layout,
        engine=candidate.engine.name,
        max_context_tokens=candidate.work.max_context_tokens,
        max_batch=candidate.full.batch,
        cache_tokens=candidate.cache_tokens,
        requests_per_s=candidate.requests_per_s,
        prefill_tokens_per_s=lengths.prompt_tokens / times.read_s if times.read_s else 0.0,
        tokens_per_s=_tokens_per_s(candidate),
        ttft_s=times.ttft_s,
        tpot_s=times.tpot_s,
        usd_per_hour=offer.usd_per_hour,
        role=candidate.role,
        hours=hours,
        load_s=offer.load_s,
    )


def _shapes(offers: Offers) -> Iterator[Shape]:
    """Yield the best shape of each model on each pool, for the requests of its busiest hour.

    That is the fewest GPUs a request; within a tenth of that, the smallest replica, which is the easiest to lend.
    """
    works = {
        needs[0].model.name: max(needs, key=lambda need: need.requests_per_s).work for needs in offers.needs if needs
    }
    found: dict[tuple[str, str], list[tuple[float, int, Offer, Candidate]]] = {}
    for offer in offers.offers:
        candidate = offer.by_work.get(works[offer.model.name])
        if candidate and offer.shape.role == "both":
            gpus = candidate.layout.gpus
            entry = (gpus / candidate.requests_per_s, gpus, offer, candidate)
            found.setdefault((offer.model.name, offer.pool.name), []).append(entry)
    chosen = []
    for entries in found.values():
        fewest = min(thrift for thrift, *_ in entries)
        near = (entry for entry in entries if entry[0] <= fewest * NEARLY_BEST)
        chosen.append(min(near, key=lambda entry: (entry[1], entry[0]))[2:])
    expected = expected_all([candidate for _, candidate in chosen], [one.requests_per_s for _, one in chosen])
    for (offer, candidate), times in zip(chosen, expected, strict=True):
        replica = _replica(offer, candidate, times, EVERY_HOUR)
        yield Shape(**{name: getattr(replica, name) for name in Shape.__struct_fields__})


def _tokens_per_s(candidate: Candidate) -> float:
    """Return what routers divide requests by: what a side of a split sustains is what it was given requests for."""
    lengths = candidate.work.lengths
    if candidate.role == "both":
        return candidate.full.requests_per_s * (lengths.prompt_tokens + lengths.output_tokens)
    return candidate.requests_per_s * (lengths.prompt_tokens if candidate.role == "prefill" else lengths.output_tokens)


def _cut(places: Sequence[Place], gpus: int) -> tuple[Place, ...]:
    """Return places without the GPUs that a part of an odd size leaves over."""
    cut: list[Place] = []
    for place in places:
        kept = place.gpus[: gpus - sum(len(one.gpus) for one in cut)]
        cut += [replace(place, gpus=kept)] if kept else []
    return tuple(cut)


def _model_plan(offers: Offers, reason: Reason, index: int, replicas: Sequence[Replica], served: Figures) -> ModelPlan:
    model, needs = offers.fleet.models[index], offers.needs[index]
    mine = [replica for replica in replicas if replica.model == model.name]
    gpus = dict.fromkeys(EVERY_HOUR, 0)
    for replica in mine:
        for hour in replica.hours:
            gpus[hour] += replica.layout.gpus
    busiest = max(gpus, key=lambda hour: gpus[hour])
    most = [replica for replica in mine if busiest in replica.hours]
    peak = max(needs, key=lambda need: need.requests_per_s)
    asked = sum(one.requests_per_s for one in peak.asked)
    tokens = sum(one.requests_per_s * (one.prompt_tokens + one.output_tokens) for one in peak.asked)
    requests = float(served[index].sum()) * HOUR_S
    usd = fsum(replica.usd_per_hour * len(replica.hours) for replica in mine)
    lengths = peak.work.lengths
    return ModelPlan(
        model=model.name,
        requests_per_s=asked,
        prompt_tokens=_mean(peak, "prompt_tokens") or lengths.prompt_tokens,
        output_tokens=_mean(peak, "output_tokens") or lengths.output_tokens,
        replicas=len(most),
        gpus=sum(replica.layout.gpus for replica in most),
        usd_per_hour=fsum(replica.usd_per_hour for replica in most),
        usd_per_million_tokens=usd / (requests * tokens / asked) * MEGA if requests else None,
        limited_by=reason.limited_by,
        reason=reason.text,
        slo_hour_usd=reason.slo_hour_usd,
    )


def _mean(need: Need, tokens: str) -> int:
    """Return the mean tokens of the requests of an hour, 0 when there are none."""
    total = need.requests_per_s
    return round(sum(one.requests_per_s * getattr(one, tokens) for one in need.asked) / total) if total else 0
