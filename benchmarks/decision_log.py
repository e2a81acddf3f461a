"""What the live decision log costs the gateway's desk: CPU microseconds a request, read by nobody, and by somebody.

    .venv/bin/python benchmarks/decision_log.py [REQUESTS]

Requests of four clients go through the desk of so many replicas of eight slots, which are always full and as many wait:
each arrives, waits for its turn, gets its first token and ends. The best of five runs each. In all, a request takes the
gateway some 400 microseconds (`benchmarks/gateway.py`: 2,500 a second and core).
"""

import random
import sys
import time
from collections import deque
from pathlib import Path

from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from waterline.fleet import load_fleet
from waterline.plan import Plan
from waterline.planner import make_plan
from waterline.service.dispatcher import Dispatcher
from waterline.service.lines import Ticket

FLEET = Path(__file__).parent.parent / "examples" / "box.toml"
RUNS, SLOTS, REPLICAS, CLIENTS = 5, 8, (2, 8, 64), 4


def full_desk(plan: Plan, replicas: int, *, read: bool) -> Dispatcher:
    """Return the desk of replicas that are ready, and read what it decides, if that is wanted."""
    (one, *_), dice = plan.replicas, random.Random(1)
    many = tuple(replace(one, id=f"{one.model}/{number}", max_batch=SLOTS) for number in range(replicas))
    desk = Dispatcher(replace(plan, replicas=many), lambda: dice.getrandbits(62))
    if read:
        desk.log.tell(deque[bytes](maxlen=1000).append, 0.0)
    for replica in many:
        desk.set_ready(replica.id, ready=True, now_s=0.0)
    return desk


def cpu_s(plan: Plan, replicas: int, requests: int, *, read: bool) -> float:
    """Return the CPU seconds of a request."""
    desk, here = full_desk(plan, replicas, read=read), deque[Ticket]()
    model, tenant, most = plan.models[0].model, plan.fleet.tenants[0].name, 2 * replicas * SLOTS
    begun_s = 0.0
    for number in range(most + requests):
        if number == most:
            begun_s = time.process_time()
        line, now_s = str(number % CLIENTS), number / 100
        ticket = desk.enter(model, 200, 100, lambda _: None, now_s, tenant=tenant, line=line, wait_s=1e6, id_="x" * 32)
        assert isinstance(ticket, Ticket), "nobody is refused who has so much time"
        here.append(ticket)
        if len(here) > most:
            goes = here.popleft()
            desk.first_token(goes)
            desk.leave(goes, now_s)
    return (time.process_time() - begun_s) / requests


def main() -> None:
    requests, plan = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000, make_plan(load_fleet(FLEET))
    table = Table("replicas", "read by nobody, us", "read, us", "more")
    for replicas in REPLICAS:
        unread, read = (
            1e6 * min(cpu_s(plan, replicas, requests, read=read) for _ in range(RUNS)) for read in (False, True)
        )
        table.add_row(str(replicas), f"{unread:.1f}", f"{read:.1f}", f"{read - unread:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
