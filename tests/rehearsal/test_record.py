"""Timelines, against sums over every instant, and who lent to whom."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.rehearsal.record import MOST_STEPS, Lent, Sampler, Timeline, lent

SECOND = 10**12


def columns(rows: list[tuple[int, int, float, float, float, int, float]]) -> dict[str, Any]:
    """Return requests as arrays: tenant, model, arrival, first token and finish in seconds, replica, busy seconds."""
    table = np.array(rows, np.float64).reshape(-1, 7)
    names = ("tenant", "model", "arrival_ps", "first_token_ps", "finish_ps", "replica", "busy_ps")
    return {
        name: np.rint(table[:, index] * (SECOND if name.endswith("_ps") else 1)).astype(np.int64)
        for index, name in enumerate(names)
    }


def test_a_request_waits_then_runs_and_keeps_its_replica_busy() -> None:
    sampler = Sampler(["public", "research"], ["chat"], length_s=10.0)
    four = sampler.replica("chat/0", 4)
    sampler.serves(four, 0, 0, 10 * SECOND)
    sampler.add(**columns([(0, 0, 1.5, 2.0, 5.5, four, 2.0)]))
    line = sampler.timeline()
    assert line.step_s == 1.0
    assert line.at_s.tolist() == list(range(10))
    assert line.waiting[0].tolist() == [0, 0.5, 0, 0, 0, 0, 0, 0, 0, 0]
    assert line.running[0].tolist() == pytest.approx([0, 0, 1, 1, 1, 0.5, 0, 0, 0, 0])
    assert line.asked_per_s[0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert line.busy[0].tolist() == pytest.approx([0, 0.25, 0.5, 0.5, 0.5, 0.25, 0, 0, 0, 0])
    assert line.used_gpus[0].tolist() == pytest.approx([0, 1, 2, 2, 2, 1, 0, 0, 0, 0])
    assert line.gpus[0].tolist() == pytest.approx([0, 4, 4, 4, 4, 4, 0, 0, 0, 0])
    assert line.spare_gpus.tolist() == pytest.approx([4, 0, 0, 0, 0, 0, 4, 4, 4, 4])
    assert not line.gpus[1].any()
    assert line.gpu_hours_of("public") == pytest.approx(20 / 3600)


def test_a_shared_replica_is_divided_by_use_and_one_that_was_started_for_a_tenant_is_its_own() -> None:
    sampler = Sampler(["public", "research"], ["chat"], length_s=1.0)
    shared, own = sampler.replica("chat/0", 8), sampler.replica("chat/1", 4)
    sampler.serves(shared, 0, 0, SECOND)
    sampler.serves(own, 0, 0, SECOND, tenant=1)
    sampler.works(0, 16, 0, SECOND)
    sampler.add(**columns([(0, 0, 0, 0.5, 1, shared, 0.3), (1, 0, 0, 0.5, 1, shared, 0.1)]))
    assert sampler.timeline().gpus[:, 0].tolist() == pytest.approx([16 + 6, 4 + 2])


def test_who_is_refused_is_counted_and_never_waits() -> None:
    sampler = Sampler(["public"], ["chat"], length_s=2.0)
    sampler.add(**columns([(0, 0, 1.25, -1, 1.25, -2, 0), (0, 0, 1.5, -1, 1.5, -1, 0)]))
    line = sampler.timeline()
    assert line.at_s.tolist() == [0, 1]
    assert line.refused_per_s[0].tolist() == [0, 4]  # in the half second that was
    assert not line.waiting.any()


def test_nothing_at_all_has_a_timeline_too() -> None:
    line = Sampler(["public"], ["chat"], length_s=0.0).timeline()
    assert (line.steps, line.gpus.tolist(), line.busy.shape) == (1, [[0.0]], (0, 1))


TIMES = st.floats(0, 40).map(lambda time: round(time, 3))


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 1), TIMES, TIMES, TIMES, st.integers(0, 2)), min_size=1, max_size=20
    ),
    st.sampled_from([1.0, 30.0, 300.0]),
)
def test_sums_over_time_are_those_of_the_requests(
    asked: list[tuple[int, int, float, float, float, int]], length_s: float
) -> None:
    rows = [
        (tenant, model, *sorted((one, two, three)), replica, (max(one, two, three) - min(one, two, three)) / 4)
        for tenant, model, one, two, three, replica in asked
    ]
    sampler = Sampler(["a", "b"], ["x", "y"], length_s)
    for name in range(3):
        sampler.replica(str(name), name + 1)
    for row in rows:
        sampler.add(**columns([row]))
    line = sampler.timeline()
    assert line.steps <= MOST_STEPS
    assert line.lengths_s.sum() == pytest.approx(line.end_s)
    for tenant in range(2):
        own = [row for row in rows if row[0] == tenant]
        assert line.waiting[tenant] @ line.lengths_s == pytest.approx(sum(row[3] - row[2] for row in own), abs=1e-6)
        assert line.running[tenant] @ line.lengths_s == pytest.approx(sum(row[4] - row[3] for row in own), abs=1e-6)
        assert line.asked_per_s[tenant] @ line.lengths_s == pytest.approx(len(own))
        used_s = sum(row[6] * (row[5] + 1) for row in own)
        assert line.used_gpus[tenant] @ line.lengths_s == pytest.approx(used_s, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 4000)), min_size=1, max_size=8), st.integers(0, 3))
def test_longer_steps_are_the_means_of_the_shorter_ones(spans: list[tuple[int, int]], halvings: int) -> None:
    def held(last_s: int) -> Timeline:
        sampler = Sampler(["a"], ["x"], 200.0)
        for begin, end in spans:
            sampler.works(0, 2, begin * SECOND // 5, end * SECOND // 5)
        sampler.works(0, 1, (last_s - 1) * SECOND, last_s * SECOND)
        return sampler.timeline()

    longer, last_s = 2**halvings, MOST_STEPS - 2
    short, long = held(last_s), held(last_s * longer)
    assert (short.step_s, long.step_s) == (1.0, float(longer))
    steps = 800 // longer
    means = short.gpus[0][: steps * longer].reshape(steps, longer).mean(axis=1)
    assert long.gpus[0][:steps] == pytest.approx(means, abs=1e-9)


def test_what_is_borrowed_comes_from_nobody_first_and_then_from_who_leaves_most() -> None:
    line = Sampler(["public", "enterprise", "research"], ["chat"], length_s=3600.0)
    for tenant, gpus in ((0, 50), (1, 10), (2, 20)):
        line.works(tenant, gpus, 0, 3600 * SECOND)
    # Of 90 GPUs 70 are deserved. The public has 40 more than it deserves: the 20 that are nobody's, and of the other 20
    # the enterprise, which leaves 20 of its own, gives twice as much as research, which leaves 10.
    found = lent(line.timeline(), [10, 30, 30], 90)
    assert [(one.lender, one.borrower) for one in found] == [
        ("", "public"),
        ("enterprise", "public"),
        ("research", "public"),
    ]
    assert [one.gpu_hours for one in found] == pytest.approx([20, 20 * 2 / 3, 20 / 3])
    assert lent(line.timeline(), [50, 30, 20], 100) == ()
    assert isinstance(found[0], Lent)
