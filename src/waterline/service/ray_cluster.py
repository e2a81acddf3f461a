"""A fleet on the nodes of a Ray cluster: which node is which, and engines that are started there.

Ray says which nodes there are, keeps their GPUs for us and reaches them; what runs where is the plan's. Each node has
one actor (`ray_host.Host`) with all the GPUs that the pool has there, so that replicas come and go on it without asking
Ray again. Engines listen on their node's address, and the gateway asks them there.
"""

import asyncio
import re
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import structlog
from msgspec.structs import replace

from waterline.errors import EngineError, InputError, MissingExtraError
from waterline.fleet import Fleet, Pool
from waterline.plan import Plan, Replica
from waterline.service.child import ENDED_WITHIN_S, Running, StillbornError
from waterline.service.engines import COMMANDED, Engine, command_of, prepare_engines
from waterline.service.engines.dialect import Dialect
from waterline.service.engines.hosted import hosted
from waterline.service.engines.seat import VISIBLE_DEVICES, Seat
from waterline.service.jobs import Holding, Spot
from waterline.service.processes import MARK
from waterline.service.ray_host import Host, Said, Started
from waterline.service.state import State

HOST_WITHIN_S = 60.0  # a node starts our actor; its interpreter has to load us
REACHED_WITHIN_S = 5.0
STOPPED_WITHIN_S = ENDED_WITHIN_S + 1.0  # the way there and back included
CALLS = 1000  # that may wait on a node at once: two or so for each engine
# Ray would kill our actor's children before they can end what they have started themselves, and jobs save their work.
LEAVES_CHILDREN = {"RAY_kill_child_processes_on_worker_exit": "0"}
LABEL = "pool"  # of a Ray node: which of the fleet's pools it belongs to
TYPE = re.compile(r"accelerator_type:(.+)")

