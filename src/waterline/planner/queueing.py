"""What nearly every request sees, not only the mean one: waiting, long prompts, and the prompts of others.

Requests come independently (Poisson), and lengths vary like a lognormal of `LENGTH_SIGMA`, as the traces we have
measured do. Reading prompts is then a queue with one server (M/G/1): its mean wait is the formula of Pollaczek and
Khinchine, and a long wait has either many causes, and is exponential, or one very long prompt.

Whoever reads goes before whoever answers: an answer of n tokens is work that prompts interrupt, those that wait behind
it at its first token and those that come while it lasts. How long it takes is the delay cycle of that queue, of which
mean and variance are known (Conway, Maxwell and Miller, Theory of Scheduling, 1967, section 8-3); beyond its shortest
time it is taken to be a gamma. Answers under way are a Poisson number.

The tests hold the result against the step-by-step rehearsal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

from waterline.cost import StepCost
from waterline.cost.step import prefill_pairs
from waterline.units import PICOSECONDS_PER_S
from waterline.workload import LENGTH_SIGMA, Slo

NORMAL = NormalDist()
PARTS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long requests are: lognormal in prompt and in output, which are taken to be independent."""

    prompt_tokens: int  # mean
    output_tokens: int  # mean
    prompt_sigma: float  # of the logarithm
    output_sigma: float
    context_tokens: int  # mean of the answers under way; long answers are under way for longer, so they weigh more

    @property
    def prompt_square(self) -> float:
        """Mean of the square of a prompt's length, over the square of its mean."""
        return math.exp(self.prompt_sigma**2)


def usual_lengths(prompt_tokens: int, output_tokens: int) -> Lengths:
    """Return lengths of which only the means are known: they vary like those of the traces we have measured."""
    return Lengths(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prompt_sigma=LENGTH_SIGMA,
        output_sigma=LENGTH_SIGMA,
        context_tokens=prompt_tokens + round(output_tokens * math.exp(LENGTH_SIGMA**2) / 2),
    )


