"""Why a request went where it went, live; that it is what a rehearsal says, `test_parity` has."""

import json
from typing import Any

import msgspec
import numpy as np
from serving import fake_plan
from split import split_plan

from waterline.fleet import Tenant
from waterline.plan import Plan
from waterline.policy.decisions import NONE
from waterline.service.dispatcher import Dispatcher
from waterline.service.lines import Ticket
from waterline.units import GIGA

TENANTS = (Tenant(name="enterprise", guarantee=0.5, deserved=0.5), Tenant(name="public", deserved=0.5))


class Desk:
    """A desk whose replicas are ready, and what it says."""

    def __init__(self, plan: Plan, *, begun_s: float = 0.0) -> None:
        fleet = msgspec.structs.replace(plan.fleet, tenants=TENANTS)
        self.does = Dispatcher(msgspec.structs.replace(plan, fleet=fleet), lambda: 0)
        self.told: list[dict[str, Any]] = []
        self.does.log.tell(lambda line: self.told.append(json.loads(line)), begun_s)
        for replica in plan.replicas:
            self.does.set_ready(replica.id, ready=True, now_s=0.0)

    def ask(self, id_: str, now_s: float = 0.0, *, tenant: str = "enterprise", **asked: Any) -> Ticket:
        ticket = self.does.enter("chat", 100, None, lambda _: None, now_s, tenant=tenant, id_=id_, **asked)
        assert isinstance(ticket, Ticket)
        return ticket

    def taken(self) -> list[dict[str, Any]]:
        """Return what it has said since this was asked last."""
        told, self.told[:] = list(self.told), []
        return told


def one_slot(replicas: int = 1) -> Plan:
    return fake_plan({"chat": replicas}, max_batch=1, tokens_per_s=1000.0)  # reads at 1000 tokens/s; 10 are expected


def test_a_line_says_who_asked_and_when_by_the_clock_on_the_wall() -> None:
    desk = Desk(one_slot(), begun_s=36_000.0)
    desk.ask("r-1", 0.5, line="alice")
    desk.ask("r-2", 0.75)
    (started,) = desk.taken()
    assert started == {
        "request_id": "r-1", "rule": "slot free", "at_ns": 36_000_500_000_000, "tenant": "enterprise",
        "claimant": "alice", "place": "chat/0", "amount": 110, "cost_ms": 0, "why": "only replica", "done_ms": 100,
    }  # fmt: skip


def test_who_has_waited_is_told_with_its_rivals_by_name() -> None:
    desk = Desk(one_slot(2))
    first = [desk.ask(f"r-{at}", tenant="public", line="carol") for at in range(2)]
    for id_, tenant, line in (("r-2", "public", "carol"), ("r-3", "enterprise", ""), ("r-4", "enterprise", "bob")):
        desk.ask(id_, 0.1, tenant=tenant, line=line)
    desk.taken()
    desk.does.leave(first[1], 2.1)
    (started,) = desk.taken()
    assert (started["request_id"], started["claimant"], started["place"]) == ("r-3", "enterprise/chat", "chat/1")
    assert (started["rule"], started["cost_ms"], started["turn"]) == ("waits for slot", 2000, "below guarantee")
    assert (started["next_tenant"], started["next_turn"]) == ("public", "below deserved")
    assert (started["next_claimant"], started["why"]) == ("bob", "only free")


def test_the_refused_are_told_when_to_come_back_and_those_who_go_why() -> None:
    desk = Desk(one_slot())
    running = desk.ask("r-1")
    waiting = [desk.ask(f"r-{at}", 1.0, wait_s=wait_s) for at, wait_s in ((2, 5.0), (3, 5.0), (4, 50.0))]
    desk.taken()
    refusal = desk.does.enter("chat", 100, None, lambda _: None, 1.0, tenant="public", wait_s=0.1, id_="r-5")
    assert not isinstance(refusal, Ticket)
    (told,) = desk.taken()
    assert (told["rule"], told["cost_ms"]) == ("too late", 0)
    assert told["deadline_ns"] == 1_000_000_000 + round(refusal.retry_after_s * GIGA)
    assert not {"place", "why", "turn"} & {*told}
    desk.does.leave(waiting[0], 3.0)
    desk.does.tick(waiting[1].until_s + 1.0)
    desk.does.leave(waiting[1], waiting[1].until_s + 1.1)
    desk.does.set_ready("chat/0", ready=False, now_s=50.0)
    desk.does.leave(waiting[2], 20.0)
    desk.does.leave(running, 60.0)
    went = desk.taken()
    assert [(one["request_id"], one["rule"]) for one in went] == [
        ("r-2", "gave up"), ("r-3", "too late"), ("r-4", "not served"),
    ]  # fmt: skip
    assert (went[1]["cost_ms"], went[1]["deadline_ns"] > went[1]["at_ns"]) == (31_000, True)


