"""Surfaces of kernel time: physics at the knots of a grid, corrected by what was measured, joined by straight lines.

A kernel's time is nearly a power of each size, so its logarithm is nearly linear in the logarithms of the sizes. A
`Curve` says which sizes span the grid and what physics says at its knots; a fit (see `waterline.catalog.measurements`)
adds a correction to each knot; a `Surface` is both for one card. Physics is computed with the card's own peaks and is
no slower with higher ones. As corrections do not depend on peaks and the running maximum along the sizes in `growing`
keeps order, neither is the surface; and it never falls when those sizes grow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

MEMORY_EFFICIENCY = 0.8  # before correction
COMPUTE_EFFICIENCY = 0.65
SIXTEEN_BITS = 2  # bytes of an activation
MOST_PLACES = 1024  # of single sizes on a surface, that are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """What a card offers a kernel, and how the operands are kept."""

    bytes_per_s: float
    flops_per_s: float
    weight_bytes: float = 2.0  # an element
    input_bytes: float = 2.0
    cache_bytes: float = 2.0
    pair_bytes_per_s: float = 0.0  # of a link: between two GPUs
    weight_flops_per_s: float = 0.0  # rate of the projections within an attention module, if not `flops_per_s`

    def limit_s(self, moved_bytes: Numbers, flops: Numbers) -> Numbers:
        """Return what the datasheet allows: everything moved once, everything computed at the peak."""
        return np.maximum(moved_bytes / self.bytes_per_s, flops / self.flops_per_s)

    def usual_s(self, floor_s: float, moved_bytes: Numbers, flops: Numbers) -> Numbers:
        """Return what is usual: a launch, then memory or arithmetic, whichever takes longer, rounded at the knee."""
        memory_s = moved_bytes / (self.bytes_per_s * MEMORY_EFFICIENCY)
        compute_s = flops / (self.flops_per_s * COMPUTE_EFFICIENCY)
        return floor_s + np.cbrt(memory_s * memory_s * memory_s + compute_s * compute_s * compute_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One kind of kernel: the sizes that span its grid, in the order `usual_s` takes them."""

    sizes: Mapping[str, tuple[float, ...]]  # knots, rising; beyond the last the correction stays as it is
    growing: tuple[str, ...]  # more of these never takes less time
    usual_s: Callable[..., Numbers]  # (Peaks, *sizes) -> seconds before correction
    beyond: float = 64.0  # how far past the knots the surface reaches, as a factor each way

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(knots) for knots in self.sizes.values())


