"""The OpenAI-compatible API, as a bare ASGI application: what is asked, whose turn it is, and what became of it."""

import asyncio
import time
from asyncio import Future
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import orjson
import structlog

from waterline.errors import WaterlineError, nearest
from waterline.outcome import Completion, Status
from waterline.plan import Plan, Replica
from waterline.service.asgi import JSON, ClientGoneError, Receive, Reply, Scope, Send, read_body, unless_disconnected
from waterline.service.body import CHAT, COMPLETIONS, Asked, read_asked
from waterline.service.dispatcher import Dispatcher, Refusal, Ticket
from waterline.service.engines import Engine
from waterline.service.errors import RejectedError, retry_after, shortened
from waterline.service.metrics import Metrics
from waterline.service.passage import Passage, Passages
from waterline.service.snapshot import take_snapshot
from waterline.service.supervisor import ReplicaState
from waterline.service.upstream import Connections, Progress
from waterline.snapshot import JobNow, Snapshot

LAST_WORD_S = 0.2  # for the last event of a stream that is cut
INVALID = "invalid request"  # the client's own doing: it counts neither for nor against the SLO
A_MODEL = "/v1/models/"  # and its name

log = structlog.get_logger()


class Turn:
    """The place of one request, as the dispatcher of its model gives it."""

    def __init__(self, dispatcher: Dispatcher, now_s: Callable[[], float], nobody: Callable[[], RejectedError]) -> None:
        self._dispatcher = dispatcher
        self._now_s = now_s
        self._nobody = nobody
        self._come: Future[bool] = asyncio.get_running_loop().create_future()
        self.ticket: Ticket  # once it was taken in

    def call(self, go: bool) -> None:  # noqa: FBT001 - a callback of one argument
        """End the wait; nobody waits any more when the client has left."""
        if not self._come.done():
            self._come.set_result(go)

    async def replica(self) -> Replica:
        if not await self._come:
            raise self._nobody()
        return self.ticket.lane.replica

    def move(self) -> None:
        self._come = asyncio.get_running_loop().create_future()
        if not self._dispatcher.move(self.ticket, self.call, self._now_s()):
            self._come.set_result(False)  # nobody is left

    def first_token(self) -> None:
        self._dispatcher.first_token(self.ticket)


