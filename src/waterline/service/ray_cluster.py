"""A fleet on the nodes of a Ray cluster: which node is which, and engines that are started there.

Ray says which nodes there are, keeps their GPUs for us and reaches them; what runs where is the plan's. Each node has
one actor (`ray_host.Host`) with all the GPUs that the pool has there, so that replicas come and go on it without asking
Ray again. Engines listen on their node's address, and the gateway asks them there.
"""

import asyncio
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import structlog
from msgspec.structs import replace

from waterline.errors import EngineError, InputError, MissingExtraError
from waterline.fleet import Fleet
from waterline.plan import Plan, Replica
from waterline.service.child import Running
from waterline.service.engines import COMMANDED, Engine, command_of, prepare_engines
from waterline.service.engines.dialect import Dialect
from waterline.service.engines.hosted import hosted
from waterline.service.engines.seat import Seat
from waterline.service.jobs import Holding, Spot
from waterline.service.nodes import Sight
from waterline.service.processes import MARK
from waterline.service.ray_host import Host, Started
from waterline.service.ray_nodes import Node, all_spots, match, read_node, spots_of, too_few, wanted_pools
from waterline.service.ray_remote import ENDED_AFTER_S, Reach, RemoteChild, RemoteRun, silence
from waterline.service.state import State

HOST_WITHIN_S = 60.0  # a node starts our actor; its interpreter has to load us
REACHED_WITHIN_S = 5.0
CALLS = 1000  # that may wait on a node at once: two or so for each engine
# Ray would kill our actor's children before they can end what they have started themselves, and jobs save their work.
LEAVES_CHILDREN = {"RAY_kill_child_processes_on_worker_exit": "0"}

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Placed:
    """An engine whose processes run on nodes of the cluster; the first of them answers requests."""

    engine: Engine
    spots: tuple[Spot, ...]
    others: tuple[Started, ...] = ()  # the processes behind the first
    renewed: "Callable[[], Placed]" = field(compare=False, repr=False)  # the same, as the nodes are now

    @property
    def command(self) -> tuple[str, ...]:
        return self.engine.command

    @property
    def environment(self) -> Mapping[str, str]:
        return self.engine.environment

    @property
    def input(self) -> bytes:
        return self.engine.input

    @property
    def url(self) -> str:
        return self.engine.url

    @property
    def headers(self) -> Mapping[str, str]:
        return self.engine.headers

    @property
    def faults(self) -> Mapping[str, str]:
        return self.engine.faults

    @property
    def dialect(self) -> Dialect:
        return self.engine.dialect

    @property
    def start_within_s(self) -> float:
        return self.engine.start_within_s

    async def served_name(self, session: aiohttp.ClientSession, url: str) -> str:
        return await self.engine.served_name(session, url)