class Surface:
    """Seconds of one kind of kernel on one card; knots are worked out when shapes near them are first asked for.

    A running maximum ties the knots along the sizes that grow together, so those are worked out whole. The others are
    mostly few: a model has one head size, a grid has five.
    """

    def __init__(self, curve: Curve, peaks: Peaks, correction: Numbers | None) -> None:
        self._curve, self._peaks, self._correction = curve, peaks, correction
        self._sizes = [_extended(np.array(values, dtype=np.float64), curve.beyond) for values in curve.sizes.values()]
        self._knots = [np.log2(values) for values in self._sizes]
        self._widths = [np.diff(values) for values in self._knots]
        self._places: dict[tuple[int, float], tuple[NDArray[np.intp], Numbers]] = {}
        self._growing = [name in curve.growing for name in curve.sizes]
        shape = [len(values) for values in self._knots]
        self._log_s = np.empty(shape)
        self._flat = self._log_s.ravel()  # the same memory
        self._known = np.zeros(
            [count - 1 for count, grows in zip(shape, self._growing, strict=True) if not grows], np.bool_
        )  # [cell of each size that does not grow]
        self._strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        corners = np.zeros(1, dtype=np.intp)
        for stride in reversed(self._strides):
            corners = np.concatenate([corners, corners + stride])
        self._corners = corners

    def __call__(self, *sizes: Numbers) -> Numbers:
        """Return seconds; sizes beyond the last knot count as that knot, below the first as the first."""
        first: NDArray[np.intp] | int = 0
        fractions = []
        cell = []
        for axis, size in enumerate(sizes):
            left, fraction = self._place(axis, size)
            fractions.append(fraction)
            first = first + left * self._strides[axis]
            if not self._growing[axis]:
                cell.append(left)
        if not self._known[tuple(cell)].all():
            self._work_out([np.array(sorted({*left.ravel().tolist()}), dtype=np.intp) for left in cell])
        corners = self._flat[np.add.outer(self._corners, first)]
        for fraction in fractions:
            half = len(corners) // 2
            corners = corners[:half] + fraction * (corners[half:] - corners[:half])
        took_s: Numbers = np.exp(corners[0])
        return took_s

    def _place(self, axis: int, size: Numbers) -> tuple[NDArray[np.intp], Numbers]:
        """Return the knots to the left of sizes, and how far to the next one they are; of a single size it is kept."""
        key = (axis, float(size)) if size.ndim == 0 else None
        if key is not None and key in self._places:
            return self._places[key]
        place, knots, widths = np.log2(size), self._knots[axis], self._widths[axis]
        left = np.minimum(np.maximum(knots.searchsorted(place, side="right") - 1, 0), len(widths) - 1)
        fraction = np.minimum(np.maximum((place - knots[left]) / widths[left], 0.0), 1.0)
        if key is not None and len(self._places) < MOST_PLACES:
            self._places[key] = left, fraction
        return left, fraction

    def _work_out(self, cells: Sequence[NDArray[np.intp]]) -> None:
        """Fill the knots around all these cells of the sizes that do not grow."""
        waiting = iter(cells)
        chosen = []
        for values, grows in zip(self._sizes, self._growing, strict=True):
            if grows:
                chosen.append(np.arange(len(values)))
            else:
                cell = next(waiting)
                chosen.append(np.array(sorted({*cell.tolist(), *(cell + 1).tolist()}), dtype=np.intp))
        nodes = np.ix_(*(values[rows] for values, rows in zip(self._sizes, chosen, strict=True)))
        log_s = np.log(np.broadcast_to(self._curve.usual_s(self._peaks, *nodes), [len(rows) for rows in chosen]))
        if self._correction is not None:
            inner = (
                np.minimum(np.maximum(rows - 1, 0), count - 1)
                for rows, count in zip(chosen, self._correction.shape, strict=True)
            )
            log_s = log_s + self._correction[np.ix_(*inner)]  # beyond the measured knots it stays as it is
        for axis, grows in enumerate(self._growing):
            if grows:
                log_s = np.maximum.accumulate(log_s, axis=axis)
        self._log_s[np.ix_(*chosen)] = log_s
        self._known[np.ix_(*cells)] = True


def weights_at(knots: list[Numbers], sizes: list[Numbers]) -> tuple[NDArray[np.intp], Numbers]:
    """Return the corners around each shape and their weights, [corner, shape]: the same interpolation, for fitting."""
    index: NDArray[np.intp] = np.zeros((1, 1), dtype=np.intp)
    weight: Numbers = np.ones((1, 1))
    for values, size in zip(knots, sizes, strict=True):
        place = np.log2(size)
        lines = np.log2(values)
        left = np.clip(np.searchsorted(lines, place, side="right") - 1, 0, len(lines) - 2)
        fraction = np.clip((place - lines[left]) / (lines[left + 1] - lines[left]), 0.0, 1.0)
        index = np.concatenate([index * len(values) + left, index * len(values) + left + 1])
        weight = np.concatenate([weight * (1 - fraction), weight * fraction])
    return index, weight


def _extended(knots: Numbers, beyond: float) -> Numbers:
    return np.concatenate([[knots[0] / beyond], knots, [knots[-1] * beyond]])


def attended(new: Numbers, old: Numbers, window: Numbers) -> Numbers:
    """Return query-key pairs of `new` tokens after `old` others; 0 < window: no query sees more than that many."""
    every = new * old + new * (new + 1) / 2
    growing = np.clip(window - old, 0, new)  # queries that still see everything before them
    limited = growing * old + growing * (growing + 1) / 2 + (new - growing) * window
    return np.where(window > 0, limited, every)


def gemm_work(peaks: Peaks, m: Numbers, n: Numbers, k: Numbers) -> tuple[Numbers, Numbers]:
    """Return bytes moved and FLOPs of (m x k)·(k x n)."""
    moved = peaks.weight_bytes * n * k + peaks.input_bytes * m * k + SIXTEEN_BITS * m * n
    return moved, 2 * m * n * k


