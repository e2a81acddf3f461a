"""OpenAI's files and batches over HTTP.

    POST   /v1/files                a form with `file` and `purpose=batch`
    GET    /v1/files                ?purpose= &after= &limit= &order=asc|desc
    GET    /v1/files/ID             about it
    GET    /v1/files/ID/content     what is in it
    DELETE /v1/files/ID
    POST   /v1/batches              input_file_id, endpoint, completion_window "24h", metadata
    GET    /v1/batches              ?after= &limit=
    GET    /v1/batches/ID
    POST   /v1/batches/ID/cancel

A client sees what it has made itself. On a service that others can reach that takes a key: who comes without one cannot
be told from the next.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from functools import partial
from tempfile import gettempdir
from typing import Annotated, Any, Literal

import msgspec
import orjson
import structlog
from msgspec import Meta, Struct
from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from waterline.errors import LedgerError, WaterlineError
from waterline.ledger import Ledger, files
from waterline.ledger.files import UNDER_WAY, Batch, Client, File
from waterline.service.access import Access, Caller, is_local
from waterline.service.asgi import BODY_WITHIN_S
from waterline.service.batches import ENDPOINTS, WINDOW_S, Runner, spare_slots
from waterline.service.errors import RejectedError, error_headers, error_json, http_status, shortened
from waterline.service.gateway import Gateway
from waterline.units import MEGA

MOST_BYTES = 100 * 2**20  # of a file, and a little more with the form around it
FORM_BYTES = 64 * 2**10
MOST_KEPT_BYTES = 2**30  # of a client
SLOWEST_BYTES_PER_S = 2**14  # of what is sent, after the first BODY_WITHIN_S
MOST_LISTED = 100
MOST_FILES_LISTED = 10_000

log = structlog.get_logger()
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it tells standard error what a client got wrong

Text = Annotated[str, Meta(min_length=1, max_length=200)]


@asynccontextmanager
async def offering_batches(gateway: Gateway, ledger: Ledger) -> AsyncIterator[Runner]:
    """Answer the routes above and run batches, for the length of the block."""
    runner = Runner(ledger, gateway.completions.submit, partial(spare_slots, gateway.dispatcher))
    api = BatchApi(ledger.engine, gateway.access, runner.wake, nameless=gateway.loopback)
    for prefix in ("/v1/files", "/v1/batches"):
        gateway.mount(prefix, api.app)
    gateway.batches_now = runner.now
    running = asyncio.create_task(runner.run())
    try:
        yield runner
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class Asked(Struct, frozen=True, kw_only=True):
    """What a client asks of a new batch; unknown keys are OpenAI's business, and left alone."""

    input_file_id: Text
    endpoint: Text
    completion_window: Literal["24h"]
    metadata: Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None  # fmt: skip # noqa: E501


