"""Read a model from its `config.json`, the file every Hugging Face checkpoint carries.

The reader knows families, not models (`families.py`), and counts every weight from the fields of the file. A family
that is not in the table is refused by name; nothing is guessed. Vision towers are counted apart; multi-token-prediction
layers are not counted.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec import structs

from waterline.errors import ModelFormatError
from waterline.llm import Llm
from waterline.llm.families import FAMILIES, MOST_LAYERS, WRAPPERS, Family
from waterline.llm.fields import WHAT_NEXT, Fields
from waterline.llm.quantization import stored_precision

__all__ = ["FAMILIES", "WRAPPERS", "read_config"]


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
    values = _read_object(path)
    beside = path.with_name("hf_quant_config.json")
    if "quantization_config" not in values and beside.is_file():
        values = {**values, "quantization_config": {"quant_method": "modelopt", **_read_object(beside)}}
    return _llm(values, name, str(path))


def _read_object(path: Path) -> dict[str, object]:
    try:
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
    fields = Fields(text, where, outer=inherited, defaults=family.defaults, prefix=prefix)
    llm = _counted(fields, family, name, model_type)
    return _with_vision(llm, outer)


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
    always = vocabulary * hidden * (1 if tied else 2) + hidden  # embedding, output head, last norm
    always += sum(mixer.group.layers * mixer.parameters for mixer in attention)
    experts = passed = 0
    for network in feed_forward:
        always += network.group.layers * network.parameters
        experts += network.group.layers * network.group.experts * network.expert_parameters
        passed += network.group.layers * network.group.experts_per_token * network.expert_parameters
    precision, notes = stored_precision(fields)
    return Llm(
        name=name,
        architecture=model_type,
        parameters=always + experts,
        active_parameters=always + passed,
        hidden=hidden,
        vocabulary=vocabulary,
        max_context_tokens=fields.count("max_position_embeddings"),
        precision=precision,
        attention=tuple(mixer.group for mixer in attention),
        feed_forward=tuple(network.group for network in feed_forward),
        tied_embeddings=tied,
        source=fields.where,
        notes=notes,
    )


def _with_vision(llm: Llm, fields: Fields) -> Llm:
    if fields.get("vision_config") is None:
        return llm
    if fields.text("model_type") in QWEN_VISION:
        return structs.replace(llm, vision_parameters=_vision_parameters(fields.inner("vision_config")))
    return structs.replace(llm, notes={**llm.notes, "vision": "the vision tower is not counted"})


QWEN_VISION = ("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe")


def _vision_parameters(fields: Fields) -> int:
    """Return the size of the vision tower of Qwen3-VL and Qwen3.5, with its mergers."""
    hidden, intermediate = fields.count("hidden_size"), fields.count("intermediate_size")
    merged, out = hidden * fields.count("spatial_merge_size") ** 2, fields.count("out_hidden_size")
    deepstack = fields.get("deepstack_visual_indexes") or []
    if not isinstance(deepstack, list):
        raise fields.wrong("deepstack_visual_indexes", "a list of layer numbers")
    patch = fields.count("in_channels") * fields.count("temporal_patch_size") * fields.count("patch_size") ** 2
    block = 4 * hidden * hidden + 4 * hidden + 2 * hidden * intermediate + intermediate + hidden + 4 * hidden
    merger = merged * merged + merged + merged * out + out
    return (
        patch * hidden
        + hidden
        + fields.count("num_position_embeddings") * hidden
        + fields.count("depth", most=MOST_LAYERS) * block
        + merger
        + 2 * hidden
        + len(deepstack) * (merger + 2 * merged)
    )
