"""The way of a request for tokens: what it asks, its turn, its answer, and what is written down of it."""

import asyncio
import math
from asyncio import Future
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from waterline.errors import WaterlineError, nearest
from waterline.ledger import new_request_id, utc_us
from waterline.outcome import Completion, Status
from waterline.policy.decisions import NOT_SERVED, RULES
from waterline.service.access import Access, Caller
from waterline.service.asgi import ClientGoneError, Headers, Receive, Reply, Scope, read_body, unless_disconnected
from waterline.service.asking import Passage
from waterline.service.body import BYTES_PER_TOKEN, CHAT, Asked, loaded, read_asked
from waterline.service.books import OVER_QUOTA, UNLIMITED, Books, Entry
from waterline.service.dispatcher import NO_BLOCKS, Dispatcher, block_keys
from waterline.service.errors import RejectedError, retry_after, shortened
from waterline.service.limits import was_slow
from waterline.service.lines import Refusal, Service, Ticket
from waterline.service.metrics import Metrics
from waterline.service.passage import Passages
from waterline.service.response_relay import Own, read_own
from waterline.service.response_stream import ResponseStream
from waterline.service.responses import RESPONSES, Answer, as_chat
from waterline.service.supervisor import ReplicaState
from waterline.service.turn import Turn
from waterline.service.upstream import Progress
from waterline.service.usage import WithoutUsage

