"""DeepSeek's day: nodes by hour when their throughput is given, and a node's throughput by our own cost model.

    .venv/bin/python benchmarks/deepseek_day.py [../shared/data/deepseek_day.csv]

What they published: 278 nodes of eight H800 at the peak, 226.75 in the mean, 87,072 USD; prefill 73,700 tokens a second
and node, cached ones included, decode 14,800. By hour there is only a chart, read off into the file that is the
argument; without it the hours are left out. No peer plans a day.
"""

import csv
import sys
from pathlib import Path

from msgspec.structs import replace

import waterline
from waterline.plan import Plan, Role

FLEET = Path(__file__).parents[1] / "examples" / "deepseek-day.toml"
CHART = Path(__file__).parents[2] / "shared" / "data" / "deepseek_day.csv"
NODE = 8  # GPUs
MEAN_NODES, PEAK_NODES, USD = 226.75, 278, 87_072
PROMPT_TOKENS_PER_S, OUTPUT_TOKENS_PER_S = 73_700, 14_800


def main(chart: Path) -> None:
    fleet = waterline.load_fleet(FLEET)
    given = waterline.make_plan(fleet)
    own = waterline.make_plan(replace(fleet, models=tuple(replace(model, measured=()) for model in fleet.models)))
    print("| | theirs | throughput given | | our cost model | |\n|---|---:|---:|---:|---:|---:|")
    for name, theirs, of in (
        ("nodes, mean", MEAN_NODES, lambda plan: sum(nodes(plan)) / 24),
        ("nodes, peak", PEAK_NODES, lambda plan: max(nodes(plan))),
        ("USD a day", USD, lambda plan: sum(hour.usd for hour in plan.hours)),
    ):
        row(name, theirs, of(given), of(own))
    demand = fleet.demand[0]
    for name, theirs, role, tokens in (
        ("prefill, tokens/s a node", PROMPT_TOKENS_PER_S, "prefill", demand.prompt_tokens),
        ("decode, tokens/s a node", OUTPUT_TOKENS_PER_S, "decode", demand.output_tokens),
    ):
        row(name, theirs, None, per_node(own, role, tokens))
    if chart.is_file():
        with chart.open() as file:
            read = {int(line["start_local_utc8"][-5:-3]): float(line["nodes_mean"]) for line in csv.DictReader(file)}
        for hour in range(24):
            row(f"nodes at {hour}:00", read[hour], nodes(given)[hour], nodes(own)[hour])
        errors = sorted(abs(nodes(given)[hour] / read[hour] - 1) for hour in read)
        near = sum(error <= 0.15 for error in errors)
        print(f"\nThroughput given: {near} of 24 hours within 15 %, worst {errors[-1]:.1%}.")


def nodes(plan: Plan) -> list[float]:
    return [hour.gpus / NODE for hour in plan.hours]


def per_node(plan: Plan, role: Role, tokens: int) -> float | None:
    """Return the tokens of prompts or answers a node of that role sustains; of replicas that do both, at their mix."""
    at_peak = plan.replicas_at(plan.busiest_hour)
    chosen = [replica for replica in at_peak if replica.role == role] or [r for r in at_peak if r.role == "both"]
    gpus = sum(replica.layout.gpus for replica in chosen)
    return sum(replica.requests_per_s for replica in chosen) * tokens / gpus * NODE if gpus else None


def row(name: str, theirs: float, *ours: float | None) -> None:
    cells = [f"{one:,.5g} | {one / theirs - 1:+.1%}" if one else " | " for one in ours]
    print(f"| {name} | {theirs:,.5g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CHART)
