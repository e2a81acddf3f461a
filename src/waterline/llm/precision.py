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

PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(name="fp32", bits=32, compute=("fp32",)),
        Precision(name="bf16", bits=16, compute=SIXTEEN_BIT),
        Precision(name="fp16", bits=16, compute=("fp16", "bf16", "fp32")),
        Precision(name="fp8", bits=8, compute=("fp8",)),
        Precision(name="int8", bits=8, compute=("int8", *SIXTEEN_BIT)),
        Precision(name="int4", bits=4.25, compute=SIXTEEN_BIT),  # group 128: a 16-bit scale and a 4-bit zero point
        Precision(name="nvfp4", bits=4.5, compute=("fp4", *SIXTEEN_BIT)),  # an fp8 scale for 16 elements
        Precision(name="mxfp4", bits=4.25, compute=("fp4", *SIXTEEN_BIT)),  # an 8-bit exponent for 32 elements
        Precision(name="q8_0", bits=8.5, compute=SIXTEEN_BIT, keeps_embeddings=False, gguf=True),
        Precision(name="q4_0", bits=4.5, compute=SIXTEEN_BIT, keeps_embeddings=False, gguf=True),
        Precision(name="q4_k_m", bits=4.84, compute=SIXTEEN_BIT, keeps_embeddings=False, gguf=True),
    )
}