class Gateway:
    """Answers HTTP for the models of a plan.

    Args:
        plan: what is served.
        engines: of the replicas by id.
        states: of the replicas by id; somebody else keeps them up to date and calls `replica_changed`.
        connections: to the engines.
        on_completion: told what became of each request to a served model.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        plan: Plan,
        engines: Mapping[str, Engine],
        states: Mapping[str, ReplicaState],
        connections: Connections,
        on_completion: Callable[[Completion], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self.engines = engines
        self.states = states
        self.dispatchers = {
            model.model: _dispatcher(plan, model.model, plan.replicas_of(model.model)) for model in plan.models
        }
        self.tenants = {model.model: _tenant(plan, model.model) for model in plan.models}
        self.jobs_now: Callable[[], tuple[JobNow, ...]] = tuple  # whoever keeps jobs says how they are
        self._slos = dict(plan.fleet.slos)
        self.metrics = Metrics(self._slos, self.snapshot)
        self._on_completion = on_completion
        self._clock = clock
        self._begun_s = clock()
        self._passages = Passages(engines, states, connections, self.now_s)
        self._created = int(time.time())  # the date OpenAI's model list asks for
        self._open: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._models = {replica.id: replica.model for replica in plan.replicas}  # by replica
        self._loads: dict[tuple[str, str], tuple[int, int]] = {}  # see take_loads
        self._routes: dict[str, tuple[str, Callable[[Scope, Receive, Reply], Awaitable[None]]]] = {
            f"/v1{CHAT}": ("POST", self._complete),
            f"/v1{COMPLETIONS}": ("POST", self._complete),
            "/v1/models": ("GET", self._list_models),
            A_MODEL: ("GET", self._list_models),
            "/health": ("GET", self._health),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        try:
            await self._route(scope, receive, reply)
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
            {model.model: self.dispatchers[model.model] for model in self.plan.models},
            self.states,
            self.metrics.recent,
            tenants=self.tenants,
            jobs=self.jobs_now(),
            now_s=self.now_s(),
            stopping=self._stopping,
        )

    def replica_changed(self, replica_id: str, state: ReplicaState) -> None:
        """Send work there, or not; what is under way on a replica that is gone is cut, and fails as if it broke off."""
        model = self._models[replica_id]
        self.metrics.replica_changed(model, state.status)
        if state.status in {"suspect", "draining"}:
            self.dispatchers[model].hold(replica_id, self.now_s())
            return
        self.dispatchers[model].set_ready(replica_id, ready=state.status == "ready", now_s=self.now_s())
        if state.status != "ready":
            self._passages.cut(replica_id)

    def admit(self, replica: Replica) -> None:
        """A replica has come into being; it gets work as soon as it is ready."""
        self._models[replica.id] = replica.model
        self.dispatchers[replica.model].add(replica)

    def update(self, replica: Replica) -> None:
        """A replica goes on with other figures."""
        self.dispatchers[replica.model].update(replica)

    def dismiss(self, replica_id: str) -> None:
        """A replica is gone for good, and nobody is on it any more."""
        self.dispatchers[self._models.pop(replica_id)].remove(replica_id)

    def under_way(self, replica_id: str) -> int:
        """Return how many requests a replica works on."""
        return self.dispatchers[self._models[replica_id]].running(replica_id)

    def take_loads(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return what each tenant has asked of each model since this was asked last, refused or not.

        As tokens of prompts, and tokens that are expected to be written.
        """
        loads, self._loads = self._loads, {}
        return loads

    def use_plan(self, plan: Plan) -> None:
        """Go on with another plan: other expectations of models, and other models; replicas come by `admit`."""
        self.plan = plan
        self._slos |= plan.fleet.slos
        for model in plan.models:
            self.tenants[model.model] = _tenant(plan, model.model)
            dispatcher = _dispatcher(plan, model.model, ())
            if known := self.dispatchers.get(model.model):
                known.expect(dispatcher)
            else:
                self.dispatchers[model.model] = dispatcher

    def forget_models(self) -> None:
        """Forget the models that the plan has no more, when nobody of them is left."""
        for model in set(self.dispatchers) - {model.model for model in self.plan.models}:
            if not self.dispatchers[model].lanes:
                del self.dispatchers[model]

    def cut(self) -> None:
        """End every request that is under way, and refuse new ones: the service stops."""
        self._stopping = True
        for task in self._open:
            task.cancel()

    async def _route(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        path, method = scope["path"], scope["method"]
        route = self._routes.get(path) or (("GET", self._show_model) if path.startswith(A_MODEL) else None)
        if not route:
            known = ", ".join(self._routes)
            raise RejectedError(
                f"There is nothing at {shortened(path)}. Known: {known}.", status=404, code="unknown_path"
            )
        allowed, answer = route
        if method != allowed and (method, allowed) != ("HEAD", "GET"):
            raise RejectedError(
                f"{shortened(path)} takes {allowed}, not {method}.",
                status=405,
                code="wrong_method",
                headers={"allow": "GET, HEAD" if allowed == "GET" else allowed},
            )
        await answer(scope, receive, reply)

    # --- Completions ------------------------------------------------------------------------------------------------

    async def _complete(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        arrival_s = self.now_s()
        try:
            body = await read_body(scope, receive)
            asked = read_asked(scope["path"].removeprefix("/v1"), body)
            dispatcher = self._dispatcher_of(asked.model)
            self._look_at(asked, dispatcher)
        except RejectedError:
            self.metrics.invalid.inc()
            raise
        turn = Turn(
            dispatcher,
            self.now_s,
            lambda: self._refused(asked, Refusal(retry_after_s=dispatcher.deadline_s, replicas_ready=0)),
        )
        ticket = dispatcher.enter(asked.prompt_tokens, asked.most_tokens, turn.call, arrival_s, answers=asked.answers)
        if isinstance(ticket, Refusal):
            error = self._refused(asked, ticket)
            self._record(asked, arrival_s, "refused", reason=str(error))
            raise error
        turn.ticket = ticket
        passage = Passage(asked=asked, path=scope["path"], headers=scope["headers"], place=turn)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._open.add(task)
        status: Status = "failed"
        reason = "a bug in the gateway"
        try:
            await unless_disconnected(self._passages.carry(passage, reply), receive)
            status, reason = "ok", ""
        except ClientGoneError:
            status, reason = "cancelled", "the client went away"
            raise
        except RejectedError as error:
            reason = str(error)
            if error.status < 500:
                status, reason = ("refused", reason) if error.status == 429 else ("cancelled", INVALID)
            raise
        except WaterlineError as error:
            reason = str(error)
            raise
        except asyncio.CancelledError:
            reason = "the service stopped"
            if not self._stopping:
                raise
            task.uncancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD_S):
                    await reply.error(_stopping())
        finally:
            self._open.discard(task)
            dispatcher.leave(ticket, self.now_s())
            self._record(asked, arrival_s, status, reason=reason, ticket=ticket, progress=passage.progress)

    def _look_at(self, asked: Asked, dispatcher: Dispatcher) -> None:
        """Count what is asked; raise RejectedError when no replica has room for it."""
        if dispatcher.lanes:
            asked.check_context(max(lane.replica.max_context_tokens for lane in dispatcher.lanes))
        key = self.tenants[asked.model], asked.model
        expected = dispatcher.expected_output_tokens
        output_tokens = expected if asked.most_tokens is None else min(asked.most_tokens, expected)
        prompts, outputs = self._loads.get(key, (0, 0))
        self._loads[key] = prompts + asked.prompt_tokens, outputs + asked.answers * output_tokens

    def _dispatcher_of(self, model: str) -> Dispatcher:
        if self._stopping:
            raise _stopping()
        try:
            return self.dispatchers[model]
        except KeyError:
            raise RejectedError(
                f"No model is called '{shortened(model)}' here. {nearest(shortened(model), self.dispatchers)}",
                status=404,
                param="model",
                code="model_not_found",
            ) from None

    def _refused(self, asked: Asked, refusal: Refusal) -> RejectedError:
        headers = retry_after(refusal.retry_after_s)
        if refusal.replicas_ready:
            return RejectedError(
                f"'{asked.model}' has more work than it can begin in time. Come back in {headers['retry-after']} s.",
                status=429,
                code="rate_limit_exceeded",
                headers=headers,
            )
        states = {replica.id: self.states[replica.id].status for replica in self.plan.replicas_of(asked.model)}
        said = ", ".join(f"{replica} is {status}" for replica, status in states.items())
        return RejectedError(
            f"'{asked.model}' is not ready: {said}. Come back in {headers['retry-after']} s.",
            status=503,
            code="model_not_ready",
            headers=headers,
        )

    def _record(
        self,
        asked: Asked,
        arrival_s: float,
        status: Status,
        *,
        reason: str,
        ticket: Ticket | None = None,
        progress: Progress | None = None,
    ) -> None:
        progress = progress or Progress()
        came_whole = status == "ok" and not asked.stream
        completion = Completion(
            tenant=self.tenants[asked.model],
            model=asked.model,
            replica=ticket.lane.replica.id if ticket else "",
            status=status,
            arrival_s=arrival_s,
            first_token_s=progress.first_token_s,
            finish_s=progress.first_token_s if came_whole else self.now_s(),
            prompt_tokens=progress.prompt_tokens or asked.prompt_tokens,
            output_tokens=progress.output_tokens,
            gpu_s=ticket.gpu_s if ticket else 0.0,
            reason=reason,
        )
        self.metrics.count(completion)
        self._on_completion(completion)

    # --- About the service ------------------------------------------------------------------------------------------

    async def _list_models(self, _scope: Scope, _receive: Receive, reply: Reply) -> None:
        models = [self._model(model) for model in self.dispatchers]
        await reply.whole(200, orjson.dumps({"object": "list", "data": models}), [JSON])

    async def _show_model(self, scope: Scope, _receive: Receive, reply: Reply) -> None:
        model = scope["path"].removeprefix(A_MODEL)
        self._dispatcher_of(model)
        await reply.whole(200, orjson.dumps(self._model(model)), [JSON])

    def _model(self, model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": self._created, "owned_by": "waterline"}

    async def _health(self, _scope: Scope, _receive: Receive, reply: Reply) -> None:
        """Say 200 when each model has a replica that is ready, else 503."""
        models = {
            model: {
                "ready": sum(self.states[lane.replica.id].status == "ready" for lane in dispatcher.lanes),
                "total": len(dispatcher.lanes),
            }
            for model, dispatcher in self.dispatchers.items()
        }
        healthy = not self._stopping and all(counts["ready"] for counts in models.values())
        status = "ok" if healthy else "stopping" if self._stopping else "not ready"
        body = {"status": status, "models": models, "replicas": {key: self.states[key].status for key in self.states}}
        await reply.whole(200 if healthy else 503, orjson.dumps(body), [JSON])


def _dispatcher(plan: Plan, model: str, replicas: Sequence[Replica]) -> Dispatcher:
    planned = next(planned for planned in plan.models if planned.model == model)
    return Dispatcher(
        replicas,
        expected_prompt_tokens=planned.prompt_tokens,
        expected_output_tokens=planned.output_tokens,
        deadline_s=plan.fleet.slos[model].ttft_s,
    )


def _stopping() -> RejectedError:
    return RejectedError("The service is stopping.", status=503, code="stopping", headers=retry_after(1))


def _tenant(plan: Plan, model: str) -> str:
    """Return whose requests these are, while keys do not say: the first tenant that asks for the model."""
    return next((demand.tenant for demand in plan.fleet.demand if demand.model == model), "public")
