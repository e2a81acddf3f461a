"""Keeps a service as its plan says and its load asks: the minutes clock over the shore, and a pause for a new plan."""

import asyncio
from datetime import datetime

from msgspec.structs import replace

from waterline.fleet import Job
from waterline.plan import Plan
from waterline.roster import Roster
from waterline.service.gateway import Gateway
from waterline.service.jobs import FOR_GOOD, Jobs, RunState, Spot
from waterline.service.minutes import Minutes, hour_of, lends, since_midnight_s, startable
from waterline.service.shore import Shore
from waterline.service.state import State
from waterline.service.supervisor import ReplicaState


class Keeper:
    """What runs, who moves it, and how a new plan gets in between.

    Args:
        shore, jobs, gateway, state: of the service.
        everywhere: whether jobs can be started on all nodes of the fleet, and not only on the first of each pool.
    """

    def __init__(self, shore: Shore, jobs: Jobs, gateway: Gateway, state: State, *, everywhere: bool) -> None:
        self.minutes: Minutes | None = None
        self._shore = shore
        self._jobs = jobs
        self._gateway = gateway
        self._state = state
        self._everywhere = everywhere
        self._lending: asyncio.Task[None] | None = None
        self._finished: dict[str, Job] = {}  # by the name of a run that is done or given up: of which job, exactly
        self._speed = 1.0
        self._away: frozenset[Spot] = frozenset()

    def nodes_changed(self, away: frozenset[Spot]) -> None:
        """Take in which nodes cannot be used now."""
        lost, back, self._away = away - self._away, self._away - away, away
        if self.minutes:
            for spot in sorted(lost):
                self.minutes.lose(spot)
            for spot in sorted(back):
                self.minutes.take_back(spot)

    def replica_changed(self, id_: str, state: ReplicaState) -> None:
        if self.minutes:
            self.minutes.replica_changed(id_, state)

    def run_changed(self, name: str, state: RunState) -> None:
        if state.status in FOR_GOOD:
            self._finished[name] = self._jobs.fleet.job(state.job)
        if self.minutes:
            self.minutes.run_changed(name, state)

    def lend(self, speed: float = 1.0) -> None:
        """Begin to lend, if there is anything to lend; all that is planned runs. `speed`: see `Minutes`."""
        self._speed = speed
        plan = startable(replace(self._shore.plan, replicas=tuple(self._shore.replicas.values())))
        if not lends(plan):
            return
        begun_s = since_midnight_s(datetime.now().astimezone())
        self.minutes = Minutes(
            Roster(plan, plan.replicas, hour=hour_of(begun_s)),
            self._shore,
            self._jobs,
            self._gateway,
            self._state,
            begun_s=begun_s,
            finished=[name for name, job in self._finished.items() if job in plan.fleet.jobs],
            everywhere=self._everywhere,
            speed=speed,
        )
        self._lending = asyncio.create_task(self.minutes.run())
        for spot in sorted(self._away):
            self.minutes.lose(spot)

    async def pause(self) -> None:
        """Decide nothing any more; what has been begun goes on."""
        self.minutes, lending, self._lending = None, self._lending, None
        if lending:
            lending.cancel()
            await asyncio.gather(lending, return_exceptions=True)

    async def move_to(self, plan: Plan) -> None:
        """Go on with another plan; see `Shore.move_to`. Jobs save their work and begin again.

        Where replicas follow the load, those that run and are of a shape of the new plan stay, planned or not, and of
        the planned ones only those of models start that would have none.
        """
        by_load = lends(startable(self._shore.plan)) and lends(startable(plan))
        self._shore.check(plan)
        await self.pause()
        await asyncio.gather(self._jobs.stop_all(), self._shore.settle())
        self._jobs.fleet = plan.fleet
        await self._shore.move_to(plan, by_load=by_load)
        self.lend(self._speed)
