"""What happened lately: requests that ended, by model and tenant, for percentiles and shares; moves and ejections."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan, nan

from waterline.outcome import Completion, Percentiles
from waterline.snapshot import EjectionNow, LatencyNow, MoveNow
from waterline.workload import Slo

WINDOW_S = 60.0
NEWS = 50  # moves and ejections that are remembered
MOST = 2000  # of one tenant and model; of more than 33 requests a second the window is shorter


@dataclass(frozen=True, slots=True)
class _Ended:
    finish_s: float
    ttft_s: float  # NaN where no token came, or nobody saw it come
    tpot_s: float  # 0 for a single token
    ok: bool
    within_slo: bool
    output_tokens: int
    gpu_s: float


class Recent:
    """The requests that ended in the last `WINDOW_S` without those a client cancelled, and the latest news."""

    def __init__(self, slos: Mapping[str, Slo]) -> None:
        self._slos = slos
        self._ended: dict[tuple[str, str], deque[_Ended]] = {}
        self.moves: deque[MoveNow] = deque(maxlen=NEWS)  # newest first
        self.ejections: deque[EjectionNow] = deque(maxlen=NEWS)  # likewise

    def count(self, completion: Completion) -> None:
        if completion.status == "cancelled":
            return
        key = (completion.model, completion.tenant)
        if key not in self._ended:
            self._ended[key] = deque(maxlen=MOST)
        self._ended[key].append(
            _Ended(
                completion.finish_s,
                nan if completion.whole else completion.ttft_s,
                completion.tpot_s,
                completion.status == "ok",
                completion.meets(self._slos[completion.model]),
                completion.output_tokens,
                completion.gpu_s,
            )
        )

    def latencies(self, now_s: float) -> tuple[LatencyNow, ...]:
        self._forget(now_s)
        return tuple(
            _latency(model, tenant, ended, now_s) for (model, tenant), ended in sorted(self._ended.items()) if ended
        )

    def gpu_s(self, model: str, now_s: float) -> dict[str, float]:
        """Return the GPU time of a model's requests by tenant, without those that had none."""
        self._forget(now_s)
        sums = {
            tenant: sum(one.gpu_s for one in ended) for (of_model, tenant), ended in self._ended.items()
            if of_model == model
        }  # fmt: skip
        return {tenant: gpu_s for tenant, gpu_s in sums.items() if gpu_s > 0}

    def _forget(self, now_s: float) -> None:
        for ended in self._ended.values():
            while ended and ended[0].finish_s < now_s - WINDOW_S:
                ended.popleft()


def _latency(model: str, tenant: str, ended: deque[_Ended], now_s: float) -> LatencyNow:
    answered = [one for one in ended if one.ok]
    return LatencyNow(
        model=model,
        tenant=tenant,
        window_s=WINDOW_S if len(ended) < MOST else now_s - ended[0].finish_s,
        requests=len(ended),
        ok=len(answered),
        within_slo=sum(one.within_slo for one in ended),
        output_tokens=sum(one.output_tokens for one in ended),
        ttft_s=_percentiles([one.ttft_s for one in answered if not isnan(one.ttft_s)]),
        tpot_s=_percentiles([one.tpot_s for one in answered if one.tpot_s > 0]),
    )


def _percentiles(times_s: list[float]) -> Percentiles | None:
    """Return the nearest-rank percentiles; None of nothing."""
    if not times_s:
        return None
    ordered = sorted(times_s)
    p50, p90, p99 = (ordered[-(-percent * len(ordered) // 100) - 1] for percent in (50, 90, 99))
    return Percentiles(mean=sum(ordered) / len(ordered), p50=p50, p90=p90, p99=p99)
