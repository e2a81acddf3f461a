"""From fractions of replicas to whole ones: a good choice at once, where the solver's own search takes seconds.

A large fleet has hundreds of replicas of an option, so what rounding costs is a small part of the whole; how small is
known, because the program without integers bounds the cost from below.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np

from waterline.planner.problem import SLACK, Counts, Figures, Problem

Move = tuple[int, ...]  # options of which to start one replica each


def rounded(problem: Problem, fractions: Figures, odd: float) -> Counts | None:
    """Return [option, hour] replicas near to fractions of them that serve all that is asked; None where that fails.

    What would be one of a kind in its model counts as `odd` times as dear: every layout more is one more to look after.
    """
    replicas = np.floor(fractions + SLACK).astype(np.int64)
    wanted = set(np.flatnonzero(fractions.max(axis=1, initial=0.0) > SLACK).tolist())
    models = [_Sides(problem, model, wanted, odd) for model in range(problem.models)]
    for hour in range(len(problem.hours)):
        counts, rates = replicas[:, hour].tolist(), problem.rates[:, hour].tolist()
        free = _Free(problem, counts)
        asked = problem.total[:, hour] * (1 - SLACK)
        missing = [asked[model] - sides.capacity(counts, rates) for model, sides in enumerate(models)]
        for model in sorted(range(problem.models), key=lambda model: -missing[model]):
            if not _filled(problem, models[model], counts, rates, free, asked[model]):
                return None
            _trim(problem, models[model], counts, rates, asked[model])
        replicas[:, hour] = counts
    return replicas


class _Sides:
    """The options of one model, by what they do."""

    def __init__(self, problem: Problem, model: int, wanted: set[int], odd: float) -> None:
        self.both = problem.of_model(model, "both")
        self.pairs = problem.pairs(model)
        moves: list[Move] = [(option,) for option in self.both]
        for reads, writes in self.pairs:
            moves += [(option,) for option in (*reads, *writes)] + list(product(reads, writes))
        self.moves = [(move, 1.0) for move in moves if wanted.issuperset(move)]
        self.moves += [(move, odd) for move in moves if len(move) == 1 and not wanted.issuperset(move)]
        self.other_moves = [(move, 1.0) for move in moves if len(move) > 1 and not wanted.issuperset(move)]

    def capacity(self, counts: Sequence[int], rates: Sequence[float]) -> float:
        """Return the requests per second that replicas sustain."""
        whole = sum(rates[option] * counts[option] for option in self.both)
        return whole + sum(
            min(sum(rates[option] * counts[option] for option in side) for side in pair) for pair in self.pairs
        )


class _Free:
    """The slots of each pool that are not taken at one hour."""

    def __init__(self, problem: Problem, counts: Sequence[int]) -> None:
        self.problem = problem
        self.slots = [problem.slots(pool) for pool in range(len(problem.pools))]
        for option, count in enumerate(counts):
            self.take((option,), count)

    def take(self, move: Move, times: int = 1) -> None:
        for option in move:
            slots = self.slots[self.problem.options[option].pool]
            for size in slots if times else ():
                slots[size] -= times * self.problem.options[option].slots(size)

    def holds(self, move: Move) -> bool:
        self.take(move)
        fits = all(free >= 0 for option in move for free in self.slots[self.problem.options[option].pool].values())
        self.take(move, -1)
        return fits


def _filled(problem: Problem, sides: _Sides, counts: list[int], rates: list[float], free: _Free, asked: float) -> bool:
    """Start replicas, what gives most for its cost first, until a model is served; return whether that worked."""
    served = sides.capacity(counts, rates)
    while served < asked:
        best = None
        for moves in (sides.moves, sides.other_moves):
            best = best or _best_move(problem, sides, moves, counts, rates, free, served, asked)
        if best is None:
            return False
        _add(counts, best[0], 1)
        free.take(best[0])
        served = best[1]
    return True


def _best_move(
    problem: Problem,
    sides: _Sides,
    moves: Sequence[tuple[Move, float]],
    counts: list[int],
    rates: list[float],
    free: _Free,
    served: float,
    asked: float,
) -> tuple[Move, float] | None:
    """Return what serves most of what is missing for its cost, and the rate it comes to."""
    best: tuple[float, Move, float] | None = None
    for move, dearer in moves:
        _add(counts, move, 1)
        reached = sides.capacity(counts, rates)
        _add(counts, move, -1)
        cost = dearer * sum(problem.options[option].cost for option in move)
        gain = min(reached, asked) - served
        if gain > 0 and (best is None or cost / gain < best[0]) and free.holds(move):
            best = (cost / gain, move, reached)
    return best and best[1:]


def _trim(problem: Problem, sides: _Sides, counts: list[int], rates: list[float], asked: float) -> None:
    """Stop what a model can do without, the dearest first."""
    options = {option for move, _ in (*sides.moves, *sides.other_moves) for option in move if counts[option]}
    for option in sorted(options, key=lambda option: -problem.options[option].cost):
        while counts[option] > 0:
            counts[option] -= 1
            if sides.capacity(counts, rates) < asked:
                counts[option] += 1
                break


def _add(counts: list[int], move: Move, times: int) -> None:
    for option in move:
        counts[option] += times
