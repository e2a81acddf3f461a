"""What a trace asks of a plan: its busiest minutes and its lengths, read a chunk at a time."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.fleet import Demand
from waterline.planner.needs import PEAK_WINDOW_NS, _Moments, _Peak, _recorded

S = 10**9


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=80).map(sorted), st.integers(1, 30))
def test_the_peak_is_the_busiest_five_minutes_however_the_trace_is_cut(seconds: list[int], size: int) -> None:
    most = max(sum(at - 300 <= other <= at for other in seconds) for at in seconds)
    peak = _Peak()
    for begin in range(0, len(seconds), size):
        peak.add(np.array(seconds[begin : begin + size], np.int64) * S)
    assert peak.requests_per_s == pytest.approx(most / min(300, max(1, seconds[-1] - seconds[0])))
    assert PEAK_WINDOW_NS == 300 * S


@given(st.lists(st.integers(1, 999_999_999), min_size=1, max_size=40), st.integers(1, 40))
def test_the_moments_of_lengths_are_exact(lengths: list[int], size: int) -> None:
    moments = _Moments()
    for begin in range(0, len(lengths), size):
        moments.add(np.array(lengths[begin : begin + size], np.int32))
    mean = sum(lengths) / len(lengths)
    assert moments.mean == mean
    assert moments.squares == sum(length * length for length in lengths)
    assert moments.square_over_mean == pytest.approx(moments.squares / len(lengths) / mean**2)


def test_what_a_trace_says_was_cached_is_planned_with_and_else_what_the_demand_says(tmp_path: Path) -> None:
    told, silent = tmp_path / "told.csv", tmp_path / "silent.csv"
    told.write_text("arrival,prompt,output,cached\n0,100,10,75\n1,100,10,25\n")
    silent.write_text("arrival,prompt,output\n0,100,10\n")
    columns = "arrival=arrival,prompt=prompt,output=output"
    wish = Demand(tenant="a", trace=str(told), columns=f"{columns},cached=cached", prefix_hit=0.2)
    assert _recorded(wish).prefix_hit == 0.5
    assert _recorded(Demand(tenant="a", trace=str(silent), columns=columns, prefix_hit=0.2)).prefix_hit == 0.2


def test_a_demand_is_planned_from_a_table_by_its_column_map(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("in,out,ts\n" + "".join(f"{100 + at % 2},{10},{at}\n" for at in range(601)))
    asked = _recorded(Demand(tenant="a", trace=str(path), columns="arrival=ts,prompt=in,output=out"))
    assert asked.requests_per_s == 301 / 300
    assert asked.prompt_tokens == pytest.approx(100.5, abs=0.01)
    assert (asked.output_tokens, asked.output_square) == (10.0, 1.0)
