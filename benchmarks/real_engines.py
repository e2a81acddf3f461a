"""Faults before a real engine: is a stream that broke off and went on elsewhere the one its client would have got?

    vllm serve ./abacus-hugging-face --served-model-name abacus --max-model-len 512 --enable-prompt-tokens-details &
    python benchmarks/real_engines.py http://127.0.0.1:8000/v1                 # some minutes on two cores
    python benchmarks/real_engines.py http://127.0.0.1:8000/v1 --every 16      # every 16th cut only

The engine is one that runs already: vLLM, SGLang or llama.cpp with the small model (`python -m waterline.training`
writes it for each of them). The gateway believes it has two replicas, and reaches each over a relay that cuts the
connection of a request once, after so many events. Every kind of request is cut at every event of its stream. All give
the same answer each time, so each is compared with the stream that nobody cut: text, thoughts, reason to end, usage,
one role, one name, one [DONE]. What cannot be gone on with must end in one clean error; it is counted apart.

Then: how soon after its client has left does the engine stop (its own count of running requests, vLLM only); and do
more requests than the engine takes all get their answers.
"""

import argparse
import asyncio
import re
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import structlog

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "service"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from serving import Served, fake_plan, served
from test_passage import Got, ask

from waterline.service.engines.openai import Attached

CHAT, COMPLETIONS = "/chat/completions", "/completions"
ASK = {"messages": [{"role": "user", "content": "347 * 586"}], "temperature": 0}
USAGE = {"stream_options": {"include_usage": True}}
DIGITS = {"type": "string", "pattern": "[0-9]{4,8}"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, ASK | USAGE),
    "chat, no usage": (CHAT, ASK),
    "chat, max_tokens": (CHAT, ASK | USAGE | {"max_tokens": 60}),
    "chat, stop": (CHAT, ASK | USAGE | {"stop": ["6772"]}),
    "chat, n = 2": (CHAT, ASK | USAGE | {"n": 2, "seed": 7, "temperature": 0.7}),
    "chat, logprobs": (CHAT, ASK | USAGE | {"logprobs": True, "max_tokens": 60}),
    "chat, guided": (
        CHAT,
        ASK | USAGE | {"response_format": {"type": "json_schema", "json_schema": {"name": "d", "schema": DIGITS}}},
    ),
    "completion": (COMPLETIONS, {"prompt": "347*586\n7*6", "temperature": 0, "max_tokens": 90} | USAGE),
}
AT_ONCE = 8
LEAVING, CROWD = 24, 300


@dataclass(kw_only=True)
class Relays:
    """Ways to the engine, on which each request is cut once, after so many events, as the name of its client says."""

    host: str
    port: int
    cut: set[bytes] = field(default_factory=set)  # names of those that were

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine_reader, engine_writer = await asyncio.open_connection(self.host, self.port)
        name, events_left = b"", 0

        async def there() -> None:
            nonlocal name, events_left
            while data := await reader.read(65536):
                if named := re.search(rb"user-agent: (cut@(\d+)[^\r]*)\r\n", data, re.IGNORECASE):
                    name, events_left = named[1], 0 if named[1] in self.cut else int(named[2])
                engine_writer.write(data)
                await engine_writer.drain()

        async def back() -> None:
            nonlocal events_left
            while data := await engine_reader.read(65536):
                for event in re.finditer(rb"data: \{", data) if events_left else ():
                    events_left -= 1
                    if events_left == 0:
                        self.cut.add(name)
                        writer.write(data[: event.start()])
                        await writer.drain()
                        return
                writer.write(data)
                await writer.drain()

        ways = [asyncio.ensure_future(there()), asyncio.ensure_future(back())]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await way
        for one in (writer, engine_writer):
            one.close()


@asynccontextmanager
async def through_relays(url: str, name: str) -> AsyncIterator[tuple[Served, Relays]]:
    """Serve one engine as two replicas."""
    at = urlsplit(url)
    relays = Relays(host=at.hostname or "127.0.0.1", port=at.port or 80)
    servers = [await asyncio.start_server(relays.serve, "127.0.0.1", 0) for _ in range(2)]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    engines = {
        f"chat/{number}": Attached(url=f"http://127.0.0.1:{port}{at.path}", name=name)
        for number, port in enumerate(ports)
    }
    try:
        async with served(fake_plan({"chat": 2}, max_batch=1000, output_tokens=200), engines=engines) as service:
            yield service, relays
    finally:
        for server in servers:
            server.close()


