"""How the models of each family are counted.

`FAMILIES` says for each `model_type` which arithmetic its attention and its feed-forward layers follow. The arithmetic
is that of the published implementation in Hugging Face transformers (5.23 for the counts the tests compare with).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeVar

from waterline.llm import AttentionLayers, FeedForwardLayers
from waterline.llm.fields import WHAT_NEXT, Fields

MOST_LAYERS = 10_000


Layers = TypeVar("Layers", AttentionLayers, FeedForwardLayers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized(Generic[Layers]):
    """A group of equal layers and what one of them weighs, in parameters."""

    group: Layers
    parameters: int  # without routed experts
    expert_parameters: int = 0  # of one routed expert


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the models of one `model_type` are counted."""

    attention: Callable[["Fields", "Family"], Iterator[Sized[AttentionLayers]]]
    feed_forward: Callable[["Fields", "Family"], Iterator[Sized[FeedForwardLayers]]]
    kinds: Callable[["Fields", int], list[str]]  # of each layer, where the config does not list them
    defaults: Mapping[str, object] = field(default_factory=dict)  # what its own code fills in for absent fields
    norms: int = 1  # before attention, and again before the feed-forward network
    query_key_norm: Literal["", "head", "all"] = ""  # one weight a dimension of a head, or of all heads
    biases: Literal["", "qkv", "config"] = "config"  # of the projections; "config": where `attention_bias` says so
    sinks: bool = False  # a learnt logit for each head
    gated_attention: bool = False  # the query projection also yields a gate


LAYER_TYPES = {
    "full_attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "window",
    "linear_attention": "state",
}
"""`layer_types` of a config, in our words. A chunk is a window that starts anew: its length bounds what is kept."""


def _full_everywhere(_fields: Fields, layers: int) -> list[str]:
    return ["full"] * layers


def _window_everywhere(fields: Fields, layers: int) -> list[str]:
    return ["full" if fields.get("sliding_window") is None else "window"] * layers


def _window_after_some(fields: Fields, layers: int) -> list[str]:
    if not fields.flag("use_sliding_window") or fields.get("sliding_window") is None:
        return ["full"] * layers
    first = fields.count("max_window_layers", least=0)
    return ["window" if layer >= first else "full" for layer in range(layers)]


def _window_first_then_alternate(_fields: Fields, layers: int) -> list[str]:
    return ["full" if layer % 2 else "window" for layer in range(layers)]


def _every(key: str, default: int | None, others: str) -> Callable[[Fields, int], list[str]]:
    def kinds(fields: Fields, layers: int) -> list[str]:
        step = fields.count(key, default)
        return ["full" if (layer + 1) % step == 0 else others for layer in range(layers)]

    return kinds


# --- attention --------------------------------------------------------------------------------------------------------


def layers_of(fields: Fields) -> int:
    return fields.count("num_hidden_layers", most=MOST_LAYERS)


