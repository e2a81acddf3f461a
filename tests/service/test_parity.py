"""The gateway decides as the rehearsal does: shown the same events, it takes in the same requests, to the same replicas.

And it says why in the same words: the log of what is decided about requests is the same, byte for byte.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import pytest
from serving import fake_plan
from split import split_plan

from waterline.cli.rehearse_files import decision_lines
from waterline.cost import replica_step_cost
from waterline.fleet import HOURS, Demand, Tenant
from waterline.plan import Plan
from waterline.policy.decisions import GAVE_UP, QUEUE_FULL, TOO_LATE, as_json, log_row
from waterline.policy.routing import NOBODY
from waterline.rehearsal import Rehearsal, house, rehearse
from waterline.rehearsal.capacity import NEVER, PICOSECONDS_PER_NS, Ask, Capacity, Terms
from waterline.rehearsal.oracle import Dice, serve
from waterline.rehearsal.stepped import Passage
from waterline.service.dispatcher import Dispatcher
from waterline.service.lines import Refusal, Ticket
from waterline.units import GIGA, HOUR_S, PICOSECONDS_PER_S
from waterline.workload import Slo
from waterline.workload.ragged import Ragged
from waterline.workload.stream import Names, Stream, chunk_of

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
    terms = Terms(ttft_s=(60.0,), output_tokens=(OUTPUT_TOKENS,), gpus=float(plan.fleet.gpus), reasons=True)
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
    told: list[bytes] = []
    desk.log.tell(told.append, 0.0)
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
    names = {"place": ids, "tenant": ["enterprise"], "claimant": ["enterprise/chat"]}
    placed = sorted((entry for one in passages for entry in one.placed), key=lambda entry: entry[0])
    assert [why_of(line) for line in told] == [
        why_of(as_json(log_row(at_s=0.0, rule=rule, place=place), names, reasons=reasons))
        for _, rule, place, *reasons in placed
    ]
    assert Counter(json.loads(line)["rule"] for line in told)["takes over"] == 300


def why_of(line: bytes) -> dict[str, int | str]:
    """Return where a request went and why, without what else is said of it."""
    apart = {"at_ns", "tenant", "claimant", "amount", "cost_ms"}
    return {key: value for key, value in json.loads(line).items() if key not in apart}


# --- Word for word ----------------------------------------------------------------------------------------------------

SHARES = (*TENANTS, Tenant(name="trial", deserved=0.0, limit=0.001))
ASKERS = (("enterprise", "a"), ("enterprise", "b"), ("public", "c"), *[("public", "d")] * 3, ("trial", "e"))
FIRST_HOUR = 10
OFTEN = (
    "slot free", "waits for slot", "over limit", "too late", "shortest wait", "only free", "prefix cached", "prefix busy",
    "below guarantee", "below deserved", "borrows",
)  # fmt: skip


def changing_plan(replicas: int, slots: int) -> Plan:
    """Return a plan of a model whose first replica drains at eleven, when the last one comes."""
    plan = plan_of(replicas, slots)
    (model,) = plan.fleet.models
    fleet = msgspec.structs.replace(
        plan.fleet,
        tenants=SHARES,
        models=(msgspec.structs.replace(model, max_context_tokens=1024, slo=Slo(ttft_s=1.5, tpot_s=0.05)),),
        demand=tuple(Demand(tenant=one.name, model="chat", requests_per_s=1.0) for one in SHARES),
    )
    before, after = (tuple(hour for hour in range(HOURS) if (hour == FIRST_HOUR + 1) == then) for then in (False, True))
    hours = [before, *[tuple(range(HOURS))] * (replicas - 2), after]
    return msgspec.structs.replace(
        plan,
        fleet=fleet,
        replicas=tuple(
            msgspec.structs.replace(one, hours=when, max_context_tokens=1024, cache_tokens=1024 * slots)
            for one, when in zip(plan.replicas, hours, strict=True)
        ),
    )


def crowd(requests: int, requests_per_s: float) -> Stream:
    """Return a request at ten, and a crowd around eleven: some with prompts that begin alike, some who go away.

    Answers are as long as the plan expects: a trace knows how long each becomes, and a gateway does not.
    """
    dice, at_s = random.Random(5), HOUR_S - requests / requests_per_s / 2
    tenants, clients = Names([one.name for one in SHARES]), Names()
    arrivals_s, prompts, blocks, asking, lines = [0.0], [10], [0], [0], ["a"]
    for _ in range(requests):
        at_s += dice.expovariate(requests_per_s)
        tenant, line = dice.choice(ASKERS)
        begins = dice.choice([0, 0, 0, 1, 2, 3])  # with one of three long texts, or with none of them
        arrivals_s.append(at_s)
        prompts.append(dice.randint(1, 300) + (512 if begins else 0))
        blocks.append(begins)
        asking.append(tenants.index(tenant))
        lines.append(line)
    goes_ns = [dice.choice([NEVER] * 9 + [dice.randint(1, 10**9)]) for _ in range(2 * len(lines))]
    begun = np.array(blocks)
    chunk = chunk_of(
        np.round(np.array(arrivals_s) * GIGA).astype(np.int64),
        np.array(prompts, np.int32),
        np.full(len(lines), OUTPUT_TOKENS, np.int32),
        tenant=np.array(asking, np.int32),
        client=clients.indices(lines),
        patience_ns=np.array(goes_ns[: len(lines)]),
        leaves_ns=np.array(goes_ns[len(lines) :]),
        blocks=Ragged(begun[begun > 0], np.cumsum(begun > 0)),
    )
    ten_ns = FIRST_HOUR * HOUR_S * GIGA
    return Stream(name="crowd", read=lambda: iter([chunk]), clock_ns=ten_ns, tenants=tenants, clients=clients)


@dataclass(frozen=True)
class Heard:
    """What a gateway hears of a request of a rehearsal, and what it costs there."""

    tenant: str
    line: str
    prompt_tokens: int
    blocks: np.ndarray
    gpu_s: float


# Of one instant, in the order in which the rehearsal takes them.
FIRST, LAST, SECOND, LEAVES, CHANGE, COMES = range(6)


def heard_of(happened: Rehearsal) -> tuple[list[Heard], list[tuple[int, int, int]]]:
    """Return the requests of a rehearsal, and the events: when, what, and of which request."""
    heard, events = [], [(HOUR_S * PICOSECONDS_PER_S, CHANGE, 0)]
    events += [(second * PICOSECONDS_PER_S, SECOND, 0) for second in range(1, HOUR_S + 100)]
    for settled in happened.kept:
        piece, passages = settled.asked, settled.passages
        for at, number in enumerate(settled.numbers.tolist()):
            heard.append(
                Heard(
                    SHARES[piece.row[at]].name,
                    settled.house.names[int(piece.client[at])],
                    int(piece.prompt_tokens[at]),
                    piece.blocks[at : at + 1].values,
                    float(passages.busy_ps[at] * 1e-12),
                )
            )
            arrival_ps, finish_ps = int(piece.arrival_ps[at]), int(passages.finish_ps[at])
            events.append((arrival_ps, COMES, number))
            if passages.first_token_ps[at] != NEVER:
                events.append((int(passages.first_token_ps[at]), FIRST, number))
            if finish_ps > arrival_ps and passages.replica[at] != -TOO_LATE:  # the desk itself tells who is overtaken
                events.append((finish_ps, LAST if passages.replica[at] >= 0 else LEAVES, number))
    return heard, sorted(events)


def told_live(plan: Plan, happened: Rehearsal) -> list[bytes]:
    """Let the gateway's desk live through what happened in a rehearsal; return what it says of its decisions."""
    desk, told = Dispatcher(plan, Dice(Terms(ttft_s=(), output_tokens=()).dice).roll), list[bytes]()
    desk.log.tell(told.append, FIRST_HOUR * HOUR_S)
    for replica in plan.replicas:
        desk.set_ready(replica.id, ready=FIRST_HOUR in replica.hours, now_s=0.0)
    tickets: dict[int, Ticket | Refusal] = {}
    told_so: list[int] = []
    heard, events = heard_of(happened)
    for at_ps, event, number in events:
        now_s, one = at_ps // PICOSECONDS_PER_NS / GIGA, heard[number]  # the log keeps whole nanoseconds
        if event == SECOND:
            desk.tick(now_s)
            while told_so:  # a moment later, each request hears that its turn does not come, and goes
                desk.leave(tickets[told_so.pop()], now_s)  # type: ignore[arg-type]
        elif event == CHANGE:
            desk.hold(plan.replicas[0].id, now_s)
            desk.set_ready(plan.replicas[-1].id, ready=True, now_s=now_s)
        elif event == COMES:
            tickets[number] = desk.enter(
                "chat",
                one.prompt_tokens,
                None,
                lambda go, number=number: None if go else told_so.append(number),  # type: ignore[misc]
                now_s,
                tenant=one.tenant,
                line=one.line,
                blocks=one.blocks,
            )
        else:
            ticket = tickets[number]
            assert isinstance(ticket, Ticket), number
            if event == FIRST:
                desk.first_token(ticket)
            else:
                desk.leave(ticket, now_s, gpu_s=one.gpu_s)
    return told


