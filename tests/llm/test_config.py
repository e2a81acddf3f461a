import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.errors import ModelFormatError
from waterline.llm import PRECISIONS
from waterline.llm.config import FAMILIES, read_config

LLAMA: dict[str, Any] = {
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
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def test_a_small_llama_is_counted_weight_by_weight() -> None:
    embedding = 2 * 100 * 64
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 64  # queries, keys and values, output, norm
    feed_forward = 3 * 64 * 128 + 64
    llm = read_config(LLAMA, "small")
    assert llm.parameters == llm.active_parameters == embedding + 2 * (attention + feed_forward) + 64
    assert (llm.layers, llm.attention[0].head_dim, llm.precision) == (2, 16, "bf16")


def test_tying_saves_one_embedding() -> None:
    tied = read_config({**LLAMA, "tie_word_embeddings": True}, "small")
    assert read_config(LLAMA, "small").parameters - tied.parameters == 100 * 64


def test_only_the_chosen_experts_are_active() -> None:
    llm = read_config(MIXTRAL, "small")
    assert llm.parameters - llm.active_parameters == 2 * (4 - 2) * 3 * 64 * 128
    assert llm.expert_parameters == 2 * 4 * 3 * 64 * 128


def test_a_window_of_some_layers_is_a_group_of_its_own() -> None:
    config = {**LLAMA, "model_type": "qwen3", "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}
    groups = read_config(config, "small").attention
    assert [(group.kind, group.layers, group.window_tokens) for group in groups] == [("full", 1, 0), ("window", 1, 32)]


def test_the_language_model_of_a_vision_model_is_read_and_the_tower_mentioned() -> None:
    config = {"model_type": "mistral3", "text_config": {**LLAMA, "model_type": "mistral"}, "vision_config": {}}
    llm = read_config(config, "seeing")
    assert llm.architecture == "mistral"
    assert llm.notes["vision"] == "the vision tower is not counted"


@pytest.mark.parametrize(
    ("quantisation", "precision"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fbgemm_fp8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, "nvfp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}},
            "int4",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "fp8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}},
            },
            "nvfp4",
        ),
    ],
)
def test_the_quantisation_gives_the_precision(quantisation: dict[str, object], precision: str) -> None:
    assert read_config({**LLAMA, "quantization_config": quantisation}, "small").precision == precision
    assert precision in PRECISIONS


@pytest.mark.parametrize(
    ("quantisation", "said"),
    [
        ({"quant_method": "hqq"}, r'quantization_config\.quant_method = "hqq"'),
        ({}, r"no field 'quantization_config\.quant_method'"),
        ({"quant_method": "awq", "bits": 3}, r"quantization_config\.bits = 3"),
        ({"quant_method": "modelopt", "quant_algo": "W2"}, r'quant_algo = "W2"'),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "found none"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 2, "type": "int"}}}},
            r"config_groups\.g\.weights\.num_bits = 2",
        ),
        ("fp8", 'quantization_config = "fp8", which must be an object'),
    ],
)
def test_an_unknown_quantisation_is_refused_by_name(quantisation: object, said: str) -> None:
    with pytest.raises(ModelFormatError, match=said):
        read_config({**LLAMA, "quantization_config": quantisation}, "small")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "foo"}, 'model_type = "foo" is a family that is not known'),
        ({"model_type": None}, "no field 'model_type'"),
        ({"model_type": 7}, "model_type = 7, which must be a text"),
        ({"hidden_size": None}, "no field 'hidden_size', which must be an integer"),
        ({"hidden_size": "64"}, 'hidden_size = "64", which must be an integer'),
        ({"hidden_size": True}, "hidden_size = true"),
        ({"hidden_size": 64.0}, r"hidden_size = 64\.0"),
        ({"hidden_size": -64}, "hidden_size = -64"),
        ({"hidden_size": 66}, "num_attention_heads = 4, which must be a divisor of hidden_size = 66"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3, which must be a divisor of num_attention_heads = 4"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"vocab_size": None}, "vocab_size"),
        ({"torch_dtype": "int2"}, 'torch_dtype = "int2"'),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings = "yes", which must be true or false'),
        ({"layer_types": ["full_attention"]}, "layer_types = .* a list of 2 names"),
        ({"layer_types": ["full_attention", "magic"]}, 'layer_types holds "magic"'),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "no field 'sliding_window'"),
        ({"text_config": {"model_type": "llama"}}, 'model_type = "llama" is a family that is not known'),
        ({"model_type": "gemma3", "text_config": 3}, "text_config = 3, which must be an object"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mamba"}}, r'text_config\.model_type = "mamba"'),
    ],
)
def test_a_bad_field_is_named_with_its_value(change: dict[str, object], said: str) -> None:
    with pytest.raises(ModelFormatError, match=said):
        read_config({**LLAMA, **change}, "bad")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b"{}", "no field 'model_type'"),
    ],
)
def test_what_is_no_config_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFormatError, match=said) as caught:
        read_config(tmp_path, "bad")
    assert str(tmp_path / "config.json") in str(caught.value)


def test_folder_and_file_are_both_taken_and_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_config(tmp_path, "small").parameters == read_config(tmp_path / "config.json", "small").parameters
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert read_config(tmp_path, "small").precision == "fp8"
    with pytest.raises(ModelFormatError, match="cannot be read"):
        read_config(tmp_path / "missing", "small")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFormatError, match=r"has no config\.json"):
        read_config(tmp_path / "empty", "small")


# --- forms ------------------------------------------------------------------------------------------------------------

GROUPS_OF_32 = {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True}


