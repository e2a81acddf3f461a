"""Write a network as a GGUF file for llama.cpp or as a folder for Hugging Face transformers, and read a GGUF back.

Matrices become Q8_0 in GGUF: 32 neighbours in a row share a 16-bit scale, 8.5 bits per weight. Norms stay exact.
"""

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from waterline.errors import MissingExtraError
from waterline.training import tokens
from waterline.training.network import NORM_EPSILON, ROPE_BASE, Network, Shape

try:
    import gguf
    import torch
    from safetensors.numpy import save_file
except ImportError as error:
    raise MissingExtraError("exporting the small model", extra="training") from error

NAME: Final = "Waterline Abacus"
DESCRIPTION: Final = "Multiplies two whole numbers of up to three digits, thinking first. It does not chat."
LICENSE: Final = "apache-2.0"

IN_TEXT: Final = (tokens.THINK, tokens.THINK_END)  # marks that an engine looks for in the text; the others are left out

# ours: (GGUF, Hugging Face), after "blocks.N.", "blk.N." and "model.layers.N."
BLOCK_NAMES: Final = {
    "attention_norm.weight": ("attn_norm.weight", "input_layernorm.weight"),
    "attention.query.weight": ("attn_q.weight", "self_attn.q_proj.weight"),
    "attention.key.weight": ("attn_k.weight", "self_attn.k_proj.weight"),
    "attention.value.weight": ("attn_v.weight", "self_attn.v_proj.weight"),
    "attention.output.weight": ("attn_output.weight", "self_attn.o_proj.weight"),
    "feed_forward_norm.weight": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "feed_forward.gate.weight": ("ffn_gate.weight", "mlp.gate_proj.weight"),
    "feed_forward.up.weight": ("ffn_up.weight", "mlp.up_proj.weight"),
    "feed_forward.down.weight": ("ffn_down.weight", "mlp.down_proj.weight"),
}


def names(shape: Shape) -> dict[str, tuple[str, str]]:
    """Return what each of our tensors is called in GGUF and in Hugging Face; tied, so neither has an output matrix."""
    table = {
        "embedding.weight": ("token_embd.weight", "model.embed_tokens.weight"),
        "norm.weight": ("output_norm.weight", "model.norm.weight"),
    }
    for layer in range(shape.layers):
        for ours, (theirs, hugging_face) in BLOCK_NAMES.items():
            table[f"blocks.{layer}.{ours}"] = (f"blk.{layer}.{theirs}", f"model.layers.{layer}.{hugging_face}")
    return table


def write_gguf(network: Network, path: Path) -> None:
    """Write weights, tokenizer and chat template into one file that needs nothing beside it."""
    shape = network.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_license(LICENSE)
    writer.add_context_length(tokens.CONTEXT)
    writer.add_embedding_length(shape.channels)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden_channels)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_dimension_count(shape.head_channels)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_vocab_size(tokens.VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    byte_count = len(tokens.BYTE_LETTERS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens.BYTE_LETTERS, *tokens.MARKS])
    writer.add_token_types(
        [gguf.TokenType.NORMAL] * byte_count
        + [
            gguf.TokenType.USER_DEFINED if byte_count + mark in IN_TEXT else gguf.TokenType.CONTROL
            for mark in range(len(tokens.MARKS))
        ]
    )
    last_letter = tokens.BYTE_LETTERS[255]
    writer.add_token_merges([f"{last_letter} {last_letter}"])  # llama.cpp wants one; byte 255 never occurs in UTF-8
    writer.add_bos_token_id(tokens.USER)
    writer.add_eos_token_id(tokens.END)
    writer.add_pad_token_id(tokens.END)
    writer.add_add_bos_token(False)  # noqa: FBT003  # gguf's signature; the chat template writes <|user|> itself
    writer.add_chat_template(tokens.CHAT_TEMPLATE)

    weights = network.state_dict()
    for ours, (theirs, _) in names(shape).items():
        values = weights[ours].float().numpy()
        if values.ndim == 1:
            writer.add_tensor(theirs, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> Network:
    """Return the network in a file that `write_gguf` wrote, with the weights the engine sees."""
    reader = gguf.GGUFReader(path)

    def field(key: str) -> int:
        return int(reader.get_field(f"llama.{key}").contents())

    shape = Shape(
        channels=field("embedding_length"),
        layers=field("block_count"),
        heads=field("attention.head_count"),
        hidden_channels=field("feed_forward_length"),
    )
    stored = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    network = Network(shape)
    network.load_state_dict({ours: stored[theirs] for ours, (theirs, _) in names(shape).items()})
    return network


def write_hugging_face(network: Network, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` and vLLM read: weights in full precision."""
    shape = network.shape
    weights = network.state_dict()
    tensors: dict[str, NDArray[np.float32]] = {}
    for ours, (_, theirs) in names(shape).items():
        values = weights[ours].float().numpy()
        pairs_matter = "query" in ours or "key" in ours
        tensors[theirs] = neighbours_to_halves(values, shape.heads) if pairs_matter else values
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(shape))
    _write_json(folder / "tokenizer.json", _tokenizer())
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())


def neighbours_to_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of each head so that the two channels of a rotary pair lie half a head apart."""
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)  # [head, pair, of a pair, column]
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(rows, columns))


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokens.VOCABULARY,
        "hidden_size": shape.channels,
        "intermediate_size": shape.hidden_channels,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.head_channels,
        "hidden_act": "silu",
        "max_position_embeddings": tokens.CONTEXT,
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROPE_BASE,
        "tie_word_embeddings": True,
        "bos_token_id": tokens.USER,
        "eos_token_id": tokens.END,
        "pad_token_id": tokens.END,
        "torch_dtype": "float32",
    }


def _tokenizer() -> dict[str, Any]:
    first_mark = len(tokens.BYTE_LETTERS)
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": first_mark + index,
                "content": mark,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": first_mark + index not in IN_TEXT,
            }
            for index, mark in enumerate(tokens.MARKS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {letter: byte for byte, letter in enumerate(tokens.BYTE_LETTERS)},
            "merges": [],
        },
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens.MARKS[tokens.USER - 256],
        "eos_token": tokens.MARKS[tokens.END - 256],
        "pad_token": tokens.MARKS[tokens.END - 256],
        "add_bos_token": False,
        "model_max_length": tokens.CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": tokens.CHAT_TEMPLATE,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
