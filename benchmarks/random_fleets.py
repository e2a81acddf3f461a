"""Whether what sharing promises holds at every decision of whole fleets, drawn at random, from request to GPU.

    .venv/bin/python benchmarks/random_fleets.py [--fleets N] [--first SEED] [--steps K] [--processes P]

Each fleet has one to three pools of one to eight GPUs a node, two or three tenants with shares and terms of their own,
one to three models whose replicas take from one GPU to two nodes, jobs that save their work, nodes that fail and are
repaired, and K = 60 steps of requests: their load jumps and falls, some are of named clients, of some the client does
not wait for ever, and of some the prompts begin alike. It is rehearsed as any fleet is, under one of the policies; the
replicas run at the speed of the cost model. In one of four fleets all replicas and jobs take the same number of GPUs,
so that nothing but the rules can keep GPUs from who deserves them: there it is seen that they come back in time.

The table counts fleets, decisions, requests and moves, in how many fleets each thing happened, and promises that were
broken, by kind. The first ends its fleet; it is shown with its seed, which makes the same fleet again.
"""

import argparse
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from waterline.fleet import Demand, Fleet, Job, Model, Pool, Tenant
from waterline.outcome import CANCELLED, OK, REFUSED
from waterline.plan import Layout, ModelPlan, Place, Plan, Replica, Shape
from waterline.policy import tide as tides
from waterline.policy.decisions import RULES
from waterline.policy.holdings import DRAIN, GONE, HAND_BACK, NOBODY, Moves
from waterline.policy.jit import compiled
from waterline.policy.tide import FIXED, REACT
from waterline.rehearsal import Scribe, prepare
from waterline.rehearsal.acting import Tidal
from waterline.rehearsal.arrivals import Traffic, traffic
from waterline.rehearsal.capacity import NEVER
from waterline.rehearsal.failures import Failure
from waterline.rehearsal.house import Settled
from waterline.rehearsal.minutes import Minutes
from waterline.rehearsal.policies import Policy
from waterline.rehearsal.recorder import Recorder
from waterline.roster import Roster
from waterline.units import GIGA, PICOSECONDS_PER_S
from waterline.workload import Slo
from waterline.workload.ragged import ragged
from waterline.workload.stream import BLOCK_TOKENS, ENDLESS, UNSAID, Names, Stream, chunk_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "policy"))

from world import PROMISES, broken_by_moves, broken_now, usage_of

EPSILON = 1e-6
STEPS = 60
HALF_A_WAVE = 12  # steps
MOST_REQUESTS = 1500  # of a fleet, about
GPUS = ("h100-sxm-80g", "mi300x", "a100-sxm-80g")  # of the first pool, the second and the third
POLICIES: tuple[Policy, ...] = ("waterline",) * 7 + ("static", "fcfs", "priority")
GUARANTEES = 3  # the promise that stands back while nodes are down


class BrokenPromiseError(AssertionError):
    """A promise was."""

    def __init__(self, promise: str, what: object = "") -> None:
        super().__init__(promise, what)
        self.promise = promise


def hold(so: Any, promise: str, what: object = "") -> None:
    """Raise BrokenPromiseError where something is not so."""
    if not so:
        raise BrokenPromiseError(promise, what)


# --- What is checked at every step ------------------------------------------------------------------------------------


