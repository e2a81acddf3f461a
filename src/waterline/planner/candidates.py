"""The shapes worth pricing: every layout of a model on a kind of node, with what it holds and how fast it is.

Prompts may be read on replicas of their own and their cache sent to others that write the answers, and experts may be
spread over several nodes, where the cards have a fast fabric of their own (NVLink, Infinity Fabric): machines built
like that give each card a port to other nodes, which is what the cost model takes for granted there.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from waterline.catalog.calibration import calibration_of
from waterline.catalog.engines import EngineProfile, find_engine
from waterline.cost import (
    MemoryUse,
    ServingPoint,
    StepCost,
    cache_tokens,
    embedding_parameters,
    memory_use,
    sequence_cache_bytes,
    serving_point,
    step_cost,
    weights_bytes,
)
from waterline.cost.kernels import SKEWED_SHARE, find_kernels
from waterline.cost.layers import NETWORK_BYTES_PER_S, forms
from waterline.cost.measured import MOST_BATCH, measured_step
from waterline.cost.memory import gpu_weights
from waterline.fleet import Measured
from waterline.hardware import Gpu, Node
from waterline.llm import PRECISIONS, Llm
from waterline.plan import Layout, Limit, Role
from waterline.planner.queueing import (
    UNDERSTATED,
    Counts,
    Lengths,
    Load,
    Numbers,
    Pace,
    Slos,
    largest_batches,
    late_fractions,
    long_multiple,
    paces,
    quantile_s,
    reading_paces,
    sustained,
    sustained_reading,
)
from waterline.units import fraction_text, gib_text, seconds_text
from waterline.workload import Slo

MOST_STAGES = 8  # of a pipeline: each adds its latency to every token
WIDE_NODES = (2, 4, 8)  # that experts are spread over
SPLITTING = ("vllm", "sglang", "trtllm", "fake")  # engines that send the cache of a prompt to another replica
ROLES: tuple[Role, ...] = ("both", "prefill", "decode")
SIDE = 0.5  # of the late requests that an SLO allows, for each side of a split
LITTLE_ROOM = 1 / 3  # of the memory, for weights: with less than that there is more cache than a batch takes
SURE = 0.9  # of the bytes and operations that a bound counts: biases, norms and scales are counted roughly


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one replica has to do: requests of these lengths, in at most this context, within this SLO."""

    lengths: Lengths
    max_context_tokens: int
    slo: Slo


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shape:
    """What is priced: a replica of a model on nodes of a kind."""

    llm: Llm
    node: Node
    nodes: int  # of this kind, that it may span
    layout: Layout
    precision: str
    engine: str
    role: Role = "both"
    measured: Measured | None = None  # believed instead of the cost model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A shape that holds the model and meets the SLO of some work."""

    shape: Shape
    work: Work
    engine: EngineProfile
    memory: MemoryUse
    step: StepCost
    cache_tokens: int
    places: int  # for requests that are under way: cache, and the engine's own limit
    max_batch: int  # decoded together, at most: as many of those places as the SLO's time per token allows
    requests_per_s: float = 0.0  # the most at which the SLO, or its side's part of it, holds for its fraction of them
    limited_by: Limit = "engine"  # what keeps `requests_per_s` from growing

    @property
    def node(self) -> Node:
        return self.shape.node

    @property
    def layout(self) -> Layout:
        return self.shape.layout

    @property
    def precision(self) -> str:
        return self.shape.precision

    @property
    def role(self) -> Role:
        return self.shape.role

    @property
    def lengths(self) -> Lengths:
        """Of the work; rates that were measured count the tokens found in the cache, so those are read like others."""
        lengths = replace(self.work.lengths, longest_tokens=self.work.max_context_tokens)
        return replace(lengths, prefix_hit=0.0) if self.shape.measured else lengths

    @property
    def full(self) -> ServingPoint:
        """With as many requests as it decodes together, always."""
        lengths = self.work.lengths
        return serving_point(
            self.step, self.max_batch, lengths.prompt_tokens, lengths.output_tokens, lengths.context_tokens
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rejection:
    """A shape that does not do, and why."""

    shape: Shape
    binding: str  # "precision", "memory", "ttft" or "tpot"
    shortfall: float  # how far from doing: bytes for memory, seconds for times; less is nearer
    reason: str

    @property
    def role(self) -> Role:
        return self.shape.role

    @property
    def layout(self) -> Layout:
        return self.shape.layout

    @property
    def precision(self) -> str:
        return self.shape.precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """A replica at a rate that it sustains."""

    ttft_s: float  # what the SLO's fraction of the requests keep to; of a replica that only writes: 0
    tpot_s: float  # likewise; of one that only reads: 0
    read_s: float  # a prompt of mean length, in steps full of prompts, others decoding along
    plain_s: float  # a step without prompts
    batch: float  # answers under way, mean


# --- What is worth pricing ------------------------------------------------------------------------------------------


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


def expert_layouts(llm: Llm, node: Node, nodes: int) -> Iterator[Layout]:
    """Yield what else a model of experts is run as: whole experts on each card, attention divided or on each card.

    Attention on each card for itself (data-parallel) is for models whose cache tensor parallelism does not divide: MLA,
    or fewer heads of keys than cards. Over several nodes it needs `fast_fabric`.
    """
    experts = max((layers.experts for layers in llm.feed_forward), default=0)
    if experts < node.gpus or node.gpus == 1:
        return
    if all(group.query_heads % node.gpus == 0 for group in llm.attention):
        yield Layout(tp=node.gpus, ep=node.gpus)
    if not any(group.kind == "latent" or group.kv_heads < node.gpus for group in llm.attention):
        return
    yield Layout(dp=node.gpus, ep=node.gpus)
    for count in WIDE_NODES if fast_fabric(node.gpu) else ():
        if count <= nodes and count * node.gpus <= experts:
            yield Layout(dp=count * node.gpus, ep=count * node.gpus)


def fast_fabric(gpu: Gpu) -> bool:
    """Return whether machines with this card are built with a port to other nodes for each card."""
    return gpu.link.kind.startswith(("nvlink", "xgmi")) and not gpu.link.kind.endswith(("-bridge", "-c2c"))


def shapes(
    llm: Llm, node: Node, nodes: int, precisions: Sequence[str], engine: str, measured: Sequence[Measured] = ()
) -> list[Shape]:
    """Return everything worth pricing of a model on a kind of node: layouts, precisions, and roles.

    A kind of GPU that was `measured` has that one shape, in the first precision.
    """
    for one in measured:
        if one.gpu == node.gpu.id:
            return [
                Shape(
                    llm=llm, node=node, nodes=nodes, layout=measured_layout(llm, node, one.gpus),
                    precision=precisions[0], engine=engine, role=role, measured=one,
                )
                for role in roles(node.gpu, engine)
            ]  # fmt: skip
    found = [*layouts(llm, node, nodes)]
    if engine != "llamacpp":
        found += expert_layouts(llm, node, nodes)
    return [
        Shape(llm=llm, node=node, nodes=nodes, layout=layout, precision=precision, engine=engine, role=role)
        for precision in precisions
        for layout in found
        if layout.pp == 1 or _worth_stages(weights_bytes(llm, precision), node.gpu, layout)
        for role in (roles(node.gpu, engine) if layout.pp == 1 else ROLES[:1])
    ]


def _worth_stages(weights: int, gpu: Gpu, layout: Layout) -> bool:
    """Return whether one stage fewer would leave little room: more stages are no faster, they only hold more."""
    return weights > LITTLE_ROOM * gpu.memory_bytes * layout.tp * (layout.pp - 1)


def roles(gpu: Gpu, engine: str) -> tuple[Role, ...]:
    """Return what replicas on a card can be for."""
    return ROLES if fast_fabric(gpu) and engine in SPLITTING else ("both",)


def measured_layout(llm: Llm, node: Node, gpus: int) -> Layout:
    """Return how GPUs that were measured together are named: models of experts with attention on each, others divided.

    More of them than a node has are the stages of a pipeline, where they are not data-parallel.
    """
    if any(layers.experts for layers in llm.feed_forward):
        return Layout(dp=gpus, ep=gpus)
    if gpus <= node.gpus:
        return Layout(tp=gpus)
    stages = -(-gpus // node.gpus)
    return Layout(tp=gpus // stages, pp=stages) if gpus % stages == 0 else Layout(pp=gpus)


# --- Bounds ---------------------------------------------------------------------------------------------------------


def bound_requests_per_s(shape: Shape, work: Work) -> float:
    """Return a rate that a shape cannot exceed, whatever its kernels: 0 where it does not do at all.

    Prompts take their arithmetic at the card's peak, and a step reads its weights and the cache of those it decodes at
    the card's bandwidth, on top of what the engine's host does. The cost model never is faster, so what is not good
    enough by this bound need not be priced.
    """
    llm, gpu, layout, lengths = shape.llm, shape.node.gpu, shape.layout, work.lengths
    if shape.measured or not _computes(gpu, shape.precision):
        return math.inf if shape.measured else 0.0
    engine = find_engine(shape.engine).on(gpu)
    memory = memory_use(llm, gpu, layout, shape.precision, engine)
    tokens = cache_tokens(llm, layout, memory, work.max_context_tokens)
    if tokens == 0:
        return 0.0
    kernels = find_kernels(gpu)
    peak = max(kernels.peaks_of("gemm", form).flops_per_s for form in set(forms(llm, shape.precision).values()))
    flops = SURE * 2 * (llm.active_parameters - embedding_parameters(llm))  # a token, attention apart
    read_s = (lengths.prompt_tokens - lengths.cached_tokens) * flops / (peak * layout.tp)  # on one rank
    plain_s = _least_plain_s(shape, lengths, memory)
    longest = long_multiple(lengths.prompt_sigma, work.slo.fraction)
    if shape.role != "decode" and plain_s(1) + longest * read_s > work.slo.ttft_s:
        return 0.0
    reads = layout.dp / read_s if shape.role != "decode" else math.inf
    if shape.role == "prefill":
        return reads
    places = min(engine.max_batch * layout.dp, max(1, tokens // lengths.context_tokens))
    if plain_s(1) > work.slo.tpot_s:
        return 0.0
    low, high = 1.0, float(places)  # the largest batch in time, from above: a step takes longer the more it decodes
    while high > 1.05 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if plain_s(middle) <= work.slo.tpot_s else (low, middle)
    return min(reads, high / (lengths.output_tokens * plain_s(high)))


def _least_plain_s(shape: Shape, lengths: Lengths, memory: MemoryUse) -> Callable[[float], float]:
    """Return the least a step without prompts can take, by its decodes."""
    llm, layout, bytes_per_s = shape.llm, shape.layout, shape.node.gpu.memory_bytes_per_s
    one_stage = Layout(tp=layout.tp, dp=layout.dp, ep=layout.ep)  # a step passes all of them
    weights = gpu_weights(llm, shape.precision, one_stage)
    engine = calibration_of(find_engine(shape.engine).name, shape.node.gpu.stack)
    always_s = engine.step_s + engine.layer_s * llm.layers + engine.stage_s * (layout.pp - 1)
    always_s += SURE * (weights.attention_bytes + weights.dense_bytes) / bytes_per_s
    experts_s = SURE * SKEWED_SHARE * weights.experts_bytes / bytes_per_s
    chosen = min((group.experts_per_token / group.experts for group in llm.feed_forward if group.experts), default=0.0)
    kept = sequence_cache_bytes(llm, lengths.context_tokens, one_stage, element_bytes=memory.cache_element_bytes)
    sparse = any(group.selected_tokens for group in llm.attention)
    one_more_s = (engine.token_s + (0.0 if sparse else SURE * kept / bytes_per_s)) / layout.dp
    return lambda decodes: always_s + experts_s * -math.expm1(-decodes * chosen) + decodes * one_more_s


# --- Pricing --------------------------------------------------------------------------------------------------------


def price(
    llm: Llm, node: Node, layout: Layout, precision: str, engine: str, work: Work, role: Role = "both"
) -> Candidate | Rejection:
    """Price one replica, at the largest rate at which the work meets its SLO."""
    shape = Shape(llm=llm, node=node, nodes=1, layout=layout, precision=precision, engine=engine, role=role)
    return price_all([shape], [work])[0][0]


def price_all(shapes: Sequence[Shape], works: Sequence[Work]) -> list[list[Candidate | Rejection]]:
    """Price every shape for every work, many at a time; the result is [work][shape]."""
    steps: dict[object, StepCost] = {}
    priced = {work: [hold(shape, work, steps) for shape in shapes] for work in dict.fromkeys(works)}
    for role in ROLES:
        places = [
            (work, index)
            for work, row in priced.items()
            for index, one in enumerate(row)
            if isinstance(one, Candidate) and one.role == role
        ]
        held = [one for work, index in places if isinstance(one := priced[work][index], Candidate)]
        if held:
            for (work, index), answer in zip(places, _Together(role, held).priced(), strict=True):
                priced[work][index] = answer
    return [priced[work] for work in works]


def expected(candidate: Candidate, requests_per_s: float) -> Expected:
    """Return what is expected of one candidate at a rate; see `expected_all`."""
    return expected_all([candidate], [requests_per_s])[0]


def expected_all(candidates: Sequence[Candidate], requests_per_s: Sequence[float]) -> list[Expected]:
    """Return what is expected of candidates that are given a rate each, none more than it sustains."""
    found: dict[int, Expected] = {}
    for role in ROLES:
        chosen = [index for index, one in enumerate(candidates) if one.role == role]
        if chosen:
            rates = np.array([min(requests_per_s[index], candidates[index].requests_per_s) for index in chosen])
            together = _Together(role, [candidates[index] for index in chosen])
            found |= zip(chosen, together.expected(rates), strict=True)
    return [found[index] for index in range(len(candidates))]


def hold(shape: Shape, work: Work, steps: dict[object, StepCost] | None = None) -> Candidate | Rejection:
    """Return a shape that holds the model and one request, its rate not known yet, or why it does not.

    `steps` keeps what was priced, for other roles and other work of the same replica.
    """
    node, layout, precision = shape.node, shape.layout, shape.precision
    engine = find_engine(shape.engine).on(node.gpu)
    memory = memory_use(shape.llm, node.gpu, layout, precision, engine)
    if shape.measured:  # it ran, whatever we make of its memory
        tokens, places = MOST_BATCH * work.max_context_tokens, MOST_BATCH
    elif not _computes(node.gpu, precision):
        reason = f"{node.gpu.id} has no units for {precision}"
        return Rejection(shape=shape, binding="precision", shortfall=math.inf, reason=reason)
    else:
        tokens = cache_tokens(shape.llm, layout, memory, work.max_context_tokens)
        places = min(engine.max_batch * layout.dp, max(1, tokens // work.lengths.context_tokens))
    if tokens == 0:
        shortfall, reason = _memory_shortfall(shape, memory, work)
        return Rejection(shape=shape, binding="memory", shortfall=shortfall, reason=reason)
    return Candidate(
        shape=shape,
        work=work,
        engine=engine,
        memory=memory,
        step=_step_of(shape, engine, {} if steps is None else steps),
        cache_tokens=tokens,
        places=places,
        max_batch=places,
    )


def _computes(gpu: Gpu, precision: str) -> bool:
    return any(rate in gpu.flops_per_s for rate in PRECISIONS[precision].compute)


def _step_of(shape: Shape, engine: EngineProfile, known: dict[object, StepCost]) -> StepCost:
    llm, gpu, layout, precision = shape.llm, shape.node.gpu, shape.layout, shape.precision
    key = (id(llm), gpu.id, layout, precision, engine.name, shape.measured)
    if key not in known:
        measured = shape.measured
        known[key] = measured_step(measured) if measured else step_cost(llm, gpu, layout, precision, engine)
    return known[key]


class _Together:
    """Candidates for one role that are priced together; every array has an entry a candidate."""

    def __init__(self, role: Role, held: Sequence[Candidate]) -> None:
        self.role, self.held = role, held
        self.load = Load([one.step for one in held], [one.lengths for one in held], reads=role != "decode")
        self.slos = Slos([one.work.slo for one in held], share=1.0 if role == "both" else SIDE)
        self.places = np.array([one.places for one in held])
        self.transfer_s = np.array([_transfer_s(one) if role == "prefill" else 0.0 for one in held])

    def priced(self) -> list[Candidate | Rejection]:
        """Return each with the largest rate at which its SLO holds, or why there is none."""
        most = self.places
        if self.role == "prefill":
            pace = sustained_reading(self.load, self.slos, self.transfer_s)
        else:
            most = largest_batches(self.load, self.places, self.slos)
            pace = sustained(self.load, most, self.slos)
        rates, limits = pace.requests_per_s, self._limits(pace, most)
        found: list[Candidate | Rejection] = [
            replace(one, requests_per_s=rate, limited_by=limit, max_batch=batch)
            for one, rate, limit, batch in zip(self.held, rates.tolist(), limits, most.tolist(), strict=True)
        ]
        slow = np.flatnonzero(rates == 0).tolist()
        alone = expected_all([self.held[index] for index in slow], [0.0] * len(slow))
        for index, times in zip(slow, alone, strict=True):
            found[index] = _too_slow(self.held[index], times)
        return found

    def expected(self, requests_per_s: Numbers) -> list[Expected]:
        """Return what is expected at rates that are sustained."""
        pace = self._paces(requests_per_s)
        allowed, alone_s = self.slos.late_fraction, pace.first_token_s + pace.plain_s + pace.own_s
        ttft_s = quantile_s(pace.late_first_fraction, allowed, alone_s)
        tpot_s = quantile_s(pace.late_tokens_fraction, allowed / UNDERSTATED, pace.plain_s * (1 + 1e-6))
        # Rates and times are searched for to a tenth of a percent: what is in time is not told to be just late.
        in_time = pace.late_first_fraction(self.slos.ttft_s) <= 1.01 * allowed
        ttft_s = np.where(in_time, np.minimum(ttft_s, self.slos.ttft_s), ttft_s)
        in_time = UNDERSTATED * pace.late_tokens_fraction(self.slos.tpot_s) <= 1.01 * allowed
        tpot_s = np.where(in_time, np.minimum(tpot_s, self.slos.tpot_s), tpot_s)
        if self.role == "prefill":
            tpot_s = np.zeros_like(tpot_s)
        elif self.role == "decode":
            ttft_s = np.zeros_like(ttft_s)
        columns = (ttft_s, tpot_s, pace.read_s, pace.plain_s, pace.batch)
        return [
            Expected(ttft_s=ttft_s, tpot_s=tpot_s, read_s=read_s, plain_s=plain_s, batch=batch)
            for ttft_s, tpot_s, read_s, plain_s, batch in zip(*(one.tolist() for one in columns), strict=True)
        ]

    def _paces(self, requests_per_s: Numbers) -> Pace:
        if self.role == "prefill":
            return reading_paces(self.load, self.slos, self.transfer_s, requests_per_s)
        return paces(self.load, requests_per_s)[0]

    def _limits(self, pace: Pace, most: Counts) -> list[Limit]:
        """Say what breaks just beyond the sustained rates: the times, or the room for requests."""
        if self.role == "prefill":
            return ["ttft"] * len(self.held)
        late = late_fractions(pace, most, self.slos, reads=self.role == "both")
        found: list[Limit] = []
        for one, batch, worst in zip(self.held, most.tolist(), np.argmax(late, axis=0).tolist(), strict=True):
            if worst == 0:
                found.append("ttft")
            elif worst == 1 or batch < one.places:  # fewer than there are places, to keep to the time per token
                found.append("tpot")
            else:
                found.append("memory" if one.places < one.engine.max_batch * one.layout.dp else "engine")
        return found


def _too_slow(candidate: Candidate, alone: Expected) -> Rejection:
    """Say by how much a lone request is late."""
    slo = candidate.work.slo
    slow_tokens = alone.tpot_s / slo.tpot_s > alone.ttft_s / slo.ttft_s
    binding, got_s, goal_s = ("tpot", alone.tpot_s, slo.tpot_s) if slow_tokens else ("ttft", alone.ttft_s, slo.ttft_s)
    reason = f"{binding.upper()} is {seconds_text(got_s)} for {fraction_text(slo.fraction)} of the requests"
    reason += f", even one at a time; the SLO allows {seconds_text(goal_s)}"
    return Rejection(shape=candidate.shape, binding=binding, shortfall=got_s - goal_s, reason=reason)


def _transfer_s(candidate: Candidate) -> float:
    """Return the time to send the cache of a prompt of mean length to another node, each card through its own port."""
    sent = sequence_cache_bytes(
        candidate.shape.llm,
        candidate.lengths.prompt_tokens,
        candidate.layout,
        block_tokens=candidate.memory.block_tokens,
        element_bytes=candidate.memory.cache_element_bytes,
    )
    return sent / NETWORK_BYTES_PER_S


def _memory_shortfall(shape: Shape, memory: MemoryUse, work: Work) -> tuple[float, str]:
    """Return the missing bytes over all cards, and the sentence that says so."""
    gpus, gpu = shape.layout.gpus, shape.node.gpu.id
    cards = f"one {gpu} offers" if gpus == 1 else f"each of {gpus} {gpu} offers"
    offer = f"{cards} {gib_text(memory.usable_bytes)}"
    if memory.cache_bytes <= 0:
        weights = f"weights {gib_text(memory.weights_bytes * gpus)} in all"
        return -memory.cache_bytes * gpus, f"needs {gib_text(memory.needed_bytes)} a card ({weights}), {offer}"
    sequence = sequence_cache_bytes(shape.llm, work.max_context_tokens, shape.layout)
    needed = f"{gib_text(memory.needed_bytes)} and {gib_text(sequence)} of cache a card"
    return (
        (sequence - memory.cache_bytes) * gpus,
        f"a context of {work.max_context_tokens} tokens needs {needed}, {offer}",
    )
