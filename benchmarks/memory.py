"""Memory: what we say beside what engines logged, and whether a model fits beside what ran and what did not.

    python benchmarks/memory.py [FOLDER]     # of serving/e2e_public.csv and e2e_datacentre.csv

Beside us the rules of thumb of others: GPUStack's 1.2 times the weights, and parameters times bits over 8, as pages
that answer "can I run it" do. Neither says how many tokens the cache holds.

The figures of the engine profile (bytes of logits, overhead) were read off the logs of llm-d; the others test them.
"""

import csv
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from waterline import catalog
from waterline.catalog.engines import find_engine
from waterline.cost.memory import (
    cache_tokens,
    memory_fit,
    memory_use,
    sequence_cache_bytes,
    weights_bytes,
)
from waterline.errors import WaterlineError
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, AttentionLayers, FeedForwardLayers, Llm
from waterline.plan import Layout
from waterline.units import GIB, MIB

DATA = Path(__file__).parents[2] / "shared" / "data"
HOPPER = {"step_tokens": 8192, "sequences": 1024}  # what vLLM serves with by default on cards of 70 GiB and more
ANY_CONTEXT = 8192
Row = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """One start-up log of vLLM, with its settings as its author states them or as the version's defaults."""

    model: str
    gpu: str
    precision: str
    version: str
    source: str
    note: str = ""  # why it differs, where that is known
    measured: dict[str, float]  # "weights" and "cache" in GiB on one GPU, "tokens", "sequences"
    layout: Layout = field(default_factory=Layout)
    context: int = ANY_CONTEXT
    settings: dict[str, Any] = field(default_factory=dict)


OLD_LATENT = """vLLM 0.7 alone, not modelled: rows of MLA's cache were padded to 256 bytes (59.75 GiB of
  1,856,368 tokens are 27 layers of 1280 bytes; 512 + 64 elements are 1152), and the products of queries and keys, and
  of values and outputs, were kept besides, in 16 bits: 27 x 2048 x (2 x 8192 + 1024) parameters, 1.79 GiB. With both,
  and groups of 64, as 10,944 columns ask for, weights are 1.9 % off and tokens 0.2 %"""
