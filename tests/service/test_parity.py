"""The gateway decides as the rehearsal does: shown the same events, it takes in the same requests, to the same replicas."""

import random

from serving import fake_plan

from waterline.cost import replica_step_cost
from waterline.rehearsal.oracle import NEVER, Capacity, serve
from waterline.service.dispatcher import Dispatcher, Refusal, Ticket
from waterline.workload import Request

ARRIVAL, FIRST_TOKEN, END = 2, 0, 1  # of one instant, what has been produced is known before what arrives


def test_a_trace_is_dealt_alike_by_the_gateway_and_by_the_rehearsal() -> None:
    expected = {"expected_prompt_tokens": 100, "expected_output_tokens": 40}
    deadline_s = 0.6
    plan = fake_plan({"chat": 3}, max_batch=4, tokens_per_s=600.0)
    dice = random.Random(7)
    requests, now_s = [], 0.0
    for _ in range(500):
        now_s += dice.expovariate(1000)
        requests.append(
            Request(arrival_s=now_s, prompt_tokens=dice.randint(1, 200), output_tokens=dice.randint(1, 120))
        )
    capacities = [
        Capacity(
            replica=replica.id,
            gpus=1,
            step=replica_step_cost(plan.fleet, replica),
            max_batch=replica.max_batch,
            cache_tokens=100_000,
            max_context_tokens=1000,
            prefill_tokens_per_s=replica.prefill_tokens_per_s,
            tokens_per_s=replica.tokens_per_s,
        )
        for replica in plan.replicas
    ]
    rehearsed = serve(capacities, requests, deadline_s=deadline_s, **expected)

    events = []
    for number, passage in enumerate(rehearsed):
        events.append((passage.arrival_ps, ARRIVAL, number))
        if passage.first_token_ps != NEVER:
            events += [(passage.first_token_ps, FIRST_TOKEN, number), (passage.finish_ps, END, number)]
    desk = Dispatcher(plan.replicas, deadline_s=deadline_s, **expected)
    for replica in plan.replicas:
        desk.set_ready(replica.id, ready=True, now_s=0.0)
    decided: dict[int, Ticket | Refusal] = {}
    for time_ps, event, number in sorted(events):
        if event == ARRIVAL:
            prompt_tokens = requests[number].prompt_tokens
            decided[number] = desk.enter(prompt_tokens, None, lambda _go: None, time_ps / 1e12)
            continue
        ticket = decided[number]
        assert isinstance(ticket, Ticket)
        if event == FIRST_TOKEN:
            desk.first_token(ticket)
        else:
            desk.leave(ticket, time_ps / 1e12)

    dealt = ["" if isinstance(one, Refusal) else one.lane.replica.id for _, one in sorted(decided.items())]
    assert dealt == [passage.replica for passage in rehearsed]
    assert set(dealt) == {"", "chat/0", "chat/1", "chat/2"}, "all kinds of decisions were made"