def prefill_work(
    peaks: Peaks, rows: Numbers, new: Numbers, old: Numbers, group: Numbers, dim: Numbers, window: Numbers
) -> tuple[Numbers, Numbers]:
    """Return bytes and FLOPs of attention over prompts; `rows` are requests x query heads, `group` heads a KV head."""
    kept = np.where(window > 0, np.minimum(old, window), old)
    moved = rows * dim * (2 * SIXTEEN_BITS * new + 2 * (SIXTEEN_BITS * new + peaks.cache_bytes * kept) / group)
    return moved, 4 * rows * dim * attended(new, old, window)


def decode_work(peaks: Peaks, rows: Numbers, read: Numbers, group: Numbers, dim: Numbers) -> tuple[Numbers, Numbers]:
    """Return bytes and FLOPs of one token against `read` cached ones; `rows` are requests x KV heads."""
    moved = rows * dim * (2 * SIXTEEN_BITS * group + 2 * read * peaks.cache_bytes)
    return moved, 4 * rows * group * dim * read


def latent_projections(
    peaks: Peaks,
    tokens: Numbers,
    heads: Numbers,
    hidden: Numbers,
    q_lora: Numbers,
    latent: Numbers,
    rope: Numbers,
    dim: Numbers,
    value: Numbers,
) -> Numbers:
    """Return usual seconds of what MLA multiplies every new token with, but for keys and values out of latents."""
    took = np.zeros(())
    for outputs, inputs in (
        (q_lora + latent + rope, hidden),
        (heads * (dim + rope), np.where(q_lora > 0, q_lora, hidden)),
        (hidden, heads * value),
    ):
        moved, flops = gemm_work(peaks, tokens, outputs, inputs)
        took = took + np.maximum(
            moved / (peaks.bytes_per_s * MEMORY_EFFICIENCY), flops / (_weight_rate(peaks) * COMPUTE_EFFICIENCY)
        )
    return took


def _weight_rate(peaks: Peaks) -> float:
    return peaks.weight_flops_per_s or peaks.flops_per_s


def latent_limit_s(
    peaks: Peaks, tokens: Numbers, heads: Numbers, hidden: Numbers, q_lora: Numbers, dim: Numbers, value: Numbers
) -> Numbers:
    """Return what the datasheet allows for the projections alone."""
    parameters = heads * (dim * np.maximum(q_lora, 1) + hidden * value) + q_lora * hidden
    return np.maximum(
        peaks.weight_bytes * parameters / peaks.bytes_per_s, 2 * tokens * parameters / _weight_rate(peaks)
    )


def latent_prefill_usual_s(
    peaks: Peaks,
    requests: Numbers,
    new: Numbers,
    heads: Numbers,
    old: Numbers | float = 0.0,
    hidden: Numbers | float = 7168.0,
    q_lora: Numbers | float = 1536.0,
    latent: Numbers | float = 512.0,
    rope: Numbers | float = 64.0,
    dim: Numbers | float = 128.0,
    value: Numbers | float = 128.0,
    selected: float = 0.0,
) -> Numbers:
    """Return usual seconds of an MLA module over prompts: keys and values of all tokens are unpacked for all heads.

    Where no query sees more than `selected` tokens, they may be left packed instead, as when decoding: each pair then
    costs more, and there are fewer.
    """
    hidden, q_lora, latent, rope, dim, value, old = (
        np.asarray(size, dtype=np.float64) for size in (hidden, q_lora, latent, rope, dim, value, old)
    )
    projected = latent_projections(peaks, requests * new, heads, hidden, q_lora, latent, rope, dim, value)
    moved = SIXTEEN_BITS * requests * heads * (2 * new + old) * (dim + rope + value)
    moved = moved + peaks.cache_bytes * requests * (new + old) * (latent + rope)
    flops = 2 * requests * heads * (dim + rope + value) * attended(new, old, np.zeros(()))
    unpacked = _unpacking_s(peaks, requests * (new + old), heads, latent, dim + value)
    unpacked = unpacked + peaks.usual_s(3e-5, moved, flops)
    if not selected:
        return projected + unpacked
    pairs = attended(new, old, np.asarray(selected))
    moved = peaks.cache_bytes * requests * np.minimum(new + old, pairs) * (latent + rope)
    moved = moved + 2 * SIXTEEN_BITS * requests * new * heads * latent
    packed = _unpacking_s(peaks, requests * new, heads, latent, dim + value)  # of queries and results
    packed = packed + peaks.usual_s(3e-5, moved, 2 * requests * heads * (2 * latent + rope) * pairs)
    return projected + np.minimum(unpacked, packed)


