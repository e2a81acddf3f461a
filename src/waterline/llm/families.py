"""The table of families: `model_type` of a config -> how its layers are counted, and where the numbers are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from waterline.llm import AttentionLayers, FeedForwardLayers
from waterline.llm.attention import (
    after_the_last,
    block_sparse,
    compressed,
    every,
    full_everywhere,
    gemma4_heads,
    grouped,
    hyper_head,
    kimi_linear,
    latent,
    mimo_heads,
    step_heads,
    window_after_some,
    window_everywhere,
    window_first_then_alternate,
    window_where_marked,
)
from waterline.llm.blocks import blocks_between, mixers, searched_attention, searched_feed_forward
from waterline.llm.family import Family, MoreTokens, Sized
from waterline.llm.feed_forward import (
    ExpertFields,
    dense,
    dense_or_experts,
    experts,
    sparse_after_the_first,
    sparse_by_step,
    sparse_from_the_start_index,
    sparse_in_between,
    sparse_where_listed,
    sparse_where_marked,
)
from waterline.llm.fields import Fields

__all__ = ["FAMILIES", "WRAPPERS", "more_token_parameters"]

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
_DEEPSEEK_EXPERTS = ExpertFields(experts="n_routed_experts", shared_experts="n_shared_experts")
_MINIMAX_EXPERTS = ExpertFields(
    experts="num_local_experts",
    dense_intermediate="dense_intermediate_size",
    shared_intermediate="shared_intermediate_size",
)
_KIMI_EXPERTS = ExpertFields(
    experts="num_experts",
    used="num_experts_per_token",
    shared_experts="num_shared_experts",
    width="routed_expert_hidden_size",
    width_norm="latent_moe_use_norm",
)
_ERNIE_EXPERTS = ExpertFields(experts="moe_num_experts", used="moe_k", shared_experts="moe_num_shared_experts")
_STEP_EXPERTS = ExpertFields(experts="num_experts", shared_intermediate="share_expert_dim")
_GEMMA4_EXPERTS = ExpertFields(
    experts="num_experts", used="top_k_experts", beside_dense=True, more_norms=3, router_scales=True
)

_LLAMA = Family(attention=grouped, feed_forward=dense, kinds=full_everywhere)
_MISTRAL = Family(attention=grouped, feed_forward=dense, kinds=window_everywhere, biases="")
_QWEN2 = Family(attention=grouped, feed_forward=dense, kinds=window_after_some, biases="qkv")
_QWEN3 = Family(attention=grouped, feed_forward=dense, kinds=window_after_some, query_key_norm="head")
_QWEN3_MOE = replace(_QWEN3, feed_forward=experts(_QWEN_EXPERTS, sparse_by_step))
_QWEN_HYBRID = Family(
    attention=grouped,
    feed_forward=dense,
    kinds=every("full_attention_interval", 4, "state"),
    query_key_norm="head",
    gate="element",
    more_tokens=MoreTokens(layers_key="mtp_num_hidden_layers"),
)
_DEEPSEEK = Family(
    attention=latent,
    feed_forward=experts(_DEEPSEEK_EXPERTS, sparse_after_the_first),
    kinds=full_everywhere,
    more_tokens=MoreTokens(attention="latent", copies_embeddings=True),
)
_GEMMA3 = Family(
    attention=grouped,
    feed_forward=dense,
    kinds=every("sliding_window_pattern", 6, "window"),
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
_GEMMA4 = Family(
    attention=grouped,
    feed_forward=dense_or_experts(_GEMMA4_EXPERTS),
    kinds=every("sliding_window_pattern", 6, "window"),
    heads=gemma4_heads,
    norms=2,
    query_key_norm="head",
    defaults={"tie_word_embeddings": True},
    refused={
        "hidden_size_per_layer_input": "embeddings of every layer are not counted",
        "num_kv_shared_layers": "layers that share a cache are not counted",
        "use_double_wide_mlp": "networks of two widths are not counted",
    },
)
_STEP = Family(
    attention=grouped,
    feed_forward=experts(_STEP_EXPERTS, sparse_where_listed),
    kinds=full_everywhere,
    heads=step_heads,
    query_key_norm="head",
    gate="head",
    aliases={
        "num_key_value_heads": "num_attention_groups",
        "num_experts": "moe_num_experts",
        "num_experts_per_tok": "moe_top_k",
    },
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_MISTRAL, defaults={"sliding_window": 4096}),
    "ministral3": _MISTRAL,
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "internlm2": replace(_LLAMA, biases=""),
    "hunyuan_v1_dense": replace(_LLAMA, query_key_norm="head"),
    "exaone4": replace(_LLAMA, biases="", query_key_norm="head"),
    "glm": replace(_LLAMA, biases="config-qkv"),
    "glm4": replace(_LLAMA, biases="config-qkv", norms=2),
    "seed_oss": replace(_LLAMA, biases="config-qkv"),
    "qwen2": _QWEN2,
    "qwen2_vl": _QWEN2,
    "qwen2_vl_text": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen2_moe": replace(_QWEN2, feed_forward=experts(_QWEN_SHARED, sparse_by_step)),
    "qwen3": _QWEN3,
    "qwen3_vl_text": _QWEN3,
    "phi3": Family(attention=grouped, feed_forward=dense, kinds=window_everywhere, biases=""),
    "mimo": replace(_QWEN2, more_tokens=MoreTokens()),
    "mimo_v2_flash": Family(
        attention=grouped,
        feed_forward=experts(_DEEPSEEK_EXPERTS, sparse_where_marked),
        kinds=window_where_marked("hybrid_layer_pattern"),
        heads=mimo_heads,
        biases="config-qkv",
    ),
    "olmo2": replace(_LLAMA, query_key_norm="all"),
    "olmo3": replace(_LLAMA, query_key_norm="all"),
    "gemma": replace(_LLAMA, defaults={"head_dim": 256, "tie_word_embeddings": True}),
    "gemma2": Family(
        attention=grouped,
        feed_forward=dense,
        kinds=window_first_then_alternate,
        norms=2,
        defaults={"head_dim": 256, "sliding_window": 4096, "tie_word_embeddings": True},
    ),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "mixtral": Family(attention=grouped, feed_forward=experts(_MIXTRAL_EXPERTS), kinds=window_everywhere, biases=""),
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_vl_moe_text": _QWEN3_MOE,
    "glm4_moe": Family(
        attention=grouped,
        feed_forward=experts(_DEEPSEEK_EXPERTS, sparse_after_the_first),
        kinds=full_everywhere,
        biases="config-qkv",
        query_key_norm="flag",
        more_tokens=MoreTokens(copies_embeddings=True),
    ),
    "dots1": Family(
        attention=grouped,
        feed_forward=experts(_DEEPSEEK_EXPERTS, sparse_after_the_first),
        kinds=window_after_some,
        query_key_norm="head",
    ),
    "olmoe": replace(
        _LLAMA,
        feed_forward=experts(ExpertFields(experts="num_experts", intermediate="intermediate_size")),
        query_key_norm="all",
    ),
    "ernie4_5_moe": replace(_LLAMA, feed_forward=experts(_ERNIE_EXPERTS, sparse_from_the_start_index), biases=""),
    "minimax_m2": Family(
        attention=grouped,
        feed_forward=experts(_MIXTRAL_EXPERTS),
        kinds=full_everywhere,
        biases="",
        query_key_norm="all",
    ),
    "minimax_m3": Family(
        attention=block_sparse,
        feed_forward=experts(_MINIMAX_EXPERTS, sparse_where_marked),
        kinds=full_everywhere,
        biases="",
        query_key_norm="head",
        refused={"attention_output_gate": "its projection is not counted"},
    ),
    "gpt_oss": Family(
        attention=grouped,
        feed_forward=experts(_GPT_OSS_EXPERTS),
        kinds=window_first_then_alternate,
        sinks=True,
        defaults={"attention_bias": True},
    ),
    "llama4_text": Family(
        attention=grouped,
        feed_forward=experts(_LLAMA4_EXPERTS, sparse_in_between),
        kinds=every("no_rope_layer_interval", 4, "window"),
        defaults={"attention_chunk_size": 8192},
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "deepseek_v4": Family(
        attention=compressed,
        feed_forward=experts(_DEEPSEEK_EXPERTS),
        kinds=full_everywhere,
        beside_layers=hyper_head,
        more_tokens=MoreTokens(attention_parameters=after_the_last),
        notes={
            "attention": "one shared key-value head; beyond a window it is kept compressed 4 or 128 times, stated here "
            "as its share of a token; the window of compressed layers is not counted"
        },
    ),
    "kimi_k2": _DEEPSEEK,
    "kimi_linear": Family(
        attention=kimi_linear,
        feed_forward=experts(_KIMI_EXPERTS, sparse_after_the_first),
        kinds=full_everywhere,
        aliases={"max_position_embeddings": "model_max_length"},
    ),
    "glm_moe_dsa": _DEEPSEEK,
    "qwen3_next": replace(
        _QWEN_HYBRID,
        feed_forward=experts(_QWEN_SHARED, sparse_by_step),
        more_tokens=MoreTokens(layers_key="mtp_num_hidden_layers", layers=1),
    ),
    "qwen3_5_text": _QWEN_HYBRID,
    "qwen3_5_moe_text": replace(_QWEN_HYBRID, feed_forward=experts(_QWEN_SHARED)),
    "step3p5": _STEP,
    "step3p7": _STEP,
    "nemotron_h": Family(
        attention=mixers, feed_forward=blocks_between, kinds=full_everywhere, more_tokens=MoreTokens()
    ),
    "nemotron-nas": Family(attention=searched_attention, feed_forward=searched_feed_forward, kinds=full_everywhere),
}
"""`model_type` of a config, or of its `text_config` -> how it is counted."""

WRAPPERS = (
    "aya_vision",
    "gemma3",
    "gemma4",
    "idefics3",
    "internvl",
    "kimi_k25",
    "kimi_k3",
    "llama4",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "step3p7",
)
"""`model_type` of configs that keep a language model of `FAMILIES` in their `text_config`."""


def more_token_parameters(
    fields: Fields,
    family: Family,
    attention: Sequence[Sized[AttentionLayers]],
    feed_forward: Sequence[Sized[FeedForwardLayers]],
) -> tuple[int, int]:
    """Return how many multi-token-prediction layers a checkpoint has, and their parameters; 0 where not counted.

    They are layers like the model's last ones, which are those with experts where it has any.
    """
    more = family.more_tokens
    if more is None:
        return _named_layers(fields), 0
    layers = fields.count(more.layers_key, more.layers or 0, least=0, most=100)
    if not layers or not feed_forward:
        return layers, 0
    if more.attention_parameters is not None:
        mixer = more.attention_parameters(fields, family)
    else:
        mixer = next((one.parameters for one in attention if one.group.kind == more.attention), 0)
    network = feed_forward[-1]
    hidden = fields.count("hidden_size")
    one = mixer + network.parameters + network.group.experts * network.expert_parameters
    one += 2 * hidden * hidden + 3 * hidden
    if family.beside_layers is not None:
        one += family.beside_layers(fields)
    if more.copies_embeddings:
        one += 2 * fields.count("vocab_size") * hidden
    return layers, layers * one


def _named_layers(fields: Fields) -> int:
    named = [fields.get(key) for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")]
    return max((value for value in named if isinstance(value, int)), default=0)
