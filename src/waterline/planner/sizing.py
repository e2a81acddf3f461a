"""How many GPUs a load takes: one model, one rate, and every card, layout and split that could serve it.

Cards are priced in the order of the least they could cost, by `bound_requests_per_s`, until the others cannot come
among the best any more: the answer is that of pricing everything.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from msgspec import Struct

from waterline.cost import estimate_replica
from waterline.errors import InfeasibleError
from waterline.hardware import Gpu, Node
from waterline.llm import PRECISIONS, Llm
from waterline.plan import Layout, Limit, Role
from waterline.planner.candidates import (
    MOST_STAGES,
    ROLES,
    Candidate,
    Rejection,
    Shape,
    Work,
    bound_requests_per_s,
    expected_all,
    price_all,
    shapes,
)
from waterline.planner.problem import SIMPLER
from waterline.units import HOUR_S, MEGA
from waterline.workload import Slo

Aim = Literal["cheapest", "fewest"]

Rank = tuple[float, float]  # dollars an hour and GPUs, or GPUs and dollars: less is better
NOTHING: Rank = (math.inf, math.inf)

_Part = tuple[Candidate, int]  # and how many replicas
NODES = MOST_STAGES  # of each card, that a replica may span
CARDS_SHOWN = 6
LAYOUTS_SHOWN = 6  # of the best card
FEW_WHOLE = 4  # replicas beside a split, or that a split takes the place of
MIXED_REPLICAS = 8  # of the best layout, that others may take the place of
AT_ONCE = 4  # cards priced together
MISSES_SHOWN = 3
LONG = 4  # times the mean: a context that nearly all requests fit in


class Part(Struct, frozen=True, kw_only=True):
    """Replicas that are alike."""

    role: Role
    layout: Layout
    replicas: int
    gpus: int
    requests_per_s: float  # the most that one of them takes
    limited_by: Limit


class Choice(Struct, frozen=True, kw_only=True):
    """Replicas on one card that serve the load; times are those that the SLO's fraction of the requests keep to."""

    gpu: str
    gpus: int
    precision: str
    layout: str
    replicas: int
    ttft_s: float
    ttft_low_s: float  # four of five measurements lie between these two
    ttft_high_s: float
    tpot_s: float
    tpot_low_s: float
    tpot_high_s: float
    usd_per_hour: float | None  # None: no price known
    usd_per_million_tokens: float | None  # prompt and output
    provenance: str  # of the times: a word of `waterline.cost.Estimate`
    parts: tuple[Part, ...]  # one, or the sides of a split


class Sizing(Choice, frozen=True, kw_only=True):
    """The best choice, what it was asked for, and what comes next."""

    model: str
    engine: str
    requests_per_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_hit: float
    max_context_tokens: int
    slo: Slo
    aim: Aim  # what was best: dollars, or GPUs
    alternatives: tuple[Choice, ...]  # the best of the other cards, and other layouts of the best card; the best first
    unpriced: tuple[str, ...] = ()  # cards left out, because no price is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A load, and what may serve it."""

    llm: Llm
    requests_per_s: float
    work: Work
    gpus: Sequence[Gpu]
    precisions: Sequence[str]
    engine: str
    aim: Aim
    usd_per_gpu_hour: Mapping[str, float]  # by the id of the card


@dataclass(frozen=True, slots=True)
class _Option:
    """Candidates that serve the load together, and how many replicas of each."""

    parts: tuple[_Part, ...]
    rank: Rank

    @property
    def gpu(self) -> str:
        return self.parts[0][0].node.gpu.id

    def __str__(self) -> str:
        return " + ".join(
            f"{candidate.layout}" + ("" if candidate.role == "both" else f" {candidate.role}")
            for candidate, _ in self.parts
        )


