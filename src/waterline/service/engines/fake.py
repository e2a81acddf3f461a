"""An engine without a model: it keeps the time the cost model predicts, and says words that mean nothing.

It batches continuously as real engines do: every step decodes one token of each running request and reads a chunk of
the next prompts, first come, first served. A step takes `StepCost.step_ps` of real time. Unlike `waterline.rehearsal`
it never runs out of cache; there are `max_batch` places and that is all.

One that is planned to read only, or to write only, hands its caches over as real ones do; see `fake_cache`.
"""

import asyncio
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import click
import msgspec
import orjson

from waterline.cost import StepCost, replica_step_cost, transfer_s
from waterline.cost.step import prefill_pairs
from waterline.errors import WaterlineError
from waterline.plan import Plan, Replica
from waterline.service.asgi import (
    JSON,
    ClientGoneError,
    HttpServer,
    Receive,
    Reply,
    Scope,
    Send,
    read_body,
    unless_disconnected,
)
from waterline.service.body import CHAT, COMPLETIONS, Asked, loaded, read_asked
from waterline.service.engines import ask
from waterline.service.engines.dialect import FAKE, Dialect
from waterline.service.engines.fake_answer import Answer, Part, answers_to, whole_of
from waterline.service.engines.fake_cache import PATH, TOLD, Caches
from waterline.service.engines.lifeline import announce, end_with_parent
from waterline.service.engines.seat import Seat
from waterline.service.errors import RejectedError
from waterline.units import PICOSECONDS_PER_S


@dataclass(frozen=True, kw_only=True)
class Fake:
    """One process that pretends to be the engine of one replica."""

    command: tuple[str, ...]
    input: bytes
    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)
    dialect: Dialect = FAKE
    start_within_s: float = 60.0

    async def served_name(self, session: aiohttp.ClientSession, url: str) -> str:
        await ask(session, url.removesuffix("/v1"), "/health")
        return self.name


def prepare(plan: Plan, replica: Replica, seat: Seat | None = None) -> Fake:
    planned = next(model for model in plan.models if model.model == replica.model)
    part = Part(
        model=replica.model,
        step=replica_step_cost(plan.fleet, replica),
        max_batch=replica.max_batch,
        max_context_tokens=replica.max_context_tokens,
        expected_output_tokens=planned.output_tokens,
        role=replica.role,
        host=(seat or Seat()).host,
        sent_s_per_token=_sent_s(plan, replica, planned.prompt_tokens) / planned.prompt_tokens,
    )
    command = (sys.executable, "-m", "waterline.service.engines.fake")
    return Fake(command=command, input=msgspec.json.encode(part, enc_hook=list) + b"\n", name=replica.model)


def _sent_s(plan: Plan, replica: Replica, prompt_tokens: int) -> float:
    """Return how long the cache of a prompt is on its way to the replicas that write."""
    if replica.role != "prefill":
        return 0.0
    fleet = plan.fleet
    others = [one for one in plan.replicas_of(replica.model) if one.role == "decode"]
    gpus = [fleet.gpu_of(fleet.pool(one.pool)) for one in (replica, *others)]
    return transfer_s(fleet.llm_of(fleet.model(replica.model)), replica.layout, prompt_tokens, gpus)


# --- The steps ------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request on its way through the batch."""

    prompt_tokens: int
    output_tokens: int
    read_tokens: int = 0
    behind: "Job | None" = None  # the first answer to its prompt, which is read once
    produced_tokens: int = 0
    produced: "asyncio.Queue[tuple[Job, int]]" = field(default_factory=asyncio.Queue)  # the number of each token


