"""What is asked, and how well it should be answered."""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import Struct


class Slo(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well a request should be answered.

    A request meets it when both times hold; the service meets it when `fraction` of the requests do.
    """

    ttft_s: float  # time to first token, from the arrival of the request
    tpot_s: float  # time per output token after the first, averaged over the request
    fraction: float = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a trace; who asks, and of which model, is known once it has been dealt to a demand."""

    arrival_s: float  # from the start of the trace
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in the order of their arrival."""

    name: str
    requests: Sequence[Request]

    @property
    def duration_s(self) -> float:
        """Time from the first arrival to the last; 0 for fewer than two requests."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0
