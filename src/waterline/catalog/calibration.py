"""How an engine differs from its kernels, fitted on serving runs: `measured/engines.toml`."""

from collections.abc import Mapping
from functools import cache
from importlib import resources

import msgspec

Ratios = tuple[float, float]  # measured over estimated: a tenth of the runs lies below the first, a tenth above the second


class Spread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far serving runs lay from estimates they had no part in."""

    ttft: Ratios
    tpot: Ratios


# Of estimates without any measurement near: wide, and said to be.
PHYSICS = Spread(ttft=(0.4, 4.0), tpot=(0.6, 2.5))


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: factors on the time of its kernels, what its host adds, and what a client sees on top."""

    products: float = 1.0
    experts: float = 1.0
    exchange: float = 1.0
    attention: float = 1.0
    small: float = 1.0
    step_s: float = 0.0  # of every step, whatever it does
    layer_s: float = 0.0  # of every layer: launches, gaps between kernels
    token_s: float = 0.0  # of every token of a step: scheduling, sampling, detokenising
    request_s: float = 0.0  # of every request: HTTP, tokenising, the first token's way back
    reading: float = 1.0  # how often a prompt's own reading counts in its first token: it waits for a step, and is one
    together: float = 0.0  # share of the requests of a run that start at the same moment
    gpus: tuple[str, ...] = ()  # the runs were on
    spread: Mapping[str, Spread] = {}  # by provenance
    source: str = ""

    @property
    def factors(self) -> Mapping[str, float]:
        return {name: getattr(self, name) for name in ("products", "experts", "exchange", "small")}

    def spread_of(self, provenance: str) -> Spread:
        return self.spread.get(provenance, PHYSICS)


@cache
def _calibrations() -> dict[str, Calibration]:
    text = resources.files("waterline.catalog").joinpath("measured", "engines.toml").read_bytes()
    return msgspec.toml.decode(text, type=dict[str, Calibration], strict=False)


def calibration_of(engine: str, stack: str = "cuda") -> Calibration:
    """Return the calibration of an engine on a software stack; one without any takes its kernels as they are."""
    found = _calibrations()
    return found.get(f"{engine}-{stack}") or found.get(engine) or Calibration()
