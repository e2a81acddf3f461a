"""Read a model from its `config.json`, the file every Hugging Face checkpoint carries.

The reader knows families, not models (`families.py`), and counts every weight from the fields of the file. A family
that is not in the table is refused by name; nothing is guessed. Vision towers and multi-token-prediction layers are
counted apart, or named in the notes as not counted.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from msgspec import structs

from waterline.errors import ModelFormatError
from waterline.llm import AttentionLayers, FeedForwardLayers, Llm
from waterline.llm.families import FAMILIES, WRAPPERS, more_token_parameters
from waterline.llm.family import Family, Sized
from waterline.llm.fields import WHAT_NEXT, Fields
from waterline.llm.quantization import Part, Storage, stored
from waterline.llm.vision import vision_parameters

__all__ = ["FAMILIES", "WRAPPERS", "read_config", "read_json"]

LARGEST_FILE_BYTES = 64 * 2**20  # of an index, which names every tensor
LARGEST_CONFIG_BYTES = 2 * 2**20  # twenty times the largest we have seen
LARGEST_MODEL = 10**15  # parameters; a hundred times the largest anyone has published


def read_config(source: Path | str | Mapping[str, object], name: str) -> Llm:
    """Read the model in a folder with `config.json`, in such a file, or in its decoded content.

    `name` is what the model is called from then on. An `hf_quant_config.json` beside the file is honoured.

    Raises:
        ModelFormatError: no such file, not JSON, a field that is missing or has the wrong type, a family or a
            quantisation that is not known; names the file, the field and its value.
    """
    if isinstance(source, Mapping):
        return _llm(source, name, f"the config of '{name}'")
    path = Path(source)
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise ModelFormatError(
                f"{path.parent} has no config.json. Give the folder of a checkpoint, or a .gguf file."
            )
    values = read_json(path, most_bytes=LARGEST_CONFIG_BYTES)
    beside = path.with_name("hf_quant_config.json")
    if "quantization_config" not in values and beside.is_file():
        values = {**values, "quantization_config": {"quant_method": "modelopt", **read_json(beside)}}
    return _llm(values, name, str(path))


def read_json(path: Path, *, most_bytes: int = LARGEST_FILE_BYTES) -> dict[str, object]:
    """Return the JSON object in a file.

    Raises:
        ModelFormatError: it cannot be read, is larger than such a file can be, or holds something else.
    """
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise ModelFormatError(
                f"{path} has {size:,} bytes, at most {most_bytes:,} are read: this is no config. Fetch the file again."
            )
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is not valid JSON: {error}. Fetch the file again.") from error
    if not isinstance(values, dict):
        raise ModelFormatError(f"{path} holds a JSON {type(values).__name__}, where an object with fields is expected.")
    return values


INHERITED = ("tie_word_embeddings", "torch_dtype", "dtype", "quantization_config")
"""What a `text_config` may leave to the config around it."""


def _llm(values: Mapping[str, object], name: str, where: str) -> Llm:
    outer = Fields(values, where)
    text, prefix = values, ""
    if values.get("text_config") is not None:
        if outer.text("model_type") not in WRAPPERS:
            raise _unknown_family(outer, WRAPPERS)
        text, prefix = {"model_type": values["model_type"], **outer.mapping("text_config")}, "text_config."
    inherited = {key: values[key] for key in INHERITED if key in values}
    fields = Fields(text, where, outer=inherited, prefix=prefix)
    model_type = fields.text("model_type")
    family = FAMILIES.get(model_type)
    if family is None:
        raise _unknown_family(fields, FAMILIES)
    fields = Fields(text, where, outer=inherited, defaults=family.defaults, aliases=family.aliases, prefix=prefix)
    for key, why in {"is_encoder_decoder": "encoders are not counted", **family.refused}.items():
        if fields.get(key):
            raise fields.wrong(key, f"absent, 0 or false: {why}. {WHAT_NEXT}")
    return _with_vision(_counted(fields, family, name, model_type), outer)


def _unknown_family(fields: Fields, known: Iterable[str]) -> ModelFormatError:
    value = fields.text("model_type")
    return ModelFormatError(
        f'{fields.where}: {fields.prefix}model_type = "{value:.60}" is a family that is not known '
        f"({', '.join(known)}). {WHAT_NEXT}"
    )


def _counted(fields: Fields, family: Family, name: str, model_type: str) -> Llm:
    hidden, vocabulary = fields.count("hidden_size"), fields.count("vocab_size")
    tied = fields.flag("tie_word_embeddings")
    attention = list(family.attention(fields, family))
    feed_forward = list(family.feed_forward(fields, family))
    parts = _parts(vocabulary * hidden, attention, feed_forward, tied=tied)
    beside = hidden + (family.beside_layers(fields) if family.beside_layers is not None else 0)  # the last norm
    parameters = sum(part.parameters for part in parts.values()) + beside
    if parameters > LARGEST_MODEL:
        raise ModelFormatError(
            f"{fields.where} describes {parameters:.3g} parameters, more than any model has: hidden_size = {hidden:,}, "
            f"vocab_size = {vocabulary:,}, {sum(one.group.layers for one in attention):,} layers. Fetch the file again."
        )
    resting = sum(
        network.group.layers * (network.group.experts - network.group.experts_per_token) * network.expert_parameters
        for network in feed_forward
    )
    storage = stored(fields, parts)
    more_layers, more_parameters = more_token_parameters(fields, family, attention, feed_forward)
    return Llm(
        name=name,
        architecture=model_type,
        parameters=parameters,
        active_parameters=parameters - resting,
        hidden=hidden,
        vocabulary=vocabulary,
        max_context_tokens=fields.count("max_position_embeddings"),
        precision=storage.precision,
        attention=tuple(mixer.group for mixer in attention),
        feed_forward=tuple(network.group for network in feed_forward),
        tied_embeddings=tied,
        mtp_layers=more_layers,
        mtp_parameters=more_parameters,
        stored_forms=storage.forms,
        stored_bytes=storage.stored_bytes,
        source=fields.where,
        notes=_notes(storage, family, more_layers, more_parameters),
    )


def _parts(
    embedding: int,
    attention: Sequence[Sized[AttentionLayers]],
    feed_forward: Sequence[Sized[FeedForwardLayers]],
    *,
    tied: bool,
) -> dict[str, Part]:
    """Return what is stored alike: parameters, and the layers they are in (dense networks come first)."""
    layers = sum(mixer.group.layers for mixer in attention)
    dense = sum(network.group.layers for network in feed_forward if not network.group.experts)
    sparse = sum(network.group.layers for network in feed_forward if network.group.experts)
    counts = dict.fromkeys(("dense", "shared", "experts", "other"), 0)
    for network in feed_forward:
        group = network.group
        counts["shared"] += group.layers * network.shared_parameters
        counts["other" if group.experts else "dense"] += group.layers * (network.parameters - network.shared_parameters)
        counts["experts"] += group.layers * group.experts * network.expert_parameters
    found = {
        "embedding": Part(embedding, range(1)),
        "head": Part(0 if tied else embedding, range(1)),
        "attention": Part(sum(mixer.group.layers * mixer.parameters for mixer in attention), range(layers)),
        "dense": Part(counts["dense"], range(dense)),
        "shared": Part(counts["shared"], range(dense, dense + sparse)),
        "experts": Part(counts["experts"], range(dense, dense + sparse)),
        "other": Part(counts["other"], range(1)),
    }
    return {key: part for key, part in found.items() if part.parameters}


def _notes(storage: Storage, family: Family, more_layers: int, more_parameters: int) -> dict[str, str]:
    notes = {**storage.notes, **family.notes}
    if more_layers and not more_parameters:
        notes["mtp"] = f"{more_layers} multi-token-prediction layers are not counted"
    return notes


def _with_vision(llm: Llm, fields: Fields) -> Llm:
    if fields.get("audio_config") is not None:
        llm = structs.replace(llm, notes={**llm.notes, "audio": "the audio tower is not counted"})
    tower = vision_parameters(fields, llm.hidden)
    if tower is None:
        return structs.replace(llm, notes={**llm.notes, "vision": "the vision tower is not counted"})
    return structs.replace(
        llm,
        parameters=llm.parameters + tower.beside,
        active_parameters=llm.active_parameters + tower.beside,
        vision_parameters=tower.parameters,
        stored_bytes=llm.stored_bytes + (2 * (tower.parameters + tower.beside) if llm.stored_bytes else 0),
    )
