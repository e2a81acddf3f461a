"""The event loop against the oracle: the same integers for every request, with numba and without.

A step of n tokens takes about a thousand picoseconds, and whole nanoseconds lie between arrivals: so a fleet of a few
small replicas meets every kind of event, several of them at one instant.
"""

import random
import sys
from collections import Counter
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
from waterline.plan import Role
from waterline.policy import dispatch
from waterline.policy.decisions import GAVE_UP, NOT_SERVED, OVER_LIMIT, TOO_LATE
from waterline.rehearsal import jit, state, station, steptime
from waterline.rehearsal.capacity import NEVER, Ask, Capacity, Change, Terms
from waterline.rehearsal.oracle import serve
from waterline.rehearsal.station import Changes, Station

MODULES = [
    f"waterline.rehearsal.{name}"
    for name in ("jit", "blocks", "entries", "heaps", "steptime", "life", "leaving", "kernel", "station")
]


def without_numba() -> ModuleType:
    """Return the station as somebody without numba imports it."""
    others = {name: module for name, module in sys.modules.items() if name not in MODULES}
    with patch.dict(sys.modules, {**others, "numba": None}, clear=True):
        return import_module("waterline.rehearsal.station")


PLAIN = without_numba()
STATIONS = {"numba": station, "plain": PLAIN}
plain_steps_until = PLAIN.run.__globals__["begin"].__globals__["steps_until"]


@jit.compiled
def compiled_steps_until(elapsed: int, first: int, growth: int) -> int:
    return steptime.steps_until(elapsed, first, growth)


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
    gpus=st.integers(1, 3),
    step=step_costs,
    max_batch=st.integers(1, 5),
    cache_tokens=st.integers(12, 70),
    max_context_tokens=st.sampled_from([20, 40, 60]),
    prefill_tokens_per_s=st.sampled_from([1e6, 3e8]),
    tokens_per_s=st.sampled_from([1e6, 2e6, 5e8, 5e8]),
    role=st.sampled_from(["both", "both", "prefill", "decode"]),
    reads_cached=st.sampled_from([False, False, True]),
    transfer_ps_per_token=st.sampled_from([0, 1, 100, 1000]),
    model=st.integers(0, 1),
)
fleets = st.lists(capacities, min_size=1, max_size=12).map(
    lambda made: [replace(one, replica=f"a/{index}") for index, one in enumerate(made)]
)
SECOND_NS = 10**9
times_ns = st.one_of(
    st.integers(0, 20),
    st.integers(0, 400),
    st.integers(SECOND_NS - 100, SECOND_NS + 100),  # when the desk's clock strikes
    st.integers(3 * SECOND_NS - 5, 3 * SECOND_NS + 5),
)
requests = st.builds(
    lambda ns, prompt, output, cached, patience_ns, leaves_ps, **others: Ask(
        arrival_ps=ns * 1000,
        prompt_tokens=prompt,
        output_tokens=output,
        cached_tokens=min(cached, prompt - 1),
        patience_ps=patience_ns * 1000 if patience_ns > 0 else NEVER,
        leaves_ps=leaves_ps or NEVER,
        **others,
    ),
    times_ns,
    st.integers(1, 24),
    st.integers(1, 40),
    st.one_of(st.just(0), st.integers(0, 23)),
    st.one_of(st.just(0), st.integers(1, 60)),
    st.one_of(st.just(0), st.integers(1, 60_000), st.integers(1, 60).map(lambda ns: ns * 1000), st.just(10**12)),
    model=st.integers(0, 1),
    client=st.integers(0, 3),
    blocks=st.just(()),
)
traffics = st.lists(requests, min_size=1, max_size=60).map(lambda made: sorted(made, key=lambda one: one.arrival_ps))
shares = st.sampled_from(
    [(0.0, 1.0, 1.0), (1e-10, 1e-9, 1.0), (0.0, 1e-11, 1e-9), (0.0, 0.0, 1e-11), (1e-11, 1e-10, 1e-10)]
)
terms = st.builds(
    lambda ttft_s, of_tenants, reasons: Terms(
        ttft_s=ttft_s,
        output_tokens=(10, 3),
        guarantee=tuple(one[0] for one in of_tenants),
        deserved=tuple(one[1] for one in of_tenants),
        limit=tuple(one[2] for one in of_tenants),
        tenant_of_client=(0, 1, 2, 2),
        block_tokens=5,
        prefix_places=16,
        reasons=reasons,
    ),
    st.tuples(*[st.sampled_from([1e9, 1e-4, 2e-5, 1e-6])] * 2),
    st.lists(shares, min_size=3, max_size=3),
    st.booleans(),
)
comings = st.lists(
    st.builds(
        lambda ns, kind, replica: Change(at_ps=ns * 1000, kind=kind, replica=replica),
        times_ns,
        st.sampled_from(["drain", "fail", "ready"]),
        st.integers(0, 11),
    ),
    max_size=8,
)


