"""The minutes clock as a whole: from what is asked, and what happens to replicas, to moves and their log.

A caller (a rehearsal, or the live service) keeps a `Tide` and tells it, in the order of time:

- `note_load`: how much was asked of a service in a step that is over;
- `has_loaded`, `has_ended`: a replica answers, or is gone; `has_saved`: a job's work is safe up to now;
- `has_finished`: a run of a job is done for good;
- `does_not_fit`: a replica that was to start cannot, because its GPUs lie too scattered on the node;
- `node_down`, `node_up`: some GPUs of a node cannot be used, or can be again.

Every step it calls `decide`, does what the moves say, and writes `log_rows` of them. Each of these is a *signal*;
`feed` takes one as it is written, a line of JSON each, and `replay` makes of a record of them the same log again, byte
for byte, wherever it runs.

Loads are in *planned requests a second*: a request counts for what it costs relative to the mean request that its model
was planned for. A replica's rate is the most at which its SLO holds, in the same unit. A job's rate is 1 a run.

Tenants of the same model share its replicas (`takeover`), so what is left of their needs beyond whole replicas is
needed together: `pool_fractions` lets one of them ask for it.

`now_s` is the caller's clock, on which a day begins at 0. Steps are `series.step_s` long.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from waterline.policy import forecast, holdings
from waterline.policy.decisions import canonical_bytes, log_row
from waterline.policy.forecast import Series
from waterline.policy.holdings import (
    DRAINING,
    GONE,
    NOBODY,
    READY,
    Claims,
    Layouts,
    Moves,
    Replicas,
    Services,
    Tenants,
    apply_moves,
)
from waterline.policy.jit import jit
from waterline.policy.lending import plan_moves
from waterline.policy.tally import SLACK

FORECAST, REACT, FIXED = 0, 1, 2  # where what a service needs comes from: `Tide.source`
LEAST_STEP_S, MOST_STEP_S = 10.0, 60.0
HOUR_S = 3600.0
STEPS_A_LOAD = 10  # of the replica that loads fastest

Row = tuple[int, ...]
Signal = Mapping[str, Any]


class Tide(NamedTuple):
    """Everything that is remembered between two decisions."""

    tenants: Tenants
    services: Services
    layouts: Layouts
    free_gpus: NDArray[np.int64]  # [node]
    claims: Claims
    replicas: Replicas
    series: Series  # [service]
    source: NDArray[np.int64]  # [service] FORECAST, REACT (what was asked last) or FIXED
    fixed: NDArray[np.float64]  # [service] what it needs if FIXED: a job's runs
    floor: NDArray[np.float64]  # [service] what it needs at least
    carried: NDArray[np.float64]  # [service, hour] work a second of replicas that keep to a plan: not in `replicas`
    saved_s: NDArray[np.float64]  # [replica] until when the work of a job is safe; NaN: it has nothing to lose
    down_gpus: NDArray[np.int64]  # [node] that cannot be used


def new_tide(
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
    gpus: NDArray[np.int64],
    step_s: float,
    *,
    running_gpus: Sequence[int] = (),
) -> Tide:
    """Return a fleet in which nothing runs.

    The horizon of each service is what it takes to get a replica in the worst case: the step until it is noticed, the
    longest grace of those who might have to make room, and the longest load time.

    Args:
        tenants: what they are promised.
        services: what they ask for; nothing so far.
        layouts: where their models run, and how.
        gpus: [node] that there are.
        step_s: how often the caller will decide.
        running_gpus: of each replica that it is going to write in.
    """
    count = len(services.tenant)
    ahead = np.zeros(count, np.int64)
    for service in range(count):
        model = services.model[service]
        load_s = layouts.load_s[model][layouts.gpus[model] > 0].max(initial=0.0)
        ahead[service] = -(-(load_s + tenants.grace_s.max(initial=0.0)) // step_s) + 1
    most_gpus = int(gpus.max(initial=1))
    smallest = np.where(layouts.gpus > 0, layouts.gpus, most_gpus).min(axis=0, initial=most_gpus)
    smallest = np.minimum(smallest, min(running_gpus, default=most_gpus))
    most = int((gpus // np.maximum(smallest, 1)).sum())  # replicas at a time, those that drain included
    most = max(most, len(running_gpus))
    return Tide(
        tenants,
        services,
        layouts,
        np.array(gpus, np.int64),
        holdings.new_claims(most),
        holdings.new_replicas(most),
        forecast.new_series(ahead, step_s),
        np.full(count, FORECAST, np.int64),
        np.zeros(count),
        np.zeros(count),
        np.zeros((count, 24)),
        np.full(most, np.nan),
        np.zeros(len(gpus), np.int64),
    )


def step_length_s(load_s: Iterable[float]) -> float:
    """Return the length of a step: a tenth of the shortest load time, in whole seconds, from 10 to 60."""
    shortest_s = min(load_s, default=MOST_STEP_S * STEPS_A_LOAD)
    return float(np.clip(round(shortest_s / STEPS_A_LOAD), LEAST_STEP_S, MOST_STEP_S))


# --- Signals ----------------------------------------------------------------------------------------------------------


@jit
def note_load(tide: Tide, service: int, step: int, load: float) -> None:
    """So much was asked of a service in a step: planned requests a second. Steps in their order; gaps are allowed."""
    forecast.observe(tide.series, service, step, load)


@jit
def has_loaded(tide: Tide, replica: int, now_s: float) -> None:
    """A replica answers from now on, or the run of a job does work that counts."""
    holdings.has_loaded(tide.replicas, replica, now_s)
    if tide.source[tide.replicas.service[replica]] == FIXED:
        tide.saved_s[replica] = now_s


@jit
def has_saved(tide: Tide, replica: int, now_s: float) -> None:
    """The work of a job's run is safe up to now."""
    tide.saved_s[replica] = now_s


