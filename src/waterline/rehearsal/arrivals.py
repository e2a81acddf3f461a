"""Who asks what, and when: a trace dealt to the fleet's demand, or arrivals drawn for it, a piece at a time.

Nothing here is random without a seed, and each row of the demand draws from its own stream: to add a row leaves what
the others ask as it was. What is asked in a stretch of the day is drawn when its turn comes, so that a day of 10^8
requests is never in memory whole.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.random import PCG64, Generator
from numpy.typing import NDArray

from waterline.errors import InputError, TraceError
from waterline.fleet import DEFAULT_CONTEXT_TOKENS, HOURS, Demand
from waterline.plan import Plan
from waterline.rehearsal.beside import ahead
from waterline.rehearsal.dealing import dealt
from waterline.rehearsal.drawing import draw
from waterline.rehearsal.pieces import (
    LONGEST_DAYS,
    PICOSECONDS_PER_NS,
    PIECE,
    Piece,
    cached,
    cut,
    joined,
    piece_of,
    piece_of_chunk,
)
from waterline.units import DAY_S, GIGA, HOUR_S, PICOSECONDS_PER_S
from waterline.workload import Request, Trace, operators
from waterline.workload.files import open_trace
from waterline.workload.operators import Surge, until
from waterline.workload.stream import DAY_NS, UNSAID, Chunk, Names, Stream, measure

DEFAULT_DURATION_S = 15 * 60.0
MOST_DRAWN = 2_000_000_000  # requests; an hour or more of work
HOUR_NS = HOUR_S * GIGA
FAR_S = 1e9  # what lasts longer has no need to be cut

Integers = NDArray[np.int64]


class Traffic:
    """The requests of a rehearsal, once, and what can be said of them afterwards."""

    def __init__(self, rows: Sequence[Demand], source: "_Dealt | _Asked", length_s: float, first_hour: int) -> None:
        self.rows = tuple(rows)
        self.first_hour = first_hour  # of the day, which begins with the traffic
        self.length_s = length_s  # from the start to the last arrival, about
        self.clients = source.clients  # as they are met
        self._source = source
        self._counts = [0] * len(rows)
        self._spans_ps: list[tuple[int, int] | None] = [None] * len(rows)  # first and last arrival

    def pieces(self) -> Iterator[Piece]:
        """Yield the requests, in the order of their arrival. Raises InputError when there are none."""
        for piece in ahead(self._source.pieces()):
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
                cached_tokens=cached_tokens,
            )
            for piece in self.pieces()
            for arrival_ps, prompt_tokens, output_tokens, row, cached_tokens in zip(
                piece.arrival_ps.tolist(),
                piece.prompt_tokens.tolist(),
                piece.output_tokens.tolist(),
                piece.row.tolist(),
                piece.cached_tokens.tolist(),
                strict=True,
            )
        ]

    @property
    def notes(self) -> tuple[str, ...]:
        """A line or more on what has been asked so far, and where it comes from."""
        return tuple(self._source.notes(self.rows, self._counts, self._spans_ps))


def traffic(
    plan: Plan, trace: Trace | Stream | None, *, seed: int, duration_s: float | None, surges: Sequence[Surge] = ()
) -> Traffic:
    """Return what is asked of a fleet.

    Args:
        plan: its fleet says who asks. Without demand, a trace goes to all models in equal parts, from the first tenant.
        trace: goes to the rows of the demand, see `dealt`. None: each row replays its own trace, or draws its arrivals,
            see `draw`, from the fleet's busiest hour on.
        seed: of all drawing.
        duration_s: ask only so long. None: all of the longest trace, or 15 minutes where there is none; with surges
            until an hour after the last.
        surges: windows of the day in which more is asked. What is drawn then begins an hour before the first.

    Raises:
        TraceError: a trace cannot be read, holds a request that no row asks, or none that a model can hold.
        UnknownNameError: a surge is of a tenant that the fleet does not have.
        InputError: too much is asked, or in no time; the seed is negative; or a surge lies outside of that time.
    """
    if duration_s is not None and not 0 < duration_s < math.inf:
        raise InputError(f"a rehearsal of {duration_s:g} s is none. Ask for more than 0 s, and an end.")
    if seed < 0:
        raise InputError(f"seed = {seed} is negative. Give one from 0 on.")
    rows = _rows(plan)
    for surge in surges:
        if surge.tenant and plan.fleet.tenant(surge.tenant).name not in {row.tenant for row in rows}:
            raise InputError(f"tenant '{surge.tenant}' of the surge {surge} asks for nothing. Give it a [[demand]].")
    own = {
        index: _Recorded(open_trace(row.trace, columns=row.columns, seed=seed), duration_s, _context_tokens(plan, row))
        for index, row in enumerate(rows)
        if row.trace
    }
    if trace:
        return _of_trace(plan, rows, own, trace, seed, duration_s, surges)
    return _of_rows(plan, rows, own, seed, duration_s, surges)


class _Recorded:
    """A stream that has been read once: what is wrong in it has been told of, and how long it lasts is known.

    Requests of more than `longest_tokens` are counted; a file in which no other is there is a TraceError.
    """

    def __init__(self, stream: Stream, duration_s: float | None, longest_tokens: int) -> None:
        self.stream = until(stream, round(duration_s * GIGA)) if duration_s and duration_s < FAR_S else stream
        self.longest_tokens, self.too_long = longest_tokens, 0
        self.measured = measure(replace(self.stream, read=self._counted))
        self.length_s = self.measured.span_ns / GIGA
        if not self.measured.requests:
            raise TraceError(
                f"{self.stream.name}: none of its requests is left of that time. Take more of it with --duration, or "
                "change less with --traffic."
            )
        if self.measured.last_ns > LONGEST_DAYS * DAY_S * GIGA:
            raise InputError(
                f"a rehearsal holds {LONGEST_DAYS} days, but '{stream.name}' goes on for "
                f"{self.measured.last_ns / GIGA / DAY_S:,.0f}. Take less of it with --duration."
            )

    def _counted(self) -> Iterator[Chunk]:
        line = prompt = output = requests = 0
        for chunk in self.stream.chunks():
            long = np.flatnonzero(chunk.tokens > self.longest_tokens)
            if len(long) and not self.too_long:
                line, prompt, output = (
                    int(column[long[0]]) for column in (chunk.line, chunk.prompt_tokens, chunk.output_tokens)
                )
            self.too_long += len(long)
            requests += len(chunk)
            yield chunk
        if line and self.too_long == requests:
            raise TraceError(
                f"{self.stream.name}, line {line}: {prompt:,} + {output:,} tokens are more than the "
                f"{self.longest_tokens:,} that a model of the fleet may hold, and so is every other request. Write "
                f"--traffic 'cut {self.longest_tokens}' to shorten them, or raise max_context_tokens."
            )

    def prefix_hit(self, row: Demand) -> float:
        """Return what the demand says is cached of each prompt, where the trace does not say it of any."""
        return 0.0 if self.measured.cached_tokens or self.measured.blocks else row.prefix_hit

    def cached_notes(self, rows: Sequence[Demand]) -> Iterator[str]:
        share = self.measured.cached_fraction
        if self.measured.blocks:
            yield f"{share:.1%} of its prompts' tokens had been asked before; what a replica still has is not read"
        elif self.measured.cached_tokens:
            yield f"{share:.1%} of its prompts' tokens had been asked before, and are not read again"
        elif any(row.prefix_hit for row in rows):
            yield "it does not tell what was cached of its prompts: taken from prefix_hit"

    @property
    def requests_per_s(self) -> float:
        return self.measured.requests / self.length_s if self.length_s > 0 else 0.0


def _of_trace(
    plan: Plan,
    rows: tuple[Demand, ...],
    own: dict[int, _Recorded],
    trace: Trace | Stream,
    seed: int,
    duration_s: float | None,
    surges: Sequence[Surge],
) -> Traffic:
    """Replay a trace for all rows.

    By its own clock where the hour matters: when it lasts longer than one, or surges at some. A shorter one is held
    against the busiest hour, when it hurts most.
    """
    hour = busiest_hour(rows)
    rates = [
        own[index].requests_per_s if row.trace else row.hourly_requests_per_s[hour] for index, row in enumerate(rows)
    ]
    stream = trace.stream if isinstance(trace, Trace) else trace
    recorded = _Recorded(stream, duration_s, max(_context_tokens(plan, row) for row in rows))
    if surges or recorded.length_s > HOUR_S:
        hour = recorded.stream.clock_ns // HOUR_NS % HOURS
    _check_surges(surges, recorded.stream.clock_ns, recorded.length_s)
    asked = surged(dealt(recorded.stream, rows, rates), surges, seed)
    return Traffic(rows, _Dealt(recorded, asked, surges, rows), recorded.length_s, hour)


def _of_rows(
    plan: Plan,
    rows: tuple[Demand, ...],
    own: dict[int, _Recorded],
    seed: int,
    duration_s: float | None,
    surges: Sequence[Surge],
) -> Traffic:
    """Let each row ask what is its own; all begin together."""
    hour = busiest_hour(rows)
    drawn_s = DEFAULT_DURATION_S
    if surges:
        hour = (surges[0].begin_ns // HOUR_NS - 1) % HOURS
        last_ns = max((surge.begin_ns - hour * HOUR_NS) % DAY_NS + surge.length_ns for surge in surges)
        drawn_s = math.ceil(last_ns / GIGA / HOUR_S + 1) * HOUR_S
    length_s = duration_s or max((one.length_s for one in own.values()), default=drawn_s)
    rate = sum(max(row.hourly_requests_per_s, default=0.0) for row in rows)
    _check_drawn(rate * length_s, length_s)
    _check_surges(surges, hour * HOUR_NS, length_s)
    return Traffic(rows, _Asked(plan, rows, own, seed, hour, length_s, surges), length_s, hour)


def surged(stream: Stream, surges: Sequence[Surge], seed: int) -> Stream:
    """Return a stream with all surges, each with dice of its own."""
    for number, surge in enumerate(surges):
        stream = operators.surge(stream, surge, seed=1000 * seed + number)
    return stream


def _check_surges(surges: Sequence[Surge], clock_ns: int, length_s: float) -> None:
    for surge in surges:
        if not surge.meets(clock_ns, clock_ns + round(length_s * GIGA)):
            begin, end = (_clock_text(clock_ns // GIGA + add_s) for add_s in (0, round(length_s)))
            raise InputError(
                f"the surge {surge} lies outside of the rehearsal, which goes from {begin} to {end}. Write another "
                "hour, or a longer --duration."
            )


def _clock_text(clock_s: int) -> str:
    return f"{clock_s // HOUR_S % HOURS:02}:{clock_s // 60 % 60:02}"


class _Dealt:
    """A trace, dealt to all rows."""

    def __init__(self, recorded: _Recorded, asked: Stream, surges: Sequence[Surge], rows: Sequence[Demand]) -> None:
        self.recorded, self.asked, self.surges = recorded, asked, surges
        self.clients = asked.clients
        self.prefix_hits = np.array([recorded.prefix_hit(row) for row in rows])
        models = sorted({row.model for row in rows})
        self.model_of_row = np.array([models.index(row.model) for row in rows])

    def pieces(self) -> Iterator[Piece]:
        for chunk in self.asked.chunks():
            piece = piece_of_chunk(chunk, chunk.model, self.prefix_hits[chunk.model])
            yield from cut(replace(piece, blocks=piece.blocks.apart(1 + self.model_of_row[piece.row], "model")))

    def notes(
        self, rows: Sequence[Demand], counts: Sequence[int], spans_ps: Sequence[tuple[int, int] | None]
    ) -> Iterator[str]:
        known = [span_ps for span_ps in spans_ps if span_ps]
        first_ps, last_ps = min(first for first, _ in known), max(last for _, last in known)
        yield f"{self.asked.name}: {_span(sum(counts), (first_ps, last_ps))}"
        yield from self.asked.notes
        by_row: dict[tuple[str, str], int] = {}
        for row, count in zip(rows, counts, strict=True):
            by_row[row.tenant, row.model] = by_row.get((row.tenant, row.model), 0) + count
        to_rows = ", ".join(f"{tenant}/{model} {count:,}" for (tenant, model), count in by_row.items())
        named = len(self.recorded.stream.tenants) or len(self.recorded.stream.models)
        yield f"{'as it names them' if named else 'dealt in turn'} to {to_rows}"
        yield from _surge_notes(self.surges, self.asked.clock_ns)
        if self.recorded.too_long:
            yield f"{self.recorded.too_long:,} of its requests are longer than any model's context, and refused"
        yield from self.recorded.cached_notes(rows)


def _surge_notes(surges: Sequence[Surge], clock_ns: int) -> Iterator[str]:
    if surges:
        yield f"surging {', '.join(map(str, surges))}; it begins at {_clock_text(clock_ns // GIGA)}"


class _Asked:
    """What the rows ask themselves: recorded, or drawn by the stretch."""

    def __init__(
        self,
        plan: Plan,
        rows: Sequence[Demand],
        recorded: dict[int, _Recorded],
        seed: int,
        hour: int,
        length_s: float,
        surges: Sequence[Surge],
    ) -> None:
        self.plan, self.rows, self.recorded = plan, rows, recorded
        self.seed, self.hour, self.length_s, self.surges = seed, hour, length_s, surges
        self.clients = Names()
        self.surges_of = [[one for one in surges if one.tenant in {"", row.tenant}] for row in rows]

    def pieces(self) -> Iterator[Piece]:
        length_ps = round(self.length_s * PICOSECONDS_PER_S)
        stretch_ps = self._stretch_ps()
        cursors = {
            index: _Cursor(self._replayed(index, one.stream), index, one.prefix_hit(self.rows[index]), self.clients)
            for index, one in self.recorded.items()
        }
        for number in range(max(1, -(-length_ps // stretch_ps))):
            begin_ps = number * stretch_ps
            end_ps = begin_ps + stretch_ps
            last = end_ps >= length_ps
            parts = [
                cursors[index].take(None if last else end_ps)
                if index in cursors
                else self._drawn(index, number, begin_ps, min(end_ps, length_ps))
                for index in range(len(self.rows))
            ]
            merged = joined(parts)
            yield from cut(merged[np.argsort(merged.arrival_ps, kind="stable")])

    def _replayed(self, index: int, stream: Stream) -> Stream:
        """Return a row's own trace, by the clock of the rehearsal, and with the surges of its tenant."""
        surges = [replace(surge, tenant="") for surge in self.surges_of[index]]
        return surged(replace(stream, clock_ns=self.hour * HOUR_NS), surges, self.seed)

    def notes(
        self, rows: Sequence[Demand], counts: Sequence[int], spans_ps: Sequence[tuple[int, int] | None]
    ) -> Iterator[str]:
        for index, row in enumerate(rows):
            drawn = index not in self.recorded
            name = f"Poisson arrivals at {self._rate(row):.3g}/s" if drawn else self.recorded[index].stream.name
            yield f"{row.tenant}/{row.model}: {name}: {_span(counts[index], spans_ps[index])}"
            if not drawn:
                yield from self.recorded[index].cached_notes([row])
        if len(self.recorded) < len(rows):
            which = "" if self.surges else ", the busiest hour"
            yield f"drawn with seed {self.seed}, over {self.length_s / 60:.3g} min from {self.hour}:00{which}"
        yield from _surge_notes(self.surges, self.hour * HOUR_NS)

    def _rate(self, row: Demand) -> float:
        return row.hourly_requests_per_s[self.hour]

    def _stretch_ps(self) -> int:
        """Return a whole fraction of an hour in which no more than a piece or two is drawn."""
        largest = sum(
            max(row.hourly_requests_per_s, default=0.0) * _most(surges)
            for row, surges in zip(self.rows, self.surges_of, strict=True)
        )
        largest += sum(one.requests_per_s * _most(self.surges_of[index]) for index, one in self.recorded.items())
        halvings = max(0, math.ceil(math.log2(max(1.0, largest * HOUR_S / PIECE))))
        return (HOUR_S * PICOSECONDS_PER_S) >> min(halvings, 11)  # an hour is 2^11 times a whole number of ticks

    def _drawn(self, index: int, number: int, begin_ps: int, end_ps: int) -> Piece:
        row = self.rows[index]
        hour = (self.hour + begin_ps // (HOUR_S * PICOSECONDS_PER_S)) % HOURS
        begin_ns, end_ns = (self.hour * HOUR_NS + time_ps // PICOSECONDS_PER_NS for time_ps in (begin_ps, end_ps))
        surges = [surge for surge in self.surges_of[index] if surge.meets(begin_ns, end_ns)]
        arrivals_ps, prompts, outputs = draw(
            [row.hourly_requests_per_s[hour] * _most(surges)] * HOURS,
            prompt_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
            max_context_tokens=_context_tokens(self.plan, row),
            duration_s=(end_ps - begin_ps) / PICOSECONDS_PER_S,
            first_hour=0,
            generator=Generator(PCG64([self.seed, index, number])),
        )
        drawn = piece_of(
            begin_ps + arrivals_ps, prompts, outputs, np.full(len(prompts), index), cached(prompts, row.prefix_hit)
        )
        if not surges:
            return drawn
        clock_ns = self.hour * HOUR_NS + drawn.arrival_ps // PICOSECONDS_PER_NS
        kept = np.prod([surge.factors(clock_ns) for surge in surges], axis=0) / _most(surges)
        return drawn[Generator(PCG64([self.seed, index, number, 1])).random(len(drawn)) < kept]


def _most(surges: Sequence[Surge]) -> float:
    """Return how many times as much is asked where all surges meet."""
    return math.prod(max(1.0, surge.factor) for surge in surges)


class _Cursor:
    """A stream that is taken in stretches of time."""

    def __init__(self, stream: Stream, row: int, prefix_hit: float, clients: Names) -> None:
        """Begin a stream; the names of its clients are written to those of all."""
        self._chunks, self._row, self._prefix_hit = stream.chunks(), row, prefix_hit
        self._names, self._clients, self._numbers = stream.clients, clients, np.array([UNSAID], np.int32)
        self._rest: list[Piece] = []

    def take(self, end_ps: int | None) -> Piece:
        """Return what comes before a time and was not taken yet; None: the rest."""
        taken, self._rest = self._rest, []
        while end_ps is None or not taken or taken[-1].arrival_ps[-1] < end_ps:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            chunk = replace(chunk, client=self._among_all(chunk.client))
            piece = piece_of_chunk(chunk, np.full(len(chunk), self._row), self._prefix_hit)
            taken.append(replace(piece, blocks=piece.blocks.apart(1 + piece.row, "row")))
        whole = joined(taken)
        end = len(whole) if end_ps is None else int(np.searchsorted(whole.arrival_ps, end_ps))
        self._rest = [whole[end:]] if end < len(whole) else []
        return whole[:end]

    def _among_all(self, client: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return which of all clients those of this stream are; UNSAID, -1, finds what stands at the end."""
        known = len(self._numbers) - 1
        fresh = self._clients.indices([self._names[number] for number in range(known, len(self._names))])
        self._numbers = np.concatenate([self._numbers[:-1], fresh, self._numbers[-1:]])
        return self._numbers[client]


def busiest_hour(rows: Iterable[Demand]) -> int:
    """Return the hour of the day, from 0, with the most tokens asked for over all rows; the first of equal ones."""
    hourly = [
        [rate * (row.prompt_tokens + row.output_tokens) for rate in row.hourly_requests_per_s]
        for row in rows
        if row.hourly_requests_per_s
    ]
    totals = [sum(tokens) for tokens in zip(*hourly, strict=True)]
    return totals.index(max(totals)) if totals else 0


def _context_tokens(plan: Plan, row: Demand) -> int:
    return plan.fleet.model(row.model).max_context_tokens or DEFAULT_CONTEXT_TOKENS


def _rows(plan: Plan) -> tuple[Demand, ...]:
    if plan.fleet.demand:
        return plan.fleet.demand
    tenant = plan.fleet.tenants[0].name if plan.fleet.tenants else "public"
    return tuple(Demand(tenant=tenant, model=model.model, requests_per_s=0.0) for model in plan.models)


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


def _span(count: int, span_ps: tuple[int, int] | None) -> str:
    if count == 1:
        return "1 request"
    span_s = (span_ps[1] - span_ps[0]) / PICOSECONDS_PER_S if span_ps else 0.0
    minutes = span_s / 60
    return f"{count:,} requests in {f'{minutes:.3g}' if minutes < 1000 else f'{minutes:,.0f}'} min"
