"""A fixed split of a fleet, as a person makes one by hand: each tenant has what it deserves, for its own models only.

Its replicas are those of the plan, that is, of their layouts on the pools where the plan has them; where these are
taken, of the shapes a model has elsewhere. First every tenant gets one of each model it asks for, the smallest first,
of equal ones whoever deserves more; then always the model gets one that has least of its peak, as long as its tenant's
share and the nodes have room. Up to the peaks, or, where a tenant has no jobs for what is left, to all of its GPUs.
"""

import heapq
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from waterline.fleet import Pool
from waterline.plan import Layout, Place, Plan, Replica, Shape

EPSILON = 1e-9  # of GPUs, and of requests a second


@dataclass(slots=True)
class Share:
    """What one tenant asks of one model of its own, and what it gets."""

    tenant: str
    model: str  # that nobody else asks for
    peak: float  # planned requests a second
    kinds: Sequence[Shape]  # what a replica of it may be, the best first
    deserves_gpus: float  # its tenant
    has: list[Replica] = field(default_factory=list)
    part: float = 0.0  # of its peak that they serve


class Nodes:
    """GPUs of pools that nobody has yet."""

    def __init__(self, pools: Iterable[Pool]) -> None:
        self.free = {pool.name: [list(range(pool.gpus_per_node)) for _ in range(pool.nodes)] for pool in pools}
        self._with = {pool.name: {pool.gpus_per_node: set(range(pool.nodes))} for pool in pools}  # so many, nodes
        self._whole = {pool.name: pool.gpus_per_node for pool in pools}

    def take(self, pool: str, gpus: int) -> tuple[Place, ...]:
        """Take whole nodes for a large replica; for a small one, part of the node that it fills best; () if none."""
        whole = self._whole[pool]
        parts = [min(whole, gpus - begin) for begin in range(0, gpus, whole)]
        if len(parts) > 1:
            nodes = heapq.nsmallest(len(parts), self._with[pool].get(whole, ()))
        else:
            least = min((there for there, nodes in self._with[pool].items() if there >= gpus and nodes), default=0)
            nodes = [min(self._with[pool][least])] if least else []
        if len(nodes) < len(parts):
            return ()
        return tuple(self._take(pool, node, part) for node, part in zip(nodes, parts, strict=True))

    def _take(self, pool: str, node: int, gpus: int) -> Place:
        free = self.free[pool][node]
        self._with[pool][len(free)].remove(node)
        self.free[pool][node] = free[gpus:]
        self._with[pool].setdefault(len(free) - gpus, set()).add(node)
        return Place(node=node, gpus=tuple(free[:gpus]))


def split(pools: Iterable[Pool], shares: Sequence[Share], *, fill: Container[str]) -> Iterator[str]:
    """Give all shares their replicas, and yield a line of text for each that cannot have one.

    Args:
        pools: of the fleet that is split.
        shares: without replicas yet.
        fill: tenants that have all of their GPUs in replicas.
    """
    nodes = Nodes(pools)
    left = {share.tenant: share.deserves_gpus for share in shares}

    def grow(share: Share) -> bool:
        for kind in share.kinds:
            places = nodes.take(kind.pool, kind.layout.gpus) if kind.layout.gpus <= left[share.tenant] + EPSILON else ()
            if places:
                replica = kind.replica(f"{share.model}/{len(share.has)}", places)
                share.has.append(replace(replica, model=share.model))
                share.part += kind.requests_per_s / share.peak
                left[share.tenant] -= kind.layout.gpus
                return True
        return False

    for share in sorted(shares, key=lambda one: (_least_gpus(one.kinds), -one.deserves_gpus)):
        if not grow(share):
            yield _why_not(share, left[share.tenant])
    growing = [share for share in shares if share.has]
    while growing:
        growing = [share for share in growing if share.tenant in fill or share.part < 1.0 - EPSILON]
        for share in sorted(growing, key=lambda one: one.part)[:1]:
            if not grow(share):
                growing.remove(share)


def _least_gpus(kinds: Iterable[Shape]) -> int:
    return min((kind.layout.gpus for kind in kinds), default=0)


def _why_not(share: Share, left_gpus: float) -> str:
    name, _, _ = share.model.rpartition("@")
    least, deserved = _least_gpus(share.kinds), f"the {share.deserves_gpus:.4g} it deserves"
    if not least:
        why = "the plan runs it nowhere as one replica"
    elif least > share.deserves_gpus + EPSILON:
        why = f"one replica takes {least} GPUs, more than {deserved}"
    elif least > left_gpus + EPSILON:
        why = f"one replica takes {least} GPUs, and of {deserved} its other models leave {left_gpus:.4g}"
    else:
        pools = ", ".join(dict.fromkeys(kind.pool for kind in share.kinds))
        why = f"one replica takes {least} GPUs of {pools}, and others have those"
    return f"a fixed split serves {share.tenant} no {name}: {why}"


def kinds_of(plan: Plan, model: str) -> list[Shape]:
    """Return what a replica of a model may be: as the plan has them, then its shapes; of each the thriftiest first.

    But for those that only read or only write, which a plan balances for all tenants together.
    """
    planned = [
        shape_of(replica)
        for replica in plan.replicas_of(model)
        if replica.role == "both" and replica.requests_per_s > 0
    ]
    others = [shape for shape in plan.shapes if shape.model == model and shape.requests_per_s > 0]
    found: dict[tuple[str, Layout, str], Shape] = {}
    for some in (planned, others):
        for kind in sorted(some, key=lambda one: one.layout.gpus / one.requests_per_s):
            found.setdefault((kind.pool, kind.layout, kind.precision), kind)
    return list(found.values())


def shape_of(replica: Replica) -> Shape:
    """Return what a replica is, wherever it may be."""
    return Shape(**{name: getattr(replica, name) for name in Shape.__struct_fields__})
