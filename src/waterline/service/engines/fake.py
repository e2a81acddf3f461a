"""An engine without a model: it keeps the time the cost model predicts, and says words that mean nothing.

It batches continuously as real engines do: every step decodes one token of each running request and reads a chunk of
the next prompts, first come, first served. A step takes `StepCost.step_ps` of real time. Unlike `waterline.rehearsal`
it never runs out of cache; there are `max_batch` places and that is all.

One that is planned to read only, or to write only, hands its caches over as real ones do; see `fake_cache`.
"""

import asyncio
import secrets
import socket
import sys
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
import click
import msgspec
import orjson

from waterline.cost import StepCost, replica_step_cost, transfer_s
from waterline.cost.step import prefill_pairs
from waterline.errors import WaterlineError
from waterline.plan import Plan, Replica, Role
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
from waterline.service.body import BYTES_PER_TOKEN, CHAT, COMPLETIONS, TOKENS_PER_MESSAGE, Asked, loaded, read_asked
from waterline.service.engines import ask
from waterline.service.engines.dialect import FAKE, Dialect
from waterline.service.engines.fake_cache import PATH, TOLD, Caches
from waterline.service.engines.lifeline import announce, end_with_parent
from waterline.service.engines.seat import Seat
from waterline.service.errors import RejectedError
from waterline.units import PICOSECONDS_PER_S

WORDS = ("when", "the", "water", "line", "drops", "cards", "below", "are", "lent", "to", "those", "above", "in", "time")


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


@dataclass(frozen=True, kw_only=True)
class Part:
    """What the process has to play."""

    model: str
    step: StepCost
    max_batch: int
    max_context_tokens: int
    expected_output_tokens: int  # of a request without a limit
    role: Role = "both"
    host: str = "127.0.0.1"  # where it listens
    sent_s_per_token: float = 0.0  # for the cache of a prompt to be with the one that writes


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
    produced_tokens: int = 0
    produced: asyncio.Queue[int] = field(default_factory=asyncio.Queue)  # the number of each token, as it comes


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
            if chunk > 0:
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
            job.produced.put_nowait(job.produced_tokens)
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
                raise RejectedError(f"There is nothing at {path}.", status=404)
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
        answer = Answer(asked, self.part, chat=chat)
        room = told.get("bootstrap_room") if self.part.role == "prefill" else None
        if room is not None:
            answer.shorten()
            await self.caches.wait_for_writer(room)
        job = Job(prompt_tokens=answer.usage["prompt_tokens"], output_tokens=answer.output_tokens)
        if self.part.role == "decode" and await self.caches.fetch(told, answer.prompt_ids):
            job.read_tokens = job.prompt_tokens - 1  # the last one is read again to produce one
            answer.beside = {"kv_transfer_params": None}  # as vLLM says
        try:
            if answer.output_tokens:
                self.batch.add(job)
            if asked.stream:
                await reply.begin(200, [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")])
                async for event in answer.events(job):
                    await reply.chunk(event)
                await reply.end(b"data: [DONE]\n\n")
            else:
                for _ in range(job.output_tokens):
                    await job.produced.get()
                if self.part.role == "prefill":
                    self._keep(answer, told)
                await reply.whole(200, orjson.dumps(answer.whole()), [JSON])
        finally:
            self.batch.drop(job)

    def _keep(self, answer: "Answer", told: Mapping[str, Any]) -> None:
        """Keep the cache of a prompt that was read, if somebody else is to go on with it."""
        if "bootstrap_room" in told:
            self.caches.keep_for_room(told["bootstrap_room"], answer.prompt_ids)
        elif (told.get("kv_transfer_params") or {}).get("do_remote_decode"):
            kept = self.caches.keep(answer.prompt_ids) if answer.finish == "length" else None
            answer.beside = {"kv_transfer_params": kept}


class Answer:
    """What is said to one request: words that follow from all that stands before them, and nothing else.

    So an answer that is gone on with from its middle, by ids or by text, is the answer that was begun.
    """

    def __init__(self, asked: Asked, part: Part, *, chat: bool) -> None:
        room = part.max_context_tokens - asked.prompt_tokens
        if room <= 0:
            raise RejectedError(
                f"The prompt has about {asked.prompt_tokens} tokens; the context is {part.max_context_tokens}.",
                code="context_length_exceeded",
            )
        fields = asked.fields
        self.prompt_ids, begun = _chat_ids(fields) if chat else _prompt_ids(fields["prompt"])
        expected = max(0, part.expected_output_tokens - begun)
        most = room if asked.most_tokens is None else min(asked.most_tokens, room)
        self.output_tokens = min(most, expected)
        self.asked, self.chat = asked, chat
        self.finish: Literal["stop", "length"] = "stop" if expected <= most else "length"
        self.ids, self.words = _words(self.prompt_ids, begun, self.output_tokens)
        self.beside: dict[str, Any] = {}  # what else is said, when it comes whole
        self.tells_ids = fields.get("return_token_ids") is True
        self.stamp = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model,
        }
        prompt_tokens = max(1, len(self.prompt_ids))
        self.usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": prompt_tokens + self.output_tokens,
        }

    def shorten(self) -> None:
        """Say one word: all the rest is said elsewhere."""
        if self.output_tokens > 1:
            self.output_tokens, self.finish = 1, "length"
            self.ids, self.words = self.ids[:1], self.words[:1]
            prompt_tokens = self.usage["prompt_tokens"]
            self.usage |= {"completion_tokens": 1, "total_tokens": prompt_tokens + 1}

    def whole(self) -> dict[str, Any]:
        text = "".join(self.words)
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        choice = {"index": 0, "finish_reason": self.finish, "logprobs": None, **said}
        return {**self.stamp, "object": kind, "choices": [choice], "usage": self.usage, **self.beside}

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        """Yield the events of a stream, each token as it is produced."""
        for number in range(job.output_tokens):
            await job.produced.get()
            yield self.event(number)
        yield self.last()

    def event(self, number: int) -> bytes:
        """Return what is sent for one token; before the first one of a chat comes the role."""
        opening = b""
        if number == 0:
            prompt_ids = {"prompt_token_ids": self.prompt_ids} if self.tells_ids else {}
            if self.chat:
                opening = self._event({"role": "assistant", "content": ""}, beside=prompt_ids)
        ids = {"token_ids": [self.ids[number]]} if self.tells_ids else {}
        if self.chat:
            return opening + self._event({"content": self.words[number]}, within=ids)
        return self._event({"text": self.words[number]}, within=ids | (prompt_ids if number == 0 else {}))

    def last(self) -> bytes:
        """Return what ends a stream, but for [DONE]."""
        end = self._event({} if self.chat else {"text": ""}, finish=self.finish)
        return end + (self._encoded({"choices": [], "usage": self.usage}) if self.asked.include_usage else b"")

    def _event(
        self,
        said: dict[str, str],
        *,
        finish: str | None = None,
        within: Mapping[str, list[int]] | None = None,
        beside: Mapping[str, list[int]] | None = None,
    ) -> bytes:
        said_so = {"delta": said} if self.chat else said
        choice = {"index": 0, **said_so, "finish_reason": finish, "logprobs": None, **(within or {})}
        return self._encoded({"choices": [choice], **(beside or {})})

    def _encoded(self, event: dict[str, Any]) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return b"data: " + orjson.dumps({**self.stamp, "object": kind, **event}) + b"\n\n"


