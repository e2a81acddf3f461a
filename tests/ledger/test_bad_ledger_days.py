"""What a ledger does when somebody takes its file away, and when its database hangs or is away for long."""

import asyncio
import os
from pathlib import Path

import pytest
from asking import new_database, reserve, rows, settlement, sums_agree

from waterline.errors import LedgerError
from waterline.ledger import Ledger, connect


async def one_request(ledger: Ledger, request_id: str) -> None:
    await (await reserve(ledger, request_id=request_id)).durable()
    await ledger.settle(settlement(request_id))


async def until_trouble(ledger: Ledger) -> str:
    async with asyncio.timeout(20):
        while not ledger.lag().problem:  # noqa: ASYNC110 - another thread notices
            await asyncio.sleep(0.01)
    return ledger.lag().problem


@pytest.mark.parametrize("fate", ["deleted", "replaced"])
def test_a_ledger_whose_file_is_gone_writes_nowhere_else_and_saves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    monkeypatch.setattr("waterline.ledger.writer.PATIENCE_S", 0.3)
    path, aside, saved = (tmp_path / name for name in ("ledger.db", "aside", "ledger.db.saved"))

    async def case(ledger: Ledger) -> None:
        await one_request(ledger, "before")
        path.rename(aside)
        if fate == "replaced":
            path.write_bytes(b"another")
        with pytest.raises(LedgerError):
            await one_request(ledger, "meanwhile")
        async with asyncio.timeout(20):
            while f"Saved to {saved}. Stop the service" not in ledger.lag().problem:  # noqa: ASYNC110 - another thread notices
                await asyncio.sleep(0.01)
        with pytest.raises(LedgerError, match="not the file any more"):
            ledger.engine.connect().begin()
        assert path.exists() == (fate == "replaced")
        aside.replace(path)
        async with asyncio.timeout(20):
            while ledger.lag().problem:  # noqa: ASYNC110 - another thread notices
                await asyncio.sleep(0.01)
        await one_request(ledger, "after")

    with Ledger.open(str(path)) as ledger:
        asyncio.run(case(ledger))
        assert rows(ledger, "SELECT id FROM completions ORDER BY id") == [("after",), ("before",)]
        assert rows(ledger, "SELECT count(*) FROM reservations") == [(0,)]
    with Ledger.open(str(saved)) as ledger:
        assert rows(ledger, "SELECT id FROM completions") == [("before",)]


def test_a_database_that_hangs_keeps_nobody_waiting_and_a_stop_neither(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of a table stands for a server that does not answer: this client is told to wait for it for ever."""
    import psycopg  # noqa: PLC0415 - an extra

    monkeypatch.setattr("waterline.ledger.database.BUSY_S", 0)  # which is without end
    for where in ("store", "writer"):
        monkeypatch.setattr(f"waterline.ledger.{where}.PATIENCE_S", 0.2)
    monkeypatch.setattr("waterline.ledger.writer.LATE_S", 0.1)
    monkeypatch.setattr("waterline.ledger.writer.FAREWELL_S", 0.0)
    url = new_database(postgres)

    async def case(ledger: Ledger) -> None:
        first = await reserve(ledger, request_id="first")
        with pytest.raises(LedgerError, match=r"has not answered for 0\.2 s"):
            await first.durable()
        await until_trouble(ledger)
        assert ledger.is_troubled
        with pytest.raises(LedgerError, match="has not answered"):
            await reserve(ledger, request_id="next")  # is not even let in
        ledger.settle(settlement("first", outcome="failed", prompt_tokens=0, output_tokens=0, nano_usd=0))

    ledger = Ledger.open(url)
    with psycopg.connect(url) as other:
        other.execute("LOCK TABLE reservations IN ACCESS EXCLUSIVE MODE")
        asyncio.run(case(ledger))
        with pytest.raises(LedgerError, match="1 requests that have ended could not be written"):
            ledger.close()
    ledger.close()  # the program would have ended; here its thread has gone on, and is done now
    with Ledger.open(url) as after:
        assert rows(after, "SELECT count(*) FROM reservations") == [(0,)]
        assert sums_agree(after)


def test_a_lock_on_a_table_is_waited_for_five_seconds_and_said(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg  # noqa: PLC0415 - an extra

    monkeypatch.setattr("waterline.ledger.database.BUSY_S", 0.05)
    url = new_database(postgres)
    with Ledger.open(url) as ledger, psycopg.connect(url) as other:
        other.execute("LOCK TABLE completions IN ACCESS EXCLUSIVE MODE")

        async def settle() -> None:
            ledger.settle(settlement("late"))
            assert "Somebody holds a lock on its tables" in await until_trouble(ledger)

        asyncio.run(settle())
    with Ledger.open(url) as ledger:
        assert rows(ledger, "SELECT id FROM completions") == [("late",)]


def test_requests_that_could_not_begin_take_no_memory_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("waterline.ledger.store.MOST_WAITING", 10)
    path = tmp_path / "ledger.db"

    async def case(ledger: Ledger) -> None:
        path.rename(tmp_path / "aside")
        for number in range(1000):
            ledger.settle(settlement(f"r{number}", outcome="failed", prompt_tokens=0, output_tokens=0, nano_usd=0))
        ledger.settle(settlement("answered"))  # is never left out
        assert ledger.lag().waiting_rows == 11
        (tmp_path / "aside").rename(path)
        async with asyncio.timeout(20):
            while ledger.lag().waiting_rows:  # noqa: ASYNC110 - another thread writes
                await asyncio.sleep(0.01)

    with Ledger.open(str(path)) as ledger:
        asyncio.run(case(ledger))
    with Ledger.open(str(path)) as ledger:
        assert rows(ledger, "SELECT outcome, count(*) FROM completions GROUP BY 1 ORDER BY 1") == [
            ("failed", 10),
            ("ok", 1),
        ]


def test_a_folder_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(str(tmp_path / "ledger.db")).dispose()

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(LedgerError, match=r"ledger\.db-gateway-\w+: Permission denied. Its folder must be yours"):
        Ledger.open(str(tmp_path / "ledger.db"))