PLANNER = "llm-d-planner accuracy report"
EMPIRICAL = "llm-d-benchmark empirical results"
LOGS = (
    Log(
        model="DeepSeek-R1-Distill-Qwen-14B", gpu="rtx-4090", precision="bf16", version="0.7", layout=Layout(tp=2),
        settings={"usable_fraction": 0.98}, measured={"weights": 13.9476, "tokens": 81536}, source="vllm 13061",
    ),
    Log(
        model="Qwen3-235B-A22B", gpu="h100-sxm-80g", precision="fp8", version="0.9", layout=Layout(tp=4),
        settings=HOPPER, measured={"cache": 8.11, "tokens": 178880}, source="vllm 21348",
    ),
    Log(
        model="llama-3.1-405b-fp8-july-2024", gpu="h100-sxm-80g", precision="fp8", version="0.5", layout=Layout(tp=8),
        measured={"weights": 57.752}, source="vllm 6746",
    ),
    Log(
        model="deepseek-coder-v2-lite", gpu="h100-sxm-80g", precision="int4", version="0.7", context=163840,
        measured={"weights": 10.45, "cache": 59.75, "tokens": 1856368}, source="vllm 13109", note=OLD_LATENT,
    ),
    Log(
        model="Qwen2.5-7B-Instruct", gpu="rtx-4060-8g", precision="int4", version="0.7",
        settings={"usable_fraction": 0.70}, measured={"weights": 5.2032, "cache": -1.05}, source="vllm 13882",
    ),
    Log(
        model="Qwen3.5-27B", gpu="h20-141g", precision="bf16", version="0.19", context=32768,
        settings=HOPPER, measured={"sequences": 33.04}, source="vllm 40691",
    ),
    Log(
        model="qwen1.5-7b", gpu="rtx-3090", precision="int4", version="0.3", settings={"step_tokens": 32768},
        measured={"tokens": 24320}, source="Qwen3 16",
    ),
    Log(
        model="Llama-3.1-8B", gpu="rtx-3090", precision="bf16", version="0.6", settings={"step_tokens": 20000},
        measured={"weights": 14.99, "cache": 3.81}, source="a log",
    ),
    Log(
        model="Llama-3.1-8B", gpu="rtx-3090", precision="bf16", version="0.6", settings={"step_tokens": 29000},
        measured={"cache": 2.89}, source="a log",
    ),
    *(
        Log(model=model, gpu="h100-sxm-80g", precision=precision, version="0.12", layout=Layout(tp=tp),
            settings=HOPPER, measured={"weights": weights, "cache": cache}, source=EMPIRICAL)
        for model, precision, tp, weights, cache in (
            ("gpt-oss-20b", "mxfp4", 1, 13.47, 50.28),
            ("Meta-Llama-3.1-70B", "fp8", 2, 33.88, 32.0),
            ("Llama-3.1-8B", "bf16", 1, 14.99, 51.38),
            ("Qwen3-0.6B", "bf16", 1, 1.12, 64.45),
            ("Qwen3-32B", "bf16", 1, 61.03, 4.45),
        )
    ),
    *(
        Log(model=model, gpu="h100-sxm-80g", precision="bf16", version=version, layout=layout,
            settings={**HOPPER, "usable_fraction": 0.95}, measured=measured, source=PLANNER)
        for model, version, layout, measured in (
            ("Llama-3.1-8B", "0.19", Layout(), {"weights": 14.99, "cache": 58.11, "tokens": 476000}),
            ("Llama-3.1-8B", "0.19", Layout(tp=2), {"weights": 7.51}),
            ("Llama-3.1-8B", "0.19", Layout(tp=4), {"weights": 3.77}),
            ("Llama-3.1-8B", "0.19", Layout(pp=4), {"weights": 4.26}),
            ("Qwen2.5-7B-Instruct", "0.19", Layout(), {"weights": 14.25, "cache": 58.53, "tokens": 1096000}),
            ("Qwen2.5-7B-Instruct", "0.19", Layout(tp=2), {"weights": 7.12}),
            ("Qwen2.5-7B-Instruct", "0.19", Layout(tp=4), {"weights": 3.55}),
            ("Qwen3-14B", "0.15", Layout(), {"weights": 27.52, "cache": 41.94}),
            ("Qwen3-14B", "0.17", Layout(), {"weights": 27.52, "cache": 45.34}),
            ("Qwen3-14B", "0.18", Layout(), {"weights": 27.52, "cache": 45.23}),
        )
    ),
)  # fmt: skip

# Checkpoints of the logs that the catalogue does not list.
OTHERS = {
    "llama-3.1-405b-fp8-july-2024": Llm(  # 16 KV heads then; only the feed-forward networks of 124 layers in 8 bits
        name="llama-3.1-405b-fp8-july-2024", architecture="llama", parameters=410_081_542_144,
        active_parameters=410_081_542_144, hidden=16384, vocabulary=128_256, max_context_tokens=131_072,
        precision="fp8", stored_bytes=2 * 410_081_542_144 - 124 * 3 * 16384 * 53248,
        attention=(AttentionLayers(kind="full", layers=126, query_heads=128, kv_heads=16, head_dim=128),),
        feed_forward=(FeedForwardLayers(layers=126, intermediate=53248),),
    ),
    "deepseek-coder-v2-lite": Llm(
        name="deepseek-coder-v2-lite", architecture="deepseek_v2", parameters=15_706_484_224,
        active_parameters=2_660_000_000, hidden=2048, vocabulary=102_400, max_context_tokens=163_840, precision="int4",
        attention=(
            AttentionLayers(
                kind="latent", layers=27, query_heads=16, kv_heads=16, head_dim=192, value_head_dim=128,
                latent_dim=512, rope_dim=64,
            ),
        ),
        feed_forward=(
            FeedForwardLayers(layers=1, intermediate=10944),
            FeedForwardLayers(layers=26, intermediate=1408, experts=64, experts_per_token=6, shared_intermediate=2816),
        ),
    ),
    "qwen1.5-7b": Llm(
        name="qwen1.5-7b", architecture="qwen2", parameters=7_721_324_544, active_parameters=7_721_324_544,
        hidden=4096, vocabulary=151_936, max_context_tokens=32768, precision="int4",
        attention=(AttentionLayers(kind="full", layers=32, query_heads=32, kv_heads=32, head_dim=128),),
        feed_forward=(FeedForwardLayers(layers=32, intermediate=11008),),
    ),
}  # fmt: skip

