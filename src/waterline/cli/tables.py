"""What the commands draw alike: text as it is, and tables in which every cell that is shown is whole."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 130
NARROWEST = 40


def console() -> "Console":
    """Return a console that takes text literally: a name may look like markup.

    It is as wide as the terminal; without one as COLUMNS says, or `PIPED_WIDTH`.
    """
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    piped_width = max(NARROWEST, int(columns)) if columns.isdecimal() else PIPED_WIDTH
    return Console(width=None if sys.stdout.isatty() else piped_width, markup=False, emoji=False, highlight=False)


def draw(
    console: "Console",
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: int,
    spare: Sequence[str],
    last_apart: bool = False,
) -> None:
    """Draw a table; where the console is too narrow, fold its headers, then leave columns out and say which.

    Args:
        console: see `console`.
        title: a line above it.
        columns: their names.
        rows: a cell for each column.
        text_columns: how many columns, from the left, are text; the others are numbers and stand to the right.
        spare: the columns that may be left out, the least needed first.
        last_apart: draw a line above the last row.
    """
    from rich.table import Table

    shown, widths = fitting(columns, rows, spare, console.width)
    table = Table()
    for index, width in zip(shown, widths, strict=True):
        justify = "left" if index < text_columns else "right"
        table.add_column(columns[index], width=width, overflow="fold", justify=justify)  # type: ignore[arg-type] # both are
    for row in rows:
        if last_apart and row is rows[-1]:
            table.add_section()
        table.add_row(*(row[index] for index in shown))
    console.print(title, style="italic")
    console.print(table)
    left_out = [column for index, column in enumerate(columns) if index not in shown]
    if left_out:
        console.print(f"Left out to fit {console.width} columns: {', '.join(left_out)}. --json has all.", style="dim")


def fitting(
    columns: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str], room: int
) -> tuple[list[int], list[int]]:
    """Return the indices of the columns that fit, and the width of each.

    Of those that can be spared the most needed are taken first, as many as fit. When even the others are too wide, the
    widest are narrowed, and their cells fold.
    """
    from rich.cells import cell_len

    cells = [max((cell_len(row[index]) for row in rows), default=0) for index in range(len(columns))]
    widths = [max(cell_len(column), cell) for column, cell in zip(columns, cells, strict=True)]
    shown = list(range(len(columns)))
    if _drawn_width(widths) > room:
        words = [max(cell_len(word) for word in column.split()) for column in columns]
        widths = [max(word, cell) for word, cell in zip(words, cells, strict=True)]
    if _drawn_width(widths) > room:
        shown = [index for index in shown if columns[index] not in spare]
        for column in reversed(spare):
            more = sorted([*shown, columns.index(column)])
            if _drawn_width([widths[index] for index in more]) <= room:
                shown = more
    widths = [widths[index] for index in shown]
    while _drawn_width(widths) > room and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    return shown, widths


def drawn_width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Return how wide a table is with every header on one line."""
    from rich.cells import cell_len

    cells = [max((cell_len(row[index]) for row in rows), default=0) for index in range(len(columns))]
    return _drawn_width([max(cell_len(column), cell) for column, cell in zip(columns, cells, strict=True)])


def _drawn_width(widths: Sequence[int]) -> int:
    """Each cell has a blank on both sides and a line to its left; one line closes the row."""
    return sum(width + 3 for width in widths) + 1
