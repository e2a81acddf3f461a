"""What the vision tower of a model weighs, with the projector that leads into the language model.

Towers are counted as transformers 5.23 builds them. Those not listed in `TOWERS` are named in the model's notes, not
counted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from waterline.llm.family import MOST_LAYERS
from waterline.llm.fields import Fields

__all__ = ["TOWERS", "Tower", "vision_parameters"]


@dataclass(frozen=True, slots=True)
class Tower:
    parameters: int
    beside: int = 0  # of a projector that the published count gives to the language model


def _plain_block(hidden: int, intermediate: int) -> int:
    """Return a layer of a transformer with biases: attention, a network of two matrices, two norms."""
    attention = 4 * (hidden * hidden + hidden)
    return attention + 2 * hidden * intermediate + intermediate + hidden + 4 * hidden


def _qwen3(fields: Fields, _text_hidden: int) -> Tower:
    """Return the tower of Qwen3-VL and Qwen3.5, with its mergers."""
    hidden, intermediate = fields.count("hidden_size"), fields.count("intermediate_size")
    merged, out = hidden * fields.count("spatial_merge_size") ** 2, fields.count("out_hidden_size")
    deepstack = fields.get("deepstack_visual_indexes") or []
    if not isinstance(deepstack, list):
        raise fields.wrong("deepstack_visual_indexes", "a list of layer numbers")
    patch = fields.count("in_channels") * fields.count("temporal_patch_size") * fields.count("patch_size") ** 2
    merger = merged * merged + merged + merged * out + out
    return Tower(
        patch * hidden
        + hidden
        + fields.count("num_position_embeddings") * hidden
        + fields.count("depth", most=MOST_LAYERS) * _plain_block(hidden, intermediate)
        + merger
        + 2 * hidden
        + len(deepstack) * (merger + 2 * merged)
    )


def _siglip(fields: Fields, text_hidden: int) -> Tower:
    """Return the SigLIP tower of Gemma 3; its projector is one matrix and a norm."""
    hidden, patch = fields.count("hidden_size"), fields.count("patch_size")
    positions = (fields.count("image_size") // patch) ** 2
    return Tower(
        3 * patch * patch * hidden
        + hidden
        + positions * hidden
        + fields.count("num_hidden_layers", most=MOST_LAYERS) * _plain_block(hidden, fields.count("intermediate_size"))
        + 2 * hidden
        + hidden
        + hidden * text_hidden
    )


def _gemma4(fields: Fields, text_hidden: int) -> Tower:
    hidden, heads, keys = (fields.count(key) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head_dim = fields.count("head_dim")
    block = 2 * hidden * (heads + keys) * head_dim + 3 * hidden * fields.count("intermediate_size")
    block += 4 * hidden + 2 * head_dim
    return Tower(
        3 * fields.count("patch_size") ** 2 * hidden
        + 2 * fields.count("position_embedding_size") * hidden
        + fields.count("num_hidden_layers", most=MOST_LAYERS) * block
        + hidden * text_hidden
    )


def _moonvit(fields: Fields, text_hidden: int) -> Tower:
    """Return MoonViT of Kimi K2.5 and its projector, which merges patches first."""
    hidden, intermediate = fields.count("vt_hidden_size"), fields.count("vt_intermediate_size")
    patch = fields.count("patch_size")
    merge = fields.numbers("merge_kernel_size", 2)
    merged = hidden * merge[0] * merge[1]
    positions = fields.count("init_pos_emb_height") * fields.count("init_pos_emb_width")
    projector = 2 * hidden + merged * merged + merged + merged * text_hidden + text_hidden
    return Tower(
        3 * patch * patch * hidden
        + hidden
        + positions * hidden
        + fields.count("vt_num_hidden_layers", most=MOST_LAYERS) * _plain_block(hidden, intermediate)
        + 2 * hidden,
        beside=projector,
    )


STEP_TOWER = {
    "hidden_size": 1536,
    "num_hidden_layers": 47,
    "patch_size": 14,
    "image_size": 728,
    "mlp_ratio": 8960 / 1536,
}
"""What the code of Step 3.7 fills in for absent fields."""


def _step(fields: Fields, text_hidden: int) -> Tower:
    """Return the tower of Step 3.7: layers with scales, then two convolutions that halve each side."""
    hidden, patch = fields.count("hidden_size"), fields.count("patch_size")
    intermediate = int(hidden * fields.ratio("mlp_ratio"))
    positions = (fields.count("image_size") // patch) ** 2
    layers = fields.count("num_hidden_layers", most=MOST_LAYERS)
    halving = 9 * hidden * 2 * hidden + 2 * hidden + 9 * 2 * hidden * 4 * hidden + 4 * hidden
    return Tower(
        3 * patch * patch * hidden
        + positions * hidden
        + 2 * hidden
        + layers * (_plain_block(hidden, intermediate) + 2 * hidden)
        + halving
        + 4 * hidden * text_hidden
    )


TOWERS: Mapping[str, Callable[[Fields, int], Tower]] = {
    "qwen3_5": _qwen3,
    "qwen3_5_moe": _qwen3,
    "qwen3_vl": _qwen3,
    "qwen3_vl_moe": _qwen3,
    "gemma3": _siglip,
    "gemma4": _gemma4,
    "kimi_k25": _moonvit,
    "step3p7": _step,
}
"""`model_type` of the whole config -> how its `vision_config` is counted."""
DEFAULTS: Mapping[str, Mapping[str, object]] = {"step3p7": STEP_TOWER}
ALIASES = {"hidden_size": "width", "num_hidden_layers": "layers"}
WITHOUT_CONFIG = ("step3p7",)  # the tower is there even where the config does not mention it


def vision_parameters(fields: Fields, text_hidden: int) -> Tower | None:
    """Return the parameters of the tower a config has; 0 without one, None where it cannot be counted."""
    model_type = fields.text("model_type")
    if fields.get("vision_config") is None and model_type not in WITHOUT_CONFIG:
        return Tower(0)
    if model_type not in TOWERS:
        return None
    values = {} if fields.get("vision_config") is None else fields.mapping("vision_config")
    defaults = DEFAULTS.get(model_type, MappingProxyType({}))
    tower = Fields(values, fields.where, defaults=defaults, aliases=ALIASES, prefix=f"{fields.prefix}vision_config.")
    return TOWERS[model_type](tower, text_hidden)
