"""What is to be done to traffic, as a person writes it: ``x2, shift 3h, repeat 7 every 24h, surge 10x@20:00+2h``.

Changes are made from left to right. Every mistake is answered with what to write.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from waterline.errors import TraceError, nearest
from waterline.units import DAY_S, GIGA, HOUR_S
from waterline.workload import operators
from waterline.workload.files import open_trace
from waterline.workload.operators import Label, Surge
from waterline.workload.stream import Stream

SECONDS = {"d": DAY_S, "h": HOUR_S, "m": 60, "min": 60, "s": 1, "": 1}
MOST_TIMES = 100_000
EXAMPLES = {
    "x": "x2, or x0.5",
    "shift": "shift 3h, or shift -30m",
    "repeat": "repeat 7, or repeat 7 every 24h",
    "then": "then other.csv, or then other.csv at 6h",
    "surge": "surge 10x@20:00+2h, or surge public:10x@20:00+2h",
    "cut": "cut 32768",
    "drop": "drop 32768",
    "tenant": "tenant public, tenant public=0.7 enterprise=0.3, tenant by client public=0.7 enterprise=0.3, or "
    "tenant by client acme=enterprise *=public",
    "model": "model r1, model r1=0.2 small=0.8, or model by tenant research=r1 *=small",
}

Change = Callable[[Stream, int], Stream]  # of a stream, with a seed


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to be done to a stream, in order."""

    changes: tuple[Change, ...] = ()

    def apply(self, stream: Stream, *, seed: int = 0) -> Stream:
        """Return the changed stream; each change has dice of its own."""
        for number, change in enumerate(self.changes):
            stream = change(stream, 1000 * seed + number)
        return stream


def parse_traffic(text: str, folder: Path = Path(), *, columns: str = "") -> Changes:
    """Read changes; files are looked for in `folder`, and have these columns if they are tables. Raises TraceError."""
    parts = [part.strip() for part in text.split(",")]
    if parts == [""]:
        return Changes()
    return Changes(tuple(_change(part, folder, columns) for part in parts))


def parse_surge(text: str) -> Surge:
    """Read ``10x@20:00+2h``, or with a tenant ``public:10x@20:00+2h``. Raises TraceError."""
    found = re.fullmatch(r"(?:(.+):)?(?:x([\d.]+)|([\d.]+)x)@(\d{1,2}):(\d\d)\+(\S+)", text.strip())
    factor = _number(found[2] or found[3]) if found else None
    if not found or factor is None:
        raise _wrong("surge", text, "a factor, an hour of the day and how long")
    hour, minute = int(found[4]), int(found[5])
    if hour > 23 or minute > 59:
        raise TraceError(f"'{found[4]}:{found[5]}' in the surge '{text}' is no time of the day. Write 00:00 to 23:59.")
    length_ns = _duration_ns("surge", text, found[6])
    if not 0 < length_ns <= DAY_S * GIGA:
        raise TraceError(f"the surge '{text}' lasts {found[6]}. It comes every day: write at most 24h.")
    begin_ns = (hour * HOUR_S + minute * 60) * GIGA
    return Surge(factor=factor, begin_ns=begin_ns, length_ns=length_ns, tenant=(found[1] or "").strip())


def duration_s(text: str) -> float | None:
    """Read a time like ``90``, ``90s``, ``1h30m`` or ``-2h``, in seconds; None if it is none."""
    found = re.fullmatch(r"(-?)((?:\d+(?:\.\d+)?(?:d|h|min|m|s|))+)", text.strip())
    if not found:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)(d|h|min|m|s|)", found[2])
    if len(parts) > 1 and any(not unit for _, unit in parts):
        return None
    total_s = sum(float(number) * SECONDS[unit] for number, unit in parts)
    return -total_s if found[1] else total_s


def _change(text: str, folder: Path, columns: str) -> Change:
    scaled = re.fullmatch(r"x\s*([\d.]+)|([\d.]+)\s*x", text)
    if scaled:
        factor = _number(scaled[1] or scaled[2])
        if factor is None:
            raise _wrong("x", text, "a factor from 0.001 to 1000")
        return lambda stream, seed: operators.scale(stream, factor, seed=seed)
    verb, _, rest = text.partition(" ")
    words = rest.split()
    if verb in {"tenant", "model"}:
        return _names(verb, text, words)  # type: ignore[arg-type]  # it is one of the two
    if verb == "then":
        return _then(text, words, folder, columns)
    if not text:
        raise TraceError(f"there is nothing between two commas. Write changes like {EXAMPLES['x']}.")
    if verb not in PARSERS:
        close = get_close_matches(verb, EXAMPLES, n=1)
        raise TraceError(
            f"'{text}' changes nothing. {nearest(verb, EXAMPLES)} Write it like {EXAMPLES[close[0] if close else 'x']}."
        )
    return PARSERS[verb](text, words)


