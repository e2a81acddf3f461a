"""Any trace file as a stream: the format is found from what stands in it, not from its name."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from waterline.workload.columns import HEADER, ColumnMap, parse_columns
from waterline.workload.delimited import read_delimited
from waterline.workload.mooncake import read_mooncake
from waterline.workload.order import in_order
from waterline.workload.parquet import read_parquet
from waterline.workload.servegen import is_folder_of_clients, is_tar, read_servegen
from waterline.workload.source import Source
from waterline.workload.stream import DAY_NS, Names, Stream

START = 512  # bytes, by which a format is known
PARQUET = b"PAR1"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def open_trace(path: str | os.PathLike[str], *, columns: ColumnMap | str | None = None, seed: int = 0) -> Stream:
    """Return the requests of a trace file: CSV, Parquet, Mooncake's JSON lines or ServeGen's clients.

    Text may be packed with gzip. The first arrival is second 0 of the stream, but for ServeGen, which begins at
    midnight. The first chunk is read at once, so that a file of the wrong kind is told of here.

    Args:
        path: a file, or a folder of ServeGen.
        columns: which column of a table is what, see `parse_columns`; None or "": as its header says.
        seed: of what is drawn, for ServeGen.

    Raises:
        TraceError: the file is not there, is no trace, or holds a wrong line; later ones are told of while it is read.
        MissingExtraError: it is Parquet, and pyarrow is not installed.
    """
    source = Source(Path(path))
    columns = parse_columns(columns) if isinstance(columns, str) and columns else columns or None
    folder = is_folder_of_clients(source.path)
    start = b"" if folder else source.start(START)
    is_json = start.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"{"
    if columns and (folder or is_tar(start) or is_json):
        source.refuse("it is no table, and needs no map of columns. Leave that out.")
    if folder or is_tar(start):
        return _drawn(source, seed)
    if not start.strip():
        source.refuse(f"it is empty. Expected a first line {HEADER}.")
    names = {key: Names() for key in ("tenant", "model", "client")}
    if start.startswith(PARQUET):
        rows = partial(read_parquet, source, columns, names)
    elif is_json:
        rows = partial(read_mooncake, source)
    else:
        rows = partial(read_delimited, source, columns, names)
    first = next(in_order(source, rows()), None)
    if first is None:
        source.refuse("it holds no requests, only the header. Expected a line a request.")
    start_ns = int(first.arrival_ns[0])
    return Stream(
        name=source.path.name,
        read=lambda: (replace(chunk, arrival_ns=chunk.arrival_ns - start_ns) for chunk in in_order(source, rows())),
        clock_ns=start_ns % DAY_NS,
        tenants=names["tenant"],
        models=names["model"],
        clients=names["client"],
    )


def _drawn(source: Source, seed: int) -> Stream:
    model = read_servegen(source)
    notes = [f"{len(model.clients)} clients of {model.name}, drawn with seed {seed}"]
    if model.gaps:
        notes.append(f"{model.gaps} of {len(model.recorded)} windows were not recorded: each asks what the last did")
    borrowing, share = model.borrowing
    if borrowing:
        notes.append(
            f"{borrowing} of the clients, who ask {share:.1%} of the requests, come without lengths: theirs are drawn "
            "from the others'"
        )
    clients = Names([f"client {client.number}" for client in model.clients])
    return Stream(name=model.name, read=partial(model.chunks, seed), notes=tuple(notes), clients=clients)
