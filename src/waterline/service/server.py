"""The whole service in one process: a socket, the engines, the gateway in front of them, and an orderly end."""

import asyncio
import errno
import gc
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TextIO

import aiohttp
import structlog
import uvloop

from waterline.errors import InputError, PortInUseError
from waterline.fleet import Fleet
from waterline.ledger import Ledger
from waterline.outcome import Completion
from waterline.plan import Plan
from waterline.service.asgi import App, HttpServer
from waterline.service.batch_routes import offering_batches
from waterline.service.child import Child
from waterline.service.connections import Connections
from waterline.service.engines import Engine, all_pretend, prepare_engines
from waterline.service.gateway import Gateway
from waterline.service.jobs import OVER, Jobs, RunState, Spot
from waterline.service.keeper import Keeper
from waterline.service.limits import GuardedProtocol
from waterline.service.logs import FailureLog
from waterline.service.nodes import Nodes, Sight, watch
from waterline.service.operator import Operator
from waterline.service.processes import kill_marked
from waterline.service.reload import keep_to_file
from waterline.service.shore import Prepare, Shore
from waterline.service.state import State, claim_state
from waterline.service.supervisor import ReplicaState, Supervisor

NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
BACKLOG = 2048  # connections that may wait to be accepted
SAY_AFTER_S = 2.0  # what is waited for at the end, and
SAY_EVERY_S = 10.0
MOST_NAMED = 5
GARBAGE_OBJECTS = 10_000  # new ones between two looks for cycles, of which a request makes few

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of a running service."""

    supervisor: Supervisor
    gateway: Gateway
    shore: Shore
    jobs: Jobs
    keeper: Keeper
    state: State
    operator: Operator


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the plan comes from, when it may change."""

    path: Path
    read: Callable[[], Plan]  # raises WaterlineError; called in a thread
    on_plan: Callable[[Plan], None] = lambda _plan: None  # told of each that is moved to; called in a thread


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminListener:
    """The listener for operators: where it listens, and what answers there."""

    listening: socket.socket
    app: Callable[[Operator, Path], App]  # told a directory that is the service's own


def listen(host: str, port: int, option: str = "--port") -> socket.socket:
    """Take the port; 0 takes any. Raises PortInUseError, or InputError when that host is not ours to listen on."""
    if not host:
        raise InputError("the host is empty. Say --host 127.0.0.1 for this machine, --host 0.0.0.0 for every network.")
    name, _, number = host.rpartition(":")
    if name and ":" not in name and number.isdigit():
        raise InputError(f"the host '{host}' has a port in it. Say: --host {name} --port {number}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)  # two who have only bound a port do not see each other
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"port {port} of {host} is in use: another program listens there. Stop it, or take another port: "
                f"{option} {port + 1 if port < 65535 else 8001}"
            ) from error
        raise InputError(
            f"cannot listen on {host}, port {port}: {error.strerror}.{_ADVICE.get(error.errno or 0, '')}"
        ) from error
    return listening


_ADVICE = {  # by what the system says
    errno.EACCES: " Ports below 1024 are root's, unless a front like nginx passes them on: take another, like 8000.",
    errno.EADDRNOTAVAIL: " It is no address of this machine: `ip address` lists them; 127.0.0.1 is this machine alone.",
}


def is_loopback(address: str) -> bool:
    """Tell whether only this machine reaches an address."""
    return ip_address(address.partition("%")[0]).is_loopback


