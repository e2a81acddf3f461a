"""A surge of the public on a live fleet: who serves it, when the GPUs come back, and what is left running.

    python benchmarks/surge_live.py [--seed 1] [--surge-s 60] [--quiet-s 30] [--part 0.25] [--times 10] [--speed 6]
    sudo -E python benchmarks/surge_live.py --nodes 4 [--lose 3]     # over nodes with networks of their own, and Ray

The gateway, the policy and the supervisor run as in `waterline up`; engines are fakes that keep the time of the cost
model, jobs are launchers of two ranks in sessions of their own, one of which counts and saves its count. Public
requests come at a part of the rate at which one replica holds its SLO, ten times as many during the surge, and as many
as at first after it. The minutes clock runs `speed` times as fast as the clock on the wall: it decides every 10 s of
its own, and hands back what has been spare for five minutes of its own. With --speed 1 and --surge-s 360 the same takes
a quarter of an hour.

With --nodes the four nodes are network namespaces of this machine with a Ray cluster over them; --lose N cuts the cable
of node N in the middle of the surge, and mends it when the surge has ended.

Lost are requests that failed, or whose answer was cut. Late is a hand-back after its stated deadline.
"""

import argparse
import asyncio
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from cluster import Cluster
from msgspec.structs import replace

from waterline.errors import EngineError
from waterline.fleet import load_fleet
from waterline.outcome import Completion
from waterline.plan import Plan
from waterline.planner import make_plan
from waterline.service.engines import Engine, prepare_engines
from waterline.service.logs import log_to
from waterline.service.processes import marked
from waterline.service.ray_cluster import RayCluster
from waterline.service.server import Service, listen, running
from waterline.service.shore import Prepare

