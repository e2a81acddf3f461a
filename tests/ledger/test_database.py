import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from waterline.errors import InputError, LedgerError
from waterline.ledger import connect, create_key, read_keys
from waterline.ledger.database import MIGRATIONS
from waterline.ledger.tables import REVISION, metadata


def test_the_migrations_make_the_tables_that_the_code_queries(url: str) -> None:
    engine = connect(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_the_newest_migration_is_the_one_the_code_asks_for() -> None:
    numbers = [path.name[1:5] for path in (MIGRATIONS / "versions").glob("v*.py")]
    assert max(numbers) == REVISION


def test_of_eight_that_open_a_new_ledger_at_once_one_makes_its_tables(url: str) -> None:
    failed: list[Exception] = []

    def open_it() -> None:
        try:
            engine = connect(url)
            create_key(engine, tenant="public", client="alice")
            engine.dispose()
        except Exception as error:  # noqa: BLE001 - shown below
            failed.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    engine = connect(url)
    assert len(read_keys(engine)) == 8
    engine.dispose()


def test_what_is_committed_is_on_the_disk_and_readers_wait_for_nobody(tmp_path: Path) -> None:
    engine = connect(str(tmp_path / "ledger.db"))
    with engine.connect() as connection:
        assert connection.scalar(text("PRAGMA synchronous")) == 2  # FULL
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://root@host/ledger", "a ledger in 'mysql' is not known"),
        ("sqlite://", "a ledger in memory would be lost"),
        ("no such thing://x", "does not say where the ledger is"),
    ],
)
def test_a_url_that_names_no_ledger_is_answered_with_what_does(url: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        connect(url)
    assert "postgresql://USER:PASSWORD@HOST/DATABASE" in str(caught.value)


def test_a_password_is_not_repeated_when_postgresql_is_not_there() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(LedgerError) as caught:
        connect("postgresql://me:secret@127.0.0.1:9/ledger")
    assert "secret" not in str(caught.value)
    assert "psql postgresql://" in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="Its folder must exist and be yours to write to") as caught:
        connect(str(tmp_path / "file" / "ledger.db"))
    assert str(tmp_path / "file" / "ledger.db") in str(caught.value)
