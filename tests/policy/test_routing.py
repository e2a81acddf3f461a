from hypothesis import given
from hypothesis import strategies as st

from waterline.policy.routing import NOBODY, least_loaded

rates = st.lists(st.tuples(st.floats(0, 1e7), st.sampled_from([0.0, 50.0, 100.0, 250.0])), max_size=8)


def test_a_draining_replica_gets_nothing() -> None:
    assert least_loaded([0.0, 9e5], [0.0, 100.0]) == 1


def test_nobody_is_chosen_when_nobody_can() -> None:
    assert least_loaded([], []) == NOBODY
    assert least_loaded([0.0, 0.0], [0.0, 0.0]) == NOBODY


def test_a_faster_replica_takes_more_backlog() -> None:
    assert least_loaded([300.0, 200.0], [100.0, 50.0]) == 0  # 3 s against 4 s


def test_ties_go_to_the_lowest_index() -> None:
    assert least_loaded([100.0, 200.0, 100.0], [10.0, 20.0, 10.0]) == 0


@given(rates, st.integers(0, 7), st.floats(0, 1e6))
def test_more_backlog_elsewhere_never_changes_the_choice(
    replicas: list[tuple[float, float]], other: int, more: float
) -> None:
    backlog, rate = [b for b, _ in replicas], [r for _, r in replicas]
    choice = least_loaded(backlog, rate)
    if other < len(backlog) and other != choice:
        backlog[other] += more
        assert least_loaded(backlog, rate) == choice


@given(rates)
def test_the_choice_waits_no_longer_than_any_other(replicas: list[tuple[float, float]]) -> None:
    backlog, rate = [b for b, _ in replicas], [r for _, r in replicas]
    choice = least_loaded(backlog, rate)
    waits = [b / r for b, r in replicas if r > 0]
    assert (choice == NOBODY) == (not waits)
    if waits:
        assert backlog[choice] / rate[choice] == min(waits)
