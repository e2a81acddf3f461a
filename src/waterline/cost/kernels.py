"""How long the kernels of one layer take on one GPU: matrix products, attention, experts, exchange between GPUs.

Every argument that is a number may be an array; all broadcast. Every result is in seconds and never below what the
card's datasheet allows: bytes moved over its bandwidth, operations over its peak.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from waterline.errors import UnknownNameError, nearest
from waterline.hardware import Gpu, Link
from waterline.llm.precision import PRECISIONS, SIXTEEN_BIT

Seconds = NDArray[np.float64]

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")
OUTPUT_BYTES = 2  # results are written in 16 bits whatever the inputs
LAUNCH_S = 2.5e-6  # no kernel is faster, however little it does
MEMORY_EFFICIENCY = 0.8
COMPUTE_EFFICIENCY = 0.7
HOP_S = 4e-6  # one exchange between two GPUs that says nothing


@dataclass(frozen=True, slots=True)
class Form:
    """How the operands of a matrix product are kept and multiplied."""

    name: str
    weight_bytes: float  # an element
    input_bytes: float
    compute: tuple[str, ...]  # rates of a card it can use, best first


@lru_cache(maxsize=256)
def _form(name: str, rates: frozenset[str]) -> Form:
    """Return the form as a card with these rates runs it: without units of its own it is unpacked to 16 bits."""
    if name == "fp8_block":
        fp8 = "fp8" in rates
        return Form(name, 1 + 4 / 128**2, 1 if fp8 else 2, ("fp8",) if fp8 else SIXTEEN_BIT)
    if name not in PRECISIONS:
        raise UnknownNameError(f"No format is called '{name}'. {nearest(name, [*PRECISIONS, 'fp8_block'])}")
    precision = PRECISIONS[name]
    own = tuple(rate for rate in precision.compute if rate in rates)
    compute = own or tuple(rate for rate in SIXTEEN_BIT if rate in rates) or tuple(sorted(rates))
    weight_bytes = precision.bits / 8
    return Form(name, weight_bytes, weight_bytes if compute[0] not in SIXTEEN_BIT else 2.0, compute)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of one card.

    `source` is the card whose measurements shape the curves; `provenance` says whether that is this very card
    ("measured") or one of its class, scaled by this card's own peaks ("transferred").
    """

    gpu: Gpu
    source: str
    provenance: str

    def gemm_s(self, tokens: ArrayLike, outputs: ArrayLike, inputs: ArrayLike, form: str) -> Seconds:
        """Return the time of (tokens x inputs) · (inputs x outputs)."""
        m, n, k = _floats(tokens, outputs, inputs)
        kept = self._form(form)
        moved = kept.weight_bytes * n * k + kept.input_bytes * m * k + OUTPUT_BYTES * m * n
        return self._roofline(moved, 2 * m * n * k, kept)

    def prefill_attention_s(
        self,
        requests: ArrayLike,
        new_tokens: ArrayLike,
        cached_tokens: ArrayLike,
        query_heads: ArrayLike,
        kv_heads: ArrayLike,
        head_dim: ArrayLike,
        window_tokens: ArrayLike = 0,
        cache: str = "bf16",
    ) -> Seconds:
        """Return the time of attention for `new_tokens` prompt tokens of each request, `cached_tokens` before them."""
        b, new, old, heads, kv, dim, window = _floats(
            requests, new_tokens, cached_tokens, query_heads, kv_heads, head_dim, window_tokens
        )
        pairs = _pairs(new, old, window)
        read = np.where(window > 0, np.minimum(old, window), old) + new
        moved = b * dim * (2 * OUTPUT_BYTES * heads * new + 2 * kv * read * self._cache_bytes(cache))
        return self._roofline(moved, 4 * b * heads * dim * pairs, self._form("bf16"))

    def decode_attention_s(
        self,
        requests: ArrayLike,
        context_tokens: ArrayLike,
        query_heads: ArrayLike,
        kv_heads: ArrayLike,
        head_dim: ArrayLike,
        window_tokens: ArrayLike = 0,
        cache: str = "bf16",
    ) -> Seconds:
        """Return the time of attention for one new token of each request against `context_tokens` in the cache."""
        b, context, heads, kv, dim, window = _floats(
            requests, context_tokens, query_heads, kv_heads, head_dim, window_tokens
        )
        read = np.where(window > 0, np.minimum(context, window), context) + 1
        moved = b * dim * (2 * OUTPUT_BYTES * heads + 2 * kv * read * self._cache_bytes(cache))
        return self._roofline(moved, 4 * b * heads * dim * read, self._form("bf16"))

    def latent_prefill_s(
        self,
        requests: ArrayLike,
        new_tokens: ArrayLike,
        cached_tokens: ArrayLike,
        heads: ArrayLike,
        form: str,
        *,
        hidden: ArrayLike = 7168,
        q_lora: ArrayLike = 1536,
        latent: ArrayLike = 512,
        rope: ArrayLike = 64,
        head_dim: ArrayLike = 128,
        value_head_dim: ArrayLike = 128,
        cache: str = "bf16",
    ) -> Seconds:
        """Return the time of a whole MLA module reading a prompt, projections included; `heads` are this GPU's own."""
        b, new, old, heads, hidden, q_lora, latent, rope, dim, value = _floats(
            requests, new_tokens, cached_tokens, heads, hidden, q_lora, latent, rope, head_dim, value_head_dim
        )
        took = self._latent_projections_s(b * new, heads, hidden, q_lora, latent, rope, dim, value, form)
        # Keys and values are unpacked from the latents of every token attended to.
        took = took + self.gemm_s(b * (new + old), heads * (dim + value), latent, form)
        moved = OUTPUT_BYTES * b * heads * (2 * new + old) * (dim + rope + value)
        moved = moved + self._cache_bytes(cache) * b * (new + old) * (latent + rope)
        flops = 2 * b * heads * (dim + rope + value) * _pairs(new, old, np.zeros_like(new))
        return took + self._roofline(moved, flops, self._form("bf16"))

    def latent_decode_s(
        self,
        requests: ArrayLike,
        context_tokens: ArrayLike,
        heads: ArrayLike,
        form: str,
        *,
        hidden: ArrayLike = 7168,
        q_lora: ArrayLike = 1536,
        latent: ArrayLike = 512,
        rope: ArrayLike = 64,
        head_dim: ArrayLike = 128,
        value_head_dim: ArrayLike = 128,
        cache: str = "bf16",
    ) -> Seconds:
        """Return the time of a whole MLA module for one new token of each request, projections included."""
        b, context, heads, hidden, q_lora, latent, rope, dim, value = _floats(
            requests, context_tokens, heads, hidden, q_lora, latent, rope, head_dim, value_head_dim
        )
        took = self._latent_projections_s(b, heads, hidden, q_lora, latent, rope, dim, value, form)
        # Queries go into the latent space and results out of it, so the cache is read as it is, once for all heads.
        took = took + self._roofline(
            OUTPUT_BYTES * heads * latent * (dim + value), 2 * b * heads * latent * (dim + value), self._form("bf16")
        )
        moved = b * (self._cache_bytes(cache) * (latent + rope) * (context + 1) + OUTPUT_BYTES * heads * latent * 2)
        flops = 2 * b * heads * (2 * latent + rope) * (context + 1)
        return took + self._roofline(moved, flops, self._form("bf16"))

    def experts_s(
        self,
        tokens: ArrayLike,
        hidden: ArrayLike,
        intermediate: ArrayLike,
        experts_per_token: ArrayLike,
        experts: ArrayLike,
        tp: ArrayLike,
        ep: ArrayLike,
        form: str,
        *,
        balanced: bool = False,
    ) -> Seconds:
        """Return the time of the routed experts of one layer on one GPU, communication left out.

        `tokens` are those of the whole group that shares the experts, before dispatch.
        """
        m, hidden, width, chosen, experts, tp, ep = _floats(
            tokens, hidden, intermediate, experts_per_token, experts, tp, ep
        )
        kept = self._form(form)
        held = experts / ep
        pairs = m * chosen / ep
        touched = held * -np.expm1(m * np.log1p(-np.minimum(chosen / experts, 1 - 1e-9)))
        if not balanced:
            touched = touched * 0.9
        parameters = 3 * hidden * width / tp
        moved = kept.weight_bytes * touched * parameters + pairs * (OUTPUT_BYTES + kept.input_bytes) * hidden
        return self._roofline(moved, 2 * pairs * parameters, kept) + LAUNCH_S

    def collective_s(
        self,
        kind: str,
        message_bytes: ArrayLike,
        gpus: ArrayLike,
        *,
        link: Link | None = None,
        nodes: ArrayLike = 1,
        across_bytes_per_s: float | None = None,
        across_latency_s: float = 5e-6,
    ) -> Seconds:
        """Return the time of one exchange between `gpus`, spread over `nodes`.

        `message_bytes` is what each GPU holds of the whole: the vector that is summed, the result of a gathering, what
        is scattered, everything one GPU sends to all (itself included), what one GPU sends to another.
        `across_bytes_per_s` is what one GPU has to other nodes, each way.
        """
        if kind not in COLLECTIVES:
            raise UnknownNameError(f"No exchange is called '{kind}'. {nearest(kind, COLLECTIVES)}")
        wire = link or self.gpu.link
        size, gpus, nodes = _floats(message_bytes, gpus, nodes)
        near_gpus = np.maximum(1.0, gpus / nodes)
        rate = np.where(near_gpus > 2, wire.bytes_per_s, wire.pair_bytes_per_s)
        rate = np.where(rate > 0, rate, self.gpu.pcie_bytes_per_s or self.gpu.memory_bytes_per_s)
        took = _exchange_s(kind, size, near_gpus, rate * MEMORY_EFFICIENCY, HOP_S)
        if across_bytes_per_s is not None:
            share = size if kind == "p2p" else size / (near_gpus if kind == "all_reduce" else 1.0)
            far = _exchange_s(kind, share, nodes, across_bytes_per_s * MEMORY_EFFICIENCY, across_latency_s)
            took = took + np.where(nodes > 1, far, 0.0)
        return np.where(gpus > 1, took, 0.0)

    def _latent_projections_s(
        self,
        tokens: Seconds,
        heads: Seconds,
        hidden: Seconds,
        q_lora: Seconds,
        latent: Seconds,
        rope: Seconds,
        dim: Seconds,
        value: Seconds,
        form: str,
    ) -> Seconds:
        took = self.gemm_s(tokens, q_lora + latent + rope, hidden, form)
        took = took + self.gemm_s(tokens, heads * (dim + rope), q_lora, form)
        return took + self.gemm_s(tokens, hidden, heads * value, form)

    def _form(self, name: str) -> Form:
        return _form(name, frozenset(self.gpu.flops_per_s))

    def _cache_bytes(self, name: str) -> float:
        return 1.0 if name == "fp8_block" else self._form(name).weight_bytes

    def _roofline(self, moved_bytes: Seconds, flops: Seconds, form: Form) -> Seconds:
        memory_s = moved_bytes / (self.gpu.memory_bytes_per_s * MEMORY_EFFICIENCY)
        compute_s = flops / (self.gpu.flops_per_s[form.compute[0]] * COMPUTE_EFFICIENCY)
        return LAUNCH_S + np.maximum(memory_s, compute_s)


