"""Runs of jobs start, save their work, yield and come back, and nobody of them is left: real processes."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serving import until

from waterline.errors import EngineError
from waterline.fleet import Fleet, Job, Model, Pool, Tenant
from waterline.plan import Place
from waterline.service.jobs import CRASHES, Holding, Jobs, Machines, RunState, ThisMachine, saved_at_s
from waterline.service.processes import end_marked, marked
from waterline.service.state import State, claim_state

# Four ranks in sessions of their own, as torchrun starts them; each notes that it was told to stop, and goes on.
RANKS = """
import os, pathlib, signal, subprocess, sys, time
rank = '''
import os, pathlib, signal, sys, time
folder, deaf = pathlib.Path(os.environ["WATERLINE_CHECKPOINT"]), sys.argv[2] == "deaf"
def stop(number, frame):
    (folder / ("saved." + sys.argv[1])).write_text("1")
    sys.exit(0) if not deaf else None
signal.signal(signal.SIGTERM, stop)
(folder / ("up." + sys.argv[1])).write_text(str(os.getpid()))
while True: time.sleep(0.02)
'''
ranks = [
    subprocess.Popen([sys.executable, "-S", "-c", rank, str(n), sys.argv[1]], start_new_session=True) for n in range(4)
]
def stop(number, frame):
    for one in ranks: one.terminate()
    if sys.argv[1] != "deaf":
        for one in ranks: one.wait()
        sys.exit(1)
