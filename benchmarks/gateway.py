"""What the gateway costs: CPU time per request, the time it adds to the first token, memory of open streams, its start.

    python benchmarks/gateway.py                     # about three minutes; use a quiet machine
    python benchmarks/gateway.py --requests 50       # does it work at all

Three processes: an upstream that answers at once (or a token every 20 ms), `waterline up` attached to it, and this one,
which asks, with a key. Everything is on: keys, shares, the ledger on the disk, metrics. CPU time is that of the
gateway's process, all threads, from /proc.

What a call of the system costs differs by a factor of two between machines, and between one hour and the next on a
shared one. So two peers that do nothing but pass bytes on are measured in turn with the gateway: the least that one can
write with uvicorn and aiohttp, and nginx where it is installed. Compare with them rather than with a figure.

Clients ask again as soon as they have their answer. Those of JSON and of streams without a pace keep the gateway busy
all the time, so that what they wait for is each other. Paced streams begin spread evenly over the length of one, so
that some are at each of their stages at any time; "in a burst" they all begin, and begin again, in one moment. Time to
the first token is compared with that of the same load without the gateway. Goals: at least 2,500 JSON requests/s/core,
20,000 tokens/s/core in 256 paced streams, whose first token comes at most 3 ms later (p50; p99: 20 ms).
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import sysconf
from pathlib import Path
from typing import Any, cast

import aiohttp
import uvicorn
import uvloop

from waterline.ledger import connect, create_key

TOKENS = 50
PACE_MS = 20

FLEET = """
name = "benchmark"
[[pools]]
name = "upstream"
gpu = "cpu"
usd_per_gpu_hour = 0.0
[[models]]
name = "bench"
weights = "waterline/abacus"
engine = "openai"
url = "{url}"
slo = {{ ttft_s = 3600.0, tpot_s = 1.0 }}
[[demand]]
requests_per_s = 0.1
prompt_tokens = 10
output_tokens = 50
"""

# CPU ms a request at JSON c=64, instant streams c=64, streams of 20 ms a token c=256; one process each, replies of 50
# tokens. Measured in November 2026 on two shared EPYC cores with this kind of upstream, in an hour in which uvicorn and
# aiohttp took 0.158, 0.324 and 1.63, and nginx 0.034, 0.126 and 0.70.
ELSEWHERE = {
    "SGLang router 0.3.2 (Rust)": (0.131, 0.445, 1.15),
    "LiteLLM 1.106.2": (12.5, 44.0, 60.0),
}
BARE = "uvicorn + aiohttp, bare"
NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 8192; }}
http {{
  access_log off; proxy_temp_path {folder}; client_body_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  upstream engine {{ server 127.0.0.1:{upstream}; keepalive 512; }}
  server {{
    listen 127.0.0.1:{port} backlog=2048; keepalive_requests 10000000;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


# --- The upstream ---------------------------------------------------------------------------------------------------

EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"bench","choices":'
    b'[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'
)
USAGE = b'"usage":{"prompt_tokens":10,"completion_tokens":%d,"total_tokens":%d}' % (TOKENS, TOKENS + 10)
LAST = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"bench","choices":[],%s}\n\n'
    % USAGE
)
WHOLE = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"bench","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"%s"},"finish_reason":"stop"}],%s}' % (b" word" * TOKENS, USAGE)
)
MODELS = b'{"object":"list","data":[{"id":"bench","object":"model"}]}'
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def as_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Upstream(asyncio.Protocol):
    """Answers HTTP that is known to be well-formed, one request after the other."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.data = cast("asyncio.Transport", transport), b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, rest = self.data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        size = int(length[1]) if length else 0
        if not found or len(rest) < size:
            return
        body, self.data = rest[:size], rest[size:]
        if b'"stream"' not in body:
            reply = WHOLE if body else MODELS
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                % (len(reply), reply)
            )
        elif b'"pace"' in body:
            self.transport.write(STREAM_HEAD)
            self.token(0)
        else:
            end = as_chunk(LAST) + as_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
            self.transport.write(STREAM_HEAD + as_chunk(EVENT) * TOKENS + end)

    def token(self, number: int) -> None:
        if number == TOKENS:
            self.transport.write(as_chunk(LAST) + as_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        elif not self.transport.is_closing():
            asyncio.get_running_loop().call_later(PACE_MS / 1000, self.next_token, number)

    def next_token(self, number: int) -> None:
        if not self.transport.is_closing():
            self.transport.write(as_chunk(EVENT))
            self.token(number + 1)


async def upstream() -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# --- The peers ------------------------------------------------------------------------------------------------------


async def bare(upstream_port: int, port: int) -> None:
    """Pass everything on, with aiohttp, and look at nothing."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
            async with session.post(f"http://127.0.0.1:{upstream_port}{scope['path']}", data=body) as response:
                kind = response.headers["content-type"].encode()
                head: dict[str, Any] = {
                    "type": "http.response.start",
                    "status": response.status,
                    "headers": [(b"content-type", kind)],
                }
                if length := response.headers.get("content-length"):
                    head["headers"].append((b"content-length", length.encode()))
                await send(head)
                async for chunk in response.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})

        config = uvicorn.Config(app, port=port, http="httptools", lifespan="off", access_log=False, log_config=None)
        await uvicorn.Server(config).serve()


@contextmanager
def peers(upstream_port: int, folder: str) -> Iterator[dict[str, tuple[int, int]]]:
    """Yield the port and the process of each peer there is."""
    ports = [free_port(), free_port()]
    commands = {BARE: [sys.executable, __file__, "--bare", str(upstream_port), str(ports[0])]}
    if nginx := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"):
        config = Path(folder) / "nginx.conf"
        config.write_text(NGINX.format(folder=folder, upstream=upstream_port, port=ports[1]))
        commands["nginx (parses nothing)"] = [nginx, "-p", folder, "-e", f"{folder}/nginx.log", "-c", str(config)]
    started = {name: subprocess.Popen(command) for name, command in commands.items()}
    try:
        for port in ports[: len(started)]:
            wait_for(port)
        yield {name: (port, process.pid) for (name, process), port in zip(started.items(), ports, strict=False)}
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def wait_for(port: int) -> None:
    for _ in range(100):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
            return
        time.sleep(0.1)
    raise TimeoutError(f"nobody listens on port {port} after 10 s")


# --- The client -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Load:
    """So many clients, each asking again as soon as it has its answer."""

    name: str
    clients: int
    fields: dict[str, bool]
    spread_s: float = 0.0  # over which the clients begin


LOADS = (
    Load(name="JSON", clients=64, fields={}),
    Load(name="stream", clients=64, fields={"stream": True}),
    Load(name="paced stream", clients=64, fields={"stream": True, "pace": True}, spread_s=TOKENS * PACE_MS / 1000),
    Load(name="paced stream", clients=256, fields={"stream": True, "pace": True}, spread_s=TOKENS * PACE_MS / 1000),
    Load(name="… in a burst", clients=256, fields={"stream": True, "pace": True}),
)


class Client(asyncio.Protocol):
    """Asks again as soon as it has its answer, while somebody is left to ask for.

    A protocol and no stream of asyncio's: what it costs to read a token here is taken from the gateway on a small
    machine, and counted as its delay.
    """

    def __init__(self, request: bytes, left: list[int], ttfts_s: list[float]) -> None:
        self.request, self.left, self.ttfts_s = request, left, ttfts_s
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("closed before the end of an answer"))

    def ask(self) -> None:
        if not self.left:
            self.ended.set_result(None)
            self.transport.close()
            return
        self.left.pop()
        self.data, self.missing, self.is_first = b"", -1, True
        self.begun_s = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if self.missing < 0:
            head, found, data = (self.data + data).partition(b"\r\n\r\n")
            if not found:
                self.data = head
                return
            assert head.startswith(b"HTTP/1.1 200"), head + data
            length = re.search(rb"(?i)content-length: (\d+)", head)
            self.missing, self.data = int(length[1]) if length else 0, b""
            self.is_stream = not length
        if not data:
            return
        self.missing -= 0 if self.is_stream else len(data)
        if self.is_first and self.missing == 0:
            self.is_first = False
            self.ttfts_s.append(time.perf_counter() - self.begun_s)
        if not self.is_stream and self.missing == 0:
            self.ask()
        elif self.is_stream:
            self.data = (self.data + data)[-7:]
            if self.data == b"\r\n0\r\n\r\n":
                self.ask()


async def ask(port: int, request: bytes, left: list[int], ttfts_s: list[float], begin_s: float) -> None:
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: Client(request, left, ttfts_s), "127.0.0.1", port)
    loop.call_later(begin_s, client.ask)
    await client.ended


def request_of(fields: dict[str, bool], key: str) -> bytes:
    body = json.dumps({"model": "bench", "messages": [{"role": "user", "content": "How deep is the sea?"}], **fields})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {key}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()


async def run(port: int, load: Load, requests: int, key: str = "") -> tuple[float, list[float]]:
    """Return how long it took, and the percentiles of the time to the first byte of an answer."""
    left, ttfts_s = list(range(requests)), list[float]()
    begun_s = time.perf_counter()
    clients = min(load.clients, requests)
    request, begin_s = request_of(load.fields, key), load.spread_s / clients
    await asyncio.gather(*(ask(port, request, left, ttfts_s, number * begin_s) for number in range(clients)))
    return time.perf_counter() - begun_s, statistics.quantiles(ttfts_s, n=100, method="inclusive")


async def hold(port: int, streams: int, key: str, pid: int) -> float:
    """Open so many streams and return the gateway's memory in MiB when each has its first token."""
    request = request_of({"stream": True, "pace": True}, key)
    opened = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(streams)))
    for _, writer in opened:
        writer.write(request)
    await asyncio.gather(*(reader.readuntil(b"data: ") for reader, _ in opened))
    rss_mib = memory_mib(pid)
    for _, writer in opened:
        writer.close()
    return rss_mib


