"""The minutes clock, live: GPUs go where the load is and come back, and the record replayed decides the same again."""

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import orjson
from msgspec.structs import replace
from openai import RateLimitError
from serving import QUESTION, Served, fake_plan, served, until

from waterline.fleet import Job, Tenant
from waterline.plan import Place, Plan, Replica, Shape, write_plan
from waterline.policy.tide import signal_line
from waterline.rehearsal.minutes import Minutes as Rehearsed
from waterline.roster import Roster
from waterline.service.jobs import OVER
from waterline.service.minutes import decision_lines, lends, replay_record, startable
from waterline.service.processes import marked
from waterline.service.shore import gpus_of

SPEED = 100.0  # a step of 10 s takes 100 ms, and what is spare for 300 s is handed back after 3 s
WORKER = """
import os, pathlib, signal, sys, time
checkpoint = pathlib.Path(os.environ["WATERLINE_CHECKPOINT"])
def save(*_):
    checkpoint.write_text(str(steps)); sys.exit(1)
signal.signal(signal.SIGTERM, save)
steps = int(checkpoint.read_text()) if checkpoint.exists() else 0
while steps < int(sys.argv[1]):
    time.sleep(0.02); steps += 1
    if steps % 25 == 0: checkpoint.write_text(str(steps))
checkpoint.write_text(str(steps))
"""


def lending_plan(folder: Path, *, steps: int = 10**6, gpus: int = 4) -> Plan:
    """Return a plan of one replica of 'chat' on four GPUs; research has as many runs, and saves its steps."""
    plan = fake_plan({"chat": 1})
    [planned] = plan.replicas
    figures = {name: getattr(planned, name) for name in Shape.__struct_fields__} | {
        "requests_per_s": 4.0,
        "load_s": 60.0,
    }
    job = Job(
        name="train",
        tenant="research",
        command=(sys.executable, "-S", "-c", WORKER, str(steps)),
        gpus=1,
        copies=gpus,
        pools=("box",),
        checkpoint=str(folder / "train.{copy}"),
        checkpoint_every_s=1.0,
        load_s=0.2,
    )
    fleet = replace(
        plan.fleet,
        pools=(replace(plan.fleet.pools[0], gpus_per_node=gpus),),
        tenants=(
            Tenant(name="public", deserved=0.5, priority=1, grace_s=100.0, min_runtime_s=0.0, anonymous=True),
            Tenant(name="research", deserved=0.5, grace_s=200.0, min_runtime_s=0.0),
        ),
        demand=(replace(plan.fleet.demand[0], tenant="public", prompt_tokens=10, output_tokens=10),),
        jobs=(job,),
    )
    chat = replace(planned, requests_per_s=4.0, places=(Place(node=0, gpus=(0,)),))
    tenants = tuple(replace(plan.tenants[0], tenant=tenant.name) for tenant in fleet.tenants)
    return replace(plan, fleet=fleet, tenants=tenants, replicas=(chat,), shapes=(Shape(**figures),))


@asynccontextmanager
async def surge(service: Served, *, sure: bool = True) -> AsyncIterator[None]:
    """Ask five times what one replica can do, inside the block; `sure`: all are answered, or refused in time."""
    asking = []

    async def ask() -> None:
        while True:
            chat = service.openai.chat.completions
            asking.append(asyncio.create_task(chat.create(model="chat", messages=QUESTION, max_tokens=10)))
            await asyncio.sleep(1 / 20)

    surging = asyncio.create_task(ask())
    yield
    surging.cancel()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    lost = [answer for answer in answers if isinstance(answer, Exception) and not isinstance(answer, RateLimitError)]
    assert not (sure and lost), lost


def counts(service: Served) -> Counter[str]:
    """Return how many replicas and runs have GPUs."""
    runs = [run for run in service.jobs.states.values() if run.status in {"loading", "running", "stopping"}]
    return Counter({"chat": len(service.supervisor.states), "train": len(runs)})


def test_a_surge_gets_the_gpus_of_research_and_hands_them_back_and_the_record_replayed_decides_the_same(
    tmp_path: Path,
) -> None:
    plan = lending_plan(tmp_path)

    async def case() -> tuple[Path, Counter[str]]:
        async with served(plan) as service:
            service.keeper.lend(SPEED)
            await until(lambda: counts(service) == {"chat": 1, "train": 3})
            async with surge(service):
                await until(lambda: counts(service)["chat"] >= 2 and not_ready(service) == [])
            assert {one.status for one in service.completions} <= {"ok", "refused"}
            await until(lambda: counts(service) == {"chat": 1, "train": 3})
            now = service.gateway.snapshot()
            assert sum(use.gpus for use in now.uses if (use.tenant, use.kind) == ("research", "job")) == 3.0
            assert sum(job.stops for job in now.jobs) >= 1
            moves = Counter((move.kind, move.rule) for move in now.moves)
            assert moves["start", "claim kept"] >= 1
            assert moves["hand back", "surplus"] >= 1
            return service.state.path, Counter(one.status for one in service.completions)

    folder, completions = asyncio.run(case())
    print(completions)
    assert sum(int(saved.read_text()) for saved in tmp_path.glob("train.?")) > 0, "they have saved their work"
    kinds = Counter(orjson.loads(line)["signal"] for line in (folder / "signals.jsonl").read_bytes().splitlines())
    print(dict(kinds))
    assert min(kinds[kind] for kind in ("begun", "load", "tick", "loaded", "saved", "ended")) > 0
    decisions = (folder / "decisions.jsonl").read_bytes()
    assert decisions.count(b"\n") >= 6
    assert replay_record(folder) == decisions


