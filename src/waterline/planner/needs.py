"""What all tenants together ask of each model, at the hours they ask most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from waterline.fleet import HOURS, Demand, Fleet, Model, default_slo
from waterline.planner.candidates import Work
from waterline.planner.queueing import Lengths, usual_lengths
from waterline.workload import LENGTH_SIGMA, read_trace

PEAK_WINDOW_S = 300.0  # a trace is planned for its busiest five minutes
UNASKED = Demand()  # the request lengths of a model nobody has asked anything of yet
SQUARE_OVER_MEAN = math.exp(LENGTH_SIGMA**2)  # of lengths of which only the mean is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One demand at one hour; of a trace its busiest minutes and its own lengths."""

    tenant: str
    requests_per_s: float
    prompt_tokens: float  # mean
    output_tokens: float
    prompt_square: float = SQUARE_OVER_MEAN  # mean of the square, over the square of the mean
    output_square: float = SQUARE_OVER_MEAN


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One model's work at one hour."""

    model: Model
    asked: tuple[Asked, ...]
    work: Work

    @property
    def requests_per_s(self) -> float:
        return sum(one.requests_per_s for one in self.asked)


def needs(fleet: Fleet, model: Model) -> list[Need]:
    """Return the work of the hours that could be a model's hardest: most requests, most to read, most to write.

    A model without demand has one, of nothing.
    """
    rows = [_hours(demand) for demand in fleet.demand if demand.model == model.name]
    hours = [tuple(row[hour] for row in rows if row[hour].requests_per_s > 0) for hour in range(HOURS)]
    hardest = {
        max(range(HOURS), key=lambda hour: _weight(hours[hour], per_prompt_token, per_output_token, per_request)): None
        for per_prompt_token, per_output_token, per_request in ((0, 0, 1), (1, 0, 0), (0, 1, 0))
    }
    distinct = dict.fromkeys(hours[hour] for hour in hardest)
    return [_need(fleet, model, asked) for asked in distinct]


def _weight(asked: Sequence[Asked], per_prompt_token: int, per_output_token: int, per_request: int) -> float:
    return sum(
        one.requests_per_s * (per_request + per_prompt_token * one.prompt_tokens + per_output_token * one.output_tokens)
        for one in asked
    )


def _need(fleet: Fleet, model: Model, asked: tuple[Asked, ...]) -> Need:
    work = Work(
        lengths=_within(_mixture(asked), model.max_context_tokens),
        max_context_tokens=model.max_context_tokens,
        slo=model.slo or default_slo(fleet.llm_of(model)),
    )
    return Need(model=model, asked=asked, work=work)


def _mixture(asked: Sequence[Asked]) -> Lengths:
    """Return the lengths of all requests together, as one lognormal with the mean and variance of the mixture.

    Of those under way, requests with long answers are more, so their prompts weigh more in the mean context.
    """
    if not asked:
        return usual_lengths(UNASKED.prompt_tokens, UNASKED.output_tokens)
    total = sum(one.requests_per_s for one in asked)
    share = [one.requests_per_s / total for one in asked]
    prompt = sum(part * one.prompt_tokens for part, one in zip(share, asked, strict=True))
    output = sum(part * one.output_tokens for part, one in zip(share, asked, strict=True))
    prompt_square = sum(part * one.prompt_square * one.prompt_tokens**2 for part, one in zip(share, asked, strict=True))
    output_square = sum(part * one.output_square * one.output_tokens**2 for part, one in zip(share, asked, strict=True))
    under_way = sum(
        part * one.output_tokens * (one.prompt_tokens + one.output_tokens * one.output_square / 2)
        for part, one in zip(share, asked, strict=True)
    )
    return Lengths(
        prompt_tokens=max(1, round(prompt)),
        output_tokens=max(1, round(output)),
        prompt_sigma=_sigma(prompt_square / prompt**2),
        output_sigma=_sigma(output_square / output**2),
        context_tokens=max(1, round(under_way / output)),
    )


def _sigma(square_over_mean: float) -> float:
    return math.sqrt(max(1e-4, math.log(max(1.0, square_over_mean))))


def _within(lengths: Lengths, context_tokens: int) -> Lengths:
    """Cut lengths to a context: a model nobody asks anything of may have a short one."""
    prompt_tokens = min(lengths.prompt_tokens, max(1, context_tokens // 2))
    return Lengths(
        prompt_tokens=prompt_tokens,
        output_tokens=min(lengths.output_tokens, max(1, context_tokens - prompt_tokens)),
        prompt_sigma=lengths.prompt_sigma,
        output_sigma=lengths.output_sigma,
        context_tokens=min(lengths.context_tokens, context_tokens),
    )


def _hours(demand: Demand) -> tuple[Asked, ...]:
    """Return a demand hour by hour."""
    if not demand.trace:
        return tuple(
            Asked(
                tenant=demand.tenant,
                requests_per_s=requests_per_s,
                prompt_tokens=demand.prompt_tokens,
                output_tokens=demand.output_tokens,
            )
            for requests_per_s in demand.hourly_requests_per_s
        )
    requests = read_trace(Path(demand.trace)).requests
    prompt_tokens, prompt_square = _moments([request.prompt_tokens for request in requests])
    output_tokens, output_square = _moments([request.output_tokens for request in requests])
    asked = Asked(
        tenant=demand.tenant,
        requests_per_s=_peak_requests_per_s([request.arrival_s for request in requests]),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prompt_square=prompt_square,
        output_square=output_square,
    )
    return (asked,) * HOURS


def _moments(lengths: Sequence[int]) -> tuple[float, float]:
    """Return the mean, and the mean of the square over its square."""
    mean = sum(lengths) / len(lengths)
    return mean, sum(length * length for length in lengths) / len(lengths) / mean**2


def _peak_requests_per_s(arrivals_s: Sequence[float]) -> float:
    """Return the rate of the busiest window; of the whole trace when it is shorter than one."""
    first = most = 0
    for last, arrival_s in enumerate(arrivals_s):
        while arrival_s - arrivals_s[first] > PEAK_WINDOW_S:
            first += 1
        most = max(most, last - first + 1)
    return most / min(PEAK_WINDOW_S, max(1.0, arrivals_s[-1] - arrivals_s[0]))
