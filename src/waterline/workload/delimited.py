"""CSV, many lines at a time; a field that is odd is read by itself, and named if it is wrong."""

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from waterline.units import DAY_S, GIGA
from waterline.workload.columns import AZURE, HEADER, LABELS, SECONDS_NS, TIMES, ColumnMap, find_columns
from waterline.workload.digits import Fields, Flags, Longs, counts, decimals, timestamps
from waterline.workload.source import Source, shown
from waterline.workload.stream import ENDLESS, Chunk, Ints, Names, chunk_of

DELIMITERS = (",", ";", "\t")
LONGEST_HEADER = 10_000  # characters
MOST_TOKENS = 999_999_999
LATEST_NS = 2**63 - 1
EXPECTED_TIMESTAMP = "a time like 2023-11-16 18:17:03.9799600"
EXPECTED_TOKENS = f"a whole number from 1 to {MOST_TOKENS}"
EXPECTED_CACHED = f"a whole number from 0 to {MOST_TOKENS}"
EXPECTED_DURATION = "a number of seconds above 0, or empty where it has no end"
TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):?(\d\d))?", re.ASCII
)
WHOLE = re.compile(r"(\d{1,9})(?:\.0*)?", re.ASCII)
PADDING = 64  # bytes behind a text, so that a look behind the end of a field finds nothing
UNIT_NAMES = {GIGA: "seconds", 10**6: "milliseconds", 10**3: "microseconds", 1: "nanoseconds"}
KEPT_DELIMITER = "\x1f"  # stands for a delimiter inside quotes


@dataclass(frozen=True, slots=True)
class Lines:
    """Some lines of a table, taken apart: which line, and where the fields of each column are."""

    number: Longs  # of the line in the file
    fields: dict[str, Fields]  # by what the column is
    delimiter: str


def read_delimited(source: Source, columns: ColumnMap | None, names: dict[str, Names]) -> Iterator[Chunk]:
    """Yield the requests of a CSV file in the order of the file; arrivals since 1970, or since second 0.

    Args:
        source: the file; gzip and a byte order mark do no harm.
        columns: which column is what; None: as the header says, see `find_columns`.
        names: of tenants, models and clients; what is met is added.

    Raises:
        TraceError: naming the line, the column, what stands there and what is expected.
    """
    table: _Table | None = None
    dates = None
    source.line = 0
    for block in source.blocks():
        data = block
        if table is None:
            header, _, data = block.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
            source.line = 1
            table = _table(source, header, columns)
        lines = table.lines(source, data)
        if not len(lines.number):
            continue
        arrivals = lines.fields["arrival"]
        dates = ":" in arrivals.string(0) if dates is None else dates
        yield _chunk(source, table.columns, lines, names, dates=dates)


@dataclass(frozen=True, slots=True)
class _Table:
    """What the header says."""

    columns: ColumnMap
    header: tuple[str, ...]
    delimiter: str

    def lines(self, source: Source, data: bytes) -> Lines:
        """Take whole lines apart; `source.line` is the last one before them, and moves on."""
        if b'"' in data:
            data = self._unquoted(source, data)
        text = np.frombuffer(data + bytes(PADDING), np.uint8)
        end = np.flatnonzero(text == ord("\n"))
        begin = np.concatenate([[0], end[:-1] + 1])[: len(end)]
        number = source.line + 1 + np.arange(len(end))
        source.line += len(end)
        end = end - ((end > begin) & (text[end - 1] == ord("\r")))
        places = np.flatnonzero(text == ord(self.delimiter))
        parts = 1 + np.searchsorted(places, end) - np.searchsorted(places, begin)
        full = np.ones(len(end), np.bool_)
        for odd in np.flatnonzero(parts != len(self.header)).tolist():
            line = text[begin[odd] : end[odd]].tobytes()
            if line.strip(b" "):
                self._refuse_parts(source, line, int(parts[odd]), int(number[odd]))
            full[odd] = False
        begin, end, number = begin[full], end[full], number[full]
        inner = places.reshape(len(begin), len(self.header) - 1)
        edges = np.concatenate([begin[:, None] - 1, inner, end[:, None]], axis=1)
        columns = {key: self.header.index(name) for key, name in self.columns.named.items()}
        fields = {key: Fields(text, edges[:, at] + 1, edges[:, at + 1]) for key, at in columns.items()}
        return Lines(number, fields, self.delimiter)

    def _refuse_parts(self, source: Source, line: bytes, parts: int, number: int) -> None:
        text = shown(line.decode(errors="replace").strip())
        expected = f"{len(self.header)}, as in the header"
        if self.columns == AZURE:
            expected = HEADER
        source.refuse(f"{text} has {parts} values. Expected {expected}.", number)

    def _unquoted(self, source: Source, data: bytes) -> bytes:
        """Take quotes off; a delimiter between them is kept apart."""
        lines = data.decode(errors="replace").split("\n")[:-1]
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        plain: list[str] = []
        try:
            for row in reader:
                if reader.line_num != len(plain) + 1 or any("\n" in field for field in row):
                    break
                plain.append(self.delimiter.join(field.replace(self.delimiter, KEPT_DELIMITER) for field in row))
        except csv.Error:
            pass
        if len(plain) != len(lines):
            source.refuse(
                f"a quote does not end on this line. Leave the columns of free text out of {source.path.name}.",
                source.line + len(plain) + 1,
            )
        return "\n".join([*plain, ""]).encode()


