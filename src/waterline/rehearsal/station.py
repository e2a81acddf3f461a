"""The replicas of a fleet behind their desk, served by the compiled event loop; traffic comes in pieces.

What becomes of requests is handed out in the order of their arrival, as soon as all before them have ended. So a day
needs no more memory than the requests that are under way at one time.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from waterline.errors import InputError
from waterline.policy import dispatch
from waterline.policy.decisions import NOT_SERVED
from waterline.rehearsal.capacity import Capacity, Change, Terms
from waterline.rehearsal.jit import seen
from waterline.rehearsal.kernel import run
from waterline.rehearsal.state import (
    ACCEPTED,
    ALIVE,
    CLIENT,
    ENTRIES_EACH,
    ENTRY,
    ENTRY_REQUEST,
    EXTRA,
    FINISH_AT,
    FIRST_TOKEN_AT,
    FIXED,
    FOUND,
    FREE_SLOT,
    LATEST_PS,
    LEFT_WITH,
    LOSS,
    LOSS_REQUEST,
    LOSSES_EACH,
    NEVER_PS,
    NEXT_TICK_PS,
    NONE,
    OUT_OF_TIME,
    PREEMPTED,
    READ_BY,
    READ_SHARE,
    REPLICA,
    REQUEST,
    RESTARTS,
    RESULT,
    RETRY_S,
    SERVED_BY,
    SHARE,
    SLOT,
    SLOT_BITS,
    STARTED_AT,
    TICK_PS,
    TIMERS,
    TIMERS_EACH,
    UNDER_WAY,
    UNFINISHED,
    Asked,
    Integers,
    Kind,
    Memory,
    Reals,
    longer,
    make_memory,
    pages_of,
    with_pages,
    with_replicas,
    with_slots,
)

FIRST_SLOTS = 1024
LOOK = 1 << 13  # requests at a time, in looking for the first that has not ended
NOBODY = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passages:
    """What became of requests; arrays by request, in the order of arrival."""

    client: Integers
    started_ps: Integers  # when the desk gave it to a replica for the first time; NONE when it never did
    first_token_ps: Integers  # NONE where none came
    finish_ps: Integers  # of those who were refused, their arrival, or when they were told that they wait in vain
    busy_ps: Integers  # their shares of the replica's steps
    replica: Integers  # its index, or minus the rule by which it was refused or gave up, see `policy.decisions`
    preemptions: Integers
    retry_s: Reals  # after which those who were refused were told to come back
    read_by: Integers  # the prefill replica, where reading and writing are apart, or NONE
    read_busy_ps: Integers  # share of its steps; `busy_ps` is that of the other
    restarts: Integers  # how many replicas failed that had it
    cached_tokens: Integers  # of the prompt, in the cache of the replica that read it
    left_tokens: Integers  # that it had when its client left; NONE where that stayed to the end
    losses: Integers  # [n, LOSS] what replicas had spent on one of them before one that had it failed, in that order
    placed: Integers  # [n, ENTRY] each time that one of them was given to a replica, in that order, if it is kept

    def __len__(self) -> int:
        return len(self.finish_ps)


class Changes:
    """Of replicas, to come, in the order of time; of one time, in that in which they were told."""

    def __init__(self, changes: Iterable[Change] = ()) -> None:
        self._heap: list[tuple[int, int, Change]] = []
        self._of: dict[int, list[tuple[int, Change]]] = {}  # by replica, those that have not been forgotten
        self._numbers = count()
        for change in changes:
            self.add(change)

    def add(self, change: Change) -> None:
        number = next(self._numbers)
        heapq.heappush(self._heap, (change.at_ps, number, change))
        self._of.setdefault(change.replica, []).append((number, change))

    def forget(self, replica: int, at_ps: int) -> None:
        """Who drains or fails while it loads does not become ready after that."""
        self._of[replica] = [
            (number, one) for number, one in self._of.get(replica, ()) if one.at_ps < at_ps or one.kind == "fail"
        ]

    @property
    def next_ps(self) -> int:
        """When the next one happens; NEVER_PS when none does."""
        while self._heap and self._heap[0][1:] not in self._of[self._heap[0][2].replica]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else NEVER_PS

    def pop(self) -> tuple[int, list[Change]]:
        """Take all out that happen next, at one time, and return it and them."""
        at_ps, due = self.next_ps, []
        while self.next_ps == at_ps:
            _, number, change = heapq.heappop(self._heap)
            self._of[change.replica].remove((number, change))
            due.append(change)
        return at_ps, due


def warm_up(*, reasons: bool = False) -> None:
    """Let the event loop be compiled, or loaded: one that writes down its reasons is another."""
    nobody = Station(Terms(ttft_s=(1.0,), output_tokens=(1,), reasons=reasons))
    nobody.offer(*[np.ones(1, np.int64)] * 3)
    nobody.finish()


class Station:
    """Serves requests as `oracle.serve` does, to the picosecond."""

    def __init__(self, terms: Terms) -> None:
        """Prepare a fleet without replicas."""
        self.capacities: list[Capacity] = []  # of all replicas that ever came
        self.block_tokens = terms.block_tokens
        self.memory = make_memory(terms, FIRST_SLOTS)
        self.models = len(terms.ttft_s)
        self.rows = 0  # of the results, in use …
        self.gone = 0  # … and how many of the first have been handed out
        self._moved = 0  # requests whose rows are not there any more
        self._placed = [np.zeros((0, ENTRY), np.int64)]  # entries of the log, of requests by their number among all
        self._losses = [np.zeros((0, LOSS), np.int64)]  # likewise, what those had spent on them that failed
        self._kinds: dict[tuple[int, bool, int], Kind] = {}
        self._changes = Changes()

    # --- Replicas that come and go ------------------------------------------------------------------------------------

    def start(self, capacity: Capacity, ready_ps: int) -> int:
        """Add a replica that gets requests from a time on, which has not passed; return its index."""
        return self.start_all([capacity], ready_ps)[0]

    def start_all(self, capacities: Sequence[Capacity], ready_ps: int) -> range:
        """Add replicas that get requests from a time on; return their indices."""
        rows = range(len(self.capacities), len(self.capacities) + len(capacities))
        self.capacities += capacities
        self.memory = with_replicas(self.memory, rows.start, capacities, self._kinds)
        if self.memory.remembers:
            self._make_pages()
        for row in rows:
            self._changes.add(Change(at_ps=ready_ps, kind="ready", replica=row))
        return rows

    def drain(self, row: int, at_ps: int) -> None:
        """Let a replica get nothing more from a time on; what it has it serves to the end."""
        self._changes.forget(row, at_ps)
        self._changes.add(Change(at_ps=at_ps, kind="drain", replica=row))

    def fail(self, row: int, at_ps: int) -> None:
        """Let a replica lose all it has at a time; its requests begin again elsewhere, with the tokens they have."""
        self._changes.forget(row, at_ps)
        self._changes.add(Change(at_ps=at_ps, kind="fail", replica=row))

    def idle(self, row: int) -> bool:
        """Whether a replica has no requests."""
        return bool(self.memory.replicas[row * REPLICA + ACCEPTED] == 0)

    # --- Requests -----------------------------------------------------------------------------------------------------

    def meet(self, tenants: Sequence[int]) -> None:
        """Let the desk know more clients, of these tenants; they are numbered on."""
        if not tenants:
            return
        memory = self.memory
        desk = dispatch.with_clients(memory.desk, [*memory.desk.queue.tenant[:: self.models].tolist(), *tenants])
        lines = len(desk.queue.tenant)
        self.memory = memory._replace(
            desk=desk,
            line_heads=longer(memory.line_heads, lines, NONE),
            line_tails=longer(memory.line_tails, lines, NONE),
        )

    def offer(
        self,
        arrival_ps: NDArray[np.integer],
        prompt_tokens: NDArray[np.integer],
        output_tokens: NDArray[np.integer],
        cached_tokens: NDArray[np.integer] | None = None,
        *,
        model: NDArray[np.integer] | None = None,
        client: NDArray[np.integer] | None = None,
        patience_ps: NDArray[np.integer] | None = None,
        leaves_ps: NDArray[np.integer] | None = None,
        blocks: NDArray[np.integer] | None = None,
        block_counts: NDArray[np.integer] | None = None,
    ) -> None:
        """Serve requests, in the order of their arrival, up to the last one's.

        Of what is left out nothing is cached, model and client are the first, patience is endless and nobody leaves.
        `blocks` are the keys of the blocks of all prompts, `block_counts` how many are of each.

        Raises InputError when that is too far from the start of the trace for 64 bits of picoseconds.
        """
        count = len(arrival_ps)
        if count and arrival_ps[-1] > LATEST_PS:
            _refuse_time()
        zeros = np.zeros(count, np.int64)
        never = np.full(count, NEVER_PS) if patience_ps is None else patience_ps
        leaves = NOBODY if leaves_ps is None else leaves_ps
        given = arrival_ps, prompt_tokens, output_tokens, cached_tokens, model, client, never, leaves
        asked = Asked(*(np.ascontiguousarray(zeros if one is None else one, np.int64) for one in given))
        self._make_rows(count, blocks, zeros if block_counts is None else block_counts)
        first = self.rows
        self.rows += count
        done = 0
        while done < count:
            at_ps = self._changes.next_ps
            until = int(np.searchsorted(asked.arrivals, at_ps))  # changes come before arrivals
            if self.memory.logs:
                until = min(until, done + FIRST_SLOTS)  # for as many the log has room
            if until > done:
                self._run(asked, done, until, first)
                done = until
            if done < count and asked.arrivals[done] >= at_ps:
                self.advance(at_ps)

    def advance(self, until_ps: int) -> None:
        """Let everything happen up to and including a time, but for steps that begin then."""
        while self._changes.next_ps <= until_ps:
            self._change()
        self._nothing_comes(until_ps)

    def finish(self) -> None:
        """Serve until the last request is done; those whom nobody will ever serve are told so."""
        while self._changes.next_ps < NEVER_PS:
            self._change()
        self._nothing_comes(NEVER_PS - 1, draining=1)
        waiting = np.flatnonzero(self.results[:, FINISH_AT] == UNFINISHED)
        self.results[waiting, FINISH_AT] = self.memory.counters[NEXT_TICK_PS] - TICK_PS
        self.results[waiting, SERVED_BY] = -NOT_SERVED

    def collect(self) -> Passages:
        """Hand out what is settled: all requests up to the first one that has not ended."""
        count = self._settled()
        first, last = self.gone, self.gone + count
        placed = _take(self._placed, ENTRY_REQUEST, self._moved + first, count)
        losses = _take(self._losses, LOSS_REQUEST, self._moved + first, count)
        results = self.memory.results[first * RESULT : last * RESULT].reshape(-1, RESULT).copy()
        extras = self.memory.extras[first * EXTRA : last * EXTRA].reshape(-1, EXTRA).copy()
        retry_s = self.memory.reals[2 * first + RETRY_S : 2 * last : 2].copy()
        self._forget(count)
        return Passages(
            client=results[:, CLIENT],
            started_ps=np.maximum(results[:, STARTED_AT], NONE),
            first_token_ps=results[:, FIRST_TOKEN_AT],
            finish_ps=results[:, FINISH_AT],
            busy_ps=results[:, SHARE],
            replica=results[:, SERVED_BY],
            preemptions=results[:, PREEMPTED],
            retry_s=np.where(results[:, SERVED_BY] < 0, retry_s, 0.0),
            read_by=extras[:, READ_BY],
            read_busy_ps=extras[:, READ_SHARE],
            restarts=extras[:, RESTARTS],
            cached_tokens=results[:, FOUND],
            left_tokens=np.maximum(extras[:, LEFT_WITH], NONE),
            losses=losses,
            placed=placed,
        )

    @property
    def results(self) -> Integers:
        """What is known of the requests that have not been handed out, a row each."""
        results: Integers = self.memory.results[self.gone * RESULT : self.rows * RESULT].reshape(-1, RESULT)
        return results

    def _settled(self) -> int:
        """Return how many requests there are before the first that has not ended."""
        finish_ps = self.results[:, FINISH_AT]
        for begin in range(0, len(finish_ps), LOOK):
            unfinished = finish_ps[begin : begin + LOOK] < 0
            if unfinished.any():
                return begin + int(unfinished.argmax())
        return len(finish_ps)

    # --- The event loop -----------------------------------------------------------------------------------------------

    def _run(self, asked: Asked, start: int, until: int, row: int) -> None:
        """Serve some requests, up to the last one's arrival; `row` of the results is for the first of all."""
        some, last_ps = Asked(*(seen(column[:until]) for column in asked)), int(asked.arrivals[until - 1])
        done = start
        while done < until:
            done = self._happen(some, done, row, last_ps)
            if done < until:
                self._make_room()

    def _nothing_comes(self, until_ps: int, *, changed: int = 0, failed: int = NONE, draining: int = 0) -> None:
        nobody = Asked(*[seen(NOBODY)] * len(Asked._fields))
        self._happen(nobody, 0, 0, until_ps, changed=changed, failed=failed, draining=draining)

    def _happen(
        self,
        asked: Asked,
        start: int,
        row: int,
        last_ps: int,
        *,
        changed: int = 0,
        failed: int = NONE,
        draining: int = 0,
    ) -> int:
        """Let the event loop run, see `kernel.run`."""
        if len(self.memory.log):
            self._make_entries()
        if failed != NONE:
            self._make_losses()
        done = run(self._seen(), asked, start, row, last_ps, changed, failed, draining)
        if self.memory.counters[OUT_OF_TIME]:
            _refuse_time()
        if len(self.memory.log):
            self._empty_log()
        if failed != NONE:
            self._empty_losses()
        return done

    def _change(self) -> None:
        """Let the first of the changes to come happen, and all that happen with it."""
        at_ps, due = self._changes.pop()
        self._nothing_comes(at_ps)
        for kind, group in groupby(due, key=lambda change: change.kind):
            rows = [change.replica for change in group]
            dispatch.set_in_service(self.memory.desk, rows, serves=kind == "ready")
            if kind == "ready":
                self.memory.fixed[np.array(rows) * FIXED + ALIVE] = 1
                self._nothing_comes(at_ps, changed=1)
            if kind == "fail":
                self.memory.fixed[np.array(rows) * FIXED + ALIVE] = 0
                for row in rows:
                    self._nothing_comes(at_ps, changed=1, failed=row)

    def _seen(self) -> Memory:
        return shown(self.memory)

    # --- Room ---------------------------------------------------------------------------------------------------------

    def _make_rows(self, more: int, blocks: NDArray[np.integer] | None, counts: NDArray[np.integer]) -> None:
        if (self.rows + more) * RESULT > len(self.memory.results):
            self._move_to_front()
        needed, memory = self.rows + more, self.memory
        if needed * RESULT > len(memory.results):
            room = max(needed, 2 * self.rows)
            reals = np.zeros(2 * room)
            reals[: 2 * self.rows] = memory.reals[: 2 * self.rows]
            memory = memory._replace(
                results=longer(memory.results[: self.rows * RESULT], room * RESULT),
                extras=longer(memory.extras[: self.rows * EXTRA], room * EXTRA),
                reals=reals,
                first_block=longer(memory.first_block[: self.rows + 1], room + 1),
            )
        before = memory.first_block[self.rows]
        memory.first_block[self.rows + 1 : needed + 1] = before + np.cumsum(counts)
        if blocks is not None and len(blocks):
            memory = memory._replace(blocks=np.concatenate([memory.blocks[:before], np.asarray(blocks, np.int64)]))
        self.memory = memory
        if len(memory.blocks) and not memory.remembers:
            self.memory = memory._replace(remembers=(1,))
            self._make_pages()

    def _make_pages(self) -> None:
        """Make room for the blocks of all replicas; done only when prompts come with theirs."""
        pages = sum(pages_of(one, self.block_tokens) for one in self.capacities)
        self.memory = with_pages(self.memory, pages)

    def _forget(self, count: int) -> None:
        """Give the rows of so many requests back, once they are more than those still in use."""
        self.gone += count
        if 2 * self.gone > self.rows:
            self._move_to_front()

    def _move_to_front(self) -> None:
        """Move what is known of requests to the front, over those that have been handed out."""
        memory, gone, left = self.memory, self.gone, self.rows - self.gone
        if not gone:
            return
        for array, width in ((memory.results, RESULT), (memory.extras, EXTRA), (memory.reals, 2)):
            array[: left * width] = array[gone * width : self.rows * width]  # numpy minds that they overlap
        passed = memory.first_block[gone]
        memory.first_block[: left + 1] = memory.first_block[gone : self.rows + 1] - passed
        if passed:
            self.memory = memory._replace(blocks=memory.blocks[passed:].copy())
        memory.slots[REQUEST::SLOT] -= gone
        self._moved += gone
        self.rows, self.gone = left, 0

    def _make_entries(self) -> None:
        """Make room in the log for all that are under way, and some that come; it is empty."""
        needed = 1 + ENTRY * ENTRIES_EACH * (int(self.memory.counters[UNDER_WAY]) + FIRST_SLOTS)
        if needed > len(self.memory.log):
            self.memory = self.memory._replace(log=longer(self.memory.log, 2 * needed))

    def _empty_log(self) -> None:
        log, count = self.memory.log, int(self.memory.log[0])
        if count:
            entries = log[1 : 1 + count * ENTRY].reshape(count, ENTRY).copy()
            entries[:, ENTRY_REQUEST] += self._moved
            self._placed.append(entries)
            log[0] = 0

    def _make_losses(self) -> None:
        """Make room for what a replica may lose that fails; there is nothing in it."""
        needed = 1 + LOSS * LOSSES_EACH * int(self.memory.counters[UNDER_WAY])
        if needed > len(self.memory.losses):
            self.memory = self.memory._replace(losses=longer(self.memory.losses, 2 * needed))

    def _empty_losses(self) -> None:
        losses, count = self.memory.losses, int(self.memory.losses[0])
        rows = losses[1 : 1 + count * LOSS].reshape(count, LOSS).copy()
        rows[:, LOSS_REQUEST] += self._moved
        self._losses.append(rows)
        losses[0] = 0

    def _make_room(self) -> None:
        memory = self.memory
        if 2 * (memory.counters[TIMERS] + TIMERS_EACH) > len(memory.timers):
            self.memory = memory._replace(timers=longer(memory.timers, 2 * len(memory.timers), NEVER_PS))
        if memory.counters[FREE_SLOT] != NONE:
            return
        slots = 2 * len(memory.slots) // SLOT
        if slots >= 1 << SLOT_BITS:  # one number is `TELLS`
            raise InputError(
                f"more than {slots // 2:,} requests are under way at once. The replicas fall behind what is asked: "
                "plan more of them, or give the model an SLO, so that some are refused."
            )
        self.memory = with_slots(self.memory, slots)


def _take(tables: list[Integers], column: int, first: int, count: int) -> Integers:
    """Return the rows of so many requests, from the first of them on, and keep the others; `column`: whose a row is."""
    rows = np.concatenate(tables) if len(tables) > 1 else tables[0]
    if not len(rows):
        return rows
    taken = rows[:, column] < first + count
    tables[:] = [rows[~taken]]
    rows = rows[taken]
    rows[:, column] -= first
    return rows


def shown(memory: Memory) -> Memory:
    """Return the memory as the event loop wants it, compiled or not."""
    if seen(NOBODY) is NOBODY:
        return memory
    return Memory(dispatch.plain(memory.desk), *[*map(seen, memory[1:-2]), memory.remembers, memory.logs])


def _refuse_time() -> NoReturn:
    days = LATEST_PS // (86_400 * 10**12)
    raise InputError(f"a rehearsal holds {days} days, and this one takes longer. Give less of it, with --duration.")