@jit
def has_ended(tide: Tide, replica: int) -> None:
    """A replica is gone, and its GPUs are whose they were freed for, or free."""
    holdings.has_ended(tide.free_gpus, tide.claims, tide.replicas, replica)
    tide.saved_s[replica] = np.nan


@jit
def does_not_fit(tide: Tide, replica: int) -> None:
    """A replica that was to start did not find its GPUs close enough together: its model is not tried there again."""
    model, node = tide.services.model[tide.replicas.service[replica]], tide.replicas.node[replica]
    has_ended(tide, replica)
    for claim in range(len(tide.claims.service)):
        service = tide.claims.service[claim]
        if service != NOBODY and tide.claims.node[claim] == node and tide.services.model[service] == model:
            holdings.close_claim(tide.free_gpus, tide.claims, tide.replicas, claim)
    tide.layouts.gpus[model, node] = 0


@jit
def node_down(tide: Tide, node: int, gpus: int) -> None:
    """So many GPUs of a node cannot be used from now on. Tell first that the replicas on them have ended."""
    tide.down_gpus[node] += gpus
    for claim in range(len(tide.claims.service)):
        if tide.free_gpus[node] >= gpus:
            break
        if tide.claims.service[claim] != NOBODY and tide.claims.node[claim] == node:
            holdings.close_claim(tide.free_gpus, tide.claims, tide.replicas, claim)
    tide.free_gpus[node] -= gpus


@jit
def node_up(tide: Tide, node: int, gpus: int) -> None:
    """So many GPUs of a node can be used again."""
    tide.down_gpus[node] -= gpus
    tide.free_gpus[node] += gpus


@jit
def has_finished(tide: Tide, service: int) -> None:
    """One run of a job is done for good: so much less is needed."""
    tide.fixed[service] = max(tide.fixed[service] - 1.0, 0.0)


@jit
def decide(tide: Tide, now_s: float) -> Moves:
    """Return what to do now, and count on its being done; the rows of replicas that start are in `Moves.started`."""
    _look_ahead(tide, now_s)
    pool_fractions(tide)
    replicas = tide.replicas
    for replica in range(len(replicas.state)):
        unsaved_s = now_s - tide.saved_s[replica]  # NaN where there is nothing to lose
        lost = unsaved_s > 0.0 and replicas.state[replica] == READY and not _saves_in_time(tide, replica)
        replicas.lost_gpu_s[replica] = replicas.gpus[replica] * unsaved_s if lost else 0.0
    moves = plan_moves(tide.tenants, tide.services, tide.layouts, tide.free_gpus, tide.claims, tide.replicas, now_s)
    apply_moves(moves, tide.free_gpus, tide.claims, tide.replicas, now_s)  # there are rows enough
    return moves


