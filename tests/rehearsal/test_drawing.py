"""Arrivals drawn by chance: their rate and their lengths are as stated."""

import importlib.util
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from numpy.random import PCG64, Generator

from waterline.fleet import HOURS
from waterline.rehearsal.drawing import poisson_trace
from waterline.workload import Request, Trace, read_trace, write_trace

ROOT = Path(__file__).parents[2]


def drawn(rates: list[float], duration_s: float, seed: int = 1, **changes: int) -> list[Request]:
    lengths = {"prompt_tokens": 1000, "output_tokens": 200, "max_context_tokens": 100_000, "first_hour": 0} | changes
    trace = poisson_trace("drawn", rates, duration_s=duration_s, generator=Generator(PCG64(seed)), **lengths)
    return list(trace.requests)


def test_a_drawn_hour_has_the_stated_rate_and_lengths() -> None:
    asked = drawn([20.0] * HOURS, 3600.0)
    assert len(asked) == pytest.approx(72_000, rel=0.015)  # 4 standard deviations
    assert sum(request.prompt_tokens for request in asked) / len(asked) == pytest.approx(1000, rel=0.02)
    assert sum(request.output_tokens for request in asked) / len(asked) == pytest.approx(200, rel=0.02)
    gaps_s = [after.arrival_s - before.arrival_s for before, after in pairwise(asked)]
    assert min(gaps_s) >= 0.0
    assert sum(gap_s > 1 / 20 for gap_s in gaps_s) / len(gaps_s) == pytest.approx(0.3679, rel=0.02)  # 1/e


def test_the_rate_follows_the_hours_and_wraps_at_midnight() -> None:
    rates = [0.0] * HOURS
    rates[23], rates[1] = 1.0, 2.0
    hours = Counter(int(request.arrival_s // 3600) for request in drawn(rates, 4 * 3600.0, first_hour=22))
    assert sorted(hours) == [1, 3]  # 23:00 and 01:00, from 22:00
    assert hours[1] == pytest.approx(3600, rel=0.07)
    assert hours[3] == pytest.approx(7200, rel=0.05)


def test_lengths_stay_within_the_context() -> None:
    asked = drawn([5.0] * HOURS, 600.0, prompt_tokens=900, output_tokens=900, max_context_tokens=1000)
    assert all(request.prompt_tokens >= 1 and request.output_tokens >= 1 for request in asked)
    assert max(request.prompt_tokens + request.output_tokens for request in asked) == 1000


def test_a_drawn_trace_survives_its_file(tmp_path: Path) -> None:
    asked = drawn([1.0] * HOURS, 600.0)
    write_trace(Trace(name="drawn", requests=asked), tmp_path / "drawn.csv")
    first_s = asked[0].arrival_s
    read = read_trace(tmp_path / "drawn.csv").requests
    assert [request.arrival_s for request in read] == pytest.approx([r.arrival_s - first_s for r in asked], abs=1e-9)
    assert [request.prompt_tokens for request in read] == [request.prompt_tokens for request in asked]


def test_the_sample_trace_is_what_its_tool_makes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_sample_trace", ROOT / "tools" / "make_sample_trace.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    write_trace(tool.office_hour(), tmp_path / "again.csv")
    sample = ROOT / "examples" / "traces" / "office-hour.csv"
    assert (tmp_path / "again.csv").read_bytes() == sample.read_bytes()
    assert sample.stat().st_size < 100_000
