"""Engines on the nodes of a Ray cluster: which node is which, and what becomes of it when something dies."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from serving import QUESTION, Served, fake_plan, served, until

from waterline.errors import EngineError, InputError, MissingExtraError
from waterline.fleet import Job, Pool
from waterline.plan import Place, Plan
from waterline.service.jobs import Held
from waterline.service.processes import MARK, find_process
from waterline.service.ray_cluster import RayCluster
from waterline.service.ray_host import Kept
from waterline.service.ray_nodes import Node, match, too_few, wanted_pools
from waterline.service.ray_remote import Reach, RemoteChild, silence

H100, MI300X = "h100-sxm-80g", "mi300x"


def plan_of(*pools: Pool) -> Plan:
    plan = fake_plan()
    return replace(plan, fleet=replace(plan.fleet, pools=pools))


def pool(name: str, gpu: str = H100, nodes: int = 1, gpus: int = 8) -> Pool:
    return Pool(name=name, gpu=gpu, nodes=nodes, gpus_per_node=gpus, usd_per_gpu_hour=1.0)


def node(number: int, gpus: int = 8, kind: str = "", label: str = "") -> Node:
    return Node(id=f"id-{number}", address=f"10.0.0.{number}", gpus=gpus, cpus=64, kind=kind, pool=label)


def matched(plan: Plan, *nodes: Node, known: dict[Any, Node] | None = None) -> dict[str, int]:
    """Return the last part of the address of each node of the fleet."""
    found = match(plan.fleet, [one.name for one in plan.fleet.pools], nodes, known or {})
    return {f"{name}/{number}": int(one.address.rpartition(".")[2]) for (name, number), one in found.items()}


def test_nodes_are_told_apart_by_the_kind_of_their_gpus_and_by_how_many_they_have() -> None:
    plan = plan_of(pool("nvidia", H100, 2), pool("amd", MI300X, 1), pool("small", "a100-sxm-80g", 1, gpus=2))
    kinds = node(1, kind="AMD-Instinct-MI300X-OAM"), node(2, kind="H100"), node(3, gpus=2, kind="A100")
    assert matched(plan, *kinds, node(4, kind="H100")) == {"nvidia/0": 2, "nvidia/1": 4, "amd/0": 1, "small/0": 3}


def test_a_label_decides_and_what_ray_does_not_know_is_taken_by_its_gpus() -> None:
    plan = plan_of(pool("left", nodes=1), pool("right", nodes=1))
    assert matched(plan, node(1), node(2, label="left"), node(3, gpus=4)) == {"left/0": 2, "right/0": 1}
    assert matched(plan, node(1, label="right"), node(2, gpus=16)) == {"right/0": 1, "left/0": 2}


def test_nodes_stay_what_they_are_and_one_that_has_left_is_replaced() -> None:
    plan = plan_of(pool("box", nodes=2))
    known = {("box", 0): node(2), ("box", 1): node(1)}
    assert matched(plan, node(1), node(2), node(3), known=known) == {"box/0": 2, "box/1": 1}
    assert matched(plan, node(1), node(3), known=known) == {"box/0": 3, "box/1": 1}
    assert matched(plan, node(1), known=known) == {"box/1": 1}


def test_a_cluster_that_is_too_small_is_described_with_what_to_do() -> None:
    plan = plan_of(pool("h100", nodes=2))
    nodes = [node(1), node(2, gpus=4, kind="A100")]
    said = too_few(plan.fleet, "h100", match(plan.fleet, ["h100"], nodes, {}), nodes, "10.0.0.1:6379")
    assert "pool 'h100' wants 2 nodes of 8 GPUs (h100-sxm-80g); the Ray cluster has 1 for it" in said
    assert "10.0.0.1 (8 GPUs), 10.0.0.2 (4 GPUs, A100)" in said
    assert "ray start --address 10.0.0.1:6379 --labels pool=h100" in said


def test_only_pools_where_something_is_started_need_nodes() -> None:
    plan = plan_of(pool("box"), pool("spare"))
    assert wanted_pools(plan) == {"box"}
    attached = replace(plan, replicas=tuple(replace(one, engine="openai") for one in plan.replicas))
    assert wanted_pools(attached) == set()


def test_without_ray_a_person_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"waterline-llm\[ray\]"):
        RayCluster("auto")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense"])
def test_where_no_cluster_answers_that_is_said_at_once(address: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'waterline-llm[ray]'")
    begun_s = time.monotonic()
    with pytest.raises(InputError, match=f"no Ray cluster answers at '{address}': .*Start one"):
        RayCluster(address)
    assert time.monotonic() - begun_s < 10


class Silent:
    """What Ray shows of an actor whose node has been cut off: nothing ever comes back."""

    def __getattr__(self, method: str) -> "Silent":
        return self

    def remote(self, *_arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()


def test_who_leaves_the_cluster_does_not_wait_for_a_node_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waterline.service.ray_remote.STOPPED_WITHIN_S", 0.01)
    monkeypatch.setattr("waterline.service.ray_remote.PING_WITHIN_S", 0.01)

    async def case() -> str:
        child, reach = RemoteChild("chat/0"), Reach(Silent(), "box/0 (10.0.0.1)")
        child._parts.append((reach, "chat/0 0"))
        stopping = asyncio.create_task(child.stop())
        await child.stop(verify=False)
        await asyncio.sleep(0.05)
        assert not stopping.done(), "while the service runs, its GPUs are not free before it is known"
        while not (why := await reach.ping()):
            pass
        reach.lose(why)
        await asyncio.wait_for(stopping, 1.0)
        with pytest.raises(EngineError, match=r"node box/0 \(10.0.0.1\) has been silent for 0.04 s"):
            await reach.ask("url", "chat/0 0")
        return await silence(Silent().remote(), 0.01)

    assert asyncio.run(case()) == "nothing within 0.01 s"


def test_a_host_that_hears_nothing_of_the_service_ends_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("waterline.service.ray_host.LEASE_S", 0.4)

    async def case() -> float:
        kept = Kept(str(tmp_path), grace_s=0.2)
        with (tmp_path / "log").open("ab") as log:
            held = kept.held["train/0"] = await Held.start(
                ("0.2", "sleep", "60"), {MARK: f"{tmp_path}/jobs/train%2F0"}, log
            )
        minding = asyncio.create_task(kept.mind_the_lease())
        for _ in range(10):
            await asyncio.sleep(0.05)
            kept.heard_s = time.monotonic()
        assert find_process(held.pid), "while it hears of the service, all goes on"
        await held.wait()
        ended_s = time.monotonic() - kept.heard_s
        await until(lambda: not kept.held)
        assert held in kept.given_up, "which is no fault of the run"
        minding.cancel()
        return ended_s

    assert asyncio.run(case()) >= 0.4


def test_a_run_that_was_lost_starts_elsewhere_when_it_has_surely_ended_where_it_was_and_there_at_once() -> None:
    cluster = object.__new__(RayCluster)
    cluster._fences = {"train/0": ("id-1", time.monotonic() + 50.0)}
    with pytest.raises(EngineError, match=r"it may still run on the node that was lost, for (50|49) s at most"):
        cluster._check_fence("train/0", node(2))
    cluster._check_fence("train/0", node(1))
    cluster._check_fence("train/0", node(2))


# --- A cluster of two nodes on this machine -------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a cluster of one node with two GPUs, which are only a number here; the other comes later."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'waterline-llm[ray]'")
    utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2] / 'src'}:{os.environ.get('PYTHONPATH', '')}")
    made = utils.Cluster()
    made.add_node(num_cpus=1, num_gpus=2, include_dashboard=False)
    yield made
    made.shutdown()


def two_nodes() -> Plan:
    plan = fake_plan({"chat": 2}, output_tokens=5)
    places = [Place(node=number, gpus=(0,)) for number in range(2)]
    replicas = tuple(replace(one, places=(place,)) for one, place in zip(plan.replicas, places, strict=True))
    return replace(plan, fleet=replace(plan.fleet, pools=(pool("box", nodes=2, gpus=2),)), replicas=replicas)


async def asked(service: Served) -> str:
    reply = await service.openai.chat.completions.create(model="chat", messages=QUESTION)
    return reply.choices[0].message.content or ""


def said(path: Path) -> str:
    return path.read_text()


def parent(service: Served, replica: str) -> int:
    """Return the process that holds a replica: the actor of its node."""
    process = find_process(service.supervisor.states[replica].pid or 0)
    assert process
    return process.parent


async def a_job_saves_its_work_on_its_node(service: Served, checkpoint: Path, holder: int) -> None:
    jobs = service.jobs
    command = f'trap "echo $CUDA_VISIBLE_DEVICES > {checkpoint}; exit 3" TERM; touch {checkpoint}.up; while :; do sleep 0.05; done'
    one = Job(name="train", tenant="enterprise", command=("sh", "-c", command), checkpoint=str(checkpoint), load_s=0.1)
    jobs.fleet = replace(jobs.fleet, jobs=(one,))
    name = await begun(service, checkpoint)
    process = find_process(jobs.states[name].pid or 0)
    assert process
    assert process.parent == holder, "beside the engine of that node"
    await jobs.stop(name, 5.0)
    assert jobs.states[name].status == "stopped", "it yields, whatever its exit code"
    assert said(checkpoint) == "1\n"
    assert find_process(process.pid) is None


async def begun(service: Served, checkpoint: Path) -> str:
    """Start a run of the job on the second node, and wait until it has begun and would save its work."""
    up = checkpoint.with_suffix(".up")
    remove(up, checkpoint)
    name = service.jobs.start(service.jobs.fleet.jobs[0], 0, "box", Place(node=1, gpus=(1,)))
    await until(lambda: up.exists() and service.jobs.states[name].status == "running")
    return name


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def test_engines_run_on_their_nodes_and_come_back_when_they_or_their_node_die(cluster: Any, tmp_path: Path) -> None:
    ray = RayCluster(cluster.address)

    async def case() -> None:
        plan = two_nodes()
        with pytest.raises(EngineError, match="pool 'box' wants 2 nodes of 2 GPUs .*; the Ray cluster has 1 for it"):
            ray.prepare(plan)
        cluster.add_node(num_cpus=1, num_gpus=2)
        async with served(plan, prepare=ray.prepare, nodes=ray) as service:
            states = service.supervisor.states
            said = await asked(service)
            holders = {parent(service, "chat/0"), parent(service, "chat/1")}
            assert len(holders) == 2, "one on each node"

            await a_job_saves_its_work_on_its_node(service, tmp_path / "saved", parent(service, "chat/1"))

            os.kill(states["chat/0"].pid or 0, signal.SIGKILL)
            await until(lambda: states["chat/0"].restarts == 1 and states["chat/0"].status == "ready")
            assert parent(service, "chat/0") in holders, "on its node again"

            last = {replica: state.pid or 0 for replica, state in states.items()}
            name = await begun(service, tmp_path / "saved")
            ray._ray.kill(ray._reaches[ray._nodes["box", 1].id].actor)  # as Ray does when we are killed ourselves
            await until((tmp_path / "saved").exists)
            await service.jobs.stop(name, 5.0)
            await until(lambda: states["chat/1"].status == "backing off")
            assert "node box/1" in states["chat/1"].reason
            assert await asked(service) == said
            await until(lambda: find_process(last["chat/1"]) is None)
            await until(lambda: states["chat/1"].status == "ready")
            assert parent(service, "chat/1") not in holders

            draining = service.shore.drain("chat/1", within_s=5.0)
            pid = states["chat/1"].pid or 0
            await draining
            assert find_process(pid) is None
            assert await asked(service) == said
            pids = [state.pid or 0 for state in states.values()]
        assert not any(map(find_process, pids)), "nothing is left"

    try:
        asyncio.run(case())
    finally:
        ray.leave()
