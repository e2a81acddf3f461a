"""What can be done to traffic: each takes a stream and gives another, a chunk at a time.

Nothing is random without a seed, and the same seed gives the same requests however the stream is cut into chunks.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from typing import Literal

import numpy as np
from numpy.random import PCG64, Generator
from numpy.typing import NDArray

from waterline.errors import TraceError, nearest
from waterline.units import GIGA
from waterline.workload.stream import CHUNK, DAY_NS, UNSAID, Chunk, Ints, Longs, Names, Stream, joined, measure

Label = Literal["tenant", "model", "client"]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]
FARTHEST = 4 * CHUNK  # rows that are held until the next request of a tenant comes
ANY = "*"
MINUTE_NS = 60 * GIGA


# --- Rate -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Surge:
    """A window of the day, of every day, in which so many times as much is asked."""

    factor: float
    begin_ns: int  # since midnight
    length_ns: int  # at most a day
    tenant: str = ""  # "": all

    def __str__(self) -> str:
        minutes = self.begin_ns // MINUTE_NS
        begin = f"{minutes // 60:02}:{minutes % 60:02}"
        who = f"{self.tenant}:" if self.tenant else ""
        hours, rest_ns = divmod(self.length_ns, 60 * MINUTE_NS)
        length = f"{self.length_ns / MINUTE_NS:g}m" if rest_ns else f"{hours}h"
        return f"{who}{self.factor:g}x@{begin}+{length}"

    def holds(self, clock_ns: Longs) -> Flags:
        """Tell for times since some midnight whether they lie in the window."""
        return (clock_ns - self.begin_ns) % DAY_NS < self.length_ns

    def meets(self, begin_ns: int, end_ns: int) -> bool:
        """Tell whether any of a stretch of time, since some midnight, lies in the window."""
        return (begin_ns - self.begin_ns) % DAY_NS < self.length_ns or (
            (self.begin_ns - begin_ns) % DAY_NS < end_ns - begin_ns
        )

    def factors(self, clock_ns: Longs) -> Floats:
        """Return how many times as much is asked at each of some times."""
        return np.where(self.holds(clock_ns), self.factor, 1.0)


def scale(stream: Stream, factor: float, *, seed: int = 0) -> Stream:
    """Ask `factor` times as much, in the same time and with the same bursts.

    Each request becomes `factor` of them in the mean: a whole number of copies, one more by chance for the fraction.
    The first stays where it was; the others fall at random between it and the next request, so that at any time there
    have been `factor` times as many, to one request's copies. A factor below 1 keeps each with that chance.

    Copies are other people who behave alike: where the trace has bursts, all of them have theirs at once.
    """

    def all_alike(chunk: Chunk) -> tuple[Flags, Floats]:
        return np.ones(len(chunk), np.bool_), np.full(len(chunk), factor)

    return replace(stream, read=lambda: multiplied(stream.chunks(), all_alike, seed))


def surge(stream: Stream, surge: Surge, *, seed: int = 0) -> Stream:
    """Ask more (or less) in a window of the day, as `scale` does; a tenant alone if the surge names one."""
    seen = not surge.tenant

    def chosen(chunk: Chunk) -> tuple[Flags, Floats]:
        nonlocal seen
        mine = chunk.tenant == stream.tenants.find(surge.tenant) if surge.tenant else np.ones(len(chunk), np.bool_)
        seen = seen or bool(mine.any())
        return mine, np.where(mine, surge.factors(stream.clock_ns + chunk.arrival_ns), 1.0)

    def read() -> Iterator[Chunk]:
        yield from multiplied(stream.chunks(), chosen, seed)
        if not seen:
            hint = nearest(surge.tenant, stream.tenants) if len(stream.tenants) else "It names none: write who asks."
            raise TraceError(f"{stream.name}: no request is of the tenant '{surge.tenant}' that surges. {hint}")

    return replace(stream, read=read)


def multiplied(chunks: Iterator[Chunk], chosen: Callable[[Chunk], tuple[Flags, Floats]], seed: int) -> Iterator[Chunk]:
    """Yield each request so many times, see `scale`.

    Args:
        chunks: the requests.
        chosen: tells of a chunk which requests belong together, so that copies fall between them, and of each how many
            times it is to be there in the mean.
        seed: of the dice.
    """
    number_dice, place_dice = Generator(PCG64([seed, 0])), Generator(PCG64([seed, 1]))
    held: tuple[Chunk, Flags, Longs] | None = None
    for part in chain(_counted(chunks, chosen, number_dice), [None]):
        held = _appended(held, part) if part else held
        if held is None:
            return
        pool, mine, copies = held
        places = np.flatnonzero(mine)
        end = len(pool)
        if part and len(places) and (places[-1] > 0 or end < FARTHEST):
            end = int(places[-1])
        ready = _copied(pool, places, copies, end, place_dice, seed)
        held = (pool[end:], mine[end:], copies[end:]) if end < len(pool) else None
        if len(ready):
            yield ready


def _counted(
    chunks: Iterator[Chunk], chosen: Callable[[Chunk], tuple[Flags, Floats]], dice: Generator
) -> Iterator[tuple[Chunk, Flags, Longs]]:
    """Yield requests, which of them belong together, and how many there are to be of each; few at a time if many."""
    for chunk in chunks:
        mine, factors = chosen(chunk)
        copies = np.floor(factors + dice.random(len(chunk))).astype(np.int64)
        size = max(1, int(CHUNK / max(1.0, factors.max())))
        for begin in range(0, len(chunk), size):
            part = slice(begin, begin + size)
            yield chunk[part], mine[part], copies[part]


def _appended(held: tuple[Chunk, Flags, Longs] | None, more: tuple[Chunk, Flags, Longs]) -> tuple[Chunk, Flags, Longs]:
    if held is None:
        return more
    return joined([held[0], more[0]]), np.concatenate([held[1], more[1]]), np.concatenate([held[2], more[2]])


def _copied(pool: Chunk, places: Longs, copies: Longs, end: int, dice: Generator, seed: int) -> Chunk:
    """Return the copies of the requests before `end`; `places` are those that belong together.

    All first copies are other people than all originals, and so on: their prompts begin alike among each other only.
    """
    own = places[places < end]
    gap_ns = np.zeros(end, np.int64)
    if len(own):
        after = pool.arrival_ns[np.append(own[1:], min(end, len(pool) - 1))]
        gap_ns[own] = after - pool.arrival_ns[own]
    index = np.repeat(np.arange(end), copies[:end])
    later = np.flatnonzero(index == np.concatenate([[-1], index[:-1]]))  # copies but the first
    ready = pool[index]
    copy = np.arange(len(index)) - np.searchsorted(index, index)
    ready = replace(ready, blocks=ready.blocks.apart(copy, f"copies {seed}"))
    arrival_ns = ready.arrival_ns.copy()
    arrival_ns[later] += (dice.random(len(later)) * gap_ns[index[later]]).astype(np.int64)
    return replace(ready, arrival_ns=arrival_ns)[np.argsort(arrival_ns, kind="stable")]


# --- Time -------------------------------------------------------------------------------------------------------------


def until(stream: Stream, end_ns: int) -> Stream:
    """Leave out what comes at a time or later."""

    def read() -> Iterator[Chunk]:
        for chunk in stream.chunks():
            if chunk.arrival_ns[-1] >= end_ns:
                yield chunk[chunk.arrival_ns < end_ns]
                return
            yield chunk

    return replace(stream, read=read)


def shift(stream: Stream, by_ns: int) -> Stream:
    """Let everything happen later, or earlier; what would come before the start is left out."""

    def read() -> Iterator[Chunk]:
        for chunk in stream.chunks():
            moved = replace(chunk, arrival_ns=chunk.arrival_ns + by_ns)
            yield moved[moved.arrival_ns >= 0] if by_ns < 0 else moved

    return replace(stream, read=read)


def repeat(stream: Stream, times: int, *, every_ns: int = 0) -> Stream:
    """Play a stream several times, one after the other; 0: each begins a mean gap after the last has ended.

    Raises:
        TraceError: while it is read, when it lasts longer than `every_ns`.
    """

    def read() -> Iterator[Chunk]:
        whole = measure(stream)
        if every_ns and whole.span_ns > every_ns:
            raise TraceError(
                f"{stream.name} goes on for {whole.span_ns / GIGA:,.6g} s, longer than the {every_ns / GIGA:,.6g} s "
                "after which it is to be repeated. Give it that much time, or leave 'every' out."
            )
        for number in range(times):
            begin_ns = number * (every_ns or whole.lasts_ns)
            for chunk in stream.chunks():
                blocks = chunk.blocks.apart(np.full(len(chunk), number), "repeat")
                yield replace(chunk, arrival_ns=chunk.arrival_ns + begin_ns, blocks=blocks)

    return replace(stream, read=read)


def splice(first: Stream, second: Stream, *, at_ns: int | None = None) -> Stream:
    """Go on with another stream: from a time on, or a mean gap after the first has ended."""

    def read() -> Iterator[Chunk]:
        for chunk in first.chunks():
            yield chunk if at_ns is None else chunk[chunk.arrival_ns < at_ns]
        begin_ns = measure(first).lasts_ns if at_ns is None else at_ns
        for chunk in second.chunks():
            yield replace(
                chunk,
                arrival_ns=chunk.arrival_ns + begin_ns,
                tenant=_renamed(chunk.tenant, second.tenants, first.tenants),
                model=_renamed(chunk.model, second.models, first.models),
                client=_renamed(chunk.client, second.clients, first.clients),
                blocks=chunk.blocks.apart(np.ones(len(chunk), np.int64), f"then {first.name}"),
            )

    return replace(first, name=f"{first.name} then {second.name}", read=read, notes=(*first.notes, *second.notes))


def _renamed(indices: Ints, names: Names, into: Names) -> Ints:
    """Say indices into some names as indices into others."""
    return np.append(into.indices(list(names)), np.int32(UNSAID))[indices]


# --- Lengths ----------------------------------------------------------------------------------------------------------


def cut(stream: Stream, longest_tokens: int) -> Stream:
    """Cut what does not fit a context: the answer first, then the prompt, of which all but one token may stay."""

    def read() -> Iterator[Chunk]:
        for chunk in stream.chunks():
            prompts = np.minimum(chunk.prompt_tokens, longest_tokens - 1)
            yield replace(
                chunk,
                prompt_tokens=prompts,
                output_tokens=np.minimum(chunk.output_tokens, longest_tokens - prompts),
                cached_tokens=np.minimum(chunk.cached_tokens, prompts - 1),
            )

    return replace(stream, read=read)


def drop(stream: Stream, longest_tokens: int) -> Stream:
    """Leave out what does not fit a context."""

    def read() -> Iterator[Chunk]:
        for chunk in stream.chunks():
            yield chunk[chunk.tokens <= longest_tokens]

    return replace(stream, read=read)


# --- Who --------------------------------------------------------------------------------------------------------------


def by_share(stream: Stream, label: Label, shares: Mapping[str, float], *, seed: int = 0) -> Stream:
    """Name the tenant (or model) of each request by chance; shares are in proportion to each other."""
    names = Names(list(shares))
    upto = np.cumsum(list(shares.values())) / sum(shares.values())

    def read() -> Iterator[Chunk]:
        dice = Generator(PCG64([seed]))
        for chunk in stream.chunks():
            yield _labelled(chunk, label, _drawn(dice.random(len(chunk)), upto))

    return _with_names(replace(stream, read=read), label, names)


def by_client_share(stream: Stream, label: Label, shares: Mapping[str, float]) -> Stream:
    """Name the tenant (or model) of each client, by a hash of its name: all that a client asks stays together."""
    names = Names(list(shares))
    upto = np.cumsum(list(shares.values())) / sum(shares.values())

    def read() -> Iterator[Chunk]:
        places = np.zeros(0)
        for chunk in stream.chunks():
            _check_said(stream, chunk, "client")
            new = [_hashed(name) for name in list(stream.clients)[len(places) :]]
            places = np.concatenate([places, new])
            yield _labelled(chunk, label, _drawn(places, upto)[chunk.client])

    return _with_names(replace(stream, read=read), label, names)


def by_value(stream: Stream, label: Label, column: Label, values: Mapping[str, str]) -> Stream:
    """Name the tenant (or model) by what stands in a column; `*` stands for whatever is not listed."""
    names = Names(list(values.values()))

    def read() -> Iterator[Chunk]:
        for chunk in stream.chunks():
            known = _names_of(stream, column)
            index = np.array([names.index(values.get(name, values.get(ANY, ""))) for name in (*known, "")], np.int32)
            named = index[getattr(chunk, column)]
            if (named == UNSAID).any():
                first = int(np.flatnonzero(named == UNSAID)[0])
                said = int(getattr(chunk, column)[first])
                where = f"{stream.name}, line {chunk.line[first]}"
                if said == UNSAID:
                    raise TraceError(f"{where}: no {column} is named. Write *=… for those, or name its column.")
                name = known[said]
                raise TraceError(
                    f"{where}: the {column} '{name}' is not listed. Write {name}=…, or *=… for whatever is not."
                )
            yield _labelled(chunk, label, named)

    return _with_names(replace(stream, read=read), label, names)


def _drawn(places: Floats, upto: Floats) -> Ints:
    return np.minimum(np.searchsorted(upto, places, side="right"), len(upto) - 1).astype(np.int32)


def _hashed(name: str) -> float:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest()) / 2**64


def _check_said(stream: Stream, chunk: Chunk, column: Label) -> None:
    unsaid = np.flatnonzero(getattr(chunk, column) == UNSAID)
    if len(unsaid):
        raise TraceError(
            f"{stream.name}, line {chunk.line[unsaid[0]]}: no {column} is named. Give the column that does with "
            f"--columns {column}=…, or deal by share without 'by {column}'."
        )


def _names_of(stream: Stream, label: Label) -> Names:
    return {"tenant": stream.tenants, "model": stream.models, "client": stream.clients}[label]


def _labelled(chunk: Chunk, label: Label, indices: Ints) -> Chunk:
    return replace(chunk, tenant=indices) if label == "tenant" else replace(chunk, model=indices)


def _with_names(stream: Stream, label: Label, names: Names) -> Stream:
    return replace(stream, tenants=names) if label == "tenant" else replace(stream, models=names)
