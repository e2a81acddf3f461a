"""Turn the collected accelerator facts and price observations into `catalog/gpus.toml` and `catalog/prices.csv`.

Run by hand where the collected data lies beside the checkout; the tables are kept in the repository and may be edited::

    python tools/make_gpu_tables.py ../shared/data
"""

import csv
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

CATALOG = Path(__file__).parents[1] / "src" / "waterline" / "catalog"
READ = "2026-11-23"

GPU_HEADER = """\
# What accelerators can do: one table a card, every number with its unit in the key.
#
#   nominal_gb       what the box says; only to find the card by the name people type
#   memory_mib       what the driver offers
#   dense_tflops     dense peaks in 1e12 operations/s (1 multiply-add = 2), by precision; datasheets often print the
#                    sparse figure, twice this. GeForce: 16 bits and fp8 accumulate in fp32, at half rate; `*_acc16` is
#                    the full rate. On CDNA 1 and 2 fp32 is the matrix rate.
#   link_gb_per_s    each way, one card to all its neighbours together; pair_gb_per_s: each way, between two cards
#   pcie_gb_per_s    each way
#   tpp              total processing performance of the export rules: the best dense rate x its bits
#   doubtful         "cell" or "cell: why": our sources disagree on it, or it is from memory only; shown with a `?`
"""

CELLS = {
    "memory_gib_usable": "memory_mib",
    "memory_bandwidth_gb_s": "memory_gb_per_s",
    "tdp_w": "tdp_watts",
    "link_gb_s_per_gpu_uni": "link_gb_per_s",
    "link_gb_s_pair_uni": "pair_gb_per_s",
    "tops_int8": "dense_tflops.int8",
    "tflops_*": "dense_tflops",
    "fp32": "dense_tflops.fp32",
}
RATES = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4", "fp16_acc16", "fp8_acc16")
EVERY_FIGURE = ("memory_mib", "memory_gb_per_s", "dense_tflops", "tdp_watts", "link_gb_per_s", "pair_gb_per_s")
SOURCES = {"aic": "aiconfigurator", "stas": "the ml-engineering table", "hf": "the Hugging Face hardware table"}
EXACT_MIB = {"h200-sxm-141g": 143771, "b200-sxm-180g": 183359, "rtx-4070ti-super": 16376}
FURTHER_DOUBTS = {
    "mi308x": ["memory_mib: gpuhunt says 128 GB", "dense_tflops", "tdp_watts"],
    "b200-sxm-180g": ["memory_gb_per_s: 7700 in the datasheet, 8000 in the ml-engineering table"],
}
PAIR_GB_PER_S = {"ascend-910c": 392}  # a switched fabric: a pair gets the full rate

ALIASES = {
    "rtx-3060-12g": ["NVIDIA GeForce RTX 3060"],
    "rtx-3080-10g": ["NVIDIA GeForce RTX 3080"],
    "rtx-3090": ["NVIDIA GeForce RTX 3090"],
    "rtx-4060-8g": ["4060", "RTX 4060", "NVIDIA GeForce RTX 4060"],
    "rtx-4070": ["4070", "NVIDIA GeForce RTX 4070"],
    "rtx-4070ti-super": ["NVIDIA GeForce RTX 4070 Ti SUPER"],
    "rtx-4080": ["4080", "NVIDIA GeForce RTX 4080"],
    "rtx-4090": ["4090", "NVIDIA GeForce RTX 4090"],
    "rtx-4090d": ["4090 D", "NVIDIA GeForce RTX 4090 D"],
    "rtx-5060ti-16g": ["NVIDIA GeForce RTX 5060 Ti 16GB"],
    "rtx-5070ti": ["NVIDIA GeForce RTX 5070 Ti"],
    "rtx-5080": ["5080", "NVIDIA GeForce RTX 5080"],
    "rtx-5090": ["5090", "NVIDIA GeForce RTX 5090"],
    "rtx-a6000": ["A6000", "NVIDIA RTX A6000"],
    "rtx-6000-ada": ["6000 Ada", "NVIDIA RTX 6000 Ada Generation"],
    "rtx-pro-6000-ws": ["NVIDIA RTX PRO 6000 Blackwell Workstation Edition"],
    "rtx-pro-6000-server": ["NVIDIA RTX PRO 6000 Blackwell Server Edition"],
    "v100-pcie-16g": ["Tesla V100-PCIE-16GB"],
    "v100-sxm2-16g": ["Tesla V100-SXM2-16GB"],
    "v100-sxm2-32g": ["Tesla V100-SXM2-32GB"],
    "a10": ["NVIDIA A10"],
    "a10g": ["NVIDIA A10G"],
    "a100-pcie-40g": ["NVIDIA A100-PCIE-40GB"],
    "a100-pcie-80g": ["NVIDIA A100 80GB PCIe"],
    "a100-sxm-40g": ["NVIDIA A100-SXM4-40GB"],
    "a100-sxm-80g": ["NVIDIA A100-SXM4-80GB", "a100_sxm"],
    "a800-sxm-80g": ["NVIDIA A800-SXM4-80GB"],
    "h20-96g": ["NVIDIA H20"],
    "h20-141g": ["NVIDIA H20-3e", "H20-3e"],
    "h100-pcie-80g": ["NVIDIA H100 PCIe"],
    "h100-sxm-80g": ["NVIDIA H100 80GB HBM3"],
    "h100-nvl-94g": ["NVIDIA H100 NVL"],
    "h800-sxm-80g": ["NVIDIA H800"],
    "h200-sxm-141g": ["NVIDIA H200"],
    "h200-nvl-141g": ["NVIDIA H200 NVL"],
    "gh200-96g": ["NVIDIA GH200 480GB"],
    "b200-sxm-180g": ["NVIDIA B200"],
    "b300-sxm-288g": ["NVIDIA B300"],
    "gb200-186g": ["NVIDIA GB200"],
    "gb300-288g": ["NVIDIA GB300"],
    "gb10-dgx-spark": ["NVIDIA GB10", "Spark"],
    "mi300x": ["AMD Instinct MI300X OAM"],
    "rx-7900xt": ["7900 XT"],
    "rx-7900xtx": ["7900 XTX"],
    "strix-halo-8060s": ["Radeon 8060S", "Ryzen AI Max+ 395"],
    "apple-m4-max": ["M4 Max"],
    "apple-m3-ultra": ["M3 Ultra"],
    "ascend-910b": ["910B"],
    "ascend-910c": ["910C"],
}

