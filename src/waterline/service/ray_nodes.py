"""Which node of a Ray cluster is which of the fleet's: by its label, the kind of its GPUs, and how many it has."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from waterline.fleet import Fleet, Pool
from waterline.plan import Plan, Replica
from waterline.service.engines.seat import VISIBLE_DEVICES
from waterline.service.jobs import Spot

LABEL = "pool"  # of a Ray node: which of the fleet's pools it belongs to
TYPE = re.compile(r"accelerator_type:(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node of the cluster, as Ray tells of it."""

    id: str
    address: str
    gpus: int = 0
    cpus: int = 0
    kind: str = ""  # of its GPUs, as Ray calls it; "" where it does not know
    pool: str = ""  # that it is labelled with

    def __str__(self) -> str:
        return f"{self.address} ({', '.join(filter(None, (f'{self.gpus} GPUs', self.kind, self.pool)))})"


def wanted_pools(plan: Plan) -> set[str]:
    """Return the pools on whose nodes something may be started."""
    jobs = {pool.name for pool in plan.fleet.pools} if any(job.command for job in plan.fleet.jobs) else set()
    replicas = {one.pool for one in plan.replicas if one.engine != "openai"}
    return jobs | replicas | {one.pool for one in plan.shapes if one.engine != "openai"}


def match(fleet: Fleet, wanted: Iterable[str], nodes: Sequence[Node], known: Mapping[Spot, Node]) -> dict[Spot, Node]:
    """Return which node of the cluster is which of the fleet's, as far as there are enough; known ones stay.

    A node is one of a pool's when it is labelled so, or else has as many GPUs, of that kind if Ray knows it. Labelled
    ones come first, then those of the kind, then the smallest that will do, by their addresses.
    """
    there = {node.id for node in nodes}
    spots = all_spots(fleet, wanted)
    found = {spot: node for spot, node in known.items() if spot in spots and node.id in there}
    for pool in fleet.pools:
        taken = {node.id for node in found.values()}
        free = sorted((one for one in nodes if one.id not in taken and _fits(fleet, pool, one)), key=_rank)
        missing = sorted(spot for spot in spots if spot[0] == pool.name and spot not in found)
        found |= dict(zip(missing, free, strict=False))
    return found


def too_few(fleet: Fleet, name: str, found: Mapping[Spot, Node], nodes: Sequence[Node], address: str) -> str:
    """Say what a pool lacks, and what to do."""
    pool = fleet.pool(name)
    gpu, has = fleet.gpu_of(pool), sum(spot[0] == name for spot in found)
    what = "GPUs" if gpu.vendor in VISIBLE_DEVICES else "CPUs"
    return (
        f"pool '{name}' wants {pool.nodes} nodes of {pool.gpus_per_node} {what} ({gpu.id}); the Ray cluster has {has} "
        f"for it. Its nodes: {', '.join(map(str, nodes)) or 'none'}. Start Ray on the others (ray start --address "
        f"{address if address != 'auto' else 'HOST:6379'} --labels {LABEL}={name}), or write nodes = {has}."
    )


def spots_of(replica: Replica) -> tuple[Spot, ...]:
    return tuple((replica.pool, place.node) for place in replica.places)


def all_spots(fleet: Fleet, wanted: Iterable[str]) -> set[Spot]:
    """Return all nodes that the fleet has in some pools."""
    return {(pool.name, number) for pool in fleet.pools if pool.name in wanted for number in range(pool.nodes)}


def _fits(fleet: Fleet, pool: Pool, node: Node) -> bool:
    gpu = fleet.gpu_of(pool)
    has = node.gpus if gpu.vendor in VISIBLE_DEVICES else node.cpus
    if node.pool:
        return node.pool == pool.name and has >= pool.gpus_per_node
    words = re.split(r"[^a-z0-9]+", node.kind.lower())
    return has >= pool.gpus_per_node and (not node.kind or gpu.id.split("-")[0] in words)


def _rank(node: Node) -> tuple[bool, bool, int, str, str]:
    return not node.pool, not node.kind, node.gpus, node.address, node.id


def read_node(told: Mapping[str, Any]) -> Node:
    """Make a node of what Ray tells of one."""
    resources, labels = told["Resources"], told.get("Labels") or {}
    kinds = [found[1] for name in resources if (found := TYPE.fullmatch(name))]
    return Node(
        id=told["NodeID"],
        address=told["NodeManagerAddress"],
        gpus=int(resources.get("GPU", 0)),
        cpus=int(resources.get("CPU", 0)),
        kind=next(iter(kinds), ""),
        pool=labels.get(LABEL, ""),
    )
