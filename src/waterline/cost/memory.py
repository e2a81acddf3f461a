"""What fits: weights, KV cache, activations and overhead of one GPU of a replica."""

import math
from dataclasses import dataclass

from waterline.catalog.engines import EngineProfile
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, AttentionLayers, Llm
from waterline.plan import Layout

CACHE_ELEMENT_BYTES = 2  # the cache is kept in 16 bits
ACTIVATION_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Where the memory of one GPU goes, in bytes."""

    usable_bytes: int  # of the card, what the engine may take
    weights_bytes: int
    activations_bytes: int
    overhead_bytes: int
    cache_bytes: int  # what is left for the KV cache; negative when the rest alone does not fit

    @property
    def needed_bytes(self) -> int:
        """Everything but the cache."""
        return self.weights_bytes + self.activations_bytes + self.overhead_bytes


def embedding_parameters(llm: Llm) -> int:
    """Return the parameters of the input embedding and the output head, once when they are tied."""
    return llm.vocabulary * llm.hidden * (1 if llm.tied_embeddings else 2)


def weights_bytes(llm: Llm, precision: str) -> int:
    """Return the size of all weights in a precision, vision tower included, as the engine loads them.

    Exact for the precision a file was read in; else parameters times bits, with embedding and head in 16 bits where
    the format leaves them so.
    """
    if llm.stored_bytes and precision == llm.precision:
        return llm.stored_bytes
    form = PRECISIONS[precision]
    sixteen_bit = (embedding_parameters(llm) if form.keeps_embeddings else 0) + llm.vision_parameters
    packed = llm.parameters + llm.vision_parameters - sixteen_bit
    sixteen_bit_size = max(form.bits, 16.0) if precision == "fp32" else 16.0
    return math.ceil((packed * form.bits + sixteen_bit * sixteen_bit_size) / 8)


def layer_cache_elements(group: AttentionLayers, context_tokens: int) -> int:
    """Return the cache elements of one layer of the group for a sequence of `context_tokens`, over all heads."""
    if group.kind == "state":
        return group.state_elements
    if group.kind == "latent":
        return context_tokens * (group.latent_dim + group.rope_dim)
    kept_tokens = min(context_tokens, group.window_tokens) if group.kind == "window" else context_tokens
    return kept_tokens * group.kv_heads * (group.head_dim + (group.value_head_dim or group.head_dim))


def sequence_cache_bytes(llm: Llm, context_tokens: int, layout: Layout) -> int:
    """Return the cache of one sequence on one GPU.

    Tensor parallelism divides KV heads and states, but never below one head, and not the latent of MLA, which every
    GPU keeps whole; pipeline parallelism divides the layers.
    """
    elements = 0.0
    for group in llm.attention:
        shards = layout.tp if group.kind == "state" else 1 if group.kind == "latent" else min(layout.tp, group.kv_heads)
        elements += group.layers * layer_cache_elements(group, context_tokens) / shards
    return math.ceil(elements * CACHE_ELEMENT_BYTES / layout.pp)


def activation_bytes(llm: Llm, layout: Layout, step_tokens: int) -> int:
    """Return the peak of one step: the residual stream, one layer's widest intermediate, and the logits.

    The logits are those of a full batch in 32 bits, which is what the profiling run of an engine reserves for.
    """
    widest = max(
        (group.intermediate * max(1, group.experts_per_token) + group.shared_intermediate) for group in llm.feed_forward
    )
    per_token = ACTIVATION_BYTES * (4 * llm.hidden + 2 * widest / layout.tp)
    logits = 4 * min(step_tokens, 256) * llm.vocabulary / layout.tp
    return math.ceil(step_tokens * per_token + logits)


def memory_use(llm: Llm, gpu: Gpu, layout: Layout, precision: str, engine: EngineProfile) -> MemoryUse:
    """Return where the memory of each GPU goes when `layout` holds one copy of the model."""
    usable = math.floor(gpu.memory_bytes * engine.usable_memory_fraction)
    weights = math.ceil(weights_bytes(llm, precision) / (layout.tp * layout.pp))
    activations = activation_bytes(llm, layout, engine.step_tokens)
    return MemoryUse(
        usable_bytes=usable,
        weights_bytes=weights,
        activations_bytes=activations,
        overhead_bytes=engine.memory_overhead_bytes,
        cache_bytes=usable - weights - activations - engine.memory_overhead_bytes,
    )


def cache_tokens(llm: Llm, layout: Layout, memory: MemoryUse, context_tokens: int) -> int:
    """Return how many tokens the cache of the replica holds in sequences of `context_tokens`; 0 if not even one fits.

    A window or a state makes long sequences cheaper per token, which is why the length matters.
    """
    if memory.cache_bytes <= 0:
        return 0
    sequences = memory.cache_bytes / max(1, sequence_cache_bytes(llm, context_tokens, layout))
    tokens = math.floor(sequences * context_tokens)
    return tokens if tokens >= context_tokens else 0