def size(question: Question) -> Sizing:
    """Return the best choice and the runners-up. Raises InfeasibleError saying why there is none, and what would do.

    Cards of which no price is known cannot be the cheapest, so they are left out of that question, unless all are.
    """
    priced = [gpu for gpu in question.gpus if gpu.id in question.usd_per_gpu_hour]
    unpriced = tuple(gpu.id for gpu in question.gpus if gpu.id not in question.usd_per_gpu_hour)
    if question.aim == "cheapest":
        question = replace(question, gpus=priced) if priced else replace(question, aim="fewest")
    options = _options(question)
    if not options:
        raise InfeasibleError(_why_not(question))
    choices = _choices(question, [options[0], *_shown(options)])
    lengths = question.work.lengths
    return Sizing(
        **{name: getattr(choices[0], name) for name in Choice.__struct_fields__},
        model=question.llm.name,
        engine=question.engine,
        requests_per_s=question.requests_per_s,
        prompt_tokens=lengths.prompt_tokens,
        output_tokens=lengths.output_tokens,
        prefix_hit=lengths.prefix_hit,
        max_context_tokens=question.work.max_context_tokens,
        slo=question.work.slo,
        aim=question.aim,
        alternatives=tuple(choices[1:]),
        unpriced=unpriced,
    )


def _shown(options: Sequence[_Option]) -> list[_Option]:
    """Return what stands beside the best one: the best of the other cards, and other layouts of its own."""
    best = options[0]
    others: dict[str, _Option] = {}
    for option in options[1:]:
        if option.gpu != best.gpu:
            others.setdefault(option.gpu, option)
    own = [option for option in options[1:] if option.gpu == best.gpu]
    found = [*list(others.values())[: CARDS_SHOWN - 1], *own[: LAYOUTS_SHOWN - 1]]
    return sorted(found, key=lambda option: option.rank)


# --- Searching ------------------------------------------------------------------------------------------------------


class _Card:
    """A card, the shapes that may serve the load on it, and what it ranks at best."""

    def __init__(self, question: Question, gpu: Gpu) -> None:
        node = Node(gpu=gpu, gpus=gpu.gpus_per_node)
        found = shapes(question.llm, node, NODES, question.precisions, question.engine)
        ranked = [(_least(question, shape), shape) for shape in found]
        self.gpu = gpu.id
        self.shapes = [shape for rank, shape in ranked if rank < NOTHING]
        whole, reading, writing = (
            min((rank for rank, shape in ranked if shape.role == role), default=NOTHING) for role in ROLES
        )
        self.least = min(whole, (reading[0] + writing[0], reading[1] + writing[1]))


def _options(question: Question) -> list[_Option]:
    """Return what serves the load, the best first, no worse than the best of the last card that is shown."""
    waiting = sorted((_Card(question, gpu) for gpu in question.gpus), key=lambda card: card.least)
    options: list[_Option] = []
    while waiting and waiting[0].least <= _worst_shown(options) and waiting[0].least < NOTHING:
        some, waiting = waiting[:AT_ONCE], waiting[AT_ONCE:]
        wanted = [shape for card in some for shape in card.shapes]
        options += _combined(question, price_all(wanted, [question.work])[0])
        worst = _worst_shown(options)
        options = sorted(  # what cannot be shown is let go, because steps are large
            (option for option in options if option.rank <= worst),
            key=lambda option: (option.rank, option.gpu, str(option), option.parts[0][0].precision),
        )
    return options


def _worst_shown(options: Sequence[_Option]) -> Rank:
    """Return the rank of the last card that would be shown; without so many every card has its chance."""
    best: dict[str, Rank] = {}
    for option in options:
        best[option.gpu] = min(option.rank, best.get(option.gpu, option.rank))
    ranks = sorted(best.values())
    return ranks[CARDS_SHOWN - 1] if len(ranks) >= CARDS_SHOWN else NOTHING


def _least(question: Question, shape: Shape) -> Rank:
    """Return what the load costs at least on such replicas, and parts of one."""
    bound = bound_requests_per_s(shape, question.work)
    if bound <= 0:
        return NOTHING
    gpus = shape.layout.gpus * question.requests_per_s / bound
    usd = question.usd_per_gpu_hour.get(shape.node.gpu.id, 0.0) * gpus
    return (usd, gpus) if question.aim == "cheapest" else (gpus, usd)


