"""What the world looks like: accelerators, models, prices, each with its source and the date it was read.

The facts are files beside this one (`gpus.toml`, `models.toml`, `prices.csv`); they are read on first use and kept.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from waterline.catalog import accelerators, hub, llms, naming, price_list
from waterline.catalog.llms import weights_file
from waterline.catalog.price_list import Price, prices
from waterline.errors import ModelFormatError, UnknownNameError
from waterline.hardware import Gpu
from waterline.llm import Llm
from waterline.llm.config import read_config
from waterline.llm.gguf import read_gguf
from waterline.llm.safetensors import INDEX, read_checkpoint, with_index

__all__ = [
    "Price",
    "find_gpu",
    "find_model",
    "gpus",
    "load_model",
    "models",
    "prices",
    "usd_per_gpu_hour",
    "weights_file",
]


def gpus() -> Mapping[str, Gpu]:
    """Return every accelerator by id, NVIDIA and AMD first; `cpu`, a laptop's own processor, is the last."""
    return MappingProxyType(accelerators.table())


def find_gpu(name: str) -> Gpu:
    """Return the accelerator of an id or a name people and drivers use: ``RTX 4090``, ``mi300x``, ``H100 SXM``.

    Raises:
        UnknownNameError: nothing is called so, or several cards are (``h100``); names the nearest or the candidates.
    """
    return accelerators.table()[naming.find_id("GPU", name, accelerators.names(), see="waterline catalog gpus")]


def find_gpus(name: str) -> list[Gpu]:
    """Return every accelerator that a name could mean: all three of ``h100``. Raises UnknownNameError for none."""
    ids = naming.find_ids("GPU", name, accelerators.names(), see="waterline catalog gpus")
    return [accelerators.table()[id_] for id_ in ids]


def models() -> Mapping[str, Llm]:
    """Return every model by id, the organisation included."""
    return MappingProxyType(llms.table())


def find_model(name: str) -> Llm:
    """Return the model of an id or a name people use: ``deepseek-r1``, ``qwen3 32b``.

    Raises:
        UnknownNameError: nothing is called so, or several models are; names the nearest or the candidates.
    """
    return llms.table()[naming.find_id("model", name, llms.names(), see="waterline catalog models")]


@lru_cache(maxsize=256)
def load_model(weights: str, folder: Path) -> Llm:
    """Return the model that a fleet file or a command means by `weights`, whichever comes first.

    A `.gguf` file, or a folder with `config.json` and, where they are there, its safetensors files, relative to
    `folder`; an id or a name of the catalogue; an id of the Hugging Face Hub, of which config and index are fetched
    when `huggingface_hub` is installed and the network answers.

    Raises:
        UnknownNameError: there is no such file and no such model.
        ModelFormatError: the file is there, and is not a model this version can read.
    """
    path = folder / Path(weights).expanduser()
    if weights and _exists(path):
        if path.is_dir() and not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
            path = _only_model(files)
        return read_gguf(path) if path.suffix == ".gguf" else read_checkpoint(path, name=weights)
    if weights.endswith((".gguf", ".json", ".safetensors")) or weights.startswith(("/", "./", "../", "~")):
        raise UnknownNameError(
            f"there is no file {path}. Give a .gguf file, a folder with config.json, or a model's name."
        )
    if not hub.is_hub_id(weights) or naming.called(weights, llms.names()) or _renamed(weights):
        return find_model(_renamed(weights) or weights)
    try:
        llm = read_config(hub.fetch_config(weights), name=weights)
    except UnknownNameError:
        if (again := llms.requantised(weights)) is not None:
            return again
        raise
    return with_index(llm, hub.fetch_index(weights), f"{INDEX} of '{weights}'")


def _only_model(files: list[Path]) -> Path:
    """Return the model of a folder of GGUF files: one, or the parts of one; projectors for images are left aside."""
    models = [file for file in files if not file.name.startswith("mmproj")]
    first = [file for file in models if "-of-" not in file.name or "-00001-of-" in file.name]
    if len(first) != 1:
        raise ModelFormatError(
            f"{files[0].parent} has no config.json and {len(first)} GGUF models"
            f"{': ' + ', '.join(file.name for file in first[:4]) if first else ''}. Name one of them."
        )
    return first[0]


def _renamed(hub_id: str) -> str:
    """Return the one model of the same organisation that goes by that name: its id on the Hub has changed."""
    organisation, _, name = hub_id.partition("/")
    ids = [found for found in naming.called(name, llms.names()) if found.partition("/")[0] == organisation]
    return ids[0] if len(ids) == 1 else ""


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a path, or no path at all
        return False


def usd_per_gpu_hour(gpu_id: str) -> Price | None:
    """Return what an hour of an accelerator costs, with where that comes from, or None where no price is known.

    The median on-demand price; else the community price; else the purchase price over 4 years (35,064 hours) at full
    time, without power and housing. `kind` of the answer says which; `cpu` costs nothing.
    """
    return price_list.hourly(gpu_id)
