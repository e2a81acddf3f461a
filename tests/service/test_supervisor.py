"""Engines are started, watched, restarted with patience and stopped; real processes."""

import asyncio
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field

import aiohttp
import openai
import pytest
import uvloop
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec.structs import replace
from serving import QUESTION, fake_plan, served, until

from waterline.errors import EngineError
from waterline.service.engines import NotReadyError, prepare_engines
from waterline.service.engines.openai import Attached
from waterline.service.supervisor import ReplicaState, Supervisor, next_delay_s


def test_waits_double_up_to_half_a_minute_and_begin_anew_after_a_healthy_one() -> None:
    delays, delay_s = [], 0.0
    for _ in range(9):
        delay_s = next_delay_s(delay_s, healthy_s=1.0)
        delays.append(delay_s)
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert next_delay_s(30.0, healthy_s=60.0) == 0.5


@dataclass(frozen=True, kw_only=True)
class Script:
    """An engine that is a few lines of Python, ready as soon as it has said where it listens."""

    code: str
    input: bytes = b""
    environment: dict[str, str] = field(default_factory=dict)
    url: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    start_within_s: float = 20.0

    @property
    def command(self) -> tuple[str, ...]:
        return (sys.executable, "-c", self.code)

    async def served_name(self, _session: aiohttp.ClientSession, _url: str) -> str:
        return "script"


def supervise(code: str, *, failures: int) -> tuple[list[ReplicaState], list[float], str]:
    """Run a script under an impatient supervisor until it has failed so often.

    Returns the states it went through, the waits it should have made, and the error of the start.
    """
    states: list[ReplicaState] = []

    def waits() -> list[float]:
        return [state.delay_s for state in states if state.status == "backing off"]

    async def case() -> str:
        async with aiohttp.ClientSession() as session:
            supervisor = Supervisor(
                {"r": Script(code=code)},
                session,
                lambda _, state: states.append(state),
                sleep=lambda _duration_s: asyncio.sleep(0.01),
            )
            try:
                await supervisor.start()
                await until(lambda: len(waits()) >= failures)
            except EngineError as error:
                return str(error)
            finally:
                await supervisor.stop()
        return ""

    error = asyncio.run(case())
    return states, waits(), error


def test_an_engine_that_refuses_to_start_says_its_last_words_once() -> None:
    states, waits, error = supervise("import sys; sys.exit('the weights are haunted')", failures=2)
    assert "replica 'r' failed: exit 1" in error
    assert "the weights are haunted" in error
    assert waits == [], "it would refuse again"
    assert not any(state.reason for state in states)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; print('{\"url\": %d}' % len(sys.stdin.readline()), flush=True); sys.stdin.read()", "1048577"),
        ("import sys; sys.exit('I cannot read')", "I cannot read"),
    ],
)
def test_an_engine_gets_its_input_however_long_it_is_and_need_not_read_it(code: str, said: str) -> None:
    engine = Script(code=code, input=b"x" * 2**20 + b"\n")

    async def case() -> str:
        async with aiohttp.ClientSession() as session:
            supervisor = Supervisor({"r": engine}, session, lambda *_: None)
            try:
                await supervisor.start()
                return supervisor.states["r"].url
            except EngineError as error:
                return str(error)
            finally:
                await supervisor.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert said in runner.run(case())


def test_an_engine_that_is_killed_at_its_start_gets_a_second_chance() -> None:
    _, waits, error = supervise("import os; os.kill(os.getpid(), 9)", failures=2)
    assert "was ended by SIGKILL" in error
    assert waits == [0.5], "there were two attempts"


def test_a_bug_is_a_failure_of_the_engine_that_is_restarted() -> None:
    told: list[str] = []

    @dataclass(frozen=True, kw_only=True)
    class Buggy(Script):
        async def served_name(self, _session: aiohttp.ClientSession, _url: str) -> str:
            if len(told) == 2:  # starting, ready
                raise RuntimeError("a bug")
            return "script"

    def follow(_replica: str, state: ReplicaState) -> None:
        told.append(state.status)
        raise OSError("nobody reads the log")

    async def case() -> None:
        code = 'import time; print(\'{"url": "x"}\', flush=True); time.sleep(60)'
        async with aiohttp.ClientSession() as session:
            supervisor = Supervisor({"r": Buggy(code=code)}, session, follow, sleep=lambda _s: asyncio.sleep(0.01))
            await supervisor.start()
            await until(lambda: len(told) >= 5)
            await supervisor.stop()

    asyncio.run(case())
    assert told[:5] == ["starting", "ready", "backing off", "starting", "ready"]


