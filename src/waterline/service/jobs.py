"""Runs of jobs: research that has GPUs until somebody else needs them.

A run is a command of the fleet file, in a process that holds whatever comes of it (see `holder`). It is told by its
environment which GPUs it has, where its checkpoint is, and how long it gets to save its work when it must stop. How it
ends is judged by who wanted it and by what it has saved, not by its exit code alone: launchers answer SIGTERM with 1.

- It was told to stop: it will be started again from its checkpoint, whatever its exit code.
- It left by itself with 0: it is done.
- It left by itself with anything else: it has crashed, and is started again on its GPUs, at once if it has saved
  something since it started, else after longer and longer waits; after `CRASHES` without a checkpoint it is given up.
- Its node is gone, which is no fault of its own: it is started again when there is one in its place.

Its GPUs are free when the last of its processes is gone, and not before: that is looked at, not believed.
"""

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, get_args
from urllib.parse import quote

import structlog

from waterline.errors import EngineError
from waterline.fleet import Fleet, Job
from waterline.plan import Place
from waterline.service.engines.seat import VISIBLE_DEVICES, environment_of
from waterline.service.processes import end_marked, marked
from waterline.service.state import State
from waterline.snapshot import JobNow

HOLDER = str(Path(__file__).with_name("holder.py"))
CRASHES = 5  # in a row, without a new checkpoint
FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 300.0
NODE_AGAIN_S = 5.0  # between two looks for a node that is gone
LOOK_AGAIN_S = 5.0  # for processes that hang in the kernel
LOOKS_A_CHECKPOINT = 20  # at the folder, while one is awaited; but at most
LOOK_SELDOM_S = 10.0  # so seldom, and
LOOK_OFTEN_S = 0.1  # so often
LOG_BYTES = 64 * 1024**2  # then it is put aside, and one older is forgotten
LOOK_AT_LOG_S = 1.0
CANNOT_START = 127  # what the holder leaves with, and a shell
COPY = "{copy}"  # in a command and the path of a checkpoint: the number of the copy

log = structlog.get_logger()

Spot = tuple[str, int]  # pool, and the number of a node in it
RunStatus = Literal["loading", "running", "backing off", "stopping", "stuck", "stopped", "done", "given up"]
RUN_STATUSES: tuple[RunStatus, ...] = get_args(RunStatus)
SAID: Mapping[RunStatus, str] = {"loading": "starting", "stopping": "checkpointing", "stopped": "waiting"}  # to people
FOR_GOOD: tuple[RunStatus, ...] = ("done", "given up")
OVER: tuple[RunStatus, ...] = ("stopped", *FOR_GOOD)  # its GPUs are free


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """How a run is; a new record for every change."""

    job: str
    copy: int
    pool: str
    place: Place
    status: RunStatus
    pid: int | None = None  # of the process that holds it
    starts: int = 0
    reason: str = ""  # why it is backing off, stuck or given up
    log: str = ""  # the file it writes to


class Holding(Protocol):
    """The process that holds a run, wherever it is."""

    @property
    def pid(self) -> int: ...

    def tell(self, data: bytes) -> None:
        """Write to its standard input."""
        ...

    async def wait(self) -> int:
        """Return its exit code, once it is gone. Raises EngineError when its machine is gone, and it with it."""
        ...


class Machines(Protocol):
    """Where runs are; `spot` is a pool and the number of a node in it."""

    async def hold(self, spot: Spot, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Holding:
        """Start the holder with these arguments. Raises OSError where its log cannot be written, or EngineError."""
        ...

    async def end(self, spot: Spot, mark: str, grace_s: float) -> list[int]:
        """End who bears a mark, if there is anybody, within a grace; return the pids of those who hang."""
        ...


class ThisMachine:
    """All nodes are this machine."""

    async def hold(self, _spot: Spot, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Holding:
        with open_log(log) as output:
            return await Held.start(arguments, environment, output)

    async def end(self, _spot: Spot, mark: str, grace_s: float) -> list[int]:
        return await end_runs(mark, grace_s)


class Held:
    """A holder on this machine."""

    def __init__(self, process: Process, log: str) -> None:
        self._process = process
        self._shortening = asyncio.create_task(self._keep_short(Path(log)))

    @classmethod
    async def start(cls, arguments: Sequence[str], environment: Mapping[str, str], output: BinaryIO) -> "Held":
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", HOLDER, *arguments),
            stdin=PIPE,  # kept open: it ends the run when we are gone, however we ended
            stdout=output,
            stderr=output,
            env=environment_of(environment, os.environ),
            start_new_session=True,
        )
        return cls(process, output.name)

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, data: bytes) -> None:
        if self._process.stdin:
            with suppress(OSError, RuntimeError):  # it is gone already
                self._process.stdin.write(data)

    async def wait(self) -> int:
        return await self._process.wait()

    async def _keep_short(self, log: Path) -> None:
        """Put the log aside whenever it is long: a run that talks all day must not fill the disk."""
        while self._process.returncode is None:
            await asyncio.sleep(LOOK_AT_LOG_S)
            with suppress(OSError):
                await asyncio.to_thread(shorten, log)


