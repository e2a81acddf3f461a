"""Hedged requests whose engines, clients and replicas do what dice say: each gets one whole answer or one clean error."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from faulty import BEFORE, COMPLETIONS, WITHIN, Engine, Line, listening, said_by
from msgspec.structs import replace
from serving import Served, fake_plan, served, until
from sqlalchemy import select

from waterline.ledger import Ledger, Quotas, connect, create_key
from waterline.ledger.tables import balances, completions, reservations
from waterline.plan import Plan
from waterline.service.body import CHAT

HEDGE_S = 0.01
LATE_S = (0.0, 0.005, HEDGE_S, HEDGE_S, 0.02, 0.05)  # until an engine says something
LEAVES_S = (0.0, 0.005, 0.015, 0.03, 0.06)  # who leaves, after so long
REQUESTS, CLIENTS, TOKENS = 40, 12, 10
OFTEN_ASKED = 3  # from then on no engine fails a request of its own accord
ENGINE = Engine(output_tokens=2 * TOKENS)


@dataclass(kw_only=True, eq=False)
class Dicey(Engine):
    """Answers each request as the dice of its name say, which are other dice each time that it is sent to somebody."""

    asked: Counter[str]  # how often each request was sent to anybody

    async def _answer(self, path: str, body: bytes, headers: Any, line: Line) -> None:
        name = headers.get("user-agent", "")
        if not name.startswith("dice"):  # a probe
            await super()._answer(path, body, headers, line)
            return
        self.asked[name] += 1
        dice = random.Random(f"{name} {self.asked[name]}")
        fault = dice.choice((*BEFORE, *WITHIN)) if self.asked[name] < OFTEN_ASKED and dice.random() < 0.3 else ""
        after = f"@{dice.randrange(1, TOKENS)}" if fault in WITHIN else ""
        self.running += 1
        try:
            await self._think(line, dice.choice(LATE_S))
            await super()._answer(path, body, {"user-agent": fault + after}, line)
        finally:
            self.running -= 1


@dataclass(kw_only=True)
class Client:
    """One request, and what its client has seen."""

    name: str
    path: str
    fields: dict[str, Any]
    leaves_s: float | None
    status: int = 0  # 0: it has left
    data: bytes = b""

    async def ask(self, session: aiohttp.ClientSession, url: str) -> None:
        headers = {"user-agent": self.name}
        with suppress(TimeoutError):
            async with (
                asyncio.timeout(self.leaves_s),
                session.post(f"{url}/v1{self.path}", json=self.fields, headers=headers) as reply,
            ):
                data = await reply.read()
                self.status, self.data = reply.status, data

    def is_answered(self) -> bool:
        """Whether it has got a whole answer, and not a clean error; AssertionError for anything else."""
        if self.status != 200:
            assert self.status in {429, 502, 503}
            assert orjson.loads(self.data)["error"]["message"]
            return False
        said = said_by(self.fields, ENGINE, self.path)
        if "stream" not in self.fields:
            whole = orjson.loads(self.data)
            [choice] = whole["choices"]
            assert (choice["message"]["content"] if self.path == CHAT else choice["text"]) == said
            assert whole["usage"]["completion_tokens"] == TOKENS
            return True
        *blocks, rest = self.data.split(b"\n\n")
        assert not rest
        dones = [number for number, block in enumerate(blocks) if block == b"data: [DONE]"]
        events = [orjson.loads(block.removeprefix(b"data: ")) for block in blocks if block != b"data: [DONE]"]
        choices = [choice for event in events for choice in event.get("choices", ())]
        text = "".join((one["delta"].get("content") or "") if self.path == CHAT else one["text"] for one in choices)
        if "error" in events[-1]:
            assert not dones
            assert said.startswith(text)
            return False
        assert text == said
        assert dones == [len(blocks) - 1]
        assert [one["finish_reason"] for one in choices if one["finish_reason"]] == ["length"]
        assert [event["usage"]["completion_tokens"] for event in events if event.get("usage")] == [TOKENS]
        assert len({(event["id"], event["created"]) for event in events}) == 1
        return True


def client_of(seed: int, number: int) -> Client:
    dice = random.Random(f"{seed} {number}")
    path = dice.choice((CHAT, CHAT, COMPLETIONS))
    text = f"{seed} and {number}"
    fields: dict[str, Any] = {"model": "chat", "max_tokens": TOKENS, "temperature": 0}
    fields |= {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    if dice.random() < 0.6:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    leaves_s = dice.choice(LEAVES_S) if dice.random() < 0.2 else None
    return Client(name=f"dice {seed} {number}", path=path, fields=fields, leaves_s=leaves_s)


def plan_of(replicas: int, max_batch: int) -> Plan:
    plan = fake_plan({"chat": replicas}, max_batch=max_batch)
    [model] = plan.fleet.models
    return replace(plan, fleet=replace(plan.fleet, models=(replace(model, hedge_after_s=HEDGE_S),)))


async def shake(service: Served, dice: random.Random) -> None:
    """Take replicas away from those who ask, in the three ways there are, and give them back."""
    gateway, desk = service.gateway, service.gateway.dispatcher
    while True:
        await asyncio.sleep(0.05 * dice.random())
        replica = dice.choice(list(desk.lanes))
        how = dice.choice(("hold", "doubt", "gone"))
        if how == "hold":
            desk.hold(replica, gateway.now_s())
        elif how == "doubt":
            desk.doubt(replica, doubted=True, now_s=gateway.now_s())
        else:
            desk.set_ready(replica, ready=False, now_s=gateway.now_s(), back_in_s=0.05)
            gateway._asker.cut(replica)
        await asyncio.sleep(0.05 * dice.random())
        desk.doubt(replica, doubted=False, now_s=gateway.now_s())
        desk.set_ready(replica, ready=True, now_s=gateway.now_s())


def held(service: Served, engines: list[Dicey]) -> Iterator[tuple[str, int]]:
    """Yield what nobody may hold when nobody is there any more."""
    desk, numbers = service.gateway.dispatcher, service.gateway.dispatcher.rows.desk
    for id_, lane in desk.lanes.items():
        yield f"slots of {id_}", lane.replica.max_batch - int(numbers.replicas.free_slots[lane.row])
        yield f"unread tokens of {id_}", int(numbers.replicas.unread_tokens[lane.row])
        yield f"backlog of {id_}", lane.backlog_tokens
        yield f"requests on {id_}", lane.running
        yield f"prompts at {id_}", service.gateway._asker.health.of(lane.replica).unread_tokens
    ready = [lane.row for lane in desk.lanes.values() if lane.ready]
    free_slots = sum(int(numbers.replicas.free_slots[row]) for row in ready)
    yield "slots of the model", free_slots - int(numbers.models.free_slots[0])
    yield "unread tokens of the model", int(numbers.models.unread_tokens[0])
    yield "second places", len(desk.services["chat"].hedged)
    yield "requests of the tenant", desk.under_way("enterprise")
    yield "requests at engines", sum(engine.running for engine in engines)


async def throw(folder: Path, seed: int, slots: int) -> Counter[str]:
    """Ask with one seed; return what became of the requests."""
    dice, asked, url = random.Random(seed), Counter[str](), str(folder / "ledger.db")
    _, secret = create_key(connect(url), tenant="enterprise", client="acme", quotas=Quotas(tokens_total=10**6))
    engines = [
        Dicey(asked=asked, faulty=True, owner=dice.choice(("vllm", "sglang")), output_tokens=2 * TOKENS)
        for _ in range(dice.choice((2, 3)))
    ]
    clients = [client_of(seed, number) for number in range(REQUESTS)]
    with Ledger.open(url) as ledger:
        async with (
            asyncio.timeout(50.0),
            listening(*engines) as attached,
            served(plan_of(len(engines), slots), engines=attached, ledger=ledger) as service,
            aiohttp.ClientSession(headers={"authorization": f"Bearer {secret}"}) as session,
        ):
            waiting = iter(clients)

            async def keep_asking() -> None:
                for one in waiting:
                    await one.ask(session, service.url)

            shaking = asyncio.create_task(shake(service, dice))
            await asyncio.gather(*(keep_asking() for _ in range(CLIENTS)))
            shaking.cancel()
            await asyncio.wait([shaking])
            assert shaking.cancelled()
            with suppress(TimeoutError):
                await until(lambda: not any(count for _, count in held(service, engines)), 10.0)
            assert [(what, count) for what, count in held(service, engines) if count] == []
            told, hedges = list(service.completions), service.gateway.metrics.text().decode()
    seen = Counter("left" if not one.status else "answered" if one.is_answered() else "failed" for one in clients)
    with connect(url).connect() as connection:
        rows = connection.execute(select(completions)).all()
        assert connection.execute(select(reservations)).all() == []
        [balance] = connection.execute(select(balances)).all()
    assert len({row.id for row in rows}) == len(rows) == len(told), "one line for each that was taken in"
    whole = [row for row in rows if row.outcome == "ok"]
    assert seen["answered"] <= len(whole) <= seen["answered"] + seen["left"]
    assert {row.output_tokens for row in whole} <= {TOKENS}
    assert balance.tokens == sum(row.prompt_tokens + row.output_tokens for row in rows), "charged once"
    assert balance.reserved_tokens == 0
    for line in hedges.splitlines():
        if line.startswith("waterline_hedges_total{"):
            seen[line.split('outcome="')[1].split('"')[0]] = int(float(line.split()[-1]))
    return seen


@pytest.mark.parametrize("slots", [2, 16])
def test_whatever_happens_there_is_one_answer_and_one_charge_and_no_place_is_lost(tmp_path: Path, slots: int) -> None:
    seen = asyncio.run(throw(tmp_path, seed=7, slots=slots))
    print(dict(seen))
    assert seen["answered"] + seen["failed"] + seen["left"] == REQUESTS
    assert seen["answered"] > REQUESTS / 2
    assert slots == 2 or seen["won"] + seen["lost"] > 0, "nobody was sent twice"
