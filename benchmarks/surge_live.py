"""A surge of the public on a live fleet: who serves it, when the GPUs come back, and what is left running.

    python benchmarks/surge_live.py [--seed 1] [--surge-s 60] [--quiet-s 30] [--part 0.25] [--times 10] [--speed 6]

The gateway, the policy and the supervisor run as in `waterline up`; engines are fakes that keep the time of the cost
model, jobs are processes that count and save their count. Public requests come at a part of the rate at which one
replica holds its SLO, ten times as many during the surge, and as many as at first after it. The minutes clock runs
`speed` times as fast as the clock on the wall: it decides every 10 s of its own, and hands back what has been spare for
five minutes of its own. With --speed 1 and --surge-s 360 the same takes a quarter of an hour.

Lost are requests that failed, or whose answer was cut. Late is a hand-back after its stated deadline.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from msgspec.structs import replace

from waterline.fleet import load_fleet
from waterline.outcome import Completion
from waterline.plan import Plan
from waterline.planner import make_plan
from waterline.service.engines import prepare_engines
from waterline.service.logs import log_to
from waterline.service.processes import marked
from waterline.service.server import Service, listen, running

FLEET = """
name = "surge"
[[pools]]
name = "box"
gpu = "l4"
nodes = 4
gpus_per_node = 4
[[models]]
name = "chat"
weights = "qwen3-14b"
precisions = ["fp8"]
max_context_tokens = 4096
slo = {{ ttft_s = 5.0, tpot_s = 0.06 }}
engine = "fake"
[[tenants]]
name = "public"
deserved = 0.75
anonymous = true
priority = 1
grace_s = 60
min_runtime_s = 30
[[tenants]]
name = "research"
deserved = 0.25
grace_s = 30
min_runtime_s = 30
[[demand]]
tenant = "public"
model = "chat"
requests_per_s = {requests_per_s}
prompt_tokens = 200
output_tokens = 400
[[jobs]]
name = "pretrain"
tenant = "research"
command = {command}
gpus = 2
copies = 8
checkpoint = "{folder}/step.{{copy}}"
checkpoint_every_s = 5
load_s = 2
"""
WORKER = """
import os, pathlib, signal, sys, time
checkpoint = pathlib.Path(os.environ["WATERLINE_CHECKPOINT"])
def save(*stop):
    checkpoint.with_suffix(".new").write_text(str(steps)); checkpoint.with_suffix(".new").replace(checkpoint)
    stop and sys.exit(1)
steps = int(checkpoint.read_text()) if checkpoint.exists() else 0
signal.signal(signal.SIGTERM, save)
while True:
    time.sleep(0.1); steps += 1
    if steps % 50 == 0: save()
