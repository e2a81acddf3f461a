"""What became of requests: one `Completion` each, and the `Summary` people read.

The rehearsal and the live service both end here, so that their numbers can be laid side by side.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec import Struct

from waterline.workload import Slo

Status = Literal["ok", "refused", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What became of one request; times in seconds from the start of the trace, or of the service."""

    tenant: str
    model: str
    replica: str  # "" when it never reached one
    status: Status
    arrival_s: float
    first_token_s: float  # when it came; NaN if none did
    finish_s: float  # when the last token came, or when it was refused, failed or was cancelled
    prompt_tokens: int
    output_tokens: int  # produced
    gpu_s: float = 0.0  # its share of the replica's step time, times the replica's GPUs
    preemptions: int = 0

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 for a single token."""
        later_tokens = self.output_tokens - 1
        return (self.finish_s - self.first_token_s) / later_tokens if later_tokens > 0 else 0.0

    def meets(self, slo: Slo) -> bool:
        return self.status == "ok" and self.ttft_s <= slo.ttft_s and self.tpot_s <= slo.tpot_s


class Percentiles(Struct, frozen=True, kw_only=True):
    """Of a duration, in seconds; the smallest value that at least the given share of requests does not exceed."""

    mean: float
    p50: float
    p90: float
    p99: float


class Summary(Struct, frozen=True, kw_only=True):
    """One tenant's requests to one model, or all of them."""

    tenant: str  # "" over all tenants
    model: str  # "" over all models
    requests: int
    completed: int
    refused: int
    failed: int  # cancelled ones included
    ttft_s: Percentiles | None  # of the completed; None when there are none
    tpot_s: Percentiles | None
    within_slo: int
    goodput_per_s: float  # requests within their SLO, per second of the replay
    slo_fraction: float  # of all requests
    prompt_tokens: int
    output_tokens: int
    gpu_hours: float
    usd: float


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Return nearest-rank percentiles, which are values that really occurred."""
    if not values:
        return None
    ordered = sorted(values)

    def rank(fraction: float) -> float:
        return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]

    return Percentiles(mean=sum(ordered) / len(ordered), p50=rank(0.5), p90=rank(0.9), p99=rank(0.99))


def summarize(
    completions: Iterable[Completion], slos: Mapping[str, Slo], duration_s: float, usd: float
) -> tuple[Summary, ...]:
    """Summarise by tenant and model, sorted by name, with the total first.

    `usd` is what the whole fleet cost over `duration_s`. It is divided by GPU time used, so that the parts add up to
    the bill and idle cards are paid by those who made the fleet that large; without any use, it stays in the total.
    """
    groups: dict[tuple[str, str], list[Completion]] = {}
    for completion in completions:
        groups.setdefault((completion.tenant, completion.model), []).append(completion)
    everything = [completion for group in groups.values() for completion in group]
    gpu_s = sum(completion.gpu_s for completion in everything)

    def summary(tenant: str, model: str, group: Sequence[Completion], group_usd: float) -> Summary:
        done = [completion for completion in group if completion.status == "ok"]
        within_slo = sum(completion.meets(slos[completion.model]) for completion in done)
        return Summary(
            tenant=tenant,
            model=model,
            requests=len(group),
            completed=len(done),
            refused=sum(completion.status == "refused" for completion in group),
            failed=sum(completion.status in {"failed", "cancelled"} for completion in group),
            ttft_s=percentiles([completion.ttft_s for completion in done]),
            tpot_s=percentiles([completion.tpot_s for completion in done if completion.output_tokens > 1]),
            within_slo=within_slo,
            goodput_per_s=within_slo / duration_s if duration_s > 0 else 0.0,
            slo_fraction=within_slo / len(group) if group else 0.0,
            prompt_tokens=sum(completion.prompt_tokens for completion in group),
            output_tokens=sum(completion.output_tokens for completion in group),
            gpu_hours=sum(completion.gpu_s for completion in group) / 3600,
            usd=group_usd,
        )

    parts = tuple(
        summary(tenant, model, group, usd * sum(part.gpu_s for part in group) / gpu_s if gpu_s else 0.0)
        for (tenant, model), group in sorted(groups.items())
    )
    return (summary("", "", everything, usd), *parts)
