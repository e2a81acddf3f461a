"""The header of a GGUF file: llama.cpp's format, with every tensor's shape, type and place.

Tensor data is never touched, only checked to be there. A model may be split into several files, of which the first
holds the keys and each names its own tensors. The layout follows `docs/gguf.md` of ggml; versions 2 and 3,
little-endian.
"""

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from waterline.errors import ModelFormatError

__all__ = ["TENSOR_TYPES", "Header", "Tensor", "TensorType", "read_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MOST_KEYS, MOST_TENSORS = 100_000, 1_000_000  # far beyond any model; more is damage
MOST_TEXT_BYTES, MOST_TEXTS = 64 * 2**20, 20_000_000
KEPT_ARRAY = 10_000  # numbers a layer are kept; token lists are longer and skipped
MOST_DIMENSIONS = 4
MOST_PARTS = 1000
DEFAULT_ALIGNMENT = 32
AGAIN = "Copy or download it again."


@dataclass(frozen=True, slots=True)
class TensorType:
    """How ggml stores a tensor: `block_bytes` for every `block` elements."""

    name: str  # as ggml calls it
    precision: str  # a key of PRECISIONS; "" for types that hold no weights
    block: int
    block_bytes: int


TENSOR_TYPES: Mapping[int, TensorType] = {
    0: TensorType("f32", "fp32", 1, 4),
    1: TensorType("f16", "fp16", 1, 2),
    2: TensorType("q4_0", "q4_0", 32, 18),
    3: TensorType("q4_1", "q4_1", 32, 20),
    6: TensorType("q5_0", "q5_0", 32, 22),
    7: TensorType("q5_1", "q5_1", 32, 24),
    8: TensorType("q8_0", "q8_0", 32, 34),
    10: TensorType("q2_k", "q2_k", 256, 84),
    11: TensorType("q3_k", "q3_k_m", 256, 110),
    12: TensorType("q4_k", "q4_k_m", 256, 144),
    13: TensorType("q5_k", "q5_k_m", 256, 176),
    14: TensorType("q6_k", "q6_k", 256, 210),
    16: TensorType("iq2_xxs", "iq2_xxs", 256, 66),
    17: TensorType("iq2_xs", "iq2_xs", 256, 74),
    18: TensorType("iq3_xxs", "iq3_xxs", 256, 98),
    19: TensorType("iq1_s", "iq1_s", 256, 50),
    20: TensorType("iq4_nl", "iq4_nl", 32, 18),
    21: TensorType("iq3_s", "iq3_s", 256, 110),
    22: TensorType("iq2_s", "iq2_s", 256, 82),
    23: TensorType("iq4_xs", "iq4_xs", 256, 136),
    24: TensorType("i8", "", 1, 1),
    25: TensorType("i16", "", 1, 2),
    26: TensorType("i32", "", 1, 4),
    27: TensorType("i64", "", 1, 8),
    28: TensorType("f64", "", 1, 8),
    29: TensorType("iq1_m", "iq1_m", 256, 56),
    30: TensorType("bf16", "bf16", 1, 2),
    34: TensorType("tq1_0", "tq1_0", 256, 54),
    35: TensorType("tq2_0", "tq2_0", 256, 66),
    39: TensorType("mxfp4", "mxfp4", 32, 17),
    40: TensorType("nvfp4", "nvfp4", 64, 36),
}
"""`ggml_type` -> its storage, from ggml. A k-quant that `general.file_type` does not name is taken as its `_m` mix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # innermost first, as ggml writes it
    type_id: int
    size_bytes: int

    @property
    def parameters(self) -> int:
        return prod(self.shape)


@dataclass(slots=True, kw_only=True)
class Header:
    path: Path
    values: dict[str, object] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        value = self.values.get("general.architecture")
        if not isinstance(value, str):
            raise ModelFormatError(f"{self.path} has no text 'general.architecture'. {AGAIN}")
        return value

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Return an integer of the architecture's own keys, positive unless `least` is 0."""
        if not least and self.values.get(f"{self.architecture}.{key}", default) == 0:
            return 0
        return self.per_layer(key, 1, default)[0]

    def per_layer(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """Return one integer a layer; a single one in the file holds for all."""
        full = f"{self.architecture}.{key}"
        value = self.values.get(full, default)
        if value is None:
            raise ModelFormatError(
                f"{self.path} has no '{full}', which its layers are read with. Use the model's folder with "
                "config.json, or download the file again."
            )
        if isinstance(value, list) and layers > 1:
            numbers, least = value, 0
            if len(numbers) < layers:
                raise ModelFormatError(f"{self.path}: '{full}' has {len(numbers)} numbers for {layers} layers.")
        else:
            numbers, least = [max(value) if isinstance(value, list) and value else value] * layers, 1
        if not all(isinstance(number, int) and least <= number < 2**40 for number in numbers):
            raise ModelFormatError(f"{self.path}: '{full}' = {value!r:.60}, which must be a positive integer.")
        return numbers[:layers]


PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<parts>\d{5})\.gguf")


def read_header(path: Path) -> Header:
    """Return the header of a file, or of all parts of a model that is split: any of them may be given.

    Raises:
        ModelFormatError: not a GGUF file, of a version that is not known, cut short, or a part is missing.
    """
    named = PART.fullmatch(path.name)
    if named is None or int(named["parts"]) < 2:
        header = _one_file(path)
        parts = header.values.get("split.count")
        if isinstance(parts, int) and parts > 1:
            raise ModelFormatError(
                f"{path} is one of {parts} parts, and its name does not say which: parts end in "
                f"-00001-of-{parts:05}.gguf. Give them their names back, or join them: llama-gguf-split --merge."
            )
        return header
    parts = int(named["parts"])
    if parts > MOST_PARTS:
        raise ModelFormatError(f"{path} says it is one of {parts} parts; at most {MOST_PARTS} are read. {AGAIN}")
    paths = [path.with_name(f"{named['stem']}-{number:05}-of-{parts:05}.gguf") for number in range(1, parts + 1)]
    missing = [one.name for one in paths if not one.is_file()]
    if missing and path.is_file():
        raise ModelFormatError(
            f"{path} is one of {parts} parts, and {missing[0]} is not beside it. Download all parts."
        )
    header = _one_file(paths[0] if not missing else path)
    for other in paths[1:]:
        header.tensors.update(_one_file(other).tensors)
    return header


def _one_file(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                raise ModelFormatError(f"{path} is empty. {AGAIN}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).header()
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror or error}.") from error


class _Reader:
    """The bytes of a header, read front to back; what is cut short is said with its offset."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size, self._at = path, data, size, 0

    def header(self) -> Header:
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
        header = Header(path=self._path)
        if self._size - self._at >= keys * 13 and (keys > MOST_KEYS or tensors > MOST_TENSORS):
            raise ModelFormatError(
                f"{self._path} claims {keys:,} keys and {tensors:,} tensors, at most {MOST_KEYS:,} and "
                f"{MOST_TENSORS:,} are read. {AGAIN}"
            )
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
            length = self._number("Q")
            self._expect(length, "a text")
            if length > MOST_TEXT_BYTES:
                raise ModelFormatError(f"{self._path} has a text of {length:,} bytes at offset {at:,}. {AGAIN}")
            return self._take(length).decode()
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
        if count > MOST_TEXTS:
            raise ModelFormatError(f"{self._path} has a list of {count:,} texts at offset {self._at:,}. {AGAIN}")
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

    def _tensor(self) -> tuple[Tensor, int]:
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
        tensor = Tensor(name=name, shape=shape, type_id=type_id, size_bytes=0)
        if shape and shape[0] % stored.block:
            raise ModelFormatError(
                f"{self._path}: rows of tensor '{name}' have {shape[0]} elements, not a multiple of "
                f"{stored.block}. {AGAIN}"
            )
        size = tensor.parameters // stored.block * stored.block_bytes
        return Tensor(name=name, shape=shape, type_id=type_id, size_bytes=size), offset
