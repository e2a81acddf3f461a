import csv
from pathlib import Path

import pytest

from waterline import catalog
from waterline.llm import PRECISIONS, Llm
from waterline.llm.gguf_sizes import MIXES, Epoch, file_bytes


# sizes of published files: gguf-parser dumps, llama.cpp tools/quantize/README.md, bartowski's cards; in units of 1e9
@pytest.mark.parametrize(
    ("model", "precision", "published"),
    [
        ("llama-3.1-8b", "q8_0", 8.540775840),
        ("llama-3.1-8b", "q4_k_m", 4.920739232),
        ("llama-3.1-8b", "q2_k", 3.17),
        ("llama-3.1-8b", "iq3_xs", 3.51),
        ("llama-3.1-8b", "iq2_m", 2.94),
        ("llama-3.1-8b", "iq1_s", 2.01),
        ("llama-3.1-70b", "q4_k_m", 42.52),
        ("deepseek-r1", "q8_0", 713.286514368),
        ("deepseek-v3", "q4_k_m", 404.43),
        ("mixtral-8x22b", "q4_k_m", 85.58),
        ("mixtral-8x22b", "q2_k", 52.1),
        ("gpt-oss-20b", "mxfp4", 12.1),
        ("qwen2.5-0.5b", "q4_k_m", 0.3978),  # rows of 896 do not divide by 256: the next larger types are taken
        ("qwen2.5-72b", "q4_k_m", 47.42),
    ],
)
def test_published_files_are_foreseen_within_a_hundredth(model: str, precision: str, published: float) -> None:
    assert file_bytes(catalog.find_model(model), precision) / 1e9 == pytest.approx(published, rel=0.01)


# cards of TheBloke (GGUF, 2023) and of Llama 2 as GGML v3; in units of 1e9
@pytest.mark.parametrize(
    ("model", "precision", "epoch", "published"),
    [
        ("llama-2-7b", "q2_k", "2023", 2.825940672),
        ("llama-2-7b", "q3_k_m", "2023", 3.298004672),
        ("llama-2-7b", "q4_k_m", "2023", 4.081004224),
        ("mixtral-8x7b", "q2_k", "2023", 15.64),  # each expert a tensor of its own, which no rule knew
        ("mixtral-8x7b", "q3_k_m", "2023", 20.36),
        ("mixtral-8x7b", "q4_k_m", "2023", 26.44),
        ("mixtral-8x7b", "q5_k_m", "2023", 32.23),
    ],
)
def test_files_of_earlier_rules_are_foreseen_by_those(
    model: str, precision: str, epoch: Epoch, published: float
) -> None:
    llm = catalog.find_model(model)
    assert file_bytes(llm, precision, epoch) / 1e9 == pytest.approx(published, rel=0.002)
    if precision == "q2_k":
        assert file_bytes(llm, precision) / 1e9 != pytest.approx(published, rel=0.05)


def test_before_gguf_fewer_tensors_had_more_bits() -> None:
    llm = catalog.find_model("llama-2-7b")
    for mix in ("q4_0", "q4_k_s", "q3_k_m"):
        assert 0.98 < file_bytes(llm, mix, "ggml") / file_bytes(llm, mix) < 1
    assert file_bytes(llm, "q2_k", "ggml") > 1.1 * file_bytes(llm, "q2_k")


def test_every_format_of_llama_cpp_has_its_rules() -> None:
    gguf = {name for name, form in PRECISIONS.items() if form.gguf}
    assert gguf <= set(MIXES) <= gguf | {"fp32", "fp16", "bf16", "mxfp4"}


@pytest.mark.parametrize("llm", catalog.models().values(), ids=lambda llm: llm.name)
def test_more_bits_never_make_a_smaller_file(llm: Llm) -> None:
    sizes = [file_bytes(llm, name) for name in ("q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "bf16", "fp32")]
    assert sizes == sorted(sizes)


def test_the_collected_files_are_foreseen(shared_data: Path) -> None:
    """All quants of two models whose files are all of today's llama.cpp; benchmarks/models.py has every row."""
    wanted = {"deepseek-ai/DeepSeek-V3-0324": "deepseek-v3", "mistralai/Mixtral-8x22B-v0.1": "mixtral-8x22b"}
    compared = 0
    with (shared_data / "gguf_sizes.csv").open() as file:
        for row in csv.DictReader(file):
            precision = row["quant"].lower()
            if row["model"] in wanted and precision in MIXES:
                foreseen = file_bytes(catalog.find_model(wanted[row["model"]]), precision)
                assert foreseen / 1e9 == pytest.approx(float(row["size_gb_decimal"]), rel=0.01), row
                compared += 1
    assert compared >= 15