class Checked(Minutes):
    """Holds every decision, and what it leads to, against what is promised."""

    made = ticks = 0
    note_load, broken_now, broken_by_moves = map(staticmethod, (tides.note_load, broken_now, broken_by_moves))
    within_s = float("inf")  # in which whoever deserves GPUs and wants them has them; inf: that is not seen

    def _decide(self) -> None:
        super()._decide()
        self.ticks += 1
        self.check_state()
        self.check_restored()

    def _fail(self, pool: str, node: int) -> None:
        super()._fail(pool, node)
        self.lately.clear()

    def _repair(self, pool: str, node: int) -> None:
        super()._repair(pool, node)
        self.lately.clear()

    def _tell(self, signal: str, **more: int | float) -> Moves | None:
        if signal == "load" and self.signals is None:
            return self.note_load(self.tide, more["service"], more["step"], more["load"])
        if signal != "tick":
            return super()._tell(signal, **more)
        tide = self.tide
        claims, held = (type(one)(*(column.copy() for column in one)) for one in (tide.claims, tide.replicas))
        moves = super()._tell(signal, **more)
        assert moves is not None
        self.made += len(moves.kind)
        now_s = self.first_s + self.now_s
        broken = self.broken_by_moves(tide.tenants, tide.services, tide.layouts, claims, held, moves, now_s)
        hold(not broken, PROMISES.get(broken, ""), f"at {now_s:g} s")
        for move in np.flatnonzero((moves.victim != NOBODY) & np.isin(moves.kind, (DRAIN, HAND_BACK))).tolist():
            grace_s = tide.tenants.grace_s[tide.services.tenant[held.service[moves.victim[move]]]]
            hold(moves.deadline_s[move] <= now_s + grace_s, "no deadline is later than the grace")
        return moves

    def check_state(self) -> None:
        tide, roster = self.tide, self.roster
        there = np.array([sum(len(gpus) for gpus in free.values()) for free in roster.free])
        claimed = np.zeros(len(there), np.int64)
        for claim in np.flatnonzero(tide.claims.service != NOBODY):
            claimed[tide.claims.node[claim]] += tide.claims.held_gpus[claim]
        hold((there == tide.free_gpus + claimed).all(), "GPUs of a node are those of its replicas, held, or idle")
        seen: set[tuple[str, int, int]] = set()
        for one in [*roster.has.values(), *(kept.what for kept in self.kept.values())]:
            gpus = {(one.pool, place.node, gpu) for place in one.places for gpu in place.gpus}
            hold(not gpus & seen, "no GPU has two owners", one.id)
            seen |= gpus
        for row, one in roster.has.items():
            gpus_of = sum(len(place.gpus) for place in one.places)
            right = gpus_of == tide.replicas.gpus[row] and tide.replicas.state[row] != GONE
            hold(right, "who has GPUs has those that it counts", one.id)
            down = [place.node for place in one.places if (one.pool, place.node) in roster.down]
            hold(not down, "nobody has GPUs of a node that is down", one.id)
        hold(len(roster.has) == int((tide.replicas.state != GONE).sum()), "nobody has GPUs without a name")
        broken = self.broken_now(
            tide.tenants, tide.services, tide.layouts, tide.free_gpus, tide.claims, tide.replicas,
            self.all_gpus - tide.down_gpus,
        )  # fmt: skip
        hold(not broken or (broken == GUARANTEES and tide.down_gpus.any()), PROMISES.get(broken, ""))

    def watch(self, within_s: float = float("inf")) -> None:
        """Begin to check; after so long whoever deserves GPUs and wants them has them, inf: that is not seen."""
        self.all_gpus = self.tide.free_gpus.copy()
        np.add.at(self.all_gpus, self.tide.replicas.node, self.tide.replicas.gpus)
        self.within_s = within_s
        self.steps = int(within_s / self.roster.step_s) + 2 if within_s < float("inf") else 1
        self.lately: deque[np.ndarray] = deque(maxlen=self.steps)

    def check_restored(self) -> None:
        """Nobody lacks what it deserves for too long: what answers, loads or is being freed for it counts as there."""
        tide, services, tenants = self.tide, self.tide.services, self.tide.tenants
        if self.within_s == float("inf"):
            return
        supply = tides.supply_of(tide)
        usage = usage_of(tenants, services, tide.layouts, tide.claims, tide.replicas, draining=False)
        takes = tide.layouts.gpus.max(axis=1)[services.model]
        room = usage[services.tenant] + takes <= tenants.deserved_gpus[services.tenant] + EPSILON
        self.lately.append((takes > 0) & room & (services.wanted > supply * (1.0 + EPSILON)))
        if len(self.lately) == self.steps and not tide.down_gpus.any():
            late = np.all(self.lately, axis=0)
            hold(not late.any(), PROMISES[10], f"at {self.now_s:g} s: services {np.flatnonzero(late).tolist()}")

    def check_end(self) -> None:
        for move in self.moves:
            if move.kind in {"drain", "hand back"} and move.victim:
                hold(not move.done_s > move.deadline_s + EPSILON, "GPUs are handed over by the deadline", move)
            if move.kind == "start" and not (self.warm and move.at_s == 0.0):
                hold(not abs(move.done_s - move.deadline_s) > EPSILON, "a replica serves when it was said to", move)


