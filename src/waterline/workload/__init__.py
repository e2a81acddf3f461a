"""What is asked, and how well it should be answered; traffic is read, changed and written here.

`stream` says what traffic is: requests as columns, a chunk at a time. `files` opens a trace of any format: `delimited`,
`parquet` and `mooncake` are logs of requests, `servegen` are models of clients. `operators` change traffic, and
`grammar` lets a person write how. The trace files we write have the columns of the Azure LLM inference traces,
``TIMESTAMP,ContextTokens,GeneratedTokens``, packed with gzip when their name ends in ``.gz``.
"""

import errno
import gzip
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from msgspec import Struct

from waterline.errors import TraceError
from waterline.units import DAY_S, GIGA
from waterline.workload.columns import HEADER
from waterline.workload.stream import Names, Stream, chunk_of, cut

TICKS_PER_S = 10**7  # of 100 ns, the last digit of a timestamp
FIRST_DAY = date(2025, 1, 1)  # of a trace we write: ours have no date of their own

# Of the logarithm of a length, where only its mean is known. The traces we have measured vary like a lognormal of 0.8
# to 1.0 in their prompts and of 0.65 to 1.3 in their answers (Azure code 2023, Mooncake conversation; from mean and
# standard deviation).
LENGTH_SIGMA = 1.0


class Slo(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well a request should be answered.

    A request meets it when both times hold; the service meets it when `fraction` of the requests do.
    """

    ttft_s: float  # time to first token, from the arrival of the request
    tpot_s: float  # time per output token after the first, averaged over the request
    fraction: float = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a trace; who asks, and of which model, is known once it has been dealt to a demand."""

    arrival_s: float  # from the start of the trace
    prompt_tokens: int  # at least 1
    output_tokens: int  # at least 1
    tenant: str = ""
    model: str = ""
    cached_tokens: int = 0  # of the prompt: are in the cache already; less than all


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in the order of their arrival. Raises TraceError when they are not, or one asks for nothing."""

    name: str
    requests: Sequence[Request]

    def __post_init__(self) -> None:
        before_s = 0.0
        for number, request in enumerate(self.requests, start=1):
            where = f"request {number} of the trace '{self.name}'"
            if not before_s <= request.arrival_s < math.inf:
                raise TraceError(
                    f"{where} arrives at {request.arrival_s} s, after one at {before_s} s. Sort the requests by "
                    "arrival_s, which begins at 0."
                )
            if request.prompt_tokens < 1 or request.output_tokens < 1:
                raise TraceError(
                    f"{where} has {request.prompt_tokens} + {request.output_tokens} tokens. A request has at least 1 "
                    "token of prompt and 1 of output."
                )
            if not 0 <= request.cached_tokens < request.prompt_tokens:
                raise TraceError(
                    f"{where} has {request.cached_tokens} cached tokens of a prompt of {request.prompt_tokens}. At "
                    "least one is not cached, for the first token of the answer comes from it."
                )
            before_s = request.arrival_s

    @property
    def duration_s(self) -> float:
        """Time from the first arrival to the last; 0 for fewer than two requests."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0

    @property
    def stream(self) -> Stream:
        """The same requests as columns; arrivals rounded to the nanosecond."""
        tenants, models = Names(), Names()
        requests = self.requests
        whole = chunk_of(
            np.rint(np.array([request.arrival_s for request in requests], np.float64) * GIGA).astype(np.int64),
            np.array([request.prompt_tokens for request in requests], np.int32),
            np.array([request.output_tokens for request in requests], np.int32),
            cached_tokens=np.array([request.cached_tokens for request in requests], np.int32),
            tenant=tenants.indices([request.tenant for request in requests]),
            model=models.indices([request.model for request in requests]),
        )
        return Stream(name=self.name, read=lambda: cut(whole), tenants=tenants, models=models)


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace file of any format we know into objects; see `open_trace`, which takes no more memory for more."""
    from waterline.workload.files import open_trace  # noqa: PLC0415 - every format's libraries; most commands read none

    stream = open_trace(path)
    return Trace(
        name=stream.name,
        requests=[
            Request(
                arrival_s=arrival_ns / GIGA,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                tenant=stream.tenants[tenant],
                model=stream.models[model],
                cached_tokens=cached_tokens,
            )
            for chunk in stream.chunks()
            for arrival_ns, prompt_tokens, output_tokens, tenant, model, cached_tokens in zip(
                chunk.arrival_ns.tolist(),
                chunk.prompt_tokens.tolist(),
                chunk.output_tokens.tolist(),
                chunk.tenant.tolist(),
                chunk.model.tolist(),
                np.minimum(chunk.cached_tokens, chunk.prompt_tokens - 1).tolist(),
                strict=True,
            )
        ],
    )


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace file, whole or not at all; arrivals are rounded to 100 ns and counted from an arbitrary midnight.

    Who asked, of which model and what was cached is not written: the format has no column for it. Raises TraceError.
    """
    path = Path(path)
    lines = [HEADER]
    try:
        for request in trace.requests:
            timestamp = _timestamp(round(request.arrival_s * TICKS_PER_S))
            lines.append(f"{timestamp},{request.prompt_tokens},{request.output_tokens}")
    except (ValueError, OverflowError) as error:
        raise TraceError(
            f"cannot write the trace {path}: an arrival after {request.arrival_s:g} s is beyond the calendar."
        ) from error
    data = "\n".join([*lines, ""]).encode()
    try:
        write_whole(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    except OSError as error:
        raise TraceError(f"cannot write the trace {path}: {error.strerror or error}. Choose another place.") from error


def write_whole(path: str | os.PathLike[str], data: bytes | Iterable[bytes]) -> None:
    """Write a file whole or not at all: under another name first, beside what a link leads to. Raises OSError.

    What is there and no regular file, like ``/dev/stdout``, stays what it is and is written straight through.
    """
    path, pieces = Path(path), [data] if isinstance(data, bytes) else data
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                file.writelines(pieces)
            return
        target = Path(os.path.realpath(path))
        partial = target.with_name(f".waterline-{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.writelines(pieces)
            partial.replace(target)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error)) from error


def _timestamp(ticks: int) -> str:
    """Say a time as the traces do, from `FIRST_DAY` on."""
    seconds, fraction = divmod(ticks, TICKS_PER_S)
    days, seconds = divmod(seconds, DAY_S)
    minutes, second = divmod(seconds, 60)
    day = date.fromordinal(FIRST_DAY.toordinal() + days)
    return f"{day} {minutes // 60:02}:{minutes % 60:02}:{second:02}.{fraction:07}"
