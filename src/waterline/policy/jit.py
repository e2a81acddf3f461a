"""One decorator for every decision: plain Python for the gateway, machine code for the rehearsal.

A decorated function called from Python runs as it is written, so the gateway needs no compiler. Called from a function
that numba compiles, it is compiled with it. `compiled` gives the machine code to callers in Python, where numba is
installed. numba itself is imported when somebody first asks for that, never before.

Both give the same bits, on any machine, because decisions use nothing but integers, comparisons, + - * / and square
roots, which IEEE 754 rounds in one way only. That is a rule for whoever writes here: no exp, log, power or sum of
NumPy. Arguments are numbers, arrays and named tuples of arrays; plain Python also takes lists for arrays.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import update_wrapper
from hashlib import sha256
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Generic, ParamSpec, TypeVar, cast

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class Decision(Generic[Arguments, Answer]):
    """A function that Python calls as it is, and that numba finds compiled."""

    def __init__(self, function: Callable[Arguments, Answer], *, swift: bool = False) -> None:
        self.plain = function
        self.swift = swift
        self._dispatchers: dict[bool, Any] = {}
        update_wrapper(self, function)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        return self.plain(*args, **kwargs)

    @property
    def dispatcher(self) -> Any:
        """The compiled function as compiled code calls it; kept on disk between runs where that can be written."""
        return self.compiled_for(python=not self.swift and not self.plain.__name__.startswith("_"))

    def compiled_for(self, *, python: bool) -> Any:
        """Return the compiled function, with or without what takes arguments from Python."""
        if python not in self._dispatchers:
            self._dispatchers[python] = _compile_lazily(self.plain, swift=self.swift, python=python)
        return self._dispatchers[python]

    @property
    def _numba_type_(self) -> Any:  # the name by which numba asks an object what it is
        return self.dispatcher._numba_type_


def jit(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """Make a function callable from compiled code as well."""
    return Decision(function)


def swift(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """As `jit`, for what is decided a million times a second: it must allocate nothing, and never divide by 0.

    Compiled, it is put in where it is called, because a call would copy the description of every array; and nobody
    counts references.
    """
    return Decision(function, swift=True)


def compiled(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """Return the compiled form of a decorated function; without numba, the function itself."""
    if not isinstance(function, Decision):
        raise TypeError(f"{function.__name__} is not decorated with waterline.policy.jit.jit. Decorate it, or call it.")
    if find_spec("numba") is None:
        return function.plain
    return cast("Callable[Arguments, Answer]", function.compiled_for(python=True))


def _compile_lazily(function: Callable[..., Any], *, swift: bool, python: bool) -> Any:  # numba has no types
    import numba  # noqa: PLC0415 - the gateway does without

    # Nobody calls these from C. What takes the arguments from Python costs more to compile than most of them.
    options: dict[str, Any] = {"no_cfunc_wrapper": True, "no_cpython_wrapper": not python}
    if swift:
        options |= {"forceinline": True, "_nrt": False, "error_model": "numpy"}
    dispatcher = numba.njit(function, **options)
    with suppress(RuntimeError):  # no place to write to
        dispatcher.enable_caching()
        dispatcher._cache._cache_file._source_stamp = _stamp(function, options)  # noqa: SLF001 - numba looks at one file only
    template = dispatcher.get_call_template

    def without_literals(args: Any, kws: Any) -> Any:
        """Compile once for integers, not once for every constant that is passed."""
        return template(
            tuple(numba.types.unliteral(arg) for arg in args),
            {name: numba.types.unliteral(arg) for name, arg in kws.items()},
        )

    dispatcher.get_call_template = without_literals
    return dispatcher


def _stamp(function: Callable[..., Any], options: dict[str, Any]) -> str:
    """Return a digest of a function and of all it uses: what was compiled of something else must not be found again."""
    digest, seen, pending = sha256(repr(options).encode()), set[int](), [function]
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        code = one.__code__
        digest.update(repr((one.__qualname__, code.co_code, code.co_names, code.co_consts, one.__defaults__)).encode())
        for used in _used(one):
            if isinstance(used, Decision):
                pending.append(used.plain)
            elif isinstance(used, int | float | str | tuple):
                digest.update(repr(used).encode())
    return digest.hexdigest()


def _used(function: Callable[..., Any]) -> Iterator[object]:
    """Yield the globals a function names, and what it names of modules."""
    names = function.__code__.co_names
    for name in names:
        used = function.__globals__.get(name)
        yield used
        if isinstance(used, ModuleType):
            yield from (getattr(used, attribute, None) for attribute in names)
