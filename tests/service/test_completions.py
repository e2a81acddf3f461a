"""Requests that end where nobody expects it."""

import asyncio
import sqlite3
from pathlib import Path

import openai
import orjson
import pytest
from aiohttp import web
from serving import QUESTION, engine_that, fake_plan, served, until

from waterline.ledger import Ledger, connect, read_usage
from waterline.outcome import summarize
from waterline.service.access import Caller
from waterline.service.asgi import Message, Reply
from waterline.service.body import CHAT
from waterline.service.completions import Request
from waterline.service.supervisor import ReplicaState


async def nowhere(_message: Message) -> None:
    pass


def test_who_leaves_as_its_turn_comes_has_been_on_no_replica_and_took_no_time_of_one() -> None:
    async def case() -> None:
        async with served(fake_plan(max_batch=1, output_tokens=400)) as service:
            body = orjson.dumps({"model": "chat", "messages": QUESTION})
            caller = Caller(tenant="enterprise", client="one", line="one")
            asked = [Request(endpoint=CHAT, body=body, caller=caller) for _ in range(2)]
            submit, waits = service.gateway.completions.submit, service.gateway.dispatcher.services["chat"]
            working, waiting = (asyncio.create_task(submit(one, Reply(nowhere))) for one in asked)
            await until(lambda: waits.waiting == 1)
            working.cancel()  # and its place is the other's, in the same step …
            waiting.cancel()  # … in which that leaves
            await asyncio.gather(working, waiting, return_exceptions=True)
            first, second = service.completions
            assert (first.replica, second.replica) == ("chat/0", "")
            assert first.gpu_s > 0.0 == second.gpu_s
            usd_per_hour = {replica.id: 1.0 for replica in service.gateway.plan.replicas}
            assert summarize(service.completions, service.gateway.plan.fleet.slos, 1.0, usd_per_hour)

    asyncio.run(case())


@pytest.mark.parametrize(("status", "outcome"), [(400, "cancelled"), (500, "failed")])
def test_nobody_is_charged_for_what_an_engine_refuses_or_fails_to_begin(
    status: int, outcome: str, tmp_path: Path
) -> None:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=status)

    async def case() -> None:
        with Ledger.open(str(tmp_path / "ledger.db")) as ledger:
            async with (
                engine_that(answer) as url,
                served(fake_plan(engine="openai", urls=(url,)), ledger=ledger) as service,
            ):
                with pytest.raises(openai.APIStatusError):
                    await service.openai.chat.completions.create(model="chat", messages=QUESTION)  # type: ignore[call-overload]
                [completion] = service.completions
                assert (completion.status, completion.replica, completion.prompt_tokens) == (outcome, "chat/0", 0)

    asyncio.run(case())
    [row] = read_usage(connect(str(tmp_path / "ledger.db")), ["tenant"])
    assert (row.requests, getattr(row, outcome)) == (1, 1)
    assert (row.prompt_tokens, row.output_tokens, row.nano_usd) == (0, 0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_may_go_as_soon_as_it_has_said_all(stream: bool, tmp_path: Path) -> None:
    """A replica that drains has nothing to do any more while the last byte waits for the ledger."""

    async def case() -> None:
        with Ledger.open(str(tmp_path / "ledger.db")) as ledger:
            async with served(fake_plan(output_tokens=60), ledger=ledger) as service:
                lane = service.gateway.dispatcher.lanes["chat/0"]

                async def ask() -> str:
                    reply = await service.openai.chat.completions.create(  # type: ignore[call-overload]
                        model="chat", messages=QUESTION, stream=stream
                    )
                    if not stream:
                        return str(reply.choices[0].finish_reason)
                    return str([chunk.choices[0].finish_reason async for chunk in reply][-1])

                asking = asyncio.create_task(ask())
                await until(lambda: lane.running == 1 and not ledger.lag().waiting_rows)  # its reservation is written
                disk = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
                disk.execute("begin immediate")
                await until(lambda: lane.running == 0)
                service.supervisor._change("chat/0", ReplicaState(status="stopped"))
                await asyncio.sleep(0.05)
                disk.execute("rollback")
                disk.close()
                async with asyncio.timeout(5):
                    assert await asking == "stop"

    asyncio.run(case())