async def end_runs(mark: str, grace_s: float) -> list[int]:
    """End who bears a mark on this machine, if there is anybody; return the pids of those who hang in the kernel."""
    grace_s = grace_s if await asyncio.to_thread(marked, mark) else 0.0
    return [process.pid for process in await end_marked(mark, grace_s)]


def run_name(job: str, copy: int) -> str:
    return f"{job}/{copy}"


def mark_of_run(name: str) -> str:
    """Return what the processes of a run bear, behind the mark of their service."""
    return f"jobs/{quote(name, safe='')}"


def checkpoint_of(job: Job, copy: int) -> Path | None:
    """Return where a copy of a job saves its work; None where the fleet file does not say."""
    return Path(job.checkpoint.replace(COPY, str(copy))) if job.checkpoint else None


def saved_at_s(checkpoint: Path | None) -> float:
    """Return when work was saved last, as time.time() counts; 0 when nothing is there.

    Of a folder, that is the newest of what lies in it, two levels deep: a pointer to the latest, or a folder a step.
    """
    if checkpoint is None:
        return 0.0
    newest = 0.0
    for path in (checkpoint, *checkpoint.glob("*"), *checkpoint.glob("*/*")):
        with suppress(OSError):
            if path == checkpoint and path.is_dir():
                continue  # made by whoever looks, it says nothing
            newest = max(newest, path.stat().st_mtime)
    return newest


class Jobs:
    """The runs of jobs that are under way, by name ("job/copy").

    Args:
        fleet: whose jobs they are, and whose GPUs.
        state: where they write, and what marks their processes.
        on_change: told the name of a run and its new state.
        machines: where the nodes are.
    """

    def __init__(
        self,
        fleet: Fleet,
        state: State,
        on_change: Callable[[str, RunState], None],
        machines: Machines | None = None,
    ) -> None:
        self.fleet = fleet
        self._machines = machines or ThisMachine()
        self.states: dict[str, RunState] = {}
        self._state = state
        self._on_change = on_change
        self._runs: dict[str, Run] = {}
        self._tenants: dict[str, str] = {}
        self._stops = Counter[str]()  # how often each had to yield

    def start(self, job: Job, copy: int, pool: str, place: Place) -> str:
        """Start a run on GPUs that are free; return its name."""
        name = run_name(job.name, copy)
        assert name not in self._runs, f"{name} runs already"  # noqa: S101 - whoever asks keeps count
        grace_s = self.fleet.tenant(job.tenant).grace_s
        mark = mark_of_run(name)
        environment = {
            **_devices(self.fleet, pool, place),
            **self._state.environment(mark),
            "WATERLINE_JOB": job.name,
            "WATERLINE_RUN": name,
            "WATERLINE_COPY": str(copy),
            "WATERLINE_GPUS": ",".join(map(str, place.gpus)),
            "WATERLINE_GRACE_S": f"{grace_s:g}",
        }
        log_path = self._state.log_of(f"{job.name}.{copy}")
        first = RunState(job=job.name, copy=copy, pool=pool, place=place, status="loading", log=str(log_path))
        run = Run(job, first, environment, grace_s, f"{self._state.mark}/{mark}", self._changed, self._machines)
        self._runs[name] = run
        self.states[name], self._tenants[name] = first, job.tenant
        run.begin()
        return name

    async def stop(self, name: str, within_s: float) -> None:
        """Tell a run to save its work and to end within so many seconds; return when it is gone."""
        if run := self._runs.get(name):
            await run.stop(within_s)

    def lose(self, name: str) -> None:
        """Forget a run whose node is gone, and it with it: it may be started elsewhere."""
        if run := self._runs.get(name):
            run.abandon()

    async def stop_all(self, within_s: float = float("inf")) -> None:
        """End all runs, with the grace of their tenants at most; return when they are gone."""
        await asyncio.gather(*(run.stop(min(run.grace_s, within_s)) for run in list(self._runs.values())))

    def saved_s(self, name: str) -> float:
        """Return when a run saved its work last, on the clock of the machine; 0 when it has not since it started."""
        run = self._runs.get(name)
        return run.saved_s if run else 0.0

    def now(self) -> tuple[JobNow, ...]:
        """Return how all runs are, those that have GPUs and those that had some."""
        return tuple(self._job_now(name, state) for name, state in self.states.items())

    def _job_now(self, name: str, state: RunState) -> JobNow:
        run = self._runs.get(name)
        return JobNow(
            job=name,
            tenant=self._tenants[name],
            state=SAID.get(state.status, state.status),
            pool=state.pool if run else "",
            node=state.place.node if run else -1,
            gpus=len(state.place.gpus) if run else 0,
            checkpoint_age_s=time.time() - run.saved_s if run and run.saved_s else None,
            stops=self._stops[name],
            reason=state.reason,
        )

    def _changed(self, name: str, state: RunState) -> None:
        if state.status in OVER:
            del self._runs[name]
            self._stops[name] += state.status == "stopped" and not state.reason
        self.states[name] = state
        write = log.warning if state.reason else log.info
        details = {"reason": state.reason, "pid": state.pid, "gpus": list(state.place.gpus)}
        write("run", status=state.status, id=name, **{key: value for key, value in details.items() if value})
        try:
            self._on_change(name, state)
        except Exception:
            log.exception("a bug in who is told about runs", id=name)


