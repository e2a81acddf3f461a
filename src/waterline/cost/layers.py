"""What one GPU of a replica does in a step: the kernels of its share of every layer, timed by `waterline.cost.kernels`.

Tensor parallelism divides heads and the widths of feed-forward networks; a head that cannot be divided is computed
whole. Data-parallel attention gives each rank its own sequences; experts then serve the tokens of all ranks. The stages
of a pipeline follow one another, so a step passes every layer, whichever GPU holds it.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterline.cost.kernels import Kernels
from waterline.cost.kernels_curves import COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY
from waterline.cost.memory import CACHE_ELEMENT_BYTES, embedding_parameters
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, AttentionLayers, FeedForwardLayers, Llm
from waterline.llm.precision import SIXTEEN_BIT
from waterline.plan import Layout

Numbers = NDArray[np.float64]
Sizes = dict[str, Any]  # arguments of a kernel by name: arrays and numbers

PARTS_OF_WEIGHTS = ("attention", "dense", "shared", "experts", "head")
ACTIVATION_BYTES = 2  # the residual stream is kept in 16 bits
NETWORK_BYTES_PER_S = 50e9  # each GPU's own 400 Gb/s port to other nodes, as in HGX machines since 2022
QUERY_LATENT = 1536  # q_lora_rank of DeepSeek V3, which the measured module has
INDEX_HEADS = 64  # index_n_heads of DeepSeek V3.2, whole on every GPU
SLOWER_IN_FEW_BITS = 1.15  # at most, than in 16
EVEN_ABOVE = 8  # GPUs that share the experts: more of them keep copies of those in demand
UNPACKED_ABOVE = 32  # tokens of a step; for fewer llama.cpp multiplies quantised weights as they are
PASSES = 14  # how often they read or write the residual stream, together


def forms(llm: Llm, precision: str) -> Mapping[str, str]:
    """Return the form of each part's matrix products, as the checkpoint has them or as quantising to `precision` would.

    Quantised checkpoints keep the output head in 16 bits, and those in 4 bits the projections of MLA as well.
    """
    kept = PRECISIONS[precision]
    if precision == llm.precision and llm.stored_forms:
        return {part: llm.stored_forms.get(part, precision) for part in PARTS_OF_WEIGHTS}
    found = dict.fromkeys(PARTS_OF_WEIGHTS, precision)
    if kept.keeps_embeddings:
        found["head"] = "bf16" if kept.bits <= 16 else precision
    if kept.bits < 8 and not kept.gguf and any(group.kind == "latent" for group in llm.attention):
        found["attention"] = "bf16"
    return found


class Product(NamedTuple):
    """A matrix product that so many layers have."""

    layers: int
    outputs: float
    inputs: float
    form: str


@dataclass(frozen=True, slots=True)
class Shard:
    """One GPU's share of a model; all times in seconds, over all layers, as the engine's calibration has them."""

    llm: Llm
    gpu: Gpu
    layout: Layout
    forms: Mapping[str, str]  # of the matrix products by part: a key of PRECISIONS, or "fp8_block"
    kernels: Kernels
    cache: str  # form of the cache of keys and values
    vector_s_per_byte: float  # of weights, for kernels that multiply on the vector units; 0: they do not
    factors: Mapping[str, float]  # of the engine on the time of its kernels, by part; never below the card's limits

    def tokens_s(self, tokens: Numbers) -> Numbers:
        """Return what a step of so many tokens on each rank takes, attention and output head left out."""
        took = self.llm.layers * self._small_s(tokens) + self._products_s(tokens)
        for layers in self.llm.feed_forward:
            if layers.experts:
                took = took + layers.layers * self._experts_s(layers, tokens * self.layout.dp)
        exchange = self._exchange_s(tokens)
        if self.layout.dp > self.gpu.gpus_per_node:  # engines that span nodes exchange for one half of a step while …
            return np.maximum(took, exchange)  # … they compute the other
        return took + exchange

    def head_s(self, sequences: Numbers) -> Numbers:
        """Return the time of the output head for so many sequences on each rank."""
        outputs, inputs = np.array(self.llm.vocabulary / self.layout.tp), np.array(float(self.llm.hidden))
        return self._gemm_s(sequences, outputs, inputs, self.forms["head"])

    def key_of(self, group: AttentionLayers) -> tuple[Hashable, ...]:
        """Return all that the attention of the group depends on: it takes the same time wherever this is the same."""
        latent = group.kind == "latent"
        factor = self.factors["latent" if latent else "attention"]
        projected = (self.llm.hidden, self.forms["attention"]) if latent else ()
        return (self.kernels, group, self.layout.tp, self.layout.dp, self.cache, factor, projected)

    def decode_s(self, group: AttentionLayers, sequences: Numbers, context_tokens: Numbers) -> Numbers:
        """Return the attention of the group for sequences of a rank that decode; for MLA the projections as well."""
        if group.kind == "state":
            moved = 2 * group.state_elements * CACHE_ELEMENT_BYTES / self._split(group.kv_heads or self.layout.tp)
            return group.layers * (sequences * moved / self.gpu.memory_bytes_per_s + 0.0 * context_tokens)
        read = np.minimum(context_tokens, group.selected_tokens or np.inf)
        if group.kind == "latent":
            form, latent = self.forms["attention"], self._latent(group)
            took = self.kernels.latent_decode_s(sequences, read, self._heads(group), form, **latent)
            latent_sizes = {"requests": sequences, "heads": self._heads(group)}
            return group.layers * self._calibrated("latent", took, "latent_decode", form, latent_sizes)
        sizes: Sizes = {
            "requests": sequences, "context_tokens": read, "query_heads": self._heads(group),
            "kv_heads": self._kv_heads(group), "head_dim": group.head_dim, "window_tokens": group.window_tokens,
        }  # fmt: skip
        took = self.kernels.decode_attention_s(**sizes, cache=self.cache)
        return group.layers * self._calibrated("attention", took, "decode", "", sizes)

    def decode_limit_s(self, group: AttentionLayers, sequences: Numbers, context_tokens: Numbers) -> Numbers:
        """Return what the datasheet allows for `decode_s`; 0 for states and MLA, whose limit is that of a module."""
        if group.kind in {"state", "latent"}:
            return 0.0 * sequences * context_tokens
        sizes: Sizes = {
            "requests": sequences, "context_tokens": np.minimum(context_tokens, group.selected_tokens or np.inf),
            "query_heads": self._heads(group), "kv_heads": self._kv_heads(group), "head_dim": group.head_dim,
            "window_tokens": group.window_tokens,
        }  # fmt: skip
        shape = {name: np.asarray(size, dtype=np.float64) for name, size in sizes.items()}
        return group.layers * self.kernels.limit_s("decode", "", self.cache, shape)

    def prefill_s(self, group: AttentionLayers, new_tokens: Numbers, cached_tokens: Numbers) -> Numbers:
        """Return the attention of the group for a chunk of one prompt; for MLA the projections as well."""
        if group.kind == "state":
            moved = 2 * group.state_elements * CACHE_ELEMENT_BYTES / self._split(group.kv_heads or self.layout.tp)
            return group.layers * (moved / self.gpu.memory_bytes_per_s + 0.0 * new_tokens)
        if group.kind == "latent":
            form, heads, latent = self.forms["attention"], self._heads(group), self._latent(group)
            selected = group.selected_tokens
            took = self.kernels.latent_prefill_s(
                1.0, new_tokens, cached_tokens, heads, form, **latent, selected_tokens=selected
            )
            latent_sizes = {"requests": 1.0, "new_tokens": new_tokens, "heads": heads}
            return group.layers * self._calibrated("latent", took, "latent_prefill", form, latent_sizes)
        sizes: Sizes = {
            "requests": 1.0, "new_tokens": new_tokens, "cached_tokens": cached_tokens,
            "query_heads": self._heads(group), "kv_heads": self._kv_heads(group), "head_dim": group.head_dim,
            "window_tokens": group.window_tokens or group.selected_tokens,
        }  # fmt: skip
        took = self.kernels.prefill_attention_s(**sizes, cache=self.cache)
        return group.layers * self._calibrated("attention", took, "prefill", "", sizes)

    def _products_s(self, tokens: Numbers) -> Numbers:
        """Return the time of all products but the output head's; those of a form are timed together."""
        by_form: dict[str, list[Product]] = {}
        for product in (*self._projections(), *self._dense(), *self._unaccounted()):
            by_form.setdefault(product.form, []).append(product)
        took = np.zeros_like(tokens)
        for form, products in by_form.items():
            outputs = np.array([float(product.outputs) for product in products])[:, None]
            inputs = np.array([float(product.inputs) for product in products])[:, None]
            layers = np.array([float(product.layers) for product in products])
            took = took + (layers[:, None] * self._gemm_s(tokens, outputs, inputs, form)).sum(axis=0)
        return took

    def _gemm_s(self, tokens: Numbers, outputs: Numbers, inputs: Numbers, form: str) -> Numbers:
        """Return the time of matrix products, [product, tokens] or [tokens] of one.

        Block-scaled fp8 was measured outside CUDA graphs: up to a few hundred tokens, and for narrow matrices always,
        its points are the host's launches. Per-tensor fp8 moves and multiplies the same and is taken instead.
        """
        form = "fp8" if form == "fp8_block" else form
        took = self.kernels.gemm_s(tokens, outputs, inputs, form)
        if PRECISIONS[form].bits < 16 and self.kernels.provenance != "measured":
            # Kernels of fewer bits that are slower were measured; of a card nobody measured it is not to be believed.
            took = np.minimum(took, SLOWER_IN_FEW_BITS * self.kernels.gemm_s(tokens, outputs, inputs, "bf16"))
        # Fitted as a share of the usual time to read, of which bandwidth alone is MEMORY_EFFICIENCY.
        vector_s = self.vector_s_per_byte / MEMORY_EFFICIENCY * outputs * inputs * PRECISIONS[form].bits / 8
        sizes = {"tokens": tokens, "outputs": outputs, "inputs": inputs}
        took = self._calibrated("products", took, "gemm", form, sizes)
        return vector_s + took + self._unpacked_s(tokens, outputs * inputs, form)

    def _unpacked_s(self, tokens: Numbers, weights: Numbers, form: str) -> Numbers:
        """Return the time to write quantised weights out in 16 bits and read those, as llama.cpp does for prompts."""
        if not self.factors["products"] or not PRECISIONS[form].gguf or PRECISIONS[form].bits >= 16:
            return np.zeros(())
        return np.where(tokens > UNPACKED_ABOVE, 2 * ACTIVATION_BYTES * weights / self.gpu.memory_bytes_per_s, 0.0)

    def _calibrated(self, part: str, took_s: Numbers, kind: str, form: str, sizes: Sizes) -> Numbers:
        factor = self.factors[part]
        if factor >= 1 or factor == 0:  # 0 leaves a part out, for a fit that wants the others alone
            return factor * took_s
        shape = {name: np.asarray(size, dtype=np.float64) for name, size in sizes.items()}
        return np.maximum(factor * took_s, self.kernels.limit_s(kind, form, self.cache, shape))

    def _latent(self, group: AttentionLayers) -> Sizes:
        return {
            "hidden": self.llm.hidden,
            "latent": group.latent_dim,
            "rope": group.rope_dim,
            "head_dim": group.head_dim - group.rope_dim,
            "value_head_dim": group.value_head_dim or group.head_dim,
        }

    def _split(self, most: int) -> int:
        return max(1, min(self.layout.tp, most))

    def _heads(self, group: AttentionLayers) -> int:
        return -(-group.query_heads // self.layout.tp)

    def _kv_heads(self, group: AttentionLayers) -> int:
        return max(1, -(-group.kv_heads // self.layout.tp))

    def _projections(self) -> Iterator[Product]:
        hidden, form = self.llm.hidden, self.forms["attention"]
        for group in self.llm.attention:
            if group.kind in {"latent", "state"} or not group.query_heads:
                continue
            heads, kv_heads = self._heads(group), self._kv_heads(group)
            value_dim = group.value_head_dim or group.head_dim
            into = heads * group.head_dim + kv_heads * (group.head_dim + value_dim)
            yield Product(group.layers, into, hidden, form)
            yield Product(group.layers, hidden, heads * value_dim, form)

    def _dense(self) -> Iterator[Product]:
        """Dense networks, or the experts every token passes, and the routers."""
        hidden = self.llm.hidden
        for layers in self.llm.feed_forward:
            if width := layers.shared_intermediate if layers.experts else layers.intermediate:
                own, form = width / self.layout.tp, self.forms["shared" if layers.experts else "dense"]
                yield Product(layers.layers, (layers.matrices - 1) * own, hidden, form)
                yield Product(layers.layers, hidden, own, form)
            if layers.experts:
                yield Product(layers.layers, layers.experts, hidden, "bf16")

    def _experts_s(self, layers: FeedForwardLayers, tokens: Numbers) -> Numbers:
        gpus = self.layout.tp * self.layout.dp
        ep = min(self.layout.ep, gpus)
        sizes: Sizes = {
            "tokens": tokens, "hidden": layers.expert_hidden or self.llm.hidden, "intermediate": layers.intermediate,
            "experts_per_token": layers.experts_per_token, "experts": layers.experts, "tp": gpus // ep, "ep": ep,
            "matrices": layers.matrices,
        }  # fmt: skip
        even, form = ep > EVEN_ABOVE, self.forms["experts"]
        kind = "experts_balanced" if even else "experts"
        took = self.kernels.experts_s(**sizes, form=form, balanced=even)
        if form == "fp8" and self.llm.stored_forms.get("experts") != form:
            # Nobody quantised them yet. vLLM's kernel for one scale a tensor takes four times as long on Hopper as that
            # for blocks, so there they are published in blocks.
            took = np.minimum(took, self.kernels.experts_s(**sizes, form="fp8_block", balanced=even))
        if form not in SIXTEEN_BIT and not self.kernels.measured(kind, form):
            plain = self.kernels.experts_s(**sizes, form="bf16", balanced=even)
            took = np.minimum(took, SLOWER_IN_FEW_BITS * plain)  # as in `_gemm_s`
        return self._calibrated("experts", took, kind, form, sizes)

    def _unaccounted(self) -> Iterator[Product]:
        """Whatever else every token is multiplied with: the projections of states, indexers, biases, gates."""
        known = embedding_parameters(self.llm)
        for group in self.llm.attention:
            known += group.layers * _projection_parameters(group, self.llm.hidden)
        for layers in self.llm.feed_forward:
            chosen = layers.experts_per_token * layers.intermediate * (layers.expert_hidden or self.llm.hidden)
            dense = (layers.shared_intermediate if layers.experts else layers.intermediate) * self.llm.hidden
            known += layers.layers * (layers.matrices * (chosen * bool(layers.experts) + dense))
        rest = self.llm.active_parameters - known
        states = sum(group.layers for group in self.llm.attention if group.kind == "state")
        if rest <= 0.02 * self.llm.active_parameters and not states:
            return
        count = states or self.llm.layers
        width = max(1.0, rest / count / self.llm.hidden / self.layout.tp)
        yield Product(count, width, self.llm.hidden, self.forms["attention"])

    def _small_s(self, tokens: Numbers) -> Numbers:
        moved = PASSES * ACTIVATION_BYTES * self.llm.hidden * tokens
        return np.asarray(self.factors["small"] * moved / self.gpu.memory_bytes_per_s)

    def index_s_per_token(self, group: AttentionLayers) -> float:
        """Sparse attention reads one small key for every token of the context, in 8 bits, to choose by."""
        return group.layers * group.index_dim / self.layout.dp / self.gpu.memory_bytes_per_s

    def index_s_per_pair(self, group: AttentionLayers) -> float:
        """It scores every query against every key to choose, in 8 bits where the card has units for them."""
        rate = self.gpu.flops_per_s.get("fp8") or self.gpu.flops_per_s.get("bf16") or max(self.gpu.flops_per_s.values())
        flops = 2 * INDEX_HEADS * group.index_dim
        return group.layers * flops / (COMPUTE_EFFICIENCY * rate) / self.layout.dp

    def _exchange_s(self, tokens: Numbers) -> Numbers:
        """An all-reduce after attention and after each network; with ranks of their own, experts gather and scatter."""
        layout, llm = self.layout, self.llm
        message = tokens * llm.hidden * ACTIVATION_BYTES
        took = np.zeros_like(tokens)
        sparse = sum(layers.layers for layers in llm.feed_forward if layers.experts)
        if layout.tp > 1:
            reduced = llm.layers + (llm.layers - sparse if layout.dp > 1 else llm.layers)
            took = took + reduced * self._collective_s("all_reduce", message, layout.tp)
        if layout.dp > 1 and sparse:
            chosen = max(layers.experts_per_token for layers in llm.feed_forward)
            took = took + sparse * self._to_experts_and_back_s(message, chosen)
        if layout.pp > 1:
            nodes = 2 if layout.gpus > self.gpu.gpus_per_node else 1
            took = took + (layout.pp - 1) * self._collective_s("p2p", message, 2, nodes)
        return took

    def _to_experts_and_back_s(self, message: Numbers, chosen: int) -> Numbers:
        """All ranks gather all tokens and scatter the sums, or each sends its own to the experts they chose.

        Tokens that are sent go out in 8 bits and come back in 16; to another node once, whoever there has chosen it.
        """
        layout = self.layout
        gpus = layout.tp * layout.dp
        nodes = -(-gpus // self.gpu.gpus_per_node)
        chosen = min(chosen, nodes) if nodes > 1 else chosen
        gathered = sum(self._collective_s(kind, message * layout.dp, gpus) for kind in ("all_gather", "reduce_scatter"))
        sent = self._collective_s("all_to_all", message * chosen / 2, gpus)
        sent = sent + self._collective_s("all_to_all", message * chosen, gpus)
        return np.minimum(gathered, sent)

    def _collective_s(self, kind: str, message_bytes: Numbers, gpus: int, nodes: int = 0) -> Numbers:
        nodes = nodes or -(-gpus // self.gpu.gpus_per_node)
        across = NETWORK_BYTES_PER_S if nodes > 1 else None
        took = self.kernels.collective_s(kind, message_bytes, gpus, nodes=nodes, across_bytes_per_s=across)
        if nodes > 1:
            return self.factors["exchange"] * took
        return self._calibrated("exchange", took, kind, "", {"message_bytes": message_bytes, "gpus": gpus})


def _projection_parameters(group: AttentionLayers, hidden: int) -> int:
    """Return the parameters of a layer's attention that its own kernels account for."""
    if group.kind == "state":
        return 0
    value_dim = group.value_head_dim or group.head_dim
    if group.kind == "latent":
        ranked = QUERY_LATENT * (hidden + group.query_heads * group.head_dim)
        latent = group.latent_dim * group.query_heads * (group.head_dim - group.rope_dim + value_dim)
        return ranked + latent + hidden * (group.latent_dim + group.rope_dim + group.query_heads * value_dim)
    return hidden * (group.query_heads * (group.head_dim + value_dim) + group.kv_heads * (group.head_dim + value_dim))
