"""What became of requests: one `Completion` each, and the `Summary` people read.

The rehearsal and the live service both end here, so that their numbers can be laid side by side.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from waterline.sketch import Histograms
from waterline.units import HOUR_S, MEGA
from waterline.workload import Slo

Status = Literal["ok", "refused", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
NOWHERE = -1  # no replica
NO_CLIENT = -1  # the request names none
MOST_CLIENTS = 500  # that are counted apart: the first ones that come
OTHERS = "(others)"  # those after them
SLOTS = MOST_CLIENTS + 2  # with one of no client
MOST_WATCHED = 100_000  # refusals at a time, to see whether the client comes back
TIME_BITS = 43  # of microseconds: 100 days

OK, REFUSED, FAILED, CANCELLED = range(len(STATUSES))
WITHIN, MIDWAY, PROMPT, READ, CACHED, OUTPUT, SERVED, TOLD, RETURNED, HONOURED, FIELDS = range(
    len(STATUSES), len(STATUSES) + 11
)  # counted

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
    cached_tokens: int = 0  # of the prompt, in the cache of the replica that read it
    gpu_s: float = 0.0  # its share of the replica's step time, times the replica's GPUs
    preemptions: int = 0  # how often its cache was taken and what it held had to be computed again
    reason: str = ""  # why it was refused or failed
    client: str = ""  # "": not named
    whole: bool = False  # its answer came in one piece: nobody saw how long its first token took, and the others
    thinking_tokens: int = 0  # of the output; a rehearsal does not tell them apart

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
        if self.status == "ok" and self.whole:
            return self.finish_s - self.arrival_s <= slo.ttft_s + slo.tpot_s * max(self.output_tokens - 1, 0)
        return self.status == "ok" and self.ttft_s <= slo.ttft_s and self.tpot_s <= slo.tpot_s


class Percentiles(Struct, frozen=True, kw_only=True):
    """Of a duration, in seconds, to one part in 256; the smallest that the share of requests does not exceed."""

    mean: float
    p50: float
    p90: float
    p99: float


class Summary(Struct, frozen=True, kw_only=True):
    """Some of the requests, or all of them: those of a tenant, client, model or pool, where it names one."""

    tenant: str = ""
    client: str = ""
    model: str = ""
    pool: str = ""
    requests: int
    completed: int
    refused: int
    failed: int
    cancelled: int  # by the client; they count neither for nor against the SLO
    left_midway: int  # of them, those of whose answer something had been written; the others gave up before
    told: int  # of the refused, who were told when to come back
    returned: int  # of them, those whose client came back: asked the model again within an hour after that time
    honoured: int  # of them, those whose first request after it was taken
    ttft_s: Percentiles | None  # of the completed that produced a token; None when there are none
    tpot_s: Percentiles | None  # of the completed that produced two tokens or more
    latency_s: Percentiles | None  # of the completed, from the arrival to the last token
    within_slo: int
    goodput_per_s: float  # requests within their SLO, per second of the time summarised
    slo_fraction: float  # of all but the cancelled; who was refused did not get what was promised
    prompt_tokens: int  # of those that reached a replica
    cached_tokens: int  # of the prompts of those that were completed, in the caches of the replicas that read them
    cached_fraction: float  # of the tokens of their prompts: the hit rate of the prefix caches
    output_tokens: int
    gpu_hours: float  # of computing
    usd: float
    usd_per_million_tokens: float | None  # of prompts and answers that were served; None when none were
    kwh: float | None  # of the GPUs, computing and idle; None when their power is not known

    @property
    def gave_up(self) -> int:
        """How many did not wait any longer, before anything of their answer had been written."""
        return self.cancelled - self.left_midway


def percentiles(values: Sequence[float] | Reals) -> Percentiles | None:
    """Return exact nearest-rank percentiles of a few values; None without any. See `Histograms` for many."""
    ordered = np.sort(np.asarray(values, np.float64))
    if not len(ordered):
        return None
    p50, p90, p99 = (float(ordered[-(-percent * len(ordered) // 100) - 1]) for percent in (50, 90, 99))
    return Percentiles(mean=float(ordered.mean()), p50=p50, p90=p90, p99=p99)


class Cell(NamedTuple):
    """Requests that are counted together, or what a group of them has in common; "" of what they have not."""

    tenant: str = ""
    client: str = ""
    model: str = ""
    pool: str = ""


class Where(NamedTuple):
    """What is known of a replica."""

    id: str
    model: str
    pool: str
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a stretch of time took, by the id of the replica."""

    duration_s: float  # goodput is divided by it
    usd: Mapping[str, float]
    kwh: Mapping[str, float] | None = None


