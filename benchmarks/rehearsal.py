"""How many requests a second are rehearsed, beside what peers were measured at.

    .venv/bin/python benchmarks/rehearsal.py [REQUESTS]

Llama-3.1-8B on A100 cards by vLLM, priced by the cost model. Arrivals are Poisson; lengths are lognormal with the means
of the Azure conversation trace, 1,155 prompt and 211 output tokens. Three tenants ask through four clients each: one
has a guarantee, one deserves a share, one has neither. Who cannot have a first token within 5 s is refused. In one case
a tenth of the clients goes away, each within 20 s of its arrival, where its answer is not complete by then. The event
loop is compiled before the clock runs. Time is CPU time of this process, in the event loop and in drawing up what
became of the requests; the best of three runs, for other work on the machine only ever adds. The oracle takes every
step, in plain Python, on the first requests of the same traffic, and its figures are compared to the picosecond on the
way.

Peers: the whole process on the 19,366 requests of the Azure conversation trace (splitwise-sim: its first 2,000),
measured on the 2-core machine on which Waterline was begun. They ran other models and schedulers: compare orders of
magnitude.
"""

import resource
import sys
import time
from dataclasses import replace

import numpy as np
from rich.console import Console
from rich.table import Table

from waterline import catalog
from waterline.catalog.engines import find_engine
from waterline.cost import step_cost
from waterline.plan import Layout
from waterline.rehearsal.capacity import NEVER, Ask, Capacity, Terms
from waterline.rehearsal.oracle import serve
from waterline.rehearsal.state import NEVER_PS
from waterline.rehearsal.station import Station, warm_up
from waterline.rehearsal.stepped import Step

RUNS = 3
PIECE = 1 << 16
STEPPED = 1500  # requests for the oracle
PROMPT, OUTPUT = 1155, 211
TERMS = Terms(
    ttft_s=(5.0,),
    output_tokens=(OUTPUT,),
    guarantee=(0.2, 0.0, 0.0),
    deserved=(0.5, 0.3, 0.0),
    limit=(1.0, 1.0, 1.0),
    tenant_of_client=(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2),
)
LEAVE_FRACTION, LEAVE_WITHIN_PS = 0.1, 20 * 10**12
CASES = (  # replicas, requests/s each, whether clients leave
    (1, 3.0, False),
    (64, 3.0, False),
    (64, 3.0, True),
    (64, 0.5, False),
    (1000, 3.0, False),
    (1000, 0.5, False),
    (7500, 3.0, False),
    (7500, 0.15, False),
)
GOALS = {1: 3e6, 64: 1e6, 7500: 5e5}
PEERS = (  # name and version, replicas, requests per CPU second
    ("Vidur 7d47513, Llama-3-8B on A100, sarathi", 1, 405),
    ("Vidur 7d47513", 8, 242),
    ("Vidur 7d47513", 64, 223),
    ("BLIS f90a1e3, Llama-3.1-8B on A100", 1, 257),
    ("splitwise-sim 8f99e7d, token_jsq", 1, 82),
)


def capacities(replicas: int) -> list[Capacity]:
    step = step_cost(
        catalog.find_model("meta-llama/Llama-3.1-8B"),
        catalog.find_gpu("a100-sxm-80g"),
        Layout(),
        "bf16",
        find_engine("vllm"),
    )
    one = Capacity(
        replica="",
        gpus=1,
        step=step,
        max_batch=256,
        cache_tokens=400_000,
        max_context_tokens=16_384,
        prefill_tokens_per_s=1e4,
        tokens_per_s=1e4,
    )
    return [replace(one, replica=f"llama/{index}") for index in range(replicas)]


def drawn(requests: int, requests_per_s: float) -> np.ndarray:
    """Return arrivals in ps, prompt tokens and output tokens, a row each."""
    generator = np.random.Generator(np.random.PCG64(7))
    arrivals_ns = np.cumsum(generator.exponential(1e9 / requests_per_s, requests)).astype(np.int64)
    lengths = [np.rint(generator.lognormal(np.log(mean) - 0.5, 1.0, requests)) for mean in (PROMPT, OUTPUT)]
    return np.stack([arrivals_ns * 1000, *(np.clip(length, 1, 8000).astype(np.int64) for length in lengths)])


