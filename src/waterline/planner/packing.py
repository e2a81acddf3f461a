"""Which GPUs of which node: replicas onto the nodes of a fleet."""

from waterline.fleet import Fleet
from waterline.plan import Layout, Place


class FreeGpus:
    """The GPUs of a fleet nobody has taken yet. The one place where planning keeps state."""

    def __init__(self, fleet: Fleet) -> None:
        self._free = {pool.name: [list(range(pool.gpus_per_node)) for _ in range(pool.nodes)] for pool in fleet.pools}

    def room(self, pool: str, layout: Layout) -> int:
        """Return how many replicas of this layout still go onto the pool."""
        groups = sum(len(free) // layout.tp for free in self._free[pool])
        return groups // layout.pp

    def take(self, pool: str, layout: Layout) -> tuple[Place, ...]:
        """Take one replica's GPUs: each tensor parallel group whole on one node, on the fullest that has room.

        The fullest node first keeps whole nodes free for those who need them. There must be `room`.
        """
        return tuple(self._take_group(pool, layout.tp) for _ in range(layout.pp))

    def _take_group(self, pool: str, gpus: int) -> Place:
        nodes = self._free[pool]
        node = min((index for index, free in enumerate(nodes) if len(free) >= gpus), key=lambda i: len(nodes[i]))
        taken, nodes[node] = nodes[node][:gpus], nodes[node][gpus:]
        return Place(node=node, gpus=tuple(taken))

    def free(self, pool: str) -> int:
        return sum(len(free) for free in self._free[pool])
