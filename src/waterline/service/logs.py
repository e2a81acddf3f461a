"""The service's log: lines for people in a terminal, else one JSON object a line, with the request it is about.

What a client sent or was answered is never in it: events carry ids, counts and reasons, and a traceback shows code
without the values of its variables.
"""

import time
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from typing import Any, Protocol, TextIO, cast

import orjson
import structlog

from waterline.outcome import Completion

REQUEST_ID = "request_id"  # of a line; also a client finds it in its answer's headers
LONGEST_REASON = 300  # characters of what an engine said
MOST_A_SECOND = 5  # lines about requests that failed

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


class FailureLog:
    """Writes a line about each request that failed, but of a flood only the first of each second.

    When the ledger or all engines are away every request fails, and the disk is not to be the next to do so.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._second = -1  # of the last line …
        self._lines = 0  # … and how many came in it
        self._left_out = 0

    def note(self, completion: Completion) -> None:
        if completion.status != "failed":
            return
        if self._second != (now := int(self._clock())):
            self._second, self._lines = now, 0
        if self._lines == MOST_A_SECOND:
            self._left_out += 1
            return
        log.warning(
            "request failed",
            tenant=completion.tenant,
            model=completion.model,
            replica=completion.replica,
            reason=completion.reason[:LONGEST_REASON],
            after_s=round(completion.finish_s - completion.arrival_s, 3),
            output_tokens=completion.output_tokens,
            **({"more_before": self._left_out} if self._left_out else {}),
        )
        self._lines += 1
        self._left_out = 0


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
