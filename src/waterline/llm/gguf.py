"""Read a model from the header of a GGUF file: llama.cpp's format, all of a model in one file or a few parts.

The header names every tensor with its shape and type, so parameters and bytes are exact and the layers are read off the
tensors themselves.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from msgspec import structs

from waterline.errors import ModelFormatError
from waterline.llm import AttentionLayers, FeedForwardLayers, Llm
from waterline.llm.gguf_header import AGAIN, TENSOR_TYPES, Header, Tensor, TensorType, read_header

__all__ = ["TENSOR_TYPES", "TensorType", "read_gguf"]

MIXES = {
    11: "q3_k_s",
    12: "q3_k_m",
    13: "q3_k_l",
    14: "q4_k_s",
    15: "q4_k_m",
    16: "q5_k_s",
    17: "q5_k_m",
    21: "q2_k_s",
    22: "iq3_xs",
    27: "iq3_m",
    29: "iq2_m",
}
"""`general.file_type` -> precision, for the k-quants whose file is a mix of tensor types."""

WINDOW_PATTERNS = {"gemma2": 2, "gpt-oss": 2, "gemma3": 6, "cohere2": 4}
"""Architecture -> every how many layers one keeps the whole context, the others a window."""


def read_gguf(path: Path | str) -> Llm:
    """Read the model in a GGUF file, or in the parts of a split one: any of them may be given.

    `parameters` and `stored_bytes` are those of the tensors; `precision` is the one most parameters are stored in.
    Multi-token-prediction layers are counted apart, and so are their bytes.

    Raises:
        ModelFormatError: not a GGUF file, of a version that is not known, cut short, a part is missing, or not a
            language model whose layers are understood; with offsets and sizes.
    """
    return _llm(read_header(Path(path)))


def _llm(header: Header) -> Llm:
    architecture = header.architecture
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2 or not embedding.parameters:
        raise ModelFormatError(
            f'{header.path} holds no language model: general.architecture = "{architecture}", and there is no table '
            "'token_embd.weight'. Give the file with the model's own weights."
        )
    blocks = header.count("block_count")
    if blocks > len(header.tensors):
        raise ModelFormatError(
            f"{header.path}: {architecture}.block_count = {blocks}, but {len(header.tensors)} tensors."
        )
    more_layers = min(blocks - 1, header.count("nextn_predict_layers", 0, least=0))
    layers = blocks - more_layers
    stack = _by_layer(header)
    attention, notes = _attention(header, stack, layers)
    feed_forward = _feed_forward(header, stack, layers)
    more = sum(tensor.parameters for layer in range(layers, blocks) for tensor in stack[layer].values())
    unloaded = sum(tensor.size_bytes for layer in range(layers, blocks) for tensor in stack[layer].values())
    parameters = sum(tensor.parameters for tensor in header.tensors.values()) - more
    resting = 0
    for layer in range(layers):
        experts = sum(tensor.parameters for part, tensor in stack[layer].items() if part.endswith("_exps.weight"))
        resting += experts - experts * _used(header, stack[layer]) // max(1, _experts(stack[layer]))
    stored: Counter[str] = Counter()
    for tensor in header.tensors.values():
        stored[TENSOR_TYPES[tensor.type_id].name] += tensor.size_bytes
    name = header.values.get("general.name")
    return Llm(
        name=name if isinstance(name, str) and name else header.path.stem,
        architecture=architecture,
        parameters=parameters,
        active_parameters=parameters - resting,
        hidden=embedding.shape[0],
        vocabulary=embedding.shape[1],
        max_context_tokens=header.count("context_length"),
        precision=_precision(header),
        attention=attention,
        feed_forward=feed_forward,
        tied_embeddings="output.weight" not in header.tensors,
        mtp_layers=more_layers,
        mtp_parameters=more,
        stored_bytes=stored.total() - unloaded,
        stored_types=dict(stored.most_common()),
        weights_file=str(header.path),
        source=str(header.path),
        notes=notes,
    )


Parts = Mapping[str, Tensor]
"""The tensors of one layer, by what their name says after ``blk.N.``"""


def _by_layer(header: Header) -> Mapping[int, Parts]:
    stack: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in header.tensors.items():
        block, _, rest = name.removeprefix("blk.").partition(".")
        if name.startswith("blk.") and block.isdecimal():
            stack[int(block)][rest] = tensor
    return stack


def _experts(parts: Parts) -> int:
    down = parts.get("ffn_down_exps.weight")
    return down.shape[2] if down is not None and len(down.shape) == 3 else 0


def _used(header: Header, parts: Parts) -> int:
    """Return how many of a layer's experts a token passes; all of them where the file does not say."""
    experts = _experts(parts)
    return min(header.count("expert_used_count", max(1, experts)), experts)


def _precision(header: Header) -> str:
    stored: Counter[str] = Counter()
    for tensor in header.tensors.values():
        stored[TENSOR_TYPES[tensor.type_id].precision] += tensor.parameters
    precision = stored.most_common(1)[0][0]
    file_type = header.values.get("general.file_type")
    mix = MIXES.get(file_type, "") if isinstance(file_type, int) else ""
    if not precision:
        raise ModelFormatError(
            f"{header.path}: most of its numbers are integers, not weights. Quantise the model anew."
        )
    return mix if mix and mix[:4] == precision[:4] else precision


