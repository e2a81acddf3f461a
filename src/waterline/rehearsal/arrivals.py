"""Who asks what, and when: a trace dealt to the fleet's demand, or arrivals drawn for it, a piece at a time.

Nothing here is random without a seed, and each row of the demand draws from its own stream: to add a row leaves what
the others ask as it was. What is asked in a stretch of the day is drawn when its turn comes, so that a day of 10^8
requests is never in memory whole.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import PCG64, Generator
from numpy.typing import NDArray

from waterline.errors import InputError
from waterline.fleet import DEFAULT_CONTEXT_TOKENS, HOURS, Demand
from waterline.plan import Plan
from waterline.rehearsal.jit import compiled, seen
from waterline.units import DAY_S, GIGA, HOUR_S, PICOSECONDS_PER_S
from waterline.workload import LENGTH_SIGMA, TICKS_PER_S, Request, Trace, read_trace

DEFAULT_DURATION_S = 15 * 60.0
MOST_DRAWN = 2_000_000_000  # requests; an hour or more of work
LONGEST_DAYS = 100  # time is kept in 64 bits of picoseconds
PIECE = 1 << 16  # requests, about
PICOSECONDS_PER_NS = PICOSECONDS_PER_S // GIGA
PICOSECONDS_PER_TICK = PICOSECONDS_PER_S // TICKS_PER_S

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some requests in the order of their arrival, one entry of each array a request."""

    arrival_ps: Integers
    prompt_tokens: Integers
    output_tokens: Integers
    row: Integers  # index of the row of the demand that asks

    def __len__(self) -> int:
        return len(self.arrival_ps)

    def __getitem__(self, which: slice | NDArray[Any]) -> "Piece":
        return Piece(self.arrival_ps[which], self.prompt_tokens[which], self.output_tokens[which], self.row[which])


class Traffic:
    """The requests of a rehearsal, once, and what can be said of them afterwards."""

    def __init__(self, rows: Sequence[Demand], source: "_Dealt | _Asked", length_s: float, first_hour: int) -> None:
        self.rows = tuple(rows)
        self.first_hour = first_hour  # of the day, which begins with the traffic
        self.length_s = length_s  # from the start to the last arrival, about
        self._source = source
        self._counts = [0] * len(rows)
        self._spans_ps: list[tuple[int, int] | None] = [None] * len(rows)  # first and last arrival

    def pieces(self) -> Iterator[Piece]:
        """Yield the requests, in the order of their arrival. Raises InputError when there are none."""
        for piece in self._source.pieces():
            for row in np.flatnonzero(np.bincount(piece.row, minlength=len(self.rows))).tolist():
                arrivals_ps = piece.arrival_ps[piece.row == row]
                first = self._spans_ps[row] or (int(arrivals_ps[0]), 0)
                self._counts[row] += len(arrivals_ps)
                self._spans_ps[row] = (first[0], int(arrivals_ps[-1]))
            yield piece
        if not any(self._counts):
            raise InputError(
                "the fleet's demand asks for nothing in that time. Give a [[demand]] its requests_per_s, or rehearse "
                "with --trace FILE, or a longer --duration."
            )

    def requests(self) -> list[Request]:
        """Return them one by one, for whoever would rather have objects than arrays."""
        return [
            Request(
                arrival_s=arrival_ps / PICOSECONDS_PER_S,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                tenant=self.rows[row].tenant,
                model=self.rows[row].model,
            )
            for piece in self.pieces()
            for arrival_ps, prompt_tokens, output_tokens, row in zip(
                piece.arrival_ps.tolist(),
                piece.prompt_tokens.tolist(),
                piece.output_tokens.tolist(),
                piece.row.tolist(),
                strict=True,
            )
        ]

    @property
    def notes(self) -> tuple[str, ...]:
        """A line or more on what has been asked so far, and where it comes from."""
        return tuple(self._source.notes(self.rows, self._counts, self._spans_ps))