WRITTEN_WITHIN_S = 2.0  # what an answer waits for the ledger; it is written all the same, and the lag is shown
LAST_WORD_S = 0.2  # for the last event of a stream that is cut
UNSERVED_S = 30.0  # after which to ask again for a model without a replica, where nobody knows when there is one
FLEX_S = 600.0  # a request with service_tier "flex" would rather wait than be refused
INVALID = "invalid request"  # the client's own doing: it counts neither for nor against the SLO
NOT_READY = "model_not_ready"  # the code of who is told that no replica is in service
GONE, SLOW = "the client went away", "the client did not read its answer"
BLOCK_BYTES = 512 * BYTES_PER_TOKEN  # of a prompt, which a replica may still have in its cache
PROMPTS = (b'"messages"', b'"prompt"')  # where the part of a body begins that engines keep


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request for tokens, wherever it comes from."""

    endpoint: str  # of OpenAI's API, without /v1
    body: bytes = field(repr=False)
    caller: Caller
    headers: Headers = field(default_factory=list)
    id: str = field(default_factory=new_request_id)  # in the ledger
    wait_s: float | None = None  # for its first token, before it would rather be refused; None: as its model's SLO says
    scope: Scope | None = None  # of HTTP, if it came that way
    again: bool = False  # until it ends well it will be submitted again, under the same id
    spare: bool = False  # it takes only what nobody else wants …
    counts: bool = True  # … and is demand for which GPUs are moved


@dataclass(slots=True, kw_only=True, eq=False)
class Visit:
    """One request, while it is here."""

    request: Request
    asked: Asked
    service: Service
    entry: Entry
    turn: Turn
    wait_s: float  # for its first token
    arrival_s: float
    ticket: Ticket | None = None  # once it was taken in
    progress: Progress
    is_over: bool = False
    in_vain: bool = False  # no byte of an answer went out
    over_quota: bool = False  # it was refused for that: the ledger's business, and no matter of load
    settled: Future[None] | None = None  # done when it stands in the ledger

    @property
    def tokens(self) -> tuple[int, int]:
        """Of prompt and answer so far; nothing until an engine has begun."""
        if not self.turn.replicas:
            return 0, 0
        return self.progress.prompt_tokens or self.asked.prompt_tokens, self.progress.output_tokens


class Completions:
    """Answers requests for tokens, of clients over HTTP and of whoever calls `submit`.

    Args:
        states: of the replicas by id.
        dispatcher: whose turn it is.
        access: who may ask.
        books: what is written down.
        passages: to the engines.
        metrics: that count.
        on_completion: told what became of each request to a served model.
        now_s: the time since the service started.
    """

    def __init__(
        self,
        states: Mapping[str, ReplicaState],
        dispatcher: Dispatcher,
        access: Access,
        books: Books,
        passages: Passages,
        metrics: Metrics,
        on_completion: Callable[[Completion], None],
        now_s: Callable[[], float],
    ) -> None:
        self._states = states
        self._dispatcher = dispatcher
        self._access = access
        self._books = books
        self._passages = passages
        self._metrics = metrics
        self._on_completion = on_completion
        self._now_s = now_s
        self._open: dict[asyncio.Task[object], Visit] = {}
        self.stopping = False

    async def answer(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        """Answer one HTTP request. Raises RejectedError, or ClientGoneError when there is nobody left to answer."""
        caller = self._access.caller(scope)
        body = await read_body(scope, receive)
        endpoint = scope["path"].removeprefix("/v1")
        request = Request(
            endpoint=endpoint, body=body, caller=caller, headers=scope["headers"], id=scope["waterline.id"], scope=scope
        )
        await unless_disconnected(self.submit(request, reply), scope, receive)

    async def submit(self, request: Request, reply: Reply) -> "Future[None] | None":
        """Answer one request, wherever it comes from; cancel this when nobody wants the answer any more.

        Returns what is done when it stands in the ledger; None without a ledger.

        Raises RejectedError when there is no answer, and LedgerError when it cannot be written down.
        """
        visit = self._begun(request, reply)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._open[task] = visit
        status: Status = "failed"
        reason = "a bug in the gateway"
        reply.headers += self._books.limits(request.caller.key)
        try:
            self._take_in(visit)
            await self._carry(visit, reply)
            status, reason = "ok", ""
        except ClientGoneError:
            status, reason = "cancelled", GONE
            raise
        except WaterlineError as error:
            status, reason = _judged(error)
            visit.in_vain = not reply.begun
            visit.over_quota = isinstance(error, RejectedError) and error.code == OVER_QUOTA
            raise
        except asyncio.CancelledError:
            if not self.stopping:
                status, reason = "cancelled", SLOW if request.scope and was_slow(request.scope) else GONE
                raise
            reason = "the service stopped"
            task.uncancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD_S):
                    await reply.error(stopping())
        finally:
            del self._open[task]
            self._see_off(visit, status, reason)
        return visit.settled

    def note(self) -> None:
        """Tell the ledger how far every request has come; once a second."""
        for visit in self._open.values():
            if visit.turn.replicas:
                self._books.note(visit.entry, *visit.tokens, visit.service.cost_gpu_s(*visit.tokens))

    def cut(self) -> None:
        """End every request that is under way, and refuse new ones: the service stops."""
        self.stopping = True
        for task in self._open:
            task.cancel()

    def service_of(self, model: str) -> Service:
        """Return the model with this name. Raises RejectedError when there is none."""
        if self.stopping:
            raise stopping()
        try:
            return self._dispatcher.services[model]
        except KeyError:
            raise RejectedError(
                f"No model is called '{shortened(model)}' here. {nearest(shortened(model), self._dispatcher.services)}",
                status=404,
                param="model",
                code="model_not_found",
            ) from None

    # --- The stages of a visit --------------------------------------------------------------------------------------

    def _asked(self, request: Request, reply: Reply) -> Asked:
        """Return what an engine is asked; its answer will be edited accordingly."""
        if request.endpoint != RESPONSES:
            return read_asked(request.endpoint, request.body)
        model = str(_field(request.body, "model"))
        if self._passages.asker.make_responses(self._dispatcher.replicas_of(model)):
            reply.edit = Own()
            return read_own(request.body)
        body, asked = as_chat(request.body)
        reply.edit = ResponseStream(Answer(asked, request.id))
        return read_asked(CHAT, body)

    def _begun(self, request: Request, reply: Reply) -> Visit:
        """Read what is asked. Raises RejectedError when that cannot be understood, or is not allowed."""
        arrival_s, caller = self._now_s(), request.caller
        try:
            asked = self._asked(request, reply)
            caller.check_model(asked.model)
            service = self.service_of(asked.model)
            asked.check_context(service.max_context_tokens)
        except RejectedError:
            self._metrics.invalid.inc()
            raise
        entry = Entry(
            request_id=request.id,
            tenant=caller.tenant,
            client=caller.client,
            key=caller.key,
            model=asked.model,
            arrival_us=utc_us(),
            usd_per_gpu_s=service.usd_per_gpu_s,
        )
        patient_s = FLEX_S if asked.is_patient else service.ttft_s
        return Visit(
            request=request,
            asked=asked,
            service=service,
            entry=entry,
            turn=Turn(
                self._dispatcher,
                self._now_s,
                lambda rule, again_s: self._refused(asked, Refusal(rule=rule, retry_after_s=again_s)),
                self._metrics.hedged,
            ),
            wait_s=patient_s if request.wait_s is None else request.wait_s,
            arrival_s=arrival_s,
            progress=Progress(asked=asked),
        )

    def _take_in(self, visit: Visit) -> None:
        """Ask for a place. Raises RejectedError when there is none."""
        asked, request = visit.asked, visit.request
        ticket = self._dispatcher.enter(
            asked.model,
            asked.prompt_tokens,
            asked.most_tokens,
            visit.turn.call,
            visit.arrival_s,
            tenant=request.caller.tenant,
            line=request.caller.line,
            answers=asked.answers,
            blocks=_blocks(asked) if len(visit.service.lanes) > 1 else NO_BLOCKS,
            wait_s=visit.wait_s,
            spare=request.spare,
            counts=request.counts,
            id_=request.id,
        )
        if isinstance(ticket, Refusal):
            raise self._refused(asked, ticket)
        visit.ticket = visit.turn.ticket = ticket

    async def _carry(self, visit: Visit, reply: Reply) -> None:
        """Wait for its turn and for its answer, within its quota."""
        asked, entry = visit.asked, visit.entry
        room = max(visit.service.max_context_tokens - asked.fewest_tokens, 0)
        output_tokens = asked.answers * (room if asked.most_tokens is None else min(room, asked.most_tokens))
        cost_gpu_s = visit.service.cost_gpu_s(asked.prompt_tokens, output_tokens)
        await self._books.reserve(entry, asked.prompt_tokens + output_tokens, cost_gpu_s)
        if entry.reservation:
            reply.after = lambda: self._settled(visit)
            limited = bool(entry.key and entry.key.quotas != UNLIMITED)
            if asked.stream or limited:
                reply.before = lambda: self._books.durable(entry)
            else:  # what comes whole is settled before it, if it can be
                reply.before = lambda: self._books.durable_in_trouble(entry)
        if asked.stream and not asked.include_usage and not reply.edit:
            reply.edit = WithoutUsage()
        passage = Passage(
            asked=asked,
            path=f"/v1{asked.endpoint}",
            headers=visit.request.headers,
            place=visit.turn,
            patience_s=min(visit.wait_s, FLEX_S),
            progress=visit.progress,
            hedge_after_s=None if visit.request.spare else visit.service.hedge_after_s,
        )
        await self._passages.carry(passage, reply)

    async def _settled(self, visit: Visit) -> None:
        """See off who has its whole answer, and wait until that stands in the ledger; not for ever, if it cannot."""
        self._see_off(visit, "ok", "")
        if visit.settled:
            await _done_within(visit.settled, WRITTEN_WITHIN_S)

    def _see_off(self, visit: Visit, status: Status, reason: str) -> None:
        """Give its place to the next, and write down what became of it, once."""
        if visit.is_over:
            return
        visit.is_over = True
        asked, progress, ticket = visit.asked, visit.progress, visit.ticket
        untold = status in {"refused", "failed"} and math.isnan(progress.first_token_s)
        in_vain = visit.in_vain or reason == INVALID or untold
        tokens = (0, 0) if in_vain else visit.tokens  # nobody is charged for a refusal, nor for a failure of ours
        if ticket:
            self._dispatcher.leave(ticket, self._now_s())
        came_whole = status == "ok" and not asked.stream
        completion = Completion(
            tenant=visit.request.caller.tenant,
            model=asked.model,
            replica=visit.turn.replicas[-1] if visit.turn.replicas else "",
            status=status,
            arrival_s=ticket.start_s if ticket and visit.request.spare else visit.arrival_s,  # a day is no lateness
            first_token_s=progress.first_token_s,
            finish_s=progress.first_token_s if came_whole else self._now_s(),
            prompt_tokens=tokens[0] if visit.turn.replicas else asked.prompt_tokens,
            output_tokens=tokens[1],
            cached_tokens=min(progress.cached_tokens, tokens[0]),
            thinking_tokens=progress.thinking_tokens,
            gpu_s=ticket.gpu_s if ticket and visit.turn.replicas else 0.0,  # it may leave as its turn comes
            reason=reason,
            whole=came_whole,
        )
        seen = replace(completion, status="cancelled") if visit.over_quota else completion
        self._metrics.count(seen)
        self._on_completion(seen)
        cost_gpu_s = visit.service.cost_gpu_s(*tokens)
        visit.settled = self._books.settle(
            visit.entry, completion, visit.turn.replicas, cost_gpu_s, final=status == "ok" or not visit.request.again
        )

    # --- In words ---------------------------------------------------------------------------------------------------

    def _refused(self, asked: Asked, refusal: Refusal) -> RejectedError:
        headers = retry_after(refusal.retry_after_s if math.isfinite(refusal.retry_after_s) else UNSERVED_S)
        again = f"Come back in {headers['retry-after']} s."
        if refusal.rule == NOT_SERVED:
            lanes = self._dispatcher.services[asked.model].lanes
            said = ", ".join(
                f"{lane.replica.id} is {lane.said(self._states[lane.replica.id].status)}" for lane in lanes
            )
            return RejectedError(
                f"'{asked.model}' is not ready: {said or 'it has no replica now'}. {again}",
                status=503,
                code=NOT_READY,
                headers=headers,
            )
        return RejectedError(
            f"'{asked.model}' has more work than it can begin in time. {RULES[refusal.rule][1]} {again}",
            status=429,
            code="rate_limit_exceeded",
            headers=headers,
        )


def _field(body: bytes, name: str) -> object:
    whole = loaded(body)
    return whole.get(name) if isinstance(whole, dict) else None


def stopping() -> RejectedError:
    return RejectedError("The service is stopping.", status=503, code="stopping", headers=retry_after(1))


async def _done_within(future: "Future[None]", within_s: float) -> None:
    """Wait until it is done, and no longer than that: `asyncio.wait` for one, at a third of its price."""
    loop = asyncio.get_running_loop()
    waiter: Future[None] = loop.create_future()

    def wake(_: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = loop.call_later(within_s, wake)
    future.add_done_callback(wake)
    try:
        await waiter
    finally:
        timer.cancel()
        future.remove_done_callback(wake)


def _judged(error: WaterlineError) -> tuple[Status, str]:
    """Return what an error means for the SLO, and what is remembered of it."""
    if isinstance(error, RejectedError) and (error.status == 429 or error.code == NOT_READY):
        return "refused", str(error)
    if isinstance(error, RejectedError) and error.status < 500:
        return "cancelled", INVALID
    return "failed", str(error)


def _blocks(asked: Asked) -> NDArray[np.int64]:
    """Return the keys of a prompt's blocks, as `policy.routing` compares them."""
    begin = max(asked.body.find(mark) for mark in PROMPTS)
    return np.fromiter(block_keys(asked.body[max(begin, 0) :], BLOCK_BYTES), np.int64)
