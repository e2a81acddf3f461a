"""Who gets how much of a full fleet: shares of tenants in GPU time, fairness among clients, and a surge of ten times.

    python benchmarks/shares.py                              # about five minutes
    python benchmarks/shares.py --seconds 10 --warm-up 5     # does it work at all

Two fake engines keep the time the cost model gives Llama 3.1 8B on L4 cards; the gateway, its ledger and its keys are
real, and so is HTTP. First three tenants ask for all there is, each with four clients of which one asks three times as
much as the others. Accounts remember a minute's half: they need some of them until shares are what they will be. Then
the public asks for ten times what the fleet can serve, while the enterprise asks for half of what it deserves. At last
the enterprise wants all it deserves again, in the middle of such a surge: until it has that, is the hand-back.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
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

Row = tuple[str, str, str, bool]  # what, measured, goal, met
Used = dict[tuple[str, str], tuple[float, int]]  # GPU-seconds and answered requests by tenant and client
DESERVED = {"enterprise": 0.5, "public": 0.3, "research": 0.2}
CLIENTS = (("busy", 30), ("quiet 1", 10), ("quiet 2", 10), ("quiet 3", 10))  # of each tenant, and how much at once
TTFT_S = 10.0
OVER_S = 5.0  # GPU time is looked at over so long
HAND_BACK_S = 30.0  # the goal
RAMP_S = 15.0  # of a surge, until answers come as fast as they will
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
    within_slo: list[float] = field(default_factory=list)  # when those were answered
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
            seen.within_slo += [time.monotonic()] * (ttft_s <= TTFT_S)
            return 0.0
        await reply.read()
        if reply.status != 429:
            seen.failed += 1
            return 1.0
        seen.refused += 1
        seen.refusals_s.append(time.perf_counter() - begun_s)
        seen.retry_after_s.append(float(reply.headers["retry-after"]))
        return seen.retry_after_s[-1]


async def saturate(
    url: str, keys: dict[tuple[str, str], str], until_s: float, seed: int, tenants: Iterable[str] = DESERVED
) -> dict[str, Seen]:
    """Let every client keep as many requests under way as it is said to, and come back when it is told to."""
    seen: dict[str, Seen] = defaultdict(Seen)

    async def keep_asking(tenant: str, key: str, number: int) -> None:
        dice = random.Random(f"{seed} {key} {number}")
        while time.monotonic() < until_s:
            again_s = await ask(session, url, key, body_of(dice, stream=False), seen[tenant])
            await asyncio.sleep(min(again_s, max(0.0, until_s - time.monotonic())))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(
            *(
                keep_asking(tenant, keys[tenant, client], number)
                for tenant in tenants
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


async def hand_back(
    url: str, keys: dict[tuple[str, str], str], rate: float, seconds: float, folder: Path, seed: int
) -> float:
    """Let the enterprise ask for everything after `OVER_S` of a surge; return until it has what it deserves, in s.

    That is when the ledger has its part of the GPU time of the last `OVER_S`; infinite when it never is.
    """
    surging = asyncio.create_task(surge(url, keys, {"public": rate}, seconds + OVER_S, seed))
    await asyncio.sleep(OVER_S)
    begun_s = time.monotonic()
    asking = asyncio.create_task(saturate(url, keys, begun_s + seconds, seed, ["enterprise"]))
    seen, back_s = [await asyncio.to_thread(by_tenant, folder)], math.inf
    while time.monotonic() < begun_s + seconds:
        await asyncio.sleep(1.0)
        seen.append(await asyncio.to_thread(by_tenant, folder))
        now, before = seen[-1], seen[max(0, len(seen) - 1 - int(OVER_S))]
        had_s = {tenant: now[tenant] - before[tenant] for tenant in now}
        if had_s["enterprise"] >= DESERVED["enterprise"] * sum(had_s.values()) > 0.0:
            back_s = min(back_s, time.monotonic() - begun_s)
    await asyncio.gather(surging, asking)
    return back_s


# --- The tables -------------------------------------------------------------------------------------------------------


def by_tenant(folder: Path) -> dict[str, float]:
    """Return the GPU-seconds each has had."""
    had: defaultdict[str, float] = defaultdict(float)
    for (tenant, _), (gpu_s, _) in used(folder).items():
        had[tenant] += gpu_s
    return had


def used(folder: Path) -> Used:
    """Return what the ledger has."""
    rows = read_usage(connect(str(folder / "ledger.db")), ["client"])
    return {(row.tenant, row.client): (row.gpu_us / 1e6, row.ok) for row in rows}


def jain(values: list[float]) -> float:
    """Return Jain's index: 1 when all have as much, 1/n when one has all."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values)) if any(values) else 0.0


