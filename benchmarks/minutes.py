"""Whether what sharing promises holds at every decision, with replicas, jobs and nodes that fail, on random fleets.

    .venv/bin/python benchmarks/minutes.py [--fleets N]

Each fleet has pools of one to eight GPUs a node, two or three tenants with random shares and terms, models whose
replicas take from one GPU to two nodes, jobs, loads that jump and fall, and failures. Its requests are a fluid: what
matters here is who has which GPUs, and when. The table counts decisions, moves, and promises that were broken.
"""

import sys
import time
from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from waterline.fleet import Demand, Fleet, Job, Model, Pool, Tenant
from waterline.plan import Layout, ModelPlan, Plan, Replica, Shape
from waterline.policy import tide as tides
from waterline.policy.holdings import DRAIN, DRAINING, GONE, HAND_BACK, NOBODY, READY, Moves
from waterline.policy.jit import compiled
from waterline.rehearsal.arrivals import Piece
from waterline.rehearsal.failures import Failure
from waterline.rehearsal.minutes import Minutes
from waterline.roster import Roster

EPSILON = 1e-6
STEPS = 90
HALF_A_WAVE = 15  # steps


class Fluid:
    """Serves whatever is asked; replicas are idle some steps after they drain."""

    def __init__(self, dice: np.random.Generator) -> None:
        self.dice = dice
        self.rows = 0
        self.drained: dict[int, int] = {}  # row -> polls until it is idle
        self.gone: set[int] = set()

    def start_all(self, replicas: Sequence[Replica], ready_ps: int) -> range:  # noqa: ARG002 - the station's signature
        self.rows += len(replicas)
        return range(self.rows - len(replicas), self.rows)

    def drain(self, row: int, at_ps: int) -> None:  # noqa: ARG002 - the station's signature
        assert row not in self.gone
        self.drained[row] = int(self.dice.integers(0, 6))

    def fail(self, row: int, at_ps: int) -> None:  # noqa: ARG002 - likewise
        assert row not in self.gone
        self.gone.add(row)

    def offer(self, piece: Piece) -> None:
        pass

    def advance(self, until_ps: int) -> None:
        pass

    def idle(self, row: int) -> bool:
        self.drained[row] -= 1
        return self.drained[row] < 0


class Given:
    """Says what is asked at each step."""

    def __init__(self, loads: np.ndarray, step_s: float) -> None:
        self.of_step, self.step_s, self.asked = loads, step_s, 0  # [step, service]

    def note(self, piece: Piece) -> None:
        pass

    def loads(self) -> dict[int, float]:
        self.asked += 1
        return dict(enumerate((self.of_step[min(self.asked, len(self.of_step)) - 1] * self.step_s).tolist()))


class BrokenPromiseError(AssertionError):
    """A promise was."""


