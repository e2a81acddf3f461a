"""The fleet of a plan in rehearsal: its replicas at the speed of the cost model, its tenants, and its desk."""

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from waterline.catalog import find_gpu
from waterline.cost import StepCost, replica_step_cost, transfer_s
from waterline.fleet import HOURS, Demand
from waterline.outcome import CANCELLED, NOWHERE, OK, REFUSED, STATUSES, Completion
from waterline.plan import Plan, Replica
from waterline.policy import admission
from waterline.policy.decisions import GAVE_UP, NOT_SERVED, OVER_LIMIT, QUEUE_FULL, RULES, TOO_LATE, TOO_LONG
from waterline.rehearsal.capacity import NEVER, Capacity, Terms
from waterline.rehearsal.pieces import Piece, joined
from waterline.rehearsal.recorder import Recorder
from waterline.rehearsal.state import NEVER_PS, Integers, Reals
from waterline.rehearsal.station import Passages, Station
from waterline.units import HOUR_S, PICOSECONDS_PER_S
from waterline.workload.stream import BLOCK_TOKENS, UNSAID, Names

PICOSECONDS_PER_HOUR = HOUR_S * PICOSECONDS_PER_S
GONE = "the client went away"  # in the middle of its answer


class House:
    """Serves the requests to all models of a plan."""

    def __init__(
        self, plan: Plan, rows: Sequence[Demand], clients: Names, first_hour: int, *, reasons: bool = False
    ) -> None:
        """Prepare a fleet without replicas; see `start` and `keep_hours`.

        Args:
            plan: whose replicas may come.
            rows: who asks. What names no client is of one for each row.
            clients: names, as they are met.
            first_hour: of the day, which begins with the traffic.
            reasons: whether to write down why each request is given to its replica.
        """
        self.reasons = reasons
        self.plan, self.rows, self.names = plan, tuple(rows), clients
        self.models = [model.model for model in plan.models]
        self.tenants = [tenant.name for tenant in plan.fleet.tenants] or list(dict.fromkeys(row.tenant for row in rows))
        self.replicas: list[Replica] = []  # that ever came, as the station numbers them
        self.ttft_s = [plan.fleet.slos[model].ttft_s for model in self.models]
        self.station = Station(self._terms())
        self.first_hour = first_hour
        self._hours = 0  # that have been kept so far
        self._serving: dict[str, int] = {}  # replicas of the plan, by id, and their numbers
        self._steps: dict[tuple[object, ...], StepCost] = {}
        self.model_of_row = np.array([self.models.index(row.model) for row in rows], np.int64)
        self._tenant_of_row = np.array([self.tenants.index(row.tenant) for row in rows], np.int64)
        self._client_of: dict[tuple[int, int], int] = {}  # tenant and name: number at the desk
        self._first_token_ps = array("q")  # [replica] that a client waits for one, besides its step
        self._unsettled: deque[Piece] = deque()
        self._settled = 0  # requests

    def _terms(self) -> Terms:
        tenants = self.plan.fleet.tenants
        return Terms(
            ttft_s=tuple(self.ttft_s),
            output_tokens=tuple(model.output_tokens for model in self.plan.models),
            guarantee=tuple(float(one.guarantee) for one in tenants) or (0.0,) * len(self.tenants),
            deserved=tuple(float(one.deserved or 0.0) for one in tenants) or (1.0,) * len(self.tenants),
            limit=tuple(float(one.limit) for one in tenants) or (1.0,) * len(self.tenants),
            tenant_of_client=tuple(self.tenants.index(row.tenant) for row in self.rows),
            gpus=float(self.plan.fleet.gpus),
            block_tokens=BLOCK_TOKENS,
            reasons=self.reasons,
        )

    # --- Replicas -----------------------------------------------------------------------------------------------------

    def start(self, replica: Replica, ready_ps: int) -> int:
        """Let a replica serve from a time on, which has not passed; return its number."""
        return self.start_all([replica], ready_ps)[0]

    def start_all(self, replicas: Sequence[Replica], ready_ps: int) -> range:
        """Let replicas serve from a time on; return their numbers."""
        capacities = [self.capacity(replica) for replica in replicas]
        self.replicas += replicas
        self._first_token_ps.extend(one.step.first_token_ps for one in capacities)
        return self.station.start_all(capacities, ready_ps)

    def drain(self, row: int, at_ps: int) -> None:
        """Give a replica nothing new from a time on."""
        self.station.drain(row, at_ps)

    def fail(self, row: int, at_ps: int) -> None:
        """Let a replica be gone from a time on; what ran on it goes on elsewhere."""
        self.station.fail(row, at_ps)

    def idle(self, row: int) -> bool:
        """Whether nothing runs on a replica."""
        return self.station.idle(row)

    def keep_hours(self, until_ps: int) -> None:
        """Start and drain the replicas of the plan as their hours say, up to a time."""
        while self._hours * PICOSECONDS_PER_HOUR <= until_ps:
            at_ps, hour = self._hours * PICOSECONDS_PER_HOUR, (self.first_hour + self._hours) % HOURS
            for replica in self.plan.replicas:
                if replica.id in self._serving and hour not in replica.hours:
                    self.station.drain(self._serving.pop(replica.id), at_ps)
            come = [one for one in self.plan.replicas if hour in one.hours and one.id not in self._serving]
            come = [one for one in come if one.tokens_per_s > 0 and _reads_per_s(one) > 0]
            self._serving |= dict(zip([one.id for one in come], self.start_all(come, at_ps), strict=True))
            self._hours += 1

    def capacity(self, replica: Replica) -> Capacity:
        """Return what a replica can do."""
        key = replica.pool, replica.layout, replica.precision, replica.engine, replica.model
        if key not in self._steps:
            self._steps[key] = replica_step_cost(self.plan.fleet, replica)
        gpu = find_gpu(self.plan.fleet.pool(replica.pool).gpu).id
        measured = gpu in {one.gpu for one in self.plan.fleet.model(replica.model).measured}
        unread_share = 1.0 if measured else _unread_share(self.plan, replica.model)
        return Capacity(
            replica=replica.id,
            gpus=replica.layout.gpus,
            step=self._steps[key],
            max_batch=replica.max_batch,
            cache_tokens=replica.cache_tokens,
            max_context_tokens=replica.max_context_tokens,
            prefill_tokens_per_s=_reads_per_s(replica) * unread_share,
            tokens_per_s=replica.prefill_tokens_per_s if replica.role == "prefill" else replica.tokens_per_s,
            role=replica.role,
            transfer_ps_per_token=_transfer_ps_per_token(self.plan, replica),
            reads_cached=measured,
            model=self.models.index(replica.model),
        )

    # --- Requests -----------------------------------------------------------------------------------------------------

    def advance(self, until_ps: int) -> None:
        """Serve up to a time."""
        self.station.advance(until_ps)

    def offer(self, asked: Piece) -> None:
        """Serve requests, in the order of their arrival, up to the last one's."""
        leaves = asked.leaves_ps != NEVER
        self.station.offer(
            asked.arrival_ps,
            asked.prompt_tokens,
            asked.output_tokens,
            asked.cached_tokens,
            model=self.model_of_row[asked.row],
            client=self._clients(asked),
            patience_ps=np.where(asked.patience_ps == NEVER, NEVER_PS, asked.patience_ps),
            leaves_ps=np.where(leaves, asked.leaves_ps, NEVER_PS) if leaves.any() else None,
            blocks=asked.blocks.values,
            block_counts=asked.blocks.counts,
        )
        self._unsettled.append(asked)

    def finish(self) -> None:
        """Serve until the last request is done."""
        self.station.finish()

    def _clients(self, asked: Piece) -> Integers:
        """Return who asks as the desk knows them."""
        clients = asked.row.copy()
        named = asked.client != UNSAID
        if named.any():
            tenants = self._tenant_of_row[asked.row[named]]
            keys, places = np.unique(tenants << 32 | asked.client[named], return_inverse=True)
            pairs = [(key >> 32, key & 0xFFFFFFFF) for key in keys.tolist()]
            fresh = [pair for pair in pairs if pair not in self._client_of]
            known = len(self.rows) + len(self._client_of)
            self._client_of |= {pair: known + number for number, pair in enumerate(fresh)}
            self.station.meet([tenant for tenant, _ in fresh])
            clients[named] = np.array([self._client_of[pair] for pair in pairs], np.int64)[places]
        return clients

    @property
    def clients(self) -> list[str]:
        """Return who asks, as the desk numbers them: a row's tenant and model, where no client is named."""
        return [f"{row.tenant}/{row.model}" for row in self.rows] + [self.names[name] for _, name in self._client_of]

    def settle(self) -> "Settled":
        """Return what has been settled since the last time: all requests up to the first that has not ended.

        Puts what became of them beside what they asked, and adds what the client sees on top of the steps.
        """
        passages = self.station.collect()
        number, count = self._settled, len(passages)
        self._settled += count
        asked = self._take(count)
        first = np.where(passages.read_by == NEVER, passages.replica, passages.read_by)
        later_ps = np.append(np.array(self._first_token_ps), 0)[np.maximum(first, NEVER)]
        first_token_ps = np.where(passages.first_token_ps == NEVER, NEVER, passages.first_token_ps + later_ps)
        left = passages.left_tokens != NEVER
        finish_ps = np.where((passages.replica >= 0) & ~left, passages.finish_ps + later_ps, passages.finish_ps)
        sent = (passages.read_by != NEVER) & (passages.replica >= 0)
        if sent.any():
            transfer_ps = np.array([one.transfer_ps_per_token for one in self.station.capacities])
            takes_ps = transfer_ps[passages.read_by[sent]] * asked.prompt_tokens[sent]
            tokens = np.where(left, passages.left_tokens, asked.output_tokens)[sent]
            seen = passed_on(first_token_ps[sent], finish_ps[sent], takes_ps, tokens)
            first_token_ps[sent], finish_ps[sent] = seen
        if left.any():  # nobody sees what would have come after that
            finish_ps[left] = passages.finish_ps[left]
            first_token_ps[left & (first_token_ps > finish_ps)] = NEVER
        passages = replace(passages, first_token_ps=first_token_ps, finish_ps=finish_ps)
        return Settled(self, asked, np.arange(number, number + count), passages)

    def _take(self, count: int) -> Piece:
        """Return what the first requests asked that have not been settled."""
        taken = []
        while count > 0:
            piece = self._unsettled.popleft()
            taken.append(piece[:count])
            if len(piece) > count:
                self._unsettled.appendleft(piece[count:])
            count -= len(taken[-1])
        return joined(taken)