PROCESSOR = """
[gpu.cpu]
name = "This machine's processor"
aliases = ["processor", "laptop"]
vendor = "cpu"
architecture = "x86-64 or arm64"
stack = "cpu"
support = "full"
memory_mib = 8192
memory_gb_per_s = 20
dense_tflops = { fp32 = 0.2, fp16 = 0.2, bf16 = 0.2, int8 = 0.4 }
link = "none"
topology = "single"
link_gb_per_s = 0
pair_gb_per_s = 0
gpus_per_node = 1
doubtful = ["memory_mib: a laptop's share", "memory_gb_per_s: 24.7 measured on one machine", "dense_tflops: assumed"]
source = "own measurement: memory read at 24.7 GB/s on 2 virtual cores of an EPYC"
read = 2026-11-23
notes = "stands for a laptop without an accelerator, so that a first fleet can be planned and started anywhere"
"""


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def number(text: str) -> str:
    return f"{float(text):.10g}"


def doubts(row: dict[str, str]) -> list[str]:
    """Return the cells marked uncertain, then those where another source differs, each with its reason."""
    found: dict[str, str] = {}
    uncertain = "" if row["uncertain"].startswith("ALL:") else row["uncertain"]
    for item in filter(None, uncertain.split(";")):
        cell, _, reason = item.partition("(")
        for name in expanded(cell):
            found[name] = reason.rstrip(")")
    for item in re.findall(r"(\w+)\.(\w+)!=([\d.]+)(\(blank here\))?", row["crosscheck"]):
        source, cell, value, blank = item
        reason = f"{SOURCES[source]} says {value}" + (", left out here" if blank else "")
        for name in expanded(cell):
            known = found.get(name, "")
            if value not in known:
                found[name] = f"{known}; {reason}" if known else reason
    texts = [f"{name}: {reason}" if reason else name for name, reason in found.items()]
    texts += [doubt for doubt in FURTHER_DOUBTS.get(row["id"], []) if doubt.split(":")[0] not in found]
    return [text.replace("stas00", "ml-engineering") for text in texts]


def expanded(cell: str) -> tuple[str, ...]:
    if cell == "ALL":
        return EVERY_FIGURE
    if cell == "link_*":
        return ("link_gb_per_s", "pair_gb_per_s")
    if cell.startswith("tflops_") and cell != "tflops_*":
        return ("dense_tflops." + cell.removeprefix("tflops_"),)
    return (CELLS.get(cell, cell),)


