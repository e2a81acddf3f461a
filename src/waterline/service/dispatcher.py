"""The live desk: requests in their lines, and the calls that ask `policy.dispatch` about them.

Every decision (taken in or not, whose turn, on which replica) is the policy's; here are the requests themselves.
`places` has what each of them has on replicas, `rows` the numbers the policy goes by. No socket and no clock: what
happens is told by calls, time comes in as an argument, and the answers are values or calls of a request's `turn`. So a
rehearsal, fed the same events, decides alike.

Requests wait here, those of one client to one model in the order they came; a replica gets one only when it has a slot.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from waterline.plan import Plan, Replica
from waterline.policy import admission, dispatch
from waterline.policy.decisions import NOT_SERVED, SLOT_FREE, TOO_LATE, WAITS_FOR_SLOT
from waterline.policy.routing import MOST_DRAWN, NOBODY
from waterline.service.decision_log import DecisionLog
from waterline.service.lines import (
    Coming,
    Lane,
    Refusal,
    Service,
    Ticket,
    Turn,
    most_tokens,
    reads_per_s,
    works_per_s,
)
from waterline.service.places import Places
from waterline.service.rows import Rows
from waterline.service.second_places import SecondPlaces

Draw = Callable[[], int]

ROLES = {"both": dispatch.BOTH, "prefill": dispatch.READS, "decode": dispatch.WRITES}
NO_BLOCKS: NDArray[np.int64] = np.zeros(0, np.int64)


class Dispatcher:
    """The desk of a fleet: the one place where its queues change.

    Args:
        plan: whose replicas there are; none is ready yet.
        draw: a whole number below `MOST_DRAWN`, uniform.
    """

    def __init__(self, plan: Plan, draw: Draw | None = None) -> None:
        self._draw = draw or (lambda: random.randrange(MOST_DRAWN))  # noqa: S311 - which of two queues is no secret
        self.rows = Rows(plan)
        self.services: dict[str, Service] = {}
        self.lanes: dict[str, Lane] = {}  # by replica
        self._lane_at: dict[int, Lane] = {}  # by row
        self._loads: dict[tuple[str, str], tuple[int, int]] = {}
        self.log = DecisionLog(self.rows, self._lane_at)
        self._places = Places(self.rows, self._lane_at, self.log, self._draw)
        self._seconds = SecondPlaces(self.rows, self._lane_at, self.log, self._draw, self._places)
        self.use_plan(plan)
        for replica in plan.replicas:
            self.add(replica)

    # --- Requests ---------------------------------------------------------------------------------------------------
    def enter(
        self,
        model: str,
        prompt_tokens: int,
        most_tokens: int | None,
        turn: Turn,
        now_s: float,
        *,
        tenant: str,
        line: str = "",
        answers: int = 1,
        blocks: NDArray[np.int64] = NO_BLOCKS,
        wait_s: float | None = None,
        spare: bool = False,
        counts: bool = True,
        id_: str = "",
    ) -> Ticket | Refusal:
        """Decide about a newcomer; its `turn` may come before this returns.

        Args:
            model: it asks.
            prompt_tokens: of it, as far as is known.
            most_tokens: the limit of each of its answers, if any.
            turn: called when it may go ahead.
            now_s: the time.
            tenant: whose it is.
            line: in which it waits, behind those of the same client.
            answers: it wants.
            blocks: keys of its prompt's blocks, see `policy.routing`.
            wait_s: for its first token, before it would rather be refused; None: as the SLO of the model says.
            spare: it takes only what nobody else wants: its turn comes after everybody's, and what it uses is on
                another account of its tenant's, so that it lowers nobody's standing.
            counts: its work is demand, for which GPUs are moved.
            id_: by which the decision log knows it.
        """
        service = self.services[model]
        expected = service.planned.output_tokens
        output_tokens = answers * (expected if most_tokens is None else min(most_tokens, expected))
        if counts:
            prompts, outputs = self._loads.get((tenant, model), (0, 0))
            self._loads[tenant, model] = prompts + prompt_tokens, outputs + output_tokens
        clients = self.rows.spare_of(tenant) if spare else self.rows.tenants[tenant]
        within_s = service.ttft_s if wait_s is None else wait_s
        ticket = Ticket(
            service=service,
            client=self.rows.client(clients, line),
            clients=clients,
            tenant=tenant,
            line=line,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            # Estimated, so that only an engine can tell that a request is too long for it.
            tokens=min(prompt_tokens + output_tokens, self.rows.desk.models.longest_tokens[service.row] or 1),
            blocks=blocks,
            arrival_s=now_s,
            until_s=now_s + admission.waits_s(within_s),
            turn=turn,
            id=id_,
        )
        if service.hedged and self.rows.desk.models.free_slots[service.row] <= 0:
            self._seconds.lose_one(service, now_s)
        return self._take_in(ticket, self._arrive(ticket, within_s), now_s)

    def first_token(self, ticket: Ticket, replica_id: str = "") -> None:
        """Its prompt has been read, or its cache fetched; told again, this changes nothing.

        By the replica of that name, where it may be its second.
        """
        if ticket.second and ticket.second.lane.replica.id == replica_id:
            self._seconds.read(ticket)
        else:
            self._places.first_token(ticket)

    def leave(self, ticket: Ticket, now_s: float, gpu_s: float | None = None) -> None:
        """A request has ended, in whatever way; its place goes to the next.

        Its tenant is charged for the time it had on its replica, times the GPUs: `gpu_s` where somebody knows better.
        """
        if ticket.again_s is not None:  # it has been told, and has no place any more
            ticket.clients.go(ticket.client)
            return
        if self.log.listeners and not ticket.running:
            self.log.write_end(ticket, now_s)
        self._seconds.drop(ticket, now_s)
        if not self._places.give_up(ticket, now_s, gpu_s):
            self._unline(ticket)
            dispatch.gave_up(self.rows.desk, ticket.service.row, ticket.client, ticket.cost_gpu_s)
        ticket.clients.go(ticket.client)
        self._advance(ticket.service, now_s)

    def move(self, ticket: Ticket, avoid: frozenset[str], now_s: float) -> None:
        """Send a request that its replica could not serve to another, and not to these while there is one.

        It goes before all that wait for the model, because what has begun is not held up; nor is it told ever that its
        turn does not come.
        """
        service = ticket.service
        ticket.avoids, ticket.until_s = avoid, math.inf
        self._seconds.drop(ticket, now_s)
        if self._places.give_up(ticket, now_s):
            dispatch.come_back(self.rows.desk, service.row, ticket.client, ticket.cost_gpu_s)
            service.lines.setdefault(ticket.client, deque()).appendleft(ticket)
            service.returned.append(ticket)
        self._advance(service, now_s)

    # --- Requests that two replicas work on, until one of them speaks -----------------------------------------------

    def hedge(self, ticket: Ticket, on_lost: Callable[[float], None], now_s: float) -> Replica | None:
        """Give a request a second replica, where one has a slot that nobody waits for; None: there is none.

        Its time there is on nobody's account, unless it is that replica that answers. When somebody comes who would
        have to wait for the slot, it is theirs, and `on_lost` is told the GPU time that was for nothing.
        """
        return self._seconds.give(ticket, on_lost, now_s)

    def take_second(self, ticket: Ticket, now_s: float) -> float:
        """Let a request run on its second replica alone; return the GPU time it had on the first, which nobody pays."""
        lost_gpu_s = self._seconds.take(ticket, now_s)
        self._advance(ticket.service, now_s)
        return lost_gpu_s

    def drop_second(self, ticket: Ticket, now_s: float) -> float:
        """Let it run on its first replica alone; return the GPU time it had on the second. Without one, nothing."""
        lost_gpu_s = self._seconds.drop(ticket, now_s)
        self._advance(ticket.service, now_s)
        return lost_gpu_s

    # --- Requests whose prompt is read on one replica, and the answer written on another ----------------------------

    def hand_over(self, ticket: Ticket, now_s: float) -> Lane | None:
        """Choose who writes the answer to a prompt that has been read, or is being read; None while there is nobody.

        Where nobody takes over any more, those are asked that drain, or did not answer lately.
        """
        return self._places.hand_over(ticket, now_s)

    def has_read(self, ticket: Ticket, now_s: float) -> None:
        """The prompt has been read, and the next may be; its cache is kept until it is fetched, see `first_token`."""
        self._places.has_read(ticket, now_s)
        self._advance(ticket.service, now_s)

    # --- The fleet as it is, and the time that passes ---------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Let the accounts forget, and tell those whose turn does not come; once a second."""
        dispatch.tick(self.rows.desk, now_s)
        self.rows.limit_spare()
        for service in self.services.values():
            if service.lines:
                self._advance(service, now_s)
                self._tell_overtaken(service, now_s)

    def replicas_of(self, model: str) -> list[Replica]:
        """Return a model's replicas, in service or not; none where it is not known."""
        service = self.services.get(model)
        return [lane.replica for lane in service.lanes] if service else []

    def stand_ins(self, replica: Replica) -> list[str]:
        """Return the ids of those that do what a replica does, itself among them and none else that drains.

        None of a model that is gone.
        """
        service = self.services.get(replica.model)
        stay = [one for one in service.lanes if not one.drains or one.replica.id == replica.id] if service else []
        return [one.replica.id for one in stay if one.writes_only == (replica.role == "decode")]

    def under_way(self, tenant: str) -> int:
        """Return how many requests of a tenant wait or run."""
        return self.rows.under_way(tenant)

    # --- Replicas that come and go ----------------------------------------------------------------------------------

    def add(self, replica: Replica) -> None:
        """A replica has come into being, and is not ready yet."""
        lane = Lane(replica=replica, row=self.rows.take_replica(), rows=self.rows)
        service = self.services[replica.model]
        service.lanes.append(lane)
        service.recount()
        self.lanes[replica.id] = self._lane_at[lane.row] = lane
        dispatch.put(
            self.rows.desk,
            lane.row,
            service.row,
            role=ROLES[replica.role],
            gpus=replica.layout.gpus,
            slots=replica.max_batch,
            longest_tokens=most_tokens(replica),
            tokens_per_s=works_per_s(replica),
            prefill_tokens_per_s=reads_per_s(replica),
        )
        dispatch.set_in_service(self.rows.desk, [lane.row], serves=False)

    def update(self, replica: Replica) -> None:
        """A replica goes on with other figures."""
        lane = self.lanes[replica.id]
        free_slots = self.rows.desk.replicas.free_slots
        free_slots[lane.row] += replica.max_batch - lane.replica.max_batch
        self.rows.desk.replicas.tokens_per_s[lane.row] = works_per_s(replica)
        self.rows.desk.replicas.prefill_tokens_per_s[lane.row] = reads_per_s(replica)
        self.rows.desk.models.holds_tokens[lane.row] = most_tokens(replica)
        lane.replica = replica
        self.services[replica.model].recount()
        dispatch.set_in_service(self.rows.desk, [lane.row], serves=lane.ready)

    def remove(self, replica_id: str) -> None:
        """A replica is gone; nobody runs on it any more."""
        lane = self.lanes.pop(replica_id)
        dispatch.set_in_service(self.rows.desk, [lane.row], serves=False)
        service = self.services[lane.replica.model]
        service.lanes.remove(lane)
        service.recount()
        self.rows.replicas.append(lane.row)

    def set_ready(self, replica_id: str, *, ready: bool, now_s: float, back_in_s: float = math.inf) -> None:
        """A replica has come up, or gone, to be back in a while, which is infinite where nobody knows.

        When it was the last, who waits is told that there is nobody now.
        """
        lane = self.lanes[replica_id]
        lane.up, lane.held, lane.drains, lane.back_s = ready, False, False, now_s + back_in_s
        self._serve(lane, now_s)
        if not ready:
            self._tell_if_hopeless(self.services[lane.replica.model])

    def hold(self, replica_id: str, now_s: float, *, drains: bool = False) -> None:
        """A replica did not answer lately, or drains, and gets no more work; what it has stays its.

        Who waits for its model waits on, unless it drains and was the last.
        """
        lane = self.lanes[replica_id]
        lane.up, lane.held, lane.drains = False, True, drains
        self._serve(lane, now_s)
        if drains:
            self._seconds.lose_on(lane, self.services[lane.replica.model], now_s)
            self._tell_if_hopeless(self.services[lane.replica.model])

    def expect(self, coming: Iterable[Coming]) -> None:
        """These will be started when there is room for them, and no others; models of a plan that is used."""
        for service in self.services.values():
            service.coming = []
        for one in coming:
            self.services[one.replica.model].coming.append(one)

    def doubt(self, replica_id: str, *, doubted: bool, now_s: float) -> None:
        """A replica fails requests and gets no more of them, or may have them again."""
        lane = self.lanes[replica_id]
        lane.doubted = doubted
        self._serve(lane, now_s)

    # --- Plans that come and go -------------------------------------------------------------------------------------

    def use_plan(self, plan: Plan) -> None:
        """Go on with another plan: its tenants, its models and what is expected of them; replicas come by `add`."""
        self.rows.use_tenants(plan.fleet.tenants)
        slos = plan.fleet.slos
        for planned in plan.models:
            if service := self.services.get(planned.model):
                service.planned, service.ttft_s = planned, slos[planned.model].ttft_s
            else:
                row = self.rows.models.pop()
                self.services[planned.model] = Service(row=row, planned=planned, ttft_s=slos[planned.model].ttft_s)
            self.services[planned.model].hedge_after_s = plan.fleet.model(planned.model).hedge_after_s

    def forget(self, model: str) -> None:
        """Forget a model that has no replica left."""
        self.rows.models.append(self.services.pop(model).row)

    def take_loads(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return what each tenant has asked of each model since this was asked last, refused or not.

        As tokens of prompts, and tokens that are expected to be written.
        """
        loads, self._loads = self._loads, {}
        return loads

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _tell_if_hopeless(self, service: Service) -> None:
        """Tell those who wait when there is nobody any more."""
        if not service.has_hope:
            for ticket in [ticket for line in service.lines.values() for ticket in line]:
                ticket.turn(False)  # noqa: FBT003 - a callback of one argument

    def _tell_overtaken(self, service: Service, now_s: float) -> None:
        """Tell those whose turn has not come for long, in the order in which they came; they lose their place."""
        late = [ticket for line in service.lines.values() for ticket in line if ticket.until_s < now_s]
        for ticket in sorted(late, key=lambda one: one.arrival_s):
            self._unline(ticket)
            ticket.again_s = dispatch.overtaken(
                self.rows.desk, service.row, ticket.client, ticket.cost_gpu_s, service.ttft_s
            )
            if self.log.listeners:
                self.log.write(ticket, TOO_LATE, now_s, back_in_s=ticket.again_s)
            ticket.turn(False)  # noqa: FBT003 - a callback of one argument
        if late:
            self._advance(service, now_s)

    def _arrive(self, ticket: Ticket, within_s: float) -> dispatch.Arrival:
        """Decide about a newcomer that may wait so long for its first token."""
        draw = self._draw()
        if self.log.listeners:
            self.log.explain(ticket, draw)
        arrival = dispatch.arrive(
            self.rows.desk,
            ticket.service.row,
            ticket.client,
            ticket.prompt_tokens,
            0,
            ticket.output_tokens,
            ticket.tokens,
            within_s,
            ticket.blocks,
            draw,
        )
        return self._arrive_ahead(ticket, within_s) if arrival.rule == NOT_SERVED else arrival

    def _arrive_ahead(self, ticket: Ticket, within_s: float) -> dispatch.Arrival:
        """Decide about a newcomer while nobody serves its model: it may wait for those who should be there first."""
        service = ticket.service
        there_s = service.there_s
        coming = [one.replica for one in service.expected if one.there_s <= there_s]
        readers = [replica for replica in coming if replica.role != "decode"]
        return dispatch.arrive_ahead(
            self.rows.desk,
            service.row,
            ticket.client,
            ticket.prompt_tokens,
            service.cost_gpu_s(ticket.prompt_tokens, ticket.output_tokens),
            service.ready_in_s(ticket.arrival_s),
            float(sum(replica.layout.gpus for replica in coming)),
            sum(map(reads_per_s, readers)) / max(len(readers), 1),
            within_s,
        )

    def _take_in(self, ticket: Ticket, arrival: dispatch.Arrival, now_s: float) -> Ticket | Refusal:
        """Do what was decided about a newcomer."""
        if arrival.rule not in {SLOT_FREE, WAITS_FOR_SLOT}:
            if self.log.listeners:
                self.log.write(ticket, arrival.rule, now_s, back_in_s=arrival.seconds)
            return Refusal(rule=arrival.rule, retry_after_s=arrival.seconds)
        ticket.cost_gpu_s = arrival.gpu_s
        ticket.clients.come(ticket.client)
        if arrival.rule == SLOT_FREE:
            self._run(ticket, SLOT_FREE, arrival.replica, arrival.cached_tokens, now_s)
        else:
            ticket.service.lines.setdefault(ticket.client, deque()).append(ticket)
            self._advance(ticket.service, now_s)
        return ticket

    def _advance(self, service: Service, now_s: float) -> None:
        """Start whoever may start; where slots are lacking, those that are second places are theirs."""
        self._start_all(service, now_s)
        while service.hedged and self._seconds.are_needed(service):
            self._seconds.lose_one(service, now_s)
            self._start_all(service, now_s)

    def _start_all(self, service: Service, now_s: float) -> None:
        """Start whoever may start: first those who have begun before."""
        for ticket in tuple(service.returned):
            self._start(service, ticket, now_s)
        while service.lines:
            client, _ = dispatch.next_turn(self.rows.desk, service.row)
            if client == NOBODY or not self._start(service, service.lines[client][0], now_s):
                return

    def _start(self, service: Service, ticket: Ticket, now_s: float) -> bool:
        """Start a request where it has not failed before, if there is anybody else; tell whether there is a slot."""
        # Who could hold it may have gone since it came: then it goes as one that comes now.
        ticket.tokens = min(ticket.tokens, self.rows.desk.models.longest_tokens[service.row] or ticket.tokens)
        avoided = self._places.avoided(ticket, writers=False)
        self.rows.set_serving(avoided, 0)
        draw = self._draw()
        if self.log.listeners:
            self.log.explain_turn(ticket, draw)
        replica, cached_tokens, _ = dispatch.start(
            self.rows.desk,
            service.row,
            ticket.client,
            ticket.prompt_tokens,
            0,
            ticket.output_tokens,
            ticket.tokens,
            ticket.cost_gpu_s,
            ticket.blocks,
            draw,
        )
        self.rows.set_serving(avoided, 1)
        if replica != NOBODY:
            self._unline(ticket)
            self._run(ticket, WAITS_FOR_SLOT, replica, cached_tokens, now_s)
        return replica != NOBODY

    def _run(self, ticket: Ticket, rule: int, row: int, cached_tokens: int, now_s: float) -> None:
        if self.log.listeners:
            self.log.write(ticket, rule, now_s, row=row)
        self._places.take(ticket, row, cached_tokens, now_s)
        ticket.turn(True)  # noqa: FBT003 - a callback of one argument

    def _unline(self, ticket: Ticket) -> None:
        """Take a request out of its line; those who have begun before stand first."""
        service = ticket.service
        line = service.lines[ticket.client]
        if line[0] is ticket:
            line.popleft()
        else:
            line.remove(ticket)
        if not line:
            del service.lines[ticket.client]
        if ticket in service.returned:
            service.returned.remove(ticket)

    def _serve(self, lane: Lane, now_s: float) -> None:
        ready = lane.up and not lane.held and not lane.doubted
        if lane.ready != ready:
            lane.ready = ready
            dispatch.set_in_service(self.rows.desk, [lane.row], serves=ready)
            if ready:
                self._advance(self.services[lane.replica.model], now_s)


def block_keys(prompt: bytes, block_bytes: int) -> Iterable[int]:
    """Yield a key for each whole block of a prompt: equal keys mean equal beginnings, in this process."""
    key = 0
    for end in range(block_bytes, len(prompt) + 1, block_bytes):
        key = hash((key, prompt[end - block_bytes : end])) or 1
        yield key