def test_an_engine_that_hangs_gets_no_work_after_a_miss_and_is_replaced_after_three() -> None:
    async def case() -> tuple[float, float, float]:
        async with served(fake_plan({"chat": 2}, output_tokens=100)) as service:
            states = service.supervisor.states
            chat = service.openai.chat.completions
            pid = states["chat/0"].pid
            assert pid
            os.kill(pid, signal.SIGSTOP)
            begun_s = time.monotonic()
            caught = asyncio.create_task(chat.create(model="chat", messages=QUESTION, max_tokens=2))
            await until(lambda: states["chat/0"].status == "suspect")
            suspect_s = time.monotonic() - begun_s
            for _ in range(3):
                await chat.create(model="chat", messages=QUESTION, max_tokens=2)
            assert {one.replica for one in service.completions} == {"chat/1"}
            async with aiohttp.ClientSession() as session, session.get(f"{service.url}/health") as health:
                assert (await health.json())["models"]["chat"] == {"ready": 1, "total": 2}
            await until(lambda: states["chat/0"].status == "backing off")
            gone_s = time.monotonic() - begun_s
            await caught
            assert service.completions[-1].replica == "chat/1", "it was cut, and moved"
            return suspect_s, gone_s, time.monotonic() - begun_s

    suspect_s, gone_s, moved_s = asyncio.run(case())
    print(f"suspect after {suspect_s:.2f} s, gone after {gone_s:.2f} s, served after {moved_s:.2f} s")
    assert suspect_s < gone_s <= moved_s


def test_an_engine_that_keeps_dying_is_restarted_with_longer_and_longer_waits() -> None:
    states, waits, error = supervise('print(\'{"url": "http://x/v1"}\', flush=True)', failures=4)
    assert (waits, error) == ([0.5, 1.0, 2.0, 4.0], "")
    assert [state.status for state in states[:5]] == ["starting", "ready", "backing off", "starting", "ready"]
    assert states[-1].status == "stopped"


def test_a_process_that_ignores_sigterm_is_killed_after_its_grace() -> None:
    code = 'import signal, time; signal.signal(15, signal.SIG_IGN); print(\'{"url": "x"}\', flush=True); time.sleep(60)'

    async def case() -> float:
        async with aiohttp.ClientSession() as session:
            supervisor = Supervisor({"r": Script(code=code)}, session, lambda *_: None)
            await supervisor.start()
            pid = supervisor.states["r"].pid
            assert pid
            begun_s = time.monotonic()
            await supervisor.stop()
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            return time.monotonic() - begun_s

    assert 0.9 <= asyncio.run(case()) <= 3.0


def test_a_killed_engine_is_restarted_and_requests_wait_for_it() -> None:
    async def case() -> None:
        async with served(fake_plan(ttft_s=60.0)) as service:
            states = service.supervisor.states
            old = states["chat/0"].pid
            assert old
            os.kill(old, signal.SIGSTOP)  # so that it has the request when it dies
            chat = service.openai.chat.completions
            caught = asyncio.create_task(chat.create(model="chat", messages=QUESTION))
            await until(lambda: service.gateway.dispatcher.services["chat"].running == 1)
            os.kill(old, signal.SIGKILL)
            await until(lambda: states["chat/0"].status == "backing off")
            assert "SIGKILL" in states["chat/0"].reason
            async with aiohttp.ClientSession() as session, session.get(f"{service.url}/health") as health:
                assert (health.status, (await health.json())["status"]) == (503, "not ready")
            late = await chat.create(model="chat", messages=QUESTION)
            assert late.choices, "who comes meanwhile waits too"
            assert states["chat/0"].status == "ready"
            assert states["chat/0"].restarts == 1
            assert states["chat/0"].pid != old
            await caught
            assert [one.status for one in service.completions] == ["ok", "ok"]

    asyncio.run(case())


