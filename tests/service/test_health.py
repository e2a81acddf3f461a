"""Who is left out after failures, and who comes back; a fake clock, no sockets."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import fake_plan

from waterline.plan import Replica
from waterline.service.health import FIRST_PAUSE_S, IN_A_ROW, LONGEST_PAUSE_S, Health


class World:
    """Replicas, a clock that moves when somebody sleeps, and who was ejected when."""

    def __init__(self, replicas: int = 4) -> None:
        self.replicas = fake_plan({"chat": replicas}).replicas
        self.now_s = 0.0
        self.well = False  # whether probes are answered
        self.doubted: set[str] = set()
        self.pauses_s: list[float] = []
        self.health = Health(
            lambda like: [replica.id for replica in self.replicas if replica.model == like.model],
            self.on_doubt,
            self.probe,
            clock=lambda: self.now_s,
            sleep=self.sleep,
        )

    def on_doubt(self, replica_id: str, doubted: bool) -> None:
        (self.doubted.add if doubted else self.doubted.remove)(replica_id)

    async def probe(self, _replica: Replica) -> bool:
        return self.well

    async def sleep(self, pause_s: float) -> None:
        self.pauses_s.append(pause_s)
        self.now_s += pause_s
        await asyncio.sleep(0)

    def fail(self, number: int = 0, times: int = IN_A_ROW) -> None:
        for _ in range(times):
            self.health.failed(self.replicas[number])


async def turns_until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - it sets no event for us
        await asyncio.sleep(0)


def run(case: Callable[[World], Awaitable[None]], replicas: int = 4) -> World:
    async def main() -> World:
        world = World(replicas)
        await case(world)
        world.health.close()
        return world

    return asyncio.run(main())


def test_failures_in_a_row_eject_and_a_success_between_them_does_not() -> None:
    async def case(world: World) -> None:
        world.fail(times=IN_A_ROW - 1)
        world.health.served(world.replicas[0])
        world.fail(times=IN_A_ROW - 1)
        assert world.doubted == set()
        world.fail(times=1)
        assert world.doubted == {"chat/0"}

    run(case)


def test_one_that_fails_every_other_request_is_ejected_too() -> None:
    async def case(world: World) -> None:
        for _ in range(4):
            world.fail(times=1)
            world.health.served(world.replicas[0])
        assert world.doubted == set()
        world.fail(times=2)
        assert world.doubted == {"chat/0"}

    run(case)


def test_old_failures_fade() -> None:
    async def case(world: World) -> None:
        for _ in range(40):
            world.fail(times=1)
            world.health.served(world.replicas[0])
            world.now_s += 10.0
        assert world.doubted == set()

    run(case)


@pytest.mark.parametrize(("replicas", "at_most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_at_most_half_of_a_model_is_out(replicas: int, at_most: int) -> None:
    async def case(world: World) -> None:
        for number in range(replicas):
            world.fail(number, times=20)
        assert len(world.doubted) == at_most

    run(case, replicas)


def test_the_pause_before_it_is_tried_again_grows_until_it_has_served() -> None:
    async def case(world: World) -> None:
        world.fail()
        await turns_until(lambda: len(world.pauses_s) >= 9)
        world.well = True
        await turns_until(lambda: not world.doubted)
        assert world.pauses_s[:9] == [min(FIRST_PAUSE_S * 2**n, LONGEST_PAUSE_S) for n in range(9)]
        world.fail(times=1)
        assert world.doubted == {"chat/0"}, "one on trial may not fail even once"
        await turns_until(lambda: not world.doubted)
        assert world.pauses_s[-1] == LONGEST_PAUSE_S
        world.health.served(world.replicas[0])
        world.fail()
        await asyncio.sleep(0)
        assert world.pauses_s[-1] == FIRST_PAUSE_S

    run(case)


def test_one_that_begins_anew_has_failed_nobody() -> None:
    async def case(world: World) -> None:
        world.fail()
        world.health.forget("chat/0")
        assert world.doubted == set()
        world.fail(times=IN_A_ROW - 1)
        assert world.doubted == set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert world.pauses_s == [], "nobody waits for the one that is gone"

    run(case)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["failed", "served", "silent", "forget"])), max_size=80))
def test_whatever_happens_half_of_the_replicas_stay(events: list[tuple[int, str]]) -> None:
    async def case(world: World) -> None:
        for number, event in events:
            replica = world.replicas[number]
            if event == "forget":
                world.health.forget(replica.id)
            elif event == "served":
                world.health.served(replica)
            else:
                world.health.failed(replica, silent=event == "silent")
            world.now_s += 0.1
            assert len(world.doubted) <= 2

    run(case)


def test_a_replica_that_says_nothing_is_silent_also_where_others_are_quicker_to_answer() -> None:
    async def case(world: World) -> None:
        mute, within_s = world.replicas[0], world.health.of(world.replicas[0]).first_within_s
        for number in range(6):
            since_s = number * within_s
            world.health.was_beaten(mute, since_s, since_s + 0.4 * within_s)
            assert world.doubted == (set() if number < 5 else {mute.id}), "waited for 2.4 times as long, in all"

    run(case)


def test_two_who_wait_at_a_time_wait_no_longer_than_one() -> None:
    async def case(world: World) -> None:
        mute, within_s = world.replicas[0], world.health.of(world.replicas[0]).first_within_s
        for _ in range(9):
            world.health.was_beaten(mute, 0.0, 0.9 * within_s)
        assert world.health.of(mute).failures == 0.0

    run(case)


@pytest.mark.parametrize("speaks", ["a stream", "a whole answer"])
def test_a_replica_that_is_beaten_time_and_again_and_answers_others_is_not_silent(speaks: str) -> None:
    async def case(world: World) -> None:
        slow, within_s = world.replicas[0], world.health.of(world.replicas[0]).first_within_s
        for number in range(20):
            since_s = number * within_s
            world.health.was_beaten(slow, since_s, since_s + 0.9 * within_s)
            if speaks == "a stream":
                world.health.of(slow).heard_s = since_s + 0.95 * within_s
            else:
                world.health.served(slow)
        assert world.health.of(slow).failures == 0.0

    run(case)