def _shift(text: str, words: list[str]) -> Change:
    if len(words) != 1:
        raise _wrong("shift", text, "one time")
    by_ns = _duration_ns("shift", text, words[0])
    return lambda stream, _: operators.shift(stream, by_ns)


def _repeat(text: str, words: list[str]) -> Change:
    if len(words) not in {1, 3} or words[1:2] not in ([], ["every"]) or not words[0].isdecimal():
        raise _wrong("repeat", text, "how often")
    times = int(words[0])
    if not 1 <= times <= MOST_TIMES:
        raise _wrong("repeat", text, f"how often, from 1 to {MOST_TIMES:,}")
    every_ns = _duration_ns("repeat", text, words[2]) if len(words) == 3 else 0
    if len(words) == 3 and every_ns <= 0:
        raise _wrong("repeat", text, "a time above 0")
    return lambda stream, _: operators.repeat(stream, times, every_ns=every_ns)


def _then(text: str, words: list[str], folder: Path, columns: str) -> Change:
    at_ns = None
    if len(words) >= 3 and words[-2] == "at":
        at_ns = _duration_ns("then", text, words[-1])
        words = words[:-2]
    if not words or (at_ns is not None and at_ns < 0):
        raise _wrong("then", text, "a trace file, and a time from 0 on if any")
    second = open_trace(folder / " ".join(words), columns=columns)
    return lambda stream, _: operators.splice(stream, second, at_ns=at_ns)


def _surge(text: str, words: list[str]) -> Change:  # noqa: ARG001 - all parsers are called alike
    surge = parse_surge(" ".join(words))
    return lambda stream, seed: operators.surge(stream, surge, seed=seed)


def _lengths(text: str, words: list[str]) -> Change:
    verb = text.split(maxsplit=1)[0]
    if len(words) != 1 or not words[0].isdecimal() or int(words[0]) < 2:
        raise _wrong(verb, text, "the tokens of a context, at least 2")
    longest_tokens = int(words[0])
    change = operators.cut if verb == "cut" else operators.drop
    return lambda stream, _: change(stream, longest_tokens)


PARSERS: dict[str, Callable[[str, list[str]], Change]] = {
    "shift": _shift,
    "repeat": _repeat,
    "surge": _surge,
    "cut": _lengths,
    "drop": _lengths,
}


def _names(label: Literal["tenant", "model"], text: str, words: list[str]) -> Change:
    """Read who a request is from: one name for all, shares, shares of clients, or names by the value of a column."""
    column: Label | None = None
    if words[:1] == ["by"]:
        if len(words) < 2 or words[1] not in {"tenant", "model", "client"}:
            raise _wrong(label, text, "'by tenant', 'by model' or 'by client'")
        column = words[1]  # type: ignore[assignment]  # it is one of the three
        words = words[2:]
    if len(words) == 1 and "=" not in words[0] and not column:
        return lambda stream, seed: operators.by_share(stream, label, {words[0]: 1.0}, seed=seed)
    rules = _rules(label, text, words)
    shares = {name: share for name, right in rules.items() if (share := _number(right)) is not None}
    if not shares and column:
        return lambda stream, _: operators.by_value(stream, label, column, rules)
    if len(shares) < len(rules) or column not in {None, "client"}:
        raise _wrong(label, text, "shares, or names 'by' a column")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise TraceError(f"the shares in '{text}' come to {sum(shares.values()):g}. Make them 1 together.")
    if column:
        return lambda stream, _: operators.by_client_share(stream, label, shares)
    return lambda stream, seed: operators.by_share(stream, label, shares, seed=seed)


def _rules(label: Label, text: str, words: list[str]) -> dict[str, str]:
    pairs = [word.rpartition("=") for word in words]
    rules = {left: right for left, _, right in pairs}
    if not pairs or len(rules) < len(pairs) or not all(rules) or not all(rules.values()):
        raise _wrong(label, text, "each name once, with something on both sides of =")
    return rules


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0.001 <= value <= 1000 else None


def _duration_ns(verb: str, text: str, word: str) -> int:
    found_s = duration_s(word)
    if found_s is None or abs(found_s) > 100_000 * DAY_S:
        raise _wrong(verb, text, f"a time like 90s, 15m, 2h or 1h30m where '{word}' is")
    return round(found_s * GIGA)


def _wrong(verb: str, text: str, expected: str) -> TraceError:
    return TraceError(f"'{text}' needs {expected}. Write it like {EXAMPLES[verb]}.")
