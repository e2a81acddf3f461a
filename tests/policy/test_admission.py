from hypothesis import given
from hypothesis import strategies as st

from waterline.policy.admission import ADMIT, retry_after_s


def test_a_request_is_taken_in_while_the_work_before_it_fits_the_deadline() -> None:
    assert retry_after_s(backlog_tokens=500, tokens_per_s=100, deadline_s=5) == ADMIT
    assert retry_after_s(backlog_tokens=800, tokens_per_s=100, deadline_s=5) == 3.0


def test_with_no_replica_ready_the_deadline_is_the_answer() -> None:
    assert retry_after_s(backlog_tokens=0, tokens_per_s=0, deadline_s=2) == 2.0


@given(st.floats(0, 1e7), st.floats(1, 1e6), st.floats(1e-2, 1e4))
def test_who_comes_back_when_told_is_taken_in(backlog: float, rate: float, deadline: float) -> None:
    wait = retry_after_s(backlog, rate, deadline)
    assert wait >= 0
    left = max(0.0, backlog - wait * rate)
    assert retry_after_s(left, rate, deadline * (1 + 1e-6) + 1e-6) == ADMIT
