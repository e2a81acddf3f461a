"""Whether the gateway stays as it is: memory, sockets and tasks after many requests, and the ledger's sum to the token.

    python benchmarks/soak.py                        # 1,000,000 requests: an hour or so
    python benchmarks/soak.py --requests 2000        # does it work at all

Clients with keys ask for answers whole and streamed; one in fifty leaves in the middle of its stream, with a key of its
own, because nobody can say how far its engine had come. Every whole answer of the upstream has 50 tokens. Memory is
compared between the end of the first tenth and the end, with nobody asking at either time.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from gateway import FLEET, TOKENS, Upstream

from waterline.fleet import load_fleet
from waterline.ledger import Ledger, connect, create_key, read_usage
from waterline.planner import make_plan
from waterline.service.engines import prepare_engines
from waterline.service.logs import log_to
from waterline.service.server import listen, running

CLIENTS = 64
LEAVES = 50  # one of so many does
SETTLES_S = 5.0  # connections that are kept are given up, and what is open ends


# --- The service: a process of its own --------------------------------------------------------------------------------


async def serve(folder: Path) -> None:
    """Serve, and say how it is at each line of standard input."""
    log_to(sys.stderr, terminal=False)
    upstream = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}/v1"
    fleet = folder / "fleet.toml"
    fleet.write_text(FLEET.format(url=url).replace('"benchmark"', '"soak"'))
    plan, listening = make_plan(load_fleet(fleet)), listen("127.0.0.1", 0)
    with Ledger.open(str(folder / "ledger.db")) as ledger:
        async with running(plan, prepare_engines(plan), listening, lambda _: None, ledger=ledger) as service:
            await service.supervisor.start()
            print(listening.getsockname()[1], flush=True)
            while await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
                under_way = len(service.gateway.completions._open)  # noqa: SLF001 - whether anybody was left behind
                tasks = len(asyncio.all_tasks())
                print(json.dumps({**of_this_process(), "tasks": tasks, "under way": under_way}), flush=True)
    upstream.close()


def of_this_process() -> dict[str, float]:
    rss = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    sockets = sum(1 for file in Path("/proc/self/fd").iterdir() if "socket" in _target(file))
    return {"rss_mib": int(rss[1]) / 1024 if rss else 0.0, "sockets": sockets}


def _target(file: Path) -> str:
    try:
        return str(file.readlink())
    except OSError:
        return ""


# --- The clients ------------------------------------------------------------------------------------------------------


def request_of(key: str, *, stream: bool, leaves: bool) -> bytes:
    fields = {"stream": True} if stream else {}
    if leaves:
        fields["pace"] = True
    body = json.dumps({"model": "bench", "messages": [{"role": "user", "content": "How deep is the sea?"}], **fields})
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: soak\r\n"
    return f"{head}authorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


async def ask(port: int, keys: dict[str, str], left: list[int], seed: int, answered: list[int]) -> None:
    reader = writer = None
    while left:
        dice = random.Random(seed * 1_000_003 + left.pop())
        leaves = dice.randrange(LEAVES) == 0
        stream = leaves or dice.random() < 0.3
        if writer is None or reader is None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        writer.write(request_of(keys["leaves" if leaves else "stays"], stream=stream, leaves=leaves))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head + await reader.read(500)
        if leaves:
            await reader.read(100)
            writer.transport.abort()
            reader = writer = None
            continue
        if length := re.search(rb"content-length: (\d+)", head):
            await reader.readexactly(int(length[1]))
        else:
            data = b""
            while not data.endswith(b"\r\n0\r\n\r\n"):
                data = data[-16:] + await reader.read(2**16)
        answered[0] += 1
    if writer:
        writer.close()


async def load(port: int, keys: dict[str, str], numbers: range, seed: int) -> int:
    left, answered = list(numbers), [0]
    await asyncio.gather(*(ask(port, keys, left, seed, answered) for _ in range(CLIENTS)))
    return answered[0]


# --- The table --------------------------------------------------------------------------------------------------------


def look(service: "subprocess.Popen[str]") -> dict[str, float]:
    """Return how the service is when it has come to rest."""
    time.sleep(SETTLES_S)
    assert service.stdin
    assert service.stdout
    service.stdin.write("\n")
    service.stdin.flush()
    found: dict[str, float] = json.loads(service.stdout.readline())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        uvloop.run(serve(arguments.serve))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        database = connect(str(folder / "ledger.db"))
        keys = {client: create_key(database, tenant="public", client=client)[1] for client in ("stays", "leaves")}
        command = [sys.executable, __file__, "--serve", str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as service:
            assert service.stdin
            assert service.stdout
            port = int(service.stdout.readline())
            tenth = arguments.requests // 10
            answered = uvloop.run(load(port, keys, range(tenth), arguments.seed))
            before = look(service)
            begun_s = time.perf_counter()
            answered += uvloop.run(load(port, keys, range(tenth, arguments.requests), arguments.seed))
            took_s = time.perf_counter() - begun_s
            after = look(service)
            service.stdin.close()
            service.wait(20)
        show(arguments.requests - tenth, took_s, before, after)
        rows = {row.client: row for row in read_usage(database, ["client"])}
        said, had = rows["stays"].output_tokens, answered * TOKENS
        print(f"ledger {said:,} tokens, engine {had:,}: {'equal' if said == had else 'NOT EQUAL'}")
        print(f"left in the middle: {rows['leaves'].cancelled:,} of {rows['leaves'].requests:,}")


def show(requests: int, took_s: float, before: dict[str, float], after: dict[str, float]) -> None:
    print(f"{requests:,} requests in {took_s:.0f} s, after a tenth as many to warm up:")
    growth = after["rss_mib"] / before["rss_mib"] - 1
    print(f"RSS {before['rss_mib']:.1f} -> {after['rss_mib']:.1f} MiB, {growth:+.1%} (goal: at most 5 %)")
    for what in ("sockets", "tasks", "under way"):
        print(f"{what} {before[what]} -> {after[what]} (goal: no more)")


if __name__ == "__main__":
    main()
