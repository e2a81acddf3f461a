"""What a request may use and what it did use, told to the ledger; without a ledger nothing is written.

A request is charged for what it costs on a replica that is full, whatever else ran beside it: the GPU time of its
tokens at the rates of the plan, at the price of those GPUs.
"""

from asyncio import Future
from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan

from waterline.errors import QuotaError
from waterline.ledger import Key, Ledger, Quotas, Reservation, Settlement, utc_us
from waterline.ledger.quotas import Room
from waterline.outcome import Completion
from waterline.service.asgi import Headers
from waterline.service.errors import DO_NOT_RETRY, RejectedError, retry_after
from waterline.units import GIGA, MEGA

OVER_QUOTA = "insufficient_quota"  # OpenAI's code
UNLIMITED = Quotas()
NEVER_S = 30 * 86_400.0  # to come back, for who needs somebody to raise a quota first


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """One request in the ledger."""

    request_id: str
    tenant: str
    client: str
    key: Key | None
    model: str
    arrival_us: int
    usd_per_gpu_s: float
    reservation: Reservation | None = None

    def nano_usd(self, cost_gpu_s: float) -> int:
        return round(cost_gpu_s * self.usd_per_gpu_s * GIGA)


class Books:
    """Writes to a ledger, if there is one."""

    def __init__(self, ledger: Ledger | None) -> None:
        self._ledger = ledger

    async def reserve(self, entry: Entry, tokens: int, cost_gpu_s: float) -> None:
        """Set aside the most that a request may use. Raises RejectedError (429) when a quota has no room."""
        if self._ledger:
            try:
                entry.reservation = await self._ledger.reserve(
                    request_id=entry.request_id,
                    tenant=entry.tenant,
                    client=entry.client,
                    key=entry.key,
                    model=entry.model,
                    tokens=tokens,
                    nano_usd=entry.nano_usd(cost_gpu_s),
                    arrival_us=entry.arrival_us,
                )
            except QuotaError as error:
                raise over_quota(error) from error

    def limits(self, key: Key | None) -> Headers:
        """Return what a key may still use: of tokens in the headers of OpenAI, and of money in such as theirs."""
        if not self._ledger or not key or key.quotas == UNLIMITED:
            return []
        tokens, money = self._ledger.room(key)
        return [*_headers(b"tokens", tokens, b"%d", 1), *_headers(b"usd", money, b"%.6f", GIGA)]

    async def durable(self, entry: Entry) -> None:
        """Wait until it is on the disk that a request is under way. Raises RejectedError as `reserve` does."""
        if entry.reservation:
            try:
                await entry.reservation.durable()
            except QuotaError as error:
                raise over_quota(error) from error

    async def durable_in_trouble(self, entry: Entry) -> None:
        """Do the same where the ledger could not be written to a moment ago."""
        if self._ledger and self._ledger.is_troubled:
            await self.durable(entry)

    def note(self, entry: Entry, prompt_tokens: int, output_tokens: int, cost_gpu_s: float) -> None:
        """Say how far a request has come, for the case that this process does not see its end."""
        if self._ledger and entry.reservation:
            nano_usd = entry.nano_usd(cost_gpu_s)
            self._ledger.note(
                entry.reservation, prompt_tokens=prompt_tokens, output_tokens=output_tokens, nano_usd=nano_usd
            )

    def settle(
        self, entry: Entry, completion: Completion, replicas: Iterable[str], cost_gpu_s: float, *, final: bool = True
    ) -> "Future[None] | None":
        """Write down what became of a request; what is not final gives way to what is, under the same id.

        Returns what is done when it is on the disk; None without a ledger.
        """
        if not self._ledger:
            return None
        ttft_s = completion.ttft_s
        first_token_us = None if isnan(ttft_s) else entry.arrival_us + round(ttft_s * MEGA)
        return self._ledger.settle(
            Settlement(
                request_id=entry.request_id,
                tenant=entry.tenant,
                client=entry.client,
                key_id=entry.key.id if entry.key else "",
                model=entry.model,
                replicas=tuple(replicas),
                prompt_tokens=completion.prompt_tokens if completion.replica else 0,
                cached_tokens=completion.cached_tokens,
                output_tokens=completion.output_tokens,
                thinking_tokens=completion.thinking_tokens,
                arrival_us=entry.arrival_us,
                first_token_us=first_token_us,
                finish_us=max(utc_us(), first_token_us or entry.arrival_us),  # somebody may set the clock
                gpu_us=round(completion.gpu_s * MEGA),
                nano_usd=entry.nano_usd(cost_gpu_s),
                outcome=completion.status if final else "interrupted",
                reason=completion.reason,
            )
        )


def _headers(unit: bytes, room: Room | None, form: bytes, per_unit: float) -> Headers:
    if not room:
        return []
    reset = [] if room.anew_s is None else [(b"x-ratelimit-reset-" + unit, b"%ds" % room.anew_s)]
    return [
        (b"x-ratelimit-limit-" + unit, form % (room.limit / per_unit)),
        (b"x-ratelimit-remaining-" + unit, form % (room.left / per_unit)),
        *reset,
    ]


def over_quota(error: QuotaError) -> RejectedError:
    """Return a spent quota in OpenAI's words: it is no rate limit, and to ask again soon will not help."""
    return RejectedError(
        str(error),
        status=429,
        code=OVER_QUOTA,
        headers=retry_after(NEVER_S if error.retry_after_s is None else error.retry_after_s) | DO_NOT_RETRY,
    )