def changes_of(fleet: Sequence[Capacity], made: list[Change], late: list[int]) -> list[Change]:
    """Return the changes of a fleet: most are ready from the start, and who has failed does not come back."""
    every = [Change(at_ps=0, kind="ready", replica=row) for row in range(len(fleet)) if row not in late]
    failed: set[int] = set()
    for change in sorted(made, key=lambda change: change.at_ps):
        if change.replica < len(fleet) and change.replica not in failed:
            every.append(change)
            failed |= {change.replica} if change.kind == "fail" else set()
    return every


def by_events(
    module: ModuleType,
    fleet: Sequence[Capacity],
    asked: Sequence[Ask],
    house: Terms,
    changes: Sequence[Change] | None = None,
    pieces: int = 1,
) -> Iterator[tuple[object, ...]]:
    served = module.Station(house)
    served.start_all(fleet, state.NEVER_PS)
    all_ready = [Change(at_ps=0, kind="ready", replica=row) for row in range(len(fleet))]
    served._changes = Changes(all_ready if changes is None else changes)
    for piece in np.array_split(np.arange(len(asked)), pieces):
        offer(served, [asked[number] for number in piece])
        yield from rows(served.collect())
    served.finish()
    yield from rows(served.collect())


def offer(served: Station, asked: Sequence[Ask]) -> None:
    served.offer(
        *fields_of(asked, "arrival_ps", "prompt_tokens", "output_tokens", "cached_tokens"),
        **dict(zip(("model", "client"), fields_of(asked, "model", "client"), strict=True)),
        patience_ps=np.array([one.patience_ps if one.patience_ps > 0 else state.NEVER_PS for one in asked], np.int64),
        leaves_ps=np.array([one.leaves_ps if one.leaves_ps > 0 else state.NEVER_PS for one in asked], np.int64),
        blocks=np.array([key for one in asked for key in one.blocks], np.int64),
        block_counts=np.array([len(one.blocks) for one in asked], np.int64),
    )


def fields_of(asked: Sequence[Ask], *names: str) -> list[np.ndarray]:
    return [np.array([getattr(one, name) for one in asked], np.int64) for name in names]


FIELDS = (
    "client",
    "started_ps",
    "first_token_ps",
    "finish_ps",
    "busy_ps",
    "replica",
    "preemptions",
    "retry_s",
    "read_by",
    "read_busy_ps",
    "restarts",
    "cached_tokens",
    "left_tokens",
)


def rows(passages: station.Passages) -> Iterator[tuple[object, ...]]:
    placed: list[list[tuple[int, ...]]] = [[] for _ in range(len(passages))]
    for at_ps, request, *entry in passages.placed.tolist():
        placed[request].append((at_ps, *entry))
    losses: list[list[tuple[int, ...]]] = [[] for _ in range(len(passages))]
    for request, *loss in passages.losses.tolist():
        losses[request].append(tuple(loss))
    return zip(*(getattr(passages, name).tolist() for name in FIELDS), losses, placed, strict=True)


def by_steps(
    fleet: Sequence[Capacity], asked: Sequence[Ask], house: Terms, changes: Sequence[Change] | None = None
) -> list[tuple[object, ...]]:
    return [
        (
            passage.ask.client,
            passage.started_ps,
            passage.first_token_ps,
            passage.finish_ps,
            passage.busy_ps,
            -passage.refusal or passage.replica,
            passage.preemptions,
            passage.retry_s,
            passage.read_by,
            passage.read_busy_ps,
            passage.restarts,
            passage.found_tokens,
            passage.produced_tokens if passage.left else state.NONE,
            passage.losses,
            passage.placed,
        )
        for passage in serve(fleet, asked, house, changes=changes)
    ]


# --- Exactness ------------------------------------------------------------------------------------------------------


