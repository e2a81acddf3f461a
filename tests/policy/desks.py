"""A desk for tests: two tenants, the first guaranteed a half; replicas of one GPU.

A replica of these serves 100 tokens a second with all its slots taken, so a request of 100 + 100 tokens costs 2
GPU-seconds, and reads 1,000 tokens a second.
"""

import numpy as np

from waterline.policy import dispatch
from waterline.policy.dispatch import Arrival, Desk
from waterline.policy.routing import NOBODY, make_ready, new_prefixes, new_ready, new_replicas, note_slots, route

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


class Router:
    """Replicas that read ten times as fast as they serve, and what they remember."""

    def __init__(self, rate: list[float], slots: int = 10**6) -> None:
        self.replicas, self.ready, self.prefixes = new_replicas(len(rate)), new_ready(1, len(rate)), new_prefixes(64)
        self.replicas.serves[:] = np.array(rate) > 0
        self.replicas.free_slots[:], self.replicas.longest_tokens[:] = slots, 10**6
        self.rate, self.backlog, self.born = (
            self.replicas.tokens_per_s,
            self.replicas.backlog_tokens,
            self.replicas.born,
        )
        self.rate[:], self.replicas.prefill_tokens_per_s[:] = rate, np.array(rate) * 10
        make_ready(self.replicas, self.ready, 0)

    def route(
        self, blocks: np.ndarray = NO_BLOCKS, draw: int = 0, prompt_tokens: int = 1000, tokens: int = 2000
    ) -> tuple[int, int, int]:
        return route(self.replicas, self.ready, self.prefixes, 0, prompt_tokens, tokens, blocks, 100, draw)

    def take_slots(self, replica: int, slots: int) -> None:
        self.replicas.free_slots[replica] -= slots
        note_slots(self.replicas, self.ready, replica)
