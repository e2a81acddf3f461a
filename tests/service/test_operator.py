"""What an operator may do to a running service, and that requests come to no harm by it."""

import asyncio
import dataclasses
import json
from datetime import datetime
from pathlib import Path

import aiohttp
import openai
import pytest
from serving import QUESTION, Served, fake_plan, served, until

from waterline.errors import UnknownNameError
from waterline.ledger import Ledger, create_key
from waterline.service.engines import prepare_engines
from waterline.service.minutes import since_midnight_s
from waterline.service.operator import MOST_UNTOLD, NotOfferedError
from waterline.service.server import AdminListener, listen, running
from waterline.service.supervisor import ReplicaState
from waterline.units import DAY_S, GIGA


async def ask(service: Served, tokens: int = 3) -> None:
    await service.openai.chat.completions.create(model="chat", messages=QUESTION, max_tokens=tokens)


def test_a_drained_replica_ends_what_it_has_and_gets_nothing_more() -> None:
    async def case() -> None:
        async with served(fake_plan({"chat": 2}, output_tokens=300)) as service:
            asking = [asyncio.ensure_future(ask(service, 300)) for _ in range(4)]
            await until(lambda: sum(one.running for one in service.operator.snapshot().replicas) == 4)
            running = [one.running for one in service.operator.snapshot().replicas]
            assert all(running)
            service.operator.drain("chat/0")
            service.operator.drain("chat/0")
            replica = next(one for one in service.operator.snapshot().replicas if one.id == "chat/0")
            assert (replica.state, replica.running) == ("draining", running[0])
            assert replica.reason == "An operator drains it."
            now = service.operator.snapshot()
            assert now.replica_states == {"draining": 1, "ready": 1}
            assert (now.models[0].ready, now.models[0].replicas, now.health) == (1, 2, "ok")
            await asyncio.gather(*asking)
            assert {one.status for one in service.completions} == {"ok"}, "what was under way was not cut"
            service.completions.clear()
            for _ in range(6):
                await ask(service)
            assert {one.replica for one in service.completions} == {"chat/1"}
            service.operator.undrain("chat/0")
            await asyncio.gather(*(ask(service) for _ in range(8)))
            assert {one.replica for one in service.completions} == {"chat/0", "chat/1"}
            assert {one.state for one in service.operator.snapshot().replicas} == {"ready"}

    asyncio.run(case())


def test_a_drained_replica_stays_so_when_its_engine_comes_back() -> None:
    async def case() -> None:
        async with served(fake_plan({"chat": 2})) as service:
            service.operator.drain("chat/0")
            state = service.supervisor.states["chat/0"]
            for status in ("backing off", "starting", "ready"):
                state = ReplicaState(status=status, url=state.url, served_name=state.served_name, restarts=1)
                service.supervisor.states["chat/0"] = state
                service.operator.replica_changed("chat/0", state)
            for _ in range(4):
                await ask(service)
            assert {one.replica for one in service.completions} == {"chat/1"}

    asyncio.run(case())


def test_decisions_are_told_as_they_are_made_under_the_ids_of_their_requests() -> None:
    async def case() -> None:
        async with served(fake_plan()) as service:
            told = service.operator.decisions()
            first = asyncio.ensure_future(anext(told))
            await until(lambda: bool(service.gateway.dispatcher.log.listeners))
            made = await service.openai.chat.completions.with_raw_response.create(
                model="chat", messages=QUESTION, max_tokens=3
            )
            line = json.loads(await first)
            assert line["request_id"] == made.headers["x-request-id"]
            assert (line["rule"], line["place"], line["why"]) == ("slot free", "chat/0", "only replica")
            ago_s = since_midnight_s(datetime.now().astimezone()) - line["at_ns"] / GIGA
            assert (ago_s + 1.0) % DAY_S < 61.0, "a minute ago at most"
            service.operator.stopping.set()
            assert [chunk async for chunk in told] == []
            assert service.gateway.dispatcher.log.listeners == []

    asyncio.run(case())


def test_who_reads_decisions_too_slowly_is_told_no_more_rather_than_a_part() -> None:
    async def case() -> None:
        async with served(fake_plan(), start=False) as service:
            log = service.gateway.dispatcher.log
            reading = service.operator.decisions()
            first = asyncio.ensure_future(anext(reading))
            await until(lambda: bool(log.listeners))
            (listener,) = log.listeners
            listener(b"1\n")
            assert await first == b"1\n"
            for number in range(MOST_UNTOLD):
                listener(b"%d\n" % number)
            with pytest.raises(StopAsyncIteration):
                await anext(reading)
            assert log.listeners == []

    asyncio.run(case())


