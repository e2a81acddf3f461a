"""The weights of a Hugging Face checkpoint, from the headers of its safetensors files: exact counts and bytes.

Each file begins with the length of its header (8 bytes, little-endian) and the header, a JSON object that names every
tensor with type, shape and place. `model.safetensors.index.json` says in which file each tensor is. Tensor data is
never touched, only checked to be there. The layout is that of https://github.com/huggingface/safetensors.

What the headers hold is compared with what the config describes: a difference of more than 1 % means that one of the
two is not what it seems.
"""

import json
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, TypeGuard

from msgspec import structs

from waterline.errors import ModelFormatError
from waterline.llm import PRECISIONS, Llm
from waterline.llm.config import read_config, read_json

__all__ = ["INDEX", "read_checkpoint", "with_index"]

INDEX = "model.safetensors.index.json"
LARGEST_HEADER_BYTES = 100_000_000  # the format's own limit
DISAGREEMENT = 0.01
AGAIN = "Copy or download it again."

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F4_E2M1": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
PACKED = ("U8", "I8", "I32", "U32")  # several weights may share one number

BESIDE = re.compile(
    r".*([._](scale|scale_inv|scale_2|scales|zero_point|qzeros|g_idx|shape|absmax|quant_map|nested_absmax|global_scale|"
    r"nested_quant_map|weight_format)|\.SCB|\.quant_state\..*)"
)
"""What is kept beside quantised weights: scales, zero points, orders."""
NO_WEIGHTS = re.compile(r".*(\.e_score_correction_bias|rotary_emb\.inv_freq|\.tid2eid|\.position_ids)")
"""Buffers that published counts leave out."""
VISION = re.compile(
    r"(model\.)?(visual|vision_tower|vision_model|vision_embed_tokens|embed_vision|multi_modal_projector|mm_projector|"
    r"vit_large_projector|vit_downsampler\d|vision_encoder|image_newline|audio_tower|embed_audio)\b.*"
)
MORE_TOKENS = re.compile(r"(model\.)?(mtp|mtp_layers|mtp_block)\b.*")
LAYER = re.compile(r"(?:model\.|language_model\.|backbone\.|text_model\.)*layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


def read_checkpoint(path: Path, name: str) -> Llm:
    """Read the model in a folder of a checkpoint, in its index, in one of its files, or in a `config.json` alone.

    Counts and bytes are those of the tensors where the files are there; with the index alone its total bytes are taken;
    with nothing but the config everything is computed. Layers always come from the config.

    Raises:
        ModelFormatError: no config, a file that is missing, cut short or not in the format, a type that is not known,
            or weights that are not those the config describes; names the file and the tensor.
    """
    folder = path if path.is_dir() else path.parent
    described = read_config(path if path.suffix == ".json" and path.name != INDEX else folder, name)
    if path.suffix == ".json" and path.name != INDEX:
        return described
    index = path if path.name == INDEX else folder / INDEX
    if path.suffix == ".safetensors":
        files = [path]
        if index.is_file() and path.name in _indexed(index)[0]:
            files = [folder / file for file in _indexed(index)[0]]
    elif index.is_file():
        listed, total_bytes = _indexed(index)
        files = [folder / file for file in listed]
        if path.name == INDEX and total_bytes and not any(file.is_file() for file in files):
            return with_index(described, read_json(index), str(index))
        _all_there(index, files)
    else:
        files = _weights_of(folder)
    return (
        _with_tensors(described, [tensor for file in files for tensor in _header(file)], folder) if files else described
    )


def _indexed(index: Path) -> tuple[list[str], int]:
    return _content(read_json(index), str(index))


def _content(values: Mapping[str, object], index: str) -> tuple[list[str], int]:
    """Return the files an index names and the bytes it says they hold together."""
    weights = values.get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(_is_file_name(file) for file in weights.values()):
        raise ModelFormatError(f"{index} has no 'weight_map' that names a .safetensors file for each tensor. {AGAIN}")
    metadata = values.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and (isinstance(total, bool) or not isinstance(total, int | float) or not 0 < total < 2**60):
        raise ModelFormatError(
            f"{index}: metadata.total_size = {total!r:.60}, which must be a number of bytes. {AGAIN}"
        )
    return sorted(set(weights.values())), int(total or 0)


def _is_file_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and value.endswith(".safetensors") and "/" not in value and "\\" not in value


def _all_there(index: Path, files: Iterable[Path]) -> None:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelFormatError(
            f"{index} names {missing[0]}{others}, which is not in the folder. Download what is missing, or give the "
            "config.json itself to describe the model without its weights."
        )


NUMBERED = re.compile(r".*-(\d{5})-of-(\d{5})\.safetensors")


def _weights_of(folder: Path) -> list[Path]:
    """Return the files of a folder without an index: one, or numbered ones that must all be there."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("consolidated*.safetensors"))
    for file in files:
        numbered = NUMBERED.fullmatch(file.name)
        if numbered is not None and int(numbered[2]) != len(files):
            raise ModelFormatError(
                f"{folder} holds {len(files)} of {int(numbered[2])} files like {file.name}. Download what is missing."
            )
    return files


def with_index(llm: Llm, index: Mapping[str, object] | None, where: str) -> Llm:
    """Return a model with the bytes its index states, less the share of extra layers, which no engine has to load.

    Raises:
        ModelFormatError: the content is not that of an index.
    """
    total_bytes = _content(index, where)[1] if index is not None else 0
    if not total_bytes:
        return llm
    everything = llm.parameters + llm.vision_parameters + llm.mtp_parameters
    own_bytes = round(total_bytes * (1 - llm.mtp_parameters / everything))
    note = f"{total_bytes:,} as {where} says; the files were not read, so layers and counts are the config's"
    return structs.replace(llm, stored_bytes=own_bytes, notes={**llm.notes, "stored_bytes": note})


# --- one file ---------------------------------------------------------------------------------------------------------


def _header(path: Path) -> list[_Tensor]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            begin = file.read(8)
            if len(begin) < 8:
                raise ModelFormatError(f"{path} is cut short: it has {size} bytes, a header begins with 8. {AGAIN}")
            (length,) = struct.unpack("<Q", begin)
            if length > LARGEST_HEADER_BYTES:
                raise ModelFormatError(
                    f"{path} is not a safetensors file: its header would have {length:,} bytes, at most "
                    f"{LARGEST_HEADER_BYTES:,} are allowed."
                )
            if length > size - 8:
                raise ModelFormatError(
                    f"{path} is cut short: its header needs {length:,} bytes, the file has {size:,}. {AGAIN}"
                )
            values = json.loads(file.read(length))
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} has a header that is not valid JSON: {error}. {AGAIN}") from error
    if not isinstance(values, dict):
        raise ModelFormatError(f"{path} has a header that holds a JSON {type(values).__name__}, not an object. {AGAIN}")
    return [_tensor(path, key, value, size - 8 - length) for key, value in values.items() if key != "__metadata__"]


def _tensor(path: Path, name: str, value: object, data_bytes: int) -> _Tensor:
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: tensor '{name:.80}' is no object with dtype, shape and data_offsets. {AGAIN}")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ModelFormatError(
            f"{path}: tensor '{name:.80}' is of dtype {dtype!r:.40}, which is not known ({', '.join(DTYPE_BITS)})."
        )
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ModelFormatError(
            f"{path}: tensor '{name:.80}' has shape {shape!r:.60} and data_offsets {offsets!r:.60}, which must be "
            f"lists of counts. {AGAIN}"
        )
    begin, end = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if (end - begin) * 8 != bits:
        raise ModelFormatError(
            f"{path}: tensor '{name:.80}' of shape {shape!r:.60} and dtype {dtype} needs {bits // 8:,} bytes, its "
            f"place has {end - begin:,}. {AGAIN}"
        )
    if end > data_bytes:
        raise ModelFormatError(
            f"{path} is cut short: tensor '{name:.80}' ends at byte {end:,} of the data, the file has {data_bytes:,}. "
            f"{AGAIN}"
        )
    return _Tensor(name, dtype, tuple(shape), end - begin)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**60 for item in value
    )


# --- all tensors together ---------------------------------------------------------------------------------------------


def _with_tensors(llm: Llm, tensors: list[_Tensor], folder: Path) -> Llm:
    counted: Counter[str] = Counter()
    loaded: Counter[str] = Counter()
    in_files: Counter[str] = Counter()
    stack, packed_bits = _stack(llm), _packed_bits(llm)
    for tensor in tensors:
        in_files[tensor.dtype.lower()] += tensor.size_bytes
        if llm.tied_embeddings and tensor.name.endswith("lm_head.weight"):
            continue  # a copy of the embedding, which no engine loads twice
        owner = _owner(tensor.name, stack)
        loaded[owner] += tensor.size_bytes
        counted[owner] += _weights_in(tensor, packed_bits, quantised=bool(llm.stored_forms))
    parameters = counted["language"]
    if abs(parameters / llm.parameters - 1) > DISAGREEMENT:
        raise ModelFormatError(
            f"{folder}: config.json describes {llm.parameters:,} parameters, the safetensors files hold {parameters:,} "
            f"({parameters / llm.parameters - 1:+.1%}). Give a folder whose config belongs to its weights."
        )
    return structs.replace(
        llm,
        parameters=parameters,
        active_parameters=min(parameters, llm.active_parameters + parameters - llm.parameters),
        vision_parameters=counted["vision"],
        mtp_layers=max(1, llm.mtp_layers) if counted["mtp"] else 0,
        mtp_parameters=counted["mtp"],
        stored_bytes=loaded["language"] + loaded["vision"],
        stored_types=dict(in_files.most_common()),
        source=str(folder),
        notes={key: text for key, text in llm.notes.items() if key not in {"vision", "mtp"}},
    )


def _stack(llm: Llm) -> int:
    """Return the number of the first layer that is no longer the model's own, where such layers follow its own."""
    networks = sum(group.layers for group in llm.feed_forward)
    return llm.layers if networks == llm.layers else sys.maxsize


def _owner(name: str, stack: int) -> Literal["language", "vision", "mtp"]:
    if VISION.match(name):
        return "vision"
    layer = LAYER.match(name)
    if MORE_TOKENS.match(name) or (layer is not None and int(layer[1]) >= stack):
        return "mtp"
    return "language"


def _packed_bits(llm: Llm) -> int:
    """Return the bits a weight takes where several share one integer; 0 where nothing is packed."""
    forms = {PRECISIONS[form].bits for form in llm.stored_forms.values() if form in PRECISIONS}
    return min((4 if bits < 8 else 8 for bits in forms if bits < 16), default=0)


def _weights_in(tensor: _Tensor, packed_bits: int, *, quantised: bool) -> int:
    """Return how many weights a tensor holds: none in scales, several in one integer where they are packed."""
    if NO_WEIGHTS.fullmatch(tensor.name) or (quantised and BESIDE.fullmatch(tensor.name)):
        return 0
    if packed_bits and tensor.dtype in PACKED:
        return tensor.elements * DTYPE_BITS[tensor.dtype] // packed_bits
    return tensor.elements
