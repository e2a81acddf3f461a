"""From fractions of replicas to whole ones: a good choice at once, where the solver's own search takes seconds.

A large fleet has hundreds of replicas of an option, so what rounding costs is a small part of the whole; how small is
known, because the program without integers bounds the cost from below.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from waterline.planner.problem import SLACK, Counts, Figures, Problem

EXACT = 5e-8  # of what is asked; less than the solver's tolerance, which looks at the result again


def rounded(problem: Problem, fractions: Figures, odd: float) -> Counts | None:
    """Return [option, hour] replicas near to fractions of them that serve all that is asked; None where that fails.

    What would be one of a kind in its model counts as `odd` times as dear: every layout more is one more to look after.
    """
    replicas = np.floor(fractions + SLACK).astype(np.int64)
    wanted = fractions.max(axis=1, initial=0.0) > SLACK
    slots, taken = problem.slot_rows
    models = [_moves(problem, model, wanted, odd) for model in range(problem.models)]
    for hour in range(len(problem.hours)):
        counts = replicas[:, hour]
        rates = np.append(problem.rates[:, hour], 0.0)
        free = slots - taken @ counts
        asked = problem.total[:, hour] * (1 - EXACT)
        missing = [asked[model] - moves.capacity(counts, rates)[2] for model, moves in enumerate(models)]
        for model in sorted(range(problem.models), key=lambda model: -missing[model]):
            if not _filled(models[model], counts, rates, free, asked[model]):
                return None
            free += taken @ _trim(problem, models[model], counts, rates, asked[model])
    return replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moves:
    """What can be started of one model: one replica, or one that reads and one that writes."""

    both: Counts  # options
    pairs: tuple[tuple[Counts, Counts], ...]  # options that read, and those that write
    options: Counts  # [move, (whole, reads, writes)]; the number after the last option is nobody, and does nothing
    pair: Counts  # [move]
    cost: Figures  # [move]; what is one of a kind counts as dearer
    slots: Counts  # [slot row, move] taken
    last_resort: NDArray[np.bool_]  # [move] to be taken where no other is left

    def capacity(self, counts: Counts, rates: Figures) -> tuple[Figures, Figures, float]:
        """Return [pair] requests per second that are read, likewise written, and those answered in all."""
        reads, writes = (
            np.array([float(rates[pair[side]] @ counts[pair[side]]) for pair in self.pairs] or [0.0]) for side in (0, 1)
        )
        return reads, writes, float(rates[self.both] @ counts[self.both] + np.minimum(reads, writes).sum())


def _moves(problem: Problem, model: int, wanted: NDArray[np.bool_], odd: float) -> _Moves:
    nobody = len(problem.options)
    both, pairs = problem.of_model(model, "both"), problem.pairs(model)
    moves = [((option, nobody, nobody), 0) for option in both]
    for index, (reads, writes) in enumerate(pairs):
        moves += [((nobody, option, nobody), index) for option in reads]
        moves += [((nobody, nobody, option), index) for option in writes]
        moves += [((nobody, *two), index) for two in product(reads, writes)]
    options = np.array([move for move, _ in moves], dtype=np.int64).reshape(-1, 3)
    known = np.append(wanted, True)[options].all(axis=1)
    single = (options == nobody).sum(axis=1) == 2
    costs = np.append([option.cost for option in problem.options], 0.0)[options].sum(axis=1)
    _, taken = problem.slot_rows
    taken = np.hstack([taken, np.zeros((len(taken), 1), dtype=np.int64)])
    return _Moves(
        both=np.array(both, dtype=np.int64),
        pairs=tuple((np.array(reads), np.array(writes)) for reads, writes in pairs),
        options=options,
        pair=np.array([pair for _, pair in moves], dtype=np.int64),
        cost=np.where(known | ~single, costs, odd * costs),
        slots=taken[:, options].sum(axis=2),
        last_resort=~known & ~single,
    )


def _filled(moves: _Moves, counts: Counts, rates: Figures, free: Counts, asked: float) -> bool:
    """Start replicas, what gives most for its cost first, until a model is served; return whether that worked."""
    whole, read, written = rates[moves.options].T
    while (now := moves.capacity(counts, rates))[2] < asked:
        reads, writes, served = now
        paired = np.minimum(reads[moves.pair] + read, writes[moves.pair] + written)
        gain = np.minimum(whole + paired - np.minimum(reads, writes)[moves.pair], asked - served)
        useful = np.flatnonzero(gain > 0)
        useful = useful[(moves.slots[:, useful] <= np.maximum(free, 0)[:, None]).all(axis=0)]
        if (usual := useful[~moves.last_resort[useful]]).size:
            useful = usual
        if not useful.size:
            return False
        best = useful[np.argmin(moves.cost[useful] / gain[useful])]
        started = moves.options[best]
        counts[started[started < len(counts)]] += 1
        free -= moves.slots[:, best]
    return True


def _trim(problem: Problem, moves: _Moves, counts: Counts, rates: Figures, asked: float) -> Counts:
    """Stop what a model can do without, the dearest first; return [option] how many were stopped."""
    stopped = np.zeros_like(counts)
    running = [option for option in np.unique(moves.options[moves.options < len(counts)]).tolist() if counts[option]]
    for option in sorted(running, key=lambda option: -problem.options[option].cost):
        while counts[option] > 0:
            counts[option] -= 1
            if moves.capacity(counts, rates)[2] < asked:
                counts[option] += 1
                break
            stopped[option] += 1
    return stopped
