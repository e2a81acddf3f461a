"""What Prometheus is told: names by its conventions, labels bounded by the fleet file, and numbers that are true."""

import asyncio
import re

from prometheus_client.parser import text_string_to_metric_families
from serving import QUESTION, fake_plan, served

from waterline.outcome import Completion
from waterline.service.metrics import Metrics
from waterline.snapshot import (
    BatchNow,
    EjectionNow,
    JobNow,
    LedgerNow,
    ModelNow,
    MoveNow,
    QueueNow,
    ReplicaNow,
    Snapshot,
    TenantNow,
    Use,
)
from waterline.workload import Slo

SLOS = {"chat": Slo(ttft_s=1.0, tpot_s=0.05)}


def snapshot(clients: int = 1, replicas: int = 1) -> Snapshot:
    """Return a service with something of everything."""
    return Snapshot(
        at_s=1.8e9,
        uptime_s=60.0,
        fleet="fleet",
        health="ok",
        gpus=16,
        uses=(
            Use(pool="a", tenant="public", kind="serving", gpus=4.0),
            Use(pool="a", tenant="research", kind="job", gpus=8.0),
            Use(pool="a", tenant="", kind="idle", gpus=4.0),
        ),
        tenants=(
            TenantNow(tenant="public", gpus=4.0, guarantee_gpus=0.0, deserved_gpus=1.0, limit_gpus=16.0, waiting=3),
            TenantNow(tenant="research", gpus=8.0, guarantee_gpus=4.0, deserved_gpus=15.0, limit_gpus=16.0),
        ),
        models=(
            ModelNow(model="chat", ready=1, replicas=1, running=2, slots=4, waiting=3, ttft_slo_s=1.0, tpot_slo_s=0.05),
        ),
        latencies=(),
        queues=tuple(
            QueueNow(model="chat", tenant="public", client=f"client-{number}", waiting=3, oldest_s=2.5)
            for number in range(clients)
        ),
        replicas=tuple(
            ReplicaNow(id=f"chat/{number}", model="chat", tenant="", pool="a", node=0, gpus=4, state="ready")
            for number in range(replicas)
        ),
        replica_states={"ready": replicas},
        jobs=(JobNow(job="pretrain", tenant="research", state="running", gpus=8),),
        batches=(BatchNow(id="b", tenant="public", client="c", status="in_progress", requests=9, ended=4, left_s=1.0),),
        ledger=LedgerNow(waiting_rows=5, lag_s=0.25),
    )


def completion(**changes: object) -> Completion:
    fields: dict[str, object] = {
        "tenant": "public", "model": "chat", "replica": "chat/0", "status": "ok", "arrival_s": 0.0,
        "first_token_s": 0.5, "finish_s": 0.7, "prompt_tokens": 10, "output_tokens": 11, "gpu_s": 0.1,
    }  # fmt: skip
    return Completion(**{**fields, **changes})  # type: ignore[arg-type]


def full() -> Metrics:
    metrics = Metrics(SLOS, snapshot)
    metrics.count(completion())
    for status in ("refused", "cancelled"):  # in the queue: nothing of them was read
        metrics.count(completion(status=status, replica="", first_token_s=float("nan"), output_tokens=0, gpu_s=0.0))
    metrics.moved(
        MoveNow(at_s=1.0, kind="start", rule="borrow idle", why="", tenant="public", what="chat", pool="a", gpus=4)
    )
    metrics.ejected("chat", EjectionNow(at_s=1.0, replica="chat/0", reason="5 failures"))
    return metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def test_what_happened_is_told() -> None:
    told = samples(full())
    who = (("model", "chat"), ("tenant", "public"))
    assert told["waterline_requests_total", (who[0], ("status", "ok"), who[1])] == 1
    assert told["waterline_requests_total", (who[0], ("status", "refused"), who[1])] == 1
    assert told["waterline_requests_within_slo_total", who] == 1
    assert told["waterline_tokens_total", (("kind", "prompt"), *who)] == 10, "that were read"
    assert told["waterline_tokens_total", (("kind", "output"), *who)] == 11
    assert told["waterline_gpu_seconds_total", who] == 0.1
    assert told["waterline_ttft_seconds_bucket", (("le", "0.5"), *who)] == 1
    assert told["waterline_ttft_seconds_bucket", (("le", "0.25"), *who)] == 0
    assert told["waterline_tpot_seconds_bucket", (("le", "0.02"), *who)] == 1, "0.2 s for ten tokens after the first"
    assert told["waterline_moves_total", (("kind", "start"), ("rule", "borrow idle"), ("tenant", "public"))] == 1
    assert told["waterline_ejections_total", (("model", "chat"),)] == 1


def test_how_things_are_is_read_from_the_snapshot() -> None:
    told = samples(full())
    assert told["waterline_waterline_ratio", ()] == 4 / 16
    assert told["waterline_gpus", (("kind", "job"), ("pool", "a"), ("tenant", "research"))] == 8
    assert told["waterline_tenant_borrowed_gpus", (("tenant", "public"),)] == 3
    assert told["waterline_tenant_deserved_gpus", (("tenant", "research"),)] == 15
    assert told["waterline_requests_queued", (("model", "chat"), ("tenant", "public"))] == 3
    assert told["waterline_queue_age_seconds", (("model", "chat"), ("tenant", "public"))] == 2.5
    assert told["waterline_requests_queued", (("model", "chat"), ("tenant", "research"))] == 0, "an empty queue is told"
    assert told["waterline_replicas", (("model", "chat"), ("pool", "a"), ("state", "ready"))] == 1
    assert told["waterline_jobs", (("job", "pretrain"), ("state", "running"), ("tenant", "research"))] == 1
    assert told["waterline_ledger_lag_seconds", ()] == 0.25
    assert told["waterline_batches", (("status", "in_progress"), ("tenant", "public"))] == 1
    assert told["waterline_batch_requests_left", (("tenant", "public"),)] == 5


def test_more_clients_and_replicas_make_no_more_series() -> None:
    few, many = Metrics(SLOS, snapshot), Metrics(SLOS, lambda: snapshot(clients=500, replicas=500))
    assert len(samples(few)) == len(samples(many)) > 20
    assert b"client" not in many.text().replace(b"clients", b"")


def test_names_keep_to_prometheus_conventions() -> None:
    for family in text_string_to_metric_families(full().text().decode()):
        assert re.fullmatch(r"waterline_[a-z_]+[a-z]", family.name)
        assert family.documentation.endswith("."), family.name
        assert not family.name.endswith("_created"), "a time of creation for each series doubles them"
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples), family.name
        assert not re.search(r"_(ms|milliseconds|minutes|mib|percent)\b", family.name)


def test_a_live_service_tells_what_it_does() -> None:
    async def case() -> None:
        async with served(fake_plan({"chat": 2})) as service:
            await service.openai.chat.completions.create(model="chat", messages=QUESTION, max_tokens=3)
            told = samples(service.gateway.metrics)
            assert told["waterline_replicas_ready", (("model", "chat"),)] == 2
            assert told["waterline_replica_slots", (("model", "chat"),)] == 8
            assert told["waterline_replica_changes_total", (("model", "chat"), ("state", "ready"))] == 2
            assert (
                told["waterline_tokens_total", (("kind", "output"), ("model", "chat"), ("tenant", "enterprise"))] == 3
            )
            assert told["waterline_health", (("health", "ok"),)] == 1

    asyncio.run(case())
