"""A second engine where the first token is late: who answers, who is charged, and that nobody is pushed back by it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from faulty import Engine, Line, listening, said_by
from msgspec.structs import replace
from serving import QUESTION, Served, fake_plan, served, until

from waterline.errors import FleetFileError
from waterline.fleet import load_fleet
from waterline.ledger import Ledger, Quotas, Usage, connect, create_key, read_usage
from waterline.plan import Plan, Replica
from waterline.service.access import Caller
from waterline.service.asgi import Reply
from waterline.service.body import CHAT
from waterline.service.completions import Request
from waterline.service.engines.fake_answer import Answer
from waterline.service.hedge import Race
from waterline.service.upstream import UnansweredError

LATE_S = 0.05
WAIT = "wait"  # the name of a client whose engine waits for a word of the test
FIELDS: dict[str, Any] = {"model": "chat", "messages": QUESTION, "max_tokens": 10}
STREAM = FIELDS | {"stream": True, "stream_options": {"include_usage": True}}
STALLS = {True: "stall@0", False: "hang"}  # whether it streams: the head of the answer comes, or nothing


@dataclass(kw_only=True, eq=False)
class InTurn(Engine):
    """One of several engines: those that are asked first fail as the client's name says, the others answer."""

    asked: list["InTurn"] = field(default_factory=list)  # by all of them, in turn
    failing: int = 1  # of those that are asked
    speaks: asyncio.Event = field(default_factory=asyncio.Event)  # until when it says nothing to one that waits …
    breaks: asyncio.Event = field(default_factory=asyncio.Event)  # … unless it cuts the connection
    cut_after: int = 0  # tokens, or not at all

    async def _answer(self, path: str, body: bytes, headers: Any, line: Line) -> None:
        if body and path != "/v1/responses":
            self.faulty = len(self.asked) < self.failing
            self.asked.append(self)
        await super()._answer(path, body, headers, line)

    async def _stream(self, answer: Answer, line: Line, fault: str, after: int) -> None:
        if fault == WAIT:
            ends = [asyncio.create_task(one) for one in (self.speaks.wait(), self.breaks.wait(), line.reader.read(1))]
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if not ends[0].done():
                    raise ConnectionError
            finally:
                for end in ends:
                    end.cancel()
                await asyncio.wait(ends)  # nobody else may read before
            fault, after = "cut" if self.cut_after else "", self.cut_after
        await super()._stream(answer, line, fault, after)


def plan_of(replicas: int, after_s: float | None, **more: Any) -> Plan:
    """Return a plan whose replicas are slow enough that nobody takes one for silent."""
    plan = fake_plan({"chat": replicas}, **more)
    [model] = plan.fleet.models
    fleet = replace(plan.fleet, models=(replace(model, hedge_after_s=after_s),))
    return replace(plan, fleet=fleet, replicas=tuple(replace(one, ttft_s=10.0) for one in plan.replicas))


@dataclass(kw_only=True)
class Scene:
    """Two engines or more, the service before them, and a client with a key."""

    service: Served
    engines: tuple[InTurn, ...]
    asked: list[InTurn]
    secret: str
    ledger: str

    async def ask(self, fields: dict[str, Any], fault: str) -> tuple[int, bytes]:
        headers = {"user-agent": fault or "none", "authorization": f"Bearer {self.secret}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(f"{self.service.url}/v1{CHAT}", json=fields) as reply,
        ):
            return reply.status, await reply.read()

    def hedges(self) -> dict[str, float]:
        text = self.service.gateway.metrics.text().decode()
        told = [line for line in text.splitlines() if line.startswith("waterline_hedges_total{")]
        return {line.split('outcome="')[1].split('"')[0]: float(line.split()[-1]) for line in told}

    def is_quiet(self) -> bool:
        """Whether no place is taken and no work expected, at the desk and in the engines."""
        desk = self.service.gateway.dispatcher.rows.desk
        lanes = self.service.gateway.dispatcher.lanes.values()
        slots = [int(desk.replicas.free_slots[lane.row]) - lane.replica.max_batch for lane in lanes]
        unread = [int(desk.replicas.unread_tokens[lane.row]) for lane in lanes]
        rest = [lane.running + lane.backlog_tokens for lane in lanes]
        return not any([*slots, *unread, *rest, *(engine.running for engine in self.engines)])

    async def quiet(self) -> None:
        await until(self.is_quiet)

    async def used(self) -> Usage:
        """Return what the ledger has of the client, once it has something."""
        await until(lambda: bool(read_usage(connect(self.ledger), ["client"])))
        [row] = read_usage(connect(self.ledger), ["client"])
        return row


