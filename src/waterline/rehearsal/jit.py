"""Compile plain functions with numba where it is installed; without it they run as they are, slower.

What has been compiled is kept in the user's cache directory, in a folder of its own for every state of the sources:
numba itself looks only at the file of a function, not at those of the functions it calls.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from waterline import policy

try:
    import numba
except ImportError:
    numba = None

COMPILED = numba is not None
OWN = ("blocks", "dealing", "entries", "heaps", "jit", "kernel", "leaving", "life", "state", "steptime")
POLICY = ("admission", "decisions", "dispatch", "jit", "routing", "why")
SOURCES = (
    *(Path(__file__).with_name(f"{name}.py") for name in OWN),
    *(Path(policy.__file__).with_name(f"{name}.py") for name in POLICY),
)

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Return the function compiled, when it is first called, or from the cache; itself without numba."""
    return _wrapped(function) if COMPILED else function


def inlined(function: Function) -> Function:
    """Return a part of compiled functions, put in where it is called: a call would copy every array's description."""
    if not COMPILED:
        return function
    # Nobody calls them from Python: what would take the arguments from there costs more to compile than they do.
    return _wrapped(function, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def apart(function: Function) -> Function:
    """Return a part of compiled functions that is seldom called, and then called: that keeps them small."""
    return _wrapped(function, no_cpython_wrapper=True, no_cfunc_wrapper=True) if COMPILED else function


def seen(array: Any) -> Any:
    """Return an array as compiled functions want it: where they are not, single numbers come quicker from a view."""
    return array if COMPILED else memoryview(array)


@contextmanager
def telling(tell: Callable[[], None]) -> Iterator[None]:
    """Within it, `tell` is called once, when something has to be compiled that was not kept from before."""
    if not COMPILED:
        yield
        return
    from numba.core import event  # noqa: PLC0415 - there is one

    class First(event.Listener):  # type: ignore[misc]  # numba has no types
        told = False

        def on_start(self, _event: object) -> None:
            if not self.told:
                self.told = True
                tell()

        def on_end(self, _event: object) -> None: ...

    with event.install_listener("numba:compile", First()):
        yield


def _wrapped(function: Function, **options: Any) -> Function:
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(_folder())  # asked for when a function is wrapped; others keep theirs
    try:
        # Nothing allocates, so no array's references have to be counted (_nrt): that made events 3 times as fast.
        # Other threads may run meanwhile (nogil).
        options = {"cache": True, "nogil": True, "error_model": "numpy", "_nrt": False, **options}
        return cast("Function", numba.njit(**options)(function))
    finally:
        numba.config.CACHE_DIR = before


@cache
def _folder() -> Path:
    state = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:16]
    for base in (_user_cache(), Path(tempfile.gettempdir()) / f"waterline-{os.getuid()}"):
        folder = base / "compiled" / state
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="waterline-"))


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path("~/Library/Caches/waterline").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "waterline"
