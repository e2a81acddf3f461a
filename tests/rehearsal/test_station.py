"""The event loop against the oracle: the same integers for every request, with numba and without.

A step of n tokens takes about a thousand picoseconds, and whole nanoseconds lie between arrivals: so a fleet of a few
small replicas meets every kind of event, several of them at one instant.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from waterline.cost.step import AttentionCost, StepCost
from waterline.errors import InputError
from waterline.plan import EVERY_HOUR
from waterline.policy.routing import least_loaded
from waterline.rehearsal import kernel, state, station
from waterline.rehearsal.oracle import Capacity, Passage, serve
from waterline.rehearsal.station import Station
from waterline.workload import Request

EXPECTED = {"expected_prompt_tokens": 3, "expected_output_tokens": 10, "first_hour": 22}
MODULES = [f"waterline.rehearsal.{name}" for name in ("jit", "kernel", "station")]


def without_numba() -> ModuleType:
    """Return the station as somebody without numba imports it."""
    others = {name: module for name, module in sys.modules.items() if name not in MODULES}
    with patch.dict(sys.modules, {**others, "numba": None}, clear=True):
        return import_module("waterline.rehearsal.station")


PLAIN = without_numba()
STATIONS = {"numba": station, "plain": PLAIN}

# --- Fleets and traffic ---------------------------------------------------------------------------------------------

picoseconds = st.integers(0, 40)


def tables(most: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, most), min_size=1, max_size=7).map(
        lambda more: tuple(np.cumsum([0, *more]).tolist())
    )


attentions = st.builds(
    lambda window, decodes, prefill: AttentionCost(
        window_tokens=window,
        decode_ps=(0, *(base for base, _ in decodes)),
        decode_ps_per_token=(0, *(slope for _, slope in decodes)),
        prefill_ps=prefill[0],
        prefill_ps_per_token=prefill[1],
        prefill_ps_per_pair=prefill[2],
    ),
    st.sampled_from([0, 0, 3, 9, 20]),
    st.lists(st.tuples(picoseconds, st.integers(0, 9)), min_size=1, max_size=7),
    st.tuples(picoseconds, picoseconds, st.integers(0, 3)),
)
step_costs = st.builds(
    StepCost,
    tokens_ps=tables(300).map(lambda table: (0, *(entry + 900 for entry in table))),
    more_ps_per_token=picoseconds,
    head_ps=tables(50),
    attention=st.lists(attentions, max_size=3).map(tuple),
    step_tokens=st.integers(1, 14),
    ranks=st.sampled_from([1, 1, 2, 3]),
)
capacities = st.builds(
    Capacity,
    replica=st.just(""),
    gpus=st.just(1),
    step=step_costs,
    max_batch=st.integers(1, 7),
    cache_tokens=st.integers(12, 70),
    max_context_tokens=st.sampled_from([20, 40, 60]),
    prefill_tokens_per_s=st.sampled_from([1e6, 3e6]),
    tokens_per_s=st.sampled_from([1e6, 2e6, 5e6, 5e6, 0.0]),
    role=st.sampled_from(["both", "both", "prefill", "decode"]),
    reads_cached=st.sampled_from([False, False, True]),
    transfer_ps_per_token=st.sampled_from([0, 1, 100, 1000]),
    hours=st.sampled_from([EVERY_HOUR, EVERY_HOUR, (22,), (23,), (0, 23), (0, 1, 22)]),
)
fleets = st.lists(capacities, min_size=1, max_size=7).map(
    lambda made: [replace(one, replica=f"a/{index}") for index, one in enumerate(made)]
)
HOUR_NS = 3600 * 10**9
requests = st.builds(
    lambda ns, prompt, output, cached: Request(
        arrival_s=ns / 1e9, prompt_tokens=prompt, output_tokens=output, cached_tokens=min(cached, prompt - 1)
    ),
    st.one_of(
        st.integers(0, 20),
        st.integers(0, 400),
        st.integers(HOUR_NS - 100, HOUR_NS + 100),  # from 22:00, this is 23:00
        st.integers(2 * HOUR_NS - 5, 2 * HOUR_NS + 5),
    ),
    st.integers(1, 24),
    st.integers(1, 40),
    st.one_of(st.just(0), st.integers(0, 23)),
)
traffics = st.lists(requests, min_size=1, max_size=50).map(lambda made: sorted(made, key=lambda one: one.arrival_s))
deadlines = st.sampled_from([math.inf, 1e-4, 2e-5, 0.0])


def by_events(
    module: ModuleType, fleet: Sequence[Capacity], asked: Sequence[Request], deadline_s: float, pieces: int = 1
) -> Iterator[tuple[int | float, ...]]:
    served = module.Station(fleet, deadline_s=deadline_s, **EXPECTED)
    columns = np.array(
        [(round(one.arrival_s * 1e9) * 1000, one.prompt_tokens, one.output_tokens, one.cached_tokens) for one in asked]
    )
    for piece in np.array_split(columns, pieces):
        served.offer(*piece.T)
        yield from rows(served.collect())
    served.drain()
    yield from rows(served.collect())


def rows(passages: station.Passages) -> Iterator[tuple[int | float, ...]]:
    return zip(
        passages.first_token_ps.tolist(),
        passages.finish_ps.tolist(),
        passages.busy_ps.tolist(),
        passages.replica.tolist(),
        passages.preemptions.tolist(),
        passages.retry_s.tolist(),
        passages.read_by.tolist(),
        passages.read_busy_ps.tolist(),
        strict=True,
    )


def by_steps(fleet: Sequence[Capacity], asked: Sequence[Request], deadline_s: float) -> list[tuple[int | float, ...]]:
    index = {one.replica: number for number, one in enumerate(fleet)}
    return [
        (
            passage.first_token_ps,
            passage.finish_ps,
            passage.busy_ps,
            index.get(passage.replica, refusal(passage)),
            passage.preemptions,
            passage.retry_s,
            index.get(passage.read_by, state.NONE),
            passage.read_busy_ps,
        )
        for passage in serve(fleet, asked, deadline_s=deadline_s, **EXPECTED)
    ]


def refusal(passage: Passage) -> int:
    if passage.retry_s:
        return state.TOO_LATE
    return state.TOO_LONG if "of which no replica" in passage.reason else state.NOT_SERVED


# --- Exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATIONS)
@settings(max_examples=150)
@given(fleet=fleets, asked=traffics, deadline_s=deadlines, pieces=st.integers(1, 4))
def test_skipping_equals_step_by_step_to_the_picosecond(
    name: str, fleet: list[Capacity], asked: list[Request], deadline_s: float, pieces: int
) -> None:
    assert list(by_events(STATIONS[name], fleet, asked, deadline_s, pieces)) == by_steps(fleet, asked, deadline_s)


@pytest.mark.parametrize("name", STATIONS)
def test_real_steps_are_skipped_exactly_too(name: str) -> None:
    """Coefficients of a real size: a step of 8 ms, 60 ns a cached token, half the layers with a window of 1,024."""
    whole = AttentionCost(
        window_tokens=0,
        decode_ps=(0, *(10**8 + 7 * batch for batch in range(1, 300))),
        decode_ps_per_token=(0, *(61_000 - batch for batch in range(1, 300))),
        prefill_ps=10**8 + 3,
        prefill_ps_per_token=20_011,
        prefill_ps_per_pair=59,
    )
    step = StepCost(
        tokens_ps=tuple(0 if tokens == 0 else 8 * 10**9 + 12_345_677 * tokens for tokens in range(1025)),
        more_ps_per_token=12_345_677,
        head_ps=tuple(10**8 + 1_003 * batch for batch in range(300)),
        attention=(whole, replace(whole, window_tokens=1024)),
        step_tokens=512,
    )
    generator = np.random.Generator(np.random.PCG64(3))
    fleet = [
        Capacity(
            replica=f"a/{index}",
            gpus=1,
            step=step,
            max_batch=64,
            cache_tokens=24_000 - 5_000 * (index == 2),
            max_context_tokens=9_000,
            prefill_tokens_per_s=2e4,
            tokens_per_s=3e3 + 1e3 * index,
        )
        for index in range(4)
    ]
    arrivals_s = np.round(np.cumsum(generator.exponential(0.03, 1500)), 9).tolist()
    lengths = np.clip(generator.lognormal((6.5, 5.3), 1.0, (1500, 2)), 1, 5000).astype(int).tolist()
    asked = [
        Request(
            arrival_s=at_s, prompt_tokens=prompt, output_tokens=output, cached_tokens=number % 3 * (prompt - 1) // 4
        )
        for number, (at_s, (prompt, output)) in enumerate(zip(arrivals_s, lengths, strict=True))
    ]
    stepped = by_steps(fleet, asked, 4.0)
    assert list(by_events(STATIONS[name], fleet, asked, 4.0, pieces=7)) == stepped
    preemptions, refused = sum(row[4] for row in stepped), sum(row[3] < 0 for row in stepped)
    assert preemptions > 50, "the cache is full at times"
    assert refused > 50, "not everybody can be served in time"
    assert {row[3] for row in stepped} >= {0, 1, 2, 3}


@given(st.integers(1, 10**15), st.integers(1, 10**11), st.one_of(st.just(0), st.integers(1, 10**9)))
@example(10**15, 1, 0)
def test_the_first_boundary_not_before_a_time_is_found_whatever_a_float_guesses(
    elapsed: int, first: int, growth: int
) -> None:
    first = max(first, elapsed // 10**6)
    steps = PLAIN.run.__globals__["steps_until"](elapsed, first, growth)
    assert kernel.steps_until(elapsed, first, growth) == steps

    def took(number: int) -> int:
        return sum([first * number, growth * number * (number - 1) // 2])

    assert took(steps) >= elapsed
    assert steps == 1 or took(steps - 1) < elapsed


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([8, 9])), min_size=1)
)
def test_the_tree_of_waits_finds_whom_the_policy_finds(replicas: list[tuple[int, float, int]]) -> None:
    fleet = [
        Capacity(
            replica=f"a/{index}",
            gpus=1,
            step=StepCost(tokens_ps=(0, 1), more_ps_per_token=1, head_ps=(0,), attention=(), step_tokens=1),
            max_batch=1,
            cache_tokens=longest,
            max_context_tokens=longest,
            prefill_tokens_per_s=1.0,
            tokens_per_s=rate,
        )
        for index, (_, rate, longest) in enumerate(replicas)
    ]
    memory = state.make_memory(fleet, [one.longest_tokens for one in fleet], 0, 0, 1)
    memory = memory._replace(results=np.zeros(state.RESULT, np.int64), retries_s=np.zeros(1))
    state.make_ready(memory, fleet, 0)
    for index, (backlog, rate, _) in enumerate(replicas):
        memory.replicas[index * state.REPLICA + state.BACKLOG] = backlog
        if rate:
            kernel.reckon(memory, index)
    for tokens in (8, 9):
        fitting = [index for index, one in enumerate(replicas) if one[2] >= tokens]
        chosen = least_loaded([replicas[index][0] for index in fitting], [replicas[index][1] for index in fitting])
        if not fitting:
            assert kernel.choose(memory, tokens, 0, math.inf, 0) == state.TOO_LONG
        elif chosen < 0:
            assert kernel.choose(memory, tokens, 0, 0.0, 0) == state.NOT_SERVED
        else:
            assert kernel.choose(memory, tokens, 0, math.inf, 0) == fitting[chosen]


# --- Traffic in pieces ----------------------------------------------------------------------------------------------


def one_slot(**changes: object) -> Capacity:
    usual = Capacity(
        replica="a/0",
        gpus=1,
        step=StepCost(tokens_ps=(0, 1000), more_ps_per_token=0, head_ps=(0,), attention=(), step_tokens=8),
        max_batch=1,
        cache_tokens=10**9,
        max_context_tokens=10**9,
        prefill_tokens_per_s=1e9,
        tokens_per_s=1e9,
    )
    return replace(usual, **changes)  # type: ignore[arg-type] # mypy does not know the names


def columns(*asked: tuple[int, int, int]) -> list[np.ndarray]:
    return [np.array(column, np.int64) for column in zip(*asked, strict=True)]


def test_what_is_settled_is_handed_out_in_the_order_of_arrival() -> None:
    served = Station([one_slot(max_batch=2)], deadline_s=math.inf, **EXPECTED)
    served.offer(*columns((0, 1, 50), (0, 1, 2), (10_000, 1, 1)))  # the first takes 50 steps, of 1000 ps each
    assert len(served.collect()) == 0
    served.offer(*columns((100_000, 1, 1)))
    assert served.collect().finish_ps.tolist() == [50_000, 2000, 11_000]
    served.drain()
    assert served.collect().finish_ps.tolist() == [101_000]


def test_whom_a_replica_has_accepted_it_serves_beyond_its_hours() -> None:
    """From 22:00: the first replica serves until 23:00, the second from then on."""
    step = replace(one_slot().step, tokens_ps=(0, 600 * 10**12))  # ten minutes a step
    pair = [one_slot(step=step, hours=(22,)), one_slot(replica="a/1", step=step, hours=(23,))]
    served = Station(pair, deadline_s=math.inf, **EXPECTED)
    minute_ps = 60 * 10**12
    served.offer(*columns((0, 1, 9), (59 * minute_ps, 1, 1), (60 * minute_ps, 1, 1), (120 * minute_ps, 1, 1)))
    served.drain()
    passages = served.collect()
    assert passages.replica.tolist() == [0, 0, 1, state.TOO_LATE]  # after midnight nobody serves
    assert (passages.finish_ps // minute_ps).tolist() == [90, 100, 70, 120]


def test_a_long_queue_finds_room() -> None:
    served = Station([one_slot()], deadline_s=math.inf, **EXPECTED)
    count = 5 * station.FIRST_SLOTS
    zeros = np.zeros(count, np.int64)
    served.offer(zeros, zeros + 1, zeros + 1)
    served.drain()
    assert served.collect().finish_ps.tolist() == list(range(1000, 1000 * count + 1, 1000))


def test_longer_than_64_bits_of_picoseconds_is_said() -> None:
    day_ps = 86_400 * 10**12
    served = Station([one_slot()], deadline_s=math.inf, **EXPECTED)
    with pytest.raises(InputError, match="a rehearsal holds 100 days, and this one takes longer. Give less of it"):
        served.offer(*columns((101 * day_ps, 1, 1)))
    slow = one_slot(step=replace(one_slot().step, tokens_ps=(0, 10**12)))  # a second for a step
    served = Station([slow], deadline_s=math.inf, **EXPECTED)
    served.offer(*columns((0, 1, 101 * 86_400)))
    with pytest.raises(InputError, match="a rehearsal holds 100 days"):
        served.drain()
    served = Station([slow], deadline_s=math.inf, **EXPECTED)
    served.offer(*columns((0, 1, 99 * 86_400)))
    served.drain()
    assert served.collect().finish_ps.tolist() == [99 * day_ps]


def test_without_replicas_everybody_is_refused() -> None:
    served = Station([], deadline_s=math.inf, **EXPECTED)
    served.offer(*columns((0, 1, 1)))
    served.drain()
    assert served.collect().replica.tolist() == [state.TOO_LONG]
