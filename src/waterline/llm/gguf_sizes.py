"""How large a GGUF file of a model is, before it exists: what llama.cpp's quantize would write.

A mix such as Q4_K_M keeps some tensors in more bits than its name says: which ones depends on the layer, on the shape
and on the number of experts. The rules are those of `llama_tensor_get_type` in llama.cpp `src/llama-quant.cpp` (read
2026-11-24). IQ1 to IQ3 are taken as made with an importance matrix, the others without.

Older files differ, see `Epoch`: their rules are those that reproduce published files, which agree with what comments in
today's source say was taken out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from waterline.llm import FeedForwardLayers, Llm
from waterline.llm.gguf_header import TENSOR_TYPES

__all__ = ["MIXES", "Epoch", "FileParts", "file_bytes", "file_parts"]

Epoch = Literal["today", "2023", "ggml"]
"""When a file was made, where that changes its mix.

``today``  since January 2024
``2023``   GGUF before: gate and up of Q2_K had the bits of Q3_K, and no rule knew the tensors of single experts
``ggml``   the format before GGUF, until August 2023: fewer rules, and no output head of Q6_K for formats without a K
"""

MIXES: Mapping[str, str] = {
    "fp32": "f32",
    "fp16": "f16",
    "bf16": "bf16",
    "q8_0": "q8_0",
    "q6_k": "q6_k",
    "q5_1": "q5_1",
    "q5_0": "q5_0",
    "q5_k_m": "q5_k",
    "q5_k_s": "q5_k",
    "q4_1": "q4_1",
    "q4_0": "q4_0",
    "q4_k_m": "q4_k",
    "q4_k_s": "q4_k",
    "iq4_nl": "iq4_nl",
    "iq4_xs": "iq4_xs",
    "mxfp4": "mxfp4",
    "q3_k_l": "q3_k",
    "q3_k_m": "q3_k",
    "q3_k_s": "q3_k",
    "iq3_m": "iq3_s",
    "iq3_s": "iq3_s",
    "iq3_xs": "iq3_s",
    "iq3_xxs": "iq3_xxs",
    "q2_k": "q2_k",
    "q2_k_s": "q2_k",
    "iq2_m": "iq2_s",
    "iq2_s": "iq2_xs",
    "iq2_xs": "iq2_xs",
    "iq2_xxs": "iq2_xxs",
    "tq2_0": "tq2_0",
    "iq1_m": "iq1_m",
    "iq1_s": "iq1_s",
    "tq1_0": "tq1_0",
}
"""Precision -> the type of most tensors."""

BITS = {stored.name: stored.block_bytes * 8 / stored.block for stored in TENSOR_TYPES.values()}
BLOCK = {stored.name: stored.block for stored in TENSOR_TYPES.values()}
UNFIT = {  # what takes the place of a type whose block does not divide the rows
    **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
UNFIT_OTHERS = "iq4_nl"
TINY = ("iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq1_s", "iq1_m")  # mixes with rules of their own
TOKEN_BYTES = 50  # of the header: text, score, type and merge of a word of the vocabulary


@dataclass(frozen=True, slots=True)
class _Model:
    """What the rules look at."""

    layers: int
    experts: int
    queries_per_key: int
    epoch: Epoch

    @property
    def few_keys(self) -> bool:
        return self.queries_per_key >= 4

    @property
    def like_mixtral(self) -> bool:
        return self.experts == 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FileParts:
    """The tensors of a GGUF file, in bytes."""

    head_bytes: float  # the output head, or the one table there is
    embedding_bytes: float  # 0 where it is the same table
    layers_bytes: float


def file_bytes(llm: Llm, precision: str, epoch: Epoch = "today") -> int:
    """Return the bytes of the GGUF file of a model in a precision, its vocabulary included.

    Raises:
        KeyError: llama.cpp has no mix of this name; see `MIXES`.
    """
    parts = file_parts(llm, precision, epoch)
    tensors = parts.head_bytes + parts.embedding_bytes + parts.layers_bytes
    return round(tensors) + TOKEN_BYTES * llm.vocabulary


def file_parts(llm: Llm, precision: str, epoch: Epoch = "today") -> FileParts:
    """Return what the tensors of that file take; see `file_bytes`."""
    base = MIXES[precision]
    mixer = next((group for group in llm.attention if group.kv_heads and group.kind != "state"), None)
    model = _Model(
        layers=llm.layers,
        experts=max((group.experts for group in llm.feed_forward), default=0),
        queries_per_key=mixer.query_heads // mixer.kv_heads if mixer is not None else 1,
        epoch=epoch,
    )

    def stored(elements: float, row: int, kind: str) -> float:
        return elements * BITS[_fitting(kind, row)] / 8

    table = llm.vocabulary * llm.hidden
    legacy = epoch == "ggml" and not base.endswith("_k")
    networks = sum(_network_bytes(group, precision, model, llm.hidden, first, stored) for first, group in _placed(llm))
    return FileParts(
        head_bytes=stored(table, llm.hidden, base if legacy else _output(precision, base, llm.hidden)),
        embedding_bytes=0.0 if llm.tied_embeddings else stored(table, llm.hidden, _embedding(precision, base)),
        layers_bytes=networks + _attention_bytes(llm, precision, model, stored),
    )


def _fitting(kind: str, row: int) -> str:
    if row % BLOCK[kind] == 0:
        return kind
    instead = UNFIT.get(kind, UNFIT_OTHERS)
    return instead if row % BLOCK[instead] == 0 else "f16"


def _placed(llm: Llm) -> list[tuple[int, FeedForwardLayers]]:
    """Return each group of networks with the number of its first layer."""
    placed, first = [], 0
    for group in llm.feed_forward:
        placed.append((first, group))
        first += group.layers
    return placed


Stored = Callable[[float, int, str], float]


def _network_bytes(
    group: FeedForwardLayers, precision: str, model: _Model, hidden: int, first: int, stored: Stored
) -> float:
    width = group.expert_hidden or hidden
    routed = group.experts * width * group.intermediate
    inner = group.intermediate if group.experts else 0
    total = 4.0 * group.layers * hidden * group.experts  # the router stays in 32 bits
    for layer in range(first, first + group.layers):
        into, out = _entering(precision, model, layer), _leaving(precision, model, layer)
        if group.experts and model.epoch != "today":
            into = out = MIXES[precision]
        for elements, enters, leaves, of_experts in (
            (routed, width, inner, True),
            (hidden * group.shared_intermediate, hidden, group.shared_intermediate, False),
            (0 if group.experts else hidden * group.intermediate, hidden, group.intermediate, False),
        ):
            if elements:
                kinds = ("mxfp4", "mxfp4") if precision == "mxfp4" and of_experts else (into, out)
                total += stored((group.matrices - 1) * elements, enters, kinds[0])
                total += stored(elements, leaves, kinds[1])
    return total


def _attention_bytes(llm: Llm, precision: str, model: _Model, stored: Stored) -> float:
    """Return values and outputs by their rules, and everything else that is in the layers as the mix has queries."""
    values = keys = outputs = 0.0
    rows = llm.hidden
    for group in llm.attention:
        if group.kind == "state":
            continue
        value_dim = group.value_head_dim or group.head_dim
        outputs += group.layers * llm.hidden * group.query_heads * value_dim
        rows = group.query_heads * value_dim
        if group.kind == "latent":
            values += (
                group.layers * group.latent_dim * group.query_heads * (group.head_dim - group.rope_dim + value_dim)
            )
        else:
            values += group.layers * llm.hidden * group.kv_heads * value_dim
            keys += group.layers * llm.hidden * group.kv_heads * group.head_dim
    rest = max(0.0, _in_layers(llm) - values - keys - outputs)
    layers = max(1, llm.layers)
    by_layer = sum(
        stored(values / layers, llm.hidden, _values(precision, model, layer, layers)) for layer in range(layers)
    )
    return (
        by_layer
        + stored(keys, llm.hidden, _keys(precision, model))
        + stored(outputs, rows, _outputs(precision, model))
        + stored(rest, llm.hidden, _queries(precision))
    )


def _in_layers(llm: Llm) -> int:
    """Return the parameters of the layers without their feed-forward networks."""
    tables = llm.vocabulary * llm.hidden * (1 if llm.tied_embeddings else 2)
    networks = sum(
        group.layers
        * (
            group.experts * llm.hidden
            + group.matrices * llm.hidden * group.shared_intermediate
            + (0 if group.experts else group.matrices * llm.hidden * group.intermediate)
        )
        for group in llm.feed_forward
    )
    return llm.parameters - tables - networks - llm.expert_parameters


# --- the rules, one function for each kind of tensor ------------------------------------------------------------------


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _output(mix: str, base: str, row: int) -> str:
    if mix == "mxfp4" or (BLOCK[base] > 1 and row % BLOCK[base]):
        return "q8_0"
    if BLOCK[base] == 1 or base == "q8_0":
        return base
    return "q5_k" if mix in {*TINY, "iq3_xxs"} else "q6_k"


def _embedding(mix: str, base: str) -> str:
    if mix in {"iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"}:
        return "q2_k"
    if mix in {"iq2_s", "iq2_m", "iq3_xxs"}:
        return "iq3_s"
    return {"tq1_0": "q4_k", "tq2_0": "q4_k", "mxfp4": "q8_0"}.get(mix, base)


def _of_ggml(mix: str, layer: int, layers: int, *, rises: bool) -> str:
    """Return the type of values, outputs and down before GGUF; values and down rise in some layers of two mixes."""
    if rises and mix in {"q4_k_m", "q5_k_m"} and _more_bits(layer, layers):
        return "q6_k"
    return {"q2_k": "q4_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(mix, MIXES[mix])


def _values(mix: str, model: _Model, layer: int, layers: int) -> str:
    if model.epoch == "ggml":
        return _of_ggml(mix, layer, layers, rises=True)
    if mix in TINY:
        if model.few_keys or model.experts >= 4:
            return "q4_k"
        return "iq3_s" if mix in {"iq2_s", "iq2_m"} else "q2_k"
    if model.like_mixtral and BLOCK[MIXES[mix]] > 1:
        return "q8_0"
    kind = _values_of(mix, model, layer, layers)
    return "q5_k" if model.layers == 80 and kind in {"q3_k", "q4_k"} else kind


def _values_of(mix: str, model: _Model, layer: int, layers: int) -> str:
    always = {"iq3_m": "q4_k", "q3_k_l": "q5_k", "q3_k_m": "q5_k" if layer < 2 else "q4_k", "mxfp4": "q8_0"}
    shared = {
        **dict.fromkeys(("q2_k", "q2_k_s", "iq3_xxs", "iq3_xs", "iq3_s"), "q4_k"),
        **dict.fromkeys(("iq4_nl", "iq4_xs"), "q5_k"),
    }
    if mix in always:
        return always[mix]
    if model.few_keys and mix in shared:
        return shared[mix]
    if mix == "q2_k":
        return "q3_k"
    if mix in {"q4_k_m", "q5_k_m"} and _more_bits(layer, layers):
        return "q6_k"
    return "q5_k" if mix == "q4_k_s" and layer < 4 else MIXES[mix]


def _keys(mix: str, model: _Model) -> str:
    if model.like_mixtral and BLOCK[MIXES[mix]] > 1:
        return "q4_k" if mix in TINY else "q8_0"
    return _queries(mix)


def _queries(mix: str) -> str:
    return {"iq3_xs": "iq3_xxs", "iq3_xxs": "iq2_s", "mxfp4": "q8_0"}.get(mix, MIXES[mix])


def _outputs(mix: str, model: _Model) -> str:
    if model.epoch == "ggml":
        return _of_ggml(mix, 0, model.layers, rises=False)
    if model.like_mixtral and model.epoch == "today":
        bumped = {
            "q2_k",
            "iq3_xs",
            "iq3_xxs",
            "q3_k_s",
            "q3_k_m",
            "iq4_nl",
            "q4_k_s",
            "q4_k_m",
            "iq3_s",
            "iq3_m",
            "iq4_xs",
        }
        return "q5_k" if mix in bumped or mix in TINY else MIXES[mix]
    others = {
        **dict.fromkeys(("iq1_s", "iq1_m"), "iq2_xxs"),
        **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), "iq3_s"),
        **dict.fromkeys(("q3_k_m", "iq3_m"), "q4_k"),
        "q2_k": "q3_k",
        "q3_k_l": "q5_k",
        "mxfp4": "q8_0",
    }
    return others.get(mix, MIXES[mix])


def _entering(mix: str, model: _Model, layer: int) -> str:
    """Return the type of gate and up."""
    layers = model.layers
    if model.epoch == "2023" and mix == "q2_k":
        return "q3_k"
    if mix == "iq3_xs" and layers // 8 <= layer < 7 * layers // 8:
        return "iq3_xxs"
    return "q8_0" if mix == "mxfp4" else MIXES[mix]


def _leaving(mix: str, model: _Model, layer: int) -> str:
    """Return the type of down."""
    layers = model.layers
    if model.epoch == "ggml":
        return _of_ggml(mix, layer, layers, rises=True)
    early, more = layer < layers // 8, _more_bits(layer, layers)
    if mix in TINY and early:
        return "iq3_s" if mix in {"iq2_s", "iq2_m"} else "q2_k"
    if mix == "q3_k_m":
        return "q5_k" if layer < layers // 16 else "q4_k"
    raised = {
        "q2_k_s": ("q4_k", early),
        "iq3_m": ("q4_k", early or (model.like_mixtral and more)),
        "q4_k_m": ("q6_k", more),
        "q5_k_m": ("q6_k", more),
        "q4_k_s": ("q5_k", early),
        "iq4_nl": ("q5_k", early),
        "iq4_xs": ("q5_k", early),
    }
    if mix in raised and raised[mix][1]:
        return raised[mix][0]
    return {"q2_k": "q3_k", "q3_k_l": "q5_k", "mxfp4": "q8_0"}.get(mix, MIXES[mix])
