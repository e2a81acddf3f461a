import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from waterline import catalog
from waterline.errors import ModelFormatError
from waterline.llm import PRECISIONS
from waterline.llm.gguf import TENSOR_TYPES, read_gguf

HIDDEN, LAYERS, VOCABULARY, INTERMEDIATE, EXPERTS = 64, 2, 100, 128, 4


def write(
    path: Path,
    architecture: str = "llama",
    *,
    quantised: gguf.GGMLQuantizationType | None = gguf.GGMLQuantizationType.Q8_0,
    experts: int = 0,
    window: int = 0,
    tied: bool = False,
    tokens: int = VOCABULARY,
    extra_layers: int = 0,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Small")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_context_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_token_list([f"token {index}" for index in range(tokens)])
    if extra_layers:
        writer.add_uint32(f"{architecture}.nextn_predict_layers", extra_layers)
    if window:
        writer.add_sliding_window(window)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)

    def add(name: str, *shape: int) -> None:  # outermost first, as numpy writes it
        weights = np.zeros(shape, dtype=np.float32)
        if quantised is None or len(shape) == 1:
            writer.add_tensor(name, weights)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weights, quantised), raw_dtype=quantised)

    add("token_embd.weight", VOCABULARY, HIDDEN)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm.weight", HIDDEN)
        add(f"{block}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"{block}.attn_k.weight", HIDDEN // 2, HIDDEN)
        add(f"{block}.attn_v.weight", HIDDEN // 2, HIDDEN)
        add(f"{block}.attn_output.weight", HIDDEN, HIDDEN)
        for part, shape in (
            ("gate", (INTERMEDIATE, HIDDEN)),
            ("up", (INTERMEDIATE, HIDDEN)),
            ("down", (HIDDEN, INTERMEDIATE)),
        ):
            if experts:
                add(f"{block}.ffn_{part}_exps.weight", experts, *shape)
            else:
                add(f"{block}.ffn_{part}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_written_file_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    llm = read_gguf(path := write(tmp_path / "small.gguf"))
    tensors = gguf.GGUFReader(path).tensors
    assert llm.parameters == sum(int(tensor.n_elements) for tensor in tensors)
    assert llm.stored_bytes == sum(int(tensor.n_bytes) for tensor in tensors)
    assert (llm.name, llm.architecture, llm.precision) == ("Small", "llama", "q8_0")
    assert (llm.hidden, llm.vocabulary, llm.max_context_tokens) == (HIDDEN, VOCABULARY, 512)
    (attention,), (network,) = llm.attention, llm.feed_forward
    assert (attention.kind, attention.layers, attention.query_heads, attention.kv_heads) == ("full", LAYERS, 4, 2)
    assert attention.head_dim == 16
    assert (network.layers, network.intermediate, network.matrices, network.experts) == (LAYERS, INTERMEDIATE, 3, 0)
    assert llm.active_parameters == llm.parameters
    assert llm.weights_file == str(path)


@pytest.mark.parametrize(
    ("quantised", "precision"),
    [(None, "fp32"), ("F16", "fp16"), ("BF16", "bf16"), ("Q8_0", "q8_0"), ("Q4_0", "q4_0"), ("Q5_1", "q5_1")],
)
def test_the_precision_is_that_of_most_weights(tmp_path: Path, quantised: str | None, precision: str) -> None:
    kind = None if quantised is None else gguf.GGMLQuantizationType[quantised]
    assert read_gguf(write(tmp_path / "small.gguf", quantised=kind)).precision == precision


def test_experts_that_rest_are_not_active(tmp_path: Path) -> None:
    llm = read_gguf(write(tmp_path / "small.gguf", "qwen3moe", experts=EXPERTS))
    assert llm.expert_parameters == LAYERS * EXPERTS * 3 * HIDDEN * INTERMEDIATE
    assert llm.parameters - llm.active_parameters == llm.expert_parameters // 2
    assert llm.feed_forward[0].experts_per_token == 2


def test_windows_are_placed_where_the_family_puts_them_and_mentioned_where_it_is_not_known(tmp_path: Path) -> None:
    gemma = read_gguf(write(tmp_path / "gemma.gguf", "gemma2", window=32, tied=True))
    assert [(group.kind, group.window_tokens) for group in gemma.attention] == [("window", 32), ("full", 0)]
    assert gemma.tied_embeddings
    other = read_gguf(write(tmp_path / "other.gguf", "llama", window=32))
    assert [group.kind for group in other.attention] == ["full"]
    assert "32 tokens" in other.notes["window"]


def test_the_shipped_model_agrees_with_the_reference_reader() -> None:
    path = catalog.weights_file("abacus")
    tensors = gguf.GGUFReader(path).tensors
    llm = read_gguf(path)
    assert llm.parameters == sum(int(tensor.n_elements) for tensor in tensors)
    assert llm.stored_bytes == sum(int(tensor.n_bytes) for tensor in tensors)


def test_storage_is_that_of_the_reference_implementation() -> None:
    for type_id, stored in TENSOR_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)] == (stored.block, stored.block_bytes)
        assert stored.precision in {"", *PRECISIONS}


# published files: parameters, format, size in bytes (gguf-parser dumps and the table of llama.cpp's quantize)
@pytest.mark.parametrize(
    ("parameters", "precision", "size_bytes"),
    [
        (8_030_261_248, "q8_0", 8_540_775_840),
        (671_026_419_200, "q8_0", 713_286_514_368),
        (8_030_261_248, "q4_k_m", 4.92e9),
        (8_030_261_248, "q6_k", 6.59e9),
        (6_738_415_616, "q4_0", 3.83e9),
    ],
)
def test_bits_give_the_size_of_published_files(parameters: int, precision: str, size_bytes: float) -> None:
    assert parameters * PRECISIONS[precision].bits / 8 == pytest.approx(size_bytes, rel=0.012)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("whole") / "small.gguf").read_bytes()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_cut_short_anywhere_is_refused_with_its_size(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    kept = data.draw(st.integers(0, 9000) | st.integers(0, len(whole) - gguf.GGUF_DEFAULT_ALIGNMENT))
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:kept])
    with pytest.raises(ModelFormatError, match=f"{kept:,}|is empty"):
        read_gguf(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_read_or_refused(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    at = data.draw(st.integers(0, 6000))
    damage = data.draw(st.binary(min_size=1, max_size=12))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(whole[:at] + damage + whole[at + len(damage) :])
    try:
        read_gguf(path)
    except ModelFormatError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"GG", r"needs 4 bytes at offset 0, the file has 2"),
        (b"PK\3\4 a zip archive", "is not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "cut short"),
    ],
)
def test_what_is_no_gguf_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=said):
        read_gguf(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="No such file"):
        read_gguf(tmp_path / "missing.gguf")
    with pytest.raises(ModelFormatError, match="directory"):
        read_gguf(tmp_path)


