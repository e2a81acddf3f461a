"""Requests a piece at a time, as arrays: what a rehearsal is asked, in the order of arrival."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterline.rehearsal.capacity import NEVER
from waterline.units import DAY_S, GIGA, PICOSECONDS_PER_S
from waterline.workload import ragged
from waterline.workload.ragged import Ragged
from waterline.workload.stream import ENDLESS, UNSAID, Chunk

PIECE = 1 << 16  # requests, about
LONGEST_DAYS = 100  # time is kept in 64 bits of picoseconds
PICOSECONDS_PER_NS = PICOSECONDS_PER_S // GIGA

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some requests in the order of their arrival, one entry of each array a request."""

    arrival_ps: Integers
    prompt_tokens: Integers
    output_tokens: Integers
    row: Integers  # index of the row of the demand that asks
    cached_tokens: NDArray[np.int32]  # of the prompt; at least one token of it is not
    client: NDArray[np.int32]  # index of its name in `Traffic.clients`, or UNSAID
    patience_ps: Integers  # how long it waits for its turn, or NEVER: as long as it takes
    leaves_ps: Integers  # after its arrival, when its client goes away whatever has come by then, or NEVER
    blocks: Ragged  # keys of its prompt, see `policy.routing`

    def __len__(self) -> int:
        return len(self.arrival_ps)

    def __getitem__(self, which: slice | NDArray[Any]) -> "Piece":
        return Piece(*(getattr(self, name)[which] for name in COLUMNS))


COLUMNS = tuple(column.name for column in fields(Piece))


def piece_of(
    arrival_ps: Integers,
    prompt_tokens: Integers,
    output_tokens: Integers,
    row: Integers,
    cached_tokens: NDArray[np.int32],
) -> Piece:
    """Return requests of clients without a name, who stay to the end; their prompts have nothing to do with others."""
    count = len(arrival_ps)
    nobody, endless = np.full(count, UNSAID, np.int32), np.full(count, NEVER)
    return Piece(
        arrival_ps, prompt_tokens, output_tokens, row, cached_tokens, nobody, endless, endless, ragged.empty(count)
    )  # fmt: skip


def piece_of_chunk(chunk: Chunk, row: NDArray[Any], prefix_hit: float | NDArray[np.float64]) -> Piece:
    """Return a chunk as a piece. `prefix_hit`: of a trace that does not tell what was cached."""
    prompts = chunk.prompt_tokens.astype(np.int64)
    told = np.where(chunk.blocks.counts > 0, 0, np.minimum(chunk.cached_tokens, chunk.prompt_tokens - 1))
    return Piece(
        chunk.arrival_ns * PICOSECONDS_PER_NS,
        prompts,
        chunk.output_tokens.astype(np.int64),
        row.astype(np.int64),
        np.maximum(told, cached(prompts, prefix_hit)),
        chunk.client,
        _durations_ps(chunk.patience_ns),
        _durations_ps(chunk.leaves_ns),
        chunk.blocks,
    )


def cached(prompt_tokens: Integers, prefix_hit: float | NDArray[np.float64]) -> NDArray[np.int32]:
    """Return how much of prompts is cached; at least their last token is read."""
    return np.minimum(np.rint(prefix_hit * prompt_tokens), prompt_tokens - 1).astype(np.int32)


def joined(parts: Sequence[Piece]) -> Piece:
    """Return pieces as one, in the order they are given."""
    if len(parts) == 1:
        return parts[0]
    none = np.zeros(0, np.int64)
    parts = [piece_of(none, none, none, none, none.astype(np.int32)), *parts]
    return Piece(*(ragged.joined([getattr(part, name) for part in parts]) for name in COLUMNS))


def cut(asked: Piece) -> Iterator[Piece]:
    """Yield it in parts of `PIECE` requests at most."""
    for begin in range(0, len(asked), PIECE):
        yield asked[begin : begin + PIECE]


def _durations_ps(durations_ns: Integers) -> Integers:
    """Return times that may be ENDLESS; those longer than any rehearsal are, too."""
    endless = (durations_ns == ENDLESS) | (durations_ns > LONGEST_DAYS * DAY_S * GIGA)
    return np.where(endless, NEVER, durations_ns * PICOSECONDS_PER_NS)
