"""Turn collected configs and published parameter counts into `catalog/models.toml`.

Run by hand where the collected data lies beside the checkout; the table is kept in the repository and may be edited::

    python tools/make_model_table.py ../shared/data

Families that `waterline.llm.config` reads are read by it. The others have an extractor here: it states their layers,
and their counts are the published reference, or this file's arithmetic where there is none; `notes` then says so.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from waterline.errors import ModelFormatError
from waterline.llm import PRECISIONS, AttentionLayers, FeedForwardLayers, Llm
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
#   stored_bytes       only where the weights mix precisions: as published, or computed (see notes)
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
SCALED_GROUPS_OF_32 = 4.5  # bits a weight: 4, and a 16-bit scale for 32

Config = Mapping[str, Any]
Sizes = tuple[list[AttentionLayers], list[FeedForwardLayers], int, int]  # groups, parameters, active parameters


def embeddings(config: Config) -> int:
    return int(config["vocab_size"] * config["hidden_size"] * 2 + config["hidden_size"])


def mimo_v2_flash(config: Config) -> Sizes:
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    attention, total = [], embeddings(config)
    for kind, prefix, count in (("full", "", 9), ("window", "swa_", 39)):
        heads, kv_heads = config[f"{prefix}num_attention_heads"], config[f"{prefix}num_key_value_heads"]
        head_dim, value_dim = config[f"{prefix}head_dim"], config[f"{prefix}v_head_dim"]
        sinks = heads if kind == "window" else 0
        projections = hidden * (heads * head_dim + kv_heads * (head_dim + value_dim) + heads * value_dim)
        total += count * (projections + sinks + hidden)
        attention.append(
            AttentionLayers(
                kind="window" if kind == "window" else "full",
                layers=count,
                query_heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                value_head_dim=value_dim,
                window_tokens=config["sliding_window"] if kind == "window" else 0,
            )
        )
    assert config["hybrid_layer_pattern"].count(1) == 39
    feed_forward, more, active = experts(config, dense=layers - sum(config["moe_layer_freq"]), shared=0)
    return attention, feed_forward, total + more, total + active


def experts(
    config: Config,
    *,
    dense: int,
    shared: int,
    dense_intermediate: int = 0,
    count_key: str = "n_routed_experts",
    width: int = 0,
    norms: int = 1,
    shared_gate: int = 0,
) -> tuple[list[FeedForwardLayers], int, int]:
    """Return the groups of a mixture after `dense` plain layers, their parameters and those a token passes."""
    hidden, sparse = config["hidden_size"], config["num_hidden_layers"] - dense
    intermediate, count = config["moe_intermediate_size"], config[count_key]
    used = int(config.get("num_experts_per_tok") or config["num_experts_per_token"])
    dense_intermediate = dense_intermediate or config.get("intermediate_size", 0)
    expert = 3 * (width or hidden) * intermediate
    always = sparse * (hidden * count + 3 * hidden * shared + norms * hidden + (2 * hidden * width if width else 0))
    always += dense * (3 * hidden * dense_intermediate + norms * hidden) + sparse * shared_gate
    groups = [FeedForwardLayers(layers=dense, intermediate=dense_intermediate)] if dense else []
    groups.append(
        FeedForwardLayers(
            layers=sparse,
            intermediate=intermediate,
            experts=count,
            experts_per_token=used,
            shared_intermediate=shared,
            expert_hidden=width,
        )
    )
    return groups, always + sparse * count * expert, always + sparse * used * expert


def step_3_7(config: Config) -> Sizes:
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    kinds: Counter[str] = Counter(config["layer_types"])
    attention = [
        AttentionLayers(
            kind="window" if kind == "window" else "full",
            layers=kinds[name],
            query_heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window_tokens=config["sliding_window"] if kind == "window" else 0,
        )
        for kind, name in (("full", "full_attention"), ("window", "sliding_attention"))
    ]
    hidden = config["hidden_size"]
    total = embeddings(config) + config["num_hidden_layers"] * (
        2 * hidden * (heads + kv_heads) * head_dim + 2 * head_dim + hidden + hidden * heads
    )
    groups, more, active = experts(
        config, dense=config["first_k_dense_replace"], shared=config["share_expert_dim"], count_key="num_experts"
    )
    return attention, groups, total + more, total + active


def gemma_4(config: Config) -> Sizes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kinds: Counter[str] = Counter(config["layer_types"])
    attention, total = [], config["vocab_size"] * hidden + hidden
    for kind, name, kv_heads, head_dim, projected in (
        ("window", "sliding_attention", config["num_key_value_heads"], config["head_dim"], 2),
        ("full", "full_attention", config["num_global_key_value_heads"], config["global_head_dim"], 1),  # keys = values
    ):
        attention.append(
            AttentionLayers(
                kind="window" if kind == "window" else "full",
                layers=kinds[name],
                query_heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                window_tokens=config["sliding_window"] if kind == "window" else 0,
            )
        )
        projections = hidden * head_dim * (2 * heads + projected * kv_heads)
        total += kinds[name] * (projections + 2 * head_dim + 2 * hidden)
    layers, intermediate, count = config["num_hidden_layers"], config["moe_intermediate_size"], config["num_experts"]
    expert, used = 3 * hidden * intermediate, config["top_k_experts"]
    total += layers * (hidden * count + hidden + count + 3 * hidden * config["intermediate_size"] + 5 * hidden)
    group = FeedForwardLayers(
        layers=layers,
        intermediate=intermediate,
        experts=count,
        experts_per_token=used,
        shared_intermediate=config["intermediate_size"],
    )
    return attention, [group], total + layers * count * expert, total + layers * used * expert


def deepseek_v4(config: Config) -> Sizes:
    """State one shared key-value head, kept whole for a window and compressed 4 or 128 times beyond it."""
    layers, heads, head_dim = config["num_hidden_layers"], config["num_attention_heads"], config["head_dim"]
    attention = []
    for ratio, count in sorted(Counter(config["compress_ratios"][:layers]).items()):
        if ratio == 0:
            attention.append(
                AttentionLayers(
                    kind="window",
                    layers=count,
                    query_heads=heads,
                    kv_heads=1,
                    head_dim=head_dim,
                    window_tokens=config["sliding_window"],
                )
            )
            continue
        rope = config["qk_rope_head_dim"] // ratio
        attention.append(
            AttentionLayers(
                kind="latent",
                layers=count,
                query_heads=heads,
                kv_heads=heads,
                head_dim=head_dim,
                latent_dim=head_dim // ratio - rope,
                rope_dim=rope,
                index_dim=config["index_head_dim"] // ratio if ratio == 4 else 0,
                selected_tokens=config["index_topk"] * ratio if ratio == 4 else 0,
            )
        )
    groups, _, _ = experts(config, dense=0, shared=config["n_shared_experts"] * config["moe_intermediate_size"])
    return attention, groups, 0, 0


def minimax_m3(config: Config) -> Sizes:
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, sparse = config["head_dim"], config["sparse_attention_config"]
    index_heads, index_dim = sparse["sparse_num_index_heads"], sparse["sparse_index_dim"]
    indexed = sum(sparse["sparse_attention_freq"])
    plain = {"kind": "full", "query_heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    attention = [
        AttentionLayers(layers=config["num_hidden_layers"] - indexed, **plain),
        AttentionLayers(
            layers=indexed,
            index_dim=index_dim,
            selected_tokens=sparse["sparse_topk_blocks"] * sparse["sparse_block_size"],
            **plain,
        ),
    ]
    total = embeddings(config) + indexed * (hidden * (index_heads + 1) * index_dim + 2 * index_dim)
    total += config["num_hidden_layers"] * (2 * hidden * (heads + kv_heads) * head_dim + 2 * head_dim + hidden)
    groups, more, active = experts(
        config,
        dense=config["first_k_dense_replace"],
        shared=config["shared_intermediate_size"],
        dense_intermediate=config["dense_intermediate_size"],
        count_key="num_local_experts",
    )
    return attention, groups, total + more, total + active


def kimi_k3(config: Config) -> Sizes:
    hidden, heads, linear = config["hidden_size"], config["num_attention_heads"], config["linear_attn_config"]
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value_dim, rank = config["qk_nope_head_dim"], config["v_head_dim"], config["q_lora_rank"]
    full, states = len(linear["full_attn_layers"]), len(linear["kda_layers"])
    inner, kernel = linear["num_heads"] * linear["head_dim"], linear["short_conv_kernel_size"]
    latent_layer = (
        hidden * rank
        + rank
        + rank * heads * (nope + rope)
        + hidden * (latent + rope)
        + latent
        + latent * heads * (nope + value_dim)
        + 2 * heads * value_dim * hidden  # output gate, output
        + hidden
    )
    delta_layer = (
        5 * hidden * inner  # query, key, value, gate, output
        + 3 * inner * kernel
        + hidden * linear["head_dim"]
        + linear["head_dim"] * inner  # decay, at low rank
        + hidden * linear["num_heads"]
        + linear["num_heads"]
        + inner
        + linear["head_dim"]
        + hidden
    )
    attention = [
        AttentionLayers(
            kind="latent",
            layers=full,
            query_heads=heads,
            kv_heads=heads,
            head_dim=nope + rope,
            value_head_dim=value_dim,
            latent_dim=latent,
            rope_dim=rope,
        ),
        AttentionLayers(
            kind="state",
            layers=states,
            query_heads=linear["num_heads"],
            kv_heads=linear["num_heads"],
            head_dim=linear["head_dim"],
            state_elements=inner * linear["head_dim"] + 3 * inner * (kernel - 1),
        ),
    ]
    total = embeddings(config) + full * latent_layer + states * delta_layer
    groups, more, active = experts(
        config,
        dense=config["first_k_dense_replace"],
        shared=config["num_shared_experts"] * config["moe_intermediate_size"],
        count_key="num_experts",
        width=config["routed_expert_hidden_size"],
    )
    return attention, groups, total + more, total + active


def nemotron_nas(config: Config) -> Sizes:
    """Follow the model's own code: a block may lack attention, and its network is `ffn_mult` wide, up to a 256th."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim, total = hidden // heads, embeddings(config)
    attention: Counter[int] = Counter()
    widths: Counter[int] = Counter()
    for block in config["block_configs"]:
        if not block["attention"]["no_op"]:
            kv_heads = heads // block["attention"]["n_heads_in_group"]
            attention[kv_heads] += 1
            total += 2 * hidden * (heads + kv_heads) * head_dim + hidden
        if not block["ffn"]["no_op"]:
            width = -(-int(2 * block["ffn"]["ffn_mult"] * hidden / 3) // 256) * 256
            widths[width] += 1
            total += 3 * hidden * width + hidden
    return (
        [
            AttentionLayers(kind="full", layers=count, query_heads=heads, kv_heads=kv_heads, head_dim=head_dim)
            for kv_heads, count in attention.items()
        ],
        [FeedForwardLayers(layers=count, intermediate=width) for width, count in widths.items()],
        total,
        total,
    )


EXTRACTORS: Mapping[str, Callable[[Config], Sizes]] = {
    "MiniMaxAI/MiniMax-M3": minimax_m3,
    "XiaomiMiMo/MiMo-V2-Flash": mimo_v2_flash,
    "deepseek-ai/DeepSeek-V4-Flash": deepseek_v4,
    "deepseek-ai/DeepSeek-V4-Pro": deepseek_v4,
    "google/gemma-4-26B-A4B": gemma_4,
    "moonshotai/Kimi-K3": kimi_k3,
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1": nemotron_nas,
    "stepfun-ai/Step-3.7-Flash": step_3_7,
}
EXTRACTED_PRECISION = {
    "XiaomiMiMo/MiMo-V2-Flash": "fp8",
    "deepseek-ai/DeepSeek-V4-Flash": "mxfp4",
    "deepseek-ai/DeepSeek-V4-Pro": "mxfp4",
    "moonshotai/Kimi-K3": "mxfp4",
}
MIXED = {  # bits of the routed experts, bits of the rest
    "deepseek-ai/DeepSeek-V4-Flash": (PRECISIONS["mxfp4"].bits, 8.0),
    "deepseek-ai/DeepSeek-V4-Pro": (PRECISIONS["mxfp4"].bits, 8.0),
    "moonshotai/Kimi-K2.5": (SCALED_GROUPS_OF_32, 16.0),
    "moonshotai/Kimi-K3": (PRECISIONS["mxfp4"].bits, 16.0),
}
NOTES = {
    "deepseek-ai/DeepSeek-V4-Flash": {
        "attention": "one shared key-value head; beyond a window of 128 tokens it is kept compressed 4 or 128 times, "
        "stated here as its share of a token; the window itself (65,536 elements a layer) is not counted"
    },
    "moonshotai/Kimi-K3": {"attention": "attention residuals between blocks are not counted"},
    "stepfun-ai/Step-3.7-Flash": {"attention": "query heads of the windowed layers as in the full ones: doubtful"},
}
NOTES["deepseek-ai/DeepSeek-V4-Pro"] = NOTES["deepseek-ai/DeepSeek-V4-Flash"]


def entry(row: Mapping[str, str], data: Path) -> dict[str, object]:
    name = row["model"]
    config = json.loads((data / "model_configs" / row["config_file"]).read_text())
    reference = int(row["reference_total_params"] or 0) - int(row["reference_vision_params"] or 0)
    active_reference = int(row["reference_active_incl_embed"] or 0)
    notes: dict[str, str] = dict(NOTES.get(name, {}))
    try:
        llm = read_config(config, name)
    except ModelFormatError:
        inner = config.get("text_config", config)
        attention, feed_forward, parameters, active = EXTRACTORS[name](inner)
        if reference and parameters:
            difference = abs(parameters / reference - 1)
            sys.stderr.write(f"{name}: {parameters - reference:+,} from the reference ({difference:.4%})\n")
        llm = Llm(
            name=name,
            architecture=inner["model_type"] if name != "moonshotai/Kimi-K3" else config["model_type"],
            parameters=reference or parameters,
            active_parameters=active_reference or active,
            hidden=inner["hidden_size"],
            vocabulary=inner["vocab_size"],
            max_context_tokens=inner["max_position_embeddings"],
            precision=EXTRACTED_PRECISION.get(name, "bf16"),
            attention=tuple(attention),
            feed_forward=tuple(feed_forward),
            tied_embeddings=bool(inner.get("tie_word_embeddings", False)),
        )
    else:
        assert not reference or abs(llm.parameters / reference - 1) < WITHIN, (name, llm.parameters, reference)
    if not reference:
        published = f"published: {row['published_total']}" if row["published_total"] else "none is published"
        notes["parameters"] = f"computed from the config; {published}"
    vision = int(row["reference_total_params"] or 0) - llm.parameters if row["reference_vision_params"] else 0
    vision = vision if int(row["reference_vision_params"] or 0) else llm.vision_parameters
    stored_bytes = int(row["safetensors_total_size_bytes"] or 0) if name in STORED_BYTES else 0
    if name in MIXED:
        expert_bits, other_bits = MIXED[name]
        embedding = llm.vocabulary * llm.hidden * 2
        others = llm.parameters - llm.expert_parameters - embedding
        bits = llm.expert_parameters * expert_bits + others * other_bits + (embedding + vision) * 16
        stored_bytes = round(bits / 8)
        notes["stored_bytes"] = f"computed: routed experts {expert_bits:g} bits, the rest {other_bits:g}"
    llm = msgspec.structs.replace(
        llm,
        vision_parameters=vision,
        stored_bytes=stored_bytes,
        precision=PRECISION.get(name, llm.precision),
        source=row["config_source"],
        notes={**{key: value for key, value in llm.notes.items() if key != "vision"}, **notes},
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
