"""Nodes that are lost while the service runs, and come back: what is lent, what jobs do, and what people are told."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from msgspec.structs import replace
from serving import served, until
from test_minutes import SPEED, counts, lending_plan

from waterline.plan import Place, Plan
from waterline.service.child import Child, Running
from waterline.service.engines import Engine
from waterline.service.jobs import Holding, Spot, ThisMachine
from waterline.service.minutes import replay_record
from waterline.service.nodes import Sight
from waterline.service.processes import kill_marked
from waterline.service.state import State

SIGNALS = "signals.jsonl"


class Machines(ThisMachine):
    """Nodes on this machine that can be taken away, and all their processes with them."""

    def __init__(self, *spots: Spot) -> None:
        self.away: set[Spot] = set()
        self.holding: dict[Spot, list[str]] = {spot: [] for spot in spots}

    async def launch(self, engine: Engine, state: State | None = None, replica: str = "") -> Running:
        return await Child.start(engine, state, replica)

    async def hold(self, spot: Spot, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Holding:
        self.holding[spot].append(environment["WATERLINE_OWNER"])
        return await super().hold(spot, arguments, environment, log)

    async def look(self) -> None:
        pass

    def sights(self) -> Mapping[Spot, Sight]:
        return {
            spot: Sight("silent", "10.0.0.1", "It says nothing.") if spot in self.away else Sight("up", "10.0.0.1")
            for spot in self.holding
        }

    def lose(self, spot: Spot) -> None:
        self.away.add(spot)
        for mark in self.holding[spot]:
            kill_marked(mark)


def two_nodes(folder: Path) -> Plan:
    plan = lending_plan(folder)
    [pool] = plan.fleet.pools
    job = replace(plan.fleet.jobs[0], copies=3)
    public, research = plan.fleet.tenants
    tenants = (replace(public, deserved=0.75), replace(research, deserved=0.25))
    fleet = replace(plan.fleet, pools=(replace(pool, nodes=2, gpus_per_node=2),), jobs=(job,), tenants=tenants)
    return replace(plan, fleet=fleet)


def signals(folder: Path) -> Iterator[dict[str, Any]]:
    for line in (folder / SIGNALS).read_bytes().splitlines():
        yield orjson.loads(line)


def test_a_node_that_is_lost_is_lent_no_more_and_its_jobs_go_on_elsewhere_until_it_is_back(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("waterline.service.nodes.LOOK_EVERY_S", 0.02)
    machines = Machines(("box", 0), ("box", 1))

    async def case() -> Path:
        async with served(two_nodes(tmp_path), nodes=machines) as service:
            service.keeper.lend(SPEED)
            await until(lambda: counts(service) == {"chat": 1, "train": 3})
            await until(lambda: all((tmp_path / f"train.{copy}").exists() for copy in range(3)))

            machines.lose(("box", 1))
            await until(lambda: counts(service) == {"chat": 1, "train": 1})
            await asyncio.sleep(0.3)
            assert counts(service) == {"chat": 1, "train": 1}, "nobody gets GPUs of it"
            now = service.gateway.snapshot()
            assert now.node_states == {"up": 1, "silent": 1}
            lost, there = now.nodes
            assert (there.node, there.users) == (0, ("chat/0", *(job.job for job in now.jobs if job.gpus)))
            assert (lost.node, lost.users) == (1, ())
            assert [use.gpus for use in now.uses if use.kind == "lost"] == [2.0]
            assert "Node box/1 is silent, nobody gets its 2 GPUs: It says nothing." in now.problems
            assert service.keeper.minutes
            assert service.keeper.minutes.roster.tide.down_gpus.tolist() == [0, 2]

            machines.away.clear()
            await until(lambda: counts(service) == {"chat": 1, "train": 3})
            assert service.gateway.snapshot().node_states == {"up": 2}

            machines.lose(("box", 0))
            await until(lambda: "chat/0" not in service.supervisor.states and counts(service)["chat"] == 1)
            [chat] = service.shore.replicas.values()
            assert chat.places == (Place(node=1, gpus=chat.places[0].gpus),), "who is asked gets the GPUs of a job"
            await until(lambda: service.supervisor.states[chat.id].status == "ready")
            return service.state.path

    folder = asyncio.run(case())
    told = [signal for signal in signals(folder) if signal["signal"] in {"down", "up"}]
    assert [(one["signal"], one["node"], one["gpus"]) for one in told] == [("down", 1, 2), ("up", 1, 2), ("down", 0, 2)]
    assert replay_record(folder) == (folder / "decisions.jsonl").read_bytes()
