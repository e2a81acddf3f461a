"""Who is taken in, where, and whose turn it is; no sockets, no clock."""

from hypothesis import given
from hypothesis import strategies as st
from serving import fake_plan

from waterline.service.dispatcher import Dispatcher, Refusal, Ticket, Turn


def dispatcher(
    replicas: int = 1, *, max_batch: int = 2, deadline_s: float = 60.0, tokens_per_s: float = 100.0
) -> Dispatcher:
    plan = fake_plan({"chat": replicas}, max_batch=max_batch, tokens_per_s=tokens_per_s)
    made = Dispatcher(plan.replicas, expected_prompt_tokens=0, expected_output_tokens=10, deadline_s=deadline_s)
    for replica in plan.replicas:
        made.set_ready(replica.id, ready=True, now_s=0.0)
    return made


class Turns:
    """Notes the names of those whose turn has come, in order."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.lost: list[str] = []

    def of(self, name: str) -> Turn:
        return lambda go: (self.begun if go else self.lost).append(name)


def enter(desk: Dispatcher, turns: Turns, name: str, prompt_tokens: int = 5, now_s: float = 0.0) -> Ticket:
    ticket = desk.enter(prompt_tokens, None, turns.of(name), now_s)
    assert isinstance(ticket, Ticket)
    return ticket


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
    chosen = [enter(desk, turns, str(number)).lane.replica.id for number in range(6)]
    assert chosen == ["chat/0", "chat/1", "chat/2"] * 2


def test_the_backlog_is_prompt_and_expected_output_then_output_then_nothing() -> None:
    desk, turns = dispatcher(), Turns()
    ticket, limited = enter(desk, turns, "a", prompt_tokens=7), desk.enter(3, 4, turns.of("b"), 0.0)
    lane = ticket.lane
    assert lane.backlog_tokens == 7 + 10 + 3 + 4
    desk.first_token(ticket)
    desk.first_token(ticket)
    assert lane.backlog_tokens == 10 + 3 + 4
    desk.leave(ticket, 1.0)
    assert isinstance(limited, Ticket)
    desk.leave(limited, 1.0)
    assert (lane.backlog_tokens, lane.unread_tokens, lane.running) == (0, 0, 0)


def test_who_would_wait_too_long_is_told_when_to_come_back() -> None:
    desk, turns = dispatcher(max_batch=1, deadline_s=1.0, tokens_per_s=10.0), Turns()
    enter(desk, turns, "a")  # 5 prompt tokens: 0.5 s
    enter(desk, turns, "b")  # 10 prompt tokens and 10 for the slot: 2 s, which is 1 s too long
    assert desk.enter(5, None, turns.of("c"), 0.0) == Refusal(retry_after_s=1.0, replicas_ready=1)


def test_without_a_ready_replica_nobody_is_taken_in() -> None:
    desk, turns = dispatcher(deadline_s=3.0), Turns()
    desk.set_ready("chat/0", ready=False, now_s=0.0)
    assert desk.enter(5, None, turns.of("a"), 0.0) == Refusal(retry_after_s=3.0, replicas_ready=0)


def test_who_waits_for_a_replica_that_fails_moves_to_the_others() -> None:
    desk, turns = dispatcher(2, max_batch=1), Turns()
    tickets = [enter(desk, turns, name) for name in "abcd"]  # a, c on the first; b, d on the second
    desk.set_ready("chat/0", ready=False, now_s=1.0)
    assert tickets[2].lane.replica.id == "chat/1"
    desk.leave(tickets[1], 2.0)
    assert turns.begun == ["a", "b", "c"], "c has waited longer than d"
    desk.set_ready("chat/1", ready=False, now_s=3.0)
    assert turns.lost == ["d"]


def test_who_waits_for_a_replica_in_doubt_moves_or_waits_on() -> None:
    desk, turns = dispatcher(2, max_batch=1), Turns()
    a, b, c, _ = [enter(desk, turns, name) for name in "abcd"]  # a, c on the first; b, d on the second
    desk.hold("chat/0", 1.0)
    assert c.lane.replica.id == "chat/1"
    desk.hold("chat/1", 2.0)
    desk.leave(a, 3.0)
    desk.leave(b, 3.0)
    assert (turns.begun, turns.lost) == (["a", "b"], []), "there is no other"
    desk.set_ready("chat/1", ready=True, now_s=4.0)
    assert turns.begun == ["a", "b", "c"]


def test_a_request_for_several_answers_is_expected_to_produce_them_all() -> None:
    desk = dispatcher()
    desk.enter(5, 4, lambda _go: None, 0.0, answers=6)
    assert desk.lanes[0].backlog_tokens == 5 + 6 * 4


def test_a_failed_request_goes_to_another_replica_or_back_to_the_only_one() -> None:
    desk, turns = dispatcher(2), Turns()
    ticket = enter(desk, turns, "a")
    assert desk.move(ticket, turns.of("again"), 1.0)
    assert ticket.lane.replica.id == "chat/1"
    desk.set_ready("chat/0", ready=False, now_s=2.0)
    assert desk.move(ticket, turns.of("once more"), 2.0)
    desk.set_ready("chat/1", ready=False, now_s=2.0)
    assert not desk.move(ticket, turns.of("never"), 3.0)
    assert turns.begun == ["a", "again", "once more"]


def test_requests_that_share_a_replica_share_its_time() -> None:
    desk, turns = dispatcher(), Turns()
    a = enter(desk, turns, "a", now_s=0.0)
    b = enter(desk, turns, "b", now_s=4.0)
    desk.leave(a, 6.0)  # 4 s alone, 2 s together
    desk.leave(b, 9.0)  # 2 s together, 3 s alone
    assert (a.gpu_s, b.gpu_s) == (5.0, 4.0)


events = st.lists(
    st.tuples(st.sampled_from(["enter", "first", "leave", "move", "fail", "hold", "recover"]), st.integers(0, 7)),
    max_size=60,
)


@given(events)
def test_when_all_have_left_nothing_is_left(happened: list[tuple[str, int]]) -> None:
    desk, inside, now_s = dispatcher(2), list[Ticket](), 0.0
    for event, number in happened:
        now_s += 1.0
        ticket = inside[number % len(inside)] if inside else None
        if event == "enter":
            entered = desk.enter(number + 1, None, lambda _go: None, now_s)
            inside += [entered] if isinstance(entered, Ticket) else []
        elif event in {"fail", "recover"}:
            desk.set_ready(f"chat/{number % 2}", ready=event == "recover", now_s=now_s)
        elif event == "hold":
            desk.hold(f"chat/{number % 2}", now_s)
        elif ticket and event == "first":
            desk.first_token(ticket)
        elif ticket and event == "move":
            desk.move(ticket, lambda _go: None, now_s)
        elif ticket:
            inside.remove(ticket)
            desk.leave(ticket, now_s)
        assert all(lane.running <= lane.replica.max_batch for lane in desk.lanes)
        assert sum(lane.running + len(lane.waiting) for lane in desk.lanes) == len(inside)
    for ticket in inside:
        desk.leave(ticket, now_s)
    assert all((lane.running, lane.unread_tokens, lane.backlog_tokens) == (0, 0, 0) for lane in desk.lanes)
