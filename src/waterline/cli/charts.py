"""Charts of a rehearsal as SVG: stacked areas and lines over time, shares of requests, a heat map; nothing runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from waterline.cli.day import gpus_text
from waterline.cli.markup import points
from waterline.units import DAY_S, HOUR_S

Reals = NDArray[np.float64]

WIDTH, HEIGHT = 760, 260  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 60, 12, 12, 26  # margins
ACROSS, DOWN = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
MOST_COLUMNS = 240  # of a chart over time
TICKS_S = (
    1,
    2,
    5,
    10,
    15,
    30,
    60,
    120,
    300,
    600,
    900,
    1800,
    HOUR_S,
    7200,
    3 * HOUR_S,
    6 * HOUR_S,
    12 * HOUR_S,
    24 * HOUR_S,
)
LEVELS = 8  # of a heat map
ROW, TALLEST_ROW, TALL = 9, 22, 240  # heights of a row, and of a map with room for taller ones


@dataclass(frozen=True, slots=True)
class Axis:
    """Time, from 0 to its end; the same for all charts of a page. It is labelled by the hour of the day."""

    end_s: float
    first_hour: int = 0

    def x(self, at_s: float) -> float:
        return LEFT + at_s / self.end_s * ACROSS

    def clock(self, at_s: float, *, seconds: bool = True) -> str:
        """Say a time of the day: ``20:01``, or ``20:01:30``; of a later one ``day 2 20:01``."""
        days, second = divmod(int(at_s) + self.first_hour * HOUR_S, DAY_S)
        minutes = f"{second // HOUR_S:02}:{second // 60 % 60:02}"
        return (f"day {days + 1} " if days else "") + minutes + (f":{second % 60:02}" if seconds else "")

    def ticks(self, height: float) -> str:
        every_s = next((tick_s for tick_s in TICKS_S if self.end_s / tick_s <= 8), math.ceil(self.end_s / 8))
        drawn = []
        for number in range(int(self.end_s // every_s) + 1):
            x = self.x(number * every_s)
            label = self.clock(number * every_s, seconds=every_s < 60)
            anchor = "start" if number == 0 else "end" if x > WIDTH - RIGHT - 10 else "middle"
            drawn.append(f'<text x="{x:.1f}" y="{height - 8:.0f}" text-anchor="{anchor}">{label}</text>')
        return "".join(drawn)


def fewer(values: Reals, most: int) -> Reals:
    """Return means of neighbouring steps, so that no more than so many are left; over the last axis."""
    steps = values.shape[-1]
    size = -(-steps // most)
    begins = np.arange(0, steps, size)
    sums: Reals = np.add.reduceat(values, begins, axis=-1)
    return sums / np.diff(begins, append=steps)


def stacked(
    title: str,
    said: str,
    axis: Axis,
    step_s: float,
    layers: Mapping[str, Reals],
    top: float,
    colours: Mapping[str, str],
    surface: str,
) -> str:
    """Draw layers from the bottom up; beneath the layer `surface` a line is drawn."""
    floor = np.zeros(len(next(iter(layers.values()))))
    drawn, line = [_grid(top, gpus_text)], ""
    for who, values in layers.items():
        ceiling = floor + values
        outline = [*_steps(axis, step_s, ceiling, top), *reversed(_steps(axis, step_s, floor, top))]
        drawn.append(f'<polygon points="{points(outline)}" style="fill: var({colours[who]})"/>')
        if who == surface:
            line = f'<polyline class="surface" points="{points(_steps(axis, step_s, floor, top))}"/>'
        floor = ceiling
    return _svg(title, said, HEIGHT, "".join(drawn) + line + axis.ticks(HEIGHT) + _marker(HEIGHT))


def lines(
    title: str, said: str, axis: Axis, step_s: float, rows: Mapping[str, Reals], top: float, colours: Mapping[str, str]
) -> str:
    """Draw a line each, up to `top`."""
    drawn = [_grid(top, lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}")]
    for who, values in rows.items():
        corners = points(_steps(axis, step_s, values, top))
        drawn.append(f'<polyline class="line" points="{corners}" style="stroke: var({colours[who]})"/>')
    return _svg(title, said, HEIGHT, "".join(drawn) + axis.ticks(HEIGHT) + _marker(HEIGHT))


def shares(
    title: str,
    said: str,
    rows: Mapping[str, Sequence[tuple[float, float]]],
    colours: Mapping[str, str],
    span: tuple[float, float],
) -> str:
    """Draw which share of requests took no longer than a time, on a logarithmic axis from one time to another."""
    low, high = (math.log10(max(time_s, 1e-6)) for time_s in span)
    high = max(high, low + 0.5)

    def x(time_s: float) -> float:
        return LEFT + (math.log10(max(time_s, 1e-6)) - low) / (high - low) * ACROSS

    drawn = [_grid(1.0, lambda value: f"{value:.0%}")]
    for power in range(math.ceil(low), math.floor(high) + 1):
        at = x(10.0**power)
        drawn.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        drawn.append(f'<text x="{at:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_time_text(power)}</text>')
    for who, steps in rows.items():
        few = [*steps[:: -(-len(steps) // MOST_COLUMNS)], steps[-1]]
        corners, before = [], 0.0
        for time_s, share in few:
            at = min(max(x(time_s), LEFT), WIDTH - RIGHT)
            corners += [(at, _y(before, 1.0)), (at, _y(share, 1.0))]
            before = share
        drawn.append(f'<polyline class="line" points="{points(corners)}" style="stroke: var({colours[who]})"/>')
    return _svg(title, said, HEIGHT, "".join(drawn))


def heat(title: str, said: str, axis: Axis, step_s: float, labels: Sequence[str], present: Reals, busy: Reals) -> str:
    """Draw a row a replica, or a few together: the darker, the more it computed; nothing while it was away."""
    height = max(ROW, min(TALLEST_ROW, TALL // max(1, len(labels))))
    bottom = TOP + height * len(labels)
    level = np.where(present > 0.01, np.ceil(np.clip(busy, 0.0, 1.0) * LEVELS), -1).astype(int)
    drawn, cells = [], [""] * (LEVELS + 1)
    for row, label in enumerate(labels):
        y = TOP + height * row
        if label:
            x, below = LEFT - 6, y + height / 2 + 3
            drawn.append(f'<text x="{x}" y="{below:g}" text-anchor="end" class="small">{escape(label)}</text>')
        ends = [0, *(np.flatnonzero(np.diff(level[row])) + 1).tolist(), level.shape[1]]
        for begin, end in pairwise(ends):
            if level[row, begin] >= 0:
                left, right = axis.x(begin * step_s), axis.x(min(end * step_s, axis.end_s))
                width = max(0.1, right - left)
                cells[level[row, begin]] += f"M{left:.1f} {y}h{width:.1f}v{height - 1}h-{width:.1f}z"
    drawn += [f'<path class="h{number}" d="{path}"/>' for number, path in enumerate(cells) if path]
    whole = bottom + BOTTOM
    return _svg(title, said, whole, "".join(drawn) + axis.ticks(whole) + _marker(whole))


def nice(value: float) -> float:
    """Return a round number that is no smaller; 1 for nothing."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10, 20) if step * power >= value)


def _svg(title: str, said: str, height: float, drawn: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(f"{title}. {said}")}">'
        f"<title>{escape(title)}</title><desc>{escape(said)}</desc>{drawn}</svg>"
    )


def _marker(height: float) -> str:
    return f'<line class="marker" visibility="hidden" x1="0" x2="0" y1="{TOP}" y2="{height - BOTTOM}"/>'


def _grid(top: float, text: Callable[[float], str]) -> str:
    drawn = []
    for part in range(5):
        value = top * part / 4
        y = _y(value, top)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text(value))}</text>')
    return "".join(drawn)


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - value / top * DOWN


def _steps(axis: Axis, step_s: float, values: Reals, top: float) -> list[tuple[float, float]]:
    """Return the corners of a line that stays level through each step."""
    return [
        (axis.x(min((index + end) * step_s, axis.end_s)), _y(float(value), top))
        for index, value in enumerate(values)
        for end in (0, 1)
    ]


def _time_text(power: int) -> str:
    return {-6: "1 us", -5: "10 us", -4: "0.1 ms", -3: "1 ms", -2: "10 ms", -1: "0.1 s"}.get(
        power, f"{10 ** max(0, power):,} s"
    )
