"""What nearly every request sees, not only the mean one: waiting, long prompts, and the prompts of others.

Requests come independently (Poisson), and lengths vary like a lognormal of `LENGTH_SIGMA`, as the traces we have
measured do, cut at the context. Reading prompts is then a queue with one server (M/G/1): its mean wait is the formula
of Pollaczek and Khinchine, and a long wait has either many causes, and is exponential, or one very long prompt. Prompts
that wait are read together, as many as a step has room for, and the longer one is the more each of its tokens costs.
Ranks of data-parallel attention read side by side; together they are taken to be one server that is so many times as
fast.

Whoever reads goes before whoever answers: an answer of n tokens is work that prompts interrupt, those that wait behind
it at its first token and those that come while it lasts. How long it takes is the delay cycle of that queue, of which
mean and variance are known (Conway, Maxwell and Miller, Theory of Scheduling, 1967, section 8-3). Answers under way
are a Poisson number that changes as slowly as answers end; an answer sees its mean over the time it takes. Beyond its
shortest time an answer is taken to be a gamma, shifted so that its first three moments are those of both.

Replicas are priced many at a time: a `Load` holds replicas and what each is asked, and every number below is an array
with an entry a replica. The tests hold the result against the step-by-step rehearsal.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from operator import getitem
from statistics import NormalDist
from typing import Self

import numpy as np
from numpy.typing import NDArray

from waterline.cost.step import AttentionCost, StepCost, prefill_pairs
from waterline.units import PICOSECONDS_PER_S
from waterline.workload import LENGTH_SIGMA, Slo

Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]
# Lengths are summed over parts of their distribution: equally likely ones up to each edge, finer towards the longest.
PARTS = ((0.0, 0.9, 12), (0.9, 0.99, 6), (0.99, 0.999, 4), (0.999, 1.0, 2))
WEIGHTS = np.array([(end - begin) / parts for begin, end, parts in PARTS for _ in range(parts)])
MIDDLES = np.array([NormalDist().inv_cdf(middle) for middle in np.cumsum(WEIGHTS) - WEIGHTS / 2])
LEAST_REQUESTS_PER_S = 1e-3  # a replica that cannot do this cannot do anything
# In nine cases at their very limit the rehearsal saw up to 1.6 times as many answers with late tokens as the formulas
# say, so plans allow for fewer than the SLO does. First tokens need no such allowance.
UNDERSTATED = 1.5
PRECISION = 1e-3  # of a rate that is searched for
MOST_BUSY = 1 - 1e-9  # of a server that waits keep finite for
MOST_LOPSIDED = 5.0  # skewness up to which a gamma follows its formula; beyond it a single prompt decides
EVERYTHING = 2**40  # tokens, a window without an end
CROWD = 1.25  # how much larger a batch is tried, to learn what one more request costs
FREE = AttentionCost(
    window_tokens=0,
    decode_ps=(0,),
    decode_ps_per_token=(0,),
    prefill_ps=0,
    prefill_ps_per_token=0,
    prefill_ps_per_pair=0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long requests are: lognormal in prompt and in output, which are taken to be independent."""

    prompt_tokens: int  # mean
    output_tokens: int  # mean
    prompt_sigma: float  # of the logarithm
    output_sigma: float
    context_tokens: int  # mean of the answers under way; long answers are under way for longer, so they weigh more
    prefix_hit: float = 0.0  # share of a prompt's tokens that are in the cache already, and need not be read
    longest_tokens: int = 2**40  # a prompt has

    @property
    def cached_tokens(self) -> int:
        """Of a prompt of mean length; at least its last token is read."""
        return min(round(self.prefix_hit * self.prompt_tokens), self.prompt_tokens - 1)


def usual_lengths(prompt_tokens: int, output_tokens: int, prefix_hit: float = 0.0) -> Lengths:
    """Return lengths of which only the means are known: they vary like those of the traces we have measured."""
    return Lengths(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prompt_sigma=LENGTH_SIGMA,
        output_sigma=LENGTH_SIGMA,
        context_tokens=prompt_tokens + round(output_tokens * math.exp(LENGTH_SIGMA**2) / 2),
        prefix_hit=prefix_hit,
    )


# --- Steps of many replicas -----------------------------------------------------------------------------------------


