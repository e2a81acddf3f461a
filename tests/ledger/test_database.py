import threading
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import inspect, select, text

from waterline.errors import InputError, LedgerError
from waterline.ledger import connect, create_key, read_keys
from waterline.ledger.database import MIGRATIONS, _engine
from waterline.ledger.tables import REVISION, completions, keys, metadata


def test_the_migrations_make_the_tables_that_the_code_queries(url: str) -> None:
    engine = connect(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_an_older_ledger_keeps_what_is_in_it_and_a_newer_one_is_left_alone(url: str) -> None:
    engine = _engine(url)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    assert "batches" not in inspect(engine).get_table_names()
    key = {"id": "k1", "hash": "h", "prefix": "wl-abc", "tenant": "public", "client": "alice", "models": "[]"}
    with engine.begin() as connection:
        connection.execute(keys.insert(), {**key, "created_us": 1})
        row = dict.fromkeys(["prompt_tokens", "cached_tokens", "output_tokens", "thinking_tokens", "gpu_us"], 3)
        names = {"id": "r1", "tenant": "public", "client": "alice", "key_id": "k1", "model": "m", "replicas": "[]"}
        row |= {"arrival_us": 1, "finish_us": 2, "nano_usd": 5}
        connection.execute(completions.insert(), {**names, **row, "outcome": "ok", "reason": ""})
    engine.dispose()

    engine = connect(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.execute(select(completions.c.id, completions.c.nano_usd)).all() == [("r1", 5)]
    assert [key.client for key in read_keys(engine)] == ["alice"]
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(LedgerError, match="belongs to a newer Waterline: its tables are at step 9999"):
        connect(url)


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
