"""What all tenants together ask of each model, hour by hour."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from waterline.fleet import HOURS, Demand, Fleet, Model, default_slo
from waterline.planner.candidates import Work
from waterline.planner.queueing import Lengths, usual_lengths
from waterline.units import GIGA
from waterline.workload import LENGTH_SIGMA
from waterline.workload.stream import Ints, Longs

PEAK_WINDOW_NS = 300 * GIGA  # a trace is planned for its busiest five minutes
NOTHING_PER_S = 1e-9  # one request in thirty years
MOST_CACHED = 0.999  # the last token of a prompt is always read
LARGE = 10**6  # tokens; a chunk of squares of more might not fit 64 bits
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
    prefix_hit: float = 0.0  # share of the prompts' tokens that are in the cache already


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One model's work at one hour."""

    model: Model
    asked: tuple[Asked, ...]
    work: Work  # of a mixture near to what is asked, see `needs`

    @property
    def requests_per_s(self) -> float:
        return sum(one.requests_per_s for one in self.asked)


def needs(fleet: Fleet, model: Model) -> tuple[Need, ...]:
    """Return a model's work at each of the 24 hours.

    Work is priced for a mixture of tenants in eighths of the requests, so that hours that hardly differ have the same;
    whoever counts requests by their GPU time makes up for the rest. An hour without requests has the work of the one
    before, and a model without demand that of usual requests.
    """
    rows = [_hours(demand) for demand in fleet.demand if demand.model == model.name]
    hours = [tuple(row[hour] for row in rows if row[hour].requests_per_s > NOTHING_PER_S) for hour in range(HOURS)]
    works: dict[tuple[Asked, ...], Work] = {}
    found, latest = [], next((asked for asked in reversed(hours) if asked), ())
    for asked in hours:
        latest = asked or latest
        mixture = _in_eighths(latest)
        if mixture not in works:
            works[mixture] = Work(
                lengths=_within(_mixture(mixture), model.max_context_tokens),
                max_context_tokens=model.max_context_tokens,
                slo=model.slo or default_slo(fleet.llm_of(model)),
            )
        found.append(Need(model=model, asked=asked, work=works[mixture]))
    return tuple(found)


def _in_eighths(asked: tuple[Asked, ...]) -> tuple[Asked, ...]:
    """Return what is asked with each part of the requests rounded to an eighth of them; equal requests are one part."""
    total = sum(one.requests_per_s for one in asked)
    parts: dict[Asked, float] = {}
    for one in asked:
        alike = replace(one, tenant="", requests_per_s=1.0)
        parts[alike] = parts.get(alike, 0.0) + one.requests_per_s / total
    if len(parts) == 1:
        return tuple(parts)
    eighths = {alike: round(8 * part) / 8 for alike, part in parts.items()}
    return tuple(replace(alike, requests_per_s=part) for alike, part in eighths.items() if part > 0) or tuple(parts)


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
        prefix_hit=sum(part * one.prompt_tokens * one.prefix_hit for part, one in zip(share, asked, strict=True))
        / prompt,
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
        prefix_hit=lengths.prefix_hit,
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
                prefix_hit=demand.prefix_hit,
            )
            for requests_per_s in demand.hourly_requests_per_s
        )
    return (_recorded(demand),) * HOURS


def _recorded(demand: Demand) -> Asked:
    """Read a trace once, and say what it asks in its busiest minutes and how long its requests are."""
    peak = _Peak()
    prompts, outputs = _Moments(), _Moments()
    cached_tokens = 0
    from waterline.workload.files import open_trace  # noqa: PLC0415 - every format's libraries; most fleets name no trace

    for chunk in open_trace(demand.trace, columns=demand.columns).chunks():
        peak.add(chunk.arrival_ns)
        prompts.add(chunk.prompt_tokens)
        outputs.add(chunk.output_tokens)
        cached_tokens += int(chunk.cached_tokens.sum(dtype=np.int64))
    return Asked(
        tenant=demand.tenant,
        requests_per_s=peak.requests_per_s,
        prompt_tokens=prompts.mean,
        output_tokens=outputs.mean,
        prompt_square=prompts.square_over_mean,
        output_square=outputs.square_over_mean,
        prefix_hit=min(cached_tokens / prompts.total, MOST_CACHED) if cached_tokens else demand.prefix_hit,
    )


@dataclass(slots=True)
class _Moments:
    """Of lengths, as they are added."""

    count: int = 0
    total: int = 0
    squares: int = 0

    def add(self, lengths: Ints) -> None:
        whole = lengths.astype(np.int64)
        self.count += len(whole)
        self.total += int(whole.sum())
        self.squares += sum((whole * whole).tolist()) if whole.max() > LARGE else int((whole * whole).sum())

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def square_over_mean(self) -> float:
        """The mean of the square, over the square of the mean."""
        return self.squares / self.count / self.mean**2


@dataclass(slots=True)
class _Peak:
    """The busiest window of arrivals, as they are added; of all when they are shorter than one."""

    recent_ns: Longs = field(default_factory=lambda: np.zeros(0, np.int64))  # those of the last window
    first_ns: int | None = None
    most: int = 0

    def add(self, arrival_ns: Longs) -> None:
        self.first_ns = int(arrival_ns[0]) if self.first_ns is None else self.first_ns
        pool = np.concatenate([self.recent_ns, arrival_ns])
        first = np.searchsorted(pool, pool - PEAK_WINDOW_NS)
        self.most = max(self.most, int((np.arange(len(pool)) - first).max()) + 1)
        self.recent_ns = pool[first[-1] :]

    @property
    def requests_per_s(self) -> float:
        span_ns = int(self.recent_ns[-1]) - (self.first_ns or 0)
        return self.most * GIGA / min(PEAK_WINDOW_NS, max(GIGA, span_ns))
