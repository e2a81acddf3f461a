"""How long a request may think, and over how many samples it may vote: the seconds clock.

The rule is small on purpose, and the place for a better one. It knows how near requests are to their deadline: `load`
is the wait of a newcomer (`admission.admit`) over the time it may wait. Up to `CALM` everybody thinks as long as they
asked to; from there the budget shrinks, and at 1, when newcomers are about to be refused, as little is thought as a
tenant accepts. Samples go first, because each costs a whole answer; then the length of thought. A tenant below its
guarantee has paid for its thoughts and keeps them.
"""

from waterline.policy.decisions import FULL_EFFORT, LOAD_HIGH
from waterline.policy.jit import jit

CALM = 0.5  # of the time a request may wait


@jit
def effort(
    load: float,
    below_guarantee: bool,  # noqa: FBT001 - compiled code has no keyword-only arguments
    asked_thinking_tokens: int,
    least_thinking_tokens: int,
    asked_samples: int,
) -> tuple[int, int, int]:
    """Return the thinking tokens and the samples a request may spend, and the rule.

    Args:
        load: expected wait over the longest that is allowed; see above.
        below_guarantee: whether its tenant has used less GPU time than it is guaranteed.
        asked_thinking_tokens: by the request, or its tenant's default.
        least_thinking_tokens: below which answers of the model are not worth giving.
        asked_samples: at least 1.
    """
    if load <= CALM or below_guarantee:
        return asked_thinking_tokens, asked_samples, FULL_EFFORT
    left = max(1.0 - load, 0.0) / (1.0 - CALM)
    samples = max(int(asked_samples * max(2.0 * left - 1.0, 0.0)), 1)
    if samples > 1:
        return asked_thinking_tokens, samples, LOAD_HIGH
    part = min(2.0 * left, 1.0)
    least = min(least_thinking_tokens, asked_thinking_tokens)
    return least + int((asked_thinking_tokens - least) * part), 1, LOAD_HIGH
