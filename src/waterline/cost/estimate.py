"""What a client of a replica would measure, with the interval it is worth: equal requests, asked for in two ways.

In a closed loop so many clients send a request each, wait for its answer and send the next, as the common benchmarks
do. At a rate, requests come independently of one another, as those of many users do. Each figure has an 80 % interval,
taken from how far estimates of this kind lay from serving runs that had no part in their fit, and a provenance that
says how near those runs were. Prompts and answers on replicas of their own: `waterline.cost.split`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from waterline.catalog.calibration import Calibration, Spread, calibration_of
from waterline.catalog.engines import EngineProfile
from waterline.cost.kernels import find_kernels
from waterline.cost.memory import MemoryUse, memory_use, most_sequences
from waterline.cost.serving import OpenPoint, Pieces, open_point, pieces, sustained_requests_per_s
from waterline.cost.step import StepCost
from waterline.errors import InfeasibleError, InputError
from waterline.hardware import Gpu
from waterline.llm import Llm
from waterline.plan import Layout
from waterline.units import gib_text

MEANING = {  # of each provenance, the best first
    "measured": "kernels, and the engine with this model, were measured on the card",
    "interpolated": "kernels were measured on the card, the engine on others or with other models",
    "transferred": "from the nearest card measured, scaled to the card's peaks",
    "physics": "bytes, operations and usual efficiencies",
}
PROVENANCES = tuple(MEANING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """An estimate and the interval that holds four of five measurements."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A replica under a load; means over requests.

    provenance:
        ``measured``      kernels, and the engine with this model, were measured on this very card
        ``interpolated``  kernels were measured on this card, the engine on others or with other models
        ``transferred``   the curves are those of another card of its class, scaled to this card's peaks
        ``physics``       nothing near was measured: bytes, operations and the efficiency they usually reach
    """

    ttft_s: Between
    tpot_s: Between
    tokens_per_s_per_gpu: Between  # output tokens
    needed_bytes_per_gpu: int  # weights, activations, engine, and the cache of the requests
    running: int  # requests that decode together; the others wait for a place
    provenance: str
    sustained_requests_per_s: Between | None = None  # at a rate: the most that can be asked for
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Requests, all alike."""

    prompt_tokens: int
    output_tokens: int
    prefix_hit: float = 0.0  # share of the prompt's tokens that are in the cache already, 0 to 1

    @property
    def cached_tokens(self) -> int:
        return round(self.prefix_hit * self.prompt_tokens)

    @property
    def context_tokens(self) -> int:
        """What a request under way holds: they are at any stage of their answers, so this is the mean."""
        return self.prompt_tokens + self.output_tokens // 2


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """A replica whose steps are priced, by `step_cost` of all the rest."""

    llm: Llm
    gpu: Gpu
    layout: Layout
    precision: str  # a key of `PRECISIONS`
    engine: EngineProfile
    step: StepCost

    @property
    def calibration(self) -> Calibration:
        return calibration_of(self.engine.name, self.gpu.stack)

    @property
    def memory(self) -> MemoryUse:
        return memory_use(self.llm, self.gpu, self.layout, self.precision, self.engine)

    @property
    def provenance(self) -> str:
        calibration = self.calibration
        if not calibration.source:
            return "physics"
        if find_kernels(self.gpu).provenance != "measured":
            return "transferred"
        return "measured" if calibration.ran(self.gpu, self.llm) else "interpolated"

    def pieces(self, asked: Asked, batch: int) -> Pieces:
        return pieces(self.step, batch, asked.prompt_tokens, asked.context_tokens, asked.cached_tokens)