def _heads(fields: Fields, key: str = "head_dim") -> tuple[int, int, int]:
    """Return query heads, key-value heads and the dimension of one."""
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads")
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    if fields.get(key) is None and hidden % heads:
        raise fields.wrong("num_attention_heads", f"a divisor of hidden_size = {hidden}, or head_dim must be given")
    return heads, kv_heads, fields.count(key, hidden // heads)


def _grouped(fields: Fields, family: Family) -> Iterator[Sized[AttentionLayers]]:
    """Yield grouped-query attention over all tokens or a window, and gated delta networks (Qwen3-Next) among it."""
    hidden, layers = fields.count("hidden_size"), layers_of(fields)
    heads, kv_heads, head_dim = _heads(fields)
    queries, keys = heads * head_dim, kv_heads * head_dim
    projections = hidden * (queries * (2 if family.gated_attention else 1) + 2 * keys) + queries * hidden
    biases = {
        "": 0,
        "qkv": queries + 2 * keys,
        "config": (queries + 2 * keys + hidden) if fields.flag("attention_bias") else 0,
    }[family.biases]
    norms = family.norms * hidden
    norms += {"": 0, "head": 2 * head_dim, "all": queries + keys}[family.query_key_norm]
    parameters = projections + biases + norms + (heads if family.sinks else 0)

    kinds = fields.per_layer("layer_types", layers, LAYER_TYPES) or family.kinds(fields, layers)
    for kind, count in Counter(kinds).items():
        if kind == "state":
            yield _delta_network(fields, family, count)
            continue
        window_tokens = 0
        if kind == "window":
            chunked = fields.get("sliding_window") is None and fields.get("attention_chunk_size") is not None
            window_tokens = fields.count("attention_chunk_size" if chunked else "sliding_window")
        group = AttentionLayers(
            kind="window" if kind == "window" else "full",
            layers=count,
            query_heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window_tokens=window_tokens,
        )
        yield Sized(group=group, parameters=parameters)


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


def _latent(fields: Fields, family: Family) -> Iterator[Sized[AttentionLayers]]:
    """Yield multi-head latent attention (DeepSeek-V2 and after), with the indexer of sparse attention where it is."""
    hidden, heads, layers = fields.count("hidden_size"), fields.count("num_attention_heads"), layers_of(fields)
    latent, rope = fields.count("kv_lora_rank"), fields.count("qk_rope_head_dim")
    nope, value_dim = fields.count("qk_nope_head_dim"), fields.count("v_head_dim")
    query_rank = fields.count("q_lora_rank", 0)
    queries = heads * (nope + rope)
    query_weights = hidden * query_rank + query_rank + query_rank * queries if query_rank else hidden * queries
    parameters = (
        query_weights
        + hidden * (latent + rope)
        + latent  # norm
        + latent * heads * (nope + value_dim)
        + heads * value_dim * hidden
        + family.norms * hidden
    )
    if fields.flag("attention_bias"):
        parameters += query_rank + latent + rope + hidden
    index_dim = fields.count("index_head_dim", 0)
    index_heads = fields.count("index_n_heads") if index_dim else 0
    # what chooses the tokens to read: queries from the latent, one key a token (with a biased norm), a weight a head
    indexer = query_rank * index_heads * index_dim + hidden * index_dim + 2 * index_dim + hidden * index_heads
    indexed = fields.per_layer("indexer_types", layers, {"full": "full", "shared": "shared"}) if index_dim else None
    for indexing, count in Counter(indexed or ["full" if index_dim else "none"] * layers).items():
        group = AttentionLayers(
            kind="latent",
            layers=count,
            query_heads=heads,
            kv_heads=heads,
            head_dim=nope + rope,
            value_head_dim=value_dim,
            latent_dim=latent,
            rope_dim=rope,
            index_dim=index_dim if indexing == "full" else 0,
            selected_tokens=fields.count("index_topk") if index_dim else 0,
        )
        yield Sized(group=group, parameters=parameters + (indexer if indexing == "full" else 0))


# --- feed-forward -----------------------------------------------------------------------------------------------------


def _dense(fields: Fields, family: Family) -> Iterator[Sized[FeedForwardLayers]]:
    yield _dense_layers(fields, family, layers_of(fields), fields.count("intermediate_size"))


def _dense_layers(
    fields: Fields, family: Family, layers: int, intermediate: int, matrices: int = 3
) -> Sized[FeedForwardLayers]:
    hidden = fields.count("hidden_size")
    biases = (matrices - 1) * intermediate + hidden if fields.flag("mlp_bias") else 0
    return Sized(
        group=FeedForwardLayers(layers=layers, intermediate=intermediate, matrices=matrices),
        parameters=matrices * hidden * intermediate + biases + family.norms * hidden,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFields:
    """Under which names a family keeps its mixture of experts."""

    experts: str
    used: str = "num_experts_per_tok"
    intermediate: str = "moe_intermediate_size"
    dense_intermediate: str = "intermediate_size"
    shared_experts: str = ""  # how many, each as wide as a routed one
    shared_intermediate: str = ""  # or how wide they are together
    shared_gate: bool = False
    biases: bool = False  # of router and experts


def _experts(
    names: ExpertFields, is_sparse: Callable[[Fields, int], bool] = lambda _fields, _layer: True
) -> Callable[[Fields, Family], Iterator[Sized[FeedForwardLayers]]]:
    def feed_forward(fields: Fields, family: Family) -> Iterator[Sized[FeedForwardLayers]]:
        layers = layers_of(fields)
        sparse_layers = sum(is_sparse(fields, layer) for layer in range(layers))
        if sparse_layers < layers:
            yield _dense_layers(fields, family, layers - sparse_layers, fields.count(names.dense_intermediate))
        if sparse_layers:
            yield _sparse_layers(fields, family, names, sparse_layers)

    return feed_forward


def _sparse_layers(
    fields: Fields, family: Family, names: ExpertFields, layers: int, matrices: int = 3
) -> Sized[FeedForwardLayers]:
    hidden, intermediate = fields.count("hidden_size"), fields.count(names.intermediate)
    experts = fields.count(names.experts)
    width = fields.count("moe_latent_size", hidden)
    shared = 0
    if names.shared_intermediate:
        shared = fields.count(names.shared_intermediate, 0, least=0)
    elif names.shared_experts:
        shared = fields.count(names.shared_experts, 0, least=0) * intermediate
    router = hidden * experts + (experts if names.biases else 0)
    expert = matrices * width * intermediate + ((matrices - 1) * intermediate + hidden if names.biases else 0)
    parameters = router + matrices * hidden * shared + family.norms * hidden
    if shared and names.shared_gate:
        parameters += hidden
    if width != hidden:
        parameters += 2 * hidden * width
    group = FeedForwardLayers(
        layers=layers,
        intermediate=intermediate,
        experts=experts,
        experts_per_token=fields.count(names.used, most=experts),
        shared_intermediate=shared,
        matrices=matrices,
        expert_hidden=width if width != hidden else 0,
    )
    return Sized(group=group, parameters=parameters, expert_parameters=expert)


def _sparse_by_step(fields: Fields, layer: int) -> bool:
    listed = fields.get("mlp_only_layers") or []
    if not isinstance(listed, list):
        raise fields.wrong("mlp_only_layers", "a list of layer numbers")
    return layer not in listed and (layer + 1) % fields.count("decoder_sparse_step", 1) == 0


def _sparse_after_the_first(fields: Fields, layer: int) -> bool:
    if fields.count("moe_layer_freq", 1) != 1:
        raise fields.wrong("moe_layer_freq", f"1; other patterns are not known. {WHAT_NEXT}")
    return layer >= fields.count("first_k_dense_replace", 0, least=0)


def _sparse_in_between(fields: Fields, layer: int) -> bool:
    return (layer + 1) % fields.count("interleave_moe_layer_step", 1) == 0


# --- layers that are either attention, state space or feed-forward (Nemotron-H) ---------------------------------------

BLOCKS = {"M": "state", "*": "full", "-": "dense", "E": "sparse"}
BLOCK_NAMES = {"mamba": "state", "attention": "full", "mlp": "dense", "moe": "sparse"}
NEMOTRON_EXPERTS = ExpertFields(experts="n_routed_experts", shared_intermediate="moe_shared_expert_intermediate_size")


def _blocks(fields: Fields) -> Counter[str]:
    pattern = fields.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        unknown = set(pattern) - set(BLOCKS)
        if unknown:
            raise fields.wrong("hybrid_override_pattern", f"made of {' '.join(BLOCKS)}. {WHAT_NEXT}")
        return Counter(BLOCKS[letter] for letter in pattern)
    listed = fields.get("layers_block_type")
    if not isinstance(listed, list):
        raise fields.wrong("hybrid_override_pattern", "a text such as 'M-M*', one letter a layer")
    return Counter(fields.per_layer("layers_block_type", len(listed), BLOCK_NAMES))


def _mixers(fields: Fields, family: Family) -> Iterator[Sized[AttentionLayers]]:
    blocks, hidden = _blocks(fields), fields.count("hidden_size")
    if blocks["full"]:
        key = "head_dim" if fields.get("head_dim") is not None else "attention_head_dim"
        heads, kv_heads, head_dim = _heads(fields, key)
        biases = (heads + 2 * kv_heads) * head_dim + hidden if fields.flag("attention_bias") else 0
        group = AttentionLayers(
            kind="full", layers=blocks["full"], query_heads=heads, kv_heads=kv_heads, head_dim=head_dim
        )
        parameters = 2 * hidden * (heads + kv_heads) * head_dim + biases + family.norms * hidden
        yield Sized(group=group, parameters=parameters)
    if blocks["state"]:
        yield _mamba(fields, family, blocks["state"])


def _mamba(fields: Fields, family: Family, layers: int) -> Sized[AttentionLayers]:
    """Return Mamba-2 layers: a state of `ssm_state_size` for every channel, and a short convolution."""
    hidden, heads = fields.count("hidden_size"), fields.count("mamba_num_heads")
    head_dim, state = fields.count("mamba_head_dim"), fields.count("ssm_state_size")
    groups, kernel = fields.count("n_groups"), fields.count("conv_kernel")
    inner = heads * head_dim
    convolved = inner + 2 * groups * state
    projections = hidden * (inner + convolved + heads) + inner * hidden
    biases = (inner + convolved + heads + hidden) if fields.flag("mamba_proj_bias") else 0
    convolution = convolved * (kernel + (1 if fields.flag("use_conv_bias", default=True) else 0))
    group = AttentionLayers(
        kind="state",
        layers=layers,
        query_heads=heads,
        kv_heads=groups,
        head_dim=state,
        value_head_dim=head_dim,
        state_elements=inner * state + convolved * (kernel - 1),
    )
    per_head = 3 * heads  # A, D and the time-step bias
    return Sized(group=group, parameters=projections + biases + convolution + per_head + inner + family.norms * hidden)


def _blocks_between(fields: Fields, family: Family) -> Iterator[Sized[FeedForwardLayers]]:
    blocks, ungated = _blocks(fields), 2
    if blocks["dense"]:
        yield _dense_layers(fields, family, blocks["dense"], fields.count("intermediate_size"), ungated)
    if blocks["sparse"]:
        yield _sparse_layers(fields, family, NEMOTRON_EXPERTS, blocks["sparse"], ungated)


# --- the table --------------------------------------------------------------------------------------------------------

_QWEN_EXPERTS = ExpertFields(experts="num_experts")
_QWEN_SHARED = ExpertFields(
    experts="num_experts", shared_intermediate="shared_expert_intermediate_size", shared_gate=True
)
_MIXTRAL_EXPERTS = ExpertFields(experts="num_local_experts", intermediate="intermediate_size")
_GPT_OSS_EXPERTS = ExpertFields(experts="num_local_experts", intermediate="intermediate_size", biases=True)
_LLAMA4_EXPERTS = ExpertFields(
    experts="num_local_experts",
    intermediate="intermediate_size",
    dense_intermediate="intermediate_size_mlp",
    shared_intermediate="intermediate_size",
)
_DEEPSEEK = Family(
    attention=_latent,
    feed_forward=_experts(
        ExpertFields(experts="n_routed_experts", shared_experts="n_shared_experts"), _sparse_after_the_first
    ),
    kinds=_full_everywhere,
)
_QWEN3 = Family(attention=_grouped, feed_forward=_dense, kinds=_window_after_some, query_key_norm="head")
_QWEN3_MOE = Family(
    attention=_grouped,
    feed_forward=_experts(_QWEN_EXPERTS, _sparse_by_step),
    kinds=_window_after_some,
    query_key_norm="head",
)
_QWEN_HYBRID = Family(
    attention=_grouped,
    feed_forward=_dense,
    kinds=_every("full_attention_interval", 4, "state"),
    query_key_norm="head",
    gated_attention=True,
)
_GEMMA3 = Family(
    attention=_grouped,
    feed_forward=_dense,
    kinds=_every("sliding_window_pattern", 6, "window"),
    norms=2,
    query_key_norm="head",
    defaults={  # its published configs leave these out
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(attention=_grouped, feed_forward=_dense, kinds=_full_everywhere),
    "mistral": Family(
        attention=_grouped,
        feed_forward=_dense,
        kinds=_window_everywhere,
        biases="",
        defaults={"sliding_window": 4096},
    ),
    "qwen2": Family(attention=_grouped, feed_forward=_dense, kinds=_window_after_some, biases="qkv"),
    "qwen3": _QWEN3,
    "qwen3_vl_text": _QWEN3,
    "phi3": Family(attention=_grouped, feed_forward=_dense, kinds=_window_everywhere, biases=""),
    "mimo": Family(attention=_grouped, feed_forward=_dense, kinds=_window_after_some, biases="qkv"),
    "gemma2": Family(
        attention=_grouped,
        feed_forward=_dense,
        kinds=_window_first_then_alternate,
        norms=2,
        defaults={"head_dim": 256, "sliding_window": 4096, "tie_word_embeddings": True},
    ),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "mixtral": Family(attention=_grouped, feed_forward=_experts(_MIXTRAL_EXPERTS), kinds=_window_everywhere, biases=""),
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_vl_moe_text": _QWEN3_MOE,
    "minimax_m2": Family(
        attention=_grouped,
        feed_forward=_experts(_MIXTRAL_EXPERTS),
        kinds=_full_everywhere,
        biases="",
        query_key_norm="all",
    ),
    "gpt_oss": Family(
        attention=_grouped,
        feed_forward=_experts(_GPT_OSS_EXPERTS),
        kinds=_window_first_then_alternate,
        sinks=True,
        defaults={"attention_bias": True},
    ),
    "llama4_text": Family(
        attention=_grouped,
        feed_forward=_experts(_LLAMA4_EXPERTS, _sparse_in_between),
        kinds=_every("no_rope_layer_interval", 4, "window"),
        defaults={"attention_chunk_size": 8192},
    ),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "glm_moe_dsa": _DEEPSEEK,
    "qwen3_next": replace(_QWEN_HYBRID, feed_forward=_experts(_QWEN_SHARED, _sparse_by_step)),
    "qwen3_5_text": _QWEN_HYBRID,
    "qwen3_5_moe_text": replace(_QWEN_HYBRID, feed_forward=_experts(_QWEN_SHARED)),
    "nemotron_h": Family(attention=_mixers, feed_forward=_blocks_between, kinds=_full_everywhere),
}
"""`model_type` of a config, or of its `text_config` -> how it is counted."""

WRAPPERS = ("gemma3", "kimi_k25", "llama4", "mistral3", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe")
"""`model_type` of configs that keep a language model of `FAMILIES` in their `text_config`."""
