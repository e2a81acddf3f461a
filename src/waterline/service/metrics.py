"""What Prometheus may know: counts and times of requests as they end, and the rest from a snapshot when it asks.

Names and units follow Prometheus's conventions. Labels are bounded by the fleet file: models, tenants, pools and
states, never a client. Replicas come and go, so they are counted by state; `waterline status` and the page name each.
"""

import math
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from waterline.outcome import STATUSES, Completion
from waterline.service.recent import Recent
from waterline.snapshot import HEALTHS, EjectionNow, MoveNow, Snapshot
from waterline.workload import Slo

TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)

disable_created_metrics()  # type: ignore[no-untyped-call] # they would double what is sent


class Metrics:
    """The service's own registry; nothing of the process that hosts it gets in.

    Args:
        slos: by model.
        snapshot: returns how the service is now.
    """

    def __init__(self, slos: Mapping[str, Slo], snapshot: Callable[[], Snapshot]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Live(snapshot))
        self.recent = Recent(slos)
        self._slos = slos
        self._of: dict[tuple[str, str], _Requests] = {}
        who = ("model", "tenant")
        self.requests = Counter(
            "waterline_requests", "Requests that have ended, by how.", (*who, "status"), registry=self.registry
        )
        self.within_slo = Counter(
            "waterline_requests_within_slo", "Requests that met their SLO.", who, registry=self.registry
        )
        self.invalid = Counter(
            "waterline_invalid_requests", "Requests that could not be understood.", registry=self.registry
        )
        self.tokens = Counter("waterline_tokens", "Tokens read and produced.", (*who, "kind"), registry=self.registry)
        self.gpu_s = Counter(
            "waterline_gpu_seconds", "GPU time of the requests that have ended.", who, registry=self.registry
        )
        self.ttft = Histogram(
            "waterline_ttft_seconds", "Time to first token.", who, buckets=TTFT_S, registry=self.registry
        )
        self.tpot = Histogram(
            "waterline_tpot_seconds",
            "Time per output token after the first, averaged over a request.",
            who,
            buckets=TPOT_S,
            registry=self.registry,
        )
        self.moves = Counter(
            "waterline_moves",
            "GPUs that went from one use to another.",
            ("tenant", "kind", "rule"),
            registry=self.registry,
        )
        self.ejections = Counter(
            "waterline_ejections", "Times a replica got no work for a while.", ("model",), registry=self.registry
        )
        self.hedges = Counter(
            "waterline_hedges",
            "Requests that a second replica was wanted for, by what became of it.",
            ("model", "outcome"),
            registry=self.registry,
        )
        self.hedge_gpu_s = Counter(
            "waterline_hedge_gpu_seconds",
            "GPU time on the replica whose answer nobody got.",
            ("model",),
            registry=self.registry,
        )
        self.changes = Counter(
            "waterline_replica_changes",
            "Times a replica came into a state.",
            ("model", "state"),
            registry=self.registry,
        )

    def count(self, completion: Completion) -> None:
        self.recent.count(completion)
        who = (completion.model, completion.tenant)
        if who not in self._of:
            self._of[who] = _Requests(self, *who)
        self._of[who].count(completion, within_slo=completion.meets(self._slos[completion.model]))

    def moved(self, move: MoveNow) -> None:
        self.recent.moves.appendleft(move)
        self.moves.labels(move.tenant, move.kind, move.rule).inc()

    def ejected(self, model: str, ejection: EjectionNow) -> None:
        self.recent.ejections.appendleft(ejection)
        self.ejections.labels(model).inc()

    def hedged(self, model: str, outcome: str, lost_gpu_s: float) -> None:
        self.hedges.labels(model, outcome).inc()
        self.hedge_gpu_s.labels(model).inc(lost_gpu_s)

    def replica_changed(self, model: str, state: str) -> None:
        self.changes.labels(model, state).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Requests:
    """The counters of one model and tenant; to look them up by their labels costs more than to count."""

    def __init__(self, metrics: Metrics, model: str, tenant: str) -> None:
        who = (model, tenant)
        self._ended = {status: metrics.requests.labels(*who, status) for status in STATUSES}
        self._within_slo = metrics.within_slo.labels(*who)
        self._prompt_tokens = metrics.tokens.labels(*who, "prompt")
        self._output_tokens = metrics.tokens.labels(*who, "output")
        self._gpu_s = metrics.gpu_s.labels(*who)
        self._ttft = metrics.ttft.labels(*who)
        self._tpot = metrics.tpot.labels(*who)

    def count(self, completion: Completion, *, within_slo: bool) -> None:
        self._ended[completion.status].inc()
        if completion.status == "refused":
            return
        if within_slo:
            self._within_slo.inc()
        self._prompt_tokens.inc(completion.prompt_tokens if completion.replica else 0)
        self._output_tokens.inc(completion.output_tokens)
        self._gpu_s.inc(completion.gpu_s)
        if not (math.isnan(completion.ttft_s) or completion.whole):
            self._ttft.observe(completion.ttft_s)
        if completion.tpot_s > 0:
            self._tpot.observe(completion.tpot_s)


