"""What the ledger costs: rows a second, how long a reservation and a settlement take, and CPU time per request.

    python benchmarks/ledger.py                        # SQLite in a temporary folder; about a minute
    python benchmarks/ledger.py --url postgresql://…   # an empty database
    python benchmarks/ledger.py --requests 2000 --rows 0

A request reserves, waits until that is durable, and settles. CPU time is of this whole process, both threads; what the
loop of requests itself costs is measured without a ledger, and taken off. What a first token waits for its reservation
is measured at a rate of arrivals, for engines of different speed. Then rows of a hundred days are put in, and `usage`
is asked for them.
"""

import argparse
import asyncio
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop
from sqlalchemy import text

from waterline.ledger import Ledger, Quotas, Settlement, create_key, new_request_id, utc_us
from waterline.ledger.batch import Batch, Books, Ending
from waterline.ledger.records import OUTCOMES, Key


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def ending(request_id: str, key: Key, arrival_us: int) -> Settlement:
    return Settlement(
        request_id=request_id,
        tenant=key.tenant,
        client=key.client,
        key_id=key.id,
        model="qwen3-8b",
        replicas=("qwen3-8b-0",),
        prompt_tokens=500,
        output_tokens=200,
        arrival_us=arrival_us,
        first_token_us=arrival_us + 100_000,
        finish_us=utc_us(),
        gpu_us=31_000,
        nano_usd=18_600,
        outcome="ok",
    )


Times = tuple[list[float], list[float]]  # of reservations until durable, of settlements


async def ask(ledger: Ledger, key: Key, requests: int, times: Times) -> None:
    for _ in range(requests):
        request_id, arrival_us, begun_s = new_request_id(), utc_us(), time.perf_counter()
        reservation = await ledger.reserve(
            request_id=request_id,
            tenant=key.tenant,
            client=key.client,
            key=key,
            model="qwen3-8b",
            tokens=700,
            nano_usd=20_000,
            arrival_us=arrival_us,
        )
        await reservation.durable()
        reserved_s = time.perf_counter()
        await ledger.settle(ending(request_id, key, arrival_us))
        times[0].append(reserved_s - begun_s)
        times[1].append(time.perf_counter() - reserved_s)


async def ask_nobody(key: Key, requests: int) -> None:
    for _ in range(requests):
        request_id, arrival_us, _ = new_request_id(), utc_us(), time.perf_counter()
        await asyncio.sleep(0)
        ending(request_id, key, arrival_us)
        await asyncio.sleep(0)


def measured(at_once: int, one: Callable[[], Awaitable[None]]) -> tuple[float, float]:
    """Return the seconds and the CPU seconds that so many of them take, side by side."""

    async def all_of_them() -> None:
        await asyncio.gather(*(one() for _ in range(at_once)))

    begun_s, begun_cpu_s = time.perf_counter(), cpu_s()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(all_of_them())
    return time.perf_counter() - begun_s, cpu_s() - begun_cpu_s


