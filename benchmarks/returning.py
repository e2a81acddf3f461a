"""Whether who is refused and comes back as told is taken in then: a surge on one replica.

    .venv/bin/python benchmarks/returning.py

A replica of 64 slots, of requests that take 8 s, is asked for six tenths of what it can do, and for five minutes for a
multiple of that. The desk is the one of the policy; the replica keeps time by dice. Of those who are refused a part
come back at the second they were told (whole seconds, at least one, as HTTP has them), up to 30 times. The table says
how many refusals there were, how many of those who came back were taken in, and what they had been told.
"""

import heapq
import math
from collections import deque
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from waterline.policy import dispatch
from waterline.policy.decisions import SLOT_FREE, WAITS_FOR_SLOT

SLOTS, TAKES_S, TTFT_S = 64, 8.0, 4.0
PROMPT, OUTPUT, READS_S = 200, 200, 0.05
QUIET_S, SURGE_S, AFTER_S, CALM = 60.0, 300.0, 900.0, 0.6
MOST_TRIES = 30
NO_BLOCKS = np.zeros(0, np.int64)


class Event(NamedTuple):
    """What happens, in the order of time; at one instant ends come first, then ticks, first tokens and requests."""

    at_s: float
    order: int
    number: int
    tries: int = 0  # of a request, before this one
    cost_gpu_s: float = 0.0  # of what ends: beyond what it was charged


ENDS, TICKS, READ, ASKS = range(4)


class Counter:
    """A replica and its desk, and clients who do as they are told."""

    def __init__(self, times: float, returning: float, seed: int) -> None:
        self.dice = np.random.default_rng(seed)
        self.returning = returning
        desk = dispatch.new_desk([0.0], [1.0], [1.0], [0], models=1, rows=1, gpus=1.0)
        rate = SLOTS / TAKES_S * (PROMPT + OUTPUT)
        dispatch.put(desk, 0, 0, gpus=1.0, slots=SLOTS, longest_tokens=10**6, tokens_per_s=rate,
                     prefill_tokens_per_s=20_000.0)  # fmt: skip
        dispatch.set_in_service(desk, [0], serves=True)
        self.desk = dispatch.plain(desk)
        self.events: list[Event] = []
        self.line: deque[float] = deque()  # what those cost who wait
        self.served = self.came_back = self.taken = 0
        self.told_s: list[float] = []
        self.end_s = QUIET_S + SURGE_S + AFTER_S
        at_s = 0.0
        while at_s < self.end_s:
            surges = QUIET_S <= at_s < QUIET_S + SURGE_S
            at_s += self.dice.exponential(TAKES_S / SLOTS / (times if surges else CALM))
            self.at(at_s, ASKS)
        for second in range(int(self.end_s)):
            self.at(float(second), TICKS)

    def at(self, at_s: float, order: int, tries: int = 0, cost_gpu_s: float = 0.0) -> None:
        heapq.heappush(self.events, Event(at_s, order, len(self.events) + self.served, tries, cost_gpu_s))

    def run(self) -> None:
        while self.events and self.events[0].at_s <= self.end_s:
            event = heapq.heappop(self.events)
            if event.order == TICKS:
                dispatch.tick(self.desk, event.at_s)
            elif event.order == READ:
                dispatch.first_token(self.desk, 0, 0, PROMPT, PROMPT)
            elif event.order == ENDS:
                dispatch.ended(self.desk, 0, 0, 0, OUTPUT, event.cost_gpu_s)
            else:
                self.ask(event.at_s, event.tries)
            while self.line and dispatch.next_turn(self.desk, 0)[0] == 0:
                cost_gpu_s = self.line.popleft()
                dispatch.start(self.desk, 0, 0, PROMPT, 0, OUTPUT, PROMPT + OUTPUT, cost_gpu_s, NO_BLOCKS, self.draw())
                self.start(event.at_s, cost_gpu_s)

    def draw(self) -> int:
        return int(self.dice.integers(1 << 62))

    def ask(self, now_s: float, tries: int) -> None:
        answer = dispatch.arrive(self.desk, 0, 0, PROMPT, 0, OUTPUT, PROMPT + OUTPUT, TTFT_S, NO_BLOCKS, self.draw())
        taken = answer.rule in {SLOT_FREE, WAITS_FOR_SLOT}
        self.came_back += tries > 0
        self.taken += tries > 0 and taken
        if answer.rule == SLOT_FREE:
            self.start(now_s, answer.gpu_s)
        elif taken:
            self.line.append(answer.gpu_s)
        else:
            self.told_s.append(answer.seconds)
            if tries < MOST_TRIES and self.dice.random() < self.returning:
                self.at(now_s + max(1, math.ceil(answer.seconds)), ASKS, tries + 1)

    def start(self, now_s: float, cost_gpu_s: float) -> None:
        takes_s = TAKES_S / 2 * (1.0 + self.dice.exponential())
        self.served += 1
        self.at(now_s + READS_S, READ)
        self.at(now_s + takes_s, ENDS, cost_gpu_s=takes_s / SLOTS - cost_gpu_s)


def main() -> None:
    table = Table(title="Who is refused and comes back as told, on one replica; mean of 3 seeds", title_justify="left")
    for name in ("come back", "surge", "served", "refusals", "taken in when they came back", "told, median s"):
        table.add_column(name, justify="right")
    for returning in (1.0, 0.3):
        for times in (1.2, 1.5, 2.0, 4.0, 10.0):
            counters = [Counter(times, returning, seed) for seed in range(3)]
            for counter in counters:
                counter.run()
            table.add_row(
                f"{returning:.0%}",
                f"{times:g}x",
                f"{np.mean([counter.served for counter in counters]):,.0f}",
                f"{np.mean([len(counter.told_s) for counter in counters]):,.0f}",
                f"{sum(counter.taken for counter in counters) / sum(counter.came_back for counter in counters):.0%}",
                f"{np.median(np.concatenate([counter.told_s for counter in counters])):,.1f}",
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
