"""Prefill and decode on replicas of their own: prompts are read here, their cache sent there, answers written there."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from waterline.catalog.calibration import Calibration
from waterline.cost.estimate import (
    PROVENANCES,
    Asked,
    Between,
    Estimate,
    Priced,
    at_rate,
    behind,
    between,
    beyond,
    check,
    needed_bytes,
    rate_of,
    room_for,
)
from waterline.cost.layers import NETWORK_BYTES_PER_S
from waterline.cost.memory import sequence_cache_bytes
from waterline.cost.serving import pieces
from waterline.cost.step import StepCost, prefill_pairs
from waterline.errors import InfeasibleError
from waterline.hardware import Gpu
from waterline.llm import Llm
from waterline.plan import Layout
from waterline.units import PICOSECONDS_PER_S, gib_text

AS_MEASURED = Calibration()


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The replicas of one kind, all alike."""

    step: StepCost
    replicas: int
    most: int  # requests one replica holds: cache and the engine's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPoint:
    """What requests see, and how near each side is to its limit."""

    ttft_s: float
    tpot_s: float
    batch: int  # requests a decode replica holds
    prefill_busy_fraction: float
    decode_busy_fraction: float  # of the requests its replicas can hold
    wait_s: float = 0.0  # of ttft_s, for the prompts before


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """The side that reads, one prompt after another on each of its data-parallel ranks."""

    lone_s: float  # one prompt, while the other ranks have none …
    alone_s: float  # … and while each of them has one as well
    busy_s: float  # of a rank, for each of many prompts: short ones are read several at a time
    ranks: int  # over all replicas

    @property
    def requests_per_s(self) -> float:
        return self.ranks / self.busy_s

    def own_s(self, busy: float) -> float:
        """Return the reading of one prompt while each of the other ranks reads one for such a share of the time."""
        return self.lone_s + busy * (self.alone_s - self.lone_s)

    def wait_s(self, requests_per_s: float, clients: int = 0, slower: float = 1.0) -> float:
        """Return the mean wait for the prompts before, which come independently (Pollaczek and Khinchine).

        Of the clients of a rank in a closed loop each finds the queue that the others make.
        """
        others = max(0.0, 1 - self.ranks / clients) if clients else 1.0
        busy = slower * requests_per_s / self.requests_per_s * others
        return slower * self.busy_s * busy / (2 * (1 - busy)) if busy < 1 else math.inf


def split_point(
    prefill: Side,
    decode: Side,
    requests_per_s: float,
    prompt_tokens: int,
    output_tokens: int,
    *,
    cached_tokens: int = 0,
    transfer_s: float = 0.0,
    clients: int = 0,
    calibration: Calibration = AS_MEASURED,
) -> SplitPoint:
    """Return the steady state of a split pair of sides.

    A prefill replica reads prompts in the order they come, one on each of its data-parallel ranks at a time; requests
    come independently, so they wait as in a queue with equal service times. A decode replica holds as many requests as
    come in the time of an answer (Little).

    Args:
        prefill: where prompts are read.
        decode: where answers are written.
        requests_per_s: that arrive, over all replicas.
        prompt_tokens: of each request.
        output_tokens: of each answer.
        cached_tokens: of the prompt that need not be read.
        transfer_s: to send the cache of a prompt from one side to the other.
        clients: whose requests these are, each with one under way; 0: they come independently of one another.
        calibration: of the engine, for what a first token takes besides.

    Raises InfeasibleError when a side cannot keep up; says which, and by how much.
    """
    reading = _reading(prefill, prompt_tokens, cached_tokens)
    busy = requests_per_s / reading.requests_per_s
    if busy >= 1:
        raise InfeasibleError(
            f"{prefill.replicas} prefill replicas read {requests_per_s / busy:.4g} prompts of {prompt_tokens} tokens a "
            f"second, {requests_per_s:.4g} arrive. Take at least {int(prefill.replicas * busy) + 1}."
        )
    batch, tpot_s = _settled(
        decode, requests_per_s / decode.replicas, prompt_tokens + output_tokens // 2, output_tokens
    )
    wait_s = reading.wait_s(requests_per_s, clients)
    own_s = calibration.request_s + calibration.reading * reading.own_s(busy)
    return SplitPoint(
        ttft_s=own_s + wait_s + transfer_s + tpot_s,  # passed on over there, in a step
        tpot_s=tpot_s,
        batch=batch,
        prefill_busy_fraction=busy,
        decode_busy_fraction=batch / decode.most,
        wait_s=wait_s,
    )


