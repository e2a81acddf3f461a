"""The file of a ledger in SQLite, which somebody may take away while it is open.

A file that is deleted or replaced goes on without a name: whoever has it open can write to it, and what he writes is
gone when he ends. Nor may the file that was put in its place be opened meanwhile: SQLite would find the log of the
first one beside it, and take it for its own. So nothing is written until the first is back, and what is in it is saved.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Engine

from waterline.errors import LedgerError

_SAVED = ".saved"


class DisplacedError(LedgerError):
    """The ledger's file is not where it was."""


class Whereabouts:
    """Which file an engine has opened first; no other is opened, read or written instead."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first: tuple[int, int] | None = None

    def check(self) -> None:
        """Raise DisplacedError when the path leads to another file than before, or to none."""
        try:
            stat = self._path.stat()
            now: tuple[int, int] | None = (stat.st_dev, stat.st_ino)
        except FileNotFoundError:
            now = None
        except OSError:
            return  # SQLite will say what is wrong
        self._first = self._first or now
        if now != self._first:
            what = "another file is in its place" if now else "it was deleted, moved or renamed"
            raise DisplacedError(
                f"the ledger {self._path} is not the file any more that this service has open: {what}. Nothing is "
                "written until it is back."
            )


def save(engine: Engine) -> str:
    """Copy what is in a displaced ledger to a file beside it; return what a person may do then."""
    path = Path(engine.url.database or "")
    copy = path.with_name(path.name + _SAVED)
    number = 1
    while copy.exists():
        number += 1
        copy = path.with_name(f"{path.name}{_SAVED}-{number}")
    try:
        with closing(engine.raw_connection()) as ours, closing(sqlite3.connect(copy)) as other:
            driver = ours.driver_connection
            assert isinstance(driver, sqlite3.Connection)  # noqa: S101 - no other has files
            driver.backup(other)
    except (sqlite3.Error, LedgerError) as error:
        copy.unlink(missing_ok=True)
        return f"It could not be saved to {copy}, and is lost when the service ends, unless it comes back: {error}."
    return (
        f"Saved to {copy}. Stop the service, put the ledger that you want at {path}, without {path.name}-wal and "
        f"{path.name}-shm beside it, and start it again."
    )
