"""Histograms: what is read back, against the values themselves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.sketch import LEAST, RELATIVE_ERROR, Histograms

VALUES = st.lists(st.one_of(st.floats(1e-6, 1e6), st.floats(0.5, 2.0), st.just(0.0)), min_size=1, max_size=200)


def histograms(*rows: list[float]) -> Histograms:
    found = Histograms()
    found.make_rows(len(rows))
    for number, values in enumerate(rows):
        found.add(np.full(len(values), number), np.array(values, np.float64))
    return found


@given(VALUES)
def test_a_percentile_is_the_value_at_its_rank_to_one_part_in_256(values: list[float]) -> None:
    ordered = sorted(values)
    percents = (1, 50, 90, 99, 100)
    for percent, value in zip(percents, histograms(values).percentiles([0], percents)[2], strict=True):
        exact = ordered[-(-percent * len(values) // 100) - 1]
        assert value == pytest.approx(exact, rel=RELATIVE_ERROR, abs=LEAST)


@given(VALUES, VALUES)
def test_rows_are_apart_and_together_are_one(left: list[float], right: list[float]) -> None:
    apart = histograms(left, right)
    for rows, values in (([0], left), ([1], right), ([0, 1], left + right)):
        count, mean, found = apart.percentiles(rows, [50, 99])
        assert (count, found) == (len(values), histograms(values).percentiles([0], [50, 99])[2])
        assert mean == pytest.approx(sum(values) / len(values))


@given(VALUES)
def test_shares_rise_to_all(values: list[float]) -> None:
    shares = histograms(values).shares([0])
    assert shares == sorted(shares)
    assert shares[-1][1] == 1.0
    for value, share in shares:
        surely, perhaps = (
            sum(one <= value * (1 + error) for one in values) for error in (-RELATIVE_ERROR, RELATIVE_ERROR)
        )
        assert surely <= round(share * len(values)) <= perhaps


def test_bins_are_kept_for_what_was_met_and_not_for_all_there_could_be() -> None:
    seconds = histograms([0.5, 1.0, 30.0])
    assert seconds.counts.shape[1] <= 6 * 128
    assert seconds.counts.nbytes < 7_000
    assert histograms([1e-5, 1e30]).percentiles([0], [100])[2][0] == pytest.approx(2.0**30, rel=RELATIVE_ERROR)


def test_a_million_values_take_no_more_than_ten() -> None:
    few, many = histograms([1.0, 2.0] * 5), histograms([1.0, 2.0] * 500_000)
    assert few.counts.nbytes == many.counts.nbytes
    assert many.percentiles([0], [])[0] == 1_000_000


def test_nothing_has_no_shares() -> None:
    assert histograms([]).shares([0]) == []
    assert histograms([]).percentiles([0], [50]) == (0, 0.0, [0.0])