def _replicas(question: Question, requests_per_s: float) -> int:
    return max(1, math.ceil(question.requests_per_s / requests_per_s))


def _combined(question: Question, priced: Sequence[Candidate | Rejection]) -> Iterator[_Option]:
    """Yield what serves the load: one layout, two that split it, and mixtures in which the last replica is small."""
    groups: dict[tuple[str, str], dict[Role, list[Candidate]]] = {}
    for one in priced:
        if isinstance(one, Candidate):
            groups.setdefault((one.node.gpu.id, one.precision), {}).setdefault(one.role, []).append(one)
    for by_role in groups.values():
        found: dict[Role, list[_Option]] = {
            role: [_option(question, [(one, _replicas(question, one.requests_per_s))]) for one in some]
            for role, some in by_role.items()
        }
        yield from found.get("both", [])
        mixed = [_option(question, _mixed(question, by_role["both"]))] if "both" in by_role else []
        if "prefill" in by_role and "decode" in by_role:
            reading = min(found["prefill"], key=lambda option: option.rank)
            yield from (_option(question, [*reading.parts, *writing.parts]) for writing in found["decode"])
            sides = (_mixed(question, by_role["prefill"]), _mixed(question, by_role["decode"]))
            mixed.append(_option(question, [*sides[0], *sides[1]]))
            mixed += sorted(_partly_split(question, by_role), key=lambda option: option.rank)[:1]
        yield from (
            option
            for option in mixed
            if len({(one.role, one.layout) for one, _ in option.parts}) > len({one.role for one, _ in option.parts})
        )


def _partly_split(question: Question, by_role: Mapping[Role, Sequence[Candidate]]) -> Iterator[_Option]:
    """Yield what serves nearly all by a split, or nearly all by one layout: the few others fill what is left over."""
    if "both" not in by_role:
        return
    best = max(by_role["both"], key=lambda one: one.requests_per_s / one.layout.gpus)
    whole = _replicas(question, best.requests_per_s)
    few = range(1, FEW_WHOLE + 1)
    for replicas in sorted({*few, *(whole - one for one in few)}):
        left = question.requests_per_s - replicas * best.requests_per_s
        if replicas > 0 and left > 0:
            rest = replace(question, requests_per_s=left)
            sides = (_mixed(rest, by_role["prefill"]), _mixed(rest, by_role["decode"]))
            yield _option(question, [(best, replicas), *sides[0], *sides[1]])


def _option(question: Question, parts: Sequence[_Part]) -> _Option:
    """Return parts with their rank; what is split counts as dearer, as it does in a plan (`problem.SIMPLER`)."""
    gpus = sum(one.layout.gpus * replicas * (1 if one.role == "both" else 1 + SIMPLER) for one, replicas in parts)
    usd = question.usd_per_gpu_hour.get(parts[0][0].node.gpu.id, 0.0) * gpus
    return _Option(tuple(parts), (usd, float(gpus)) if question.aim == "cheapest" else (float(gpus), usd))


def _mixed(question: Question, candidates: Sequence[Candidate]) -> list[_Part]:
    """Return the fewest GPUs of candidates for one role: most are of the best layout, and the rest may be of others."""
    best = max(candidates, key=lambda one: one.requests_per_s / one.layout.gpus)
    bulk = max(0, int(question.requests_per_s / best.requests_per_s) - MIXED_REPLICAS)
    left = question.requests_per_s - bulk * best.requests_per_s
    reached: list[tuple[float, int, Candidate | None]] = [
        (0.0, 0, None)
    ]  # [GPUs] the most they do, from where, with what
    while reached[-1][0] < left:
        gpus = len(reached)
        reached.append(
            max(
                ((reached[gpus - one.layout.gpus][0] + one.requests_per_s, gpus - one.layout.gpus, one)
                 for one in candidates if one.layout.gpus <= gpus),
                key=lambda step: step[0],
                default=(0.0, gpus - 1, None),
            )
        )  # fmt: skip
    counts: dict[int, int] = {id(best): bulk}
    gpus = len(reached) - 1
    while gpus:
        _, gpus, used = reached[gpus]
        if used:
            counts[id(used)] = counts.get(id(used), 0) + 1
    return [(one, counts[id(one)]) for one in candidates if counts.get(id(one))]


