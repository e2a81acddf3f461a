"""Hour to hour only what pays: the same day with no start that another walk through it spares.

A choice is made to within a gap of the whole day's cost, which leaves room for starts that cost little and bring
nothing: one layout for another that is no cheaper, a stop in a dip too short for it. Here each model walks anew through
the line-ups it has during the day, and takes the cheapest walk, starts included.

What a start costs: what starts is paid for while it loads, before the hour from which it serves. What it takes over
from serves until that hour, which is paid for already, so a handover costs nothing more.
"""

from math import inf

import numpy as np

from waterline.planner.problem import SLACK, Counts, Figures, Problem, capacity_of


def settled(problem: Problem, replicas: Counts) -> Counts:
    """Return [option, hour] replicas that serve as much, within the pools, and cost no more; one model after another.

    Of the walks through the line-ups of a model (those of its hours, and of two neighbouring hours together) the
    cheapest is found exactly, by dynamic programming over hours, midnight to midnight; other models stay as they are.
    """
    settled = replicas.copy()
    slots, taken = problem.slot_rows
    for model in range(problem.models):
        mine = np.array([i for i, option in enumerate(problem.options) if option.model == model], dtype=np.int64)
        day = settled[mine]
        if (day == day[:, :1]).all():
            continue
        together = np.maximum(day, np.roll(day, 1, axis=1))
        line_ups, own = np.unique(np.hstack([day, together]).T, axis=0, return_inverse=True)
        alone = problem.of(model)
        free = slots[:, None] - taken @ settled + taken[:, mine] @ day  # [row, hour]
        need = line_ups @ taken[:, mine].T  # [line-up, row]
        fits = (need[:, :, None] <= free[None]).all(axis=1)
        serves = np.stack(
            [capacity_of(alone, np.repeat(one[:, None], day.shape[1], axis=1))[0] for one in line_ups]
        ) >= alone.total[0] * (1 - SLACK)
        may = fits & serves
        may[own.reshape(-1)[: day.shape[1]], np.arange(day.shape[1])] = True
        running = line_ups @ np.array([option.cost for option in alone.options])
        costs = np.where(may, running[:, None] * np.array(problem.hours), inf)
        started = np.maximum(0, line_ups[None] - line_ups[:, None])  # [from, to, option]
        starts = started @ np.array([option.start_cost for option in alone.options])
        settled[mine] = line_ups[_cheapest_walk(costs, starts)].T
    return settled


def _cheapest_walk(costs: Figures, moves: Figures) -> Counts:
    """Return [hour] the state of the cheapest walk round the day: [state, hour] costs, and [from, to] of a move."""
    states, hours = costs.shape
    total = np.full((states, states), inf)  # [state of the first hour, state now]
    np.fill_diagonal(total, costs[:, 0])
    came_from = np.zeros((hours, states, states), dtype=np.int64)
    for hour in range(1, hours):
        ways = total[:, :, None] + moves[None]
        came_from[hour] = ways.argmin(axis=1)
        total = ways.min(axis=1) + costs[:, hour]
    first, last = divmod(int((total + moves.T).argmin()), states)
    walk = [last]
    for hour in range(hours - 1, 0, -1):
        walk.append(int(came_from[hour, first, walk[-1]]))
    return np.array(walk[::-1], dtype=np.int64)
