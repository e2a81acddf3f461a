"""The random fleets that the tests try, many more of them: what must always hold is asked of each.

    .venv/bin/python benchmarks/more_fleets.py [--planned N] [--lent N]

**Planned.** Small planning problems: the choice costs what trying everything finds, tenants get what they are entitled
to, and more of anything never serves less nor costs more. **Lent.** Fleets in which GPUs are lent and taken back: every
promise, after every step. The first that breaks one is named with its seed.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "policy"))
CHANGES = ("nodes", "limits", "cheaper", "faster", "guarantees")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--planned", type=int, default=1000)
    parser.add_argument("--lent", type=int, default=10_000)
    asked = parser.parse_args()
    for name, check, arguments in checks(asked.planned, asked.lent):
        began_s = time.process_time()
        check(*arguments)
        print(f"{time.process_time() - began_s:7.1f} CPU s  {name} {arguments or ''}")


def checks(planned: int, lent: int) -> Iterator[tuple[str, Any, tuple[object, ...]]]:
    milp: Any = import_module("planner.test_milp")
    milp.TRIED, milp.FLEETS = planned // 2, planned
    yield from named(milp.test_the_choice_costs_what_trying_everything_finds)
    yield from named(milp.test_entitlements_hold_with_shared_models_whether_the_fleet_is_large_enough_or_not)
    for number, what in enumerate(CHANGES):
        yield from named(milp.test_more_of_anything_never_serves_less_nor_costs_more, number, what)
    promises: Any = import_module("test_lending_promises")
    promises.FLEETS = lent
    for fails in (0.0, 0.01):
        yield from named(promises.test_every_promise_holds_at_every_step_of_random_fleets, fails)
    yield from named(promises.test_a_tenant_that_wants_what_it_deserves_gets_it_within_minimum_runtime_grace_and_load)


def named(check: Any, *arguments: object) -> Iterator[tuple[str, Any, tuple[object, ...]]]:
    yield check.__name__, check, arguments


if __name__ == "__main__":
    main()