def test_without_a_replica_in_service_and_none_that_is_expected_no_time_is_named() -> None:
    desk = Desk(one_slot())
    desk.does.set_ready("chat/0", ready=False, now_s=0.0)
    desk.does.enter("chat", 100, None, lambda _: None, 1.0, tenant="public")
    (told,) = desk.taken()
    assert (told["rule"], told["claimant"]) == ("not served", "public/chat")
    assert not {"deadline_ns", "request_id"} & {*told}


def test_who_comes_back_goes_elsewhere_and_its_turn_is_told_only_where_it_is_its_turn() -> None:
    desk = Desk(one_slot(2))
    public, other = desk.ask("r-1", tenant="public"), desk.ask("r-2", tenant="public")
    desk.ask("r-3", 0.1, tenant="enterprise")
    desk.does.hold("chat/0", 0.5)
    desk.does.move(public, frozenset({"chat/0"}), 0.5)
    desk.taken()
    desk.does.leave(other, 1.0)
    (back,) = desk.taken()
    assert (back["request_id"], back["rule"], back["place"]) == ("r-1", "comes back", "chat/1")
    assert (back["why"], back["done_ms"]) == ("only replica", 100)
    assert not {"cost_ms", "turn"} & {*back}, "it does not wait for the tenants, of whom another would be next"


def test_who_takes_what_is_spare_is_told_apart() -> None:
    desk = Desk(one_slot())
    first = desk.ask("r-1")
    desk.ask("r-2", spare=True)
    desk.ask("r-3", tenant="public")
    desk.taken()
    desk.does.leave(first, 1.0)
    (told,) = desk.taken()
    assert (told["tenant"], told["next_tenant"], told["next_turn"]) == ("public", "enterprise, spare", "borrows")


def test_what_is_kept_of_a_prompt_is_told_with_who_keeps_it_also_when_that_one_has_gone() -> None:
    desk, blocks = Desk(one_slot(2)), np.array([7, 8], np.int64)
    desk.does.rows.desk.models.block_tokens[0] = 40
    first = desk.ask("r-1", blocks=blocks)
    desk.ask("r-2", blocks=blocks)
    assert [(one["place"], one.get("other"), one["why"]) for one in desk.taken()] == [
        ("chat/0", "chat/1", "shortest wait"), ("chat/1", "chat/0", "prefix busy"),
    ]  # fmt: skip
    desk.does.leave(first, 1.0)
    desk.does.remove("chat/1")
    desk.ask("r-3", 1.0, blocks=blocks)
    (told,) = desk.taken()
    assert (told["place"], told["other"], told["why"], told["cached"]) == ("chat/0", "chat/1", "prefix busy", 80)


def test_who_writes_what_another_has_read_is_told_and_that_there_was_nobody_else() -> None:
    desk = Desk(split_plan(1, 2, max_batch=2))
    tickets = [desk.ask(f"r-{at}") for at in range(2)]
    desk.taken()
    for at, ticket in enumerate(tickets):
        desk.does.has_read(ticket, 1.0 + at)
        if at == 1:
            for writer in ("w0", "w1"):
                desk.does.hold(writer, 2.0)
        desk.does.hand_over(ticket, 2.0)
    shortest, last = desk.taken()
    assert (shortest["rule"], shortest["place"], shortest["why"], shortest["other"]) == (
        "takes over", "w0", "shortest wait", "w1",
    )  # fmt: skip
    assert (last["rule"], last["place"], last["why"], last["done_ms"]) == ("takes over", "w1", "last resort", 0)
    assert "cost_ms" not in last
    desk.does.set_ready("w0", ready=True, now_s=3.0)
    third = desk.ask("r-3", 3.0)
    desk.does.has_read(third, 3.0)
    desk.taken()
    desk.does.leave(third, 4.0)
    assert [(one["rule"], one["cost_ms"]) for one in desk.taken()] == [("gave up", 1000)], "its cache was on its way"


def test_all_who_listen_are_told_the_same_and_nothing_is_made_for_nobody() -> None:
    desk, late = Desk(one_slot(), begun_s=100.0), list[bytes]()
    (first,) = desk.does.log.listeners
    desk.does.log.tell(late.append, 500.0)
    ticket = desk.ask("r-1")
    assert [json.loads(line) for line in late] == desk.taken()
    desk.does.leave(ticket, 1.0)
    desk.does.log.listeners.clear()
    made = desk.does.log._reasons  # the only trace it could leave
    made[:] = NONE
    desk.ask("r-2", 2.0)
    assert set(made.tolist()) == {NONE}
    desk.does.log.tell(first, 500.0)
    desk.ask("r-3", 3.0)
    desk.does.set_ready("chat/0", ready=False, now_s=3.0)
    desk.does.enter("chat", 100, None, lambda _: None, 4.0, tenant="public")
    assert [one["at_ns"] for one in desk.taken()] == [504 * GIGA]
