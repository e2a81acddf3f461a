"""In which forms a checkpoint stores its weights, from its config: one form for each part of the model.

A form is a key of `PRECISIONS`, or ``fp8_block``: fp8 with a scale for a block of weights (DeepSeek's 128 x 128), which
other kernels multiply than fp8 with a scale for a tensor or a channel.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate

from waterline.llm.fields import WHAT_NEXT, Fields
from waterline.llm.precision import PRECISIONS

__all__ = ["LINEAR_PARTS", "PARTS", "Part", "Storage", "stored"]

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
METHODS = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "modelopt_fp4": "nvfp4",
}
"""`quant_method` -> form, where the name says it all."""
ALGORITHMS = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "FP8_PB_WO": "fp8_block",
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "NVFP4_AWQ": "nvfp4",
    "MXFP4": "mxfp4",
    "W4A16_AWQ": "int4",
    "W4A16": "int4",
    "W4A8_AWQ": "int4",
    "W8A16": "int8",
    "W8A8": "int8",
    "W8A8_SQ_PER_CHANNEL": "int8",
    "INT8_SQ": "int8",
}
"""`quant_algo` of NVIDIA's model optimizer -> form."""
MIXED_ALGORITHM = "MIXED_PRECISION"
QUARK_TYPES = {
    "fp8_e4m3": "fp8",
    "fp4": "mxfp4",
    "int8": "int8",
    "uint8": "int8",
    "int4": "int4",
    "uint4": "int4",
}
"""`dtype` of weights of AMD's Quark -> form."""
INTEGER_BITS = {4: "int4", 8: "int8"}
COMPRESSED = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8"}
SCALE_BITS = {"int4": 16, "int8": 16, "fp8_block": 32}
DOUBLY_QUANTISED_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # bitsandbytes: the scales themselves in 8 bits

PARTS = ("embedding", "head", "attention", "dense", "shared", "experts", "other")  # other: routers, always in 16 bits
LINEAR_PARTS = ("attention", "dense", "shared", "experts")
MODULES = {
    "attention": ("self_attn.q_proj", "self_attn.q_b_proj", "self_attn.o_proj", "linear_attn.out_proj", "mixer.q_proj"),
    "dense": ("mlp.gate_proj", "mlp.down_proj", "mixer.up_proj"),
    "shared": ("mlp.shared_experts.gate_proj", "mlp.shared_expert.gate_proj", "mixer.shared_experts.up_proj"),
    "experts": ("mlp.experts.0.gate_proj", "block_sparse_moe.experts.0.w1", "mixer.experts.0.up_proj"),
}
"""What checkpoints call a typical matrix of each part, within its layer."""
STACKS = ("model.layers", "model.language_model.layers", "language_model.model.layers", "backbone.layers")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a model: its parameters, and the numbers of the layers it is in."""

    parameters: int
    layers: range


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How the weights of a checkpoint are stored."""

    precision: str  # a key of PRECISIONS: of most weights
    forms: Mapping[str, str] = field(default_factory=dict)  # part -> form; empty where nothing is quantised
    stored_bytes: int = 0  # of the language model, where the precision alone does not give them; else 0
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Form:
    name: str
    bits: float

    @property
    def precision(self) -> str:
        return "fp8" if self.name == "fp8_block" else self.name


class _Names:
    """A list of modules as checkpoints write it: names, parts of names, shell patterns, ``re:`` expressions."""

    def __init__(self, fields: Fields, key: str, names: Iterable[object]) -> None:
        self._plain: set[str] = set()
        patterns = []
        for name in names:
            if not isinstance(name, str) or len(name) > 1000:
                raise fields.wrong(key, "a list of names of modules")
            if name.startswith("re:"):
                patterns.append(name[3:])
            elif "*" in name or "?" in name:
                patterns.append(translate(name))
            else:
                self._plain.add(name)
        try:
            self._pattern = re.compile("|".join(f"(?:{one})" for one in patterns)) if patterns else None
        except (re.error, OverflowError, RecursionError) as error:
            raise fields.wrong(key, f"made of names and valid expressions ({error})") from error

    def hold(self, name: str) -> bool:
        if self._pattern is not None and self._pattern.match(name):
            return True
        words = name.split(".")
        runs = (".".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1))
        return any(run in self._plain for run in runs)

    def hold_part(self, part: str, layer: int) -> bool:
        return any(self.hold(name) for name in _modules(part, layer))