PRECISION_WORDS = {"f16": "fp16", "fp4": "nvfp4", "uint4": "int4", "fp8_block": "fp8", "": "bf16"}
MODEL_WORDS = {
    "llama2-70b-99": "Llama-2-70b-hf", "llama3.1-405b": "Meta-Llama-3.1-405B", "llama3.1-8b": "Llama-3.1-8B",
    "llama3_1-8b": "Llama-3.1-8B", "mixtral-8x7b": "Mixtral-8x7B-v0.1", "deepseek-r1": "DeepSeek-R1",
    "llama 7B": "Llama-2-7b-hf", "llama 8B": "Llama-3.1-8B", "Meta-Llama-3-8B-Instruct": "Llama-3.1-8B",
    "Meta-Llama-3-70B-Instruct": "Meta-Llama-3.1-70B", "Qwen/Qwen3-235B-A22B-FP8": "Qwen3-235B-A22B",
    "nvidia/DeepSeek-R1-NVFP4": "DeepSeek-R1", "nvidia/Llama-3.1-8B-Instruct-FP8": "Llama-3.1-8B",
    "Kimi-K2.5-NVFP4": "Kimi-K2.5", "moonshotai/Kimi-K2.6": "Kimi-K2.5", "Qwen/Qwen3-14B-AWQ": "Qwen3-14B",
    "Qwen/Qwen3-235B-A22B-Instruct-2507": "Qwen3-235B-A22B", "MiniMaxAI/MiniMax-M2.7": "MiniMax-M2.5",
    "Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8": "Qwen3-Coder-480B-A35B-Instruct",
    "amd/Llama-3.1-405B-Instruct-FP8-KV": "Meta-Llama-3.1-405B", "deepseek-ai/DeepSeek-V3.1": "DeepSeek-V3",
    "amd/Llama-3.1-70B-Instruct-FP8-KV": "Meta-Llama-3.1-70B",
    "Qwen/Qwen3-4B-Instruct-2507": "Qwen3-4B", "zai-org/GLM-5-FP8": "GLM-5",
}  # fmt: skip
GPU_WORDS = {
    "H100": "h100-sxm-80g", "H200": "h200-sxm-141g", "NVIDIA H200-SXM-141GB": "h200-sxm-141g",
    "Virtualized NVIDIA H200-SXM-141GB": "h200-sxm-141g", "NVIDIA H200-NVL-141GB": "h200-nvl-141g",
    "NVIDIA H100-SXM-80GB": "h100-sxm-80g", "NVIDIA B200-SXM-180GB": "b200-sxm-180g", "NVIDIA GB200": "gb200-186g",
    "AMD Instinct MI300X 192GB HBM3": "mi300x", "AMD Instinct MI325X 256GB HBM3e": "mi325x",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx-pro-6000-server", "A100 80GB": "a100-sxm-80g",
}  # fmt: skip
NOT_LISTED = {  # a card of the catalogue that offers as much to a program or a little less, and its MiB
    "3070 8GB": ("rtx-4060-8g", 8192), "3080 Ti 12GB": ("rtx-3060-12g", 12288), "4070 Ti 12GB": ("rtx-4070", 12282),
    "RTX 4000 Ada 20GB": ("rtx-6000-ada", 20475), "RTX 5000 Ada 32GB": ("rtx-6000-ada", 32760),
}  # fmt: skip


