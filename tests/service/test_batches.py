"""Batches as clients meet them: the official `openai` package against a real service with fake engines and a ledger."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web
from openai.types import Batch
from serving import Served, engine_that, fake_plan, served, until
from sqlalchemy import text

from waterline.ledger import Ledger, files, utc_us
from waterline.ledger.files import Batch as Batch_
from waterline.ledger.files import Client
from waterline.plan import Plan
from waterline.service import batch_routes
from waterline.service.asgi import Reply
from waterline.service.batches import _Run, request_id
from waterline.service.completions import Request

CHAT = "/v1/chat/completions"
DAY_US = 86_400_000_000


def request(number: int, **body: Any) -> dict[str, Any]:
    said = {"model": "chat", "messages": [{"role": "user", "content": f"{number}?"}], "max_tokens": 3, **body}
    return {"custom_id": f"mine-{number}", "method": "POST", "url": CHAT, "body": said}


def jsonl(*lines: Any) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@asynccontextmanager
async def offered(plan: Plan, folder: Path, **options: Any) -> AsyncIterator[tuple[Served, Ledger]]:
    with Ledger.open(str(folder / "ledger.db")) as ledger:
        async with served(plan, ledger=ledger, **options) as service:
            yield service, ledger


async def begin(service: Served, content: bytes, **options: Any) -> Batch:
    file = await service.openai.files.create(file=("in.jsonl", content), purpose="batch")
    return await service.openai.batches.create(
        input_file_id=file.id, endpoint=options.pop("endpoint", CHAT), completion_window="24h", **options
    )


async def ended(service: Served, batch_id: str, within_s: float = 20.0) -> Batch:
    async with asyncio.timeout(within_s):
        while True:
            batch = await service.openai.batches.retrieve(batch_id)
            if batch.status in {"completed", "failed", "expired", "cancelled"}:
                return batch
            await asyncio.sleep(0.05)


async def has_ended(service: Served, batch_id: str, requests: int) -> None:
    async with asyncio.timeout(20):
        while True:
            batch = await service.openai.batches.retrieve(batch_id)
            if batch.request_counts and batch.request_counts.completed >= requests:
                return
            await asyncio.sleep(0.01)


async def lines_of(service: Served, file_id: str | None) -> list[dict[str, Any]]:
    if not file_id:
        return []
    content = await service.openai.files.content(file_id)
    return [json.loads(line) for line in content.read().splitlines()]


def charged(ledger: Ledger) -> list[tuple[str, str, int]]:
    with ledger.engine.connect() as connection:
        rows = connection.execute(text("SELECT id, outcome, output_tokens FROM completions ORDER BY id"))
        return [(row[0], row[1], row[2]) for row in rows]


def test_a_batch_answers_each_line_once_in_the_order_of_its_input_and_charges_it(tmp_path: Path) -> None:
    async def case() -> None:
        async with offered(fake_plan({"chat": 2}), tmp_path) as (service, ledger):
            wrong = request(3, model="nobody")
            begun = await begin(
                service, jsonl(*(request(number) for number in range(3)), wrong, *(request(n) for n in range(4, 40))),
                metadata={"for": "a test"},
            )  # fmt: skip
            assert (begun.object, begun.status, begun.metadata) == ("batch", "validating", {"for": "a test"})
            done = await ended(service, begun.id)
            assert done.status == "completed"
            assert done.request_counts
            assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (40, 39, 1)
            assert done.completed_at
            assert done.in_progress_at
            assert done.created_at <= done.in_progress_at <= done.completed_at
            good, bad = await lines_of(service, done.output_file_id), await lines_of(service, done.error_file_id)
            assert [line["custom_id"] for line in good] == [f"mine-{n}" for n in range(40) if n != 3]
            assert all(line["response"]["status_code"] == 200 and line["error"] is None for line in good)
            assert all(line["response"]["body"]["usage"]["completion_tokens"] == 3 for line in good)
            (line,) = bad
            assert (line["custom_id"], line["response"]["status_code"]) == ("mine-3", 404)
            assert line["response"]["body"]["error"]["code"] == "model_not_found"
            assert charged(ledger) == [(request_id(done.id, n), "ok", 3) for n in range(40) if n != 3]
            assert len({line["id"] for line in good + bad}) == 40

    asyncio.run(case())


def test_files_are_kept_listed_sent_back_and_deleted(tmp_path: Path) -> None:
    async def case() -> None:
        async with offered(fake_plan(), tmp_path, start=False) as (service, _):
            api = service.openai.files
            content = jsonl(*(request(number) for number in range(5000)))
            kept = [await api.create(file=(f'{n} ä"\r\n.jsonl', content), purpose="batch") for n in range(3)]
            assert (kept[0].bytes, kept[0].purpose, kept[0].object) == (len(content), "batch", "file")
            assert '"' not in kept[0].filename
            assert (await api.content(kept[0].id)).read() == content
            assert [file.id async for file in api.list()] == [file.id for file in reversed(kept)]
            first = await api.list(limit=2)
            assert (len(first.data), first.has_more) == (2, True)
            assert [file.id async for file in api.list(limit=1, order="asc")] == [file.id for file in kept]
            assert (await api.delete(kept[0].id)).deleted
            with pytest.raises(openai.NotFoundError, match="You have no file"):
                await api.retrieve(kept[0].id)

    asyncio.run(case())


def test_what_cannot_be_a_batch_is_told_line_by_line(tmp_path: Path) -> None:
    async def case() -> None:
        async with offered(fake_plan(), tmp_path, start=False) as (service, ledger):
            content = b"{\n" + jsonl(
                request(1),
                request(1),
                {**request(2), "method": "GET"},
                {**request(3), "url": "/v1/embeddings"},
                {**request(4), "body": []},
                request(5, stream=True),
                {**request(6), "custom_id": ""},
                [1],
            )
            done = await ended(service, (await begin(service, content)).id)
            assert done.status == "failed"
            assert done.errors
            assert done.errors.data
            assert [(error.line, error.code) for error in done.errors.data] == [
                (1, "invalid_json_line"),
                (3, "duplicate_custom_id"),
                (4, "invalid_method"),
                (5, "mismatched_endpoint"),
                (6, "missing_body"),
                (7, "stream_not_supported"),
                (8, "missing_custom_id"),
                (9, "invalid_json_line"),
            ]
            assert charged(ledger) == []
            empty = await ended(service, (await begin(service, b"\n \n")).id)
            assert empty.errors
            assert empty.errors.data
            assert empty.errors.data[0].code == "empty_file"

    asyncio.run(case())


def test_wrong_requests_are_refused_in_openais_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_routes, "MOST_BYTES", 1000)
    monkeypatch.setattr(batch_routes, "FORM_BYTES", 1000)
    monkeypatch.setattr(batch_routes, "MOST_KEPT_BYTES", 1500)

    async def case() -> None:
        async with offered(fake_plan(), tmp_path, start=False) as (service, _):
            files_, batches_ = service.openai.files, service.openai.batches
            with pytest.raises(openai.BadRequestError, match="'purpose' of a file must be 'batch'"):
                await files_.create(file=("a", b"{}"), purpose="fine-tune")
            with pytest.raises(openai.APIStatusError, match="more than 2,000 bytes") as caught:
                await files_.create(file=("a", b"x" * 5000), purpose="batch")
            assert caught.value.status_code == 413
            kept = await files_.create(file=("a", b"x" * 900), purpose="batch")
            with pytest.raises(openai.APIStatusError, match="Delete files you no longer need") as caught:
                await files_.create(file=("b", b"x" * 900), purpose="batch")
            assert caught.value.status_code == 413
            with pytest.raises(openai.NotFoundError, match="You have no file 'file-none'"):
                await batches_.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
            with pytest.raises(openai.BadRequestError, match="There are no batches for /v1/images"):
                await batches_.create(input_file_id=kept.id, endpoint="/v1/images", completion_window="24h")  # type: ignore[arg-type]
            with pytest.raises(openai.BadRequestError, match="24h|enum"):
                await batches_.create(input_file_id=kept.id, endpoint=CHAT, completion_window="1h")  # type: ignore[arg-type]
            with pytest.raises(openai.NotFoundError, match="You have no batch"):
                await batches_.retrieve("batch_none")

    asyncio.run(case())


def test_who_has_no_key_gets_none_of_it_where_others_can_come(tmp_path: Path) -> None:
    async def case() -> None:
        async with offered(fake_plan(), tmp_path, start=False) as (service, ledger):
            api = batch_routes.BatchApi(ledger.engine, service.gateway.access, lambda: None, nameless=False)
            service.gateway.mount("/v1/files", api.app)
            with pytest.raises(openai.AuthenticationError, match="need a key"):
                await service.openai.files.list()
            for_us = batch_routes.BatchApi(ledger.engine, service.gateway.access, lambda: None, nameless=True)
            service.gateway.mount("/v1/files", for_us.app)
            assert (await service.openai.files.list()).data == []
            with pytest.raises(openai.AuthenticationError, match="need a key"):
                await service.openai.files.list(extra_headers={"x-forwarded-for": "203.0.113.7"})

    asyncio.run(case())


def test_a_client_does_not_see_what_another_has(tmp_path: Path) -> None:
    with Ledger.open(str(tmp_path / "ledger.db")) as ledger:
        alice, bob = Client(tenant="public", client="alice"), Client(tenant="public", client="bob")
        file = files.add_file(ledger.engine, alice, "batch", "a", [b"{}"])
        batch = files.add_batch(
            ledger.engine, alice, key_id="", endpoint=CHAT, input_file_id=file.id, metadata={}, for_s=60.0
        )
        for whose, sees in ((alice, True), (bob, False), (Client(tenant="research", client="alice"), False)):
            assert (files.find_file(ledger.engine, whose, file.id) is not None) == sees
            assert (files.find_batch(ledger.engine, batch.id, whose) is not None) == sees
            assert bool(files.list_files(ledger.engine, whose, "", "", 9, newest_first=True)) == sees
            assert bool(files.list_batches(ledger.engine, whose, "", 9)) == sees
            assert (files.cancel_batch(ledger.engine, whose, batch.id) is not None) == sees
        assert not files.delete_file(ledger.engine, bob, file.id)
        assert files.delete_file(ledger.engine, alice, file.id)


def test_a_cancelled_batch_keeps_what_it_has_and_says_so_of_the_rest(tmp_path: Path) -> None:
    async def case() -> None:
        async with offered(fake_plan({"chat": 1}, max_batch=2, output_tokens=30), tmp_path) as (service, _):
            begun = await begin(service, jsonl(*(request(number, max_tokens=30) for number in range(60))))
            with pytest.raises(openai.ConflictError, match="still reads this file"):
                await service.openai.files.delete(begun.input_file_id)
            await has_ended(service, begun.id, 5)
            assert (await service.openai.batches.cancel(begun.id)).status == "cancelling"
            done = await ended(service, begun.id)
            assert done.status == "cancelled"
            good, bad = await lines_of(service, done.output_file_id), await lines_of(service, done.error_file_id)
            assert len(good) >= 5
            assert Counter(line["custom_id"] for line in good + bad) == Counter(f"mine-{n}" for n in range(60))
            assert {line["error"]["code"] for line in bad} == {"batch_cancelled"}
            with pytest.raises(openai.ConflictError, match="is cancelled already"):
                await service.openai.batches.cancel(begun.id)

    asyncio.run(case())


def test_what_is_not_answered_within_its_window_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_routes, "WINDOW_S", 1.0)

    async def case() -> None:
        async with offered(fake_plan({"chat": 1}, max_batch=1, output_tokens=300), tmp_path) as (service, _):
            begun = await begin(service, jsonl(*(request(number, max_tokens=300) for number in range(20))))
            done = await ended(service, begun.id)
            assert done.status == "expired"
            good, bad = await lines_of(service, done.output_file_id), await lines_of(service, done.error_file_id)
            assert len(good) + len(bad) == 20
            assert {line["error"]["code"] for line in bad} == {"batch_expired"}

    asyncio.run(case())


def test_a_batch_waits_for_a_model_that_is_not_ready(tmp_path: Path) -> None:
    async def case() -> None:
        async with offered(fake_plan(), tmp_path, start=False) as (service, ledger):
            begun = await begin(service, jsonl(*(request(number) for number in range(5))))
            await asyncio.sleep(0.5)
            assert (await service.openai.batches.retrieve(begun.id)).status == "in_progress"
            await service.supervisor.start()
            done = await ended(service, begun.id)
            assert done.request_counts
            assert done.request_counts.completed == 5
            assert {outcome for _, outcome, _ in charged(ledger)} == {"ok"}, "whatever was refused before"

    asyncio.run(case())


def test_people_do_not_wait_for_a_batch(tmp_path: Path) -> None:
    async def case() -> None:
        plan = fake_plan({"chat": 1}, max_batch=10, output_tokens=60)
        async with offered(plan, tmp_path) as (service, _):
            begun = await begin(service, jsonl(*(request(number, max_tokens=60) for number in range(200))))
            model = service.gateway.dispatcher.services["chat"]
            await until(lambda: model.running >= 9)
            most = 0
            for _ in range(10):
                most = max(most, model.running)
                reply = await service.openai.chat.completions.with_raw_response.create(
                    model="chat", messages=[{"role": "user", "content": "?"}], max_tokens=2
                )
                assert reply.status_code == 200
                assert model.waiting == 0, "a slot is kept free"
            assert most <= 10
            assert (await service.openai.batches.cancel(begun.id)).status == "cancelling"
            await ended(service, begun.id)

    asyncio.run(case())


def test_as_demand_a_batch_is_one_request_at_a_time_until_it_is_late() -> None:
    async def counted(passed_h: float, ok: int) -> list[bool]:
        seen: list[bool] = []
        answered = asyncio.Event()

        async def submit(request: Request, reply: Reply) -> None:
            assert request.spare
            seen.append(request.counts)
            await answered.wait()
            await reply.whole(200, b"{}", [])

        created_us = utc_us() - round(passed_h * 3.6e9)
        batch = Batch_(
            id="batch_1", tenant="public", client="alice", key_id="", endpoint=CHAT, input_file_id="", ok=ok,
            status="in_progress", metadata={}, requests=100, created_us=created_us, expires_us=created_us + DAY_US,
        )  # fmt: skip
        run = _Run(None, batch, submit, lambda _model: 9, Counter())
        asking = [asyncio.create_task(run._ask(number, request(number))) for number in range(3)]
        await until(lambda: len(seen) == 3)
        answered.set()
        await asyncio.gather(*asking)
        await run._ask(3, request(3))
        return seen

    assert asyncio.run(counted(0.9, ok=0)) == [True, False, False, True], "the first hour is not judged"
    assert asyncio.run(counted(12.0, ok=51)) == [True, False, False, True], "it will be done in time"
    assert asyncio.run(counted(12.0, ok=49)) == [True] * 4


FLEET = """
name = "batches-{mark}"

