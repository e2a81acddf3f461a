"""What it takes to write down what became of requests: CPU time a request, and memory.

    .venv/bin/python benchmarks/recording.py [REQUESTS]

Requests are made up: three tenants, two models, 1,000 clients, times lognormal, a tenth refused and told when to come
back. The best of three runs; time is CPU time of this process.
"""

import resource
import sys
import time

import numpy as np
from msgspec.structs import replace

from waterline.fleet import Fleet, Model, Pool, Tenant
from waterline.plan import Layout, Place, Plan, Replica
from waterline.rehearsal.recorder import Recorder
from waterline.workload import Slo

PIECE = 1 << 16
PS = 10**12
CLIENTS = [f"client {number}" for number in range(1000)]


def plan(replicas: int) -> Plan:
    slo = Slo(ttft_s=2.0, tpot_s=0.05)
    models = tuple(
        Model(name=name, weights="meta-llama/Llama-3.1-8B", precisions=("bf16",), max_context_tokens=8192, slo=slo)
        for name in ("chat", "code")
    )
    tenants = tuple(Tenant(name=name, deserved=0.3) for name in ("public", "enterprise", "research"))
    pools = (Pool(name="box", gpu="a100-sxm-80g", nodes=replicas, gpus_per_node=1, usd_per_gpu_hour=2.0),)
    one = Replica(
        id="",
        model="chat",
        pool="box",
        places=(Place(node=0, gpus=(0,)),),
        precision="bf16",
        layout=Layout(),
        engine="vllm",
        max_context_tokens=8192,
        max_batch=64,
        cache_tokens=100_000,
        requests_per_s=3.0,
        prefill_tokens_per_s=9000.0,
        tokens_per_s=9000.0,
        ttft_s=1.0,
        tpot_s=0.03,
        usd_per_hour=2.0,
    )
    made = tuple(
        replace(one, id=f"{name}/{number}", model=name)
        for number, name in ((number, ("chat", "code")[number % 2]) for number in range(replicas))
    )
    fleet = Fleet(name="made up", pools=pools, models=models, tenants=tenants)
    return Plan(fleet=fleet, models=(), tenants=(), replicas=made)


def record(requests: int, replicas: int) -> float:
    """Return CPU seconds."""
    made = plan(replicas)
    recorder = Recorder(made, length_s=86_400.0)
    for one in made.replicas:
        recorder.add_replica(one)
    generator = np.random.default_rng(0)
    model = generator.integers(0, 2, PIECE)
    replica = generator.integers(0, replicas // 2, PIECE) * 2 + model
    replica[generator.random(PIECE) < 0.1] = -1
    wait_ps = np.rint(generator.lognormal(-1, 1, PIECE) * PS).astype(np.int64)
    answer_ps = np.rint(generator.lognormal(1, 1, PIECE) * PS).astype(np.int64)
    arrivals_ps = np.sort(generator.integers(0, 86_400 * PS * PIECE // requests, PIECE))
    columns = {
        "tenant": generator.integers(0, 3, PIECE),
        "client": generator.integers(0, len(CLIENTS), PIECE),
        "model": model,
        "prompt_tokens": generator.integers(1, 4000, PIECE),
        "output_tokens": np.where(replica >= 0, generator.integers(1, 400, PIECE), 0),
        "replica": replica,
        "busy_ps": answer_ps // 30,
        "preemptions": np.zeros(PIECE, np.int64),
        "retry_s": np.where(replica < 0, 30.0, 0.0),
        "cached_tokens": np.zeros(PIECE, np.int64),
        "read_by": np.full(PIECE, -1),
        "read_busy_ps": np.zeros(PIECE, np.int64),
    }
    begun_s = time.process_time()
    for piece in range(requests // PIECE):
        arrival_ps = arrivals_ps + piece * (86_400 * PS * PIECE // requests)
        refused = replica < 0
        first_ps = np.where(refused, -1, arrival_ps + wait_ps)
        finish_ps = np.where(refused, arrival_ps, arrival_ps + wait_ps + answer_ps)
        recorder.add(arrival_ps=arrival_ps, first_token_ps=first_ps, finish_ps=finish_ps, clients=CLIENTS, **columns)
    recorder.run_as_planned(0)
    recorder.report()
    return time.process_time() - begun_s


def main() -> None:
    requests = max(PIECE, int(float(sys.argv[1])) if len(sys.argv) > 1 else 5_000_000) // PIECE * PIECE
    print(f"{'replicas':>8} {'requests':>12} {'ns a request':>13} {'peak MB':>8}")
    for replicas in (8, 7500):
        best_s = min(record(requests, replicas) for _ in range(3))
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        print(f"{replicas:8,} {requests:12,} {best_s / requests * 1e9:13.0f} {peak_mb:8.0f}")


if __name__ == "__main__":
    main()
