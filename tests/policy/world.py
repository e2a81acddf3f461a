"""A small fleet in which moves take the time they take: replicas load, run, drain and end.

`Fleet` is for tests that read like a story; `live` is compiled, and checks every promise after every step, for tests
of ten thousand fleets.
"""

from dataclasses import dataclass, field

import numpy as np

from waterline.policy import holdings, lending
from waterline.policy.decisions import CLAIM_KEPT, OUTBID_LOAN, RECLAIM, RULES
from waterline.policy.holdings import (
    DRAIN,
    DRAINING,
    GONE,
    HAND_BACK,
    HOLD,
    LOADING,
    NOBODY,
    READY,
    START,
    TAKE_OVER,
    Claims,
    Layouts,
    Moves,
    Replicas,
    Services,
    Tenants,
    new_claims,
    new_replicas,
    new_services,
)
from waterline.policy.jit import jit

INF = float("inf")


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@dataclass
class Fleet:
    """Tenants as name -> (guarantee, deserved, limit); every model takes one GPU and does one unit of work, if not told."""

    gpus: tuple[int, ...]  # [node]
    shares: dict[str, tuple[float, float, float]]
    priority: dict[str, int] = field(default_factory=dict)
    weight: dict[str, float] = field(default_factory=dict)
    grace_s: float = 30.0
    min_runtime_s: float = 0.0
    load_s: float = 60.0
    model_gpus: tuple[tuple[int, ...], ...] = ()  # [model, node]; a tenant asks for the model of its own index
    now_s: float = 0.0
    plan = staticmethod(lending.plan_moves)

    def __post_init__(self) -> None:
        names, count = list(self.shares), len(self.shares)
        guarantee, deserved, limit = (floats(*column) for column in zip(*self.shares.values(), strict=True))
        weight = floats(*(self.weight.get(name, share) for name, share in zip(names, deserved, strict=True)))
        terms = np.full(count, self.grace_s), np.full(count, self.min_runtime_s)
        self.tenants = Tenants(guarantee, deserved, limit, weight, *terms)
        model_gpus = np.array(self.model_gpus or [[1] * len(self.gpus)] * count, np.int64)
        self.services = new_services(
            np.arange(count), np.arange(count), integers(*(self.priority.get(name, 0) for name in names))
        )
        self.layouts = Layouts(model_gpus, model_gpus.astype(float), np.full(model_gpus.shape, self.load_s))
        self.free_gpus = integers(*self.gpus)
        self.claims = new_claims(sum(self.gpus))
        self.replicas = new_replicas(2 * sum(self.gpus))
        self.names = names

    def want(self, **work: float) -> "Fleet":
        for name, wanted in work.items():
            self.services.wanted[self.names.index(name)] = self.services.kept[self.names.index(name)] = wanted
        return self

    def run(
        self, name: str, count: int = 1, *, node: int = 0, since_s: float = 0.0, lost_gpu_s: float = 0.0
    ) -> "Fleet":
        """Give a tenant replicas that have been ready since then."""
        service = self.names.index(name)
        for _ in range(count):
            row = int(np.flatnonzero(self.replicas.state == GONE)[0])
            gpus = self.layouts.gpus[service, node]
            self.replicas.service[row], self.replicas.node[row], self.replicas.gpus[row] = service, node, gpus
            self.replicas.state[row], self.replicas.since_s[row] = READY, since_s
            self.replicas.lost_gpu_s[row], self.replicas.rate[row] = lost_gpu_s, self.layouts.rate[service, node]
            self.free_gpus[node] -= gpus
        return self

    def moves(self) -> Moves:
        return self.plan(
            self.tenants, self.services, self.layouts, self.free_gpus, self.claims, self.replicas, self.now_s
        )

    def step(self, seconds: float = 10.0) -> Moves:
        """Decide, act, and let time pass; what drains takes its whole grace."""
        moves = self.moves()
        assert holdings.apply_moves(moves, self.free_gpus, self.claims, self.replicas, self.now_s)
        self.now_s += seconds
        for row in np.flatnonzero(self.replicas.state):
            since_s, node = self.replicas.since_s[row], self.replicas.node[row]
            model = self.services.model[self.replicas.service[row]]
            if self.replicas.state[row] == LOADING and self.now_s >= since_s + self.layouts.load_s[model, node]:
                holdings.has_loaded(self.replicas, row, self.now_s)
            elif self.replicas.state[row] == DRAINING and self.now_s >= since_s + self.grace_s:
                holdings.has_ended(self.free_gpus, self.claims, self.replicas, row)
        return moves

    def settle(self, steps: int = 60) -> "Fleet":
        for _ in range(steps):
            self.step()
        return self

    def gpus_of(self, name: str) -> int:
        """GPUs of replicas that load or run."""
        mine = (self.replicas.service == self.names.index(name)) & (self.replicas.state != GONE)
        return int(self.replicas.gpus[mine & (self.replicas.state != DRAINING)].sum())