def estimate_replica(
    llm: Llm,
    gpu: Gpu,
    layout: Layout,
    precision: str,
    engine: EngineProfile,
    step: StepCost,
    *,
    prompt_tokens: int,
    output_tokens: int,
    concurrency: int,
    prefix_hit: float = 0.0,
) -> Estimate:
    """Estimate what `concurrency` clients see of one replica whose steps cost `step`.

    Args:
        llm: the model.
        gpu: each card of the replica.
        layout: how the model is spread over them.
        precision: a key of `PRECISIONS`.
        engine: the engine that runs it.
        step: from `step_cost` of all these.
        prompt_tokens: of each request.
        output_tokens: of each answer.
        concurrency: clients, each with one request under way.
        prefix_hit: share of the prompt's tokens that are in the cache already, 0 to 1.

    Raises:
        InputError: a number is out of range, or requests are longer than the model's context.
        InfeasibleError: the model, or one request, does not fit.
    """
    asked = Asked(prompt_tokens=prompt_tokens, output_tokens=output_tokens, prefix_hit=prefix_hit)
    check(llm, asked, concurrency=concurrency)
    replica = Priced(llm, gpu, layout, precision, engine, step)
    memory = replica.memory
    places = room_for(replica, memory, asked.context_tokens)
    calibration = replica.calibration
    running = min(concurrency, places, engine.max_batch * layout.dp)
    ttft_s, tpot_s = closed_loop(replica.pieces(asked, running), calibration, running, output_tokens, concurrency)
    provenance = replica.provenance
    spread = calibration.spread_of(provenance)
    notes = [] if running == concurrency else [f"{running} of {concurrency} requests run, the others wait"]
    notes += beyond(calibration, asked, concurrency=concurrency, gpus=layout.gpus)
    return Estimate(
        ttft_s=between(ttft_s, spread.ttft),
        tpot_s=between(tpot_s, spread.tpot),
        tokens_per_s_per_gpu=rate_of(ttft_s, tpot_s, output_tokens, concurrency / layout.gpus, spread),
        needed_bytes_per_gpu=needed_bytes(memory, running, places),
        running=running,
        provenance=provenance,
        notes=tuple(notes),
    )


def estimate_at_rate(replica: Priced, asked: Asked, requests_per_s: float) -> Estimate:
    """Estimate what requests see of one replica when so many a second come, independently of one another.

    The first token waits for the prompts before it besides. `Estimate.sustained_requests_per_s` is where that grows
    without end; above its low edge the high edge of the first token is infinite.

    Raises:
        InputError: a number is out of range, or requests are longer than the model's context.
        InfeasibleError: the model, or one request, does not fit; or more come than the replica answers.
    """
    check(replica.llm, asked, requests_per_s=requests_per_s)
    memory = replica.memory
    places = room_for(replica, memory, asked.context_tokens)
    most = min(places, replica.engine.max_batch * replica.layout.dp)
    output_tokens, gpus = asked.output_tokens, replica.layout.gpus
    calibration, provenance = replica.calibration, replica.provenance
    spread = calibration.spread_of(provenance)

    @cache
    def price(batch: int) -> Pieces:
        return replica.pieces(asked, batch)

    rate, batch = sustained_requests_per_s(price, most, output_tokens)
    sustained = Between(value=rate, low=rate / spread.tpot[1], high=rate / spread.tpot[0])
    point = open_point(price, most, output_tokens, requests_per_s)
    if point is None:
        raise InfeasibleError(
            f"{requests_per_s:.4g} requests of {asked.prompt_tokens} + {output_tokens} tokens arrive a second; "
            f"{replica.layout.gpus} {replica.gpu.id} ({replica.layout}) answer {rate:.4g} ({sustained.low:.3g} to "
            f"{sustained.high:.3g}) with {batch} at once, and fall behind. Take at least "
            f"{math.ceil(requests_per_s / rate + 1e-9)} such replicas."
        )
    swift, slow = (open_point(price, most, output_tokens, requests_per_s, ratio) for ratio in spread.tpot)
    low_s, high_s = (
        math.inf if found is None else first_token_s(calibration, point, ratio) + found.wait_s
        for found, ratio in zip((swift, slow), spread.ttft, strict=True)
    )
    ttft_s = first_token_s(calibration, point) + point.wait_s
    notes = behind(requests_per_s, sustained) + beyond(calibration, asked, concurrency=point.batch, gpus=gpus)
    return Estimate(
        ttft_s=Between(value=ttft_s, low=min(low_s, ttft_s), high=max(high_s, ttft_s)),
        tpot_s=between(point.tpot_s, spread.tpot),
        tokens_per_s_per_gpu=at_rate(requests_per_s * output_tokens / gpus, sustained.low * output_tokens / gpus),
        needed_bytes_per_gpu=needed_bytes(memory, point.batch, places),
        running=point.batch,
        provenance=provenance,
        sustained_requests_per_s=sustained,
        notes=tuple(notes),
    )


def first_token_s(calibration: Calibration, point: OpenPoint, ratio: float = 1.0) -> float:
    """Return the time to a first token that waits for no other prompt; see `closed_loop`."""
    others_s = max(point.others_s, calibration.steps * point.tpot_s)
    return ratio * (calibration.request_s + calibration.reading * point.lone_s + others_s)


