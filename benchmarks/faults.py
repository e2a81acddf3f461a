"""Failures that clients see: two replicas, one of them faulty, and what becomes of streams of 50 tokens.

    python benchmarks/faults.py                 # about a minute: 24 streams for each fault and moment
    python benchmarks/faults.py --streams 4     # does it work at all

A stream is complete when its client got exactly the tokens of the fault-free run, one role, one reason to end, the
right usage and [DONE]. The engines are real HTTP servers in this process (`tests/service/faulty.py`), which say a token
every 5 ms and fail as they are told; the gateway is the one of `waterline up`, under its supervisor.
"""

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path

import structlog

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "service"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from faulty import BEFORE, WITHIN, Engine, listening
from serving import fake_plan, served
from test_passage import REQUEST, TOKENS, Got, ask

TOKEN_S = 0.005
MOMENTS = {"at once": 1, "in the middle": 25, "near the end": 48, "after the last": TOKENS}

# Complete streams of 24, as measured in November 2026 on two shared cores with this kind of replicas: nginx 1.22,
# SGLang router 0.3.2, LiteLLM 1.106 (3 retries, a fallback, a timeout of 8 s). "-": not measured.
PEERS = {
    "refused": ("24", "24", "24"),
    "500": ("24", "24", "24"),
    "hang": ("24 (8 s)", "24 (24 s)", "24 (28 s)"),
    "cut": ("12", "12", "12"),
    "stall": ("12 (8 s)", "12 (8 s)", "15 (9 s)"),
    "broken": ("12", "12", "12"),
}


async def refused(streams: int) -> tuple[int, float]:
    """Ask while one of the two takes no connections any more, before anybody has noticed."""
    engines = Engine(token_s=TOKEN_S), Engine(token_s=TOKEN_S)
    async with (
        listening(*engines) as attached,
        served(fake_plan({"chat": 2}, max_batch=1000), engines=attached) as service,
    ):
        expected = await ask(service, REQUEST)
        assert engines[0].server
        engines[0].server.close()
        got = await asyncio.gather(*(ask(service, REQUEST) for _ in range(streams)))
        return judged(got, expected)


async def faulty(fault: str, streams: int) -> tuple[int, float]:
    """Ask while one of the two fails every request in this way; return the complete streams and the longest delay."""
    engines = Engine(faulty=True, token_s=TOKEN_S), Engine(token_s=TOKEN_S)
    async with (
        listening(*engines) as attached,
        served(fake_plan({"chat": 2}, max_batch=1000), engines=attached) as service,
    ):
        expected = await ask(service, REQUEST)
        got = await asyncio.gather(*(ask(service, REQUEST, fault) for _ in range(streams)))
        return judged(got, expected)


def judged(got: list[Got], expected: Got) -> tuple[int, float]:
    complete = sum(
        (one.text, one.finishes, one.roles, one.usages, one.dones, one.errors, len(one.stamps))
        == (expected.text, expected.finishes, 1, expected.usages, 1, [], 1)
        for one in got
    )
    return complete, max(one.took_s for one in got) - statistics.median([expected.took_s])


async def main(streams: int) -> None:
    print(f"complete streams of {streams}; in brackets the longest delay, where it is more than 0.5 s\n")
    print(f"{'fault':12}{'moment':16}{'waterline':>14}{'nginx':>12}{'SGLang router':>15}{'LiteLLM':>12}   (of 24)")
    total, begun_s = [0, 0], time.monotonic()
    cases = [("refused", "before"), *((fault, "before") for fault in BEFORE)]
    cases += [(fault, moment) for fault in WITHIN for moment in MOMENTS]
    for fault, moment in cases:
        if fault == "refused":
            complete, delay_s = await refused(streams)
        else:
            complete, delay_s = await faulty(f"{fault}@{MOMENTS[moment]}" if moment in MOMENTS else fault, streams)
        total = [total[0] + complete, total[1] + streams]
        mine = f"{complete}" + (f" ({delay_s:.1f} s)" if delay_s > 0.5 else "")
        peers = PEERS.get(fault, ("-",) * 3) if moment in {"before", "in the middle"} else ("-",) * 3
        print(f"{fault:12}{moment:16}{mine:>14}{peers[0]:>12}{peers[1]:>15}{peers[2]:>12}", flush=True)
    print(f"\n{total[0]} of {total[1]} streams complete, in {time.monotonic() - begun_s:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=24, help="for each fault and moment")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(parser.parse_args().streams))