def _unpacking_s(peaks: Peaks, tokens: Numbers, heads: Numbers, latent: Numbers, dims: Numbers) -> Numbers:
    """Return usual seconds of the products between the latent space and so many dimensions of each head."""
    moved, flops = gemm_work(peaks, tokens, heads * dims, latent)
    return np.maximum(
        moved / (peaks.bytes_per_s * MEMORY_EFFICIENCY), flops / (_weight_rate(peaks) * COMPUTE_EFFICIENCY)
    )


def latent_decode_usual_s(
    peaks: Peaks,
    requests: Numbers,
    context: Numbers,
    heads: Numbers,
    hidden: Numbers | float = 7168.0,
    q_lora: Numbers | float = 1536.0,
    latent: Numbers | float = 512.0,
    rope: Numbers | float = 64.0,
    dim: Numbers | float = 128.0,
    value: Numbers | float = 128.0,
) -> Numbers:
    """Return usual seconds of an MLA module for one token a request.

    Queries go into the latent space and results out of it, so the cache is read as it is, once for all heads.
    """
    hidden, q_lora, latent, rope, dim, value = (
        np.asarray(size, dtype=np.float64) for size in (hidden, q_lora, latent, rope, dim, value)
    )
    took = latent_projections(peaks, requests, heads, hidden, q_lora, latent, rope, dim, value)
    absorbed = heads * latent * (dim + value)
    moved = SIXTEEN_BITS * absorbed + peaks.cache_bytes * requests * (latent + rope) * context
    moved = moved + 2 * SIXTEEN_BITS * requests * heads * latent
    return took + peaks.usual_s(3e-5, moved, 2 * requests * (absorbed + heads * (2 * latent + rope) * context))


def experts_work(
    peaks: Peaks, load: Numbers, held: Numbers, matrix: Numbers, hidden: Numbers | None = None
) -> tuple[Numbers, Numbers]:
    """Return bytes and FLOPs of `held` experts of three matrices of `matrix` elements, `load` tokens each on average.

    Routing is taken as random: an expert is read unless nobody chose it, which happens with probability exp(-load).
    """
    hidden = np.sqrt(2 * matrix) if hidden is None else hidden
    touched = held * -np.expm1(-load)
    moved = 3 * peaks.weight_bytes * matrix * touched
    moved = moved + load * held * ((SIXTEEN_BITS + peaks.input_bytes) * hidden + 3 * SIXTEEN_BITS * matrix / hidden)
    return moved, 6 * load * held * matrix


def link_rate(bytes_per_s: float, pair_bytes_per_s: float, gpus: Numbers) -> Numbers:
    """Return what one GPU sends to all others together: in a mesh each of them adds a wire, up to the card's total."""
    return np.minimum(bytes_per_s, (pair_bytes_per_s or bytes_per_s) * np.maximum(1.0, gpus - 1))


def exchange_usual_s(peaks: Peaks, rounds: float, gpus: Numbers, size: Numbers) -> Numbers:
    """Return usual seconds of a ring: shares of one message, and a latency that grows with the ring's logarithm."""
    gpus = np.maximum(2.0, gpus)
    rate = link_rate(peaks.bytes_per_s, peaks.pair_bytes_per_s, gpus) * MEMORY_EFFICIENCY
    return 4e-6 * (1 + np.log2(gpus)) + rounds * size * (gpus - 1) / gpus / rate


def _powers(first: int, last: int, step: int = 1) -> tuple[float, ...]:
    return tuple(2.0**power for power in range(first, last + 1, step))


def _no(size: Numbers) -> Numbers:
    return np.zeros_like(size)


