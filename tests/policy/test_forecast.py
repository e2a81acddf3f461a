import importlib.util
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.policy import forecast as module
from waterline.policy.forecast import Series, expect_day, new_series
from waterline.policy.jit import compiled

observe, forecast, needs = (compiled(one) for one in (module.observe, module.forecast, module.needs))
DAY_S = 86_400


def follow(loads: list[float], *, step_s: float = 30.0, horizon: int = 4, first: int = 0) -> Series:
    series = new_series([horizon], step_s)
    for step, load in enumerate(loads, start=first):
        observe(series, 0, step, load)
    return series


def ahead(series: Series, step: int, steps: int = 4) -> tuple[float, float]:
    return forecast(series, 0, step, steps)


def test_before_three_steps_are_known_the_forecast_is_the_last_load() -> None:
    assert ahead(follow([]), 0) == (0.0, 0.0)
    assert ahead(follow([5.0]), 0) == (5.0, 5.0)


def test_where_the_plan_expects_nothing_and_nothing_comes_nothing_is_needed() -> None:
    series = new_series([4], 30.0)
    expect_day(series, 0, np.zeros(24))
    for step in range(100):
        observe(series, 0, step, 0.0)
        assert needs(series, 0, step) == (0.0, 0.0)


def test_it_begins_with_the_day_of_the_plan() -> None:
    series = new_series([4], 30.0)
    expect_day(series, 0, np.full(24, 40.0))
    for step, load in enumerate([60.0, 30.0, 50.0]):
        observe(series, 0, step, load)
        assert needs(series, 0, step)[0] == pytest.approx(40.0, rel=0.1)


def test_the_day_of_the_plan_is_a_line_between_the_middles_of_its_times() -> None:
    """Its times are five minutes long, so from 12:57:30 to 13:02:30 it goes from the one hour to the other."""
    series = new_series([4], 30.0)
    expect_day(series, 0, np.arange(24.0))
    steps = {"12:55": 1550, "12:57:30": 1555, "12:58:30": 1557, "13:00": 1560, "13:02:30": 1565, "midnight": 0}
    said = {at: round(ahead(series, step - 4)[0], 9) for at, step in steps.items()}
    assert said == {"12:55": 12, "12:57:30": 12, "12:58:30": 12.2, "13:00": 12.5, "13:02:30": 13, "midnight": 11.5}


@pytest.mark.parametrize("unseen", [119, 120, 121, None])
def test_a_time_of_day_is_known_when_it_and_those_beside_it_have_been_seen(unseen: int | None) -> None:
    series = new_series([4], 30.0)
    series.typical[:], series.days[:, 119:122] = 7.0, 1
    if unseen is not None:
        series.days[0, unseen] = 0
    assert ahead(series, 1205 - 4)[0] == (0.0 if unseen is not None else 7.0)


def test_a_day_that_is_half_as_busy_again_is_expected_to_remain_so() -> None:
    """From 12:00 on the day has twice its load. Both opinions have been right so far, so they count alike."""
    series = new_series([20], 30.0)
    expect_day(series, 0, np.repeat([40.0, 80.0], 12))
    for step in range(1320, 1430):  # 11:00 to 11:55
        observe(series, 0, step, 60.0)
    assert ahead(series, 1429, 20)[0] == pytest.approx((60 + 1.5 * 80) / 2, rel=0.1)


def test_the_mean_load_is_that_of_some_six_hours() -> None:
    series = follow([40.0] * 10 + [80.0] * 721)
    assert series.mean[0] == pytest.approx(80 - 40 / np.e, rel=0.01), "720 steps of 30 s"


def test_a_steady_load_stays() -> None:
    assert ahead(follow([40.0] * 100), 99) == pytest.approx((40.0, 40.0))


def test_a_growing_load_is_ahead_of_itself() -> None:
    """It grows by 1 a step: in four steps there will be four more."""
    expected, bound = ahead(follow([50.0] * 50 + [50.0 + step for step in range(40)]), 89)
    assert expected == pytest.approx(89 + 4, rel=0.03)
    assert bound >= expected


