"""A linear program, with integers where asked for, written down in blocks of numpy and solved by HiGHS."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.int64]
Term = tuple[Indices, ArrayLike]  # columns and their coefficients, both of the shape of the rows they stand in


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the solver found."""

    values: NDArray[np.float64]  # of the columns
    objective: float
    bound: float  # no solution costs less
    duals: NDArray[np.float64]  # [row] what one more on its right side adds to the cost; of a program without integers

    @property
    def gap(self) -> float:
        """How much dearer than the best it may be, as a fraction of its cost."""
        return max(0.0, self.objective - self.bound) / max(abs(self.objective), 1e-9)


class Program:
    """Columns, rows and costs; the cost is minimised."""

    def __init__(self) -> None:
        self.columns = self.rows = 0
        self._columns: list[tuple[NDArray[np.float64], ...]] = []  # cost, lower, upper
        self._integer: list[NDArray[np.bool_]] = []
        self._bounds: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []  # of the rows
        self._entries: list[tuple[Indices, Indices, NDArray[np.float64]]] = []  # row, column, coefficient

    def add_columns(
        self,
        shape: tuple[int, ...],
        *,
        cost: ArrayLike = 0.0,
        lower: ArrayLike = 0.0,
        upper: ArrayLike = inf,
        integer: bool = False,
    ) -> Indices:
        """Add a block of columns and return their indices, in its shape."""
        size = int(np.prod(shape))
        block = np.arange(self.columns, self.columns + size).reshape(shape)
        parts = (cost, lower, upper)
        self._columns.append(tuple(np.broadcast_to(np.asarray(part, float), shape).ravel() for part in parts))
        self._integer.append(np.full(size, integer))
        self.columns += size
        return block

    def add_rows(
        self, terms: Sequence[Term], *, shape: tuple[int, ...], lower: ArrayLike = -inf, upper: ArrayLike = inf
    ) -> Indices:
        """Add a block of rows, lower <= sum of terms <= upper, and return their indices, in its shape.

        The columns of a term have the shape of the block, or further axes behind it, which are summed over.
        """
        size = int(np.prod(shape))
        block = np.arange(self.rows, self.rows + size).reshape(shape)
        for columns, coefficients in terms:
            rows = np.broadcast_to(block.reshape(shape + (1,) * (columns.ndim - block.ndim)), columns.shape)
            values = np.broadcast_to(np.asarray(coefficients, float), columns.shape)
            self._entries.append((rows.ravel(), columns.ravel(), values.ravel()))
        self._bounds.append(
            (
                np.broadcast_to(np.asarray(lower, float), shape).ravel(),
                np.broadcast_to(np.asarray(upper, float), shape).ravel(),
            )
        )
        self.rows += size
        return block

    def set_upper(self, rows: Indices, upper: float) -> None:
        """Change the upper bound of a block of rows."""
        self._bounds = [
            (lower, np.full_like(most, upper) if first == rows.flat[0] else most)
            for first, (lower, most) in zip(self._firsts(), self._bounds, strict=True)
        ]

    def _firsts(self) -> list[int]:
        firsts: list[int] = np.cumsum([0, *(len(lower) for lower, _ in self._bounds[:-1])]).tolist()
        return firsts

    def solve(
        self,
        *,
        relaxed: bool = False,
        gap: float = 0.0,
        time_limit_s: float = inf,
        most_nodes: int | None = None,
        fixed: tuple[Indices, NDArray[np.float64]] | None = None,
    ) -> Outcome | None:
        """Return the best solution found; None when there is none, or none was found in the time.

        Args:
            relaxed: leave the integers out.
            gap: stop when the cost is that near to the bound, as a fraction.
            time_limit_s: stop then, with the best found.
            most_nodes: stop after so many branches, with the best found.
            fixed: columns and the values they must have.
        """
        from highspy import _core as highspy  # noqa: PLC0415 - a tenth of a second that only planning pays

        solver: Any = highspy._Highs()  # noqa: SLF001 - highspy.Highs prints a banner when it is made
        solver.setOptionValue("output_flag", False)  # noqa: FBT003 - its signature
        solver.setOptionValue("threads", 1)  # the same plan wherever it is made
        solver.setOptionValue("mip_rel_gap", gap)
        solver.setOptionValue("mip_abs_gap", 0.0)
        if isfinite(time_limit_s):
            solver.setOptionValue("time_limit", max(0.01, time_limit_s))
        if most_nodes is not None:
            solver.setOptionValue("mip_max_nodes", most_nodes)
        model = self._model(highspy, relaxed=relaxed)
        if fixed is not None:
            lower, upper = np.array(model.col_lower_), np.array(model.col_upper_)
            lower[fixed[0]] = upper[fixed[0]] = fixed[1]
            model.col_lower_, model.col_upper_ = lower, upper
        solver.passModel(model)
        solver.run()
        if solver.getModelStatus() == highspy.HighsModelStatus.kSolveError:  # presolve loses itself in tolerances
            solver.setOptionValue("presolve", "off")
            solver.run()
        info, solution = solver.getInfo(), solver.getSolution()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None
        integers = not relaxed and any(bool(part.any()) for part in self._integer)
        optimal = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
        return Outcome(
            values=np.array(solution.col_value),
            objective=info.objective_function_value,
            bound=info.mip_dual_bound if integers else info.objective_function_value if optimal else -inf,
            duals=np.array(solution.row_dual),
        )

    def _model(self, highspy: Any, *, relaxed: bool) -> Any:
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = self.columns, self.rows
        cost, lower, upper = (np.concatenate(parts) for parts in zip(*self._columns, strict=True))
        model.col_cost_, model.col_lower_, model.col_upper_ = cost, lower, upper
        if self._bounds:
            model.row_lower_, model.row_upper_ = (np.concatenate(parts) for parts in zip(*self._bounds, strict=True))
        rows, columns, values = (
            (np.concatenate(parts) for parts in zip(*self._entries, strict=True))
            if self._entries
            else (np.empty(0, int), np.empty(0, int), np.empty(0))
        )
        order = np.argsort(rows, kind="stable")
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.searchsorted(rows[order], np.arange(self.rows + 1)).astype(np.int32)
        model.a_matrix_.index_ = columns[order].astype(np.int32)
        model.a_matrix_.value_ = values[order]
        if not relaxed:
            kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
            model.integrality_ = [kinds[flag] for flag in np.concatenate(self._integer).tolist()]
        return model
