import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from waterline import catalog
from waterline.catalog import hub
from waterline.errors import ModelFormatError, UnknownNameError

LLAMA = {
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


def test_a_folder_beside_the_fleet_file_comes_before_the_catalogue(tmp_path: Path) -> None:
    folder = tmp_path / "deepseek-r1"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert catalog.load_model("deepseek-r1", tmp_path).architecture == "llama"
    assert catalog.load_model("deepseek-r1", tmp_path / "elsewhere").architecture == "deepseek_v3"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(LLAMA))
    assert catalog.load_model("~/tiny", Path("/")).hidden == 64


def test_a_gguf_file_is_read() -> None:
    path = catalog.weights_file("abacus")
    assert catalog.load_model(path.name, path.parent).parameters == catalog.find_model("abacus").parameters


@pytest.mark.parametrize("weights", ["./nothing", "/nothing/there", "~/nothing-there", "nothing.gguf"])
def test_a_path_that_is_not_there_is_not_looked_up(weights: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="there is no file"):
        catalog.load_model(weights, tmp_path)


def test_a_folder_without_config_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFormatError, match=r"has no config\.json"):
        catalog.load_model("empty", tmp_path)


@pytest.mark.parametrize("weights", ["", "a" * 5000, "a/b/c", "no such model"])
def test_what_is_no_name_is_refused(weights: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no model is called"):
        catalog.load_model(weights, tmp_path)


def test_offline_a_model_of_the_hub_is_refused_with_what_to_do(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\nfrom waterline.catalog import load_model\n"
        "from waterline.errors import UnknownNameError\n"
        "try:\n    load_model('some/model', Path())\nexcept UnknownNameError as error:\n    print(error)\n"
    )
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert "'some/model' is not in the catalogue, and it could not be fetched" in said
    assert "Give a folder with its config.json" in said


def test_without_the_library_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnknownNameError, match="pip install huggingface_hub"):
        hub.fetch_config("some/model")


def fake_library(monkeypatch: pytest.MonkeyPatch, folder: Path, status: int, header: str = "") -> None:
    """Stand in for a Hub that has what lies in `folder`."""

    def head(address: str, **_: object) -> SimpleNamespace:
        found = (folder / address).exists()
        return SimpleNamespace(
            status_code=status if found else 404, headers={} if found else {"x-error-code": header or "EntryNotFound"}
        )

    library = SimpleNamespace(
        try_to_load_from_cache=lambda _name, _file: None,
        hf_hub_url=lambda _name, file: file,
        hf_hub_download=lambda _name, file: str(folder / file),
        get_session=lambda: SimpleNamespace(head=head),
        utils=SimpleNamespace(build_hf_headers=dict),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)  # type: ignore[arg-type]


def test_a_fetched_config_honours_the_quantisation_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    fake_library(monkeypatch, tmp_path, 307)
    assert catalog.load_model("some/plain", tmp_path).precision == "bf16"
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert catalog.load_model("some/quantised", tmp_path).precision == "nvfp4"


def test_the_index_of_a_model_of_the_hub_gives_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    index = {"metadata": {"total_size": 123_456}, "weight_map": {"model.norm.weight": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    fake_library(monkeypatch, tmp_path, 302)
    assert catalog.load_model("some/indexed", tmp_path).stored_bytes == 123_456
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelFormatError, match="of 'some/damaged' has no 'weight_map'"):
        catalog.load_model("some/damaged", tmp_path)


def test_a_folder_of_one_gguf_model_is_that_model(tmp_path: Path) -> None:
    path = catalog.weights_file("abacus")
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / path.name).symlink_to(path)
    (folder / "mmproj-abacus.gguf").write_bytes(b"")
    assert catalog.load_model("gguf", tmp_path).parameters == catalog.find_model("abacus").parameters
    (folder / "other.gguf").symlink_to(path)
    with pytest.raises(ModelFormatError, match="2 GGUF models: .* Name one of them"):
        catalog.load_model("./gguf", tmp_path)


def test_a_model_the_hub_hides_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(monkeypatch, tmp_path, 200, header="RepoNotFound")
    with pytest.raises(UnknownNameError, match="no such model on the Hugging Face Hub, or it is not open to you"):
        catalog.load_model("some/secret", tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    fake_library(monkeypatch, tmp_path, 200)
    with pytest.raises(UnknownNameError, match="not a JSON object"):
        catalog.load_model("some/list", tmp_path)


def test_a_model_whose_id_on_the_hub_has_changed_is_still_known() -> None:
    assert catalog.load_model("meta-llama/Llama-3.1-70B", Path()).name == "meta-llama/Meta-Llama-3.1-70B"
    with pytest.raises(UnknownNameError):
        catalog.load_model("somebody/Llama-3.1-70B", Path())