def passed_on(
    read_ps: Integers, finish_ps: Integers, transfer_ps: Integers, output_tokens: Integers
) -> tuple[Integers, Integers]:
    """Return when clients see the first and the last token of answers that are not written where prompts are read.

    The first comes from the decode replica, a step after the cache has arrived, as a plan counts it
    (`cost.split.split_point`). The station has it where the prompt was read, at `read_ps`, and takes a step less for
    the answer; so the last token comes a step later than there. A step: the mean of the answer's, waiting included.
    """
    there_ps = read_ps + transfer_ps
    step_ps = np.maximum(0, finish_ps - there_ps) // np.maximum(1, output_tokens - 1)
    return there_ps + step_ps, finish_ps + step_ps


def _reads_per_s(replica: Replica) -> float:
    """Return the rate at which a replica reads prompts; one that only writes is asked to read none, at any rate."""
    return replica.tokens_per_s if replica.role == "decode" else replica.prefill_tokens_per_s


def _unread_share(plan: Plan, model: str) -> float:
    """Return how much of a prompt has to be read, as planned: the plan's rates of reading count whole prompts."""
    rows = [row for row in plan.fleet.demand if row.model == model]
    weights = [sum(row.hourly_requests_per_s) * row.prompt_tokens for row in rows]
    if not any(weights):
        weights = [1.0] * len(rows)
    cached = sum(weight * row.prefix_hit for weight, row in zip(weights, rows, strict=True))
    return 1.0 - cached / sum(weights) if rows else 1.0


