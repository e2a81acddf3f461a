"""What fits: weights, KV cache, activations and overhead of one GPU of a replica.

Every figure is for the GPU that holds most. Tensor parallelism divides heads, feed-forward networks and vocabulary, but
no part of fewer than one head or 64 entries; data-parallel ranks each hold attention, dense networks and embeddings
whole and share the experts; pipeline stages hold layers, the first one the embedding, the last one the head.
"""

import math
from dataclasses import dataclass

from waterline.catalog.engines import EngineProfile
from waterline.errors import InputError
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, AttentionLayers, FeedForwardLayers, Llm
from waterline.llm.gguf_sizes import FileParts, file_parts
from waterline.plan import Layout

CACHE_ELEMENT_BYTES = 2  # the cache is kept in 16 bits, unless it is asked for in fewer
CACHE_DTYPES = {"auto": CACHE_ELEMENT_BYTES, "bf16": 2, "fp16": 2, "fp8": 1}
INDEX_ELEMENT_BYTES = 132 / 128  # the indexer's keys are kept in 8 bits, with a 32-bit scale for 128 of them
ACTIVATION_BYTES = 2
BUSES = ("none", "pcie")  # links between GPUs that are no network of their own; nor are bridges between two
VOCABULARY_BLOCK = 64  # vLLM, SGLang and TensorRT-LLM pad each GPU's share of the vocabulary to this
MOST_MIXES = 256  # kept, of models and formats of llama.cpp
LEADING_SHARE = 8  # dense layers fewer than 1 in so many are the first ones of the stack, not spread over it


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsUse:
    """Where the weights of one GPU go, in bytes."""

    attention_bytes: int  # with norms, routers and all else that is neither of the others
    dense_bytes: int  # dense feed-forward networks and shared experts
    experts_bytes: int
    embedding_bytes: int  # input embedding and output head
    vision_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.attention_bytes + self.dense_bytes + self.experts_bytes + self.embedding_bytes + self.vision_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Where the memory of one GPU goes, in bytes."""

    usable_bytes: int  # of the card, what the engine may take
    weights_bytes: int
    activations_bytes: int
    overhead_bytes: int
    cache_bytes: int  # what is left for the KV cache; negative when the rest alone does not fit
    weights: WeightsUse | None = None  # the parts of weights_bytes
    communication_bytes: int = 0  # of overhead_bytes …
    graphs_bytes: int = 0  # … likewise
    block_tokens: int = 1  # the cache is handed out in blocks of so many tokens
    cache_element_bytes: int = CACHE_ELEMENT_BYTES

    @property
    def needed_bytes(self) -> int:
        """Everything but the cache."""
        return self.weights_bytes + self.activations_bytes + self.overhead_bytes

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Where every byte of `usable_bytes` goes, by names for people; the sum is exact."""
        weights = self.weights or WeightsUse(
            attention_bytes=self.weights_bytes, dense_bytes=0, experts_bytes=0, embedding_bytes=0, vision_bytes=0
        )
        named = (
            ("attention" if self.weights else "weights", weights.attention_bytes),
            ("feed-forward", weights.dense_bytes),
            ("experts", weights.experts_bytes),
            ("embedding and head", weights.embedding_bytes),
            ("vision", weights.vision_bytes),
            ("activations", self.activations_bytes),
            ("communication", self.communication_bytes),
            ("graphs", self.graphs_bytes),
            ("engine", self.overhead_bytes - self.communication_bytes - self.graphs_bytes),
            ("cache", self.cache_bytes),
        )
        return tuple((name, size) for name, size in named if size)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """Whether a number of sequences of a length fit, on the GPU that holds most."""

    needed_bytes: int  # weights, activations, overhead and the cache of those sequences
    offered_bytes: int

    @property
    def margin_bytes(self) -> int:
        """What is left over; negative: what is missing."""
        return self.offered_bytes - self.needed_bytes

    @property
    def fits(self) -> bool:
        return self.margin_bytes >= 0


# --- Weights --------------------------------------------------------------------------------------------------------


