"""Who is taken in, where, and whose turn it is; no sockets, no clock. What is decided is the policy's, see its tests."""

import math
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from serving import fake_plan

from waterline.fleet import Tenant
from waterline.plan import Plan
from waterline.policy.decisions import NOT_SERVED, TOO_LATE
from waterline.service.dispatcher import Dispatcher, block_keys
from waterline.service.lines import Coming, Refusal, Ticket, Turn
from waterline.service.rows import MOST_CLIENTS

TENANTS = (Tenant(name="enterprise", guarantee=0.5, deserved=0.5), Tenant(name="public", deserved=0.5))


def plan_of(replicas: int = 1, *, max_batch: int = 2, ttft_s: float = 60.0, tokens_per_s: float = 100.0) -> Plan:
    plan = fake_plan({"chat": replicas}, max_batch=max_batch, tokens_per_s=tokens_per_s, ttft_s=ttft_s)
    return msgspec.structs.replace(plan, fleet=msgspec.structs.replace(plan.fleet, tenants=TENANTS))


def dispatcher(
    replicas: int = 1, *, max_batch: int = 2, ttft_s: float = 60.0, tokens_per_s: float = 100.0
) -> Dispatcher:
    made = Dispatcher(plan_of(replicas, max_batch=max_batch, ttft_s=ttft_s, tokens_per_s=tokens_per_s), lambda: 0)
    for replica in list(made.lanes):
        made.set_ready(replica, ready=True, now_s=0.0)
    return made