# --- What engines logged --------------------------------------------------------------------------------------------


def ours(log: Log) -> dict[str, float]:
    llm, gpu = model(log.model), catalog.find_gpu(log.gpu)
    use = memory_use(llm, gpu, log.layout, log.precision, find_engine("vllm", log.version), **log.settings)
    return {
        "weights": use.weights_bytes / GIB,
        "cache": use.cache_bytes / GIB,
        "tokens": float(cache_tokens(llm, log.layout, use, log.context)),
        "sequences": cache_tokens(llm, log.layout, use, log.context) / log.context,
    }


def print_logs() -> None:
    print(f"{'model':30} {'card':13} {'layout':6} {'vLLM':>5} {'what':9} {'logged':>11} {'ours':>11} {'error':>8}")
    errors: dict[str, list[float]] = {}
    for log in LOGS:
        said = ours(log)
        for what, measured in log.measured.items():
            error = said[what] / measured - 1
            fits_neither = measured < 0 and said[what] < 0
            if not fits_neither:
                errors.setdefault(what, []).append(abs(error))
            shown = "no room" if fits_neither else f"{error:+8.1%}"
            print(
                f"{log.model[:30]:30} {log.gpu:13} {log.layout!s:6} {log.version:>5} {what:9} {measured:11.2f} "
                f"{said[what]:11.2f} {shown:>8}  {log.source}"
            )
        if log.note:
            print(f"  {log.note}")
    for what, found in errors.items():
        found.sort()
        limit = 0.015 if what == "weights" else 0.10
        within = sum(error <= limit for error in found)
        middle, worst = found[len(found) // 2], found[-1]
        print(f"{what}: median {middle:.1%}, worst {worst:.1%}, {within} of {len(found)} within {limit:.1%}")


# --- What ran and what did not --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One published run, or one that ran out of memory."""

    name: str
    llm: Llm
    gpu: Gpu
    precision: str
    engine: str
    layouts: tuple[Layout, ...]  # one of which it was
    context: int
    ran: bool


def model(name: str) -> Llm:
    return OTHERS.get(name) or catalog.find_model(MODEL_WORDS.get(name, name))


def card(name: str) -> Gpu:
    if name not in NOT_LISTED:
        return catalog.find_gpu(GPU_WORDS.get(name, name))
    like, memory_mib = NOT_LISTED[name]
    return replace(catalog.find_gpu(like), id=name, memory_bytes=memory_mib * MIB)


def we_say(case: Case) -> bool:
    engine = find_engine(case.engine)

    def fits(layout: Layout) -> bool:
        use = memory_use(case.llm, case.gpu, layout, case.precision, engine)
        return memory_fit(case.llm, use, layout, case.context).fits

    return any(fits(layout) for layout in case.layouts)


def gpustack_says(case: Case) -> bool:
    gpus = max(layout.gpus for layout in case.layouts)
    return 1.2 * weights_bytes(case.llm, case.precision) <= gpus * case.gpu.memory_bytes


def pages_say(case: Case) -> bool:
    gpus = max(layout.gpus for layout in case.layouts)
    bits = PRECISIONS[case.precision].bits
    return case.llm.parameters * bits / 8 <= gpus * case.gpu.memory_bytes


def public_cases(rows: list[Row], refused: Counter[str]) -> Iterator[Case]:
    kinds = {"serving_bench", "llamacpp_bench", "offline_throughput", "offline_latency", "mlperf_inference_v5.1", "fit"}
    for row in rows:
        if row["kind"] not in kinds or not row["n_gpu"]:
            continue
        try:
            llm = model(row["model"])
            word = row["precision"].split()[0].split("/")[0].lower()
            precision = llm.precision if word == "checkpoint" else PRECISION_WORDS.get(word, word)
            PRECISIONS[precision]
            gpu = card(row["gpu"])
        except (WaterlineError, KeyError) as error:
            refused[str(error)[:60]] += 1
            continue
        yield Case(
            name=f"{row['model']} {precision} {row['n_gpu']}x{gpu.id} {row['engine'][:12]}",
            llm=llm,
            gpu=gpu,
            precision=precision,
            engine=engine_of(row["engine"]),
            layouts=public_layouts(row),
            context=int(float(row["isl"] or 0)) + int(float(row["osl"] or 0)) or 1024,
            ran=row["kind"] != "fit" or row["value"] == "1",
        )


def engine_of(text: str) -> str:
    words = {"llama.cpp": "llamacpp", "sglang": "sglang", "tensorrt": "trtllm"}
    return next((engine for word, engine in words.items() if word in text.lower()), "vllm")


def public_layouts(row: Row) -> tuple[Layout, ...]:
    gpus = int(row["n_gpu"])
    if row["tp"] == "layer-split":
        return (Layout(pp=gpus),)
    if row["tp"].isdigit() and int(row["tp"]) > 1:
        return (Layout(tp=int(row["tp"])),)
    return tuple(Layout(tp=tp) for tp in (1, 2, 4, 8) if tp <= gpus)


def datacentre_cases(rows: list[Row], refused: Counter[str]) -> Iterator[Case]:
    for row in rows:
        try:
            llm, gpu = model(row["model"]), card(row["gpu"])
        except WaterlineError as error:
            refused[str(error)[:60]] += 1
            continue
        precision = PRECISION_WORDS.get(row["precision"], row["precision"])
        yield Case(
            name=f"{row['model']} {precision} {gpu.id} {row['engine']} {datacentre_layout(row)}",
            llm=llm,
            gpu=gpu,
            precision=precision,
            engine=row["engine"],
            layouts=(datacentre_layout(row),),
            context=int(row["isl"]) + int(row["osl"]),
            ran=True,
        )


def datacentre_layout(row: Row) -> Layout:
    """Some rows write tp x ep into tp, or dp x ep into attention_dp: 64 with 8 x 8 experts is eight GPUs."""
    tp, dp, moe_tp, moe_ep = (max(1, int(row[key] or 1)) for key in ("tp", "attention_dp", "moe_tp", "moe_ep"))
    if moe_tp == moe_ep > 1:
        tp, dp = (moe_ep if degree == moe_tp * moe_ep else degree for degree in (tp, dp))
    elif moe_tp * moe_ep > tp * dp:
        tp = moe_tp * moe_ep // dp
    return Layout(tp=tp, dp=dp, ep=min(moe_ep, tp * dp))


def print_cases(title: str, cases: list[Case]) -> None:
    rules: dict[str, Callable[[Case], bool]] = {"ours": we_say, "x 1.2": gpustack_says, "bits / 8": pages_say}
    print(f"\n{title}: {len(cases)} rows")
    for name, says in rules.items():
        missed = [case for case in cases if case.ran and not says(case)]
        allowed = [case for case in cases if not case.ran and says(case)]
        print(f"  {name:9} ran but 'does not fit': {len(missed):4}   out of memory but 'fits': {len(allowed):3}")
        if name == "ours":
            for case, count in Counter(case.name for case in (*missed, *allowed)).items():
                print(f"    {count:4} {case}")


def main(folder: Path) -> None:
    print_logs()
    longest = (
        sequence_cache_bytes(model("Qwen3-30B-A3B"), 262_144, Layout()) / GIB
    )  # Qwen3-Coder-30B has the same shape
    print(f"one sequence of 262,144 tokens of Qwen3-Coder-30B-A3B: logged 24.00 GiB, ours {longest:.2f}  vllm 34076")
    refused: Counter[str] = Counter()
    public = list(public_cases(read(folder / "e2e_public.csv"), refused))
    datacentre = list(datacentre_cases(read(folder / "e2e_datacentre.csv"), refused))
    print_cases("reported out of memory", [case for case in public if not case.ran])
    print_cases("public runs", [case for case in public if case.ran])
    print_cases("data centre runs", datacentre)
    print(f"\nnot answered: {refused.total()} rows")
    for reason, count in refused.most_common(12):
        print(f"  {count:4} {reason}")


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA / "serving")
