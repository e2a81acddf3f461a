"""What a rehearsal is given: replicas, when they come and go, who asks under which terms, and what."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from waterline.cost.step import StepCost
from waterline.plan import Role
from waterline.policy.dispatch import PREFIX_PLACES
from waterline.units import GIGA, PICOSECONDS_PER_S
from waterline.workload import Request

PICOSECONDS_PER_NS = PICOSECONDS_PER_S // GIGA
NEVER = -1  # no time: times are never negative


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a replica can take, and how long its steps are."""

    replica: str  # its id
    gpus: int
    step: StepCost
    max_batch: int  # requests it is given at most, and runs together
    cache_tokens: int
    max_context_tokens: int
    prefill_tokens_per_s: float  # at which it reads what has to be read of prompts, planned; above 0
    tokens_per_s: float  # prompt and output with all slots taken, planned; above 0
    role: Role = "both"
    transfer_ps_per_token: int = 0  # of a prompt that a prefill replica has read, to the decode replicas
    reads_cached: bool = False  # its steps count cached tokens as read
    model: int = 0  # that it serves

    @property
    def longest_tokens(self) -> int:
        """The longest request it can hold, prompt and output."""
        return min(self.cache_tokens, self.max_context_tokens)

    @property
    def slots(self) -> int:
        """Requests that can decode together: each takes a token of the step."""
        return min(self.max_batch, self.step.step_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Who may ask what of a fleet, and what is promised to them."""

    ttft_s: tuple[float, ...]  # [model] of its SLO
    output_tokens: tuple[int, ...]  # [model] the mean of the plan: what a request is expected to produce
    guarantee: tuple[float, ...] = (0.0,)  # [tenant] fraction of the GPU time
    deserved: tuple[float, ...] = (1.0,)  # [tenant]
    limit: tuple[float, ...] = (1.0,)  # [tenant]
    tenant_of_client: tuple[int, ...] = (0,)  # [client]
    gpus: float = 0.0  # of the fleet, of which those are fractions; 0: of those in service
    block_tokens: int = 512  # of the blocks of prompts
    prefix_places: int = PREFIX_PLACES
    affinity: bool = True  # whether routing looks who has read the beginning of a prompt
    dice: tuple[int, int] = (1_234_567, 7_654_321)  # with which the draws of routing begin
    reasons: bool = False  # whether to write down why each request is given to its replica, and whose turn it was


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request."""

    arrival_ps: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0  # of the prompt, on whatever replica; less than all of it
    model: int = 0
    client: int = 0
    patience_ps: int = NEVER  # how long it waits to be given to a replica, above 0; NEVER: as long as it takes
    leaves_ps: int = NEVER  # after its arrival, when its client goes away whatever has come by then; above 0
    blocks: tuple[int, ...] = ()  # keys of its prompt, see `policy.routing`


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A replica becomes ready, gets nothing new from now on, or loses all it has."""

    at_ps: int
    kind: Literal["ready", "drain", "fail"]
    replica: int  # its index


def asks(requests: Iterable[Request]) -> list[Ask]:
    """Return requests of one client to one model; the one place where seconds become picoseconds."""
    return [
        Ask(
            arrival_ps=round(request.arrival_s * GIGA) * PICOSECONDS_PER_NS,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            cached_tokens=request.cached_tokens,
        )
        for request in requests
    ]
