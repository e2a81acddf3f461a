"""Plan, rehearse and run LLM fleets on mixed GPUs with one file and one policy.

The promised API, and the nouns it exchanges::

    fleet = waterline.load_fleet(Path("fleet.toml"))
    plan = waterline.make_plan(fleet)
    rehearsal = waterline.rehearse(plan, waterline.read_trace(Path("friday.csv")))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from waterline.fleet import Fleet, load_fleet
    from waterline.outcome import Completion, Summary
    from waterline.plan import Plan, Replica, read_plan, write_plan
    from waterline.planner import make_plan
    from waterline.rehearsal import Rehearsal, rehearse
    from waterline.workload import Request, Slo, Trace, read_trace
    from waterline.workload.files import open_trace

_HOME = {
    "Completion": "outcome",
    "Fleet": "fleet",
    "Plan": "plan",
    "Rehearsal": "rehearsal",
    "Replica": "plan",
    "Request": "workload",
    "Slo": "workload",
    "Summary": "outcome",
    "Trace": "workload",
    "load_fleet": "fleet",
    "make_plan": "planner",
    "open_trace": "workload.files",
    "read_plan": "plan",
    "read_trace": "workload",
    "rehearse": "rehearsal",
    "write_plan": "plan",
}
__all__ = [
    "Completion",
    "Fleet",
    "Plan",
    "Rehearsal",
    "Replica",
    "Request",
    "Slo",
    "Summary",
    "Trace",
    "load_fleet",
    "make_plan",
    "open_trace",
    "read_plan",
    "read_trace",
    "rehearse",
    "write_plan",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, so that `import waterline` and `waterline --help` stay quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'waterline' has no attribute '{name}'")
    return getattr(import_module(f"waterline.{_HOME[name]}"), name)
