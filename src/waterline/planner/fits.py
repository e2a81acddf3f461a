"""The tiers of a model: for every card the smallest number of them that runs it, and how fast."""

import math
from collections.abc import Iterable, Iterator

from msgspec import Struct
from msgspec.structs import replace

from waterline import catalog
from waterline.catalog.engines import runs_on
from waterline.cost import estimate_replica
from waterline.errors import InputError
from waterline.hardware import Gpu, Node
from waterline.llm import PRECISIONS, Llm
from waterline.plan import Layout
from waterline.planner.candidates import Candidate, Shape, Work, hold, layouts
from waterline.planner.queueing import usual_lengths
from waterline.units import HOUR_S, MEGA
from waterline.workload import Slo

MOST_NODES = 4
ANY_TIME = Slo(ttft_s=1e9, tpot_s=1e9)
PROMPT_TOKENS, OUTPUT_TOKENS = 1000, 200  # of the requests the times are given for


class Fit(Struct, frozen=True, kw_only=True):
    """One card and a model: what runs it, or why nothing does."""

    gpu: str
    vendor: str
    runs: bool
    gpus: int = 0
    precision: str = ""
    layout: Layout | None = None
    max_context_tokens: int = 0  # one request may have
    max_concurrency: int = 0  # requests of the context asked for, at once
    ttft_s: float | None = None  # mean at the concurrency asked for, all of whose requests come again at once …
    ttft_low_s: float | None = None  # … and what four of five measurements lie between
    ttft_high_s: float | None = None
    tpot_s: float | None = None
    tpot_low_s: float | None = None
    tpot_high_s: float | None = None
    output_tokens_per_s: float | None = None
    provenance: str = ""  # of the times: a word of `waterline.cost.Estimate`
    usd_per_hour: float | None = None  # None: no price known
    price_kind: str = ""  # "on_demand", "community", or "purchase": derived from what the card costs to buy
    usd_per_million_tokens: float | None = None  # prompt and output, at the largest concurrency
    why_not: str = ""
    whole_node: bool = False  # all cards of a node as one replica, instead of as few as it takes


def default_fit_precisions(llm: Llm, engine: str) -> tuple[str, ...]:
    """Return the published precision, then the usual smaller ones, the best first; of llama.cpp its own formats."""
    if engine == "llamacpp":
        usual: tuple[str, ...] = ("fp16", "q8_0", "q4_k_m")
        if llm.precision in {"fp8", "int8", "int4", "nvfp4"}:
            return usual[1:]
    else:
        usual = ("bf16", "fp8", "int8", "int4")
    smaller = (name for name in usual if PRECISIONS[name].bits <= PRECISIONS[llm.precision].bits)
    return tuple(dict.fromkeys((llm.precision, *smaller)))


def fits(
    llm: Llm, gpus: Iterable[Gpu], precisions: tuple[str, ...], engine: str, context_tokens: int, concurrency: int
) -> list[Fit]:
    """Return a fit for each card, those that run it first, the cheapest first.

    A price derived from what a card costs to buy leaves out power and housing, so those stand behind rented ones.
    """
    llamacpp_only = [precision for precision in precisions if PRECISIONS[precision].gguf]
    if llamacpp_only and engine in {"vllm", "sglang", "trtllm"}:
        raise InputError(
            f"{llamacpp_only[0]} is a format of llama.cpp, {engine} does not run it. Add --engine llamacpp, or take "
            "another --precision."
        )
    work = _work(context_tokens)
    found = [_fit(llm, gpu, precisions, engine, work, concurrency) for gpu in gpus]
    return sorted(found, key=_rank)


def _work(context_tokens: int) -> Work:
    return Work(
        lengths=usual_lengths(*example_lengths(context_tokens)), max_context_tokens=context_tokens, slo=ANY_TIME
    )


