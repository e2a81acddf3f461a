"""The gateway decides as the rehearsal does: shown the same events, it takes in the same requests, to the same replicas."""

import random
from dataclasses import replace

import msgspec
import pytest
from serving import fake_plan
from split import split_plan

from waterline.cost import replica_step_cost
from waterline.fleet import Tenant
from waterline.plan import Plan
from waterline.policy.decisions import GAVE_UP, QUEUE_FULL, TOO_LATE
from waterline.policy.routing import NOBODY
from waterline.rehearsal.capacity import Ask, Capacity, Terms
from waterline.rehearsal.oracle import NEVER, Dice, Passage, serve
from waterline.service.dispatcher import Dispatcher
from waterline.service.lines import Refusal, Ticket
from waterline.units import PICOSECONDS_PER_S

TENANTS = (Tenant(name="enterprise", guarantee=0.4, deserved=0.6), Tenant(name="public", deserved=0.4, limit=0.9))
CLIENTS = (("enterprise", "a"), ("enterprise", "b"), ("public", "c"), ("public", "d"))
TTFT_S, OUTPUT_TOKENS = 0.6, 40
# Of one instant, in the order in which the rehearsal takes them.
END, FIRST_TOKEN, TICK, ARRIVAL = range(4)
READ, FETCHED = 0.5, 0.6  # likewise, where prompts and answers are apart


def plan_of(replicas: int, slots: int) -> Plan:
    rates = {"max_batch": slots, "tokens_per_s": 600.0, "ttft_s": TTFT_S, "output_tokens": OUTPUT_TOKENS}
    plan = fake_plan({"chat": replicas}, **rates)  # type: ignore[arg-type]
    pools = (msgspec.structs.replace(plan.fleet.pools[0], gpus_per_node=replicas),)
    return msgspec.structs.replace(plan, fleet=msgspec.structs.replace(plan.fleet, tenants=TENANTS, pools=pools))


def rehearsed(plan: Plan, asked: list[Ask]) -> list[Passage]:
    capacities = [
        Capacity(
            replica=replica.id,
            gpus=1,
            step=replica_step_cost(plan.fleet, replica),
            max_batch=replica.max_batch,
            cache_tokens=replica.cache_tokens,
            max_context_tokens=replica.max_context_tokens,
            prefill_tokens_per_s=replica.prefill_tokens_per_s,
            tokens_per_s=replica.tokens_per_s,
        )
        for replica in plan.replicas
    ]
    terms = Terms(
        ttft_s=(TTFT_S,),
        output_tokens=(OUTPUT_TOKENS,),
        guarantee=tuple(tenant.guarantee for tenant in TENANTS),
        deserved=tuple(tenant.deserved or 0.0 for tenant in TENANTS),
        limit=tuple(tenant.limit for tenant in TENANTS),
        tenant_of_client=tuple([tenant.name for tenant in TENANTS].index(tenant) for tenant, _ in CLIENTS),
        gpus=float(plan.fleet.gpus),
    )
    return serve(capacities, asked, terms)


def events_of(passages: list[Passage]) -> list[tuple[int, float, int]]:
    """Return what the desk is told: when, what, and of which request."""
    last_s = passages[-1].ask.arrival_ps // PICOSECONDS_PER_S
    events: list[tuple[int, float, int]] = [(second * PICOSECONDS_PER_S, TICK, 0) for second in range(1, last_s + 100)]
    for number, passage in enumerate(passages):
        events.append((passage.ask.arrival_ps, ARRIVAL, number))
        if passage.first_token_ps != NEVER:
            events.append((passage.first_token_ps, FIRST_TOKEN, number))
        if passage.left or not passage.refusal:
            events.append((passage.finish_ps, END, number))
    return events


