"""The service over HTTP, as a bare ASGI application: which path leads where, and what is said about the service."""

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import structlog

from waterline.errors import WaterlineError
from waterline.ledger import Ledger, new_request_id
from waterline.outcome import Completion
from waterline.plan import Plan, Replica
from waterline.service.access import Access, is_local
from waterline.service.asgi import JSON, ClientGoneError, Message, Receive, Reply, Scope, Send
from waterline.service.asking import Asker
from waterline.service.body import CHAT, COMPLETIONS, EMBEDDINGS
from waterline.service.books import Books
from waterline.service.completions import Completions
from waterline.service.connections import Connections
from waterline.service.dispatcher import Dispatcher
from waterline.service.engines import Engine
from waterline.service.errors import RejectedError, shortened
from waterline.service.limits import WRITE
from waterline.service.lines import Coming
from waterline.service.logs import about_request
from waterline.service.metrics import Metrics
from waterline.service.nodes import Sight
from waterline.service.passage import Passages
from waterline.service.responses import RESPONSES
from waterline.service.snapshot import EJECTED, take_snapshot
from waterline.service.supervisor import ReplicaState
from waterline.snapshot import BatchNow, EjectionNow, JobNow, Snapshot

A_MODEL = "/v1/models/"  # and its name
REQUEST_ID = b"x-request-id"
ID = "waterline.id"  # a key of the scope: what the ledger calls the request
TICK_S = 1.0
HELD = {"suspect", "draining"}  # states of replicas that get no more work, and finish what they have
SANE_ID = re.compile(rb"[\w.:/+=@-]{1,128}", re.ASCII)

log = structlog.get_logger()

