"""Files of clients and batches of requests, kept where the ledger is: one backup has all of it.

A client sees what clients of its tenant with its own name have made. Everything here is one transaction each, and
nothing waits longer than that: call it in a thread.
"""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import msgspec
from msgspec import Struct
from sqlalchemy import Connection, Engine, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from waterline.ledger.database import in_words, reading, writing
from waterline.ledger.presence import presence
from waterline.ledger.records import utc_us
from waterline.ledger.tables import batch_lines, batches, file_parts, files
from waterline.units import MEGA

PART_BYTES = 2**18
GATHERED = 64  # lines in a part that is being filled, at most

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
    """Keep a file, whole or not at all."""
    with writing(engine) as connection:
        return _add_file(connection, whose, purpose, filename, pieces, file_id or new_id("file-"))


def _add_file(
    connection: Connection, whose: Client, purpose: str, filename: str, pieces: Iterable[bytes], file_id: str
) -> File:
    size = 0
    for number, part in enumerate(_parts(pieces)):
        connection.execute(insert(file_parts).values(file_id=file_id, number=number, data=part))
        size += len(part)
    file = File(
        id=file_id,
        tenant=whose.tenant,
        client=whose.client,
        purpose=purpose,
        filename=filename,
        bytes=size,
        created_us=utc_us(),
    )
    connection.execute(insert(files).values(msgspec.structs.asdict(file)))
    return file


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
            connection.execute(delete(file_parts).where(file_parts.c.file_id == file_id))
    return bool(gone)


def read_part(engine: Engine, file_id: str, number: int) -> bytes | None:
    """Return a part of a file's content, None behind its end."""
    asked = select(file_parts.c.data).where(file_parts.c.file_id == file_id, file_parts.c.number == number)
    with reading(engine) as connection:
        data = connection.scalar(asked)
    return None if data is None else bytes(data)


def read_lines(engine: Engine, file_id: str) -> Iterator[bytes]:
    """Yield the lines of a file that are not blank."""
    rest, number = b"", 0
    while (part := read_part(engine, file_id, number)) is not None:
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
    """Make a batch's files of its lines, and end it, all or nothing."""
    now_us = utc_us()
    with writing(engine) as connection:
        batch = _batch(connection.execute(select(batches).where(batches.c.id == batch_id)).one())
        if batch.status not in UNDER_WAY:
            return
        made = {}
        for name, ok, count in (("output", 1, batch.ok), ("error", 0, batch.not_ok)):
            if count:
                lines = _lines(connection, batch_id, ok)
                made[f"{name}_file_id"] = file_id = new_id("file-")
                _add_file(connection, batch.whose, "batch_output", f"{batch_id}_{name}.jsonl", lines, file_id)
        ended = {"status": status, f"{status}_us": now_us, "owner": ""}
        connection.execute(update(batches).where(batches.c.id == batch_id).values({**ended, **made}))
        connection.execute(delete(batch_lines).where(batch_lines.c.batch_id == batch_id))


def _lines(connection: Connection, batch_id: str, ok: int) -> Iterator[bytes]:
    asked = select(batch_lines.c.line).where(batch_lines.c.batch_id == batch_id, batch_lines.c.ok == ok)
    after = -1
    while True:
        some = connection.execute(
            asked.add_columns(batch_lines.c.number)
            .where(batch_lines.c.number > after)
            .order_by(batch_lines.c.number)
            .limit(GATHERED)
        ).all()
        for line, number in some:
            after = number
            yield bytes(line) + b"\n"
        if not some:
            return


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
