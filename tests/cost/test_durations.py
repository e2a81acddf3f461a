"""A table that is looked up is the table written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.cost.durations import Durations, Numbers

COUNTS = np.array([1.0, 2.0, 3.0, 16.0, 19.0, 23.0, 40.0])
seconds = st.lists(st.floats(0.0, 10.0), min_size=len(COUNTS), max_size=len(COUNTS)).map(np.array)


@given(seconds, st.booleans())
def test_entries_one_by_one_are_those_of_the_whole_table(took_s: Numbers, free: bool) -> None:
    one_by_one = Durations(COUNTS, took_s, free=free)
    assert [one_by_one[count] for count in range(41)] == Durations(COUNTS, took_s, free=free).whole().tolist()


@given(seconds)
def test_entries_lie_on_straight_lines_rounded_up_to_picoseconds(took_s: Numbers) -> None:
    line_ps = np.interp(np.arange(41.0), COUNTS, took_s) * 1e12
    above = Durations(COUNTS, took_s, free=False).whole() - line_ps
    assert (above > -0.01).all(), above
    assert (above < 1.01).all(), above


def test_no_tokens_take_no_time_and_8000_0000000001_is_8000() -> None:
    table = Durations(np.array([1.0, 3.0]), np.array([8000.0000000001e-12, 9001e-12]))
    assert tuple(table) == (0, 8000, 8501, 9001)
    assert np.array(table, np.int64).tolist() == [0, 8000, 8501, 9001]
    assert (table[-1], table[1:3], len(table)) == (9001, (8000, 8501), 4)
    assert table == (0, 8000, 8501, 9001)
    with pytest.raises(IndexError):
        table[4]
