"""Who gets how much of a full fleet: shares of tenants in GPU time, fairness among clients, and a surge of ten times.

    python benchmarks/shares.py                              # about six minutes
    python benchmarks/shares.py --seconds 10 --warm-up 5     # does it work at all

Two fake engines keep the time the cost model gives Llama 3.1 8B on L4 cards; the gateway, its ledger and its keys are
real, and so is HTTP. First three tenants ask for all there is, each with four clients of which one asks three times as
much as the others. Accounts remember a minute's half: they need some of them until shares are what they will be. Then
the public asks for ten times what the fleet can serve, while the enterprise asks for half of what it deserves.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import uvloop

from waterline.fleet import load_fleet
from waterline.ledger import Ledger, connect, create_key, read_usage
from waterline.outcome import Completion
from waterline.plan import Plan
from waterline.planner import make_plan
from waterline.service.engines import prepare_engines
from waterline.service.logs import log_to
from waterline.service.server import listen, running

Used = dict[tuple[str, str], tuple[float, int]]  # GPU-seconds and answered requests by tenant and client
DESERVED = {"enterprise": 0.5, "public": 0.3, "research": 0.2}
CLIENTS = (("busy", 30), ("quiet 1", 10), ("quiet 2", 10), ("quiet 3", 10))  # of each tenant, and how much at once
TTFT_S = 10.0
FLEET = f"""
name = "shares"
[[pools]]
name = "box"
gpu = "l4"
nodes = 2
gpus_per_node = 1
usd_per_gpu_hour = 1.0
[[models]]
name = "chat"
weights = "meta-llama/Llama-3.1-8B"
engine = "fake"
slo = {{ ttft_s = {TTFT_S}, tpot_s = 0.07 }}
[[tenants]]
name = "enterprise"
guarantee = 0.3
deserved = {DESERVED["enterprise"]}
[[tenants]]
name = "public"
deserved = {DESERVED["public"]}
[[tenants]]
name = "research"
deserved = {DESERVED["research"]}
[[demand]]
tenant = "enterprise"
requests_per_s = 4
prompt_tokens = 100
output_tokens = 100
"""


# --- The service: a process of its own ------------------------------------------------------------------------------


def plan_of(folder: Path) -> Plan:
    fleet = folder / "fleet.toml"
    fleet.write_text(FLEET)
    return make_plan(load_fleet(fleet))


async def serve(folder: Path) -> None:
    log_to(sys.stderr, terminal=False)
    plan, ended = plan_of(folder), list[Completion]()
    listening = listen("127.0.0.1", 0)
    with Ledger.open(str(folder / "ledger.db")) as ledger:
        async with running(plan, prepare_engines(plan), listening, ended.append, ledger=ledger) as service:
            await service.supervisor.start()
            print(listening.getsockname()[1], flush=True)
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


# --- The clients ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """What clients of one tenant have met."""

    ok: int = 0
    within_slo: int = 0
    refused: int = 0
    failed: int = 0
    refusals_s: list[float] = field(default_factory=list)
    retry_after_s: list[float] = field(default_factory=list)


def body_of(dice: random.Random, *, stream: bool) -> bytes:
    words, output_tokens = dice.randint(20, 180), dice.randint(20, 180)
    messages = [{"role": "user", "content": "word" * words}]
    return json.dumps({"model": "chat", "messages": messages, "max_tokens": output_tokens, "stream": stream}).encode()


async def ask(session: aiohttp.ClientSession, url: str, key: str, body: bytes, seen: Seen) -> float:
    """Ask once; return how long to wait before asking again."""
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    begun_s = time.perf_counter()
    async with session.post(url, data=body, headers=headers) as reply:
        if reply.status == 200:
            await reply.content.readany()
            ttft_s = time.perf_counter() - begun_s
            await reply.read()
            seen.ok += 1
            seen.within_slo += ttft_s <= TTFT_S
            return 0.0
        await reply.read()
        if reply.status != 429:
            seen.failed += 1
            return 1.0
        seen.refused += 1
        seen.refusals_s.append(time.perf_counter() - begun_s)
        seen.retry_after_s.append(float(reply.headers["retry-after"]))
        return seen.retry_after_s[-1]


async def saturate(url: str, keys: dict[tuple[str, str], str], until_s: float, seed: int) -> dict[str, Seen]:
    """Let every client keep as many requests under way as it is said to, and come back when it is told to."""
    seen: dict[str, Seen] = defaultdict(Seen)

    async def keep_asking(tenant: str, key: str, number: int) -> None:
        dice = random.Random(f"{seed} {key} {number}")
        while time.monotonic() < until_s:
            again_s = await ask(session, url, key, body_of(dice, stream=False), seen[tenant])
            await asyncio.sleep(again_s)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(
            *(
                keep_asking(tenant, keys[tenant, client], number)
                for tenant in DESERVED
                for client, at_once in CLIENTS
                for number in range(at_once)
            )
        )
    return seen


async def surge(
    url: str, keys: dict[tuple[str, str], str], rates: dict[str, float], seconds: float, seed: int
) -> dict[str, Seen]:
    """Ask at these rates whatever the answers are, from four clients each."""
    seen: dict[str, Seen] = defaultdict(Seen)

    async def ask_on(tenant: str, requests_per_s: float) -> None:
        dice, asking, end_s = random.Random(f"{seed} {tenant}"), set[asyncio.Task[float]](), time.monotonic() + seconds
        next_s = time.monotonic()
        while next_s < end_s:
            next_s += dice.expovariate(requests_per_s)
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            key = keys[tenant, dice.choice(CLIENTS)[0]]
            task = asyncio.create_task(ask(session, url, key, body_of(dice, stream=True), seen[tenant]))
            asking.add(task)
            task.add_done_callback(asking.discard)
        await asyncio.gather(*asking)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(ask_on(tenant, rate) for tenant, rate in rates.items()))
    return seen


# --- The tables -------------------------------------------------------------------------------------------------------


def used(folder: Path) -> Used:
    """Return what the ledger has."""
    rows = read_usage(connect(str(folder / "ledger.db")), ["client"])
    return {(row.tenant, row.client): (row.gpu_us / 1e6, row.ok) for row in rows}


def jain(values: list[float]) -> float:
    """Return Jain's index: 1 when all have as much, 1/n when one has all."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values)) if any(values) else 0.0