def _reading(prefill: Side, prompt_tokens: int, cached_tokens: int) -> _Reading:
    step = prefill.step
    one = pieces(step, 1, prompt_tokens, prompt_tokens, cached_tokens)
    first = min(cached_tokens, prompt_tokens - 1)
    several = step.ranks * max(1, step.step_tokens // step.ranks // (prompt_tokens - first))  # prompts in one step
    together_ps = step.step_ps(
        several * (prompt_tokens - first), several * prefill_pairs(first, prompt_tokens - first), 0, 0
    )
    busy_s = min(one.alone_s, together_ps / PICOSECONDS_PER_S * step.ranks / several)
    return _Reading(lone_s=one.lone_s, alone_s=one.alone_s, busy_s=busy_s, ranks=prefill.replicas * step.ranks)


def _writes_s(decode: Side, context_tokens: int) -> Callable[[int], float]:
    """Return the time of a token by the requests a replica holds."""
    return lambda batch: decode.step.step_ps(0, 0, batch, batch * context_tokens) / PICOSECONDS_PER_S


def _settled(decode: Side, requests_per_s: float, context_tokens: int, output_tokens: int) -> tuple[int, float]:
    """Return the smallest batch that finishes requests as fast as they come, and its time per token."""
    tpot_s = _writes_s(decode, context_tokens)

    def keeps_up(batch: int) -> bool:
        return batch >= requests_per_s * output_tokens * tpot_s(batch)

    if not keeps_up(decode.most):
        finished = decode.most / (output_tokens * tpot_s(decode.most))
        raise InfeasibleError(
            f"{decode.replicas} decode replicas of {decode.most} requests finish {finished * decode.replicas:.4g} a "
            f"second, {requests_per_s * decode.replicas:.4g} arrive. Take at least "
            f"{int(decode.replicas * requests_per_s / finished) + 1}."
        )
    low, high = 1, decode.most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps_up(middle) else (middle + 1, high)
    return low, tpot_s(low)


# --- with intervals -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """The replicas of one side, with all that prices them."""

    replica: Priced
    replicas: int

    @property
    def gpus(self) -> int:
        return self.replicas * self.replica.layout.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """Both sides and what is asked of them."""

    prefill: Side
    decode: Side
    asked: Asked
    transfer_s: float
    calibration: Calibration

    def at(self, requests_per_s: float, clients: int = 0) -> SplitPoint:
        return split_point(
            self.prefill, self.decode, requests_per_s, self.asked.prompt_tokens, self.asked.output_tokens,
            cached_tokens=self.asked.cached_tokens, transfer_s=self.transfer_s, clients=clients,
            calibration=self.calibration,
        )  # fmt: skip

    @property
    def reading(self) -> _Reading:
        return _reading(self.prefill, self.asked.prompt_tokens, self.asked.cached_tokens)

    @property
    def sustained_requests_per_s(self) -> float:
        """What the slower of the sides sustains."""
        most = self.decode.most
        written_s = self.asked.output_tokens * _writes_s(self.decode, self.asked.context_tokens)(most)
        return min(self.reading.requests_per_s, self.decode.replicas * most / written_s)

    def closed_loop(self, clients: int) -> SplitPoint:
        """Return what so many clients see, each with one request under way: they set the rate, and it their times.

        Those for whom the slower side has no room wait in front.
        """

        def under_way(rate: float) -> float:
            return rate * _answer_s(self.at(rate, clients), self.asked.output_tokens)

        high = self.sustained_requests_per_s * (1 - 1e-9)
        if (full := under_way(high)) <= clients:
            found = self.at(high, clients)
            return replace(found, ttft_s=found.ttft_s + (clients - full) / high)
        low = 0.0
        while high - low > 1e-4 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if under_way(middle) <= clients else (low, middle)
        return self.at(high, clients)


def _answer_s(found: SplitPoint, output_tokens: int) -> float:
    return found.ttft_s + (output_tokens - 1) * found.tpot_s


def estimate_split(
    prefill: Half, decode: Half, asked: Asked, *, concurrency: int = 0, requests_per_s: float = 0.0
) -> Estimate:
    """Estimate what requests see of prefill and decode replicas, for so many clients or at a rate: give one of them.

    The cache of a prompt goes over each GPU's own port to the network, all GPUs that hold it at once. Intervals are
    those of replicas that do both, because runs with both kinds had no part in any fit.

    Raises:
        InputError: a number is out of range, or requests are longer than the model's context.
        InfeasibleError: the model or one request does not fit a side, or at that rate a side falls behind.
    """
    first = prefill.replica
    check(first.llm, asked, concurrency=concurrency if concurrency or not requests_per_s else 1)
    if requests_per_s:
        check(first.llm, asked, requests_per_s=requests_per_s)
    (reads, reads_bytes), (writes, writes_bytes) = _side(prefill, asked), _side(decode, asked)
    calibration = decode.replica.calibration
    pair = _Pair(
        prefill=reads, decode=writes, asked=asked, transfer_s=_transfer_s(prefill, decode, asked),
        calibration=calibration,
    )  # fmt: skip
    found = pair.at(requests_per_s) if requests_per_s else pair.closed_loop(concurrency)
    provenance = max(first.provenance, decode.replica.provenance, "interpolated", key=PROVENANCES.index)
    spread, gpus, rate = calibration.spread_of(provenance), prefill.gpus + decode.gpus, pair.sustained_requests_per_s
    sustained = Between(value=rate, low=rate / spread.tpot[1], high=rate / spread.tpot[0])
    if requests_per_s:
        tokens_per_s = at_rate(requests_per_s * asked.output_tokens / gpus, sustained.low * asked.output_tokens / gpus)
        own_s, waits = found.ttft_s - found.wait_s, [pair.reading.wait_s(requests_per_s, 0, r) for r in spread.tpot]
        low, high = (own_s * ratio + wait_s for ratio, wait_s in zip(spread.ttft, waits, strict=True))
        ttft_s = Between(value=found.ttft_s, low=min(low, found.ttft_s), high=max(high, found.ttft_s))
    else:
        tokens_per_s = rate_of(found.ttft_s, found.tpot_s, asked.output_tokens, concurrency / gpus, spread)
        ttft_s = between(found.ttft_s, spread.ttft)
    notes = [
        f"prefill {found.prefill_busy_fraction:.0%} busy, {gib_text(reads_bytes)} a GPU",
        f"decode {found.batch} of {writes.most} requests a replica, {gib_text(writes_bytes)} a GPU",
        "runs like this had no part in the intervals",
        *behind(requests_per_s, sustained),
        *beyond(calibration, asked, concurrency=found.batch * decode.replicas, gpus=gpus),
    ]
    return Estimate(
        ttft_s=ttft_s,
        tpot_s=between(found.tpot_s, spread.tpot),
        tokens_per_s_per_gpu=tokens_per_s,
        needed_bytes_per_gpu=max(reads_bytes, writes_bytes),
        running=found.batch * decode.replicas,
        provenance=provenance,
        sustained_requests_per_s=sustained,
        notes=tuple(notes),
    )


def _side(half: Half, asked: Asked) -> tuple[Side, int]:
    """Return a side, and the bytes each of its GPUs needs when it is full."""
    replica = half.replica
    memory = replica.memory
    places = room_for(replica, memory, asked.context_tokens)
    most = min(places, replica.engine.max_batch * replica.layout.dp)
    return Side(step=replica.step, replicas=half.replicas, most=most), needed_bytes(memory, most, places)


def _transfer_s(prefill: Half, decode: Half, asked: Asked) -> float:
    replica = prefill.replica
    return transfer_s(replica.llm, replica.layout, asked.prompt_tokens, (replica.gpu, decode.replica.gpu))


def transfer_s(llm: Llm, layout: Layout, prompt_tokens: int, gpus: Iterable[Gpu]) -> float:
    """Return how long the cache of a prompt is on its way from who has read it to who writes.

    Args:
        llm: whose cache it is.
        layout: of the one that has read it; each of its GPUs sends its part through its own port.
        prompt_tokens: that were read.
        gpus: of both sides; the slowest port counts.
    """
    ports = (gpu.pcie_bytes_per_s or NETWORK_BYTES_PER_S for gpu in gpus)
    return sequence_cache_bytes(llm, prompt_tokens, layout) / min(NETWORK_BYTES_PER_S, *ports)
