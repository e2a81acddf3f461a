"""A ledger in each database we promise: SQLite in a file, and a PostgreSQL that is started for the tests."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `asking`
DEBIAN = Path("/usr/lib/postgresql")
NOBODY = "nobody"  # PostgreSQL refuses to be run by root


def _programs() -> Path | None:
    """Return the folder of PostgreSQL's programs: Debian keeps those of the server off the PATH."""
    versions = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: float(path.parent.parent.name))
    found = versions[-1] if versions else shutil.which("initdb")
    return Path(found).parent if found else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Return the URL of a PostgreSQL of our own: in a temporary folder, on a free port, gone at the end."""
    pytest.importorskip("psycopg")
    programs = _programs()
    if not programs:
        pytest.skip("no PostgreSQL server is installed: apt-get install postgresql")
    root = os.geteuid() == 0
    user = {"user": NOBODY, "group": "nogroup", "extra_groups": []} if root else {}
    place = Path("/tmp") / f"waterline-postgres-{secrets.token_hex(4)}"  # short: a socket's path holds 107 letters
    place.mkdir(mode=0o700)
    if root:
        shutil.chown(place, NOBODY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        start = [programs / "initdb", "-D", place / "data", "-U", "waterline", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run([*start, "--no-instructions"], check=True, capture_output=True, cwd=place, **user)
        server = subprocess.Popen(
            [
                programs / "postgres",
                "-D",
                place / "data",
                "-p",
                str(port),
                "-h",
                "127.0.0.1",
                "-k",
                place,
                "-F",
            ],  # -F: no fsync
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=place,
            **user,
        )
        try:
            _wait_for(programs, port, server)
            yield f"postgresql://waterline@127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGQUIT)  # at once: nobody needs what is in it
            server.wait(timeout=20)
    finally:
        shutil.rmtree(place)


def _wait_for(programs: Path, port: int, server: "subprocess.Popen[bytes]") -> None:
    for _ in range(200):
        ready = subprocess.run([programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)], check=False)
        if ready.returncode == 0:
            return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError("the PostgreSQL of the tests does not start")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return where a ledger of its own is for each test, in each database."""
    if request.param == "sqlite":
        return str(tmp_path / "ledger.db")
    from asking import new_database  # noqa: PLC0415 - beside this file, which makes it importable

    return new_database(request.getfixturevalue("postgres"))
