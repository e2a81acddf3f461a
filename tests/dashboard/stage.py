"""A service to look at: its operations are a script's, its listener is real."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from waterline.dashboard import Access, make_app
from waterline.errors import UnknownNameError
from waterline.outcome import Percentiles
from waterline.service.asgi import HttpServer
from waterline.snapshot import (
    BatchNow,
    EjectionNow,
    JobNow,
    LatencyNow,
    LedgerNow,
    ModelNow,
    MoveNow,
    QueueNow,
    ReplicaNow,
    Snapshot,
    TenantNow,
    Use,
)

KEY = "an-admin-key-for-tests"
AT_S = 1_795_658_218.0


def quiet() -> Snapshot:
    """Return a fleet of three pools in which most is lent to nobody and a little serves the public."""
    return Snapshot(
        at_s=AT_S,
        uptime_s=7_300.0,
        fleet="iceberg",
        health="ok",
        gpus=52,
        uses=(
            Use(pool="a100", tenant="public", kind="serving", gpus=6.0),
            Use(pool="a100", tenant="enterprise", kind="serving", gpus=8.0),
            Use(pool="a100", tenant="research", kind="job", gpus=16.0),
            Use(pool="a100", tenant="public", kind="starting", gpus=2.0),
            Use(pool="mi300", tenant="public", kind="serving", gpus=1.0),
            Use(pool="mi300", tenant="enterprise", kind="serving", gpus=3.0),
            Use(pool="mi300", tenant="research", kind="job", gpus=8.0),
            Use(pool="mi300", tenant="research", kind="draining", gpus=2.0),
            Use(pool="mi300", tenant="", kind="idle", gpus=2.0),
            Use(pool="gaming", tenant="public", kind="serving", gpus=2.0),
            Use(pool="gaming", tenant="", kind="idle", gpus=2.0),
        ),
        tenants=(
            TenantNow(tenant="public", gpus=11.0, guarantee_gpus=0, deserved_gpus=5.2, limit_gpus=52, running=41, waiting=3),
            TenantNow(tenant="enterprise", gpus=11.0, guarantee_gpus=10.4, deserved_gpus=20.8, limit_gpus=52, running=12),
            TenantNow(tenant="research", gpus=26.0, guarantee_gpus=5.2, deserved_gpus=26, limit_gpus=52),
        ),
        models=(
            ModelNow(model="small", ready=9, replicas=10, running=41, slots=288, waiting=3, ttft_slo_s=2.0, tpot_slo_s=0.05),
            ModelNow(model="big", ready=6, replicas=6, running=12, slots=96, waiting=0, ttft_slo_s=3.0, tpot_slo_s=0.075),
        ),
        latencies=(
            LatencyNow(
                model="small", tenant="public", window_s=60.0, requests=812, ok=806, within_slo=790, output_tokens=160_000,
                ttft_s=Percentiles(mean=0.4, p50=0.31, p90=0.9, p99=2.4),
                tpot_s=Percentiles(mean=0.02, p50=0.019, p90=0.027, p99=0.041),
            ),
            LatencyNow(
                model="big", tenant="enterprise", window_s=60.0, requests=118, ok=118, within_slo=118, output_tokens=30_000,
                ttft_s=Percentiles(mean=0.6, p50=0.52, p90=0.8, p99=1.2),
                tpot_s=Percentiles(mean=0.03, p50=0.031, p90=0.037, p99=0.042),
            ),
        ),
        queues=(
            QueueNow(model="small", tenant="public", client="alice", waiting=2, oldest_s=0.8),
            QueueNow(model="small", tenant="public", client="bob", waiting=1, oldest_s=0.2),
        ),
        replicas=(
            *(
                ReplicaNow(
                    id=f"small/{number}", model="small", tenant="public", pool="a100", node=number // 4, gpus=1, state="ready",
                    running=4 + number % 3, slots=32, backlog_tokens=1200.0 * number,
                )
                for number in range(9)
            ),
            ReplicaNow(
                id="small/9", model="small", tenant="public", pool="a100", node=3, gpus=2, state="backing off", slots=32,
                restarts=2, reason="The engine of replica 'small/9' failed: CUDA out of memory.",
            ),
            ReplicaNow(
                id="big/0", model="big", tenant="enterprise", pool="mi300", node=0, gpus=3, state="ready", running=12,
                slots=96, backlog_tokens=31_000.0,
            ),
        ),
        replica_states={"ready": 15, "backing off": 1},
        jobs=(
            JobNow(job="pretrain", tenant="research", state="running", pool="a100", node=1, gpus=8, checkpoint_age_s=312.0),
            JobNow(job="ablation", tenant="research", state="stopping", pool="mi300", node=0, gpus=2, checkpoint_age_s=40.0, stops=3),
        ),
        moves=(
            MoveNow(
                at_s=AT_S - 20, kind="drain", rule="reclaim", tenant="public", what="small", pool="mi300", gpus=2,
                why="The claimant stays within what it deserves; the victim's tenant has more than it deserves.",
                victim="ablation", victim_tenant="research", deadline_s=30.0,
            ),
            MoveNow(
                at_s=AT_S - 75, kind="start", rule="borrow idle", tenant="public", what="small", pool="a100", gpus=2,
                why="The tenant starts a replica on GPUs others leave idle, within its limit.",
            ),
        ),
        ejections=(EjectionNow(at_s=AT_S - 300, replica="small/9", reason="5 failures in a row: connection reset"),),
        batches=(
            BatchNow(
                id="batch_1", tenant="public", client="alice", status="in_progress", requests=5000, ended=1250, left_s=70_000.0
            ),
        ),
        ledger=LedgerNow(waiting_rows=3, lag_s=0.004),
        problems=("Replica 'small/9' is backing off: The engine of replica 'small/9' failed: CUDA out of memory.",),
    )  # fmt: skip


def surge() -> Snapshot:
    """Return the same fleet when the public has most of it."""
    uses = (
        Use(pool="a100", tenant="public", kind="serving", gpus=24.0),
        Use(pool="a100", tenant="enterprise", kind="serving", gpus=8.0),
        Use(pool="mi300", tenant="public", kind="serving", gpus=11.0),
        Use(pool="mi300", tenant="enterprise", kind="serving", gpus=3.0),
        Use(pool="mi300", tenant="research", kind="draining", gpus=2.0),
        Use(pool="gaming", tenant="public", kind="serving", gpus=4.0),
    )
    gpus = {"public": 39.0, "enterprise": 11.0, "research": 2.0}
    tenants = tuple(replace(tenant, gpus=gpus[tenant.tenant]) for tenant in quiet().tenants)
    return replace(quiet(), uses=uses, tenants=tenants, problems=())


def starting() -> Snapshot:
    """Return it before anything is ready."""
    before = quiet()
    return replace(
        before,
        health="not ready",
        uses=tuple(
            Use(pool=pool, tenant="", kind="idle", gpus=gpus)
            for pool, gpus in (("a100", 32), ("mi300", 16), ("gaming", 4))
        ),
        tenants=tuple(replace(tenant, gpus=0.0, running=0, waiting=0) for tenant in before.tenants),
        replicas=tuple(
            replace(replica, state="starting", reason="", running=0, backlog_tokens=0.0) for replica in before.replicas
        ),
        replica_states={"starting": 16},
        models=tuple(replace(model, ready=0, running=0, slots=0, waiting=0) for model in before.models),
        latencies=(),
        queues=(),
        moves=(),
        jobs=(),
        ejections=(),
        problems=("No replica of 'small' is ready.", "No replica of 'big' is ready."),
    )


@dataclass
class Script:
    """Operations that say what a test has written, and remember what they were asked."""

    now: Snapshot = field(default_factory=quiet)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[str] = field(default_factory=list)

    def snapshot(self) -> Snapshot:
        return self.now

    def metrics(self) -> bytes:
        return b"waterline_waterline_ratio 0.2\n"

    def drain(self, replica: str) -> None:
        if replica not in {one.id for one in self.now.replicas}:
            raise UnknownNameError(f"no replica is called '{replica}'.")
        self.asked.append(f"drain {replica}")

    def undrain(self, replica: str) -> None:
        self.asked.append(f"undrain {replica}")

    async def reload(self) -> str:
        self.asked.append("reload")
        return "1 replica more"

    async def decisions(self) -> AsyncIterator[bytes]:
        yield b'{"rule":"slot free"}\n'

    async def keys(self) -> Any:
        return [{"id": "key-1", "tenant": "public", "client": "alice"}]

    async def revoke(self, key: str) -> None:
        self.asked.append(f"revoke {key}")

    async def usage(self, since: str, until: str) -> Any:
        return [{"tenant": "public", "since": since, "until": until}]


@asynccontextmanager
async def shown(script: Script, *, bound_to: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Serve the listener for operators; yield its URL. `bound_to` is what the rules of access are told."""
    listening = socket.create_server(("127.0.0.1", port))
    server = HttpServer(make_app(script, Access(KEY, bound_to), version="0.1"), grace_s=0)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        script.stopping.set()
        server.should_exit = True
        await serving
        listening.close()
