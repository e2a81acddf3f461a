"""Families whose configs are not among the collected ones, against the parameters their makers publish.

The configs are written down here with the fields that are read; counts are those of the Hugging Face Hub.
"""

from typing import Any

import pytest

from waterline.errors import ModelFormatError
from waterline.llm.config import read_config

FULL = (4, 8, 12, 16, 20, 24, 27)
KIMI_LINEAR: dict[str, Any] = {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 9216,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "moe_intermediate_size": 1024,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 163_840,
    "model_max_length": 1_048_576,
    "linear_attn_config": {
        "num_heads": 32,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
        "full_attn_layers": list(FULL),
        "kda_layers": [layer for layer in range(1, 28) if layer not in FULL],
    },
}
PUBLISHED: dict[str, tuple[float, dict[str, Any]]] = {
    "Kimi-Linear-48B-A3B": (49.12e9, KIMI_LINEAR),
    "DeepSeek-V2-Lite": (
        15_706_484_224,
        {
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "vocab_size": 102_400,
            "max_position_embeddings": 163_840,
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        14_315_784_192,
        {
            "model_type": "qwen2_moe",
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "decoder_sparse_step": 1,
            "vocab_size": 151_936,
            "max_position_embeddings": 8192,
        },
    ),
    "gemma-7b": (
        8_537_680_896,
        {
            "model_type": "gemma",
            "hidden_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "intermediate_size": 24576,
            "vocab_size": 256_000,
            "max_position_embeddings": 8192,
        },
    ),
    "Seed-OSS-36B": (
        36_151_104_512,
        {
            "model_type": "seed_oss",
            "hidden_size": 5120,
            "num_hidden_layers": 64,
            "num_attention_heads": 80,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 27648,
            "vocab_size": 155_136,
            "attention_bias": True,
            "max_position_embeddings": 524_288,
        },
    ),
    "OLMo-2-7B": (
        7_298_617_344,
        {
            "model_type": "olmo2",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
            "vocab_size": 100_352,
            "max_position_embeddings": 4096,
        },
    ),
    "OLMoE-1B-7B": (
        6_919_161_856,
        {
            "model_type": "olmoe",
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "vocab_size": 50_304,
            "max_position_embeddings": 4096,
        },
    ),
    "SmolLM3-3B": (
        3_075_098_624,
        {
            "model_type": "smollm3",
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "intermediate_size": 11008,
            "vocab_size": 128_256,
            "max_position_embeddings": 65536,
            "tie_word_embeddings": True,
        },
    ),
    "dots.llm1": (
        142.8e9,
        {
            "model_type": "dots1",
            "hidden_size": 4096,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "head_dim": 128,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "vocab_size": 152_064,
            "max_position_embeddings": 32768,
        },
    ),
    "ERNIE-4.5-21B-A3B": (
        21.83e9,
        {
            "model_type": "ernie4_5_moe",
            "hidden_size": 2560,
            "num_hidden_layers": 28,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "moe_num_experts": 64,
            "moe_k": 6,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "vocab_size": 103_424,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
        },
    ),
}
GLM_AIR: dict[str, Any] = {
    "model_type": "glm4_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "vocab_size": 151_552,
    "attention_bias": True,
    "use_qk_norm": False,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 131_072,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_count_is_the_published_one(name: str) -> None:
    published, config = PUBLISHED[name]
    assert read_config(config, name).parameters == pytest.approx(published, rel=1e-3)


def test_extra_layers_of_glm_make_up_what_the_hub_counts_more() -> None:
    llm = read_config(GLM_AIR, "GLM-4.5-Air")
    assert llm.parameters + llm.mtp_parameters == pytest.approx(110.47e9, rel=1e-4)


def test_attention_that_keeps_a_state_and_a_latent_has_a_group_of_each() -> None:
    groups = {group.kind: group for group in read_config(KIMI_LINEAR, "kimi").attention}
    assert (groups["state"].layers, groups["latent"].layers) == (20, 7)
    inner = 32 * 128
    assert groups["state"].state_elements == inner * 128 + 3 * inner * 3  # a matrix a head, three short convolutions


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"linear_attn_config": {"full_attn_layers": [1], "kda_layers": [2]}}, "kda_layers"),
        ({"linear_attn_config": None}, "linear_attn_config"),
        ({"kv_lora_rank": -1}, "kv_lora_rank = -1"),
        ({"num_experts_per_token": 300}, "num_experts_per_token = 300"),
    ],
)
def test_a_hybrid_that_does_not_add_up_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ModelFormatError, match=said):
        read_config({**KIMI_LINEAR, **change}, "kimi")


@pytest.mark.parametrize("key", ["hidden_size_per_layer_input", "num_kv_shared_layers", "use_double_wide_mlp"])
def test_what_gemma_4_has_and_is_not_understood_is_refused_by_field(key: str) -> None:
    config = {"model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, key: 7}
    with pytest.raises(ModelFormatError, match=rf"{key} = 7, which must be absent, 0 or false"):
        read_config(config, "gemma")