# --- Answering ------------------------------------------------------------------------------------------------------


def _choices(question: Question, options: Sequence[_Option]) -> list[Choice]:
    """Return options as people read them, each replica at its part of the rate."""
    parts = [part for option in options for part in option.parts]
    rates = [rate for option in options for rate in _rates(question, option)]
    expected = iter(expected_all([candidate for candidate, _ in parts], rates))
    found = []
    for option in options:
        times = [next(expected) for _ in option.parts]
        # A split is judged by the side that writes: it is there that requests spend their time.
        writer, _ = option.parts[-1]
        estimate = estimate_replica(
            question.llm, writer.node.gpu, writer.layout, writer.precision, writer.engine, writer.step,
            prompt_tokens=question.work.lengths.prompt_tokens,
            output_tokens=question.work.lengths.output_tokens,
            concurrency=max(1, round(times[-1].batch)),
        )  # fmt: skip
        ttft_s, tpot_s = max(one.ttft_s for one in times), max(one.tpot_s for one in times)
        gpus = sum(candidate.layout.gpus * replicas for candidate, replicas in option.parts)
        price = question.usd_per_gpu_hour.get(option.gpu)
        usd_per_hour = None if price is None else price * gpus
        lengths = question.work.lengths
        tokens_per_hour = question.requests_per_s * (lengths.prompt_tokens + lengths.output_tokens) * HOUR_S
        found.append(
            Choice(
                gpu=option.gpu,
                gpus=gpus,
                precision=writer.precision,
                layout=str(option),
                replicas=sum(replicas for _, replicas in option.parts),
                ttft_s=ttft_s,
                ttft_low_s=ttft_s * estimate.ttft_s.low / estimate.ttft_s.value,
                ttft_high_s=ttft_s * estimate.ttft_s.high / estimate.ttft_s.value,
                tpot_s=tpot_s,
                tpot_low_s=tpot_s * estimate.tpot_s.low / estimate.tpot_s.value,
                tpot_high_s=tpot_s * estimate.tpot_s.high / estimate.tpot_s.value,
                usd_per_hour=usd_per_hour,
                usd_per_million_tokens=None if usd_per_hour is None else usd_per_hour / tokens_per_hour * MEGA,
                provenance=estimate.provenance,
                parts=tuple(
                    Part(
                        role=candidate.role,
                        layout=candidate.layout,
                        replicas=replicas,
                        gpus=candidate.layout.gpus * replicas,
                        requests_per_s=candidate.requests_per_s,
                        limited_by=candidate.limited_by,
                    )
                    for candidate, replicas in option.parts
                ),
            )
        )
    return found


def _rates(question: Question, option: _Option) -> list[float]:
    """Return what each replica of each part gets: replicas for one role are busy alike."""
    able: dict[Role, float] = dict.fromkeys(ROLES, 0.0)
    for one, replicas in option.parts:
        able[one.role] += replicas * one.requests_per_s
    split = min(able["prefill"], able["decode"])
    busy = min(1.0, question.requests_per_s / (able["both"] + split))
    return [
        one.requests_per_s * busy * (1.0 if one.role == "both" else split / able[one.role]) for one, _ in option.parts
    ]


# --- When nothing does ----------------------------------------------------------------------------------------------


