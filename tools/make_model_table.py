"""Turn collected configs and published parameter counts into `catalog/models.toml`.

Run by hand where the collected data lies beside the checkout; the table is kept in the repository and may be edited::

    python tools/make_model_table.py ../shared/data

Every config is read by `waterline.llm.config`; its count must be within a thousandth of the published reference, and
`notes` says where there is none.
"""

import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from waterline.llm.config import read_config

TABLE = Path(__file__).parents[1] / "src" / "waterline" / "catalog" / "models.toml"
READ = "2026-11-23"
WITHIN = 0.001
HEADER = """\
# What models weigh and compute: one table a model, in the words of `waterline.llm.Llm`.
#
#   parameters         of the language model, without vision tower and multi-token-prediction layers
#   active_parameters  that one token passes, input embedding included
#   precision          what the published weights are stored in
#   mtp_parameters     of multi-token-prediction layers in the checkpoint, not counted in `parameters`
#   stored_bytes       only where the precision alone does not give them: as published, or computed (see notes)
#   stored_forms       of quantised checkpoints: the form of each part
#   source             where the config was read; counts are those of transformers 5.23 unless notes say otherwise
"""

ALIASES = {
    "01-ai/Yi-34B": ["01-ai/Yi-34B-Chat"],
    "Qwen/Qwen2.5-0.5B": ["Qwen/Qwen2.5-0.5B-Instruct"],
    "Qwen/Qwen2.5-14B": ["Qwen/Qwen2.5-14B-Instruct"],
    "Qwen/Qwen2.5-32B": ["Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-Coder-32B-Instruct"],
    "Qwen/Qwen2.5-3B": ["Qwen/Qwen2.5-3B-Instruct"],
    "Qwen/Qwen2.5-72B-Instruct": ["Qwen/Qwen2.5-72B"],
    "Qwen/Qwen2.5-7B-Instruct": ["Qwen/Qwen2.5-7B"],
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": ["qwen3-coder"],
    "Qwen/Qwen3-Next-80B-A3B-Instruct": ["Qwen/Qwen3-Next-80B-A3B-Thinking", "qwen3-next"],
    "XiaomiMiMo/MiMo-7B-Base": ["XiaomiMiMo/MiMo-7B-RL", "mimo-7b"],
    "codellama/CodeLlama-34b-Instruct-hf": ["codellama-34b", "codellama/CodeLlama-34b-hf"],
    "deepseek-ai/DeepSeek-R1": ["r1", "deepseek-ai/DeepSeek-R1-0528"],
    "deepseek-ai/DeepSeek-V3": ["v3", "deepseek-ai/DeepSeek-V3-0324"],
    "google/gemma-3-4b-it": ["google/gemma-3-4b-pt", "gemma-3-4b"],
    "meta-llama/Llama-2-70b-hf": ["meta-llama/Llama-2-70b-chat-hf", "llama-2-70b"],
    "meta-llama/Llama-2-7b-hf": ["meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"],
    "meta-llama/Llama-3.1-8B": ["meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"],
    "meta-llama/Llama-3.2-3B": ["meta-llama/Llama-3.2-3B-Instruct"],
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": ["llama-4-maverick", "maverick"],
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": ["llama-4-scout", "scout"],
    "meta-llama/Meta-Llama-3.1-405B": [
        "llama-3.1-405b",
        "meta-llama/Llama-3.1-405B-Instruct",
        "meta-llama/Meta-Llama-3.1-405B-Instruct",
    ],
    "meta-llama/Meta-Llama-3.1-70B": [
        "llama-3.1-70b",
        "meta-llama/Llama-3.1-70B-Instruct",
        "meta-llama/Meta-Llama-3.1-70B-Instruct",
        "meta-llama/Llama-3.3-70B-Instruct",
    ],
    "mistralai/Mistral-7B-v0.1": ["mistral-7b"],
    "mistralai/Mistral-Nemo-Instruct-2407": ["mistral-nemo", "mistralai/Mistral-Nemo-Base-2407"],
    "mistralai/Mixtral-8x22B-v0.1": ["mixtral-8x22b", "mistralai/Mixtral-8x22B-Instruct-v0.1"],
    "mistralai/Mixtral-8x7B-v0.1": ["mixtral-8x7b", "mistralai/Mixtral-8x7B-Instruct-v0.1"],
    "moonshotai/Kimi-K2-Instruct": ["kimi-k2", "k2"],
    "moonshotai/Kimi-K2.5": ["k2.5"],
    "moonshotai/Kimi-K3": ["k3"],
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1": ["llama-3.3-nemotron-super-49b", "nemotron-super-49b"],
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ["nemotron-3-nano"],
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": ["nemotron-3-ultra"],
    "nvidia/Nemotron-H-56B-Base-8K": ["nemotron-h-56b"],
    "stepfun-ai/Step-3.7-Flash": ["step-3.7"],
}
PRECISION = {  # stated by the name and the model card: its config.json keeps silent
    "nvidia/DeepSeek-V3.1-NVFP4": "nvfp4",
    "nvidia/Llama-3.1-70B-Instruct-FP8": "fp8",
}
STORED_BYTES = {
    "openai/gpt-oss-120b",
    "openai/gpt-oss-20b",
}  # published sizes that count neither vision nor extra layers
NOTES = {
    "moonshotai/Kimi-K3": {"attention": "attention residuals between blocks are not counted"},
    "stepfun-ai/Step-3.7-Flash": {"attention": "query heads of the windowed layers as in the full ones: doubtful"},
}


