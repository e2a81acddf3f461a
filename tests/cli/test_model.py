import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from waterline import catalog
from waterline.cli.model import model
from waterline.errors import InputError
from waterline.llm import PRECISIONS

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(model, [str(one) for one in arguments], catch_exceptions=False, env={"COLUMNS": "130"})


def described(*arguments: str | Path) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_both_ways_to_count_can_be_had_from_the_json() -> None:
    r1 = described("deepseek-r1")
    assert (r1["parameters"], r1["active_parameters"]) == (671_026_404_352, 37_552_282_624)
    assert r1["active_parameters_without_input_embedding"] == 36_625_603_584
    assert r1["parameters"] + r1["mtp_parameters"] == pytest.approx(684.5e9, rel=1e-4)  # as the Hub counts it
    assert r1["form"] == "fp8_block"


def test_the_cache_of_a_token_is_worked_out_by_hand() -> None:
    llama = described("llama-3.1-8b")
    per_token = 2 * 32 * 8 * 128 * 2  # keys and values, layers, key-value heads, dimension, bytes
    assert set(llama["kv_bytes_per_token"].values()) == {per_token}
    assert llama["kv_bytes_per_sequence"]["131072"] == 131_072 * per_token


def test_a_window_makes_a_token_cheaper_in_a_long_context() -> None:
    per_token = described("gemma-3-4b")["kv_bytes_per_token"]
    assert per_token["131072"] < per_token["32768"] < per_token["1024"]


def test_contexts_end_where_the_model_does(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert list(described(tmp_path)["kv_bytes_per_token"]) == ["1024", "2048"]


def test_bytes_by_precision_hold_the_stored_one(tmp_path: Path) -> None:
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "quantization_config": quantised}))
    small = described(tmp_path)
    assert small["bytes_by_precision"]["bf16"] == 2 * small["parameters"]
    assert small["stored_bytes"] == small["bytes_by_precision"][small["precision"]] < 2 * small["parameters"]


def test_llama_cpp_s_formats_are_as_large_as_published_files() -> None:
    sizes = described("mixtral-8x22b")["bytes_by_precision"]
    assert set(sizes) == set(PRECISIONS)
    assert sizes["q4_k_m"] / 1e9 == pytest.approx(85.58, rel=2e-3)  # bartowski/Mixtral-8x22B-v0.1-GGUF
    assert sizes["iq4_xs"] / 1e9 == pytest.approx(76.35, rel=2e-3)


def test_a_gguf_file_shows_its_tensors_as_stored() -> None:
    path = catalog.weights_file("abacus")
    abacus = described(path)
    assert sum(abacus["stored_bytes_by_type"].values()) == abacus["stored_bytes"]
    assert "tensors: q8_0" in run(path).stdout


def test_what_is_not_counted_is_said() -> None:
    assert "7 multi-token-prediction layers are not counted" in run("minimax-m3").stdout
    assert described("k3")["notes"]["vision"] == "the vision tower is not counted"


@pytest.mark.parametrize("name", ["deepseek-v4-flash", "k3", "gemma-4-26b-a4b", "nemotron-super-49b", "qwen3.5-27b"])
def test_every_kind_of_layer_has_a_row(name: str) -> None:
    done = run(name)
    assert done.exit_code == 0
    llm = catalog.find_model(name)
    for kind in {group.kind for group in llm.attention}:
        assert f"{kind} attention" in done.stdout or f" {kind} " in done.stdout


def test_help_has_an_example() -> None:
    assert "waterline model deepseek-r1" in run("--help").stdout


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", "not json", "not valid JSON"),
        ("config.json", json.dumps({**SMALL, "hidden_size": -64}), "hidden_size = -64"),
        ("config.json", json.dumps({**SMALL, "torch_dtype": "float3"}), 'torch_dtype = "float3"'),
        ("config.json", json.dumps({**SMALL, "model_type": "mamba9"}), 'model_type = "mamba9"'),
        ("config.json", json.dumps({**SMALL, "layer_types": ["full_attention"] * 100_000}), "a list of 2 names"),
        ("weights.gguf", "GGUF", "cut short"),
        ("model.safetensors", "", "config.json"),
    ],
)
def test_a_bad_file_is_one_message_with_exit_code_2(file: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        run(tmp_path / file)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


# --- Bad input ------------------------------------------------------------------------------------------------------

HEADER = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
TEXT_KEY = struct.pack("<Q", 1) + b"a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            json.dumps(SMALL | {"junk": "x" * 3_000_000}),
            "has 3,000,2.. bytes, at most 2,097,152 are read: this is no config",
        ),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "is not valid JSON: maximum recursion depth exceeded"),
        ('{"model_type": "llama", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "is not valid JSON: maximum recursion"),
        (json.dumps(SMALL)[:50], "is not valid JSON: "),
        ("", "is not valid JSON: "),
        ("[1]", "holds a JSON list, where an object with fields is expected"),
        (json.dumps(SMALL | {"hidden_size": -64}), "hidden_size = -64, which must be an integer from 1 to"),
        (
            json.dumps(SMALL | {"hidden_size": 10**12}),
            "hidden_size = 1000000000000, which must be an integer from 1 to",
        ),
        (json.dumps(SMALL | {"hidden_size": float("nan")}), "hidden_size = NaN, which must be an integer"),
        (
            json.dumps(SMALL | {"num_hidden_layers": 10**9}),
            "num_hidden_layers = 1000000000, which must be an integer from 1 to 10,000",
        ),
        (json.dumps(SMALL | {"num_attention_heads": 3}), "num_key_value_heads = 2, which must be a divisor of"),
        (json.dumps(SMALL | {"torch_dtype": "float13"}), 'torch_dtype = "float13", which must be one of bfloat16'),
        (json.dumps(SMALL)[:-1] + ', "z": ' + "9" * 6000 + "}", "is not valid JSON: Exceeds the limit"),
    ],
    ids=lambda text: text[:30],
)
def test_a_config_that_cannot_be_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert re.search(message, failed(tmp_path)), failed(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"GGUF", "is cut short: the header needs 4 bytes at offset 4, the file has 4"),
        (HEADER, "is cut short: header needs 37 bytes at offset 24, the file has 24"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62), "is cut short: header needs"),
        (b"GGUF" + struct.pack("<IQQ", 9, 1, 1), "is GGUF version 9; versions 2 and 3"),
        (b"PK\x03\x04 a zip", "is not a GGUF file: it begins with"),
        (HEADER + struct.pack("<Q", 2**63) + b"x" * 64, "is cut short|is no text|claims|as a text of"),
        (HEADER + TEXT_KEY + struct.pack("<IIQ", 9, 9, 2**40) * 20, "has a list of type 9"),
    ],
)
def test_a_gguf_header_that_cannot_be_is_one_sentence(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert re.search(message, failed(path)), failed(path)


def test_a_model_of_the_hub_without_a_network_says_what_to_give_instead() -> None:
    said = failed("meta-llama/Llama-9-unheard-of")
    assert "'meta-llama/Llama-9-unheard-of' is not in the catalogue" in said
    assert "a folder with its config.json, a .gguf file, or a model of the catalogue" in said


def failed(what: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        run(what)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)