def example_lengths(context_tokens: int) -> tuple[int, int]:
    """Return the prompt and output tokens of the requests that times are given for."""
    return max(1, min(PROMPT_TOKENS, context_tokens * 5 // 6)), max(1, min(OUTPUT_TOKENS, context_tokens // 6))


def _rank(fit: Fit) -> tuple[bool, bool, bool, float, int]:
    return (not fit.runs, fit.usd_per_hour is None, fit.price_kind == "purchase", fit.usd_per_hour or 0.0, fit.gpus)


def _fit(llm: Llm, gpu: Gpu, precisions: tuple[str, ...], engine: str, work: Work, concurrency: int) -> Fit:
    if not runs_on(engine, gpu):
        return Fit(gpu=gpu.id, vendor=gpu.vendor, runs=False, why_not=f"{engine} runs on NVIDIA's cards alone")
    node = Node(gpu=gpu, gpus=gpu.gpus_per_node)
    why_not, nearest = "", math.inf
    for precision, layout in _smallest_first(llm, node, precisions):
        shape = Shape(llm=llm, node=node, nodes=MOST_NODES, layout=layout, precision=precision, engine=engine)
        priced = hold(shape, work)
        if isinstance(priced, Candidate):
            most = _most(priced)
            if most >= concurrency:
                return _runs(llm, priced, work, concurrency)
            cards = f"{layout.gpus} {gpu.id} hold" if layout.gpus > 1 else f"one {gpu.id} holds"
            requests = f"{most} requests of {work.max_context_tokens} tokens"
            nearest, why_not = -most, f"{precision} {layout}: {cards} the model and {requests}, not {concurrency}"
        elif priced.shortfall < nearest or not why_not:
            nearest, why_not = priced.shortfall, f"{precision} {layout}: {priced.reason}"
    return Fit(gpu=gpu.id, vendor=gpu.vendor, runs=False, why_not=why_not)


def whole_nodes(
    llm: Llm, gpus: Iterable[Gpu], precisions: tuple[str, ...], engine: str, context_tokens: int, concurrency: int
) -> list[Fit]:
    """Return a fit for a whole node of each card as one replica, in the most bits that it holds; none it is not for.

    That is a node of more than one card whose number divides the heads of the model.
    """
    work, found = _work(context_tokens), []
    for gpu in (one for one in gpus if runs_on(engine, one)):
        node = Node(gpu=gpu, gpus=gpu.gpus_per_node)
        whole = [layout for layout in layouts(llm, node, 1) if layout.tp == node.gpus > 1]
        shapes = (
            Shape(llm=llm, node=node, nodes=1, layout=layout, precision=precision, engine=engine)
            for layout in whole
            for precision in _best_first(precisions)
        )
        held = (one for one in (hold(shape, work) for shape in shapes) if isinstance(one, Candidate))
        if best := next((one for one in held if _most(one) >= concurrency), None):
            found.append(replace(_runs(llm, best, work, concurrency), whole_node=True))
    return found


def _most(candidate: Candidate) -> int:
    """Return the requests of the longest context that a replica holds."""
    return min(candidate.cache_tokens // candidate.work.max_context_tokens, candidate.engine.max_batch)


def _smallest_first(llm: Llm, node: Node, precisions: tuple[str, ...]) -> Iterator[tuple[str, Layout]]:
    """Fewer cards before more, and on the same cards the precision with more bits first."""
    for layout in layouts(llm, node, MOST_NODES):
        for precision in _best_first(precisions):
            yield precision, layout


def _best_first(precisions: tuple[str, ...]) -> list[str]:
    return sorted(precisions, key=lambda name: -PRECISIONS[name].bits)


def _runs(llm: Llm, candidate: Candidate, work: Work, concurrency: int) -> Fit:
    prompt_tokens, output_tokens = work.lengths.prompt_tokens, work.lengths.output_tokens
    now = estimate_replica(
        llm, candidate.node.gpu, candidate.layout, candidate.precision, candidate.engine, candidate.step,
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, concurrency=concurrency,
    )  # fmt: skip
    price_per_gpu = catalog.usd_per_gpu_hour(candidate.node.gpu.id)
    usd_per_hour = price_per_gpu.usd_per_gpu_hour * candidate.layout.gpus if price_per_gpu else None
    tokens_per_hour = candidate.full.requests_per_s * (prompt_tokens + output_tokens) * HOUR_S
    return Fit(
        gpu=candidate.node.gpu.id,
        vendor=candidate.node.gpu.vendor,
        runs=True,
        gpus=candidate.layout.gpus,
        precision=candidate.precision,
        layout=candidate.layout,
        max_context_tokens=min(candidate.cache_tokens, llm.max_context_tokens),
        max_concurrency=_most(candidate),
        ttft_s=now.ttft_s.value,
        ttft_low_s=now.ttft_s.low,
        ttft_high_s=now.ttft_s.high,
        tpot_s=now.tpot_s.value,
        tpot_low_s=now.tpot_s.low,
        tpot_high_s=now.tpot_s.high,
        output_tokens_per_s=now.tokens_per_s_per_gpu.value * candidate.layout.gpus,
        provenance=now.provenance,
        usd_per_hour=usd_per_hour,
        price_kind=price_per_gpu.kind if price_per_gpu else "",
        usd_per_million_tokens=usd_per_hour / tokens_per_hour * MEGA if usd_per_hour is not None else None,
    )