def slow_life(seed: int) -> tuple[list[Capacity], list[Ask], Terms, list[Change]]:
    """Draw replicas whose steps take tenths of a second, of which some fail, and requests that wait for minutes."""
    dice, second = random.Random(seed), 10**12
    fleet = [
        Capacity(
            replica=f"a/{row}",
            gpus=1,
            step=StepCost(
                tokens_ps=(0, second // dice.choice([2, 5, 10])),
                more_ps_per_token=dice.choice([0, second // 50]),
                head_ps=(0,),
                attention=(),
                step_tokens=dice.randint(2, 14),
                ranks=1,
            ),
            max_batch=dice.randint(1, 4),
            cache_tokens=dice.randint(30, 200),
            max_context_tokens=60,
            prefill_tokens_per_s=1e6,  # the desk expects too much of it
            tokens_per_s=1e6,
            role=dice.choice([*["both"] * 6, "prefill", "decode"]),
            transfer_ps_per_token=second // 10,
        )
        for row in range(dice.randint(1, 3))
    ]
    asked = [
        Ask(
            arrival_ps=dice.choice([dice.randrange(60) * second, dice.randrange(60 * 10**9) * 1000]),
            prompt_tokens=dice.randint(1, 24),
            output_tokens=dice.randint(1, 40),
            client=dice.randrange(4),
            patience_ps=NEVER if dice.random() < 0.9 else dice.randrange(1, 60) * second,
            leaves_ps=NEVER if dice.random() < 0.9 else dice.randrange(1, 60 * second),
        )
        for _ in range(dice.randint(20, 60))
    ]
    shares = [dice.choice([(0.0, 1.0, 1.0), (0.2, 0.5, 1.0), (0.0, 0.1, 0.3), (0.0, 0.0, 1.0)]) for _ in range(3)]
    house = Terms(
        ttft_s=(dice.choice([3.0, 12.0, 30.0]),),
        output_tokens=(10,),
        guarantee=tuple(one[0] for one in shares),
        deserved=tuple(one[1] for one in shares),
        limit=tuple(one[2] for one in shares),
        tenant_of_client=(0, 1, 2, 2),
        reasons=True,
    )
    made = [
        Change(at_ps=dice.randrange(100) * second, kind=dice.choice(["drain", "fail", "fail", "ready"]), replica=row)
        for row in range(len(fleet))
        if dice.random() < 0.5
    ]
    changes = sorted(changes_of(fleet, made, []), key=lambda one: one.at_ps)
    return fleet, sorted(asked, key=lambda one: one.arrival_ps), house, changes


@pytest.mark.parametrize("module", STATIONS.values(), ids=STATIONS)
def test_who_is_overtaken_and_who_comes_back_fare_alike_step_by_step(module: ModuleType) -> None:
    told = came_back = 0
    for seed in range(20):
        fleet, asked, house, changes = slow_life(seed)
        expected = by_steps(fleet, asked, house, changes)
        assert list(by_events(module, fleet, asked, house, changes, pieces=3)) == expected, seed
        refused = zip(asked, expected, strict=True)
        told += sum(row[5] == -TOO_LATE and row[3] >= one.arrival_ps + 30 * 10**12 for one, row in refused)  # type: ignore[operator]
        came_back += sum(row[10] > 0 for row in expected)  # type: ignore[operator]
    assert (told > 20, came_back > 5) == (True, True), (told, came_back)


@pytest.mark.parametrize("name", STATIONS)
@settings(max_examples=150)
@given(
    fleet=fleets,
    asked=traffics,
    house=terms,
    made=comings,
    late=st.lists(st.integers(0, 11), max_size=3),
    pieces=st.integers(1, 4),
)
def test_skipping_equals_step_by_step_to_the_picosecond(
    name: str,
    fleet: list[Capacity],
    asked: list[Ask],
    house: Terms,
    made: list[Change],
    late: list[int],
    pieces: int,
) -> None:
    changes = changes_of(fleet, made, late)
    assert list(by_events(STATIONS[name], fleet, asked, house, changes, pieces)) == by_steps(
        fleet, asked, house, changes
    )


# Stories in blocks of two tokens; the first two begin alike, and so do their prompts as far as they go.
STORIES = (tuple(range(1, 13)), (*range(1, 5), *range(25, 33)), tuple(range(41, 53)), ())


@pytest.mark.parametrize("name", STATIONS)
@settings(max_examples=40)
@given(
    fleet=st.lists(capacities, min_size=3, max_size=3),
    seed=st.integers(0, 2**32),
    pieces=st.integers(1, 4),
    affinity=st.booleans(),
    roles=st.sampled_from([("both",) * 3, ("prefill", "decode", "prefill"), ("decode", "prefill", "decode")]),
)
def test_what_each_replica_has_of_prompts_is_the_same_too(
    name: str, fleet: list[Capacity], seed: int, pieces: int, affinity: bool, roles: tuple[Role, ...]
) -> None:
    house = Terms(ttft_s=(1e9,), output_tokens=(10,), block_tokens=2, affinity=affinity, reasons=True)
    dice = np.random.Generator(np.random.PCG64(seed))
    fleet = [
        replace(one, replica=f"a/{index}", model=0, role=role, cache_tokens=90, max_batch=9, max_context_tokens=64)
        for index, (one, role) in enumerate(zip(fleet, roles, strict=True))
    ]
    asked = [
        Ask(
            arrival_ps=arrival_ps,
            prompt_tokens=int(dice.integers(1, 25)),
            output_tokens=int(dice.integers(1, 30)),
            blocks=STORIES[dice.integers(len(STORIES))],
            leaves_ps=int(
                dice.choice([NEVER, NEVER, NEVER, 1 + dice.integers(40_000), 1000 * (1 + dice.integers(40))])
            ),
        )
        for arrival_ps in (1000 * np.cumsum(dice.choice([0, 0, 3, 20], 100))).tolist()
    ]
    fails = Change(at_ps=1000 * int(dice.integers(50, 700)), kind="fail", replica=int(dice.integers(3)))
    changes = changes_of(fleet, [fails], [])
    stepped = by_steps(fleet, asked, house, changes)
    assert list(by_events(STATIONS[name], fleet, asked, house, changes, pieces)) == stepped


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
    house = Terms(
        ttft_s=(8.0,),
        output_tokens=(300,),
        guarantee=(0.2, 0.0, 0.0),
        deserved=(0.4, 0.4, 0.2),
        limit=(1.0, 1.0, 0.3),
        tenant_of_client=(0, 1, 2, 1),
    )
    arrivals_ns = np.cumsum(generator.exponential(0.02, 1500) * 1e9).astype(int).tolist()
    lengths = np.clip(generator.lognormal((6.5, 5.3), 1.0, (1500, 2)), 1, 5000).astype(int).tolist()
    asked = [
        Ask(
            arrival_ps=at_ns * 1000,
            prompt_tokens=prompt,
            output_tokens=output,
            cached_tokens=number % 3 * (prompt - 1) // 4,
            client=number % 4,
            patience_ps=(-1, 2 * 10**12)[number % 2],
            leaves_ps=(-1, -1, 3 * 10**12 + number, -1, 9 * 10**12)[number % 5],
        )
        for number, (at_ns, (prompt, output)) in enumerate(zip(arrivals_ns, lengths, strict=True))
    ]
    changes = [
        *[Change(at_ps=0, kind="ready", replica=row) for row in range(3)],
        Change(at_ps=6 * 10**12 + 1, kind="fail", replica=0),
        Change(at_ps=9 * 10**12, kind="ready", replica=3),
        Change(at_ps=20 * 10**12, kind="drain", replica=1),
    ]
    stepped = by_steps(fleet, asked, house, changes)
    assert list(by_events(STATIONS[name], fleet, asked, house, changes, pieces=7)) == stepped
    rules = Counter(row[5] for row in stepped)
    assert sum(row[6] for row in stepped) > 50, "the cache is full at times"
    assert rules[-TOO_LATE] + rules[-OVER_LIMIT] > 50, "not everybody can be served in time"
    assert rules[-GAVE_UP] > 5, "not everybody waits so long"
    assert sum(row[5] >= 0 and row[12] >= 0 for row in stepped) > 100, "not everybody stays to the end"
    assert sum(row[10] for row in stepped) > 20, "much was under way on the replica that failed"
    assert set(rules) >= {0, 1, 2, 3}


@given(st.integers(1, 10**15), st.integers(1, 10**11), st.one_of(st.just(0), st.integers(1, 10**9)))
@example(10**15, 1, 0)
def test_the_first_boundary_not_before_a_time_is_found_whatever_a_float_guesses(
    elapsed: int, first: int, growth: int
) -> None:
    first = max(first, elapsed // 10**6)
    steps = plain_steps_until(elapsed, first, growth)
    assert compiled_steps_until(elapsed, first, growth) == steps

    def took(number: int) -> int:
        return sum([first * number, growth * number * (number - 1) // 2])

    assert took(steps) >= elapsed
    assert steps == 1 or took(steps - 1) < elapsed


@settings(max_examples=30)
@given(fleet=fleets, asked=traffics, house=terms, made=comings)
def test_every_request_ends_once_and_what_it_cost_is_on_an_account(
    fleet: list[Capacity], asked: list[Ask], house: Terms, made: list[Change]
) -> None:
    served = Station(house)
    served.start_all(fleet, state.NEVER_PS)
    served._changes = Changes(changes_of(fleet, made, []))
    offer(served, asked)
    served.finish()
    passages = served.collect()
    assert len(passages) == len(asked)
    assert (passages.finish_ps >= [one.arrival_ps for one in asked]).all()
    left, outputs = passages.left_tokens != NEVER, np.array([one.output_tokens for one in asked])
    served_whole = (passages.replica >= 0) & ~left
    assert (passages.first_token_ps[served_whole] > passages.started_ps[served_whole]).all()
    assert (passages.left_tokens <= outputs).all()
    assert ((passages.first_token_ps != NEVER) == (served_whole | (passages.left_tokens > 0)))[
        passages.replica >= 0
    ].all()
    stays_ps = np.array([min([ps for ps in (one.patience_ps, one.leaves_ps) if ps > 0], default=0) for one in asked])
    assert (passages.finish_ps - [one.arrival_ps for one in asked] >= stays_ps)[left].all()
    assert not left[stays_ps == 0].any()

    memory = served.memory
    replicas, fixed = memory.replicas.reshape(-1, state.REPLICA), memory.fixed.reshape(-1, state.FIXED)
    whole = fixed[:, state.ALIVE][: len(fleet)] == 1
    rooms = np.array([one.cache_tokens for one in fleet])
    assert (replicas[: len(fleet), state.FREE][whole] == rooms[whole]).all(), "all of the cache is given back"
    assert (replicas[:, [state.ACCEPTED, state.DECODES]] == 0).all()
    assert (memory.leaving == 0).all()
    assert memory.counters[state.LEAVING] == 0
    assert memory.counters[state.UNDER_WAY] == 0 or (passages.replica == -NOT_SERVED).any()
    desk = memory.desk
    if memory.counters[state.UNDER_WAY] == 0:
        assert (desk.queue.waiting == 0).all()
        serves = desk.replicas.serves == 1
        assert (desk.replicas.backlog_tokens[serves] == 0).all()
        assert (desk.replicas.unread_tokens[serves] == 0).all()
        slots = np.array([one.max_batch for one in fleet])
        reads = serves & (desk.models.role != dispatch.WRITES)
        assert (desk.replicas.free_slots[reads] == slots[reads[: len(fleet)]]).all()


def test_a_tenant_pays_for_what_those_had_who_left_and_gets_the_rest_back() -> None:
    """One slot, steps of 1,000 ps. The first leaves while it decodes, the second while it is read, the third in line."""
    served = patient(one_slot(gpus=2, step=replace(one_slot().step, step_tokens=4)))
    leaves_ps = np.array([2500, 4500, 3600, state.NEVER_PS])
    served.offer(*columns((0, 4, 50), (0, 9, 9), (0, 4, 5), (0, 3, 2)), leaves_ps=leaves_ps)
    used = served.memory.desk.accounts.used_gpu_s
    # begins  ends  what
    #      0  1000  the prompt of the first
    #   1000  3000  it decodes; its client goes at 2500, so it ends here, with 3 of 50 tokens
    #   3000  5000  4 and 4 of the 9 prompt tokens of the second; its client goes at 4500
    #   5000  7000  the fourth is read, and has its second token; the third left the line at 3600
    served.advance(8000)
    passages = served.collect()
    assert passages.finish_ps.tolist() == [3000, 5000, 3600, 7000]
    assert passages.left_tokens.tolist() == [3, 0, 0, -1]
    assert passages.replica.tolist() == [0, 0, -GAVE_UP, 0]
    assert passages.first_token_ps.tolist() == [1000, -1, -1, 6000]
    assert passages.busy_ps.tolist() == [
        3000,
        2000,
        0,
        2000,
    ]  # 3 x 333, and the picosecond that is left with the next step
    assert used[0] == pytest.approx(2 * sum(passages.busy_ps.tolist()) * 1e-12, rel=1e-9)


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


def patient(*fleet: Capacity) -> Station:
    served = Station(Terms(ttft_s=(1e9,), output_tokens=(10,)))
    served.start_all(fleet, 0)
    return served


def test_what_is_settled_is_handed_out_in_the_order_of_arrival() -> None:
    served = patient(one_slot(max_batch=2))
    served.offer(*columns((0, 1, 50), (0, 1, 2), (10_000, 1, 1)))  # the first takes 50 steps, of 1000 ps each
    assert len(served.collect()) == 0
    served.offer(*columns((100_000, 1, 1)))
    assert served.collect().finish_ps.tolist() == [50_000, 2000, 11_000]
    served.finish()
    assert served.collect().finish_ps.tolist() == [101_000]


def test_whom_a_replica_has_accepted_it_serves_while_it_drains() -> None:
    served = patient(one_slot(max_batch=2))
    served.start(one_slot(max_batch=2), 60_000)
    served.drain(0, 60_000)
    served.drain(1, 120_000)
    served.offer(*columns((0, 1, 90), (59_000, 1, 1), (60_000, 1, 1), (120_000, 1, 1)))
    assert served.idle(0)
    served.finish()
    passages = served.collect()
    assert passages.replica.tolist() == [0, 0, 1, -NOT_SERVED]
    assert passages.finish_ps.tolist() == [90_000, 60_000, 61_000, 120_000]


def test_a_replica_that_fails_loses_its_cache_and_no_request() -> None:
    """Each step takes 1,000 ps; after 10 tokens the second replica reads prompt and tokens again, in a step."""
    served = patient(one_slot())
    served.offer(*columns((0, 5, 50)))
    served.start(one_slot(), 10_500)
    served.fail(0, 10_500)
    served.finish()
    passages = served.collect()
    assert (passages.replica[0], passages.restarts[0], passages.first_token_ps[0]) == (1, 1, 1000)
    assert passages.finish_ps[0] == 10_500 + 2000 + 39 * 1000, (
        "15 tokens are read in two steps, the 11th comes with them"
    )
    assert passages.losses.tolist() == [[0, 0, 10_000, 10_500]]
    assert passages.started_ps[0] == 0


def test_tenants_and_clients_wait_at_the_desk_and_not_in_the_order_they_came() -> None:
    served = Station(Terms(ttft_s=(1e9,), output_tokens=(1,), tenant_of_client=(0, 0)))
    served.start(one_slot(), 0)
    served.offer(*columns(*[(0, 1, 1)] * 5), client=np.array([0, 0, 0, 0, 1]))
    served.finish()
    assert served.collect().finish_ps.tolist() == [1000, 3000, 4000, 5000, 2000]


def test_a_long_queue_finds_room() -> None:
    served = patient(one_slot())
    count = 5 * station.FIRST_SLOTS
    zeros = np.zeros(count, np.int64)
    served.offer(zeros, zeros + 1, zeros + 1)
    served.finish()
    assert served.collect().finish_ps.tolist() == list(range(1000, 1000 * count + 1, 1000))


def test_longer_than_64_bits_of_picoseconds_is_said() -> None:
    day_ps = 86_400 * 10**12
    served = patient(one_slot())
    with pytest.raises(InputError, match="a rehearsal holds 100 days, and this one takes longer. Give less of it"):
        served.offer(*columns((101 * day_ps, 1, 1)))
    slow = one_slot(step=replace(one_slot().step, tokens_ps=(0, 10**12)))  # a second for a step
    served = patient(slow)
    served.offer(*columns((0, 1, 101 * 86_400)))
    with pytest.raises(InputError, match="a rehearsal holds 100 days"):
        served.finish()
    served = patient(slow)
    served.offer(*columns((0, 1, 99 * 86_400)))
    served.finish()
    assert served.collect().finish_ps.tolist() == [99 * day_ps]


def test_without_replicas_everybody_is_refused() -> None:
    served = patient()
    served.offer(*columns((0, 1, 1)))
    served.finish()
    assert served.collect().replica.tolist() == [-NOT_SERVED]