def room_for(replica: Priced, memory: MemoryUse, tokens: int) -> int:
    """Return how many requests of so many tokens the cache holds. Raises InfeasibleError when not even one."""
    places = most_sequences(replica.llm, replica.layout, memory, tokens) if memory.cache_bytes > 0 else 0
    if places < 1:
        raise InfeasibleError(
            f"{replica.llm.name} in {replica.precision} on {replica.layout.gpus} {replica.gpu.id} ({replica.layout}) "
            f"needs {gib_text(memory.needed_bytes)} of each before any cache; {replica.engine.name} can use "
            f"{gib_text(memory.usable_bytes)}, and one request of {tokens} tokens does not fit. Take more cards or "
            "fewer bits."
        )
    return places


def closed_loop(
    found: Pieces, calibration: Calibration, running: int, output_tokens: int, concurrency: int
) -> tuple[float, float]:
    """Return mean TTFT and TPOT of a closed loop of `concurrency` clients, of which `running` are served at a time.

    In a step `running / output_tokens` requests finish and as many prompts have to be read; what that adds to the steps
    is shared by all tokens. A first token takes the engine's own time, the reading of its prompt, and, for those that
    start together, the reading of half the prompts in front. Who finds no place waits for those who have one.
    """
    tpot_s = found.plain_s + running / output_tokens * found.delay_s
    ttft_s = calibration.request_s + calibration.reading * found.lone_s + calibration.steps * tpot_s
    ttft_s += calibration.together * running / 2 * found.lone_s
    answer_s = ttft_s + (output_tokens - 1) * tpot_s
    return ttft_s + (concurrency - running) / running * answer_s, tpot_s


def check(llm: Llm, asked: Asked, *, concurrency: int = 1, requests_per_s: float = 1.0) -> None:
    """Raise InputError for the first number that is out of range."""
    counts = {"isl": asked.prompt_tokens, "osl": asked.output_tokens, "concurrency": concurrency}
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name} = {value} should be at least 1.")
    if not 0 < requests_per_s < math.inf:
        raise InputError(f"request_rate = {requests_per_s:g} should be above 0.")
    if not 0 <= asked.prefix_hit <= 1:
        raise InputError(f"prefix_hit = {asked.prefix_hit:g} should be a share from 0 to 1.")
    tokens = asked.prompt_tokens + asked.output_tokens
    if tokens > llm.max_context_tokens:
        raise InputError(f"isl + osl = {tokens} tokens; {llm.name} has a context of {llm.max_context_tokens}.")


def beyond(calibration: Calibration, asked: Asked, **others: int) -> list[str]:
    """Say of every number that is more than twice the largest of the runs the engine was fitted on."""
    context = asked.prompt_tokens + asked.output_tokens
    sizes: Mapping[str, int] = {
        "isl": asked.prompt_tokens, "osl": asked.output_tokens, "context": context, **others,
    }  # fmt: skip
    return [
        f"{name} {sizes[name]} is beyond twice what was measured, {most}"
        for name, most in calibration.most.items()
        if sizes.get(name, 0) > 2 * most
    ]


def behind(requests_per_s: float, sustained: Between) -> list[str]:
    """Say so when a rate may be more than is sustained."""
    if requests_per_s <= sustained.low:
        return []
    return [f"may fall behind: {sustained.low:.3g} to {sustained.high:.3g} requests a second are sustained"]


def at_rate(tokens_per_s: float, sustained_low: float) -> Between:
    """Return what comes out where so much is asked for: all of it, unless less is sustained."""
    return Between(value=tokens_per_s, low=min(tokens_per_s, sustained_low), high=tokens_per_s)


def between(value: float, ratios: tuple[float, float]) -> Between:
    """Ratios are measured over estimated, at the 10th and the 90th of a hundred."""
    return Between(value=value, low=value * ratios[0], high=value * ratios[1])


def rate_of(ttft_s: float, tpot_s: float, output_tokens: int, clients: float, spread: Spread) -> Between:
    """Return the output tokens a second of a closed loop; `clients` may be those of one GPU."""

    def at(ttft_ratio: float, tpot_ratio: float) -> float:
        return clients * output_tokens / (ttft_s * ttft_ratio + (output_tokens - 1) * tpot_s * tpot_ratio)

    return Between(value=at(1, 1), low=at(spread.ttft[1], spread.tpot[1]), high=at(spread.ttft[0], spread.tpot[0]))


def needed_bytes(memory: MemoryUse, running: int, places: int) -> int:
    return round(memory.needed_bytes + running * memory.cache_bytes / max(1, places))