App = Callable[[Scope, Receive, Send], Awaitable[None]]
Answer = Callable[[Scope, Receive, Reply], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Route:
    """What answers at a path."""

    method: str
    answer: Answer


class Gateway:
    """Answers HTTP for the models of a plan.

    Args:
        plan: what is served.
        engines: of the replicas by id.
        states: of the replicas by id; somebody else keeps them up to date and calls `replica_changed`.
        connections: to the engines.
        on_completion: told what became of each request to a served model.
        ledger: of keys, and of what became of requests; None: nobody has a key, and nothing is written down.
        loopback: only this machine can reach the service.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        plan: Plan,
        engines: Mapping[str, Engine],
        states: Mapping[str, ReplicaState],
        connections: Connections,
        on_completion: Callable[[Completion], None],
        *,
        ledger: Ledger | None = None,
        loopback: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self.engines = engines
        self.states = states
        self.loopback = loopback
        self._ledger = ledger
        self.access = Access(plan.fleet, ledger, loopback=loopback)
        self.dispatcher = Dispatcher(plan)
        self.jobs_now: Callable[[], tuple[JobNow, ...]] = tuple  # whoever keeps jobs says how they are
        self.nodes_now: Callable[[], Mapping[tuple[str, int], Sight]] = dict  # by pool and number, likewise
        self.batches_now: Callable[[], tuple[BatchNow, ...]] = tuple  # whoever runs batches, likewise
        self._slos = dict(plan.fleet.slos)
        self.metrics = Metrics(self._slos, self.snapshot)
        self._clock = clock
        self._begun_s = clock()
        self._asker = Asker(
            engines,
            states,
            connections,
            replicas_of=self.dispatcher.stand_ins,
            on_doubt=self._doubt,
            now_s=self.now_s,
        )
        self.completions = Completions(
            states=states,
            dispatcher=self.dispatcher,
            access=self.access,
            books=Books(ledger),
            passages=Passages(self._asker, replicas_of=self.dispatcher.stand_ins, now_s=self.now_s),
            metrics=self.metrics,
            on_completion=on_completion,
            now_s=self.now_s,
        )
        self._created = int(time.time())  # the date OpenAI's model list asks for
        self._mounted: dict[str, App] = {}
        self._routes = {
            f"/v1{CHAT}": Route("POST", self.completions.answer),
            f"/v1{COMPLETIONS}": Route("POST", self.completions.answer),
            f"/v1{EMBEDDINGS}": Route("POST", self.completions.answer),
            f"/v1{RESPONSES}": Route("POST", self.completions.answer),
            "/v1/models": Route("GET", self._list_models),
            A_MODEL: Route("GET", self._list_models),
            "/health": Route("GET", self._health),
        }

    def mount(self, prefix: str, app: App) -> None:
        """Hand everything at a path, and below it, to another ASGI application; whom it lets in is its own affair."""
        self._mounted[prefix] = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[ID] = new_request_id()
        about_request(scope[ID])
        shown = (REQUEST_ID, _request_id(scope))
        if self._mounted and (app := self._mounted_at(scope["path"])):
            await app(scope, receive, _showing(shown, send))
            return
        reply = Reply(send, [shown], scope.get(WRITE))
        try:
            await self._route(scope)(scope, receive, reply)
        except ClientGoneError:
            pass
        except WaterlineError as error:
            await reply.error(error)
        except Exception:
            log.exception("a bug in the gateway")
            await reply.error(WaterlineError("The gateway has a bug; its log says where."))

    def now_s(self) -> float:
        """Return the time since the service started."""
        return self._clock() - self._begun_s

    def snapshot(self) -> Snapshot:
        """Return how everything is now."""
        return take_snapshot(
            self.plan,
            self.dispatcher,
            self.states,
            self.metrics.recent,
            jobs=self.jobs_now(),
            nodes=self.nodes_now(),
            batches=self.batches_now(),
            ledger=self._ledger,
            now_s=self.now_s(),
            stopping=self.completions.stopping,
        )

    async def keep_time(self) -> None:
        """Do what is due once a second, until this is cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.dispatcher.tick(self.now_s())
            self.completions.note()

    # --- Replicas and plans that come and go ------------------------------------------------------------------------

    def replica_changed(self, replica_id: str, state: ReplicaState) -> None:
        """Send work there, or not; what is under way on a replica that is gone is cut, and fails as if it broke off."""
        self.metrics.replica_changed(self.dispatcher.lanes[replica_id].replica.model, state.status)
        if state.status in HELD:
            self.dispatcher.hold(replica_id, self.now_s(), drains=state.status == "draining")
            return
        back_in_s = self._back_in_s(replica_id, state)
        self.dispatcher.set_ready(replica_id, ready=state.status == "ready", now_s=self.now_s(), back_in_s=back_in_s)
        if state.status != "ready":
            self._asker.cut(replica_id)

    def _back_in_s(self, replica_id: str, state: ReplicaState) -> float:
        """Return when a replica should be ready that is not: as measured, else as planned; inf where nobody knows."""
        if state.status not in {"starting", "backing off"}:
            return math.inf
        if not self.engines[replica_id].command:  # it is asked again, and may be there at once
            return state.delay_s
        return state.delay_s + (state.load_s or self.dispatcher.lanes[replica_id].replica.load_s)

    def _doubt(self, replica_id: str, doubted: bool) -> None:  # noqa: FBT001 - a callback of two arguments
        """Send no new work to a replica that fails requests, though it says that it is well; or do so again."""
        if replica_id in self.dispatcher.lanes:
            self.dispatcher.doubt(replica_id, doubted=doubted, now_s=self.now_s())
            if doubted:
                model = self.dispatcher.lanes[replica_id].replica.model
                self.metrics.ejected(model, EjectionNow(at_s=time.time(), replica=replica_id, reason=EJECTED))

    def admit(self, replica: Replica) -> None:
        """A replica has come into being; it gets work as soon as it is ready."""
        self.dispatcher.add(replica)

    def expect(self, coming: Iterable[tuple[Replica, float]]) -> None:
        """These replicas, and no others, will be started when there is room, to be ready in so many seconds."""
        now_s = self.now_s()
        self.dispatcher.expect(Coming(replica=replica, there_s=now_s + in_s) for replica, in_s in coming)

    def ends_in_s(self, replica_id: str) -> float:
        """Return how long what a replica works on should take yet, were it begun now; 0 where that is nothing."""
        replica = self.dispatcher.lanes[replica_id].replica
        output_tokens = self.dispatcher.services[replica.model].planned.output_tokens
        return replica.ttft_s + output_tokens * replica.tpot_s if self.under_way(replica_id) else 0.0

    def update(self, replica: Replica) -> None:
        """A replica goes on with other figures."""
        self.dispatcher.update(replica)

    def dismiss(self, replica_id: str) -> None:
        """A replica is gone for good, and nobody is on it any more."""
        self._asker.forget(replica_id)
        self.dispatcher.remove(replica_id)

    def under_way(self, replica_id: str) -> int:
        """Return how many requests a replica works on, or keeps something for."""
        lane = self.dispatcher.lanes[replica_id]
        return lane.running + lane.keeping

    def take_loads(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return what each tenant has asked of each model since this was asked last, refused or not.

        As tokens of prompts, and tokens that are expected to be written.
        """
        return self.dispatcher.take_loads()

    def use_plan(self, plan: Plan) -> None:
        """Go on with another plan: its tenants, its models and what is expected of them; replicas come by `admit`."""
        self.plan = plan
        self._slos |= plan.fleet.slos
        self.access.use_fleet(plan.fleet)
        self.dispatcher.use_plan(plan)

    def forget_models(self) -> None:
        """Forget the models that the plan has no more, when nobody of them is left."""
        for model in set(self.dispatcher.services) - {model.model for model in self.plan.models}:
            if not self.dispatcher.services[model].lanes:
                self.dispatcher.forget(model)

    def cut(self) -> None:
        """End every request that is under way, and refuse new ones: the service stops."""
        self.completions.cut()
        self._asker.close()

    def _mounted_at(self, path: str) -> App | None:
        for prefix, app in self._mounted.items():
            if path == prefix or path.startswith(prefix + "/"):
                return app
        return None

    def _route(self, scope: Scope) -> Answer:
        """Return what answers a request. Raises RejectedError for a path or a method that nothing answers."""
        path, method = scope["path"], scope["method"]
        route = self._routes.get(path) or (Route("GET", self._show_model) if path.startswith(A_MODEL) else None)
        if not route:
            known = ", ".join((*self._routes, *self._mounted))
            raise RejectedError(
                f"There is nothing at {shortened(path)}. Known: {known}.", status=404, code="unknown_path"
            )
        if method != route.method and (method, route.method) != ("HEAD", "GET"):
            raise RejectedError(
                f"{shortened(path)} takes {route.method}, not {method}.",
                status=405,
                code="wrong_method",
                headers={"allow": "GET, HEAD" if route.method == "GET" else route.method},
            )
        return route.answer

    # --- About the service ------------------------------------------------------------------------------------------

    async def _list_models(self, scope: Scope, _receive: Receive, reply: Reply) -> None:
        caller = self.access.caller(scope)
        models = [self._model(model) for model in self.dispatcher.services if caller.may_use(model)]
        await reply.whole(200, orjson.dumps({"object": "list", "data": models}), [JSON])

    async def _show_model(self, scope: Scope, _receive: Receive, reply: Reply) -> None:
        caller, model = self.access.caller(scope), scope["path"].removeprefix(A_MODEL)
        self.completions.service_of(model)
        caller.check_model(model)
        await reply.whole(200, orjson.dumps(self._model(model)), [JSON])

    def _model(self, model: str) -> dict[str, Any]:
        context = self.dispatcher.services[model].max_context_tokens
        return {  # with the length of its context as vLLM tells it
            "id": model, "object": "model", "created": self._created, "owned_by": "waterline", "max_model_len": context
        }  # fmt: skip

    async def _health(self, scope: Scope, _receive: Receive, reply: Reply) -> None:
        """Say 200 when each model has a replica that takes requests, else 503; which it is, to this machine only."""
        services = self.dispatcher.services
        stopping = self.completions.stopping
        healthy = not stopping and all(service.ready for service in services.values())
        body: dict[str, Any] = {"status": "ok" if healthy else "stopping" if stopping else "not ready"}
        if self.loopback and is_local(scope):
            body["models"] = {
                model: {"ready": service.ready, "total": len(service.lanes)} for model, service in services.items()
            }
            lanes = self.dispatcher.lanes
            body["replicas"] = {
                replica: lanes[replica].said(state.status) if replica in lanes else state.status
                for replica, state in self.states.items()
            }
        await reply.whole(200 if healthy else 503, orjson.dumps(body), [JSON])


def _showing(header: tuple[bytes, bytes], send: Send) -> Send:
    """Return what sends an answer with one header more."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [header, *message.get("headers", ())]}
        await send(message)

    return sending


def _request_id(scope: Scope) -> bytes:
    """Return what the client calls its request, if that is fit to be said back, else what we call it."""
    shown = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
    return shown if SANE_ID.fullmatch(shown) else str(scope[ID]).encode()
