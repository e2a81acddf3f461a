"""Pieces of the pages: tables, legends, bars and lines, every name escaped."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template

from waterline.errors import InputError
from waterline.workload import write_whole

LONG = 32  # characters of a cell from which on it is folded


def fill(frame: str, **parts: str) -> str:
    """Return a page: a file of this folder with its places filled in, and the style that all pages share."""
    folder = resources.files("waterline.cli")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    return Template(folder.joinpath(frame).read_text(encoding="utf-8")).substitute(style=style, **parts)


def write(html: str, path: str | os.PathLike[str]) -> None:
    """Write a page, whole or not at all. Raises InputError when it cannot be written."""
    try:
        write_whole(path, html.encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}. Choose another place with --html.") from error


def for_script(data: object) -> str:
    """Return what a script reads, as JSON that cannot end the script it stands in."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: int = 1,
    bars: Sequence[str] = (),
) -> str:
    """Return a table; the first columns are text, the others numbers, and a bar closes each row where there are any."""
    head = "".join(_cell("th", text, "col", index < text_columns) for index, text in enumerate(heads))
    body = []
    for number, (first, *others) in enumerate(rows):
        cells = [_cell("th", first, "row", text_columns > 0)]
        cells += [_cell("td", text, "", index < text_columns) for index, text in enumerate(others, start=1)]
        if bars:
            cells.append(f'<td class="bar" aria-hidden="true">{bars[number]}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    wide, last = (' class="wide"', "<td></td>") if bars else ("", "")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table{wide}>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}{last}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(tag: str, text: str, scope: str, is_text: bool) -> str:  # noqa: FBT001 - read at its three calls
    style = f' class="text{" long" if len(text) > LONG else ""}"' if is_text else ""
    of = f' scope="{scope}"' if scope else ""
    return f"<{tag}{style}{of}>{escape(text)}</{tag}>"


def bar(parts: Iterable[tuple[float, str]], whole: float) -> str:
    """Return a bar of coloured parts, each so much of the whole; what is left of it stays empty."""
    pieces = (
        f'<i style="width: {100 * part / whole:.2f}%; background: var({colour})"></i>'
        for part, colour in parts
        if part > 0
    )
    return f"<span>{''.join(pieces) if whole > 0 else ''}</span>"


def points(corners: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)


def legend(order: Iterable[str], colours: Mapping[str, str], said: Mapping[str, str]) -> str:
    entries = (f'<li><i style="background: var({colours[who]})"></i>{escape(said.get(who, who))}</li>' for who in order)
    return f'<ul class="legend">{"".join(entries)}</ul>'


def count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")
