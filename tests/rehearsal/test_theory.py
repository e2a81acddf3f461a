"""The event loop against queueing theory: what waits at the desk is one queue before all replicas of a model."""

import math

import numpy as np
import pytest

from waterline.cost.step import StepCost
from waterline.rehearsal.capacity import Capacity, Terms
from waterline.rehearsal.jit import COMPILED
from waterline.rehearsal.station import Station

MS = 10**9  # in picoseconds
STEP = StepCost(tokens_ps=(0, MS), more_ps_per_token=0, head_ps=(0,), attention=(), step_tokens=1)  # a token takes 1 ms
REQUESTS = 200_000 if COMPILED else 5_000
MEAN_MS = 100


def waits_ms(servers: int, load: float, outputs: np.ndarray) -> np.ndarray:
    """Return how long requests of so many tokens wait, that come at random to replicas with one slot each."""
    station = Station(Terms(ttft_s=(1e9,), output_tokens=(MEAN_MS,)))
    one = Capacity(
        replica="",
        gpus=1,
        step=STEP,
        max_batch=1,
        cache_tokens=10**6,
        max_context_tokens=10**6,
        prefill_tokens_per_s=1000.0,
        tokens_per_s=1000.0,
    )
    station.start_all([one] * servers, 0)
    dice = np.random.Generator(np.random.PCG64(3))
    gaps_ns = dice.exponential(1e6 * outputs.mean() / (servers * load), len(outputs)).astype(np.int64)
    arrivals_ps = np.cumsum(gaps_ns) * 1000
    station.offer(arrivals_ps, np.ones(len(outputs), np.int64), outputs)
    station.finish()
    return (station.collect().started_ps - arrivals_ps) / MS


def erlang_c(servers: int, load: float) -> float:
    """Return the probability that an arrival of an M/M/c queue waits (Erlang 1917)."""
    offered = servers * load
    terms = [offered**k / math.factorial(k) for k in range(servers + 1)]
    last = terms[-1] / (1 - load)
    return last / (sum(terms[:-1]) + last)


def lengths(mean: int = MEAN_MS) -> np.ndarray:
    """Return geometric lengths, the whole numbers' exponential."""
    return np.random.Generator(np.random.PCG64(4)).geometric(1 / mean, REQUESTS)


def test_one_slot_is_an_m_m_1_queue() -> None:
    """The mean wait is ρ / (1 - ρ) services, and e^(-(1 - ρ) t / service) of those who wait do so longer than t."""
    load, waits = 0.7, waits_ms(1, 0.7, lengths())
    assert waits.mean() == pytest.approx(load / (1 - load) * MEAN_MS, rel=0.05 if COMPILED else 0.5)
    assert (waits > 0).mean() == pytest.approx(load, rel=0.02 if COMPILED else 0.1)
    if COMPILED:
        later = (waits > 500).mean() / (waits > 0).mean()
        assert later == pytest.approx(math.exp(-(1 - load) * 500 / MEAN_MS), rel=0.1)


@pytest.mark.parametrize("spread", ["geometric", "all alike"])
def test_slots_of_many_replicas_are_an_m_g_c_queue(spread: str) -> None:
    """M/M/c by Erlang's formula; other lengths wait (1 + C²) / 2 times as long, about (Lee and Longton 1959)."""
    servers, load = 8, 0.85
    outputs = lengths() if spread == "geometric" else np.full(REQUESTS, MEAN_MS)
    squared = (outputs.std() / outputs.mean()) ** 2
    expected_ms = (1 + squared) / 2 * erlang_c(servers, load) / (servers * (1 - load)) * outputs.mean()
    assert waits_ms(servers, load, outputs).mean() == pytest.approx(expected_ms, rel=0.08 if COMPILED else 0.5)
