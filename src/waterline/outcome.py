"""What became of requests: one `Completion` each, and the `Summary` people read.

The rehearsal and the live service both end here, so that their numbers can be laid side by side.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from waterline.units import HOUR_S
from waterline.workload import Slo

Status = Literal["ok", "refused", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
NOWHERE = -1  # no replica

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]


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


def percentiles(values: Sequence[float] | Reals) -> Percentiles | None:
    """Return nearest-rank percentiles, which are values that really occurred; None without values.

    The p-th is the value at rank ⌈p n / 100⌉ of n, counted from 1: in integers, because 0.9 is not nine tenths.
    """
    return _percentiles([np.asarray(values, np.float64)])


class Tally:
    """Counts what becomes of requests, a piece at a time; it keeps two times of each, and nothing else."""

    def __init__(self, slos: Mapping[str, Slo], replicas: Sequence[str], gpus: Sequence[int]) -> None:
        """Begin with nothing; `slos` by model, `gpus` of each replica."""
        self.slos, self.replicas, self.gpus = slos, replicas, np.array(gpus, np.float64)
        self.accounts: dict[tuple[str, str], _Account] = {}

    def add(
        self,
        tenant: str,
        model: str,
        *,
        status: Integers,  # indices of STATUSES
        ttft_s: Reals,  # anything where no token came
        tpot_s: Reals,
        prompt_tokens: Integers,
        output_tokens: Integers,
        replica: Integers,  # its index, or NOWHERE
        busy_s: Reals,  # share of the replica's time
    ) -> None:
        """Count requests of one tenant to one model; arrays by request."""
        slo, ok = self.slos[model], status == STATUSES.index("ok")
        account = self.accounts.setdefault((tenant, model), _Account(busy_s=np.zeros(len(self.replicas))))
        account.ended += np.bincount(status, minlength=len(STATUSES))
        account.within_slo += int((ok & (ttft_s <= slo.ttft_s) & (tpot_s <= slo.tpot_s)).sum())
        account.prompt_tokens += int(prompt_tokens.sum())
        account.output_tokens += int(output_tokens.sum())
        account.ttft_s.append(ttft_s[ok & (output_tokens > 0)])
        account.tpot_s.append(tpot_s[ok & (output_tokens > 1)])
        reached = replica != NOWHERE
        self.use(tenant, model, replica[reached], busy_s[reached])

    def use(self, tenant: str, model: str, replica: Integers, busy_s: Reals) -> None:
        """Put time of replicas on an account; arrays of indices and times."""
        self.accounts[tenant, model].busy_s += np.bincount(replica, busy_s, minlength=len(self.replicas))

    def summaries(self, duration_s: float, usd: Mapping[str, float]) -> tuple[Summary, ...]:
        """Summarise by tenant and model, sorted by name, with the total first.

        Args:
            duration_s: what goodput is divided by.
            usd: what each replica costs over that time. Those who used it pay for its idle time too, each the part it
                had of its use; what nobody used stays in the total.
        """
        total = self._summary("", "", list(self.accounts.values()), duration_s, usd)
        return (
            replace(total, usd=math.fsum(usd.values())),
            *(
                self._summary(tenant, model, [self.accounts[tenant, model]], duration_s, usd)
                for tenant, model in sorted(self.accounts)
            ),
        )

    def by_tenant(self, duration_s: float, usd: Mapping[str, float]) -> tuple[Summary, ...]:
        """Summarise by tenant over all models, sorted by name; see `summaries`."""
        groups: dict[str, list[_Account]] = {}
        for (tenant, _), account in self.accounts.items():
            groups.setdefault(tenant, []).append(account)
        return tuple(self._summary(tenant, "", groups[tenant], duration_s, usd) for tenant in sorted(groups))

    def _paid(self, accounts: "Iterable[_Account]", usd: Mapping[str, float]) -> float:
        used_s = self._busy_s(self.accounts.values())
        part = np.divide(self._busy_s(accounts), used_s, out=np.zeros_like(used_s), where=used_s > 0)
        return math.fsum(part * [usd[replica] for replica in self.replicas])

    def _busy_s(self, accounts: "Iterable[_Account]") -> Reals:
        return sum((account.busy_s for account in accounts), np.zeros(len(self.replicas)))

    def _summary(
        self,
        tenant: str,
        model: str,
        accounts: "Sequence[_Account]",
        duration_s: float,
        usd: Mapping[str, float],
    ) -> Summary:
        ended = [sum(int(account.ended[status]) for account in accounts) for status in range(len(STATUSES))]
        completed, refused, failed, cancelled = ended
        within_slo = sum(account.within_slo for account in accounts)
        counted = sum(ended) - cancelled
        return Summary(
            tenant=tenant,
            model=model,
            requests=sum(ended),
            completed=completed,
            refused=refused,
            failed=failed,
            cancelled=cancelled,
            ttft_s=_percentiles([piece for account in accounts for piece in account.ttft_s]),
            tpot_s=_percentiles([piece for account in accounts for piece in account.tpot_s]),
            within_slo=within_slo,
            goodput_per_s=within_slo / duration_s if duration_s > 0 else 0.0,
            slo_fraction=within_slo / counted if counted else 0.0,
            prompt_tokens=sum(account.prompt_tokens for account in accounts),
            output_tokens=sum(account.output_tokens for account in accounts),
            gpu_hours=math.fsum(self._busy_s(accounts) * self.gpus) / HOUR_S,
            usd=self._paid(accounts, usd),
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
    groups: dict[tuple[str, str], list[Completion]] = {}
    for completion in completions:
        groups.setdefault((completion.tenant, completion.model), []).append(completion)
    index = {replica: number for number, replica in enumerate(usd_per_hour)}
    tally = Tally(slos, list(index), [1] * len(index))  # the GPU time of a completion is over all GPUs
    for (tenant, model), group in groups.items():
        tally.add(
            tenant,
            model,
            status=np.array([STATUSES.index(one.status) for one in group]),
            ttft_s=np.array([one.ttft_s for one in group]),
            tpot_s=np.array([one.tpot_s for one in group]),
            prompt_tokens=np.array([one.prompt_tokens for one in group]),
            output_tokens=np.array([one.output_tokens for one in group]),
            replica=np.array([index[one.replica] if one.gpu_s else NOWHERE for one in group]),
            busy_s=np.array([one.gpu_s for one in group]),
        )
    usd = {replica: per_hour * duration_s / HOUR_S for replica, per_hour in usd_per_hour.items()}
    return tally.summaries(duration_s, usd)


@dataclass(slots=True, kw_only=True)
class _Account:
    """What has been counted of one tenant and model."""

    busy_s: Reals  # [replica] of their time, used
    ended: Integers = field(default_factory=lambda: np.zeros(len(STATUSES), np.int64))  # [status]
    within_slo: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: list[Reals] = field(default_factory=list)  # of the completed that produced a token
    tpot_s: list[Reals] = field(default_factory=list)  # of the completed that produced two tokens or more


def _percentiles(pieces: Sequence[Reals]) -> Percentiles | None:
    ordered = np.concatenate([np.zeros(0), *pieces])
    count = len(ordered)
    if not count:
        return None
    mean = float(ordered.mean())
    ranks = [-(-percent * count // 100) - 1 for percent in (50, 90, 99)]
    ordered.partition(sorted(set(ranks)))
    p50, p90, p99 = (float(ordered[rank]) for rank in ranks)
    return Percentiles(mean=mean, p50=p50, p90=p90, p99=p99)
