"""What Prometheus may know: counts and times of requests as they end, and the state of the replicas when it asks."""

import math
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from waterline.outcome import Completion
from waterline.service.dispatcher import Dispatcher
from waterline.service.supervisor import STATUSES, ReplicaState

TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)


class Metrics:
    """The service's own registry; nothing of the process that hosts it gets in."""

    def __init__(self, dispatchers: Mapping[str, Dispatcher], states: Mapping[str, ReplicaState]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Live(dispatchers, states))
        who = ("model", "tenant")
        self.requests = Counter(
            "waterline_requests", "Requests that have ended.", (*who, "status"), registry=self.registry
        )
        self.invalid = Counter(
            "waterline_invalid_requests", "Requests that could not be understood.", registry=self.registry
        )
        self.tokens = Counter("waterline_tokens", "Tokens read and produced.", (*who, "kind"), registry=self.registry)
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

    def count(self, completion: Completion) -> None:
        who = (completion.model, completion.tenant)
        self.requests.labels(*who, completion.status).inc()
        if completion.status == "refused":
            return
        self.tokens.labels(*who, "prompt").inc(completion.prompt_tokens)
        self.tokens.labels(*who, "output").inc(completion.output_tokens)
        if not math.isnan(completion.ttft_s):
            self.ttft.labels(*who).observe(completion.ttft_s)
        if completion.tpot_s > 0:
            self.tpot.labels(*who).observe(completion.tpot_s)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Live(Collector):
    """Gauges, read from what they describe when somebody asks."""

    def __init__(self, dispatchers: Mapping[str, Dispatcher], states: Mapping[str, ReplicaState]) -> None:
        self.dispatchers = dispatchers
        self.states = states

    def collect(self) -> Iterator[GaugeMetricFamily]:
        lanes = [(model, lane) for model, dispatcher in self.dispatchers.items() for lane in dispatcher.lanes]
        labels = ("model", "replica")
        yield _gauge(
            "waterline_requests_in_flight",
            "Requests an engine works on.",
            labels,
            (((model, lane.replica.id), lane.running) for model, lane in lanes),
        )
        yield _gauge(
            "waterline_requests_queued",
            "Requests that wait in the gateway.",
            labels,
            (((model, lane.replica.id), len(lane.waiting)) for model, lane in lanes),
        )
        yield _gauge(
            "waterline_backlog_tokens",
            "Tokens accepted and not yet produced, as expected.",
            labels,
            (((model, lane.replica.id), lane.backlog_tokens) for model, lane in lanes),
        )
        yield _gauge(
            "waterline_replica_state",
            "1 for the state a replica is in.",
            (*labels, "state"),
            (
                ((model, lane.replica.id, status), int(self.states[lane.replica.id].status == status))
                for model, lane in lanes
                for status in STATUSES
            ),
        )


def _gauge(
    name: str, text: str, labels: Iterable[str], samples: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=tuple(labels))
    for values, sample in samples:
        family.add_metric(values, sample)
    return family