def split(whole: Path, stem: str, parts: int = 2) -> list[Path]:
    """Write the tensors of a file into parts, as llama-gguf-split does: the keys are in the first."""
    read = gguf.GGUFReader(whole)
    paths = []
    for part in range(parts):
        path = whole.with_name(f"{stem}-{part + 1:05}-of-{parts:05}.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", parts)
        if part == 0:
            for key in ("block_count", "embedding_length", "context_length"):
                writer.add_uint32(f"llama.{key}", int(read.fields[f"llama.{key}"].contents()))
            writer.add_head_count(4)
            writer.add_head_count_kv(2)
        for index, tensor in enumerate(read.tensors):
            if index % parts == part:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_a_model_in_parts_is_read_from_any_of_them(tmp_path: Path) -> None:
    whole = read_gguf(write(tmp_path / "whole.gguf"))
    parts = split(tmp_path / "whole.gguf", "small", parts=3)
    for part in parts:
        llm = read_gguf(part)
        assert (llm.parameters, llm.stored_bytes) == (whole.parameters, whole.stored_bytes)
        assert (llm.attention, llm.feed_forward) == (whole.attention, whole.feed_forward)
        assert llm.weights_file == str(parts[0])


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "whole.gguf")
    first, second = split(tmp_path / "whole.gguf", "small")
    second.unlink()
    with pytest.raises(ModelFormatError, match=r"one of 2 parts, and small-00002-of-00002\.gguf is not beside it"):
        read_gguf(first)
    nameless = first.rename(tmp_path / "part.gguf")
    with pytest.raises(ModelFormatError, match="one of 2 parts, and its name does not say which"):
        read_gguf(nameless)


def test_extra_layers_and_types_are_told_apart(tmp_path: Path) -> None:
    plain = read_gguf(write(tmp_path / "small.gguf"))
    more = read_gguf(write(tmp_path / "more.gguf", extra_layers=1))
    one_layer = more.mtp_parameters
    assert (more.mtp_layers, more.layers) == (1, LAYERS - 1)
    assert more.parameters + one_layer == plain.parameters
    assert more.stored_bytes < plain.stored_bytes == sum(more.stored_types.values())
    assert set(more.stored_types) == {"q8_0", "f32"}


@pytest.mark.parametrize(
    ("keys", "tensors", "said"),
    [
        (2**40, 1, "cut short"),
        (1, 2**40, "claims 1 keys and 1,099,511,627,776 tensors"),
        (0, 2**62, "claims|cut short"),
    ],
)
def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path, keys: int, tensors: int, said: str) -> None:
    path = tmp_path / "huge.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + bytes(1000))
    with pytest.raises(ModelFormatError, match=said):
        read_gguf(path)