# Its tokens: words that it says, once as the first of an answer and once after a blank; and of what it is told, four
# bytes each, whose ids say which. A message of a chat has tokens more, for what is around it.
FIRST_WORDS, OTHERS = len(WORDS), 2 * len(WORDS)
AROUND = OTHERS  # an id without text


def _chat_ids(fields: dict[str, Any]) -> tuple[list[int], int]:
    """Return the prompt of a chat, and how many words of it are the answer that is gone on with."""
    messages = fields["messages"]
    begun = ""
    if fields.get("continue_final_message") and messages[-1]["role"] == "assistant":
        *messages, last = messages
        begun = last.get("content") or ""
    ids = []
    for message in messages:
        content = message.get("content") or ""
        texts = (
            [content]
            if isinstance(content, str)
            else [part if isinstance(part, str) else part.get("text") or "" for part in content]
        )
        ids += [AROUND] * TOKENS_PER_MESSAGE + _text_ids("".join(texts))
    said = _said_ids(begun)
    return ids + said, len(said)


def _prompt_ids(prompt: Any) -> tuple[list[int], int]:
    """Return the prompt of a completion, of which the words at its end are said already where it is a list of ids."""
    parts = [prompt] if isinstance(prompt, str) else prompt
    ids = list[int]()
    for part in parts:
        ids += _text_ids(part) if isinstance(part, str) else part if isinstance(part, list) else [part]
    begun = next((number for number, one in enumerate(reversed(ids)) if one >= OTHERS), len(ids))
    return ids, begun


def _text_ids(text: str) -> list[int]:
    data = text.encode()
    groups = [data[start : start + BYTES_PER_TOKEN] for start in range(0, len(data), BYTES_PER_TOKEN)]
    return [AROUND + 1 + (len(group) - 1) * 2**32 + int.from_bytes(group, "big") for group in groups]


def _said_ids(text: str) -> list[int]:
    """Return the ids of words it has said."""
    words = [WORDS.index(word) if word in WORDS else 0 for word in text.split()]
    return [word + FIRST_WORDS * (number > 0) for number, word in enumerate(words)]


def _words(prompt_ids: list[int], begun: int, count: int) -> tuple[list[int], list[str]]:
    """Return the next so many tokens and their text."""
    state = zlib.crc32(orjson.dumps(prompt_ids[: len(prompt_ids) - begun]))
    for one in prompt_ids[len(prompt_ids) - begun :]:
        state = zlib.crc32(b"%d" % one, state)
    ids, words = [], []
    for number in range(begun, begun + count):
        word = (state >> 8) % len(WORDS)
        ids.append(word + FIRST_WORDS * (number > 0))
        words.append(" " * (number > 0) + WORDS[word])
        state = zlib.crc32(b"%d" % ids[-1], state)
    return ids, words


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
