"""How long one engine step takes: a roofline, in integer picoseconds.

A step reads the weights once, reads the cache of every sequence it decodes, and multiplies every token it processes
with the weights. Memory traffic and arithmetic overlap, so the slower of the two counts; what the GPUs of a replica
exchange and what the host does come on top. With peaks of the datasheet and the efficiencies of the engine it is

    step = overhead + max(bytes / bandwidth, FLOPs / rate) + exchange

and so never below bytes / bandwidth nor FLOPs / peak. All coefficients are integers (rounded up): sums over steps are
exact whatever their order, which is what lets a rehearsal skip steps without changing the result.
"""

import math
from dataclasses import dataclass

from waterline import catalog
from waterline.catalog.engines import EngineProfile, find_engine
from waterline.cost.memory import (
    CACHE_ELEMENT_BYTES,
    embedding_parameters,
    layer_cache_elements,
    weights_bytes,
)
from waterline.errors import InfeasibleError
from waterline.fleet import Fleet
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, AttentionLayers, Llm
from waterline.plan import Layout, Replica
from waterline.units import PICOSECONDS_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCost:
    """One kind of attention layers, all of them together; a window limits what is read and multiplied."""

    window_tokens: int  # 0: the whole context
    read_ps_per_token: int  # of the cache, for a sequence that is decoded
    multiply_ps_per_pair: int  # one query against one key and value


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """The coefficients of one replica's steps; see `step_ps` for how they combine."""

    overhead_ps: int
    weights_ps: int  # read once a step, experts left out
    experts_ps: tuple[int, ...]  # [tokens] routed experts a step of so many tokens reads; the last one for more
    state_ps_per_sequence: int  # recurrent state, read and written
    attention: tuple[AttentionCost, ...]
    multiply_ps_per_token: int
    head_ps_per_sequence: int  # the output head, for every sequence that samples a token
    exchange_ps: int
    exchange_ps_per_token: int
    step_tokens: int  # prompt and output tokens the engine puts into one step, at most

    def step_ps(self, prefill_tokens: int, prefill_pairs: int, decodes: int, cached_tokens: int) -> int:
        """Return the time of one step, in picoseconds.

        Args:
            prefill_tokens: prompt tokens processed, over all requests.
            prefill_pairs: sum over those tokens of the tokens each attends to, itself included.
            decodes: sequences that produce their next token.
            cached_tokens: context of all those sequences together.
        """
        tokens = prefill_tokens + decodes
        read_ps = (
            self.weights_ps
            + self.experts_ps[min(tokens, len(self.experts_ps) - 1)]
            + self.state_ps_per_sequence * decodes
        )
        multiply_ps = self.multiply_ps_per_token * tokens + self.head_ps_per_sequence * (decodes + (prefill_tokens > 0))
        for layers in self.attention:
            kept, pairs = cached_tokens, prefill_pairs
            if layers.window_tokens:
                kept = min(kept, decodes * layers.window_tokens)
                pairs = min(pairs, prefill_tokens * layers.window_tokens)
            read_ps += layers.read_ps_per_token * kept
            multiply_ps += layers.multiply_ps_per_pair * (pairs + kept)
        return self.overhead_ps + max(read_ps, multiply_ps) + self.exchange_ps + self.exchange_ps_per_token * tokens


def prefill_pairs(first_token: int, tokens: int) -> int:
    """Return the query-key pairs of prompt tokens `first_token` … `first_token + tokens - 1`, counted from 0."""
    return tokens * first_token + tokens * (tokens + 1) // 2


