"""Files of clients and batches of requests, kept where the ledger is: one backup has all of it.

A client sees what clients of its tenant with its own name have made. All of it waits for the database: call it in a
thread. Every transaction is short, however large a file is, because the ledger's own wait for them. So a file is
written part by part, and is there when its row is; what a kill leaves without one is swept away.
"""

import itertools
import secrets
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Literal, get_args

import msgspec
from msgspec import Struct
from sqlalchemy import Engine, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from waterline.errors import LedgerError
from waterline.ledger.database import in_words, reading, writing
from waterline.ledger.presence import presence
from waterline.ledger.records import utc_us
from waterline.ledger.tables import batch_lines, batches, file_parts, files
from waterline.units import DAY_S, MEGA

PART_BYTES = 2**18
PARTS_TOGETHER = 16  # in one transaction
LINES_TOGETHER = 500  # likewise
OLD_US = 3 * DAY_S * MEGA  # no file takes so long to come, and no batch to end

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
STATUSES: tuple[BatchStatus, ...] = get_args(BatchStatus)
UNDER_WAY: tuple[BatchStatus, ...] = ("validating", "in_progress", "finalizing", "cancelling")


class Client(Struct, frozen=True, kw_only=True):
    """Whose files and batches they are."""

    tenant: str
    client: str


class File(Struct, frozen=True, kw_only=True):
    """What is known of a file besides its content."""

    id: str
    tenant: str
    client: str
    purpose: str
    filename: str
    bytes: int
    created_us: int


class Batch(Struct, frozen=True, kw_only=True):
    """One batch; moments are None while they lie ahead."""

    id: str
    tenant: str
    client: str
    key_id: str
    endpoint: str
    input_file_id: str
    status: BatchStatus
    metadata: dict[str, str]
    requests: int
    created_us: int
    expires_us: int
    in_progress_us: int | None = None
    finalizing_us: int | None = None
    completed_us: int | None = None
    failed_us: int | None = None
    expired_us: int | None = None
    cancelling_us: int | None = None
    cancelled_us: int | None = None
    errors: tuple[dict[str, Any], ...] = ()
    output_file_id: str = ""
    error_file_id: str = ""
    ok: int = 0  # lines that have ended well
    not_ok: int = 0  # lines that have ended otherwise

    @property
    def whose(self) -> Client:
        return Client(tenant=self.tenant, client=self.client)


class Line(Struct, frozen=True, kw_only=True):
    """One line of a batch that has ended."""

    number: int  # of the line in the input, from 0 on
    ok: bool
    line: bytes  # of the output or the error file, without its end


def new_id(kind: str) -> str:
    """Return an id such as ``file-…`` that sorts after those made earlier."""
    return f"{kind}{utc_us():014x}{secrets.token_hex(8)}"


# --- Files ----------------------------------------------------------------------------------------------------------


def add_file(
    engine: Engine, whose: Client, purpose: str, filename: str, pieces: Iterable[bytes], *, file_id: str = ""
) -> File:
    """Keep a file; it is there when this returns, whole, or not at all."""
    file_id, number, size = file_id or new_id("file-"), 0, 0
    parts = _parts(pieces)
    try:
        while some := list(islice(parts, PARTS_TOGETHER)):
            rows = [{"file_id": file_id, "number": number + i, "data": part} for i, part in enumerate(some)]
            with writing(engine) as connection:
                connection.execute(insert(file_parts), rows)
            number, size = number + len(some), size + sum(map(len, some))
    except BaseException:
        with suppress(LedgerError):
            _delete_parts(engine, file_id)
        raise
    file = File(
        id=file_id,
        tenant=whose.tenant,
        client=whose.client,
        purpose=purpose,
        filename=filename,
        bytes=size,
        created_us=utc_us(),
    )
    with writing(engine) as connection:
        connection.execute(insert(files).values(msgspec.structs.asdict(file)))
    return file


