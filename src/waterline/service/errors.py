"""Errors as OpenAI's clients expect them: the one place where the tree of errors becomes JSON and a status."""

import math
from collections.abc import Mapping

import orjson

from waterline.errors import LedgerError, WaterlineError

LONGEST_BODY_BYTES = 16 * 2**20  # a prompt of a million tokens, or some pictures
LONGEST_NAME = 60  # characters of what somebody sent that are said back
LEDGER_AWAY = (
    "The ledger does not answer, and nothing begins that it does not know. Come back in a moment."  # not where
)
LEDGER_AGAIN_S = 5
LONGEST_RETRY_S = 60  # many of OpenAI's clients wait no longer: told of more, they ask again in a moment, in vain
DO_NOT_RETRY = {"x-should-retry": "false"}  # so they do not, unasked

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RejectedError(WaterlineError):
    """A request that is answered with an error, and everything OpenAI's clients want to know about it."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}


def shortened(name: str) -> str:
    """Return a name as a message may repeat it."""
    return name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "…"


def retry_after(seconds: float) -> dict[str, str]:
    """Say when to come back: HTTP wants whole seconds, and 0 would mean now."""
    again = {"retry-after": str(max(1, math.ceil(seconds)))}
    return again | DO_NOT_RETRY if seconds > LONGEST_RETRY_S else again


def http_status(error: WaterlineError) -> int:
    return error.status if isinstance(error, RejectedError) else error.http_status


def error_headers(error: WaterlineError) -> list[tuple[bytes, bytes]]:
    if isinstance(error, LedgerError):
        headers: Mapping[str, str] = retry_after(LEDGER_AGAIN_S)
    else:
        headers = error.headers if isinstance(error, RejectedError) else {}
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def error_json(error: WaterlineError) -> bytes:
    status = http_status(error)
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param, code = (error.param, error.code) if isinstance(error, RejectedError) else (None, kind)
    message = LEDGER_AWAY if isinstance(error, LedgerError) else str(error)
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})