class Steps:
    """The steps of many replicas, side by side: as `StepCost.step_ps`, with an entry a replica."""

    def __init__(self, costs: Sequence[StepCost]) -> None:
        self.costs = costs
        self.ranks = _counts(cost.ranks for cost in costs)
        self.step_tokens = _counts(cost.step_tokens for cost in costs)
        self.first_token_s = np.array([cost.first_token_ps / PICOSECONDS_PER_S for cost in costs])
        self._tokens = [cost.tokens_ps for cost in costs]
        self._last = _counts(len(cost.tokens_ps) - 1 for cost in costs)
        self._more = _counts(cost.more_ps_per_token for cost in costs)
        self._heads = [cost.head_ps for cost in costs]
        self._last_head = _counts(len(cost.head_ps) - 1 for cost in costs)
        most = max((len(cost.attention) for cost in costs), default=0)
        padded = [(*cost.attention, *(FREE,) * (most - len(cost.attention))) for cost in costs]
        self._layers = [_Layers([layers[index] for layers in padded]) for index in range(most)]

    def plain_ps(self, decodes: Counts, cached_tokens: Counts) -> Counts:
        """Return the time of a step without prompts."""
        row = -(-decodes // self.ranks)
        return self._shared_ps(row, row) + self._decode_ps(row, cached_tokens)

    def reading_ps(
        self, decodes: Counts, cached_tokens: Counts, prompts: Sequence[tuple[Counts, Counts]]
    ) -> list[Counts]:
        """Return the times of steps of so many decodes and each of these tokens of prompts, with their pairs."""
        row = -(-decodes // self.ranks)
        same = self._decode_ps(row, cached_tokens)
        found = []
        for tokens, pairs in prompts:
            took = same + self._shared_ps(-(-(tokens + decodes) // self.ranks), row + 1)
            for layers in self._layers:
                took = took + layers.prefill_ps(tokens, pairs)
            found.append(took)
        return found

    def pair_s(self, pairs: Numbers) -> Numbers:
        """Return what so many pairs of query and key take, in layers that attend to everything."""
        took = np.zeros_like(pairs)
        for layers in self._layers:
            took += np.where(layers.window == EVERYTHING, layers.per_pair, 0) * pairs
        return took / PICOSECONDS_PER_S

    def _shared_ps(self, tokens: Counts, sampled: Counts) -> Counts:
        """Return everything but attention, for so many tokens and sampled sequences of a rank."""
        took = _at(self._tokens, np.minimum(tokens, self._last)) + _at(
            self._heads, np.minimum(sampled, self._last_head)
        )
        took += self._more * np.maximum(0, tokens - self._last)
        return took

    def _decode_ps(self, row: Counts, cached_tokens: Counts) -> Counts:
        none = np.zeros_like(row)
        return (row > 0) * sum(
            (layers.decode_ps(row, self.ranks, cached_tokens) for layers in self._layers), start=none
        )


class _Layers:
    """One kind of attention layers of each replica."""

    def __init__(self, costs: Sequence[AttentionCost]) -> None:
        self.window = _counts(cost.window_tokens or EVERYTHING for cost in costs)
        self.decode = [cost.decode_ps for cost in costs]
        self.per_token = [cost.decode_ps_per_token for cost in costs]
        self.last = _counts(len(cost.decode_ps) - 1 for cost in costs)
        self.fixed = _counts(cost.prefill_ps for cost in costs)
        self.per_prompt_token = _counts(cost.prefill_ps_per_token for cost in costs)
        self.per_pair = _counts(cost.prefill_ps_per_pair for cost in costs)

    def decode_ps(self, decodes: Counts, ranks: Counts, cached_tokens: Counts) -> Counts:
        row = np.minimum(decodes, self.last)
        kept = np.minimum(cached_tokens, decodes * ranks * self.window)
        took = _at(self.decode, row)
        took += _at(self.per_token, row) * kept
        return took

    def prefill_ps(self, tokens: Counts, pairs: Counts) -> Counts:
        pairs = np.minimum(pairs, tokens * self.window)
        took: Counts = self.fixed + self.per_prompt_token * tokens + self.per_pair * pairs
        return took


def _counts(values: object) -> Counts:
    return np.fromiter(values, np.int64)  # type: ignore[call-overload, no-any-return] # an iterable of integers


def _at(tables: list[Sequence[int]], index: Counts) -> Counts:
    """Return entries of each replica's table: replicas are the last axis of the index.

    In one array the tables of all replicas would be many megabytes.
    """
    return np.fromiter(map(getitem, cycle(tables), index.ravel().tolist()), np.int64, index.size).reshape(index.shape)


# --- A replica at a rate --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Replicas at a steady rate; every field is a number, or an array with an entry a replica first."""

    requests_per_s: Numbers
    first_token_s: Numbers  # by which a first token comes later than its last step
    plain_s: Numbers  # a step without prompts
    one_more_s: Numbers  # by which it takes longer with one more answer under way
    read_s: Numbers  # a prompt of mean length, in steps full of prompts, over the ranks that read at once …
    own_s: Numbers  # … by itself, the tokens of the others decoded along …
    delay_s: Numbers  # … and by how much it makes those late
    pair_s: Numbers  # of `read_s` and `delay_s`, what grows with the square of the length …
    own_pair_s: Numbers  # … and of `own_s`
    longest_s: Numbers  # a step with as much of the longest prompts as there is room for: no token takes longer
    batch: Numbers  # answers under way, mean
    crowd_variance: Numbers  # of their number; the less a larger batch yields, the further it strays
    output_tokens: Numbers  # mean
    prompt_sigma: Numbers  # of the logarithm
    output_sigma: Numbers
    prompts: Numbers  # [replica, part] lengths over the mean
    outputs: Numbers  # likewise

    @property
    def reading_fraction(self) -> Numbers:
        """Of the time that prompts are being read."""
        return self.requests_per_s * self._mean_s(self.read_s)

    @property
    def mean_wait_s(self) -> Numbers:
        """For the prompts before."""
        busy = np.minimum(self.reading_fraction, MOST_BUSY)
        return np.asarray(self.requests_per_s * self._square_s2(self.read_s) / (2 * (1 - busy)))

    def _took_s(self, mean_s: Numbers, pair_s: Numbers) -> Numbers:
        """Return [replica, part] the time of prompts of each length."""
        linear_s, pair_s = np.asarray(mean_s - pair_s)[..., None], np.asarray(pair_s)[..., None]
        return np.asarray(self.prompts * (linear_s + pair_s * self.prompts))

    def _mean_s(self, took_s: Numbers) -> Numbers:
        return np.asarray(self._took_s(took_s, self.pair_s) @ WEIGHTS)

    def _square_s2(self, took_s: Numbers) -> Numbers:
        return np.asarray(np.square(self._took_s(took_s, self.pair_s)) @ WEIGHTS)

    def take(self, chosen: NDArray[np.intp] | int) -> Self:
        """Return the pace of some replicas, or of one."""
        return type(self)(**{name: getattr(self, name)[chosen] for name in self.__slots__})

    def late_first_fraction(self, ttft_s: Numbers | float) -> Numbers:
        """Return the fraction of requests whose first token takes longer than that."""
        left_s = np.asarray(ttft_s - self.first_token_s - self.plain_s)[..., None]
        left_s = left_s - self._took_s(self.own_s, self.own_pair_s)
        late = np.where(left_s > 0, self._long_wait_fraction(np.maximum(left_s, 0.0)), 1.0) @ WEIGHTS
        return np.asarray(np.maximum(late, np.minimum(1.0, late + self._refused_fraction(ttft_s))))

    def _refused_fraction(self, ttft_s: Numbers | float) -> Numbers:
        """Return the fraction that comes while a prompt is read for which the deadline is too short, though it is not.

        Admission knows of a prompt how long it takes, at the rate of the mean, and not how much of it has been read.
        """
        took_s = self._took_s(self.read_s, self.pair_s)
        deadline_s = np.asarray(ttft_s)[..., None]
        refused_s = np.where(self.prompts * np.asarray(self.read_s)[..., None] > deadline_s, took_s, 0.0)
        return np.asarray(
            self.requests_per_s * ((refused_s - np.maximum(took_s - deadline_s, 0.0)).clip(0.0) @ WEIGHTS)
        )

    def _long_wait_fraction(self, wait_s: Numbers) -> Numbers:
        """Return the chance to wait longer: behind many prompts, or behind a single one that is very long."""
        busy = np.asarray(np.minimum(self.reading_fraction, MOST_BUSY))[..., None]
        mean_wait_s = np.maximum(np.asarray(self.mean_wait_s)[..., None], 1e-300)
        behind_many = busy * np.exp(-np.minimum(busy * wait_s / mean_wait_s, 700.0))
        took_s = self._took_s(self.read_s, self.pair_s)
        beyond_s = np.maximum(took_s[..., None, :] - wait_s[..., None], 0.0) @ WEIGHTS
        behind_one = np.asarray(self.requests_per_s)[..., None] * beyond_s / (1 - busy)
        return np.asarray(np.minimum(1.0, behind_many + behind_one))

    def late_tokens_fraction(self, tpot_s: Numbers | float) -> Numbers:
        """Return the fraction of requests whose tokens take longer than that, in the mean of their answer."""
        tokens = np.maximum(self.outputs * np.asarray(self.output_tokens)[..., None] - 1, 0.0)
        late = self._slow_fraction(tokens, np.asarray(tpot_s)[..., None]) @ WEIGHTS
        return np.where(tpot_s >= self.longest_s, 0.0, late)

    def _slow_fraction(self, tokens: Numbers, tpot_s: Numbers) -> Numbers:
        """Return the chance that so many tokens after the first take longer than that in their mean.

        Prompts hold them up, and more answers under way than usual.
        """
        rate, plain_s, one_more_s, read_s, delay_s, wait_s, busy = (
            np.asarray(one)[..., None]
            for one in (
                self.requests_per_s, self.plain_s, self.one_more_s, self._mean_s(self.read_s),
                self._mean_s(self.delay_s), self.mean_wait_s, self.reading_fraction,
            )
        )  # fmt: skip
        read_square_s2 = np.asarray(self._square_s2(self.read_s))[..., None]
        delay_square_s2 = np.asarray(self._square_s2(self.delay_s))[..., None]
        idle = np.maximum(1 - rate * delay_s, 1e-9)
        before_s = wait_s + read_s  # from arrival to the first token; who comes then is read next
        work_s = tokens * plain_s + rate * before_s * delay_s
        before_variance = wait_s**2 * (2 / np.maximum(busy, 1e-9) - 1) + read_square_s2 - read_s**2
        work_variance = rate * before_s * delay_square_s2 + (rate * delay_s) ** 2 * before_variance
        delayed_s = work_s / idle - tokens * plain_s
        held_variance = rate * delay_square_s2 * work_s / idle**3 + work_variance / idle**2
        crowded_variance = (tokens * one_more_s / idle) ** 2 * self._crowd_seen(tokens)
        spread_s = np.sqrt(np.maximum(held_variance + crowded_variance, 1e-30))
        # What prompts hold up alone would be a gamma; the crowd, a normal, makes it less lopsided.
        possible = (delayed_s > 0) & (held_variance > 0)
        lopsided = 2 * held_variance / np.where(possible, delayed_s, 1.0) * np.where(possible, held_variance, 0.0)
        lopsided = np.clip(lopsided / spread_s**3, 1e-3, MOST_LOPSIDED)
        beyond = (tokens * (tpot_s - plain_s) - delayed_s) / spread_s
        # Wilson and Hilferty: the cube root of a gamma over its mean is nearly normal.
        root = np.cbrt(np.maximum(1 + beyond * lopsided / 2, 0.0))
        late = 1 - normal_fraction(np.where(root > 0, 6 / lopsided * (root - 1 + lopsided**2 / 36), -FAR))
        come = np.maximum(rate * (before_s + tokens * plain_s), 0.0)  # while it waits, is read and lasts, mean
        late = np.maximum(late, 1 - np.exp(-come * self._longer_fraction(tokens * (tpot_s - plain_s))))
        anybody = 1 - np.exp(-come)
        crowded = 1 - normal_fraction(tokens * (tpot_s - plain_s) / np.sqrt(np.maximum(crowded_variance, 1e-30)))
        # An answer of one token has none that could be late.
        return np.where(tokens >= 0.5, np.minimum(late, anybody + crowded), 0.0)

    def _longer_fraction(self, delay_s: Numbers) -> Numbers:
        """Return the fraction of prompts each of which alone delays the others by more."""
        linear_s, pair_s = np.asarray(self.delay_s - self.pair_s)[..., None], np.asarray(self.pair_s)[..., None]
        delay_s = np.maximum(delay_s, 0.0)
        multiple = 2 * delay_s / np.maximum(linear_s + np.sqrt(linear_s**2 + 4 * pair_s * delay_s), 1e-200)
        sigma = np.asarray(self.prompt_sigma)[..., None]
        beyond = 1 - normal_fraction((np.log(np.maximum(multiple, 1e-300)) + sigma**2 / 2) / sigma)
        return np.where(multiple < np.asarray(self.prompts)[..., -1:], beyond, 0.0)

    def _crowd_seen(self, tokens: Numbers) -> Numbers:
        """Return the variance of the mean number of answers under way, over the time of an answer of so many tokens.

        Their number is remembered for the rest of the life of an answer.
        """
        memory = np.asarray(self.output_tokens * np.exp(np.square(self.output_sigma)) / 2)[..., None]
        lasts = np.maximum(tokens, 1e-3) / memory
        return np.asarray(self.crowd_variance)[..., None] * 2 / lasts * (1 + np.expm1(-lasts) / lasts)

    def late_place_fraction(self, places: Counts, patience_s: Numbers) -> Numbers:
        """Return the fraction of requests that find no place within their patience; one comes free as answers end."""
        lasts_s = self.batch / np.maximum(self.requests_per_s, 1e-12)
        waiting = np.maximum(patience_s, 0.0) * places / np.maximum(lasts_s, 1e-9)
        spread = np.sqrt(np.maximum(self.crowd_variance, 1e-12))
        return 1 - normal_fraction((places + waiting - self.batch) / spread)


def _multiples(sigma: Numbers) -> Numbers:
    """Return [any, part] lengths over their mean, of each part of a lognormal."""
    found = np.exp(MIDDLES * sigma[..., None])
    return np.asarray(found / (found @ WEIGHTS)[..., None])


def long_multiple(sigma: float, fraction: float) -> float:
    """Return how many times the mean the longest prompt is that has to be in time for a fraction of them to be."""
    late = np.cumsum(WEIGHTS[::-1])[::-1] > 1 - fraction + 1e-9  # parts too likely to be late
    return float(_multiples(np.array(sigma))[late][-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What replicas that decode so many take; see `Pace`."""

    output_tokens: Numbers
    plain_s: Numbers
    read_s: Numbers
    own_s: Numbers
    delay_s: Numbers
    mean_delay_s: Numbers  # over all lengths
    longest_s: Numbers

    def requests_per_s(self, batch: Numbers) -> Numbers:
        """Return the rate that keeps a batch as it is."""
        return batch / (self.output_tokens * self.plain_s + batch * self.mean_delay_s)

    def batch(self, requests_per_s: Numbers) -> Numbers:
        """Return the batch that a rate settles to."""
        return requests_per_s * self.output_tokens * self.plain_s / (1 - requests_per_s * self.mean_delay_s)

    def tpot_s(self, batch: Numbers) -> Numbers:
        """Return the mean time per token of a replica that always decodes so many."""
        return self.plain_s + batch / self.output_tokens * self.mean_delay_s


class Load:
    """Replicas, and how long the requests are that each is given."""

    def __init__(self, costs: Sequence[StepCost], lengths: Sequence[Lengths], *, reads: bool = True) -> None:
        self.steps = Steps(costs)
        self.reads = reads  # False: prompts are read elsewhere, and here answers are written
        self.ranked = bool((self.steps.ranks > 1).any())
        self.new_tokens = _counts(one.prompt_tokens - one.cached_tokens for one in lengths)  # of a prompt, to be read
        pairs = [prefill_pairs(one.cached_tokens, one.prompt_tokens - one.cached_tokens) for one in lengths]
        self.pairs_per_token = np.array(pairs, dtype=np.float64) / self.new_tokens
        self.pair_s = self.steps.pair_s(np.array(pairs, dtype=np.float64)) * reads  # of a prompt of mean length
        self.output_tokens = np.array([one.output_tokens for one in lengths], dtype=np.float64)
        self.prompt_sigma = np.array([one.prompt_sigma for one in lengths])
        self.output_sigma = np.array([one.output_sigma for one in lengths])
        self.context_tokens = _counts(one.context_tokens for one in lengths)
        longest = np.array([one.longest_tokens / one.prompt_tokens for one in lengths])
        self.prompts = np.minimum(_multiples(self.prompt_sigma), longest[:, None])
        self.outputs = _multiples(self.output_sigma)
        self.mean_prompt, self.mean_square = self.prompts @ WEIGHTS, np.square(self.prompts) @ WEIGHTS
        self.longest_tokens = np.rint(self.prompts[:, -1] * [one.prompt_tokens for one in lengths]).astype(np.int64)

    def times(self, batch: Numbers, *, longest: bool = True) -> Times:
        """Return what replicas take whose answers under way are so many in the mean; a part of one is one alone.

        Without `longest` the longest step and the prompt by itself are left out.
        """
        few = np.maximum(1, np.floor(batch)).astype(np.int64)
        share = np.clip(batch - few, 0.0, 1.0)  # of the time that there is one more
        found_s = self._times_s(np.stack([few, few + 1]), longest=longest)
        fewer, more = found_s[:, 0], found_s[:, 1]
        return self._times(fewer + share * (more - fewer))

    def reading_times(self) -> Times:
        """Return what replicas take that write no answers."""
        return self._times(self._times_s(np.zeros_like(self.new_tokens), longest=True))

    def _times(self, found_s: Numbers) -> Times:
        plain_s, read_s, own_s, delay_s, longest_s = found_s
        delay_s = delay_s * self.reads
        return Times(
            output_tokens=self.output_tokens,
            plain_s=plain_s,
            read_s=read_s * self.reads,
            own_s=own_s * self.reads,
            delay_s=delay_s,
            mean_delay_s=(delay_s - self.pair_s) * self.mean_prompt + self.pair_s * self.mean_square,
            longest_s=longest_s,
        )

    def _times_s(self, decodes: Counts, *, longest: bool) -> Numbers:
        """Return [time of `Times`, …] for decodes […], the last axis that of replicas."""
        steps, new = self.steps, self.new_tokens
        room = np.maximum(1, steps.step_tokens - decodes)
        chunk = np.minimum(room, new)
        own_chunk = np.minimum(np.maximum(1, room // steps.ranks), new)  # of one prompt, on one rank
        prompts = [chunk]
        if longest:
            prompts += [room, own_chunk * steps.ranks] if self.ranked else [room]
        cached = decodes * self.context_tokens
        with_pairs = [(tokens, np.rint(self.pairs_per_token * tokens).astype(np.int64)) for tokens in prompts]
        if longest:
            with_pairs.append((room, room * np.maximum(self.longest_tokens, room)))
        plain_s = steps.plain_ps(decodes, cached) / PICOSECONDS_PER_S
        chunk_s, *others_s = (took / PICOSECONDS_PER_S for took in steps.reading_ps(decodes, cached, with_pairs))
        chunks = new / chunk
        delay_s = chunks * (chunk_s - plain_s)
        if not longest:
            return np.stack([plain_s, chunks * chunk_s, chunks * chunk_s, delay_s, chunk_s])
        own_s = new / own_chunk * others_s[1] if self.ranked else chunks * chunk_s
        return np.stack([plain_s, new / room * others_s[0], own_s, delay_s, others_s[-1]])

    def pace(self, times: Times, batch: Numbers, requests_per_s: Numbers) -> Pace:
        """Return the pace of replicas that hold such a batch at such a rate."""
        crowd = np.maximum(1.0, CROWD * batch)
        crowded = self.times(crowd, longest=False)
        growth = np.log(crowded.requests_per_s(crowd) / np.maximum(requests_per_s, 1e-300)) / math.log(CROWD)
        growth = np.where(requests_per_s > 0, growth, 1.0)
        return Pace(
            requests_per_s=requests_per_s,
            first_token_s=self.steps.first_token_s,
            plain_s=times.plain_s,
            one_more_s=(crowded.plain_s - times.plain_s) / np.maximum(crowd - batch, 1.0),
            read_s=times.read_s,
            own_s=times.own_s,
            delay_s=times.delay_s,
            pair_s=self.pair_s,
            own_pair_s=self.pair_s * self.steps.ranks,
            longest_s=times.longest_s,
            batch=batch,
            crowd_variance=batch / np.minimum(1.0, np.maximum(0.05, growth)),
            output_tokens=self.output_tokens,
            prompt_sigma=self.prompt_sigma,
            output_sigma=self.output_sigma,
            prompts=self.prompts,
            outputs=self.outputs,
        )


def paces(load: Load, requests_per_s: Numbers) -> tuple[Pace, NDArray[np.bool_]]:
    """Return the paces replicas settle to at a rate, and which of them do not fall behind.

    The batch sets the pace, and the pace the batch: it is the one that gets as much done as is asked.
    """

    def done(batch: Numbers) -> Numbers:
        return load.times(batch, longest=False).requests_per_s(batch)

    high = np.ones_like(requests_per_s)
    limit = np.maximum(1.0, load.steps.step_tokens / 2)  # beyond it prompts hardly find room in a step
    while ((short := done(high) <= requests_per_s) & (high < limit)).any():
        high = np.where(short, np.minimum(2 * high, limit), high)
    keeps_up = ~short
    rate = np.where(keeps_up, requests_per_s, 0.0)
    batch = _largest(lambda batch: done(batch) <= rate, np.where(high > 1, high / 2, 0.0), high, PRECISION / 10)
    times = load.times(batch)
    keeps_up &= load.pace(times, batch, rate).reading_fraction < 1
    rate = np.where(keeps_up, rate, 0.0)
    return load.pace(times, times.batch(rate), rate), keeps_up


def pace_at(step: StepCost, requests_per_s: float, lengths: Lengths) -> Pace | None:
    """Return the pace one replica settles to at a rate; None when it falls behind."""
    found, keeps_up = paces(Load([step], [lengths]), np.array([requests_per_s]))
    return found.take(0) if keeps_up[0] else None


# --- The most a replica can take ------------------------------------------------------------------------------------


class Slos:
    """What each replica is held to; `share` is the part of the late requests that its side of a split is allowed."""

    def __init__(self, slos: Sequence[Slo], share: float = 1.0) -> None:
        self.ttft_s = np.array([slo.ttft_s for slo in slos])
        self.tpot_s = np.array([slo.tpot_s for slo in slos])
        self.late_fraction = share * (1 - np.array([slo.fraction for slo in slos]))


def largest_batches(load: Load, places: Counts, slos: Slos) -> Counts:
    """Return the most requests that a replica may always decode without their mean time per token being late."""

    def in_time(batch: Numbers) -> NDArray[np.bool_]:
        return load.times(batch, longest=False).tpot_s(batch) <= slos.tpot_s

    one = np.ones(len(places))
    found = _largest(in_time, np.where(in_time(one), one, 0.0), places.astype(np.float64))
    return np.maximum(1, np.floor(found)).astype(np.int64)


def sustained(load: Load, most: Counts, slos: Slos) -> Pace:
    """Return the paces at the largest rates at which the SLO holds for its fraction of the requests; 0 where for none.

    `most` are the requests a replica decodes together. The batch is searched for, not the rate, because the time of a
    step is known by the batch.
    """

    def at(batch: Numbers) -> Pace:
        times = load.times(batch)
        return load.pace(times, batch, times.requests_per_s(batch))

    least = load.times(np.ones(len(most))).batch(np.full(len(most), LEAST_REQUESTS_PER_S))

    def holds(batch: Numbers) -> NDArray[np.bool_]:
        first, tokens, place = late_fractions(at(batch), most, slos, reads=load.reads)
        return first + tokens + place <= slos.late_fraction

    return at(_largest(holds, np.where(holds(least), least, 0.0), np.minimum(most, load.steps.step_tokens / 2)))


def late_fractions(pace: Pace, most: Counts, slos: Slos, *, reads: bool) -> tuple[Numbers, Numbers, Numbers]:
    """Return the fractions that are late with their first token, with the others, and for want of a place."""
    tokens = UNDERSTATED * pace.late_tokens_fraction(slos.tpot_s)
    if not reads:
        return np.zeros_like(tokens), tokens, pace.late_place_fraction(most, np.zeros_like(tokens))
    alone_s = pace.first_token_s + pace.plain_s + pace.own_s
    return (
        pace.late_first_fraction(slos.ttft_s),
        tokens,
        pace.late_place_fraction(most, slos.ttft_s - alone_s),
    )


def sustained_reading(load: Load, slos: Slos, transfer_s: Numbers) -> Pace:
    """Return the paces at the largest rates at which replicas that only read are in time; see `reading_paces`."""
    alone = reading_paces(load, slos, transfer_s, np.zeros_like(transfer_s))
    reading_s = replace(alone, requests_per_s=np.ones_like(transfer_s)).reading_fraction

    def at(busy_fraction: Numbers) -> Pace:
        return replace(alone, requests_per_s=busy_fraction / reading_s)

    def in_time(busy_fraction: Numbers) -> NDArray[np.bool_]:
        return at(busy_fraction).late_first_fraction(slos.ttft_s) <= slos.late_fraction

    least = LEAST_REQUESTS_PER_S * reading_s
    return at(_largest(in_time, np.where(in_time(least), least, 0.0), np.ones_like(least)))


def reading_paces(load: Load, slos: Slos, transfer_s: Numbers, requests_per_s: Numbers) -> Pace:
    """Return the paces of replicas that read prompts at a rate and write nothing.

    A first token waits for the prompts before, its own prompt, the transfer of its cache to where the answer is written
    (of a prompt of mean length `transfer_s`) and a step there, which takes the SLO's time per token at most.
    """
    none = np.zeros_like(requests_per_s)
    alone = load.reading_times()
    alone = replace(alone, plain_s=slos.tpot_s, own_s=alone.own_s + transfer_s)
    return load.pace(alone, none, requests_per_s)


def _largest(
    does: Callable[[Numbers], NDArray[np.bool_]], low: Numbers, high: Numbers, precision: float = PRECISION
) -> Numbers:
    """Return the largest values that do, between some that do and some that may not; where `low` is 0 none does."""
    low = np.where((low > 0) & does(high), high, low)
    high = np.where(low > 0, high, 0.0)
    while (wide := high - low > precision * high).any():  # whoever is done stays as if searched for alone
        middle = np.sqrt(low * high)
        good = does(middle)
        low, high = np.where(wide & good, middle, low), np.where(wide & ~good, middle, high)
    return low


def quantile_s(late_fraction: Callable[[Numbers], Numbers], allowed: Numbers | float, high_s: Numbers) -> Numbers:
    """Return the times that all but the `allowed` fraction keep to, searched from `high_s` upwards."""
    low, high = np.zeros_like(high_s), high_s
    while (late := late_fraction(high) > allowed).any():
        low, high = np.where(late, high, low), np.where(late, 2 * high, high)
    while (wide := high - low > PRECISION * high).any():
        middle = (low + high) / 2
        good = late_fraction(middle) <= allowed
        low, high = np.where(wide & ~good, middle, low), np.where(wide & good, middle, high)
    return high


def sustained_requests_per_s(step: StepCost, lengths: Lengths, most: int, slo: Slo) -> float:
    """Return the largest rate at which the SLO holds on one replica; 0 if it does for none."""
    return float(sustained(Load([step], [lengths]), np.array([most]), Slos([slo])).requests_per_s[0])


# --- The normal distribution ----------------------------------------------------------------------------------------

NUMERATOR = (
    3.52624965998911e-02, 0.700383064443688, 6.37396220353165, 33.912866078383, 112.079291497871, 221.213596169931,
    220.206867912376,
)  # fmt: skip
DENOMINATOR = (
    8.83883476483184e-02, 1.75566716318264, 16.064177579207, 86.7807322029461, 296.564248779674, 637.333633378831,
    793.826512519948, 440.413735824752,
)  # fmt: skip
FAR = 7.0  # standard deviations; beyond them a part in 1e12 is left


def normal_fraction(value: Numbers) -> Numbers:
    """Return the fraction of a normal distribution below so many standard deviations, to 1e-12.

    Hart's rational approximation (Computer Approximations, 1968, no. 5666), which NumPy has none of its own for.
    """
    size = np.minimum(np.abs(value), FAR)
    above, below = np.full_like(size, NUMERATOR[0]), np.full_like(size, DENOMINATOR[0])
    for factor in NUMERATOR[1:]:
        above = above * size + factor
    for factor in DENOMINATOR[1:]:
        below = below * size + factor
    tail = np.exp(-size * size / 2) * above / below
    return np.where(value > 0, 1 - tail, tail)