def _delete_parts(engine: Engine, file_id: str) -> None:
    for number in itertools.count(0, PARTS_TOGETHER):
        within = file_parts.c.number.between(number, number + PARTS_TOGETHER - 1)
        with writing(engine) as connection:
            gone = connection.execute(delete(file_parts).where(file_parts.c.file_id == file_id, within)).rowcount
        if not gone:
            return


def sweep(engine: Engine) -> None:
    """Delete what kills have left behind: parts of files that never came to be, lines of batches that have ended."""
    old = f"file-{utc_us() - OLD_US:014x}"
    with reading(engine) as connection:
        kept, parts = select(files.c.id), file_parts.c.file_id
        orphans = connection.scalars(select(parts).where(parts < old, parts.not_in(kept)).distinct()).all()
        ended = select(batches.c.id).where(batches.c.status.not_in(UNDER_WAY))
        of_batch = batch_lines.c.batch_id
        over = connection.scalars(select(of_batch).where(of_batch.in_(ended)).distinct()).all()
    for file_id in orphans:
        _delete_parts(engine, file_id)
    for batch_id in over:
        _delete_lines(engine, batch_id)


def find_file(engine: Engine, whose: Client, file_id: str) -> File | None:
    with reading(engine) as connection:
        row = connection.execute(select(files).where(files.c.id == file_id, *_of(files, whose))).one_or_none()
    return _file(row) if row else None


def list_files(
    engine: Engine, whose: Client, purpose: str, after: str, limit: int, *, newest_first: bool
) -> list[File]:
    """Return files behind the one with the id `after`; `purpose` is "" for all."""
    asked = select(files).where(*_of(files, whose), *([files.c.purpose == purpose] if purpose else []))
    with reading(engine) as connection:
        return [_file(row) for row in connection.execute(_page(asked, files, after, limit, newest_first=newest_first))]


def file_bytes(engine: Engine, whose: Client) -> int:
    """Return how much a client keeps."""
    with reading(engine) as connection:
        return int(connection.scalar(select(func.sum(files.c.bytes)).where(*_of(files, whose))) or 0)


def is_in_use(engine: Engine, file_id: str) -> bool:
    """Return whether a batch under way still reads a file."""
    asked = select(batches.c.id).where(batches.c.input_file_id == file_id, batches.c.status.in_(UNDER_WAY)).limit(1)
    with reading(engine) as connection:
        return connection.scalar(asked) is not None


def delete_file(engine: Engine, whose: Client, file_id: str) -> bool:
    with writing(engine) as connection:
        gone = connection.execute(delete(files).where(files.c.id == file_id, *_of(files, whose))).rowcount
    if gone:
        _delete_parts(engine, file_id)
    return bool(gone)


def read_part(engine: Engine, file_id: str, number: int) -> bytes | None:
    """Return a part of a file's content, None behind its end."""
    asked = select(file_parts.c.data).where(file_parts.c.file_id == file_id, file_parts.c.number == number)
    with reading(engine) as connection:
        data = connection.scalar(asked)
    return None if data is None else bytes(data)


def read_lines(engine: Engine, file_id: str) -> Iterator[bytes]:
    """Yield the lines of a file that are not blank, without the mark that Windows puts at the beginning."""
    rest, number = b"", 0
    while (part := read_part(engine, file_id, number)) is not None:
        part = part if number else part.removeprefix(BOM_UTF8)
        *whole, rest = (rest + part).split(b"\n")
        yield from (line for line in whole if line.strip())
        number += 1
    if rest.strip():
        yield rest


# --- Batches --------------------------------------------------------------------------------------------------------


def add_batch(
    engine: Engine,
    whose: Client,
    *,
    key_id: str,
    endpoint: str,
    input_file_id: str,
    metadata: dict[str, str],
    for_s: float,
) -> Batch:
    """Keep a new batch, to be run by whoever claims it."""
    now_us = utc_us()
    batch = Batch(
        id=new_id("batch_"),
        tenant=whose.tenant,
        client=whose.client,
        key_id=key_id,
        endpoint=endpoint,
        input_file_id=input_file_id,
        status="validating",
        metadata=metadata,
        requests=0,
        created_us=now_us,
        expires_us=now_us + round(for_s * MEGA),
    )
    row = msgspec.structs.asdict(batch) | {
        "metadata": msgspec.json.encode(metadata).decode(),
        "errors": "[]",
        "owner": "",
    }
    with writing(engine) as connection:
        connection.execute(insert(batches).values({name: row[name] for name in row if name in batches.c}))
    return batch