def embedding_parameters(llm: Llm) -> int:
    """Return the parameters of the input embedding and the output head, once when they are tied."""
    return llm.vocabulary * llm.hidden * (1 if llm.tied_embeddings else 2)


def weights_bytes(llm: Llm, precision: str) -> int:
    """Return the size of all weights in a precision, vision tower included, as the engine loads them.

    Exact for the precision a file was read in; for a format of llama.cpp what its quantize would write; else parameters
    times bits, with embedding and head in 16 bits where the format leaves them so.
    """
    if llm.stored_bytes and precision == llm.precision:
        return llm.stored_bytes
    form = PRECISIONS[precision]
    if form.gguf:
        parts = _gguf_parts(llm, precision)
        tensors = parts.head_bytes + parts.embedding_bytes + parts.layers_bytes
        return math.ceil(tensors) + 2 * llm.vision_parameters
    sixteen_bit = (embedding_parameters(llm) if form.keeps_embeddings else 0) + llm.vision_parameters
    packed = llm.parameters + llm.vision_parameters - sixteen_bit
    sixteen_bit_size = max(form.bits, 16.0) if precision == "fp32" else 16.0
    return math.ceil((packed * form.bits + sixteen_bit * sixteen_bit_size) / 8)


def gpu_weights(
    llm: Llm,
    precision: str,
    layout: Layout,
    *,
    redundant_experts: int = 0,
    embedding_on_host: bool = False,
    mxfp4_width_multiple: int = 1,
) -> WeightsUse:
    """Return the weights of the GPU that holds most.

    `redundant_experts` are the copies of experts a layer holds beyond one each, over all GPUs, as load balancing adds
    them; the others are habits of an engine, see `EngineProfile`.
    """
    tp = layout.tp
    dense = _dense_parameters(llm)
    experts = llm.expert_parameters
    others = max(0, llm.parameters - embedding_parameters(llm) - dense - experts)
    body_bits, expert_bits, table_bits = _bits(llm, precision, others + dense, experts)
    attention = others * _attention_share(llm, others, tp) * body_bits / 8
    dense_size = dense / tp * body_bits / 8
    expert_size = experts * _expert_share(llm, layout, redundant_experts) * expert_bits / 8
    if precision == "mxfp4":
        expert_size *= math.ceil(llm.hidden / mxfp4_width_multiple) * mxfp4_width_multiple / llm.hidden
    entries = min(llm.vocabulary, math.ceil(llm.vocabulary / (VOCABULARY_BLOCK * tp)) * VOCABULARY_BLOCK)
    table = entries * llm.hidden * table_bits / 8
    share, tables = _heaviest_stage(
        llm, layout.pp, attention + dense_size + expert_size, table, embedding_on_host=embedding_on_host
    )
    return WeightsUse(
        attention_bytes=math.ceil(attention * share),
        dense_bytes=math.ceil(dense_size * share),
        experts_bytes=math.ceil(expert_size * share),
        embedding_bytes=math.ceil(table * tables),
        vision_bytes=math.ceil(llm.vision_parameters * (4 if precision == "fp32" else 2) / tp),
    )


def _dense_parameters(llm: Llm) -> int:
    return sum(
        group.layers
        * group.matrices
        * llm.hidden
        * (group.shared_intermediate if group.experts else group.intermediate + group.shared_intermediate)
        for group in llm.feed_forward
    )


