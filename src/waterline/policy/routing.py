"""Which replica serves a request."""

from collections.abc import Sequence

NOBODY = -1


def least_loaded(backlog_tokens: Sequence[float], tokens_per_s: Sequence[float]) -> int:
    """Return the replica that would drain its backlog first, or NOBODY.

    Args:
        backlog_tokens: [replica] accepted, not yet produced.
        tokens_per_s: [replica] the rate it sustains; 0 while it loads or drains, or when it has failed.

    Ties go to the lowest index, so that a rehearsal and a live gateway agree.
    """
    best, shortest_wait_s = NOBODY, float("inf")
    for replica in range(len(backlog_tokens)):
        if tokens_per_s[replica] <= 0.0:
            continue
        wait_s = backlog_tokens[replica] / tokens_per_s[replica]
        if wait_s < shortest_wait_s:
            best, shortest_wait_s = replica, wait_s
    return best