def _why_not(question: Question) -> str:
    """Say how near the nearest cards come, and what would do: each remedy was tried."""
    rejections = [one for one in _priced_alone(question) if isinstance(one, Rejection)]
    nearest: dict[str, Rejection] = {}
    for one in sorted(rejections, key=lambda one: _distance(one, question)):
        nearest.setdefault(one.shape.node.gpu.id, one)
    near = [one.shape.node.gpu for one in list(nearest.values())[:CARDS_SHOWN]]
    shown = list(nearest.values())[:MISSES_SHOWN]
    misses = "; ".join(f"{one.shape.node.gpu.id}, {one.precision} {one.layout}: {one.reason}" for one in shown)
    more = f" ({len(nearest) - len(shown)} other cards miss by more)" if len(nearest) > len(shown) else ""
    advice = "; or ".join(_remedies(question, near)) or "other cards, or a smaller model"
    return f"{question.llm.name} cannot be served like that. {misses}{more}. What would do: {advice}."


def _distance(rejection: Rejection, question: Question) -> tuple[int, float]:
    """Order misses: late ones by the share they are late, before those that do not fit, by bytes."""
    slo = question.work.slo
    goals = {"ttft": (0, slo.ttft_s), "tpot": (0, slo.tpot_s), "memory": (1, 1.0), "precision": (2, 1.0)}
    order, goal = goals[rejection.binding]
    return order, rejection.shortfall / goal


def _remedies(question: Question, near: Sequence[Gpu]) -> Iterator[str]:
    """Yield changes to the question that have an answer; times are loosened for the cards that are near."""
    work, slo = question.work, question.work.slo
    others = [name for name, form in PRECISIONS.items() if form.gguf == (question.engine == "llamacpp")]
    for precision in sorted(set(others) - set(question.precisions), key=lambda name: -PRECISIONS[name].bits):
        if found := _best(replace(question, precisions=(precision,))):
            yield f"--precision {precision} ({found})"
            break
    enough = LONG * (work.lengths.prompt_tokens + work.lengths.output_tokens)
    shorter = replace(question, work=replace(work, max_context_tokens=enough))
    if work.max_context_tokens > enough and (found := _best(shorter)):
        yield f"--context {enough} ({found})"
    for patient in ({"ttft_s": 1e9}, {"tpot_s": 1e9}, {"ttft_s": 1e9, "tpot_s": 1e9}):
        times = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, **patient}
        if kept := _kept_slo(replace(question, gpus=near, work=replace(work, slo=Slo(**times, fraction=slo.fraction)))):
            looser = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, **{name: getattr(kept, name) for name in patient}}
            wish = Slo(**looser, fraction=slo.fraction)
            if found := _best(replace(question, work=replace(work, slo=wish))):
                words = " ".join(f"--{name.removesuffix('_s')} {looser[name]:g}" for name in patient)
                yield f"{words} ({found})"
                break


def _priced_alone(question: Question) -> list[Candidate | Rejection]:
    """Return every shape that does it all, on every card, priced."""
    found = [
        shape
        for gpu in question.gpus
        for shape in shapes(
            question.llm, Node(gpu=gpu, gpus=gpu.gpus_per_node), NODES, question.precisions, question.engine
        )
    ]
    return price_all([shape for shape in found if shape.role == "both"], [question.work])[0]


def _best(question: Question) -> str:
    """Return the best choice in a few words; empty if there is none."""
    options = _options(question)
    if not options:
        return ""
    gpus = sum(candidate.layout.gpus * replicas for candidate, replicas in options[0].parts)
    return f"{gpus} x {options[0].gpu}"


def _kept_slo(question: Question) -> Slo | None:
    """Return times that a lone request keeps to with a fifth to spare, on the candidate that is nearest to its SLO."""
    found = [one for one in _priced_alone(question) if isinstance(one, Candidate)]
    times = expected_all(found, [0.0] * len(found))
    least = min(times, key=lambda one: one.ttft_s * one.tpot_s, default=None)
    if least is None:
        return None
    return Slo(ttft_s=_rounded_up(1.2 * least.ttft_s), tpot_s=_rounded_up(1.2 * least.tpot_s))


def _rounded_up(value: float) -> float:
    """Return two digits that are not less."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step) * step:.2g}")
