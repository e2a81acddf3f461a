"""One model of a plan: its station, and what becomes of the requests that go there."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from waterline.catalog import find_gpu
from waterline.cost import replica_step_cost
from waterline.cost.layers import NETWORK_BYTES_PER_S
from waterline.cost.memory import sequence_cache_bytes
from waterline.fleet import Demand
from waterline.outcome import NOWHERE, Completion
from waterline.plan import ModelPlan, Plan, Replica
from waterline.rehearsal.arrivals import Piece, joined
from waterline.rehearsal.oracle import NEVER, NOT_IN_SERVICE, Capacity, accepted_tokens, too_late, too_long
from waterline.rehearsal.recorder import Recorder
from waterline.rehearsal.state import NONE, TOO_LATE, TOO_LONG, Integers, Reals
from waterline.rehearsal.station import Passages, Station
from waterline.units import PICOSECONDS_PER_S


class Lane:
    """Serves the requests to one model; a router serves one model, so lanes know nothing of each other."""

    def __init__(self, plan: Plan, model: ModelPlan, first_hour: int) -> None:
        replicas = plan.replicas_of(model.model)
        different = {_alike(replica): replica for replica in replicas}
        steps = {key: replica_step_cost(plan.fleet, replica) for key, replica in different.items()}
        measured = {one.gpu for one in plan.fleet.model(model.model).measured}
        whole = {replica.id: find_gpu(plan.fleet.pool(replica.pool).gpu).id in measured for replica in replicas}
        unread_share = _unread_share(plan, model.model)
        self.model = model.model
        self.deadline_s = plan.fleet.slos[model.model].ttft_s
        self.capacities = [
            Capacity(
                replica=replica.id,
                gpus=replica.layout.gpus,
                step=steps[_alike(replica)],
                max_batch=replica.max_batch,
                cache_tokens=replica.cache_tokens,
                max_context_tokens=replica.max_context_tokens,
                prefill_tokens_per_s=replica.prefill_tokens_per_s * (1.0 if whole[replica.id] else unread_share),
                tokens_per_s=replica.prefill_tokens_per_s if replica.role == "prefill" else replica.tokens_per_s,
                hours=replica.hours,
                role=replica.role,
                transfer_ps_per_token=_transfer_ps_per_token(plan, replica, model.prompt_tokens),
                reads_cached=whole[replica.id],
            )
            for replica in replicas
        ]
        self.longest_tokens = max(accepted_tokens(self.capacities), default=0)
        index = {replica.id: number for number, replica in enumerate(plan.replicas)}
        refusals = 3  # -1, -2 and -3 instead of a replica find what stands at the end
        self.first_token_ps = np.array([*(one.step.first_token_ps for one in self.capacities), *[0] * refusals])
        self.in_plan = np.array([*(index[one.replica] for one in self.capacities), *[NOWHERE] * refusals])
        self.station = Station(
            self.capacities,
            deadline_s=self.deadline_s,
            expected_prompt_tokens=model.prompt_tokens,
            expected_output_tokens=model.output_tokens,
            first_hour=first_hour,
        )
        self.unsettled: list[tuple[Piece, Integers]] = []

    def serve(self, asked: Piece, numbers: Integers) -> "Settled":
        """Serve requests, which have these numbers among all; return what has been settled since the last time."""
        self.station.offer(asked.arrival_ps, asked.prompt_tokens, asked.output_tokens, asked.cached_tokens)
        self.unsettled.append((asked, numbers))
        return self._settle(self.station.collect())

    def drain(self) -> "Settled":
        """Serve the rest."""
        self.station.drain()
        return self._settle(self.station.collect())

    def _settle(self, passages: Passages) -> "Settled":
        """Put what became of requests beside what they asked, and add what the client sees on top of the steps."""
        asked = joined([piece for piece, _ in self.unsettled])
        numbers = np.concatenate([np.zeros(0, np.int64), *(numbers for _, numbers in self.unsettled)])
        count = len(passages)
        self.unsettled = [(asked[count:], numbers[count:])]
        first = np.where(passages.read_by == NONE, passages.replica, passages.read_by)
        for time_ps in (passages.first_token_ps, passages.finish_ps):
            np.add(time_ps, self.first_token_ps[first], out=time_ps)
        return Settled(self, asked[:count], numbers[:count], passages)


def _unread_share(plan: Plan, model: str) -> float:
    """Return how much of a prompt has to be read, as planned: the plan's rates of reading count whole prompts."""
    rows = [row for row in plan.fleet.demand if row.model == model]
    weights = [sum(row.hourly_requests_per_s) * row.prompt_tokens for row in rows]
    if not any(weights):
        weights = [1.0] * len(rows)
    cached = sum(weight * row.prefix_hit for weight, row in zip(weights, rows, strict=True))
    return 1.0 - cached / sum(weights) if rows else 1.0