def test_who_cannot_wait_until_a_killed_engine_is_back_is_told_when_to_come_back() -> None:
    async def case() -> tuple[openai.APIStatusError, float]:
        async with served(fake_plan(ttft_s=0.1)) as service:
            pid = service.supervisor.states["chat/0"].pid
            assert pid
            os.kill(pid, signal.SIGKILL)
            await until(lambda: service.supervisor.states["chat/0"].status == "backing off")
            with pytest.raises(openai.APIStatusError) as caught:
                await service.openai.chat.completions.create(model="chat", messages=QUESTION)
            state = service.supervisor.states["chat/0"]
            (told,) = service.completions
            assert (told.status, told.replica, told.prompt_tokens > 0) == ("refused", "", True), "as in a rehearsal"
            return caught.value, state.delay_s + state.load_s

    refused, back_in_s = asyncio.run(case())
    assert refused.status_code == 503
    assert 0.6 < back_in_s < 30.0, "half a second, and what its start took"
    assert 1 <= int(refused.response.headers["retry-after"]) <= math.ceil(back_in_s)
    assert refused.code == "model_not_ready"


def test_while_one_of_two_replicas_is_down_the_other_serves() -> None:
    async def case() -> None:
        async with served(fake_plan({"chat": 2})) as service:
            pid = service.supervisor.states["chat/0"].pid
            assert pid
            os.kill(pid, signal.SIGKILL)  # noticed by nobody yet: the first requests find out
            for _ in range(4):
                await service.openai.chat.completions.create(model="chat", messages=QUESTION, max_tokens=2)
            assert {one.status for one in service.completions} == {"ok"}
            assert {one.replica for one in service.completions} == {"chat/1"}

    asyncio.run(case())


def test_an_attached_server_that_is_down_is_waited_for_and_holds_nobody_up() -> None:
    plan = fake_plan(engine="openai", urls=("http://127.0.0.1:1/v1",))

    async def case() -> None:
        async with served(plan) as service:  # which starts
            told: set[str] = set()

            def state() -> ReplicaState:
                told.add(service.supervisor.states["chat/0"].status)
                return service.supervisor.states["chat/0"]

            assert state().reason == "http://127.0.0.1:1/v1 does not answer: connection refused."
            await until(lambda: state().restarts == 2)
            assert told == {"backing off"}, "nothing starts: it is asked again"

    asyncio.run(case())


def test_an_attached_server_gets_its_own_key_and_never_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str | None] = []

    async def models(request: web.Request) -> web.StreamResponse:
        keys.append(request.headers.get("authorization"))
        return web.json_response({"data": [{"id": "chat"}]})

    async def answers(request: web.Request) -> web.StreamResponse:
        keys.append(request.headers.get("authorization"))
        return web.json_response({})

    async def case() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", models)
        app.router.add_post("/v1/chat/completions", answers)
        async with TestServer(app) as server:
            plan = fake_plan(engine="openai", urls=(str(server.make_url("/v1")),))
            for variable in ("", "THE_KEY"):
                model = replace(plan.fleet.models[0], api_key_env=variable)
                keyed = replace(plan, fleet=replace(plan.fleet, models=(model,)))
                if variable:
                    with pytest.raises(EngineError, match="export THE_KEY="):
                        prepare_engines(keyed)
                    monkeypatch.setenv("THE_KEY", "secret")
                async with served(keyed) as service:
                    await service.openai.chat.completions.create(model="chat", messages=QUESTION)

    asyncio.run(case())
    assert keys == [None, None, "Bearer secret", "Bearer secret"]


def test_attaching_to_a_server_of_other_models_names_them() -> None:
    async def models(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"data": [{"id": "a"}, {"id": "b"}]})

    async def case() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", models)
        async with TestServer(app) as server, aiohttp.ClientSession() as session:
            attached = Attached(url=str(server.make_url("/v1")), name="chat")
            with pytest.raises(NotReadyError, match="serves a, b, none called 'chat'"):
                await attached.served_name(session, attached.url)

    asyncio.run(case())
