"""The listener for operators of `waterline up`: where it listens, what is served there, and its key."""

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import waterline

if TYPE_CHECKING:
    import socket

    from waterline.service.asgi import App
    from waterline.service.operator import Operator
    from waterline.service.server import AdminListener


def open_admin(host: str, port: int | None, api_port: int) -> "tuple[AdminListener, str]":
    """Take a port for operators; return what `serve` needs and the URL of the page.

    Args:
        host: to listen on.
        port: of the listener; None takes the one after the API's, or any where that is taken.
        api_port: where the API listens.
    """
    from waterline.dashboard import Access, is_loopback, make_app
    from waterline.service.server import AdminListener

    listening = _listen(host, port, api_port)
    here = is_loopback(host)

    def app(operator: "Operator", folder: Path) -> "App":
        return make_app(operator, Access(_key(folder, needed=not here), host), version=waterline.__version__)

    return AdminListener(listening=listening, app=app), page_url(host, listening.getsockname()[1])


def page_url(host: str, port: int) -> str:
    """Return where this machine finds the page."""
    named = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - all networks, and what reaches them
    return f"http://[{named}]:{port}/" if ":" in named else f"http://{named}:{port}/"


def _listen(host: str, port: int | None, api_port: int) -> "socket.socket":
    from waterline.errors import PortInUseError
    from waterline.service.server import listen

    if port is not None:
        return listen(host, port, option="--admin-port")
    try:
        return listen(host, api_port + 1 if api_port < 65535 else 0)
    except PortInUseError:
        return listen(host, 0)


def _key(folder: Path, *, needed: bool) -> str:
    from waterline.dashboard import admin_key
    from waterline.errors import InputError
    from waterline.snapshot import KEY_VARIABLE

    try:
        return admin_key(folder)
    except InputError:
        if needed or os.environ.get(KEY_VARIABLE):
            raise
        return secrets.token_urlsafe(32)  # nobody knows it: who is on this machine still sees the page
