"""Read a model from its `config.json`, the file every Hugging Face checkpoint carries.

The reader knows families, not models: `FAMILIES` says for each `model_type` which arithmetic its attention and its
feed-forward layers follow, and counts every weight from the fields of the file. A family that is not in the table is
refused by name; nothing is guessed. Vision towers are counted apart; multi-token-prediction layers are not counted.

The arithmetic of each family is that of its published implementation in Hugging Face transformers (5.23 for the counts
the tests compare with).
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Generic, Literal, TypeVar

from msgspec import structs

from waterline.errors import ModelFormatError
from waterline.llm import AttentionLayers, FeedForwardLayers, Llm

__all__ = ["FAMILIES", "WRAPPERS", "read_config"]

MOST_LAYERS = 10_000
LARGEST_COUNT = 2**40
WHAT_NEXT = "Use a GGUF file of this model, which states its tensors itself, or a model of the catalogue."


def read_config(source: Path | str | Mapping[str, object], name: str) -> Llm:
    """Read the model in a folder with `config.json`, in such a file, or in its decoded content.

    `name` is what the model is called from then on. An `hf_quant_config.json` beside the file is honoured.

    Raises:
        ModelFormatError: no such file, not JSON, a field that is missing or has the wrong type, a family or a
            quantisation that is not known; names the file, the field and its value.
    """
    if isinstance(source, Mapping):
        return _llm(source, name, f"the config of '{name}'")
    path = Path(source)
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise ModelFormatError(
                f"{path.parent} has no config.json. Give the folder of a checkpoint, or a .gguf file."
            )
    values = _read_object(path)
    beside = path.with_name("hf_quant_config.json")
    if "quantization_config" not in values and beside.is_file():
        values = {**values, "quantization_config": {"quant_method": "modelopt", **_read_object(beside)}}
    return _llm(values, name, str(path))


def _read_object(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is not valid JSON: {error}. Fetch the file again.") from error
    if not isinstance(values, dict):
        raise ModelFormatError(f"{path} holds a JSON {type(values).__name__}, where an object with fields is expected.")
    return values


class _Fields:
    """The fields of one config, each with the type it must have; what is wrong is said with file, field and value."""

    def __init__(
        self,
        values: Mapping[str, object],
        where: str,
        *,
        outer: Mapping[str, object] = MappingProxyType({}),
        defaults: Mapping[str, object] = MappingProxyType({}),
        prefix: str = "",
    ) -> None:
        self.where, self.prefix = where, prefix
        self._values, self._outer, self._defaults = values, outer, defaults

    def get(self, key: str) -> object:
        """Return the value; None where it is null or absent and the family has no default for it."""
        for values in (self._values, self._outer, self._defaults):
            if key in values:
                return values[key]
        return None

    def wrong(self, key: str, expected: str) -> ModelFormatError:
        value = self.get(key)
        if value is None:
            return ModelFormatError(f"{self.where} has no field '{self.prefix}{key}', which must be {expected}.")
        return ModelFormatError(f"{self.where}: {self.prefix}{key} = {_short(value)}, which must be {expected}.")

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST_COUNT) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, f"an integer from {least:,} to {most:,}")
        return value

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def per_layer(self, key: str, layers: int, meanings: Mapping[str, str]) -> list[str] | None:
        """Return what a list with one name a layer says, in our words; None where the config has no such list."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers:
            raise self.wrong(key, f"a list of {layers} names, one a layer")
        unknown = [item for item in value if not isinstance(item, str) or item not in meanings]
        if unknown:
            known = ", ".join(meanings)
            raise ModelFormatError(
                f"{self.where}: {self.prefix}{key} holds {_short(unknown[0])}, which is not known "
                f"({known}). {WHAT_NEXT}"
            )
        return [meanings[item] for item in value]

    def mapping(self, key: str) -> dict[str, object]:
        value = self.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def inner(self, key: str) -> "_Fields":
        return _Fields(self.mapping(key), self.where, prefix=f"{self.prefix}{key}.")


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# --- what a family is -------------------------------------------------------------------------------------------------


Layers = TypeVar("Layers", AttentionLayers, FeedForwardLayers)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sized(Generic[Layers]):
    """A group of equal layers and what one of them weighs, in parameters."""

    group: Layers
    parameters: int  # without routed experts
    expert_parameters: int = 0  # of one routed expert


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """How the models of one `model_type` are counted."""

    attention: Callable[["_Fields", "_Family"], Iterator[_Sized[AttentionLayers]]]
    feed_forward: Callable[["_Fields", "_Family"], Iterator[_Sized[FeedForwardLayers]]]
    kinds: Callable[["_Fields", int], list[str]]  # of each layer, where the config does not list them
    defaults: Mapping[str, object] = field(
        default_factory=dict
    )  # what the family's own code fills in for absent fields
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