class Idle:
    """A station of a rehearsal that has replicas and no requests: whatever it is told, nothing follows."""

    rows = 0

    def start_all(self, replicas: Sequence[Replica], _ready_ps: int) -> Sequence[int]:
        self.rows += len(replicas)
        return range(self.rows - len(replicas), self.rows)

    def idle(self, _row: int) -> bool:
        return True

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_: None


@dataclass
class Scripted:
    """A meter of a rehearsal that reads what the script says, step by step."""

    asked: Iterator[float]

    def loads(self) -> dict[int, float]:
        return {0: next(self.asked), 1: 0.0}


def test_the_signals_of_a_rehearsal_make_the_live_service_decide_as_the_rehearsal_did(tmp_path: Path) -> None:
    plan = lending_plan(tmp_path)
    write_plan(plan, tmp_path / "plan.json")
    roster = Roster(plan, plan.replicas, hour=9)
    asked = (10.0 * (20.0 if 30 <= step < 90 else 1.0) for step in range(400))  # in a step of 10 s
    rehearsed = Rehearsed(plan, roster, Idle(), rows=plan.fleet.demand, first_hour=9, length_s=3000.0)
    rehearsed.meter = Scripted(asked)  # type: ignore[assignment]
    rehearsed.signals = []
    rehearsed.advance(3000.0)
    record = [{"at_s": 9 * 3600.0, "signal": "begun"}, *rehearsed.signals]
    (tmp_path / "signals.jsonl").write_bytes(b"".join(map(signal_line, record)))
    moves = Counter(move.kind for move in rehearsed.moves)
    print(dict(moves))
    assert min(moves[kind] for kind in ("start", "drain", "hold", "hand back")) > 0  # type: ignore[index]
    assert replay_record(tmp_path) == decision_lines(rehearsed.log.rows, roster)


def test_a_job_that_is_done_is_not_started_again(tmp_path: Path) -> None:
    async def case() -> Counter[str]:
        async with served(lending_plan(tmp_path, steps=5)) as service:
            service.keeper.lend(SPEED)
            await until(lambda: sum(run.status == "done" for run in service.jobs.states.values()) == 4)
            await asyncio.sleep(0.5)
            return Counter(run.starts for run in service.jobs.states.values())

    assert asyncio.run(case()) == {1: 4}


def not_ready(service: Served) -> list[str]:
    return [replica for replica, state in service.supervisor.states.items() if state.status != "ready"]


def gpus_in_use(service: Served) -> list[tuple[str, int, int]]:
    """Return the GPUs of all replicas and runs, as often as they are used."""
    runs = [run for run in service.jobs.states.values() if run.status not in OVER]
    of_runs = [gpu for run in runs for gpu in gpus_of(run.pool, [run.place])]
    return [*service.shore.taken, *of_runs]


def test_whatever_dies_no_gpu_is_used_twice_and_the_record_still_replays(tmp_path: Path) -> None:
    plan = lending_plan(tmp_path)
    dice = random.Random(5)

    async def kill(service: Served) -> int:
        """Kill one process of ours after the other, whatever it is; return how many."""
        killed = 0
        for _ in range(20):
            await asyncio.sleep(0.1)
            if ours := marked(service.state.mark):
                with suppress(ProcessLookupError):
                    os.kill(dice.choice(ours).pid, signal.SIGKILL)
                    killed += 1
        return killed

    async def look(service: Served) -> None:
        while True:
            used = gpus_in_use(service)
            assert len(used) == len(set(used)) <= 4, used
            await asyncio.sleep(0.01)

    async def case() -> tuple[int, Path]:
        async with served(plan) as service:
            service.keeper.lend(SPEED)
            looking = asyncio.create_task(look(service))
            async with surge(service, sure=False):
                killed = await kill(service)
            await until(lambda: counts(service)["chat"] >= 1 and counts(service)["train"] >= 2)
            free = service.keeper.minutes.roster.tide.free_gpus.sum() if service.keeper.minutes else None
            print(f"{killed} killed, {free} GPUs free at the end, {counts(service)}")
            assert not looking.done(), looking.result()
            looking.cancel()
            return killed, service.state.path

    killed, folder = asyncio.run(case())
    assert killed > 8
    assert replay_record(folder) == (folder / "decisions.jsonl").read_bytes()


def test_a_new_plan_during_a_surge_keeps_the_replicas_that_were_started_for_it(tmp_path: Path) -> None:
    plan = lending_plan(tmp_path)
    longer = replace(plan, fleet=replace(plan.fleet, jobs=(replace(plan.fleet.jobs[0], copies=1),)))

    async def case() -> None:
        async with served(plan) as service:
            service.keeper.lend(SPEED)
            await until(lambda: counts(service) == {"chat": 1, "train": 3})
            async with surge(service):
                await until(lambda: counts(service)["chat"] >= 2 and not_ready(service) == [])
                pids = [state.pid for state in service.supervisor.states.values()]
                await service.keeper.move_to(longer)
                assert [state.pid for state in service.supervisor.states.values()] == pids
                await until(lambda: counts(service)["train"] == 1)
            assert {one.status for one in service.completions} <= {"ok", "refused"}

    asyncio.run(case())


def test_a_fleet_with_nothing_to_lend_between_is_left_as_it_is_planned(tmp_path: Path) -> None:
    plan = lending_plan(tmp_path)
    job = replace(plan.fleet.jobs[0], command=())  # it is only rehearsed
    elsewhere = replace(plan.shapes[0], engine="openai")
    assert lends(startable(plan))
    assert not lends(startable(replace(plan, fleet=replace(plan.fleet, jobs=()))))
    assert not lends(startable(replace(plan, fleet=replace(plan.fleet, jobs=(job,)))))
    assert not lends(startable(replace(plan, shapes=(elsewhere,))))