WIDTHS = (32.0, 128.0, 512.0, 1024.0, 2048.0, 4096.0, 6144.0, 8192.0, 12288.0, 16384.0, 65536.0)
HEAD_DIMS = (64.0, 128.0, 192.0, 256.0, 512.0)
PROMPTS = (1.0, *_powers(4, 14))
EXPERT_CURVE = Curve(
    sizes={
        "load": _powers(-8, 13),
        "held": (1.0, 4.0, 16.0, 64.0, 256.0, 512.0),
        "ep": (1.0, 2.0, 8.0, 32.0, 256.0),
        "matrix": (2.0**17, 2.0**20, 2.0**22, 2.0**24, 2.0**26),
    },
    growing=("load",),
    usual_s=lambda peaks, load, held, ep, matrix: (
        peaks.usual_s(1.5e-5, *experts_work(peaks, load, held, matrix)) + 0 * ep
    ),
)
EXCHANGE_SIZES = {"gpus": (2.0, 4.0, 8.0), "bytes": _powers(8, 30)}

CURVES = {
    "gemm": Curve(
        sizes={
            "tokens": (
                1,
                8,
                16,
                17,
                32,
                64,
                65,
                96,
                128,
                129,
                192,
                256,
                257,
                512,
                768,
                1024,
                1536,
                2048,
                3072,
                4096,
                8192,
                16384,
                32768,
            ),
            "outputs": WIDTHS,
            "inputs": WIDTHS,
        },
        growing=("tokens",),
        usual_s=lambda peaks, m, n, k: peaks.usual_s(2e-6, *gemm_work(peaks, m, n, k)),
    ),
    "prefill": Curve(
        sizes={
            "rows": (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384),
            "new_tokens": PROMPTS,
            "group": (1, 2, 4, 8, 64),
            "head_dim": HEAD_DIMS,
        },
        growing=("rows", "new_tokens"),
        usual_s=lambda peaks, rows, new, group, dim: peaks.usual_s(
            8e-6, *prefill_work(peaks, rows, new, _no(new), group, dim, _no(new))
        ),
    ),
    "prefill_window": Curve(
        sizes={
            "rows": (1, 4, 16, 64, 256, 1024, 4096, 16384),
            "new_tokens": PROMPTS,
            "group": (1, 4, 64),
            "head_dim": (64, 128, 256),
            "window": (128, 1024, 8192),
        },
        growing=("rows", "new_tokens"),
        usual_s=lambda peaks, rows, new, group, dim, window: peaks.usual_s(
            8e-6, *prefill_work(peaks, rows, new, _no(new), group, dim, window)
        ),
    ),
    "decode": Curve(
        sizes={
            "rows": (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384),
            "read": (2, *_powers(4, 17)),
            "group": (1, 2, 4, 8, 16, 64),
            "head_dim": HEAD_DIMS,
        },
        growing=("rows", "read"),
        usual_s=lambda peaks, rows, read, group, dim: peaks.usual_s(8e-6, *decode_work(peaks, rows, read, group, dim)),
    ),
    "decode_window": Curve(
        sizes={
            "rows": (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384),
            "read": (2, 32, 64, 128, 512, 1024, 8192),
            "group": (1, 4, 8, 16, 64),
            "head_dim": (64, 128, 192, 256),
        },
        growing=("rows", "read"),
        usual_s=lambda peaks, rows, read, group, dim: peaks.usual_s(8e-6, *decode_work(peaks, rows, read, group, dim)),
    ),
    "latent_prefill": Curve(
        sizes={
            "requests": (1, 4, 16, 64, 256),
            "new_tokens": (*PROMPTS, 32768.0),
            "heads": (1, 4, 16, 32, 64, 128),
        },
        growing=("requests", "new_tokens"),
        usual_s=latent_prefill_usual_s,
    ),
    "latent_decode": Curve(
        sizes={
            "requests": (1, 4, 16, 32, 64, 128, 256, 1024),
            "context_tokens": (2, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
            "heads": (1, 4, 16, 32, 64, 128),
        },
        growing=("requests", "context_tokens"),
        usual_s=latent_decode_usual_s,
    ),
    "experts": EXPERT_CURVE,
    "experts_balanced": EXPERT_CURVE,
    **{
        kind: Curve(
            sizes=EXCHANGE_SIZES,
            growing=("bytes",),
            usual_s=lambda peaks, gpus, size, rounds=rounds: exchange_usual_s(peaks, rounds, gpus, size),
        )
        for kind, rounds in {
            "all_reduce": 2.0,
            "custom_all_reduce": 2.0,
            "all_gather": 1.0,
            "reduce_scatter": 1.0,
            "all_to_all": 1.0,
        }.items()
    },
}