@asynccontextmanager
async def scene(
    folder: Path, after_s: float | None = LATE_S, *, replicas: int = 2, failing: int = 1, **more: Any
) -> AsyncIterator[Scene]:
    asked: list[InTurn] = []
    engines = tuple(InTurn(asked=asked, failing=failing, output_tokens=10) for _ in range(replicas))
    url = str(folder / "ledger.db")
    _, secret = create_key(connect(url), tenant="enterprise", client="acme", quotas=Quotas(tokens_total=10_000))
    with Ledger.open(url) as ledger:
        async with (
            listening(*engines) as attached,
            served(plan_of(replicas, after_s, **more), engines=attached, ledger=ledger) as service,
        ):
            yield Scene(service=service, engines=engines, asked=asked, secret=secret, ledger=url)


def run(case: Callable[[Scene], Awaitable[None]], folder: Path, after_s: float | None = LATE_S, **more: Any) -> None:
    async def within() -> None:
        async with asyncio.timeout(50.0), scene(folder, after_s, **more) as there:
            await case(there)

    asyncio.run(within())


def text_of(data: bytes) -> str:
    events = [orjson.loads(block[6:]) for block in data.split(b"\n\n")[:-1] if block != b"data: [DONE]"]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


@pytest.mark.parametrize("stream", [True, False])
def test_when_the_first_is_late_the_second_answers_and_the_first_is_left_at_once(tmp_path: Path, stream: bool) -> None:
    async def case(there: Scene) -> None:
        fields = STREAM if stream else FIELDS
        status, data = await there.ask(fields, STALLS[stream])
        assert status == 200
        first, second = there.asked
        assert first is not second
        await until(lambda: first.left == 1)
        assert second.left == 0
        if stream:
            assert text_of(data) == said_by(fields, second), "the words of one engine, from the first to the last"
            assert data.count(b"data: [DONE]") == data.count(b'"role"') == 1
        await there.quiet()
        assert there.hedges() == {"won": 1.0}
        [one] = there.service.completions
        assert (one.status, one.output_tokens) == ("ok", 10)
        assert one.replica == f"chat/{there.engines.index(second)}"
        row = await there.used()
        assert row.requests == 1
        assert (row.ok, row.output_tokens, row.prompt_tokens) == (1, 10, one.prompt_tokens), "charged once"

    run(case, tmp_path)


@pytest.mark.parametrize("after_s", [None, 30.0])
def test_nobody_is_asked_twice_unless_the_owner_wants_it_and_the_first_is_late(
    tmp_path: Path, after_s: float | None
) -> None:
    async def case(there: Scene) -> None:
        for fields in (STREAM, FIELDS):
            assert (await there.ask(fields, ""))[0] == 200
        assert len(there.asked) == 2
        await there.quiet()
        assert there.hedges() == {}

    run(case, tmp_path, after_s)


def test_a_request_of_a_batch_is_sent_to_nobody_twice(tmp_path: Path) -> None:
    async def send(_message: object) -> None:
        raise AssertionError("its engine has said nothing")

    async def case(there: Scene) -> None:
        caller = Caller(tenant="enterprise", client="acme", line="acme: batches")
        headers = [(b"user-agent", STALLS[False].encode())]
        request = Request(endpoint=CHAT, body=orjson.dumps(FIELDS), caller=caller, headers=headers, spare=True)
        asking = asyncio.create_task(there.service.gateway.completions.submit(request, Reply(send)))
        await until(lambda: len(there.asked) == 1)
        await asyncio.sleep(3 * LATE_S)
        assert (len(there.asked), there.hedges()) == (1, {})
        asking.cancel()
        await there.quiet()

    run(case, tmp_path)


