"""A forecast against reacting, on a ramp with real queues and real loading: what the benchmark says of one short day."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ramp.py"


def test_on_a_ramp_a_forecast_halves_what_is_late_and_borrows_hardly_more_than_who_knows_the_future(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = importlib.util.spec_from_file_location("ramp", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    ramp = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ramp)
    monkeypatch.setattr(ramp, "QUIET_S", 100.0)
    quiet_per_s = 0.8 * ramp.DESERVED * ramp.plan_of(1.0).shapes[0].requests_per_s
    found = {policy: ramp.live(policy, quiet_per_s, 60.0, 0) for policy in ramp.POLICIES}
    requests, late_reacting, _ = found["reactive"]
    _, late, borrowed_gpu_h = found["forecast"]
    _, _, least_gpu_h = found["clairvoyant"]
    assert requests > 300_000
    assert late < late_reacting / 2
    assert borrowed_gpu_h < 1.2 * least_gpu_h
