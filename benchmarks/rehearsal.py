"""How many requests a second the oracle rehearses, beside what peers were measured at.

    .venv/bin/python benchmarks/rehearsal.py [TRACE.csv.gz]

The Azure code trace (8,819 requests; CC-BY, Azure/AzurePublicDataset) is sped up with the replicas, so that each of
them gets what one would get alone; nobody is refused. Time is CPU time of this process in the simulator alone, the
median of three runs. Peers: the whole process on the 19,366 requests of the Azure conversation trace (splitwise-sim:
its first 2,000), measured on the 2-core machine on which Waterline was begun. They ran other models and schedulers:
compare orders of magnitude.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from waterline import catalog
from waterline.catalog.engines import find_engine
from waterline.cost import step_cost
from waterline.plan import Layout
from waterline.rehearsal.oracle import Capacity, Step, serve
from waterline.workload import Request, read_trace

AZURE = Path(__file__).parents[2] / "shared" / "data" / "traces" / "AzureLLMInferenceTrace_code.csv.gz"
RUNS = 3
PEERS = (  # name and version, replicas, requests per CPU second
    ("Vidur 7d47513, Llama-3-8B on A100, sarathi", 1, 405),
    ("Vidur 7d47513", 8, 242),
    ("Vidur 7d47513", 64, 223),
    ("BLIS f90a1e3, Llama-3.1-8B on A100", 1, 257),
    ("splitwise-sim 8f99e7d, token_jsq", 1, 82),
)


def capacity(index: int) -> Capacity:
    step = step_cost(
        catalog.find_model("meta-llama/Llama-3.1-8B"),
        catalog.find_gpu("a100-sxm-80g"),
        Layout(),
        "bf16",
        find_engine("vllm"),
    )
    return Capacity(
        replica=f"llama/{index}",
        gpus=1,
        step=step,
        max_batch=256,
        cache_tokens=400_000,
        max_context_tokens=16_384,
        prefill_tokens_per_s=1e4,
        tokens_per_s=1e4,
    )


def requests_per_cpu_s(requests: list[Request], replicas: int) -> tuple[float, int]:
    """Return the speed and the steps that were taken for each request."""
    faster = [replace(request, arrival_s=request.arrival_s / replicas) for request in requests]
    capacities = [capacity(index) for index in range(replicas)]
    times_s = []
    for _ in range(RUNS):
        began_s = time.process_time()
        serve(capacities, faster, deadline_s=1e9, expected_prompt_tokens=2000, expected_output_tokens=28)
        times_s.append(time.process_time() - began_s)
    steps: list[Step] = []
    serve(capacities, faster, deadline_s=1e9, expected_prompt_tokens=2000, expected_output_tokens=28, steps=steps)
    return len(requests) / median(times_s), len(steps)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else AZURE
    requests = list(read_trace(path).requests)
    table = Table(title=f"{path.name}: {len(requests):,} requests", title_justify="left")
    table.add_column("simulator")
    for name in ("replicas", "steps per request", "requests per CPU second"):
        table.add_column(name, justify="right")
    for replicas in (1, 4, 16):
        speed, steps = requests_per_cpu_s(requests, replicas)
        table.add_row(
            "Waterline's oracle, CPython, step by step", str(replicas), f"{steps / len(requests):.1f}", f"{speed:,.0f}"
        )
    table.add_section()
    for name, replicas, speed in PEERS:
        table.add_row(name, str(replicas), "", f"{speed:,}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
