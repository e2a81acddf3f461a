"""How far the reading of models is from published figures: parameters, and sizes of GGUF files.

    .venv/bin/python benchmarks/models.py [FOLDER_OF_THE_COLLECTED_DATA]

Parameters are those `waterline.llm.config` counts from each collected config, against transformers 5.23 on the meta
device. File sizes are those `waterline.llm.gguf_sizes` foresees for the catalogue's model, against published files.
"""

import csv
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from waterline import catalog
from waterline.errors import WaterlineError
from waterline.llm import Llm
from waterline.llm.config import read_config
from waterline.llm.gguf_sizes import MIXES, Epoch, file_bytes
from waterline.units import GIGA

DATA = Path(__file__).parents[2] / "shared" / "data"
LLAMA_2_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}
NAMES = {  # how the table of files calls a model the catalogue has under another name
    "Mixtral-8x7B-Instruct-v0.1": "mixtral-8x7b",
    "openbuddy-llama3.3-70b": "llama-3.1-70b",
    "Llama-2-7b": "llama-2-7b",
    "DeepSeek-V3-0324": "deepseek-v3",
    "Qwen2.5-0.5B-Instruct": "Qwen2.5-0.5B",
    "Llama-3.1-405B": "llama-3.1-405b",
    "Llama-3.1-70B": "llama-3.1-70b",
    "Llama-3.1-70B-Instruct": "llama-3.1-70b",
}
QWEN2_VL_2B = {  # its language model
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}
EPOCHS: dict[str, Epoch] = {"TheBloke": "2023", "GGML v3": "ggml"}  # what stands in source or model -> when it was made
WITHIN = 0.01  # the goal
FORMATS = {"f16": "fp16", "f32": "fp32"}

Errors = dict[str, list[float]]  # family -> relative errors


def parameters(rows: Iterable[dict[str, str]], folder: Path) -> tuple[dict[str, Errors], list[str]]:
    """Return the errors by what was compared, and the models that were refused."""
    errors: dict[str, Errors] = {"total": defaultdict(list), "active": defaultdict(list)}
    refused = []
    for row in rows:
        try:
            llm = read_config(folder / "model_configs" / row["config_file"], row["model"])
        except WaterlineError as error:
            refused.append(f"{row['model']}: {error}")
            continue
        if row["reference_total_params"]:
            language = int(row["reference_total_params"]) - int(row["reference_vision_params"])
            errors["total"][llm.architecture].append(llm.parameters / language - 1)
            active = int(row["reference_active_incl_embed"])
            errors["active"][llm.architecture].append(llm.active_parameters / active - 1)
    return errors, refused


def files(rows: Iterable[dict[str, str]]) -> tuple[Errors, list[str]]:
    errors: Errors = defaultdict(list)
    refused = []
    for row in rows:
        try:
            llm, precision = _model(row["model"]), _precision(row["quant"])
        except LookupError:
            refused.append(f"{row['model']} {row['quant']}")
            continue
        published = int(row["bytes_exact"] or 0) or float(row["size_gb_decimal"]) * GIGA
        epoch = next((EPOCHS[mark] for mark in EPOCHS if mark in row["source"] + row["model"]), "today")
        error = file_bytes(llm, precision, epoch) / published - 1
        errors[f"{llm.architecture} {epoch} {row['flag']}"].append(error)
        if abs(error) > WITHIN:
            refused.append(f"{row['model']} {row['quant']}: {error:+.2%}, {row['source']}")
    return errors, refused


def _model(name: str) -> Llm:
    if "Llama-2-13b" in name:
        return read_config(LLAMA_2_13B, name)
    if "Qwen2-VL-2B" in name:
        return read_config(QWEN2_VL_2B, name)
    if "unsloth UD" in name:
        raise LookupError(name)  # a mix of its own, chosen tensor by tensor
    bare = _bare(name)
    try:
        return catalog.find_model(NAMES.get(bare, bare))
    except WaterlineError as error:
        raise LookupError(name) from error


def _bare(name: str) -> str:
    return name.partition(" ")[0].rpartition("/")[2]


def _precision(quant: str) -> str:
    precision = FORMATS.get(quant.lower(), quant.lower().removesuffix("-v2"))
    if precision not in MIXES:
        raise LookupError(quant)
    return precision


def show(title: str, errors: Errors) -> None:
    found = [abs(error) for family in errors.values() for error in family]
    print(f"| {title} | {len(found)} | {statistics.median(found):.4%} | {max(found):.4%} |")
    for family, own in sorted(errors.items(), key=lambda item: -max(map(abs, item[1])))[:8]:
        worst = max(own, key=abs)
        print(f"|   {family} | {len(own)} | {statistics.median(map(abs, own)):.4%} | {worst:+.4%} |")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    with (folder / "model_facts.csv").open() as file:
        counted, refused = parameters(csv.DictReader(file), folder)
    with (folder / "gguf_sizes.csv").open() as file:
        sizes, not_foreseen = files(csv.DictReader(file))
    print("| against | rows | median error | worst |\n|---|---|---|---|")
    show("parameters, language model", counted["total"])
    show("active parameters, embedding included", counted["active"])
    show("size of GGUF files", sizes)
    print(f"refused configs: {len(refused)}", *refused, sep="\n  ")
    print(f"files further off than {WITHIN:.0%}, and those that cannot be foreseen: {len(not_foreseen)}")
    print(*(f"  {name}" for name in not_foreseen), sep="\n")


if __name__ == "__main__":
    main()
