"""From the name a person types to the id of the catalogue; pure, so every rule can be tested on three entries.

A name is tried as the id, then as a whole name or alias whatever its case, spaces and dashes, then as a few words of
one entry. What fits several entries is never chosen between: the candidates are named instead.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from waterline.errors import UnknownNameError, nearest

LONGEST_LIST = 8
VARIANTS = {"ti", "super", "xt", "xtx"}  # words that make another product of a name


def find_id(what: str, name: str, names: Mapping[str, Sequence[str]], *, see: str) -> str:
    """Return the id that `name` means.

    `names` holds for each id the other names it goes by, the shortest full one last; `see` is the command that lists
    them.

    Raises:
        UnknownNameError: nothing or several entries are called so; offers the nearest names or the candidates.
    """
    candidates = find_ids(what, name, names, see=see)
    if len(candidates) == 1:
        return candidates[0]
    listed = ", ".join(candidates[:LONGEST_LIST]) + (", …" if len(candidates) > LONGEST_LIST else "")
    raise UnknownNameError(f"'{name}' could be any of these {what}s: {listed}. Write one of them; `{see}` compares.")


def find_ids(what: str, name: str, names: Mapping[str, Sequence[str]], *, see: str) -> list[str]:
    """Return every id that `name` could mean; raises UnknownNameError when there is none."""
    if name in names:
        return [name]
    if candidates := called(name, names) or _begins(name, names) or _has_words(name, names):
        return candidates
    offered = nearest(name, (others[-1] for others in names.values()))
    raise UnknownNameError(f"no {what} is called '{name[:80]}'. {offered} `{see}` lists all.")


def called(name: str, names: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the ids of which `name` is the id, the name or an alias, whatever its case, spaces and dashes."""
    wanted = _squeezed(name)
    return [id_ for id_, others in names.items() if wanted and wanted in {_squeezed(one) for one in (id_, *others)}]


def _begins(name: str, names: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the ids that begin with the name as it is typed: ``gb200`` is no ``h200`` of so many GB."""
    wanted = _squeezed(name)
    return [id_ for id_ in names if wanted in accumulate(_squeezed(part) for part in id_.split("-"))]


def _has_words(name: str, names: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the ids that have all words of the name and none that makes another product: no 5070 is a 5070 Ti."""
    words = _words(name)
    found = {id_: {word for one in (id_, *others) for word in _words(one)} for id_, others in names.items()}
    return [id_ for id_, have in found.items() if words and words <= have and not (have - words) & VARIANTS]


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def _words(name: str) -> set[str]:
    """Split where letters meet digits, so that ``4060ti`` and ``4060 Ti``, ``80g`` and ``80 GB`` are alike."""
    words = set(re.findall(r"[a-z]+|[0-9]+(?:\.[0-9]+)?", name.lower()))
    return {"g" if word in {"gb", "gib"} else word for word in words}