def _bits(llm: Llm, precision: str, body: int, experts: int) -> tuple[float, float, float]:
    """Return the bits of a parameter of the layers, of the experts and of embedding and head.

    Published weights that mix precisions state their size: experts then take the bits of the format, and what remains
    is spread over the other layers, as far as that leaves them between the format and 16 bits.
    """
    form = PRECISIONS[precision]
    if form.gguf and not (llm.stored_bytes and precision == llm.precision):
        parts = _gguf_parts(llm, precision)
        bits = 8 * parts.layers_bytes / max(1, body + experts)
        return bits, bits, 8 * parts.head_bytes / max(1, llm.vocabulary * llm.hidden)
    table_bits = 16.0 if form.keeps_embeddings and precision != "fp32" else form.bits
    if not (llm.stored_bytes and precision == llm.precision):
        return form.bits, form.bits, table_bits
    stored = 8.0 * llm.stored_bytes - 16.0 * llm.vision_parameters
    tables = embedding_parameters(llm)
    if not form.keeps_embeddings:  # a GGUF packs every tensor
        bits = stored / max(1, body + experts + tables)
        return bits, bits, bits
    layers = stored - tables * table_bits
    rest = (layers - experts * form.bits) / max(1, body)
    if experts and form.bits <= rest <= 16.0:
        return rest, form.bits, table_bits
    bits = max(0.0, layers) / max(1, body + experts)
    return bits, bits, table_bits


_mixes: dict[tuple[int, str], tuple[Llm, FileParts]] = {}


def _gguf_parts(llm: Llm, precision: str) -> FileParts:
    """Return `file_parts`, once for the many layouts of a model; a model has no hash, so it is known by what it is."""
    known = _mixes.get((id(llm), precision))
    if known is None or known[0] is not llm:
        if len(_mixes) >= MOST_MIXES:
            _mixes.clear()
        known = _mixes[id(llm), precision] = llm, file_parts(llm, precision)
    return known[1]


def _attention_share(llm: Llm, parameters: int, tp: int) -> float:
    """Return the part of the attention layers' weights one of `tp` GPUs holds.

    A GPU holds whole heads, at least one KV head, and the whole projections into the latents of MLA.
    """
    if tp == 1:
        return 1.0
    whole = key_value = layers = 0
    heads = held = 0.0
    for group in llm.attention:
        layers += group.layers
        if group.kind == "latent":
            whole += (
                group.layers * llm.hidden * (group.latent_dim + group.rope_dim + _query_rank(llm, group, parameters))
            )
        elif group.kind != "state":
            size = (
                group.layers * llm.hidden * group.kv_heads * (group.head_dim + (group.value_head_dim or group.head_dim))
            )
            key_value += size
            held += size * math.ceil(group.kv_heads / tp) / max(1, group.kv_heads)
        heads += group.layers * (math.ceil(group.query_heads / tp) / group.query_heads if group.query_heads else 1 / tp)
    if not parameters or not layers:
        return 1 / tp
    divided = max(0, parameters - whole - key_value)
    return min(1.0, (divided * heads / layers + held + whole) / parameters)


def _query_rank(llm: Llm, group: AttentionLayers, parameters: int) -> int:
    """Return the width queries are squeezed to in MLA: what the size of its layers leaves for it; 0: they are not."""
    values = group.value_head_dim or group.head_dim
    known = llm.hidden * (group.latent_dim + group.rope_dim)
    known += group.query_heads * (group.latent_dim * (group.head_dim - group.rope_dim + values) + values * llm.hidden)
    rank = (parameters / max(1, llm.layers) - known) / max(1, llm.hidden + group.query_heads * group.head_dim)
    return math.floor(rank) if 0 < rank < llm.hidden else 0


