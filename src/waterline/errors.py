"""Everything a person can cause.

The tree, with the exit code the command line gives it and the HTTP status the gateway gives it::

    WaterlineError                       1   500
    ├── InputError                       2   400   a file, a key, a value is wrong
    │   ├── FleetFileError               2   400   … in a fleet file
    │   ├── ModelFormatError             2   400   … in a config.json or a GGUF file
    │   ├── TraceError                   2   400   … in a trace
    │   ├── PlanFileError                2   400   … in a plan.json
    │   └── UnknownNameError             2   404   no such GPU, model, pool, tenant; nearest names offered
    ├── InfeasibleError                  3   400   well-formed, but it cannot be done with these GPUs
    ├── MissingExtraError                4   500   an optional part is not installed; says the pip line
    ├── EngineError                      5   502   an engine did not start, died or talked nonsense
    ├── PortInUseError                   6   500   somebody else listens there
    ├── LedgerError                      7   503   the ledger cannot be read or written
    └── QuotaError                       8   429   a key has spent what it may

A message says what is wrong, where, with the numbers, and what to do next. Anything else that escapes is our bug and
shows its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class WaterlineError(Exception):
    """Root of the tree; never raised itself."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500


class InputError(WaterlineError):
    exit_code = 2
    http_status = 400


class FleetFileError(InputError):
    pass


class ModelFormatError(InputError):
    pass


class TraceError(InputError):
    pass


class PlanFileError(InputError):
    pass


class UnknownNameError(InputError):
    http_status = 404


class InfeasibleError(WaterlineError):
    exit_code = 3
    http_status = 400


class MissingExtraError(WaterlineError):
    """An optional dependency is absent; `extra` is the name to put between the brackets."""

    exit_code = 4

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional part. Install it with: pip install 'waterline-llm[{extra}]'")


class EngineError(WaterlineError):
    exit_code = 5
    http_status = 502


class PortInUseError(WaterlineError):
    exit_code = 6


class LedgerError(WaterlineError):
    exit_code = 7
    http_status = 503


class QuotaError(WaterlineError):
    """A key has no room for a request; `retry_after_s` says when it will have, None when it takes a person."""

    exit_code = 8
    http_status = 429

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that offers the nearest known names, or a few of them when none is near."""
    names = sorted(set(known))
    close = get_close_matches(name.lower(), [known_name.lower() for known_name in names], n=3, cutoff=0.5)
    offered = [known_name for known_name in names if known_name.lower() in close] or names[:8]
    return (
        "Did you mean " + " or ".join(f"'{offer}'" for offer in offered) + "?"
        if close
        else ("Known: " + ", ".join(offered) + (", …" if len(names) > len(offered) else "") + ".")
    )
