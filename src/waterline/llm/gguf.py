"""Read a model from the header of a GGUF file: llama.cpp's format, all of a model in one file.

The header names every tensor with its shape, type and place, so parameters and bytes are exact and the layers are read
off the tensors themselves. Tensor data is never touched, only checked to be there. The layout follows `docs/gguf.md` of
ggml; versions 2 and 3, little-endian.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from waterline.errors import ModelFormatError
from waterline.llm import AttentionLayers, FeedForwardLayers, Llm

__all__ = ["TENSOR_TYPES", "TensorType", "read_gguf"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
KEPT_ARRAY = 10_000  # numbers a layer are kept; token lists are longer and skipped
MOST_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
AGAIN = "Copy or download it again."


@dataclass(frozen=True, slots=True)
class TensorType:
    """How ggml stores a tensor: `block_bytes` for every `block` elements."""

    precision: str  # a key of PRECISIONS; "" for types that hold no weights
    block: int
    block_bytes: int


TENSOR_TYPES: Mapping[int, TensorType] = {
    0: TensorType("fp32", 1, 4),
    1: TensorType("fp16", 1, 2),
    2: TensorType("q4_0", 32, 18),
    3: TensorType("q4_1", 32, 20),
    6: TensorType("q5_0", 32, 22),
    7: TensorType("q5_1", 32, 24),
    8: TensorType("q8_0", 32, 34),
    10: TensorType("q2_k", 256, 84),
    11: TensorType("q3_k_m", 256, 110),
    12: TensorType("q4_k_m", 256, 144),
    13: TensorType("q5_k_m", 256, 176),
    14: TensorType("q6_k", 256, 210),
    16: TensorType("iq2_xxs", 256, 66),
    17: TensorType("iq2_xs", 256, 74),
    18: TensorType("iq3_xxs", 256, 98),
    19: TensorType("iq1_s", 256, 50),
    20: TensorType("iq4_nl", 32, 18),
    21: TensorType("iq3_s", 256, 110),
    22: TensorType("iq2_s", 256, 82),
    23: TensorType("iq4_xs", 256, 136),
    24: TensorType("", 1, 1),
    25: TensorType("", 1, 2),
    26: TensorType("", 1, 4),
    27: TensorType("", 1, 8),
    28: TensorType("", 1, 8),
    29: TensorType("iq1_m", 256, 56),
    30: TensorType("bf16", 1, 2),
    39: TensorType("mxfp4", 32, 17),
}
"""`ggml_type` -> its storage, from ggml. A k-quant that `general.file_type` does not name is taken as its `_m` mix."""

MIXES = {11: "q3_k_s", 12: "q3_k_m", 13: "q3_k_l", 14: "q4_k_s", 15: "q4_k_m", 16: "q5_k_s", 17: "q5_k_m"}
"""`general.file_type` -> precision, for the k-quants whose file is a mix of tensor types."""

WINDOW_PATTERNS = {"gemma2": 2, "gpt-oss": 2, "gemma3": 6, "cohere2": 4}
"""Architecture -> every how many layers one keeps the whole context, the others a window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]  # innermost first, as ggml writes it
    type_id: int
    size_bytes: int

    @property
    def parameters(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(slots=True, kw_only=True)
class _Header:
    path: Path
    values: dict[str, object] = field(default_factory=dict)
    tensors: dict[str, _Tensor] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        value = self.values.get("general.architecture")
        if not isinstance(value, str):
            raise ModelFormatError(f"{self.path} has no text 'general.architecture'. {AGAIN}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """Return a positive integer of the architecture's own keys."""
        return self.per_layer(key, 1, default)[0]

    def per_layer(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """Return one integer a layer; a single one in the file holds for all."""
        full = f"{self.architecture}.{key}"
        value = self.values.get(full, default)
        if value is None:
            raise ModelFormatError(f"{self.path} has no '{full}', which must be an integer. {AGAIN}")
        if isinstance(value, list) and layers > 1:
            numbers, least = value, 0
            if len(numbers) < layers:
                raise ModelFormatError(f"{self.path}: '{full}' has {len(numbers)} numbers for {layers} layers.")
        else:
            numbers, least = [max(value) if isinstance(value, list) and value else value] * layers, 1
        if not all(isinstance(number, int) and least <= number < 2**40 for number in numbers):
            raise ModelFormatError(f"{self.path}: '{full}' = {value!r:.60}, which must be a positive integer.")
        return numbers[:layers]


def read_gguf(path: Path | str) -> Llm:
    """Read the model in a GGUF file.

    `parameters` and `stored_bytes` are those of the tensors; `precision` is the one most parameters are stored in.

    Raises:
        ModelFormatError: not a GGUF file, of a version that is not known, cut short, or not a language model whose
            layers are understood; with offsets and sizes.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                raise ModelFormatError(f"{path} is empty. {AGAIN}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _Reader(path, data, size).header()
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror or error}.") from error
    return _llm(header)


class _Reader:
    """The bytes of a header, read front to back; what is cut short is said with its offset."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size, self._at = path, data, size, 0

    def header(self) -> _Header:
        if self._take(4) != MAGIC:
            raise ModelFormatError(
                f"{self._path} is not a GGUF file: it begins with {bytes(self._data[:4])!r}, not {MAGIC!r}."
            )
        version = self._number("I")
        if version not in VERSIONS:
            reason = (
                "a big-endian file" if version >> 24 in VERSIONS and version % 2**24 == 0 else f"GGUF version {version}"
            )
            raise ModelFormatError(
                f"{self._path} is {reason}; versions 2 and 3, little-endian, are read. Convert it anew."
            )
        tensors, keys = self._number("Q"), self._number("Q")
        header = _Header(path=self._path)
        self._expect(keys * 13 + tensors * 24, "header")  # the least that so many entries take
        for _ in range(keys):
            key = self._text()
            header.values[key] = self._value(self._number("I"))
        places = [self._tensor() for _ in range(tensors)]
        alignment = header.values.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment % 8:
            raise ModelFormatError(f"{self._path}: general.alignment = {alignment!r}, which must be a multiple of 8.")
        start = -(-self._at // alignment) * alignment
        for tensor, offset in places:
            end = start + offset + tensor.size_bytes
            if end > self._size:
                raise ModelFormatError(
                    f"{self._path} is cut short: tensor '{tensor.name}' needs bytes {start + offset:,} to {end:,}, "
                    f"the file has {self._size:,}. {AGAIN}"
                )
            header.tensors[tensor.name] = tensor
        return header

    def _expect(self, count: int, what: str) -> None:
        if count > self._size - self._at:
            raise ModelFormatError(
                f"{self._path} is cut short: {what} needs {count:,} bytes at offset {self._at:,}, "
                f"the file has {self._size:,}. {AGAIN}"
            )

    def _take(self, count: int, what: str = "the header") -> bytes:
        self._expect(count, what)
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def _number(self, form: str) -> int:
        (value,) = struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))
        return int(value)

    def _text(self) -> str:
        at = self._at
        try:
            return self._take(self._number("Q"), "a text").decode()
        except UnicodeDecodeError as error:
            raise ModelFormatError(f"{self._path} has a text at offset {at:,} that is not UTF-8. {AGAIN}") from error

    def _value(self, kind: int) -> object:
        if kind in SCALARS:
            form = "<" + SCALARS[kind]
            return struct.unpack(form, self._take(struct.calcsize(form)))[0]
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            return self._array(self._number("I"), self._number("Q"))
        raise ModelFormatError(
            f"{self._path} has a value of type {kind} at offset {self._at:,}, which is not known. {AGAIN}"
        )

    def _array(self, kind: int, count: int) -> object:
        """Return numbers where they can be one a layer; skip everything else."""
        if kind in SCALARS:
            size = struct.calcsize("<" + SCALARS[kind])
            if count > KEPT_ARRAY:
                self._expect(count * size, "a list")
                self._at += count * size
                return None
            return list(struct.unpack(f"<{count}{SCALARS[kind]}", self._take(count * size, "a list")))
        if kind != STRING:
            raise ModelFormatError(
                f"{self._path} has a list of type {kind} at offset {self._at:,}, which is not known."
            )
        self._expect(count * 8, "a list of texts")
        at, length_of, data, last = self._at, struct.Struct("<Q").unpack_from, self._data, self._size - 8
        for _ in range(count):
            if at > last:
                break
            at += 8 + length_of(data, at)[0]
        if at > self._size:
            self._at = min(self._at, self._size)
            raise ModelFormatError(
                f"{self._path} is cut short: a list of {count:,} texts at offset {self._at:,} runs past the end, "
                f"the file has {self._size:,} bytes. {AGAIN}"
            )
        self._at = at
        return None

    def _tensor(self) -> tuple[_Tensor, int]:
        name, dimensions = self._text(), self._number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ModelFormatError(
                f"{self._path}: tensor '{name}' has {dimensions} dimensions, at most 4 are known. {AGAIN}"
            )
        shape = tuple(self._number("Q") for _ in range(dimensions))
        type_id, offset = self._number("I"), self._number("Q")
        stored = TENSOR_TYPES.get(type_id)
        if stored is None:
            raise ModelFormatError(
                f"{self._path}: tensor '{name}' is of ggml type {type_id}, which is not known. Quantise the model anew."
            )
        tensor = _Tensor(name=name, shape=shape, type_id=type_id, size_bytes=0)
        if shape and shape[0] % stored.block:
            raise ModelFormatError(
                f"{self._path}: rows of tensor '{name}' have {shape[0]} elements, not a multiple of "
                f"{stored.block}. {AGAIN}"
            )
        size = tensor.parameters // stored.block * stored.block_bytes
        return _Tensor(name=name, shape=shape, type_id=type_id, size_bytes=size), offset


# --- from tensors to layers -------------------------------------------------------------------------------------------


def _llm(header: _Header) -> Llm:
    architecture = header.architecture
    parts = header.values.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise ModelFormatError(f"{header.path} is one of {parts} parts. Join them first: llama-gguf-split --merge.")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2 or not embedding.parameters:
        raise ModelFormatError(
            f'{header.path} holds no language model: general.architecture = "{architecture}", and there is no table '
            "'token_embd.weight'. Give the file with the model's own weights."
        )
    layers = header.count("block_count")
    if layers > len(header.tensors):
        raise ModelFormatError(
            f"{header.path}: {architecture}.block_count = {layers}, but {len(header.tensors)} tensors."
        )
    attention, notes = _attention(header, layers)
    feed_forward = _feed_forward(header, layers)
    parameters = sum(tensor.parameters for tensor in header.tensors.values())
    experts = sum(tensor.parameters for tensor in header.tensors.values() if tensor.name.endswith("_exps.weight"))
    most = next((group for group in feed_forward if group.experts), None)
    resting = experts - experts * most.experts_per_token // most.experts if most else 0
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
        stored_bytes=sum(tensor.size_bytes for tensor in header.tensors.values()),
        weights_file=str(header.path),
        source=str(header.path),
        notes=notes,
    )


def _precision(header: _Header) -> str:
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


def _attention(header: _Header, layers: int) -> tuple[tuple[AttentionLayers, ...], dict[str, str]]:
    heads = header.per_layer("attention.head_count", layers)
    kv_heads = header.per_layer("attention.head_count_kv", layers, max(heads))
    hidden = header.count("embedding_length")
    window = header.values.get(f"{header.architecture}.attention.sliding_window")
    pattern = _window_pattern(header, layers) if isinstance(window, int) and window > 0 else None
    groups: Counter[AttentionLayers] = Counter()
    for layer in range(layers):
        parts = {name.removeprefix(f"blk.{layer}.") for name in header.tensors if name.startswith(f"blk.{layer}.")}
        if any(part.startswith("ssm_") for part in parts):
            groups[_state(header)] += 1
        elif "attn_kv_a_mqa.weight" in parts:
            groups[_latent(header, heads[layer])] += 1
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
    return tuple(_repeated(group, count) for group, count in groups.items()), notes


def _repeated(group: AttentionLayers, layers: int) -> AttentionLayers:
    return AttentionLayers(**{name: getattr(group, name) for name in group.__struct_fields__} | {"layers": layers})


def _window_pattern(header: _Header, layers: int) -> Callable[[int], bool] | None:
    """Return whether a layer keeps a window only; None where neither file nor table says which layers do."""
    said = header.values.get(f"{header.architecture}.attention.sliding_window_pattern")
    if isinstance(said, list) and len(said) >= layers:
        return lambda layer: bool(said[layer])
    step = said if isinstance(said, int) and said > 0 else WINDOW_PATTERNS.get(header.architecture)
    return None if step is None else lambda layer: (layer + 1) % step != 0


def _latent(header: _Header, heads: int) -> AttentionLayers:
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
    )