signal.signal(signal.SIGTERM, stop)
while True: time.sleep(0.02)
"""


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


def job(*command: str, checkpoint: Path | None = None, load_s: float = 0.0) -> Job:
    return Job(
        name="pretrain", tenant="research", command=command, gpus=2, checkpoint=str(checkpoint or ""), load_s=load_s
    )


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code, *arguments)


def read(path: str) -> str:
    return Path(path).read_text()


def ranks(folder: Path) -> list[int]:
    return [int(text) for path in folder.glob("up.*") if (text := path.read_text())]


@dataclass(frozen=True, kw_only=True)
class Running:
    jobs: Jobs
    told: list[RunState]
    state: State

    @property
    def statuses(self) -> list[str]:
        return ["", *(state.status for state in self.told)]


@asynccontextmanager
async def running(
    gpu: str = "h100-sxm-80g", grace_s: float = 5.0, machines: Machines | None = None
) -> AsyncIterator[Running]:
    fleet = Fleet(
        name="box",
        pools=(Pool(name="box", gpu=gpu, nodes=1, gpus_per_node=4, usd_per_gpu_hour=1.0),),
        models=(Model(name="chat", weights="waterline/abacus"),),
        tenants=(Tenant(name="research", grace_s=grace_s),),
    )
    told: list[RunState] = []
    with claim_state("box") as state:
        jobs = Jobs(fleet, state, lambda _name, run: told.append(run), machines)
        try:
            yield Running(jobs=jobs, told=told, state=state)
        finally:
            await jobs.stop_all(0.0)
            assert marked(state.mark) == []


def start(service: Running, one: Job, copy: int = 0) -> str:
    return service.jobs.start(one, copy, "box", Place(node=0, gpus=(1, 3)))


@pytest.mark.parametrize(
    ("gpu", "mask"), [("h100-sxm-80g", "CUDA_VISIBLE_DEVICES"), ("mi300x", "HIP_VISIBLE_DEVICES"), ("cpu", "")]
)
def test_a_run_is_told_its_gpus_its_checkpoint_and_its_grace(gpu: str, mask: str, tmp_path: Path) -> None:
    async def case() -> str:
        async with running(gpu) as service:
            code = "import os, sys; print(sys.argv[1], sorted((k, v) for k, v in os.environ.items() if k in sys.argv[2].split()))"
            names = f"{mask} WATERLINE_JOB WATERLINE_RUN WATERLINE_COPY WATERLINE_GPUS WATERLINE_CHECKPOINT WATERLINE_GRACE_S"
            start(service, job(*python(code, "copy {copy}", names), checkpoint=tmp_path / "{copy}"), copy=7)
            await until(lambda: service.statuses[-1] == "done")
            return read(service.told[-1].log)

    said = asyncio.run(case())
    expected = {
        **({mask: "1,3"} if mask else {}),
        "WATERLINE_CHECKPOINT": str(tmp_path / "7"),
        "WATERLINE_COPY": "7",
        "WATERLINE_GPUS": "1,3",
        "WATERLINE_GRACE_S": "5",
        "WATERLINE_JOB": "pretrain",
        "WATERLINE_RUN": "pretrain/7",
    }
    assert said == f"copy 7 {sorted(expected.items())}\n"


def test_a_run_is_told_to_stop_saves_its_work_and_is_not_done_whatever_its_exit_code(tmp_path: Path) -> None:
    async def case() -> list[str]:
        async with running() as service:
            name = start(service, job(*python(RANKS, "polite"), checkpoint=tmp_path))
            await until(lambda: len(ranks(tmp_path)) == 4 and service.statuses[-1] == "running")
            assert len(marked(service.state.mark)) == 6, "the holder, the launcher and its ranks"
            await service.jobs.stop(name, 5.0)
            assert marked(service.state.mark) == []
            assert service.jobs.states[name].status == "stopped"
            return service.statuses

    statuses = asyncio.run(case())
    assert statuses == ["", "loading", "running", "stopping", "stopped"]
    assert len(list(tmp_path.glob("saved.*"))) == 4


def test_ranks_that_do_not_stop_are_killed_in_whatever_session_when_their_time_is_up(tmp_path: Path) -> None:
    async def case() -> float:
        async with running() as service:
            name = start(service, job(*python(RANKS, "deaf"), checkpoint=tmp_path))
            await until(lambda: len(ranks(tmp_path)) == 4)
            begun_s = time.monotonic()
            await service.jobs.stop(name, 0.5)
            assert marked(service.state.mark) == []
            return time.monotonic() - begun_s

    took_s = asyncio.run(case())
    print(f"gone {took_s:.2f} s after it was told, with 0.5 s to save")
    assert 0.5 <= took_s < 1.5
    assert len(list(tmp_path.glob("saved.*"))) == 4, "they were told, and stayed"


@pytest.mark.parametrize("victim", ["launcher", "holder"])
def test_ranks_whose_launcher_was_killed_do_not_go_on(victim: str, tmp_path: Path) -> None:
    async def case() -> list[int]:
        async with running(grace_s=0.3) as service:
            start(service, job(*python(RANKS, "deaf"), checkpoint=tmp_path))
            await until(lambda: len(ranks(tmp_path)) == 4)
            holder = service.told[-1].pid
            assert holder
            [launcher] = [one.pid for one in marked(service.state.mark) if one.parent == holder]
            old = ranks(tmp_path)
            os.kill(launcher if victim == "launcher" else holder, signal.SIGKILL)
            await until(lambda: service.statuses[-1] == "backing off")
            return [pid for pid in old if any(one.pid == pid for one in marked(service.state.mark))]

    assert asyncio.run(case()) == []


def test_a_run_that_left_by_itself_with_0_is_done() -> None:
    async def case() -> list[str]:
        async with running() as service:
            start(service, job(*python("")))
            await until(lambda: service.statuses[-1] == "done")
            return service.statuses

    assert asyncio.run(case())[-1] == "done"


def test_a_run_that_keeps_crashing_waits_longer_and_longer_and_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waterline.service.jobs.FIRST_DELAY_S", 0.01)

    async def case() -> list[RunState]:
        async with running() as service:
            start(service, job("no-such-program"))
            await until(lambda: service.statuses[-1] == "given up")
            assert read(service.told[-1].log) == "cannot start no-such-program: No such file or directory\n" * 5
            return [state for state in service.told if state.reason]

    told = asyncio.run(case())
    assert [state.status for state in told] == ["backing off"] * 4 + ["given up"]
    waits = [state.reason.rpartition("again in ")[2] for state in told[:-1]]
    assert waits == ["0.01 s.", "0.02 s.", "0.04 s.", "0.08 s."]
    assert told[-1].reason.startswith(
        "It has crashed 5 times without a checkpoint between: its command cannot be started"
    )


def test_a_run_that_was_killed_is_told_by_whom_it_may_have_been() -> None:
    async def case() -> str:
        async with running() as service:
            start(service, job(*python("import os; os.kill(os.getpid(), 9)")))
            await until(lambda: service.statuses[-1] == "backing off")
            assert service.jobs.now()[0].reason == service.told[-1].reason, "operators see it"
            return service.told[-1].reason

    assert asyncio.run(case()).startswith("it was ended by SIGKILL, as the system does when memory is short, see ")


def test_a_run_that_talks_all_day_does_not_fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waterline.service.jobs.LOG_BYTES", 10_000)
    monkeypatch.setattr("waterline.service.jobs.LOOK_AT_LOG_S", 0.02)

    async def case() -> Path:
        async with running(grace_s=0.1) as service:
            name = start(service, job("sh", "-c", "i=0; while :; do i=$((i+1)); echo line $i; done"))
            log = Path(service.jobs.states[name].log)
            kept = log.with_suffix(".log.1")
            for _ in range(2):
                await until(lambda: kept.exists() and kept.stat().st_size == 10_000)
                kept.unlink()
            await until(lambda: kept.exists() and kept.stat().st_size == 10_000)
            return log

    log = asyncio.run(case())
    assert b"line" in log.with_suffix(".log.1").read_bytes()
    assert b"\0" not in log.read_bytes() + log.with_suffix(".log.1").read_bytes(), "it goes on at the beginning"


class Failing(ThisMachine):
    """A node that goes away with the first run on it, and is away for a while."""

    def __init__(self, away: int) -> None:
        self.lost = [f"node box/0 is away for the {number}. time." for number in range(away)]

    async def hold(self, *arguments: Any) -> Holding:
        if len(self.lost) > 1:
            raise EngineError(self.lost.pop())
        held = await super().hold(*arguments)
        return Gone(held, self.lost.pop()) if self.lost else held


@dataclass(frozen=True)
class Gone:
    """A holder whose node goes away."""

    held: Holding
    why: str

    @property
    def pid(self) -> int:
        return self.held.pid

    def tell(self, data: bytes) -> None:
        self.held.tell(data)

    async def wait(self) -> int:
        raise EngineError(self.why)


def test_a_run_whose_node_is_gone_has_not_crashed_and_waits_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("waterline.service.jobs.NODE_AGAIN_S", 0.01)
    code = "import os, time; open(os.environ['WATERLINE_CHECKPOINT'], 'a').write('up'); time.sleep(60)"

    async def case() -> list[RunState]:
        async with running(grace_s=0.1, machines=Failing(away=3 * CRASHES)) as service:
            start(service, job(*python(code), checkpoint=tmp_path / "up"))
            await until(lambda: service.statuses[-2:] == ["loading", "running"] and (tmp_path / "up").exists())
            return service.told

    told = asyncio.run(case())
    lost = [state.reason for state in told if state.status == "backing off"]
    assert len(lost) == 3 * CRASHES
    assert lost[-1] == "node box/0 is away for the 0. time. It is tried again every 0.01 s."
    assert not {"given up", "done"} & {state.status for state in told}


def test_a_crash_after_a_new_checkpoint_is_the_first_one_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waterline.service.jobs.FIRST_DELAY_S", 0.01)
    code = (
        "import pathlib, os; pathlib.Path(os.environ['WATERLINE_CHECKPOINT']).write_text('step'); raise SystemExit(3)"
    )

    async def case() -> list[str]:
        async with running() as service:
            start(service, job(*python(code), checkpoint=tmp_path / "step"))
            await until(lambda: service.statuses.count("backing off") >= 7)
            return [state.reason.rpartition("again in ")[2] for state in service.told if state.reason]

    assert set(asyncio.run(case())) == {"0.01 s."}


def test_work_is_saved_when_something_new_lies_in_the_folder_and_not_before(tmp_path: Path) -> None:
    assert saved_at_s(None) == saved_at_s(tmp_path) == saved_at_s(tmp_path / "none") == 0.0
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-5" / "rank0").write_text("weights")
    os.utime(tmp_path / "step-5", (10, 10))
    os.utime(tmp_path / "step-5" / "rank0", (20, 20))
    assert saved_at_s(tmp_path) == 20.0
    assert saved_at_s(tmp_path / "step-5" / "rank0") == 20.0


def test_who_is_left_by_a_killed_service_is_found_by_the_next_and_two_services_do_not_meet() -> None:
    async def case() -> None:
        with claim_state("box") as first:
            with claim_state("box") as second:
                assert (second.path.name, second.abandoned) == ("box-2", (str(second.path),))
            process = await asyncio.create_subprocess_exec(
                *python("import time; time.sleep(60)"),
                env={**os.environ, **first.environment("jobs/pretrain/0")},
                start_new_session=True,
            )
            with claim_state("box") as second:
                assert await second.end_orphans(0.0) == 0
            assert process.returncode is None, "its service runs"
        with claim_state("box") as again:
            assert await again.end_orphans(0.0) == 1
            assert await process.wait() == -signal.SIGKILL

    asyncio.run(case())


SERVICE = """
import asyncio, sys
from waterline.errors import EngineError
from waterline.fleet import Fleet, Job, Model, Pool, Tenant
from waterline.plan import Place
from waterline.service.jobs import Jobs
from waterline.service.state import claim_state
fleet = Fleet(
    name="box",
    pools=(Pool(name="box", gpu="cpu", nodes=1, gpus_per_node=1, usd_per_gpu_hour=1.0),),
    models=(Model(name="chat", weights="waterline/abacus"),),
    tenants=(Tenant(name="research"),),
)
job = Job(name="pretrain", tenant="research", command=tuple(sys.argv[2:]), gpus=1, checkpoint=sys.argv[1])
async def case(state):
    Jobs(fleet, state, lambda *_: None).start(job, 0, "box", Place(node=0, gpus=(0,)))
    await asyncio.sleep(60)