def serve(
    plan: Plan,
    engines: Mapping[str, Engine],
    listening: socket.socket,
    *,
    on_ready: Callable[[list[str]], None],
    on_completion: Callable[[Completion], None],
    prepare: Prepare = prepare_engines,
    source: Source | None = None,
    admin: AdminListener | None = None,
    ledger: Ledger | None = None,
    proxies: Sequence[str] = (),
    nodes: Nodes | None = None,
) -> dict[str, float]:
    """Serve a plan until SIGINT, SIGTERM or a closed terminal; a second one ends all on the spot.

    Where the plan comes from a file, SIGHUP has it read again, and so has a change of the file. Without one, or when
    the terminal is gone, SIGHUP ends the service as SIGTERM does, unless it is ignored.

    Returns what each replica has cost in dollars, those that came and went meanwhile included.

    Args:
        plan: what to serve.
        engines: of its replicas by id, from `prepare_engines`.
        listening: a socket from `listen`; closed at the end.
        on_ready: called once, when every engine of ours has been ready; told the attached ones that are not yet.
        on_completion: told what became of each request.
        prepare: returns the engines of another plan, or raises EngineError.
        source: where the plan comes from, if it may change.
        admin: where operators look at it, if they do.
        ledger: of keys, and of what became of requests; None: nobody has a key, and nothing is written down.
        proxies: see `HttpServer`.
        nodes: of the fleet; None: they are all this machine.

    Raises:
        EngineError: an engine cannot be started; the message holds its last words.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(
            _serve(plan, engines, listening, on_ready, on_completion, prepare, source, admin, ledger, proxies, nodes)
        )


async def _serve(
    plan: Plan,
    engines: Mapping[str, Engine],
    listening: socket.socket,
    on_ready: Callable[[list[str]], None],
    on_completion: Callable[[Completion], None],
    prepare: Prepare,
    source: Source | None,
    admin: AdminListener | None,
    ledger: Ledger | None,
    proxies: Sequence[str],
    nodes: Nodes | None,
) -> dict[str, float]:
    async with running(plan, engines, listening, on_completion, prepare, admin, ledger, proxies, nodes) as service:
        hangup = service.operator.hangup = asyncio.Event() if source else None
        stop = _stop_on_signals(service.state, hangup)
        starting = asyncio.create_task(service.supervisor.start())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                gc.freeze()  # what is there now stays: a collection need not look at it again, and takes no 50 ms
                gc.set_threshold(GARBAGE_OBJECTS)
                states = service.supervisor.states
                on_ready([replica for replica, state in states.items() if state.status != "ready"])
                service.keeper.lend()
                if source and hangup:
                    following = asyncio.create_task(
                        keep_to_file(source.path, source.read, service.keeper, hangup, on_plan=source.on_plan)
                    )
                    stopping.add_done_callback(lambda _: following.cancel())
            await stopping
            return service.shore.usd()
        finally:
            starting.cancel()
            stopping.cancel()
            await asyncio.gather(starting, stopping, return_exceptions=True)


@asynccontextmanager
async def running(
    plan: Plan,
    engines: Mapping[str, Engine],
    listening: socket.socket,
    on_completion: Callable[[Completion], None],
    prepare: Prepare = prepare_engines,
    admin: AdminListener | None = None,
    ledger: Ledger | None = None,
    proxies: Sequence[str] = (),
    nodes: Nodes | None = None,
) -> AsyncIterator[Service]:
    """Answer HTTP inside the block; starting the engines is left to it. At its end everything ends.

    That takes 2 s at most, and where jobs run, the grace of their tenants.
    """
    async with AsyncExitStack() as stack:
        state = stack.enter_context(claim_state(plan.fleet.name))
        await state.end_orphans(max(tenant.grace_s for tenant in plan.fleet.tenants))
        connections = stack.enter_context(Connections(GuardedProtocol.hold_back))
        session = await stack.enter_async_context(_session())

        def on_change(replica: str, state: ReplicaState) -> None:
            operator.replica_changed(replica, state)
            _log_change(replica, state)
            keeper.replica_changed(replica, state)

        def on_run_change(run: str, state: RunState) -> None:
            keeper.run_changed(run, state)

        def under_way(replica: str) -> int:
            return gateway.under_way(replica)

        failures = FailureLog()

        def completed(completion: Completion) -> None:
            failures.note(completion)
            on_completion(completion)

        supervisor = Supervisor(
            engines,
            session,
            on_change,
            under_way=under_way,
            state=state,
            launch=nodes.launch if nodes else Child.start,
        )
        jobs = Jobs(plan.fleet, state, on_run_change, nodes)
        loopback = is_loopback(listening.getsockname()[0])
        gateway = Gateway(
            plan, supervisor.engines, supervisor.states, connections, completed, ledger=ledger, loopback=loopback
        )
        gateway.jobs_now = jobs.now
        everywhere = nodes is not None or all_pretend(engines)
        gateway.nodes_now = nodes.sights if nodes else lambda: _here(plan.fleet, everywhere=everywhere)
        operator = Operator(gateway, supervisor.states, ledger)
        if ledger:
            await stack.enter_async_context(offering_batches(gateway, ledger))
        shore = Shore(plan, supervisor, gateway, prepare)
        keeper = Keeper(shore, jobs, gateway, state, everywhere=everywhere)
        doors = [(HttpServer(gateway, proxies=proxies), listening)]
        if admin:
            doors.append((HttpServer(admin.app(operator, state.path), grace_s=0), admin.listening))
        service = Service(supervisor, gateway, shore, jobs, keeper, state, operator)
        async with _open(service, doors, nodes):
            yield service


@asynccontextmanager
async def _open(
    service: Service, doors: Sequence[tuple[HttpServer, socket.socket]], nodes: Nodes | None
) -> AsyncIterator[None]:
    """Let people in, clients by the first door; at the end of the block end everything they might use."""
    serving = [asyncio.create_task(http.serve(sockets=[door])) for http, door in doors]
    beside = [asyncio.create_task(service.gateway.keep_time())]
    if nodes:
        beside.append(asyncio.create_task(watch(nodes, service.keeper.nodes_changed)))
    try:
        yield
    finally:
        doors[0][0].should_exit = True
        service.gateway.cut()
        service.operator.stopping.set()
        await service.keeper.pause()
        beside.append(asyncio.create_task(_say_what_is_waited_for(service)))
        await asyncio.gather(service.supervisor.stop(), service.jobs.stop_all())
        for http, _ in doors:  # operators see the end
            http.should_exit = True
        await asyncio.gather(*serving)
        for task in beside:
            task.cancel()


async def _say_what_is_waited_for(service: Service) -> None:
    """Tell from time to time who has not ended yet, until this is cancelled."""
    begun_s, fleet = time.monotonic(), service.jobs.fleet
    await asyncio.sleep(SAY_AFTER_S)
    while True:
        runs = [(name, run) for name, run in service.jobs.states.items() if run.status not in OVER]
        if runs:
            grace_s = max(fleet.tenant(fleet.job(run.job).tenant).grace_s for _, run in runs)
            log.info(
                "waits for jobs to save their work; another Ctrl-C ends them at once",
                runs=[f"{name} on {run.pool}/{run.place.node}" for name, run in runs[:MOST_NAMED]],
                more=max(0, len(runs) - MOST_NAMED),
                at_most_s=max(0, round(grace_s - (time.monotonic() - begun_s))),
            )
        await asyncio.sleep(SAY_EVERY_S)


def _here(fleet: Fleet, *, everywhere: bool) -> dict[Spot, Sight]:
    """Return how the nodes of a fleet look that is all on this machine: the first node of each pool, or all pretend."""
    there, elsewhere = Sight("up"), Sight("elsewhere", reason="Nothing is started there: it is not this machine.")
    return {
        (pool.name, node): there if everywhere or node == 0 else elsewhere
        for pool in fleet.pools
        for node in range(pool.nodes)
    }


def _session() -> aiohttp.ClientSession:
    """Return what asks engines how they are."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0)  # most servers wait 5 s
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


