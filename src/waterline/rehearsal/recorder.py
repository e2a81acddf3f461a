"""Adds up what a rehearsal tells of requests, replicas and jobs, as it goes: into summaries and a timeline."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from waterline.catalog.servers import idle_watts
from waterline.fleet import HOURS
from waterline.outcome import NO_CLIENT, NOWHERE, OK, REFUSED, Spent, Summary, Tally, Where
from waterline.plan import Plan, Replica
from waterline.rehearsal.record import NOBODY, Lent, Sampler, Timeline, lent
from waterline.units import HOUR_S, KILO, PICOSECONDS_PER_S

Integers = NDArray[np.int64]
Reals = NDArray[np.float64]
Shares = tuple[tuple[float, float], ...]

HOUR_PS = HOUR_S * PICOSECONDS_PER_S
JOULES_PER_KWH = KILO * HOUR_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rehearsal comes to."""

    summaries: tuple[Summary, ...]  # the total first, then by tenant and model
    by_tenant: tuple[Summary, ...]  # over all models
    by_client: tuple[Summary, ...]  # of each tenant; requests that name none are in none
    by_model: tuple[Summary, ...]
    by_pool: tuple[Summary, ...]  # requests that were served there
    ttft_shares: Mapping[str, Shares]  # by tenant: times, rising, each with the share of requests that took no longer
    latency_shares: Mapping[str, Shares]
    replicas: tuple[Where, ...]  # of the timeline, in its order
    timeline: Timeline
    lent: tuple[Lent, ...]  # who used GPUs beyond what it deserves, and whose they were
    preempted: int  # requests whose cache was taken at least once
    duration_s: float  # from the first arrival to the last finish; 0 without requests
    usd: float  # all replicas, while they served or loaded
    idle_kwh: float | None  # of GPUs that were up, in no replica and no job; None when their power is not known
    jobs_kwh: float | None  # of GPUs that worked for jobs


