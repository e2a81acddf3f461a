"""What became of requests: one `Completion` each, and the `Summary` people read.

The rehearsal and the live service both end here, so that their numbers can be laid side by side.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from waterline.units import HOUR_S
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
    preemptions: int = 0  # how often its cache was taken and what it held had to be computed again
    reason: str = ""  # why it was refused or failed

    @property
    def ttft_s(self) -> float:
        """Time to first token; NaN if none came."""
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
    failed: int
    cancelled: int  # by the client; they count neither for nor against the SLO
    ttft_s: Percentiles | None  # of the completed that produced a token; None when there are none
    tpot_s: Percentiles | None  # of the completed that produced two tokens or more
    within_slo: int
    goodput_per_s: float  # requests within their SLO, per second of the time summarised
    slo_fraction: float  # of all but the cancelled; who was refused did not get what was promised
    prompt_tokens: int
    output_tokens: int
    gpu_hours: float
    usd: float


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Return nearest-rank percentiles, which are values that really occurred; None without values.

    The p-th is the value at rank ⌈p n / 100⌉ of n, counted from 1: in integers, because 0.9 is not nine tenths.
    """
    if not values:
        return None
    ordered = sorted(values)

    def percentile(percent: int) -> float:
        return ordered[-(-percent * len(ordered) // 100) - 1]

    return Percentiles(
        mean=math.fsum(ordered) / len(ordered), p50=percentile(50), p90=percentile(90), p99=percentile(99)
    )


def summarize(
    completions: Iterable[Completion], slos: Mapping[str, Slo], duration_s: float, usd_per_hour: Mapping[str, float]
) -> tuple[Summary, ...]:
    """Summarise by tenant and model, sorted by name, with the total first.

    Args:
        completions: of one rehearsal, or of one stretch of a live service.
        slos: by model; every model of the completions is there.
        duration_s: what goodput is divided by: of a rehearsal the time from the first arrival to the last finish, so
            that the time it takes to drain counts; of a service the length of the stretch.
        usd_per_hour: of each replica by its id. A replica's cost over that time is divided among those who used it, by
            the GPU time they used; that of a replica nobody used stays in the total.
    """
    everything = list(completions)
    groups: dict[tuple[str, str], list[Completion]] = {}
    for completion in everything:
        groups.setdefault((completion.tenant, completion.model), []).append(completion)
    used_gpu_s: dict[str, float] = {}
    for completion in everything:
        used_gpu_s[completion.replica] = used_gpu_s.get(completion.replica, 0.0) + completion.gpu_s
    usd_per_gpu_s = {
        replica: usd_per_hour[replica] * duration_s / HOUR_S / gpu_s for replica, gpu_s in used_gpu_s.items() if gpu_s
    }

    def summary(tenant: str, model: str, group: Sequence[Completion]) -> Summary:
        done = [completion for completion in group if completion.status == "ok"]
        cancelled = sum(completion.status == "cancelled" for completion in group)
        within_slo = sum(completion.meets(slos[completion.model]) for completion in done)
        return Summary(
            tenant=tenant,
            model=model,
            requests=len(group),
            completed=len(done),
            refused=sum(completion.status == "refused" for completion in group),
            failed=sum(completion.status == "failed" for completion in group),
            cancelled=cancelled,
            ttft_s=percentiles([completion.ttft_s for completion in done if completion.output_tokens > 0]),
            tpot_s=percentiles([completion.tpot_s for completion in done if completion.output_tokens > 1]),
            within_slo=within_slo,
            goodput_per_s=within_slo / duration_s if duration_s > 0 else 0.0,
            slo_fraction=within_slo / (len(group) - cancelled) if len(group) > cancelled else 0.0,
            prompt_tokens=sum(completion.prompt_tokens for completion in group),
            output_tokens=sum(completion.output_tokens for completion in group),
            gpu_hours=math.fsum(completion.gpu_s for completion in group) / HOUR_S,
            usd=math.fsum(one.gpu_s * usd_per_gpu_s[one.replica] for one in group if one.gpu_s),
        )

    total = replace(summary("", "", everything), usd=sum(usd_per_hour.values()) * duration_s / HOUR_S)
    return (total, *(summary(tenant, model, group) for (tenant, model), group in sorted(groups.items())))