def _full_everywhere(_fields: _Fields, layers: int) -> list[str]:
    return ["full"] * layers


def _window_everywhere(fields: _Fields, layers: int) -> list[str]:
    return ["full" if fields.get("sliding_window") is None else "window"] * layers


def _window_after_some(fields: _Fields, layers: int) -> list[str]:
    if not fields.flag("use_sliding_window") or fields.get("sliding_window") is None:
        return ["full"] * layers
    first = fields.count("max_window_layers", least=0)
    return ["window" if layer >= first else "full" for layer in range(layers)]


def _window_first_then_alternate(_fields: _Fields, layers: int) -> list[str]:
    return ["full" if layer % 2 else "window" for layer in range(layers)]


def _every(key: str, default: int | None, others: str) -> Callable[[_Fields, int], list[str]]:
    def kinds(fields: _Fields, layers: int) -> list[str]:
        step = fields.count(key, default)
        return ["full" if (layer + 1) % step == 0 else others for layer in range(layers)]

    return kinds


# --- attention --------------------------------------------------------------------------------------------------------


def _layers(fields: _Fields) -> int:
    return fields.count("num_hidden_layers", most=MOST_LAYERS)


def _heads(fields: _Fields, key: str = "head_dim") -> tuple[int, int, int]:
    """Return query heads, key-value heads and the dimension of one."""
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads")
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    if fields.get(key) is None and hidden % heads:
        raise fields.wrong("num_attention_heads", f"a divisor of hidden_size = {hidden}, or head_dim must be given")
    return heads, kv_heads, fields.count(key, hidden // heads)


def _grouped(fields: _Fields, family: _Family) -> Iterator[_Sized[AttentionLayers]]:
    """Yield grouped-query attention over all tokens or a window, and gated delta networks (Qwen3-Next) among it."""
    hidden, layers = fields.count("hidden_size"), _layers(fields)
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
        yield _Sized(group=group, parameters=parameters)


def _delta_network(fields: _Fields, family: _Family, layers: int) -> _Sized[AttentionLayers]:
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
    return _Sized(group=group, parameters=parameters)


def _latent(fields: _Fields, family: _Family) -> Iterator[_Sized[AttentionLayers]]:
    """Yield multi-head latent attention (DeepSeek-V2 and after), with the indexer of sparse attention where it is."""
    hidden, heads, layers = fields.count("hidden_size"), fields.count("num_attention_heads"), _layers(fields)
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
        yield _Sized(group=group, parameters=parameters + (indexer if indexing == "full" else 0))


# --- feed-forward -----------------------------------------------------------------------------------------------------


def _dense(fields: _Fields, family: _Family) -> Iterator[_Sized[FeedForwardLayers]]:
    yield _dense_layers(fields, family, _layers(fields), fields.count("intermediate_size"))


def _dense_layers(
    fields: _Fields, family: _Family, layers: int, intermediate: int, matrices: int = 3
) -> _Sized[FeedForwardLayers]:
    hidden = fields.count("hidden_size")
    biases = (matrices - 1) * intermediate + hidden if fields.flag("mlp_bias") else 0
    return _Sized(
        group=FeedForwardLayers(layers=layers, intermediate=intermediate, matrices=matrices),
        parameters=matrices * hidden * intermediate + biases + family.norms * hidden,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ExpertFields:
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
    names: _ExpertFields, is_sparse: Callable[[_Fields, int], bool] = lambda _fields, _layer: True
) -> Callable[[_Fields, _Family], Iterator[_Sized[FeedForwardLayers]]]:
    def feed_forward(fields: _Fields, family: _Family) -> Iterator[_Sized[FeedForwardLayers]]:
        layers = _layers(fields)
        sparse_layers = sum(is_sparse(fields, layer) for layer in range(layers))
        if sparse_layers < layers:
            yield _dense_layers(fields, family, layers - sparse_layers, fields.count(names.dense_intermediate))
        if sparse_layers:
            yield _sparse_layers(fields, family, names, sparse_layers)

    return feed_forward


def _sparse_layers(
    fields: _Fields, family: _Family, names: _ExpertFields, layers: int, matrices: int = 3
) -> _Sized[FeedForwardLayers]:
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
    return _Sized(group=group, parameters=parameters, expert_parameters=expert)


def _sparse_by_step(fields: _Fields, layer: int) -> bool:
    listed = fields.get("mlp_only_layers") or []
    if not isinstance(listed, list):
        raise fields.wrong("mlp_only_layers", "a list of layer numbers")
    return layer not in listed and (layer + 1) % fields.count("decoder_sparse_step", 1) == 0


def _sparse_after_the_first(fields: _Fields, layer: int) -> bool:
    if fields.count("moe_layer_freq", 1) != 1:
        raise fields.wrong("moe_layer_freq", f"1; other patterns are not known. {WHAT_NEXT}")
    return layer >= fields.count("first_k_dense_replace", 0, least=0)


def _sparse_in_between(fields: _Fields, layer: int) -> bool:
    return (layer + 1) % fields.count("interleave_moe_layer_step", 1) == 0


# --- layers that are either attention, state space or feed-forward (Nemotron-H) ---------------------------------------

BLOCKS = {"M": "state", "*": "full", "-": "dense", "E": "sparse"}
BLOCK_NAMES = {"mamba": "state", "attention": "full", "mlp": "dense", "moe": "sparse"}
NEMOTRON_EXPERTS = _ExpertFields(experts="n_routed_experts", shared_intermediate="moe_shared_expert_intermediate_size")


def _blocks(fields: _Fields) -> Counter[str]:
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


def _mixers(fields: _Fields, family: _Family) -> Iterator[_Sized[AttentionLayers]]:
    blocks, hidden = _blocks(fields), fields.count("hidden_size")
    if blocks["full"]:
        key = "head_dim" if fields.get("head_dim") is not None else "attention_head_dim"
        heads, kv_heads, head_dim = _heads(fields, key)
        biases = (heads + 2 * kv_heads) * head_dim + hidden if fields.flag("attention_bias") else 0
        group = AttentionLayers(
            kind="full", layers=blocks["full"], query_heads=heads, kv_heads=kv_heads, head_dim=head_dim
        )
        parameters = 2 * hidden * (heads + kv_heads) * head_dim + biases + family.norms * hidden
        yield _Sized(group=group, parameters=parameters)
    if blocks["state"]:
        yield _mamba(fields, family, blocks["state"])


def _mamba(fields: _Fields, family: _Family, layers: int) -> _Sized[AttentionLayers]:
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
    return _Sized(group=group, parameters=projections + biases + convolution + per_head + inner + family.norms * hidden)


def _blocks_between(fields: _Fields, family: _Family) -> Iterator[_Sized[FeedForwardLayers]]:
    blocks, ungated = _blocks(fields), 2
    if blocks["dense"]:
        yield _dense_layers(fields, family, blocks["dense"], fields.count("intermediate_size"), ungated)
    if blocks["sparse"]:
        yield _sparse_layers(fields, family, NEMOTRON_EXPERTS, blocks["sparse"], ungated)


# --- the table --------------------------------------------------------------------------------------------------------

_QWEN_EXPERTS = _ExpertFields(experts="num_experts")
_QWEN_SHARED = _ExpertFields(
    experts="num_experts", shared_intermediate="shared_expert_intermediate_size", shared_gate=True
)
_MIXTRAL_EXPERTS = _ExpertFields(experts="num_local_experts", intermediate="intermediate_size")
_GPT_OSS_EXPERTS = _ExpertFields(experts="num_local_experts", intermediate="intermediate_size", biases=True)
_LLAMA4_EXPERTS = _ExpertFields(
    experts="num_local_experts",
    intermediate="intermediate_size",
    dense_intermediate="intermediate_size_mlp",
    shared_intermediate="intermediate_size",
)
_DEEPSEEK = _Family(
    attention=_latent,
    feed_forward=_experts(
        _ExpertFields(experts="n_routed_experts", shared_experts="n_shared_experts"), _sparse_after_the_first
    ),
    kinds=_full_everywhere,
)
_QWEN3 = _Family(attention=_grouped, feed_forward=_dense, kinds=_window_after_some, query_key_norm="head")
_QWEN3_MOE = _Family(
    attention=_grouped,
    feed_forward=_experts(_QWEN_EXPERTS, _sparse_by_step),
    kinds=_window_after_some,
    query_key_norm="head",
)
_QWEN_HYBRID = _Family(
    attention=_grouped,
    feed_forward=_dense,
    kinds=_every("full_attention_interval", 4, "state"),
    query_key_norm="head",
    gated_attention=True,
)
_GEMMA3 = _Family(
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

FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(attention=_grouped, feed_forward=_dense, kinds=_full_everywhere),
    "mistral": _Family(
        attention=_grouped,
        feed_forward=_dense,
        kinds=_window_everywhere,
        biases="",
        defaults={"sliding_window": 4096},
    ),
    "qwen2": _Family(attention=_grouped, feed_forward=_dense, kinds=_window_after_some, biases="qkv"),
    "qwen3": _QWEN3,
    "qwen3_vl_text": _QWEN3,
    "phi3": _Family(attention=_grouped, feed_forward=_dense, kinds=_window_everywhere, biases=""),
    "mimo": _Family(attention=_grouped, feed_forward=_dense, kinds=_window_after_some, biases="qkv"),
    "gemma2": _Family(
        attention=_grouped,
        feed_forward=_dense,
        kinds=_window_first_then_alternate,
        norms=2,
        defaults={"head_dim": 256, "sliding_window": 4096, "tie_word_embeddings": True},
    ),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "mixtral": _Family(
        attention=_grouped, feed_forward=_experts(_MIXTRAL_EXPERTS), kinds=_window_everywhere, biases=""
    ),
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_vl_moe_text": _QWEN3_MOE,
    "minimax_m2": _Family(
        attention=_grouped,
        feed_forward=_experts(_MIXTRAL_EXPERTS),
        kinds=_full_everywhere,
        biases="",
        query_key_norm="all",
    ),
    "gpt_oss": _Family(
        attention=_grouped,
        feed_forward=_experts(_GPT_OSS_EXPERTS),
        kinds=_window_first_then_alternate,
        sinks=True,
        defaults={"attention_bias": True},
    ),
    "llama4_text": _Family(
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
    "nemotron_h": _Family(attention=_mixers, feed_forward=_blocks_between, kinds=_full_everywhere),
}
"""`model_type` of a config, or of its `text_config` -> how it is counted."""

WRAPPERS = ("gemma3", "kimi_k25", "llama4", "mistral3", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe")
"""`model_type` of configs that keep a language model of `FAMILIES` in their `text_config`."""


INHERITED = ("tie_word_embeddings", "torch_dtype", "dtype", "quantization_config")
"""What a `text_config` may leave to the config around it."""


def _llm(values: Mapping[str, object], name: str, where: str) -> Llm:
    outer = _Fields(values, where)
    text, prefix = values, ""
    if values.get("text_config") is not None:
        if outer.text("model_type") not in WRAPPERS:
            raise _unknown_family(outer, WRAPPERS)
        text, prefix = {"model_type": values["model_type"], **outer.mapping("text_config")}, "text_config."
    inherited = {key: values[key] for key in INHERITED if key in values}
    fields = _Fields(text, where, outer=inherited, prefix=prefix)
    model_type = fields.text("model_type")
    family = FAMILIES.get(model_type)
    if family is None:
        raise _unknown_family(fields, FAMILIES)
    fields = _Fields(text, where, outer=inherited, defaults=family.defaults, prefix=prefix)
    llm = _counted(fields, family, name, model_type)
    return _with_vision(llm, outer)


def _unknown_family(fields: _Fields, known: Iterable[str]) -> ModelFormatError:
    value = fields.text("model_type")
    return ModelFormatError(
        f'{fields.where}: {fields.prefix}model_type = "{value:.60}" is a family that is not known '
        f"({', '.join(known)}). {WHAT_NEXT}"
    )


def _counted(fields: _Fields, family: _Family, name: str, model_type: str) -> Llm:
    hidden, vocabulary = fields.count("hidden_size"), fields.count("vocab_size")
    tied = fields.flag("tie_word_embeddings")
    attention = list(family.attention(fields, family))
    feed_forward = list(family.feed_forward(fields, family))
    always = vocabulary * hidden * (1 if tied else 2) + hidden  # embedding, output head, last norm
    always += sum(mixer.group.layers * mixer.parameters for mixer in attention)
    experts = passed = 0
    for network in feed_forward:
        always += network.group.layers * network.parameters
        experts += network.group.layers * network.group.experts * network.expert_parameters
        passed += network.group.layers * network.group.experts_per_token * network.expert_parameters
    precision, notes = _precision(fields)
    return Llm(
        name=name,
        architecture=model_type,
        parameters=always + experts,
        active_parameters=always + passed,
        hidden=hidden,
        vocabulary=vocabulary,
        max_context_tokens=fields.count("max_position_embeddings"),
        precision=precision,
        attention=tuple(mixer.group for mixer in attention),
        feed_forward=tuple(network.group for network in feed_forward),
        tied_embeddings=tied,
        source=fields.where,
        notes=notes,
    )


def _with_vision(llm: Llm, fields: _Fields) -> Llm:
    if fields.get("vision_config") is None:
        return llm
    if fields.text("model_type") in QWEN_VISION:
        return structs.replace(llm, vision_parameters=_vision_parameters(fields.inner("vision_config")))
    return structs.replace(llm, notes={**llm.notes, "vision": "the vision tower is not counted"})


QWEN_VISION = ("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe")


def _vision_parameters(fields: _Fields) -> int:
    """Return the size of the vision tower of Qwen3-VL and Qwen3.5, with its mergers."""
    hidden, intermediate = fields.count("hidden_size"), fields.count("intermediate_size")
    merged, out = hidden * fields.count("spatial_merge_size") ** 2, fields.count("out_hidden_size")
    deepstack = fields.get("deepstack_visual_indexes") or []
    if not isinstance(deepstack, list):
        raise fields.wrong("deepstack_visual_indexes", "a list of layer numbers")
    patch = fields.count("in_channels") * fields.count("temporal_patch_size") * fields.count("patch_size") ** 2
    block = 4 * hidden * hidden + 4 * hidden + 2 * hidden * intermediate + intermediate + hidden + 4 * hidden
    merger = merged * merged + merged + merged * out + out
    return (
        patch * hidden
        + hidden
        + fields.count("num_position_embeddings") * hidden
        + fields.count("depth", most=MOST_LAYERS) * block
        + merger
        + 2 * hidden
        + len(deepstack) * (merger + 2 * merged)
    )


# --- precision --------------------------------------------------------------------------------------------------------

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
METHODS = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "modelopt_fp4": "nvfp4",
}
"""`quant_method` -> precision, where the name says it all."""
ALGORITHMS = {
    "FP8": "fp8",
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "W4A16_AWQ": "int4",
    "W4A16": "int4",
    "W8A8": "int8",
}
"""`quant_algo` of NVIDIA's model optimizer -> precision."""
INTEGER_BITS = {4: "int4", 8: "int8"}
COMPRESSED = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8"}


def _precision(fields: _Fields) -> tuple[str, dict[str, str]]:
    """Return the precision the weights are stored in, and remarks on it."""
    if fields.get("quantization_config") is not None:
        return _quantised(fields.inner("quantization_config")), {}
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    if fields.get(key) is None:
        return "bf16", {"precision": "the config names no dtype: taken as bf16"}
    dtype = fields.text(key).removeprefix("torch.")
    if dtype not in DTYPES:
        raise fields.wrong(key, "one of " + ", ".join(DTYPES))
    return DTYPES[dtype], {}


def _quantised(fields: _Fields) -> str:
    method = fields.text("quant_method")
    if method in METHODS:
        return METHODS[method]
    if method in {"awq", "gptq", "auto-round"}:
        bits = fields.count("bits")
        if bits not in INTEGER_BITS:
            raise fields.wrong("bits", f"4 or 8 for {method}. {WHAT_NEXT}")
        return INTEGER_BITS[bits]
    if method == "bitsandbytes":
        return "nf4" if fields.flag("load_in_4bit") else "int8"
    if method == "modelopt":
        holder = fields.inner("quantization") if fields.get("quantization") is not None else fields
        algorithm = holder.text("quant_algo").upper()
        if algorithm not in ALGORITHMS:
            raise holder.wrong("quant_algo", "one of " + ", ".join(ALGORITHMS))
        return ALGORITHMS[algorithm]
    if method == "compressed-tensors":
        return _compressed(fields)
    known = (*METHODS, "awq", "gptq", "auto-round", "bitsandbytes", "modelopt", "compressed-tensors")
    raise fields.wrong("quant_method", f"one of {', '.join(known)}. {WHAT_NEXT}")


def _compressed(fields: _Fields) -> str:
    found = set()
    groups = fields.inner("config_groups")
    for key in fields.mapping("config_groups"):
        group = groups.inner(key)
        weights = group.inner("weights")
        bits, kind = weights.count("num_bits"), weights.text("type", "int")
        layout = group.text("format", fields.text("format", ""))
        if (kind, bits) == ("float", 4):
            found.add("mxfp4" if "mxfp4" in layout else "nvfp4")
        elif (kind, bits) in COMPRESSED:
            found.add(COMPRESSED[kind, bits])
        else:
            raise weights.wrong("num_bits", f"4 or 8 for weights of type {kind}. {WHAT_NEXT}")
    if len(found) != 1:
        raise fields.wrong(
            "config_groups", f"of one precision; found {', '.join(sorted(found)) or 'none'}. {WHAT_NEXT}"
        )
    return found.pop()
