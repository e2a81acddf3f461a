"""A database for the ledger: found by its URL, set up so that what is committed stays, its tables up to date."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from waterline.errors import InputError, LedgerError, MissingExtraError
from waterline.ledger.displaced import Whereabouts
from waterline.ledger.tables import REVISION

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_S = 5  # to wait for another program that writes to the file
CONNECT_S = 5
SILENT_S = 15  # until a PostgreSQL is given up that says nothing at all: its machine or its network is gone
MIGRATION_LOCK = 0x7761_7465_726C  # an advisory lock of PostgreSQL: the first letters of our name
SQLITE = "sqlite:///"


def connect(url: str, *, create: bool = True) -> Engine:
    """Return the database at a URL or at the path of a file, with the tables of this program.

    Args:
        url: where it is.
        create: make it when it is not there.

    Raises:
        InputError: that is no URL we know, or there is nothing and it is not to be made.
        MissingExtraError: PostgreSQL without psycopg.
        LedgerError: it cannot be reached, read or written, or a newer program has changed its tables.
    """
    engine = _engine(url)
    if not create and engine.dialect.name == "sqlite" and not Path(_name(engine)).exists():
        raise InputError(
            f"there is no ledger {_name(engine)}: `waterline up` makes one, and `waterline keys create`. "
            "Is it elsewhere? Say --ledger FILE."
        )
    try:
        with in_words(engine):
            if _revision(engine) != REVISION:
                _migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def in_words(engine: Engine) -> Iterator[None]:
    """Turn what goes wrong with the database into what a person can do about it; a value it cannot hold is our bug."""
    try:
        yield
    except (DataError, IntegrityError):
        raise
    except DBAPIError as error:
        raise LedgerError(_explained(engine, error)) from error
    except PoolTimeoutError as error:
        raise LedgerError(f"the ledger {_name(engine)} is slow: all connections to it are taken.") from error
    except OSError as error:  # of the files beside SQLite's
        where = error.filename or _name(engine)
        raise LedgerError(
            f"the ledger {_name(engine)} cannot be used: {where}: {error.strerror}. "
            "Its folder must be yours to write to."
        ) from error


def _engine(url: str) -> Engine:
    if "://" not in url:
        url = f"{SQLITE}{Path(url).expanduser().absolute()}"
    try:
        parsed = make_url(url)
        if parsed.drivername in {"postgres", "postgresql"}:
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() == "sqlite":
            return _sqlite(parsed)
        if parsed.drivername != "postgresql+psycopg":
            raise InputError(f"a ledger in '{parsed.drivername}' is not known. {_URLS}")
        return _postgresql(parsed)
    except ModuleNotFoundError:
        raise MissingExtraError("A ledger in PostgreSQL", extra="postgres") from None
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise InputError(f"'{url}' does not say where the ledger is. {_URLS}") from None


_URLS = "Write the path of a file, or postgresql://USER:PASSWORD@HOST/DATABASE."


def _sqlite(url: sqlalchemy.URL) -> Engine:
    if not url.database or url.database == ":memory:":
        raise InputError(f"a ledger in memory would be lost. {_URLS}")
    with suppress(OSError):  # what cannot be made cannot be opened, and that is said below
        Path(url.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = sqlalchemy.create_engine(url, connect_args={"timeout": BUSY_S})
    whereabouts = Whereabouts(Path(url.database))
    event.listen(engine, "do_connect", lambda *_: whereabouts.check())
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", lambda connection: _begin_sqlite(connection, whereabouts))
    return engine


def _postgresql(url: sqlalchemy.URL) -> Engine:
    """Return a PostgreSQL that keeps nobody waiting without end: for a connection, a lock, a network that is gone."""
    patience = {
        "connect_timeout": CONNECT_S,
        "keepalives_idle": CONNECT_S,
        "keepalives_interval": CONNECT_S,
        "keepalives_count": SILENT_S // CONNECT_S,
        "tcp_user_timeout": SILENT_S * 1000,
    }
    engine = sqlalchemy.create_engine(url, connect_args=patience, pool_pre_ping=True)
    event.listen(engine, "connect", _set_up_postgresql)
    return engine


def _set_up_postgresql(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{BUSY_S}s'")
    connection.commit()


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins: Python would do so too late
    with suppress(sqlite3.OperationalError):  # a file that we may only read
        connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns


def _begin_sqlite(connection: Connection, whereabouts: Whereabouts) -> None:
    """Begin a transaction; one that writes says so at once, so that it never finds others ahead of it halfway."""
    whereabouts.check()
    writes = not connection.get_execution_options().get("reads")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Give a connection that only reads: it waits for nobody and holds nobody up."""
    with in_words(engine), engine.connect().execution_options(reads=True) as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Give a connection in a transaction, which is on the disk when the block ends well."""
    with in_words(engine), engine.begin() as connection:
        yield connection


# --- Migrations -----------------------------------------------------------------------------------------------------


def _revision(engine: Engine) -> str:
    """Return the newest migration that the database has had; "" for a new one."""
    with engine.connect().execution_options(reads=True) as connection:
        if not sqlalchemy.inspect(connection).has_table("alembic_version"):
            return ""
        return connection.scalar(text("SELECT version_num FROM alembic_version")) or ""


def _migrate(engine: Engine) -> None:
    """Run the migrations that are missing; of several programs that start at once, one does, and the others wait."""
    from alembic import command  # noqa: PLC0415 - a third of a second, which a ledger that is up to date need not take
    from alembic.config import Config  # noqa: PLC0415 - as above
    from alembic.script import ScriptDirectory  # noqa: PLC0415 - as above

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL lock_timeout = 0"))  # whoever migrates takes as long as it takes
            connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
        revision = _revision_inside(connection)
        if revision and revision not in known:
            raise LedgerError(
                f"the ledger {_name(engine)} belongs to a newer Waterline: its tables are at step {revision}, this "
                f"program knows them up to {REVISION}. Install that Waterline, or keep another ledger: --ledger FILE."
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _revision_inside(connection: Connection) -> str:
    if not sqlalchemy.inspect(connection).has_table("alembic_version"):
        return ""
    return connection.scalar(text("SELECT version_num FROM alembic_version")) or ""


# --- Errors ---------------------------------------------------------------------------------------------------------


def _name(engine: Engine) -> str:
    if engine.dialect.name == "sqlite":
        return engine.url.database or ""
    return engine.url.set(drivername="postgresql").render_as_string()


def _explained(engine: Engine, error: DBAPIError) -> str:
    name, said = _name(engine), " ".join(str(error.orig).split()).rstrip(".?")
    known = _SQLITE_ADVICE if engine.dialect.name == "sqlite" else _POSTGRESQL_ADVICE
    advice = next((advice for part, advice in known.items() if part in said), "")
    if engine.dialect.name == "sqlite":
        return f"the ledger {name} cannot be used: {said}. {advice}".rstrip()
    if not advice:
        advice = (
            f"Is it running, and may this machine reach it? Try: psql {name}"
            if isinstance(error, OperationalError)
            else "That user needs the right to create tables there, and nobody else's tables may have our names."
        )
    return f"the ledger {name} does not answer as it should: {said}. {advice}"


_POSTGRESQL_ADVICE = {  # by what PostgreSQL says
    "password authentication failed": "Are user and password in the URL right? Of a password, % and @ are written %25 "
    "and %40.",
    '" does not exist': "Make it: createdb DATABASE, createuser USER; or correct the URL.",
    "no password supplied": "Write it into the URL: postgresql://USER:PASSWORD@HOST/DATABASE.",
    "lock timeout": "Somebody holds a lock on its tables; who, says: SELECT pid, state, query FROM pg_stat_activity.",
    "too many clients": "Raise its max_connections, or close other programs' connections.",
    "remaining connection slots": "Raise its max_connections, or close other programs' connections.",
    "No space left on device": "Make room on its disk.",
    "read-only transaction": "Is it a standby? Name the server that may be written to.",
}

_SQLITE_ADVICE = {  # by what SQLite says
    "locked": f"Another program has been writing to it for more than {BUSY_S} s: close it (a database browser, a copy, "
    "an sqlite3 with an open transaction), or keep another ledger: --ledger FILE.",
    "readonly": "Give yourself the right to write to it and to its folder, or keep another: --ledger FILE.",
    "unable to open": "Its folder must exist and be yours to write to; or keep another: --ledger FILE.",
    "already exists": "It is another program's database. Name the ledger: --ledger FILE.",
    "not a database": "It is another kind of file. Name the ledger: --ledger FILE.",
    "malformed": "It is damaged: restore it from a copy, or keep another: --ledger FILE.",
    "full": "Make room on its disk.",
    "disk I/O": "Is its disk full, or broken?",
}