def show_shares(before: Used, after: Used, seconds: float) -> float:
    """Print who had how much in between; return requests a second."""
    gpu_s: dict[tuple[str, str], float] = {}
    requests = 0
    for who, (after_gpu_s, after_requests) in after.items():
        earlier_gpu_s, earlier_requests = before.get(who, (0.0, 0))
        gpu_s[who] = after_gpu_s - earlier_gpu_s
        requests += after_requests - earlier_requests
    total_s, worst = sum(gpu_s.values()), 0.0
    print(f"{'tenant':12}{'deserved':>10}{'GPU time':>10}{'off by':>10}{'Jain among its clients':>26}")
    for tenant, deserved in DESERVED.items():
        mine = [value for (name, _), value in gpu_s.items() if name == tenant]
        off = sum(mine) / total_s - deserved
        worst = max(worst, abs(off))
        print(f"{tenant:12}{deserved:10.1%}{sum(mine) / total_s:10.1%}{off * 100:+7.1f} pt{jain(mine):26.3f}")
    print(f"{requests / seconds:.1f} requests/s; off by {worst * 100:.1f} points at most (goal: 5; Jain 0.95)\n")
    return requests / seconds


def show_surge(seen: dict[str, Seen], capacity: float, seconds: float) -> None:
    goodput = sum(one.within_slo for one in seen.values()) / seconds
    refusals_s = [value for one in seen.values() for value in one.refusals_s]
    for tenant, one in seen.items():
        asked = one.ok + one.refused + one.failed
        print(
            f"{tenant:12}{asked:7} asked, {one.ok} answered, {one.within_slo} within their SLO, {one.refused} refused, "
            f"{one.failed} failed"
        )
    print(f"goodput {goodput:.1f}/s, {goodput / capacity:.0%} of {capacity:.1f}/s (goal: 90 %)")
    if len(refusals_s) > 1:
        late = statistics.quantiles(refusals_s, n=100)
        retry_after_s = [value for one in seen.values() for value in one.retry_after_s]
        print(
            f"refused within {statistics.median(refusals_s) * 1000:.1f} ms (median), {late[98] * 1000:.1f} ms (p99; "
            f"goal: 50 ms); told to come back in {statistics.median(retry_after_s):.0f} s (median)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each part")
    parser.add_argument("--warm-up", type=float, default=180.0, help="seconds before the first part counts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        uvloop.run(serve(arguments.serve))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = connect(str(folder / "ledger.db"))
        keys = {
            (tenant, client): create_key(engine, tenant=tenant, client=client)[1]
            for tenant in DESERVED
            for client, _ in CLIENTS
        }
        command = [sys.executable, __file__, "--serve", str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as service:
            assert service.stdout
            assert service.stdin
            try:
                measure(
                    f"http://127.0.0.1:{int(service.stdout.readline())}/v1/chat/completions", keys, folder, arguments
                )
            finally:
                service.stdin.close()
                service.wait(10)


def measure(url: str, keys: dict[tuple[str, str], str], folder: Path, arguments: argparse.Namespace) -> None:
    seconds, warm_up_s, seed = arguments.seconds, arguments.warm_up, arguments.seed

    async def saturated() -> tuple[Used, Used]:
        asking = asyncio.create_task(saturate(url, keys, time.monotonic() + warm_up_s + seconds, seed))
        await asyncio.sleep(warm_up_s)
        before = await asyncio.to_thread(used, folder)
        await asyncio.sleep(seconds)
        after = await asyncio.to_thread(used, folder)
        seen = await asking
        print(f"{sum(one.failed for one in seen.values())} failed, {sum(one.refused for one in seen.values())} refused")
        return before, after

    print(f"All tenants ask for everything, {seconds:g} s after {warm_up_s:g} s to warm up:")
    capacity = show_shares(*uvloop.run(saturated()), seconds)
    rates = {"enterprise": DESERVED["enterprise"] / 2 * capacity, "public": 10 * capacity}
    print(f"The public asks for ten times that for {seconds:g} s:")
    show_surge(uvloop.run(surge(url, keys, rates, seconds, seed)), capacity, seconds)


if __name__ == "__main__":
    main()
