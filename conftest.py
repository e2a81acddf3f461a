"""Runs the code blocks of the documentation as tests.

A ``console`` block holds commands after ``$`` and what they print. Each runs in a copy of the examples and must print
what is shown: a line ``...`` stands for any lines, a ``…`` for anything within one. A ``python`` block runs as it is.
Blocks that speak to 127.0.0.1:8000 find a real `waterline up` there, on another port so that yours is left alone.
"""

import atexit
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).parent
COMMAND = re.compile(r"^\$ (.+(?:\n> .+)*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
ADDRESS = "127.0.0.1:8000"
STATE = tempfile.mkdtemp(prefix="waterline-docs-")  # what services keep does not go to the person who tests
atexit.register(shutil.rmtree, STATE, ignore_errors=True)
# What is printed is as wide as where nobody says how wide: workers of pytest-xdist are given the width of a terminal.
os.environ.pop("COLUMNS", None)
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "NO_COLOR": "1",
    "XDG_STATE_HOME": STATE,
}


def run_console(example: Example) -> None:
    for command, expected in COMMAND.findall(str(example.parsed).rstrip("\n") + "\n"):
        printed = run_command(command, example.namespace["folder"], example.namespace["at_server"])
        if not shown_by(expected, printed):
            raise AssertionError(f"$ {command}\nprints\n{printed}\nbut the page shows\n{expected}")


def run_command(command: str, folder: Path, at_server: Callable[[str], str]) -> str:
    done = subprocess.run(
        at_server(command.replace("\\\n> ", "")),
        shell=True,
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return "".join(line.rstrip() + "\n" for line in (done.stdout + done.stderr).strip().splitlines())


def shown_by(expected: str, printed: str) -> bool:
    any_lines = re.split(r"(?m)^\.\.\.\n", "".join(line.rstrip() + "\n" for line in expected.strip().splitlines()))
    pattern = "(?:.*\n)*".join(".*".join(map(re.escape, part.split("…"))) for part in any_lines)
    return re.fullmatch(pattern, printed) is not None


def run_python(example: Example) -> None:
    code = example.namespace["at_server"](textwrap.dedent(str(example.parsed)))
    where = Path.cwd()
    os.chdir(example.namespace["folder"])
    try:
        exec(compile(code, str(example.path), "exec"), example.namespace)
    finally:
        os.chdir(where)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a place to run commands in, with the examples beside."""
    place = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", place / "examples")
    return place


@pytest.fixture(scope="session")
def at_server() -> Iterator[Callable[[str], str]]:
    """Return a function that starts `waterline up` for text that speaks to it, and puts the real address in."""
    running: list[tuple[subprocess.Popen[bytes], str]] = []

    def with_address(text: str) -> str:
        if ADDRESS not in text:
            return text
        if not running:
            running.append(start_server())
        return text.replace(ADDRESS, running[0][1])

    yield with_address
    for process, _ in running:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=10)


def start_server() -> tuple["subprocess.Popen[bytes]", str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "waterline", "up", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    for line in process.stdout:  # it says a curl line when it is ready
        if b"curl" in line:
            break
    else:
        raise RuntimeError(f"waterline up ended with {process.wait()}")
    return process, f"127.0.0.1:{port}"


pytest_collect_file = Sybil(
    parsers=[
        CodeBlockParser(language="console", evaluator=run_console),
        CodeBlockParser(language="python", evaluator=run_python),
    ],
    patterns=["README.md", "docs/*.md"],
    fixtures=["folder", "at_server"],
).pytest()
