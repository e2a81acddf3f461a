import json
from urllib.request import Request, urlopen

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra waterline-llm[training]")
gguf = pytest.importorskip("gguf", reason="needs the extra waterline-llm[training]")
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs the extra waterline-llm[training]")

from waterline.training import tokens  # noqa: E402  # torch may be absent
from waterline.training.evaluate import SHIPPED_WEIGHTS, draw_questions  # noqa: E402  # as above
from waterline.training.export import (  # noqa: E402  # as above
    neighbours_to_halves,
    read_gguf,
    write_gguf,
    write_hugging_face,
)
from waterline.training.network import Network, Shape, rotary_turns, rotate  # noqa: E402  # as above

TINY = Shape(channels=64, layers=2, heads=2, hidden_channels=96)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network(TINY)


def test_a_gguf_read_back_is_the_network_to_half_a_quantisation_step(network, tmp_path):
    write_gguf(network, tmp_path / "tiny.gguf")
    reloaded = read_gguf(tmp_path / "tiny.gguf")
    assert reloaded.shape == TINY
    for name, weight in network.state_dict().items():
        if weight.ndim == 1:
            assert torch.equal(reloaded.state_dict()[name], weight)
            continue
        blocks = weight.unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        error = (reloaded.state_dict()[name].unflatten(-1, (-1, 32)) - blocks).abs()
        assert (error <= 0.6 * step).all()  # half a step, and what a 16-bit scale adds at the far end


def test_a_hugging_face_folder_holds_every_weight_under_its_llama_name(network, tmp_path):
    write_hugging_face(network, tmp_path)
    stored = safetensors_numpy.load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert sum(weight.size for weight in stored.values()) == network.parameter_count
    assert config["tie_word_embeddings"]
    assert "lm_head.weight" not in stored
    assert stored["model.layers.1.mlp.down_proj.weight"].shape == (64, 96)
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], network.embedding.weight.detach().numpy())


def test_a_hugging_face_tokenizer_numbers_tokens_as_we_do(network, tmp_path):
    write_hugging_face(network, tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer["model"]["vocab"]["7"] == ord("7")
    assert {mark["content"]: mark["id"] for mark in tokenizer["added_tokens"]}["</think>"] == tokens.THINK_END


def test_of_the_marks_only_those_of_a_thought_reach_the_text(network, tmp_path):
    write_hugging_face(network, tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert [mark["content"] for mark in tokenizer["added_tokens"] if not mark["special"]] == ["<think>", "</think>"]


def test_reordered_for_halves_attention_stays_the_same():
    heads, head_channels, position = 2, 32, 5
    weight = torch.randn(heads * head_channels, 48)
    x = torch.randn(48)
    turns = rotary_turns(head_channels)[position]
    cosine, sine = (part.repeat(2) for part in turns.unbind(-1))  # Hugging Face: [head channel]

    def rotate_halves(vector):  # transformers, modeling_llama.py: apply_rotary_pos_emb
        first, second = vector.chunk(2, dim=-1)
        return vector * cosine + torch.cat((-second, first), dim=-1) * sine

    ours = rotate((weight @ x).view(heads, -1), turns)
    reordered = torch.from_numpy(neighbours_to_halves(weight.numpy(), heads))
    theirs = rotate_halves((reordered @ x).view(heads, -1))
    torch.testing.assert_close(ours.view(heads, -1, 2).transpose(1, 2).flatten(1), theirs)


def test_the_shipped_file_says_what_it_is():
    reader = gguf.GGUFReader(SHIPPED_WEIGHTS)
    said = {key: reader.get_field(f"general.{key}").contents() for key in ("name", "license", "architecture")}
    assert said == {"name": "Waterline Abacus", "license": "apache-2.0", "architecture": "llama"}
    assert "does not chat" in reader.get_field("general.description").contents()


def test_the_engine_and_torch_write_the_same_tokens(abacus_url):
    """Torch, given what the engine wrote, finds each token the likeliest: then it would have written the same."""
    network = read_gguf(SHIPPED_WEIGHTS)
    for question in draw_questions(3, 3, 12, seed=2):
        prompt = tokens.prompt(question.text, thinking=True)
        request = {"prompt": prompt, "temperature": 0.0, "return_tokens": True, "n_predict": 300}
        with urlopen(Request(abacus_url.removesuffix("/v1") + "/completion", json.dumps(request).encode())) as reply:
            written = json.load(reply)["tokens"]
        with torch.no_grad():
            likeliest = network(torch.tensor([prompt + written]))[0].argmax(-1).tolist()
        assert likeliest[len(prompt) - 1 : -1] == written