def traffic(plan: Plan, trace: Trace | None, *, seed: int, duration_s: float | None) -> Traffic:
    """Return what is asked of a fleet.

    Args:
        plan: its fleet says who asks. Without demand, a trace goes to all models in equal parts, from the first tenant.
        trace: dealt to the rows of the demand, see `deal`. None: each row replays its own trace, or draws its arrivals,
            see `draw`, from the fleet's busiest hour on.
        seed: of all drawing.
        duration_s: ask only so long. None: all of the longest trace, or 15 minutes where there is none.

    Raises:
        TraceError: a row's trace cannot be read.
        InputError: too much is asked, or in no time; or the seed is negative.
    """
    if duration_s is not None and not 0 < duration_s < math.inf:
        raise InputError(f"a rehearsal of {duration_s:g} s is none. Ask for more than 0 s, and an end.")
    if seed < 0:
        raise InputError(f"seed = {seed} is negative. Give one from 0 on.")
    rows = _rows(plan)
    own = {row.trace: read_trace(Path(row.trace)) for row in rows if row.trace}
    hour = busiest_hour(rows)
    if trace:
        rates = [_mean_rate(own[row.trace]) if row.trace else row.hourly_requests_per_s[hour] for row in rows]
        length_s = min(duration_s or math.inf, trace.duration_s)
        return Traffic(rows, _Dealt(trace.name, _columns(trace, duration_s), rates), length_s, hour)
    length_s = duration_s or max((one.duration_s for one in own.values()), default=DEFAULT_DURATION_S)
    _check_drawn(sum(max(row.hourly_requests_per_s, default=0.0) for row in rows) * length_s, length_s)
    recorded = {
        index: (own[row.trace].name, _columns(own[row.trace], duration_s, index))
        for index, row in enumerate(rows)
        if row.trace
    }
    return Traffic(rows, _Asked(plan, rows, recorded, seed, hour, length_s), length_s, hour)


class _Dealt:
    """A trace, dealt to all rows."""

    def __init__(self, name: str, asked: Piece, rates: Sequence[float]) -> None:
        self.name, self.asked, self.rates = name, asked, rates

    def pieces(self) -> Iterator[Piece]:
        rows = deal(len(self.asked), self.rates)
        whole = Piece(self.asked.arrival_ps, self.asked.prompt_tokens, self.asked.output_tokens, rows)
        yield from _cut(whole)

    def notes(
        self, rows: Sequence[Demand], counts: Sequence[int], spans_ps: Sequence[tuple[int, int] | None]
    ) -> Iterator[str]:
        known = [span_ps for span_ps in spans_ps if span_ps]
        first_ps, last_ps = min(first for first, _ in known), max(last for _, last in known)
        yield f"{self.name}: {_span(sum(counts), (first_ps, last_ps))}"
        by_row: dict[tuple[str, str], int] = {}
        for row, count in zip(rows, counts, strict=True):
            by_row[row.tenant, row.model] = by_row.get((row.tenant, row.model), 0) + count
        dealt = ", ".join(f"{tenant}/{model} {count:,}" for (tenant, model), count in by_row.items())
        yield f"dealt in turn to {dealt}"


