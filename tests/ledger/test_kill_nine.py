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
        [sys.executable, SCRIPT, "--kills", "5", *url], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "5 kills: " in done.stdout
    assert ", none charged twice" in done.stdout


def test_a_service_that_is_killed_under_load_has_charged_what_its_clients_saw() -> None:
    script = SCRIPT.with_name("kill_gateway.py")
    done = subprocess.run(
        [sys.executable, script, "--kills", "2"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 kills: " in done.stdout
    assert "None is missing, none charged twice" in done.stdout
