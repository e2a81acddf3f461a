"""Second places: a request that a replica keeps waiting may have one on another as well, until one of them speaks.

A second place is a slot that nobody waits for. As soon as somebody does who would start in it, it is given up: who is
sent twice pushes nobody back. The time on the replica whose answer nobody got is on no tenant's account.
"""

from collections.abc import Callable, Mapping

from waterline.plan import Replica
from waterline.policy import dispatch
from waterline.policy.decisions import HEDGES
from waterline.policy.routing import NOBODY
from waterline.service.decision_log import DecisionLog
from waterline.service.lines import Lane, Second, Service, Ticket
from waterline.service.places import Places
from waterline.service.rows import Rows


class SecondPlaces:
    """Those of all requests that have one.

    Args:
        rows: the desk's numbers.
        lanes: replicas by their rows.
        log: of decisions.
        draw: a whole number below `MOST_DRAWN`, uniform.
        places: the first ones.
    """

    def __init__(
        self, rows: Rows, lanes: Mapping[int, Lane], log: DecisionLog, draw: Callable[[], int], places: Places
    ) -> None:
        self._rows = rows
        self._lanes = lanes
        self._log = log
        self._draw = draw
        self._places = places

    def give(self, ticket: Ticket, on_lost: Callable[[float], None], now_s: float) -> Replica | None:
        """Give a request a second replica, where one has a slot to spare; None: there is none.

        `on_lost` is told when it is lost to somebody else, and the GPU time that was for nothing.
        """
        if ticket.second or not (ticket.running and ticket.lane) or self.are_needed(ticket.service):
            return None
        row, cached_tokens = self._chosen(ticket, ticket.lane)
        if row == NOBODY:
            return None
        if self._log.listeners:
            self._log.write(ticket, HEDGES, now_s, row=row)
        lane = self._lanes[row]
        lane.settle(now_s)
        lane.running += 1
        unread_tokens = ticket.prompt_tokens - cached_tokens
        ticket.second = Second(lane=lane, unread_tokens=unread_tokens, begun_share_s=lane.share_s, on_lost=on_lost)
        ticket.service.hedged.append(ticket)
        return lane.replica

    def _chosen(self, ticket: Ticket, first: Lane) -> tuple[int, int]:
        """Return the row of a replica with a slot, and what it has in its cache; not of one that has failed it."""
        avoided = {first.replica.id, *ticket.avoids}
        ready = [lane for lane in ticket.service.lanes if lane.ready]
        out = [lane.row for lane in ready if lane.replica.id in avoided or lane.replica.role != "both"]
        self._rows.set_serving(out, 0)
        draw = self._draw()
        if self._log.listeners:
            self._log.explain(ticket, draw)
        row, cached_tokens = dispatch.hedge(
            self._rows.desk,
            ticket.service.row,
            ticket.prompt_tokens,
            ticket.output_tokens,
            ticket.tokens,
            ticket.blocks,
            draw,
        )
        self._rows.set_serving(out, 1)
        return row, cached_tokens

    def are_needed(self, service: Service) -> bool:
        """Whether somebody waits who would start if there were a slot; who waits because of a limit would not."""
        if not service.lines:
            return False
        models = self._rows.desk.models
        client = dispatch.next_turn(self._rows.desk, service.row)[0]
        return bool(service.returned) or models.free_slots[service.row] <= 0 or client != NOBODY

    def read(self, ticket: Ticket) -> None:
        """The prompt has been read on the second replica; told again, this changes nothing."""
        if (second := ticket.second) and second.unread:
            second.unread = False
            row, unread_tokens = second.lane.row, second.unread_tokens
            dispatch.first_token(self._rows.desk, ticket.service.row, row, ticket.prompt_tokens, unread_tokens)

    def take(self, ticket: Ticket, now_s: float) -> float:
        """Let a request run on its second replica alone; return the GPU time it had on the first."""
        second, first = ticket.second, ticket.lane
        assert second  # noqa: S101 - it runs on both
        assert first  # noqa: S101
        self._places.first_token(ticket)
        lost_gpu_s = self._places.leave(ticket, first, ticket.begun_share_s, now_s)
        ticket.second = None
        ticket.service.hedged.remove(ticket)
        ticket.lane, ticket.begun_share_s = second.lane, second.begun_share_s
        ticket.unread, ticket.unread_tokens = second.unread, second.unread_tokens
        dispatch.hedge_won(self._rows.desk, second.lane.row, ticket.blocks)
        return lost_gpu_s

    def drop(self, ticket: Ticket, now_s: float) -> float:
        """Let a request run on its first replica alone; return the GPU time it had on the second, or 0."""
        if not (second := ticket.second):
            return 0.0
        self.read(ticket)
        ticket.second = None
        ticket.service.hedged.remove(ticket)
        return self._places.leave(ticket, second.lane, second.begun_share_s, now_s)

    def lose_one(self, service: Service, now_s: float) -> None:
        """Take the second place from the request that got one last."""
        self._lose(service.hedged[-1], now_s)

    def lose_on(self, lane: Lane, service: Service, now_s: float) -> None:
        """Take those away that are on a replica which drains: nobody waits for what another does as well."""
        for ticket in [one for one in service.hedged if one.second and one.second.lane is lane]:
            self._lose(ticket, now_s)

    def _lose(self, ticket: Ticket, now_s: float) -> None:
        assert ticket.second  # noqa: S101 - or it would not be there
        on_lost = ticket.second.on_lost
        on_lost(self.drop(ticket, now_s))
