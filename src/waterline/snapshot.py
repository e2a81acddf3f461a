"""How a live service is at one moment: the record that the admin API sends, the dashboard draws and `status` prints.

The service fills it, whoever shows it only reads. Times named `at_s` are Unix times; every other is a duration.
"""

from collections.abc import Iterable
from typing import Literal, get_args

from msgspec import Struct
from msgspec.structs import replace

from waterline.outcome import Percentiles

PUBLIC = "public"  # the tenant whose GPUs are the waterline
KEY_VARIABLE = "WATERLINE_ADMIN_KEY"  # of the environment: what a service asks of operators, and what they show
MOST_REPLICAS = 200  # that `public_view` names one by one
MOST_BATCHES = 20  # likewise
MOST_NODES = 64  # likewise
MOST_JOBS = 64  # likewise

Health = Literal["ok", "not ready", "stopping"]  # not ready: a model has no replica that is
HEALTHS: tuple[Health, ...] = get_args(Health)
NodeState = Literal["up", "silent", "down", "elsewhere"]  # silent: its machine, or the way there, may come back
Kind = Literal["serving", "starting", "draining", "job", "idle", "lost"]  # lost: their node is


class Use(Struct, frozen=True, kw_only=True):
    """GPUs of a pool that one tenant has for one thing. Those of a pool add up to its GPUs."""

    pool: str
    tenant: str  # "": nobody's
    kind: Kind
    gpus: float  # a tenant's part of a shared replica is a fraction


class TenantNow(Struct, frozen=True, kw_only=True):
    """What a tenant has, beside what it is entitled to, in GPUs."""

    tenant: str
    gpus: float
    guarantee_gpus: float
    deserved_gpus: float
    limit_gpus: float
    running: int = 0  # requests
    waiting: int = 0

    @property
    def borrowed_gpus(self) -> float:
        return max(0.0, self.gpus - self.deserved_gpus)


class ModelNow(Struct, frozen=True, kw_only=True):
    """A model, over all its replicas and tenants."""

    model: str
    ready: int  # replicas
    replicas: int
    running: int  # requests that an engine works on
    slots: int  # requests that the ready replicas may work on together
    waiting: int  # requests in the gateway
    ttft_slo_s: float
    tpot_slo_s: float


class LatencyNow(Struct, frozen=True, kw_only=True):
    """The requests of one tenant to one model that ended lately."""

    model: str
    tenant: str
    window_s: float  # how far back they go
    requests: int
    ok: int
    within_slo: int
    output_tokens: int
    ttft_s: Percentiles | None  # of those that went well; None when none did
    tpot_s: Percentiles | None  # of those with two tokens or more


class QueueNow(Struct, frozen=True, kw_only=True):
    """Requests that wait in the gateway."""

    model: str
    tenant: str
    client: str  # "": all of them
    waiting: int
    oldest_s: float = 0.0  # how long the first of them has waited


class ReplicaNow(Struct, frozen=True, kw_only=True):
    """One replica."""

    id: str
    model: str
    tenant: str  # whose GPUs it has; "": several share it
    pool: str
    node: int
    gpus: int
    state: str  # "ready", "starting", "draining", "suspect", "backing off", "ejected", "stopped" …
    reason: str = ""  # why, where it is not as it should be
    running: int = 0  # requests
    slots: int = 0
    backlog_tokens: float = 0.0  # accepted, not yet produced
    restarts: int = 0


class NodeNow(Struct, frozen=True, kw_only=True):
    """One node of a pool."""

    pool: str
    node: int
    state: NodeState
    gpus: int
    used_gpus: int = 0
    users: tuple[str, ...] = ()  # replicas and runs that have some of them
    address: str = ""
    reason: str = ""  # why it is not up


class JobNow(Struct, frozen=True, kw_only=True):
    """One run of a research job."""

    job: str
    tenant: str
    state: str  # "starting", "running", "checkpointing", "waiting" …
    pool: str = ""
    node: int = -1
    gpus: int = 0
    checkpoint_age_s: float | None = None  # what would be lost; None: it has written none
    stops: int = 0  # how often it had to yield
    reason: str = ""  # why, where it is not as it should be