class _Live(Collector):
    """Gauges, read from a snapshot when somebody asks."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        return []  # else the registry asks for a snapshot before there is one

    def collect(self) -> Iterator[Metric]:
        now = self._snapshot()
        yield _gauge("waterline_uptime_seconds", "Time since the service started.", (), [((), now.uptime_s)])
        yield _gauge(
            "waterline_health",
            "1 for how the service is.",
            ("health",),
            [((health,), int(now.health == health)) for health in HEALTHS],
        )
        yield from _of_gpus(now)
        yield from _of_requests(now)
        yield from _of_replicas(now)
        yield from _of_the_rest(now)


def _of_gpus(now: Snapshot) -> Iterator[Metric]:
    yield _gauge("waterline_waterline_ratio", "GPUs serving the public, over all GPUs.", (), [((), now.waterline)])
    yield _gauge(
        "waterline_gpus",
        "GPUs by who has them for what; tenant is empty where nobody has.",
        ("pool", "tenant", "kind"),
        [((use.pool, use.tenant, use.kind), use.gpus) for use in now.uses],
    )
    tenants = now.tenants
    for name, text, values in (
        ("used", "GPUs a tenant has.", [tenant.gpus for tenant in tenants]),
        ("guarantee", "GPUs of a tenant that are never lent.", [tenant.guarantee_gpus for tenant in tenants]),
        ("deserved", "GPUs of a tenant that always come back.", [tenant.deserved_gpus for tenant in tenants]),
        ("limit", "The most GPUs a tenant may have.", [tenant.limit_gpus for tenant in tenants]),
        ("borrowed", "GPUs a tenant has beyond what it deserves.", [tenant.borrowed_gpus for tenant in tenants]),
    ):
        samples = [((tenant.tenant,), value) for tenant, value in zip(tenants, values, strict=True)]
        yield _gauge(f"waterline_tenant_{name}_gpus", text, ("tenant",), samples)


def _of_requests(now: Snapshot) -> Iterator[Metric]:
    models = now.models
    yield _gauge(
        "waterline_requests_in_flight",
        "Requests an engine works on.",
        ("model",),
        [((model.model,), model.running) for model in models],
    )
    waiting = {(model.model, tenant.tenant): 0 for model in models for tenant in now.tenants}
    oldest_s = dict.fromkeys(waiting, 0.0)
    for queue in now.queues:
        key = (queue.model, queue.tenant)
        waiting[key] = waiting.get(key, 0) + queue.waiting
        oldest_s[key] = max(oldest_s.get(key, 0.0), queue.oldest_s)
    who = ("model", "tenant")
    yield _gauge("waterline_requests_queued", "Requests that wait in the gateway.", who, waiting.items())
    yield _gauge("waterline_queue_age_seconds", "How long the first of them has waited.", who, oldest_s.items())


def _of_replicas(now: Snapshot) -> Iterator[Metric]:
    states = Counts((replica.model, replica.pool, replica.state) for replica in now.replicas)
    backlog_tokens = dict.fromkeys(((model.model,) for model in now.models), 0.0)
    for replica in now.replicas:
        backlog_tokens[replica.model,] += replica.backlog_tokens
    yield _gauge("waterline_replicas", "Replicas by state.", ("model", "pool", "state"), states.items())
    yield _gauge(
        "waterline_replicas_ready",
        "Replicas that take requests.",
        ("model",),
        [((model.model,), model.ready) for model in now.models],
    )
    yield _gauge(
        "waterline_replica_slots",
        "Requests the ready replicas may work on together.",
        ("model",),
        [((model.model,), model.slots) for model in now.models],
    )
    yield _gauge(
        "waterline_backlog_tokens",
        "Tokens accepted and not yet produced, as expected.",
        ("model",),
        backlog_tokens.items(),
    )


def _of_the_rest(now: Snapshot) -> Iterator[Metric]:
    jobs = Counts((job.job, job.tenant, job.state) for job in now.jobs)
    yield _gauge("waterline_jobs", "Runs of research jobs by state.", ("job", "tenant", "state"), jobs.items())
    batches = Counts((batch.tenant, batch.status) for batch in now.batches)
    yield _gauge("waterline_batches", "Batches that are run here.", ("tenant", "status"), batches.items())
    left = dict.fromkeys(((tenant.tenant,) for tenant in now.tenants), 0)
    for batch in now.batches:
        left[batch.tenant,] = left.get((batch.tenant,), 0) + batch.requests - batch.ended
    yield _gauge("waterline_batch_requests_left", "Their requests without an answer.", ("tenant",), left.items())
    if now.ledger:
        lag = [((), now.ledger.lag_s)]
        yield _gauge("waterline_ledger_lag_seconds", "Age of the oldest row that is not written yet.", (), lag)
        rows = [((), float(now.ledger.waiting_rows))]
        yield _gauge("waterline_ledger_waiting_rows", "Rows that are not written yet.", (), rows)


def _gauge(
    name: str, text: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, sample in samples:
        family.add_metric(values, sample)
    return family
