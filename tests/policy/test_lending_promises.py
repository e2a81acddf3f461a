"""Random fleets, each promise checked after every step of each."""

from importlib.util import find_spec

import numpy as np
import pytest
from world import INF, PROMISES, live

from waterline.policy.holdings import (
    Claims,
    Layouts,
    Replicas,
    Services,
    Tenants,
    new_claims,
    new_replicas,
    new_services,
)
from waterline.policy.jit import compiled

COMPILED = find_spec("numba") is not None
FLEETS = 1000 if COMPILED else 60  # many more: benchmarks/more_fleets.py
STEPS = 48
STEP_S = 30.0
Arrays = tuple[Tenants, Services, Layouts, np.ndarray, Claims, Replicas]


def random_tenants(dice: np.random.Generator, count: int, gpus: int, unit: int) -> Tenants:
    """Shares are multiples of `unit`; who deserves less than a replica takes cannot have one."""
    units = gpus // unit
    deserved = np.floor(dice.dirichlet(np.ones(count)) * units * dice.choice([0.6, 1.0])) * unit
    guarantee = np.floor(deserved / unit * dice.choice([0.0, 0.5, 1.0], count)) * unit
    limit = np.minimum(deserved + np.floor(dice.random(count) * units) * unit, gpus)
    terms = dice.choice([0.0, 20.0, 60.0], count), dice.choice([0.0, 60.0, 200.0], count)
    return Tenants(guarantee, deserved, limit, deserved + dice.integers(0, 2, count), *terms)


def random_fleet(dice: np.random.Generator, *, uniform: bool) -> tuple[Arrays, np.ndarray]:
    """Return the arrays of a fleet, and what its services want at each step.

    `uniform`: each model takes the same number of GPUs, and each tenant asks for one model, so that nothing but the
    rules and its neighbours can keep GPUs from a tenant.
    """
    nodes, models, tenants = int(dice.integers(1, 5)), int(dice.integers(1, 4)), int(dice.integers(2, 5))
    node_gpus = dice.choice([4, 8], nodes).astype(np.int64)
    model_gpus = np.minimum(dice.choice([1, 2, 4, 8], (models, nodes)), node_gpus)
    model_gpus *= dice.random((models, nodes)) < 0.8
    rate = model_gpus * dice.choice([0.5, 1.0, 2.0], (models, 1))
    if uniform:
        model_gpus[:] = dice.choice([1, 2, 4])
        rate = model_gpus.astype(float)
    load_s = dice.choice([20.0, 60.0, 150.0], (models, nodes))
    services = tenants if uniform else int(dice.integers(tenants, tenants + 3))
    of_tenant = np.concatenate([np.arange(tenants), dice.integers(0, tenants, services - tenants)])
    wanted = np.repeat(dice.random((STEPS // 8, services)) * node_gpus.sum(), 8, axis=0)
    wanted *= dice.random(services) < 0.8
    wanted[:, dice.random(services) < 0.25] = INF
    arrays = (
        random_tenants(dice, tenants, int(node_gpus.sum()), int(model_gpus[0, 0]) if uniform else 1),
        new_services(of_tenant, dice.integers(0, models, services), dice.integers(0, 3, services)),
        Layouts(model_gpus.astype(np.int64), rate, load_s),
        node_gpus,
        new_claims(int(node_gpus.sum())),
        new_replicas(2 * int(node_gpus.sum())),
    )
    return arrays, wanted


@pytest.mark.parametrize("fails", [0.0, 0.01], ids=["healthy", "failing"])
def test_every_promise_holds_at_every_step_of_random_fleets(fails: float) -> None:
    run = compiled(live)
    all_moves = 0
    for seed in range(FLEETS * 2 // 5):
        dice = np.random.default_rng([seed, int(fails > 0)])
        arrays, wanted = random_fleet(dice, uniform=False)
        luck = dice.random((STEPS, len(arrays[5].state)))
        broken, step, moves = run(*arrays, wanted, luck, STEP_S, fails, INF)
        assert not broken, f"seed {seed}, step {step}: not so: {PROMISES[broken]}"
        all_moves += moves
    assert all_moves > 2 * FLEETS, "they do move"


def test_a_tenant_that_wants_what_it_deserves_gets_it_within_minimum_runtime_grace_and_load() -> None:
    run = compiled(live)
    for seed in range(FLEETS // 5):
        dice = np.random.default_rng([seed, 2])
        arrays, wanted = random_fleet(dice, uniform=True)
        tenants, _, layouts = arrays[:3]
        bound_s = layouts.load_s.max() + tenants.min_runtime_s.max() + tenants.grace_s.max() + 2 * STEP_S
        luck = dice.random((STEPS, len(arrays[5].state)))
        broken, step, _ = run(*arrays, wanted, luck, STEP_S, 0.0, bound_s)
        assert not broken, f"seed {seed}, step {step}: not so: {PROMISES[broken]}"


@pytest.mark.skipif(not COMPILED, reason="numba is not installed: there is nothing to compare with")
def test_moves_are_the_same_with_and_without_numba() -> None:
    for seed in range(25):
        after: list[Replicas] = []
        for run in (live.plain, compiled(live)):  # type: ignore[attr-defined]  # a Decision
            dice = np.random.default_rng([seed, 3])
            arrays, wanted = random_fleet(dice, uniform=False)
            luck = dice.random((STEPS, len(arrays[5].state)))
            run(*arrays, wanted, luck, STEP_S, 0.02, INF)
            after.append(arrays[5])
        for one, other in zip(*after, strict=True):
            assert one.tobytes() == other.tobytes()
