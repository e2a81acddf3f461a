"""The shapes worth pricing: every layout of a model on a kind of node, with what it holds and how fast it is."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from waterline.catalog.engines import EngineProfile, find_engine
from waterline.cost import (
    MemoryUse,
    ServingPoint,
    StepCost,
    cache_tokens,
    memory_use,
    sequence_cache_bytes,
    serving_point,
    step_cost,
)
from waterline.hardware import Node
from waterline.llm import PRECISIONS, Llm
from waterline.plan import Layout, Limit
from waterline.planner.queueing import Lengths, Pace, pace_at, quantile_s, sustained_requests_per_s
from waterline.units import gib_text, seconds_text
from waterline.workload import Slo

MOST_STAGES = 8  # of a pipeline: each adds its latency to every token


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one replica has to do: requests of these lengths, in at most this context, within this SLO."""

    lengths: Lengths
    max_context_tokens: int
    slo: Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout that holds the model and meets the SLO."""

    node: Node
    layout: Layout
    precision: str
    engine: EngineProfile
    memory: MemoryUse
    step: StepCost
    cache_tokens: int
    requests_per_s: float  # the most at which the SLO holds for its fraction of the requests
    full: ServingPoint  # with as many requests as the SLO's time per token allows, always
    limited_by: Limit  # what keeps `requests_per_s` from growing


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A layout that does not do, and why."""

    node: Node
    layout: Layout
    precision: str
    binding: str  # "precision", "memory", "ttft" or "tpot"
    shortfall: float  # how far from doing: bytes for memory, seconds for times; less is nearer
    reason: str


def layouts(llm: Llm, node: Node, nodes: int) -> Iterator[Layout]:
    """Yield tensor parallel degrees inside a node, then pipelines of such groups over several nodes.

    Tensor parallelism never leaves a node, because its all-reduces need the fast link, and divides the heads evenly,
    because engines ask for that. A stage has at least a layer. Without a PCIe bus there is no network to span nodes
    with.
    """
    degree = whole_node = 1
    while degree <= node.gpus and all(group.query_heads % degree == 0 for group in llm.attention):
        yield Layout(tp=degree)
        whole_node, degree = degree, 2 * degree
    stages = min(nodes * (node.gpus // whole_node), llm.layers, MOST_STAGES) if node.gpu.pcie_bytes_per_s else 1
    for count in range(2, stages + 1):
        yield Layout(tp=whole_node, pp=count)


def price(llm: Llm, node: Node, layout: Layout, precision: str, engine: str, work: Work) -> Candidate | Rejection:
    """Price one replica, at the largest rate at which the work meets its SLO."""

    def reject(binding: str, shortfall: float, reason: str) -> Rejection:
        return Rejection(
            node=node, layout=layout, precision=precision, binding=binding, shortfall=shortfall, reason=reason
        )

    gpu = node.gpu
    profile = find_engine(engine).on(gpu)
    if not any(rate in gpu.flops_per_s for rate in PRECISIONS[precision].compute):
        return reject("precision", math.inf, f"{gpu.id} has no units for {precision}")
    memory = memory_use(llm, gpu, layout, precision, profile)
    tokens = cache_tokens(llm, layout, memory, work.max_context_tokens)
    if tokens == 0:
        return reject("memory", *_memory_shortfall(llm, node, layout, memory, work))
    step = step_cost(llm, gpu, layout, precision, profile)
    most = min(profile.max_batch, max(1, tokens // work.lengths.context_tokens))
    requests_per_s = sustained_requests_per_s(step, work.lengths, most, work.slo)
    if requests_per_s == 0.0:
        return reject(*_slo_shortfall(pace_of(step, 0.0, work), work.slo))
    return Candidate(
        node=node,
        layout=layout,
        precision=precision,
        engine=profile,
        memory=memory,
        step=step,
        cache_tokens=tokens,
        requests_per_s=requests_per_s,
        full=_full(step, most, work),
        limited_by=_limit(pace_of(step, requests_per_s, work), work.slo, profile.max_batch > most),
    )


def pace_of(step: StepCost, requests_per_s: float, work: Work) -> Pace:
    """Return the pace at a rate that is known to be sustained."""
    pace = pace_at(step, requests_per_s, work.lengths)
    assert pace is not None  # noqa: S101 - what was sustained does not fall behind
    return pace


def expected_times_s(pace: Pace, slo: Slo) -> tuple[float, float]:
    """Return the TTFT and TPOT that the SLO's fraction of the requests keep to."""
    return quantile_s(pace.late_first_fraction, slo.fraction), quantile_s(pace.late_tokens_fraction, slo.fraction)


def _limit(pace: Pace, slo: Slo, fewer_than_the_engine_allows: bool) -> Limit:  # noqa: FBT001 - read at its one call
    """Say what breaks just beyond the sustained rate: the times, or else the room for requests."""
    late_first, late_tokens = pace.late_first_fraction(slo.ttft_s), pace.late_tokens_fraction(slo.tpot_s)
    if late_first + late_tokens > 0.9 * (1 - slo.fraction):
        return "ttft" if late_first > late_tokens else "tpot"
    return "memory" if fewer_than_the_engine_allows else "engine"


def _slo_shortfall(alone: Pace, slo: Slo) -> tuple[str, float, str]:
    ttft_s, tpot_s = expected_times_s(alone, slo)
    binding, got_s, goal_s = ("tpot", tpot_s, slo.tpot_s) if tpot_s > slo.tpot_s else ("ttft", ttft_s, slo.ttft_s)
    reason = f"{binding.upper()} is {seconds_text(got_s)} for {slo.fraction:.4g} of the requests, even one at a time"
    return binding, got_s - goal_s, f"{reason}; the SLO allows {seconds_text(goal_s)}"


def _memory_shortfall(llm: Llm, node: Node, layout: Layout, memory: MemoryUse, work: Work) -> tuple[float, str]:
    """Return the missing bytes over all cards, and the sentence that says so."""
    gpus = layout.gpus
    cards = f"one {node.gpu.id} offers" if gpus == 1 else f"each of {gpus} {node.gpu.id} offers"
    offer = f"{cards} {gib_text(memory.usable_bytes)}"
    if memory.cache_bytes <= 0:
        weights = f"weights {gib_text(memory.weights_bytes * gpus)} in all"
        return -memory.cache_bytes * gpus, f"needs {gib_text(memory.needed_bytes)} a card ({weights}), {offer}"
    sequence = sequence_cache_bytes(llm, work.max_context_tokens, layout)
    needed = f"{gib_text(memory.needed_bytes)} and {gib_text(sequence)} of cache a card"
    return (
        (sequence - memory.cache_bytes) * gpus,
        f"a context of {work.max_context_tokens} tokens needs {needed}, {offer}",
    )


def _full(step: StepCost, most: int, work: Work) -> ServingPoint:
    """Return the point of the largest batch whose time per token is within the SLO; that time grows with the batch."""

    def at(batch: int) -> ServingPoint:
        lengths = work.lengths
        return serving_point(step, batch, lengths.prompt_tokens, lengths.output_tokens, lengths.context_tokens)

    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if at(middle).tpot_s <= work.slo.tpot_s else (low, middle - 1)
    return at(low)
