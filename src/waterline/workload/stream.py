"""Requests as columns, a chunk at a time: what every reader gives and every operator takes.

A `Stream` can be read again and again, each time from its start, and never holds more than a few chunks; so 10^8
requests pass through the memory of some 10^5.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from waterline.units import DAY_S, GIGA
from waterline.workload import ragged
from waterline.workload.ragged import Ragged

CHUNK = 1 << 16  # requests, about
UNSAID = -1  # of a tenant, model or client that the trace does not name
ENDLESS = -1  # patience, and the time after which a client leaves
UNMET = -2  # of a name that has not been met
DAY_NS = DAY_S * GIGA
BLOCK_TOKENS = 512  # as Mooncake's traces have them

Longs = NDArray[np.int64]
Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some requests in the order of their arrival, one entry of each array a request."""

    arrival_ns: Longs  # from the start of the stream
    prompt_tokens: Ints  # at least 1
    output_tokens: Ints  # at least 1
    cached_tokens: Ints  # of the prompt: were asked before, and are found by a prefix cache that forgets nothing
    tenant: Ints  # index into the names of the stream, or UNSAID
    model: Ints
    client: Ints
    line: Longs  # of the file, where an error should point to; 0 where it was drawn
    patience_ns: Longs  # how long the client waits for its turn, above 0, or ENDLESS
    leaves_ns: Longs  # after its arrival, when the client goes away whatever has come by then, above 0, or ENDLESS
    blocks: Ragged  # keys of the prompt's blocks, of `BLOCK_TOKENS` each: equal keys mean prompts that are equal so far

    def __len__(self) -> int:
        return len(self.arrival_ns)

    @property
    def tokens(self) -> Longs:
        """Of prompt and answer together."""
        return self.prompt_tokens.astype(np.int64) + self.output_tokens

    def __getitem__(self, which: "slice | NDArray[np.bool_] | NDArray[np.intp]") -> "Chunk":
        return Chunk(*(getattr(self, name)[which] for name in COLUMNS))


COLUMNS = tuple(column.name for column in fields(Chunk))


def chunk_of(
    arrival_ns: Longs,
    prompt_tokens: Ints,
    output_tokens: Ints,
    *,
    line: Longs | None = None,
    cached_tokens: Ints | None = None,
    tenant: Ints | None = None,
    model: Ints | None = None,
    client: Ints | None = None,
    patience_ns: Longs | None = None,
    leaves_ns: Longs | None = None,
    blocks: Ragged | None = None,
) -> Chunk:
    """Make a chunk; what is left out is 0, unsaid or endless."""
    count = len(arrival_ns)
    unsaid = np.full(count, UNSAID, np.int32)
    return Chunk(
        arrival_ns=arrival_ns,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        cached_tokens=np.zeros(count, np.int32) if cached_tokens is None else cached_tokens,
        tenant=unsaid if tenant is None else tenant,
        model=unsaid if model is None else model,
        client=unsaid if client is None else client,
        line=np.zeros(count, np.int64) if line is None else line,
        patience_ns=np.full(count, ENDLESS, np.int64) if patience_ns is None else patience_ns,
        leaves_ns=np.full(count, ENDLESS, np.int64) if leaves_ns is None else leaves_ns,
        blocks=ragged.empty(count) if blocks is None else blocks,
    )


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """Return chunks as one, in the order they are given; there must be one."""
    if len(chunks) == 1:
        return chunks[0]
    return Chunk(*(ragged.joined([getattr(chunk, name) for chunk in chunks]) for name in COLUMNS))


class Names:
    """Names in the order they were first met; a chunk holds their indices."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names: list[str] = []
        self._index: dict[str, int] = {"": UNSAID}
        self.indices(names)

    def __getitem__(self, index: int) -> str:
        return self._names[index] if index != UNSAID else ""

    def __len__(self) -> int:
        return len(self._names)

    def find(self, name: str) -> int:
        """Return the index of a name, or one that no request has."""
        return self._index.get(name, UNMET)

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._names))

    def index(self, name: str) -> int:
        """Return the index of a name, a new one if it was never met; UNSAID of no name."""
        found = self._index.get(name)
        if found is None:
            found = self._index[name] = len(self._names)
            self._names.append(name)
        return found

    def indices(self, names: Sequence[str]) -> Ints:
        return np.fromiter(map(self.index, names), np.int32, len(names))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Requests that can be read, from the start, as often as one likes; the names fill up while they are."""

    name: str
    read: Callable[[], Iterator[Chunk]]
    clock_ns: int = 0  # the time of the day at the start; that of the trace's own clock
    notes: tuple[str, ...] = ()  # what was assumed to make it
    tenants: Names = field(default_factory=Names)
    models: Names = field(default_factory=Names)
    clients: Names = field(default_factory=Names)

    def chunks(self) -> Iterator[Chunk]:
        """Yield the requests, none of the chunks empty. Raises TraceError where the source has something wrong."""
        return (chunk for chunk in self.read() if len(chunk))

    def whole(self) -> Chunk:
        """Return all requests at once, for a stream that is known to be small."""
        none = np.zeros(0, np.int64)
        empty = chunk_of(none, none.astype(np.int32), none.astype(np.int32))
        return joined(list(self.chunks()) or [empty])


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a stream comes to."""

    requests: int
    span_ns: int  # from the first arrival to the last
    last_ns: int  # arrival, from the start of the stream
    prompt_tokens: int  # sums
    output_tokens: int
    cached_tokens: int
    blocks: int  # whose keys are known

    @property
    def prompt_mean(self) -> float:
        return self.prompt_tokens / self.requests if self.requests else 0.0

    @property
    def output_mean(self) -> float:
        return self.output_tokens / self.requests if self.requests else 0.0

    @property
    def cached_fraction(self) -> float:
        """Share of the prompts' tokens that were asked before."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def lasts_ns(self) -> int:
        """How long the stream lasts when its last gap is as long as the others are in the mean."""
        return self.span_ns + self.span_ns // max(1, self.requests - 1)


def measure(stream: Stream) -> Measured:
    """Read a stream and say what it comes to."""
    first_ns, last_ns, requests, blocks = None, 0, 0, 0
    sums = dict.fromkeys(("prompt_tokens", "output_tokens", "cached_tokens"), 0)
    for chunk in stream.chunks():
        first_ns = int(chunk.arrival_ns[0]) if first_ns is None else first_ns
        last_ns = int(chunk.arrival_ns[-1])
        requests += len(chunk)
        blocks += len(chunk.blocks.values)
        for name in sums:
            sums[name] += int(getattr(chunk, name).sum(dtype=np.int64))
    span_ns = last_ns - (first_ns or 0)
    return Measured(requests=requests, span_ns=span_ns, last_ns=last_ns, blocks=blocks, **sums)


def cut(chunk: Chunk, size: int = CHUNK) -> Iterator[Chunk]:
    """Yield a chunk in smaller ones."""
    for begin in range(0, len(chunk), size):
        yield chunk[begin : begin + size]
