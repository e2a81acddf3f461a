"""From a fleet to a plan, and from a question to its answer: sizing, fits, purchases.

`make_plan` is imported when it is asked for: whoever sizes a model needs no solver.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from waterline.planner.making import make_plan

__all__ = ["make_plan"]


def __getattr__(name: str) -> Any:  # of a module: whatever it holds
    if name == "make_plan":
        from waterline.planner.making import make_plan  # noqa: PLC0415 - see above

        return make_plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
