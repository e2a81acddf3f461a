"""Who may see and do what on the listener for operators.

Somebody on this machine sees totals without a key: fleet, tenants, models, replicas, metrics. Everybody else, and
everything that names a client or changes something, needs the admin key: `Authorization: Bearer KEY`, or as the
password of any user name, which browsers ask for. What changes something takes a bearer only, because a browser sends
a password along with the forms of strangers.

On this machine means: the listener is bound to loopback, the request names it so, and no proxy passed it on. So a web
page that makes a browser here ask 127.0.0.1 by another name (DNS rebinding) sees nothing, and neither does the world
behind a TLS front.
"""

import base64
import binascii
import hmac
import ipaddress
import os
import secrets
from pathlib import Path

from starlette.requests import Request

from waterline.errors import InputError, WaterlineError
from waterline.snapshot import KEY_VARIABLE

KEY_FILE = "admin-key"
SHORTEST_KEY = 16
PASSED_ON = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


class NoAccessError(WaterlineError):
    """The key is missing or wrong."""

    http_status = 401


def admin_key(folder: Path) -> str:
    """Return the admin key: of the environment, else of the file in that folder, which is made when it is not there.

    Raises InputError when it is too short to be one, or the file cannot be read or written.
    """
    if key := os.environ.get(KEY_VARIABLE, ""):
        return _long_enough(key, f"the variable {KEY_VARIABLE}")
    path = folder / KEY_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return _long_enough(path.read_text(encoding="utf-8").strip(), str(path))
        try:
            with os.fdopen(file, "w", encoding="utf-8") as written:
                written.write("wl-admin-" + secrets.token_urlsafe(32) + "\n")
        except OSError:  # the disk is full, and half a key is none
            path.unlink()
            raise
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot keep the admin key in {path}: {error}. Or set {KEY_VARIABLE}.") from error


def _long_enough(key: str, where: str) -> str:
    if len(key) < SHORTEST_KEY:
        raise InputError(
            f"{where} holds an admin key of {len(key)} characters; it must have {SHORTEST_KEY} at least. "
            "Try: openssl rand -hex 32"
        )
    return key


def is_loopback(host: str) -> bool:
    """Say whether a host, as it is bound or asked for, is this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Access:
    """The rules above, for one listener.

    Args:
        key: the admin key.
        bound_to: the host the listener is bound to.
    """

    def __init__(self, key: str, bound_to: str) -> None:
        self._key = key.encode()
        self._here = is_loopback(bound_to)

    def check_look(self, request: Request) -> None:
        """Raise NoAccessError unless this request may see totals."""
        if not (self._here and _names_this_machine(request)) and not self._has_key(request):
            raise NoAccessError("From elsewhere the admin key is needed, as a password or as Authorization: Bearer.")

    def check_key(self, request: Request) -> None:
        """Raise NoAccessError unless this request has the key."""
        if not self._has_key(request):
            raise NoAccessError("This needs the admin key, as Authorization: Bearer KEY.")

    def check_change(self, request: Request) -> None:
        """Raise NoAccessError unless this request may change something."""
        if not self._matches(_bearer(request)):
            raise NoAccessError("What changes something needs the admin key, as Authorization: Bearer KEY.")

    def _has_key(self, request: Request) -> bool:
        return self._matches(_bearer(request)) or self._matches(_password(request))

    def _matches(self, key: str) -> bool:
        return hmac.compare_digest(key.encode(), self._key)


def _names_this_machine(request: Request) -> bool:
    name = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
    return is_loopback(name) and not any(header in request.headers for header in PASSED_ON)


def _bearer(request: Request) -> str:
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _password(request: Request) -> str:
    kind, _, said = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return ""
    try:
        return base64.b64decode(said, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
