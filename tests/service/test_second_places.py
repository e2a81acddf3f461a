"""Second places at the desk: who gets one, who takes it away, what is charged and remembered; no sockets, no clock."""

import json
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from serving import fake_plan

from waterline.fleet import Tenant
from waterline.service.dispatcher import Dispatcher
from waterline.service.lines import Ticket

TENANTS = (
    Tenant(name="enterprise", guarantee=0.5, deserved=0.5),
    Tenant(name="public", deserved=0.5),
    Tenant(name="bounded", limit=0.01),
)
BLOCKS = np.array([11], np.int64)


class Desk:
    """A desk whose replicas are ready, and what it has told."""

    def __init__(self, replicas: int = 2, *, max_batch: int = 1) -> None:
        plan = fake_plan({"chat": replicas}, max_batch=max_batch, tokens_per_s=1000.0)
        self.does = Dispatcher(replace(plan, fleet=replace(plan.fleet, tenants=TENANTS)), lambda: 0)
        for replica in plan.replicas:
            self.does.set_ready(replica.id, ready=True, now_s=0.0)
        self.begun: list[str] = []
        self.lost_gpu_s: list[float] = []

    def enter(self, name: str, now_s: float = 0.0, tenant: str = "enterprise", **asked: Any) -> Ticket:
        ticket = self.does.enter("chat", 100, None, lambda _: self.begun.append(name), now_s, tenant=tenant, **asked)
        assert isinstance(ticket, Ticket)
        return ticket

    def hedge(self, ticket: Ticket, now_s: float = 0.0) -> str | None:
        replica = self.does.hedge(ticket, self.lost_gpu_s.append, now_s)
        return replica.id if replica else None

    def unread(self) -> list[int]:
        return [int(self.does.rows.desk.replicas.unread_tokens[lane.row]) for lane in self.does.lanes.values()]

    def running(self) -> list[int]:
        return [lane.running for lane in self.does.lanes.values()]


def place_of(ticket: Ticket) -> str:
    assert ticket.lane
    return ticket.lane.replica.id


def test_who_comes_and_would_have_to_wait_gets_the_slot_of_a_second_place() -> None:
    desk = Desk()
    late = desk.enter("late")
    assert desk.hedge(late) == "chat/1"
    assert desk.hedge(late) is None, "it has one already"
    newcomer = desk.enter("newcomer", 3.0)
    assert (desk.begun, place_of(newcomer), place_of(late)) == (["late", "newcomer"], "chat/1", "chat/0")
    assert (desk.lost_gpu_s, late.second) == ([3.0], None)
    assert desk.hedge(late, 3.0) is None, "there is no slot"


def test_who_has_to_move_on_gets_the_slot_of_a_second_place() -> None:
    desk = Desk(replicas=3)
    late, other = desk.enter("late"), desk.enter("other")
    assert desk.hedge(late) == "chat/2"
    desk.does.move(other, frozenset({"chat/1"}), 2.0)
    assert (place_of(other), desk.lost_gpu_s) == ("chat/2", [2.0]), "not where it has failed"
    assert desk.does.services["chat"].waiting == 0


def test_who_waits_because_of_its_tenants_limit_is_not_pushed_back_and_one_whose_limit_is_left_goes_first() -> None:
    desk = Desk(max_batch=1)
    spent = desk.enter("spent", tenant="bounded")
    desk.does.leave(spent, 0.0, gpu_s=1e6)
    waits = desk.enter("waits", tenant="bounded", wait_s=1e9)
    late = desk.enter("late")
    assert (desk.begun, desk.does.services["chat"].waiting) == (["spent", "late"], 1)
    assert desk.hedge(late) == "chat/1", "the slot is of no use to who waits"
    desk.does.tick(1e6)
    assert (place_of(waits), len(desk.lost_gpu_s)) == ("chat/1", 1), "the limit is left, and the slot is needed"


def test_nobody_gets_a_second_place_while_somebody_waits_for_a_slot() -> None:
    desk = Desk()
    late, _, _ = desk.enter("late"), desk.enter("other"), desk.enter("waits")
    assert desk.hedge(late) is None


