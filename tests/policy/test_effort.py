from hypothesis import given
from hypothesis import strategies as st

from waterline.policy.decisions import FULL_EFFORT, LOAD_HIGH
from waterline.policy.effort import effort


def test_while_it_is_calm_everybody_thinks_as_long_as_asked() -> None:
    assert effort(0.5, False, 8000, 1000, 5) == (8000, 5, FULL_EFFORT)


def test_samples_go_first_then_the_length_of_thought() -> None:
    assert effort(0.6, False, 8000, 1000, 5) == (8000, 3, LOAD_HIGH)
    assert effort(0.75, False, 8000, 1000, 5) == (8000, 1, LOAD_HIGH)
    assert effort(0.875, False, 8000, 1000, 5) == (4500, 1, LOAD_HIGH)
    assert effort(1.0, False, 8000, 1000, 5) == (1000, 1, LOAD_HIGH)


def test_a_tenant_below_its_guarantee_keeps_its_thoughts() -> None:
    assert effort(2.0, True, 8000, 1000, 5) == (8000, 5, FULL_EFFORT)


@given(st.floats(0, 3), st.floats(0, 3), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 64))
def test_more_load_never_buys_more_effort(one: float, other: float, asked: int, least: int, samples: int) -> None:
    calm, busy = (effort(load, False, asked, least, samples) for load in sorted((one, other)))
    assert busy[0] <= calm[0] <= asked
    assert 1 <= busy[1] <= calm[1] <= samples
    assert busy[0] >= min(least, asked)