class _Asked:
    """What the rows ask themselves: recorded, or drawn by the stretch."""

    def __init__(
        self,
        plan: Plan,
        rows: Sequence[Demand],
        recorded: dict[int, tuple[str, Piece]],
        seed: int,
        hour: int,
        length_s: float,
    ) -> None:
        self.plan, self.rows, self.recorded = plan, rows, recorded
        self.seed, self.hour, self.length_s = seed, hour, length_s

    def pieces(self) -> Iterator[Piece]:
        length_ps = round(self.length_s * PICOSECONDS_PER_S)
        stretch_ps = self._stretch_ps()
        for number in range(max(1, -(-length_ps // stretch_ps))):
            begin_ps = number * stretch_ps
            end_ps = begin_ps + stretch_ps
            last = end_ps >= length_ps
            parts = [
                _between(self.recorded[index][1], begin_ps, None if last else end_ps)
                if index in self.recorded
                else self._drawn(index, number, begin_ps, min(end_ps, length_ps))
                for index in range(len(self.rows))
            ]
            merged = joined(parts)
            yield from _cut(merged[np.argsort(merged.arrival_ps, kind="stable")])

    def notes(
        self, rows: Sequence[Demand], counts: Sequence[int], spans_ps: Sequence[tuple[int, int] | None]
    ) -> Iterator[str]:
        for index, row in enumerate(rows):
            drawn = index not in self.recorded
            name = f"Poisson arrivals at {self._rate(row):.3g}/s" if drawn else self.recorded[index][0]
            yield f"{row.tenant}/{row.model}: {name}: {_span(counts[index], spans_ps[index])}"
        if len(self.recorded) < len(rows):
            yield (
                f"drawn with seed {self.seed}, over {self.length_s / 60:.3g} min from {self.hour}:00, the busiest hour"
            )

    def _rate(self, row: Demand) -> float:
        return row.hourly_requests_per_s[self.hour]

    def _stretch_ps(self) -> int:
        """Return a whole fraction of an hour in which no more than a piece or two is drawn."""
        largest = sum(max(row.hourly_requests_per_s, default=0.0) for row in self.rows)
        halvings = max(0, math.ceil(math.log2(max(1.0, largest * HOUR_S / PIECE))))
        return (HOUR_S * PICOSECONDS_PER_S) >> min(halvings, 11)  # an hour is 2^11 times a whole number of ticks

    def _drawn(self, index: int, number: int, begin_ps: int, end_ps: int) -> Piece:
        row = self.rows[index]
        hour = (self.hour + begin_ps // (HOUR_S * PICOSECONDS_PER_S)) % HOURS
        arrivals_ps, prompts, outputs = draw(
            [row.hourly_requests_per_s[hour]] * HOURS,
            prompt_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
            max_context_tokens=self.plan.fleet.model(row.model).max_context_tokens or DEFAULT_CONTEXT_TOKENS,
            duration_s=(end_ps - begin_ps) / PICOSECONDS_PER_S,
            first_hour=0,
            generator=Generator(PCG64([self.seed, index, number])),
        )
        return Piece(begin_ps + arrivals_ps, prompts, outputs, np.full(len(prompts), index))


def deal(count: int, rates: Sequence[float]) -> Integers:
    """Give so many requests to rows, in proportion to their rates; in equal parts when all are 0.

    Deterministic and as even as can be: each request goes to the row that lags furthest behind its share of all so far,
    the first of equal ones. Returns the row of each request.
    """
    weights = np.array(rates if any(rates) else [1.0] * len(rates))
    taken, takers = np.zeros(len(rates), np.int64), np.zeros(count, np.int64)
    _deal(seen(weights), seen(taken), seen(takers), math.fsum(weights))
    return takers


@compiled
def _deal(weights: Any, taken: Any, takers: Any, total: float) -> None:
    for number in range(len(takers)):
        taker, furthest = 0, -math.inf
        for row in range(len(weights)):
            lag = weights[row] * (number + 1) - total * taken[row]
            if lag > furthest:
                taker, furthest = row, lag
        taken[taker] += 1
        takers[number] = taker


def draw(
    hourly_requests_per_s: Sequence[float],
    *,
    prompt_tokens: int,
    output_tokens: int,
    max_context_tokens: int,
    duration_s: float,
    first_hour: int,
    generator: Generator,
) -> tuple[Integers, Integers, Integers]:
    """Draw Poisson arrivals whose rate changes with the hour, and lognormal lengths.

    Arrivals at the largest rate are thinned to the rate of their hour, and rounded to 100 ns, which a trace file keeps.
    Lengths are independent, with the stated means and `LENGTH_SIGMA`, at least 1; where prompt and output exceed the
    context, the output is cut, and the prompt when it alone does. So the means come out a little lower than stated when
    they are not far below the context.

    Returns arrivals in picoseconds from the start, prompt tokens and output tokens.
    """
    largest = max(hourly_requests_per_s)
    candidates_s = np.sort(generator.random(generator.poisson(largest * duration_s))) * duration_s
    hours = (first_hour + (candidates_s // HOUR_S).astype(np.int64)) % HOURS
    kept = generator.random(len(candidates_s)) * largest < np.asarray(hourly_requests_per_s)[hours]
    ticks = np.rint(candidates_s[kept] * TICKS_PER_S).astype(np.int64)
    prompts = np.clip(_lengths(prompt_tokens, len(ticks), generator), 1, max_context_tokens - 1)
    outputs = np.clip(_lengths(output_tokens, len(ticks), generator), 1, max_context_tokens - prompts)
    return ticks * PICOSECONDS_PER_TICK, prompts, outputs


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
    """Return what `draw` draws as a trace."""
    arrivals_ps, prompts, outputs = draw(
        hourly_requests_per_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_context_tokens=max_context_tokens,
        duration_s=duration_s,
        first_hour=first_hour,
        generator=generator,
    )
    return Trace(
        name=name,
        requests=[
            Request(arrival_s=ticks / TICKS_PER_S, prompt_tokens=prompt, output_tokens=output)
            for ticks, prompt, output in zip(
                (arrivals_ps // PICOSECONDS_PER_TICK).tolist(), prompts.tolist(), outputs.tolist(), strict=True
            )
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


def _lengths(mean: float, count: int, generator: Generator) -> Integers:
    """Draw whole numbers; a lognormal with parameter μ has the mean exp(μ + σ²/2)."""
    lengths = generator.lognormal(np.log(mean) - LENGTH_SIGMA**2 / 2, LENGTH_SIGMA, count)
    return np.rint(lengths).astype(np.int64)


def _rows(plan: Plan) -> tuple[Demand, ...]:
    if plan.fleet.demand:
        return plan.fleet.demand
    tenant = plan.fleet.tenants[0].name if plan.fleet.tenants else "public"
    return tuple(Demand(tenant=tenant, model=model.model, requests_per_s=0.0) for model in plan.models)


def _columns(trace: Trace, duration_s: float | None, row: int = 0) -> Piece:
    """Turn a trace into arrays, up to a time."""
    kept = [request for request in trace.requests if duration_s is None or request.arrival_s < duration_s]
    arrivals_s = np.array([request.arrival_s for request in kept], np.float64)
    if kept and arrivals_s[-1] > LONGEST_DAYS * DAY_S:
        raise InputError(
            f"a rehearsal holds {LONGEST_DAYS} days, but '{trace.name}' goes on for {arrivals_s[-1] / DAY_S:,.0f}. "
            f"Take less of it with --duration."
        )
    return Piece(
        np.rint(arrivals_s * GIGA).astype(np.int64) * PICOSECONDS_PER_NS,
        np.array([request.prompt_tokens for request in kept], np.int64),
        np.array([request.output_tokens for request in kept], np.int64),
        np.full(len(kept), row),
    )


def joined(parts: Sequence[Piece]) -> Piece:
    """Return pieces as one, in the order they are given."""
    if len(parts) == 1:
        return parts[0]
    none = np.zeros(0, np.int64)
    parts = [Piece(none, none, none, none), *parts]
    return Piece(
        np.concatenate([part.arrival_ps for part in parts]),
        np.concatenate([part.prompt_tokens for part in parts]),
        np.concatenate([part.output_tokens for part in parts]),
        np.concatenate([part.row for part in parts]),
    )


def _between(asked: Piece, begin_ps: int, end_ps: int | None) -> Piece:
    begin = int(np.searchsorted(asked.arrival_ps, begin_ps))
    end = len(asked) if end_ps is None else int(np.searchsorted(asked.arrival_ps, end_ps))
    return asked[begin:end]


def _cut(asked: Piece) -> Iterator[Piece]:
    for begin in range(0, len(asked), PIECE):
        yield asked[begin : begin + PIECE]


def _check_drawn(requests: float, length_s: float) -> None:
    if length_s > LONGEST_DAYS * DAY_S:
        raise InputError(
            f"a rehearsal holds {LONGEST_DAYS} days, and this one would take {length_s / DAY_S:,.10g}. "
            "Ask for less with --duration."
        )
    if requests > MOST_DRAWN:
        raise InputError(
            f"a rehearsal of {length_s:,.10g} s would draw up to {requests:.3g} requests, more than {MOST_DRAWN:,}. "
            f"Ask for {length_s * MOST_DRAWN / requests:,.0f} s at most."
        )


def _mean_rate(trace: Trace) -> float:
    return len(trace.requests) / trace.duration_s if trace.duration_s > 0 else 0.0


def _span(count: int, span_ps: tuple[int, int] | None) -> str:
    if count == 1:
        return "1 request"
    span_s = (span_ps[1] - span_ps[0]) / PICOSECONDS_PER_S if span_ps else 0.0
    return f"{count:,} requests in {span_s / 60:.3g} min"
