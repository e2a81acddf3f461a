"""Requests in a real ledger: who is charged what, and quotas that hold however many ask at once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import openai
import pytest
from serving import QUESTION, Served, fake_plan, served, until

from waterline.errors import LedgerError, QuotaError, WaterlineError
from waterline.fleet import Tenant
from waterline.ledger import Ledger, Quotas, Reservation, Usage, connect, create_key, read_keys, read_usage, revoke_key
from waterline.plan import Plan

TENANTS = (Tenant(name="enterprise", deserved=0.5), Tenant(name="public", deserved=0.5, anonymous=True))


def plan_of(output_tokens: int = 10, *, usd_per_hour: float = 3.6, **asked: float) -> Plan:
    plan = fake_plan(output_tokens=output_tokens, **asked)  # type: ignore[arg-type]
    replicas = tuple(msgspec.structs.replace(one, usd_per_hour=usd_per_hour) for one in plan.replicas)
    fleet = msgspec.structs.replace(plan.fleet, tenants=TENANTS)
    return msgspec.structs.replace(plan, fleet=fleet, replicas=replicas)


@asynccontextmanager
async def kept(
    folder: Path, plan: Plan, quotas: Quotas | None = None
) -> AsyncIterator[tuple[Served, openai.AsyncOpenAI]]:
    """Serve with a ledger; yield the service, and a client of it with a key."""
    url = str(folder / "ledger.db")
    _, secret = create_key(connect(url), tenant="enterprise", client="acme", quotas=quotas)
    with Ledger.open(url) as ledger:
        async with served(plan, ledger=ledger) as service:
            yield service, service.openai.with_options(api_key=secret)


def used(folder: Path) -> dict[str, Usage]:
    return {row.client: row for row in read_usage(connect(str(folder / "ledger.db")), ["client"])}


async def ask(client: openai.AsyncOpenAI, **asked: object) -> int:
    """Return the tokens of prompt and answer."""
    reply = await client.chat.completions.create(model="chat", messages=QUESTION, **asked)  # type: ignore[call-overload]
    return int(reply.usage.total_tokens)


def test_every_answer_stands_in_the_ledger_before_its_last_byte_has_gone_out(tmp_path: Path) -> None:
    async def case() -> None:
        async with kept(tmp_path, plan_of()) as (service, client):
            total = await ask(client)
            row = used(tmp_path)["acme"]
            assert (row.requests, row.ok, row.output_tokens) == (1, 1, 10)
            assert row.prompt_tokens + row.output_tokens == total
            assert row.nano_usd == total * 1000, "at 1000 tokens/s and $3.60/h a token is a millionth of a dollar"
            stream = await client.chat.completions.create(model="chat", messages=QUESTION, stream=True)
            assert not [chunk async for chunk in stream if chunk.usage]
            assert used(tmp_path)["acme"].output_tokens == 20
            await ask(service.openai)
            nobody = used(tmp_path)["anonymous"]
            assert (nobody.tenant, nobody.ok) == ("public", 1)

    asyncio.run(case())


def test_an_answer_that_was_made_and_not_let_out_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine works on it while the ledger decides, and the ledger decides against it."""

    async def case() -> None:
        async with kept(tmp_path, plan_of(), Quotas(tokens_total=1000)) as (service, client):
            await ask(client)
            await ask(service.openai)  # nobody's quota: it need not wait …
            for error in (LedgerError("away"), QuotaError("spent by another gateway")):

                async def refuse(_: Reservation, error: WaterlineError = error) -> None:
                    await asyncio.sleep(0.05)
                    raise error

                monkeypatch.setattr(Reservation, "durable", refuse)
                for stream in (False, True):
                    with pytest.raises(openai.APIStatusError):
                        await ask(client, stream=stream)
            await ask(service.openai)
            monkeypatch.setattr(Ledger, "is_troubled", True)
            with pytest.raises(openai.APIStatusError):  # … unless there is trouble
                await ask(service.openai)

    asyncio.run(case())
    assert (used(tmp_path)["anonymous"].ok, used(tmp_path)["anonymous"].output_tokens) == (2, 20)
    row = used(tmp_path)["acme"]
    assert (row.requests, row.ok, row.failed, row.refused, row.output_tokens) == (5, 1, 2, 2, 10)


def test_a_stream_that_its_client_leaves_is_charged_for_what_it_had(tmp_path: Path) -> None:
    async def case() -> None:
        async with kept(tmp_path, plan_of(400)) as (service, client):
            stream = await client.chat.completions.create(model="chat", messages=QUESTION, stream=True)
            seen = 0
            async for _ in stream:
                seen += 1
                if seen == 20:
                    break
            await stream.close()
            await until(lambda: len(service.completions) == 1)
            await until(lambda: "acme" in used(tmp_path))
            row = used(tmp_path)["acme"]
            assert (row.requests, row.cancelled) == (1, 1)
            assert 10 <= row.output_tokens < 400

    asyncio.run(case())