def _attention(
    header: Header, stack: Mapping[int, Parts], layers: int
) -> tuple[tuple[AttentionLayers, ...], dict[str, str]]:
    heads = header.per_layer("attention.head_count", layers)
    kv_heads = header.per_layer("attention.head_count_kv", layers, max(heads))
    hidden = header.count("embedding_length")
    window = header.values.get(f"{header.architecture}.attention.sliding_window")
    pattern = _window_pattern(header, layers) if isinstance(window, int) and window > 0 else None
    groups: Counter[AttentionLayers] = Counter()
    for layer in range(layers):
        parts = set(stack[layer])
        if any(part.startswith("ssm_") for part in parts):
            groups[_state(header)] += 1
        elif "attn_kv_a_mqa.weight" in parts:
            groups[_latent(header, heads[layer], indexed=any(part.startswith("indexer.") for part in parts))] += 1
        elif parts & {"attn_k.weight", "attn_qkv.weight"}:
            if not 0 < kv_heads[layer] <= heads[layer]:
                raise ModelFormatError(
                    f"{header.path}: layer {layer} has {heads[layer]} heads and {kv_heads[layer]} key-value heads, "
                    f"which must be at least 1 and at most as many. {AGAIN}"
                )
            head_dim = header.count("attention.key_length", max(1, hidden // heads[layer]))
            value_head_dim = header.count("attention.value_length", head_dim)
            kind: Literal["full", "window"] = "window" if pattern is not None and pattern(layer) else "full"
            groups[
                AttentionLayers(
                    kind=kind,
                    layers=1,
                    query_heads=heads[layer],
                    kv_heads=kv_heads[layer],
                    head_dim=head_dim,
                    value_head_dim=value_head_dim if value_head_dim != head_dim else 0,
                    window_tokens=int(str(window)) if kind == "window" else 0,
                )
            ] += 1
        elif not any(part.startswith("ffn_") for part in parts):
            raise ModelFormatError(
                f'{header.path}: the layers of general.architecture = "{header.architecture}" are not known; layer '
                f"{layer} holds {', '.join(sorted(parts)[:4]) or 'nothing'}. Use the model's folder with config.json."
            )
    notes = {}
    if window and pattern is None:
        notes["window"] = f"the file names a window of {window} tokens, not of which layers: all counted as full"
    return tuple(structs.replace(group, layers=count) for group, count in groups.items()), notes


def _window_pattern(header: Header, layers: int) -> Callable[[int], bool] | None:
    """Return whether a layer keeps a window only; None where neither file nor table says which layers do."""
    said = header.values.get(f"{header.architecture}.attention.sliding_window_pattern")
    if isinstance(said, list) and len(said) >= layers:
        return lambda layer: bool(said[layer])
    step = said if isinstance(said, int) and said > 0 else WINDOW_PATTERNS.get(header.architecture)
    return None if step is None else lambda layer: (layer + 1) % step != 0


def _latent(header: Header, heads: int, *, indexed: bool) -> AttentionLayers:
    latent, rope = header.count("attention.kv_lora_rank"), header.count("rope.dimension_count")
    key_dim = header.count("attention.key_length_mla", header.count("attention.key_length"))
    return AttentionLayers(
        kind="latent",
        layers=1,
        query_heads=heads,
        kv_heads=heads,
        head_dim=key_dim,
        value_head_dim=header.count("attention.value_length_mla", header.count("attention.value_length")),
        latent_dim=latent,
        rope_dim=rope,
        index_dim=header.count("attention.indexer.key_length") if indexed else 0,
        selected_tokens=header.count("attention.indexer.top_k") if indexed else 0,
    )


def _state(header: Header) -> AttentionLayers:
    """Return a state space or gated delta layer: a state for every inner channel, and a short convolution."""
    inner, state = header.count("ssm.inner_size"), header.count("ssm.state_size")
    groups, kernel = header.count("ssm.group_count", 1), header.count("ssm.conv_kernel")
    convolved = inner + 2 * groups * state
    return AttentionLayers(kind="state", layers=1, state_elements=inner * state + convolved * (kernel - 1))


def _feed_forward(header: Header, stack: Mapping[int, Parts], layers: int) -> tuple[FeedForwardLayers, ...]:
    """Read the networks off their tensors: `ffn_down` is [intermediate, hidden], experts add a third dimension."""
    groups: Counter[FeedForwardLayers] = Counter()
    for layer in range(layers):
        network = _network(header, stack[layer])
        if network is not None:
            groups[network] += 1
    return tuple(structs.replace(group, layers=count) for group, count in groups.items())


def _network(header: Header, parts: Parts) -> FeedForwardLayers | None:
    experts = _experts(parts)
    if experts:
        gated = "ffn_gate_exps.weight" in parts or "ffn_gate_up_exps.weight" in parts
        shared = parts.get("ffn_down_shexp.weight")
        beside = parts.get("ffn_down.weight")  # Gemma 4: a dense network beside the experts
        return FeedForwardLayers(
            layers=1,
            intermediate=parts["ffn_down_exps.weight"].shape[0],
            experts=experts,
            experts_per_token=_used(header, parts),
            shared_intermediate=sum(one.shape[0] for one in (shared, beside) if one is not None and one.shape),
            matrices=3 if gated else 2,
        )
    down, up = parts.get("ffn_down.weight"), parts.get("ffn_up.weight")
    if down is None or not down.shape:
        return None
    fused = up is not None and bool(up.shape) and up.shape[-1] == 2 * down.shape[0]
    return FeedForwardLayers(
        layers=1, intermediate=down.shape[0], matrices=3 if "ffn_gate.weight" in parts or fused else 2
    )
