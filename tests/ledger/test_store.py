import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from asking import reserve, rows, settlement, sums_agree

from waterline.errors import QuotaError
from waterline.ledger import Key, Ledger, Quotas, create_key, new_request_id


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
