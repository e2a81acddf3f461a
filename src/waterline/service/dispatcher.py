"""The live desk: requests in their lines, and the calls that ask `policy.dispatch` about them.

Every decision (taken in or not, whose turn, on which replica) is the policy's; here are the requests themselves and the
time each of them had; `rows` has the numbers the policy goes by. No socket and no clock: what happens is told by calls,
time comes in as an argument, and the answers are values or calls of a request's `turn`. So a rehearsal, fed the same
events, decides alike.

Requests wait here, those of one client to one model in the order they came; a replica gets one only when it has a slot.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from waterline.plan import Plan, Replica
from waterline.policy import dispatch
from waterline.policy.decisions import NOT_SERVED, SLOT_FREE, TAKES_OVER, WAITS_FOR_SLOT
from waterline.policy.routing import MOST_DRAWN, NOBODY
from waterline.service.decision_log import DecisionLog
from waterline.service.lines import (
    Coming,
    Lane,
    Refusal,
    Second,
    Service,
    Ticket,
    Turn,
    most_tokens,
    reads_per_s,
    works_per_s,
)
from waterline.service.rows import Rows

Draw = Callable[[], int]

PATIENCE = 3  # how much longer than its deadline a request may wait that was taken in, before it is told
LEAST_WAIT_S = 10.0
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
            until_s=now_s + PATIENCE * max(within_s, LEAST_WAIT_S),
            turn=turn,
            id=id_,
        )
        if service.hedged:
            self._make_room(service)
        return self._take_in(ticket, self._arrive(ticket, within_s), now_s)

    def first_token(self, ticket: Ticket) -> None:
        """Its prompt has been read, or its cache fetched; told again, this changes nothing."""
        self._fetched(ticket)
        if ticket.unread and ticket.running and ticket.lane:
            ticket.unread = False
            dispatch.first_token(
                self.rows.desk, ticket.service.row, ticket.lane.row, ticket.prompt_tokens, ticket.unread_tokens
            )

    def leave(self, ticket: Ticket, now_s: float, gpu_s: float | None = None) -> None:
        """A request has ended, in whatever way; its place goes to the next.

        Its tenant is charged for the time it had on its replica, times the GPUs: `gpu_s` where somebody knows better.
        """
        if self.log.listeners and not ticket.running:
            self.log.write_end(ticket, now_s)
        if not self._take_off(ticket, now_s, gpu_s):
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
        if self._take_off(ticket, now_s):
            dispatch.come_back(self.rows.desk, service.row, ticket.client, ticket.cost_gpu_s)
            service.lines.setdefault(ticket.client, deque()).appendleft(ticket)
            service.returned.append(ticket)
        self._make_room(service)
        self._advance(service, now_s)

    # --- Requests that two replicas work on, until one of them speaks -----------------------------------------------

    def hedge(self, ticket: Ticket, give_up: Callable[[], None], now_s: float) -> Replica | None:
        """Give a request a second replica, where one has a slot that nobody waits for; None: there is none.

        Its time there is on nobody's account, unless it is that replica that answers. When somebody comes who would
        have to wait for the slot, it is theirs, and `give_up` is called.
        """
        service = ticket.service
        if service.lines or not (ticket.running and ticket.lane) or ticket.second:
            return None
        others = [lane for lane in service.lanes if lane.ready]
        avoided = {ticket.lane.replica.id, *ticket.avoids}
        out = [one.row for one in others if one.replica.id in avoided or one.replica.role != "both"]
        self._set_serving(out, 0)
        draw = self._draw()
        if self.log.listeners:
            self.log.explain(ticket, draw)
        row, cached_tokens = dispatch.hedge(
            self.rows.desk,
            service.row,
            ticket.prompt_tokens,
            ticket.output_tokens,
            ticket.tokens,
            ticket.blocks,
            draw,
        )
        self._set_serving(out, 1)
        if row == NOBODY:
            return None
        if self.log.listeners:
            self.log.write(ticket, SLOT_FREE, now_s, row=row)
        lane = self._lane_at[row]
        lane.settle(now_s)
        lane.running += 1
        unread_tokens = ticket.prompt_tokens - cached_tokens
        ticket.second = Second(lane=lane, unread_tokens=unread_tokens, begun_share_s=lane.share_s, give_up=give_up)
        service.hedged.append(ticket)
        return lane.replica

    def take_second(self, ticket: Ticket, now_s: float) -> float:
        """Let a request run on its second replica alone; return the GPU time it had on the first, which nobody pays."""
        second, first = ticket.second, ticket.lane
        assert second  # noqa: S101 - it runs on both
        assert first  # noqa: S101
        self.first_token(ticket)
        lost_gpu_s = self._leave_lane(ticket, first, ticket.begun_share_s, now_s)
        ticket.second = None
        ticket.service.hedged.remove(ticket)
        ticket.lane, ticket.begun_share_s = second.lane, second.begun_share_s
        ticket.unread, ticket.unread_tokens = True, second.unread_tokens
        self._advance(ticket.service, now_s)
        return lost_gpu_s

    def drop_second(self, ticket: Ticket, now_s: float) -> float:
        """Let it run on its first replica alone; return the GPU time it had on the second. Without one, nothing."""
        lost_gpu_s = self._leave_second(ticket, now_s)
        self._advance(ticket.service, now_s)
        return lost_gpu_s

    def _leave_second(self, ticket: Ticket, now_s: float) -> float:
        if not (second := ticket.second):
            return 0.0
        ticket.second = None
        ticket.service.hedged.remove(ticket)
        row = second.lane.row
        dispatch.first_token(self.rows.desk, ticket.service.row, row, ticket.prompt_tokens, second.unread_tokens)
        return self._leave_lane(ticket, second.lane, second.begun_share_s, now_s)

    def _make_room(self, service: Service) -> None:
        """Where there is no slot left, take one from who has two replicas."""
        if service.hedged and self.rows.desk.models.free_slots[service.row] <= 0:
            second = service.hedged[-1].second
            assert second  # noqa: S101 - or it would not be there
            second.give_up()

    # --- Requests whose prompt is read on one replica, and the answer written on another ----------------------------

    def hand_over(self, ticket: Ticket, now_s: float) -> Lane | None:
        """Choose who writes the answer to a prompt that has been read, or is being read; None while there is nobody.

        Where nobody takes over any more, those are asked that drain, or did not answer lately.
        """
        service = ticket.service
        avoided = self._avoided(service, ticket, writers=True)
        self._set_serving(avoided, 0)
        draw = self._draw()
        if self.log.listeners:
            self.log.explain_writer(ticket, draw)
        row = dispatch.take_over(self.rows.desk, service.row, ticket.output_tokens, ticket.tokens, draw)
        self._set_serving(avoided, 1)
        lane = self._lane_at[row] if row != NOBODY else self._leaving_writer(ticket)
        if not lane:
            return None
        if self.log.listeners:
            self.log.write(ticket, TAKES_OVER, now_s, row=lane.row)
        lane.settle(now_s)
        lane.running += 1
        ticket.writer = lane
        if not ticket.running:
            self._pass_on(ticket)
        return lane

    def has_read(self, ticket: Ticket, now_s: float) -> None:
        """The prompt has been read, and the next may be; its cache is kept until it is fetched, see `first_token`."""
        reader = ticket.lane
        assert reader  # noqa: S101 - it runs there
        self.first_token(ticket)
        ticket.read_gpu_s = self._leave_lane(ticket, reader, ticket.begun_share_s, now_s)
        ticket.running, ticket.was_read, ticket.keeper = False, True, reader
        reader.keeping += 1
        if ticket.writer:
            self._pass_on(ticket)
        self._advance(ticket.service, now_s)

    def _pass_on(self, ticket: Ticket) -> None:
        """Let a request run where it is written."""
        assert ticket.writer  # noqa: S101 - that has been chosen
        ticket.lane, ticket.writer, ticket.running = ticket.writer, None, True
        ticket.begun_share_s = ticket.lane.share_s

    def _fetched(self, ticket: Ticket) -> None:
        if ticket.keeper:
            ticket.keeper.keeping -= 1
            ticket.keeper = None

    def _leaving_writer(self, ticket: Ticket) -> Lane | None:
        """Return who would be done first of those that write, are there, and get no more."""
        lanes = [lane for lane in ticket.service.lanes if lane.writes_only and lane.held and not lane.doubted]
        able = [lane for lane in lanes if most_tokens(lane.replica) >= ticket.tokens]
        lane = min(able, key=lambda one: one.backlog_tokens / one.replica.tokens_per_s, default=None)
        if lane:
            if self.log.listeners:
                self.log.explain_last_resort(lane.row)
            self.rows.desk.replicas.backlog_tokens[lane.row] += ticket.output_tokens
        return lane

    def tick(self, now_s: float) -> None:
        """Let the accounts forget, and tell those whose turn does not come; once a second."""
        dispatch.tick(self.rows.desk, now_s)
        self.rows.limit_spare()
        for service in self.services.values():
            if service.lines:
                self._advance(service, now_s)
            for ticket in [ticket for line in service.lines.values() for ticket in line if ticket.until_s < now_s]:
                ticket.turn(False)  # noqa: FBT003 - a callback of one argument

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
        avoided = self._avoided(service, ticket, writers=False)
        self._set_serving(avoided, 0)
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
        self._set_serving(avoided, 1)
        if replica != NOBODY:
            self._unline(ticket)
            self._run(ticket, WAITS_FOR_SLOT, replica, cached_tokens, now_s)
        return replica != NOBODY

    def _avoided(self, service: Service, ticket: Ticket, *, writers: bool) -> Sequence[int]:
        """Return the rows where a request has failed before, if there is anybody else for it."""
        if not ticket.avoids:
            return ()
        ready = [lane for lane in service.lanes if lane.ready and lane.writes_only == writers]
        ready = [lane for lane in ready if self.rows.desk.replicas.longest_tokens[lane.row] >= ticket.tokens]
        avoided = [lane.row for lane in ready if lane.replica.id in ticket.avoids]
        return avoided if len(avoided) < len(ready) else ()

    def _set_serving(self, rows: Sequence[int], serves: int) -> None:
        for row in rows:
            self.rows.desk.replicas.serves[row] = serves

    def _run(self, ticket: Ticket, rule: int, row: int, cached_tokens: int, now_s: float) -> None:
        if self.log.listeners:
            self.log.write(ticket, rule, now_s, row=row)
        lane = self._lane_at[row]
        lane.settle(now_s)
        lane.running += 1
        ticket.lane, ticket.running, ticket.unread = lane, True, True
        ticket.unread_tokens = ticket.prompt_tokens - cached_tokens
        ticket.begun_share_s, ticket.start_s = lane.share_s, now_s
        ticket.turn(True)  # noqa: FBT003 - a callback of one argument

    def _take_off(self, ticket: Ticket, now_s: float, gpu_s: float | None = None) -> bool:
        """Take a request off its replica, and charge what it had there instead of what was expected.

        What it had where its prompt was read counts in. False when it waits for its turn, and has nothing to give up.
        """
        if not (ticket.running or ticket.was_read):
            return False
        self._leave_second(ticket, now_s)
        had_gpu_s = ticket.read_gpu_s
        if ticket.running and ticket.lane:
            self.first_token(ticket)
            had_gpu_s += self._leave_lane(ticket, ticket.lane, ticket.begun_share_s, now_s)
        if ticket.writer:  # it has not begun there
            self._leave_lane(ticket, ticket.writer, ticket.writer.share_s, now_s)
            ticket.writer = None
        self._fetched(ticket)
        ticket.running, ticket.was_read, ticket.read_gpu_s = False, False, 0.0
        had_gpu_s = had_gpu_s if gpu_s is None else gpu_s
        ticket.gpu_s += had_gpu_s
        dispatch.settle(self.rows.desk, ticket.service.row, ticket.client, had_gpu_s - ticket.cost_gpu_s)
        return True

    def _leave_lane(self, ticket: Ticket, lane: Lane, begun_share_s: float, now_s: float) -> float:
        """Take a request off one replica; return the GPU time it had there since its share was at the beginning."""
        dispatch.left(self.rows.desk, ticket.service.row, lane.row, ticket.output_tokens)
        lane.settle(now_s)
        lane.running -= 1
        return (lane.share_s - begun_share_s) * lane.replica.layout.gpus

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