class Life(Tidal):
    """A rehearsal with every promise checked."""

    clock = Checked
    minutes: Checked


def check_requests(life: Life, asked: int, settled: Sequence[Settled]) -> None:
    """Every request ends, once: with all of its answer by a replica that was there, or it is told why not."""
    report = life.recorder.report()
    total = report.summaries[0]
    ended = total.completed + total.refused + total.cancelled + total.failed
    hold(sum(len(one.numbers) for one in settled) == asked == total.requests == ended, ONCE, f"{asked}: {total}")
    hold(not len(life.house.station.results), ONCE, "somebody is still there")
    parts = sum(one.requests for one in report.by_tenant), sum(one.requests for one in report.summaries[1:])
    hold(parts == (asked, asked), ONCE, "of tenants and models together")
    stays = {stay.what.id: stay for stay in life.minutes.stays}
    kept = {replica.id for replica in life.setting.roster.kept}
    span_ps = np.zeros((2, len(life.house.replicas)))
    for row, replica in enumerate(life.house.replicas):
        stay, later_ps = stays[replica.id], life.house.station.capacities[row].step.first_token_ps
        span_ps[0, row] = stay.ready_s * PICOSECONDS_PER_S
        span_ps[1, row] = stay.ended_s * PICOSECONDS_PER_S + later_ps if replica.id not in kept else np.inf
        span_ps[0, row] *= replica.id not in kept
    known = life.house.models
    models = np.array([known.index(replica.model) for replica in life.house.replicas], np.int64)
    asked_of = np.array([known.index(row.model) for row in life.setting.rows], np.int64)
    for one in settled:
        asked_for, what, status = one.asked, one.passages, one.status
        served, refused, gone = status == OK, status == REFUSED, status == CANCELLED
        begin, first, end = what.started_ps[served], what.first_token_ps[served], what.finish_ps[served]
        rows = what.replica[served]
        times = (asked_for.arrival_ps[served] <= begin) & (begin < first) & (first <= end)
        hold(times.all(), "a request is asked, begun, answered and done in this order")
        hold((end <= span_ps[1, rows] + 1).all(), "who answers is there until the answer is whole")
        stayed = what.restarts[served] == 0  # else its first token may have come from a replica that is gone
        hold((first >= span_ps[0, rows])[stayed].all(), "who answers has loaded")
        right = models[rows] == asked_of[asked_for.row[served]]
        hold(right.all(), "who answers is of the model that was asked for")
        hold((what.finish_ps[refused] >= asked_for.arrival_ps[refused]).all(), "nobody is refused before they ask")
        hold((what.retry_s >= 0.0).all() and np.isfinite(what.retry_s).all(), "who is refused hears when to come back")
        stayed_ps = what.finish_ps - asked_for.arrival_ps
        patience_ps, leaves_ps = (
            np.where(one == NEVER, np.inf, one) for one in (asked_for.patience_ps, asked_for.leaves_ps)
        )
        gives_up = gone & (what.replica < 0)
        hold((stayed_ps >= np.where(gives_up, np.minimum(patience_ps, leaves_ps), leaves_ps))[gone].all(), GOES)
        on_the_way_ps = np.array([one.step.first_token_ps for one in life.house.station.capacities], np.int64)[rows]
        hold((stayed_ps[served] - on_the_way_ps <= leaves_ps[served]).all(), GOES)
        hold((what.cached_tokens <= asked_for.prompt_tokens).all(), "no more is cached than was asked")


ONCE = "every request ends, once"
GOES = "a client goes when it said it would, and not before; nobody answers who has gone"