class BatchNow(Struct, frozen=True, kw_only=True):
    """One batch that this gateway runs."""

    id: str
    tenant: str
    client: str  # "": somebody's
    status: str  # "validating", "in_progress", "finalizing", "cancelling"
    requests: int  # 0 until they have been counted
    ended: int  # of them
    left_s: float  # of its window


class MoveNow(Struct, frozen=True, kw_only=True):
    """GPUs that went, or are about to go, from one use to another, and why."""

    at_s: float
    kind: str  # "start", "drain", "hold", "hand back"
    rule: str  # in words, see `policy.decisions.RULES`
    why: str  # the rule's sentence
    tenant: str  # for whom
    what: str  # model or job
    pool: str
    gpus: int
    victim: str = ""  # replica or run that ends
    victim_tenant: str = ""
    deadline_s: float = 0.0  # within how many seconds of `at_s` the victim is gone


class EjectionNow(Struct, frozen=True, kw_only=True):
    """A replica that got no more work for a while because it failed."""

    at_s: float
    replica: str
    reason: str


class LedgerNow(Struct, frozen=True, kw_only=True):
    """How far what is written lags behind what was done."""

    waiting_rows: int
    lag_s: float  # since the oldest of them was to be written
    problem: str = ""  # why it cannot be written


class Snapshot(Struct, frozen=True, kw_only=True):
    """Everything that is known of a live service at one moment."""

    at_s: float
    uptime_s: float
    fleet: str
    health: Health
    gpus: int  # of the fleet
    uses: tuple[Use, ...]
    tenants: tuple[TenantNow, ...]
    models: tuple[ModelNow, ...]
    latencies: tuple[LatencyNow, ...]
    queues: tuple[QueueNow, ...]
    replicas: tuple[ReplicaNow, ...]
    replica_states: dict[str, int]  # how many replicas are in each state
    nodes: tuple[NodeNow, ...] = ()  # those that are lost before all others
    node_states: dict[str, int] = {}  # how many nodes are in each state
    jobs: tuple[JobNow, ...] = ()
    job_states: dict[str, int] = {}  # how many runs are in each state
    batches: tuple[BatchNow, ...] = ()
    moves: tuple[MoveNow, ...] = ()  # the latest, newest first
    ejections: tuple[EjectionNow, ...] = ()  # likewise
    ledger: LedgerNow | None = None  # None: nothing is written
    problems: tuple[str, ...] = ()  # in words, what an operator should look at

    @property
    def public_gpus(self) -> float:
        """GPUs that serve the public now: the tip of the iceberg."""
        return sum(use.gpus for use in self.uses if use.tenant == PUBLIC and use.kind in {"serving", "draining"})

    @property
    def waterline(self) -> float:
        """GPUs serving the public, over all GPUs."""
        return self.public_gpus / self.gpus if self.gpus else 0.0

    def public_view(self) -> "Snapshot":
        """Return what anybody may see: nothing of single clients, and of many replicas those that need attention."""
        shown = sorted(self.replicas, key=lambda replica: (replica.state == "ready", not replica.reason))
        batches = tuple(replace(batch, client="") for batch in self.batches[:MOST_BATCHES])
        return replace(
            self,
            queues=_over_clients(self.queues),
            replicas=tuple(shown[:MOST_REPLICAS]),
            nodes=self.nodes[:MOST_NODES],
            jobs=tuple(sorted(self.jobs, key=lambda job: not job.reason)[:MOST_JOBS]),
            batches=batches,
        )


def _over_clients(queues: Iterable[QueueNow]) -> tuple[QueueNow, ...]:
    together: dict[tuple[str, str], QueueNow] = {}
    for queue in queues:
        before = together.get((queue.model, queue.tenant))
        waiting, oldest_s = (before.waiting, before.oldest_s) if before else (0, 0.0)
        together[queue.model, queue.tenant] = replace(
            queue, client="", waiting=waiting + queue.waiting, oldest_s=max(oldest_s, queue.oldest_s)
        )
    return tuple(together.values())
