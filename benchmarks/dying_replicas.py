"""Tokens lost and said twice while replicas die: 1,000 streams, and every 2 s an engine process is killed.

    python benchmarks/dying_replicas.py                                 # a minute or two
    python benchmarks/dying_replicas.py --streams 60 --tokens 40        # does it work at all

The engines are processes of the fake engine, under the supervisor of `waterline up`, which starts them again; they are
killed with SIGKILL, one after the other, while the streams run. Each stream has a prompt of its own, and its client
compares every token with what an engine says that nobody kills.
"""

import argparse
import asyncio
import itertools
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import structlog

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "service"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from serving import Served, fake_plan, served
from test_passage import Got, ask

from waterline.cost import replica_step_cost
from waterline.service.body import CHAT, read_asked
from waterline.service.engines.fake_answer import Answer, Part


def request(number: int, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{number}: how deep is the sea?"}]
    return {"model": "chat", "messages": messages, "max_tokens": tokens, "stream_options": {"include_usage": True}}


def judge(got: Got, expected: list[str], outcomes: Counter[str]) -> None:
    """Count what one stream has lost, or got twice."""
    words = got.text.split()
    usage = got.usages[0]["completion_tokens"] if got.usages else -1
    ended = (got.finishes, got.roles, got.dones, len(got.stamps), usage)
    outcomes["tokens"] += len(words)
    if words == expected and ended == (["length"], 1, 1, 1, len(expected)) and not got.errors:
        outcomes["complete"] += 1
        return
    outcomes["broken"] += 1
    outcomes["lost tokens"] += max(0, len(expected) - len(words))
    outcomes["tokens too many"] += max(0, len(words) - len(expected))
    outcomes[f"e.g. {got.errors[0]['message'][:90] if got.errors else ended}"] += 1


async def kill_in_turn(service: Served, every_s: float, seed: int) -> int:
    """Kill an engine every so often, one that is ready; return how many once this is cancelled."""
    dice, kills = random.Random(seed), 0
    try:
        while True:
            await asyncio.sleep(every_s)
            ready = [state for state in service.supervisor.states.values() if state.status == "ready" and state.pid]
            if len(ready) > 1:
                with suppress(ProcessLookupError):  # it has died, and that is not known yet
                    os.kill(dice.choice(ready).pid or 0, signal.SIGKILL)
                kills += 1
    except asyncio.CancelledError:
        return kills


async def main(arguments: argparse.Namespace) -> None:
    plan = fake_plan(
        {"chat": arguments.replicas}, max_batch=200, output_tokens=arguments.tokens + 1, tokens_per_s=1e6, ttft_s=3600.0
    )
    part = Part(
        model="chat",
        step=replica_step_cost(plan.fleet, plan.replicas[0]),
        max_batch=200,
        max_context_tokens=512,
        expected_output_tokens=arguments.tokens + 1,
    )
    outcomes, numbers, longest_s = Counter[str](), itertools.count(), 0.0

    async def client(service: Served) -> None:
        nonlocal longest_s
        while (number := next(numbers)) < arguments.streams:
            fields = request(number, arguments.tokens)
            expected = Answer(read_asked(CHAT, orjson.dumps(fields)), part, chat=True).words
            got = await ask(service, fields)
            longest_s = max(longest_s, got.took_s)
            judge(got, "".join(expected).split(), outcomes)

    async with served(plan) as service:
        begun_s = time.monotonic()
        killing = asyncio.create_task(kill_in_turn(service, arguments.every, arguments.seed))
        await asyncio.gather(*(client(service) for _ in range(min(arguments.clients, arguments.streams))))
        took_s = time.monotonic() - begun_s
        killing.cancel()
        kills = await killing
    print(f"{arguments.streams} streams of {arguments.tokens} tokens, {arguments.clients} at a time")
    print(f"{arguments.replicas} replicas, {kills} kills in {took_s:.1f} s; the longest stream took {longest_s:.1f} s")
    for name in ("complete", "broken", "lost tokens", "tokens too many", "tokens"):
        print(f"{name:18}{outcomes.pop(name, 0):10,}")
    for name, count in outcomes.most_common(5):
        print(f"{count:10,}  {name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=250, help="streams at a time")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=6)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=1)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(parser.parse_args()))
