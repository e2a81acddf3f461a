"""llama.cpp with a GGUF file, in a child process, for as long as a ``with`` block lasts.

A child, because the engine has no way to stop while a request is in flight; a process can always be stopped.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from waterline.errors import EngineError, MissingExtraError
from waterline.training.tokens import CONTEXT

SLOTS: Final = 8  # requests the engine works on at once
THREADS: Final = 1  # threads wait for one another many times a token: on busy cores, several are slower than one


@contextmanager
def serve(weights: Path) -> Iterator[str]:
    """Yield the base URL of the API of an engine that serves `weights` on a free port of this machine."""
    if find_spec("xllamacpp") is None:
        raise MissingExtraError("running the small model in the embedded engine", extra="embedded")
    with tempfile.TemporaryFile() as complaints:
        engine = subprocess.Popen(  # noqa: S603  # our own module, the caller's file
            [sys.executable, "-m", "waterline.training.embedded", str(weights)],
            stdin=subprocess.PIPE,  # never written to: it closes when we end, however we end
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        )
        with engine:  # closes the pipes and waits
            try:
                assert engine.stdout is not None  # noqa: S101  # we asked for a pipe
                address = engine.stdout.readline().strip()
                if not address:
                    engine.wait()
                    complaints.seek(0)
                    last_words = complaints.read().decode(errors="replace").strip().splitlines()[-3:]
                    raise EngineError(f"The embedded engine did not start with {weights}: {' / '.join(last_words)}")
                yield f"{address}/v1"
            finally:
                engine.kill()


def _serve_until_parent_ends(weights: str) -> None:
    import xllamacpp  # noqa: PLC0415  # only the child needs it

    parameters = xllamacpp.CommonParams()
    parameters.model.path = weights
    parameters.model_alias = {"abacus"}
    parameters.n_parallel = SLOTS
    parameters.n_ctx = SLOTS * CONTEXT  # shared out evenly among the slots
    parameters.port = 0
    parameters.cpuparams.n_threads = THREADS
    parameters.cpuparams_batch.n_threads = THREADS
    parameters.cache_ram_mib = 0  # prompts are too short to be worth keeping
    parameters.fit_params = False
    parameters.ui = False
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()  # returns when the parent is gone
    os._exit(0)  # an orderly end would wait for requests in flight


if __name__ == "__main__":
    _serve_until_parent_ends(sys.argv[1])
