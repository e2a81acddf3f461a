"""A desk for tests: two tenants, the first guaranteed a half; replicas of one GPU.

A replica of these serves 100 tokens a second with all its slots taken, so a request of 100 + 100 tokens costs 2
GPU-seconds, and reads 1,000 tokens a second.
"""

import numpy as np

from waterline.policy import dispatch
from waterline.policy.dispatch import NOBODY, Arrival, Desk

NO_BLOCKS = np.zeros(0, np.int64)
PAID, PUBLIC, OTHER = 0, 1, 2  # clients; the first is of the tenant with a guarantee


def desk(*rows: tuple[int, int], models: int = 1, slots: int = 1, ready: bool = True) -> Desk:
    """Return a desk with a replica for each (model, role)."""
    made = dispatch.new_desk([0.5, 0.0], [0.5, 0.5], [1.0, 1.0], [0, 1, 1], models=models, rows=len(rows))
    for row, (model, role) in enumerate(rows):
        rates = {"tokens_per_s": 100.0, "prefill_tokens_per_s": 1000.0}
        dispatch.put(made, row, model, role=role, gpus=1.0, slots=slots, longest_tokens=1000, **rates)
    dispatch.set_in_service(made, range(len(rows)), serves=ready)
    return made


def ask(
    made: Desk, client: int, *, model: int = 0, tokens: int = 200, ttft_s: float = 60.0, blocks: np.ndarray = NO_BLOCKS
) -> Arrival:
    return dispatch.arrive(made, model, client, tokens - 100, 0, 100, tokens, ttft_s, blocks, 0)


def start_next(made: Desk, model: int = 0) -> tuple[int, int, int]:
    """Return client, rule and replica of the next start of a request of 100 + 100 tokens."""
    client, rule = dispatch.next_turn(made, model)
    if client == NOBODY:
        return NOBODY, rule, NOBODY
    return client, rule, dispatch.start(made, model, client, 100, 0, 100, 200, 2.0, NO_BLOCKS, 0)[0]


def end(made: Desk, replica: int, client: int, *, model: int = 0, gpu_s: float = 2.0) -> None:
    dispatch.first_token(made, model, replica, 100, 100)
    dispatch.ended(made, model, replica, client, 100, gpu_s - 2.0)