with claim_state("box") as state:
    asyncio.run(case(state))
"""


def test_a_job_that_outlives_its_service_is_told_to_save_and_is_ended_by_the_next(tmp_path: Path) -> None:
    async def case() -> tuple[int, float]:
        with claim_state("box") as state:
            mark = state.mark
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", SERVICE, str(tmp_path), *python(RANKS, "deaf")), stdout=asyncio.subprocess.DEVNULL
        )
        await until(lambda: len(ranks(tmp_path)) == 4)
        process.kill()
        await process.wait()
        await until(lambda: len(list(tmp_path.glob("saved.*"))) == 4)
        with claim_state("box") as state:
            assert state.mark == mark
            begun_s = time.monotonic()
            ended = await state.end_orphans(0.3)
            assert marked(mark) == []
            return ended, time.monotonic() - begun_s

    ended, took_s = asyncio.run(case())
    print(f"{ended} processes ended in {took_s:.2f} s, of which 0.3 s were their grace")
    assert ended == 6


def test_a_mark_is_not_that_of_a_name_it_begins_with() -> None:
    async def case() -> None:
        process = await asyncio.create_subprocess_exec(
            *python("import time; time.sleep(60)"), env={**os.environ, "WATERLINE_OWNER": "/here/box-2/jobs/a"}
        )
        await until(lambda: bool(marked("/here/box-2")))
        assert marked("/here/box") == []
        assert [one.pid for one in marked("/here/box-2/jobs")] == [process.pid]
        assert await end_marked("/here/box-2") == []
        await process.wait()

    asyncio.run(case())