def find_batch(engine: Engine, batch_id: str, whose: Client | None = None) -> Batch | None:
    """Return a batch; of one client, or of anybody."""
    asked = select(batches).where(batches.c.id == batch_id, *(_of(batches, whose) if whose else ()))
    with reading(engine) as connection:
        row = connection.execute(asked).one_or_none()
    return _batch(row) if row else None


def list_batches(engine: Engine, whose: Client, after: str, limit: int) -> list[Batch]:
    """Return batches, the newest first, behind the one with the id `after`."""
    asked = select(batches).where(*_of(batches, whose))
    with reading(engine) as connection:
        rows = connection.execute(_page(asked, batches, after, limit, newest_first=True)).all()
        return [_batch(row) for row in rows]


def cancel_batch(engine: Engine, whose: Client, batch_id: str) -> Batch | None:
    """Ask a batch that is under way to end; return it as it is then."""
    with writing(engine) as connection:
        connection.execute(
            update(batches)
            .where(batches.c.id == batch_id, *_of(batches, whose), batches.c.status.in_(("validating", "in_progress")))
            .values(status="cancelling", cancelling_us=utc_us())
        )
    return find_batch(engine, batch_id, whose)


def claim_batches(engine: Engine, owner: str) -> list[Batch]:
    """Return the batches under way that a gateway runs from now on: its own, and those that nobody runs any more."""
    under_way = batches.c.status.in_(UNDER_WAY)
    with reading(engine) as connection:
        others = set(connection.scalars(select(batches.c.owner).where(under_way).distinct())) - {owner}
    if free := [other for other in sorted(others) if not other or _is_dead(engine, other)]:
        with writing(engine) as connection:
            connection.execute(update(batches).where(under_way, batches.c.owner.in_(free)).values(owner=owner))
    asked = select(batches).where(under_way, batches.c.owner == owner).order_by(batches.c.id)
    with reading(engine) as connection:
        return [_batch(row) for row in connection.execute(asked)]


def _is_dead(engine: Engine, owner: str) -> bool:
    lock = presence(engine, owner)
    with in_words(engine):
        dead = lock.hold()
        lock.leave()
    return dead


def begin_batch(engine: Engine, batch_id: str, requests: int) -> None:
    """Say that the input of a batch is in order."""
    _advance(engine, batch_id, ("validating",), status="in_progress", in_progress_us=utc_us(), requests=requests)


def finalize_batch(engine: Engine, batch_id: str) -> None:
    """Say that all lines have ended, and files are made of them."""
    _advance(engine, batch_id, ("in_progress",), status="finalizing", finalizing_us=utc_us())


def fail_batch(engine: Engine, batch_id: str, errors: Sequence[dict[str, Any]]) -> None:
    """Say why the input of a batch cannot be run."""
    said = msgspec.json.encode(errors).decode()
    _advance(engine, batch_id, ("validating", "cancelling"), status="failed", failed_us=utc_us(), errors=said)


def add_lines(engine: Engine, batch_id: str, lines: Sequence[Line]) -> None:
    """Keep some hundred lines that have ended; one that is there already stays as it is, and is counted once."""
    dialect: Any = postgresql if engine.dialect.name == "postgresql" else sqlite
    with writing(engine) as connection:
        for column, ok in ((batches.c.ok, 1), (batches.c.not_ok, 0)):
            rows = [
                {"batch_id": batch_id, "number": line.number, "ok": ok, "line": line.line}
                for line in lines
                if line.ok == bool(ok)
            ]
            if not rows:
                continue
            statement = dialect.insert(batch_lines).values(rows).on_conflict_do_nothing()
            new = len(connection.execute(statement.returning(batch_lines.c.number)).all())
            connection.execute(update(batches).where(batches.c.id == batch_id).values({column: column + new}))