def _expert_share(llm: Llm, layout: Layout, redundant: int) -> float:
    """Return the part of the routed experts one GPU holds: some of them, each divided over the GPUs that are left."""
    gpus = layout.tp * layout.dp
    groups = min(layout.ep, gpus)
    parts = max(1, gpus // groups)
    share = 0.0
    for group in llm.feed_forward:
        if group.experts:
            held = math.ceil((group.experts + redundant) / groups) / group.experts
            share = max(share, held * math.ceil(group.intermediate / parts) / max(1, group.intermediate))
    return share


def _heaviest_stage(
    llm: Llm, stages: int, layers_size: float, table_size: float, *, embedding_on_host: bool
) -> tuple[float, int]:
    """Return the part of the layers, and how many of embedding and head, on the pipeline stage that holds most.

    Layers that do not divide go to the stages between the first and the last one, as vLLM deals them. Stages of a
    model that begins with a few dense layers are compared by the others, which weigh more.
    """
    embeddings = 0 if embedding_on_host else 1
    if stages == 1:
        return 1.0, 1 if llm.tied_embeddings else 1 + embeddings
    layers = llm.layers
    dense = sum(group.layers for group in llm.feed_forward if not group.experts)
    heavy = layers - dense if dense * LEADING_SHARE < layers else layers
    held = (  # by the first stage, those between, the last one
        (min(1.0, (layers + 1) // stages / heavy), embeddings),
        (min(1.0, math.ceil(layers / stages) / heavy) if stages > 2 else 0.0, 0),
        (min(1.0, layers // stages / heavy), 1),
    )
    return max(held, key=lambda stage: stage[0] * layers_size + stage[1] * table_size)


# --- Cache ----------------------------------------------------------------------------------------------------------


def layer_cache_elements(group: AttentionLayers, context_tokens: int) -> int:
    """Return the cache elements of one layer of the group for a sequence of `context_tokens`, over all heads."""
    if group.kind == "state":
        return group.state_elements
    if group.kind == "latent":
        return context_tokens * (group.latent_dim + group.rope_dim)
    kept_tokens = min(context_tokens, group.window_tokens) if group.kind == "window" else context_tokens
    return kept_tokens * group.kv_heads * (group.head_dim + (group.value_head_dim or group.head_dim))


def sequence_cache_bytes(
    llm: Llm, context_tokens: int, layout: Layout, *, block_tokens: int = 1, element_bytes: int = CACHE_ELEMENT_BYTES
) -> int:
    """Return the cache of one sequence on one GPU.

    Tensor parallelism divides KV heads and states, but never below one head, and not the latent of MLA, which every
    GPU keeps whole; pipeline parallelism divides the layers. States stay in 16 bits whatever `element_bytes` is.
    """
    fixed, per_token = _cache_line(llm, context_tokens, layout, block_tokens, element_bytes)
    return math.ceil(fixed + per_token * math.ceil(context_tokens / block_tokens) * block_tokens)


def _cache_line(
    llm: Llm, context_tokens: int, layout: Layout, block_tokens: int, element_bytes: int
) -> tuple[float, float]:
    """Return the line the cache of a sequence follows from `context_tokens` on: bytes at 0, and bytes a token.

    A window is a line with a kink; it holds one block more than itself once it slides.
    """
    fixed = per_token = 0.0
    tp = layout.tp
    for group in llm.attention:
        if group.kind == "state":
            heads = group.kv_heads or tp
            fixed += group.layers * group.state_elements * CACHE_ELEMENT_BYTES * math.ceil(heads / tp) / heads
            continue
        if group.kind == "latent":
            token = (group.latent_dim + group.rope_dim) * element_bytes
        else:
            head = group.head_dim + (group.value_head_dim or group.head_dim)
            token = math.ceil(group.kv_heads / tp) * head * element_bytes
        if group.kind == "window" and context_tokens >= _held_window(group, block_tokens):
            fixed += group.layers * token * _held_window(group, block_tokens)
        else:
            per_token += group.layers * token
        if group.index_dim:
            per_token += group.layers * group.index_dim * INDEX_ELEMENT_BYTES
    share = math.ceil(llm.layers / layout.pp) / max(1, llm.layers)
    return fixed * share, per_token * share


def _held_window(group: AttentionLayers, block_tokens: int) -> int:
    """Return the most tokens a window keeps: where blocks are larger than a token, its ends lie inside two of them."""
    blocks = math.ceil(group.window_tokens / block_tokens) + (block_tokens > 1)
    return blocks * block_tokens


# --- Activations ----------------------------------------------------------------------------------------------------


def activation_bytes(
    llm: Llm,
    layout: Layout,
    step_tokens: int,
    sequences: int = 256,
    *,
    logits_bytes: float = 8.0,
    expert_workspace: bool = True,
) -> int:
    """Return the peak of one step, as the profiling run of an engine finds it.

    The larger of two moments: in a layer, residual stream, normed copy and input beside gate, up and their product;
    at the end, the logits of all sequences that sample, copied and sorted, beside the last hidden states. Buffers for
    routed tokens are kept throughout. Holds within 0.2 GiB on vLLM's logs of 19 architectures.
    """
    widest = workspace = 0
    parts = max(1, layout.tp * layout.dp // min(layout.ep, layout.tp * layout.dp))
    for group in llm.feed_forward:
        dense = group.shared_intermediate if group.experts else group.intermediate
        widest = max(widest, math.ceil(dense / layout.tp))
        if group.experts and expert_workspace:
            workspace = max(workspace, group.experts_per_token * _routed_width(llm, group, parts))
    in_layer = ACTIVATION_BYTES * step_tokens * 3 * (llm.hidden + widest)
    at_end = (
        min(sequences, step_tokens) * llm.vocabulary * logits_bytes + 2 * ACTIVATION_BYTES * step_tokens * llm.hidden
    )
    return math.ceil(max(in_layer, at_end) + ACTIVATION_BYTES * step_tokens * workspace)


def _routed_width(llm: Llm, group: FeedForwardLayers, parts: int) -> int:
    """Return the elements a routed token takes in the two buffers of a fused MoE kernel."""
    narrow = math.ceil(group.intermediate / parts)
    width = group.expert_hidden or llm.hidden
    return max(2 * narrow, width) + max(narrow, width)


# --- Answers --------------------------------------------------------------------------------------------------------


def memory_use(
    llm: Llm,
    gpu: Gpu,
    layout: Layout,
    precision: str,
    engine: EngineProfile,
    *,
    step_tokens: int = 0,
    sequences: int = 0,
    cache_dtype: str = "auto",
    usable_fraction: float = 0.0,
    redundant_experts: int = 0,
) -> MemoryUse:
    """Return where the memory of each GPU goes when `layout` holds one copy of the model.

    What is not given is the engine's default: `step_tokens` (--max-num-batched-tokens; vLLM before 0.8 took the maximum
    context), `sequences` (--max-num-seqs), `usable_fraction` (--gpu-memory-utilization, --mem-fraction-static),
    `cache_dtype`, a key of CACHE_DTYPES. See `gpu_weights` for `redundant_experts`.

    Raises InputError for an unknown cache type.
    """
    cache_dtype = engine.cache_dtype(precision) if cache_dtype == "auto" else cache_dtype
    element_bytes = CACHE_DTYPES.get(cache_dtype)
    if element_bytes is None:
        raise InputError(f"no cache type is called '{cache_dtype[:40]}'. Known: {', '.join(CACHE_DTYPES)}.")
    step_tokens = step_tokens or engine.step_tokens
    weights = _engine_weights(llm, precision, layout, engine, redundant_experts)
    held = weights.total_bytes
    activations = activation_bytes(
        llm,
        layout,
        step_tokens,
        sequences or engine.max_batch,
        logits_bytes=engine.logits_bytes,
        expert_workspace=engine.expert_workspace and precision != "mxfp4",  # whose kernels gather by themselves
    )
    communication = 0
    if layout.tp * layout.dp > 1:
        # Counted up to what the split saves: a model smaller than the buffers would be told it needs more on two GPUs.
        stage = _engine_weights(llm, precision, Layout(pp=layout.pp), engine, redundant_experts)
        bus = gpu.link.kind in BUSES or gpu.link.kind.endswith("-bridge")
        buffers = engine.bus_communication_bytes if bus else engine.communication_bytes
        communication = min(buffers, max(0, stage.total_bytes - held))
    overhead = engine.memory_overhead_bytes + engine.graphs_bytes + communication
    usable = _usable_bytes(gpu, engine, usable_fraction, step_tokens, held, activations + overhead, communication)
    return MemoryUse(
        usable_bytes=usable,
        weights_bytes=held,
        activations_bytes=activations,
        overhead_bytes=overhead,
        cache_bytes=usable - held - activations - overhead,
        weights=weights,
        communication_bytes=communication,
        graphs_bytes=engine.graphs_bytes,
        block_tokens=engine.cache_block_tokens,
        cache_element_bytes=element_bytes,
    )


def _engine_weights(
    llm: Llm, precision: str, layout: Layout, engine: EngineProfile, redundant_experts: int
) -> WeightsUse:
    return gpu_weights(
        llm,
        precision,
        layout,
        redundant_experts=redundant_experts,
        embedding_on_host=engine.embedding_on_host,
        mxfp4_width_multiple=engine.mxfp4_width_multiple,
    )


def _usable_bytes(
    gpu: Gpu,
    engine: EngineProfile,
    fraction: float,
    step_tokens: int,
    weights: int,
    others: int,
    communication: int,
) -> int:
    """Return what weights, activations, overhead and cache may take together, by the engine's rule."""
    card = gpu.memory_bytes - (engine.driver_bytes if gpu.stack == "cuda" else 0)
    free = card - engine.context_bytes
    share = fraction or engine.usable_memory_fraction
    if engine.memory_rule == "left":
        left = free - weights - others
        return weights + others + math.floor(left * share) if left > 0 else free
    if engine.memory_rule == "static":
        reserved = 0 if fraction else engine.reserve_bytes_per_step_token * step_tokens + engine.memory_overhead_bytes
        shared_out = free - communication  # what it finds free before it loads the weights
        return min(free, math.floor(shared_out * share) - reserved + others)
    return min(free, math.floor(card * share))


def memory_fit(llm: Llm, memory: MemoryUse, layout: Layout, context_tokens: int, concurrency: int = 1) -> MemoryFit:
    """Return whether `concurrency` sequences of `context_tokens` fit, and by how much.

    The sequences are spread evenly over the data-parallel ranks.
    """
    ranked = math.ceil(concurrency / layout.dp)
    cache = ranked * _sequence_bytes(llm, context_tokens, layout, memory)
    return MemoryFit(needed_bytes=memory.needed_bytes + cache, offered_bytes=memory.usable_bytes)


def most_sequences(llm: Llm, layout: Layout, memory: MemoryUse, context_tokens: int) -> int:
    """Return how many sequences of `context_tokens` the cache holds at once; 0 when not even one."""
    if memory.cache_bytes <= 0:
        return 0
    return layout.dp * (memory.cache_bytes // max(1, _sequence_bytes(llm, context_tokens, layout, memory)))


def longest_context(llm: Llm, layout: Layout, memory: MemoryUse, concurrency: int = 1) -> int:
    """Return the longest context at which `concurrency` sequences fit, at most what the model takes; 0 when none does.

    The cache grows along straight lines that windows only flatten, so following the line from the left never goes too
    far and arrives after as many steps as there are windows.
    """
    room = memory.cache_bytes // max(1, math.ceil(concurrency / layout.dp))
    block, element_bytes = memory.block_tokens, memory.cache_element_bytes
    if room <= 0:
        return 0
    tokens = 0
    for _ in range(len(llm.attention) + 1):
        fixed, per_token = _cache_line(llm, tokens, layout, block, element_bytes)
        reached = math.floor((room - fixed) / (per_token * block)) * block if per_token else llm.max_context_tokens
        if reached >= llm.max_context_tokens:
            return llm.max_context_tokens if fixed <= room else 0
        if reached <= tokens:
            break
        tokens = reached
    return tokens


def cache_tokens(llm: Llm, layout: Layout, memory: MemoryUse, context_tokens: int) -> int:
    """Return how many tokens the cache of the replica holds in sequences of `context_tokens`; 0 if not even one fits.

    A window or a state makes long sequences cheaper per token, which is why the length matters. Data-parallel ranks
    have a cache each.
    """
    if memory.cache_bytes <= 0:
        return 0
    sequences = memory.cache_bytes / max(1, _sequence_bytes(llm, context_tokens, layout, memory))
    tokens = math.floor(sequences * context_tokens)
    return tokens * layout.dp if tokens >= context_tokens else 0


def _sequence_bytes(llm: Llm, context_tokens: int, layout: Layout, memory: MemoryUse) -> int:
    return sequence_cache_bytes(
        llm, context_tokens, layout, block_tokens=memory.block_tokens, element_bytes=memory.cache_element_bytes
    )
