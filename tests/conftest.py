"""What the tests share: examples beside them can be imported, and the measured data where it is at hand."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # a test never asks the network


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of measured data that lies beside a developer's checkout; a user's clone has none."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the measured data is not beside this checkout")
    return folder