class BatchApi:
    """The routes above, as an ASGI application.

    Args:
        engine: of the ledger's database.
        access: who asks.
        on_change: called when there is a batch to run or to cancel.
        nameless: whether those without a key may have files: on a service that only this machine can reach.
    """

    def __init__(self, engine: Engine, access: Access, on_change: Callable[[], None], *, nameless: bool) -> None:
        self._engine = engine
        self._access = access
        self._on_change = on_change
        self._nameless = nameless
        a_file, a_batch = "/v1/files/{id}", "/v1/batches/{id}"
        self.app = Starlette(
            routes=[
                Route("/v1/files", self._with_caller(self._add_file), methods=["POST"]),
                Route("/v1/files", self._with_caller(self._list_files)),
                Route(a_file, self._with_caller(self._show_file)),
                Route(a_file, self._with_caller(self._delete_file), methods=["DELETE"]),
                Route(f"{a_file}/content", self._with_caller(self._send_file)),
                Route("/v1/batches", self._with_caller(self._add_batch), methods=["POST"]),
                Route("/v1/batches", self._with_caller(self._list_batches)),
                Route(a_batch, self._with_caller(self._show_batch)),
                Route(f"{a_batch}/cancel", self._with_caller(self._cancel_batch), methods=["POST"]),
            ],
            exception_handlers={WaterlineError: _answer_error, HTTPException: _answer_no_route},
        )

    # --- Files ------------------------------------------------------------------------------------------------------

    async def _add_file(self, request: Request, caller: Caller) -> Response:
        whose = _whose(caller)
        kept = await asyncio.to_thread(files.file_bytes, self._engine, whose)
        bounded = Request(request.scope, _bounded(request, MOST_BYTES + FORM_BYTES))
        async with bounded.form(max_files=1, max_fields=8) as form:
            upload, purpose = form.get("file"), form.get("purpose")
            if not isinstance(upload, UploadFile):
                raise RejectedError("There is no 'file' in the form.", param="file", code="missing_parameter")
            if purpose != "batch":
                raise RejectedError("The 'purpose' of a file must be 'batch'.", param="purpose", code="invalid_value")
            if kept + (upload.size or 0) > MOST_KEPT_BYTES:
                raise RejectedError(
                    f"You keep {kept:,} bytes, and this file has {upload.size or 0:,}: together more than "
                    f"{MOST_KEPT_BYTES:,}. Delete files you no longer need.",
                    status=413,
                    code="storage_full",
                )
            name = _clean(upload.filename or "file")
            pieces = iter(partial(upload.file.read, files.PART_BYTES), b"")
            file = await asyncio.to_thread(files.add_file, self._engine, whose, "batch", name, pieces)
        return _json(_file(file))

    async def _list_files(self, request: Request, caller: Caller) -> Response:
        asked = request.query_params
        limit = _limit(asked, MOST_FILES_LISTED)
        found = await asyncio.to_thread(
            files.list_files,
            self._engine,
            _whose(caller),
            asked.get("purpose", ""),
            asked.get("after", ""),
            limit + 1,
            newest_first=asked.get("order", "desc") != "asc",
        )
        return _json(_list([_file(file) for file in found], limit))

    async def _show_file(self, request: Request, caller: Caller) -> Response:
        return _json(_file(await self._file(request, caller)))

    async def _send_file(self, request: Request, caller: Caller) -> Response:
        file = await self._file(request, caller)
        headers = {"content-length": str(file.bytes), "content-disposition": f'attachment; filename="{file.filename}"'}
        return StreamingResponse(self._content(file), media_type="application/octet-stream", headers=headers)

    async def _content(self, file: File) -> AsyncIterator[bytes]:
        number = 0
        while (part := await asyncio.to_thread(files.read_part, self._engine, file.id, number)) is not None:
            yield part
            number += 1

    async def _delete_file(self, request: Request, caller: Caller) -> Response:
        file = await self._file(request, caller)
        if await asyncio.to_thread(files.is_in_use, self._engine, file.id):
            raise RejectedError("A batch still reads this file. Cancel it first.", status=409, code="file_in_use")
        await asyncio.to_thread(files.delete_file, self._engine, _whose(caller), file.id)
        return _json({"id": file.id, "object": "file", "deleted": True})

    async def _file(self, request: Request, caller: Caller) -> File:
        return await self._find_file(request.path_params["id"], caller)

    async def _find_file(self, file_id: str, caller: Caller) -> File:
        file = await asyncio.to_thread(files.find_file, self._engine, _whose(caller), file_id)
        if not file:
            raise _not_found("file", file_id)
        return file

    # --- Batches ----------------------------------------------------------------------------------------------------

    async def _add_batch(self, request: Request, caller: Caller) -> Response:
        try:
            asked = msgspec.json.decode(await Request(request.scope, _bounded(request, FORM_BYTES)).body(), type=Asked)
        except msgspec.DecodeError as error:
            raise RejectedError(f"{error}.", code="invalid_value") from None
        if asked.endpoint not in ENDPOINTS:
            raise RejectedError(
                f"There are no batches for {shortened(asked.endpoint)}, but for {', '.join(ENDPOINTS)}.",
                param="endpoint",
                code="invalid_value",
            )
        file = await self._find_file(asked.input_file_id, caller)
        if file.purpose != "batch":
            raise RejectedError(
                f"The file {file.id} is not for batches: its purpose is '{file.purpose}'.",
                param="input_file_id",
                code="invalid_value",
            )
        batch = await asyncio.to_thread(
            files.add_batch,
            self._engine,
            _whose(caller),
            key_id=caller.key.id if caller.key else "",
            endpoint=asked.endpoint,
            input_file_id=file.id,
            metadata=asked.metadata or {},
            for_s=WINDOW_S,
        )
        self._on_change()
        return _json(_batch(batch))

    async def _list_batches(self, request: Request, caller: Caller) -> Response:
        asked = request.query_params
        limit = _limit(asked, MOST_LISTED)
        after = asked.get("after", "")
        found = await asyncio.to_thread(files.list_batches, self._engine, _whose(caller), after, limit + 1)
        return _json(_list([_batch(batch) for batch in found], limit))

    async def _show_batch(self, request: Request, caller: Caller) -> Response:
        return _json(_batch(await self._find_batch(request, caller)))

    async def _cancel_batch(self, request: Request, caller: Caller) -> Response:
        batch = await self._find_batch(request, caller)
        if batch.status not in UNDER_WAY:
            raise RejectedError(f"This batch is {batch.status} already.", status=409, code="batch_has_ended")
        cancelled = await asyncio.to_thread(files.cancel_batch, self._engine, _whose(caller), batch.id)
        self._on_change()
        return _json(_batch(cancelled or batch))

    async def _find_batch(self, request: Request, caller: Caller) -> Batch:
        batch_id = request.path_params["id"]
        batch = await asyncio.to_thread(files.find_batch, self._engine, batch_id, _whose(caller))
        if not batch:
            raise _not_found("batch", batch_id)
        return batch

    def _with_caller(
        self, answer: Callable[[Request, Caller], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def answered(request: Request) -> Response:
            caller = self._access.caller(request.scope)
            if not caller.key and not (self._nameless and is_local(request.scope)):
                raise RejectedError(
                    "Files and batches need a key, so that nobody else sees them.", status=401, code="invalid_api_key"
                )
            try:
                return await answer(request, caller)
            except (WaterlineError, HTTPException):
                raise
            except ClientDisconnect:
                return Response(status_code=499)
            except OSError as error:  # what comes is put down in a temporary file first
                log.warning("files and batches", error=f"cannot write to {gettempdir()}: {error.strerror}.")
                raise RejectedError(
                    "There is no room here for what you send. Come back later.", status=503, code="no_room"
                ) from None
            except Exception:
                log.exception("a bug in files and batches")
                raise WaterlineError("The service has a bug; its log says where.") from None

        return answered


# --- What is said ---------------------------------------------------------------------------------------------------


def _file(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_us // MEGA,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def _batch(batch: Batch) -> dict[str, Any]:
    moments = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    errors = {"object": "list", "data": list(batch.errors)} if batch.errors else None
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file_id or None,
        "error_file_id": batch.error_file_id or None,
        "created_at": batch.created_us // MEGA,
        "expires_at": batch.expires_us // MEGA,
        **{f"{moment}_at": _seconds(getattr(batch, f"{moment}_us")) for moment in moments},
        "request_counts": {"total": batch.requests, "completed": batch.ok, "failed": batch.not_ok},
        "metadata": batch.metadata or None,
    }


def _seconds(moment_us: int | None) -> int | None:
    return None if moment_us is None else moment_us // MEGA


def _list(found: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Return a page of what was found; one more than the limit says that there are more."""
    shown = found[:limit]
    return {
        "object": "list",
        "data": shown,
        "has_more": len(found) > limit,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }


def _limit(asked: Mapping[str, str], most: int) -> int:
    said = asked.get("limit", "")
    if said and (not said.isdecimal() or not 0 < int(said) <= most):
        raise RejectedError(f"'limit' must be a number from 1 to {most}.", param="limit", code="invalid_value")
    return int(said or min(most, MOST_LISTED))


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _not_found(kind: str, id_: str) -> RejectedError:
    return RejectedError(f"You have no {kind} '{shortened(id_)}'.", status=404, param="id", code=f"{kind}_not_found")


async def _answer_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, WaterlineError)  # noqa: S101 - the handler is registered for it
    if isinstance(error, LedgerError):
        log.warning("ledger", error=str(error))
    headers = {name.decode(): value.decode() for name, value in error_headers(error)}
    return Response(error_json(error), http_status(error), headers, media_type="application/json")


async def _answer_no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    path = shortened(request.url.path)
    said = {404: f"There is nothing at {path}.", 405: f"{path} does not take {request.method}."}
    rejected = RejectedError(
        said.get(error.status_code, f"{error.detail.rstrip('.')}."), status=error.status_code, code="invalid_request"
    )
    return await _answer_error(request, rejected)


# --- What is sent ---------------------------------------------------------------------------------------------------


def _whose(caller: Caller) -> Client:
    return Client(tenant=caller.tenant, client=caller.client)


def _clean(filename: str) -> str:
    """Return a name that can stand in a header."""
    name = "".join(letter if letter.isalnum() or letter in "._- " else "_" for letter in filename)
    return name.encode("ascii", "replace").decode().replace("?", "_")[:200] or "file"


def _bounded(request: Request, most_bytes: int) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
    """Return a `receive` that raises RejectedError when more than that comes, or it comes too slowly."""
    said = request.headers.get("content-length", "0")
    came, begun_s = 0, time.monotonic()

    async def receive() -> MutableMapping[str, Any]:
        nonlocal came
        try:
            async with asyncio.timeout(begun_s + BODY_WITHIN_S + came / SLOWEST_BYTES_PER_S - time.monotonic()):
                message = await request.receive()
        except TimeoutError:
            raise RejectedError(
                f"This comes too slowly: {came:,} bytes in {time.monotonic() - begun_s:.0f} s.",
                status=408,
                code="request_timeout",
            ) from None
        came += len(message.get("body", b""))
        if came > most_bytes or (said.isdecimal() and int(said) > most_bytes):
            raise RejectedError(f"This is more than {most_bytes:,} bytes.", status=413, code="body_too_large")
        return message

    return receive
