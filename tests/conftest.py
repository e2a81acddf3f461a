"""What the tests share: examples beside them can be imported, and the measured data where it is at hand."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # a test never asks the network


# Time is measured in benchmarks/, never by a test: a busy machine must not fail one.
settings.register_profile("waterline", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("waterline")


@pytest.fixture(scope="session", autouse=True)
def state_home() -> Iterator[None]:
    """Let services keep what they keep in a directory of this run, not in that of the person who tests."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["XDG_STATE_HOME"] = folder
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of measured data that lies beside a developer's checkout; a user's clone has none."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the measured data is not beside this checkout")
    return folder
