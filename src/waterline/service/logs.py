"""The service's log: lines for people in a terminal, else one JSON object a line, with the request it is about.

What a client sent or was answered is never in it: events carry ids, counts and reasons, and a traceback shows code
without the values of its variables.
"""

from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any, Protocol, TextIO, cast

import orjson
import structlog

from waterline.outcome import Completion

REQUEST_ID = "request_id"  # of a line; also a client finds it in its answer's headers
LONGEST_REASON = 300  # characters of what an engine said

log = structlog.get_logger()


class Stream(Protocol):
    def write(self, text: str) -> None: ...

    def flush(self) -> None: ...


def log_to(stream: Stream, *, terminal: bool) -> None:
    """Send the log there; people read a terminal."""
    structlog.configure(
        processors=[
            _with_request,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,  # text without variables; a renderer further down would show them
            *(_for_people() if terminal else _for_machines()),
        ],
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", stream)),
    )


def about_request(request_id: str) -> None:
    """Put the id into every line that the task of a request writes from now on."""
    _REQUEST.set(request_id)


_REQUEST: ContextVar[str] = ContextVar(REQUEST_ID, default="")


def _with_request(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if request_id := _REQUEST.get():
        event.setdefault(REQUEST_ID, request_id)
    return event


def log_failure(completion: Completion) -> None:
    """Write a line about a request that failed; the others are in the ledger."""
    if completion.status == "failed":
        log.warning(
            "request failed",
            tenant=completion.tenant,
            model=completion.model,
            replica=completion.replica,
            reason=completion.reason[:LONGEST_REASON],
            after_s=round(completion.finish_s - completion.arrival_s, 3),
            output_tokens=completion.output_tokens,
        )


def _for_people() -> tuple[Any, ...]:
    return (
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        structlog.dev.ConsoleRenderer(colors=True),
    )


def _for_machines() -> tuple[Any, ...]:
    return (
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
        structlog.processors.JSONRenderer(serializer=_json),
    )


def _json(event: dict[str, Any], **_: Any) -> str:
    first = {"at": event.pop("at"), "level": event.pop("level"), "event": event.pop("event")}
    return orjson.dumps({**first, **event}, default=str).decode()