def _state(header: _Header) -> AttentionLayers:
    """Return a state space or gated delta layer: a state for every inner channel, and a short convolution."""
    inner, state = header.count("ssm.inner_size"), header.count("ssm.state_size")
    groups, kernel = header.count("ssm.group_count", 1), header.count("ssm.conv_kernel")
    convolved = inner + 2 * groups * state
    return AttentionLayers(kind="state", layers=1, state_elements=inner * state + convolved * (kernel - 1))


def _feed_forward(header: _Header, layers: int) -> tuple[FeedForwardLayers, ...]:
    """Read the networks off their tensors: `ffn_down` is [intermediate, hidden], experts add a third dimension."""
    groups: Counter[tuple[int, int, int, int, int]] = Counter()
    per_token = (
        header.count("expert_used_count", 1) if f"{header.architecture}.expert_used_count" in header.values else 0
    )
    for layer in range(layers):
        shapes = {
            part: tensor.shape
            for part in ("down", "up", "gate", "down_exps", "gate_exps", "gate_up_exps", "down_shexp")
            if (tensor := header.tensors.get(f"blk.{layer}.ffn_{part}.weight"))
        }
        if "down_exps" in shapes and len(shapes["down_exps"]) == 3:
            intermediate, _, experts = shapes["down_exps"]
            gated = "gate_exps" in shapes or "gate_up_exps" in shapes
            shared = shapes["down_shexp"][0] if "down_shexp" in shapes else 0
            groups[intermediate, experts, min(per_token, experts) or experts, shared, 3 if gated else 2] += 1
        elif "down" in shapes:
            intermediate = shapes["down"][0]
            fused = "up" in shapes and shapes["up"][-1] == 2 * intermediate
            groups[intermediate, 0, 0, 0, 3 if "gate" in shapes or fused else 2] += 1
    return tuple(
        FeedForwardLayers(
            layers=count,
            intermediate=intermediate,
            experts=experts,
            experts_per_token=used,
            shared_intermediate=shared,
            matrices=matrices,
        )
        for (intermediate, experts, used, shared, matrices), count in groups.items()
    )
