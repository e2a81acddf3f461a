"""Fakes that only read or only write, each on a port of its own in this process, and what is asked of them."""

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from msgspec.structs import replace
from serving import fake_plan

from waterline.plan import Plan, Replica
from waterline.service.asgi import HttpServer, Receive, Scope, Send
from waterline.service.engines.dialect import FAKE
from waterline.service.engines.fake import Fake, FakeApp, Job, prepare
from waterline.service.engines.fake_answer import Part
from waterline.service.engines.fake_cache import Caches


def split_plan(readers: int = 2, writers: int = 2, *, output_tokens: int = 20, max_batch: int = 4) -> Plan:
    """Return a plan of one model whose prompts are read by r0, r1 … and whose answers are written by w0, w1 …"""
    plan = fake_plan({"chat": 1}, output_tokens=output_tokens, max_batch=max_batch)
    [one] = plan.replicas
    reads = [replace(one, id=f"r{number}", role="prefill") for number in range(readers)]
    writes = [replace(one, id=f"w{number}", role="decode", prefill_tokens_per_s=0.0) for number in range(writers)]
    return replace(plan, replicas=(*reads, *writes))


class Played(FakeApp):
    """One fake that notes what it is asked, and fails as it is told."""

    def __init__(self, part: Part, caches: Caches) -> None:
        super().__init__(part, caches)
        self.fault = ""
        self.asked: list[dict[str, Any]] = []
        self.read_tokens: list[int] = []  # of prompts, of those that have begun to be read
        self.under_way = 0
        add = self.batch.add

        def noted(job: Job) -> None:
            self.read_tokens.append(job.prompt_tokens - job.read_tokens)
            add(job)

        self.batch.add = noted  # type: ignore[method-assign]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.fault == "hang" and scope["path"] != "/health":
            await asyncio.sleep(60)
        if self.fault == "500" and scope["path"].startswith("/v1/"):
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b'{"error": {"message": "out of memory"}}'})
            return
        await super().__call__(scope, receive, send)

    async def _answer(self, asked: Any, told: Any, chat: Any, reply: Any) -> None:
        self.asked.append({**asked.fields, **told})
        self.under_way += 1
        try:
            if self.fault.startswith("cut@"):
                reply = CutShort(reply, int(self.fault.removeprefix("cut@")))
            await super()._answer(asked, told, chat, reply)
            if self.fault == "forget":
                self.caches._kept.clear()
        finally:
            self.under_way -= 1


class CutShort:
    """A reply whose connection is cut after so many pieces."""

    def __init__(self, reply: Any, pieces: int) -> None:
        self._reply, self._left = reply, pieces

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reply, name)

    async def chunk(self, data: bytes) -> None:
        if not self._left:
            raise ConnectionResetError
        self._left -= 1
        await self._reply.chunk(data)


@asynccontextmanager
async def played(plan: Plan, hand_over: str) -> AsyncIterator[tuple[dict[str, Fake], dict[str, Played]]]:
    """Yield the engines of a plan, attached, and those who play them."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        apps, engines = {}, {}
        for replica in plan.replicas:
            listening = socket.create_server(("127.0.0.1", 0))
            host, port = listening.getsockname()
            app = apps[replica.id] = Played(part_of(plan, replica), Caches(host, port, 0.0, session))
            server = HttpServer(app, grace_s=0)
            tasks = [asyncio.create_task(app.batch.run()), asyncio.create_task(server.serve(sockets=[listening]))]
            stack.push_async_callback(_end, server, tasks)
            engines[replica.id] = fake_at(f"http://{host}:{port}/v1", hand_over)
        yield engines, apps


def part_of(plan: Plan, replica: Replica) -> Part:
    return msgspec.json.decode(prepare(plan, replica).input, type=Part)


def fake_at(url: str, hand_over: str) -> Fake:
    return Fake(command=(), input=b"", name="chat", url=url, dialect=dataclasses.replace(FAKE, hand_over=hand_over))


async def _end(server: HttpServer, tasks: list["asyncio.Task[None]"]) -> None:
    server.should_exit = True
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
