"""What attention layers and their kin weigh and keep, read from the fields of a config.

The arithmetic is that of the published implementation in Hugging Face transformers (5.23 for the counts the tests
compare with).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from waterline.llm import AttentionLayers
from waterline.llm.family import Family, Heads, Sized, layers_of
from waterline.llm.fields import WHAT_NEXT, Fields

# --- which layer is of which kind -------------------------------------------------------------------------------------

LAYER_TYPES = {
    "full_attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "window",
    "linear_attention": "state",
}
"""`layer_types` of a config, in our words. A chunk is a window that starts anew: its length bounds what is kept."""


def full_everywhere(_fields: Fields, layers: int) -> list[str]:
    return ["full"] * layers


def window_everywhere(fields: Fields, layers: int) -> list[str]:
    return ["full" if fields.get("sliding_window") is None else "window"] * layers


def window_after_some(fields: Fields, layers: int) -> list[str]:
    if not fields.flag("use_sliding_window") or fields.get("sliding_window") is None:
        return ["full"] * layers
    first = fields.count("max_window_layers", least=0)
    return ["window" if layer >= first else "full" for layer in range(layers)]


def window_first_then_alternate(_fields: Fields, layers: int) -> list[str]:
    return ["full" if layer % 2 else "window" for layer in range(layers)]


def window_where_marked(key: str) -> Callable[[Fields, int], list[str]]:
    def kinds(fields: Fields, layers: int) -> list[str]:
        return ["window" if marked else "full" for marked in fields.marks(key, layers)]

    return kinds


def every(key: str, default: int | None, others: str) -> Callable[[Fields, int], list[str]]:
    def kinds(fields: Fields, layers: int) -> list[str]:
        step = fields.count(key, default)
        return ["full" if (layer + 1) % step == 0 else others for layer in range(layers)]

    return kinds


# --- heads ------------------------------------------------------------------------------------------------------------


def plain_heads(fields: Fields, key: str = "head_dim") -> Heads:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    keys = fields.count("num_key_value_heads", heads)
    if heads % keys:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    if fields.get(key) is None and hidden % heads:
        raise fields.wrong("num_attention_heads", f"a divisor of hidden_size = {hidden}, or head_dim must be given")
    head_dim = fields.count(key, hidden // heads)
    return Heads(queries=heads, keys=keys, head_dim=head_dim, value_dim=head_dim)


def mimo_heads(fields: Fields, kind: str) -> Heads:
    """Return the heads of MiMo-V2: those of windows have fields of their own."""
    prefix, sinks = (
        ("swa_", "add_swa_attention_sink_bias") if kind == "window" else ("", "add_full_attention_sink_bias")
    )
    head_dim = fields.count(f"{prefix}head_dim")
    return Heads(
        queries=fields.count(f"{prefix}num_attention_heads"),
        keys=fields.count(f"{prefix}num_key_value_heads"),
        head_dim=head_dim,
        value_dim=fields.count(f"{prefix}v_head_dim", head_dim),
        sinks=fields.flag(sinks),
    )


def gemma4_heads(fields: Fields, kind: str) -> Heads:
    """Return the heads of Gemma 4: fewer and wider over the whole context, where keys may serve as values."""
    heads, keys = fields.count("num_attention_heads"), fields.count("num_key_value_heads")
    head_dim, shared = fields.count("head_dim"), False
    if kind == "full":
        head_dim = fields.count("global_head_dim", head_dim)
        shared = fields.flag("attention_k_eq_v")
        keys = fields.count("num_global_key_value_heads", keys) if shared else keys
    return Heads(queries=heads, keys=keys, head_dim=head_dim, value_dim=head_dim, keys_are_values=shared)


def step_heads(fields: Fields, kind: str) -> Heads:
    """Return the heads of Step 3.5 and 3.7: windows may have more queries."""
    queries, head_dim = fields.count("num_attention_heads"), fields.count("head_dim")
    if kind == "window":
        queries = fields.count("num_sliding_attention_heads", queries)
        if fields.get("attention_other_setting") is not None:
            queries = fields.inner("attention_other_setting").count("num_attention_heads", queries)
    return Heads(queries=queries, keys=fields.count("num_key_value_heads"), head_dim=head_dim, value_dim=head_dim)


# --- grouped queries, over all tokens or a window ---------------------------------------------------------------------


def grouped(fields: Fields, family: Family) -> Iterator[Sized[AttentionLayers]]:
    """Yield grouped-query attention over all tokens or a window, and gated delta networks (Qwen3-Next) among it."""
    layers = layers_of(fields)
    kinds = fields.per_layer("layer_types", layers, LAYER_TYPES) or family.kinds(fields, layers)
    for kind, count in Counter(kinds).items():
        if kind == "state":
            yield _delta_network(fields, family, count)
            continue
        heads = plain_heads(fields) if family.heads is None else family.heads(fields, kind)
        if heads.queries % heads.keys:
            raise fields.wrong("num_key_value_heads", f"a divisor of the {heads.queries} query heads of {kind} layers")
        window_tokens = 0
        if kind == "window":
            chunked = fields.get("sliding_window") is None and fields.get("attention_chunk_size") is not None
            window_tokens = fields.count("attention_chunk_size" if chunked else "sliding_window")
        group = AttentionLayers(
            kind="window" if kind == "window" else "full",
            layers=count,
            query_heads=heads.queries,
            kv_heads=heads.keys,
            head_dim=heads.head_dim,
            value_head_dim=0 if heads.value_dim == heads.head_dim else heads.value_dim,
            window_tokens=window_tokens,
        )
        yield Sized(group=group, parameters=_grouped_parameters(fields, family, heads))


def _grouped_parameters(fields: Fields, family: Family, heads: Heads) -> int:
    hidden = fields.count("hidden_size")
    queries, keys, values = (
        heads.queries * heads.head_dim,
        heads.keys * heads.head_dim,
        heads.keys * heads.value_dim,
    )
    stored_values = 0 if heads.keys_are_values else values
    gate = {"": 0, "element": queries, "head": heads.queries}[family.gate]
    projections = hidden * (queries + gate + keys + stored_values) + heads.queries * heads.value_dim * hidden
    biased = family.biases == "qkv" or (family.biases.startswith("config") and fields.flag("attention_bias"))
    biases = queries + keys + stored_values if biased else 0
    if biased and family.biases == "config":
        biases += hidden
    norms = family.norms * hidden
    by_head = 2 * heads.head_dim
    asked = by_head if fields.flag("use_qk_norm") else 0
    norms += {"": 0, "head": by_head, "all": queries + keys, "flag": asked}[family.query_key_norm]
    return projections + biases + norms + (heads.queries if family.sinks or heads.sinks else 0)


def block_sparse(fields: Fields, family: Family) -> Iterator[Sized[AttentionLayers]]:
    """Yield the attention of MiniMax-M3: in marked layers an indexer chooses the blocks of tokens that are read."""
    layers, heads, hidden = layers_of(fields), plain_heads(fields), fields.count("hidden_size")
    sparse = fields.inner("sparse_attention_config")
    indexed = sum(sparse.marks("sparse_attention_freq", layers)) if sparse.flag("use_sparse_attention") else 0
    index_heads, index_dim = sparse.count("sparse_num_index_heads"), sparse.count("sparse_index_dim")
    indexer = hidden * (index_heads + 1) * index_dim + 2 * index_dim
    parameters = _grouped_parameters(fields, family, heads)
    for count, more, extra in ((layers - indexed, 0, {}), (indexed, indexer, _block_choice(sparse))):
        if count:
            group = AttentionLayers(
                kind="full",
                layers=count,
                query_heads=heads.queries,
                kv_heads=heads.keys,
                head_dim=heads.head_dim,
                **extra,
            )
            yield Sized(group=group, parameters=parameters + more)


def _block_choice(sparse: Fields) -> dict[str, int]:
    return {
        "index_dim": sparse.count("sparse_index_dim"),
        "selected_tokens": sparse.count("sparse_topk_blocks") * sparse.count("sparse_block_size"),
    }


# --- one latent for all heads -----------------------------------------------------------------------------------------


def latent(fields: Fields, family: Family) -> Iterator[Sized[AttentionLayers]]:
    """Yield multi-head latent attention (DeepSeek-V2 and after), with the indexer of sparse attention where it is."""
    layers = layers_of(fields)
    query_rank, hidden = fields.count("q_lora_rank", 0, least=0), fields.count("hidden_size")
    index_dim = fields.count("index_head_dim", 0)
    index_heads = fields.count("index_n_heads") if index_dim else 0
    # what chooses the tokens to read: queries from the latent, one key a token (with a biased norm), a weight a head
    indexer = query_rank * index_heads * index_dim + hidden * index_dim + 2 * index_dim + hidden * index_heads
    indexed = fields.per_layer("indexer_types", layers, {"full": "full", "shared": "shared"}) if index_dim else None
    parameters = latent_parameters(fields, family)
    for indexing, count in Counter(indexed or ["full" if index_dim else "none"] * layers).items():
        group = latent_group(
            fields,
            count,
            index_dim=index_dim if indexing == "full" else 0,
            selected_tokens=fields.count("index_topk") if index_dim else 0,
        )
        yield Sized(group=group, parameters=parameters + (indexer if indexing == "full" else 0))


def latent_group(fields: Fields, layers: int, **choice: int) -> AttentionLayers:
    heads, rope = fields.count("num_attention_heads"), fields.count("qk_rope_head_dim")
    return AttentionLayers(
        kind="latent",
        layers=layers,
        query_heads=heads,
        kv_heads=heads,
        head_dim=fields.count("qk_nope_head_dim") + rope,
        value_head_dim=fields.count("v_head_dim"),
        latent_dim=fields.count("kv_lora_rank"),
        rope_dim=rope,
        **choice,
    )


def latent_parameters(fields: Fields, family: Family) -> int:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kept, rope = fields.count("kv_lora_rank"), fields.count("qk_rope_head_dim")
    nope, value_dim = fields.count("qk_nope_head_dim"), fields.count("v_head_dim")
    query_rank = fields.count("q_lora_rank", 0, least=0)
    queries = heads * (nope + rope)
    parameters = hidden * query_rank + query_rank + query_rank * queries if query_rank else hidden * queries
    parameters += (
        hidden * (kept + rope)
        + kept  # norm
        + kept * heads * (nope + value_dim)
        + heads * value_dim * hidden
        + family.norms * hidden
    )
    if fields.flag("attention_bias"):
        parameters += query_rank + kept + rope + hidden
    return parameters


# --- one shared head, compressed beyond a window (DeepSeek-V4) --------------------------------------------------------

COMPRESSIONS: Mapping[int, str] = {0: "none", 4: "sparse", 128: "heavy"}


def compressed(fields: Fields, family: Family) -> Iterator[Sized[AttentionLayers]]:
    """Yield one shared key-value head, kept whole for a window and compressed 4 or 128 times beyond it.

    A compressed layer is stated as a latent one that keeps its share of a token; its window is not counted.
    """
    layers, heads, head_dim = layers_of(fields), fields.count("num_attention_heads"), fields.count("head_dim")
    ratios = fields.numbers("compress_ratios", layers)
    if fields.count("num_key_value_heads", 1) != 1:
        raise fields.wrong("num_key_value_heads", f"1: heads that are compressed are one. {WHAT_NEXT}")
    index_dim, rope = fields.count("index_head_dim"), fields.count("qk_rope_head_dim", most=head_dim)
    for ratio, count in sorted(Counter(ratios).items()):
        if ratio == 0:
            group = AttentionLayers(
                kind="window",
                layers=count,
                query_heads=heads,
                kv_heads=1,
                head_dim=head_dim,
                window_tokens=fields.count("sliding_window"),
            )
        else:
            sparse = COMPRESSIONS.get(ratio) == "sparse"
            group = AttentionLayers(
                kind="latent",
                layers=count,
                query_heads=heads,
                kv_heads=heads,
                head_dim=head_dim,
                latent_dim=head_dim // ratio - rope // ratio,
                rope_dim=rope // ratio,
                index_dim=index_dim // ratio if sparse else 0,
                selected_tokens=fields.count("index_topk") * ratio if sparse else 0,
            )
        yield Sized(group=group, parameters=compressed_parameters(fields, family, ratio))


def after_the_last(fields: Fields, family: Family) -> int:
    """Return the attention of a multi-token-prediction layer, whose compression is listed after the others."""
    ratios = fields.numbers("compress_ratios")[layers_of(fields) :]
    return compressed_parameters(fields, family, ratios[0] if ratios else 0)


def compressed_parameters(fields: Fields, family: Family, ratio: int) -> int:
    if ratio not in COMPRESSIONS:
        raise fields.wrong("compress_ratios", f"made of {', '.join(map(str, COMPRESSIONS))}. {WHAT_NEXT}")
    hidden, heads, head_dim = (fields.count(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    rank, groups, out_rank = (fields.count(key) for key in ("q_lora_rank", "o_groups", "o_lora_rank"))
    if heads * head_dim % groups:
        raise fields.wrong("o_groups", f"a divisor of the {heads} heads x {head_dim}")
    parameters = (
        hidden * rank
        + rank
        + rank * heads * head_dim
        + hidden * head_dim
        + head_dim
        + heads * head_dim * out_rank  # a block-diagonal projection, `groups` blocks
        + groups * out_rank * hidden
        + heads  # sinks
        + family.norms * hidden
        + _hyper_connection(fields)
    )
    if COMPRESSIONS[ratio] == "heavy":
        parameters += _compressor(hidden, head_dim, head_dim, ratio)
    if COMPRESSIONS[ratio] == "sparse":  # two overlapping series, for the keys and for the indexer
        index_heads, index_dim = fields.count("index_n_heads"), fields.count("index_head_dim")
        parameters += _compressor(hidden, head_dim, 2 * head_dim, ratio)
        parameters += _compressor(hidden, index_dim, 2 * index_dim, ratio)
        parameters += rank * index_heads * index_dim + hidden * index_heads
    return parameters


def _compressor(hidden: int, head_dim: int, width: int, ratio: int) -> int:
    return 2 * hidden * width + ratio * width + head_dim  # values and gate, a bias for each place, a norm


def _hyper_connection(fields: Fields) -> int:
    """Return what mixes the residual streams, before attention and before the experts."""
    streams = fields.count("hc_mult")
    mixed = (2 + streams) * streams
    return 2 * (mixed * streams * fields.count("hidden_size") + mixed + 3)


def hyper_head(fields: Fields) -> int:
    """Return what joins the residual streams after the last layer."""
    streams = fields.count("hc_mult")
    return streams * streams * fields.count("hidden_size") + streams + 1


# --- a state instead of a cache ---------------------------------------------------------------------------------------


def _delta_network(fields: Fields, family: Family, layers: int) -> Sized[AttentionLayers]:
    """Return the gated delta networks of Qwen3-Next and Qwen3.5: a matrix a value head, and a short convolution."""
    hidden = fields.count("hidden_size")
    key_heads, key_dim = fields.count("linear_num_key_heads"), fields.count("linear_key_head_dim")
    value_heads, value_dim = fields.count("linear_num_value_heads"), fields.count("linear_value_head_dim")
    kernel = fields.count("linear_conv_kernel_dim")
    keys, values = key_heads * key_dim, value_heads * value_dim
    convolved = 2 * keys + values
    parameters = (
        hidden * (convolved + values + 2 * value_heads)  # queries, keys, values; the output gate; beta and decay
        + convolved * kernel
        + 2 * value_heads  # A and the time-step bias
        + value_dim  # gated norm
        + values * hidden
        + family.norms * hidden
    )
    group = AttentionLayers(
        kind="state",
        layers=layers,
        query_heads=key_heads,
        kv_heads=value_heads,
        head_dim=key_dim,
        value_head_dim=value_dim,
        state_elements=value_heads * key_dim * value_dim + convolved * (kernel - 1),
    )
    return Sized(group=group, parameters=parameters)


def kimi_linear(fields: Fields, family: Family) -> Iterator[Sized[AttentionLayers]]:
    """Yield the latent attention and the delta attention (KDA) of Kimi Linear and Kimi K3, which list their layers."""
    layers, linear = layers_of(fields), fields.inner("linear_attn_config")
    full, states = (len(set(linear.numbers(key))) for key in ("full_attn_layers", "kda_layers"))
    if full + states != layers:
        raise linear.wrong("kda_layers", f"so many layers that with full_attn_layers they are {layers}")
    hidden = fields.count("hidden_size")
    if full:
        gate = 0
        if fields.flag("mla_use_output_gate"):
            gate = hidden * fields.count("num_attention_heads") * fields.count("v_head_dim")
        yield Sized(group=latent_group(fields, full), parameters=latent_parameters(fields, family) + gate)
    if states:
        yield _kimi_delta(hidden, linear, family, states)


def _kimi_delta(hidden: int, linear: Fields, family: Family, layers: int) -> Sized[AttentionLayers]:
    heads, head_dim = linear.count("num_heads"), linear.count("head_dim")
    inner, kernel = heads * head_dim, linear.count("short_conv_kernel_size")
    low_rank = hidden * head_dim + head_dim * inner
    parameters = (
        4 * hidden * inner  # query, key, value, output
        + (hidden * inner if linear.flag("use_full_rank_gate") else low_rank)
        + low_rank  # decay
        + 3 * inner * kernel
        + hidden * heads  # beta
        + heads  # A
        + inner  # time-step bias
        + head_dim  # gated norm
        + family.norms * hidden
    )
    group = AttentionLayers(
        kind="state",
        layers=layers,
        query_heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        state_elements=inner * head_dim + 3 * inner * (kernel - 1),
    )
    return Sized(group=group, parameters=parameters)
