"""What a replica does in steady state, from the time of its steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from waterline.cost.step import StepCost, prefill_pairs
from waterline.units import PICOSECONDS_PER_S

NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPoint:
    """A replica that always decodes `batch` requests and prefills new ones as fast as old ones finish."""

    batch: int
    ttft_s: float  # of a request that finds a free place; queueing comes on top
    tpot_s: float
    requests_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """The times a closed loop of equal requests is made of; each is a sum of steps."""

    plain_s: float  # a step of the whole batch without any prompt
    delay_s: float  # what reading one prompt adds to the steps of the others
    alone_s: float  # reading one prompt, or one on each data-parallel rank, with nobody else about
    lone_s: float  # reading one prompt on one rank, while the others only help with its experts
    reading_s: float  # reading one prompt while the others decode along
    share: float = 0.0  # of a step's room for prompt tokens that one prompt takes; above 1: it is read in chunks

    @property
    def busy_s(self) -> float:
        """What a prompt takes of a replica that does nothing but read as much as a step has room for."""
        return self.delay_s + self.share * self.plain_s


def pieces(step: StepCost, batch: int, prompt_tokens: int, context_tokens: int, cached_tokens: int = 0) -> Pieces:
    """Price what a batch of requests spends its time on, with chunked prefill.

    Args:
        step: of the replica.
        batch: requests that decode together.
        prompt_tokens: of one request.
        context_tokens: mean context of the requests under way.
        cached_tokens: of the prompt, that need not be read because another request has left them in the cache.
    """
    whole = batch * context_tokens
    plain_ps = step.step_ps(0, 0, batch, whole)
    ranks = step.ranks
    room = max(1, step.step_tokens - batch, step.step_tokens // 2) // ranks
    alone_ps = lone_ps = reading_ps = delay_ps = 0
    start = min(cached_tokens, prompt_tokens - 1)
    for first in range(start, prompt_tokens, room):
        tokens = min(room, prompt_tokens - first)
        pairs = prefill_pairs(first, tokens)
        alone_ps += step.step_ps(ranks * tokens, ranks * pairs, 0, 0)
        lone_ps += step.step_ps(tokens, ranks * pairs, 0, 0)  # `step_ps` spreads pairs over all ranks
        reading_ps += step.step_ps(tokens, ranks * pairs, batch - 1, (batch - 1) * context_tokens)
        delay_ps += step.step_ps(tokens, pairs, batch, whole) - plain_ps
    return Pieces(
        plain_s=plain_ps / PICOSECONDS_PER_S,
        delay_s=delay_ps / PICOSECONDS_PER_S,
        alone_s=alone_ps / PICOSECONDS_PER_S,
        lone_s=lone_ps / PICOSECONDS_PER_S,
        reading_s=reading_ps / PICOSECONDS_PER_S,
        share=(prompt_tokens - start) / (room * ranks),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPoint:
    """A replica at a rate of requests that come independently of one another."""

    batch: int  # requests that decode together, the least that finish as many as come
    tpot_s: float
    wait_s: float  # of a request, for the prompts before it and for a place
    others_s: float  # by which those who decode delay a first token: half a step, and their part of those it is read in
    lone_s: float  # reading its prompt on one rank, with nobody else about


def sustained_requests_per_s(price: Callable[[int], Pieces], most: int, output_tokens: int) -> tuple[float, int]:
    """Return the rate a replica that holds `most` requests never falls behind at, and how many it then holds.

    No more than those whose prompts find room in the steps: `batch / output_tokens` of them are read in each.
    """
    batch = _first(1, most, lambda batch: batch * price(batch).share >= output_tokens)
    found = price(batch)
    finished = batch / (output_tokens * found.plain_s + batch * found.delay_s)
    return min(finished, 1 / found.busy_s), batch


def open_point(
    price: Callable[[int], Pieces], most: int, output_tokens: int, requests_per_s: float, slower: float = 1.0
) -> OpenPoint | None:
    """Return the steady state at a rate; None when the replica falls behind.

    As many requests are under way as come in the time of an answer (Little). Reading prompts is a queue with equal
    service times (Pollaczek and Khinchine), and whoever reads goes before whoever answers: an answer is held up by the
    prompts that came while its own waited, and by those that come while it lasts. Who finds no place waits as in a
    queue with many servers (Halfin and Whitt, Operations Research 29, 1981).

    Args:
        price: what a batch spends its time on; see `pieces`.
        most: requests the replica holds.
        output_tokens: of each request.
        requests_per_s: that arrive.
        slower: every step takes so many times what was priced.
    """
    rate = requests_per_s * slower  # by a clock that goes with the steps
    sustained, batch = sustained_requests_per_s(price, most, output_tokens)
    if rate >= sustained:
        return None
    low = _first(1, batch, lambda batch: batch >= rate * _answer_s(price(batch), rate, output_tokens))
    found = price(low)
    tpot_s = found.plain_s / (1 - rate * found.delay_s)
    return OpenPoint(
        batch=low,
        tpot_s=slower * _answer_s(found, rate, output_tokens) / output_tokens,
        wait_s=slower * (_read_wait_s(found, rate) + _place_wait_s(rate, output_tokens * tpot_s, most)),
        others_s=slower * (tpot_s / 2 + found.reading_s - found.lone_s),
        lone_s=slower * found.lone_s,
    )


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the first number from which on something holds; `high` where it does not before."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _answer_s(found: Pieces, requests_per_s: float, output_tokens: int) -> float:
    """Return the time of an answer at a rate of prompts that hold it up; no step is more than full of them."""
    idle = 1 - requests_per_s * found.delay_s
    if idle <= 0:
        return math.inf
    before_s = _read_wait_s(found, requests_per_s) + found.reading_s
    held_s = (output_tokens * found.plain_s + requests_per_s * before_s * found.delay_s) / idle
    return min(held_s, output_tokens * (found.plain_s + found.delay_s / found.share))


def _read_wait_s(found: Pieces, requests_per_s: float) -> float:
    busy = requests_per_s * found.busy_s
    return found.busy_s * busy / (2 * (1 - busy)) if busy < 1 else math.inf


def _place_wait_s(requests_per_s: float, answer_s: float, places: int) -> float:
    under_way = requests_per_s * answer_s
    if under_way >= places:
        return math.inf
    spare = (places - under_way) / math.sqrt(under_way)
    waiting = 1 / (1 + spare * NORMAL.cdf(spare) / max(NORMAL.pdf(spare), 1e-300))
    return waiting * answer_s / (places - under_way)


def serving_point(
    step: StepCost, batch: int, prompt_tokens: int, output_tokens: int, context_tokens: int = 0
) -> ServingPoint:
    """Return the closed-loop steady state at a batch, with chunked prefill.

    `context_tokens` is the mean context of the answers under way; 0 takes it from requests that are all alike.

    `batch / output_tokens` requests finish in a step, and as many prompts have to be read. Their chunks ride along in
    the steps of the others, so a token takes a plain step and its share of what reading adds.
    """
    found = pieces(step, batch, prompt_tokens, context_tokens or prompt_tokens + output_tokens // 2)
    tpot_s = found.plain_s + batch / output_tokens * found.delay_s
    return ServingPoint(
        batch=batch,
        ttft_s=tpot_s / 2 + found.reading_s,
        tpot_s=tpot_s,
        requests_per_s=batch / (output_tokens * tpot_s),
    )