def _stop_on_signals(state: State, hangup: asyncio.Event | None) -> asyncio.Event:
    """Return an event that the first signal sets.

    SIGHUP sets `hangup` instead, if there is one, unless it tells that our terminal has gone. nohup has it ignored.
    """
    stop, had_terminal = asyncio.Event(), _has_terminal()
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    def on_signal(number: int) -> None:
        if number == signal.SIGHUP and hangup and (ignored or _has_terminal() == had_terminal):
            hangup.set()
            return
        if stop.is_set():
            kill_marked(state.mark)
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hangup or not ignored else ())):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stop


def _has_terminal() -> bool:
    """Whether a terminal is still there that can stop us; when its window is closed, it is not."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _log_change(replica: str, state: ReplicaState) -> None:
    details = {"reason": state.reason, "pid": state.pid, "restarts": state.restarts, "again_in_s": state.delay_s}
    write = log.warning if state.reason else log.info
    write("replica", status=state.status, id=replica, **{name: value for name, value in details.items() if value})


class Outlet:
    """A stream for people, who may leave: what is written after that goes nowhere, and nobody fails for it.

    There may be no stream from the beginning, and it may lack letters.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def say(self, text: str) -> None:
        self.write(text + "\n")
        self.flush()

    def write(self, text: str) -> None:
        if self._stream:
            encoding = self._stream.encoding or "utf-8"
            with _or_nowhere(self._stream):
                self._stream.write(text.encode(encoding, "replace").decode(encoding))

    def flush(self) -> None:
        if self._stream:
            with _or_nowhere(self._stream):
                self._stream.flush()


@contextmanager
def _or_nowhere(stream: TextIO) -> Iterator[None]:
    """Try to write; when nobody reads any more, send this stream nowhere, also for Python's own last flush.

    Of a disk that is full only what it does not take is lost: there may be room later.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        is_full = isinstance(error, OSError) and error.errno in NO_ROOM
        with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
            number = stream.fileno()
            kept = os.dup(number)
            os.dup2(nowhere.fileno(), number)
            if is_full:
                stream.flush()
                os.dup2(kept, number)
            os.close(kept)