class Run:
    """One copy of a job on its GPUs, through all its starts there."""

    def __init__(
        self,
        job: Job,
        first: RunState,
        environment: Mapping[str, str],
        grace_s: float,
        mark: str,
        on_change: Callable[[str, RunState], None],
        machines: Machines,
    ) -> None:
        self.grace_s = grace_s
        self.state = first
        self._job = job
        self._name = run_name(job.name, first.copy)
        self._checkpoint = checkpoint_of(job, first.copy)
        if self._checkpoint:
            environment = {**environment, "WATERLINE_CHECKPOINT": str(self._checkpoint)}
        self._environment = environment
        self._mark = mark
        self._on_change = on_change
        self._machines = machines
        self._spot = first.pool, first.place.node
        self.saved_s = 0.0  # when it saved its work last, since it started; 0: it has not
        self._process: Holding | None = None
        self._stopping = asyncio.Event()
        self._within_s = grace_s
        self._keeper: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self, within_s: float) -> None:
        assert self._keeper is not None  # noqa: S101 - whoever stops it has begun it
        self._stopping.set()
        self._within_s = within_s
        if self._process and self.state.status not in {*OVER, "stuck"}:
            self._change("stopping")
            self.hurry(within_s)
        await asyncio.wait((self._keeper,))  # it ends by itself, whoever waits

    def abandon(self) -> None:
        """Look after it no more: it is gone with its node."""
        assert self._keeper is not None  # noqa: S101 - whoever loses it has begun it
        self._keeper.cancel()
        self._change("stopped", f"Node {self._spot[0]}/{self._spot[1]} is gone.")

    def hurry(self, within_s: float) -> None:
        """Pass on to the holder how much time is left."""
        if self._process:
            self._process.tell(f"{within_s}\n".encode())

    async def _keep(self) -> None:
        crashes, delay_s = 0, 0.0
        while not self._stopping.is_set():
            self.saved_s, begun_s = 0.0, time.time()
            looking = asyncio.create_task(self._look_for_checkpoints(begun_s))
            reason, lost = "", ""
            try:
                reason = await self._run()
            except EngineError as error:
                lost = str(error)
            finally:
                looking.cancel()
            await self._verify()
            await self._look(begun_s)
            if self._stopping.is_set():
                break
            if lost:
                self._change("backing off", f"{lost} It is tried again every {NODE_AGAIN_S:g} s.")
                await self._pause(NODE_AGAIN_S)
                continue
            if not reason:
                self._change("done")
                return
            crashes, delay_s = (1, FIRST_DELAY_S) if self.saved_s else (crashes + 1, 2 * delay_s or FIRST_DELAY_S)
            reason = f"{reason}, see {self.state.log}."
            if crashes == CRASHES:
                reason = f"It has crashed {CRASHES} times without a checkpoint between: {reason}"
                self._change("given up", reason)
                return
            delay_s = min(delay_s, LONGEST_DELAY_S)
            self._change("backing off", f"{reason} It is started again in {delay_s:g} s.")
            await self._pause(delay_s)
        self._change("stopped")

    async def _pause(self, within_s: float) -> None:
        """Wait, but not longer than it is wanted."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._stopping.wait()

    async def _run(self) -> str:
        """Run it once, to the end of its holder; return what went wrong, nothing if it is done.

        Raises EngineError when its node cannot be reached, or is gone.
        """
        starts = self.state.starts + 1
        command = [word.replace(COPY, str(self.state.copy)) for word in self._job.command]
        environment = {**self._environment, "WATERLINE_START": str(starts)}
        try:
            self._process = await self._machines.hold(
                self._spot, (f"{self.grace_s}", *command), environment, Path(self.state.log)
            )
        except OSError as error:
            return f"cannot write its log: {error.strerror}"
        self.state = replace(self.state, pid=self._process.pid, starts=starts)
        self._change("loading")
        if self._stopping.is_set():
            self.hurry(self._within_s)
        loaded = asyncio.get_running_loop().call_later(self._job.load_s, self._loaded, starts)
        try:
            code = await self._process.wait()
        finally:
            loaded.cancel()
            self._process = None
        return _how(code)

    async def _look_for_checkpoints(self, begun_s: float) -> None:
        every_s = self._job.checkpoint_every_s / LOOKS_A_CHECKPOINT
        while True:
            await asyncio.sleep(min(max(every_s, LOOK_OFTEN_S), LOOK_SELDOM_S))
            await self._look(begun_s)

    async def _look(self, begun_s: float) -> None:
        """See whether it has saved something since it started. In a thread: the folder may be far away."""
        saved_s = await asyncio.to_thread(saved_at_s, self._checkpoint)
        self.saved_s = saved_s if saved_s > begun_s else 0.0

    def _loaded(self, starts: int) -> None:
        if self.state.status == "loading" and self.state.starts == starts:
            self._change("running")

    async def _verify(self) -> None:
        """Return when none of its processes is left; end who has stayed behind because its holder was killed."""
        grace_s = self.grace_s
        while left := await self._machines.end(self._spot, self._mark, grace_s):
            grace_s = 0.0
            pids = ", ".join(map(str, left))
            self._change("stuck", f"Its processes {pids} hang in the kernel: its GPUs are not free.")
            await asyncio.sleep(LOOK_AGAIN_S)

    def _change(self, status: RunStatus, reason: str = "") -> None:
        state = replace(self.state, status=status, reason=reason, pid=self._process.pid if self._process else None)
        if state != self.state or status == "loading":
            self.state = state
            self._on_change(self._name, state)


def _how(code: int) -> str:
    """Say how a run has ended by itself, by the exit code of its holder; nothing if it is done."""
    if code == CANNOT_START:
        return "its command cannot be started, or has not found one of its own"
    if code > 128 or code < 0:
        number = code - 128 if code > 128 else -code
        name = signal.Signals(number).name if number in {one.value for one in signal.Signals} else f"signal {number}"
        memory = ", as the system does when memory is short" if number == signal.SIGKILL else ""
        return f"it was ended by {name}{memory}"
    return f"its command left with {code}" if code else ""


def _devices(fleet: Fleet, pool: str, place: Place) -> dict[str, str]:
    """Return the mask that leaves a run no GPUs but its own; nothing for cards without one."""
    mask = VISIBLE_DEVICES.get(fleet.gpu_of(fleet.pool(pool)).vendor)
    return {mask: ",".join(map(str, place.gpus))} if mask else {}


def shorten(log: Path) -> None:
    """Keep the last of a long log beside it, and go on with an empty one: whoever writes to it, appends."""
    if log.stat().st_size > LOG_BYTES:
        with log.open("rb") as old, log.with_suffix(".log.1").open("wb") as kept:
            old.seek(-LOG_BYTES, os.SEEK_END)
            kept.write(old.read(LOG_BYTES))
        os.truncate(log, 0)


def open_log(path: Path) -> BinaryIO:
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    return path.open("ab", buffering=0)