# Where several end with one step of a replica, a gateway hears of one after the other and gives the first one's slot away
# before it knows of the next; the rehearsal knows of all. Here no two of those end together for whom somebody waits.
@pytest.mark.parametrize(
    ("replicas", "slots", "requests_per_s", "seldom", "told"),
    [(10, 1, 90.0, "first free", 0), (3, 1, 20.0, "gave up", 1), (12, 2, 100.0, "prefix behind", 4)],
)
def test_the_gateway_says_of_every_request_what_the_rehearsal_said_byte_for_byte(
    replicas: int, slots: int, requests_per_s: float, seldom: str, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    priced = replica_step_cost  # what clients wait for on top of the steps of an engine, its desk does not hear of
    monkeypatch.setattr(house, "replica_step_cost", lambda *of: replace(priced(*of), first_token_ps=0))
    plan = changing_plan(replicas, slots)
    happened = rehearse(plan, crowd(400, requests_per_s), policy="plan", decisions=True)
    said = list(decision_lines(happened))
    assert told_live(plan, happened) == said
    lines = [json.loads(line) for line in said]
    words = Counter(line[key] for line in lines for key in ("rule", "why", "turn") if key in line)
    assert len(lines) == 401
    assert {*OFTEN, seldom} <= {*words}
    overtaken = [line["cost_ms"] for line in lines if line["rule"] == "too late" and line["cost_ms"]]
    assert len(overtaken) == told
    assert all(30_000 <= waited_ms <= 31_000 for waited_ms in overtaken), "three times 10 s, to the next second"
    eleven_ns = (FIRST_HOUR + 1) * HOUR_S * GIGA
    drained, late = ([line["at_ns"] for line in lines if line.get("place") == f"chat/{at}"] for at in (0, replicas - 1))
    assert max(drained) < eleven_ns <= min(late)
