import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from waterline.errors import ModelFormatError
from waterline.llm.config import read_config
from waterline.llm.safetensors import DTYPE_BITS, INDEX, read_checkpoint

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "self_attn.q_proj.weight": (64, 64),
    "self_attn.k_proj.weight": (32, 64),
    "self_attn.v_proj.weight": (32, 64),
    "self_attn.o_proj.weight": (64, 64),
    "mlp.gate_proj.weight": (128, 64),
    "mlp.up_proj.weight": (128, 64),
    "mlp.down_proj.weight": (64, 128),
    "input_layernorm.weight": (64,),
    "post_attention_layernorm.weight": (64,),
}
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def tensors(layers: int = 2) -> Tensors:
    found: Tensors = {
        "model.embed_tokens.weight": ("BF16", (100, 64)),
        "lm_head.weight": ("BF16", (100, 64)),
        "model.norm.weight": ("BF16", (64,)),
    }
    for layer in range(layers):
        found |= {f"model.layers.{layer}.{name}": ("BF16", shape) for name, shape in SHAPES.items()}
    return found


def file_of(held: Tensors) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in held.items():
        size = prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def checkpoint(folder: Path, held: Tensors, config: dict[str, Any] = CONFIG, parts: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if parts == 1:
        (folder / "model.safetensors").write_bytes(file_of(held))
        return folder
    placed: dict[str, str] = {}
    for part in range(parts):
        own = {name: tensor for index, (name, tensor) in enumerate(held.items()) if index % parts == part}
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        (folder / file).write_bytes(file_of(own))
        placed |= dict.fromkeys(own, file)
    total = sum(prod(shape) * DTYPE_BITS[dtype] // 8 for dtype, shape in held.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": placed}))
    return folder


@pytest.mark.parametrize("parts", [1, 3])
def test_a_checkpoint_is_counted_tensor_by_tensor(tmp_path: Path, parts: int) -> None:
    llm = read_checkpoint(checkpoint(tmp_path, tensors(), parts=parts), "small")
    assert llm.parameters == read_config(CONFIG, "small").parameters
    assert llm.stored_bytes == 2 * llm.parameters
    assert llm.stored_types == {"bf16": 2 * llm.parameters}
    assert llm.active_parameters == llm.parameters


def test_index_and_single_files_mean_the_whole_model(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, tensors(), parts=2)
    whole = read_checkpoint(folder, "small")
    assert read_checkpoint(folder / INDEX, "small") == whole
    assert read_checkpoint(folder / "model-00002-of-00002.safetensors", "small") == whole
    assert read_checkpoint(folder / "config.json", "small").stored_bytes == 0


def test_the_index_alone_gives_the_bytes(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, tensors(), parts=2)
    whole = read_checkpoint(folder, "small")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    alone = read_checkpoint(folder / INDEX, "small")
    assert (alone.stored_bytes, alone.parameters) == (whole.stored_bytes, whole.parameters)
    assert "the files were not read" in alone.notes["stored_bytes"]


def test_a_tied_head_that_is_stored_again_counts_once(tmp_path: Path) -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    llm = read_checkpoint(checkpoint(tmp_path, tensors(), config), "small")
    assert llm.parameters == read_config(config, "small").parameters
    assert llm.stored_bytes == 2 * llm.parameters


def test_towers_and_extra_layers_are_counted_apart(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "mimo", "num_nextn_predict_layers": 1}
    held = tensors() | {"visual.blocks.0.attn.qkv.weight": ("BF16", (30, 10)), "model.mtp.fc.weight": ("BF16", (7, 9))}
    held |= {
        f"model.layers.{layer}.self_attn.{name}_proj.bias": ("BF16", (size,))
        for layer in (0, 1)
        for name, size in (("q", 64), ("k", 32), ("v", 32))
    }
    held |= {f"model.layers.2.{name}": ("BF16", shape) for name, shape in SHAPES.items()}
    llm = read_checkpoint(checkpoint(tmp_path, held, config), "small")
    assert llm.parameters == read_config(config, "small").parameters
    assert llm.vision_parameters == 300
    assert llm.mtp_parameters == 63 + sum(prod(shape) for shape in SHAPES.values())
    assert llm.stored_bytes == 2 * (llm.parameters + 300)


PACKED_4_BIT: dict[str, tuple[dict[str, Any], dict[str, tuple[str, int]]]] = {
    # quantisation, and what a matrix becomes: suffix -> dtype and how many weights share one number
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 64}, {"qweight": ("I32", 8), "scales": ("F16", 64)}),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64}, {"qweight": ("I32", 8), "qzeros": ("I32", 512)}),
    "nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"weight": ("U8", 2), "weight_scale": ("F8_E4M3", 16), "weight_scale_2": ("F32", 4096)},
    ),
    "nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"weight": ("U8", 2), "weight.absmax": ("F32", 64), "weight.quant_state.bitsandbytes__nf4": ("U8", 64)},
    ),
    "fp8_block": (
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"weight": ("F8_E4M3", 1), "weight_scale_inv": ("F32", 2048)},
    ),
    "mxfp4": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"format": "mxfp4-pack-quantized", "weights": {"num_bits": 4, "type": "float"}}},
        },
        {"weight_packed": ("U8", 2), "weight_scale": ("U8", 32)},
    ),
}