def _modules(part: str, layer: int) -> list[str]:
    if part == "head":
        return ["lm_head", "language_model.lm_head"]
    return [f"{stack}.{layer}.{module}" for module in MODULES[part] for stack in STACKS]


def stored(fields: Fields, parts: Mapping[str, Part]) -> Storage:
    """Return the forms the weights are stored in; `parts` has those of PARTS that the model has."""
    if fields.get("quantization_config") is None:
        precision, notes = _dtype(fields)
        return Storage(precision=precision, notes=notes)
    forms = {part: _of_part(quantised, parts[part]) for part, quantised in _forms(fields, parts).items()}
    plain = _Form("bf16", 16.0)
    mixes = {part: forms.get(part, {plain: 1.0}) for part in parts}
    weighed: Counter[str] = Counter()
    for part in LINEAR_PARTS:
        for form, share in mixes.get(part, {}).items():
            weighed[form.precision] += round(parts[part].parameters * share)
    precision = weighed.most_common(1)[0][0] if weighed else "bf16"
    names = {part: max(mix, key=lambda form: mix[form]).name for part, mix in mixes.items() if part != "other"}
    return Storage(
        precision=precision,
        forms=names,
        stored_bytes=0 if _as_the_precision_says(mixes, parts, precision) else _bytes(mixes, parts),
        notes=_remarks(names, precision),
    )


def _bytes(mixes: Mapping[str, Mapping[_Form, float]], parts: Mapping[str, Part]) -> int:
    bits = sum(part.parameters * share * form.bits for key, part in parts.items() for form, share in mixes[key].items())
    return round(bits / 8)


def _as_the_precision_says(
    mixes: Mapping[str, Mapping[_Form, float]], parts: Mapping[str, Part], precision: str
) -> bool:
    """Say whether all matrices are in one form, of about the bits its precision has; embedding and head in 16."""
    plain = PRECISIONS[precision]
    expected = sum(part.parameters * (plain.bits if key in LINEAR_PARTS else 16.0) / 8 for key, part in parts.items())
    return abs(_bytes(mixes, parts) / expected - 1) < 0.01


def _remarks(forms: Mapping[str, str], precision: str) -> dict[str, str]:
    others = {part: form for part, form in forms.items() if part in LINEAR_PARTS}
    if len(set(others.values())) < 2:
        return {}
    said = ", ".join(f"{part} {form}" for part, form in others.items())
    return {"precision": f"mixed, mostly {precision}: {said}; embedding and head {forms.get('head', 'bf16')}"}


def _dtype(fields: Fields) -> tuple[str, dict[str, str]]:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    if fields.get(key) is None:
        return "bf16", {"precision": "the config names no dtype: taken as bf16"}
    dtype = fields.text(key).removeprefix("torch.")
    if dtype not in DTYPES:
        raise fields.wrong(key, "one of " + ", ".join(DTYPES))
    return DTYPES[dtype], {}


# --- what a quantisation says of each part ----------------------------------------------------------------------------

Layered = Mapping[int, _Form]
"""Layer -> its form, for the layers of a part that are quantised."""


def _of_part(quantised: Layered, part: Part) -> dict[_Form, float]:
    """Return form -> the share of the part's layers it has, those left in 16 bits included."""
    plain = _Form("bf16", 16.0)
    counted = Counter(quantised.get(layer, plain) for layer in part.layers)
    return {form: count / len(part.layers) for form, count in counted.items()}