@cache
def multiples(sigma: float) -> tuple[float, ...]:
    """Return the middle of each of PARTS equally likely parts of a lognormal, over its mean."""
    return tuple(math.exp(NORMAL.inv_cdf((part + 0.5) / PARTS) * sigma - sigma**2 / 2) for part in range(PARTS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """A replica at a steady rate."""

    requests_per_s: float
    lengths: Lengths
    plain_s: float  # a step without prompts
    read_s: float  # a prompt of mean length, the tokens of the others decoded along
    delay_s: float  # by which it makes those tokens late
    longest_s: float  # a step with as much of prompts as there is room for: no token takes longer
    batch: float  # answers under way, mean
    crowd_variance: float  # of their number; the less a larger batch yields, the further it strays

    @property
    def reading_fraction(self) -> float:
        """Of the time that prompts are being read."""
        return self.requests_per_s * self.read_s

    @property
    def mean_wait_s(self) -> float:
        """For the prompts before."""
        return self.reading_fraction * self.read_s * self.lengths.prompt_square / (2 * (1 - self.reading_fraction))

    def late_first_fraction(self, ttft_s: float) -> float:
        """Return the fraction of requests whose first token takes longer than that."""

        def late(multiple: float) -> float:
            left_s = ttft_s - self.plain_s - self.read_s * multiple
            return self._long_wait_fraction(left_s) if left_s > 0 else 1.0

        return sum(late(multiple) for multiple in multiples(self.lengths.prompt_sigma)) / PARTS

    def _long_wait_fraction(self, wait_s: float) -> float:
        """Return the chance to wait longer: behind many prompts, or behind a single one that is very long."""
        busy = self.reading_fraction
        if busy <= 0:
            return 0.0
        behind_many = busy * math.exp(-busy * wait_s / self.mean_wait_s)
        behind_one = busy / (1 - busy) * _mean_excess(wait_s / self.read_s, self.lengths.prompt_sigma)
        return min(1.0, behind_many + behind_one)

    def late_tokens_fraction(self, tpot_s: float) -> float:
        """Return the fraction of requests whose tokens take longer than that, in the mean of their answer."""
        if tpot_s <= self.plain_s:
            return 1.0
        if tpot_s >= self.longest_s:
            return 0.0
        outputs = (multiple * self.lengths.output_tokens for multiple in multiples(self.lengths.output_sigma))
        return sum(self._interrupted_fraction(tokens - 1, tpot_s) for tokens in outputs) / PARTS

    def _interrupted_fraction(self, tokens: float, tpot_s: float) -> float:
        """Return the chance that prompts hold up so many tokens after the first for more than they can bear."""
        if tokens < 0.5:  # an answer of one token has none that could be late
            return 0.0
        rate, idle = self.requests_per_s, 1 - self.requests_per_s * self.delay_s
        before_s = self.mean_wait_s + self.read_s  # from arrival to the first token; who comes then is read next
        square_s2 = self.delay_s**2 * self.lengths.prompt_square
        work_s = tokens * self.plain_s + rate * before_s * self.delay_s
        before_variance = self.mean_wait_s**2 * (2 / max(self.reading_fraction, 1e-9) - 1)
        before_variance += self.read_s**2 * (self.lengths.prompt_square - 1)
        work_variance = rate * before_s * square_s2 + (rate * self.delay_s) ** 2 * before_variance
        delayed_s = work_s / idle - tokens * self.plain_s
        variance = rate * square_s2 * work_s / idle**3 + work_variance / idle**2
        if delayed_s <= 0 or variance <= 0:
            return 0.0
        shape = delayed_s**2 / variance
        excess = tokens * (tpot_s - self.plain_s) / delayed_s
        # Wilson and Hilferty: the cube root of a gamma over its mean is nearly normal.
        late = 1 - NORMAL.cdf((excess ** (1 / 3) - (1 - 1 / (9 * shape))) * math.sqrt(9 * shape))
        anybody = 1 - math.exp(-rate * (before_s + tokens * self.plain_s))
        return min(late, anybody)


def pace_at(step: StepCost, requests_per_s: float, lengths: Lengths) -> Pace | None:
    """Return the pace a replica settles to at a rate; None when it falls behind."""
    batch = 1.0
    for _ in range(50):  # the batch sets the pace, and the pace the batch; it settles from below
        plain_s, read_s, delay_s = _steps(step, max(1, round(batch)), lengths)
        if requests_per_s * read_s >= 1 or batch > step.step_tokens:
            return None
        settled, batch = batch, requests_per_s * lengths.output_tokens * plain_s / (1 - requests_per_s * delay_s)
        if round(settled) == round(batch):
            break
    crowded = _throughput(step, max(1, round(1.25 * batch)), lengths)
    growth = math.log(crowded / requests_per_s, 1.25) if requests_per_s > 0 else 1.0
    return Pace(
        requests_per_s=requests_per_s,
        lengths=lengths,
        plain_s=plain_s,
        read_s=read_s,
        delay_s=delay_s,
        longest_s=_longest_s(step, max(1, round(batch)), lengths),
        batch=batch,
        crowd_variance=batch / min(1.0, max(0.05, growth)),
    )


def _throughput(step: StepCost, batch: int, lengths: Lengths) -> float:
    """Return the requests per second that keep a batch as it is."""
    plain_s, _, delay_s = _steps(step, batch, lengths)
    return batch / (lengths.output_tokens * plain_s + batch * delay_s)


def _steps(step: StepCost, decodes: int, lengths: Lengths) -> tuple[float, float, float]:
    """Return a step without prompts, a prompt's reading while others decode, and by how much that delays them."""
    cached_tokens = decodes * lengths.context_tokens
    plain_s = step.step_ps(0, 0, decodes, cached_tokens) / PICOSECONDS_PER_S
    chunk_tokens = min(max(1, step.step_tokens - decodes), lengths.prompt_tokens)
    pairs = round(prefill_pairs(0, lengths.prompt_tokens) / lengths.prompt_tokens * chunk_tokens)
    chunk_s = step.step_ps(chunk_tokens, pairs, decodes, cached_tokens) / PICOSECONDS_PER_S
    chunks = lengths.prompt_tokens / chunk_tokens
    return plain_s, chunks * chunk_s, chunks * (chunk_s - plain_s)


def _longest_s(step: StepCost, decodes: int, lengths: Lengths) -> float:
    """Return a step full of prompts; their later parts attend to more than the mean, which is left out."""
    room = max(1, step.step_tokens - decodes)
    pairs = round(prefill_pairs(0, lengths.prompt_tokens) / lengths.prompt_tokens * room)
    return step.step_ps(room, pairs, decodes, decodes * lengths.context_tokens) / PICOSECONDS_PER_S


def _mean_excess(multiple: float, sigma: float) -> float:
    """Return how far a lognormal lies beyond a multiple of its mean, in the mean, over its mean."""
    upper = (sigma**2 / 2 - math.log(multiple)) / sigma
    return NORMAL.cdf(upper) - multiple * NORMAL.cdf(upper - sigma)


def holds(pace: Pace | None, max_batch: int, slo: Slo) -> bool:
    """Return whether the SLO's fraction of the requests is in time, and finds a free place but for as many."""
    if pace is None:
        return False
    late = pace.late_first_fraction(slo.ttft_s) + pace.late_tokens_fraction(slo.tpot_s)
    crowd = pace.batch + NORMAL.inv_cdf(slo.fraction) * math.sqrt(pace.crowd_variance)
    return late <= 1 - slo.fraction and crowd <= max_batch


def sustained_requests_per_s(step: StepCost, lengths: Lengths, max_batch: int, slo: Slo) -> float:
    """Return the largest rate at which the SLO holds for its fraction of the requests; 0 if it does for none."""

    def sustains(requests_per_s: float) -> bool:
        return holds(pace_at(step, requests_per_s, lengths), max_batch, slo)

    low, high = 0.0, 1e-3
    while sustains(high):
        low, high = high, 4 * high
    if low == 0.0:
        return 0.0
    while high - low > 0.001 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if sustains(middle) else (low, middle)
    return low


def quantile_s(late_fraction: Callable[[float], float], fraction: float) -> float:
    """Return the time that all but 1 - `fraction` of the requests keep to, to a tenth of a percent."""
    low, high = 0.0, 1e-3
    while late_fraction(high) > 1 - fraction:
        low, high = high, 2 * high
    while high - low > 0.001 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if late_fraction(middle) <= 1 - fraction else (middle, high)
    return high
