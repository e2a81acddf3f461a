"""What a person may hand to an engine: every flag but those of `owned_flags.toml`, which Waterline sets itself."""

from collections.abc import Sequence
from functools import cache
from importlib import resources

import msgspec
from msgspec import Struct

from waterline.errors import InputError

PARSERS = ("--reasoning-parser", "--tool-call-parser")  # of vLLM and SGLang alike; see `catalog.parsers`


class Owned(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Flags of each engine that are Waterline's for one reason."""

    why: str
    vllm: tuple[str, ...]
    sglang: tuple[str, ...]
    llamacpp: tuple[str, ...] = ()


class _File(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    owned: tuple[Owned, ...]


TAKE_ARGUMENTS = ("vllm", "sglang", "llamacpp")


@cache
def owned_flags(engine: str) -> dict[str, str]:
    """Return each flag of an engine that Waterline owns, and why."""
    text = resources.files("waterline.catalog").joinpath("owned_flags.toml").read_bytes()
    return {flag: group.why for group in msgspec.toml.decode(text, type=_File).owned for flag in getattr(group, engine)}


def flag_of(word: str) -> str:
    """Return the name of the flag that a word of a command line is, in full spelling; "" where it is none.

    ``--max_model_len=9`` is ``--max-model-len``, ``--no-headless`` is ``--headless``, and a key of a flag that takes
    JSON, ``--speculative-config.model``, is the flag.
    """
    name = word.partition("=")[0].partition(".")[0].replace("_", "-")
    if not name.startswith("-") or not name.lstrip("-")[:1].isalpha():
        return ""
    return f"--{name.removeprefix('--no-')}" if name.startswith("--no-") else name


def check_arguments(engine: str, arguments: Sequence[str]) -> None:
    """Raise InputError for arguments that are Waterline's to give, or that no engine would understand."""
    if not arguments:
        return
    if engine not in TAKE_ARGUMENTS:
        raise InputError(
            f"the engine '{engine}' is handed no arguments; {', '.join(TAKE_ARGUMENTS)} are. Leave the key out."
        )
    if not flag_of(arguments[0]):
        raise InputError(f"'{arguments[0]}' is no flag. Begin with one, as in [\"--trust-remote-code\"].")
    for word in arguments:
        flag = flag_of(word)
        if " " in flag:
            parts = ", ".join(f'"{part}"' for part in word.split(None, 1))
            raise InputError(f"'{word}' is two words. Write them one by one: [{parts}].")
        if flag and (owned := _owned_by(engine, flag)):
            same = "" if owned == flag else f" (it means {owned})"
            raise InputError(
                f"'{word}'{same} is not yours to give: {owned_flags(engine)[owned]}. Leave it out of engine_arguments."
            )
    if flag_of(arguments[-1]) in PARSERS and "=" not in arguments[-1]:
        raise InputError(f"'{arguments[-1]}' has no value. Write its name behind it, or \"\" for none.")


def _owned_by(engine: str, flag: str) -> str:
    """Return the owned flag that an engine takes a flag for.

    Those of vLLM and SGLang take the beginning of a name for the name, and what follows one letter for its value.
    """
    owned = owned_flags(engine)
    if flag in owned or engine == "llamacpp":
        return flag if flag in owned else ""
    if len(flag) == 2 or flag.startswith("--"):
        return next((one for one in owned if one.startswith(flag)), "")
    return flag[:2] if flag[:2] in owned else ""
