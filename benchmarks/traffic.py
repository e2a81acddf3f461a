"""How fast traces are read and changed, and in how much memory.

    .venv/bin/python benchmarks/traffic.py [ROWS]

Rows are made up: Poisson arrivals at 1,000 requests a second, lognormal lengths, 500 clients. Each figure is the CPU
time of this process from opening the file to the last request, the best of three; other work on the machine only adds.
Beside it pyarrow's CSV reader on the same file, which reads columns and leaves order, lengths and lines unchecked.
"""

import csv
import gzip
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import parquet
from rich.console import Console
from rich.table import Table

from waterline.workload.columns import HEADER, parse_columns
from waterline.workload.files import open_trace
from waterline.workload.grammar import parse_traffic
from waterline.workload.stream import Stream, measure

RUNS = 3


def made_up(rows: int) -> dict[str, np.ndarray]:
    generator = np.random.Generator(np.random.PCG64(7))
    arrival_us = np.cumsum(generator.exponential(1000.0, rows)).astype(np.int64)
    lengths = [np.clip(np.rint(generator.lognormal(np.log(mean) - 0.5, 1.0, rows)), 1, 99_999) for mean in (1155, 211)]
    return {
        "arrival_us": arrival_us,
        "prompt": lengths[0].astype(np.int64),
        "output": lengths[1].astype(np.int64),
        "client": generator.integers(0, 500, rows),
    }


def write_azure(columns: dict[str, np.ndarray], path: Path) -> None:
    times = np.datetime_as_string(np.datetime64("2025-01-01T00:00:00", "us") + columns["arrival_us"])
    rows = zip(times.tolist(), columns["prompt"].tolist(), columns["output"].tolist(), strict=True)
    lines = [f"{time_of_day.replace('T', ' ')}0,{prompt},{output}" for time_of_day, prompt, output in rows]
    path.write_text("\n".join([HEADER, *lines, ""]))


def write_table(columns: dict[str, np.ndarray], path: Path) -> None:
    with path.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["ts", "in", "out", "who"])
        for arrival_us, *lengths, client in zip(*(column.tolist() for column in columns.values()), strict=True):
            writer.writerow([f"{arrival_us / 1e6:.6f}", *lengths, f"client-{client:03}"])


def write_parquet(columns: dict[str, np.ndarray], path: Path) -> None:
    parquet.write_table(pa.table(columns), path)


def best_s(run: Callable[[], object]) -> float:
    times_s = []
    for _ in range(RUNS):
        began_s = time.process_time()
        run()
        times_s.append(time.process_time() - began_s)
    return min(times_s)


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    table = Table("what", "rows", "CPU s", "rows per CPU s", "pyarrow's CSV reader, CPU s")
    with tempfile.TemporaryDirectory() as folder:
        made = made_up(rows)
        azure, packed, generic, arrow = (
            Path(folder) / name for name in ("azure.csv", "azure.csv.gz", "table.csv", "table.parquet")
        )
        write_azure(made, azure)
        packed.write_bytes(gzip.compress(azure.read_bytes(), 6))
        write_table(made, generic)
        write_parquet(made, arrow)
        mapped = parse_columns("arrival=ts,prompt=in,output=out,client=who")
        by_us = parse_columns("arrival_us=arrival_us,prompt=prompt,output=output,client=client")
        cases: list[tuple[str, Callable[[], Stream], Path | None]] = [
            ("CSV of Azure, times of day", lambda: open_trace(azure), azure),
            ("the same, packed", lambda: open_trace(packed), packed),
            ("CSV with a column map, seconds and clients", lambda: open_trace(generic, columns=mapped), generic),
            ("Parquet", lambda: open_trace(arrow, columns=by_us), None),
        ]
        cases += [
            (f"CSV of Azure, {change}", lambda change=change: parse_traffic(change).apply(open_trace(azure)), None)
            for change in ("x0.5", "x10", "x100", "surge 10x@00:05+5m", "tenant a=0.7 b=0.3")
        ]
        for what, stream, peer in cases:
            got = measure(stream()).requests
            took_s = best_s(lambda stream=stream: measure(stream()))
            peer_s = f"{best_s(lambda peer=peer: arrow_csv.read_csv(peer)):.2f}" if peer else ""
            table.add_row(what, f"{got:,}", f"{took_s:.2f}", f"{got / took_s:,.0f}", peer_s)
    Console().print(table)
    most_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"Most memory at once, this script included: {most_gib:.2f} GiB")


if __name__ == "__main__":
    main()