def leaving(requests: int) -> np.ndarray:
    """Return when each client leaves, in ps after its arrival, or NEVER_PS."""
    generator = np.random.Generator(np.random.PCG64(8))
    leaves = generator.random(requests) < LEAVE_FRACTION
    return np.where(leaves, generator.integers(1, LEAVE_WITHIN_PS, requests), NEVER_PS)


def by_events(
    replicas: list[Capacity], asked: np.ndarray, leaves_ps: np.ndarray | None = None
) -> tuple[list[int], float]:
    """Return when each request was done, and the CPU seconds it took."""
    station = Station(TERMS)
    station.start_all(replicas, 0)
    began_s, finished = time.process_time(), []
    for begin in range(0, asked.shape[1], PIECE):
        piece = asked[:, begin : begin + PIECE]
        station.offer(
            *piece,
            client=np.arange(begin, begin + piece.shape[1]) % len(TERMS.tenant_of_client),
            leaves_ps=None if leaves_ps is None else leaves_ps[begin : begin + PIECE],
        )
        finished.append(station.collect().finish_ps)
    station.finish()
    finished.append(station.collect().finish_ps)
    took_s = time.process_time() - began_s
    return np.concatenate(finished).tolist(), took_s


def by_steps(replicas: list[Capacity], asked: np.ndarray, leaves_ps: np.ndarray | None = None) -> tuple[float, float]:
    """Return requests per CPU second and steps per request, having compared every finish."""
    requests = [
        Ask(
            arrival_ps=arrival_ps,
            prompt_tokens=prompt,
            output_tokens=output,
            client=number % len(TERMS.tenant_of_client),
            leaves_ps=NEVER if leaves_ps is None or leaves_ps[number] == NEVER_PS else int(leaves_ps[number]),
        )
        for number, (arrival_ps, prompt, output) in enumerate(asked[:, :STEPPED].T.tolist())
    ]
    began_s = time.process_time()
    passages = serve(replicas, requests, TERMS)
    took_s = time.process_time() - began_s
    finished, _ = by_events(replicas, asked[:, :STEPPED], None if leaves_ps is None else leaves_ps[:STEPPED])
    assert finished == [passage.finish_ps for passage in passages]
    steps: list[Step] = []
    serve(replicas, requests, TERMS, steps=steps)
    return len(requests) / took_s, len(steps) / len(requests)


def main() -> None:
    requests = int(float(sys.argv[1])) if len(sys.argv) > 1 else 1_000_000
    table = Table(title=f"{requests:,} requests", title_justify="left")
    table.add_column("simulator")
    for name in ("replicas", "requests/s each", "steps a request", "requests per CPU second", "goal"):
        table.add_column(name, justify="right")
    warm_up()
    for count, requests_per_s, leave in CASES:
        replicas, asked = capacities(count), drawn(requests, requests_per_s * count)
        leaves_ps = leaving(requests) if leave else None
        speed = requests / min(by_events(replicas, asked, leaves_ps)[1] for _ in range(RUNS))
        stepped, steps = by_steps(replicas, asked, leaves_ps) if count <= 64 else (0.0, 0.0)
        goal = f"{GOALS[count]:,.0f}" if count in GOALS else ""
        who = "Waterline, a tenth of the clients leaves" if leave else "Waterline"
        table.add_row(who, f"{count:,}", f"{requests_per_s:g}", "", f"{speed:,.0f}", goal)
        if stepped:
            name = "Waterline's oracle, step by step, the same to 0 ps"
            table.add_row(name, f"{count:,}", f"{requests_per_s:g}", f"{steps:,.0f}", f"{stepped:,.0f}", "")
    table.add_section()
    for name, count, speed in PEERS:
        table.add_row(name, f"{count:,}", "", "", f"{speed:,}", "")
    console = Console(width=130)
    console.print(table)
    console.print(f"Largest memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
