"""What a client of a replica would measure, with the interval it is worth: a closed loop of equal requests.

So many clients send a request each, wait for its answer and send the next, as the common benchmarks do. Each figure has
an 80 % interval, taken from how far estimates of this kind lay from serving runs that had no part in their fit, and a
provenance that says how near those runs were.
"""

from dataclasses import dataclass

from waterline.catalog.calibration import Calibration, Spread, calibration_of
from waterline.catalog.engines import EngineProfile
from waterline.cost.kernels import find_kernels
from waterline.cost.memory import MemoryUse, memory_use, most_sequences
from waterline.cost.serving import Pieces, pieces
from waterline.cost.step import StepCost
from waterline.errors import InfeasibleError, InputError
from waterline.hardware import Gpu
from waterline.llm import Llm
from waterline.plan import Layout
from waterline.units import gib_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """An estimate and the interval that holds four of five measurements."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A replica under a number of clients; means over requests.

    provenance:
        ``measured``      kernels and engine were measured on this very card
        ``interpolated``  kernels were measured on this card, the engine on others
        ``transferred``   the curves are those of another card of its class, scaled to this card's peaks
        ``physics``       nothing near was measured: bytes, operations and the efficiency they usually reach
    """

    ttft_s: Between
    tpot_s: Between
    tokens_per_s_per_gpu: Between  # output tokens
    needed_bytes_per_gpu: int  # weights, activations, engine, and the cache of the requests
    running: int  # requests that decode together; the others wait for a place
    provenance: str
    notes: tuple[str, ...] = ()


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
    _check(llm, prompt_tokens, output_tokens, concurrency, prefix_hit)
    memory = memory_use(llm, gpu, layout, precision, engine)
    context = prompt_tokens + output_tokens // 2  # requests are at any stage: the mean is what they hold
    places = room_for(llm, gpu, layout, precision, engine, memory, context)
    calibration, kernels = calibration_of(engine.name, gpu.stack), find_kernels(gpu)
    running = min(concurrency, places, engine.max_batch * layout.dp)
    found = pieces(step, running, prompt_tokens, context, round(prefix_hit * prompt_tokens))
    ttft_s, tpot_s = closed_loop(found, calibration, running, output_tokens, concurrency, step.ranks)
    provenance = _provenance(kernels.provenance, gpu, calibration)
    spread = calibration.spread_of(provenance)
    notes = [] if running == concurrency else [f"{running} of {concurrency} requests run, the others wait"]
    asked = {"isl": prompt_tokens, "osl": output_tokens, "concurrency": concurrency}
    notes += [
        f"{name} {asked[name]} is beyond twice what was measured, {most}"
        for name, most in calibration.most.items()
        if asked[name] > 2 * most
    ]
    per_sequence = memory.cache_bytes / max(1, places)
    return Estimate(
        ttft_s=_between(ttft_s, spread.ttft),
        tpot_s=_between(tpot_s, spread.tpot),
        tokens_per_s_per_gpu=_rate(ttft_s, tpot_s, output_tokens, concurrency / layout.gpus, spread),
        needed_bytes_per_gpu=round(memory.needed_bytes + running * per_sequence),
        running=running,
        provenance=provenance,
        notes=tuple(notes),
    )


def room_for(
    llm: Llm, gpu: Gpu, layout: Layout, precision: str, engine: EngineProfile, memory: MemoryUse, tokens: int
) -> int:
    """Return how many requests of so many tokens the cache holds. Raises InfeasibleError when not even one."""
    places = most_sequences(llm, layout, memory, tokens) if memory.cache_bytes > 0 else 0
    if places < 1:
        raise InfeasibleError(
            f"{llm.name} in {precision} on {layout.gpus} {gpu.id} ({layout}) needs "
            f"{gib_text(memory.needed_bytes)} of each before any cache; {engine.name} can use "
            f"{gib_text(memory.usable_bytes)}, and one request of {tokens} tokens does not fit. Take more cards or "
            "fewer bits."
        )
    return places


def closed_loop(
    found: Pieces, calibration: Calibration, running: int, output_tokens: int, concurrency: int, ranks: int = 1
) -> tuple[float, float]:
    """Return mean TTFT and TPOT of a closed loop of `concurrency` clients, of which `running` are served at a time.

    In a step `running / output_tokens` requests finish and as many prompts have to be read; what that adds to the steps
    is shared by all tokens. A first token takes the engine's own time, the reading of its prompt, and, for those that
    start together, the reading of half the prompts in front. Who finds no place waits for those who have one.
    """
    tpot_s = found.plain_s + running / output_tokens * found.delay_s
    ttft_s = calibration.request_s + calibration.reading * found.alone_s + calibration.steps * tpot_s
    ttft_s += calibration.together * running / ranks / 2 * found.alone_s
    answer_s = ttft_s + (output_tokens - 1) * tpot_s
    return ttft_s + (concurrency - running) / running * answer_s, tpot_s


def _check(llm: Llm, prompt_tokens: int, output_tokens: int, concurrency: int, prefix_hit: float) -> None:
    for name, value in (("isl", prompt_tokens), ("osl", output_tokens), ("concurrency", concurrency)):
        if value < 1:
            raise InputError(f"{name} = {value} should be at least 1.")
    if not 0 <= prefix_hit <= 1:
        raise InputError(f"prefix_hit = {prefix_hit:g} should be a share from 0 to 1.")
    if prompt_tokens + output_tokens > llm.max_context_tokens:
        raise InputError(
            f"isl + osl = {prompt_tokens + output_tokens} tokens; {llm.name} has a context of {llm.max_context_tokens}."
        )


def _provenance(kernels: str, gpu: Gpu, calibration: Calibration) -> str:
    if not calibration.source:
        return "physics"
    if kernels != "measured":
        return "transferred"
    return "measured" if gpu.id in calibration.gpus else "interpolated"


def _between(value: float, ratios: tuple[float, float]) -> Between:
    """Ratios are measured over estimated, at the 10th and the 90th of a hundred."""
    return Between(value=value, low=value * ratios[0], high=value * ratios[1])


def _rate(ttft_s: float, tpot_s: float, output_tokens: int, clients: float, spread: Spread) -> Between:
    def at(ttft_ratio: float, tpot_ratio: float) -> float:
        return clients * output_tokens / (ttft_s * ttft_ratio + (output_tokens - 1) * tpot_s * tpot_ratio)

    return Between(value=at(1, 1), low=at(spread.ttft[1], spread.tpot[1]), high=at(spread.ttft[0], spread.tpot[0]))