class RayCluster:
    """The cluster at an address, joined until `leave`.

    Raises MissingExtraError without Ray, and InputError when nobody answers there.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise MissingExtraError("a fleet on a Ray cluster", "ray") from error
        try:
            _reach(address)  # Ray would try for minutes
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"no Ray cluster answers at '{address}': {str(error).splitlines()[0].rstrip('.')}. Start one (ray "
                "start --head on this machine, ray start --address HOST:6379 on the others) and write HOST:6379, or "
                "auto on one of its nodes. One that was started where a token is (~/.ray/auth_token) lets in who "
                "has the same, and RAY_AUTH_MODE=token in the environment."
            ) from error
        self._ray = ray
        self._address = address
        self._fleet: Fleet | None = None
        self._wanted: set[str] = set()  # pools
        self._nodes: dict[Spot, Node] = {}
        self._reaches: dict[str, Reach] = {}  # to who starts processes there, by the id of the node
        self._making: dict[str, asyncio.Lock] = {}
        self._fences: dict[str, tuple[str, float]] = {}  # run -> the node it was lost with, and when it has ended there

    def leave(self) -> None:
        self._ray.shutdown()

    # --- Which node is which ----------------------------------------------------------------------------------------

    def prepare(self, plan: Plan, instead: str = "", *, fleet: str = "FLEET") -> dict[str, Engine]:
        """Return an engine for each replica of the plan, by its id; arguments as of `prepare_engines`.

        Raises EngineError when the cluster does not hold the fleet.
        """
        needed = {spot for replica in plan.replicas for spot in spots_of(replica)}
        if plan.fleet != self._fleet:
            self._fleet, self._wanted = plan.fleet, wanted_pools(plan)
            needed |= all_spots(plan.fleet, self._wanted)
        self._match(needed)
        engines = prepare_engines(plan, instead, fleet=fleet, seat_of=self._seat)
        return {
            one.id: self._placed(plan, one, instead) if engines[one.id].command else engines[one.id]
            for one in plan.replicas
        }

    def _placed(self, plan: Plan, replica: Replica, instead: str) -> Placed:
        alone = replace(plan, replicas=(replica,))
        engine = prepare_engines(alone, instead, seat_of=self._seat)[replica.id]
        spots, others = spots_of(replica), []
        for rank in range(1, len(spots)) if (instead or replica.engine) in COMMANDED else ():
            arguments, environment = command_of(plan, replica, self._seat(replica, rank))
            others.append(Started(command=hosted(arguments), environment=environment, input=b""))
        again = partial(self._placed, plan, replica, instead)
        return Placed(engine=engine, spots=spots, others=tuple(others), renewed=again)

    def _seat(self, replica: Replica, rank: int = 0) -> Seat:
        first, mine = (self._nodes[replica.pool, replica.places[one].node].address for one in (0, rank))
        return Seat(rank=rank, host=mine, address=mine, head_address=first)

    def _match(self, needed: Iterable[Spot]) -> None:
        """Look which nodes there are now. Raises EngineError where one is needed that is not."""
        assert self._fleet  # noqa: S101 - from `prepare`
        self._nodes = match(self._fleet, self._wanted, self._alive(), self._nodes)
        for pool, number in sorted(needed):
            if (pool, number) not in self._nodes:
                raise EngineError(too_few(self._fleet, pool, self._nodes, self._alive(), self._address))

    def _alive(self) -> list[Node]:
        return [read_node(told) for told in self._ray.nodes() if told["Alive"]]

    # --- Who is there -----------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """See which nodes are there, and let them know that we are: whoever does not hear of us ends what he has."""
        if not self._fleet:
            return
        try:
            alive = await asyncio.to_thread(self._alive)
        except Exception as error:  # noqa: BLE001 - the head of the cluster may be away for a while, and nothing else
            log.warning("the cluster does not say which nodes it has", reason=type(error).__name__)
        else:
            self._nodes = match(self._fleet, self._wanted, alive, self._nodes)
            ids = {node.id for node in alive}
            for node_id, reach in self._reaches.items():
                if node_id not in ids:
                    reach.is_dead = True
                    self._lose(node_id, reach, "has left the cluster.")
        await asyncio.gather(*(self._listen(node_id, reach) for node_id, reach in list(self._reaches.items())))

    async def _listen(self, node_id: str, reach: Reach) -> None:
        if not reach.lost:
            if why := await reach.ping():
                self._lose(node_id, reach, why)
        elif not reach.is_dead:
            reach.cleaning = reach.cleaning or asyncio.create_task(reach.clean())
            if reach.cleaning.done():
                is_clean, reach.cleaning = reach.cleaning.result(), None
                if is_clean:
                    self._reaches[node_id] = Reach(reach.actor, reach.where)
        if reach.is_dead:
            self._reaches.pop(node_id, None)

    def _lose(self, node_id: str, reach: Reach, why: str) -> None:
        if not reach.lost:
            ended_s = reach.told_s + ENDED_AFTER_S + self._grace_s()
            self._fences |= dict.fromkeys(reach.runs, (node_id, ended_s))
            reach.lose(why)

    def sights(self) -> dict[Spot, Sight]:
        """Return how each node of the fleet looked the last time."""
        return {spot: self._sight(spot) for spot in sorted(all_spots(self._fleet, self._wanted))} if self._fleet else {}

    def _sight(self, spot: Spot) -> Sight:
        node = self._nodes.get(spot)
        if node is None:
            return Sight("down", reason="The Ray cluster has no node for it.")
        reach = self._reaches.get(node.id)
        return Sight("silent", node.address, f"It {reach.lost}") if reach and reach.lost else Sight("up", node.address)

    # --- What runs there --------------------------------------------------------------------------------------------

    async def launch(self, engine: Engine, state: State | None = None, replica: str = "") -> Running:
        """Start the processes of a replica on their nodes, as these are now. Raises EngineError."""
        assert isinstance(engine, Placed)  # noqa: S101 - from `prepare`
        self._match(engine.spots)  # a node that has left is another one by now, if there is one
        engine = engine.renewed()
        first = Started(command=engine.command, environment=engine.environment, input=engine.input)
        child = RemoteChild(replica)
        try:
            for rank, (spot, started) in enumerate(zip(engine.spots, (first, *engine.others), strict=False)):
                reach, _ = await self._host(spot, state.mark if state else "")
                await child.start(reach, f"{replica} {rank}", started)
        except BaseException:
            await child.stop()
            raise
        return child

    async def hold(self, spot: Spot, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Holding:
        """Start the holder of a run of a job on its node; see `jobs.Machines`."""
        self._match([spot])
        run = environment["WATERLINE_RUN"]
        self._check_fence(run, self._nodes[spot])
        reach, _ = await self._host(spot, environment[MARK].rpartition("/jobs/")[0])
        reach.runs.add(run)
        pid = await reach.ask("hold", run, tuple(arguments), dict(environment), str(log))
        return RemoteRun(reach, run, pid)

    def _check_fence(self, run: str, node: Node) -> None:
        """Raise EngineError while a run may still go on where it was lost; a host cleans its own node itself."""
        lost_with, until_s = self._fences.get(run, ("", 0.0))
        if lost_with != node.id and (left_s := until_s - time.monotonic()) > 0.0:
            raise EngineError(
                f"it may still run on the node that was lost, for {left_s:.0f} s at most: none is there twice."
            )
        self._fences.pop(run, None)

    async def end(self, spot: Spot, mark: str, grace_s: float) -> list[int]:
        """End who bears a mark on a node; one that is lost ends them itself."""
        reach = self._reaches.get(self._nodes[spot].id) if spot in self._nodes else None
        try:
            left: list[int] = await reach.ask("end", mark, grace_s) if reach else []
        except EngineError:
            return []
        return left

    async def _host(self, spot: Spot, mark: str) -> tuple[Reach, Node]:
        """Return the way to who starts processes on a node, and which that is now. Raises EngineError."""
        node = self._nodes[spot]
        async with self._making.setdefault(node.id, asyncio.Lock()):
            reach = self._reaches.get(node.id)
            if reach is None or reach.is_dead:
                reach = self._reaches[node.id] = Reach(await self._make_host(spot, node, mark), _where(spot, node))
        return reach, node

    def _grace_s(self) -> float:
        """Return how long runs may take to end, on a host that ends all it has."""
        assert self._fleet  # noqa: S101 - from `prepare`
        return max(tenant.grace_s for tenant in self._fleet.tenants)

    async def _make_host(self, spot: Spot, node: Node, mark: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415 - an extra

        where = f"node {spot[1]} of pool '{spot[0]}' ({node.address})"
        grace_s = self._grace_s()
        host = (
            self._ray.remote(Host)
            .options(
                num_cpus=0,
                num_gpus=node.gpus,
                max_concurrency=CALLS,
                runtime_env={"env_vars": LEAVES_CHILDREN},
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            )
            .remote(f"{socket.gethostname()}:{mark}/{spot[0]}.{spot[1]}", grace_s)  # nodes may share a machine
        )
        if why := await silence(host.ready.remote(), HOST_WITHIN_S + grace_s):
            self._ray.kill(host)
            raise EngineError(
                f"{where} did not start our actor: {why}. Is it there still, are its {node.gpus} GPUs free (ray "
                "status), and is this version of waterline-llm[ray] installed there?"
            )
        log.info("has a node", pool=spot[0], node=spot[1], address=node.address, gpus=node.gpus)
        return host


def _reach(address: str) -> None:
    """Raise OSError where nobody listens at host and port."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=REACHED_WITHIN_S).close()


def _where(spot: Spot, node: Node) -> str:
    return f"{spot[0]}/{spot[1]} ({node.address})"