FLEET = """
name = "surge"
[[pools]]
name = "box"
gpu = "l4"
nodes = {nodes}
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
import subprocess, sys
command = [sys.executable, "-S", "-c", sys.argv[1]]
ranks = [subprocess.Popen([*command, rank], start_new_session=True) for rank in "01"]
import signal
signal.signal(signal.SIGTERM, lambda *_: [rank.terminate() for rank in ranks])
sys.exit(max(rank.wait() for rank in ranks))
"""
RANK = """
import os, pathlib, signal, sys, time
checkpoint = pathlib.Path(os.environ["WATERLINE_CHECKPOINT"])
def save(*stop):
    checkpoint.with_suffix(".new").write_text(str(steps)); checkpoint.with_suffix(".new").replace(checkpoint)
    stop and sys.exit(1)
steps = int(checkpoint.read_text()) if checkpoint.exists() else 0
signal.signal(signal.SIGTERM, save if sys.argv[1] == "0" else lambda *_: sys.exit(1))
while True:
    time.sleep(0.1); steps += 1
    if steps % 50 == 0 and sys.argv[1] == "0": save()
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
    first_s: float = 0.0  # from the beginning of the surge until the public has a replica more
    node_s: dict[str, float] = field(default_factory=dict)  # of a node that is lost: what took how long
    stop_s: float = 0.0  # the service took to end
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


async def prepared(prepare: Prepare, plan: Plan) -> Mapping[str, Engine]:
    """Return the engines of a plan, when the nodes that it wants have joined."""
    for _ in range(60):
        try:
            return prepare(plan)
        except EngineError:
            await asyncio.sleep(2.0)
    return prepare(plan)


def runs(service: Service) -> int:
    return sum(run.status in {"loading", "running"} for run in service.jobs.states.values())


async def lose(service: Service, cluster: Cluster, node: int, seen: Seen, surge_s: float) -> None:
    """Cut a node off in the middle of the surge until it is over; note when that is known, and when nothing runs."""

    def state() -> str:
        return next(one.state for one in service.gateway.snapshot().nodes if one.node == node)

    await asyncio.sleep(surge_s / 2)
    cluster.cut(node)
    begun_s = time.monotonic()
    await until(lambda: state() != "up", 120.0)
    seen.node_s["known to be silent after"] = time.monotonic() - begun_s
    await until(lambda: not cluster.runs_on(node), 120.0)
    seen.node_s["its runs have ended by themselves after"] = time.monotonic() - begun_s
    await asyncio.sleep(max(0.0, surge_s / 2 - (time.monotonic() - begun_s)))
    cluster.mend(node)
    begun_s = time.monotonic()
    await until(lambda: state() == "up", 120.0)
    seen.node_s["it counts again, from the mending on, after"] = time.monotonic() - begun_s


async def case(
    plan: Plan, arguments: argparse.Namespace, cluster: Cluster | None
) -> tuple[Seen, list[Completion], int]:
    """Run it all; return what was seen, what became of requests, and how many processes were left."""
    nodes = RayCluster(cluster.address) if cluster else None
    prepare = nodes.prepare if nodes else prepare_engines
    dice, seen, completions = random.Random(arguments.seed), Seen(), []
    listening = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/chat/completions"
    try:
        async with running(
            plan, await prepared(prepare, plan), listening, completions.append, prepare, nodes=nodes
        ) as service:
            await service.supervisor.start()
            service.keeper.lend(arguments.speed)
            await until(lambda: runs(service) == plan.fleet.gpus // 2 - len(plan.replicas), 60.0)
            before, seen.least_runs = runs(service), runs(service)
            await asyncio.sleep(40.0 / arguments.speed)  # min_runtime_s of research, and one decision
            watching = asyncio.create_task(watch(service, seen, arguments.speed))
            calm = arguments.part * plan.replicas[0].requests_per_s
            await load(url, calm, arguments.quiet_s, dice, seen)
            surge = asyncio.create_task(load(url, calm * arguments.times, arguments.surge_s, dice, seen))
            lost = arguments.lose if cluster else 0
            faults = asyncio.gather(
                *([lose(service, cluster, lost, seen, arguments.surge_s)] if cluster and lost else ())
            )
            begun_s, ready = time.monotonic(), len(plan.replicas)
            await until(lambda: sum(one.status == "ready" for one in service.supervisor.states.values()) > ready, 60.0)
            seen.first_s = time.monotonic() - begun_s
            await asyncio.sleep(max(0.0, arguments.surge_s - seen.first_s))
            ended_s = time.monotonic()
            after = asyncio.create_task(load(url, calm, 600.0, dice, seen))
            await surge
            await until(lambda: runs(service) >= before, 590.0)
            seen.back_s = time.monotonic() - ended_s
            await faults
            after.cancel()
            await asyncio.gather(after, return_exceptions=True)
            watching.cancel()
            mark = service.state.mark
            stopping_s = time.monotonic()
        seen.stop_s = time.monotonic() - stopping_s
    finally:
        if nodes:
            nodes.leave()
    return seen, completions, len(marked(mark)) + len(marked(f"{socket.gethostname()}:{mark}"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--surge-s", type=float, default=60.0)
    parser.add_argument("--quiet-s", type=float, default=30.0)
    parser.add_argument("--part", type=float, default=0.25, help="of what one replica can do, while it is calm")
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--speed", type=float, default=6.0)
    parser.add_argument("--nodes", type=int, default=0, help="network namespaces with Ray, 0: none")
    parser.add_argument("--lose", type=int, default=0, help="the number of a node that is cut off, from 1 on")
    arguments = parser.parse_args()
    log_to(sys.stderr, terminal=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = folder
        file = Path(folder) / "fleet.toml"
        command = [sys.executable, "-S", "-c", WORKER, RANK]
        toml = "[" + ", ".join("'''" + word + "'''" for word in command) + "]"
        file.write_text(FLEET.format(requests_per_s=0.5, folder=folder, command=toml, nodes=arguments.nodes or 4))
        plan = make_plan(load_fleet(file))
        plan = replace(plan, replicas=plan.together)
        with Cluster(arguments.nodes) if arguments.nodes else nullcontext() as cluster:
            seen, completions, left = asyncio.run(case(plan, arguments, cluster))
        steps = sum(int(path.read_text()) for path in Path(folder).glob("step.?"))
    whole = Counter(one.status for one in completions)
    late_s = max(seen.late_s, default=0.0)
    within = sum(one.meets(plan.fleet.slos["chat"]) for one in completions)
    served = sum(one.status != "refused" for one in completions)
    print(f"public x{arguments.times:g} for {arguments.surge_s:g} s, seed {arguments.seed}")
    print(f"{'speed of the minutes clock':44}{arguments.speed:>10g}")
    print(f"{'requests a second, calm':44}{arguments.part * plan.replicas[0].requests_per_s:>10.2f}")
    print(f"{'replicas of the public, at most':44}{seen.most_replicas:>10}")
    print(f"{'runs of research, at least':44}{seen.least_runs:>10}")
    print(f"{'requests answered, refused in time':44}{seen.statuses['answered']:>10}{seen.statuses['refused']:>6}")
    print(f"{'of those not refused, within their SLO':44}{within / max(1, served):>10.1%}")
    print(f"{'requests lost':44}{seen.lost:>10}   goal 0   {dict(whole)}")
    print(f"{'the public has a replica more after':44}{seen.first_s:>8.1f} s")
    for what, took_s in seen.node_s.items():
        print(f"{what:44}{took_s:>8.1f} s")
    print(f"{'drains and hand-backs':44}{len(seen.late_s):>10}")
    print(f"{'latest after its stated deadline':44}{late_s:>8.1f} s   goal < 30 s")
    print(f"{'research has all back after the surge':44}{seen.back_s:>8.1f} s   (5 min, grace, start, by that clock)")
    print(f"{'the service has ended after':44}{seen.stop_s:>8.1f} s")
    print(f"{'processes left running':44}{left:>10}   goal 0")
    print(f"{'steps of research saved':44}{steps:>10}")


if __name__ == "__main__":
    main()