log = structlog.get_logger()


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
                "auto on one of its nodes."
            ) from error
        self._ray = ray
        self._address = address
        self._fleet: Fleet | None = None
        self._wanted: set[str] = set()  # pools
        self._nodes: dict[Spot, Node] = {}
        self._hosts: dict[str, Any] = {}  # by the id of their node
        self._making: dict[str, asyncio.Lock] = {}

    def leave(self) -> None:
        self._ray.shutdown()

    # --- Which node is which ----------------------------------------------------------------------------------------

    def prepare(self, plan: Plan, instead: str = "", *, fleet: str = "FLEET") -> dict[str, Engine]:
        """Return an engine for each replica of the plan, by its id; arguments as of `prepare_engines`.

        Raises EngineError when the cluster does not hold the fleet.
        """
        needed = {spot for replica in plan.replicas for spot in _spots(replica)}
        if plan.fleet != self._fleet:
            self._fleet, self._wanted = plan.fleet, wanted_pools(plan)
            needed |= _all_spots(plan.fleet, self._wanted)
        self._match(needed)
        engines = prepare_engines(plan, instead, fleet=fleet, seat_of=self._seat)
        return {
            one.id: self._placed(plan, one, instead) if engines[one.id].command else engines[one.id]
            for one in plan.replicas
        }

    def _placed(self, plan: Plan, replica: Replica, instead: str) -> Placed:
        alone = replace(plan, replicas=(replica,))
        engine = prepare_engines(alone, instead, seat_of=self._seat)[replica.id]
        spots, others = _spots(replica), []
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
        return [_node(told) for told in self._ray.nodes() if told["Alive"]]

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
                host, node = await self._host(spot, state.mark if state else "")
                await child.start(host, _where(spot, node), f"{replica} {rank}", started)
        except BaseException:
            await child.stop()
            raise
        return child

    async def hold(self, spot: Spot, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Holding:
        """Start the holder of a run of a job on its node; see `jobs.Machines`."""
        self._match([spot])
        host, node = await self._host(spot, environment[MARK].rpartition("/jobs/")[0])
        key, where = environment["WATERLINE_RUN"], _where(spot, node)
        said = await _said(host.hold.remote(key, tuple(arguments), dict(environment), str(log)), where)
        return RemoteRun(host, key, where, said.value)

    async def end(self, spot: Spot, mark: str, grace_s: float) -> list[int]:
        """End who bears a mark on a node; one that is gone has ended them."""
        host = self._hosts.get(self._nodes[spot].id) if spot in self._nodes else None
        if host is None:
            return []
        try:
            left: list[int] = (await _said(host.end.remote(mark, grace_s), str(spot))).value
        except EngineError:
            return []
        return left

    async def _host(self, spot: Spot, mark: str) -> tuple[Any, Node]:
        """Return who starts processes on a node, and which that is now."""
        node = self._nodes[spot]
        async with self._making.setdefault(node.id, asyncio.Lock()):
            host = self._hosts.get(node.id)
            if host is None or await _silence(host):
                host = self._hosts[node.id] = await self._make_host(spot, node, mark)
        return host, node

    async def _make_host(self, spot: Spot, node: Node, mark: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415 - an extra

        where = f"node {spot[1]} of pool '{spot[0]}' ({node.address})"
        assert self._fleet  # noqa: S101 - from `prepare`
        grace_s = max(tenant.grace_s for tenant in self._fleet.tenants)
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
        if why := await _silence(host, HOST_WITHIN_S + grace_s):
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


class RemoteChild:
    """The processes of one replica on their nodes: a `Running`."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._parts: list[tuple[Any, str, str]] = []  # who has it, what it is called there, and where that is
        self._ends: list[asyncio.Task[str]] = []
        self.pid = 0  # of the first, on its node

    async def start(self, host: Any, where: str, key: str, started: Started) -> None:
        """Start the next of its processes. Raises EngineError."""
        said = await _said(host.start.remote(key, self._replica, started, sys.executable), where)
        self._parts.append((host, key, where))
        self.pid = self.pid or said.value
        ended = host.ended.remote(key)
        self._ends.append(asyncio.ensure_future(_words(ended, where)))

    @property
    def has_ended(self) -> bool:
        return any(end.done() for end in self._ends)

    async def announced_url(self) -> str:
        host, key, where = self._parts[0]
        said: str = (await _said(host.url.remote(key), where)).value
        return said

    async def ended(self) -> str:
        done, _ = await asyncio.wait(self._ends, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()

    async def last_words(self) -> str:
        if self.has_ended:
            return await self.ended()
        host, key, where = self._parts[0]
        return await _words(host.last_words.remote(key), where)

    async def stop(self, *, verify: bool = True) -> None:
        """End its processes; a node that is gone has ended them.

        Not to `verify` is to leave the cluster: nobody waits then for a node that is silent, of which Ray believes for
        a minute that it is there. It ends them as soon as it hears of that.
        """
        for end in self._ends:
            end.cancel()
        stops = [_said(host.stop.remote(key, self._replica), where) for host, key, where in self._parts]
        with suppress(TimeoutError):
            async with asyncio.timeout(None if verify else STOPPED_WITHIN_S):
                await asyncio.gather(*stops, return_exceptions=True)


class RemoteRun:
    """The holder of a run on its node: a `Holding`."""

    def __init__(self, host: Any, key: str, where: str, pid: int) -> None:
        self._host, self._key, self._where = host, key, where
        self.pid = pid

    def tell(self, data: bytes) -> None:
        self._host.tell.remote(self._key, data)

    async def wait(self) -> int:
        code: int = (await _said(self._host.left.remote(self._key), self._where)).value
        return code


def _where(spot: Spot, node: Node) -> str:
    return f"{spot[0]}/{spot[1]} ({node.address})"


async def _silence(host: Any, within_s: float = HOST_WITHIN_S) -> str:
    """Return why an actor does not answer; nothing if it does."""
    try:
        async with asyncio.timeout(within_s):
            await host.ready.remote()
    except TimeoutError:
        return f"nothing within {within_s:g} s"
    except Exception as error:  # noqa: BLE001 - Ray has many for an actor that is dead, or cannot be reached
        *_, last = ("", *str(error).strip().splitlines())  # some say nothing
        return f"{type(error).__name__}, {last.rstrip('.')}".rstrip(", ")
    return ""


async def _said(reference: Any, where: str) -> Said:
    """Return what a node answers. Raises EngineError: what it says itself, or that it is gone."""
    try:
        said = await reference
    except Exception as error:
        raise EngineError(f"node {where} does not answer any more: {type(error).__name__}.") from error
    if isinstance(said, Said) and said.problem:
        raise (StillbornError if said.stillborn else EngineError)(f"on node {where}: {said.problem}")
    return said if isinstance(said, Said) else Said(value=said)


async def _words(reference: Any, where: str) -> str:
    try:
        return f"on node {where}: {(await _said(reference, where)).value}"
    except EngineError as error:
        return str(error)


# --- Matching -------------------------------------------------------------------------------------------------------


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
    spots = _all_spots(fleet, wanted)
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


def _spots(replica: Replica) -> tuple[Spot, ...]:
    return tuple((replica.pool, place.node) for place in replica.places)


def _all_spots(fleet: Fleet, wanted: Iterable[str]) -> set[Spot]:
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


def _node(told: Mapping[str, Any]) -> Node:
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