def _forms(outer: Fields, parts: Mapping[str, Part]) -> dict[str, Layered]:
    fields = outer.inner("quantization_config")
    method = fields.text("quant_method")
    if method == "compressed-tensors":
        return _compressed(fields, parts)
    if method == "modelopt":
        return _modelopt(fields, parts)
    if method == "mxfp4":  # of routed experts only; transformers leaves everything else as it is
        only = {part: parts[part] for part in ("experts",) if part in parts} or _linear(parts)
        return _everywhere(_plain_form("mxfp4"), only, _left_out(fields))
    form = _one_form(fields, method)
    forms = _everywhere(form, _linear(parts), _left_out(fields))
    if outer.get("expert_dtype") is not None and "experts" in parts:  # DeepSeek-V4
        if outer.text("expert_dtype") not in {"fp4", "fp8"}:
            raise outer.wrong("expert_dtype", f"fp4 or fp8. {WHAT_NEXT}")
        if outer.text("expert_dtype") == "fp4":
            forms["experts"] = dict.fromkeys(parts["experts"].layers, _plain_form("mxfp4"))
    return forms


def _linear(parts: Mapping[str, Part]) -> dict[str, Part]:
    return {key: part for key, part in parts.items() if key in LINEAR_PARTS}


def _plain_form(name: str) -> _Form:
    return _Form(name, PRECISIONS[name].bits)


def _everywhere(form: _Form, parts: Mapping[str, Part], left_out: _Names) -> dict[str, Layered]:
    return {
        key: {layer: form for layer in part.layers if not left_out.hold_part(key, layer)} for key, part in parts.items()
    }


LEFT_OUT = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "llm_int8_skip_modules", "exclude")


def _left_out(fields: Fields) -> _Names:
    names: list[object] = []
    key = LEFT_OUT[0]
    for key in LEFT_OUT:
        listed = fields.get(key)
        if listed is None:
            continue
        if not isinstance(listed, list):
            raise fields.wrong(key, "a list of names of modules")
        names += listed
    if fields.get("dynamic"):  # GPTQModel: "-:" leaves modules out, "+:" gives them other bits
        for pattern in fields.mapping("dynamic"):
            if not pattern.startswith("-:"):
                raise fields.wrong(
                    "dynamic", f"made of '-:' patterns; other bits for some modules are not read. {WHAT_NEXT}"
                )
            names.append("re:" + pattern[2:])
    return _Names(fields, key, names)


def _one_form(fields: Fields, method: str) -> _Form:
    """Return the form of a method that has one for all matrices."""
    if method in METHODS:
        if METHODS[method] == "fp8" and fields.get("weight_block_size") is not None:
            return _block(fields, "weight_block_size")
        return _plain_form(METHODS[method])
    if method in {"awq", "gptq", "auto-round"}:
        bits = fields.count("bits")
        if bits not in INTEGER_BITS:
            raise fields.wrong("bits", f"4 or 8 for {method}. {WHAT_NEXT}")
        zeros = fields.flag("zero_point") or (method != "awq" and not fields.flag("sym", default=True))
        return _grouped_integers(bits, fields.get("group_size"), zeros=zeros or method == "gptq")
    if method == "bitsandbytes":
        if not fields.flag("load_in_4bit"):
            return _plain_form("int8")
        doubly = fields.flag("bnb_4bit_use_double_quant")
        return _Form("nf4", DOUBLY_QUANTISED_NF4_BITS) if doubly else _plain_form("nf4")
    if method == "quark":
        weight = fields.inner("global_quant_config").inner("weight")
        dtype = weight.text("dtype")
        if dtype not in QUARK_TYPES:
            raise weight.wrong("dtype", f"one of {', '.join(QUARK_TYPES)}. {WHAT_NEXT}")
        return _plain_form(QUARK_TYPES[dtype])
    known = (*METHODS, "awq", "gptq", "auto-round", "bitsandbytes", "modelopt", "compressed-tensors", "quark")
    raise fields.wrong("quant_method", f"one of {', '.join(known)}. {WHAT_NEXT}")


def _block(fields: Fields, key: str) -> _Form:
    block = fields.numbers(key, 2)
    if 0 in block:
        raise fields.wrong(key, "two lengths above 0")
    return _Form("fp8_block", 8 + SCALE_BITS["fp8_block"] / (block[0] * block[1]))