def find_kernels(gpu: Gpu) -> Kernels:
    """Return the kernels of a card; cards nobody measured take the curves of their class and their own peaks."""
    found = _found.get(gpu.id)
    if found is None or found.gpu is not gpu:
        found = _found[gpu.id] = Kernels(gpu, gpu.id, "transferred")
    return found


_found: dict[str, Kernels] = {}


def _floats(*values: ArrayLike) -> list[Seconds]:
    return [np.asarray(value, dtype=np.float64) for value in values]


def _pairs(new: Seconds, old: Seconds, window: Seconds) -> Seconds:
    """Return query-key pairs of `new` tokens after `old` others; with a window no query sees more than that many."""
    every = new * old + new * (new + 1) / 2
    growing = np.clip(window - old, 0, new)  # queries that still see everything before them
    limited = growing * old + growing * (growing + 1) / 2 + (new - growing) * window
    return np.where(window > 0, limited, every)


def _exchange_s(kind: str, size: Seconds, gpus: Seconds, bytes_per_s: Seconds | float, hop_s: float) -> Seconds:
    """Return the time of a ring: steps of one share each, and a latency that grows with the logarithm of the ring."""
    if kind == "p2p":
        return hop_s + size / bytes_per_s
    rounds = 2.0 if kind == "all_reduce" else 1.0
    return rounds * (hop_s * np.log2(np.maximum(2.0, gpus)) + size * (gpus - 1) / gpus / bytes_per_s)