class Batch:
    """The waiting and the running requests, and the loop that moves them."""

    def __init__(self, step: StepCost, max_batch: int) -> None:
        self.step = step
        self.max_batch = max_batch
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []  # in the order they came
        self._arrived = asyncio.Event()

    def add(self, job: Job) -> None:
        self.waiting.append(job)
        self._arrived.set()

    def drop(self, job: Job) -> None:
        """Forget a request; one that has ended has been forgotten already."""
        for jobs in (self.waiting, self.running):
            if job in jobs:
                jobs.remove(job)

    async def run(self) -> None:
        """Take one step after the other. Steps follow a time table, so that a late wake-up is made good by the next."""
        boundary_s = time.monotonic()
        while True:
            if not (self.running or self.waiting):
                self._arrived.clear()
                await self._arrived.wait()
                boundary_s = time.monotonic()
            decodes, chunks = self._compose()
            boundary_s += self._step_ps(decodes, chunks) / PICOSECONDS_PER_S
            await asyncio.sleep(max(0.0, boundary_s - time.monotonic()))
            self._produce(decodes, chunks)

    def _compose(self) -> tuple[list[Job], list[tuple[Job, int]]]:
        """Return what the next step does: who decodes, and whose prompts are read, with how many tokens."""
        while self.waiting and len(self.running) < self.max_batch:
            self.running.append(self.waiting.popleft())
        decodes = [job for job in self.running if job.read_tokens == job.prompt_tokens]
        room = self.step.step_tokens - len(decodes)
        chunks = []
        for job in self.running:
            chunk = min(room, job.prompt_tokens - job.read_tokens)
            waits = job.behind and job.behind.read_tokens < job.behind.prompt_tokens
            if chunk > 0 and not waits:
                chunks.append((job, chunk))
                room -= chunk
        return decodes, chunks

    def _step_ps(self, decodes: list[Job], chunks: list[tuple[Job, int]]) -> int:
        return self.step.step_ps(
            sum(chunk for _, chunk in chunks),
            sum(prefill_pairs(job.read_tokens, chunk) for job, chunk in chunks),
            len(decodes),
            sum(job.prompt_tokens + job.produced_tokens for job in decodes),
        )

    def _produce(self, decodes: list[Job], chunks: list[tuple[Job, int]]) -> None:
        for job, chunk in chunks:
            job.read_tokens += chunk
        for job in [*decodes, *(job for job, _ in chunks if job.read_tokens == job.prompt_tokens)]:
            job.produced.put_nowait((job, job.produced_tokens))
            job.produced_tokens += 1
            if job.produced_tokens == job.output_tokens:
                self.drop(job)


# --- OpenAI's API ---------------------------------------------------------------------------------------------------


