"""Runs the code blocks of the documentation as tests.

A ```console block holds commands after ``$`` and what they print. Each command runs in a copy of the examples, and must
print exactly what is shown; a line ``...`` stands for any lines, and figures that depend on the machine are not shown.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

ROOT = Path(__file__).parent
COMMAND = re.compile(r"^\$ (.+(?:\n> .+)*)\n((?:(?!\$ ).*\n?)*)", re.MULTILINE)


def run_console(example: Example) -> None:
    for command, expected in COMMAND.findall(example.parsed + "\n"):
        done = subprocess.run(
            command.replace("\n> ", " "),
            shell=True,
            cwd=example.namespace["folder"],
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        printed = done.stdout + done.stderr
        pattern = r"(?:.*\n)*".join(re.escape(part) for part in re.split(r"(?m)^\.\.\.\n", expected.strip() + "\n"))
        if not re.fullmatch(pattern, printed.strip() + "\n"):
            raise AssertionError(f"$ {command}\nprints\n{printed}\nbut the page shows\n{expected}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a place to run commands in, with the examples beside."""
    place = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", place / "examples")
    yield place


pytest_collect_file = Sybil(
    parsers=[CodeBlockParser(language="console", evaluator=run_console), PythonCodeBlockParser()],
    patterns=["README.md", "docs/*.md"],
    fixtures=["folder"],
).pytest()
