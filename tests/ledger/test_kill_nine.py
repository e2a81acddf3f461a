"""The script that kills writers at random points, on few of them; benchmarks/kill_nine.py runs 500."""

import subprocess
import sys
from pathlib import Path

import pytest
from asking import new_database

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_nine.py"


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_nothing_acknowledged_is_lost_or_charged_twice_through_kill_nine(
    database: str, request: pytest.FixtureRequest
) -> None:
    url = [] if database == "sqlite" else ["--url", new_database(request.getfixturevalue("postgres"))]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "6", *url], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "6 kills: " in done.stdout
    assert ", none charged twice" in done.stdout