class FakeApp:
    """Answers as an engine would: chat and completions, streamed or not, models and health."""

    def __init__(self, part: Part, caches: Caches) -> None:
        self.part = part
        self.caches = caches
        self.batch = Batch(part.step, part.max_batch)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply, path = Reply(send), scope["path"]
        try:
            if path == "/health":
                running, waiting = len(self.batch.running), len(self.batch.waiting)
                await reply.whole(200, orjson.dumps({"running": running, "waiting": waiting}), [JSON])
            elif path == "/v1/models":
                models = {"object": "list", "data": [{"id": self.part.model, "object": "model", "owned_by": "fake"}]}
                await reply.whole(200, orjson.dumps(models), [JSON])
            elif path.startswith(PATH):
                cache = await self.caches.give(path.removeprefix(PATH))
                await reply.whole(200, orjson.dumps(cache), [JSON])
            elif path in {f"/v1{CHAT}", f"/v1{COMPLETIONS}"}:
                body, told = self._told(await read_body(scope, receive))
                asked = read_asked(path.removeprefix("/v1"), body)
                await unless_disconnected(self._answer(asked, told, path == f"/v1{CHAT}", reply), scope, receive)
            else:
                raise RejectedError(f"There is nothing at {path}.", status=404, code="unknown_path")
        except WaterlineError as error:
            await reply.error(error)
        except ClientGoneError:
            pass

    def _told(self, body: bytes) -> tuple[bytes, dict[str, Any]]:
        """Take out of a body what only a gateway says, about caches."""
        if self.part.role == "both":
            return body, {}
        fields = loaded(body)
        told = {name: fields.pop(name) for name in TOLD if name in fields}
        return orjson.dumps(fields) if told else body, told

    async def _answer(
        self,
        asked: Asked,
        told: Mapping[str, Any],
        chat: bool,  # noqa: FBT001 - chat, or completion
        reply: Reply,
    ) -> None:
        answers = answers_to(asked, self.part, chat=chat)
        first = answers[0]
        room = told.get("bootstrap_room") if self.part.role == "prefill" else None
        if room is not None:
            first.shorten()
            await self.caches.wait_for_writer(room)
        read = self.part.role == "decode" and await self.caches.fetch(told, first.prompt_ids)
        if read:
            first.beside = {"kv_transfer_params": None}  # as vLLM says
        jobs = _jobs(answers, read=read)
        try:
            for job in jobs:
                self.batch.add(job)
            if asked.stream:
                await reply.begin(200, [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")])
                async for event in _events(answers, jobs):
                    await reply.chunk(event)
                await reply.end(b"data: [DONE]\n\n")
            else:
                for job in jobs:
                    for _ in range(job.output_tokens):
                        await job.produced.get()
                if self.part.role == "prefill":
                    self._keep(first, told)
                await reply.whole(200, orjson.dumps(whole_of(answers)), [JSON])
        finally:
            for job in jobs:
                self.batch.drop(job)

    def _keep(self, answer: "Answer", told: Mapping[str, Any]) -> None:
        """Keep the cache of a prompt that was read, if somebody else is to go on with it."""
        if "bootstrap_room" in told:
            self.caches.keep_for_room(told["bootstrap_room"], answer.prompt_ids)
        elif (told.get("kv_transfer_params") or {}).get("do_remote_decode"):
            kept = self.caches.keep(answer.prompt_ids) if answer.finish == "length" else None
            answer.beside = {"kv_transfer_params": kept}


def _jobs(answers: Sequence[Answer], *, read: bool) -> dict[Job, Answer]:
    """Return the work on answers, without those that say nothing; where it was `read`, most of a prompt is not again.

    Its last token is, to produce one. What is produced of all of them comes in one queue.
    """
    produced = asyncio.Queue[tuple[Job, int]]()
    jobs: dict[Job, Answer] = {}
    first: Job | None = None
    for answer in answers:
        first = None if answer.is_first else first
        if answer.output_tokens:
            prompt_tokens = max(1, len(answer.prompt_ids))
            job = Job(
                prompt_tokens=prompt_tokens,
                output_tokens=answer.output_tokens,
                read_tokens=prompt_tokens - 1 if read or first else 0,
                behind=first,
                produced=produced,
            )
            first = first or job
            jobs[job] = answer
    return jobs


async def _events(answers: Sequence[Answer], jobs: Mapping[Job, Answer]) -> AsyncIterator[bytes]:
    """Yield the events of a stream, each token as it is produced."""
    for answer in answers:
        if not answer.output_tokens:
            yield answer.end()
    for _ in range(sum(job.output_tokens for job in jobs)):
        job, number = await next(iter(jobs)).produced.get()
        answer = jobs[job]
        yield answer.event(number) + (answer.end() if number == answer.output_tokens - 1 else b"")
    if counts := answers[0].counts(answers):
        yield counts


# --- The process ----------------------------------------------------------------------------------------------------


async def _serve(part: Part) -> None:
    listening = socket.create_server((part.host, 0))
    host, port = listening.getsockname()
    async with aiohttp.ClientSession() as session:
        app = FakeApp(part, Caches(host, port, part.sent_s_per_token, session))
        announce(f"http://{host}:{port}/v1")
        steps = asyncio.create_task(app.batch.run())
        await HttpServer(app).serve(sockets=[listening])
        steps.cancel()


@click.command()
def main() -> None:
    """Play the part on the first line of standard input, on a free port of this machine, until that input ends."""
    part = sys.stdin.buffer.readline()
    end_with_parent()
    asyncio.run(_serve(msgspec.json.decode(part, type=Part)))


if __name__ == "__main__":
    main()