class Turns:
    """Notes the names of those whose turn has come, in order."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.lost: list[str] = []
        self.tickets: list[Ticket] = []

    def of(self, name: str) -> Turn:
        return lambda go: (self.begun if go else self.lost).append(name)


def ask(
    desk: Dispatcher,
    turns: Turns,
    name: str,
    *,
    tenant: str = "enterprise",
    line: str = "",
    prompt_tokens: int = 5,
    now_s: float = 0.0,
    **asked: Any,
) -> Ticket | Refusal:
    return desk.enter("chat", prompt_tokens, None, turns.of(name), now_s, tenant=tenant, line=line, **asked)


def enter(desk: Dispatcher, turns: Turns, name: str, **asked: object) -> Ticket:
    ticket = ask(desk, turns, name, **asked)  # type: ignore[arg-type]
    assert isinstance(ticket, Ticket)
    turns.tickets.append(ticket)
    return ticket


def replica_of(ticket: Ticket) -> str:
    assert ticket.lane
    return ticket.lane.replica.id


def test_a_replica_gets_as_many_as_its_batch_holds_and_the_others_wait_in_order() -> None:
    desk, turns = dispatcher(max_batch=2), Turns()
    tickets = [enter(desk, turns, name) for name in "abcd"]
    assert turns.begun == ["a", "b"]
    desk.leave(tickets[1], 1.0)
    desk.leave(tickets[0], 2.0)
    assert turns.begun == ["a", "b", "c", "d"]


def test_a_waiting_request_whose_client_leaves_frees_its_place() -> None:
    desk, turns = dispatcher(max_batch=1), Turns()
    a, b, _ = [enter(desk, turns, name) for name in "abc"]
    desk.leave(b, 1.0)
    desk.leave(a, 2.0)
    assert turns.begun == ["a", "c"]


def test_every_replica_gets_work() -> None:
    desk, turns = dispatcher(3), Turns()
    chosen = [replica_of(enter(desk, turns, str(number))) for number in range(6)]
    assert chosen == ["chat/0", "chat/1", "chat/2"] * 2


def test_a_client_with_many_requests_does_not_hold_up_another() -> None:
    desk, turns = dispatcher(max_batch=1), Turns()
    greedy = [enter(desk, turns, f"greedy {number}", line="greedy") for number in range(5)]
    enter(desk, turns, "quiet", line="quiet")
    desk.leave(greedy[0], 1.0)
    assert turns.begun == ["greedy 0", "quiet"]


def test_a_tenant_below_its_guarantee_goes_before_one_that_borrows() -> None:
    desk, turns = dispatcher(max_batch=1), Turns()
    first = enter(desk, turns, "public 0", tenant="public")
    for number in range(1, 4):
        enter(desk, turns, f"public {number}", tenant="public")
    enter(desk, turns, "enterprise", tenant="enterprise")
    desk.leave(first, 1.0)
    assert turns.begun == ["public 0", "enterprise"]
    assert (desk.under_way("public"), desk.under_way("enterprise")) == (3, 1)


def test_who_takes_what_is_spare_goes_last_and_is_on_an_account_of_its_own() -> None:
    desk, turns = dispatcher(max_batch=1), Turns()
    first = enter(desk, turns, "batch 0", spare=True)
    for number in range(1, 3):
        enter(desk, turns, f"batch {number}", spare=True)
    for tenant in ("public", "enterprise"):
        enter(desk, turns, tenant, tenant=tenant, now_s=1.0)
    desk.leave(first, 2.0)
    while turns.begun[-1] != "batch 2":
        running = next(ticket for ticket in turns.tickets if ticket.running)
        desk.leave(running, 3.0)
    assert turns.begun == ["batch 0", "enterprise", "public", "batch 1", "batch 2"]
    assert desk.under_way("enterprise") == 1


def test_who_takes_what_is_spare_goes_after_who_borrows_however_little_it_has_had() -> None:
    desk, turns = dispatcher(max_batch=1), Turns()
    first = enter(desk, turns, "public 0", tenant="public")
    enter(desk, turns, "batch", spare=True)
    enter(desk, turns, "public 1", tenant="public")
    desk.rows.desk.accounts.used_gpu_s[1] = 1e6  # far more than it deserves
    desk.tick(1.0)
    desk.leave(first, 1.0)
    assert turns.begun == ["public 0", "public 1"]


def test_what_is_spare_stays_below_the_limit_of_its_tenant_and_leaves_it_its_own_turns() -> None:
    limited = (Tenant(name="enterprise", deserved=0.1, limit=0.1), Tenant(name="public", deserved=0.5))
    plan = plan_of(1, max_batch=1)
    desk = Dispatcher(msgspec.structs.replace(plan, fleet=msgspec.structs.replace(plan.fleet, tenants=limited)))
    desk.set_ready("chat/0", ready=True, now_s=0.0)
    turns, batch_gpu_s, now_s = Turns(), 0.0, 0.0
    waiting = [enter(desk, turns, f"batch {number}", spare=True, wait_s=86_400.0) for number in range(200)]
    while now_s < 600.0:
        for ticket in [ticket for ticket in waiting if ticket.running]:
            desk.leave(ticket, now_s)
            batch_gpu_s += ticket.gpu_s
            waiting.remove(ticket)
        now_s += 1.0
        desk.tick(now_s)
    print(f"{batch_gpu_s:.0f} GPU-seconds of 600 went to the batch; its limit is 10 %")
    assert 0.05 * 600 < batch_gpu_s < 0.25 * 600, "more at first: an account that was idle has a minute in hand"
    person = ask(desk, turns, "person", now_s=now_s)
    assert isinstance(person, Ticket), "what batches used counts against no person"


def test_only_what_counts_is_demand_for_which_gpus_are_moved() -> None:
    desk, turns = dispatcher(), Turns()
    enter(desk, turns, "a", spare=True, counts=False)
    assert desk.take_loads() == {}
    enter(desk, turns, "b", spare=True)
    assert desk.take_loads() == {("enterprise", "chat"): (5, 10)}


def test_the_backlog_is_prompt_and_expected_output_then_output_then_nothing() -> None:
    desk, turns = dispatcher(), Turns()
    ticket = enter(desk, turns, "a", prompt_tokens=7)
    limited = desk.enter("chat", 3, 4, turns.of("b"), 0.0, tenant="public")
    lane = desk.lanes["chat/0"]
    assert lane.backlog_tokens == 7 + 10 + 3 + 4
    desk.first_token(ticket)
    desk.first_token(ticket)
    assert lane.backlog_tokens == 10 + 3 + 4
    desk.leave(ticket, 1.0)
    assert isinstance(limited, Ticket)
    desk.leave(limited, 1.0)
    assert (lane.backlog_tokens, lane.running) == (0, 0)


def test_who_would_wait_too_long_is_told_when_to_come_back() -> None:
    desk, turns = dispatcher(max_batch=1, ttft_s=2.0, tokens_per_s=10.0), Turns()
    enter(desk, turns, "a")  # 5 prompt tokens: 0.5 s
    enter(desk, turns, "b")  # waits for them, and may wait 1.5 s: its own prompt takes 0.5 s
    refusal = ask(desk, turns, "c")  # 0.5 s for the prompt of a, and b takes 15 tokens: 2 s
    assert isinstance(refusal, Refusal)
    assert refusal.rule == TOO_LATE
    assert 0.5 <= refusal.retry_after_s <= 2.0
    patient = desk.enter("chat", 5, None, turns.of("d"), 0.0, tenant="enterprise", wait_s=600.0)
    assert isinstance(patient, Ticket)


def test_without_a_replica_that_is_expected_nobody_is_taken_in() -> None:
    desk, turns = dispatcher(ttft_s=3.0), Turns()
    desk.set_ready("chat/0", ready=False, now_s=0.0)
    assert ask(desk, turns, "a") == Refusal(rule=NOT_SERVED, retry_after_s=math.inf)


def test_who_asks_while_the_only_replica_starts_again_waits_if_its_deadline_lets_it() -> None:
    desk, turns = dispatcher(ttft_s=10.0), Turns()
    desk.set_ready("chat/0", ready=False, now_s=100.0, back_in_s=25.0)
    assert ask(desk, turns, "early", now_s=101.0) == Refusal(rule=NOT_SERVED, retry_after_s=24.0)
    enter(desk, turns, "flex", now_s=101.0, wait_s=600.0)
    enter(desk, turns, "late", now_s=116.0)
    assert turns.begun == []
    desk.set_ready("chat/0", ready=True, now_s=125.0)
    assert turns.begun == ["flex", "late"]
    desk.set_ready("chat/0", ready=False, now_s=200.0, back_in_s=1.0)
    assert ask(desk, turns, "overdue", now_s=221.0) == Refusal(rule=NOT_SERVED, retry_after_s=20.0), "as long again"


def test_who_asks_while_one_replica_is_ejected_and_the_other_gone_waits_for_the_first_to_be_trusted() -> None:
    desk, turns = dispatcher(2, ttft_s=5.0), Turns()
    desk.doubt("chat/0", doubted=True, now_s=0.0)
    desk.set_ready("chat/1", ready=False, now_s=0.0, back_in_s=60.0)
    enter(desk, turns, "a", now_s=1.0)
    assert turns.begun == []
    desk.doubt("chat/0", doubted=False, now_s=2.0)
    assert turns.begun == ["a"]


def test_who_waits_for_a_replica_that_starts_is_no_more_than_it_can_begin_in_time() -> None:
    desk, turns = dispatcher(max_batch=1, ttft_s=10.0, tokens_per_s=10.0), Turns()  # 1.5 s each
    desk.set_ready("chat/0", ready=False, now_s=0.0, back_in_s=4.0)
    asked = [ask(desk, turns, str(number)) for number in range(50)]
    taken = sum(isinstance(one, Ticket) for one in asked)
    assert 2 <= taken <= 4, "6 s are left, less half a second for its own prompt"
    refused = asked[-1]
    assert isinstance(refused, Refusal)
    assert refused.rule == TOO_LATE
    for now_s in range(1, 4):
        desk.tick(float(now_s))
    desk.set_ready("chat/0", ready=True, now_s=4.0)
    assert len(turns.begun) == 1, "its one slot"


def test_who_reads_and_who_writes_are_both_waited_for() -> None:
    desk = dispatcher(3, ttft_s=10.0)
    for lane, role in zip(desk.lanes.values(), ("prefill", "decode", "decode"), strict=True):
        lane.replica = msgspec.structs.replace(lane.replica, role=role)
    service = desk.services["chat"]
    assert service.has_hope
    desk.set_ready("chat/1", ready=False, now_s=0.0, back_in_s=8.0)
    assert service.has_hope
    desk.set_ready("chat/2", ready=False, now_s=0.0, back_in_s=5.0)
    desk.set_ready("chat/0", ready=False, now_s=0.0, back_in_s=3.0)
    assert (service.has_hope, service.ready_in_s(1.0)) == (False, 4.0)
    desk.set_ready("chat/0", ready=False, now_s=2.0)
    assert service.ready_in_s(2.0) == math.inf


def test_who_waits_goes_where_a_slot_is_free_and_is_told_when_the_last_replica_is_gone() -> None:
    desk, turns = dispatcher(2, max_batch=1), Turns()
    _, b, _, _ = [enter(desk, turns, name) for name in "abcd"]
    desk.set_ready("chat/0", ready=False, now_s=1.0)
    desk.leave(b, 2.0)
    assert turns.begun == ["a", "b", "c"]
    desk.set_ready("chat/1", ready=False, now_s=3.0)
    assert turns.lost == ["d"]


def test_who_waits_for_a_replica_in_doubt_waits_on() -> None:
    desk, turns = dispatcher(2, max_batch=1), Turns()
    a, b, _, _ = [enter(desk, turns, name) for name in "abcd"]
    desk.hold("chat/0", 2.0)
    desk.hold("chat/1", 2.0)
    desk.leave(a, 3.0)
    desk.leave(b, 3.0)
    assert (turns.begun, turns.lost) == (["a", "b"], []), "there is no other"
    desk.set_ready("chat/1", ready=True, now_s=4.0)
    assert turns.begun == ["a", "b", "c"]


def test_who_asks_while_the_only_replica_is_in_doubt_waits_for_it() -> None:
    desk, turns = dispatcher(), Turns()
    desk.hold("chat/0", 1.0)
    enter(desk, turns, "a", now_s=1.0)
    gone = enter(desk, turns, "b", now_s=1.0)
    desk.leave(gone, 1.5)
    assert (turns.begun, turns.lost) == ([], [])
    desk.set_ready("chat/0", ready=True, now_s=2.0)
    assert turns.begun == ["a"]
    desk.hold("chat/0", 3.0)
    enter(desk, turns, "c", now_s=3.0)
    desk.set_ready("chat/0", ready=False, now_s=4.0)
    assert turns.lost == ["c"]


def test_a_replica_that_drains_is_nobody_to_wait_for() -> None:
    desk, turns = dispatcher(2, max_batch=1, ttft_s=10.0), Turns()
    for name in "abc":
        enter(desk, turns, name)
    desk.hold("chat/0", 1.0, drains=True)
    assert turns.lost == [], "there is another"
    desk.hold("chat/1", 1.0, drains=True)
    assert (turns.begun, turns.lost) == (["a", "b"], ["c"])
    assert ask(desk, turns, "d", now_s=2.0) == Refusal(rule=NOT_SERVED, retry_after_s=math.inf)
    assert desk.stand_ins(desk.lanes["chat/0"].replica) == ["chat/0"]
    desk.leave(turns.tickets[0], 3.0)
    desk.set_ready("chat/0", ready=False, now_s=3.0, back_in_s=8.0)  # it starts again
    enter(desk, turns, "e", now_s=4.0)
    desk.set_ready("chat/0", ready=True, now_s=5.0)
    assert turns.begun == ["a", "b", "c"], "it has waited all the same"


def test_who_asks_while_the_only_replica_makes_room_for_its_successor_waits_if_its_deadline_lets_it() -> None:
    desk, turns = dispatcher(ttft_s=10.0), Turns()
    running = enter(desk, turns, "a")
    desk.hold("chat/0", 1.0, drains=True)
    desk.expect([Coming(replica=desk.lanes["chat/0"].replica, there_s=31.0)])
    assert ask(desk, turns, "early", now_s=1.0) == Refusal(rule=NOT_SERVED, retry_after_s=30.0)
    enter(desk, turns, "flex", now_s=1.0, wait_s=600.0)
    enter(desk, turns, "late", now_s=25.0)
    desk.leave(running, 26.0)
    assert turns.begun == ["a"]
    successor = msgspec.structs.replace(desk.lanes["chat/0"].replica, id="chat/1")
    desk.remove("chat/0")
    desk.add(successor)
    desk.expect(())
    desk.set_ready("chat/1", ready=True, now_s=31.0)
    assert turns.begun == ["a", "flex", "late"]


def plan_of_two_sizes() -> Plan:
    plan = plan_of(2, max_batch=1)
    large, small = plan.replicas
    large = msgspec.structs.replace(large, cache_tokens=512)
    small = msgspec.structs.replace(small, cache_tokens=64)
    return msgspec.structs.replace(plan, replicas=(large, small))


def test_who_waits_for_a_large_replica_that_goes_holds_up_nobody() -> None:
    desk, turns = Dispatcher(plan_of_two_sizes(), lambda: 0), Turns()
    for replica in desk.lanes:
        desk.set_ready(replica, ready=True, now_s=0.0)
    tickets = [enter(desk, turns, "large", prompt_tokens=400), enter(desk, turns, "small")]
    enter(desk, turns, "large, waits", prompt_tokens=400, line="another")
    enter(desk, turns, "small, waits")
    desk.leave(tickets[1], 1.0)
    assert turns.begun == ["large", "small"], "the turn is that of one who needs the large one"
    desk.set_ready("chat/0", ready=False, now_s=2.0)
    desk.tick(2.0)
    assert turns.begun == ["large", "small", "large, waits"], "its tokens are a guess: the engine may have room"
    desk.leave(turns.tickets[2], 3.0)
    assert turns.begun[3:] == ["small, waits"]


def test_where_only_a_replica_that_is_too_small_has_not_failed_a_request_it_goes_back_to_the_large_one() -> None:
    desk, turns = Dispatcher(plan_of_two_sizes(), lambda: 0), Turns()
    for replica in desk.lanes:
        desk.set_ready(replica, ready=True, now_s=0.0)
    ticket = enter(desk, turns, "large", prompt_tokens=400)
    desk.move(ticket, frozenset({"chat/0"}), 1.0)
    assert (turns.begun, replica_of(ticket)) == (["large"] * 2, "chat/0")


def test_whose_turn_never_comes_is_told_so() -> None:
    desk, turns = dispatcher(max_batch=1, ttft_s=60.0), Turns()
    enter(desk, turns, "a")
    enter(desk, turns, "b")
    desk.tick(179.0)
    assert turns.lost == []
    desk.tick(181.0)
    assert turns.lost == ["b"]


def test_a_request_for_several_answers_is_expected_to_produce_them_all() -> None:
    desk = dispatcher()
    desk.enter("chat", 5, 4, lambda _go: None, 0.0, tenant="public", answers=6)
    assert desk.lanes["chat/0"].backlog_tokens == 5 + 6 * 4


def test_a_failed_request_goes_to_another_replica_or_back_to_the_only_one() -> None:
    desk, turns = dispatcher(2), Turns()
    ticket = enter(desk, turns, "a")
    desk.move(ticket, frozenset({"chat/0"}), 1.0)
    assert replica_of(ticket) == "chat/1"
    desk.set_ready("chat/0", ready=False, now_s=2.0)
    desk.move(ticket, frozenset({"chat/0", "chat/1"}), 2.0)
    assert replica_of(ticket) == "chat/1"
    desk.set_ready("chat/1", ready=False, now_s=2.0)
    desk.move(ticket, frozenset({"chat/1"}), 3.0)
    assert turns.begun == ["a"] * 3
    desk.set_ready("chat/0", ready=True, now_s=4.0)
    assert (turns.begun, replica_of(ticket)) == (["a"] * 4, "chat/0"), "it has waited for it"


def test_who_has_begun_goes_before_all_who_wait() -> None:
    desk, turns = dispatcher(2, max_batch=1), Turns()
    a, b = enter(desk, turns, "a", line="many"), enter(desk, turns, "b", line="many")
    enter(desk, turns, "c", line="new")
    desk.set_ready("chat/0", ready=False, now_s=1.0)
    desk.move(a, frozenset({"chat/0"}), 1.0)
    desk.leave(b, 2.0)
    assert turns.begun == ["a", "b", "a"]


def test_a_replica_that_fails_requests_gets_none_until_it_is_trusted_again() -> None:
    desk, turns = dispatcher(2), Turns()
    desk.doubt("chat/0", doubted=True, now_s=0.0)
    assert [replica_of(enter(desk, turns, name)) for name in "ab"] == ["chat/1"] * 2
    enter(desk, turns, "c")
    desk.set_ready("chat/0", ready=True, now_s=1.0)
    assert turns.begun == ["a", "b"], "it answers, but that was not the question"
    desk.doubt("chat/0", doubted=False, now_s=2.0)
    assert turns.begun == ["a", "b", "c"]


def test_requests_that_share_a_replica_share_its_time() -> None:
    desk, turns = dispatcher(), Turns()
    a = enter(desk, turns, "a", now_s=0.0)
    b = enter(desk, turns, "b", now_s=4.0)
    desk.leave(a, 6.0)  # 4 s alone, 2 s together
    desk.leave(b, 9.0)  # 2 s together, 3 s alone
    assert (a.gpu_s, b.gpu_s) == (5.0, 4.0)


def test_prompts_that_begin_alike_go_to_the_replica_that_has_read_the_beginning() -> None:
    desk, turns = dispatcher(2, max_batch=4), Turns()
    prompts = {name: bytes(2048) * 4 + name.encode() * 2048 for name in "ab"}
    chosen = []
    for name in ("a", "b", "a"):
        blocks = list(block_keys(prompts[name], 2048))
        ticket = desk.enter("chat", 2560, 1, turns.of(name), 0.0, tenant="public", blocks=blocks)  # type: ignore[arg-type]
        assert isinstance(ticket, Ticket)
        chosen.append((replica_of(ticket), ticket.unread_tokens))
        desk.first_token(ticket)
    assert chosen == [("chat/0", 2560), ("chat/0", 512), ("chat/0", 1)]


def test_replicas_come_and_go() -> None:
    desk, turns, plan = dispatcher(1), Turns(), plan_of(3)
    for replica in plan.replicas[1:]:
        desk.add(replica)
        desk.set_ready(replica.id, ready=True, now_s=0.0)
    chosen = [replica_of(enter(desk, turns, str(number))) for number in range(3)]
    assert chosen == ["chat/0", "chat/1", "chat/2"]
    desk.set_ready("chat/2", ready=False, now_s=1.0)
    desk.remove("chat/2")
    assert {replica_of(enter(desk, turns, "later")) for _ in range(2)} == {"chat/0", "chat/1"}
    assert set(desk.lanes) == {"chat/0", "chat/1"}


def test_a_new_plan_brings_tenants_models_and_expectations() -> None:
    desk, turns = dispatcher(1), Turns()
    plan = fake_plan({"chat": 1, "code": 1}, output_tokens=30)
    tenants = (Tenant(name="research", deserved=1.0), *TENANTS)
    desk.use_plan(msgspec.structs.replace(plan, fleet=msgspec.structs.replace(plan.fleet, tenants=tenants)))
    desk.add(plan.replicas[1])
    desk.set_ready("code/0", ready=True, now_s=0.0)
    ticket = desk.enter("code", 5, None, turns.of("a"), 0.0, tenant="research")
    assert isinstance(ticket, Ticket)
    assert ticket.output_tokens == 30
    assert desk.take_loads() == {("research", "code"): (5, 30)}
    assert desk.take_loads() == {}


def test_clients_without_end_are_forgotten_when_they_have_nothing_under_way() -> None:
    desk, turns = dispatcher(), Turns()
    keeper = enter(desk, turns, "keeper", line="keeper")
    for number in range(MOST_CLIENTS + 50):
        desk.leave(enter(desk, turns, "one", line=str(number)), 0.0)
    assert len(desk.rows.desk.queue.counter_gpu_s) < 40 * MOST_CLIENTS
    desk.leave(keeper, 0.0)
    assert (desk.under_way("enterprise"), desk.lanes["chat/0"].backlog_tokens) == (0, 0)


CHANGES = ("fail", "recover", "hold", "doubt", "trust", "tick")  # of replicas, and of time
events = st.lists(
    st.tuples(st.sampled_from(["enter", "first", "leave", "move", *CHANGES]), st.integers(0, 7)), max_size=60
)


def change(desk: Dispatcher, event: str, replica: str, now_s: float) -> None:
    if event in {"fail", "recover"}:
        desk.set_ready(replica, ready=event == "recover", now_s=now_s)
    elif event == "hold":
        desk.hold(replica, now_s)
    elif event in {"doubt", "trust"}:
        desk.doubt(replica, doubted=event == "doubt", now_s=now_s)
    else:
        desk.tick(now_s)


@given(events)
def test_when_all_have_left_nothing_is_left(happened: list[tuple[str, int]]) -> None:
    desk, inside, now_s = dispatcher(2), list[Ticket](), 0.0
    tenants = ("enterprise", "public")
    for event, number in happened:
        now_s += 1.0
        ticket, replica = inside[number % len(inside)] if inside else None, f"chat/{number % 2}"
        if event in CHANGES:
            change(desk, event, replica, now_s)
        elif event == "enter":
            asked = {"tenant": tenants[number % 2], "line": str(number)}
            entered = desk.enter("chat", number + 1, None, lambda _go: None, now_s, **asked)
            inside += [entered] if isinstance(entered, Ticket) else []
        elif ticket and event == "first":
            desk.first_token(ticket)
        elif ticket and event == "move":
            desk.move(ticket, frozenset({replica}), now_s)
        elif ticket:
            inside.remove(ticket)
            desk.leave(ticket, now_s)
        chat = desk.services["chat"]
        assert all(lane.running <= lane.replica.max_batch for lane in chat.lanes)
        assert chat.running + chat.waiting == len(inside) == sum(map(desk.under_way, tenants))
    for ticket in inside:
        desk.leave(ticket, now_s)
    assert all((lane.running, lane.backlog_tokens) == (0, 0) for lane in desk.lanes.values())
    chat = desk.services["chat"]
    assert (chat.lines, chat.returned) == ({}, [])
    assert set(desk.rows.desk.queue.waiting) == {0}