def memory_mib(pid: int) -> float:
    rss = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(rss[1]) / 1024 if rss else 0.0


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / sysconf("SC_CLK_TCK")


# --- The table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Peer:
    name: str
    port: int
    pid: int
    key: str = ""


def measure(upstream_port: int, gateways: Sequence[Peer], requests: int) -> None:
    heads = ("requests/s", "CPU ms/request", "/s/core", "tokens/s/core", "TTFT added p50", "p99", "CPU x bare")
    print(f"{'':32}" + "".join(f"{head:>16}" for head in heads))
    for load in LOADS:
        count = requests if "pace" not in load.fields else min(requests, 8 * load.clients)
        print(f"{load.name}, {load.clients} clients")
        _, direct_s = uvloop.run(run(upstream_port, load, count))
        costs_ms = {peer.name: cost(peer, load, count, direct_s) for peer in gateways}
        for name, (rate, cost_ms, *added_ms) in costs_ms.items():
            tokens = f"{TOKENS / cost_ms * 1000:16,.0f}" if load.fields else " " * 16
            added = "".join(f"{one:13.1f} ms" for one in added_ms)
            times = cost_ms / costs_ms[BARE][1]
            print(f"  {name:30}{rate:16,.0f}{cost_ms:16.3f}{1000 / cost_ms:16,.0f}{tokens}{added}{times:16.2f}")


