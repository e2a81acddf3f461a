import threading
from collections.abc import Iterator
from functools import partial

import pytest

from waterline.rehearsal.beside import Behind, ahead


def test_things_made_ahead_come_in_their_order_and_one_is_made_while_another_is_used() -> None:
    made: list[int] = []
    second_is_made = threading.Event()

    def things() -> Iterator[int]:
        for number in range(1, 4):
            made.append(number)
            if number == 2:
                second_is_made.set()
            yield number

    got = []
    for thing in ahead(things()):
        got.append(thing)
        assert second_is_made.wait(10)
    assert got == made == [1, 2, 3]


def test_what_goes_wrong_in_making_is_raised_to_whoever_asks_for_it() -> None:
    def things() -> Iterator[int]:
        yield 1
        raise ValueError("line 2 is no request")

    made = ahead(things())
    assert next(made) == 1
    with pytest.raises(ValueError, match="line 2"):
        next(made)


def test_who_stops_asking_leaves_no_thread() -> None:
    for thing in ahead(iter(range(1, 100))):
        if thing == 3:
            break
    assert not [one for one in threading.enumerate() if one.name.startswith("ahead")]


def test_things_are_done_behind_in_the_order_in_which_they_were_told() -> None:
    done: list[int] = []
    with Behind() as behind:
        for number in range(20):
            behind.do(partial(done.append, number))
    assert done == list(range(20))


def test_what_goes_wrong_behind_is_raised_at_the_end_at_the_latest() -> None:
    def fail() -> None:
        raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="disk"), Behind() as behind:
        behind.do(fail)


def test_an_error_of_ones_own_is_not_hidden_by_one_behind() -> None:
    def fail(error: Exception) -> None:
        raise error

    def tell_and_fail() -> None:
        with Behind() as behind:
            behind.do(partial(fail, ValueError("the disk is full")))
            fail(KeyError("own"))

    with pytest.raises(KeyError, match="own"):
        tell_and_fail()