def test_while_the_only_replica_is_drained_its_model_is_away_and_that_is_said() -> None:
    async def case() -> None:
        async with (
            served(fake_plan({"chat": 1, "other": 1}, output_tokens=300)) as service,
            aiohttp.ClientSession() as http,
        ):
            under_way = asyncio.create_task(ask(service, 300))
            await until(lambda: service.gateway.under_way("chat/0") == 1)
            service.operator.drain("chat/0")
            with pytest.raises(openai.InternalServerError, match="'chat' is not ready: chat/0 is draining") as caught:
                await ask(service)
            assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "30")
            async with http.get(f"{service.url}/health") as health:
                said = await health.json()
            assert (health.status, said["status"], said["models"]["chat"]["ready"]) == (503, "not ready", 0)
            assert said["replicas"] == {"chat/0": "draining", "other/0": "ready"}
            await under_way
            states = service.supervisor.states
            # It may answer again, or be back in a moment: it is drained all the same.
            for status in ("suspect", "backing off", "starting"):
                states["chat/0"] = dataclasses.replace(states["chat/0"], status=status, load_s=1.0)
                service.operator.replica_changed("chat/0", states["chat/0"])
                with pytest.raises(openai.InternalServerError, match=f"chat/0 is {status}"):
                    await ask(service)
            states["chat/0"] = dataclasses.replace(states["chat/0"], status="ready")
            service.operator.undrain("chat/0")
            await ask(service)

    asyncio.run(case())


def test_what_is_not_there_is_named() -> None:
    async def case() -> None:
        async with served(fake_plan(), start=False) as service:
            with pytest.raises(UnknownNameError, match="no replica is called 'chat/9'. Did you mean 'chat/0'"):
                service.operator.drain("chat/9")
            with pytest.raises(NotOfferedError, match="without a fleet or plan file"):
                await service.operator.reload()
            service.operator.hangup = asyncio.Event()
            assert "read again" in await service.operator.reload()
            assert service.operator.hangup.is_set()

    asyncio.run(case())


def test_the_admin_listener_ends_with_the_service_though_somebody_watches() -> None:
    async def app(_scope: object, _receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})  # type: ignore[operator]
        await asyncio.sleep(3600)

    async def case() -> float:
        plan = fake_plan()
        api, admin = listen("127.0.0.1", 0), listen("127.0.0.1", 0)
        listener = AdminListener(listening=admin, app=lambda _operator, _folder: app)
        async with aiohttp.ClientSession() as session:
            async with running(plan, prepare_engines(plan), api, lambda _: None, admin=listener) as service:
                reply = await session.get(f"http://127.0.0.1:{admin.getsockname()[1]}/events")
                assert await reply.content.readany() == b"data: 1\n\n"
                assert not service.operator.stopping.is_set()
                begun_s = asyncio.get_running_loop().time()
            reply.close()
            assert service.operator.stopping.is_set()
            return asyncio.get_running_loop().time() - begun_s

    assert asyncio.run(case()) < 5.0


def test_keys_and_usage_are_those_of_the_ledger(tmp_path: Path) -> None:
    async def case() -> None:
        with Ledger.open(str(tmp_path / "ledger.db")) as ledger:
            key, _ = create_key(ledger.engine, tenant="enterprise", client="alice")
            async with served(fake_plan(), ledger=ledger) as service:
                await ask(service)
                now = service.operator.snapshot()
                assert now.ledger
                assert now.ledger.problem == ""
                assert [one.id for one in await service.operator.keys()] == [key.id]
                await service.operator.revoke(key.id)
                (revoked,) = await service.operator.keys()
                assert revoked.revoked_us
                with pytest.raises(UnknownNameError, match="No key has the id"):
                    await service.operator.revoke("nobody")
                async with asyncio.timeout(5):
                    while not (used := await service.operator.usage("", "")):  # noqa: ASYNC110 - a thread writes it
                        await asyncio.sleep(0.02)
                assert [
                    (one["tenant"], one["model"], one["requests"], one["failed"], one["output_tokens"]) for one in used
                ] == [("enterprise", "chat", 1, 0, 3)]
                assert await service.operator.usage("2100-01-01", "") == []

    asyncio.run(case())


def test_without_a_ledger_there_are_no_keys_and_that_is_said() -> None:
    async def case() -> None:
        async with served(fake_plan(), start=False) as service:
            with pytest.raises(NotOfferedError, match="keeps no ledger"):
                await service.operator.keys()

    asyncio.run(case())


def test_an_ejected_replica_is_told_of() -> None:
    async def case() -> None:
        async with served(fake_plan({"chat": 2})) as service:
            service.gateway._doubt("chat/0", True)
            now = service.operator.snapshot()
            assert [one.state for one in now.replicas] == ["ejected", "ready"]
            assert now.ejections[0].replica == "chat/0"
            assert any("'chat/0' is ejected" in problem for problem in now.problems)
            assert 'waterline_ejections_total{model="chat"} 1.0' in service.operator.metrics().decode()
            service.gateway._doubt("chat/0", False)
            assert {one.state for one in service.operator.snapshot().replicas} == {"ready"}

    asyncio.run(case())
