"""Fetch the few files that describe a model of the Hugging Face Hub; never its weights."""

import json
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from waterline.errors import UnknownNameError, WaterlineError
from waterline.llm.safetensors import INDEX

NOT_FOUND = 404
ANSWER_WITHIN_S = 5.0
INSTEAD = "Give a folder with its config.json, a .gguf file, or a model of the catalogue."


def is_hub_id(name: str) -> bool:
    """Say whether a name has the shape ``organisation/name``."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def fetch_config(name: str) -> Mapping[str, object]:
    """Return the content of `config.json`, with the quantisation of an `hf_quant_config.json` beside it.

    Raises:
        UnknownNameError: `huggingface_hub` is not installed, the Hub cannot be reached, or it has no such model.
    """
    values = _fetch(name, "config.json")
    if values is None:
        raise UnknownNameError(f"'{name}' is on the Hugging Face Hub, but has no config.json. {INSTEAD}")
    if "quantization_config" not in values and "quantization_config" not in _inner(values):
        beside = _fetch(name, "hf_quant_config.json")
        if beside is not None:
            return {**values, "quantization_config": {"quant_method": "modelopt", **beside}}
    return values


def fetch_index(name: str) -> Mapping[str, object] | None:
    """Return the content of `model.safetensors.index.json`; None where the weights are in one file, or not in such.

    Raises:
        UnknownNameError: as `fetch_config`.
    """
    return _fetch(name, INDEX)


def _inner(values: Mapping[str, object]) -> Mapping[str, object]:
    inner = values.get("text_config")
    return inner if isinstance(inner, dict) else {}


def _fetch(name: str, file: str) -> dict[str, object] | None:
    """Return the decoded file; None where the model is there and the file is not.

    One question with a short answer time comes first: the library itself asks six times, for half a minute.
    """
    try:
        library = import_module("huggingface_hub")  # optional, and slow to import
    except ImportError as error:
        raise UnknownNameError(
            f"'{name}' is not in the catalogue, and asking the Hugging Face Hub needs an optional part. "
            f"Install it with: pip install huggingface_hub. {INSTEAD}"
        ) from error
    try:
        path = library.try_to_load_from_cache(name, file)
        if not isinstance(path, str):
            address = library.hf_hub_url(name, file)
            answer = library.get_session().head(
                address, headers=library.utils.build_hf_headers(), timeout=ANSWER_WITHIN_S
            )
            if answer.status_code == NOT_FOUND and answer.headers.get("x-error-code") == "EntryNotFound":
                return None
            path = _downloaded(library.hf_hub_download, name, file, answer.status_code)
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except WaterlineError:
        raise
    except Exception as error:  # each version of the library has its own network errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise _not_fetched(name, reason) from error
    if not isinstance(values, dict):
        raise _not_fetched(name, f"its {file} is not a JSON object")
    return values


def _downloaded(download: Callable[[str, str], str], name: str, file: str, status: int) -> str:
    if status in {401, 403, NOT_FOUND}:
        raise _not_fetched(name, "there is no such model on the Hugging Face Hub, or it is not open to you")
    return download(name, file)


def _not_fetched(name: str, reason: str) -> UnknownNameError:
    return UnknownNameError(f"'{name}' is not in the catalogue, and it could not be fetched: {reason}. {INSTEAD}")
