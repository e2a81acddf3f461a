"""The minutes clock, live: what is asked and what happens becomes signals, and what is decided happens.

`policy.tide` decides; nothing here does. Whatever it is told goes through `_tell`, one signal after the other, and into
`signals.jsonl`; whatever it decides goes into `decisions.jsonl`. Replayed from the roster that they began with, the
signals give the same decisions, byte for byte: that is how a day of a live service is looked at again.

Every step (10 to 60 s) the gateway says what was asked, jobs say what they have saved, and the tide decides; and once
more when GPUs have come free that somebody waits for. A replica or run that has to go gets until the deadline of that
decision; its GPUs are told to be free when the last process on them is gone.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import structlog
from msgspec.structs import replace

from waterline.errors import EngineError, PlanFileError, WaterlineError
from waterline.fleet import HOURS
from waterline.plan import Plan, Replica, read_plan, write_plan
from waterline.policy.decisions import RULES, as_json
from waterline.policy.holdings import DRAIN, HAND_BACK, HOLD, LOADING, NOBODY, START, TAKE_OVER, Moves
from waterline.policy.tide import Row, feed, replay, signal_line
from waterline.roster import Roster, Run, Service, token_costs
from waterline.service.gateway import Gateway
from waterline.service.jobs import FOR_GOOD, OVER, Jobs, RunState, Spot
from waterline.service.shore import Shore
from waterline.service.state import State
from waterline.service.supervisor import ReplicaState
from waterline.snapshot import MoveNow
from waterline.units import HOUR_S

KINDS = {START: "start", DRAIN: "drain", HOLD: "hold", HAND_BACK: "hand back", TAKE_OVER: "take over"}
PLAN, SIGNALS, DECISIONS = "plan.json", "signals.jsonl", "decisions.jsonl"  # files of a record
NOWHERE = Path(os.devnull)
BEGUN = "begun"  # its first signal
AWAY, BACK = "away", "back"  # of nodes, to ourselves: the tide is told when nothing is left there
START_ATTEMPTS = 5  # of a replica that has never been ready; then its model is not tried on those nodes again
PUNCTUAL_S = 1.0

log = structlog.get_logger()


def hour_of(at_s: float) -> int:
    """Return the hour of the day, of the time of a tide."""
    return int(at_s // HOUR_S) % HOURS


def since_midnight_s(moment: datetime) -> float:
    """Return the time of day, by the clock on the wall."""
    return (moment - moment.replace(hour=0, minute=0, second=0, microsecond=0)).total_seconds()


def startable(plan: Plan) -> Plan:
    """Return the plan without what cannot be started: shapes of servers that run elsewhere, jobs without a command."""
    shapes = tuple(shape for shape in plan.shapes if shape.engine != "openai")
    jobs = tuple(job for job in plan.fleet.jobs if job.command)
    return replace(plan, shapes=shapes, fleet=replace(plan.fleet, jobs=jobs))


def lends(plan: Plan) -> bool:
    """Whether there is anything to move: two models or jobs that can be started on the same GPUs."""
    models = {shape.model for shape in plan.shapes}
    return bool(models) and len(models) + len(plan.fleet.jobs) >= 2


def decision_lines(rows: list[Row], roster: Roster) -> bytes:
    """Return rows of the decision log as lines of JSON."""
    names = roster.names
    return b"".join(as_json(row, names) for row in rows)


class Minutes:
    """Lends and takes back while the service runs.

    Args:
        roster: what runs, with nothing moved yet.
        shore, jobs: who start and end what is decided.
        gateway: says what is asked.
        state: where the record is kept.
        begun_s: seconds since midnight, by now.
        finished: runs of jobs that are not started again.
        everywhere: whether jobs can be started on all nodes of the fleet, and not only on the first of each pool.
        speed: seconds of the tide in one of the clock; above 1 for a test that has no time.
        clock: of the machine, or of a test.
    """

    def __init__(
        self,
        roster: Roster,
        shore: Shore,
        jobs: Jobs,
        gateway: Gateway,
        state: State,
        *,
        begun_s: float,
        finished: Iterable[str] = (),
        everywhere: bool = False,
        speed: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.roster = roster
        self._shore = shore
        self._jobs = jobs
        self._gateway = gateway
        self._everywhere = everywhere
        self._speed = speed
        self._clock = clock
        self._begun_s, self._begun_day_s = clock(), begun_s
        self._signals, self._decisions = _open_record(state.path, roster.plan, begun_s)
        self._recording = self._signals.name != str(NOWHERE)
        self._queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._acts: set[asyncio.Task[None]] = set()
        self._counted_s = begun_s  # up to when loads have been told
        self._costs = {model: token_costs(roster.plan, model) for model in roster.models}
        self._saved_s: dict[int, float] = {}  # by row: when the machine's clock says that a run saved its work last
        self._failures: dict[str, int] = {}  # by replica: failed starts before it was ready
        self._away: set[Spot] = set()  # nodes that cannot be used; the roster has them down when nothing is left there
        for name in finished:
            self._finish(name, next(one for one in roster.services if one.job and name.startswith(f"{one.target}/")))

    def now_s(self) -> float:
        """Return the time of the tide: seconds since midnight of the day when the service began."""
        return round(self._begun_day_s + (self._clock() - self._begun_s) * self._speed, 3)

    async def run(self) -> None:
        """Tick for ever; at the end, whoever is draining is left to the supervisor."""
        ticking = asyncio.create_task(self._tick_for_ever())
        try:
            while True:
                signal = await self._queue.get()
                if signal["signal"] == BACK:
                    await self._take_back(signal["spot"], signal["at_s"])
                elif signal["signal"] == AWAY:
                    await self._take_out(signal["spot"], signal["let_go"], signal["at_s"])
                else:
                    await self._tell(signal)
        except Exception:
            log.exception("a bug in the minutes clock: nothing is lent or handed back any more")
        finally:
            for task in (ticking, *self._acts):
                task.cancel()
            await asyncio.gather(ticking, *self._acts, return_exceptions=True)
            self._signals.close()
            self._decisions.close()

    def replica_changed(self, id_: str, state: ReplicaState) -> None:
        """Take in what the supervisor says."""
        row = self._row_of(id_)
        if row == NOBODY or self.roster.tide.replicas.state[row] != LOADING:
            return
        if state.status == "ready":
            self._failures.pop(id_, None)
            self._put("loaded", replica=row)
        elif state.status == "backing off":
            self._failures[id_] = self._failures.get(id_, 0) + 1
            if self._failures[id_] == START_ATTEMPTS:
                log.error("cannot be started, its model is not tried there again", id=id_, reason=state.reason)
                self._act(self._drain(row, id_, 0.0, "unfit"))

    def run_changed(self, name: str, state: RunState) -> None:
        """Take in what the jobs say."""
        row = self._row_of(name)
        if row == NOBODY:
            return
        if state.status == "running" and self.roster.tide.replicas.state[row] == LOADING:
            self._put("loaded", replica=row)
        elif state.status in OVER and not (state.status == "stopped" and self._is_away(row)):
            service = self.roster.services[self.roster.tide.replicas.service[row]]
            self._end(row, "ended")
            if state.status in FOR_GOOD:
                self._finish(name, service)

    def _end(self, row: int, signal: str) -> None:
        """A replica or run is gone; who waits for its GPUs gets them now, and not at the next step."""
        self.roster.end(row)
        awaited = self.roster.tide.replicas.claim[row] != NOBODY
        self._put(signal, replica=row)
        if awaited:
            self._put("tick")

    def _finish(self, run: str, service: Service) -> None:
        self.roster.finished.add(run)
        self._put("finished", service=self.roster.services.index(service))

    # --- Nodes that go and come back ----------------------------------------------------------------------------------

    def lose(self, spot: Spot) -> None:
        """A node cannot be used any more; what had GPUs of it is started elsewhere, as far as there is room."""
        self._away.add(spot)
        self._act(self._let_go(spot))

    def take_back(self, spot: Spot) -> None:
        """A node that was lost can be used again, and nothing of ours is left on it."""
        self._away.discard(spot)
        self._put(BACK, spot=spot)

    async def _let_go(self, spot: Spot) -> None:
        """End what has GPUs of a node; where it has some of others too, these are free when that is done."""
        ids = {self.roster.has[row].id for row in self.roster.rows_on(*spot)}
        for id_ in ids:
            self._jobs.lose(id_)
        await asyncio.gather(
            *(asyncio.shield(self._shore.drain(id_, 0.0)) for id_ in ids & self._shore.replicas.keys())
        )
        self._put(AWAY, spot=spot, let_go=ids)

    async def _take_out(self, spot: Spot, let_go: set[str], at_s: float) -> None:
        rows = self.roster.rows_on(*spot)
        if spot in self.roster.down:
            return
        if any(self.roster.has[row].id not in let_go for row in rows):  # they were to start there meanwhile
            self._act(self._let_go(spot))
            return
        for row in rows:
            self.roster.end(row)
            await self._tell(self._signal("failed", at_s, replica=row))
        berth, gpus = self.roster.fail(*spot)
        await self._tell(self._signal("down", at_s, node=berth, gpus=gpus))
        self._put("tick")
        await self._take_back(spot, at_s)

    async def _take_back(self, spot: Spot, at_s: float) -> None:
        if spot in self.roster.down and spot not in self._away:
            berth, gpus = self.roster.repair(*spot)
            await self._tell(self._signal("up", at_s, node=berth, gpus=gpus))
            self._put("tick")

    def _is_away(self, row: int) -> bool:
        one = self.roster.has[row]
        return any((one.pool, place.node) in self._away for place in one.places)

    # --- Signals ------------------------------------------------------------------------------------------------------

    async def _tick_for_ever(self) -> None:
        step_s = self.roster.step_s
        self._gateway.take_loads()
        self._counted_s = self.now_s()
        step = int(self._counted_s // step_s)
        self._put("tick")  # for jobs, which wait for nothing
        while True:
            at_s = self.now_s()
            if (left_s := (step + 1) * step_s - at_s) > 0.0:  # again when a sleep has ended a moment early
                await asyncio.sleep(left_s / self._speed)
                continue
            step = int(at_s // step_s)
            self._tick(step - 1, at_s)

    def _tick(self, step: int, at_s: float) -> None:
        """Say what was asked in a step that is over, and what has been saved since; then have it decided."""
        if at_s - self._counted_s > self.roster.step_s / 2:  # the first may be short: little is seen in it
            loads = self._gateway.take_loads()
            for number, service in enumerate(self.roster.services):
                if service.job is None:
                    read, write = self._costs[service.target]
                    prompts, outputs = loads.get((service.tenant, service.target), (0, 0))
                    load = (prompts * read + outputs * write) * self._speed / (at_s - self._counted_s)
                    self._put("load", at_s, service=number, step=step, load=load)
            self._counted_s = at_s
        for row, one in self.roster.has.items():
            if isinstance(one, Run) and (saved_s := self._jobs.saved_s(one.id)) > self._saved_s.get(row, 0.0):
                self._saved_s[row] = saved_s
                self._put("saved", at_s, replica=row)
        self._put("tick", at_s)

    def _put(self, signal: str, at_s: float | None = None, **fields: Any) -> None:
        self._queue.put_nowait(self._signal(signal, self.now_s() if at_s is None else at_s, **fields))

    @staticmethod
    def _signal(signal: str, at_s: float, **fields: Any) -> dict[str, Any]:
        return {"at_s": at_s, "signal": signal, **fields}

    async def _tell(self, signal: dict[str, Any]) -> None:
        """Let the tide learn of a signal, keep it, and do what is decided."""
        if signal["signal"] == "loaded" and self.roster.tide.replicas.state[signal["replica"]] != LOADING:
            return  # it has been told already
        if signal["signal"] == "tick":
            moves, rows = await asyncio.to_thread(feed, self.roster.tide, signal)
        else:
            moves, rows = feed(self.roster.tide, signal)
        self._write(self._signals, signal_line(signal))  # with what follows from it, or not at all
        if moves is None:
            return
        self._write(self._decisions, decision_lines(rows, self.roster))
        for move in range(len(moves.kind)):
            self._announce(moves, move, signal["at_s"])
            self._do(moves, move, signal["at_s"])

    def _write(self, file: BinaryIO, data: bytes) -> None:
        """Keep the record while there is room for it: without one GPUs are lent all the same."""
        if self._recording:
            try:
                file.write(data)
            except OSError as error:
                self._recording = False
                log.warning("the record of moves ends here", reason=error.strerror)

    # --- Moves --------------------------------------------------------------------------------------------------------

    def _do(self, moves: Moves, move: int, at_s: float) -> None:
        victim = int(moves.victim[move])
        if moves.kind[move] == START:
            self._start(moves, move)
        elif moves.kind[move] in {DRAIN, HAND_BACK} and victim != NOBODY and victim in self.roster.has:
            one, deadline_s = self.roster.has[victim], float(moves.deadline_s[move])
            within_s = max(0.0, deadline_s - at_s) / self._speed
            if isinstance(one, Run):
                self._act(self._stop(one.id, within_s))
            else:
                self._act(self._drain(victim, one.id, within_s, "ended"))

    def _start(self, moves: Moves, move: int) -> None:
        row = int(moves.started[move])
        one = self.roster.start(moves, move)
        if one is None:
            self._put("unfit", replica=row)
            return
        self._saved_s.pop(row, None)
        try:
            if isinstance(one, Replica):
                self._shore.start(one)
            else:
                self._begin(one)
        except WaterlineError as error:
            log.error("cannot be started, and is not tried there again", id=one.id, reason=str(error))  # noqa: TRY400
            self.roster.end(row)
            self._put("unfit", replica=row)

    def _begin(self, run: Run) -> None:
        [place] = run.places
        if place.node and not self._everywhere:
            raise EngineError(f"node {place.node} of pool '{run.pool}' is not this machine.")
        if not run.job.command:
            raise EngineError("the fleet file names no command for this job.")
        self._jobs.start(run.job, int(run.id.rpartition("/")[2]), run.pool, place)

    async def _stop(self, name: str, within_s: float) -> None:
        """End a run; `run_changed` says when it is gone."""
        begun_s = self._clock()
        await self._jobs.stop(name, within_s)
        self._note_delay(name, begun_s, within_s)

    async def _drain(self, row: int, id_: str, within_s: float, signal: str) -> None:
        begun_s = self._clock()
        await asyncio.shield(self._shore.drain(id_, within_s))
        self._note_delay(id_, begun_s, within_s)
        if self._row_of(id_) == row and not self._is_away(row):
            self._end(row, signal)

    def _note_delay(self, id_: str, begun_s: float, within_s: float) -> None:
        late_s = self._clock() - begun_s - within_s
        if within_s and late_s > PUNCTUAL_S:
            log.warning("handed its GPUs back late", id=id_, late_s=round(late_s, 1))

    def _act(self, act: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(act)
        self._acts.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._acts.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a bug in the minutes clock", exc_info=error)

    def _row_of(self, id_: str) -> int:
        try:
            return self.roster.row_of(id_)
        except KeyError:
            return NOBODY

    def _announce(self, moves: Moves, move: int, at_s: float) -> None:
        """Say a move to people: in the log, and on the board."""
        roster, victim = self.roster, int(moves.victim[move])
        service = roster.services[moves.claimant[move]]
        rule, why = RULES[int(moves.rule[move])]
        given = roster.has.get(victim) if victim != NOBODY else None
        now = MoveNow(
            at_s=time.time(),
            kind=KINDS[int(moves.kind[move])],
            rule=rule,
            why=why,
            tenant=service.tenant,
            what=service.target,
            pool=roster.berths[moves.node[move]].pool,
            gpus=int(moves.gpus[move]),
            victim=given.id if given else "",
            victim_tenant=roster.tenant_of(victim) if given else "",
            deadline_s=max(0.0, float(moves.deadline_s[move]) - at_s),
        )
        self._gateway.metrics.moved(now)
        said = {"victim": now.victim, "victim_tenant": now.victim_tenant, "within_s": round(now.deadline_s)}
        log.info(
            now.kind,
            rule=rule,
            tenant=now.tenant,
            what=now.what,
            gpus=now.gpus,
            pool=now.pool,
            **{key: value for key, value in said.items() if value},
        )


# --- The record -------------------------------------------------------------------------------------------------------


def _open_record(folder: Path, plan: Plan, begun_s: float) -> tuple[BinaryIO, BinaryIO]:
    """Begin a new record, with the plan and the time that it begins with; the one before is kept.

    Where it cannot be begun, that is said, and what is written goes nowhere.
    """
    try:
        for name in (PLAN, SIGNALS, DECISIONS):
            if (folder / name).exists():
                (folder / name).replace(folder / f"last-{name}")
        write_plan(plan, folder / PLAN)
        (folder / SIGNALS).write_bytes(signal_line({"at_s": begun_s, "signal": BEGUN}))
        places = folder / SIGNALS, folder / DECISIONS
    except (OSError, PlanFileError) as error:
        log.warning("moves are not recorded", reason=str(error))
        places = NOWHERE, NOWHERE
    signals, decisions = (place.open("ab", buffering=0) for place in places)
    return signals, decisions


def replay_record(folder: Path) -> bytes:
    """Return the decisions that the signals of a record lead to, as lines of JSON: those that were made then."""
    plan = read_plan(folder / PLAN)
    begun, *signals = (folder / SIGNALS).read_bytes().splitlines()
    roster = Roster(plan, plan.replicas, hour=hour_of(json.loads(begun)["at_s"]))
    return decision_lines(list(replay(roster.tide, signals)), roster)
