"""The replicas of one model behind their router, served by the compiled event loop; traffic comes in pieces.

What becomes of requests is handed out in the order of their arrival, as soon as all before them have ended. So a day
needs no more memory than the requests that are under way at one time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from waterline.errors import InputError
from waterline.fleet import HOURS
from waterline.rehearsal.jit import seen
from waterline.rehearsal.kernel import advance, run
from waterline.rehearsal.oracle import PICOSECONDS_PER_HOUR, Capacity
from waterline.rehearsal.state import (
    FINISH_AT,
    FIRST_TOKEN_AT,
    FREE_SLOT,
    LATEST_PS,
    NEVER_PS,
    NONE,
    OUT_OF_TIME,
    PREEMPTED,
    REQUEST,
    RESULT,
    SERVED_BY,
    SHARE,
    SLOT,
    SLOT_BITS,
    Integers,
    Memory,
    Reals,
    aligned,
    make_memory,
    make_ready,
    with_slots,
)

FIRST_SLOTS = 1024
UNFINISHED = -2  # a finish that is no time yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Passages:
    """What became of requests to one model; arrays by request, in the order of arrival."""

    first_token_ps: Integers  # NEVER where none came
    finish_ps: Integers  # of those who were refused, their arrival
    busy_ps: Integers  # their shares of the replica's steps
    replica: Integers  # its index, or TOO_LONG, TOO_LATE or NOT_SERVED of `state`
    preemptions: Integers
    retry_s: Reals  # after which those who were TOO_LATE were told to come back

    def __len__(self) -> int:
        return len(self.finish_ps)


def warm_up() -> None:
    """Let the event loop be compiled, or loaded."""
    nobody = Station([], deadline_s=0.0, expected_prompt_tokens=1, expected_output_tokens=1)
    nobody.offer(*[np.ones(1, np.int64)] * 3)
    nobody.drain()


class Station:
    """Serves requests as `oracle.serve` does, to the picosecond."""

    def __init__(
        self,
        capacities: Sequence[Capacity],
        *,
        deadline_s: float,
        expected_prompt_tokens: int,
        expected_output_tokens: int,
        first_hour: int = 0,
    ) -> None:
        """Prepare idle replicas; see `oracle.serve` for the arguments."""
        self.capacities = capacities
        self.deadline_s = deadline_s
        self.first_hour = first_hour
        self.hour = 0  # since the start
        self.memory = make_memory(capacities, expected_prompt_tokens, expected_output_tokens, FIRST_SLOTS, 0)
        make_ready(self.memory, capacities, first_hour)
        self.rows = 0  # of the results, in use

    def offer(
        self, arrival_ps: NDArray[np.integer], prompt_tokens: NDArray[np.integer], output_tokens: NDArray[np.integer]
    ) -> None:
        """Serve requests, in the order of their arrival, up to the last one's.

        Raises InputError when that is too far from the start of the trace for 64 bits of picoseconds.
        """
        if len(arrival_ps) and arrival_ps[-1] > LATEST_PS:
            _refuse_time()
        self._make_rows(len(arrival_ps))
        hours = arrival_ps // PICOSECONDS_PER_HOUR
        for hour in np.unique(hours).tolist():
            self._turn_to(hour)
            own = slice(*np.searchsorted(hours, [hour, hour + 1]).tolist())
            self._run(*(np.ascontiguousarray(one[own], np.int64) for one in (arrival_ps, prompt_tokens, output_tokens)))

    def drain(self) -> None:
        """Serve until the last request is done."""
        advance(self._seen(), NEVER_PS - 1)
        self._check()

    def collect(self) -> Passages:
        """Hand out what is settled: all requests up to the first one that has not ended."""
        results = self.memory.results[: self.rows * RESULT].reshape(-1, RESULT)
        unfinished = results[:, FINISH_AT] == UNFINISHED
        count = int(unfinished.argmax()) if unfinished.any() else self.rows
        settled = results[:count].copy()
        retries_s = self.memory.retries_s[:count].copy()
        left = self.rows - count
        self.memory.results[: left * RESULT] = self.memory.results[count * RESULT : self.rows * RESULT].copy()
        self.memory.retries_s[:left] = self.memory.retries_s[count : self.rows].copy()
        self.memory.slots[REQUEST::SLOT] -= count
        self.rows = left
        return Passages(
            first_token_ps=settled[:, FIRST_TOKEN_AT],
            finish_ps=settled[:, FINISH_AT],
            busy_ps=settled[:, SHARE],
            replica=settled[:, SERVED_BY],
            preemptions=settled[:, PREEMPTED],
            retry_s=retries_s,
        )

    def _run(self, arrival_ps: Integers, prompt_tokens: Integers, output_tokens: Integers) -> None:
        done = 0
        while done < len(arrival_ps):
            asked = seen(arrival_ps), seen(prompt_tokens), seen(output_tokens)
            done = run(self._seen(), *asked, done, self.rows, self.deadline_s)
            self._check()
            if self.memory.counters[FREE_SLOT] == NONE and done < len(arrival_ps):
                self._make_slots()
        self.rows += len(arrival_ps)

    def _turn_to(self, hour: int) -> None:
        """Let who serves at an hour get requests, and nobody else. What is under way then does not matter."""
        before, after = ((self.first_hour + one) % HOURS for one in (self.hour, hour))
        self.hour = hour
        if any(one.serves(before) != one.serves(after) for one in self.capacities):
            make_ready(self.memory, self.capacities, after)

    def _seen(self) -> Memory:
        return Memory(*[seen(array) for array in self.memory])

    def _make_rows(self, more: int) -> None:
        needed = self.rows + more
        if needed * RESULT > len(self.memory.results):
            room = max(needed, 2 * self.rows)
            results, retries_s = aligned(room * RESULT), np.zeros(room)
            results[: self.rows * RESULT] = self.memory.results[: self.rows * RESULT]
            retries_s[: self.rows] = self.memory.retries_s[: self.rows]
            self.memory = self.memory._replace(results=results, retries_s=retries_s)
        self.memory.results[self.rows * RESULT + FINISH_AT : needed * RESULT : RESULT] = UNFINISHED
        self.memory.retries_s[self.rows : needed] = 0.0

    def _make_slots(self) -> None:
        slots = 2 * len(self.memory.slots) // SLOT
        if slots > 1 << SLOT_BITS:
            raise InputError(
                f"more than {slots // 2:,} requests are under way at once. The replicas fall behind what is asked: "
                "plan more of them, or give the model an SLO, so that some are refused."
            )
        self.memory = with_slots(self.memory, slots)

    def _check(self) -> None:
        if self.memory.counters[OUT_OF_TIME]:
            _refuse_time()


def _refuse_time() -> NoReturn:
    days = LATEST_PS // (86_400 * 10**12)
    raise InputError(f"a rehearsal holds {days} days, and this one takes longer. Give less of it, with --duration.")