# --- Fleets drawn at random -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A fleet, who asks it what, and what happens to it."""

    plan: Plan
    policy: Policy
    reacts: bool  # replicas come as the load is, not as it is foreseen
    uniform: bool  # all replicas and jobs take the same number of GPUs
    failures: tuple[Failure, ...]
    requests: Stream
    length_s: float


def random_fleet(seed: int, steps: int = STEPS) -> Drawn:
    """Draw a fleet and its life of so many steps."""
    dice = np.random.default_rng(seed)
    uniform = bool(dice.random() < 0.25)
    plan = random_plan(dice, uniform=uniform)
    step_s = Roster(plan, ()).step_s
    pools = plan.fleet.pools
    failures = tuple(
        Failure(
            pool=(pool := pools[int(dice.integers(len(pools)))]).name,
            node=int(dice.integers(pool.nodes)),
            begin_s=float(dice.random() * steps * step_s),
            length_s=float(dice.random() * 600.0),
        )
        for _ in range(dice.integers(0, 3))
    )
    return Drawn(
        plan=plan,
        policy=POLICIES[int(dice.integers(len(POLICIES)))],
        reacts=bool(dice.random() < 0.3),
        uniform=uniform,
        failures=failures,
        requests=random_requests(dice, plan, steps, step_s),
        length_s=steps * step_s,
    )


