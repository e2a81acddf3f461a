"""The formats weights are stored in, and what a parameter costs in each."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bits a parameter takes on disk and on the card, scales included, and the arithmetic that runs it.

    `compute` lists the rates of a card this format can use, best first; the first one the card has is taken, and the
    format cannot run on a card that has none of them. Weight-only formats compute in 16 bits.
    """

    name: str
    bits: float
    compute: tuple[str, ...]
    keeps_embeddings: bool = True  # embedding and output head stay in 16 bits
    gguf: bool = False  # a llama.cpp format: served by llama.cpp only


SIXTEEN_BIT = ("bf16", "fp16", "fp32")

GGUF_BITS = {
    "q8_0": 8.5,
    "q6_k": 6.5633,
    "q5_1": 6.0,
    "q5_k_m": 5.7036,
    "q5_k_s": 5.5704,
    "q5_0": 5.5,
    "q4_1": 5.0,
    "q4_k_m": 4.8944,
    "iq4_nl": 4.6818,
    "q4_k_s": 4.6672,
    "q4_0": 4.5,
    "iq4_xs": 4.4597,
    "q3_k_l": 4.2979,
    "q3_k_m": 3.9960,
    "iq3_m": 3.7628,
    "iq3_s": 3.6606,
    "q3_k_s": 3.6429,
    "iq3_xs": 3.4977,
    "iq3_xxs": 3.2548,
    "q2_k": 3.1593,
    "q2_k_s": 2.9697,
    "iq2_m": 2.9294,
    "iq2_s": 2.7403,
    "iq2_xs": 2.5882,
    "iq2_xxs": 2.3824,
    "iq1_m": 2.1460,
    "tq2_0": 2.0625,
    "iq1_s": 2.0042,
    "tq1_0": 1.6875,
}
"""Bits a parameter of llama.cpp's formats. q8_0, q5_x, q4_x and tqx_0 are those of the block; a mix keeps some tensors
in more bits, so its figure is that of the whole file of Llama 3.1 8B (llama.cpp `tools/quantize/README.md`, read
2026-11-23). `waterline.llm.gguf_sizes` has the bytes of a given model.
"""

PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(name="fp32", bits=32, compute=("fp32",)),
        Precision(name="bf16", bits=16, compute=SIXTEEN_BIT),
        Precision(name="fp16", bits=16, compute=("fp16", "bf16", "fp32")),
        Precision(name="fp8", bits=8, compute=("fp8",)),
        Precision(name="int8", bits=8, compute=("int8", *SIXTEEN_BIT)),
        Precision(name="int4", bits=4.25, compute=SIXTEEN_BIT),  # group 128: a 16-bit scale and a 4-bit zero point
        Precision(name="nf4", bits=4.5, compute=SIXTEEN_BIT),  # bitsandbytes: a 32-bit scale for 64 elements
        Precision(name="nvfp4", bits=4.5, compute=("fp4", *SIXTEEN_BIT)),  # an fp8 scale for 16 elements
        Precision(name="mxfp4", bits=4.25, compute=("fp4", *SIXTEEN_BIT)),  # an 8-bit exponent for 32 elements
        *(
            Precision(name=name, bits=bits, compute=SIXTEEN_BIT, keeps_embeddings=False, gguf=True)
            for name, bits in GGUF_BITS.items()
        ),
    )
}
