"""How long the kernels of one layer take on one GPU: matrix products, attention, experts, exchange between GPUs.

Every argument that is a number may be an array; all broadcast. Every result is in seconds and never below what the
card's datasheet allows: bytes moved over its bandwidth, operations over its peak. Between that and the truth lie
surfaces fitted to kernels measured inside vLLM (`waterline.cost.kernels_curves`). A card nobody measured takes the
surfaces of its class with its own peaks.

Block-scaled fp8 was measured outside CUDA graphs: its short products show the host's launches (0.06 ms on an H200, 0.34
on an L40S, whatever the shape), not work of the GPU. Where there is more work than that it takes as long as plain fp8,
within 5 % on Hopper and Blackwell. So that is what short ones are taken for, plus a kernel that scales the activations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter

import numpy as np
from numpy.typing import ArrayLike, NDArray

from waterline.catalog import find_gpu, gpus
from waterline.catalog.measurements import Measured, measured_gpus, measured_kernels
from waterline.cost.kernels_curves import (
    CURVES,
    SIXTEEN_BITS,
    Peaks,
    Surface,
    decode_work,
    experts_work,
    gemm_work,
    latent_decode_usual_s,
    latent_limit_s,
    latent_prefill_usual_s,
    link_rate,
    prefill_work,
)
from waterline.errors import UnknownNameError, nearest
from waterline.hardware import Gpu, Link
from waterline.llm.precision import PRECISIONS, SIXTEEN_BIT

Seconds = NDArray[np.float64]

EXCHANGES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")
HOP_S = 8e-6  # a message between two GPUs that says nothing
CUSTOM_BYTES = 8 * 2**20  # vLLM hands larger sums to NCCL
SKEWED_SHARE = 0.6  # of the experts an even routing would touch, an uneven one touches at least
LONG_PROMPT = 16384.0  # tokens, the longest measured; attention works on cached ones as well as within such a prompt
SCALING_S = 2e-6  # the kernel that scales activations block by block

CURVES_OF_TARGET = {
    "8": "a100-sxm-80g", "8.9": "l40s", "9.0": "h100-sxm-80g", "10": "b200-sxm-180g", "12": "rtx-pro-6000-server",
}  # fmt: skip
CURVES_OF_ARCHITECTURE = {"cdna": "h100-sxm-80g", "rdna4": "l40s"}
OLDEST = "a100-sxm-80g"
FULLEST = ("h200-sxm-141g", "b200-sxm-180g")  # measured in every kind of kernel and form: for what others lack
BY_WIRE = {"pcie": "rtx-pro-6000-server", "nvlink": "h100-sxm-80g"}  # exchange follows the link, not the chip


@dataclass(frozen=True, slots=True)
class Form:
    """How the operands of a matrix product are kept and multiplied on one card."""

    name: str
    weight_bytes: float  # an element
    input_bytes: float
    rate: str  # key of the card's `flops_per_s`
    closest: tuple[str, ...]  # measured forms, best first, itself among them


@lru_cache(maxsize=512)
def _form(name: str, rates: frozenset[str]) -> Form:
    """Return the form as a card with these rates runs it: without units of its own it is unpacked to 16 bits."""
    if name != "fp8_block" and name not in PRECISIONS:
        raise UnknownNameError(f"No format is called '{name}'. {nearest(name, [*PRECISIONS, 'fp8_block'])}")
    precision = PRECISIONS["fp8" if name == "fp8_block" else name]
    usable = [rate for rate in (*precision.compute, *SIXTEEN_BIT) if rate in rates] or sorted(rates)
    weight_bytes = precision.bits / 8
    if usable[0] in SIXTEEN_BIT:
        # What was measured as nvfp4 multiplies in 4 bits; unpacked weights behave like int4 ones.
        closest = ("bf16",) if weight_bytes >= 1 else ("mxfp4" if name == "mxfp4" else "int4", "int4", "bf16")
        return Form(name, weight_bytes, SIXTEEN_BITS, usable[0], closest)
    near = {"fp4": ("nvfp4", "fp8"), "int8": ("fp8",), "fp8": ("fp8",)}.get(usable[0], ())
    return Form(name, weight_bytes, weight_bytes, usable[0], (name, *near, "bf16"))


class Kernels:
    """The kernels of one card.

    `source` is the card whose measurements shape the surfaces; `provenance` says whether that is this very card
    ("measured") or one of its class, with this card's own peaks ("transferred").
    """

    def __init__(
        self,
        gpu: Gpu,
        sources: Sequence[str],
        fits: Sequence[Mapping[str, Measured]] | None = None,
        sixteen_bit_flops_per_s: float = 0.0,
    ) -> None:
        self.gpu = gpu
        self.source = sources[0]
        self.provenance = "measured" if sources[0] == gpu.id else "transferred"
        self._alike = gpu.id == sources[0] or _generation(gpu) == _generation(find_gpu(sources[0]))
        self._sixteen_bit_flops_per_s = sixteen_bit_flops_per_s  # of products that sum in 16 bits; 0: none does
        self._sources = sources
        self._own_fits = fits
        self._rates = frozenset(gpu.flops_per_s)
        self._surfaces: dict[tuple[str, str, str, float, float], Surface] = {}
        self._peaks: dict[tuple[str, str, str, float, float], Peaks] = {}

    def gemm_s(self, tokens: ArrayLike, outputs: ArrayLike, inputs: ArrayLike, form: str) -> Seconds:
        """Return the time of (tokens x inputs) · (inputs x outputs)."""
        m, n, k = _floats(tokens, outputs, inputs)
        peaks = self.peaks_of("gemm", form)
        took = self._surface("gemm", form)(m, n, k)
        if self._sixteen_bit_flops_per_s and peaks.input_bytes == SIXTEEN_BITS:
            faster = replace(peaks, flops_per_s=self._sixteen_bit_flops_per_s)
            took = CURVES["gemm"].usual_s(faster, m, n, k)
        if form == "fp8_block" and peaks.input_bytes < SIXTEEN_BITS:
            took = took + SCALING_S
        return np.maximum(took, peaks.limit_s(*gemm_work(peaks, m, n, k)))

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
        """Return the time of attention for `new_tokens` prompt tokens of each request, `cached_tokens` before them.

        Only prompts without cached tokens were measured; pairs with those are added, at the efficiency of a prompt of
        `LONG_PROMPT` tokens. What the rest of measured prompts took behind their first part comes out within 6 %.
        """
        requests, new, old, heads, kv_heads, dim, window = _floats(
            requests, new_tokens, cached_tokens, query_heads, kv_heads, head_dim, window_tokens
        )
        rows, group = requests * heads, np.maximum(1.0, heads / kv_heads)
        if not window.any():
            took = self._prefill_s("prefill", rows, new, old, group, dim, window, cache)
        elif window.all():
            took = self._prefill_s("prefill_window", rows, new, old, group, dim, window, cache)
        else:
            took = np.where(
                window > 0,
                self._prefill_s("prefill_window", rows, new, old, group, dim, np.where(window > 0, window, 1.0), cache),
                self._prefill_s("prefill", rows, new, old, group, dim, np.zeros(()), cache),
            )
        peaks = self.peaks_of("prefill", "", cache)
        return np.maximum(took, peaks.limit_s(*prefill_work(peaks, rows, new, old, group, dim, window)))

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
        requests, context, heads, kv_heads, dim, window = _floats(
            requests, context_tokens, query_heads, kv_heads, head_dim, window_tokens
        )
        rows, group = requests * kv_heads, np.maximum(1.0, heads / kv_heads)
        read = context + 1
        if not window.any():
            took = self._surface("decode", "", cache)(rows, read, group, dim)
        else:
            everything, read = read, np.where(window > 0, np.minimum(read, window), read)
            took = self._surface("decode_window", "", cache)(rows, read, group, dim)
            if not window.all():
                took = np.where(window > 0, took, self._surface("decode", "", cache)(rows, everything, group, dim))
        peaks = self.peaks_of("decode", "", cache)
        return np.maximum(took, peaks.limit_s(*decode_work(peaks, rows, read, group, dim)))

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
        selected_tokens: float = 0,
        cache: str = "bf16",
    ) -> Seconds:
        """Return the time of a whole MLA module reading a prompt, projections included; `heads` are this GPU's own.

        DeepSeek V3's shape was measured; others are scaled by physics. What cached tokens add, and what queries that
        see no more than `selected_tokens` save, is physics at the efficiency of a prompt of `LONG_PROMPT` tokens.
        """
        requests, new, old, heads, hidden, q_lora, latent, rope, dim, value = _floats(
            requests, new_tokens, cached_tokens, heads, hidden, q_lora, latent, rope, head_dim, value_head_dim
        )
        peaks = self.peaks_of("latent_prefill", form, cache)
        sizes = (hidden, q_lora, latent, rope, dim, value)
        usual = latent_prefill_usual_s(peaks, requests, new, heads, 0.0, *sizes)
        surface = self._surface("latent_prefill", form, cache)
        took = surface(requests, new, heads) * (usual / latent_prefill_usual_s(peaks, requests, new, heads))
        if old.any() or selected_tokens:
            asked = latent_prefill_usual_s(peaks, requests, new, heads, old, *sizes, selected=selected_tokens)
            long = np.array(LONG_PROMPT)
            share = surface(requests, long, heads) / latent_prefill_usual_s(peaks, requests, long, heads)
            took = took + (asked - usual) * share
        return np.maximum(took, latent_limit_s(peaks, requests * new, heads, hidden, q_lora, dim, value))

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
        requests, context, heads, hidden, q_lora, latent, rope, dim, value = _floats(
            requests, context_tokens, heads, hidden, q_lora, latent, rope, head_dim, value_head_dim
        )
        peaks = self.peaks_of("latent_decode", form, cache)
        usual = latent_decode_usual_s(peaks, requests, context, heads, hidden, q_lora, latent, rope, dim, value)
        took = self._surface("latent_decode", form, cache)(requests, context, heads)
        took = took * (usual / latent_decode_usual_s(peaks, requests, context, heads))
        least = latent_limit_s(peaks, requests, heads, hidden, q_lora, dim, value)
        return np.maximum(took, least + peaks.cache_bytes * requests * (latent + rope) * context / peaks.bytes_per_s)

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
        matrices: float = 3,
        balanced: bool = False,
    ) -> Seconds:
        """Return the time of the routed experts of one layer on the busiest GPU, communication left out.

        An expert has three matrices with a gate and two without; both times count by their elements together.

        `tokens` are those of all GPUs that share the experts together, before dispatch, as in the measured points:
        there an even routing over more GPUs takes proportionally less time. Unbalanced is the mean of the measured
        power laws (exponents 1.01 and 1.2), whose busiest GPU has several times the mean load at high `ep`.
        """
        tokens, hidden, width, chosen, experts, tp, ep = _floats(
            tokens, hidden, intermediate, experts_per_token, experts, tp, ep
        )
        load, held, matrix = tokens * chosen / experts, experts / ep, hidden * width / tp * matrices / 3
        kind = "experts_balanced" if balanced else "experts"
        peaks = self.peaks_of(kind, form)
        took = self._surface(kind, form)(load, held, ep, matrix)
        return np.maximum(took, self._experts_limit_s(peaks, load, held, matrix, hidden, even=balanced))

    def collective_s(
        self,
        kind: str,
        message_bytes: ArrayLike,
        gpus: ArrayLike,
        *,
        link: Link | None = None,
        nodes: ArrayLike = 1,
        across_bytes_per_s: float | None = None,
        across_latency_s: float = 1e-5,
        implementation: str = "fastest",
    ) -> Seconds:
        """Return the time of one exchange between `gpus` in all, spread evenly over `nodes`.

        `message_bytes` is the whole as nccl-tests counts it: the vector that is summed, the result of a gathering, what
        is scattered, everything one GPU sends (its own share included), what one GPU sends to another.
        A sum is made by vLLM's own kernel where vLLM would take it (up to 8 MiB, NVLink or two GPUs) and it is faster;
        `implementation` "nccl" or "custom" asks for one of them. `across_bytes_per_s` is what one GPU has to other
        nodes, each way; exchange across nodes is physics: a ring of nodes, each GPU with its share, around that within.
        """
        if kind not in EXCHANGES:
            raise UnknownNameError(f"No exchange is called '{kind}'. {nearest(kind, EXCHANGES)}")
        size, gpus, nodes = _floats(message_bytes, gpus, nodes)
        wire = link or self.gpu.link
        near = np.maximum(1.0, gpus / nodes)
        took = self._near_s(kind, size, near, wire, implementation)
        if across_bytes_per_s is not None:
            share = size / near if kind == "all_reduce" else size
            far = (
                across_latency_s * np.log2(np.maximum(2.0, nodes))
                + _rounds(kind) * share * (nodes - 1) / nodes / across_bytes_per_s
            )
            took = took + np.where(nodes > 1, far, 0.0)
        return took

    def _near_s(self, kind: str, size: Seconds, gpus: Seconds, wire: Link, implementation: str) -> Seconds:
        total, pair = self._wire_rates(wire)
        least = self._exchange_limit_s(kind, size, gpus, total, pair)
        if kind == "p2p":
            return HOP_S + np.where(gpus > 1, size / pair, 0.0)
        name = "custom_all_reduce" if implementation == "custom" else kind
        took = self._surface(name, "", "", total, pair)(gpus, size)
        if kind == "all_reduce" and implementation == "fastest":
            own = self._surface("custom_all_reduce", "", "", total, pair)(gpus, size)
            allowed = (size <= CUSTOM_BYTES) & ((gpus <= 2) | (wire.kind != "pcie"))
            took = np.where(allowed, np.minimum(took, own), took)
        return np.where(gpus > 1, np.maximum(took, least), 0.0)

    def _wire_rates(self, wire: Link) -> tuple[float, float]:
        slowest = self.gpu.pcie_bytes_per_s or self.gpu.memory_bytes_per_s
        total = wire.bytes_per_s or slowest
        return total, min(total, wire.pair_bytes_per_s or slowest)

    @staticmethod
    def _exchange_limit_s(kind: str, size: Seconds, gpus: Seconds, total: float, pair: float) -> Seconds:
        # Switches of NVLink 4 and later add up on the way: a sum passes a GPU's link once, not twice.
        del kind
        return size * (gpus - 1) / np.maximum(gpus, 1.0) / link_rate(total, pair, gpus)

    @staticmethod
    def _experts_limit_s(
        peaks: Peaks, load: Seconds, held: Seconds, matrix: Seconds, hidden: Seconds, *, even: bool
    ) -> Seconds:
        moved, flops = experts_work(peaks, load, held, matrix, hidden)
        return peaks.limit_s(moved * (1.0 if even else SKEWED_SHARE), flops)

    def _prefill_s(
        self,
        kind: str,
        rows: Seconds,
        new: Seconds,
        old: Seconds,
        group: Seconds,
        dim: Seconds,
        window: Seconds,
        cache: str,
    ) -> Seconds:
        surface, peaks = self._surface(kind, "", cache), self.peaks_of(kind, "", cache)
        span = (window,) if kind == "prefill_window" else ()
        took = surface(rows, new, group, dim, *span)
        if old.any():
            none, long = np.zeros(()), np.array(LONG_PROMPT)
            with_old = peaks.usual_s(0.0, *prefill_work(peaks, rows, new, old, group, dim, window))
            without = peaks.usual_s(0.0, *prefill_work(peaks, rows, new, none, group, dim, window))
            usual = peaks.usual_s(0.0, *prefill_work(peaks, rows, long, none, group, dim, window))
            took = took + (with_old - without) * (surface(rows, long, group, dim, *span) / usual)
        return took

    def peaks_of(self, kind: str, form: str = "", cache: str = "", total: float = 0.0, pair: float = 0.0) -> Peaks:
        """Return what the card offers a kernel of this kind; for an exchange the link's rates stand for memory's."""
        key = (kind, form, cache, total, pair)
        if key not in self._peaks:
            self._peaks[key] = self._peaks_of(*key)
        return self._peaks[key]

    def _peaks_of(self, kind: str, form: str, cache: str, total: float, pair: float) -> Peaks:
        if kind in EXCHANGES or kind == "custom_all_reduce":
            total, pair = (total, pair) if total else self._wire_rates(self.gpu.link)
            return Peaks(bytes_per_s=total, flops_per_s=1.0, pair_bytes_per_s=pair)
        kept = _form(form or "bf16", self._rates)
        sixteen = _form("bf16", self._rates)
        attention = kind not in {"gemm", "experts", "experts_balanced"}
        return Peaks(
            bytes_per_s=self.gpu.memory_bytes_per_s,
            flops_per_s=self.gpu.flops_per_s[(sixteen if attention else kept).rate],
            weight_bytes=kept.weight_bytes,
            input_bytes=kept.input_bytes,
            cache_bytes=_form(cache or "bf16", self._rates).weight_bytes,
            weight_flops_per_s=self.gpu.flops_per_s[kept.rate],
        )

    def limit_s(self, kind: str, form: str, cache: str, arguments: Mapping[str, Seconds]) -> Seconds:
        """Return what the datasheet allows for a shape, by the names of the method's arguments."""
        a, peaks = arguments, self.peaks_of(kind, form, cache)
        if kind == "gemm":
            return peaks.limit_s(*gemm_work(peaks, a["tokens"], a["outputs"], a["inputs"]))
        if kind.startswith("prefill"):
            group = np.maximum(1.0, a["query_heads"] / a["kv_heads"])
            return peaks.limit_s(
                *prefill_work(
                    peaks, a["requests"] * a["query_heads"], a["new_tokens"], a["cached_tokens"], group, a["head_dim"],
                    a["window_tokens"],
                )
            )  # fmt: skip
        if kind.startswith("decode"):
            read, window = a["context_tokens"] + 1, a["window_tokens"]
            read = np.where(window > 0, np.minimum(read, window), read)
            group = np.maximum(1.0, a["query_heads"] / a["kv_heads"])
            return peaks.limit_s(*decode_work(peaks, a["requests"] * a["kv_heads"], read, group, a["head_dim"]))
        if kind.startswith("experts"):
            load = a["tokens"] * a["experts_per_token"] / a["experts"]
            matrix = a["hidden"] * a["intermediate"] / a["tp"] * a["matrices"] / 3
            even = kind == "experts_balanced"
            return self._experts_limit_s(peaks, load, a["experts"] / a["ep"], matrix, a["hidden"], even=even)
        if kind.startswith("latent"):
            sizes = (np.asarray(size, dtype=np.float64) for size in (7168, 1536, 128, 128))
            return latent_limit_s(peaks, a["requests"] * a.get("new_tokens", 1.0), a["heads"], *sizes)
        return self._exchange_limit_s(kind, a["message_bytes"], a["gpus"], peaks.bytes_per_s, peaks.pair_bytes_per_s)

    def range_of(self, kind: str, form: str = "", cache: str = "") -> Mapping[str, tuple[float, float]]:
        """Return smallest and largest size measured, by name, of the surface used; empty if none was measured."""
        found = self._fit_of(kind, form, cache)
        return found.measured if found else {}

    def measured(self, kind: str, form: str) -> bool:
        """Return whether kernels of this kind and form were measured on this very card."""
        own = self._fits(kind)[:1] if self.provenance == "measured" else []
        return any(f"{kind}/{form}" in fit for fit in own)

    def within(
        self, kind: str, form: str = "", cache: str = "", times: float = 2.0, **sizes: ArrayLike
    ) -> NDArray[np.bool_]:
        """Return whether shapes lie within so many times the range of what was measured; sizes as in `CURVES`."""
        measured = self.range_of(kind, form, cache)
        inside = np.array(bool(measured))
        for name, size in sizes.items():
            least, most = measured.get(name, (0.0, np.inf))
            inside = inside & (np.asarray(size) >= least / times) & (np.asarray(size) <= most * times)
        return inside

    def _surface(self, kind: str, form: str = "", cache: str = "", total: float = 0.0, pair: float = 0.0) -> Surface:
        key = (kind, form, cache, total, pair)
        if key not in self._surfaces:
            curve, found = CURVES[kind], self._fit_of(kind, form, cache)
            correction = found.correction if found else None
            self._surfaces[key] = Surface(curve, self.peaks_of(kind, form, cache, total, pair), correction)
        return self._surfaces[key]

    def _fit_of(self, kind: str, form: str, cache: str) -> Measured | None:
        """Return the nearest fit: the fewest steps down the lists of close forms and of sources, together."""
        forms = _form(form, self._rates).closest if form else ("",)
        caches = (cache, "fp8" if _form(cache, self._rates).weight_bytes < 2 else "bf16", "bf16") if cache else ("",)
        steps = [
            (source + rank, source, fit, "/".join(part for part in (kind, one, kept) if part))
            for source, fit in enumerate(self._fits(kind))
            for rank, one in enumerate(forms)
            for kept in caches
        ]
        nearest_first = sorted(steps, key=itemgetter(0, 1))
        return next((_better(fit, name, alike=self._alike) for *_, fit, name in nearest_first if name in fit), None)

    def _fits(self, kind: str) -> list[Mapping[str, Measured]]:
        if self._own_fits is not None:
            return list(self._own_fits)
        sources = list(self._sources)
        if kind in EXCHANGES or kind == "custom_all_reduce":
            sources = [_wire_source(self.gpu, self.source)]
        return [measured_kernels(source) for source in sources]


