import asyncio
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from asking import new_database, reserve, rows, settlement, sums_agree

from waterline.errors import LedgerError, QuotaError
from waterline.ledger import Key, Ledger, Quotas, connect, create_key, new_request_id, revoke_key
from waterline.ledger.batch import Batch, Written


async def ask(ledger: Ledger, key: Key, *, tokens: int = 100, under_way_s: float = 0.02) -> str:
    """Make one request as the gateway does; return its outcome."""
    request_id = new_request_id()
    try:
        reservation = await reserve(ledger, key, request_id=request_id, tokens=tokens)
        await reservation.durable()
    except QuotaError as error:
        await ledger.settle(
            settlement(
                request_id, key, outcome="refused", prompt_tokens=0, output_tokens=0, nano_usd=0, reason=str(error)
            )
        )
        return "refused"
    await asyncio.sleep(under_way_s)
    await ledger.settle(settlement(request_id, key, prompt_tokens=40, output_tokens=tokens - 40))
    return "ok"


async def ask_at_once(ledgers: Sequence[Ledger], key: Key, requests: int) -> Counter[str]:
    return Counter(await asyncio.gather(*(ask(ledgers[one % len(ledgers)], key) for one in range(requests))))


def test_of_100_at_once_on_a_key_with_tokens_for_10_exactly_10_pass(url: str) -> None:
    with Ledger.open(url) as ledger:
        key, _ = create_key(ledger.engine, tenant="public", client="alice", quotas=Quotas(tokens_total=1000))
        assert asyncio.run(ask_at_once([ledger], key, 100)) == {"ok": 10, "refused": 90}
        assert rows(ledger, "SELECT period, tokens, reserved_tokens FROM balances") == [("total", 1000, 0)]
        assert rows(ledger, "SELECT count(*) FROM reservations") == [(0,)]
        assert sums_agree(ledger)


def test_two_gateways_on_one_database_spend_no_more_than_one(url: str) -> None:
    with Ledger.open(url) as one, Ledger.open(url) as other:
        key, _ = create_key(one.engine, tenant="public", client="alice", quotas=Quotas(tokens_per_day=1000))
        assert asyncio.run(ask_at_once([one, other], key, 100)) == {"ok": 10, "refused": 90}
        assert rows(other, "SELECT tokens, reserved_tokens FROM balances") == [(1000, 0)]
        assert sums_agree(one)


def test_what_is_settled_twice_is_charged_once(url: str) -> None:
    async def twice(ledger: Ledger, key: Key) -> None:
        await (await reserve(ledger, key, request_id="r1")).durable()
        await (await reserve(ledger, key, request_id="r2")).durable()
        await ledger.settle(settlement("r1", key, output_tokens=60))
        await asyncio.gather(
            ledger.settle(settlement("r1", key, output_tokens=900)), ledger.settle(settlement("r2", key))
        )

    with Ledger.open(url) as ledger:
        key, _ = create_key(ledger.engine, tenant="public", client="alice", quotas=Quotas(tokens_total=1000))
        asyncio.run(twice(ledger, key))
        assert rows(ledger, "SELECT id, output_tokens FROM completions ORDER BY id") == [("r1", 60), ("r2", 60)]
        assert rows(ledger, "SELECT tokens, nano_usd, reserved_tokens FROM balances") == [(200, 1400, 0)]
        assert sums_agree(ledger)


@pytest.mark.parametrize("unit", ["tokens", "nano_usd"])
def test_a_refusal_says_the_numbers_and_when_to_come_back(url: str, unit: str) -> None:
    quotas = Quotas(tokens_per_day=250) if unit == "tokens" else Quotas(nano_usd_per_day=2_500)

    async def third(ledger: Ledger, key: Key) -> QuotaError:
        for _ in range(2):
            await (await reserve(ledger, key)).durable()
        with pytest.raises(QuotaError) as caught:
            await reserve(ledger, key)
        return caught.value

    with Ledger.open(url) as ledger:
        key, _ = create_key(ledger.engine, tenant="public", client="alice", quotas=quotas)
        error = asyncio.run(third(ledger, key))
    assert error.retry_after_s is not None
    assert 0 < error.retry_after_s <= 86_400
    assert key.prefix in str(error)
    assert ("It is 250 tokens a day" if unit == "tokens" else "It is $0.0000025 a day") in str(error)


