"""Who a recorded request is from: as the trace says, and dealt in turn where it does not."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterline.errors import TraceError
from waterline.fleet import Demand
from waterline.rehearsal.jit import compiled, seen
from waterline.workload.stream import Chunk, Names, Stream

Integers = NDArray[np.int64]


def deal(count: int, rates: Sequence[float], taken: Integers | None = None) -> Integers:
    """Give so many requests to rows, in proportion to their rates; in equal parts when all are 0.

    Deterministic and as even as can be: each request goes to the row that lags furthest behind its share of all so far,
    the first of equal ones. Returns the row of each request.

    Args:
        count: requests.
        rates: of the rows.
        taken: how many each row has had before; counts on.
    """
    weights = np.array(rates if any(rates) else [1.0] * len(rates))
    taken = np.zeros(len(rates), np.int64) if taken is None else taken
    takers = np.zeros(count, np.int64)
    _deal(seen(weights), seen(taken), seen(takers), math.fsum(weights), int(taken.sum()))
    return takers


@compiled
def _deal(weights: Any, taken: Any, takers: Any, total: float, before: int) -> None:
    for number in range(len(takers)):
        taker, furthest = 0, -math.inf
        for row in range(len(weights)):
            lag = weights[row] * (before + number + 1) - total * taken[row]
            if lag > furthest:
                taker, furthest = row, lag
        taken[taker] += 1
        takers[number] = taker


def dealt(stream: Stream, rows: Sequence[Demand], rates: Sequence[float]) -> Stream:
    """Return a stream whose tenants are those of the rows, and whose model of each request is the index of its row.

    A request goes to the rows of the tenant and the model it names, in turn by their rates; to all of them where it
    names none.

    Raises:
        TraceError: while it is read, at the first request that no row asks.
    """
    tenants = Names([row.tenant for row in rows])
    of_row = tenants.indices([row.tenant for row in rows])

    def read() -> Iterator[Chunk]:
        taken: dict[tuple[int, int], Integers] = {}
        for chunk in stream.chunks():
            row = np.zeros(len(chunk), np.int32)
            pairs = chunk.tenant.astype(np.int64) << 32 | (chunk.model.astype(np.int64) & 0xFFFFFFFF)
            for first in np.unique(pairs, return_index=True)[1].tolist():
                key = int(chunk.tenant[first]), int(chunk.model[first])
                own = np.flatnonzero(pairs == pairs[first])
                meant = _meant(stream, chunk, first, rows)
                before = taken.setdefault(key, np.zeros(len(meant), np.int64))
                row[own] = np.array(meant)[deal(len(own), [rates[index] for index in meant], before)]
            yield replace(chunk, tenant=of_row[row], model=row)

    return replace(stream, read=read, tenants=tenants, models=Names())


def _meant(stream: Stream, chunk: Chunk, at: int, rows: Sequence[Demand]) -> list[int]:
    """Return the rows a request may be of."""
    tenant, model = stream.tenants[int(chunk.tenant[at])], stream.models[int(chunk.model[at])]
    meant = [index for index, row in enumerate(rows) if tenant in {"", row.tenant} and model in {"", row.model}]
    if not meant:
        said = [f"{kind} '{name}'" for kind, name in (("tenant", tenant), ("model", model)) if name]
        asking = ", ".join(dict.fromkeys(f"{row.tenant}/{row.model}" for row in rows))
        kind, name = ("tenant", tenant) if tenant else ("model", model)
        raise TraceError(
            f"{stream.name}, line {chunk.line[at]}: no [[demand]] is of {' and '.join(said)}; there are {asking}. Add "
            f"one, or say who is meant: --traffic '{kind} by {kind} {name}=… *=…'"
        )
    return meant
