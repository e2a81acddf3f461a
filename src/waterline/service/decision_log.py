"""The decision log, live: where each request goes and why, in the lines that a rehearsal writes with `--decisions`.

While nobody listens the dispatcher asks nothing of it. Else, as in a rehearsal (`rehearsal.entries`), it is asked
before the desk is: `policy.why` says from the same numbers what the desk is about to do, and the line is written once
that is done.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from waterline.policy import dispatch, why
from waterline.policy.decisions import (
    COMES_BACK,
    GAVE_UP,
    HEDGES,
    NONE,
    NOT_SERVED,
    REASONS,
    TAKES_OVER,
    WAITS_FOR_SLOT,
    as_json,
    nanoseconds,
)
from waterline.service.lines import Lane, Ticket
from waterline.service.rows import Rows

Listener = Callable[[bytes], None]

NANOSECONDS_PER_MS = 1_000_000


class DecisionLog:
    """What the desk decides about requests, as lines for those who listen.

    Args:
        rows: the desk's numbers.
        lanes: replicas by their rows.
    """

    def __init__(self, rows: Rows, lanes: Mapping[int, Lane]) -> None:
        self.listeners: list[Listener] = []
        self._rows = rows
        self._lanes = lanes
        self._begun_s = 0.0  # the time of day when the clock of the desk was at 0
        self._reasons = np.full(len(REASONS), NONE, np.int64)  # of the decision that is being made

    def tell(self, listener: Listener, begun_s: float) -> None:
        """Tell what is decided from now on, a line each; who listens already and this one are told the same.

        Args:
            listener: gets the lines.
            begun_s: the time of day when the clock of the desk was at 0.
        """
        self._begun_s = begun_s if not self.listeners else self._begun_s
        self.listeners.append(listener)

    # --- Before the desk is asked -----------------------------------------------------------------------------------

    def explain(self, ticket: Ticket, draw: int) -> None:
        """Find out why a request would go where it would go with this draw; without a free slot it goes nowhere."""
        desk, model = self._rows.desk, ticket.service.row
        if desk.models.free_slots[model] > 0:
            why.explain_place(desk, model, ticket.prompt_tokens, ticket.tokens, ticket.blocks, draw, self._reasons)

    def explain_turn(self, ticket: Ticket, draw: int) -> None:
        """Find out as well why it is the turn of one that has waited; who has begun before may not wait for it."""
        self.explain(ticket, draw)
        desk, service = self._rows.desk, ticket.service
        client, _ = dispatch.next_turn(desk, service.row)
        if client == ticket.client and service.lines[client][0] is ticket:
            why.explain_turn(desk, service.row, self._reasons)

    def explain_writer(self, ticket: Ticket, draw: int) -> None:
        """Find out why a request would be written where it would be; nothing of its prompt is read there."""
        desk = self._rows.desk
        pool = ticket.service.row + len(desk.models.gpus)
        why.explain_place(desk, pool, 0, ticket.tokens, ticket.blocks[:0], draw, self._reasons)

    def explain_last_resort(self, row: int) -> None:
        """Note that nobody else could write it but one that gets no more."""
        why.explain_last_resort(self._rows.desk, row, self._reasons)

    # --- Once it is done --------------------------------------------------------------------------------------------

    def write(self, ticket: Ticket, rule: int, now_s: float, *, row: int = NONE, back_in_s: float = 0.0) -> None:
        """Write that a replica has got a request, or that none gets it and when it may come back."""
        if rule == WAITS_FOR_SLOT and ticket.has_begun:
            rule = COMES_BACK
        at_ns, came_ns = (nanoseconds(self._begun_s + time_s) for time_s in (now_s, ticket.arrival_s))
        waited_ms = NONE if rule in {COMES_BACK, HEDGES, TAKES_OVER} else (at_ns - came_ns) // NANOSECONDS_PER_MS
        back_ns = at_ns + nanoseconds(back_in_s) if 0.0 < back_in_s < math.inf else NONE
        tokens = ticket.prompt_tokens + ticket.output_tokens
        entry = (at_ns, rule, ticket.clients.tenant, ticket.client, NONE, row, tokens, waited_ms, back_ns)
        reasons = self._reasons.tolist() if row != NONE else ()
        line = as_json(entry, self._names(ticket, row), reasons=reasons, request_id=ticket.id)
        for listener in self.listeners:
            listener(line)

    def write_end(self, ticket: Ticket, now_s: float) -> None:
        """Write why a request goes that is on no replica."""
        self.write(ticket, GAVE_UP if ticket.service.has_hope else NOT_SERVED, now_s)

    def _names(self, ticket: Ticket, row: int) -> dict[str, dict[int, str]]:
        rivals = (int(self._reasons[why.NEXT_CLAIMANT]), ticket.client)
        places = (int(self._reasons[why.OTHER]), row)
        return {
            "tenant": self._rows.tenant_names,
            "claimant": dict(self._claimants(ticket, rivals)),
            "place": {place: self._lanes[place].replica.id for place in places if place in self._lanes},
        }

    def _claimants(self, ticket: Ticket, rows: tuple[int, ...]) -> Iterator[tuple[int, str]]:
        """Yield the names of clients, one of whom may be that of a ticket, and the others wait for the same model."""
        for row in rows:
            line = ticket.service.lines.get(row)
            one = ticket if row == ticket.client else line[0] if line else None
            if one:
                yield row, one.line or f"{one.tenant}/{one.service.planned.model}"
