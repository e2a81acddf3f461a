"""Who asks what, and when: a trace dealt to the fleet's demand, or arrivals drawn for it.

Nothing here is random without a seed, and each row of the demand draws from its own stream: to add a row leaves what
the others ask as it was.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.random import PCG64, Generator

from waterline.errors import InputError
from waterline.fleet import DEFAULT_CONTEXT_TOKENS, HOURS, Demand
from waterline.plan import Plan
from waterline.units import HOUR_S
from waterline.workload import LENGTH_SIGMA, TICKS_PER_S, Request, Trace, read_trace

DEFAULT_DURATION_S = 15 * 60.0
MOST_DRAWN = 50_000_000  # requests; they are held in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """The requests of a rehearsal in the order of their arrival, and a line or more on where they come from."""

    requests: tuple[Request, ...]
    notes: tuple[str, ...]


def traffic(plan: Plan, trace: Trace | None, *, seed: int, duration_s: float | None) -> Traffic:
    """Return what is asked of a fleet.

    Args:
        plan: its fleet says who asks. Without demand, a trace goes to all models in equal parts, from the first tenant.
        trace: dealt to the rows of the demand, see `deal`. None: each row replays its own trace, or draws its arrivals,
            see `poisson_trace`, from the fleet's busiest hour on.
        seed: of all drawing.
        duration_s: ask only so long. None: all of the longest trace, or 15 minutes where there is none.

    Raises:
        TraceError: a row's trace cannot be read.
        InputError: nothing is asked in that time, or too much, or it is no time; or the seed is negative.
    """
    if duration_s is not None and not 0 < duration_s < math.inf:
        raise InputError(f"a rehearsal of {duration_s:g} s is none. Ask for more than 0 s, and an end.")
    if seed < 0:
        raise InputError(f"seed = {seed} is negative. Give one from 0 on.")
    rows = _rows(plan)
    own_traces = {row.trace: read_trace(Path(row.trace)) for row in rows if row.trace}
    hour = busiest_hour(rows)
    if trace:
        rates = [_mean_rate(own_traces[row.trace]) if row.trace else row.hourly_requests_per_s[hour] for row in rows]
        asked = deal([request for request in trace.requests if _within(request, duration_s)], rows, rates)
        notes = [f"{trace.name}: {_span(asked)}", f"dealt in turn to {_dealt(asked, rows)}"]
    else:
        length_s = duration_s or max((own.duration_s for own in own_traces.values()), default=DEFAULT_DURATION_S)
        _check_drawn(sum(max(row.hourly_requests_per_s, default=0.0) for row in rows) * length_s, length_s)
        asked, notes = [], []
        for index, row in enumerate(rows):
            own = own_traces.get(row.trace) or _drawn(plan, row, Generator(PCG64([seed, index])), hour, length_s)
            of_row = [
                replace(request, tenant=row.tenant, model=row.model)
                for request in own.requests
                if _within(request, duration_s)
            ]
            asked += of_row
            notes.append(f"{row.tenant}/{row.model}: {own.name}: {_span(of_row)}")
        asked.sort(key=lambda request: request.arrival_s)
        if not all(row.trace for row in rows):
            notes.append(f"drawn with seed {seed}, over {length_s / 60:.3g} min from {hour}:00, the busiest hour")
    if not asked:
        raise InputError(
            "the fleet's demand asks for nothing in that time. Give a [[demand]] its requests_per_s, or rehearse with "
            "--trace FILE, or a longer --duration."
        )
    return Traffic(requests=tuple(asked), notes=tuple(notes))


def deal(requests: Iterable[Request], rows: Sequence[Demand], rates: Sequence[float]) -> list[Request]:
    """Give each request to a row of the demand, in proportion to the rows' rates; in equal parts when all are 0.

    Deterministic and as even as can be: each request goes to the row that lags furthest behind its share of all so far,
    the first of equal ones.
    """
    weights = rates if any(rates) else [1.0] * len(rates)
    total = sum(weights)
    taken = [0] * len(rows)
    dealt = []
    for number, request in enumerate(requests, start=1):
        lags = [weight * number - total * count for weight, count in zip(weights, taken, strict=True)]
        taker = lags.index(max(lags))
        taken[taker] += 1
        dealt.append(replace(request, tenant=rows[taker].tenant, model=rows[taker].model))
    return dealt


def poisson_trace(
    name: str,
    hourly_requests_per_s: Sequence[float],
    *,
    prompt_tokens: int,
    output_tokens: int,
    max_context_tokens: int,
    duration_s: float,
    first_hour: int,
    generator: Generator,
) -> Trace:
    """Draw a trace: Poisson arrivals whose rate changes with the hour, and lognormal lengths.

    Arrivals at the largest rate are thinned to the rate of their hour, and rounded to 100 ns, which a trace file keeps.
    Lengths are independent, with the stated means and `LENGTH_SIGMA`, at least 1; where prompt and output exceed the
    context, the output is cut, and the prompt when it alone does. So the means come out a little lower than stated when
    they are not far below the context.
    """
    largest = max(hourly_requests_per_s)
    candidates_s = np.sort(generator.random(generator.poisson(largest * duration_s))) * duration_s
    hours = (first_hour + (candidates_s // HOUR_S).astype(np.int64)) % HOURS
    kept = generator.random(len(candidates_s)) * largest < np.asarray(hourly_requests_per_s)[hours]
    arrivals_s = np.round(candidates_s[kept] * TICKS_PER_S) / TICKS_PER_S
    prompts = np.clip(_lengths(prompt_tokens, len(arrivals_s), generator), 1, max_context_tokens - 1)
    outputs = np.clip(_lengths(output_tokens, len(arrivals_s), generator), 1, max_context_tokens - prompts)
    return Trace(
        name=name,
        requests=[
            Request(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
            for arrival_s, prompt, output in zip(arrivals_s.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
        ],
    )


def busiest_hour(rows: Iterable[Demand]) -> int:
    """Return the hour of the day, from 0, with the most tokens asked for over all rows; the first of equal ones."""
    hourly = [
        [rate * (row.prompt_tokens + row.output_tokens) for rate in row.hourly_requests_per_s]
        for row in rows
        if row.hourly_requests_per_s
    ]
    totals = [sum(tokens) for tokens in zip(*hourly, strict=True)]
    return totals.index(max(totals)) if totals else 0


def _lengths(mean: float, count: int, generator: Generator) -> np.typing.NDArray[np.int64]:
    """Draw whole numbers; a lognormal with parameter μ has the mean exp(μ + σ²/2)."""
    lengths = generator.lognormal(np.log(mean) - LENGTH_SIGMA**2 / 2, LENGTH_SIGMA, count)
    return np.rint(lengths).astype(np.int64)


def _rows(plan: Plan) -> tuple[Demand, ...]:
    if plan.fleet.demand:
        return plan.fleet.demand
    tenant = plan.fleet.tenants[0].name if plan.fleet.tenants else "public"
    return tuple(Demand(tenant=tenant, model=model.model, requests_per_s=0.0) for model in plan.models)


def _drawn(plan: Plan, row: Demand, generator: Generator, hour: int, duration_s: float) -> Trace:
    return poisson_trace(
        f"Poisson arrivals at {row.hourly_requests_per_s[hour]:.3g}/s",
        row.hourly_requests_per_s,
        prompt_tokens=row.prompt_tokens,
        output_tokens=row.output_tokens,
        max_context_tokens=plan.fleet.model(row.model).max_context_tokens or DEFAULT_CONTEXT_TOKENS,
        duration_s=duration_s,
        first_hour=hour,
        generator=generator,
    )


def _check_drawn(requests: float, length_s: float) -> None:
    if requests > MOST_DRAWN:
        raise InputError(
            f"a rehearsal of {length_s:,.10g} s would draw up to {requests:.3g} requests, more than {MOST_DRAWN:,}. "
            f"Ask for {length_s * MOST_DRAWN / requests:,.0f} s at most."
        )


def _within(request: Request, duration_s: float | None) -> bool:
    return duration_s is None or request.arrival_s < duration_s


def _mean_rate(trace: Trace) -> float:
    return len(trace.requests) / trace.duration_s if trace.duration_s > 0 else 0.0


def _span(requests: Sequence[Request]) -> str:
    if len(requests) == 1:
        return "1 request"
    span_s = requests[-1].arrival_s - requests[0].arrival_s if requests else 0.0
    return f"{len(requests):,} requests in {span_s / 60:.3g} min"


def _dealt(requests: Sequence[Request], rows: Sequence[Demand]) -> str:
    counts = {(row.tenant, row.model): 0 for row in rows}
    for request in requests:
        counts[request.tenant, request.model] += 1
    return ", ".join(f"{tenant}/{model} {count:,}" for (tenant, model), count in counts.items())