def test_when_the_first_speaks_first_the_second_is_left_at_once(tmp_path: Path) -> None:
    async def case(there: Scene) -> None:
        asking = asyncio.create_task(there.ask(STREAM, WAIT))
        await until(lambda: len(there.asked) == 2)
        first, second = there.asked
        assert (first.running, second.running) == (1, 1)
        first.speaks.set()
        _, data = await asking
        assert text_of(data) == said_by(STREAM, first)
        await until(lambda: second.left == 1)
        assert first.left == 0
        await there.quiet()
        assert there.hedges() == {"lost": 1.0}
        assert [one.replica for one in there.service.completions] == [f"chat/{there.engines.index(first)}"]

    run(case, tmp_path, failing=2)


def test_nobody_is_pushed_back_by_a_second_place(tmp_path: Path) -> None:
    async def case(there: Scene) -> None:
        late = asyncio.create_task(there.ask(STREAM, WAIT))
        await until(lambda: len(there.asked) == 2)
        first, second = there.asked
        assert (await there.ask(STREAM, ""))[0] == 200, "both slots were taken"
        assert there.asked[2] is second
        await until(lambda: second.left == 1)
        assert there.hedges() == {"lost": 1.0}
        first.speaks.set()
        assert text_of((await late)[1]) == said_by(STREAM, first)
        await there.quiet()
        assert {one.status for one in there.service.completions} == {"ok"}

    run(case, tmp_path, failing=2, max_batch=1)


@pytest.mark.parametrize("replicas", [1, 2])
def test_where_nobody_else_takes_requests_there_is_no_second(tmp_path: Path, replicas: int) -> None:
    async def case(there: Scene) -> None:
        for number in range(1, replicas):
            there.service.gateway.dispatcher.hold(f"chat/{number}", 0.0)
        asking = asyncio.create_task(there.ask(STREAM, WAIT))
        await until(lambda: there.hedges() == {"none free": 1.0})
        assert there.asked == [there.engines[0]]
        there.engines[0].speaks.set()
        assert (await asking)[0] == 200
        await there.quiet()

    run(case, tmp_path, replicas=replicas)


@pytest.mark.parametrize("stream", [True, False])
def test_when_the_client_leaves_both_engines_stop(tmp_path: Path, stream: bool) -> None:
    async def case(there: Scene) -> None:
        asking = asyncio.create_task(there.ask(STREAM if stream else FIELDS, STALLS[stream]))
        await until(lambda: len(there.asked) == 2)
        asking.cancel()
        await until(lambda: [engine.left for engine in there.asked] == [1, 1])
        await there.quiet()
        assert there.hedges() == {"lost": 1.0}
        assert [one.status for one in there.service.completions] == ["cancelled"]

    run(case, tmp_path, failing=2)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_of_one_is_none_while_the_other_is_under_way(tmp_path: Path, failing: int) -> None:
    async def case(there: Scene) -> None:
        asking = asyncio.create_task(there.ask(STREAM, WAIT))
        await until(lambda: len(there.asked) == 2)
        failed, other = there.asked[failing], there.asked[1 - failing]
        failed.breaks.set()
        await until(lambda: failed.running == 0)
        other.speaks.set()
        _, data = await asking
        assert text_of(data) == said_by(STREAM, other)
        assert len(there.asked) == 2
        await there.quiet()
        assert there.hedges() == {"lost" if failing else "won": 1.0}
        assert [one.status for one in there.service.completions] == ["ok"]

    run(case, tmp_path, failing=2)