def line(ledger: Ledger, key: Key, name: str, at_once: int, requests: int) -> str:
    each = max(1, requests // at_once)
    times: Times = ([], [])
    _, idle_cpu_s = measured(at_once, lambda: ask_nobody(key, each))
    took_s, used_s = measured(at_once, lambda: ask(ledger, key, each, times))
    count = each * at_once
    numbers = [f"{count / took_s:,.0f}", f"{(used_s - idle_cpu_s) / count * 1e6:.0f}"]
    for some in times:
        cuts = statistics.quantiles(some, n=100)
        numbers += [f"{cuts[49] * 1e3:.1f}", f"{cuts[98] * 1e3:.1f}"]
    return f"{name:<22}{at_once:>8}" + "".join(f"{number:>12}" for number in numbers)


async def wait_added(ledger: Ledger, key: Key, ttft_s: float, rate_per_s: float, requests: int) -> list[float]:
    """Return how long each first token waits for its reservation, when the engine has it after `ttft_s`."""
    dice, added = random.Random(1), []

    async def one() -> None:
        request_id, arrival_us = new_request_id(), utc_us()
        reservation = await ledger.reserve(
            request_id=request_id,
            tenant=key.tenant,
            client=key.client,
            key=key,
            model="qwen3-8b",
            tokens=700,
            nano_usd=20_000,
            arrival_us=arrival_us,
        )
        await asyncio.sleep(ttft_s)
        begun_s = time.perf_counter()
        await reservation.durable()
        added.append(time.perf_counter() - begun_s)
        ledger.settle(ending(request_id, key, arrival_us))

    async with asyncio.TaskGroup() as group:
        for _ in range(requests):
            group.create_task(one())
            await asyncio.sleep(dice.expovariate(rate_per_s))
    return added


def commit_ms(ledger: Ledger) -> float:
    """Return the median time of a commit of one row: mostly what the disk takes to keep it."""
    taken = []
    with ledger.engine.connect() as connection:
        for _ in range(50):
            begun_s = time.perf_counter()
            with connection.begin():
                connection.execute(text("DELETE FROM meta WHERE name = 'commit'"))
                connection.execute(text("INSERT INTO meta VALUES ('commit', '')"))
            taken.append(time.perf_counter() - begun_s)
    return statistics.median(taken) * 1e3


def fill(ledger: Ledger, rows: int) -> None:
    """Put in rows of 100 days, 3 tenants, 50 clients and 4 models, through the ledger's own transactions."""
    books, day_us, now_us = Books(ledger.engine, "fill"), 86_400_000_000, utc_us()
    for start in range(0, rows, 10_000):
        batch = Batch()
        for number in range(start, min(rows, start + 10_000)):
            arrival_us = now_us - day_us * 100 + day_us * 100 * number // rows
            one = Settlement(
                request_id=f"{arrival_us:014x}{number:018x}",
                tenant=("public", "enterprise", "research")[number % 3],
                client=f"client-{number % 50}",
                key_id=f"key-{number % 50}",
                model=f"model-{number % 4}",
                prompt_tokens=500,
                output_tokens=number % 400,
                arrival_us=arrival_us,
                finish_us=arrival_us + 5_000_000,
                nano_usd=18_600 + number % 1_000,
                outcome=OUTCOMES[0],
            )
            batch.endings[one.request_id] = Ending(settlement=one, periods=(), reserved=None)
        books.write(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="", help="a PostgreSQL; without it SQLite in a temporary folder")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=1_000_000, help="to put in for `usage`")
    parser.add_argument("--folder", type=Path, help="where the SQLite file lies: its disk is what is measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        url = arguments.url or str(Path(folder) / "ledger.db")
        with Ledger.open(url) as ledger:
            free, _ = create_key(ledger.engine, tenant="public", client="no quota")
            limited, _ = create_key(
                ledger.engine,
                tenant="public",
                client="quotas",
                quotas=Quotas(tokens_per_day=10**15, nano_usd_total=10**18),
            )
            print(f"{ledger.engine.dialect.name}; a commit of one row takes {commit_ms(ledger):.1f} ms here\n")
            heads = ("requests/s", "CPU us", "reserve p50", "p99 ms", "settle p50", "p99 ms")
            print(f"{'':<22}{'at once':>8}" + "".join(f"{head:>12}" for head in heads))
            for name, key in (("without quotas", free), ("two quotas", limited)):
                for at_once in (1, 64, 256):
                    print(line(ledger, key, name, at_once, arguments.requests if at_once > 1 else 300), flush=True)
            print(f"\n{'added to the first token, ms':<30}{'requests/s':>12}{'p50':>8}{'p99':>8}")
            for ttft_s in (0.0, 0.005, 0.02, 0.1):
                for rate_per_s in (20, 200):
                    count = min(arguments.requests, rate_per_s * 10)
                    added = asyncio.run(wait_added(ledger, limited, ttft_s, rate_per_s, count))
                    cuts = statistics.quantiles(added, n=100)
                    name = f"engine's own {ttft_s * 1e3:.0f} ms"
                    print(f"{name:<30}{rate_per_s:>12}{cuts[49] * 1e3:>8.2f}{cuts[98] * 1e3:>8.1f}", flush=True)
            if not arguments.rows:
                return
            begun_s = time.perf_counter()
            fill(ledger, arguments.rows)
            print(f"\n{arguments.rows:,} rows put in, {arguments.rows / (time.perf_counter() - begun_s):,.0f} a second")
            for by in ("day", "client", "model"):
                begun_s = time.perf_counter()
                command = [sys.executable, "-m", "waterline", "usage", "--by", by, "--json", "--ledger", url]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                print(
                    f"waterline usage --by {by:<8} {time.perf_counter() - begun_s:.2f} s, the start of Python included"
                )


if __name__ == "__main__":
    main()
