"""In which precision a checkpoint stores its weights, from its config."""

from waterline.llm.fields import WHAT_NEXT, Fields

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
METHODS = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "modelopt_fp4": "nvfp4",
}
"""`quant_method` -> precision, where the name says it all."""
ALGORITHMS = {
    "FP8": "fp8",
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "W4A16_AWQ": "int4",
    "W4A16": "int4",
    "W8A8": "int8",
}
"""`quant_algo` of NVIDIA's model optimizer -> precision."""
INTEGER_BITS = {4: "int4", 8: "int8"}
COMPRESSED = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8"}


def stored_precision(fields: Fields) -> tuple[str, dict[str, str]]:
    """Return the precision the weights are stored in, and remarks on it."""
    if fields.get("quantization_config") is not None:
        return _quantised(fields.inner("quantization_config")), {}
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    if fields.get(key) is None:
        return "bf16", {"precision": "the config names no dtype: taken as bf16"}
    dtype = fields.text(key).removeprefix("torch.")
    if dtype not in DTYPES:
        raise fields.wrong(key, "one of " + ", ".join(DTYPES))
    return DTYPES[dtype], {}


def _quantised(fields: Fields) -> str:
    method = fields.text("quant_method")
    if method in METHODS:
        return METHODS[method]
    if method in {"awq", "gptq", "auto-round"}:
        bits = fields.count("bits")
        if bits not in INTEGER_BITS:
            raise fields.wrong("bits", f"4 or 8 for {method}. {WHAT_NEXT}")
        return INTEGER_BITS[bits]
    if method == "bitsandbytes":
        return "nf4" if fields.flag("load_in_4bit") else "int8"
    if method == "modelopt":
        holder = fields.inner("quantization") if fields.get("quantization") is not None else fields
        algorithm = holder.text("quant_algo").upper()
        if algorithm not in ALGORITHMS:
            raise holder.wrong("quant_algo", "one of " + ", ".join(ALGORITHMS))
        return ALGORITHMS[algorithm]
    if method == "compressed-tensors":
        return _compressed(fields)
    known = (*METHODS, "awq", "gptq", "auto-round", "bitsandbytes", "modelopt", "compressed-tensors")
    raise fields.wrong("quant_method", f"one of {', '.join(known)}. {WHAT_NEXT}")


def _compressed(fields: Fields) -> str:
    found = set()
    groups = fields.inner("config_groups")
    for key in fields.mapping("config_groups"):
        group = groups.inner(key)
        weights = group.inner("weights")
        bits, kind = weights.count("num_bits"), weights.text("type", "int")
        layout = group.text("format", fields.text("format", ""))
        if (kind, bits) == ("float", 4):
            found.add("mxfp4" if "mxfp4" in layout else "nvfp4")
        elif (kind, bits) in COMPRESSED:
            found.add(COMPRESSED[kind, bits])
        else:
            raise weights.wrong("num_bits", f"4 or 8 for weights of type {kind}. {WHAT_NEXT}")
    if len(found) != 1:
        raise fields.wrong(
            "config_groups", f"of one precision; found {', '.join(sorted(found)) or 'none'}. {WHAT_NEXT}"
        )
    return found.pop()