def said(moves: Moves) -> list[tuple[str, str]]:
    """Return kind and rule of each move, in words."""
    kinds = {START: "start", DRAIN: "drain", HOLD: "hold", HAND_BACK: "hand back", TAKE_OVER: "take over"}
    return [(kinds[kind], RULES[rule][0]) for kind, rule in zip(moves.kind.tolist(), moves.rule.tolist(), strict=True)]


# --- Compiled, with every promise checked -----------------------------------------------------------------------------

PROMISES = {
    1: "GPUs of a node are conserved, and nobody has fewer than none",
    2: "no tenant has more than its limit, what drains included",
    3: "the guarantees that are not used idle: nobody else has them",
    4: "no replica is stopped that loads, or has not run for its minimum runtime",
    5: "reclaim leaves the victim's tenant its guarantee, and takes from who has more than it deserves",
    6: "who reclaims has no more than it deserves afterwards",
    7: "a loan that is outbid leaves the victim's tenant what it deserves, and its priority is lower",
    8: "a replica starts only where its model has a layout, on as many GPUs as that takes",
    9: "GPUs that were freed for a claimant go to nobody else",
    10: "a tenant that wants what it deserves has it within minimum runtime, grace and load time",
    12: "what is taken over serves the same model, and leaves the giver its guarantee",
    11: "the GPUs of a claim are handed over by the deadline that was stated",
}


@jit
def usage_of(
    tenants: Tenants, services: Services, layouts: Layouts, claims: Claims, replicas: Replicas, draining: bool
) -> np.ndarray:
    """GPUs of each tenant: `draining`, of all its replicas; else of those that stay, and of its claims."""
    usage = np.zeros(len(tenants.deserved_gpus))
    for row in range(len(replicas.state)):
        if replicas.state[row] != GONE and (draining or replicas.state[row] != DRAINING):
            usage[services.tenant[replicas.service[row]]] += replicas.gpus[row]
    for claim in range(len(claims.service)):
        service = claims.service[claim]
        if service != NOBODY and not draining:
            usage[services.tenant[service]] += layouts.gpus[services.model[service], claims.node[claim]]
    return usage


@jit
def broken_by_moves(  # noqa: C901, PLR0911, PLR0912 - all promises about moves in one place
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
    claims: Claims,
    replicas: Replicas,
    moves: Moves,
    now_s: float,
) -> int:
    """Return the promise that moves would break, before they are made; 0 if none."""
    usage = usage_of(tenants, services, layouts, claims, replicas, False)
    for move in range(len(moves.kind)):
        service, victim, node, claim = moves.claimant[move], moves.victim[move], moves.node[move], moves.claim[move]
        tenant = services.tenant[service]
        need = layouts.gpus[services.model[service], node]
        if moves.kind[move] == START:
            if need == 0 or need != moves.gpus[move]:
                return 8
            if moves.rule[move] == CLAIM_KEPT:
                if claims.service[claim] != service or claims.node[claim] != node or claims.held_gpus[claim] < need:
                    return 9
            else:
                usage[tenant] += need
        elif moves.kind[move] == HOLD:
            usage[tenant] += need
            if need == 0:
                return 8
        elif moves.kind[move] == TAKE_OVER:
            giver = replicas.service[victim]
            owner = services.tenant[giver]
            before = usage[owner]
            usage[owner] -= replicas.gpus[victim]
            usage[tenant] += replicas.gpus[victim]
            if services.model[giver] != services.model[service] or usage[owner] < tenants.guarantee_gpus[owner] - 1e-9:
                return 12
            if moves.rule[move] == RECLAIM and (
                before <= tenants.deserved_gpus[owner] or usage[tenant] > tenants.deserved_gpus[tenant] + 1e-9
            ):
                return 6
            if moves.rule[move] == OUTBID_LOAN and usage[owner] < tenants.deserved_gpus[owner] - 1e-9:
                return 7
        elif victim != NOBODY:
            giver = replicas.service[victim]
            owner = services.tenant[giver]
            if replicas.state[victim] != READY or now_s - replicas.since_s[victim] < tenants.min_runtime_s[owner]:
                return 4
            before = usage[owner]
            usage[owner] -= replicas.gpus[victim]
            if moves.rule[move] == RECLAIM:
                if before <= tenants.deserved_gpus[owner] or usage[owner] < tenants.guarantee_gpus[owner] - 1e-9:
                    return 5
                if usage[tenant] > tenants.deserved_gpus[tenant] + 1e-9:
                    return 6
            if moves.rule[move] == OUTBID_LOAN and (
                usage[owner] < tenants.deserved_gpus[owner] - 1e-9
                or services.priority[giver] >= services.priority[service]
            ):
                return 7
        else:
            usage[tenant] -= need
    return 0


