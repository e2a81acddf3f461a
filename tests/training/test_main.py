import re
import sys

import pytest

from waterline.training.__main__ import main


def test_evaluate_prints_the_table_of_the_card(abacus_url, capsys):
    assert main(["evaluate", "--base-url", abacus_url, "--problems", "4"]) == 0
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" |")[0] for row in rows] == ["| 3 × 3", "| 3 × 2", "| 3 × 1", "| 2 × 2", "| 2 × 1"]
    assert all(re.fullmatch(r"\| \d × \d \| 4 \| [\d.]+% \| [\d.]+% \|", row) for row in rows)


def test_train_then_export_leaves_a_gguf_and_a_hugging_face_folder(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="needs the extra waterline-llm[training]")
    pytest.importorskip("gguf", reason="needs the extra waterline-llm[training]")
    from waterline.training import network  # noqa: PLC0415  # torch may be absent

    monkeypatch.setattr("waterline.training.train.BATCH", 2)
    monkeypatch.setattr(network, "ABACUS", network.Shape(channels=32, layers=1, heads=1, hidden_channels=32))
    assert main(["train", str(tmp_path), "--steps", "1"]) == 0
    assert main(["export", str(tmp_path)]) == 0
    assert (tmp_path / "abacus-q8_0.gguf").exists()
    assert (tmp_path / "hugging-face" / "tokenizer.json").exists()


def test_a_mistake_is_one_line_and_an_exit_code(tmp_path, capsys):
    pytest.importorskip("torch", reason="needs the extra waterline-llm[training]")
    assert main(["export", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("waterline.training: ")


def test_without_the_extra_training_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    for module in ("network", "train"):
        monkeypatch.delitem(sys.modules, f"waterline.training.{module}", raising=False)
        monkeypatch.delattr(f"waterline.training.{module}", raising=False)
    assert main(["train", str(tmp_path)]) == 4
    assert "pip install 'waterline-llm[training]'" in capsys.readouterr().err
