"""The minutes clock as a whole, on a fleet whose replicas load and drain at their times."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from world import integers

from waterline.policy import forecast
from waterline.policy import tide as tides
from waterline.policy.decisions import canonical_bytes
from waterline.policy.holdings import (
    DRAINING,
    GONE,
    LOADING,
    NOBODY,
    READY,
    START,
    Layouts,
    Moves,
    Tenants,
    new_services,
)
from waterline.policy.jit import compiled
from waterline.policy.tally import SLACK
from waterline.policy.tide import FIXED, REACT, Log, Tide, feed, replay, signal_line

STEP_S, LOAD_S, GRACE_S = 10.0, 100.0, 20.0


def new_tide(nodes: int = 4, *, models: tuple[int, ...] = (0, 0), jobs: float = 0.0) -> Tide:
    """Return nodes of 8 GPUs; a replica takes 4 and does 1.0; tenants deserve half each; the last may run jobs."""
    gpus, count = 8.0 * nodes, len(models)
    tenants = Tenants(
        np.zeros(count), np.full(count, gpus / count), np.full(count, gpus), np.ones(count), np.full(count, GRACE_S),
        np.zeros(count),
    )  # fmt: skip
    of_tenant = [*range(count), *([count - 1] if jobs else [])]
    kinds = [*models, *([max(models) + 1] if jobs else [])]
    size = (max(kinds) + 1, nodes)
    layouts = Layouts(np.full(size, 4), np.ones(size), np.full(size, LOAD_S))
    services = new_services(integers(*of_tenant), integers(*kinds), integers(*[1] * count, *([0] if jobs else [])))
    tide = tides.new_tide(tenants, services, layouts, np.full(nodes, 8), STEP_S)
    if jobs:
        tide.source[-1], tide.fixed[-1] = FIXED, jobs
    return tide


class World:
    """Does what a tide says, and writes down every signal."""

    def __init__(self, tide: Tide, *, source: int = REACT) -> None:
        self.tide, self.now_s, self.log = tide, 0.0, Log()
        self.signals: list[bytes] = []
        self.decide = tides.decide
        tide.source[tide.source != FIXED] = source

    def tell(self, signal: str, **more: object) -> Moves | None:
        said = {"at_s": self.now_s, "signal": signal, **more}
        self.signals.append(signal_line(said))
        moves, rows = feed(self.tide, json.loads(self.signals[-1]), self.decide)
        self.log.add(rows)
        return moves

    def step(self, *loads: float) -> Moves:
        """Let a step pass in which so much was asked of each service."""
        self.now_s += STEP_S
        replicas = self.tide.replicas
        for row in np.flatnonzero(replicas.state).tolist():
            age_s = self.now_s - replicas.since_s[row]
            if replicas.state[row] == LOADING and age_s >= LOAD_S:
                self.tell("loaded", replica=row)
            elif replicas.state[row] == DRAINING and age_s >= GRACE_S:
                self.tell("ended", replica=row)
        for service, load in enumerate(loads):
            self.tell("load", service=service, step=round(self.now_s / STEP_S) - 1, load=load)
        moves = self.tell("tick")
        assert moves is not None
        return moves

    def run(self, steps: int, *loads: float) -> "World":
        for _ in range(steps):
            self.step(*loads)
        return self

    def replicas(self, service: int) -> int:
        state = self.tide.replicas.state
        return int(((self.tide.replicas.service == service) & (state != GONE) & (state != DRAINING)).sum())


def test_tenants_of_a_model_share_the_replica_that_each_needs_part_of() -> None:
    world = World(new_tide()).run(20, 0.3, 0.4)
    assert [world.replicas(service) for service in (0, 1)] == [0, 1]  # who needs more of it asks
    world.run(20, 0.3, 0.8)
    assert sum(world.replicas(service) for service in (0, 1)) == 2


def test_of_different_models_each_has_its_own() -> None:
    world = World(new_tide(models=(0, 1))).run(20, 0.3, 0.4)
    assert [world.replicas(service) for service in (0, 1)] == [1, 1]


@pytest.mark.parametrize(("one", "other"), [(2.2, 1.7), (0.1, 2.95), (1.0, 1.0), (2.5, 0.6)])
def test_no_more_replicas_run_than_all_need_together(one: float, other: float) -> None:
    world = World(new_tide()).run(30, one, other)
    assert sum(world.replicas(service) for service in (0, 1)) == -(-(one + other) // 1)


def test_the_last_replica_of_a_model_stays_where_something_may_be_asked() -> None:
    world = World(new_tide(models=(0, 1)))
    world.tide.floor[0] = 1e-6
    world.run(20, 1.0, 1.0).run(60, 0.0, 0.0)
    assert [world.replicas(service) for service in (0, 1)] == [1, 0]


def test_a_job_takes_what_idles_and_yields_what_it_has_not_saved_last() -> None:
    world = World(new_tide(models=(0, 1), jobs=8.0)).run(20, 1.0, 0.0)
    assert [world.replicas(service) for service in (0, 1, 2)] == [1, 0, 7]
    state, services = world.tide.replicas.state, world.tide.replicas.service
    fresh = np.flatnonzero((services == 2) & (state == READY)).tolist()[3]
    world.tell("saved", replica=fresh)
    moves = world.step(1.2, 0.0)
    assert fresh in moves.victim.tolist()
    assert moves.cost_gpu_s[moves.victim == fresh].tolist() == [4 * STEP_S + 4 * GRACE_S]
    assert world.run(20, 1.2, 0.0).replicas(0) == 2


def test_a_job_that_can_save_within_its_grace_loses_no_work() -> None:
    tide = new_tide(models=(0, 1), jobs=8.0)
    tide.layouts.load_s[2] = GRACE_S
    world = World(tide).run(40, 1.0, 0.0)
    moves = world.step(1.2, 0.0)
    assert moves.cost_gpu_s[moves.victim >= 0].tolist() == [4 * GRACE_S]


def test_requests_of_a_tenant_come_before_its_own_jobs() -> None:
    world = World(new_tide(1, models=(0,), jobs=2.0)).run(20, 0.0)
    assert world.replicas(1) == 2
    assert world.run(20, 0.5).replicas(0) == 1
    world.tell("finished", service=1)
    assert world.tide.fixed[1] == 1.0


def test_a_node_that_is_down_gets_nothing_and_a_claim_on_it_is_given_up() -> None:
    world = World(new_tide(1, models=(0, 1), jobs=2.0)).run(20, 0.0, 0.0)
    assert world.replicas(2) == 2
    world.step(1.0, 0.0)
    assert (world.tide.claims.service == 0).sum() == 1
    for row in np.flatnonzero(world.tide.replicas.state).tolist():
        world.tell("failed", replica=row)
    world.tell("down", node=0, gpus=8)
    assert (world.tide.free_gpus[0], (world.tide.claims.service >= 0).sum()) == (0, 0)
    assert world.run(10, 1.0, 0.0).replicas(0) == 0
    world.tell("up", node=0, gpus=8)
    assert world.run(2, 1.0, 0.0).replicas(0) == 1


def test_what_did_not_fit_is_not_tried_there_again() -> None:
    world = World(new_tide(2))
    moves = world.step(1.0, 0.0)
    assert moves.kind.tolist() == [START]
    world.tell("unfit", replica=int(moves.started[0]))
    assert world.step(1.0, 0.0).node.tolist() == [1 - int(moves.node[0])]


def random_life(seed: int) -> World:
    dice = np.random.default_rng(seed)
    world = World(new_tide(3, models=(0, 0, 1), jobs=4.0), source=tides.FORECAST)
    level = np.array([1.0, 1.0, 0.5])
    for _ in range(120):
        level = np.clip(level + dice.normal(0, 0.2, 3), 0.0, 4.0)
        running = np.flatnonzero(world.tide.replicas.state == READY).tolist()
        if running and dice.random() < 0.05:
            world.tell("failed", replica=running[0])
        world.step(*(dice.poisson(10 * level) / 10).tolist())
    return world


@pytest.mark.parametrize("seed", range(3))
def test_a_record_of_signals_makes_the_same_log_byte_for_byte(seed: int) -> None:
    world = random_life(seed)
    assert len(world.log.rows) > 20
    again = list(replay(World(new_tide(3, models=(0, 0, 1), jobs=4.0), source=tides.FORECAST).tide, world.signals))
    assert canonical_bytes(again) == canonical_bytes(world.log.rows)
    log = Log()
    log.add(again)
    assert log.digest == world.log.digest != Log().digest


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed: there is nothing to compare with")
def test_the_log_is_the_same_with_and_without_numba() -> None:
    world = random_life(7)
    log, tide = Log(), World(new_tide(3, models=(0, 0, 1), jobs=4.0), source=tides.FORECAST).tide
    for line in world.signals:
        log.add(feed(tide, json.loads(line), compiled(tides.decide))[1])
    assert log.digest == world.log.digest


def test_a_step_is_a_tenth_of_the_shortest_load() -> None:
    assert [tides.step_length_s([load_s, 1e5]) for load_s in (20.0, 240.0, 9000.0)] == [10.0, 24.0, 60.0]
    assert tides.step_length_s([]) == 60.0


def test_a_signal_that_is_none_is_refused() -> None:
    with pytest.raises(KeyError, match="lost"):
        feed(new_tide(), {"at_s": 0.0, "signal": "lost", "replica": 0})


# --- What is needed ---------------------------------------------------------------------------------------------------


def run_replicas(tide: Tide, *counts: int, rate: float = 1.0) -> Tide:
    """Write so many replicas of each service in, ready for long."""
    row = 0
    for service, count in enumerate(counts):
        rows = slice(row, row := row + count)
        tide.replicas.service[rows], tide.replicas.gpus[rows], tide.replicas.rate[rows] = service, 4, rate
        tide.replicas.state[rows] = READY
    return tide


def pooled(tide: Tide, wanted: list[float], kept: list[float]) -> tuple[list[float], list[float]]:
    tide.services.wanted[:], tide.services.kept[:] = wanted, kept
    tides.pool_fractions(tide)
    return tide.services.wanted.round(9).tolist(), tide.services.kept.round(9).tolist()


def test_what_is_needed_beyond_whole_replicas_is_asked_for_together_up_to_a_replica_the_most_first() -> None:
    tide = new_tide(models=(0, 0, 0, 1))
    wanted, kept = pooled(tide, [1.5, 0.3, 0.4, 0.1], [1.6, 0.3, 0.7, 0.1])
    assert wanted == [1.9, 0.3, 0.0, 0.1], "0.5 and 0.4 fit into one; 0.3 does not; 0.1 is of another model"
    assert kept == [2.0, 0.3, 0.3, 0.1]
    assert pooled(tide, [0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0])[0] == [1.0, 0.0, 0.0, 0.0], "a replica to the brim"
    tide = new_tide(models=(0, 0, 0, 0))
    assert pooled(tide, [0.5, 0.3, 0.4, 0.2], [0.5, 0.3, 0.4, 0.2])[0] == [0.9, 0.5, 0.0, 0.0]


def test_what_is_needed_beyond_whole_replicas_goes_first_to_who_has_most_to_spare_the_least_of_it_first() -> None:
    tide = run_replicas(new_tide(8, models=(0, 0, 0, 0, 1)), 2, 2, 0, 0, 3)
    wanted, kept = pooled(tide, [0.8, 1.5, 0.6, 0.4, 0.0], [0.9, 1.5, 0.6, 0.4, 0.0])
    assert wanted == [1.8, 1.5, 0.0, 0.0, 0.0], "1.1, then 0.7 to spare, beside 0.5; three of another model"
    assert kept == [1.9, 1.5, 0.0, 0.0, 0.0]
    assert pooled(tide, [1.5, 1.8, 0.5, 0.0, 0.0], [1.5, 1.8, 0.5, 0.0, 0.0])[0] == [2.0, 1.8, 0.0, 0.0, 0.0]
    assert pooled(tide, [1.5, 1.8, 0.6, 0.3, 0.0], [1.5, 1.8, 0.6, 0.3, 0.0])[0] == [1.8, 1.8, 0.6, 0.0, 0.0]


def test_what_several_need_is_asked_for_by_one_that_is_below_its_limit() -> None:
    tide = run_replicas(new_tide(), 1)
    for limit_gpus, wanted in ((5.0, [1.8, 0.0]), (4.0, [1.0, 0.8])):
        tide.tenants.limit_gpus[0] = limit_gpus
        assert pooled(tide, [1.5, 0.3], [1.5, 0.3])[0] == wanted
    tide.tenants.limit_gpus[1] = 0.0
    assert pooled(tide, [1.5, 0.3], [1.5, 0.3])[0] == [1.5, 0.3], "nobody may have another"
    tide = run_replicas(new_tide(models=(0, 0, 1)), 1, 2)
    tide.replicas.gpus[3:] = 4  # of rows of the first service that are empty by now
    tide.tenants.limit_gpus[:] = [5.0, 8.0, 8.0]
    assert pooled(tide, [1.5, 2.3, 0.4], [1.5, 2.3, 0.4])[0] == [1.8, 2.0, 0.4]
    tide.tenants.limit_gpus[0] = 4.0
    assert pooled(tide, [1.5, 2.3, 0.4], [1.5, 2.3, 0.4])[0] == [1.5, 2.3, 0.4], "nor who asks for another model"


def test_a_run_that_is_done_is_needed_no_more_and_there_are_never_less_than_none() -> None:
    tide = new_tide(jobs=1.5)
    for left in (0.5, 0.0, 0.0):
        tides.has_finished(tide, 2)
        assert tide.fixed[2] == left


def test_jobs_and_models_that_run_nowhere_share_nothing() -> None:
    tide = new_tide()
    tide.source[1] = FIXED
    assert pooled(tide, [0.5, 0.3], [0.5, 0.3])[0] == [0.5, 0.3]
    tide.source[1] = REACT
    tide.layouts.gpus[:] = 0
    assert pooled(tide, [0.5, 0.3], [0.5, 0.3])[0] == [0.5, 0.3]


def test_parts_are_parts_of_the_smallest_replica_that_a_model_may_have() -> None:
    tide = new_tide(2)
    tide.layouts.rate[0] = [2.0, 0.5]
    assert pooled(tide, [0.8, 0.1], [0.8, 0.1])[0] == [0.9, 0.0], "0.3 beyond one of 0.5, and 0.1"
    tide.layouts.gpus[0, 1] = 0
    assert pooled(tide, [0.7, 1.4], [0.7, 1.4])[0] == [0.7, 1.4], "0.7 and 1.4 are more than one of 2.0"


def test_replicas_that_drain_are_no_supply_and_those_that_load_or_are_claimed_are() -> None:
    tide = run_replicas(new_tide(), 2, 2, rate=0.7)
    tide.replicas.state[:4] = [READY, LOADING, DRAINING, READY]
    tide.claims.service[1], tide.claims.node[1], tide.layouts.rate[0, 3] = 1, 3, 1.5
    assert tides.supply_of(tide).tolist() == pytest.approx([1.4, 0.7 + 1.5])


def test_what_is_needed_is_asked_for_without_what_replicas_of_the_plan_carry_and_never_below_the_floor() -> None:
    world = World(new_tide(models=(0, 1, 2)))
    world.tide.carried[0, 23], world.tide.floor[1], world.tide.source[2], world.tide.fixed[2] = 0.5, 0.2, FIXED, 3.0
    world.tide.carried[1, :] = 1.0
    for hour, wanted in ((22, 2.0), (23, 1.5), (24, 2.0), (47, 1.5)):
        world.now_s = hour * 3600.0
        world.step(2.0, 0.9)
        assert world.tide.services.wanted.tolist() == world.tide.services.kept.tolist() == [wanted, 0.2, 3.0], hour


def test_who_is_forecast_starts_when_it_needs_a_fiftieth_more_and_keeps_all_that_it_needs() -> None:
    world = World(new_tide(models=(0,)), source=tides.FORECAST)
    for step in range(50):
        world.step(1.0 + 0.1 * step)
        wanted, kept = forecast.needs(world.tide.series, 0, step)
        assert world.tide.services.wanted.tolist() == [wanted * (1.0 - SLACK)]
        assert world.tide.services.kept.tolist() == [kept]


def test_a_service_looks_as_far_ahead_as_it_takes_in_the_worst_case_to_get_a_replica() -> None:
    tide = new_tide(2, models=(0, 1))
    layouts, tenants = tide.layouts, tide.tenants
    layouts.load_s[:], tenants.grace_s[:] = [[95.0, 300.0], [40.0, 60.0]], [GRACE_S, 2.0]
    layouts.gpus[0, 1] = 0  # where it would take 300 s
    series = tides.new_tide(tenants, tide.services, layouts, np.full(2, 8), STEP_S).series
    assert series.horizon.tolist() == [12 + 1, 8 + 1], "(95 + 20) / 10 begun, (60 + 20) / 10, and one to notice it"


def test_there_are_rows_for_as_many_replicas_as_find_room_and_for_all_that_run() -> None:
    tide = new_tide(1, models=(0, 1))
    tide.layouts.gpus[:] = [[4], [0]]  # the second model does not run there

    def rows(*running_gpus: int) -> int:
        made = tides.new_tide(
            tide.tenants, tide.services, tide.layouts, np.full(1, 8), STEP_S, running_gpus=running_gpus
        )
        assert len(made.claims.service) == len(made.saved_s) == len(made.replicas.state)
        return len(made.replicas.state)

    assert [rows(), rows(2), rows(1, 4), rows(*[8] * 3)] == [2, 4, 8, 3]
    tide.layouts.gpus[:] = 0
    assert rows() == 1


# --- What happens to replicas and nodes -------------------------------------------------------------------------------


def test_what_a_job_might_have_lost_is_forgotten_when_its_run_ends() -> None:
    tide = run_replicas(new_tide(models=(0, 1), jobs=1.0), 0, 0, 1)
    tides.has_loaded(tide, 0, 0.0)
    tides.decide(tide, 50.0)
    assert tide.replicas.lost_gpu_s[0] == 4 * 50.0
    tides.has_saved(tide, 0, 50.0)
    tides.decide(tide, 50.5)
    assert tide.replicas.lost_gpu_s[0] == 4 * 0.5
    tides.has_ended(tide, 0)
    run_replicas(tide, 1)  # in the same row
    tides.has_loaded(tide, 0, 60.0)
    tides.decide(tide, 100.0)
    assert tide.replicas.lost_gpu_s[0] == 0.0


def claim_on(tide: Tide, claim: int, service: int, node: int) -> None:
    tide.claims.service[claim], tide.claims.node[claim], tide.claims.held_gpus[claim] = service, node, 2
    tide.free_gpus[node] -= 2


def test_where_a_replica_does_not_fit_the_claims_of_its_model_are_given_up_and_no_others() -> None:
    tide = run_replicas(new_tide(2, models=(0, 0, 1)), 1)
    for claim, (service, node) in enumerate([(1, 0), (2, 0), (1, 1)]):
        claim_on(tide, claim, service, node)
    tide.free_gpus[0] -= 4
    tides.does_not_fit(tide, 0)
    assert tide.claims.service[:3].tolist() == [NOBODY, 2, 1]
    assert tide.free_gpus.tolist() == [8 - 2, 8 - 2]
    assert tide.layouts.gpus.tolist() == [[0, 4], [4, 4]]
    assert tide.replicas.state[0] == GONE


def test_when_gpus_fail_as_many_claims_on_their_node_are_given_up_as_must_be() -> None:
    tide = new_tide(2)
    for claim, node in enumerate([1, 0, 0, 0]):
        claim_on(tide, claim, 0, node)
    tides.node_down(tide, 0, 2)
    assert (tide.free_gpus.tolist(), tide.down_gpus.tolist()) == ([0, 6], [2, 0]), "two idle ones are enough"
    tides.node_down(tide, 0, 3)
    assert tide.claims.service[:4].tolist() == [0, NOBODY, NOBODY, 0]
    assert (tide.free_gpus.tolist(), tide.down_gpus.tolist()) == ([1, 6], [5, 0])
    tides.node_up(tide, 0, 5)
    assert (tide.free_gpus.tolist(), tide.down_gpus.tolist()) == ([6, 6], [0, 0])