@pytest.mark.parametrize(
    ("quantisation", "form"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "fp8_block"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "g": {
                        "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
                    }
                },
            },
            "fp8_block",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
            },
            "fp8",
        ),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}, "fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "int4"),
    ],
)
def test_fp8_with_scales_for_blocks_is_told_from_fp8_with_one(quantisation: dict[str, object], form: str) -> None:
    llm = read_config({**LLAMA, "quantization_config": quantisation}, "small")
    assert llm.form == form
    assert llm.stored_forms == {"embedding": "bf16", "head": "bf16", "attention": form, "dense": form}


def test_what_is_left_out_of_a_quantisation_stays_in_16_bits() -> None:
    quantisation = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    llm = read_config({**MIXTRAL, "quantization_config": quantisation}, "mixed")
    assert llm.precision == "mxfp4"
    assert (llm.stored_forms["attention"], llm.stored_forms["experts"]) == ("bf16", "mxfp4")
    others = llm.parameters - llm.expert_parameters
    assert llm.stored_bytes == pytest.approx(llm.expert_parameters * 4.25 / 8 + others * 2, rel=1e-2)
    assert "mixed, mostly mxfp4" in llm.notes["precision"]


@pytest.mark.parametrize(
    ("ignored", "attention"),
    [
        (["lm_head"], "int4"),
        (["re:.*self_attn.*"], "bf16"),
        (["self_attn"], "bf16"),
        (["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"], "bf16"),
    ],
)
def test_names_patterns_and_expressions_leave_modules_out(ignored: list[str], attention: str) -> None:
    quantisation = {
        "quant_method": "compressed-tensors",
        "ignore": ignored,
        "config_groups": {"g": {"targets": ["Linear"], "weights": GROUPS_OF_32}},
    }
    assert read_config({**LLAMA, "quantization_config": quantisation}, "small").stored_forms["attention"] == attention


def test_groups_of_modules_may_have_forms_of_their_own() -> None:
    quantisation = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "a": {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 8, "type": "float"}},
            "b": {"targets": ["Linear"], "weights": GROUPS_OF_32},
        },
    }
    llm = read_config({**LLAMA, "quantization_config": quantisation}, "mixed")
    assert (llm.stored_forms["attention"], llm.stored_forms["dense"], llm.precision) == ("fp8", "int4", "int4")
    by_name = {
        f"model.layers.{layer}.{part}": {"quant_algo": algorithm}
        for layer in (0, 1)
        for part, algorithm in (("self_attn.q_proj", "FP8"), ("mlp.gate_proj", "NVFP4"))
    }
    listed = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": by_name}
    llm = read_config({**LLAMA, "quantization_config": listed}, "mixed")
    assert (llm.stored_forms["attention"], llm.stored_forms["dense"], llm.precision) == ("fp8", "nvfp4", "nvfp4")


def test_a_smaller_group_needs_more_bytes() -> None:
    def stored(size: int) -> int:
        quantisation = {"quant_method": "gptq", "bits": 4, "group_size": size}
        return read_config({**LLAMA, "quantization_config": quantisation}, "small").stored_bytes

    assert stored(16) > stored(32) > 0


@pytest.mark.parametrize(
    ("quantisation", "said"),
    [
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "ignored_layers": ["re:("]}, "made of names and valid expressions"),
        ({"quant_method": "fp8", "ignored_layers": [3]}, "a list of names of modules"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int3"}}}, 'weight.dtype = "int3"'),
    ],
)
def test_an_odd_detail_of_a_quantisation_is_refused(quantisation: dict[str, object], said: str) -> None:
    with pytest.raises(ModelFormatError, match=said):
        read_config({**LLAMA, "quantization_config": quantisation}, "small")


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 2**30, "head_dim": 64},
        {"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 64},
        {"intermediate_size": 2**31 - 1, "vocab_size": 2**31 - 1, "num_hidden_layers": 9999},
    ],
)
def test_a_model_larger_than_any_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ModelFormatError, match="more than any model has|an integer from"):
        read_config({**LLAMA, **change}, "absurd")


@pytest.mark.parametrize(("labels", "fine"), [(50_000, True), (100_000, False)])
def test_a_config_of_1_mb_is_read_and_one_of_3_is_none(tmp_path: Path, labels: int, fine: bool) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, "id2label": {str(index): "x" * 20 for index in range(labels)}}))
    if fine:
        assert path.stat().st_size > 1e6
        assert read_config(path, "small").layers == 2
    else:
        with pytest.raises(
            ModelFormatError, match=r"has 3,[\d,]+ bytes, at most 2,097,152 are read: this is no config"
        ):
            read_config(path, "small")


def test_a_number_of_a_million_digits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": ' + "9" * 1_000_000 + "}")
    with pytest.raises(ModelFormatError, match="not valid JSON"):
        read_config(path, "small")


def test_encoders_are_refused_by_name() -> None:
    with pytest.raises(ModelFormatError, match="is_encoder_decoder = true"):
        read_config({**LLAMA, "is_encoder_decoder": True}, "small")


FIELDS = st.sampled_from([*LLAMA, "text_config", "quantization_config", "layer_types", "head_dim", "sliding_window"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(FIELDS, JSON_VALUES, max_size=4), st.sampled_from(sorted(FAMILIES)))
def test_any_config_is_read_or_refused(change: dict[str, object], family: str) -> None:
    try:
        llm = read_config({**MIXTRAL, "model_type": family, **change}, "any")
    except ModelFormatError as error:
        assert "the config of 'any'" in str(error)
    else:
        assert llm.parameters >= llm.active_parameters > 0
