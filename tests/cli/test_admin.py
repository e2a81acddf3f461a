"""The admin listener of `waterline up`: where it is, its key, and that it steers the service that was started."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from waterline.cli.admin import open_admin, page_url
from waterline.errors import PortInUseError


@contextmanager
def up(folder: Path) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "waterline", "up", "--engine", "fake", "--port", "0", "--json"]
    environment = {**os.environ, "XDG_STATE_HOME": str(folder)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


def ask(url: str, method: str = "GET", key: str = "", data: bytes | None = None) -> tuple[int, str]:
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    try:
        with urlopen(Request(url, data=data, method=method, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def test_an_operator_watches_and_steers_what_was_started(tmp_path: Path) -> None:
    question = json.dumps(
        {"model": "abacus", "messages": [{"role": "user", "content": "2*3?"}], "max_tokens": 2}
    ).encode()
    with up(tmp_path) as said:
        page, chat = said["dashboard"], said["url"] + "/chat/completions"
        assert ask(page)[1].startswith("<!doctype html>")
        assert ask(f"{said['url'].removesuffix('/v1')}/metrics")[0] == 404, "the API's clients get no metrics"
        path = tmp_path / "waterline" / "laptop" / "admin-key"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        key = path.read_text().strip()
        assert ask(chat, "POST", data=question)[0] == 200
        assert 'waterline_requests_total{model="abacus",status="ok",tenant="public"} 1.0' in ask(f"{page}metrics")[1]
        assert ask(f"{page}admin/replicas/abacus/0/drain", "POST")[0] == 401
        assert ask(f"{page}admin/replicas/abacus/0/drain", "POST", key)[0] == 200
        shown = subprocess.run(
            [sys.executable, "-m", "waterline", "status", "--url", page], capture_output=True, text=True, timeout=60, check=True
        ).stdout  # fmt: skip
        assert "Replicas: 1 draining" in shown
        assert ask(f"{page}admin/replicas/abacus/0/undrain", "POST", key)[0] == 200
        assert ask(chat, "POST", data=question)[0] == 200
        (used,) = json.loads(ask(f"{page}admin/usage", key=key)[1])["usage"]
        assert (used["tenant"], used["model"], used["ok"]) == ("public", "abacus", 2)


def test_its_port_is_the_one_after_the_apis_or_any_that_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        admin, url = open_admin("127.0.0.1", None, port - 1)
        with admin.listening:
            assert admin.listening.getsockname()[1] != port
            assert url == f"http://127.0.0.1:{admin.listening.getsockname()[1]}/"
        with pytest.raises(PortInUseError, match=f"--admin-port {port + 1}"):
            open_admin("127.0.0.1", port, 8000)


def test_its_page_is_named_as_this_machine_reaches_it() -> None:
    assert page_url("0.0.0.0", 8001) == "http://127.0.0.1:8001/"
    assert page_url("::1", 8001) == "http://[::1]:8001/"
    assert page_url("10.0.0.5", 1) == "http://10.0.0.5:1/"