def test_a_gateway_that_died_is_charged_what_was_noted_of_its_requests(url: str) -> None:
    async def die(ledger: Ledger, key: Key) -> None:
        for request_id in ("noted", "unnoted"):
            reservation = await reserve(ledger, key, request_id=request_id, tokens=300)
            await reservation.durable()
            if request_id == "noted":
                ledger.note(reservation, prompt_tokens=40, output_tokens=7, nano_usd=470)
        await (await reserve(ledger, key, request_id="last")).durable()  # with the note, in one commit
        ledger.engine.dispose()
        ledger._presence.leave()  # as the system does for the dead

    with Ledger.open(url) as survivor:
        key, _ = create_key(survivor.engine, tenant="public", client="alice", quotas=Quotas(tokens_per_day=1000))
        dead = Ledger.open(url)
        asyncio.run(die(dead, key))
        assert rows(survivor, "SELECT tokens, reserved_tokens FROM balances") == [(0, 700)]
        with Ledger.open(url) as heir:
            found = rows(heir, "SELECT id, outcome, output_tokens, nano_usd FROM completions ORDER BY id")
            assert found == [
                ("last", "interrupted", 0, 0),
                ("noted", "interrupted", 7, 470),
                ("unnoted", "interrupted", 0, 0),
            ]
            assert rows(heir, "SELECT tokens, reserved_tokens FROM balances") == [(47, 0)]
            assert sums_agree(heir)
        dead.close()


def test_a_gateway_taken_for_dead_has_the_last_word(url: str) -> None:
    async def live_on(ledger: Ledger, key: Key, heir_does: list[str]) -> None:
        reservation = await reserve(ledger, key, request_id="r1")
        await reservation.durable()
        ledger._presence.leave()  # its connection broke, or its machine slept
        with Ledger.open(url) as heir:
            heir_does += [str(row) for row in rows(heir, "SELECT outcome FROM completions")]
        await ledger.settle(settlement("r1", key, prompt_tokens=40, output_tokens=60, nano_usd=700))

    with Ledger.open(url) as ledger:
        key, _ = create_key(ledger.engine, tenant="public", client="alice", quotas=Quotas(tokens_per_day=1000))
        heir_does: list[str] = []
        asyncio.run(live_on(ledger, key, heir_does))
        assert heir_does == ["('interrupted',)"]
        assert rows(ledger, "SELECT outcome, output_tokens, nano_usd FROM completions") == [("ok", 60, 700)]
        assert rows(ledger, "SELECT tokens, nano_usd, reserved_tokens FROM balances") == [(100, 700, 0)]
        assert sums_agree(ledger)


def test_an_answer_of_the_database_that_got_lost_changes_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waterline.ledger.writer.RETRY_S", (0.0,))

    async def ask_all(ledger: Ledger, key: Key) -> Counter[str]:
        return Counter(await asyncio.gather(*(ask(ledger, key) for _ in range(15))))

    with Ledger.open(url) as ledger:
        key, _ = create_key(ledger.engine, tenant="public", client="alice", quotas=Quotas(tokens_total=1000))
        write, lost = ledger._writer._write, []

        def write_and_lose(batch: Batch) -> Written:
            written = write(batch)
            if len(lost) % 2 == 0:
                lost.append(batch)
                raise LedgerError("the connection broke, and nobody knows whether that was committed")
            lost.append(batch)
            return written

        ledger._writer._write = write_and_lose
        assert asyncio.run(ask_all(ledger, key)) == {"ok": 10, "refused": 5}
        assert len(lost) >= 4
        assert rows(ledger, "SELECT count(*) FROM completions") == [(15,)]
        assert rows(ledger, "SELECT tokens, reserved_tokens FROM balances") == [(1000, 0)]
        assert sums_agree(ledger)


def test_while_the_ledger_is_locked_requests_are_refused_and_endings_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("waterline.ledger.writer.PATIENCE_S", 0.1)
    monkeypatch.setattr("waterline.ledger.database.BUSY_S", 0)
    path = str(tmp_path / "ledger.db")

    async def meet_a_lock(ledger: Ledger) -> str:
        under_way = await reserve(ledger, request_id="under way")
        await under_way.durable()
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            ended = ledger.settle(settlement("under way"))
            with pytest.raises(LedgerError) as caught:
                await (await reserve(ledger, request_id="late")).durable()
            async with asyncio.timeout(20):
                while ledger.lag().waiting_rows > 1:  # noqa: ASYNC110 - another thread counts
                    await asyncio.sleep(0.01)
            assert ledger.lag().waiting_rows == 1
            assert "locked" in ledger.lag().problem
            other.execute("ROLLBACK")
        await ended
        await ledger.settle(settlement("late", outcome="failed", prompt_tokens=0, output_tokens=0))
        return str(caught.value)

    with Ledger.open(path) as ledger:
        said = asyncio.run(meet_a_lock(ledger))
        assert "Another program has been writing to it" in said
        assert rows(ledger, "SELECT id, outcome FROM completions ORDER BY id") == [
            ("late", "failed"),
            ("under way", "ok"),
        ]
        assert rows(ledger, "SELECT count(*) FROM reservations") == [(0,)]
        assert ledger.lag().waiting_rows == 0