class Recorder:
    """Takes notes; everything is named by its place in the fleet's own order of tenants and models."""

    def __init__(self, plan: Plan, length_s: float) -> None:
        """Begin with nothing and without replicas; `length_s` of the traffic, about."""
        self.fleet = plan.fleet
        self.tenants = tuple(tenant.name for tenant in plan.fleet.tenants)
        self.models = tuple(model.name for model in plan.fleet.models)
        pools = [pool.name for pool in plan.fleet.pools]
        self.tally = Tally(plan.fleet.slos, self.tenants, self.models, pools)
        self.sampler = Sampler(self.tenants, self.models, length_s)
        self.replicas: list[Replica] = []
        self.first_ps: int | None = None
        self.last_ps = 0
        self.preempted = 0
        self.known: dict[str, int] = {}  # by id of a replica: its index
        self.runs_s = np.zeros(0)  # [replica, and room for more] that it served or loaded
        self.busy_s = np.zeros(0)  # [replica, likewise]
        self.jobs_gpu_s, self.down_gpu_s = dict.fromkeys(pools, 0.0), dict.fromkeys(pools, 0.0)

    def add_replica(self, replica: Replica) -> int:
        """Return its index from now on; the one it has, where its id has been met."""
        if replica.id in self.known:
            return self.known[replica.id]
        self.replicas.append(replica)
        if len(self.replicas) > len(self.busy_s):
            more = max(16, len(self.replicas))
            self.runs_s, self.busy_s = np.pad(self.runs_s, (0, more)), np.pad(self.busy_s, (0, more))
        self.sampler.replica(replica.id, replica.layout.gpus)
        where = Where(replica.id, replica.model, replica.pool, replica.layout.gpus)
        self.known[replica.id] = self.tally.add_replica(where)
        return self.known[replica.id]

    def runs(self, replica: int, begin_ps: int, ready_ps: int, end_ps: int, tenant: int = NOBODY) -> None:
        """Write down that a replica loads from one time on and serves until another; `tenant`: whose it is alone."""
        one = self.replicas[replica]
        self.runs_s[replica] += (end_ps - begin_ps) / PICOSECONDS_PER_S
        if tenant != NOBODY:
            self.sampler.works(tenant, one.layout.gpus, begin_ps, min(ready_ps, end_ps))
        self.sampler.serves(replica, self.models.index(one.model), ready_ps, end_ps, tenant)

    def works(self, tenant: int, pool: str, gpus: int, begin_ps: int, end_ps: int) -> None:
        """Write down that a job of a tenant had GPUs of a pool from one time to another."""
        self.jobs_gpu_s[pool] += gpus * max(0, end_ps - begin_ps) / PICOSECONDS_PER_S
        self.sampler.works(tenant, gpus, begin_ps, end_ps)

    def down(self, pool: str, gpus: int, begin_ps: int, end_ps: int) -> None:
        """Write down that GPUs of a pool had failed from one time to another."""
        self.down_gpu_s[pool] += gpus * max(0, end_ps - begin_ps) / PICOSECONDS_PER_S
        self.sampler.down(gpus, begin_ps, end_ps)

    def run_as_planned(self, first_hour: int) -> None:
        """Let every replica serve at its planned hours, loaded before, from the first arrival to the last finish."""
        spans = np.array(
            [
                (number, self.models.index(replica.model), *span)
                for number, replica in enumerate(self.replicas)
                for span in _spans(replica, first_hour, self.first_ps or 0, self.last_ps)
            ],
            np.int64,
        ).reshape(-1, 5)
        number, model, begin_ps, ready_ps, end_ps = spans.T
        self.runs_s += np.bincount(number, end_ps - begin_ps, len(self.runs_s)) / PICOSECONDS_PER_S
        self.sampler.share(number, model, ready_ps, end_ps)

    def add(
        self,
        *,
        tenant: Integers,
        model: Integers,
        arrival_ps: Integers,
        prompt_tokens: Integers,
        output_tokens: Integers,  # produced
        first_token_ps: Integers,  # below 0 where none came
        finish_ps: Integers,
        replica: Integers,  # as `add_replica` numbered them, or NOWHERE
        busy_ps: Integers,  # its share of the replica's steps
        preemptions: Integers,
        retry_s: Reals,  # after which it was told to come back; 0: it was not
        cached_tokens: Integers,  # of the prompt, in the cache where it was read
        read_by: Integers,  # the replica that read the prompt where another one wrote the answer, or NOWHERE
        read_busy_ps: Integers,
        status: Integers | None = None,  # indices of STATUSES; None: "ok" of those that reached a replica
        clients: Sequence[str] = (),
        client: Integers | None = None,  # index into `clients`, or NO_CLIENT; None: nobody names one
    ) -> None:
        """Write down requests of which is known what became of them, those of a model in the order of arrival."""
        if not len(arrival_ps):
            return
        self.first_ps = min(int(arrival_ps[0]), int(arrival_ps[0]) if self.first_ps is None else self.first_ps)
        self.last_ps = max(self.last_ps, int(finish_ps.max()))
        self.preempted += int((preemptions > 0).sum())
        status = np.where(replica >= 0, OK, REFUSED) if status is None else status
        client = np.full(len(tenant), NO_CLIENT) if client is None else client
        who = {"tenant": tenant, "client": client, "model": model}
        later_tokens = np.maximum(1, output_tokens - 1)
        self.tally.add(
            clients,
            **who,
            status=status,
            arrival_s=arrival_ps / PICOSECONDS_PER_S,
            ttft_s=(first_token_ps - arrival_ps) / PICOSECONDS_PER_S,
            tpot_s=(finish_ps - first_token_ps) / (PICOSECONDS_PER_S * later_tokens),
            latency_s=(finish_ps - arrival_ps) / PICOSECONDS_PER_S,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            replica=replica,
            busy_s=busy_ps / PICOSECONDS_PER_S,
            retry_s=retry_s,
            cached_tokens=np.where(replica >= 0, cached_tokens, 0),
        )
        split = read_by != NOWHERE
        self.sampler.add(
            tenant=tenant,
            model=model,
            arrival_ps=arrival_ps,
            first_token_ps=first_token_ps,
            finish_ps=finish_ps,
            replica=replica,
            busy_ps=busy_ps,
        )
        self._busy(replica[replica >= 0], busy_ps[replica >= 0])
        if split.any():
            own = {name: column[split] for name, column in who.items()}
            self.tally.use(clients, **own, replica=read_by[split], busy_s=read_busy_ps[split] / PICOSECONDS_PER_S)
            self.sampler.use(
                tenant=tenant[split],
                model=model[split],
                begin_ps=arrival_ps[split],
                end_ps=first_token_ps[split],
                replica=read_by[split],
                busy_ps=read_busy_ps[split],
            )
            self._busy(read_by[split], read_busy_ps[split])

    def lose(
        self,
        *,
        tenant: Integers,
        model: Integers,
        replica: Integers,  # that had spent it
        busy_ps: Integers,  # share of its steps
        began_ps: Integers,  # when the request was first given to a replica
        lost_ps: Integers,  # when the one that had it failed
        clients: Sequence[str],
        client: Integers,
    ) -> None:
        """Write down what replicas had spent on requests that had to begin again, because one failed; by loss."""
        busy_s = busy_ps / PICOSECONDS_PER_S
        self.tally.use(clients, tenant=tenant, client=client, model=model, replica=replica, busy_s=busy_s)
        self.sampler.use(
            tenant=tenant, model=model, begin_ps=began_ps, end_ps=lost_ps, replica=replica, busy_ps=busy_ps
        )
        self._busy(replica, busy_ps)

    @property
    def duration_s(self) -> float:
        return (self.last_ps - self.first_ps) / PICOSECONDS_PER_S if self.first_ps is not None else 0.0

    def report(self) -> Report:
        usd = {
            one.id: one.usd_per_hour * runs_s / HOUR_S
            for one, runs_s in zip(self.replicas, self._of_all(self.runs_s), strict=True)
        }
        spent = Spent(duration_s=self.duration_s, usd=usd, kwh=self._kwh())
        total, timeline = self.tally.total(spent), self.sampler.timeline()
        deserved = [float(tenant.deserved or 0.0) * self.fleet.gpus for tenant in self.fleet.tenants]
        return Report(
            summaries=(total, *self.tally.by(spent, "tenant", "model")),
            by_tenant=self.tally.by(spent, "tenant"),
            by_client=self.tally.by(spent, "tenant", "client"),
            by_model=self.tally.by(spent, "model"),
            by_pool=self.tally.by(spent, "pool"),
            ttft_shares=self._shares("ttft_s"),
            latency_shares=self._shares("latency_s"),
            replicas=tuple(self.tally.replicas),
            timeline=timeline,
            lent=lent(timeline, deserved, self.fleet.gpus),
            preempted=self.preempted,
            duration_s=self.duration_s,
            usd=total.usd,
            idle_kwh=self._idle_kwh(),
            jobs_kwh=self._jobs_kwh(),
        )

    def _busy(self, replica: Integers, busy_ps: Integers) -> None:
        self.busy_s += np.bincount(replica, busy_ps, len(self.busy_s)) / PICOSECONDS_PER_S

    def _of_all(self, figures: Reals) -> list[float]:
        """Return the figures of the replicas there are."""
        known: list[float] = figures[: len(self.replicas)].tolist()
        return known

    def _shares(self, what: Literal["ttft_s", "latency_s"]) -> dict[str, Shares]:
        return {tenant: tuple(shares) for tenant in self.tenants if (shares := self.tally.shares(what, tenant))}

    # --- Energy -------------------------------------------------------------------------------------------------------

    def _watts(self) -> dict[str, tuple[float, float]] | None:
        """Return by pool what a GPU draws while it computes, its TDP, and while it idles; None where one is unknown."""
        gpus = {pool.name: self.fleet.gpu_of(pool) for pool in self.fleet.pools}
        watts = {pool: (gpu.tdp_watts, idle_watts(gpu)) for pool, gpu in gpus.items()}
        known = {pool: (busy, idle) for pool, (busy, idle) in watts.items() if busy is not None and idle is not None}
        return known if len(known) == len(watts) else None

    def _kwh(self) -> dict[str, float] | None:
        """Return by replica what its GPUs took."""
        watts = self._watts()
        if watts is None:
            return None
        kwh = {}
        for one, runs_s, busy_s in zip(
            self.replicas, self._of_all(self.runs_s), self._of_all(self.busy_s), strict=True
        ):
            busy_watts, idle = watts[one.pool]
            joules = busy_watts * min(busy_s, runs_s) + idle * max(0.0, runs_s - busy_s)
            kwh[one.id] = one.layout.gpus * joules / JOULES_PER_KWH
        return kwh

    def _idle_kwh(self) -> float | None:
        watts = self._watts()
        if watts is None:
            return None
        idle_s = {
            pool.name: pool.gpus * self.duration_s - self.jobs_gpu_s[pool.name] - self.down_gpu_s[pool.name]
            for pool in self.fleet.pools
        }
        for one, runs_s in zip(self.replicas, self._of_all(self.runs_s), strict=True):
            idle_s[one.pool] -= one.layout.gpus * runs_s
        return sum(max(0.0, gpu_s) * watts[pool][1] for pool, gpu_s in idle_s.items()) / JOULES_PER_KWH

    def _jobs_kwh(self) -> float | None:
        watts = self._watts()
        if watts is None:
            return None
        return sum(gpu_s * watts[pool][0] for pool, gpu_s in self.jobs_gpu_s.items()) / JOULES_PER_KWH


def _spans(replica: Replica, first_hour: int, first_ps: int, last_ps: int) -> Iterator[tuple[int, int, int]]:
    """Yield each stretch within two times in which a replica serves: when it begins to load, when to serve, its end."""
    hours = range(first_ps // HOUR_PS, last_ps // HOUR_PS + 1)
    serves = [hour for hour in hours if (first_hour + hour) % HOURS in replica.hours]
    begins = [hour for hour in serves if hour - 1 not in serves]
    ends = [hour + 1 for hour in serves if hour + 1 not in serves]
    loads_ps = 0 if len(replica.hours) == HOURS else min(round(replica.load_s * PICOSECONDS_PER_S), HOUR_PS)
    for begin, end in zip(begins, ends, strict=True):
        ready_ps = max(begin * HOUR_PS, first_ps)
        fresh = (first_hour + begin - 1) % HOURS not in replica.hours  # else it has served since before the start
        yield max(ready_ps - loads_ps * fresh, first_ps), ready_ps, min(end * HOUR_PS, last_ps)