def find_kernels(gpu: Gpu) -> Kernels:
    """Return the kernels of a card; cards nobody measured take the curves of their class and their own peaks."""
    found = _found.get(gpu.id)
    if found is None or found.gpu is not gpu:
        own = gpu.id if gpu.id in measured_gpus() else source_of(gpu)
        found = _found[gpu.id] = Kernels(gpu, (own, *(other for other in FULLEST if other != own)))
    return found


def bare_kernels(gpu: Gpu) -> Kernels:
    """Return kernels unlike those measured: they reach the usual share of the peaks, and sum in 16 bits."""
    found = _bare.get(gpu.id)
    if found is None or found.gpu is not gpu:
        found = _bare[gpu.id] = Kernels(gpu, (gpu.id,), (), _sixteen_bit_flops_per_s(gpu))
    return found


_found: dict[str, Kernels] = {}
_bare: dict[str, Kernels] = {}


def _sixteen_bit_flops_per_s(gpu: Gpu) -> float:
    """Return the rate of products that also sum in 16 bits: the datasheet's, or twice that of cards which halve it.

    GeForce cards sum in 32 bits at half the rate of their chips, and that is what their datasheets state. No product is
    taken for faster than the datasheet all the same.
    """
    stated = max(gpu.flops_per_s.get(rate, 0.0) for rate in SIXTEEN_BIT)
    return max(stated, gpu.flops_per_s.get("fp32", 0.0) * _whole_chips().get(gpu.target, 0.0))


