"""The listener for operators: the page, its events, metrics, and the admin API.

    GET    /                              the page
    GET    /events                        a snapshot each second, as server-sent events
    GET    /snapshot                      the same once, without clients
    GET    /metrics                       for Prometheus
    GET    /admin/snapshot                with clients
    POST   /admin/replicas/ID/drain       no new requests; those under way end
    POST   /admin/replicas/ID/undrain
    POST   /admin/reload                  the fleet file or plan is read again
    GET    /admin/keys                    of clients, without their secrets
    DELETE /admin/keys/ID                 revoked at once
    GET    /admin/decisions               each decision about a request from now on, a line of JSON each
    GET    /admin/usage                   by day, tenant, client, key and model; ?since= and ?until= are days, in UTC

Who may do what is in `access`. Nothing here knows the service but by `Operations`.
"""

import asyncio
import hashlib
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import date
from importlib import resources
from time import monotonic
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from waterline.dashboard.access import Access, NoAccessError
from waterline.errors import InputError, WaterlineError
from waterline.snapshot import Snapshot

EVERY_S = 1.0  # an event
MOST_VIEWERS = 200
JSON = "application/json"
LINES = "application/x-ndjson"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
HEADERS = {
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Operations(Protocol):
    """What the service lets an operator do. Each may raise a WaterlineError, which says what to do next."""

    @property
    def stopping(self) -> asyncio.Event:
        """Set when the service begins to end."""

    def snapshot(self) -> Snapshot: ...

    def metrics(self) -> bytes: ...

    def drain(self, replica: str) -> None:
        """Give the replica no new requests; once more changes nothing."""

    def undrain(self, replica: str) -> None: ...

    async def reload(self) -> str:
        """Read the file again; return what changes, in words."""

    def decisions(self) -> AsyncIterator[bytes]:
        """Yield lines of the decision log about requests as they come, none of them empty, until the service stops."""

    async def keys(self) -> Any:
        """Return the keys of clients without their secrets, as JSON can hold them."""

    async def revoke(self, key: str) -> None: ...

    async def usage(self, since: str, until: str) -> Any:
        """Return what was used from one day (in UTC, "" for any) to another, both included, as JSON can hold it."""


def make_app(operations: Operations, access: Access, *, version: str) -> Starlette:
    """Return the ASGI application."""
    return Dashboard(operations, access, version).app


class Dashboard:
    """The routes, and what those who watch share."""

    def __init__(self, operations: Operations, access: Access, version: str) -> None:
        self._operations = operations
        self._access = access
        self._page, self._policy = _page(version)
        self._viewers = 0
        self._encoded: tuple[float, bytes] = (float("-inf"), b"")
        look, keyed, change = access.check_look, access.check_key, access.check_change
        self.app = Starlette(
            routes=[
                _route("/", self._show, look),
                _route("/events", self._events, look),
                _route("/snapshot", self._snapshot, look),
                _route("/metrics", self._metrics, look),
                _route("/admin/snapshot", self._whole_snapshot, keyed),
                _route("/admin/replicas/{replica:path}/drain", self._drain, change, "POST"),
                _route("/admin/replicas/{replica:path}/undrain", self._undrain, change, "POST"),
                _route("/admin/reload", self._reload, change, "POST"),
                _route("/admin/decisions", self._decisions, keyed),
                _route("/admin/keys", self._keys, keyed),
                _route("/admin/keys/{key}", self._revoke, change, "DELETE"),
                _route("/admin/usage", self._usage, keyed),
            ],
            exception_handlers={WaterlineError: _answer_error, HTTPException: _answer_no_route},
        )

    # --- What anybody here may see ----------------------------------------------------------------------------------

    async def _show(self, _request: Request) -> Response:
        return Response(self._page, media_type="text/html", headers={"content-security-policy": self._policy})

    async def _snapshot(self, _request: Request) -> Response:
        return Response(self._view(), media_type=JSON)

    async def _metrics(self, _request: Request) -> Response:
        return Response(self._operations.metrics(), media_type=PROMETHEUS)

    async def _events(self, _request: Request) -> Response:
        if self._viewers >= MOST_VIEWERS:
            raise TooManyError(f"{MOST_VIEWERS} watch already. Use /snapshot, or come back later.")
        return StreamingResponse(self._stream(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    async def _stream(self) -> AsyncIterator[bytes]:
        self._viewers += 1
        try:
            yield b"retry: 1000\n\n"
            while True:
                stopping = self._operations.stopping.is_set()
                yield b"data: " + self._view() + b"\n\n"
                with suppress(TimeoutError):
                    async with asyncio.timeout(EVERY_S):
                        await (asyncio.sleep(EVERY_S) if stopping else self._operations.stopping.wait())
        finally:
            self._viewers -= 1

    def _view(self) -> bytes:
        """Return the snapshot for everybody; those who watch at the same time share one."""
        now_s = monotonic()
        if now_s - self._encoded[0] > EVERY_S / 2 or self._operations.stopping.is_set():
            self._encoded = (now_s, msgspec.json.encode(self._operations.snapshot().public_view()))
        return self._encoded[1]

    # --- What needs the key -----------------------------------------------------------------------------------------

    async def _whole_snapshot(self, _request: Request) -> Response:
        return _json(self._operations.snapshot())

    async def _drain(self, request: Request) -> Response:
        self._operations.drain(request.path_params["replica"])
        return _json({"replica": request.path_params["replica"], "draining": True})

    async def _undrain(self, request: Request) -> Response:
        self._operations.undrain(request.path_params["replica"])
        return _json({"replica": request.path_params["replica"], "draining": False})

    async def _reload(self, _request: Request) -> Response:
        return _json({"reloaded": await self._operations.reload()})

    async def _decisions(self, _request: Request) -> Response:
        return StreamingResponse(self._operations.decisions(), media_type=LINES, headers={"x-accel-buffering": "no"})

    async def _keys(self, _request: Request) -> Response:
        return _json({"keys": await self._operations.keys()})

    async def _revoke(self, request: Request) -> Response:
        await self._operations.revoke(request.path_params["key"])
        return _json({"key": request.path_params["key"], "revoked": True})

    async def _usage(self, request: Request) -> Response:
        since, until = (_day(request.query_params, name) for name in ("since", "until"))
        return _json({"usage": await self._operations.usage(since, until)})


class TooManyError(WaterlineError):
    http_status = 503


Answer = Callable[[Request], Awaitable[Response]]


def _route(path: str, answer: Answer, check: Callable[[Request], None], method: str = "GET") -> Route:
    async def checked(request: Request) -> Response:
        check(request)
        response = await answer(request)
        response.headers.update(HEADERS)
        return response

    return Route(path, checked, methods=[method])


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type=JSON)


def _day(parameters: Mapping[str, str], name: str) -> str:
    said = parameters.get(name, "")
    try:
        return date.fromisoformat(said).isoformat() if said else ""
    except ValueError:
        raise InputError(f"{name}={said[:60]} is no day. Write it like 2026-11-26.") from None


async def _answer_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, WaterlineError)  # noqa: S101 - the handler is registered for it
    headers = dict(HEADERS)
    if isinstance(error, NoAccessError):
        headers["www-authenticate"] = 'Basic realm="Waterline: any name, the admin key as password", charset="UTF-8"'
    return _error(str(error), error.http_status, headers)


async def _answer_no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    return _error(f"{request.method} {request.url.path[:60]}: {error.detail}.", error.status_code, HEADERS)


def _error(message: str, status: int, headers: Mapping[str, str]) -> Response:
    body = msgspec.json.encode({"error": {"message": message}})
    return Response(body, status_code=status, media_type=JSON, headers=headers)


def _page(version: str) -> tuple[bytes, str]:
    """Return the page, and the policy by which a browser runs its own script and style and nothing else."""
    page = resources.files("waterline.dashboard").joinpath("page.html").read_text(encoding="utf-8")
    page = page.replace("$version", version)
    script, style = (_digest(page, tag) for tag in ("script", "style"))
    return page.encode(), (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(page: str, tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return "sha256-" + b64encode(hashlib.sha256(content.encode()).digest()).decode()
