"""The load a few minutes ahead, with a bound: what there will be when a replica that starts now is ready.

Two opinions are kept of every series (the load of one model by one tenant, in any unit):

- *Momentum*: level and damped trend (Holt; Gardner and McKenzie 1985) of the load itself. The gains grow while
  residuals keep their sign (Trigg and Leach 1967), so that scatter is smoothed and a turn is followed.
- *Habit*: the same of the load relative to this time of day on earlier days, from the second day on.

They are weighed by how wrong they were one horizon ahead, in the last half day or so: by the inverse square of the mean
squared error. So a ramp that comes every day is foreseen, one that does not come (a holiday) costs a while of error,
and an unknown one is followed by its trend.

Nothing is learnt from a spike of one step: the value of a step counts once the next is known, as the median of the
three. What lies more than four times the usual residual away then has been so for two steps: that is a *jump*, and the
level goes there at once. What is usual and the trend learn from it as if it were those four times. A step without a
value (NaN, or never told) changes nothing but the time.

The bound is the quantile `COVERED` of the errors of the forecast itself, one horizon ahead: it widens a little whenever
the load exceeds it and narrows a little when not, so it holds whatever the errors look like. The load that counts there
is the smoothed one: how requests scatter within a few seconds is the business of queues, not of the number of replicas.

Steps are numbered by the caller's clock: step n covers `step_s` seconds from n * step_s, and a day begins at step 0.
Choose steps of about a tenth of the cold start, 10 to 60 s.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterline.policy.jit import jit

DAY_S = 86_400.0
COVERED = 0.8  # of the loads lie below the bound
LEAST_GAIN = 0.1  # of the level, a step, while the load scatters about it
MOST_GAIN = 0.9  # while it runs away from it
TREND_GAIN = 0.3  # of the trend, times the square of the level's
RESIDUAL_GAIN = 0.17
DAMPING = 0.97  # of the trend, a step
HABIT_GAIN = 0.3  # of one more day, at least
ERROR_GAIN = 0.02  # of one more error, in the bound
JUDGED_S = DAY_S / 2  # for which opinions are remembered to have been wrong
LARGEST_RESIDUAL = 4.0  # in usual ones
FIRST_USUAL = 0.25  # of the load, while no residual is known
LEAST_RELATIVE = 0.02  # of the mean load: what counts as usual at least, and as a quiet hour at most
TINY = 1e-12
QUIETEST = 1e-9  # load of a time of day, so that something can be relative to it
NEVER = -1
MOMENTUM, HABIT = 0, 1


class Series(NamedTuple):
    """What is remembered of every series. The first index is always the series."""

    step_s: NDArray[np.float64]  # [1]
    horizon: NDArray[np.int64]  # [series] steps ahead for which errors are kept: the cold start
    typical: NDArray[np.float64]  # [series, time of day] load on earlier days
    days: NDArray[np.int64]  # [series, time of day] of which that is the mean
    filling: NDArray[np.float64]  # [series, 2] sum and number of the loads since this time of day began
    last_step: NDArray[np.int64]  # [series, 2] the steps observed last, older first
    last_load: NDArray[np.float64]  # [series, 2]
    step: NDArray[np.int64]  # [series] up to which the fields below know the load; NEVER at first
    mean: NDArray[np.float64]  # [series] load, over hours
    level: NDArray[np.float64]  # [series, opinion]
    trend: NDArray[np.float64]  # [series, opinion] a step
    usual: NDArray[np.float64]  # [series, opinion] absolute residual
    drift: NDArray[np.float64]  # [series, opinion] residual: near the absolute one while the load runs away
    square: NDArray[np.float64]  # [series, opinion] of the error one horizon ahead; 0: none known
    foreseen: NDArray[np.float64]  # [series, opinion or both, step modulo] what was said about that step; NaN: nothing
    error: NDArray[np.float64]  # [series, 2] mean absolute error of both together, and the bound above it


def new_series(horizon_steps: NDArray[np.int64], step_s: float, times_of_day: int = 288) -> Series:
    """Return series of which nothing is known.

    Args:
        horizon_steps: [series] the cold start in steps, at least 1.
        step_s: length of a step.
        times_of_day: into which a day is cut.
    """
    horizon = np.maximum(np.array(horizon_steps, np.int64), 1)
    series = len(horizon)
    return Series(
        np.array([float(step_s)]),
        horizon,
        np.zeros((series, times_of_day)),
        np.zeros((series, times_of_day), np.int64),
        np.zeros((series, 2)),
        np.full((series, 2), NEVER, np.int64),
        np.zeros((series, 2)),
        np.full(series, NEVER, np.int64),
        np.zeros(series),
        np.zeros((series, 2)),
        np.zeros((series, 2)),
        np.zeros((series, 2)),
        np.zeros((series, 2)),
        np.zeros((series, 2)),
        np.full((series, 3, int(horizon.max(initial=1)) + 2), np.nan),
        np.zeros((series, 2)),
    )


@jit
def expect_day(series: Series, one: int, hourly: NDArray[np.float64]) -> None:
    """Believe before anything has been observed that a day is like this: a load for each hour, from midnight on."""
    times = series.typical.shape[1]
    for time in range(times):
        series.typical[one, time] = hourly[time * len(hourly) // times]
        series.days[one, time] = 1


@jit
def observe(series: Series, one: int, step: int, load: float) -> None:
    """Take in the load of a step; steps in order, gaps allowed, NaN for a step nobody measured."""
    if not load >= 0.0:  # NaN too
        return
    before, earlier = series.last_step[one, 1], series.last_step[one, 0]
    median = _median(series.last_load[one, 0], series.last_load[one, 1], load)
    series.last_step[one, 0], series.last_step[one, 1] = before, step
    series.last_load[one, 0], series.last_load[one, 1] = series.last_load[one, 1], load
    if earlier != NEVER:
        _learn(series, one, before, median)


@jit
def forecast(series: Series, one: int, now_step: int, ahead_steps: int) -> tuple[float, float]:
    """Return the load so many steps from now, and the bound below which it stays four times of five.

    The bound is that of the series' horizon; for a step further ahead it is too narrow. Before three steps have been
    observed, both are what the day is believed to be like; without such a belief the load observed last, or 0.
    """
    if series.step[one] == NEVER:
        known = _known(series, one, now_step + ahead_steps)
        said = _believed(series, one, now_step + ahead_steps) if known else float(series.last_load[one, 1])
        return said, said
    expected = _both(series, one, now_step + ahead_steps)
    return expected, expected + series.error[one, 1]


@jit
def needs(series: Series, one: int, now_step: int) -> tuple[float, float]:
    """Return what `lending.Services` asks for: the load expected one horizon ahead, and the most from now until then.

    Without the bound: replicas are planned with room for requests that scatter, and whoever starts on the bound pays
    for each surprise for as long as `lending.STABLE_S`. Where no request above the forecast may be late, start on it.
    """
    wanted = forecast(series, one, now_step, series.horizon[one])[0]
    kept = wanted
    for ahead in range(series.horizon[one]):
        kept = max(kept, forecast(series, one, now_step, ahead)[0])
    return wanted, kept


# --- Learning ---------------------------------------------------------------------------------------------------------


@jit
def _learn(series: Series, one: int, step: int, load: float) -> None:
    """Take in what is known for certain of a step."""
    if series.step[one] == NEVER:
        _begin(series, one, step, load)
    series.mean[one] += (load - series.mean[one]) * min(1.0, series.step_s[0] / (DAY_S / 4))
    _follow(series, one, MOMENTUM, step, load, 1.0)
    _judge(series, one, step, series.level[one, MOMENTUM])
    if _known(series, one, step):
        usual = _typical(series, one, step)
        if series.level[one, HABIT] == 0.0:
            series.level[one, HABIT] = load / usual
        _follow(series, one, HABIT, step, load / usual, usual)
    _fill_day(series, one, step, load)
    series.step[one] = step
    target = step + series.horizon[one] + 1  # what is asked now, when the step after this one has just ended
    ring = target % series.foreseen.shape[2]
    series.foreseen[one, MOMENTUM, ring] = _opinion(series, one, MOMENTUM, target)
    habit = _known(series, one, step) and _known(series, one, target)
    series.foreseen[one, HABIT, ring] = _opinion(series, one, HABIT, target) if habit else np.nan
    series.foreseen[one, 2, ring] = _both(series, one, target)


@jit
def _begin(series: Series, one: int, step: int, load: float) -> None:
    """Begin with what the day is believed to be like, else with the first load; nobody knows yet how it scatters."""
    known = _known(series, one, step)
    expected = _believed(series, one, step) if known else load
    series.mean[one] = series.level[one, MOMENTUM] = expected
    series.usual[one, MOMENTUM] = FIRST_USUAL * expected
    if known and expected > 0.0:
        series.level[one, HABIT], series.usual[one, HABIT] = 1.0, FIRST_USUAL


@jit
def _follow(series: Series, one: int, opinion: int, step: int, value: float, scale: float) -> None:
    """Move level and trend towards a value; `scale` is a unit of it in terms of load."""
    gap = step - series.step[one] if series.step[one] != NEVER else 1
    level, trend = series.level[one, opinion], series.trend[one, opinion]
    for _ in range(min(gap, 200)):
        trend *= DAMPING
    expected = level + (trend if gap == 1 else 0.0)  # nobody knows whether a trend went on in a gap
    floor = LEAST_RELATIVE * series.mean[one] / scale
    most = LARGEST_RESIDUAL * max(series.usual[one, opinion], floor)
    residual = min(max(value - expected, -most), most)
    series.usual[one, opinion] += (abs(residual) - series.usual[one, opinion]) * RESIDUAL_GAIN
    series.drift[one, opinion] += (residual - series.drift[one, opinion]) * RESIDUAL_GAIN
    away = min(abs(series.drift[one, opinion]) / max(series.usual[one, opinion], TINY), 1.0)
    gain = LEAST_GAIN + (MOST_GAIN - LEAST_GAIN) * away * away
    jumped = abs(value - expected) > most
    series.level[one, opinion] = value if jumped else max(expected + gain * residual, 0.0)
    series.trend[one, opinion] = trend + TREND_GAIN * gain * gain * residual


@jit
def _judge(series: Series, one: int, step: int, load: float) -> None:
    """Compare a step with what was said about it; forget what was said about steps that were missed."""
    size = series.foreseen.shape[2]
    for missed in range(max(series.step[one] + 1, step - size + 1), step):
        series.foreseen[one, :, missed % size] = np.nan
    said = series.foreseen[one, :, step % size]
    for opinion in range(2):
        if said[opinion] == said[opinion]:  # not NaN
            square = (load - said[opinion]) * (load - said[opinion])
            known = series.square[one, opinion]
            gain = min(1.0, series.step_s[0] / JUDGED_S)
            if known == 0.0:  # the first: no worse than the others
                known = series.square[one, MOMENTUM] if opinion == HABIT else square
            series.square[one, opinion] = known + (square - known) * gain
    if said[2] == said[2]:
        error = load - said[2]
        known = series.error[one, 0]
        series.error[one, 0] = abs(error) if known == 0.0 else known + (abs(error) - known) * ERROR_GAIN
        moved = COVERED if error > series.error[one, 1] else COVERED - 1.0
        series.error[one, 1] = max(series.error[one, 1] + 0.2 * moved * series.error[one, 0], 0.0)
    series.foreseen[one, :, step % size] = np.nan


@jit
def _fill_day(series: Series, one: int, step: int, load: float) -> None:
    """Add a load to its time of day; what was gathered of the one before becomes habit."""
    time = _time_of_day(series, step)
    before = _time_of_day(series, series.step[one]) if series.step[one] != NEVER else time
    if time != before and series.filling[one, 1] > 0.0:
        found = series.filling[one, 0] / series.filling[one, 1]
        gain = max(1.0 / (series.days[one, before] + 1), HABIT_GAIN)
        series.typical[one, before] += (found - series.typical[one, before]) * gain
        series.days[one, before] += 1
        series.filling[one, 0], series.filling[one, 1] = 0.0, 0.0
    series.filling[one, 0] += load
    series.filling[one, 1] += 1.0


# --- Opinions ---------------------------------------------------------------------------------------------------------


@jit
def _both(series: Series, one: int, step: int) -> float:
    """Return both opinions on a step, weighed by how wrong they were; habit only where there is one."""
    momentum = _opinion(series, one, MOMENTUM, step)
    if series.level[one, HABIT] == 0.0 or not (_known(series, one, series.step[one]) and _known(series, one, step)):
        return momentum
    habit = _opinion(series, one, HABIT, step)
    wrong_habit = series.square[one, HABIT] * series.square[one, HABIT]
    wrong_momentum = series.square[one, MOMENTUM] * series.square[one, MOMENTUM]
    if wrong_habit + wrong_momentum == 0.0:
        return (momentum + habit) / 2
    return float((momentum * wrong_habit + habit * wrong_momentum) / (wrong_habit + wrong_momentum))


@jit
def _opinion(series: Series, one: int, opinion: int, step: int) -> float:
    """Return what an opinion says about a step, never less than 0."""
    damped, factor = 0.0, 1.0
    for _ in range(min(step - series.step[one], 200)):
        factor *= DAMPING
        damped += factor
    value = series.level[one, opinion] + damped * series.trend[one, opinion]
    if opinion == HABIT:
        value *= _typical(series, one, step)
    return max(float(value), 0.0)


@jit
def _time_of_day(series: Series, step: int) -> int:
    times = int(series.typical.shape[1])
    return int(step * series.step_s[0] % DAY_S * times / DAY_S) % times


@jit
def _known(series: Series, one: int, step: int) -> bool:
    """Whether this time of day has been seen, and the ones beside it."""
    times = series.days.shape[1]
    time = _time_of_day(series, step)
    return bool(
        series.days[one, time] > 0 and series.days[one, (time + 1) % times] > 0 and series.days[one, time - 1] > 0
    )


@jit
def _typical(series: Series, one: int, step: int) -> float:
    """Return the usual load of a time of day, on a line between the middles of two of them; never nothing at all."""
    times = series.typical.shape[1]
    position = step * series.step_s[0] % DAY_S * times / DAY_S - 0.5
    left = int(position + 1.0) - 1  # rounds down from -1 on
    part = position - left
    usual = series.typical[one, left % times] * (1.0 - part) + series.typical[one, (left + 1) % times] * part
    return float(max(usual, LEAST_RELATIVE * series.mean[one], QUIETEST))


@jit
def _believed(series: Series, one: int, step: int) -> float:
    """Return the usual load of a time of day, which may be nothing at all: then nothing is needed."""
    usual = _typical(series, one, step)
    return float(usual) if usual > QUIETEST else 0.0


@jit
def _median(one: float, other: float, third: float) -> float:
    return max(min(one, other), min(max(one, other), third))