@jit
def broken_now(  # noqa: C901 - likewise, about the state
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
    free_gpus: np.ndarray,
    claims: Claims,
    replicas: Replicas,
    gpus: np.ndarray,
) -> int:
    """Return the promise that the fleet as it is breaks; 0 if none."""
    seen = free_gpus.copy()
    going = 0  # to everybody, soon
    for claim in range(len(claims.service)):
        if claims.held_gpus[claim] < 0 or (claims.service[claim] == NOBODY and claims.held_gpus[claim] != 0):
            return 1
        seen[claims.node[claim]] += claims.held_gpus[claim]
        going += claims.held_gpus[claim]
        if claims.service[claim] != NOBODY:
            going -= layouts.gpus[services.model[claims.service[claim]], claims.node[claim]]
    for row in range(len(replicas.state)):
        if replicas.state[row] != GONE:
            seen[replicas.node[row]] += replicas.gpus[row]
        if replicas.state[row] == DRAINING:
            going += replicas.gpus[row]
    for node in range(len(gpus)):
        if seen[node] != gpus[node] or free_gpus[node] < 0:
            return 1
    occupied = usage_of(tenants, services, layouts, claims, replicas, True)
    usage = usage_of(tenants, services, layouts, claims, replicas, False)
    unused = 0.0
    for tenant in range(len(usage)):
        if occupied[tenant] > tenants.limit_gpus[tenant] + 1e-9:
            return 2
        unused += max(tenants.guarantee_gpus[tenant] - usage[tenant], 0.0)
    return 3 if unused > free_gpus.sum() + going + 1e-9 else 0


@jit
def live(  # noqa: C901, PLR0912 - a fleet's life in one compiled function
    tenants: Tenants,
    services: Services,
    layouts: Layouts,
    free_gpus: np.ndarray,
    claims: Claims,
    replicas: Replicas,
    wanted: np.ndarray,  # [step, service]
    luck: np.ndarray,  # [step, replica] from 0 to 1
    step_s: float,
    fails: float,  # probability, a step
    restored_s: float,  # promise 10 is checked after so long; inf: not at all
) -> tuple[int, int, int]:
    """Return the promise that was broken (0: none), at which step, and how many moves were made."""
    gpus = free_gpus.copy()
    made, short_since_s = 0, np.full(len(tenants.deserved_gpus), np.inf)
    promised_s = np.full(len(claims.service), np.inf)  # when the GPUs of a claim are there
    for step in range(len(wanted)):
        now_s = step * step_s
        for row in range(len(replicas.state)):
            age_s, node = now_s - replicas.since_s[row], replicas.node[row]
            service = replicas.service[row]
            if replicas.state[row] == LOADING and age_s >= layouts.load_s[services.model[service], node]:
                holdings.has_loaded(replicas, row, now_s)
            elif replicas.state[row] == DRAINING and (
                luck[step, row] < 0.2 or age_s >= tenants.grace_s[services.tenant[service]]
            ):
                holdings.has_ended(free_gpus, claims, replicas, row)
            elif replicas.state[row] == READY:
                replicas.lost_gpu_s[row] = replicas.gpus[row] * min(age_s, 600.0 * luck[0, row])
                if luck[step, row] > 1.0 - fails:
                    holdings.has_ended(free_gpus, claims, replicas, row)
        services.wanted[:] = wanted[step]
        services.kept[:] = wanted[step]
        moves = lending.plan_moves(tenants, services, layouts, free_gpus, claims, replicas, now_s)
        broken = broken_by_moves(tenants, services, layouts, claims, replicas, moves, now_s)
        if broken == 0 and not holdings.apply_moves(moves, free_gpus, claims, replicas, now_s):
            broken = 1
        made += len(moves.kind)
        for move in range(len(moves.kind)):
            if moves.kind[move] == HOLD:
                promised_s[moves.claim[move]] = moves.deadline_s[move]
        for row in range(len(replicas.state)):
            if replicas.claim[row] != NOBODY and now_s >= promised_s[replicas.claim[row]] + step_s:
                broken = 11
        if broken == 0:
            broken = broken_now(tenants, services, layouts, free_gpus, claims, replicas, gpus)
        if broken:
            return broken, step, made
        usage = np.zeros(len(tenants.deserved_gpus))  # of replicas that answer
        for row in range(len(replicas.state)):
            if replicas.state[row] == READY:
                usage[services.tenant[replicas.service[row]]] += replicas.gpus[row]
        for tenant in range(len(usage)):
            due, one = 0.0, 0
            for service in range(len(services.tenant)):
                if services.tenant[service] == tenant:
                    due += wanted[step, service]
                    one = layouts.gpus[services.model[service], 0]
            if usage[tenant] + one <= min(tenants.deserved_gpus[tenant], due):
                short_since_s[tenant] = min(short_since_s[tenant], now_s)
                if now_s - short_since_s[tenant] > restored_s:
                    return 10, step, made
            else:
                short_since_s[tenant] = np.inf
    return 0, len(wanted), made