def _transfer_ps_per_token(plan: Plan, replica: Replica) -> int:
    """Return how long the cache of a prompt token is on its way to the decode replicas, at the mean prompt."""
    if replica.role != "prefill":
        return 0
    prompt_tokens = next(model.prompt_tokens for model in plan.models if model.model == replica.model)
    writers = [one for one in plan.replicas_of(replica.model) if one.role == "decode"]
    gpus = [find_gpu(plan.fleet.pool(one.pool).gpu) for one in (replica, *writers)]
    llm = plan.fleet.llm_of(plan.fleet.model(replica.model))
    return round(transfer_s(llm, replica.layout, prompt_tokens, gpus) * PICOSECONDS_PER_S / prompt_tokens)


@dataclass(frozen=True, slots=True)
class Settled:
    """Requests in the order of their arrival, of which is known what became of them."""

    house: House
    asked: Piece
    numbers: Integers  # among all requests
    passages: Passages

    @property
    def status(self) -> Integers:
        """Return indices of STATUSES."""
        ended = np.where(self.passages.replica >= 0, OK, REFUSED)
        return np.where(self.passages.left_tokens == NEVER, ended, CANCELLED)

    @property
    def produced_tokens(self) -> Integers:
        """Return what was produced of each answer."""
        left_tokens = np.maximum(self.passages.left_tokens, 0)
        return np.where(self.status == OK, self.asked.output_tokens, left_tokens)

    def note(self, recorder: Recorder, row_of: Integers) -> None:
        """Write them down; `row_of`: what the recorder calls each replica that ever came."""
        passages, asked, house = self.passages, self.asked, self.house
        tenants = np.array([recorder.tenants.index(row.tenant) for row in house.rows])
        models = np.array([recorder.models.index(row.model) for row in house.rows])
        known = np.append(row_of, NOWHERE)
        recorder.add(
            tenant=tenants[asked.row],
            model=models[asked.row],
            arrival_ps=asked.arrival_ps,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=self.produced_tokens,
            first_token_ps=passages.first_token_ps,
            finish_ps=passages.finish_ps,
            replica=known[np.maximum(passages.replica, NOWHERE)],
            busy_ps=passages.busy_ps,
            preemptions=passages.preemptions,
            retry_s=passages.retry_s,
            cached_tokens=passages.cached_tokens,
            read_by=known[passages.read_by],
            read_busy_ps=passages.read_busy_ps,
            status=self.status,
            clients=list(house.names),
            client=asked.client.astype(np.int64),
        )
        if len(passages.losses):
            request, replica, busy_ps, at_ps = passages.losses.T
            recorder.lose(
                tenant=tenants[asked.row[request]],
                model=models[asked.row[request]],
                replica=known[replica],
                busy_ps=busy_ps,
                began_ps=passages.started_ps[request],
                lost_ps=at_ps,
                clients=list(house.names),
                client=asked.client[request].astype(np.int64),
            )

    def completions(self) -> Iterator[Completion]:
        """Return them one by one."""
        passages, asked = self.passages, self.asked
        columns: Iterable[np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = (
            asked.arrival_ps,
            asked.prompt_tokens,
            asked.output_tokens,
            asked.row,
            asked.client,
            passages.first_token_ps,
            passages.finish_ps,
            passages.replica,
            passages.preemptions,
            passages.retry_s,
            passages.cached_tokens,
            self._gpu_ps(),
            self.status,
            self.produced_tokens,
        )
        for (
            arrival_ps,
            prompt,
            output,
            row,
            client,
            first_ps,
            finish_ps,
            replica,
            preempted,
            retry_s,
            cached,
            gpu_ps,
            status,
            produced,
        ) in zip(*(column.tolist() for column in columns), strict=True):
            yield Completion(
                tenant=self.house.rows[row].tenant,
                model=self.house.rows[row].model,
                replica=self.house.replicas[replica].id if replica >= 0 else "",
                status=STATUSES[status],
                arrival_s=arrival_ps / PICOSECONDS_PER_S,
                first_token_s=first_ps / PICOSECONDS_PER_S if first_ps != NEVER else float("nan"),
                finish_s=finish_ps / PICOSECONDS_PER_S,
                prompt_tokens=prompt,
                cached_tokens=cached,
                output_tokens=produced,
                gpu_s=gpu_ps / PICOSECONDS_PER_S,
                preemptions=preempted,
                reason=self._refusal(-replica, row, prompt + output, retry_s, waited=finish_ps > arrival_ps)
                if status == REFUSED
                else ""
                if status == OK
                else GONE
                if produced
                else RULES[GAVE_UP][0],
                client=self.house.names[client],
            )

    def _gpu_ps(self) -> Reals:
        """Return the GPU time of each request, where it was read and where it was written, and what it lost."""
        gpus = np.array([*(one.gpus for one in self.house.station.capacities), 0], np.float64)
        passages = self.passages
        busy_ps = passages.busy_ps * gpus[np.maximum(passages.replica, NEVER)]
        request, replica, lost_ps, _ = passages.losses.T
        gpu_ps: Reals = busy_ps + passages.read_busy_ps * gpus[passages.read_by]
        return gpu_ps + np.bincount(request, lost_ps * gpus[replica], len(gpu_ps))

    def _refusal(self, rule: int, row: int, tokens: int, retry_s: float, *, waited: bool) -> str:
        model = int(self.house.model_of_row[row])  # which a policy may call otherwise than its row does
        if rule == TOO_LONG:
            longest_tokens = self.house.station.memory.desk.models.ever_tokens[model]
            return f"{tokens} tokens, of which no replica of the model holds more than {longest_tokens}"
        if rule == TOO_LATE and waited:
            within_s = admission.waits_s(self.house.ttft_s[model])
            return f"its turn did not come within {within_s:g} s; retry after {retry_s:.3g} s"
        if rule == TOO_LATE:
            return f"would not start within {self.house.ttft_s[model]:g} s; retry after {retry_s:.3g} s"
        if rule == NOT_SERVED:
            return "no replica of the model that can hold it is in service"
        return f"{RULES[rule][0]}; retry after {retry_s:.3g} s" if rule in {QUEUE_FULL, OVER_LIMIT} else RULES[rule][0]
