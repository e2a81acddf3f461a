"""Does a plan hold its SLO in its own rehearsal? A dozen fleets, each rehearsed twice for a quarter of an hour.

    .venv/bin/python benchmarks/plan_against_rehearsal.py

The plan says what 99 % of the requests keep to by formulas (`planner/queueing.py`); the rehearsal takes every step. No
peer plans for a fraction of the requests: their figures are means.
"""

import tempfile
from pathlib import Path

import waterline
from waterline.errors import InfeasibleError

FLEETS = [  # card, nodes, model, precisions, requests/s, prompt, output tokens
    ("rtx-4090", 2, "meta-llama/Llama-3.1-8B", [], 1.0, 1000, 200),
    ("rtx-4090", 2, "Qwen/Qwen3-32B", ["fp8", "int4"], 0.3, 1000, 300),
    ("rx-7900xtx", 2, "Qwen/Qwen2.5-7B-Instruct", [], 0.5, 500, 200),
    ("l4", 2, "meta-llama/Llama-3.1-8B", [], 1.0, 800, 150),
    ("l40s", 4, "Qwen/Qwen3-14B", [], 4.0, 2000, 200),
    ("a100-sxm-80g", 1, "mistralai/Mixtral-8x7B-v0.1", [], 3.0, 1000, 300),
    ("h100-sxm-80g", 1, "openai/gpt-oss-20b", [], 40.0, 500, 100),
    ("h100-sxm-80g", 2, "meta-llama/Meta-Llama-3.1-70B", [], 3.0, 1500, 300),
    ("h200-sxm-141g", 2, "deepseek-ai/DeepSeek-R1", [], 3.0, 1000, 1000),
    ("b200-sxm-180g", 1, "openai/gpt-oss-120b", [], 20.0, 2000, 500),
    ("mi300x", 1, "deepseek-ai/DeepSeek-R1", [], 1.0, 3000, 800),
    ("mi300x", 3, "Qwen/Qwen3-235B-A22B", [], 5.0, 4000, 200),
]


def main() -> None:
    print("| card | model | planned | requests | in SLO, seed 0 | seed 1 |\n|---|---|---|---|---|---|")
    for card, nodes, model, precisions, requests_per_s, prompt_tokens, output_tokens in FLEETS:
        text = f"""
            name = "case"
            pools = [{{ name = "pool", gpu = "{card}", nodes = {nodes}, usd_per_gpu_hour = 1.0 }}]
            models = [{{ name = "model", weights = "{model}", precisions = {precisions} }}]
            [[demand]]
            requests_per_s = {requests_per_s}
            prompt_tokens = {prompt_tokens}
            output_tokens = {output_tokens}
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "fleet.toml"
            path.write_text(text)
            try:
                plan = waterline.make_plan(waterline.load_fleet(path))
            except InfeasibleError as error:
                print(f"| {card} | {model} | {error} | | | |")
                continue
        totals = [waterline.rehearse(plan, seed=seed, policy="plan").summaries[0] for seed in (0, 1)]
        first = plan.replicas[0]
        planned = f"{len(plan.replicas)} x {first.precision} {first.layout}"
        fractions = " | ".join(f"{total.slo_fraction:.2%}" for total in totals)
        print(f"| {card} | {model} | {planned} | {totals[0].requests} | {fractions} |", flush=True)


if __name__ == "__main__":
    main()