@jit
def _saves_in_time(tide: Tide, replica: int) -> bool:
    """Whether a job that is told to stop can save its work within its grace: that takes about as long as to load it."""
    service = tide.replicas.service[replica]
    load_s = tide.layouts.load_s[tide.services.model[service], tide.replicas.node[replica]]
    return bool(load_s <= tide.tenants.grace_s[tide.services.tenant[service]])


# --- What is needed ---------------------------------------------------------------------------------------------------


@jit
def _look_ahead(tide: Tide, now_s: float) -> None:
    """Write into the services what they need."""
    services, series = tide.services, tide.series
    step = int(now_s // series.step_s[0]) - 1  # the last that is over
    hour = int(now_s // HOUR_S) % 24
    for service in range(len(services.tenant)):
        if tide.source[service] == FIXED:
            wanted, kept = tide.fixed[service], tide.fixed[service]
        elif tide.source[service] == REACT:
            wanted = kept = series.last_load[service, 1]
        else:
            wanted, kept = forecast.needs(series, service, step)
            wanted *= 1.0 - SLACK  # less than that is scatter, as it is when something seems to be spare
        services.wanted[service] = max(wanted - tide.carried[service, hour], tide.floor[service])
        services.kept[service] = max(kept - tide.carried[service, hour], tide.floor[service])


@jit
def pool_fractions(tide: Tide) -> None:
    """Let tenants of the same model need what is left beyond whole replicas together.

    What one tenant's replicas have to spare covers what others need beyond theirs, the least first. What then remains
    beyond whole replicas is added up, the most first, and asked for by one tenant for as many as one replica serves:
    the one that needs most of those that may have another.
    """
    services = tide.services
    supply = supply_of(tide)
    part = np.zeros(len(services.tenant))  # [service] needed beyond what it has, and beyond whole replicas
    seen = np.zeros(len(tide.layouts.gpus), np.int64)
    for first in range(len(services.tenant)):
        model = services.model[first]
        if seen[model]:
            continue
        seen[model] = 1
        rate = _least_rate(tide, model)
        if rate == 0.0:
            continue
        for service in range(first, len(services.tenant)):
            short = services.wanted[service] - supply[service]
            if services.model[service] == model and tide.source[service] != FIXED and short > 0.0:
                part[service] = short - rate * (short // rate)
        _cover(services, supply, part, model)
        _gather(tide, part, model, rate)


@jit
def supply_of(tide: Tide) -> NDArray[np.float64]:
    """Return work a second of replicas that stay, and of those that GPUs are being freed for."""
    services, replicas, claims = tide.services, tide.replicas, tide.claims
    supply = np.zeros(len(services.tenant))
    for replica in range(len(replicas.state)):
        if replicas.state[replica] not in (GONE, DRAINING):
            supply[replicas.service[replica]] += replicas.rate[replica]
    for claim in range(len(claims.service)):
        service = claims.service[claim]
        if service != NOBODY:
            supply[service] += tide.layouts.rate[services.model[service], claims.node[claim]]
    return supply


@jit
def _least_rate(tide: Tide, model: int) -> float:
    """Return the rate of the smallest replica that a model may have; 0 where it runs nowhere."""
    least = np.inf
    for node in range(len(tide.free_gpus)):
        if tide.layouts.gpus[model, node] > 0:
            least = min(least, tide.layouts.rate[model, node])
    return least if least < np.inf else 0.0


@jit
def _cover(services: Services, supply: NDArray[np.float64], part: NDArray[np.float64], model: int) -> None:
    """Move what is needed beyond whole replicas to tenants that have room for it, the least first."""
    while True:
        guest, host, most = NOBODY, NOBODY, 0.0
        for service in range(len(services.tenant)):
            if services.model[service] != model:
                continue
            if part[service] > 0.0 and (guest == NOBODY or part[service] < part[guest]):
                guest = service
            room = supply[service] - services.kept[service]
            if room > most:
                host, most = service, room
        if guest < 0 or host < 0 or part[guest] > most:  # NOBODY
            return
        _pass_on(services, part, guest, host)


@jit
def _gather(tide: Tide, part: NDArray[np.float64], model: int, rate: float) -> None:
    """Let one tenant ask for what several need beyond whole replicas, up to a replica at a time, the most first."""
    services = tide.services
    while True:
        host = NOBODY
        for service in range(len(services.tenant)):
            better = part[service] > 0.0 and (host == NOBODY or part[service] > part[host])
            if services.model[service] == model and better and _may_grow(tide, services.tenant[service]):
                host = service
        if host == NOBODY:
            return
        room, part[host] = rate - part[host], 0.0
        while True:
            guest = NOBODY
            for service in range(len(services.tenant)):
                fits = 0.0 < part[service] <= room
                if services.model[service] == model and fits and (guest == NOBODY or part[service] > part[guest]):
                    guest = service
            if guest == NOBODY:
                break
            room -= part[guest]
            _pass_on(services, part, guest, host)


@jit
def _may_grow(tide: Tide, tenant: int) -> bool:
    """Whether a tenant has less than its limit, claims and what drains included."""
    usage = 0
    for replica in range(len(tide.replicas.state)):
        if tide.replicas.state[replica] != GONE and tide.services.tenant[tide.replicas.service[replica]] == tenant:
            usage += tide.replicas.gpus[replica]
    return bool(usage < tide.tenants.limit_gpus[tenant])


@jit
def _pass_on(services: Services, part: NDArray[np.float64], guest: int, host: int) -> None:
    """Let a service need what is left of another's needs."""
    services.wanted[guest] -= part[guest]
    services.kept[guest] = max(services.kept[guest] - part[guest], services.wanted[guest])
    services.wanted[host] = max(services.wanted[host], 0.0) + part[guest]
    services.kept[host] += part[guest]
    part[guest] = 0.0


# --- The log ----------------------------------------------------------------------------------------------------------


def log_rows(tide: Tide, moves: Moves, now_s: float) -> list[Row]:
    """Return moves as rows of the decision log: claimants are services, victims are replicas."""
    return [
        log_row(
            at_s=now_s,
            rule=int(moves.rule[move]),
            tenant=int(tide.services.tenant[moves.claimant[move]]),
            claimant=int(moves.claimant[move]),
            victim=int(moves.victim[move]),
            place=int(moves.node[move]),
            amount=int(moves.gpus[move]),
            cost_s=float(moves.cost_gpu_s[move]),
            deadline_s=float(moves.deadline_s[move]),
        )
        for move in range(len(moves.kind))
    ]


class Log:
    """The rows so far, and their digest."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._digest = hashlib.sha256()

    def add(self, rows: Iterable[Row]) -> None:
        more = list(rows)
        self.rows += more
        self._digest.update(canonical_bytes(more))

    @property
    def digest(self) -> str:
        """SHA-256 of all rows, in hexadecimal."""
        return self._digest.hexdigest()


def signal_line(signal: Signal) -> bytes:
    """Return a signal as a line of JSON, always the same bytes for the same signal."""
    return json.dumps(signal, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def feed(tide: Tide, signal: Signal, decide: Callable[[Tide, float], Moves] = decide) -> tuple[Moves | None, list[Row]]:
    """Let a tide learn of a signal; of a "tick" return the moves it decides on, and their rows.

    Raises KeyError for a signal that is none. `decide` may be the compiled one.
    """
    now_s = float(signal["at_s"])
    kind = signal["signal"]
    if kind == "tick":
        moves = decide(tide, now_s)
        return moves, log_rows(tide, moves, now_s)
    if kind == "load":
        note_load(tide, signal["service"], signal["step"], signal["load"])
    elif kind in {"down", "up"}:
        (node_down if kind == "down" else node_up)(tide, signal["node"], signal["gpus"])
    elif kind == "finished":
        has_finished(tide, signal["service"])
    elif kind in {"ended", "failed", "unfit"}:
        (does_not_fit if kind == "unfit" else has_ended)(tide, signal["replica"])
    else:
        {"loaded": has_loaded, "saved": has_saved}[kind](tide, signal["replica"], now_s)
    return None, []


def replay(tide: Tide, signals: Iterable[bytes | str]) -> Iterator[Row]:
    """Yield the rows of the log that recorded signals lead to, beginning with the tide they began with."""
    for line in signals:
        yield from feed(tide, json.loads(line))[1]
