from hypothesis import given
from hypothesis import strategies as st

from waterline.policy.admission import ADMIT, retry_after_s


def test_a_request_is_taken_in_while_the_work_before_it_fits_the_deadline() -> None:
    assert retry_after_s(500, 100, 0, 10, deadline_s=5) == ADMIT  # 5 s of reading
    assert retry_after_s(800, 100, 0, 10, deadline_s=5) == 3.0
    assert retry_after_s(300, 100, 40, 10, deadline_s=5) == 2.0  # 3 s of reading, 4 s for a slot


def test_with_no_replica_ready_the_deadline_is_the_answer() -> None:
    assert retry_after_s(0, 0, 0, 0, deadline_s=2) == 2.0


@given(st.floats(0, 1e7), st.floats(0, 1e7), st.floats(1, 1e6), st.floats(1e-2, 1e4))
def test_who_comes_back_when_told_is_taken_in(unread: float, queued: float, rate: float, deadline: float) -> None:
    wait = retry_after_s(unread, rate, queued, rate, deadline)
    assert wait >= 0
    left = max(0.0, unread + queued - wait * rate)
    assert retry_after_s(left, rate, 0.0, rate, deadline * (1 + 1e-6) + 1e-6) == ADMIT


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1, 1e5), st.floats(1, 1e5), st.floats(0.01, 60))
def test_more_work_never_shortens_the_wait(
    unread: float, queued: float, prefill: float, rate: float, deadline: float
) -> None:
    wait = retry_after_s(unread, prefill, queued, rate, deadline)
    assert wait <= retry_after_s(unread * 1.5 + 1, prefill, queued, rate, deadline)
    assert wait <= retry_after_s(unread, prefill, queued * 1.5 + 1, rate, deadline)
