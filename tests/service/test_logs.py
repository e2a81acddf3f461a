"""What the log says, to people and to machines, and what it never says."""

import asyncio
import io
import json
from collections.abc import Iterator

import aiohttp
import pytest
import structlog
from serving import fake_plan, served

from waterline.outcome import Completion
from waterline.service.logs import MOST_A_SECOND, FailureLog, about_request, log_to

SECRET = "the prompt of a client"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    about_request("")


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def failed(**changes: object) -> Completion:
    fields: dict[str, object] = {
        "tenant": "public", "model": "chat", "replica": "chat/0", "status": "failed", "arrival_s": 1.0,
        "first_token_s": 1.5, "finish_s": 3.0, "prompt_tokens": 10, "output_tokens": 7, "reason": "The engine broke off.",
    }  # fmt: skip
    return Completion(**{**fields, **changes})  # type: ignore[arg-type]


def test_machines_get_one_object_a_line_with_its_time_first() -> None:
    stream = io.StringIO()
    log_to(stream, terminal=False)
    structlog.get_logger().info("replica", id="chat/0", status="ready")
    (line,) = lines(stream)
    assert list(line) == ["at", "level", "event", "id", "status"]
    assert str(line["at"]).endswith("Z")
    assert (line["level"], line["event"], line["id"]) == ("info", "replica", "chat/0")


def test_people_get_text() -> None:
    stream = io.StringIO()
    log_to(stream, terminal=True)
    structlog.get_logger().warning("replica", id="chat/0")
    assert "chat/0" in stream.getvalue()
    assert "{" not in stream.getvalue()


def test_every_line_about_a_request_has_its_id_and_no_other_line_has() -> None:
    stream = io.StringIO()
    log_to(stream, terminal=False)
    failures = FailureLog()

    async def handle(number: int) -> None:
        about_request(f"request-{number}")
        await asyncio.sleep(0.01)
        failures.note(failed(tenant=f"tenant-{number}"))

    async def case() -> None:
        await asyncio.gather(*(asyncio.create_task(handle(number)) for number in range(5)))
        structlog.get_logger().info("replica", id="chat/0")

    asyncio.run(case())
    *about, replica = lines(stream)
    assert {str(line["request_id"]).split("-")[1] == str(line["tenant"]).split("-")[1] for line in about} == {True}
    assert len(about) == 5
    assert "request_id" not in replica


def test_a_failure_says_who_where_and_why_and_the_others_say_nothing() -> None:
    stream = io.StringIO()
    log_to(stream, terminal=False)
    failures = FailureLog()
    for status in ("ok", "refused", "cancelled"):
        failures.note(failed(status=status))
    failures.note(failed(reason="x" * 1000))
    (line,) = lines(stream)
    assert (line["tenant"], line["model"], line["replica"], line["after_s"]) == ("public", "chat", "chat/0", 2.0)
    assert line["reason"] == "x" * 300


def test_a_flood_of_failures_is_five_lines_a_second_and_how_many_more_there_were() -> None:
    stream, clock_s = io.StringIO(), 7.2
    log_to(stream, terminal=False)
    failures = FailureLog(clock=lambda: clock_s)
    for _ in range(1000):
        failures.note(failed())
    clock_s = 8.0
    failures.note(failed())
    failures.note(failed())
    told = lines(stream)
    assert len(told) == MOST_A_SECOND + 2
    assert [line.get("more_before") for line in told[-3:]] == [None, 1000 - MOST_A_SECOND, None]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bug_shows_its_code_and_nothing_that_was_sent(terminal: bool) -> None:
    stream = io.StringIO()
    log_to(stream, terminal=terminal)

    async def case() -> None:
        async with served(fake_plan()) as service, aiohttp.ClientSession() as session:
            service.gateway.dispatcher.enter = lambda *_, **__: 1 / 0  # type: ignore[method-assign, return-value, assignment, misc]
            body = {"model": "chat", "messages": [{"role": "user", "content": SECRET}]}
            async with session.post(f"{service.url}/v1/chat/completions", json=body) as reply:
                assert reply.status == 500

    asyncio.run(case())
    assert "ZeroDivisionError" in stream.getvalue()
    assert "in _take_in" in stream.getvalue()
    assert SECRET not in stream.getvalue()