def _grouped_integers(bits: int, group_size: object, *, zeros: bool) -> _Form:
    """Return integers with a 16-bit scale for each group, and a zero point of as many bits as a weight."""
    if not isinstance(group_size, int) or group_size <= 0:  # -1: a scale a channel
        return _Form(INTEGER_BITS[bits], float(bits))
    return _Form(INTEGER_BITS[bits], bits + (SCALE_BITS["int4"] + (bits if zeros else 0)) / group_size)


def _modelopt(outer: Fields, parts: Mapping[str, Part]) -> dict[str, Layered]:
    fields = outer.inner("quantization") if outer.get("quantization") is not None else outer
    algorithm = fields.text("quant_algo").upper()
    if algorithm == MIXED_ALGORITHM:
        return _listed(fields, parts)
    if algorithm not in ALGORITHMS:
        raise fields.wrong("quant_algo", "one of " + ", ".join((*ALGORITHMS, MIXED_ALGORITHM)))
    return _everywhere(_algorithm_form(ALGORITHMS[algorithm]), _linear(parts), _left_out(fields))


def _algorithm_form(name: str) -> _Form:
    return _Form("fp8_block", 8 + SCALE_BITS["fp8_block"] / 128**2) if name == "fp8_block" else _plain_form(name)


def _listed(fields: Fields, parts: Mapping[str, Part]) -> dict[str, Layered]:
    """Return the forms where `quantized_layers` gives each module its own."""
    listed = fields.inner("quantized_layers")
    by_form: dict[str, list[object]] = {}
    for name in fields.mapping("quantized_layers"):
        algorithm = listed.inner(name).text("quant_algo").upper()
        if algorithm not in ALGORITHMS:
            raise listed.inner(name).wrong("quant_algo", "one of " + ", ".join(ALGORITHMS))
        by_form.setdefault(ALGORITHMS[algorithm], []).append(name)
    forms: dict[str, dict[int, _Form]] = {}
    for name, modules in by_form.items():
        held = _Names(fields, "quantized_layers", modules)
        for key, part in _linear(parts).items():
            for layer in part.layers:
                if held.hold_part(key, layer):
                    forms.setdefault(key, {})[layer] = _algorithm_form(name)
    return {key: dict(layers) for key, layers in forms.items()}


def _compressed(fields: Fields, parts: Mapping[str, Part]) -> dict[str, Layered]:
    groups, left_out = fields.inner("config_groups"), _left_out(fields)
    forms: dict[str, dict[int, _Form]] = {}
    if not fields.mapping("config_groups"):
        raise fields.wrong("config_groups", f"one group of weights at least; found none. {WHAT_NEXT}")
    for key in fields.mapping("config_groups"):
        group = groups.inner(key)
        form = _compressed_form(group, fields)
        targets = group.get("targets") or ["Linear"]
        if not isinstance(targets, list):
            raise group.wrong("targets", "a list of names of modules")
        all_of_them = "Linear" in targets
        held = _Names(group, "targets", targets)
        for part_key, part in _linear(parts).items():
            for layer in part.layers:
                if left_out.hold_part(part_key, layer) or not (all_of_them or held.hold_part(part_key, layer)):
                    continue
                if not all_of_them or layer not in forms.get(part_key, {}):  # a name is stronger than a class
                    forms.setdefault(part_key, {})[layer] = form
    return {key: dict(layers) for key, layers in forms.items()}


def _compressed_form(group: Fields, fields: Fields) -> _Form:
    weights = group.inner("weights")
    bits, kind = weights.count("num_bits"), weights.text("type", "int")
    layout = group.text("format", fields.text("format", ""))
    if (kind, bits) == ("float", 4):
        return _plain_form("mxfp4" if "mxfp4" in layout or weights.get("group_size") == 32 else "nvfp4")
    if (kind, bits) not in COMPRESSED:
        raise weights.wrong("num_bits", f"4 or 8 for weights of type {kind}. {WHAT_NEXT}")
    if kind == "int":
        return _grouped_integers(bits, weights.get("group_size"), zeros=not weights.flag("symmetric", default=True))
    if weights.text("strategy", "") == "block" and weights.get("block_structure") is not None:
        return _block(weights, "block_structure")
    return _plain_form("fp8")