def table(row: dict[str, str]) -> str:
    rates = {
        rate: number(row[column])
        for rate in RATES
        if row[column := "tops_int8" if rate == "int8" else f"tflops_{rate}"]
    }
    if row["id"] == "b300-sxm-288g" or row["id"] == "gb300-288g":
        assert float(rates["int8"]) < 200, "the cut INT8 rate"
    memory_mib = EXACT_MIB.get(row["id"]) or round(float(row["memory_gib_usable"]) * 1024)
    lines = [f"[gpu.{row['id']}]", f"name = {quoted(row['name'])}"]
    if aliases := ALIASES.get(row["id"]):
        lines.append(f"aliases = [{', '.join(map(quoted, aliases))}]")
    for key, column in (("vendor", "vendor"), ("architecture", "arch"), ("chip", "gpu_chip"), ("target", "cc_or_gfx")):
        lines.append(f"{key} = {quoted(row[column])}")
    lines += [f"stack = {quoted(row['stack'])}", f"support = {quoted(row['support'])}"]
    lines += [f"nominal_gb = {number(row['memory_gb_marketing'])}", f"memory_mib = {memory_mib}"]
    lines.append(f"memory_gb_per_s = {number(row['memory_bandwidth_gb_s'])}")
    lines.append("dense_tflops = { " + ", ".join(f"{rate} = {value}" for rate, value in rates.items()) + " }")
    if row["tdp_w"]:
        lines.append(f"tdp_watts = {number(row['tdp_w'])}")
    lines += [f"link = {quoted(row['link'])}", f"topology = {quoted(row['link_topology'])}"]
    lines.append(f"link_gb_per_s = {number(row['link_gb_s_per_gpu_uni'] or '0')}")
    pair = row["link_gb_s_pair_uni"] or str(PAIR_GB_PER_S.get(row["id"], 0))
    lines.append(f"pair_gb_per_s = {number(pair)}")
    if row["pcie_gb_s_uni"]:
        lines.append(f'pcie = "{row["pcie_gen"]}.0 x{row["pcie_lanes"]}"')
        lines.append(f"pcie_gb_per_s = {number(row['pcie_gb_s_uni'])}")
    lines.append(f"gpus_per_node = {row['gpus_per_node']}")
    for key, column in (("release_year",) * 2, ("msrp_usd",) * 2, ("tpp", "bis_tpp"), ("die_mm2",) * 2):
        if row[column]:
            lines.append(f"{key} = {number(row[column])}")
    if doubtful := doubts(row):
        lines.append("doubtful = [" + ", ".join(map(quoted, doubtful)) + "]")
    source = re.sub(r" \(device here:[^)]*\)", "", row["source"]).replace("stas00 table", "ml-engineering table")
    lines += [f"source = {quoted(source.replace('stas00', 'ml-engineering table'))}", f"read = {READ}"]
    if row["notes"]:
        lines.append(f"notes = {quoted(row['notes'].replace('stas00', 'ml-engineering'))}")
    return "\n".join(lines)


def write_gpus(data: Path) -> int:
    with (data / "accelerators.csv").open() as file:
        rows = list(csv.DictReader(file))
    text = GPU_HEADER + "".join(f"\n{table(row)}\n" for row in rows) + PROCESSOR
    (CATALOG / "gpus.toml").write_text(text)
    return len(rows)


def write_prices(data: Path) -> int:
    """Write one row a card and kind; the medians must be those collected before."""
    observed: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    with (data / "gpu_price_observations.csv").open() as file:
        for row in csv.DictReader(file):
            observed[row["accelerator_id"], row["kind"].removesuffix("_usd")].append(row)
    with (data / "gpu_prices.csv").open() as file:
        medians = {row["accelerator_id"]: row for row in csv.DictReader(file)}
    lines = ["gpu,kind,low,median,high,unit,date,verified,recalled,source"]
    for gpu, row in medians.items():
        for kind in ("on_demand", "spot", "community", "purchase"):
            column = "purchase_usd" if kind == "purchase" else f"{kind}_usd_gpu_h_median"
            if not row[column]:
                continue
            seen = observed[gpu, kind]
            prices = [float(one["usd"]) for one in seen]
            assert abs(median(prices) / float(row[column]) - 1) < 1e-3, (gpu, kind, prices, row[column])
            unit = "usd" if kind == "purchase" else "usd_per_gpu_hour"
            date = row["purchase_date"] if kind == "purchase" else row["date"]
            flags = [one["flag"] for one in seen]
            sources = "; ".join(dict.fromkeys(f"{one['provider']}: {one['source']}" for one in seen))
            sources = sources.replace('"', "'")
            low, middle, high = (f"{price:.6g}" for price in (min(prices), float(row[column]), max(prices)))
            counts = f"{flags.count('verified')},{flags.count('recalled')}"
            lines.append(f'{gpu},{kind},{low},{middle},{high},{unit},{date},{counts},"{sources}"')
    (CATALOG / "prices.csv").write_text("\n".join(lines) + "\n")
    return len(lines) - 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER_OF_THE_COLLECTED_DATA")
    folder = Path(sys.argv[1])
    sys.stdout.write(f"{write_gpus(folder)} accelerators, {write_prices(folder)} prices\n")