class Tally:
    """Counts what becomes of requests, a piece at a time, in memory that does not grow with their number."""

    def __init__(
        self, slos: Mapping[str, Slo], tenants: Sequence[str], models: Sequence[str], pools: Sequence[str]
    ) -> None:
        """Begin with nothing; `slos` by model."""
        self.tenants, self.models, self.pools = tuple(tenants), tuple(models), ("", *pools)
        self.replicas: list[Where] = []
        self.cells: list[Cell] = []  # in the order they were met
        self._slo_ttft_s = np.array([slos[model].ttft_s for model in models])
        self._slo_tpot_s = np.array([slos[model].tpot_s for model in models])
        pairs = len(tenants) * len(models)
        self._busy_s = np.zeros((pairs, 0))  # [tenant x model, replica] of its time
        self._pool_of = np.zeros(1, np.int64)  # [replica + 1] index into pools; the first is NOWHERE's
        self._gpus = np.zeros(1)  # [replica + 1] likewise
        self._slot_of = np.zeros(1, np.int64)  # [client + 1] 0 of no client, and of those not met
        self._slots = [""]  # clients that are counted apart, and at last the others
        self._cell_of = np.full(pairs * SLOTS * len(self.pools), NOWHERE)  # [code]
        self._of_cell = np.zeros((2, 0), np.int64)  # [its tenant x model, its pool; cell]
        self._counts = np.zeros((0, FIELDS), np.int64)  # [cell, field]
        self._gpu_s = np.zeros(0)  # [cell]
        self._ttft_s, self._tpot_s, self._latency_s = Histograms(), Histograms(), Histograms()  # [cell]
        self._returns = Returns()

    def add_replica(self, replica: Where) -> int:
        """Return its index from now on."""
        self.replicas.append(replica)
        if len(self.replicas) > self._busy_s.shape[1]:
            more = max(16, len(self.replicas))
            self._busy_s = np.pad(self._busy_s, ((0, 0), (0, more)))
            self._pool_of, self._gpus = np.pad(self._pool_of, (0, more)), np.pad(self._gpus, (0, more))
        self._pool_of[len(self.replicas)] = self.pools.index(replica.pool)
        self._gpus[len(self.replicas)] = replica.gpus
        return len(self.replicas) - 1

    def add(
        self,
        clients: Sequence[str],
        *,
        tenant: Integers,
        client: Integers,  # index into `clients`, or NO_CLIENT
        model: Integers,
        status: Integers,  # indices of STATUSES
        arrival_s: Reals,
        ttft_s: Reals,  # anything where no token came
        tpot_s: Reals,
        latency_s: Reals,
        prompt_tokens: Integers,
        output_tokens: Integers,
        replica: Integers,  # its index, or NOWHERE
        busy_s: Reals,  # share of the replica's time
        retry_s: Reals,  # after which it was told to come back; 0: it was not
        cached_tokens: Integers,  # of the prompt, in the cache of the replica that read it
        within_slo: Integers | None = None,  # 0 or 1, where somebody knows better than TTFT and TPOT
    ) -> None:
        """Count requests, those of a model in the order of their arrival; arrays by request."""
        pair = tenant * len(self.models) + model
        cell = self._cells(clients, client, pair, self._pool_of[replica + 1])
        ok, rows = status == OK, len(self.cells)
        within = ok & (ttft_s <= self._slo_ttft_s[model]) & (tpot_s <= self._slo_tpot_s[model])
        within = within if within_slo is None else within_slo
        self._counts[:, : len(STATUSES)] += np.bincount(
            cell * len(STATUSES) + status, minlength=rows * len(STATUSES)
        ).reshape(rows, -1)
        for field, amount in (
            (WITHIN, within),
            (MIDWAY, (status == CANCELLED) & (output_tokens > 0)),
            (PROMPT, (replica != NOWHERE) * prompt_tokens),
            (READ, ok * prompt_tokens),
            (CACHED, ok * cached_tokens),
            (OUTPUT, output_tokens),
            (SERVED, ok * (prompt_tokens + output_tokens)),
        ):
            self._counts[:, field] += np.rint(np.bincount(cell, amount, rows)).astype(np.int64)  # whole up to 2^53
        for histograms, value, which in (
            (self._ttft_s, ttft_s, ok & (output_tokens > 0)),
            (self._tpot_s, tpot_s, ok & (output_tokens > 1)),
            (self._latency_s, latency_s, ok),
        ):
            histograms.add(cell[which], value[which])
        reached = replica != NOWHERE
        self._use(cell[reached], pair[reached], replica[reached], busy_s[reached])
        told = (status == REFUSED) & (retry_s > 0)
        arrival_us = np.rint(arrival_s * MEGA).astype(np.int64)
        met = self._returns.add(pair << 32 | client + 1, arrival_us, ok, np.where(told, retry_s, 0.0), cell)
        for field, cells in zip((TOLD, RETURNED, HONOURED), met, strict=True):
            self._counts[:, field] += np.bincount(cells, minlength=rows)

    def use(
        self,
        clients: Sequence[str],
        *,
        tenant: Integers,
        client: Integers,
        model: Integers,
        replica: Integers,
        busy_s: Reals,
    ) -> None:
        """Put time of replicas on an account, besides that of `add`; arrays by use."""
        pair = tenant * len(self.models) + model
        self._use(self._cells(clients, client, pair, self._pool_of[replica + 1]), pair, replica, busy_s)

    def by(self, spent: Spent, *fields: str) -> tuple[Summary, ...]:
        """Summarise all requests by one or more of tenant, client, model and pool; sorted by name.

        A replica's cost is divided among those who used it, by the GPU time they used, idle time with it; what nobody
        used is on the account of the replica's model and pool, and in the total. Requests that name no client, or
        reached no pool, are in no summary by these.
        """
        groups: dict[Cell, list[int]] = {}
        for row, cell in enumerate(self.cells):
            group = Cell(**{field: getattr(cell, field) for field in fields})
            if all(getattr(group, field) for field in fields):
                groups.setdefault(group, []).append(row)
        bills = self._bills(spent)
        return tuple(self._summary(group, groups[group], spent.duration_s, *bills) for group in sorted(groups))

    def total(self, spent: Spent) -> Summary:
        return self._summary(Cell(), list(range(len(self.cells))), spent.duration_s, *self._bills(spent))

    def shares(self, what: Literal["ttft_s", "tpot_s", "latency_s"], tenant: str) -> list[tuple[float, float]]:
        """Return the times of a tenant's completed requests, rising, each with the share that does not exceed it."""
        histograms = {"ttft_s": self._ttft_s, "tpot_s": self._tpot_s, "latency_s": self._latency_s}[what]
        return histograms.shares([row for row, cell in enumerate(self.cells) if cell.tenant == tenant])

    # --- Cells --------------------------------------------------------------------------------------------------------

    def _cells(self, clients: Sequence[str], client: Integers, pair: Integers, pool: Integers) -> Integers:
        """Return the cell of each request; new ones for those that have not been met."""
        if len(clients) >= len(self._slot_of):
            self._slot_of = np.pad(self._slot_of, (0, 2 * len(clients) + 1 - len(self._slot_of)))
        slot = self._slot_of[client + 1]
        if (unmet := (slot == 0) & (client != NO_CLIENT)).any():
            for new in np.unique(client[unmet]).tolist():
                if len(self._slots) <= MOST_CLIENTS + 1:
                    self._slots.append(clients[new] if len(self._slots) <= MOST_CLIENTS else OTHERS)
                self._slot_of[new + 1] = len(self._slots) - 1
            slot = self._slot_of[client + 1]
        code = (pair * SLOTS + slot) * len(self.pools) + pool
        cell: Integers = self._cell_of[code]
        if (cell == NOWHERE).any():
            new = np.unique(code[cell == NOWHERE])
            self._cell_of[new] = len(self.cells) + np.arange(len(new))
            pairs, slots, pools = new // len(self.pools) // SLOTS, new // len(self.pools) % SLOTS, new % len(self.pools)
            for pair_, slot_, pool_ in zip(pairs.tolist(), slots.tolist(), pools.tolist(), strict=True):
                tenant, model = divmod(pair_, len(self.models))
                self.cells.append(Cell(self.tenants[tenant], self._slots[slot_], self.models[model], self.pools[pool_]))
            self._of_cell = np.concatenate([self._of_cell, np.stack([pairs, pools])], axis=1)
            self._counts = np.pad(self._counts, ((0, len(new)), (0, 0)))
            self._gpu_s = np.pad(self._gpu_s, (0, len(new)))
            for histograms in (self._ttft_s, self._tpot_s, self._latency_s):
                histograms.make_rows(len(self.cells))
            cell = self._cell_of[code]
        return cell

    def _use(self, cell: Integers, pair: Integers, replica: Integers, busy_s: Reals) -> None:
        self._gpu_s += np.bincount(cell, busy_s * self._gpus[replica + 1], len(self.cells))
        np.add.at(self._busy_s.reshape(-1), pair * self._busy_s.shape[1] + replica, busy_s)

    # --- Summaries ----------------------------------------------------------------------------------------------------

    def _summary(self, group: Cell, rows: list[int], duration_s: float, usd: "Bill", kwh: "Bill | None") -> Summary:
        counts: list[int] = self._counts[rows].sum(axis=0).tolist()
        requests = sum(counts[: len(STATUSES)])
        counted = requests - counts[CANCELLED]
        paid_usd = usd.of(group, rows)
        return Summary(
            **group._asdict(),
            requests=requests,
            completed=counts[OK],
            refused=counts[REFUSED],
            failed=counts[FAILED],
            cancelled=counts[CANCELLED],
            left_midway=counts[MIDWAY],
            told=counts[TOLD],
            returned=counts[RETURNED],
            honoured=counts[HONOURED],
            ttft_s=_percentiles(self._ttft_s, rows),
            tpot_s=_percentiles(self._tpot_s, rows),
            latency_s=_percentiles(self._latency_s, rows),
            within_slo=counts[WITHIN],
            goodput_per_s=counts[WITHIN] / duration_s if duration_s > 0 else 0.0,
            slo_fraction=counts[WITHIN] / counted if counted else 0.0,
            prompt_tokens=counts[PROMPT],
            cached_tokens=counts[CACHED],
            cached_fraction=counts[CACHED] / counts[READ] if counts[READ] else 0.0,
            output_tokens=counts[OUTPUT],
            gpu_hours=float(self._gpu_s[rows].sum()) / HOUR_S,
            usd=paid_usd,
            usd_per_million_tokens=paid_usd / counts[SERVED] * MEGA if counts[SERVED] else None,
            kwh=None if kwh is None else kwh.of(group, rows),
        )

    def _bills(self, spent: Spent) -> tuple["Bill", "Bill | None"]:
        return self._bill(spent.usd), None if spent.kwh is None else self._bill(spent.kwh)

    def _bill(self, amounts: Mapping[str, float]) -> "Bill":
        """Divide amounts by replica: among tenants and models by their use of it, and then among cells, by pool."""
        amount = np.array([amounts[one.id] for one in self.replicas], np.float64)
        busy_s = self._busy_s[:, : len(amount)]
        used_s = busy_s.sum(axis=0)
        owed = amount * np.divide(busy_s, used_s, out=np.zeros_like(busy_s), where=used_s > 0)
        pool_of, pairs, pools = self._pool_of[1 : len(amount) + 1], len(busy_s), len(self.pools)
        at = np.arange(pairs)[:, None] * pools + pool_of  # [tenant x model, replica]
        by_pair = np.bincount(at.reshape(-1), owed.reshape(-1), pairs * pools)  # [tenant x model x pool]
        cell = self._of_cell[0] * pools + self._of_cell[1]
        all_s = np.bincount(cell, self._gpu_s, pairs * pools)[cell]
        part = np.divide(self._gpu_s, all_s, out=np.zeros_like(self._gpu_s), where=all_s > 0)
        whole: dict[tuple[str, str], float] = {}
        for one, value in zip(self.replicas, amount.tolist(), strict=True):
            whole[one.model, one.pool] = whole.get((one.model, one.pool), 0.0) + value
        return Bill(by_pair[cell] * part, whole)


