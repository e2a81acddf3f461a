"""What a rehearsal writes down besides the requests: moves, the work of jobs, and who used what over time.

A `Sampler` turns requests whose end is known, and stretches in which replicas and jobs ran, into a `Timeline` of means
over equal steps. It never holds more than `MOST_STEPS` steps: when time goes on beyond them, they get twice as long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from waterline.units import DAY_S, HOUR_S, PICOSECONDS_PER_S

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]

MoveKind = Literal["start", "drain", "hold", "hand back", "take over"]
WANTED_STEPS = 288  # of five minutes, in a day
MOST_STEPS = 4 * WANTED_STEPS  # a fleet takes long to drain when it has fallen behind
STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, HOUR_S, 2 * HOUR_S, 4 * HOUR_S, 8 * HOUR_S, DAY_S)
NOBODY = -1  # a replica that is not there; GPUs that are nobody's in particular


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One decision about GPUs, and what came of it; times in seconds from the start of the traffic."""

    at_s: float
    kind: MoveKind
    rule: str  # why, in the words of `policy.decisions.RULES`
    tenant: str  # who claims the GPUs; of a hand-back, who gives them up
    target: str  # the model or the job they are for
    victim: str = ""  # the replica that makes room, or the job whose run does
    victim_tenant: str = ""
    pool: str = ""
    node: int = NOBODY
    gpus: int = 0
    cost_gpu_s: float = 0.0  # of work that is lost: grace, unfinished work, loading
    deadline_s: float = float("nan")  # when the GPUs are handed over at the latest
    done_s: float = float("nan")  # when the replica served, or the GPUs were free; NaN if that was not seen


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """What a job came to."""

    job: str
    tenant: str
    gpu_hours: float  # of work that is kept
    lost_gpu_hours: float  # of work done again, and of loading
    stops: int  # runs that had to make room


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What was going on, in means over steps of equal length; the last one ends with the rehearsal."""

    step_s: float
    at_s: Reals  # [step] its begin
    end_s: float
    tenants: tuple[str, ...]
    gpus: Reals  # [tenant, step] that serve it or do its jobs; a shared replica's are divided by use
    used_gpus: Reals  # [tenant, step] of them, how many computed for its requests
    spare_gpus: Reals  # [step] of replicas that were there and that nobody asked
    down_gpus: Reals  # [step] of nodes that had failed
    asked_per_s: Reals  # [tenant, step] requests
    refused_per_s: Reals  # [tenant, step]
    waiting: Reals  # [tenant, step] requests taken, and without a first token yet
    running: Reals  # [tenant, step] requests between their first token and their last
    replicas: tuple[str, ...]  # ids
    present: Reals  # [replica, step] the part of the step in which it could serve
    busy: Reals  # [replica, step] the part of the step in which it computed

    @property
    def steps(self) -> int:
        return len(self.at_s)

    @property
    def lengths_s(self) -> Reals:
        """Return [step]."""
        return np.diff(self.at_s, append=self.end_s)

    def gpu_hours_of(self, tenant: str) -> float:
        """Return what it had, whether it computed or not."""
        return float(self.gpus[self.tenants.index(tenant)] @ self.lengths_s) / HOUR_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Lent:
    """GPU-hours of one tenant that another one used."""

    lender: str  # "": nobody deserves them
    borrower: str
    gpu_hours: float


def lent(timeline: Timeline, deserved_gpus: Sequence[float], fleet_gpus: float) -> tuple[Lent, ...]:
    """Return who used GPUs beyond what it deserves, and whose they were.

    In every step, what tenants use beyond what they deserve is taken first from what nobody deserves, then from the
    tenants that use less than they deserve, by how much less. Sorted by lender and borrower.
    """
    deserved = np.asarray(deserved_gpus, np.float64)[:, None]
    borrowed = np.maximum(0.0, timeline.gpus - deserved)  # [tenant, step]
    left = np.maximum(0.0, deserved - timeline.gpus)
    nobodys = np.full(timeline.steps, max(0.0, fleet_gpus - float(deserved.sum())))
    wanted = borrowed.sum(axis=0)
    from_nobody = np.minimum(wanted, nobodys)
    offered = left.sum(axis=0)
    share = np.divide(wanted - from_nobody, offered, out=np.zeros_like(wanted), where=offered > 0)
    sources = [("", from_nobody), *zip(timeline.tenants, left * np.minimum(share, 1.0), strict=True)]
    found = []
    for lender, given in sorted(sources, key=lambda source: source[0]):
        for borrower, taken in sorted(zip(timeline.tenants, borrowed, strict=True), key=lambda source: source[0]):
            part = np.divide(taken, wanted, out=np.zeros_like(wanted), where=wanted > 0)
            hours = float((given * part) @ timeline.lengths_s) / HOUR_S
            if hours > 0:
                found.append(Lent(lender=lender, borrower=borrower, gpu_hours=hours))
    return tuple(found)


class Steps:
    """How much of something there was in each step, in the mean; it begins and ends at any time within them."""

    def __init__(self, rows: int, steps: int) -> None:
        self.within = np.zeros((rows, steps))  # what a step sees of what began or ended in it
        self.later = np.zeros((rows, steps))  # what it sees of what began or ended in the step before

    def change(self, row: Integers, step: Integers, rest: Reals, weight: Reals | float) -> None:
        """Let there be so much more from a time on: `rest` of its step lies behind it. Arrays by change."""
        steps = self.within.shape[1]
        flat = row * steps + step
        np.add.at(self.within.reshape(-1), flat, rest * weight)
        np.add.at(self.later.reshape(-1), flat + 1, weight)  # the last column is for what nobody will see

    def means(self, steps: int) -> Reals:
        """Return [row, step]."""
        found: Reals = self.within[:, :steps] + np.cumsum(self.later[:, :steps], axis=1)
        return np.maximum(found, 0.0)  # of sums that should be 0, rounding leaves a little

    def grow(self, rows: int, steps: int) -> None:
        """Make room."""
        more = ((0, max(0, rows - self.within.shape[0])), (0, max(0, steps - self.within.shape[1])))
        self.within, self.later = np.pad(self.within, more), np.pad(self.later, more)

    def halve(self) -> None:
        """Make one step of every two.

        What changed at a part f of an even step changes at f/2 of the new one, of which (1 - f)/2 + 1/2 lies behind it.
        """
        within = (self.within[:, ::2] + self.within[:, 1::2] + self.later[:, 1::2]) / 2
        later = np.zeros_like(within)
        later[:, 1:] = self.later[:, 1:-1:2] + self.later[:, 2::2]
        kept = within.shape[1]
        self.within, self.later = np.zeros_like(self.within), np.zeros_like(self.later)
        self.within[:, :kept], self.later[:, :kept] = within, later


class Counts:
    """How often something happened in each step."""

    def __init__(self, rows: int, steps: int) -> None:
        self.counts = np.zeros((rows, steps))

    def add(self, row: Integers, step: Integers) -> None:
        np.add.at(self.counts.reshape(-1), row * self.counts.shape[1] + step, 1.0)

    def grow(self, rows: int, steps: int) -> None:
        """Make room."""
        have_rows, have_steps = self.counts.shape
        self.counts = np.pad(self.counts, ((0, max(0, rows - have_rows)), (0, max(0, steps - have_steps))))

    def halve(self) -> None:
        """Make one step of every two."""
        counts = self.counts[:, ::2] + self.counts[:, 1::2]
        self.counts = np.zeros_like(self.counts)
        self.counts[:, : counts.shape[1]] = counts


class Sampler:
    """Fills a timeline from what is known, a piece at a time and in any order."""

    def __init__(self, tenants: Sequence[str], models: Sequence[str], length_s: float) -> None:
        """Begin with nothing; `length_s` of the traffic, about: the steps are such that a few hundred hold it."""
        self.tenants, self.models = tuple(tenants), tuple(models)
        wanted_s = length_s / WANTED_STEPS
        self.step_s = float(next((step_s for step_s in STEPS_S if step_s >= wanted_s), DAY_S))
        self.end_ps = 0
        self.replicas: dict[str, int] = {}  # id -> row
        self.gpus = np.zeros(0)  # [replica, and room for more]
        room, pairs = WANTED_STEPS, len(tenants) * len(models)
        self.asked, self.refused = Counts(len(tenants), room), Counts(len(tenants), room)
        self.waiting, self.running = Steps(len(tenants), room), Steps(len(tenants), room)
        self.held = Steps(len(tenants), room)  # GPUs that are for one tenant
        self.used = Steps(pairs, room)  # [tenant x model] GPUs that compute
        self.shared = Steps(len(models), room)  # GPUs of replicas that serve all tenants alike
        self.broken = Steps(1, room)  # GPUs of nodes that have failed
        self.busy, self.present = Steps(0, room), Steps(0, room)  # [replica]

    def replica(self, replica: str, gpus: int) -> int:
        """Return the index of a replica, a new one where its id has not been met."""
        row = self.replicas.setdefault(replica, len(self.replicas))
        if row >= len(self.gpus):
            self.gpus = np.pad(self.gpus, (0, max(16, row)))
            for steps in (self.busy, self.present):
                steps.grow(len(self.gpus), steps.within.shape[1])
        self.gpus[row] = gpus
        return row

    def serves(self, replica: int, model: int, begin_ps: int, end_ps: int, tenant: int = NOBODY) -> None:
        """Write down that a replica could serve from one time to another; `tenant`: for whom it was started."""
        if tenant == NOBODY:
            self.share(*(np.array([one]) for one in (replica, model, begin_ps, end_ps)))
        else:
            self._span(self.present, np.array([replica]), np.array([begin_ps]), np.array([end_ps]), np.ones(1))
            self.works(tenant, float(self.gpus[replica]), begin_ps, end_ps)

    def share(self, replica: Integers, model: Integers, begin_ps: Integers, end_ps: Integers) -> None:
        """Write down that replicas could serve all tenants from one time to another."""
        self._span(self.present, replica, begin_ps, end_ps, np.ones(len(replica)))
        self._span(self.shared, model, begin_ps, end_ps, self.gpus[replica])

    def works(self, tenant: int, gpus: float, begin_ps: int, end_ps: int) -> None:
        """Write down that a tenant had GPUs for a job, or to load a replica, from one time to another."""
        row, begin, end = (np.array([one]) for one in (tenant, begin_ps, end_ps))
        self._span(self.held, row, begin, end, np.array([gpus], np.float64))

    def down(self, gpus: int, begin_ps: int, end_ps: int) -> None:
        """Write down that GPUs could not be used from one time to another."""
        row, begin, end = (np.array([one]) for one in (0, begin_ps, end_ps))
        self._span(self.broken, row, begin, end, np.array([gpus], np.float64))

    def add(
        self,
        *,
        tenant: Integers,
        model: Integers,
        arrival_ps: Integers,
        first_token_ps: Integers,  # below 0 where none came
        finish_ps: Integers,
        replica: Integers,  # as `replica` numbered them, or NOBODY where it was refused
        busy_ps: Integers,  # its share of the replica's steps
    ) -> None:
        """Write down requests of which is known what became of them; arrays by request."""
        self._reach(int(finish_ps.max(initial=0)))
        arrival = self._at(arrival_ps)
        self.asked.add(tenant, arrival[0])
        served = replica >= 0
        if not served.all():
            refused = ~served
            self.refused.add(tenant[refused], arrival[0][refused])
            arrival = arrival[0][served], arrival[1][served]
            tenant, model, replica, busy_ps = tenant[served], model[served], replica[served], busy_ps[served]
            first_token_ps, finish_ps, arrival_ps = first_token_ps[served], finish_ps[served], arrival_ps[served]
        finish = self._at(finish_ps)
        first = self._at(np.where(first_token_ps < 0, finish_ps, first_token_ps))
        for steps, begin, end in ((self.waiting, arrival, first), (self.running, first, finish)):
            steps.change(tenant, *begin, 1.0)
            steps.change(tenant, *end, -1.0)
        self._use(tenant, model, replica, arrival, finish, busy_ps / np.maximum(1, finish_ps - arrival_ps))

    def use(
        self,
        *,
        tenant: Integers,
        model: Integers,
        begin_ps: Integers,
        end_ps: Integers,
        replica: Integers,
        busy_ps: Integers,
    ) -> None:
        """Write down time of replicas besides that of `add`: where prompts were read, when that was elsewhere."""
        self._reach(int(end_ps.max(initial=0)))
        begin, end = self._at(begin_ps), self._at(end_ps)
        self._use(tenant, model, replica, begin, end, busy_ps / np.maximum(1, end_ps - begin_ps))

    def timeline(self) -> Timeline:
        steps = max(1, -(-self.end_ps // self._step_ps))
        at_s, end_s = np.arange(steps, dtype=np.float64) * self.step_s, max(self.end_ps, 1) / PICOSECONDS_PER_S
        whole = np.ones(steps)  # what makes a mean over the part of the last step that was there
        whole[-1] = self.step_s / (end_s - at_s[-1])
        used = self.used.means(steps).reshape(len(self.tenants), len(self.models), steps) * whole
        shared = self.shared.means(steps) * whole  # [model, step]
        of_model = used.sum(axis=0)
        part = np.divide(used, of_model, out=np.zeros_like(used), where=of_model > 0)
        present, busy = (one.means(steps)[: len(self.replicas)] * whole for one in (self.present, self.busy))
        return Timeline(
            step_s=self.step_s,
            at_s=at_s,
            end_s=end_s,
            tenants=self.tenants,
            gpus=self.held.means(steps) * whole + (part * shared).sum(axis=1),
            used_gpus=used.sum(axis=1),
            spare_gpus=np.where(of_model > 0, 0.0, shared).sum(axis=0),
            down_gpus=self.broken.means(steps)[0] * whole,
            asked_per_s=self.asked.counts[:, :steps] * whole / self.step_s,
            refused_per_s=self.refused.counts[:, :steps] * whole / self.step_s,
            waiting=self.waiting.means(steps) * whole,
            running=self.running.means(steps) * whole,
            replicas=tuple(self.replicas),
            present=np.minimum(1.0, present),
            busy=np.minimum(1.0, busy),
        )

    # --- Times as steps ---------------------------------------------------------------------------------------------

    @property
    def _step_ps(self) -> int:
        return round(self.step_s * PICOSECONDS_PER_S)

    def _at(self, time_ps: Integers) -> tuple[Integers, Reals]:
        """Return the steps of times, and how much of each step lies behind its time."""
        step = time_ps // self._step_ps
        return step, 1.0 - (time_ps - step * self._step_ps) / self._step_ps

    def _use(
        self,
        tenant: Integers,
        model: Integers,
        replica: Integers,
        begin: tuple[Integers, Reals],
        end: tuple[Integers, Reals],
        busy: Reals,
    ) -> None:
        """Spread the time of replicas evenly over the time of each request."""
        pair = tenant * len(self.models) + model
        gpus = busy * self.gpus[replica]
        for steps, row, weight in ((self.used, pair, gpus), (self.busy, replica, busy)):
            steps.change(row, *begin, weight)
            steps.change(row, *end, -weight)

    def _span(self, steps: Steps, row: Integers, begin_ps: Integers, end_ps: Integers, weight: Reals) -> None:
        self._reach(int(end_ps.max(initial=0)))
        steps.change(row, *self._at(np.minimum(begin_ps, end_ps)), weight)
        steps.change(row, *self._at(end_ps), -weight)

    def _reach(self, time_ps: int) -> None:
        """Make room up to a time."""
        self.end_ps = max(self.end_ps, time_ps)
        everything = (self.asked, self.refused, self.waiting, self.running, self.held, self.used, self.shared)
        kinds = (*everything, self.broken, self.busy, self.present)
        while time_ps // self._step_ps + 2 > MOST_STEPS:
            for kind in kinds:
                kind.grow(0, MOST_STEPS)
                kind.halve()
            self.step_s *= 2
        needed, room = time_ps // self._step_ps + 2, self.asked.counts.shape[1]
        if needed > room:
            for kind in kinds:
                kind.grow(0, min(MOST_STEPS, max(needed, 2 * room)))
