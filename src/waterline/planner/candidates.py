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
from waterline.units import gib_text, seconds_text
from waterline.workload import Slo

# Of what a replica sustains at its SLO. The rest absorbs the ups and downs of arrivals, so that the SLO holds for
# nearly every request and not only for the mean one. The rehearsal shows whether it was enough.
PLANNED_UTILIZATION = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one replica has to do: requests of these mean lengths, in at most this context, within this SLO."""

    prompt_tokens: int
    output_tokens: int
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
    point: ServingPoint  # at the largest batch that meets the SLO
    limited_by: Limit  # what keeps the batch from growing

    @property
    def requests_per_s(self) -> float:
        """What to plan with."""
        return self.point.requests_per_s * PLANNED_UTILIZATION


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A layout that does not do, and why."""

    node: Node
    layout: Layout
    precision: str
    binding: str  # "precision", "memory", "ttft" or "tpot"
    shortfall: float  # how far from doing: bytes for memory, seconds for times; less is nearer
    reason: str


def layouts(node: Node, nodes: int) -> Iterator[Layout]:
    """Yield tensor parallel degrees inside a node, then pipelines of such groups over several nodes.

    Tensor parallelism never leaves a node: its all-reduces need the fast link. Without a PCIe bus there is no network
    to span nodes with.
    """
    degree = 1
    while degree <= node.gpus:
        yield Layout(tp=degree)
        degree *= 2
    whole_node = degree // 2
    for stages in range(2, (nodes if node.gpu.pcie_bytes_per_s else 1) + 1):
        yield Layout(tp=whole_node, pp=stages)


def price(llm: Llm, node: Node, layout: Layout, precision: str, engine: str, work: Work) -> Candidate | Rejection:
    """Price one replica, at the largest batch at which the work meets its SLO."""

    def reject(binding: str, shortfall: float, reason: str) -> Rejection:
        return Rejection(
            node=node, layout=layout, precision=precision, binding=binding, shortfall=shortfall, reason=reason
        )

    profile = find_engine(engine)
    gpu = node.gpu
    if not any(rate in gpu.flops_per_s for rate in PRECISIONS[precision].compute):
        return reject("precision", math.inf, f"{gpu.id} has no units for {precision}")
    memory = memory_use(llm, gpu, layout, precision, profile)
    tokens = cache_tokens(llm, layout, memory, work.max_context_tokens)
    if tokens == 0:
        return reject("memory", *_memory_shortfall(llm, node, layout, memory, work))
    step = step_cost(llm, gpu, layout, precision, profile)
    most = min(profile.max_batch, max(1, tokens // (work.prompt_tokens + work.output_tokens)))
    best, failed = _largest_batch(step, most, work)
    if best is None:
        binding = "tpot" if failed.tpot_s > work.slo.tpot_s else "ttft"
        got, goal = (failed.tpot_s, work.slo.tpot_s) if binding == "tpot" else (failed.ttft_s, work.slo.ttft_s)
        return reject(
            binding,
            got - goal,
            f"{binding.upper()} is {seconds_text(got)} for a single request, the SLO allows {seconds_text(goal)}",
        )
    limited_by: Limit = "engine" if most == profile.max_batch else "memory"
    if best.batch < most:
        limited_by = "tpot" if failed.tpot_s > work.slo.tpot_s else "ttft"
    return Candidate(
        node=node,
        layout=layout,
        precision=precision,
        engine=profile,
        memory=memory,
        step=step,
        cache_tokens=tokens,
        point=best,
        limited_by=limited_by,
    )


def point_at(candidate: Candidate, requests_per_s: float, work: Work) -> ServingPoint:
    """Return the smallest batch that keeps up with a rate: where the replica runs when the rate is steady."""
    low, high = 1, candidate.point.batch
    while low < high:
        middle = (low + high) // 2
        point = serving_point(candidate.step, middle, work.prompt_tokens, work.output_tokens)
        low, high = (low, middle) if point.requests_per_s >= requests_per_s else (middle + 1, high)
    return serving_point(candidate.step, low, work.prompt_tokens, work.output_tokens)


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


def _largest_batch(step: StepCost, most: int, work: Work) -> tuple[ServingPoint | None, ServingPoint]:
    """Return the point of the largest batch within the SLO, and the first one outside it (or the last one tried).

    Both times grow with the batch, so bisection finds it.
    """

    def at(batch: int) -> ServingPoint:
        return serving_point(step, batch, work.prompt_tokens, work.output_tokens)

    def meets(point: ServingPoint) -> bool:
        return point.tpot_s <= work.slo.tpot_s and point.ttft_s <= work.slo.ttft_s

    first = at(1)
    if not meets(first):
        return None, first
    best, failed = first, at(most)
    if meets(failed):
        return failed, failed
    while failed.batch - best.batch > 1:
        point = at((best.batch + failed.batch) // 2)
        best, failed = (point, failed) if meets(point) else (best, point)
    return best, failed