def entry(row: Mapping[str, str], data: Path) -> dict[str, object]:
    name = row["model"]
    llm = read_config(json.loads((data / "model_configs" / row["config_file"]).read_text()), name)
    reference = int(row["reference_total_params"] or 0) - int(row["reference_vision_params"] or 0)
    assert not reference or abs(llm.parameters / reference - 1) < WITHIN, (name, llm.parameters, reference)
    notes: dict[str, str] = dict(NOTES.get(name, {}))
    if not reference:
        published = f"published: {row['published_total']}" if row["published_total"] else "none is published"
        notes["parameters"] = f"computed from the config; {published}"
    stored_bytes = llm.stored_bytes
    if name in STORED_BYTES:
        stored_bytes = int(row["safetensors_total_size_bytes"])
    elif stored_bytes:
        notes["stored_bytes"] = "computed from the forms of its parts"
    llm = msgspec.structs.replace(
        llm,
        stored_bytes=stored_bytes,
        precision=PRECISION.get(name, llm.precision),
        source=row["config_source"],
        notes={**llm.notes, **notes},
    )
    return {"aliases": ALIASES.get(name, []), **msgspec.to_builtins(llm)}


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}" if value >= 100_000 else str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    assert isinstance(value, dict)
    return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items() if item not in (0, "")) + " }"


def table(llm: Mapping[str, object]) -> str:
    lines = [f"\n[model.{toml(llm['name'])}]"]
    for key, value in llm.items():
        if key in {"name", "read"} or value in (0, "", False) or value in ([], (), {}):
            continue
        if key in {"attention", "feed_forward"}:
            assert isinstance(value, list | tuple)
            if len(value) > 1:
                lines.append(f"{key} = [\n" + "".join(f"  {toml(group)},\n" for group in value) + "]")
                continue
        lines.append(f"{key} = {toml(value)}")
    return "\n".join([*lines, f"read = {READ}"]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER_OF_THE_COLLECTED_DATA")
    folder = Path(sys.argv[1])
    with (folder / "model_facts.csv").open() as file:
        entries = [entry(row, folder) for row in csv.DictReader(file)]
    TABLE.write_text(HEADER + "".join(table(llm) for llm in entries))
    sys.stdout.write(f"{len(entries)} models\n")