def random_plan(dice: np.random.Generator, *, uniform: bool) -> Plan:
    """Return a plan as the planner might write it, of whatever fits."""
    takes_all = int(dice.choice([1, 2, 4])) if uniform else 0
    sizes = [size for size in (1, 2, 4, 8) if size >= takes_all]
    pools = tuple(
        Pool(
            name=f"pool-{number}",
            gpu=GPUS[number],
            nodes=int(dice.integers(1, 7)),
            gpus_per_node=int(dice.choice(sizes)),
            usd_per_gpu_hour=1.0,
        )
        for number in range(dice.integers(1, 4))
    )
    gpus = sum(pool.gpus for pool in pools)
    tenants = tuple(random_tenants(dice, gpus, takes_all))
    models = tuple(
        Model(
            name=f"model-{number}",
            weights="meta-llama/Llama-3.1-8B",
            max_context_tokens=8192,
            slo=Slo(ttft_s=float(dice.choice([0.3, 2.0, 10.0])), tpot_s=0.1),
        )
        for number in range(dice.integers(1, 4))
    )
    shapes = tuple(random_shapes(dice, models, pools, takes_all))
    jobs = tuple(
        Job(
            name=f"job-{number}",
            tenant=str(dice.choice([tenant.name for tenant in tenants])),
            gpus=takes_all or 1,
            copies=int(dice.integers(1, gpus // (takes_all or 1) + 1)),
            pools=tuple(pool.name for pool in pools),
            load_s=float(dice.choice([10.0, 50.0])),
            checkpoint_every_s=float(dice.choice([60.0, 300.0])),
        )
        for number in range(dice.integers(0, 3))
    )
    pairs = [(tenant.name, model.name) for tenant in tenants for model in models]
    demand = tuple(
        Demand(tenant=tenant, model=model, requests_per_s=1.0)
        for number, (tenant, model) in enumerate(pairs)
        if not number or dice.random() < 0.7
    )
    fleet = Fleet(name="random", pools=pools, models=models, tenants=tenants, demand=demand, jobs=jobs)
    planned = tuple(
        ModelPlan(
            model=model.name, requests_per_s=1.0, prompt_tokens=1000, output_tokens=100, replicas=0, gpus=0,
            usd_per_hour=0.0, usd_per_million_tokens=None, limited_by="engine", reason="-",
        )
        for model in models
    )  # fmt: skip
    plan = Plan(fleet=fleet, models=planned, tenants=(), replicas=(), shapes=shapes)
    return with_replicas(dice, plan) if dice.random() < 0.5 else plan


def random_tenants(dice: np.random.Generator, gpus: int, unit: int) -> Iterator[Tenant]:
    """Yield tenants; with a unit they deserve multiples of it, and have what they want soon enough to see it."""
    count = int(dice.integers(2, 4))
    shares = dice.dirichlet(np.ones(count)) * dice.choice([0.5, 1.0])
    for number, deserved in enumerate((np.floor(shares * gpus / unit) * unit / gpus if unit else shares).tolist()):
        yield Tenant(
            name=f"tenant-{number}",
            guarantee=float(deserved * dice.choice([0.0, 0.5, 1.0])),
            deserved=deserved,
            limit=float(min(1.0, deserved + dice.random())),
            priority=int(dice.integers(0, 3)),
            grace_s=float(dice.choice([0.0, 20.0, 60.0])),
            min_runtime_s=float(dice.choice([0.0, 100.0, 100.0 if unit else 300.0])),
        )


def random_shapes(
    dice: np.random.Generator, models: Sequence[Model], pools: Sequence[Pool], takes_all: int
) -> Iterator[Shape]:
    for model in models:
        for pool in pools:
            takes = takes_all or int(dice.choice([1, 2, 4, 8, 16]))
            if takes > pool.gpus or (takes > pool.gpus_per_node and takes % pool.gpus_per_node):
                continue
            yield Shape(
                model=model.name,
                pool=pool.name,
                precision="bf16",
                layout=Layout(tp=takes),
                engine="fake",
                max_context_tokens=8192,
                max_batch=int(dice.choice([1, 4, 16, 64])),
                cache_tokens=int(dice.choice([5000, 10_000, 100_000])),
                requests_per_s=takes * dice.random() + 0.1,
                prefill_tokens_per_s=1e4,
                tokens_per_s=1e4,
                ttft_s=1.0,
                tpot_s=0.1,
                usd_per_hour=float(takes),
                load_s=float(dice.choice([30.0, 80.0, 200.0])),
            )


def with_replicas(dice: np.random.Generator, plan: Plan) -> Plan:
    """Return a plan with replicas on some of its nodes, if nobody has more of them than is promised to others."""
    replicas: list[Replica] = []
    for pool in plan.fleet.pools:
        fitting = [one for one in plan.shapes if one.pool == pool.name and one.layout.gpus <= pool.gpus_per_node]
        for node in range(pool.nodes if fitting else 0):
            if dice.random() < 0.5:
                shape = fitting[int(dice.integers(len(fitting)))]
                place = Place(node=node, gpus=tuple(range(shape.layout.gpus)))
                replicas.append(shape.replica(f"{shape.model}/{len(replicas)}", (place,)))
    tide = Roster(plan, replicas).tide
    gpus = tide.free_gpus.copy()
    np.add.at(gpus, tide.replicas.node, tide.replicas.gpus)
    broken = broken_now(
        tide.tenants, tide.services, tide.layouts, tide.free_gpus, tide.claims, tide.replicas, gpus
    )  # fmt: skip
    return plan if broken else replace(plan, replicas=tuple(replicas))


def random_requests(dice: np.random.Generator, plan: Plan, steps: int, step_s: float) -> Stream:
    """Return requests whose rates jump now and then."""
    rows, tenants, models = plan.fleet.demand, Names(), Names()
    of_row = tenants.indices([row.tenant for row in rows]), models.indices([row.model for row in rows])
    wave_s = HALF_A_WAVE * step_s
    size = (-(-steps // HALF_A_WAVE), len(rows))
    rates = dice.exponential(2.0, size) * (dice.random(size) < 0.6)
    rates *= min(1.0, MOST_REQUESTS / max(rates.sum() * wave_s, 1.0))
    counts = dice.poisson(rates * wave_s)
    counts[0, 0] += 1  # there is one
    wave, row = (np.repeat(index, counts.ravel()) for index in np.indices(size).reshape(2, -1))
    count = len(wave)
    arrival_s = (wave + dice.random(count)) * wave_s
    order = np.argsort(arrival_s, kind="stable")
    arrival_s, row = arrival_s[order], row[order]
    prompts = np.clip(dice.lognormal(6.2, 1.0, count), 1, 7000).astype(np.int32)
    outputs = np.clip(dice.lognormal(4.1, 1.0, count), 1, 1000).astype(np.int32)
    named, impatient, alike, leave = (dice.random(4) < (0.7, 0.5, 0.5, 0.5)).tolist()
    blocks = None
    if alike:
        stories = dice.integers(0, 20, count)
        lengths = -(-prompts // BLOCK_TOKENS)
        blocks = ragged(
            [
                list(range(100 * story, 100 * story + length))
                for story, length in zip(stories.tolist(), lengths.tolist(), strict=True)
            ]
        )
    chunk = chunk_of(
        (arrival_s * GIGA).astype(np.int64) // 100 * 100,
        prompts,
        outputs,
        tenant=of_row[0][row],
        model=of_row[1][row],
        client=dice.integers(0, 12, count).astype(np.int32) if named else np.full(count, UNSAID, np.int32),
        patience_ns=np.where(
            dice.random(count) < 0.3 * impatient, (1 + dice.exponential(5e9, count)).astype(np.int64), ENDLESS
        ),
        leaves_ns=np.where(
            dice.random(count) < 0.3 * leave, (1 + dice.exponential(10e9, count)).astype(np.int64), ENDLESS
        ),
        blocks=blocks,
    )
    return Stream(
        name="random",
        read=lambda: iter([chunk]),
        tenants=tenants,
        models=models,
        clients=Names([f"client-{number}" for number in range(12)]),
    )


# --- Their lives ------------------------------------------------------------------------------------------------------


def begin(drawn: Drawn) -> tuple[Life, Traffic]:
    """Return the fleet at its beginning, and what will be asked."""
    asked = traffic(drawn.plan, drawn.requests, seed=0, duration_s=None)
    life = Life(drawn.policy, drawn.plan, asked, Recorder(drawn.plan, asked.length_s), drawn.failures, reasons=False)
    tide = life.setting.roster.tide
    if drawn.reacts:
        tide.source[tide.source != FIXED] = REACT
    tenants, runs = tide.tenants, tide.layouts.gpus > 0
    slowest_s = tide.layouts.load_s[runs].max(initial=0.0) + tenants.min_runtime_s.max() + tenants.grace_s.max()
    life.minutes.watch(slowest_s + 2 * life.setting.roster.step_s if drawn.uniform else float("inf"))
    life.minutes.decide = compiled(tides.decide)
    return life, asked


def live(drawn: Drawn, *, keep: bool = False) -> tuple[Life, list[Settled]]:
    """Let a fleet live, every step and every request of it checked; `keep` its signals. Raises BrokenPromiseError."""
    life, asked = begin(drawn)
    life.minutes.signals = [] if keep else None
    scribe, count = Scribe(life.recorder, life.came, keep=True, decisions=False), 0
    for piece in asked.pieces():
        count += len(piece)
        scribe.note(life.serve(piece))
    life.minutes.advance(drawn.length_s)
    scribe.note(life.finish())
    scribe.meet()
    life.close()
    life.minutes.check_end()
    check_requests(life, count, scribe.kept)
    return life, scribe.kept


def happened(drawn: Drawn, life: Life, settled: Sequence[Settled]) -> Counter[str]:
    """Count what there was of each thing."""
    found: Counter[str] = Counter(f"move: {move.rule}" for move in life.moves)
    found["policy: " + drawn.policy] += 1
    found["jobs"] += len(drawn.plan.fleet.jobs)
    found["jobs stopped"] += sum(job.stops for job in life.jobs)
    found["nodes that failed"] += len(drawn.failures)
    found["replicas on several nodes"] += sum(len(replica.places) > 1 for replica in life.house.replicas)
    found["replicas from the start"] += len(drawn.plan.replicas)
    found["all take the same GPUs"] += drawn.uniform
    for one in settled:
        found["requests"] += len(one.numbers)
        found["requests: served"] += int((one.status == OK).sum())
        found["requests: gave up"] += int(((one.status == CANCELLED) & (one.passages.replica < 0)).sum())
        found["requests: left in the middle"] += int(((one.status == CANCELLED) & (one.passages.replica >= 0)).sum())
        found["requests: preempted"] += int((one.passages.preemptions > 0).sum())
        found["requests: went on elsewhere"] += int((one.passages.restarts > 0).sum())
        found["requests: prompt found in cache"] += int((one.passages.cached_tokens > 0).sum())
        for rule, times in zip(
            *np.unique(-one.passages.replica[one.status == REFUSED], return_counts=True), strict=True
        ):
            found[f"requests: refused, {RULES[int(rule)][0]}"] += int(times)
    return found


class Tried(NamedTuple):
    """What came of some fleets."""

    fleets: int
    ticks: int
    moves: int
    times: Counter[str]  # each thing happened
    fleets_with: Counter[str]  # it
    broken: list[tuple[int, str, str]]  # seed, promise, what


def try_fleets(seeds: Sequence[int], steps: int) -> Tried:
    """Let some fleets live; what is worth compiling for many is."""
    Checked.note_load, Checked.broken_now, Checked.broken_by_moves = (
        staticmethod(compiled(one)) for one in (tides.note_load, broken_now, broken_by_moves)
    )
    ticks = moves = 0
    times, fleets_with, broken = Counter[str](), Counter[str](), []
    for seed in seeds:
        drawn = random_fleet(seed, steps)
        try:
            life, settled = live(drawn)
        except BrokenPromiseError as error:
            broken.append((seed, error.promise, str(error.args[1])))
            continue
        found = happened(drawn, life, settled)
        times += found
        fleets_with.update(thing for thing, count in found.items() if count)
        ticks += life.minutes.ticks
        moves += life.minutes.made
    return Tried(len(seeds), ticks, moves, times, fleets_with, broken)


def all_of(tried: Iterable[Tried]) -> Tried:
    """Return what came of all of them."""
    whole = Tried(0, 0, 0, Counter(), Counter(), [])
    for one in tried:
        whole.times.update(one.times)
        whole.fleets_with.update(one.fleets_with)
        whole.broken.extend(one.broken)
        whole = whole._replace(
            fleets=whole.fleets + one.fleets, ticks=whole.ticks + one.ticks, moves=whole.moves + one.moves
        )
    return whole


def show(console: Console, tried: Tried, steps: int) -> None:
    table = Table(title=f"{tried.fleets:,} random fleets, {steps} steps of requests each", title_justify="left")
    for name in ("", "all", "fleets with it"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("decisions", f"{tried.ticks:,}", "")
    table.add_row("moves", f"{tried.moves:,}", "", end_section=True)
    for thing, count in sorted(tried.times.items()):
        table.add_row(thing, f"{count:,}", f"{tried.fleets_with[thing]:,}")
    table.add_section()
    kinds = Counter(promise for _, promise, _ in tried.broken)
    for promise in [*PROMISES.values(), ONCE, *sorted(set(kinds) - {*PROMISES.values(), ONCE})]:
        table.add_row(f"broken: {promise}", "", f"{kinds[promise]:,}")
    console.print(table)
    for seed, promise, what in tried.broken[:20]:
        console.print(f"seed {seed}: not so: {promise}: {what}", soft_wrap=True, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, usual in (("fleets", 10_000), ("first", 0), ("steps", STEPS), ("processes", os.cpu_count() or 1)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    given = parser.parse_args()
    seeds = range(given.first, given.first + given.fleets)
    parts = [seeds[begin : begin + 50] for begin in range(0, len(seeds), 50)]
    prepare()
    try_fleets(seeds[:1], given.steps)  # compiles, once for all
    began_s, tried = time.perf_counter(), []
    console = Console(width=120)
    with ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
        for part in pool.map(partial(try_fleets, steps=given.steps), parts):
            tried.append(part)
            for seed, promise, what in part.broken:
                console.print(f"seed {seed}: not so: {promise}: {what}", soft_wrap=True, markup=False)
    show(console, all_of(tried), given.steps)
    console.print(f"{time.perf_counter() - began_s:,.0f} s on {given.processes} processes")


if __name__ == "__main__":
    main()