def show_shares(before: Used, after: Used, seconds: float) -> tuple[float, list[Row]]:
    """Print who had how much in between; return requests a second, and what became of the goals."""
    gpu_s: dict[tuple[str, str], float] = {}
    requests = 0
    for who, (after_gpu_s, after_requests) in after.items():
        earlier_gpu_s, earlier_requests = before.get(who, (0.0, 0))
        gpu_s[who] = after_gpu_s - earlier_gpu_s
        requests += after_requests - earlier_requests
    total_s, worst, least_jain = sum(gpu_s.values()), 0.0, 1.0
    print(f"{'tenant':12}{'deserved':>10}{'GPU time':>10}{'off by':>10}{'Jain among its clients':>26}")
    for tenant, deserved in DESERVED.items():
        mine = [value for (name, _), value in gpu_s.items() if name == tenant]
        off = sum(mine) / total_s - deserved
        worst, least_jain = max(worst, abs(off)), min(least_jain, jain(mine))
        print(f"{tenant:12}{deserved:10.1%}{sum(mine) / total_s:10.1%}{off * 100:+7.1f} pt{jain(mine):26.3f}")
    print(f"{requests / seconds:.1f} requests/s\n")
    return requests / seconds, [
        ("share of GPU time, off what is deserved", f"{worst * 100:.1f} points", "<= 5", worst <= 0.05),
        ("Jain index among the clients of a tenant", f"{least_jain:.3f}", ">= 0.95", least_jain >= 0.95),
    ]


def show_surge(seen: dict[str, Seen], begun_s: float, capacity: float, seconds: float) -> list[Row]:
    """Print what its clients met; return what became of the goals."""
    good = sum(
        begun_s + RAMP_S <= at_s < begun_s + RAMP_S + seconds for one in seen.values() for at_s in one.within_slo
    )
    goodput = good / seconds
    refusals_s = [value for one in seen.values() for value in one.refusals_s]
    for tenant, one in seen.items():
        asked = one.ok + one.refused + one.failed
        print(
            f"{tenant:12}{asked:7} asked, {one.ok} answered, {len(one.within_slo)} within their SLO, "
            f"{one.refused} refused, {one.failed} failed"
        )
    failed = sum(one.failed for one in seen.values())
    rows: list[Row] = [
        (
            "goodput at ten times the load",
            f"{goodput / capacity:.0%} of {capacity:.1f}/s",
            ">= 90 %",
            goodput >= 0.9 * capacity,
        ),
        ("requests that failed", str(failed), "0", failed == 0),
    ]
    if len(refusals_s) > 1:
        median_ms, late_ms = statistics.median(refusals_s) * 1000, statistics.quantiles(refusals_s, n=100)[98] * 1000
        retry_after_s = [value for one in seen.values() for value in one.retry_after_s]
        print(f"who was refused was told to come back in {statistics.median(retry_after_s):.0f} s (median)")
        rows.append(("refused within (p50, p99)", f"{median_ms:.1f}, {late_ms:.1f} ms", "<= 50 ms", late_ms <= 50.0))
    return rows


def show_goals(rows: list[Row]) -> None:
    print(f"\n{'':44}{'measured':>20}{'goal':>12}")
    for what, measured, goal, met in rows:
        print(f"{what:44}{measured:>20}{goal:>12}{'' if met else '  MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each part")
    parser.add_argument("--warm-up", type=float, default=100.0, help="seconds before the first part counts")
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
    capacity, rows = show_shares(*uvloop.run(saturated()), seconds)
    rates = {"enterprise": DESERVED["enterprise"] / 2 * capacity, "public": 10 * capacity}
    print(f"The public asks for ten times that for {seconds:g} s:")
    begun_s = time.monotonic()
    seen = uvloop.run(surge(url, keys, rates, RAMP_S + seconds, seed))
    rows += show_surge(seen, begun_s, capacity, seconds)
    back_s = uvloop.run(hand_back(url, keys, rates["public"], min(seconds, HAND_BACK_S + OVER_S), folder, seed))
    rows.append(("hand-back to who deserves it", f"{back_s:.0f} s", f"<= {HAND_BACK_S:.0f} s", back_s <= HAND_BACK_S))
    show_goals(rows)


if __name__ == "__main__":
    main()