def step_cost(llm: Llm, gpu: Gpu, layout: Layout, precision: str, engine: EngineProfile) -> StepCost:
    """Price the steps of one replica.

    Tensor parallelism divides bytes and FLOPs; the stages of a pipeline follow one another, so a step passes all of
    them and only their memory adds up. Raises InfeasibleError when the card has no units for the precision.
    """
    form = PRECISIONS[precision]
    rate = next((gpu.flops_per_s[name] for name in form.compute if name in gpu.flops_per_s), None)
    if rate is None:
        has = ", ".join(sorted(gpu.flops_per_s))
        raise InfeasibleError(f"{gpu.id} cannot compute in {precision}: it has {has}. Allow another precision.")
    read_s = 1 / (gpu.memory_bytes_per_s * engine.memory_efficiency * layout.tp)
    multiply_s = 1 / (rate * engine.compute_efficiency * layout.tp)
    attention_rate = next((gpu.flops_per_s[name] for name in ("bf16", "fp16", "fp32") if name in gpu.flops_per_s), rate)
    pair_s = 1 / (attention_rate * engine.compute_efficiency * layout.tp)

    all_bytes = weights_bytes(llm, precision)
    expert_bytes = llm.expert_parameters * form.bits / 8
    unread_bytes = 2.0 * llm.vision_parameters
    if not llm.tied_embeddings:  # the input embedding: a row for each token
        unread_bytes += llm.vocabulary * llm.hidden * (16 if form.keeps_embeddings else form.bits) / 8
    body = llm.active_parameters - embedding_parameters(llm)
    state_elements = sum(g.layers * g.state_elements for g in llm.attention if g.kind == "state")
    return StepCost(
        overhead_ps=engine.step_overhead_ps,
        weights_ps=_ps(max(0.0, all_bytes - expert_bytes - unread_bytes) * read_s),
        experts_ps=tuple(_ps(expert_bytes * share * read_s) for share in _expert_shares(llm)),
        state_ps_per_sequence=_ps(2 * state_elements * CACHE_ELEMENT_BYTES * read_s),
        attention=tuple(
            _attention_cost(group, layout, read_s, pair_s) for group in llm.attention if group.kind != "state"
        ),
        multiply_ps_per_token=_ps(2 * body * multiply_s),
        head_ps_per_sequence=_ps(2 * llm.vocabulary * llm.hidden * multiply_s),
        exchange_ps=_exchange_ps(llm, layout, engine),
        exchange_ps_per_token=_ps(_exchange_s_per_token(llm, gpu, layout)),
        step_tokens=engine.step_tokens,
    )


def replica_step_cost(fleet: Fleet, replica: Replica) -> StepCost:
    """Price the steps of a planned replica."""
    return step_cost(
        fleet.llm_of(fleet.model(replica.model)),
        catalog.find_gpu(fleet.pool(replica.pool).gpu),
        replica.layout,
        replica.precision,
        find_engine(replica.engine),
    )


def _ps(duration_s: float) -> int:
    """Round up, but not for the last bits of a float: 8000.0000000001 is 8000."""
    return math.ceil(round(duration_s * PICOSECONDS_PER_S, 3))


def _attention_cost(group: AttentionLayers, layout: Layout, read_s: float, pair_s: float) -> AttentionCost:
    """MLA keeps its latent whole on every GPU, so tensor parallelism does not divide reading it; see `memory`."""
    undivided = layout.tp if group.kind == "latent" else layout.tp / min(layout.tp, max(1, group.kv_heads))
    head_elements = (
        2 * group.latent_dim + group.rope_dim  # absorbed: queries against the latent, and the latent as value
        if group.kind == "latent"
        else group.head_dim + (group.value_head_dim or group.head_dim)
    )
    return AttentionCost(
        window_tokens=group.window_tokens if group.kind == "window" else 0,
        read_ps_per_token=_ps(group.layers * layer_cache_elements(group, 1) * CACHE_ELEMENT_BYTES * read_s * undivided),
        multiply_ps_per_pair=_ps(2 * group.layers * group.query_heads * head_elements * pair_s),
    )


def _expert_shares(llm: Llm) -> tuple[float, ...]:
    """Return the share of the routed experts that a step of 0, 1, 2 … tokens touches, until it is nearly all.

    Tokens choose independently and evenly: 1 - (1 - chosen/experts) ** tokens. Real routing is uneven and touches
    fewer.
    """
    layers = [group for group in llm.feed_forward if group.experts]
    if not layers:
        return (0.0,)
    missed = 1 - layers[0].experts_per_token / layers[0].experts
    shares = [0.0]
    while shares[-1] < 0.999:
        shares.append(1 - missed ** len(shares))
    return (*shares, 1.0)


def _exchange_ps(llm: Llm, layout: Layout, engine: EngineProfile) -> int:
    collectives = 2 * llm.layers if layout.tp > 1 else 0  # after attention and after the feed-forward network
    return (collectives + layout.pp - 1) * engine.collective_latency_ps


def _exchange_s_per_token(llm: Llm, gpu: Gpu, layout: Layout) -> float:
    """A ring all-reduce sends every byte 2 (n-1)/n times; a stage hands the hidden state on, past the PCIe bus.

    Two GPUs of a mesh see the one wire between them; a larger group sees all of them.
    """
    hidden_bytes = 2 * llm.hidden
    exchange_s = 0.0
    if layout.tp > 1:
        link_bytes_per_s = gpu.link.pair_bytes_per_s if layout.tp == 2 else gpu.link.bytes_per_s
        exchange_s += 2 * llm.layers * hidden_bytes * 2 * (layout.tp - 1) / layout.tp / link_bytes_per_s
    if layout.pp > 1 and gpu.pcie_bytes_per_s:
        exchange_s += (layout.pp - 1) * hidden_bytes / gpu.pcie_bytes_per_s
    return exchange_s