"""


@dataclass
class Seen:
    """What a run of the benchmark looks at."""

    lost: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    most_replicas: int = 0
    least_runs: int = 99
    due_s: dict[str, float] = field(default_factory=dict)  # victim -> when it has to be gone
    late_s: list[float] = field(default_factory=list)
    back_s: float = 0.0  # from the end of the surge until research has as much as before


async def ask(session: aiohttp.ClientSession, url: str, dice: random.Random, seen: Seen, tokens: int) -> None:
    """Ask one question, streamed; it is lost when its answer is not whole, unless it was refused with a time."""
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": "x " * dice.randint(100, 300)}],
        "max_tokens": tokens,
        "stream": True,
    }
    try:
        async with session.post(url, json=body) as reply:
            text = await reply.read()
    except aiohttp.ClientError:
        seen.lost += 1
        return
    if reply.status == 429 and "retry-after" in reply.headers:
        seen.statuses["refused"] += 1
    elif reply.status == 200 and text.endswith(b"data: [DONE]\n\n") and b'"error"' not in text:
        seen.statuses["answered"] += 1
    else:
        seen.statuses[f"lost: {reply.status}"] += 1
        seen.lost += 1


async def load(url: str, requests_per_s: float, lasts_s: float, dice: random.Random, seen: Seen) -> None:
    """Ask at random times for so long; return when the last answer is there."""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session,
        asyncio.TaskGroup() as asking,
    ):
        end_s = time.monotonic() + lasts_s
        while time.monotonic() < end_s:
            await asyncio.sleep(dice.expovariate(requests_per_s))
            asking.create_task(ask(session, url, dice, seen, 400))


async def watch(service: Service, seen: Seen, speed: float) -> None:
    """Follow replicas, runs and the deadlines of those who have to go."""
    told = 0
    while True:
        now = service.gateway.snapshot()
        alive = {replica.id for replica in now.replicas} | {job.job for job in now.jobs if job.gpus}
        for move in reversed(now.moves[: len(now.moves) - told] if told <= len(now.moves) else now.moves):
            if move.victim and move.kind in {"drain", "hand back"}:
                seen.due_s[move.victim] = move.at_s + move.deadline_s / speed
        told = len(now.moves)
        for victim in [victim for victim in seen.due_s if victim not in alive]:
            seen.late_s.append(time.time() - seen.due_s.pop(victim))
        seen.most_replicas = max(seen.most_replicas, sum(replica.state == "ready" for replica in now.replicas))
        seen.least_runs = min(seen.least_runs, runs(service))
        await asyncio.sleep(0.1)


async def until(condition: Callable[[], bool], within_s: float) -> None:
    """Wait for something to become true, or for so long."""
    end_s = time.monotonic() + within_s
    while not condition() and time.monotonic() < end_s:  # noqa: ASYNC110 - nobody sets an event for us
        await asyncio.sleep(0.1)


def runs(service: Service) -> int:
    return sum(run.status in {"loading", "running"} for run in service.jobs.states.values())


async def case(plan: Plan, arguments: argparse.Namespace) -> tuple[Seen, list[Completion], int]:
    """Run it all; return what was seen, what became of requests, and how many processes were left."""
    dice, seen, completions = random.Random(arguments.seed), Seen(), []
    listening = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/chat/completions"
    async with running(plan, prepare_engines(plan), listening, completions.append) as service:
        await service.supervisor.start()
        service.keeper.lend(arguments.speed)
        await until(lambda: runs(service) == plan.fleet.gpus // 2 - len(plan.replicas), 60.0)
        before, seen.least_runs = runs(service), runs(service)
        await asyncio.sleep(40.0 / arguments.speed)  # min_runtime_s of research, and one decision
        watching = asyncio.create_task(watch(service, seen, arguments.speed))
        calm = arguments.part * plan.replicas[0].requests_per_s
        await load(url, calm, arguments.quiet_s, dice, seen)
        surge = asyncio.create_task(load(url, calm * arguments.times, arguments.surge_s, dice, seen))
        await asyncio.sleep(arguments.surge_s)
        ended_s = time.monotonic()
        after = asyncio.create_task(load(url, calm, 600.0, dice, seen))
        await surge
        await until(lambda: runs(service) >= before, 590.0)
        seen.back_s = time.monotonic() - ended_s
        after.cancel()
        await asyncio.gather(after, return_exceptions=True)
        watching.cancel()
        mark = service.state.mark
    return seen, completions, len(marked(mark))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--surge-s", type=float, default=60.0)
    parser.add_argument("--quiet-s", type=float, default=30.0)
    parser.add_argument("--part", type=float, default=0.25, help="of what one replica can do, while it is calm")
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--speed", type=float, default=6.0)
    arguments = parser.parse_args()
    log_to(sys.stderr, terminal=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = folder
        file = Path(folder) / "fleet.toml"
        command = [sys.executable, "-S", "-c", WORKER]
        toml = "[" + ", ".join("'''" + word + "'''" for word in command) + "]"
        file.write_text(FLEET.format(requests_per_s=0.5, folder=folder, command=toml))
        plan = make_plan(load_fleet(file))
        plan = replace(plan, replicas=plan.together)
        seen, completions, left = asyncio.run(case(plan, arguments))
        steps = sum(int(path.read_text()) for path in Path(folder).glob("step.?"))
    whole = Counter(one.status for one in completions)
    late_s = max(seen.late_s, default=0.0)
    print(f"public x{arguments.times:g} for {arguments.surge_s:g} s, seed {arguments.seed}")
    print(f"{'speed of the minutes clock':44}{arguments.speed:>10g}")
    print(f"{'requests a second, calm':44}{arguments.part * plan.replicas[0].requests_per_s:>10.2f}")
    print(f"{'replicas of the public, at most':44}{seen.most_replicas:>10}")
    print(f"{'runs of research, at least':44}{seen.least_runs:>10}")
    print(f"{'requests answered, refused in time':44}{seen.statuses['answered']:>10}{seen.statuses['refused']:>6}")
    print(f"{'requests lost':44}{seen.lost:>10}   goal 0   {dict(whole)}")
    print(f"{'drains and hand-backs':44}{len(seen.late_s):>10}")
    print(f"{'latest after its stated deadline':44}{late_s:>8.1f} s   goal < 30 s")
    print(f"{'research has all back after the surge':44}{seen.back_s:>8.1f} s   (5 min, grace, start, by that clock)")
    print(f"{'processes left running':44}{left:>10}   goal 0")
    print(f"{'steps of research saved':44}{steps:>10}")


if __name__ == "__main__":
    main()
