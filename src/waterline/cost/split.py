"""Prefill and decode on replicas of their own: prompts are read here, their cache sent there, answers written there."""

from dataclasses import dataclass

from waterline.cost.serving import pieces
from waterline.cost.step import StepCost
from waterline.errors import InfeasibleError
from waterline.units import PICOSECONDS_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The replicas of one kind, all alike."""

    step: StepCost
    replicas: int
    most: int  # requests one replica holds: cache and the engine's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPoint:
    """What requests see at a rate, and how near each side is to its limit."""

    ttft_s: float
    tpot_s: float
    batch: int  # requests a decode replica holds
    prefill_busy_fraction: float
    decode_busy_fraction: float  # of the requests its replicas can hold


def split_point(
    prefill: Side,
    decode: Side,
    requests_per_s: float,
    prompt_tokens: int,
    output_tokens: int,
    *,
    cached_tokens: int = 0,
    transfer_s: float = 0.0,
) -> SplitPoint:
    """Return the steady state of a split pair of sides.

    A prefill replica reads prompts in the order they come, one on each of its data-parallel ranks at a time; requests
    come independently, so they wait as in a queue with equal service times (Pollaczek and Khinchine). A decode replica
    holds as many requests as come in the time of an answer (Little).

    Args:
        prefill: where prompts are read.
        decode: where answers are written.
        requests_per_s: that arrive, over all replicas.
        prompt_tokens: of each request.
        output_tokens: of each answer.
        cached_tokens: of the prompt that need not be read.
        transfer_s: to send the cache of a prompt from one side to the other.

    Raises InfeasibleError when a side cannot keep up; says which, and by how much.
    """
    alone_s = pieces(prefill.step, 1, prompt_tokens, prompt_tokens, cached_tokens).alone_s
    busy = requests_per_s * alone_s / (prefill.replicas * prefill.step.ranks)
    if busy >= 1:
        raise InfeasibleError(
            f"{prefill.replicas} prefill replicas read {requests_per_s / busy:.4g} prompts of {prompt_tokens} tokens a "
            f"second, {requests_per_s:.4g} arrive. Take at least {int(prefill.replicas * busy) + 1}."
        )
    batch, tpot_s = _settled(
        decode, requests_per_s / decode.replicas, prompt_tokens + output_tokens // 2, output_tokens
    )
    wait_s = alone_s * busy / (2 * (1 - busy))
    return SplitPoint(
        ttft_s=wait_s + alone_s + transfer_s + tpot_s,
        tpot_s=tpot_s,
        batch=batch,
        prefill_busy_fraction=busy,
        decode_busy_fraction=batch / decode.most,
    )


def _settled(decode: Side, requests_per_s: float, context_tokens: int, output_tokens: int) -> tuple[int, float]:
    """Return the smallest batch that finishes requests as fast as they come, and its time per token."""

    def tpot_s(batch: int) -> float:
        return decode.step.step_ps(0, 0, batch, batch * context_tokens) / PICOSECONDS_PER_S

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
