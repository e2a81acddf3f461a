"""What all tenants together ask of each model, at the hour they ask most."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from waterline.fleet import HOURS, Demand, Fleet, Model
from waterline.planner.candidates import Work
from waterline.workload import Slo, read_trace

PEAK_WINDOW_S = 300.0  # a trace is planned for its busiest five minutes
UNASKED = Demand()  # the request lengths of a model nobody has asked anything of yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One model's work at its peak."""

    model: Model
    tenants: Mapping[str, float]  # requests per second of each
    work: Work

    @property
    def requests_per_s(self) -> float:
        return sum(self.tenants.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One demand, its trace read."""

    tenant: str
    hourly_requests_per_s: tuple[float, ...]
    prompt_tokens: float
    output_tokens: float


def needs(fleet: Fleet) -> list[Need]:
    """Return a need for each model of the fleet, in its order; a model without demand needs one small replica."""
    return [_need(fleet, model) for model in fleet.models]


def _need(fleet: Fleet, model: Model) -> Need:
    asked = [_read(demand) for demand in fleet.demand if demand.model == model.name]
    hour = max(range(HOURS), key=lambda hour: sum(one.hourly_requests_per_s[hour] for one in asked))
    total = sum(one.hourly_requests_per_s[hour] for one in asked)

    def mean(tokens: Callable[[_Asked], float], unasked: int) -> int:
        if total <= 0:
            return unasked
        return max(1, round(sum(tokens(one) * one.hourly_requests_per_s[hour] for one in asked) / total))

    tenants: dict[str, float] = {}
    for one in asked:
        tenants[one.tenant] = tenants.get(one.tenant, 0.0) + one.hourly_requests_per_s[hour]
    context = model.max_context_tokens
    prompt_tokens = min(mean(lambda one: one.prompt_tokens, UNASKED.prompt_tokens), context // 2)
    return Need(
        model=model,
        tenants=tenants,
        work=Work(
            prompt_tokens=prompt_tokens,
            output_tokens=min(mean(lambda one: one.output_tokens, UNASKED.output_tokens), context - prompt_tokens),
            max_context_tokens=context,
            slo=model.slo or Slo(ttft_s=1.0, tpot_s=0.1),
        ),
    )


def _read(demand: Demand) -> _Asked:
    if not demand.trace:
        return _Asked(
            tenant=demand.tenant,
            hourly_requests_per_s=demand.hourly_requests_per_s,
            prompt_tokens=demand.prompt_tokens,
            output_tokens=demand.output_tokens,
        )
    requests = read_trace(Path(demand.trace)).requests
    return _Asked(
        tenant=demand.tenant,
        hourly_requests_per_s=(_peak_requests_per_s([request.arrival_s for request in requests]),) * HOURS,
        prompt_tokens=sum(request.prompt_tokens for request in requests) / len(requests),
        output_tokens=sum(request.output_tokens for request in requests) / len(requests),
    )


def _peak_requests_per_s(arrivals_s: list[float]) -> float:
    """Return the rate of the busiest window; of the whole trace when it is shorter than one."""
    first = most = 0
    for last, arrival_s in enumerate(arrivals_s):
        while arrival_s - arrivals_s[first] > PEAK_WINDOW_S:
            first += 1
        most = max(most, last - first + 1)
    return most / min(PEAK_WINDOW_S, max(1.0, arrivals_s[-1] - arrivals_s[0]))