@pytest.mark.parametrize("wins", [True, False])
def test_only_a_replica_that_answers_is_taken_to_keep_the_prompt(wins: bool) -> None:
    desk = Desk(max_batch=4)
    late = desk.enter("late", blocks=BLOCKS)
    assert desk.hedge(late) == "chat/1"
    (desk.does.take_second if wins else desk.does.drop_second)(late, 1.0)
    desk.does.leave(late, 2.0)
    again = desk.enter("again", 2.0, blocks=BLOCKS)
    assert (place_of(again), again.unread_tokens) == ("chat/1" if wins else "chat/0", 1), "all but the last is kept"


def test_each_of_the_two_replicas_has_read_the_prompt_when_it_says_so() -> None:
    desk = Desk()
    late = desk.enter("late")
    desk.hedge(late)
    assert desk.unread() == [100, 100]
    for _ in range(2):
        desk.does.first_token(late, "chat/1")
        assert desk.unread() == [100, 0]
    desk.does.take_second(late, 1.0)
    assert desk.unread() == [0, 0]
    desk.does.first_token(late, "chat/1")
    desk.does.leave(late, 1.0)
    assert (desk.unread(), desk.running()) == ([0, 0], [0, 0])


@pytest.mark.parametrize(("wins", "paid_gpu_s"), [(True, 3.0), (False, 5.0)])
def test_the_time_on_the_replica_that_answers_is_paid_and_on_the_other_it_is_nobodys(
    wins: bool, paid_gpu_s: float
) -> None:
    desk = Desk()
    late = desk.enter("late")
    desk.hedge(late, 2.0)
    lost_gpu_s = (desk.does.take_second if wins else desk.does.drop_second)(late, 4.0)
    assert lost_gpu_s == (4.0 if wins else 2.0)
    desk.does.leave(late, 5.0)
    accounts = desk.does.rows.desk.accounts
    assert late.gpu_s == pytest.approx(paid_gpu_s)
    assert [float(one) for one in list(accounts.used_gpu_s)[:3]] == pytest.approx([paid_gpu_s, 0.0, 0.0])


@pytest.mark.parametrize(("drains", "lost_gpu_s", "unread"), [("chat/0", [], [100, 100]), ("chat/1", [2.0], [100, 0])])
def test_a_replica_that_drains_does_not_wait_for_what_another_does_as_well(
    drains: str, lost_gpu_s: list[float], unread: list[int]
) -> None:
    desk = Desk()
    late = desk.enter("late")
    desk.hedge(late)
    desk.does.hold(drains, 2.0, drains=True)
    assert (desk.lost_gpu_s, desk.unread()) == (lost_gpu_s, unread)


@pytest.mark.parametrize("ends", ["leave", "move"])
def test_who_ends_or_moves_on_leaves_both(ends: str) -> None:
    desk = Desk()
    late = desk.enter("late")
    desk.hedge(late)
    if ends == "leave":
        desk.does.leave(late, 1.0)
    else:
        desk.does.move(late, frozenset({"chat/0"}), 1.0)
        assert (place_of(late), desk.running()) == ("chat/1", [0, 1])
        desk.does.leave(late, 1.0)
    assert (desk.unread(), desk.running(), desk.does.services["chat"].hedged) == ([0, 0], [0, 0], [])
    assert desk.does.drop_second(late, 1.0) == 0.0


def test_the_decision_log_tells_of_a_second_place_by_a_rule_of_its_own() -> None:
    desk, told = Desk(), list[dict[str, Any]]()
    desk.does.log.tell(lambda line: told.append(json.loads(line)), 0.0)
    late = desk.enter("late", id_="r-1")
    desk.hedge(late, 0.5)
    assert [(one["request_id"], one["rule"], one["place"]) for one in told] == [
        ("r-1", "slot free", "chat/0"),
        ("r-1", "hedges", "chat/1"),
    ]
    assert (told[1]["at_ns"], "cost_ms" in told[1]) == (500_000_000, False)