def _transfer_ps_per_token(plan: Plan, replica: Replica, prompt_tokens: int) -> int:
    """Return how long the cache of a prompt token is on its way to the decode replicas, at the mean prompt.

    Each GPU sends its part through its own port; the slowest port of both sides counts.
    """
    if replica.role != "prefill":
        return 0
    writers = [one for one in plan.replicas_of(replica.model) if one.role == "decode"]
    gpus = [find_gpu(plan.fleet.pool(one.pool).gpu) for one in (replica, *writers)]
    ports = [gpu.pcie_bytes_per_s or NETWORK_BYTES_PER_S for gpu in gpus]
    llm = plan.fleet.llm_of(plan.fleet.model(replica.model))
    sent_bytes = sequence_cache_bytes(llm, prompt_tokens, replica.layout)
    return round(sent_bytes / min(NETWORK_BYTES_PER_S, *ports) * PICOSECONDS_PER_S / prompt_tokens)


def _alike(replica: Replica) -> tuple[object, ...]:
    """Return what the steps of a replica of a model depend on; to price them takes some milliseconds."""
    return replica.pool, replica.layout, replica.precision, replica.engine


@dataclass(frozen=True, slots=True)
class Settled:
    """Requests to one model, in the order of their arrival, of which is known what became of them."""

    lane: Lane
    asked: Piece
    numbers: Integers  # among all requests
    passages: Passages

    def note(self, recorder: Recorder, rows: tuple[Demand, ...]) -> None:
        """Write them down by who asked."""
        passages, asked = self.passages, self.asked
        tenants = np.array([recorder.tenants.index(row.tenant) for row in rows])
        recorder.add(
            tenant=tenants[asked.row],
            model=np.full(len(asked), recorder.models.index(self.lane.model)),
            arrival_ps=asked.arrival_ps,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=asked.output_tokens,
            first_token_ps=passages.first_token_ps,
            finish_ps=passages.finish_ps,
            replica=self.lane.in_plan[passages.replica],
            busy_ps=passages.busy_ps,
            preemptions=passages.preemptions,
            retry_s=passages.retry_s,
            read_by=self.lane.in_plan[passages.read_by],
            read_busy_ps=passages.read_busy_ps,
        )

    def completions(self, rows: tuple[Demand, ...]) -> Iterator[Completion]:
        """Return them one by one."""
        passages, asked = self.passages, self.asked
        columns = (
            asked.arrival_ps,
            asked.prompt_tokens,
            asked.output_tokens,
            asked.row,
            passages.first_token_ps,
            passages.finish_ps,
            passages.replica,
            passages.preemptions,
            passages.retry_s,
            self._gpu_ps(),
        )
        for arrival_ps, prompt, output, row, first_ps, finish_ps, replica, preemptions, retry_s, gpu_ps in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            by = self.lane.capacities[replica] if replica >= 0 else None
            yield Completion(
                tenant=rows[row].tenant,
                model=self.lane.model,
                replica=by.replica if by else "",
                status="ok" if by else "refused",
                arrival_s=arrival_ps / PICOSECONDS_PER_S,
                first_token_s=first_ps / PICOSECONDS_PER_S if first_ps != NEVER else float("nan"),
                finish_s=finish_ps / PICOSECONDS_PER_S,
                prompt_tokens=prompt,
                output_tokens=output if by else 0,
                gpu_s=gpu_ps / PICOSECONDS_PER_S,
                preemptions=preemptions,
                reason="" if by else self._reason(replica, prompt + output, retry_s),
            )

    def _gpu_ps(self) -> Reals:
        """Return the GPU time of each request, where it was read and where it was written."""
        gpus = np.array([*(one.gpus for one in self.lane.capacities), 0, 0, 0], np.float64)
        passages = self.passages
        gpu_ps: Reals = passages.busy_ps * gpus[passages.replica] + passages.read_busy_ps * gpus[passages.read_by]
        return gpu_ps

    def _reason(self, refusal: int, tokens: int, retry_s: float) -> str:
        if refusal == TOO_LONG:
            return too_long(tokens, self.lane.longest_tokens)
        return too_late(self.lane.deadline_s, retry_s) if refusal == TOO_LATE else NOT_IN_SERVICE
