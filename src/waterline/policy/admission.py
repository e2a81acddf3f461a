"""Whether a request is taken in, or refused with an honest time to come back."""

ADMIT = 0.0


def retry_after_s(
    unread_tokens: float, prefill_tokens_per_s: float, queued_tokens: float, tokens_per_s: float, deadline_s: float
) -> float:
    """Return ADMIT, or after how many seconds a request would be taken in.

    A newcomer waits for the prompts before it to be read, and, when all slots are taken, for those to be served who
    came before and have none either. Answers under way hold nobody up while there are slots.

    Args:
        unread_tokens: of prompts accepted and not yet read, over all ready replicas of the model.
        prefill_tokens_per_s: the rate at which they read prompts together.
        queued_tokens: expected of the accepted requests beyond the slots, prompt and output.
        tokens_per_s: the rate at which they serve together when all slots are taken; with 0 nobody can say when, and
            one deadline is the answer.
        deadline_s: how long a request may wait for its first token.
    """
    if tokens_per_s <= 0.0 or prefill_tokens_per_s <= 0.0:
        return deadline_s
    wait_s = unread_tokens / prefill_tokens_per_s + queued_tokens / tokens_per_s
    return ADMIT if wait_s <= deadline_s else wait_s - deadline_s
