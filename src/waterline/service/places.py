"""What requests have on replicas: a slot, a prompt that is not read yet, and a part of the time.

Who gets a place, and when, is the dispatcher's to say; a second place beside the first is `second_places`' own matter.
"""

from collections.abc import Callable, Mapping

from waterline.policy import dispatch
from waterline.policy.decisions import TAKES_OVER
from waterline.policy.routing import NOBODY
from waterline.service.decision_log import DecisionLog
from waterline.service.lines import Lane, Ticket, most_tokens
from waterline.service.rows import Rows


class Places:
    """The places of all requests that have one.

    Args:
        rows: the desk's numbers.
        lanes: replicas by their rows.
        log: of decisions.
        draw: a whole number below `MOST_DRAWN`, uniform.
    """

    def __init__(self, rows: Rows, lanes: Mapping[int, Lane], log: DecisionLog, draw: Callable[[], int]) -> None:
        self._rows = rows
        self._lanes = lanes
        self._log = log
        self._draw = draw

    def take(self, ticket: Ticket, row: int, cached_tokens: int, now_s: float) -> None:
        """Put a request where the desk has given it a slot."""
        lane = self._lanes[row]
        lane.settle(now_s)
        lane.running += 1
        ticket.lane, ticket.running, ticket.unread = lane, True, True
        ticket.unread_tokens = ticket.prompt_tokens - cached_tokens
        ticket.begun_share_s, ticket.start_s = lane.share_s, now_s

    def first_token(self, ticket: Ticket) -> None:
        """Its prompt has been read, or its cache fetched; told again, this changes nothing."""
        self._fetched(ticket)
        if ticket.unread and ticket.running and ticket.lane:
            ticket.unread = False
            dispatch.first_token(
                self._rows.desk, ticket.service.row, ticket.lane.row, ticket.prompt_tokens, ticket.unread_tokens
            )

    def give_up(self, ticket: Ticket, now_s: float, gpu_s: float | None = None) -> bool:
        """Take a request off its replica, and charge what it had there instead of what was expected.

        What it had where its prompt was read counts in. False when it waits for its turn, and has nothing to give up.
        """
        if not (ticket.running or ticket.was_read):
            return False
        had_gpu_s = ticket.read_gpu_s
        if ticket.running and ticket.lane:
            self.first_token(ticket)
            had_gpu_s += self.leave(ticket, ticket.lane, ticket.begun_share_s, now_s)
        if ticket.writer:  # it has not begun there
            self.leave(ticket, ticket.writer, ticket.writer.share_s, now_s)
            ticket.writer = None
        self._fetched(ticket)
        ticket.running, ticket.was_read, ticket.read_gpu_s = False, False, 0.0
        had_gpu_s = had_gpu_s if gpu_s is None else gpu_s
        ticket.gpu_s += had_gpu_s
        dispatch.settle(self._rows.desk, ticket.service.row, ticket.client, had_gpu_s - ticket.cost_gpu_s)
        return True

    def leave(self, ticket: Ticket, lane: Lane, begun_share_s: float, now_s: float) -> float:
        """Take a request off one replica; return the GPU time it had there since its share was at the beginning."""
        dispatch.left(self._rows.desk, ticket.service.row, lane.row, ticket.output_tokens)
        lane.settle(now_s)
        lane.running -= 1
        return (lane.share_s - begun_share_s) * lane.replica.layout.gpus

    def avoided(self, ticket: Ticket, *, writers: bool) -> list[int]:
        """Return the rows where a request has failed before, if there is anybody else for it."""
        if not ticket.avoids:
            return []
        ready = [lane for lane in ticket.service.lanes if lane.ready and lane.writes_only == writers]
        ready = [lane for lane in ready if self._rows.desk.replicas.longest_tokens[lane.row] >= ticket.tokens]
        avoided = [lane.row for lane in ready if lane.replica.id in ticket.avoids]
        return avoided if len(avoided) < len(ready) else []

    # --- Requests whose prompt is read on one replica, and the answer written on another ----------------------------

    def hand_over(self, ticket: Ticket, now_s: float) -> Lane | None:
        """Choose who writes the answer to a prompt that has been read, or is being read; None while there is nobody.

        Where nobody takes over any more, those are asked that drain, or did not answer lately.
        """
        avoided = self.avoided(ticket, writers=True)
        self._rows.set_serving(avoided, 0)
        draw = self._draw()
        if self._log.listeners:
            self._log.explain_writer(ticket, draw)
        row = dispatch.take_over(self._rows.desk, ticket.service.row, ticket.output_tokens, ticket.tokens, draw)
        self._rows.set_serving(avoided, 1)
        lane = self._lanes[row] if row != NOBODY else self._leaving_writer(ticket)
        if not lane:
            return None
        if self._log.listeners:
            self._log.write(ticket, TAKES_OVER, now_s, row=lane.row)
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
        ticket.read_gpu_s = self.leave(ticket, reader, ticket.begun_share_s, now_s)
        ticket.running, ticket.was_read, ticket.keeper = False, True, reader
        reader.keeping += 1
        if ticket.writer:
            self._pass_on(ticket)

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
            if self._log.listeners:
                self._log.explain_last_resort(lane.row)
            self._rows.desk.replicas.backlog_tokens[lane.row] += ticket.output_tokens
        return lane
