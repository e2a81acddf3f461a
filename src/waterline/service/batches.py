"""Batches: thousands of requests in a file, answered within a day, at the pace that nobody notices.

A batch gives way to everybody else. Its requests come after those of all tenants, its own included, and what they use
is on an account of their own, so that nobody's requests are worse off for them. Beyond one request at a time of each
client it takes only slots that are free, and leaves some of those to who comes next. As demand, for which GPUs are
moved, it counts as one request at a time; only one that will not be done in time at its pace counts in full. What it
has is in the database, a line for each request that has ended, so that it goes on after a kill where it was.

Each line is charged once and answered once. Its request has one id for all attempts, and the ledger keeps one row for
an id: an attempt that does not end well is settled as interrupted, and gives way to the next. The line is written when
that row is on the disk; was the gateway killed in between, the request is asked once more, and not charged again.

Several gateways may share a database: each batch is run by one of them, and by another when that one is dead.
"""

import asyncio
from asyncio import Future, Task
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import orjson
import structlog

from waterline.errors import LedgerError, WaterlineError
from waterline.ledger import Key, Ledger, files, read_keys, utc_us
from waterline.ledger.files import Batch, BatchStatus, Line
from waterline.service.access import Caller
from waterline.service.asgi import Message, Reply
from waterline.service.books import OVER_QUOTA
from waterline.service.completions import Request
from waterline.service.dispatcher import Dispatcher
from waterline.service.errors import RejectedError, error_json, http_status
from waterline.service.logs import about_request
from waterline.snapshot import BatchNow
from waterline.units import DAY_S, MEGA

WINDOW_S = float(DAY_S)
MOST_REQUESTS = 50_000  # of a batch, as OpenAI has it
MOST_ERRORS = 100  # about an input that are told
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
AT_ONCE = 256  # requests of a batch under way, at most
KEPT_FREE = 0.1  # of a model's slots, for requests of people
UNHURRIED_S = WINDOW_S / 24  # in which the pace of a batch is not judged
LOOK_S = 2.0  # between looks for batches to run
LOOK_FOR_ROOM_S = 0.2
READ_TOGETHER = 200  # lines
ATTEMPTS = 3  # at a request that engines fail
LONGEST_PAUSE_S = 60.0

log = structlog.get_logger()

Asking = Counter[tuple[str, str, str]]  # requests under way, of all batches, by tenant, client and model
Submit = Callable[[Request, Reply], Awaitable["Future[None] | None"]]