def ended_lines(engine: Engine, batch_id: str) -> set[int]:
    """Return the numbers of the lines that have ended."""
    with reading(engine) as connection:
        return set(connection.scalars(select(batch_lines.c.number).where(batch_lines.c.batch_id == batch_id)))


def finish_batch(engine: Engine, batch_id: str, status: BatchStatus) -> None:
    """Make a batch's files of its lines, and end it; after a kill, do so again."""
    batch = find_batch(engine, batch_id)
    if not batch or batch.status not in UNDER_WAY:
        return
    made = {}
    for name, ok, count in (("output", 1, batch.ok), ("error", 0, batch.not_ok)):
        if count:
            made[f"{name}_file_id"] = file_id = f"file-{batch_id.removeprefix('batch_')}-{name}"
            if not find_file(engine, batch.whose, file_id):
                _delete_parts(engine, file_id)  # of the time before
                lines = _lines(engine, batch_id, ok)
                add_file(engine, batch.whose, "batch_output", f"{batch_id}_{name}.jsonl", lines, file_id=file_id)
    _advance(engine, batch_id, UNDER_WAY, **{"status": status, f"{status}_us": utc_us(), "owner": "", **made})
    _delete_lines(engine, batch_id)


def _lines(engine: Engine, batch_id: str, ok: int) -> Iterator[bytes]:
    asked = select(batch_lines.c.line, batch_lines.c.number).where(
        batch_lines.c.batch_id == batch_id, batch_lines.c.ok == ok
    )
    after = -1
    while True:
        some = asked.where(batch_lines.c.number > after).order_by(batch_lines.c.number).limit(LINES_TOGETHER)
        with reading(engine) as connection:
            rows = connection.execute(some).all()
        if not rows:
            return
        after = rows[-1].number
        yield b"".join(bytes(row.line) + b"\n" for row in rows)


def _delete_lines(engine: Engine, batch_id: str) -> None:
    of_batch = batch_lines.c.batch_id == batch_id
    with reading(engine) as connection:
        last = connection.scalar(select(func.max(batch_lines.c.number)).where(of_batch))
    for number in range(0, -1 if last is None else last + 1, LINES_TOGETHER):
        within = batch_lines.c.number.between(number, number + LINES_TOGETHER - 1)
        with writing(engine) as connection:
            connection.execute(delete(batch_lines).where(of_batch, within))


def _advance(engine: Engine, batch_id: str, before: Sequence[BatchStatus], **values: Any) -> None:
    with writing(engine) as connection:
        connection.execute(
            update(batches).where(batches.c.id == batch_id, batches.c.status.in_(before)).values(**values)
        )


# --- Rows -----------------------------------------------------------------------------------------------------------


def _of(table: Any, whose: Client) -> tuple[Any, Any]:
    return table.c.tenant == whose.tenant, table.c.client == whose.client


def _page(asked: Any, table: Any, after: str, limit: int, *, newest_first: bool) -> Any:
    """Ids are in the order of time, so that they are the places of a list."""
    if after:
        asked = asked.where(table.c.id < after if newest_first else table.c.id > after)
    return asked.order_by(table.c.id.desc() if newest_first else table.c.id).limit(limit)


def _file(row: Any) -> File:
    return msgspec.convert(_fields(row), File)


def _batch(row: Any) -> Batch:
    fields = _fields(row)
    fields |= {name: msgspec.json.decode(fields[name]) for name in ("metadata", "errors")}
    return msgspec.convert(fields, Batch)


def _fields(row: Any) -> dict[str, Any]:
    return {str(name): value for name, value in row._mapping.items()}  # noqa: SLF001 - SQLAlchemy's word for it


def _parts(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Cut pieces of any size into parts of `PART_BYTES`."""
    rest = bytearray()
    for piece in pieces:
        rest += piece
        while len(rest) >= PART_BYTES:
            yield bytes(rest[:PART_BYTES])
            del rest[:PART_BYTES]
    if rest:
        yield bytes(rest)
