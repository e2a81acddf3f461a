"""Requests put into the order of their arrival, which then begins at 0."""

from collections.abc import Iterator

import numpy as np

from waterline.units import GIGA
from waterline.workload.source import Source
from waterline.workload.stream import CHUNK, Chunk, cut, joined

REACH = CHUNK  # rows: loggers write out of order, but not by much


def in_order(source: Source, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yield the requests in the order of their arrival; those of one instant keep their order.

    A row may stand some `REACH` rows from its place; farther off nothing can be put right without holding the whole
    trace, and that is a TraceError that names the line.
    """
    held: Chunk | None = None
    latest_ns: int | None = None
    for chunk in chunks:
        if not len(chunk):
            continue
        pool = _sorted(joined([held, chunk]) if held else chunk)
        if latest_ns is not None and pool.arrival_ns[0] < latest_ns:
            early_s = (latest_ns - int(pool.arrival_ns[0])) / GIGA
            source.refuse(
                f"it arrives {early_s:,.6g} s before a line that stands more than {REACH:,} lines above it. Sort the "
                "file by the time of arrival.",
                int(pool.line[0]),
            )
        ready, held = pool[:-REACH], pool[-REACH:]
        if len(ready):
            latest_ns = int(ready.arrival_ns[-1])
            yield from cut(ready)
    if held:
        yield from cut(held)


def _sorted(chunk: Chunk) -> Chunk:
    if bool((np.diff(chunk.arrival_ns) >= 0).all()):
        return chunk
    return chunk[np.argsort(chunk.arrival_ns, kind="stable")]