[[pools]]
name = "box"
gpu = "cpu"

[[models]]
name = "chat"
weights = "waterline/abacus"
engine = "fake"

[[demand]]
requests_per_s = 0.5
prompt_tokens = 10
output_tokens = 40
"""


def test_a_killed_service_goes_on_with_its_batches_and_charges_nothing_twice(tmp_path: Path) -> None:
    fleet, ledger = tmp_path / "fleet.toml", tmp_path / "ledger.db"
    fleet.write_text(FLEET.format(mark=tmp_path.name))
    count, tokens = 80, 40

    async def case() -> None:
        batch_id, before = "", 0
        for end in (10, count):
            async with up(fleet, ledger) as (process, client):
                if not batch_id:
                    content = jsonl(*(request(number, max_tokens=tokens) for number in range(count)))
                    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
                    batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
                    batch_id = batch.id
                async with asyncio.timeout(60):
                    while (done := await client.batches.retrieve(batch_id)).status != "completed":
                        assert done.request_counts
                        assert done.request_counts.completed >= before, "what it has it keeps"
                        if end < count and done.request_counts.completed >= end:
                            before = done.request_counts.completed
                            break
                        await asyncio.sleep(0.01)
                if end < count:
                    process.kill()
                    process.wait(10)
                    continue
                assert done.output_file_id
                lines = (await client.files.content(done.output_file_id)).read().splitlines()
                assert [json.loads(line)["custom_id"] for line in lines] == [
                    f"mine-{number}" for number in range(count)
                ]

        with Ledger.open(str(ledger)) as opened:
            assert charged(opened) == [(request_id(batch_id, number), "ok", tokens) for number in range(count)]

    asyncio.run(case())


@asynccontextmanager
async def up(fleet: Path, ledger: Path) -> AsyncIterator[tuple["subprocess.Popen[str]", openai.AsyncOpenAI]]:
    """Run `waterline up` for the block; at its end it is killed."""
    command = [sys.executable, "-m", "waterline", "up", str(fleet), "--port", "0", "--json", "--ledger", str(ledger)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # noqa: ASYNC220 - it takes no time
    try:
        assert process.stdout
        said = json.loads(await asyncio.to_thread(process.stdout.readline) or '{"url": "it did not start"}')
        async with openai.AsyncOpenAI(base_url=said["url"], api_key="none", max_retries=0) as client:
            yield process, client
    finally:
        process.kill()
        process.wait(10)
        assert process.stdout
        process.stdout.close()


def test_an_engine_that_fails_is_asked_again_and_then_told_of(tmp_path: Path) -> None:
    asked: Counter[str] = Counter()

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        said = body["messages"][0]["content"]
        asked[said] += 1
        if said == "1?" or (said == "2?" and asked[said] <= 2):
            return web.json_response({"error": {"message": "boom"}}, status=500)
        if said == "3?":
            return web.json_response({"error": {"message": "no such thing", "code": "odd"}}, status=400)
        usage = {"prompt_tokens": 4, "completion_tokens": 2}
        return web.json_response({"id": "x", "choices": [{"message": {"content": "line\nbreak"}}], "usage": usage})

    async def case() -> None:
        async with (
            engine_that(answer) as url,
            offered(fake_plan(engine="openai", urls=(url,)), tmp_path) as (service, ledger),
        ):
            begun = await begin(service, jsonl(*(request(number) for number in range(4))))
            done = await ended(service, begun.id, 30)
            good, bad = await lines_of(service, done.output_file_id), await lines_of(service, done.error_file_id)
            assert [line["custom_id"] for line in good] == ["mine-0", "mine-2"]
            assert [(line["custom_id"], line["response"]["status_code"]) for line in bad] == [
                ("mine-1", 502),
                ("mine-3", 400),
            ]
            outcomes = {request: outcome for request, outcome, _ in charged(ledger)}
            assert outcomes[request_id(done.id, 2)] == "ok"
            assert len(outcomes) == 4

    asyncio.run(case())
