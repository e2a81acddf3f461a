"""The gateway decides as the rehearsal does: shown the same events, it takes in the same requests, to the same replicas.

Here the live dispatcher, in Python, is held against the compiled desk that the rehearsal's kernel calls.
"""

import heapq
import random
from collections import defaultdict, deque
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from serving import fake_plan

from waterline.fleet import Tenant
from waterline.plan import Plan
from waterline.policy import dispatch
from waterline.policy.decisions import SLOT_FREE, WAITS_FOR_SLOT
from waterline.policy.jit import compiled
from waterline.policy.routing import MOST_DRAWN, NOBODY
from waterline.service.dispatcher import Dispatcher, Ticket

pytest.importorskip("numba", reason="the compiled desk needs numba")

TENANTS = (Tenant(name="enterprise", guarantee=0.4, deserved=0.6), Tenant(name="public", deserved=0.4, limit=0.9))
CLIENTS = (("enterprise", "a"), ("enterprise", "b"), ("public", "c"), ("public", "d"))
TTFT_S, OUTPUT_TOKENS = 0.6, 40
NO_BLOCKS = np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class Asked:
    at_s: float
    client: int
    prompt_tokens: int
    output_tokens: int


def plan_of(replicas: int) -> Plan:
    plan = fake_plan({"chat": replicas}, max_batch=4, tokens_per_s=600.0, ttft_s=TTFT_S, output_tokens=OUTPUT_TOKENS)
    return msgspec.structs.replace(plan, fleet=msgspec.structs.replace(plan.fleet, tenants=TENANTS))


class Compiled:
    """The desk as the kernel uses it: arrays, compiled calls, and lines of requests by client."""

    def __init__(self, plan: Plan, draw: random.Random) -> None:
        shares = zip(*((one.guarantee, one.deserved, one.limit) for one in TENANTS), strict=True)
        tenant_of = [[one.name for one in TENANTS].index(tenant) for tenant, _ in CLIENTS]
        self.desk = dispatch.new_desk(*shares, tenant_of, models=1, rows=len(plan.replicas))
        for row, replica in enumerate(plan.replicas):
            rates = {name: getattr(replica, name) for name in ("tokens_per_s", "prefill_tokens_per_s")}
            dispatch.put(self.desk, row, 0, gpus=1, slots=replica.max_batch, longest_tokens=512, **rates)
        dispatch.set_in_service(self.desk, range(len(plan.replicas)), serves=True)
        self.lines: dict[int, deque[int]] = defaultdict(deque)
        self.draw, self.gpu_s, self.rows = draw, dict[int, float](), dict[int, int]()

    def arrive(self, number: int, asked: Asked) -> int:
        answer = compiled(dispatch.arrive)(
            self.desk, 0, asked.client, asked.prompt_tokens, 0, OUTPUT_TOKENS,
            min(asked.prompt_tokens + OUTPUT_TOKENS, 512), TTFT_S, NO_BLOCKS, self.draw.randrange(MOST_DRAWN),
        )  # fmt: skip
        self.gpu_s[number] = answer.gpu_s
        if answer.rule == SLOT_FREE:
            self.rows[number] = answer.replica
        elif answer.rule == WAITS_FOR_SLOT:
            self.lines[asked.client].append(number)
        return int(answer.rule)

    def end(self, number: int, asked: Asked) -> None:
        difference_gpu_s = (asked.prompt_tokens + asked.output_tokens) / 600.0 - self.gpu_s[number]
        row = self.rows[number]
        compiled(dispatch.ended)(self.desk, 0, row, asked.client, OUTPUT_TOKENS, difference_gpu_s)

    def start(self, requests: list[Asked]) -> None:
        while (client := compiled(dispatch.next_turn)(self.desk, 0)[0]) != NOBODY:
            number = self.lines[client][0]
            asked = requests[number]
            row, _, _ = compiled(dispatch.start)(
                self.desk, 0, client, asked.prompt_tokens, 0, OUTPUT_TOKENS,
                min(asked.prompt_tokens + OUTPUT_TOKENS, 512), self.gpu_s[number], NO_BLOCKS,
                self.draw.randrange(MOST_DRAWN),
            )  # fmt: skip
            if row == NOBODY:
                return
            self.rows[self.lines[client].popleft()] = row


@pytest.mark.parametrize("replicas", [3, 12])
def test_a_trace_is_dealt_alike_by_the_gateway_and_by_the_compiled_desk(replicas: int) -> None:
    dice, plan = random.Random(7), plan_of(replicas)
    requests, at_s = [], 0.0
    for _ in range(600):
        at_s += dice.expovariate(20 * replicas)
        requests.append(
            Asked(
                at_s=at_s,
                client=dice.choice([0, 1, 2, 3, 3, 3, 3]),
                prompt_tokens=dice.randint(1, 200),
                output_tokens=dice.randint(1, 120),
            )
        )
    draws = random.Random(3), random.Random(3)
    live = Dispatcher(plan, lambda: draws[0].randrange(MOST_DRAWN))
    desk = Compiled(plan, draws[1])
    for replica in plan.replicas:
        live.set_ready(replica.id, ready=True, now_s=0.0)
    tickets: dict[int, Ticket] = {}
    begun: list[tuple[int, int]] = []
    events = [(asked.at_s, "arrive", number) for number, asked in enumerate(requests)]
    heapq.heapify(events)
    while events:
        now_s, event, number = heapq.heappop(events)
        asked = requests[number]
        before = len(begun)
        if event == "arrive":
            tenant, line = CLIENTS[asked.client]
            entered = live.enter(
                "chat", asked.prompt_tokens, None, lambda _go, one=number: begun.append((one, -1)), now_s,
                tenant=tenant, line=line,
            )  # fmt: skip
            rule = desk.arrive(number, asked)
            assert isinstance(entered, Ticket) == (rule in {SLOT_FREE, WAITS_FOR_SLOT})
            if isinstance(entered, Ticket):
                tickets[number] = entered
                if rule == WAITS_FOR_SLOT:
                    desk.start(requests)
        elif event == "first token":
            live.first_token(tickets[number])
            compiled(dispatch.first_token)(desk.desk, 0, desk.rows[number], asked.prompt_tokens, asked.prompt_tokens)
        else:
            live.leave(tickets[number], now_s, asked.prompt_tokens, asked.output_tokens)
            desk.end(number, asked)
            desk.start(requests)
        for one, _ in begun[before:]:
            lane = tickets[one].lane
            assert lane
            assert lane.row == desk.rows[one], (one, now_s)
            first_s = now_s + requests[one].prompt_tokens / 3000
            heapq.heappush(events, (first_s, "first token", one))
            heapq.heappush(events, (first_s + requests[one].output_tokens / 150, "leave", one))
    assert len(begun) == len(tickets) == len(desk.rows)
    assert 50 < len(tickets) < len(requests), "some were refused"
    assert live.desk.accounts.used_gpu_s.tolist()[:2] == pytest.approx(desk.desk.accounts.used_gpu_s)
