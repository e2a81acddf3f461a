"""How long one engine step takes: its kernels one after another, in integer picoseconds.

A step runs every layer once over all its tokens: prompt tokens of a chunk and one token of each sequence that decodes.
What depends on their number alone (matrix products, experts, exchange between GPUs, the host's work) is a table by
number of tokens. Attention also depends on what is cached: for decodes a base and a slope by the number of sequences,
for prompts a base, a slope by token and one by pair of query and key. Kernel times come from `waterline.cost.kernels`,
none faster than the card's bandwidth and peak allow, so no step is either. What an engine does better or worse than
the kernels that were measured, and what it adds, are factors of its calibration.

What a client waits for besides, once a request whatever its length, is `StepCost.first_token_ps`. It passes outside the
steps and keeps no other request waiting: add it to a first token, never to a step.

All coefficients are integers: sums over steps are exact whatever their order, which is what lets a rehearsal skip steps
without changing the result.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

import numpy as np

from waterline.catalog.calibration import Calibration, calibration_of
from waterline.catalog.engines import EngineProfile
from waterline.cost.durations import Durations, picoseconds
from waterline.cost.kernels import bare_kernels, find_kernels
from waterline.cost.layers import Numbers, Shard, forms
from waterline.errors import InfeasibleError
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, AttentionLayers, Llm
from waterline.plan import Layout

CONTEXTS = np.array([64.0, 512.0, 2048.0, 8192.0, 32768.0])  # at which the cost of cached tokens is taken
CHUNKS = np.array([64.0, 512.0, 2048.0, 8192.0])  # prompt tokens at which the cost of reading is taken …
CACHED = np.array([0.0, 2048.0, 8192.0, 32768.0])  # … after so many of the same prompt
FAR = np.array([1e6, 2e6])  # contexts where reading the cache is all there is
MOST_DECODES = 1024  # sequences in the tables; more cost as much each as the last ones


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCost:
    """One kind of attention layers, all of them together; a window limits what is read and multiplied."""

    window_tokens: int  # 0: the whole context
    decode_ps: Sequence[int]  # [decodes of a rank] whatever their context; the last one for more
    decode_ps_per_token: Sequence[int]  # [decodes of a rank] of all that all ranks have cached; the last one for more
    prefill_ps: int  # for a step with prompt tokens
    prefill_ps_per_token: int  # of all ranks' together, as the next
    prefill_ps_per_pair: int  # one query against one key and value


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """The coefficients of one replica's steps; see `step_ps` for how they combine."""

    tokens_ps: Sequence[int]  # [tokens of a rank] everything but attention and head …
    more_ps_per_token: int  # … and each token beyond the table
    head_ps: Sequence[int]  # [sequences of a rank] that sample a token; the last one for more
    attention: tuple[AttentionCost, ...]
    step_tokens: int  # prompt and output tokens the engine puts into one step, at most, over all ranks
    ranks: int = 1  # of data-parallel attention: each has its share of the sequences, all wait for the fullest
    first_token_ps: int = 0  # a first token comes so much later than its last step ends: HTTP, tokenising, the way back

    def step_ps(self, prefill_tokens: int, prefill_pairs: int, decodes: int, cached_tokens: int) -> int:
        """Return the time of one step, in picoseconds.

        Args:
            prefill_tokens: prompt tokens processed, over all requests.
            prefill_pairs: sum over those tokens of the tokens each attends to, itself included.
            decodes: sequences that produce their next token.
            cached_tokens: context of all those sequences together.
        """
        ranks = self.ranks
        tokens, decodes = -(-(prefill_tokens + decodes) // ranks), -(-decodes // ranks)  # of the fullest rank
        last = len(self.tokens_ps) - 1
        took_ps = self.tokens_ps[tokens] if tokens <= last else self._beyond(tokens)
        took_ps += self.head_ps[min(decodes + (prefill_tokens > 0), len(self.head_ps) - 1)]
        for layers in self.attention:
            if decodes:
                kept = cached_tokens
                if layers.window_tokens:
                    kept = min(kept, decodes * ranks * layers.window_tokens)
                row = min(decodes, len(layers.decode_ps) - 1)
                took_ps += layers.decode_ps[row] + layers.decode_ps_per_token[row] * kept
            if prefill_tokens:
                pairs = prefill_pairs
                if layers.window_tokens:
                    pairs = min(pairs, prefill_tokens * layers.window_tokens)
                took_ps += layers.prefill_ps + layers.prefill_ps_per_token * prefill_tokens
                took_ps += layers.prefill_ps_per_pair * pairs
        return took_ps

    def _beyond(self, tokens: int) -> int:
        return self.tokens_ps[-1] + self.more_ps_per_token * (tokens - len(self.tokens_ps) + 1)


def prefill_pairs(first_token: int, tokens: int) -> int:
    """Return the query-key pairs of prompt tokens `first_token` … `first_token + tokens - 1`, counted from 0."""
    return tokens * first_token + tokens * (tokens + 1) // 2


def step_cost(llm: Llm, gpu: Gpu, layout: Layout, precision: str, engine: EngineProfile) -> StepCost:
    """Price the steps of one replica.

    Raises InfeasibleError when the card has no units for the precision.
    """
    return price_steps(llm, gpu, layout, precision, engine, calibration_of(engine.name, gpu.stack))


def price_steps(
    llm: Llm, gpu: Gpu, layout: Layout, precision: str, engine: EngineProfile, calibration: Calibration
) -> StepCost:
    """Price the steps of one replica of an engine calibrated like that; see `step_cost`."""
    if not any(name in gpu.flops_per_s for name in PRECISIONS[precision].compute):
        has = ", ".join(sorted(gpu.flops_per_s))
        raise InfeasibleError(f"{gpu.id} cannot compute in {precision}: it has {has}. Allow another precision.")
    kernels = bare_kernels(gpu) if calibration.own_kernels else find_kernels(gpu)
    vector_s = calibration.vector_s_per_byte(gpu)
    cache = "fp8" if engine.cache_dtype(precision) == "fp8" and gpu.flops_per_s.get("fp8") else "bf16"
    shard = Shard(llm, gpu, layout, forms(llm, precision), kernels, cache, vector_s, calibration.factors(gpu))
    counts = _counts(max(engine.step_tokens, MOST_DECODES))  # of each rank
    took_s = shard.tokens_s(counts)
    took_s += calibration.step_s + calibration.layer_s * llm.layers + calibration.token_s * counts
    took_s += calibration.stage_s * (layout.pp - 1)
    table = _table(counts, took_s)
    sequences = _counts(MOST_DECODES)
    return StepCost(
        tokens_ps=table,
        more_ps_per_token=-(-(table[-1] - table[-257]) // 256),
        head_ps=_table(sequences, shard.head_s(sequences)),
        attention=tuple(
            cost for group in llm.attention for cost in _attention(_Part(shard.key_of(group), group, shard))
        ),
        step_tokens=engine.step_tokens * layout.dp,
        ranks=layout.dp,
        first_token_ps=_ps(calibration.request_s),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Layers of a shard; those of another are the same if their keys are: at another precision, in other stages."""

    key: tuple[Hashable, ...]
    group: AttentionLayers = field(compare=False)
    shard: Shard = field(compare=False)


@lru_cache(maxsize=4096)
def _attention(part: _Part) -> tuple[AttentionCost, ...]:
    return tuple(_attention_costs(part.shard, part.group))


def _attention_costs(shard: Shard, group: AttentionLayers) -> Iterator[AttentionCost]:
    """Fit the forms of `AttentionCost` to the kernels, at contexts up to the window."""
    window = group.window_tokens if group.kind == "window" else group.selected_tokens
    contexts = np.array([1 / 64, 1 / 16, 1 / 4, 1]) * window if window else CONTEXTS
    sequences = _counts(MOST_DECODES)
    if not shard.factors["latent" if group.kind == "latent" else "attention"]:
        return  # left out
    decode_s = shard.decode_s(group, sequences[:, None], contexts[None, :])
    base_s, slope_s = _lines(shard.layout.dp * sequences[:, None] * contexts[None, :], decode_s)
    slope_s = np.maximum(slope_s, _least_slope_s(shard, group, sequences, contexts[-2:] if window else FAR))
    prefill_s, columns = _reading(shard, group, window)
    fixed_s, token_s, pair_s = _plane(columns, prefill_s)
    yield AttentionCost(
        window_tokens=window,
        decode_ps=_table(sequences, base_s),
        decode_ps_per_token=Durations(sequences, slope_s, free=False),
        prefill_ps=_ps(fixed_s),
        prefill_ps_per_token=_ps(token_s / shard.layout.dp),
        prefill_ps_per_pair=_ps(pair_s / shard.layout.dp),
    )
    if group.selected_tokens and (index_s := shard.index_s_per_token(group)):
        every = tuple([_ps(index_s)] * 2)
        yield AttentionCost(
            window_tokens=0, decode_ps=(0,), decode_ps_per_token=every,
            prefill_ps=0, prefill_ps_per_token=0, prefill_ps_per_pair=_ps(shard.index_s_per_pair(group)),
        )  # fmt: skip


def _reading(shard: Shard, group: AttentionLayers, window: int) -> tuple[Numbers, Numbers]:
    """Return what attention takes for chunks of a prompt behind cached tokens, and what `AttentionCost` counts of each.

    Within its window a pair costs the same wherever the cached token lies, so one slope serves short prompts and long
    prefixes to a few percent. MLA unpacks the cached tokens again for every chunk: that is counted in its pairs, too
    little of it for chunks of less than a thousand tokens behind a long prefix (R1, 512 after 32 k: 0.84 of it).
    """
    new, old = (grid.ravel() for grid in np.meshgrid(CHUNKS, CACHED, indexing="ij"))
    pairs = new * old + new * (new + 1) / 2
    if window:
        pairs = np.minimum(pairs, new * window)
    return shard.prefill_s(group, new, old), np.stack([np.ones_like(new), new, pairs])


def _lines(cached_tokens: Numbers, took_s: Numbers) -> tuple[Numbers, Numbers]:
    """Return base and slope of the line that fits each row best by relative error, neither negative."""
    weight = 1 / took_s**2
    total = weight.sum(axis=1)
    x = (weight * cached_tokens).sum(axis=1) / total
    y = (weight * took_s).sum(axis=1) / total
    spread = (weight * (cached_tokens - x[:, None]) ** 2).sum(axis=1)
    slope = (weight * (cached_tokens - x[:, None]) * (took_s - y[:, None])).sum(axis=1) / np.maximum(spread, 1e-300)
    slope = np.maximum(0.0, slope)
    return np.maximum(0.0, y - slope * x), slope


def _least_slope_s(shard: Shard, group: AttentionLayers, sequences: Numbers, contexts: Numbers) -> Numbers:
    """Return what a cached token takes at the card's bandwidth: lines through bent curves would fall below it."""
    near_s, far_s = shard.decode_limit_s(group, sequences[:, None], contexts[None, :]).T
    return np.asarray((far_s - near_s) / (shard.layout.dp * sequences * (contexts[1] - contexts[0])))


def _plane(columns: Numbers, took_s: Numbers) -> Numbers:
    """Return coefficients, none negative, with the least relative error; those that would be negative are left out."""
    kept, found = list(range(len(columns))), np.zeros(len(columns))
    while kept:
        values, *_ = np.linalg.lstsq((columns[kept] / took_s).T, np.ones_like(took_s), rcond=None)
        if (values >= 0).all():
            found[kept] = values
            break
        kept.pop(int(np.argmin(values * columns[kept].max(axis=1))))
    return found


@cache
def _counts(most: int) -> Numbers:
    """Return counts from 1 to `most`: every one up to 16, then in steps of an eighth, powers of two among them."""
    grown = 2 ** np.arange(4, math.log2(most) + 1e-9, 0.25)
    # Not np.unique, which imports masked arrays: a twentieth of the time of a whole `waterline fit`.
    return np.array(sorted({*np.arange(1.0, 17.0).tolist(), *np.round(grown).tolist(), float(most)}))


def _table(counts: Numbers, took_s: Numbers) -> Durations:
    """Return picoseconds by count, from 0 (nothing, no time) to the last of `counts`; more never takes less."""
    return Durations(counts, np.maximum.accumulate(took_s))


def _ps(duration_s: float) -> int:
    return int(picoseconds(duration_s))