def test_a_key_made_or_revoked_elsewhere_is_known_soon(url: str) -> None:
    async def until(known: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not known():  # noqa: ASYNC110 - another thread learns of it
                await asyncio.sleep(0.05)

    with Ledger.open(url) as ledger:
        elsewhere = connect(url)
        key, secret = create_key(elsewhere, tenant="public", client="alice")
        asyncio.run(until(lambda: ledger.find_key(secret) == key))
        revoke_key(elsewhere, key.id)
        asyncio.run(until(lambda: (ledger.find_key(secret) or key).revoked_us is not None))
        assert ledger.find_key("wl-nobody") is None
        elsewhere.dispose()


def test_what_an_engine_says_cannot_hold_up_the_ledger(url: str) -> None:
    async def settle_all(ledger: Ledger) -> None:
        wild = settlement("wild", prompt_tokens=-3, output_tokens=10**30, reason="nul \x00, half a letter \ud800")
        await asyncio.gather(*(ledger.settle(one) for one in (settlement("before"), wild, settlement("after"))))

    with Ledger.open(url) as ledger:
        asyncio.run(settle_all(ledger))
        found = rows(ledger, "SELECT id, prompt_tokens, output_tokens, reason FROM completions ORDER BY id")
        assert found == [("after", 40, 60, ""), ("before", 40, 60, ""), ("wild", 0, 10**15, "nul  , half a letter  ")]


def test_of_a_batch_only_what_cannot_be_written_is_lost_and_the_log_has_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(
        "waterline.ledger.writer.log.exception", lambda *said, **details: logged.append(f"{said} {details}")
    )

    async def settle_all(ledger: Ledger) -> list[object]:
        ours = [await reserve(ledger, request_id=f"r{number}") for number in range(3)]
        for one in ours:
            await one.durable()
        bad = msgspec.structs.replace(settlement("r1"), model=None)  # type: ignore[arg-type] # as a bug would
        told = [ledger.settle(one) for one in (settlement("r0"), bad, settlement("r2"))]
        return list(await asyncio.gather(*told, return_exceptions=True))

    with Ledger.open(url) as ledger:
        asyncio.run(settle_all(ledger))
        assert rows(ledger, "SELECT id FROM completions ORDER BY id") == [("r0",), ("r2",)]
        assert rows(ledger, "SELECT id FROM reservations") == [("r1",)]
        assert sums_agree(ledger)
    assert "request_id='r1'" in logged[-1]


def test_a_postgresql_that_drops_its_connections_loses_and_doubles_nothing(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg  # noqa: PLC0415 - an extra

    monkeypatch.setattr("waterline.ledger.writer.RETRY_S", (0.001,))
    monkeypatch.setattr("waterline.ledger.writer.PATIENCE_S", 60.0)  # however slow the machine is
    drop = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'waterline' AND pid <> pg_backend_pid()"

    async def ask_while_they_drop(ledger: Ledger, key: Key, dropped: list[int]) -> Counter[str]:
        with psycopg.connect(f"{postgres}/postgres", autocommit=True) as other:
            asking = asyncio.gather(*(ask(ledger, key, under_way_s=0.02 * one) for one in range(60)))
            for _ in range(5):  # at a pace that leaves time to connect again
                await asyncio.sleep(0.2)
                (count,) = other.execute(drop).fetchone() or (0,)
                dropped.append(count)
        return Counter(await asking)

    with Ledger.open(new_database(postgres)) as ledger:
        key, _ = create_key(ledger.engine, tenant="public", client="alice", quotas=Quotas(tokens_total=5_000))
        dropped: list[int] = []
        assert asyncio.run(ask_while_they_drop(ledger, key, dropped)) == {"ok": 50, "refused": 10}
        assert sum(dropped) >= 3
        assert rows(ledger, "SELECT count(*) FROM completions") == [(60,)]
        assert rows(ledger, "SELECT tokens, reserved_tokens FROM balances") == [(5_000, 0)]
        assert rows(ledger, "SELECT count(*) FROM reservations") == [(0,)]
        assert sums_agree(ledger)