def like(got: Got) -> tuple[object, ...]:
    usage = [(one["prompt_tokens"], one["completion_tokens"], one["total_tokens"]) for one in got.usages]
    return got.texts, got.thought, sorted(got.finishes), usage, got.roles, len(got.stamps), got.dones, got.errors


async def cut_everywhere(service: Served, relays: Relays, kind: str, every: int) -> tuple[int, int, int, list[str]]:
    """Return how many were cut, the same for all that, and refused with one error; and what came of the others."""
    path, fields = KINDS[kind]
    expected = await ask(service, fields, path=path)
    assert not expected.errors, expected.errors
    points = range(2, expected.events + 1, every)
    same, refusals, others = 0, list[str](), list[str]()
    for first in range(0, len(points), AT_ONCE):
        some = points[first : first + AT_ONCE]
        got = await asyncio.gather(*(ask(service, fields, f"cut@{point} {kind}", path) for point in some))
        for point, one in zip(some, got, strict=True):
            if like(one) == like(expected):
                same += 1
            elif len(one.errors) == 1 and all(expected.texts[n].startswith(text) for n, text in one.texts.items()):
                refusals.append(str(one.errors[0]["message"]))
            else:
                others.append(f"cut@{point}: {like(one)}")
    cut = sum(name.endswith(kind.encode()) for name in relays.cut)
    return cut, same, len(refusals), others or refusals[:1]


async def running(session: aiohttp.ClientSession, url: str) -> int | None:
    """Return how many requests the engine works on, as vLLM counts them."""
    async with session.get(f"{url.removesuffix('/v1')}/metrics") as reply:
        counted = re.compile(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([\d.e+]+)", re.MULTILINE)
        counts = counted.findall(await reply.text())
        return sum(int(float(count)) for count in counts) if counts else None


async def leaving(service: Served, url: str) -> list[float]:
    """Return how long the engine still worked after its only client had left, some times."""
    took_s = []
    async with aiohttp.ClientSession() as session:
        if await running(session, url) is None:
            return []
        for _ in range(LEAVING):
            fields = {"model": "chat", "stream": True, "ignore_eos": True, "max_tokens": 480, **ASK}
            async with session.post(f"{service.url}/v1{CHAT}", json=fields) as reply:
                await reply.content.readany()
                assert await running(session, url)
                reply.close()
            left_s = time.monotonic()
            while await running(session, url):
                pass
            took_s.append(time.monotonic() - left_s)
    return took_s


async def crowd(service: Served) -> tuple[int, set[str]]:
    """Ask more at once than the engine takes; return how many got a whole answer, and which answers there were."""
    got = await asyncio.gather(*(ask(service, ASK | USAGE | {"max_tokens": 16}) for _ in range(CROWD)))
    return sum(not one.errors and one.finishes == ["length"] for one in got), {one.text for one in got}


async def main(url: str, every: int) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/models") as reply:
        model = (await reply.json())["data"][0]
    print(f"{model['owned_by']} at {url}, which serves '{model['id']}'\n")
    print(f"{'request':20}{'cut':>6}{'the same':>10}{'refused':>9}   what was said")
    async with through_relays(url, model["id"]) as (service, relays):
        for kind in KINDS:
            try:
                cut, same, refused, said = await cut_everywhere(service, relays, kind, every)
            except AssertionError as error:  # it does not do such a thing at all
                print(f"{kind:20}   {str(error)[:160]}")
                continue
            print(f"{kind:20}{cut:6}{same:10}{refused:9}   {said[0][:150] if said else ''}", flush=True)
        whole, texts = await crowd(service)
        print(f"\n{whole} of {CROWD} asked at once got a whole answer, {len(texts)} different")
        if took_s := await leaving(service, url):
            print(
                f"the engine stops {statistics.median(took_s) * 1000:.0f} ms after its client has left "
                f"(median of {LEAVING}; at most {max(took_s) * 1000:.0f} ms)"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the engine, with /v1")
    parser.add_argument("--every", type=int, default=1, help="cut at every so many events")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    chosen = parser.parse_args()
    asyncio.run(main(chosen.url.rstrip("/"), chosen.every))