def _table(source: Source, header: bytes, columns: ColumnMap | None) -> _Table:
    try:
        text = header.decode().strip()
    except UnicodeDecodeError:
        source.refuse(f"it is not text. Expected a CSV file with the columns {HEADER}.")
    delimiter = max(DELIMITERS, key=text[:LONGEST_HEADER].count)
    names = tuple(name.strip() for name in next(csv.reader([text], delimiter=delimiter)))
    return _Table(find_columns(names, columns, f"{source.path}, line 1"), names, delimiter)


def _chunk(source: Source, columns: ColumnMap, lines: Lines, names: dict[str, Names], *, dates: bool) -> Chunk:
    """Read the fields: many at once where that is possible, and each of the others by itself."""
    fields = lines.fields

    def read(key: str, fast: tuple[Longs, Flags], slow: Callable[[str], int | None], expected: str) -> Longs:
        values, known = fast
        for odd in np.flatnonzero(~known).tolist():
            text = fields[key].string(odd)
            value = slow(text)
            if value is None:
                name = columns.named[key]
                source.refuse(f"column {name}: {shown(text)} is not {expected}.", int(lines.number[odd]))
            values[odd] = value
        return values

    def tokens(key: str, least: int, expected: str) -> Ints:
        values, known = counts(fields[key])
        known &= values >= least
        return read(key, (values, known), lambda text: _count(text, least), expected).astype(np.int32)

    def labels(key: str) -> Ints:
        own = fields[key]
        raw, begins, ends = own.text.tobytes(), own.begin.tolist(), own.end.tolist()
        found = {name: _label(name, lines.delimiter) for name in {raw[b:e] for b, e in zip(begins, ends, strict=True)}}
        index = {name: names[key].index(text) for name, text in sorted(found.items())}
        return np.fromiter((index[raw[b:e]] for b, e in zip(begins, ends, strict=True)), np.int32, len(own))

    def durations(key: str) -> Longs:
        values, known = decimals(fields[key], SECONDS_NS)
        known &= values > 0
        return read(key, (values, known), _duration, EXPECTED_DURATION)

    if dates:
        arrival_ns = read("arrival", timestamps(fields["arrival"]), nanoseconds, EXPECTED_TIMESTAMP)
    else:
        unit_ns = columns.unit_ns
        expected = f"a time, in {UNIT_NAMES[unit_ns]} from 0 to {LATEST_NS // unit_ns:,}{_hint(unit_ns)}"
        fast = decimals(fields["arrival"], unit_ns)
        arrival_ns = read("arrival", fast, lambda text: _decimal(text, unit_ns), expected)
    named: dict[str, Any] = {key: labels(key) for key in LABELS if key in fields}
    named |= {f"{key}_ns": durations(key) for key in TIMES if key in fields}
    return chunk_of(
        arrival_ns,
        tokens("prompt", 1, EXPECTED_TOKENS),
        tokens("output", 1, EXPECTED_TOKENS),
        line=lines.number,
        cached_tokens=tokens("cached", 0, EXPECTED_CACHED) if "cached" in fields else None,
        **named,
    )


def _label(name: bytes, delimiter: str) -> str:
    return name.decode(errors="replace").replace(KEPT_DELIMITER, delimiter).strip()


def _count(text: str, least: int) -> int | None:
    """Read a whole number; one with nothing behind its point is one too."""
    found = WHOLE.fullmatch(text)
    return int(found[1]) if found and int(found[1]) >= least else None


def _decimal(text: str, unit_ns: int) -> int | None:
    """Read a number of any form, rounded to the nanosecond."""
    try:
        value = Decimal(text) * unit_ns
    except InvalidOperation:
        return None
    return round(value) if value.is_finite() and 0 <= value <= LATEST_NS else None


def _duration(text: str) -> int | None:
    """Read a number above 0, in seconds; what is shorter than a nanosecond is one."""
    if not text:
        return ENDLESS
    value = _decimal(text, SECONDS_NS)
    positive = value is not None and Decimal(text) > 0
    return max(1, value) if value is not None and positive else None


def _hint(unit_ns: int) -> str:
    return "; for milliseconds write arrival_ms=…" if unit_ns == SECONDS_NS else ""


def nanoseconds(timestamp: str) -> int | None:
    """Return the nanoseconds since 1970 of a time of day, or None if it is none."""
    found = TIMESTAMP.fullmatch(timestamp)
    if not found:
        return None
    day, hours, minutes, seconds, fraction, sign, offset_hours, offset_minutes = found.groups()
    try:
        days = date.fromisoformat(day).toordinal() - date(1970, 1, 1).toordinal()
    except ValueError:
        return None
    if int(hours) > 23 or int(minutes) > 59 or int(seconds) > 59:
        return None
    time_s = days * DAY_S + int(hours) * 3600 + int(minutes) * 60 + int(seconds)
    if sign:
        offset_s = int(offset_hours) * 3600 + int(offset_minutes) * 60
        time_s -= offset_s if sign == "+" else -offset_s
    time_ns = time_s * GIGA + int((fraction or "").ljust(9, "0"))
    return time_ns if abs(time_ns) <= LATEST_NS else None