@lru_cache(maxsize=1)
def _whole_chips() -> Mapping[str, float]:
    """Return operations in 16 bits for each one of the vector units, of targets where some cards halve them."""
    by_target: dict[str, list[float]] = {}
    for gpu in gpus().values():
        if (vector := gpu.flops_per_s.get("fp32")) and gpu.stack == "cuda":
            stated = max(gpu.flops_per_s.get(rate, 0.0) for rate in SIXTEEN_BIT)
            by_target.setdefault(gpu.target, []).append(stated / vector)
    return {
        target: max(ratios)
        for target, ratios in by_target.items()
        if any(1.9 < max(ratios) / ratio < 2.1 for ratio in ratios if ratio)
    }


def source_of(gpu: Gpu) -> str:
    """Return the measured card a card is most like, itself aside: by what kernels are compiled for, then by age."""
    if gpu.stack == "cuda":
        name = CURVES_OF_TARGET.get(gpu.target) or CURVES_OF_TARGET.get(gpu.target.split(".")[0], OLDEST)
        if name == "h100-sxm-80g" and gpu.memory_bytes_per_s / gpu.flops_per_s["bf16"] > 4e-3:
            return "h200-sxm-141g"  # more memory bandwidth for its arithmetic, as H20 has
        return name
    return next((name for start, name in CURVES_OF_ARCHITECTURE.items() if gpu.architecture.startswith(start)), OLDEST)


