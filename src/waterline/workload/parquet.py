"""Parquet, a batch at a time; read by pyarrow, which is an extra."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from waterline.errors import MissingExtraError
from waterline.workload.columns import LABELS, SECONDS_NS, TIMES, UNITS_NS, ColumnMap, find_columns
from waterline.workload.digits import Longs
from waterline.workload.source import Source
from waterline.workload.stream import CHUNK, ENDLESS, Chunk, Ints, Names, chunk_of

LATEST_NS = 2**63 - 1
MOST_TOKENS = 999_999_999
NUMBERS = ("int", "uint", "float", "double", "halffloat")  # types
EXPECTED_DURATION = "a number of seconds above 0, or missing where it has no end"


def read_parquet(source: Source, columns: ColumnMap | None, names: dict[str, Names]) -> Iterator[Chunk]:
    """Yield the requests of a Parquet file in the order of its rows; a row counts as a line, the first is 1.

    Raises:
        TraceError: naming the row, the column, what stands there and what is expected.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException  # noqa: PLC0415 - an extra
        from pyarrow.parquet import ParquetFile  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("Reading a Parquet file", "parquet") from error
    source.line = 0
    try:
        file = ParquetFile(source.path)
        found = find_columns(tuple(file.schema_arrow.names), columns, str(source.path))
        for batch in file.iter_batches(CHUNK, columns=sorted(set(found.named.values()))):
            reader = _Batch(source, found, batch)
            yield reader.chunk(names)
            source.line += batch.num_rows
    except (ArrowException, OSError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        source.refuse(f"it cannot be read as Parquet: {why}. Write it again.", source.line)


class _Batch:
    """Some rows."""

    def __init__(self, source: Source, columns: ColumnMap, batch: Any) -> None:
        self.source, self.columns, self.batch = source, columns, batch
        self.line = source.line + 1 + np.arange(batch.num_rows)

    def chunk(self, names: dict[str, Names]) -> Chunk:
        own = self.columns.named
        named: dict[str, Any] = {key: self._labels(key, names[key]) for key in LABELS if key in own}
        named |= {f"{key}_ns": self._durations(key) for key in TIMES if key in own}
        return chunk_of(
            self._arrivals(),
            self._tokens("prompt", 1),
            self._tokens("output", 1),
            line=self.line,
            cached_tokens=self._tokens("cached", 0) if "cached" in own else None,
            **named,
        )

    def _column(self, key: str) -> Any:
        return self.batch.column(self.columns.named[key])

    def _refuse(self, key: str, row: int, expected: str) -> None:
        value = self._column(key)[row].as_py()
        name = self.columns.named[key]
        self.source.refuse(f"column {name}: {value!r} is not {expected}.", int(self.line[row]))

    def _numbers(self, key: str, least: int, most: int, unit: int, expected: str, filler: int | None = None) -> Longs:
        """Return the values times a unit, whole; refuse the first that is none, NaN or beyond the limits.

        `filler` stands for what is missing, where that is no mistake.
        """
        column = self._column(key)
        numbers = str(column.type).startswith(NUMBERS)
        if filler is not None and numbers:
            column = column.fill_null(filler)
        values = column.to_numpy(zero_copy_only=False)
        if not numbers or values.dtype.kind not in "iuf":
            kind = str(column.type)
            self.source.refuse(f"column {self.columns.named[key]} holds {kind}. Expected {expected}.")
        with np.errstate(invalid="ignore"):
            right = (values >= least) & (values <= most // unit)
            if values.dtype.kind == "f" and unit == 1:
                right &= values == np.floor(values)
        if not right.all():
            self._refuse(key, int(np.flatnonzero(~right)[0]), expected)
        scaled = np.rint(values * float(unit)) if values.dtype.kind == "f" else values.astype(np.int64) * unit
        return np.asarray(scaled.astype(np.int64))

    def _arrivals(self) -> Longs:
        column = self._column("arrival")
        if str(column.type).startswith("timestamp"):
            times = column.to_numpy(zero_copy_only=False).astype("datetime64[ns]")
            missing = np.flatnonzero(np.isnat(times))
            if len(missing):
                self._refuse("arrival", int(missing[0]), "a time")
            return np.asarray(times.astype(np.int64))
        unit_ns = self.columns.unit_ns
        unit = next(name for name, value in UNITS_NS.items() if value == unit_ns)
        return self._numbers("arrival", 0, LATEST_NS, unit_ns, f"a timestamp, or a number from 0 on ({unit})")

    def _tokens(self, key: str, least: int) -> Ints:
        expected = f"a whole number from {least} to {MOST_TOKENS}"
        return self._numbers(key, least, MOST_TOKENS, 1, expected).astype(np.int32)

    def _durations(self, key: str) -> Longs:
        values = self._numbers(key, 0, LATEST_NS, SECONDS_NS, EXPECTED_DURATION, filler=1)
        column = self._column(key)
        missing = column.is_null().to_numpy(zero_copy_only=False)
        none = np.flatnonzero(~missing & (column.fill_null(1).to_numpy(zero_copy_only=False) == 0))
        if len(none):
            self._refuse(key, int(none[0]), EXPECTED_DURATION)
        return np.where(missing, ENDLESS, np.maximum(values, 1))

    def _labels(self, key: str, names: Names) -> Ints:
        encoded = self._column(key).cast("string").dictionary_encode()
        index = names.indices([value or "" for value in encoded.dictionary.to_pylist()])
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return np.asarray(np.concatenate([index, np.array([-1], np.int32)])[codes])