class Runner:
    """Runs the batches of a database that nobody else runs.

    Args:
        ledger: where they are.
        submit: answers one request, see `Completions.submit`.
        room: returns how many requests to a model could begin now without anybody's waiting for it.
    """

    def __init__(self, ledger: Ledger, submit: Submit, room: Callable[[str], int]) -> None:
        self._engine, self._owner = ledger.engine, ledger.owner
        self._submit = submit
        self._room = room
        self._news = asyncio.Event()
        self._runs: dict[str, tuple[_Run, Task[None]]] = {}
        self._asking: Asking = Counter()

    def wake(self) -> None:
        """Say that there is a new batch, or one to cancel."""
        self._news.set()

    def now(self) -> tuple[BatchNow, ...]:
        """Return what it runs, as it was at the last look."""
        now_us = utc_us()
        batches = [run.batch for run, task in self._runs.values() if not task.done()]
        return tuple(
            BatchNow(
                id=batch.id,
                tenant=batch.tenant,
                client=batch.client,
                status=batch.status,
                requests=batch.requests,
                ended=batch.ok + batch.not_ok,
                left_s=max(0.0, (batch.expires_us - now_us) / MEGA),
            )
            for batch in batches
        )

    async def run(self) -> None:
        """Run batches until this is cancelled; what is under way then is left to who comes next."""
        problem = ""
        try:
            with suppress(LedgerError):
                await asyncio.to_thread(files.sweep, self._engine)
            while True:
                try:
                    await self._look()
                    problem = ""
                except LedgerError as error:
                    if problem != str(error):  # it is said once
                        problem = str(error)
                        log.warning("batches", error=problem)
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._news.wait()
                self._news.clear()
        finally:
            tasks = [task for _, task in self._runs.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        claimed = await asyncio.to_thread(files.claim_batches, self._engine, self._owner)
        mine = {batch.id: batch for batch in claimed}
        keys = {key.id: key for key in await asyncio.to_thread(read_keys, self._engine)} if mine else {}
        for batch_id, (_, task) in list(self._runs.items()):
            if task.done():
                del self._runs[batch_id]
        for batch_id, batch in mine.items():
            key = keys.get(batch.key_id)
            if batch_id not in self._runs:
                one = _Run(self._engine, batch, self._submit, self._room, self._asking)
                self._runs[batch_id] = one, asyncio.create_task(one.run())
            self._runs[batch_id][0].update(batch, key)


class _Run:
    """One batch, while this gateway runs it."""

    def __init__(self, engine: Any, batch: Batch, submit: Submit, room: Callable[[str], int], asking: Asking) -> None:
        self._engine = engine
        self.batch = batch
        self._submit = submit
        self._room = room
        self._asking = asking
        self._counted = False  # one of its requests is demand now
        self._key: Key | None = None
        self._ending = asyncio.Event()  # cancelled or expired

    def update(self, batch: Batch, key: Key | None) -> None:
        """Take notice of what may have changed: it is cancelled, or its key revoked."""
        self.batch, self._key = batch, key
        if batch.status == "cancelling" or utc_us() > batch.expires_us:
            self._ending.set()

    async def run(self) -> None:
        try:
            await self._through()
        except LedgerError as error:  # the next look begins again
            log.warning("batch", id=self.batch.id, error=str(error))
        except Exception:
            log.exception("a bug in a batch", id=self.batch.id)
            await asyncio.sleep(LONGEST_PAUSE_S)

    async def _through(self) -> None:
        """Take the batch from where it is to its end."""
        batch = self.batch
        if batch.status == "validating":
            requests, errors = await asyncio.to_thread(check_input, self._engine, batch)
            if errors:
                await asyncio.to_thread(files.fail_batch, self._engine, batch.id, errors)
                return
            await asyncio.to_thread(files.begin_batch, self._engine, batch.id, requests)
        if batch.requests or batch.status != "cancelling":  # else it was cancelled before it was read
            await self._ask_all()
        ended: BatchStatus = "completed"
        if self._ending.is_set():
            ended = "cancelled" if self.batch.status == "cancelling" else "expired"
            await self._give_up(ended)
        else:
            await asyncio.to_thread(files.finalize_batch, self._engine, batch.id)
        await asyncio.to_thread(files.finish_batch, self._engine, batch.id, ended)
        log.info("batch", id=batch.id, status=ended)

    async def _ask_all(self) -> None:
        """Ask for every line that has not ended, as fast as there is room, until all have or the batch is to end."""
        done = await asyncio.to_thread(files.ended_lines, self._engine, self.batch.id)
        asking: set[Task[Line]] = set()
        try:
            async for number, text in self._lines():
                if number in done:
                    continue
                item = orjson.loads(text)
                while not self._ending.is_set() and not self._may_begin(item["body"]["model"], len(asking)):
                    asking = await self._gather(asking, LOOK_FOR_ROOM_S)
                if self._ending.is_set():
                    break
                asking.add(asyncio.create_task(self._ask(number, item)))
                await asyncio.sleep(0)  # it takes its place, and the next one sees that
            while asking and not self._ending.is_set():
                asking = await self._gather(asking, LOOK_FOR_ROOM_S)
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    def _may_begin(self, model: str, under_way: int) -> bool:
        return under_way < AT_ONCE and (not self._asking[self._place(model)] or self._room(model) > 0)

    def _place(self, model: str) -> tuple[str, str, str]:
        return self.batch.tenant, self.batch.client, model

    def _is_late(self) -> bool:
        """Whether it will not be done in time at the pace that it has had."""
        batch = self.batch
        passed_us = utc_us() - batch.created_us
        due = batch.requests * passed_us / (batch.expires_us - batch.created_us)
        return passed_us > UNHURRIED_S * MEGA and batch.ok + batch.not_ok < due

    async def _gather(self, asking: set[Task[Line]], within_s: float) -> set[Task[Line]]:
        """Wait for requests to end, and keep their lines; return those that go on."""
        if utc_us() > self.batch.expires_us:
            self._ending.set()
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait({*asking, ending}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        ended = {task for task in asking if task.done()}
        ending.cancel()
        lines = [task.result() for task in ended]
        if lines:
            await asyncio.to_thread(files.add_lines, self._engine, self.batch.id, lines)
        return asking - ended

    async def _give_up(self, why: BatchStatus) -> None:
        """Write a line for each request that has not ended."""
        said = {
            "cancelled": ("batch_cancelled", "This request was not answered before the batch was cancelled."),
            "expired": ("batch_expired", "This request was not answered before the completion window expired."),
        }[why]
        error = orjson.dumps({"code": said[0], "message": said[1]})
        done = await asyncio.to_thread(files.ended_lines, self._engine, self.batch.id)
        lines: list[Line] = []
        async for number, text in self._lines():
            if number not in done:
                lines.append(self._line(number, orjson.loads(text), ok=False, error=error))
            if len(lines) >= READ_TOGETHER:
                await asyncio.to_thread(files.add_lines, self._engine, self.batch.id, lines)
                lines = []
        await asyncio.to_thread(files.add_lines, self._engine, self.batch.id, lines)

    async def _lines(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield the lines of the input with their numbers, read some at a time."""
        reading = enumerate(files.read_lines(self._engine, self.batch.input_file_id))
        while some := await asyncio.to_thread(lambda: list(islice(reading, READ_TOGETHER))):
            for numbered in some:
                yield numbered

    # --- One request ------------------------------------------------------------------------------------------------

    async def _ask(self, number: int, item: dict[str, Any]) -> Line:
        """Ask until there is an answer, good or bad, however long a model has to load or others go first."""
        about_request(request_id(self.batch.id, number))
        place = self._place(item["body"]["model"])
        self._asking[place] += 1
        counts, self._counted = not self._counted, True
        try:
            return await self._ask_again_and_again(number, item, counts=counts)
        finally:
            self._asking[place] -= 1
            self._counted = self._counted and not counts

    async def _ask_again_and_again(self, number: int, item: dict[str, Any], *, counts: bool) -> Line:
        attempt, pause_s = 0, 1.0
        while True:
            answer = _Answer()
            try:
                request = self._request(number, item, counts=counts or self._is_late())
                settled = await self._submit(request, Reply(answer.send))
                status, body = answer.status, bytes(answer.body)
                if settled:
                    await settled
                if status == 200:
                    return self._line(number, item, ok=True, status=status, body=body)
            except WaterlineError as error:
                status, body = http_status(error), error_json(error)
                attempt += status >= 500 and status != 503
                if not _is_worth_another_try(error, status) or attempt >= ATTEMPTS:
                    return self._line(number, item, ok=False, status=status, body=body)
            await self._pause(item["body"]["model"], pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _pause(self, model: str, longest_s: float) -> None:
        """Wait before another try; no longer than until there is room, where there was none."""
        had_room, waited_s = self._room(model) > 0, 0.0
        while waited_s < longest_s and (had_room or self._room(model) <= 0):
            await asyncio.sleep(LOOK_FOR_ROOM_S)
            waited_s += LOOK_FOR_ROOM_S

    def _request(self, number: int, item: dict[str, Any], *, counts: bool) -> Request:
        """Return a request. Raises RejectedError when its key is no longer good."""
        batch, key = self.batch, self._key
        if batch.key_id and (not key or key.revoked_us is not None):
            raise RejectedError("The key of this batch has been revoked.", status=401, code="invalid_api_key")
        return Request(
            endpoint=batch.endpoint.removeprefix("/v1"),
            body=orjson.dumps(item["body"]),
            caller=Caller(tenant=batch.tenant, client=batch.client, line=f"{batch.client}: batches", key=key),
            id=request_id(batch.id, number),
            wait_s=max(1.0, (batch.expires_us - utc_us()) / MEGA),
            again=True,
            spare=True,
            counts=counts,
        )

    def _line(
        self, number: int, item: dict[str, Any], *, ok: bool, status: int = 0, body: bytes = b"", error: bytes = b"null"
    ) -> Line:
        """Return a line of the output or the error file."""
        said = {
            "id": f"batch_req_{request_id(self.batch.id, number).removeprefix('batch_')}",
            "custom_id": item["custom_id"],
            "response": {
                "status_code": status,
                "request_id": request_id(self.batch.id, number),
                "body": orjson.loads(body),
            }
            if body
            else None,
            "error": orjson.loads(error),
        }
        return Line(number=number, ok=ok, line=orjson.dumps(said))


class _Answer:
    """Catches what would go to a client."""

    def __init__(self) -> None:
        self.status = 0
        self.body = bytearray()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message.get("body", b"")


def request_id(batch_id: str, number: int) -> str:
    """Return what the ledger calls the request of a line, at every attempt."""
    return f"{batch_id}-{number:06d}"


def spare_slots(dispatcher: Dispatcher, model: str) -> int:
    """Return how many requests of a batch may begin: slots that are free, without some for who comes next.

    Of a model that is not there it is 1: to ask tells why.
    """
    service = dispatcher.services.get(model)
    if not service:
        return 1
    slots = sum(lane.replica.max_batch for lane in service.lanes if lane.up)
    return int(slots * (1.0 - KEPT_FREE)) - service.running - service.waiting


def _is_worth_another_try(error: WaterlineError, status: int) -> bool:
    spent = isinstance(error, RejectedError) and error.code == OVER_QUOTA
    return status >= 500 or (status == 429 and not spent)


# --- The input ------------------------------------------------------------------------------------------------------


def check_input(engine: Any, batch: Batch) -> tuple[int, list[dict[str, Any]]]:
    """Return how many requests the input of a batch holds, and what is wrong with it."""
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    requests = 0
    for number, text in enumerate(files.read_lines(engine, batch.input_file_id)):
        requests += 1
        if requests > MOST_REQUESTS:
            message = f"The file has more than {MOST_REQUESTS:,} requests. Make several batches of it."
            errors.append({"code": "too_many_requests", "message": message, "param": None, "line": number + 1})
        else:
            for code, message, param in _problems(text, batch.endpoint, seen):
                errors.append({"code": code, "message": message, "param": param, "line": number + 1})
        if len(errors) >= MOST_ERRORS or requests > MOST_REQUESTS:
            break
    if not requests:
        errors.append({"code": "empty_file", "message": "The file has no requests.", "param": None, "line": None})
    return requests, errors


def _problems(text: bytes, endpoint: str, seen: set[str]) -> Iterator[tuple[str, str, str | None]]:
    """Yield what is wrong with a line: a code, a sentence, and where; `seen` are the custom ids before it."""
    try:
        item = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        yield "invalid_json_line", f"This line is not valid JSON: {error}.", None
        return
    if not isinstance(item, dict):
        yield "invalid_json_line", "This line is not a JSON object.", None
        return
    custom_id, body = item.get("custom_id"), item.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        yield "missing_custom_id", "Each request needs a 'custom_id', a text of its own.", "custom_id"
    elif custom_id in seen:
        yield "duplicate_custom_id", f"The custom_id '{custom_id[:60]}' is there twice.", "custom_id"
    else:
        seen.add(custom_id)
    if item.get("method") != "POST":
        yield "invalid_method", "The 'method' of each request must be POST.", "method"
    if item.get("url") != endpoint:
        yield "mismatched_endpoint", f"The 'url' of each request must be the batch's endpoint, {endpoint}.", "url"
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        yield "missing_body", "Each request needs a 'body' with a 'model'.", "body"
    elif body.get("stream"):
        yield "stream_not_supported", "Answers of a batch cannot be streamed. Leave 'stream' out.", "body.stream"
