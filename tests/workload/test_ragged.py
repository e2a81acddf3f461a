"""Lists of numbers beside columns of numbers: whatever is done to columns is done to them."""

from itertools import accumulate

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from waterline.workload.ragged import Ragged, empty, joined, ragged

listed = st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), max_size=8)


def lists(column: Ragged) -> list[list[int]]:
    ends = column.ends.tolist()
    return [column.values[begin:end].tolist() for begin, end in zip([0, *ends], ends, strict=False)]


@given(made=listed, more=listed, data=st.data())
def test_it_is_cut_picked_and_joined_like_a_list_of_lists(
    made: list[list[int]], more: list[list[int]], data: st.DataObject
) -> None:
    column = ragged(made)
    assert (lists(column), len(column), column.counts.tolist()) == (made, len(made), [len(one) for one in made])
    begin, end = data.draw(st.integers(-9, 9)), data.draw(st.integers(-9, 9))
    assert lists(column[begin:end]) == made[begin:end]
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(made), max_size=len(made))), np.bool_)
    assert lists(column[mask]) == [one for one, kept in zip(made, mask.tolist(), strict=True) if kept]
    if made:
        places = np.array(data.draw(st.lists(st.integers(0, len(made) - 1), max_size=9)), np.int64)
        assert lists(column[places]) == [made[place] for place in places]
    assert lists(joined([column, empty(2), ragged(more)])) == [*made, [], [], *more]


def test_populations_have_keys_of_their_own_and_prompts_that_begin_alike_still_do() -> None:
    column = ragged([[1, 2, 3], [1, 2, 4], [1, 2, 3]])
    apart = lists(column.apart(np.array([0, 1, 1]), "copies"))
    assert apart[0] == [1, 2, 3]
    assert apart[1][:2] == apart[2][:2]
    assert len(set(accumulate(apart, lambda known, one: known + one).__next__() + apart[1] + apart[2])) == 7
    assert lists(column.apart(np.array([0, 1, 1]), "others"))[1] != apart[1]
