"""Numbers and times out of the bytes of many fields at once.

A field is where it begins and where it ends in an array of bytes. Each function returns the values and which of the
fields it could read; those it could not are wrong, or written in a way that is rare, and are left to whoever reads one
field at a time.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from waterline.units import GIGA

MOST_DIGITS = 18  # of a number that surely fits 64 bits
COUNT_DIGITS = 9  # of a number of tokens
SHORTEST_TIME, LONGEST_FRACTION = 19, 9  # 2023-11-16 18:17:03, and nanoseconds
MINUTE_NS, HOUR_NS, DAY_NS = 60 * GIGA, 3600 * GIGA, 86_400 * GIGA

Bytes = NDArray[np.uint8]
Longs = NDArray[np.int64]
Flags = NDArray[np.bool_]
ZERO, MINUS, PLUS, DOT, COLON, BLANK, LETTER_T, LETTER_Z = (np.uint8(ord(one)) for one in "0-+.: TZ")


@dataclass(frozen=True, slots=True)
class Fields:
    """Fields of a text, one entry of each array a field."""

    text: Bytes  # padded, so that a look behind the end of a field is none beyond the text
    begin: Longs
    end: Longs

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def length(self) -> Longs:
        return self.end - self.begin

    def at(self, place: int) -> Bytes:
        """Return the byte at a place of each field; of whatever follows where the field is shorter."""
        return self.text[self.begin + place]

    def string(self, number: int) -> str:
        """Return one field as text, without blanks around it."""
        return self.text[self.begin[number] : self.end[number]].tobytes().decode(errors="replace").strip()


def counts(fields: Fields) -> tuple[Longs, Flags]:
    """Read whole numbers of at most nine digits."""
    length = fields.length
    known = (length > 0) & (length <= COUNT_DIGITS)
    value = np.zeros(len(fields), np.int64)
    for place in range(int(length[known].max(initial=0))):
        inside = place < length
        digit = fields.at(place) - ZERO  # of a byte below '0' it wraps, and is large
        known &= (digit < 10) | ~inside
        value = np.where(inside, value * 10 + digit, value)
    return value, known


def decimals(fields: Fields, unit_ns: int) -> tuple[Longs, Flags]:
    """Read numbers like ``12.75``, exactly, into nanoseconds; `unit_ns` is what 1 stands for, a power of ten."""
    length = fields.length
    known = (length > 0) & (length <= MOST_DIGITS)
    value = np.zeros(len(fields), np.int64)
    dots, behind_dot = np.zeros(len(fields), np.int64), np.zeros(len(fields), np.int64)
    for place in range(int(length[known].max(initial=0))):
        byte = fields.at(place)
        digit, inside, dot = byte - ZERO, place < length, byte == DOT
        known &= (digit < 10) | dot | ~inside
        is_digit = inside & (digit < 10)
        value = np.where(is_digit, value * 10 + digit, value)
        behind_dot += is_digit & (dots > 0)
        dots += inside & dot
    known &= (dots <= 1) & (length > dots)
    unit_digits = len(str(unit_ns)) - 1
    known &= behind_dot <= unit_digits
    factor = 10 ** np.where(known, unit_digits - behind_dot, 0)
    known &= value < np.iinfo(np.int64).max // factor
    return np.where(known, value * factor, 0), known


def timestamps(fields: Fields) -> tuple[Longs, Flags]:
    """Read times like ``2023-11-16 18:17:03.9799600`` into nanoseconds since 1970.

    A ``T`` may part day and time; ``Z`` or an offset like ``+02:00`` may follow, and is taken off.
    """
    length = fields.length.copy()
    known = length >= SHORTEST_TIME
    last = fields.text[np.maximum(fields.end - 1, 0)]
    length -= known & (last == LETTER_Z)
    offset_ns = _offset_ns(fields, length)
    known &= (length == SHORTEST_TIME) | (
        (length > SHORTEST_TIME + 1)
        & (length <= SHORTEST_TIME + 1 + LONGEST_FRACTION)
        & (fields.at(SHORTEST_TIME) == DOT)
    )
    for place, marks in ((4, (MINUS,)), (7, (MINUS,)), (10, (BLANK, LETTER_T)), (13, (COLON,)), (16, (COLON,))):
        byte = fields.at(place)
        known &= (byte == marks[0]) | (byte == marks[-1])
    year, month, day, hour, minute, second = (
        _number(fields, begin, digits, known) for begin, digits in ((0, 4), (5, 2), (8, 2), (11, 2), (14, 2), (17, 2))
    )
    fraction_ns = np.zeros(len(fields), np.int64)
    for place in range(LONGEST_FRACTION):
        at = SHORTEST_TIME + 1 + place
        inside = at < length
        digit = fields.at(at) - ZERO
        known &= (digit < 10) | ~inside
        fraction_ns = fraction_ns * 10 + np.where(inside, digit, 0)
    known &= (month >= 1) & (month <= 12) & (day >= 1) & (hour < 24) & (minute < 60) & (second < 60)
    known &= (year >= 1678) & (year < 2262)  # what 64 bits of nanoseconds hold
    months = np.where(known, (year - 1970) * 12 + month - 1, 0).astype("datetime64[M]")
    first_day = months.astype("datetime64[D]").astype(np.int64)
    known &= day <= (months + 1).astype("datetime64[D]").astype(np.int64) - first_day
    time_ns = (hour * 3600 + minute * 60 + second) * GIGA + fraction_ns - offset_ns
    return np.where(known, (first_day + day - 1) * DAY_NS + time_ns, 0), known


def _number(fields: Fields, begin: int, digits: int, known: Flags) -> Longs:
    value = np.zeros(len(fields), np.int64)
    for place in range(begin, begin + digits):
        digit = fields.at(place) - ZERO
        known &= digit < 10
        value = value * 10 + digit
    return value


def _offset_ns(fields: Fields, length: Longs) -> Longs:
    """Return the offset from UTC that stands at the end, and take it off the length; 0 where there is none."""
    offset_ns = np.zeros(len(fields), np.int64)
    sign = fields.text[np.maximum(fields.end - 6, 0)]
    there = np.flatnonzero(
        (length >= SHORTEST_TIME + 6) & ((sign == PLUS) | (sign == MINUS)) & (fields.text[fields.end - 3] == COLON)
    )
    if not len(there):
        return offset_ns
    own = Fields(fields.text, fields.end[there] - 6, fields.end[there])
    known = np.ones(len(there), np.bool_)
    minutes = _number(own, 1, 2, known) * 60 + _number(own, 4, 2, known)
    length[there[known]] -= 6
    offset_ns[there[known]] = (np.where(own.at(0) == PLUS, minutes, -minutes) * MINUTE_NS)[known]
    return offset_ns
