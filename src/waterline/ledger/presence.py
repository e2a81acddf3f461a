"""Which gateways are alive: each holds a lock that the system lets go of when it dies, however it dies."""

import fcntl
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol
from zlib import crc32

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

_SUFFIX = "-gateway-"
CLASS = 0x7761_7465  # of our advisory locks in PostgreSQL: the first letters of our name


class Presence(Protocol):
    """The lock of one gateway."""

    def hold(self) -> bool:
        """Take the lock; False when somebody else has it. Held already, it is asked for again where it can be lost."""

    def leave(self) -> None:
        """Let go."""


def presence(engine: Engine, owner: str) -> Presence:
    """Return the lock of a gateway, not yet taken."""
    if engine.dialect.name == "postgresql":
        return _Advisory(engine, owner)
    return _File(Path(f"{engine.url.database}{_SUFFIX}{owner}"))


def left_behind(engine: Engine) -> set[str]:
    """Return the owners of files beside the ledger's; those of the dead may go."""
    if engine.dialect.name == "postgresql":
        return set()
    path = Path(engine.url.database or "")
    return {file.name.removeprefix(f"{path.name}{_SUFFIX}") for file in path.parent.glob(f"{path.name}{_SUFFIX}*")}


class _File:
    """A file beside the ledger's, locked; it goes with its owner, or with whoever finds that its owner is dead."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def hold(self) -> bool:
        if self._file:
            return True
        file = self._path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        self._file = file
        return True

    def leave(self) -> None:
        if self._file:
            with suppress(OSError):
                self._path.unlink()
            self._file.close()
            self._file = None


class _Advisory:
    """A lock of a connection of its own, which PostgreSQL ends when that breaks."""

    def __init__(self, engine: Engine, owner: str) -> None:
        self._engine = engine
        self._number = crc32(owner.encode()) - 2**31  # owners are random; two with one number wait for each other
        self._connection: Connection | None = None

    def hold(self) -> bool:
        try:
            if not self._connection:
                connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
                taken = connection.scalar(text(f"SELECT pg_try_advisory_lock({CLASS}, {self._number})"))
                if not taken:
                    connection.close()
                    return False
                self._connection = connection
            else:
                self._connection.execute(text("SELECT 1"))
        except DBAPIError:
            self._drop()
            raise
        return True

    def leave(self) -> None:
        if self._connection:
            with suppress(DBAPIError):
                self._connection.execute(text(f"SELECT pg_advisory_unlock({CLASS}, {self._number})"))
        self._drop()

    def _drop(self) -> None:
        if self._connection:
            with suppress(DBAPIError):
                self._connection.invalidate()
                self._connection.close()
            self._connection = None