def cost(peer: Peer, load: Load, count: int, direct_s: Sequence[float]) -> tuple[float, float, float, float]:
    """Return requests a second, CPU ms a request, and the ms added to the first token: median and 99th percentile."""
    uvloop.run(run(peer.port, load, min(count, load.clients), peer.key))  # connections and caches
    before_s = cpu_s(peer.pid)
    took_s, ttft_s = uvloop.run(run(peer.port, load, count, peer.key))
    used_s = (cpu_s(peer.pid) - before_s) / count or float("nan")
    p50_ms, p99_ms = ((ttft_s[at] - direct_s[at]) * 1000 for at in (49, 98))
    return count / took_s, used_s * 1000, p50_ms, p99_ms


def report(upstream_port: int, gateway: Peer, requests: int, folder: str) -> None:
    with peers(upstream_port, folder) as others:
        everybody = [gateway, *(Peer(name=name, port=port, pid=pid) for name, (port, pid) in others.items())]
        measure(upstream_port, everybody, requests)
    streams = min(1000, max(requests, 10))
    rss_mib = uvloop.run(hold(gateway.port, streams, gateway.key, gateway.pid))
    print(f"\n{streams} open streams: RSS {rss_mib:.0f} MiB (goal: 200)")
    print("\nCPU ms/request of others, in another hour:    JSON 64   stream 64   paced 256")
    for name, (whole, stream, paced) in ELSEWHERE.items():
        print(f"  {name:42}{whole:9.3f}{stream:12.3f}{paced:12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="for each load; paced ones take fewer")
    parser.add_argument("--upstream", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bare", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.upstream or arguments.bare:
        uvloop.run(bare(*arguments.bare) if arguments.bare else upstream())
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([sys.executable, __file__, "--upstream"], stdout=subprocess.PIPE, text=True) as engine,
    ):
        try:
            assert engine.stdout
            port = int(engine.stdout.readline())
            fleet = Path(folder) / "fleet.toml"
            fleet.write_text(FLEET.format(url=f"http://127.0.0.1:{port}/v1"))
            ledger = str(Path(folder) / "ledger.db")
            _, key = create_key(connect(ledger), tenant="public", client="bench")
            command = [sys.executable, "-m", "waterline", "up", str(fleet), "--port", "0", "--json", "--ledger", ledger]
            begun_s = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as gateway:
                try:
                    assert gateway.stdout
                    url = json.loads(gateway.stdout.readline())["url"]
                    print(f"ready after {time.perf_counter() - begun_s:.2f} s (goal: 1.5)\n")
                    gateway_port = int(re.findall(r":(\d+)/", url)[0])
                    ours = Peer(name="Waterline", port=gateway_port, pid=gateway.pid, key=key)
                    report(port, ours, arguments.requests, folder)
                finally:
                    gateway.terminate()
                    gateway.wait(5)
        finally:
            engine.kill()


if __name__ == "__main__":
    main()