@dataclass(frozen=True, slots=True)
class Bill:
    """Who has to pay how much."""

    cells: Reals  # [cell]
    whole: Mapping[tuple[str, str], float]  # by model and pool, of all replicas

    def of(self, group: Cell, rows: Sequence[int]) -> float:
        """Return what a group has to pay; what nobody used is on the account of models and pools only."""
        if group.tenant or group.client:
            return math.fsum(self.cells[rows])
        return math.fsum(
            value
            for (model, pool), value in self.whole.items()
            if group.model in {"", model} and group.pool in {"", pool}
        )


class Returns:
    """Looks whether clients that were told when to come back are taken when they do.

    It watches at most `MOST_WATCHED` refusals at a time, and each for an hour after the time that was told.
    """

    def __init__(self) -> None:
        self.waiting = np.zeros((3, 0), np.int64)  # [who, due in us, cell; refusal]

    def add(
        self, who: Integers, arrival_us: Integers, taken: NDArray[np.bool_], retry_s: Reals, cell: Integers
    ) -> tuple[Integers, Integers, Integers]:
        """Look at more requests, in the order of arrival; return the cells of who was told, came back and was taken.

        `retry_s` is 0 of those who were told nothing.
        """
        told = retry_s > 0
        none = np.zeros(0, np.int64)
        if not told.any() and not self.waiting.shape[1]:
            return none, none, none
        due_us = arrival_us[told] + np.ceil(retry_s[told] * MEGA).astype(np.int64)
        waiting = np.concatenate([self.waiting, np.stack([who[told], due_us, cell[told]])], axis=1)[:, :MOST_WATCHED]
        here, due_us, cells = waiting
        _, ids = np.unique(np.concatenate([who, here]), return_inverse=True)
        order = np.argsort(ids[: len(who)], kind="stable")
        asked = ids[: len(who)][order] << TIME_BITS | arrival_us[order]  # rises
        found = np.searchsorted(asked, ids[len(who) :] << TIME_BITS | due_us)
        came = found < len(asked)
        came[came] = asked[found[came]] >> TIME_BITS == ids[len(who) :][came]
        in_time = came.copy()
        in_time[came] = arrival_us[order[found[came]]] <= due_us[came] + HOUR_S * MEGA
        honoured = in_time.copy()
        honoured[in_time] = taken[order[found[in_time]]]
        self.waiting = waiting[:, ~came & (due_us + HOUR_S * MEGA >= arrival_us[-1])]
        return cell[told], cells[in_time], cells[honoured]


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
    ordered = sorted(completions, key=lambda one: one.arrival_s)
    tenants, models, clients = (
        sorted({getattr(one, name) for one in ordered}) for name in ("tenant", "model", "client")
    )
    tally = Tally(slos, tenants, models, [])
    served = {one.replica: one.model for one in ordered}
    for id_ in usd_per_hour:
        tally.add_replica(Where(id_, served.get(id_, ""), "", 1))  # the GPU time of a completion is over all GPUs
    index = {replica: number for number, replica in enumerate(usd_per_hour)}
    named = {client: number for number, client in enumerate(clients)}
    if ordered:
        tally.add(
            clients,
            tenant=np.array([tenants.index(one.tenant) for one in ordered]),
            client=np.array([named[one.client] if one.client else NO_CLIENT for one in ordered]),
            model=np.array([models.index(one.model) for one in ordered]),
            status=np.array([STATUSES.index(one.status) for one in ordered]),
            arrival_s=np.array([one.arrival_s for one in ordered]),
            ttft_s=np.array([one.ttft_s for one in ordered]),
            tpot_s=np.array([one.tpot_s for one in ordered]),
            latency_s=np.array([one.finish_s - one.arrival_s for one in ordered]),
            prompt_tokens=np.array([one.prompt_tokens for one in ordered]),
            output_tokens=np.array([one.output_tokens for one in ordered]),
            replica=np.array([index.get(one.replica, NOWHERE) for one in ordered]),
            busy_s=np.array([one.gpu_s for one in ordered]),
            retry_s=np.zeros(len(ordered)),
            cached_tokens=np.array([one.cached_tokens for one in ordered]),
            within_slo=np.array([int(one.meets(slos[one.model])) for one in ordered]),
        )
    usd = {replica: per_hour * duration_s / HOUR_S for replica, per_hour in usd_per_hour.items()}
    spent = Spent(duration_s=duration_s, usd=usd)
    return tally.total(spent), *tally.by(spent, "tenant", "model")


def _percentiles(histograms: Histograms, rows: Sequence[int]) -> Percentiles | None:
    count, mean, (p50, p90, p99) = histograms.percentiles(rows, (50, 90, 99)) if rows else (0, 0.0, (0.0,) * 3)
    return Percentiles(mean=mean, p50=p50, p90=p90, p99=p99) if count else None