# Where many end with one step, the gateway starts others after each of them, and the rehearsal after all: those who leave
# have a replica for themselves.
@pytest.mark.parametrize(("replicas", "slots", "leavers"), [(3, 4, 0.0), (12, 4, 0.0), (40, 1, 0.3)])
def test_a_trace_is_dealt_alike_by_the_gateway_and_by_the_rehearsal(replicas: int, slots: int, leavers: float) -> None:
    dice, plan = random.Random(7), plan_of(replicas, slots)
    asked, now_s = [], 0.0
    for number in range(300):
        now_s += dice.expovariate(25 * replicas * slots)
        asked.append(
            Ask(
                arrival_ps=round(now_s * 1e9) * 1000,
                prompt_tokens=dice.randint(1, 200),
                output_tokens=dice.randint(1, 120),
                client=number if number < 4 else dice.choice([0, 1, 2, 3, 3, 3, 3]),  # who came first goes first
            )
        )
    goes = random.Random(9)
    asked = [replace(one, leaves_ps=goes.randint(1, 3 * 10**11) if goes.random() < leavers else NEVER) for one in asked]
    passages = rehearsed(plan, asked)
    events = events_of(passages)
    roll = Dice(Terms(ttft_s=(), output_tokens=()).dice).roll
    desk = Dispatcher(plan, roll)
    for replica in plan.replicas:
        desk.set_ready(replica.id, ready=True, now_s=0.0)
    decided: dict[int, Ticket | Refusal] = {}
    for time_ps, event, number in sorted(events):
        at_s = time_ps / 1e12
        if event == TICK:
            desk.tick(float(time_ps // PICOSECONDS_PER_S))
            continue
        passage = passages[number]
        if event == ARRIVAL:
            tenant, line = CLIENTS[passage.ask.client]
            decided[number] = desk.enter(
                "chat", passage.ask.prompt_tokens, None, lambda _go: None, at_s, tenant=tenant, line=line
            )
            continue
        ticket = decided[number]
        assert isinstance(ticket, Ticket), number
        if event == FIRST_TOKEN:
            desk.first_token(ticket)
        else:
            desk.leave(ticket, at_s, gpu_s=passage.busy_ps / PICOSECONDS_PER_S)

    dealt = ["" if isinstance(one, Refusal) else one.lane and one.lane.replica.id for _, one in sorted(decided.items())]
    assert dealt == [
        None if one.refusal == GAVE_UP else "" if one.refusal else f"chat/{one.replica}" for one in passages
    ]
    for where in ({NOBODY}, {*range(replicas)}):
        left = sum(one.left and one.replica in where for one in passages)
        assert left > 10 or not leavers, "clients leave in line and on replicas"
    refused = [one for one in decided.values() if isinstance(one, Refusal)]
    assert {one.rule for one in refused} <= {TOO_LATE, QUEUE_FULL}
    assert 30 < len(refused) < 270, "all kinds of decisions were made"
    assert [one.retry_after_s for one in refused] == [one.retry_s for one in passages if one.refusal and not one.left]


def test_prompts_and_answers_are_dealt_alike_where_they_are_apart() -> None:
    dice = random.Random(8)
    plan = split_plan(2, 3, output_tokens=OUTPUT_TOKENS)
    rates = {"prefill": (2000.0, 2000.0), "decode": (900.0, 0.0)}  # both figures of a plan, of which one counts
    plan = msgspec.structs.replace(
        plan,
        replicas=tuple(
            msgspec.structs.replace(one, tokens_per_s=rates[one.role][0], prefill_tokens_per_s=rates[one.role][1])
            for one in plan.replicas
        ),
    )
    asked, now_s = [], 0.0
    for _ in range(300):
        now_s += dice.expovariate(40)
        prompt_tokens, output_tokens = dice.randint(1, 200), dice.randint(2, 120)
        asked.append(
            Ask(arrival_ps=round(now_s * 1e9) * 1000, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        )
    step = replica_step_cost(plan.fleet, plan.replicas[0])
    sent_ps = 50_000_000
    capacities = [
        Capacity(
            replica=one.id,
            gpus=1,
            step=step,
            max_batch=one.max_batch,
            cache_tokens=100_000,
            max_context_tokens=one.max_context_tokens,
            prefill_tokens_per_s=one.prefill_tokens_per_s if one.role == "prefill" else one.tokens_per_s,
            tokens_per_s=one.prefill_tokens_per_s if one.role == "prefill" else one.tokens_per_s,
            role=one.role,
            transfer_ps_per_token=sent_ps,
        )
        for one in plan.replicas
    ]
    terms = Terms(ttft_s=(60.0,), output_tokens=(OUTPUT_TOKENS,), gpus=float(plan.fleet.gpus))
    passages = serve(capacities, asked, terms)
    events = [
        (second * PICOSECONDS_PER_S, TICK, 0) for second in range(1, asked[-1].arrival_ps // PICOSECONDS_PER_S + 100)
    ]
    for number, passage in enumerate(passages):
        assert not passage.refusal
        arrives_ps = passage.first_token_ps + passage.ask.prompt_tokens * sent_ps
        events += [
            (passage.ask.arrival_ps, ARRIVAL, number),
            (passage.first_token_ps, READ, number),
            (arrives_ps, FETCHED, number),
            (passage.finish_ps, END, number),
        ]
    roll = Dice(Terms(ttft_s=(), output_tokens=()).dice).roll
    desk = Dispatcher(plan, roll)
    for replica in plan.replicas:
        desk.set_ready(replica.id, ready=True, now_s=0.0)
    tickets: dict[int, Ticket] = {}
    readers: dict[int, str] = {}
    for time_ps, event, number in sorted(events):
        at_s = time_ps / 1e12
        if event == TICK:
            desk.tick(float(time_ps // PICOSECONDS_PER_S))
        elif event == ARRIVAL:
            prompt_tokens = passages[number].ask.prompt_tokens
            ticket = desk.enter("chat", prompt_tokens, None, lambda _go: None, at_s, tenant="enterprise")
            assert isinstance(ticket, Ticket)
            tickets[number] = ticket
        elif event == READ:
            assert tickets[number].lane
            readers[number] = tickets[number].lane.replica.id
            desk.has_read(tickets[number], at_s)
        elif event == FETCHED:
            assert desk.hand_over(tickets[number], at_s)
            desk.first_token(tickets[number])
        else:
            gpu_s = (passages[number].busy_ps + passages[number].read_busy_ps) / PICOSECONDS_PER_S
            desk.leave(tickets[number], at_s, gpu_s=gpu_s)
    ids = [one.id for one in plan.replicas]
    wrote = [ticket.lane.replica.id for _, ticket in sorted(tickets.items()) if ticket.lane]
    assert [readers[number] for number in range(300)] == [ids[one.read_by] for one in passages]
    assert wrote == [ids[one.replica] for one in passages]
    assert {*readers.values(), *wrote} == {*ids}, "all had something to do"
    assert all(lane.running == lane.keeping == lane.backlog_tokens == 0 for lane in desk.lanes.values())
