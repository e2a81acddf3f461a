"""From a plan and traffic to what will happen: who waits, who is refused, what it costs.

`arrivals` says who asks what, `oracle` serves it. A day's rehearsal is a matter of arithmetic: no clock, no network.
"""

from dataclasses import dataclass

from waterline.cost import replica_step_cost
from waterline.outcome import Completion, Summary, summarize
from waterline.plan import Plan
from waterline.rehearsal.arrivals import traffic
from waterline.rehearsal.oracle import NEVER, Capacity, Passage, serve
from waterline.units import HOUR_S, PICOSECONDS_PER_S
from waterline.workload import Request, Slo, Trace

__all__ = ["Rehearsal", "rehearse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What happened to every request, and what it comes to."""

    completions: tuple[Completion, ...]  # in the order of arrival; times from the start of the trace
    summaries: tuple[Summary, ...]  # the total first, then by tenant and model
    duration_s: float  # from the first arrival to the last finish
    usd: float  # all replicas of the plan, over that time
    notes: tuple[str, ...]  # what was replayed


def rehearse(plan: Plan, trace: Trace | None = None, *, seed: int = 0, duration_s: float | None = None) -> Rehearsal:
    """Replay traffic against a plan until the last request is done. Same input, same bytes.

    Args:
        plan: its replicas serve, each at the speed of the cost model; see `oracle` for what they do.
        trace: requests, dealt to the rows of the fleet's demand by their rates. None: what the demand says.
        seed: of drawn arrivals.
        duration_s: how much of the traffic; None: all of a trace, 15 minutes of the busiest hour without one.

    Raises:
        TraceError: a trace of the demand cannot be read.
        InputError: nothing is asked in that time.
    """
    asked = traffic(plan, trace, seed=seed, duration_s=duration_s)
    slos = plan.fleet.slos
    passages = _serve_all(plan, asked.requests, slos)
    lasted_ps = max(passage.finish_ps for passage in passages) - passages[0].arrival_ps
    lasted_s = lasted_ps / PICOSECONDS_PER_S
    gpus = {replica.id: replica.layout.gpus for replica in plan.replicas}
    completions = tuple(completion(passage, gpus.get(passage.replica, 0)) for passage in passages)
    return Rehearsal(
        completions=completions,
        summaries=summarize(completions, slos, lasted_s, plan.replica_usd_per_hour),
        duration_s=lasted_s,
        usd=plan.usd_per_hour * lasted_s / HOUR_S,
        notes=asked.notes,
    )


def completion(passage: Passage, gpus: int) -> Completion:
    """Turn a passage into what people read; the one place where picoseconds become seconds."""
    started = passage.first_token_ps != NEVER
    return Completion(
        tenant=passage.request.tenant,
        model=passage.request.model,
        replica=passage.replica,
        status="refused" if passage.reason else "ok",
        arrival_s=passage.arrival_ps / PICOSECONDS_PER_S,
        first_token_s=passage.first_token_ps / PICOSECONDS_PER_S if started else float("nan"),
        finish_s=passage.finish_ps / PICOSECONDS_PER_S,
        prompt_tokens=passage.request.prompt_tokens,
        output_tokens=passage.produced_tokens,
        gpu_s=passage.busy_ps * gpus / PICOSECONDS_PER_S,
        preemptions=passage.preemptions,
        reason=passage.reason,
    )


def _serve_all(plan: Plan, requests: tuple[Request, ...], slos: dict[str, Slo]) -> list[Passage]:
    """Serve each model by itself: replicas are independent but for the router, and a router serves one model."""
    passages: dict[int, Passage] = {}
    for model in plan.models:
        indices = [index for index, request in enumerate(requests) if request.model == model.model]
        capacities = [
            Capacity(
                replica=replica.id,
                gpus=replica.layout.gpus,
                step=replica_step_cost(plan.fleet, replica),
                max_batch=replica.max_batch,
                cache_tokens=replica.cache_tokens,
                max_context_tokens=replica.max_context_tokens,
                prefill_tokens_per_s=replica.prefill_tokens_per_s,
                tokens_per_s=replica.tokens_per_s,
            )
            for replica in plan.replicas_of(model.model)
        ]
        served = serve(
            capacities,
            [requests[index] for index in indices],
            deadline_s=slos[model.model].ttft_s,
            expected_prompt_tokens=model.prompt_tokens,
            expected_output_tokens=model.output_tokens,
        )
        passages.update(zip(indices, served, strict=True))
    return [passages[index] for index in range(len(requests))]
