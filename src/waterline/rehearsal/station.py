"""The replicas of one model behind their router, served by the compiled event loop; traffic comes in pieces.

What becomes of requests is handed out in the order of their arrival, as soon as all before them have ended. So a day
needs no more memory than the requests that are under way at one time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from waterline.errors import InputError
from waterline.fleet import HOURS
from waterline.rehearsal.jit import seen
from waterline.rehearsal.kernel import advance, run
from waterline.rehearsal.oracle import PICOSECONDS_PER_HOUR, Capacity, accepted_tokens
from waterline.rehearsal.state import (
    FINISH_AT,
    FIRST_TOKEN_AT,
    FREE_SLOT,
    LATEST_PS,
    NEVER_PS,
    NONE,
    NOT_SERVED,
    OUT_OF_TIME,
    PREEMPTED,
    REQUEST,
    RESULT,
    SERVED_BY,
    SHARE,
    SLOT,
    SLOT_BITS,
    TOO_LATE,
    TOO_LONG,
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
SENT, WRITTEN = 1, 2  # what is known of a request that a prefill replica has read


@dataclass(frozen=True, slots=True, kw_only=True)
class Passages:
    """What became of requests to one model; arrays by request, in the order of arrival."""

    first_token_ps: Integers  # NEVER where none came
    finish_ps: Integers  # of those who were refused, their arrival
    busy_ps: Integers  # their shares of the replica's steps
    replica: Integers  # its index, or TOO_LONG, TOO_LATE or NOT_SERVED of `state`
    preemptions: Integers
    retry_s: Reals  # after which those who were TOO_LATE were told to come back
    read_by: Integers  # the prefill replica, where reading and writing are apart, or NONE
    read_busy_ps: Integers  # share of its steps; `busy_ps` is that of the other

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
        readers, writers = ([one for one in capacities if (one.role == "decode") == writes] for writes in (False, True))
        stage = partial(
            Stage,
            expected_prompt_tokens=expected_prompt_tokens,
            expected_output_tokens=expected_output_tokens,
            first_hour=first_hour,
        )
        held = [one.longest_tokens for one in writers]
        self.reading = stage(readers, accepted_tokens(capacities), deadline_s=deadline_s)
        self.writing = stage(writers, held, deadline_s=math.inf, read=True) if writers else None
        index = {one.replica: number for number, one in enumerate(capacities)}
        self.readers = np.array([*(index[one.replica] for one in readers), NOT_SERVED, TOO_LATE, TOO_LONG])
        self.writers = np.array([index[one.replica] for one in writers], np.int64)
        self.sends = np.array([*(one.role == "prefill" for one in readers), False, False, False])
        self.transfer_ps = np.array([*(one.transfer_ps_per_token for one in readers), 0, 0, 0])
        none = np.zeros(0, np.int64)
        self.asked = np.zeros((0, 2), np.int64)  # [row of the results] prompt and output tokens
        self.known = none  # [row] 1 when it has been sent on, 2 when it has ended there
        self.written = np.zeros((0, RESULT), np.int64)  # [row] what came of it there
        self.coming = np.zeros((0, 2), np.int64)  # [request under way] when its cache arrives, and its row
        self.there = none  # [row of the second results] row of the first

    def offer(
        self,
        arrival_ps: NDArray[np.integer],
        prompt_tokens: NDArray[np.integer],
        output_tokens: NDArray[np.integer],
        cached_tokens: NDArray[np.integer] | None = None,
    ) -> None:
        """Serve requests, in the order of their arrival, up to the last one's; nothing is cached unless told.

        Raises InputError when that is too far from the start of the trace for 64 bits of picoseconds.
        """
        arrivals_ps, prompts, outputs = (
            np.asarray(one, np.int64) for one in (arrival_ps, prompt_tokens, output_tokens)
        )
        cached = np.zeros_like(prompts) if cached_tokens is None else np.asarray(cached_tokens, np.int64)
        self.reading.offer(arrivals_ps, prompts, outputs, cached)
        if self.writing and len(arrival_ps):
            self.asked = np.concatenate([self.asked, np.stack([prompts, outputs], axis=1)])
            self.known = np.concatenate([self.known, np.zeros(len(arrival_ps), np.int64)])
            self.written = np.concatenate([self.written, np.zeros((len(arrival_ps), RESULT), np.int64)])
            self._send_on(int(arrival_ps[-1]))

    def drain(self) -> None:
        """Serve until the last request is done."""
        self.reading.drain()
        if self.writing:
            self._send_on(NEVER_PS)
            self.writing.drain()
            self._settle_written()

    def collect(self) -> Passages:
        """Hand out what is settled: all requests up to the first one that has not ended."""
        unfinished = self.reading.results[:, FINISH_AT] == UNFINISHED
        if self.writing:
            unfinished |= self.known == SENT
        count = int(unfinished.argmax()) if unfinished.any() else len(unfinished)
        read, retries_s = self.reading.take(count)
        passages = Passages(
            first_token_ps=read[:, FIRST_TOKEN_AT],
            finish_ps=read[:, FINISH_AT],
            busy_ps=read[:, SHARE],
            replica=self.readers[read[:, SERVED_BY]],
            preemptions=read[:, PREEMPTED],
            retry_s=retries_s,
            read_by=np.full(count, NONE),
            read_busy_ps=np.zeros(count, np.int64),
        )
        if self.writing:
            self._add_written(passages, self.known[:count] == WRITTEN, self.written[:count])
            self.asked, self.known, self.written = self.asked[count:], self.known[count:], self.written[count:]
            self.coming[:, 1] -= count
            self.there = self.there - count
        return passages

    def _send_on(self, until_ps: int) -> None:
        """Let the decode replicas serve what has arrived there: what is sent later arrives after `until_ps`."""
        results = self.reading.results
        sent = self.sends[results[:, SERVED_BY]] & (results[:, FINISH_AT] != UNFINISHED)
        rows = np.flatnonzero(sent & (self.asked[:, 1] > 1) & (self.known == 0))
        takes_ps = self.asked[rows, 0] * self.transfer_ps[results[rows, SERVED_BY]]
        self.known[rows] = SENT
        coming = np.concatenate([self.coming, np.stack([results[rows, FINISH_AT] + takes_ps, rows], axis=1)])
        coming = coming[np.lexsort((coming[:, 1], coming[:, 0]))]
        count = int(np.searchsorted(coming[:, 0], until_ps, side="right"))
        self.coming = coming[count:]
        due_ps, rows = coming[:count, 0], coming[:count, 1]
        self.there = np.concatenate([self.there, rows])
        assert self.writing is not None  # noqa: S101 - asked by every caller
        self.writing.offer(due_ps, self.asked[rows, 0], self.asked[rows, 1], np.zeros(count, np.int64))
        self._settle_written()

    def _settle_written(self) -> None:
        assert self.writing is not None  # noqa: S101 - asked by every caller
        ended = self.writing.results[:, FINISH_AT] != UNFINISHED
        fresh = ended & (self.there >= 0)  # others have been handed out
        rows = self.there[fresh]
        self.written[rows] = self.writing.results[fresh]
        self.known[rows] = WRITTEN
        count = len(ended) if ended.all() else int((~ended).argmax())
        self.writing.take(count)
        self.there = self.there[count:]

    def _add_written(self, passages: Passages, which: NDArray[np.bool_], written: Integers) -> None:
        """Write down what came of the requests that were sent on."""
        passages.read_by[which] = passages.replica[which]
        passages.read_busy_ps[which] = passages.busy_ps[which]
        passages.replica[which] = self.writers[written[which, SERVED_BY]]
        passages.finish_ps[which] = written[which, FINISH_AT]
        passages.busy_ps[which] = written[which, SHARE]
        passages.preemptions[which] += written[which, PREEMPTED]


class Stage:
    """Replicas behind one router: all of a model's, or those that read, or those that write."""

    def __init__(
        self,
        capacities: Sequence[Capacity],
        longest_tokens: Sequence[int],
        *,
        deadline_s: float,
        expected_prompt_tokens: int,
        expected_output_tokens: int,
        first_hour: int,
        read: bool = False,
    ) -> None:
        """Prepare idle replicas, which accept no longer requests than these; `read`: by others, before they come."""
        self.capacities = capacities
        self.deadline_s = deadline_s
        self.first_hour = first_hour
        self.read = int(read)
        self.hour = 0  # since the start
        self.memory = make_memory(
            capacities, longest_tokens, expected_prompt_tokens, expected_output_tokens, FIRST_SLOTS
        )
        make_ready(self.memory, capacities, first_hour)
        self.rows = 0  # of the results, in use

    def offer(
        self, arrival_ps: Integers, prompt_tokens: Integers, output_tokens: Integers, cached_tokens: Integers
    ) -> None:
        """Serve requests, in the order of their arrival, up to the last one's."""
        if len(arrival_ps) and arrival_ps[-1] > LATEST_PS:
            _refuse_time()
        self._make_rows(len(arrival_ps))
        hours = arrival_ps // PICOSECONDS_PER_HOUR
        for hour in np.unique(hours).tolist():
            self._turn_to(hour)
            own = slice(*np.searchsorted(hours, [hour, hour + 1]).tolist())
            asked = arrival_ps, prompt_tokens, output_tokens, cached_tokens
            self._run(*(np.ascontiguousarray(one[own], np.int64) for one in asked))

    def drain(self) -> None:
        """Serve until the last request is done."""
        advance(self._seen(), NEVER_PS - 1)
        self._check()

    @property
    def results(self) -> Integers:
        """What is known of the requests that have not been taken, a row each."""
        results: Integers = self.memory.results[: self.rows * RESULT].reshape(-1, RESULT)
        return results

    def take(self, count: int) -> tuple[Integers, Reals]:
        """Return the first results and times to come back, and forget them."""
        taken, retries_s = self.results[:count].copy(), self.memory.retries_s[:count].copy()
        left = self.rows - count
        self.memory.results[: left * RESULT] = self.memory.results[count * RESULT : self.rows * RESULT].copy()
        self.memory.retries_s[:left] = self.memory.retries_s[count : self.rows].copy()
        self.memory.slots[REQUEST::SLOT] -= count
        self.rows = left
        return taken, retries_s

    def _run(
        self, arrival_ps: Integers, prompt_tokens: Integers, output_tokens: Integers, cached_tokens: Integers
    ) -> None:
        done = 0
        while done < len(arrival_ps):
            asked = seen(arrival_ps), seen(prompt_tokens), seen(output_tokens), seen(cached_tokens)
            done = run(self._seen(), *asked, done, self.rows, self.deadline_s, self.read)
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
        self.memory.results[self.rows * RESULT + SERVED_BY : needed * RESULT : RESULT] = NONE
        self.memory.results[self.rows * RESULT + PREEMPTED : needed * RESULT : RESULT] = 0
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