def test_what_runs_while_the_load_falls_is_kept_until_it_has_fallen() -> None:
    """It falls by 1 a step, to 51: in four steps there will be 47, but until then up to 51 have to be served."""
    wanted, kept = needs(follow([90.0] * 50 + [90.0 - step for step in range(40)]), 0, 89)
    assert wanted == pytest.approx(51 - 4, rel=0.03)
    assert kept == pytest.approx(51, rel=0.03)


def test_nothing_is_learnt_from_a_spike_of_one_step() -> None:
    quiet, spiked = follow([40.0] * 200), follow([40.0] * 150 + [4000.0] + [40.0] * 49)
    for one, other in zip(quiet, spiked, strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_spike_does_not_lend_a_card_even_while_it_lasts() -> None:
    series = follow([40.0] * 150 + [4000.0])
    assert needs(series, 0, 150) == pytest.approx((40.0, 40.0))


def test_a_load_that_jumps_is_believed_after_two_steps_and_so_is_its_end() -> None:
    dice = np.random.default_rng(3)
    quiet, surge, after = (dice.poisson(rate * 30, 40) / 30 for rate in (26.0, 260.0, 26.0))
    believed = [ahead(follow([*quiet, *surge[:steps]]), 39 + steps)[0] for steps in range(1, 40)]
    assert believed[0] == pytest.approx(26.0, rel=0.1)
    assert believed[1:] == pytest.approx([260.0] * 38, rel=0.1), "a jump is no ramp"
    back = [ahead(follow([*quiet, *surge, *after[:steps]]), 79 + steps)[0] for steps in range(2, 40)]
    assert back == pytest.approx([26.0] * 38, abs=8.0)


@pytest.mark.parametrize("missing", [float("nan"), None], ids=["NaN", "never told"])
def test_missing_steps_change_little(missing: float | None) -> None:
    dice = np.random.default_rng(1)
    loads = [float(dice.poisson(900)) / 30 for _ in range(400)]
    whole, holes = follow(loads), new_series([4], 30.0)
    for step, load in enumerate(loads):
        if step % 5 in (1, 2) and 150 < step < 390:
            if missing is not None:
                observe(holes, 0, step, missing)
        else:
            observe(holes, 0, step, load)
    assert ahead(holes, 399)[0] == pytest.approx(ahead(whole, 399)[0], rel=0.05)


def test_in_a_long_gap_a_trend_dies_away() -> None:
    rising = [10.0 + step for step in range(60)]
    series = follow(rising)
    assert ahead(series, 59 + 1000)[0] < 69 + 40, "not by one a step for ever"
    back = follow(rising)
    for step in range(300, 304):
        observe(back, 0, step, 69.0)
    assert ahead(back, 303)[0] == pytest.approx(69.0, abs=0.5)
    for step in range(1060, 1090):
        observe(series, 0, step, 20.0)
    assert ahead(series, 1089)[0] == pytest.approx(20.0, rel=0.1)


def daily(step: int, step_s: float = 60.0) -> float:
    """A day that rises from 30 to 90 between 8:00 and 8:20 and falls from 18:00 to 21:00."""
    hour = step * step_s % DAY_S / 3600
    up, down = min(max((hour - 8) * 3, 0), 1), min(max((hour - 18) / 3, 0), 1)
    return 30.0 + 60.0 * (up - down)


def days_of(count: float, *, noise: int | None = 0) -> list[float]:
    dice = np.random.default_rng(noise)
    steps = range(int(count * 1440))
    return [dice.poisson(daily(step) * 60) / 60 if noise is not None else daily(step) for step in steps]


def test_two_thirds_of_a_rise_that_comes_every_day_are_foreseen_before_it_begins() -> None:
    before = 7 * 60 + 59
    first = follow(days_of(before / 1440), step_s=60.0, horizon=10)
    fourth = follow(days_of(3 + before / 1440), step_s=60.0, horizon=10)
    assert ahead(first, before - 1, 10)[0] == pytest.approx(30, abs=3), "nobody can know"
    assert daily(before + 9) == pytest.approx(54)
    assert 30 + (54 - 30) * 2 / 3 <= ahead(fourth, 3 * 1440 + before - 1, 10)[0] <= 60


def test_a_rise_that_does_not_come_is_given_up_within_the_hour() -> None:
    loads = days_of(3) + [30.0 + 0.1 * (step % 3) for step in range(int(9.5 * 60))]  # a holiday
    series = follow(loads, step_s=60.0, horizon=10)
    assert ahead(series, len(loads) - 1, 10)[0] == pytest.approx(30, rel=0.25)


def test_four_loads_of_five_stay_below_the_bound() -> None:
    """Not those of single steps, which scatter, but the rate behind them; on the third and fourth day."""
    loads, series, below = days_of(4, noise=3), new_series([5], 60.0), []
    for step, load in enumerate(loads):
        observe(series, 0, step, load)
        if step >= 2 * 1440:
            below.append(daily(step + 5) <= forecast(series, 0, step, 5)[1])
    assert 0.75 <= np.mean(below) <= 0.97


@given(st.lists(st.one_of(st.floats(0, 1e6), st.just(float("nan"))), max_size=60), st.integers(0, 50))
def test_forecasts_are_numbers_and_never_negative(loads: list[float], steps: int) -> None:
    expected, bound = forecast(follow(loads), 0, max(len(loads) - 1, 0), steps)
    assert 0.0 <= expected <= bound < np.inf


def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "policy.py"
    spec = importlib.util.spec_from_file_location("policy_benchmark", path)
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed: this would take minutes")
def test_on_a_ramp_a_forecast_halves_late_requests_and_lends_little_more_than_a_clairvoyant() -> None:
    """Ten minutes, a cold start of two; see benchmarks/policy.py, which prints more seeds."""
    script = benchmark()
    late, lent = {}, {}
    for policy in ("reactive", "forecast, first day", "clairvoyant"):
        done = script.ramps(policy, 3)
        late[policy], lent[policy] = sum(one.late for one in done), sum(one.lent_gpu_hours for one in done)
    assert late["reactive"] > 1000
    assert late["forecast, first day"] <= 0.5 * late["reactive"]
    assert lent["forecast, first day"] <= 1.2 * lent["clairvoyant"]


def fortnight(shared_data: Path) -> np.ndarray:
    """Requests a second of a production service, in 2,016 windows of ten minutes (ServeGen, m-large)."""
    rate: dict[float, float] = {}
    with tarfile.open(shared_data / "traces" / "servegen" / "language_m-large_rates.tar.gz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith("-trace.csv") else None
            for line in file.read().decode().splitlines() if file else []:
                start_s, requests_per_s = line.split(",")[:2]
                rate[float(start_s)] = rate.get(float(start_s), 0.0) + float(requests_per_s)
    return np.array([rate[start_s] for start_s in sorted(rate)])


def test_on_a_fortnight_of_production_it_is_nearer_than_the_same_time_yesterday(shared_data: Path) -> None:
    """The second week, half an hour ahead, in steps far longer than are meant to be used."""
    loads = fortnight(shared_data)
    assert len(loads) == 2016
    series, ours, yesterdays = new_series([3], 600.0, 144), [], []
    for step in range(len(loads) - 3):
        observe(series, 0, step, loads[step])
        if step >= 7 * 144:
            ours.append(abs(forecast(series, 0, step, 3)[0] - loads[step + 3]))
            yesterdays.append(abs(loads[step + 3 - 144] - loads[step + 3]))
    assert np.mean(ours) < np.mean(yesterdays), (np.mean(ours), np.mean(yesterdays), loads.mean())
