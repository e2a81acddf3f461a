import pytest

from waterline.training.embedded import serve
from waterline.training.evaluate import SHIPPED_WEIGHTS


@pytest.fixture(scope="session")
def abacus_url():
    """Base URL of the API that serves the shipped weights in the embedded engine."""
    pytest.importorskip("xllamacpp", reason="needs the extra waterline-llm[embedded]")
    with serve(SHIPPED_WEIGHTS) as base_url:
        yield base_url
