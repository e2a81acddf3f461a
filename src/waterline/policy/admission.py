"""Whether a request is taken in, or refused with an honest time to come back."""

ADMIT = 0.0


def retry_after_s(backlog_tokens: float, tokens_per_s: float, deadline_s: float) -> float:
    """Return ADMIT, or after how many seconds a request would be taken in.

    Args:
        backlog_tokens: accepted by all replicas of the model together, not yet produced.
        tokens_per_s: the rate they sustain together; with 0 nobody can say when, and one deadline is the answer.
        deadline_s: how long a request may wait for the work before it.
    """
    if tokens_per_s <= 0.0:
        return deadline_s
    wait_s = backlog_tokens / tokens_per_s
    return ADMIT if wait_s <= deadline_s else wait_s - deadline_s
