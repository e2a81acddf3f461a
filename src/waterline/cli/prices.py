"""Prices that are given on the command line."""

import math
from collections.abc import Sequence

from waterline import catalog
from waterline.errors import InputError


def read_prices(texts: Sequence[str]) -> dict[str, float]:
    """Read CARD=USD, each of an hour; return them by the id of the card."""
    found = {}
    for text in texts:
        name, _, amount = text.partition("=")
        try:
            usd = float(amount)
        except ValueError:
            usd = math.nan
        if not 0 <= usd < math.inf:
            raise InputError(f"--price {text[:60]} should be a card and dollars an hour, as --price h100-sxm-80g=2.5.")
        found[catalog.find_gpu(name).id] = usd
    return found