class Checked(Minutes):
    """Holds every decision, and what it leads to, against what is promised."""

    made = 0

    def _decide(self) -> None:
        super()._decide()
        self.check_state()

    def _tell(self, signal: str, **more: int | float) -> Moves | None:
        if signal != "tick":
            return super()._tell(signal, **more)
        held = self.tide.replicas
        state, since_s = held.state.copy(), held.since_s.copy()
        service, tenant = held.service.copy(), self.tide.services.tenant
        moves = super()._tell(signal, **more)
        assert moves is not None
        self.made += len(moves.kind)
        now_s = self.first_s + self.now_s
        for move in np.flatnonzero((moves.victim != NOBODY) & np.isin(moves.kind, (DRAIN, HAND_BACK))).tolist():
            victim = moves.victim[move]
            owner = tenant[service[victim]]
            if state[victim] != READY:
                raise BrokenPromiseError(f"a replica in state {state[victim]} is stopped")
            if now_s - since_s[victim] < self.tide.tenants.min_runtime_s[owner]:
                raise BrokenPromiseError("a replica is stopped before its minimum runtime")
            if moves.deadline_s[move] > now_s + self.tide.tenants.grace_s[owner]:
                raise BrokenPromiseError("a deadline is later than the grace")
        return moves

    def check_state(self) -> None:
        tide, roster = self.tide, self.roster
        held, tenants = tide.replicas, tide.tenants
        there = np.array([sum(len(gpus) for gpus in free.values()) for free in roster.free])
        claimed = np.zeros(len(there), np.int64)
        for claim in np.flatnonzero(tide.claims.service != NOBODY):
            claimed[tide.claims.node[claim]] += tide.claims.held_gpus[claim]
        if (there != tide.free_gpus + claimed).any():
            raise BrokenPromiseError("GPUs of a node are not those that nobody has")
        seen: set[tuple[str, int, int]] = set()
        for row, one in roster.has.items():
            gpus = {(one.pool, place.node, gpu) for place in one.places for gpu in place.gpus}
            if gpus & seen or len(gpus) != held.gpus[row] or held.state[row] == GONE:
                raise BrokenPromiseError("a GPU has two owners, or none that is known")
            seen |= gpus
        if len(roster.has) != int((held.state != GONE).sum()):
            raise BrokenPromiseError("somebody has GPUs and no name")
        usage, occupied = np.zeros(len(tenants.limit_gpus)), np.zeros(len(tenants.limit_gpus))
        going = 0.0
        for row in np.flatnonzero(held.state != GONE):
            owner = tide.services.tenant[held.service[row]]
            occupied[owner] += held.gpus[row]
            usage[owner] += held.gpus[row] * (held.state[row] != DRAINING)
            going += held.gpus[row] * (held.state[row] == DRAINING)
        for claim in np.flatnonzero(tide.claims.service != NOBODY):
            service = tide.claims.service[claim]
            takes = tide.layouts.gpus[tide.services.model[service], tide.claims.node[claim]]
            usage[tide.services.tenant[service]] += takes
            going += tide.claims.held_gpus[claim] - takes
        if (occupied > tenants.limit_gpus + EPSILON).any():
            raise BrokenPromiseError(f"more than a limit: {occupied}, {tenants.limit_gpus}")
        unused = np.maximum(tenants.guarantee_gpus - usage, 0.0).sum()
        if not tide.down_gpus.any() and unused > tide.free_gpus.sum() + going + EPSILON:
            raise BrokenPromiseError(f"somebody has what is guaranteed to another: {unused}, {tide.free_gpus.sum()}")

    def check_end(self) -> None:
        for move in self.moves:
            if move.kind in {"drain", "hand back"} and move.victim and move.done_s > move.deadline_s + EPSILON:
                raise BrokenPromiseError(f"handed over {move.done_s - move.deadline_s:g} s too late: {move}")
            if move.kind == "start" and abs(move.done_s - move.deadline_s) > EPSILON:
                raise BrokenPromiseError(f"serves at {move.done_s:g}, not at {move.deadline_s:g}: {move}")


def random_plan(dice: np.random.Generator) -> Plan:
    """Return a plan as the planner might write it, of whatever fits."""
    pools = tuple(
        Pool(
            name=f"pool-{number}",
            gpu="h100-sxm-80g",
            nodes=int(dice.integers(1, 7)),
            gpus_per_node=int(dice.choice([1, 2, 4, 8])),
            usd_per_gpu_hour=1.0,
        )
        for number in range(dice.integers(1, 4))
    )
    gpus = sum(pool.gpus for pool in pools)
    count = int(dice.integers(2, 4))
    shares = dice.dirichlet(np.ones(count)) * dice.choice([0.5, 1.0])
    tenants = tuple(
        Tenant(
            name=f"tenant-{number}",
            guarantee=float(share * dice.choice([0.0, 0.5])),
            deserved=float(share),
            limit=float(min(1.0, share + dice.random())),
            priority=int(dice.integers(0, 3)),
            grace_s=float(dice.choice([0.0, 20.0, 60.0])),
            min_runtime_s=float(dice.choice([0.0, 100.0, 300.0])),
        )
        for number, share in enumerate(shares.tolist())
    )
    models = tuple(Model(name=f"model-{number}", weights="-") for number in range(dice.integers(1, 4)))
    shapes = [
        Shape(
            model=model.name, pool=pool.name, precision="bf16", layout=Layout(tp=takes), engine="fake",
            max_context_tokens=8192, max_batch=64, cache_tokens=10**5, requests_per_s=takes * dice.random() + 0.1,
            prefill_tokens_per_s=1e4, tokens_per_s=1e4, ttft_s=1.0, tpot_s=0.1, usd_per_hour=float(takes),
            load_s=float(dice.choice([30.0, 80.0, 200.0])),
        )
        for model in models
        for pool in pools
        if (takes := int(dice.choice([1, 2, 4, 8, 16]))) <= pool.gpus
        and (takes <= pool.gpus_per_node or takes % pool.gpus_per_node == 0)
    ]  # fmt: skip
    jobs = tuple(
        Job(
            name=f"job-{number}",
            tenant=str(dice.choice([tenant.name for tenant in tenants])),
            gpus=1,
            copies=int(dice.integers(1, gpus + 1)),
            pools=tuple(pool.name for pool in pools),
            load_s=float(dice.choice([10.0, 50.0])),
            checkpoint_every_s=float(dice.choice([60.0, 300.0])),
        )
        for number in range(dice.integers(0, 3))
    )
    demand = tuple(
        Demand(tenant=tenant.name, model=model.name, requests_per_s=1.0) for tenant in tenants for model in models
    )
    fleet = Fleet(name="random", pools=pools, models=models, tenants=tenants, demand=demand, jobs=jobs)
    planned = tuple(
        ModelPlan(
            model=model.name, requests_per_s=1.0, prompt_tokens=1000, output_tokens=200, replicas=0, gpus=0,
            usd_per_hour=0.0, usd_per_million_tokens=None, limited_by="engine", reason="-",
        )
        for model in models
    )  # fmt: skip
    return Plan(fleet=fleet, models=planned, tenants=(), replicas=(), shapes=tuple(shapes))