def _generation(gpu: Gpu) -> str:
    """Return what kernels are compiled for, without its last digit."""
    return gpu.target.partition(".")[0] if gpu.stack == "cuda" else gpu.architecture


def _wire_source(gpu: Gpu, source: str) -> str:
    """Cards with a link of their own exchange like others with one, cards on PCIe like others on it."""
    if source == gpu.id:
        return source
    if gpu.link.kind in {"pcie", "none"}:
        return BY_WIRE["pcie"]
    return source if source not in {"l40s", BY_WIRE["pcie"]} else BY_WIRE["nvlink"]


def _better(fit: Mapping[str, Measured], name: str, *, alike: bool) -> Measured:
    """Return a fit; for a card of another generation that of the better kernel where two were measured for the bits.

    On Hopper vLLM's experts in per-tensor fp8 take four times as long as block-scaled ones, on Blackwell they do not:
    that one of two implementations is poor stays with what it was compiled for.
    """
    found, other = fit[name], fit.get(f"{name}_block")
    if alike or other is None or not name.startswith("experts"):
        return found
    return Measured(np.minimum(found.correction, other.correction), found.measured)


def _rounds(kind: str) -> float:
    return 2.0 if kind == "all_reduce" else 1.0


def _floats(*values: ArrayLike) -> list[Seconds]:
    return [np.asarray(value, dtype=np.float64) for value in values]