def test_a_quota_holds_however_many_ask_at_once(tmp_path: Path) -> None:
    async def case() -> None:
        async with kept(tmp_path, plan_of(), Quotas(tokens_total=100)) as (service, client):
            asking = (ask(client, max_tokens=10) for _ in range(20))
            answers = await asyncio.gather(*asking, return_exceptions=True)
            tokens = [answer for answer in answers if isinstance(answer, int)]
            refusals = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
            assert len(tokens) + len(refusals) == 20
            assert 1 <= len(tokens) <= 100 // tokens[0]
            assert {refusal.code for refusal in refusals} == {"insufficient_quota"}
            assert "retry-after" in refusals[0].response.headers
            row = used(tmp_path)["acme"]
            assert row.prompt_tokens + row.output_tokens == sum(tokens) <= 100
            with pytest.raises(openai.RateLimitError, match="max_tokens"):
                await ask(client)  # without a limit it may become as long as the context
            assert (row.requests, row.refused) == (20, len(refusals))
            assert not [one for one in service.completions if one.status == "refused"], "it is no matter of load"

    asyncio.run(case())


def test_a_reply_says_what_is_left_of_the_quota(tmp_path: Path) -> None:
    async def case() -> None:
        async with kept(tmp_path, plan_of(), Quotas(tokens_per_day=1000, tokens_total=5000)) as (_, client):
            left = []
            for _ in range(2):
                asked = client.chat.completions.with_raw_response
                reply = await asked.create(model="chat", messages=QUESTION, max_tokens=10)
                left.append(int(reply.headers["x-ratelimit-remaining-tokens"]))
                assert reply.headers["x-ratelimit-limit-tokens"] == "1000"
                assert 0 < int(reply.headers["x-ratelimit-reset-tokens"].rstrip("s")) <= 86_400
            assert left == [1000, 981], "as far as has been decided about: nothing yet, then an answer"
            assert await ask(client, max_tokens=100_000) < 512, (
                "no answer is longer than the context: so much is set aside"
            )

    asyncio.run(case())


def test_a_reply_says_what_is_left_of_the_money_and_pretends_no_tokens(tmp_path: Path) -> None:
    async def case() -> None:
        quotas = Quotas(nano_usd_per_month=1_000_000, nano_usd_total=50_000)
        async with kept(tmp_path, plan_of(), quotas) as (service, client):
            raw = client.chat.completions.with_raw_response
            total = await ask(client, max_tokens=10)
            reply = await raw.create(model="chat", messages=QUESTION, max_tokens=10)
            said = {name: value for name, value in reply.headers.items() if name.startswith("x-ratelimit")}
            left = f"{(50_000 - total * 1000) / 1e9:.6f}"  # a token is a millionth of a dollar
            assert said == {"x-ratelimit-limit-usd": "0.000050", "x-ratelimit-remaining-usd": left}, "it never resets"
            impatient = client.with_options(max_retries=2)
            with pytest.raises(openai.RateLimitError, match=r"\$0\.00005 in all") as caught:
                await ask(impatient, max_tokens=100)
            assert caught.value.response.headers["x-should-retry"] == "false"
            assert len(service.completions) == 2 + 1, "a client that retries by itself is told not to"

    asyncio.run(case())


def test_a_key_that_is_made_or_revoked_elsewhere_is_known_within_a_second(tmp_path: Path) -> None:
    async def case() -> None:
        async with kept(tmp_path, plan_of()) as (service, client):
            await ask(client)
            engine = connect(str(tmp_path / "ledger.db"))
            revoke_key(engine, read_keys(engine)[0].id)
            _, secret = create_key(engine, tenant="enterprise", client="other")
            await asyncio.sleep(1.5)
            with pytest.raises(openai.AuthenticationError, match="has been revoked"):
                await ask(client)
            assert await ask(service.openai.with_options(api_key=secret)) > 0

    asyncio.run(case())


def test_who_is_refused_costs_nothing_and_is_counted(tmp_path: Path) -> None:
    async def case() -> None:
        plan = plan_of(200, max_batch=1, tokens_per_s=20.0, ttft_s=1.0)
        async with kept(tmp_path, plan) as (service, client):
            first = [asyncio.create_task(ask(client)) for _ in range(2)]
            await until(lambda: service.gateway.dispatcher.services["chat"].waiting == 1)
            with pytest.raises(openai.RateLimitError, match="past its deadline"):
                await ask(client)
            tokens = sum(await asyncio.gather(*first))
            row = used(tmp_path)["acme"]
            assert (row.requests, row.ok, row.refused) == (3, 2, 1)
            assert row.prompt_tokens + row.output_tokens == tokens

    asyncio.run(case())
