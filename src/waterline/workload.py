"""What is asked, and how well it should be answered; traces are read and written here.

A trace file has the columns of the Azure LLM inference traces, ``TIMESTAMP,ContextTokens,GeneratedTokens``: the wall
clock of the arrival, the tokens of the prompt and those of the answer. It is CSV without quotes, packed with gzip when
its name ends in ``.gz``.
"""

import errno
import gzip
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from operator import itemgetter
from pathlib import Path
from typing import IO, NoReturn

from msgspec import Struct

from waterline.errors import TraceError
from waterline.units import DAY_S, GIGA

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
HEADER = ",".join(COLUMNS)
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
            before_s = request.arrival_s

    @property
    def duration_s(self) -> float:
        """Time from the first arrival to the last; 0 for fewer than two requests."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace file; the first arrival is second 0.

    Arrivals are exact: the digits of the timestamps are subtracted as whole nanoseconds, and only the difference
    becomes a float. A timestamp may carry ``Z`` or an offset from UTC. Loggers write out of order, so rows are put into
    the order of their time; those of one instant keep theirs. Blank lines are skipped.

    Raises:
        TraceError: the file is not there or not readable, is no such CSV, or holds a wrong row; the message names the
            line (the header is line 1), the column, what stands there and what is expected.
    """
    path = Path(path)
    try:
        packed = path.suffix == ".gz"
        with gzip.open(path, "rt", encoding="utf-8-sig") if packed else path.open(encoding="utf-8-sig") as file:
            rows = list(_rows(file, path))
    except (gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{path} cannot be unpacked: {error}. A name that ends in .gz must be a gzip file.") from error
    except EOFError as error:
        raise TraceError(f"{path} is cut short: its gzip data ends too early. Copy it again.") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is not text. Expected a CSV file (or .csv.gz) with the columns {HEADER}.") from error
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror or error}. Check the path.") from error
    if not rows:
        raise TraceError(f"{path} holds no requests, only the header. Expected rows of {HEADER}.")
    rows.sort(key=itemgetter(0))
    first_ns = rows[0][0]
    return Trace(
        name=path.name,
        requests=[
            Request(arrival_s=(arrival_ns - first_ns) / GIGA, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
            for arrival_ns, prompt_tokens, output_tokens in rows
        ],
    )


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace file, whole or not at all; arrivals are rounded to 100 ns and counted from an arbitrary midnight.

    Who asked and of which model is not written: the format has no column for it. Raises TraceError.
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


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: under another name first, beside what a link leads to. Raises OSError.

    What is there and no regular file, like ``/dev/stdout``, stays what it is and is written straight through.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        target = Path(os.path.realpath(path))
        partial = target.with_name(f".waterline-{os.getpid()}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(target)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error)) from error


# --- Rows -----------------------------------------------------------------------------------------------------------

LONGEST_LINE = 1000  # characters; junk without line ends must not fill the memory
EXPECTED_TIMESTAMP = "a time like 2023-11-16 18:17:03.9799600"
EXPECTED_TOKENS = "a whole number from 1 to 999999999"
TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):?(\d\d))?", re.ASCII
)


def _rows(file: IO[str], path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield each row as (arrival in ns since day 0, prompt tokens, output tokens)."""
    header = file.readline(LONGEST_LINE).strip()
    if not header:
        raise TraceError(f"{path} is empty. Expected a first line {HEADER}.")
    if tuple(name.strip() for name in header.split(",")) != COLUMNS:
        raise TraceError(f"{path}, line 1: the header is {_shown(header)}. Expected {HEADER}.")
    number = 1
    while line := file.readline(LONGEST_LINE):
        number += 1
        fields = [field.strip() for field in line.split(",")]
        if fields == [""]:
            continue
        if len(fields) != len(COLUMNS):
            raise TraceError(
                f"{path}, line {number}: {_shown(line.strip())} has {len(fields)} values. Expected {HEADER}."
            )
        timestamp, prompt_tokens, output_tokens = fields
        arrival_ns = _nanoseconds(timestamp)
        if arrival_ns is None:
            _refuse(path, number, 0, timestamp, EXPECTED_TIMESTAMP)
        if not _is_count(prompt_tokens):
            _refuse(path, number, 1, prompt_tokens, EXPECTED_TOKENS)
        if not _is_count(output_tokens):
            _refuse(path, number, 2, output_tokens, EXPECTED_TOKENS)
        yield arrival_ns, int(prompt_tokens), int(output_tokens)


def _refuse(path: Path, line: int, column: int, value: str, expected: str) -> NoReturn:
    raise TraceError(f"{path}, line {line}, column {COLUMNS[column]}: {_shown(value)} is not {expected}.")


def _shown(value: str) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}…"


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < len(text) <= 9 and int(text) > 0


def _nanoseconds(timestamp: str) -> int | None:
    """Return the nanoseconds since day 0 of the calendar, or None if that is no time."""
    found = TIMESTAMP.fullmatch(timestamp)
    if not found:
        return None
    day, hours, minutes, seconds, fraction, sign, offset_hours, offset_minutes = found.groups()
    try:
        days = date.fromisoformat(day).toordinal()
    except ValueError:
        return None
    if int(hours) > 23 or int(minutes) > 59 or int(seconds) > 59:
        return None
    time_s = days * DAY_S + int(hours) * 3600 + int(minutes) * 60 + int(seconds)
    if sign:
        offset_s = int(offset_hours) * 3600 + int(offset_minutes) * 60
        time_s -= offset_s if sign == "+" else -offset_s
    return time_s * GIGA + int((fraction or "").ljust(9, "0"))


def _timestamp(ticks: int) -> str:
    """Say a time as the traces do, from `FIRST_DAY` on."""
    seconds, fraction = divmod(ticks, TICKS_PER_S)
    days, seconds = divmod(seconds, DAY_S)
    minutes, second = divmod(seconds, 60)
    day = date.fromordinal(FIRST_DAY.toordinal() + days)
    return f"{day} {minutes // 60:02}:{minutes % 60:02}:{second:02}.{fraction:07}"
