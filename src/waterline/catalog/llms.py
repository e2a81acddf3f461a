"""`models.toml` and the small model that ships in the package, as models by id."""

import re
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path

import msgspec

from waterline.catalog import naming
from waterline.errors import UnknownNameError
from waterline.llm import Llm
from waterline.llm.gguf import read_gguf

BLOCK_SCALED = {"Qwen", "deepseek-ai", "MiniMaxAI", "zai-org", "moonshotai"}
REQUANTISED = {  # how names end -> precision
    "fp8": "fp8", "nvfp4": "nvfp4", "fp4": "nvfp4", "mxfp4": "mxfp4", "awq": "int4", "awq-int4": "int4",
    "gptq-int4": "int4", "int4": "int4", "gptq-int8": "int8", "int8": "int8", "quantized.w8a8": "int8",
    "quantized.w4a16": "int4", "bf16": "bf16",
}  # fmt: skip
SHIPPED = {"waterline/abacus": "abacus-*.gguf"}


@cache
def table() -> dict[str, Llm]:
    """Return every model of the catalogue by id; the shipped ones are described by their own files."""
    models = {
        id_: msgspec.convert({**entry, "name": id_, "read": str(entry["read"])}, Llm)
        for id_, (entry, _) in _entries().items()
    }
    for id_ in SHIPPED:
        if (path := _shipped(id_)) is not None:
            llm = read_gguf(path)
            models[id_] = msgspec.structs.replace(llm, name=id_, source="shipped with Waterline")
    return models


@cache
def names() -> dict[str, tuple[str, ...]]:
    """Return for every id the names its model goes by, with and without the organisation; its own bare one is last."""
    spelled = {id_: (*aliases, id_) for id_, (_, aliases) in _entries().items()}
    spelled |= {id_: (id_,) for id_ in SHIPPED if id_ in table()}
    return {id_: (*others, *(one.rpartition("/")[2] for one in others)) for id_, others in spelled.items()}


def requantised(name: str) -> Llm | None:
    """Return a model of the catalogue as somebody has published it again in another precision, told by its name.

    ``nvidia/Llama-3.1-8B-Instruct-FP8`` is the catalogue's Llama with 8-bit weights. Those who train in fp8 keep a
    scale for each block of weights, the others one for each tensor.
    """
    organisation, _, bare = name.partition("/")
    for ending, precision in REQUANTISED.items():
        base = re.sub(rf"[-_.]{ending}(-dynamic|-kv)?$", "", bare, flags=re.IGNORECASE)
        if base == bare:
            continue
        found = naming.called(base, names())
        if not found:
            return None
        llm = table()[found[0]]
        blocks = precision == "fp8" and organisation in BLOCK_SCALED
        parts = dict.fromkeys(("attention", "dense", "shared", "experts"), "fp8_block" if blocks else precision)
        return msgspec.structs.replace(
            llm,
            name=name,
            precision=precision,
            stored_bytes=0,
            stored_types={},
            stored_forms={"embedding": "bf16", "head": "bf16", **parts} if blocks else {},
            notes={"architecture": f"that of {llm.name}, quantised to {precision} as its name says"},
        )
    return None


def weights_file(name: str) -> Path:
    """Return the GGUF file of a shipped model.

    Raises:
        UnknownNameError: no model of this name is shipped.
    """
    id_ = next((id_ for id_ in SHIPPED if name.lower() in {id_, id_.rpartition("/")[2]}), "")
    path = _shipped(id_) if id_ else None
    if path is None:
        raise UnknownNameError(f"no weights of '{name}' ship with Waterline; those of {', '.join(SHIPPED)} do.")
    return path


def _shipped(id_: str) -> Path | None:
    folder = Path(str(resources.files("waterline.catalog"))) / "weights"
    return next(iter(sorted(folder.glob(SHIPPED[id_]))), None)


@cache
def _entries() -> dict[str, tuple[dict[str, object], tuple[str, ...]]]:
    text = resources.files("waterline.catalog").joinpath("models.toml").read_text(encoding="utf-8")
    return {id_: (entry, tuple(entry.pop("aliases", ()))) for id_, entry in tomllib.loads(text)["model"].items()}