def random_loads(dice: np.random.Generator, plan: Plan, steps: int) -> np.ndarray:
    """Return loads by step and service that jump now and then."""
    size = (-(-steps // HALF_A_WAVE), len(plan.fleet.tenants) * len(plan.fleet.models))
    return np.repeat(dice.exponential(2.0, size) * (dice.random(size) < 0.6), HALF_A_WAVE, axis=0)


def random_life(seed: int, steps: int = STEPS, *, keep: bool = False) -> Checked:
    """Let a random fleet live for some steps, every one of them checked; `keep` its signals.

    Raises BrokenPromiseError.
    """
    dice = np.random.default_rng(seed)
    plan = random_plan(dice)
    roster = Roster(plan, (), hour=0)
    if dice.random() < 0.5:
        roster.tide.source[roster.tide.source != tides.FIXED] = tides.REACT
    pools = plan.fleet.pools
    failures = [
        Failure(
            pool=(pool := pools[int(dice.integers(len(pools)))]).name,
            node=int(dice.integers(pool.nodes)),
            begin_s=float(dice.random() * steps * roster.step_s),
            length_s=float(dice.random() * 600.0),
        )
        for _ in range(dice.integers(0, 3))
    ]
    loads = random_loads(dice, plan, steps)
    minutes = Checked(plan, roster, Fluid(dice), rows=(), first_hour=0, length_s=0.0, failures=failures)
    minutes.meter = Given(loads, roster.step_s)  # type: ignore[assignment]
    minutes.decide = compiled(tides.decide)
    minutes.signals = [] if keep else None
    minutes.advance(steps * roster.step_s)
    minutes.finish(steps * roster.step_s)
    minutes.check_end()
    return minutes


def shares_of(lives: Iterable[Checked]) -> dict[str, int]:
    """Count moves by their rule."""
    counted: dict[str, int] = {}
    for life in lives:
        for move in life.moves:
            counted[move.rule] = counted.get(move.rule, 0) + 1
    return counted


def main() -> None:
    fleets = int(sys.argv[sys.argv.index("--fleets") + 1]) if "--fleets" in sys.argv else 10_000
    broken: list[str] = []
    rules: dict[str, int] = {}
    began_s = time.process_time()
    for seed in range(fleets):
        try:
            for rule, times in shares_of([random_life(seed)]).items():
                rules[rule] = rules.get(rule, 0) + times
        except BrokenPromiseError as error:
            broken.append(f"seed {seed}: {error}")
    table = Table(title=f"{fleets:,} random fleets, {STEPS} decisions each", title_justify="left")
    table.add_column("moves by rule")
    table.add_column("", justify="right")
    for rule, times in sorted(rules.items(), key=lambda one: -one[1]):
        table.add_row(rule, f"{times:,}")
    table.add_row("promises broken", f"{len(broken):,}", end_section=True)
    table.add_row("CPU seconds", f"{time.process_time() - began_s:,.0f}")
    console = Console(width=110)
    console.print(table)
    for one in broken[:10]:
        console.print(one)


if __name__ == "__main__":
    main()