@pytest.mark.parametrize("scheme", PACKED_4_BIT)
def test_packed_weights_are_counted_one_by_one_and_scales_not_at_all(tmp_path: Path, scheme: str) -> None:
    quantisation, becomes = PACKED_4_BIT[scheme]
    held: Tensors = {}
    for name, (dtype, shape) in tensors().items():
        if "_proj" not in name:
            held[name] = (dtype, shape)
            continue
        for suffix, (stored, shared) in becomes.items():
            held[name.removesuffix("weight") + suffix] = (stored, (prod(shape) // shared,))
    config = {**CONFIG, "quantization_config": quantisation}
    llm = read_checkpoint(checkpoint(tmp_path, held, config), "small")
    assert llm.parameters == read_config(config, "small").parameters
    assert llm.stored_bytes == sum(prod(shape) * DTYPE_BITS[dtype] // 8 for dtype, shape in held.values())


def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"describes 86,848 parameters, the safetensors files hold 49,856 \(-42"):
        read_checkpoint(checkpoint(tmp_path, tensors(layers=1)), "small")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, tensors(), parts=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    for given_path in (folder, folder / INDEX, folder / "model-00001-of-00003.safetensors"):
        with pytest.raises(ModelFormatError, match=r"model-00002-of-00003\.safetensors"):
            read_checkpoint(given_path, "small")
    (folder / INDEX).unlink()
    with pytest.raises(ModelFormatError, match="holds 2 of 3 files"):
        read_checkpoint(folder, "small")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "has no 'weight_map'"),
        ({"weight_map": []}, "has no 'weight_map'"),
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "has no 'weight_map'"),
        ({"weight_map": {"a": "model-1.safetensors"}}, r"names model-1\.safetensors, which is not in the folder"),
        ({"weight_map": {"a": "m.safetensors"}, "metadata": {"total_size": -5}}, "total_size = -5"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(ModelFormatError, match=said):
        read_checkpoint(tmp_path, "small")


def header(**tensor: object) -> bytes:
    text = json.dumps({"w": tensor}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it has 0 bytes"),
        (struct.pack("<Q", 2**40), "not a safetensors file: its header would have 1,099,511,627,776 bytes"),
        (struct.pack("<Q", 5000) + b"{}", "its header needs 5,000 bytes, the file has 10"),
        (struct.pack("<Q", 4) + b"oops", "not valid JSON"),
        (struct.pack("<Q", 2) + b"[]", "holds a JSON list"),
        (struct.pack("<Q", 7) + b'{"w":1}', "tensor 'w' is no object"),
        (header(dtype="F2", shape=[4], data_offsets=[0, 8]), "dtype 'F2', which is not known"),
        (header(dtype="F16", shape=[-4], data_offsets=[0, 8]), "must be lists of counts"),
        (header(dtype="F16", shape=[3], data_offsets=[0, 8]), "needs 6 bytes, its place has 8"),
        (header(dtype="F16", shape=[400], data_offsets=[0, 800]), "ends at byte 800 of the data, the file has 8"),
        (header(dtype="F16", shape=[4], data_offsets=[0]), "must be lists of counts"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFormatError, match=said):
        read_checkpoint(tmp_path, "small")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 4000), damage=st.binary(min_size=1, max_size=12), cut=st.booleans())
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, at: int, damage: bytes, cut: bool) -> None:
    whole = file_of(tensors())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    broken = whole[:at] if cut else whole[:at] + damage + whole[at + len(damage) :]
    (tmp_path / "model.safetensors").write_bytes(broken)
    try:
        read_checkpoint(tmp_path, "small")
    except ModelFormatError as error:
        assert str(tmp_path) in str(error)
    else:
        assert not cut