def test_when_all_fail_the_client_gets_one_clean_error(tmp_path: Path) -> None:
    async def case(there: Scene) -> None:
        asking = asyncio.create_task(there.ask(STREAM, WAIT))
        await until(lambda: len(there.asked) == 2)
        for engine in there.engines:
            engine.breaks.set()
        status, data = await asking
        assert status == 502
        assert data.count(b'"error"') == 1
        await there.quiet()
        assert len(there.asked) >= 3
        assert [one.status for one in there.service.completions] == ["failed"]
        row = await there.used()
        assert (row.requests, row.output_tokens, row.nano_usd) == (1, 0, 0)

    run(case, tmp_path, failing=99)


def test_a_second_that_answers_may_break_off_and_another_goes_on(tmp_path: Path) -> None:
    async def case(there: Scene) -> None:
        asking = asyncio.create_task(there.ask(STREAM, WAIT))
        await until(lambda: len(there.asked) == 2)
        second = there.asked[1]
        second.cut_after = 4
        second.speaks.set()
        _, data = await asking
        assert text_of(data) == said_by(STREAM, second)
        assert data.count(b"data: [DONE]") == data.count(b'"role"') == 1
        assert len(there.asked) == 3
        await there.quiet()
        [one] = there.service.completions
        assert (one.status, one.output_tokens) == ("ok", 10)

    run(case, tmp_path, failing=2)


class Told:
    """A place with a second one, and what a race says of the two."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def second(self, _on_lost: Callable[[], None]) -> Replica:
        return fake_plan().replicas[0]

    def take_second(self) -> None:
        self.said.append("takes the second place")

    def drop_second(self) -> None:
        self.said.append("drops the second place")

    def goes_second(self) -> None:
        pass

    def failed(self, error: UnansweredError, *, second: bool) -> None:
        self.said.append(f"{'second' if second else 'first'} failed: {error}")

    def was_beaten(self, *, second: bool) -> None:
        self.said.append(f"{'second' if second else 'first'} was beaten")


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("late", "speaks", ["first was beaten", "takes the second place"]),
        ("speaks", "late", ["second was beaten", "drops the second place"]),
        ("fails", "speaks", ["first failed: no", "takes the second place"]),
        ("speaks", "fails", ["second failed: no", "drops the second place"]),
        ("fails at once", "speaks", ["first failed: no", "takes the second place"]),
        ("speaks", "fails at once", ["second failed: no", "drops the second place"]),
    ],
)
def test_who_goes_on_alone_beats_nobody_and_who_has_failed_is_not_beaten(
    first: str, second: str, said: list[str]
) -> None:
    told = Told()
    race = Race(told, told)
    both = asyncio.Event()

    async def engine(does: str) -> None:
        await both.wait()
        if does.startswith("fails"):
            raise UnansweredError("no")
        for _ in range(
            1 if "fails at once" in {first, second} else 9
        ):  # in the step in which the other fails, or later
            await asyncio.sleep(0)
        await asyncio.sleep(60.0 * (does == "late"))
        race.spoke()

    def ask_second(_replica: Replica) -> Coroutine[Any, Any, None]:
        both.set()
        return engine(second)

    asyncio.run(race.run(engine(first), 0.001, ask_second))
    assert told.said == said


FLEET = """
name = "a"
[[pools]]
name = "p"
gpu = "h100-sxm"
nodes = 1
[[models]]
name = "m"
weights = "waterline/abacus"
"""


@pytest.mark.parametrize("value", ["0", "-1", '"fast"'])
def test_a_time_that_is_none_is_refused_by_its_name(tmp_path: Path, value: str) -> None:
    (tmp_path / "fleet.toml").write_text(FLEET + f"hedge_after_s = {value}\n")
    with pytest.raises(FleetFileError, match="hedge_after_s"):
        load_fleet(tmp_path / "fleet.toml")


def test_off_is_what_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(FLEET)
    assert load_fleet(tmp_path / "fleet.toml").models[0].hedge_after_s is None
    (tmp_path / "fleet.toml").write_text(FLEET + "hedge_after_s = 0.8\n")
    assert load_fleet(tmp_path / "fleet.toml").models[0].hedge_after_s == 0.8
