"""Kills a process that writes to the ledger, at random points, and checks that the ledger tells the truth afterwards.

    python benchmarks/kill_nine.py                        # 500 kills, SQLite in a temporary folder
    python benchmarks/kill_nine.py --kills 10 --seed 3
    python benchmarks/kill_nine.py --url postgresql://…   # an empty database

A child makes requests as the gateway does, many at a time: reserve, wait until that is durable, note how far it has
come, settle, wait until that is on the disk. Each step is told on a pipe, before or after, in one write: so what
was said is known however it dies. SIGKILL comes at a random time, one in four while it still opens the ledger; the next
child settles what was left open, and goes on. After each kill:

- every request whose settlement was acknowledged has its row, with the amounts that were said;
- every request whose reservation was acknowledged has a row: with the amounts of its settlement, or, interrupted, with
  those of one of its notes;
- no request has two rows, none stands open, and the sums by day and the balances of keys equal the sums of the rows;
- no quota is overspent: one key has room for few.

SIGKILL takes the process, not what the system holds for the disk: that a commit is on the disk is SQLite's word
(synchronous=FULL) and PostgreSQL's (fsync), which a power cut would test.
"""

import argparse
import asyncio
import json
import os
import random
import select
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, Row, text

from waterline.errors import QuotaError
from waterline.ledger import Key, Ledger, Quotas, Settlement, create_key, new_request_id, read_keys, utc_us

AT_ONCE = 24
LONGEST_S = 0.25  # a child's life once it writes
LONGEST_OPENING_S = 0.06
PATIENCE_S = 60.0  # for a child to open the ledger
TOKENS = 200  # reserved by a request, 100 of them for its prompt
PROMPT = 100


# --- The child ------------------------------------------------------------------------------------------------------


def say(*words: str | int) -> None:
    """Say something in one write, which the reader gets whole."""
    os.write(1, (json.dumps(words) + "\n").encode())


async def make_requests(ledger: Ledger, key: Key | None, dice: random.Random) -> None:
    while True:
        request_id, arrival_us = new_request_id(), utc_us()
        used = {"prompt_tokens": 0, "output_tokens": 0, "nano_usd": 0}
        try:
            reservation = await ledger.reserve(
                request_id=request_id,
                tenant="public",
                client=key.client if key else "anonymous",
                key=key,
                model="small",
                tokens=TOKENS,
                nano_usd=TOKENS * 7,
                arrival_us=arrival_us,
            )
            await reservation.durable()
            say("reserved", request_id)
            for output_tokens in range(0, dice.randint(1, TOKENS - PROMPT), 20):
                used = {"prompt_tokens": PROMPT, "output_tokens": output_tokens, "nano_usd": output_tokens * 7}
                say("noted", request_id, *used.values())
                ledger.note(reservation, **used)
                await asyncio.sleep(dice.uniform(0, 0.01))
            outcome = "ok"
        except QuotaError:
            outcome = "refused"
        say("settling", request_id, *used.values())
        await ledger.settle(
            Settlement(
                request_id=request_id,
                tenant="public",
                client=key.client if key else "anonymous",
                key_id=key.id if key else "",
                model="small",
                arrival_us=arrival_us,
                finish_us=utc_us(),
                outcome=outcome,  # type: ignore[arg-type] # one of them
                **used,
            )
        )
        say("settled", request_id)
        await asyncio.sleep(0.05 if outcome == "refused" else 0)


def child(url: str, seed: int) -> None:
    dice = random.Random(seed)

    async def all_of_them(ledger: Ledger) -> None:
        keys = [*read_keys(ledger.engine), None]
        await asyncio.gather(*(make_requests(ledger, keys[one % len(keys)], dice) for one in range(AT_ONCE)))

    with Ledger.open(url) as ledger:
        say("open")
        asyncio.run(all_of_them(ledger))


# --- The parent -----------------------------------------------------------------------------------------------------

Amounts = tuple[int, int, int]  # prompt tokens, output tokens, nano-dollars


@dataclass
class Said:
    """What the children have said."""

    reserved: set[str] = field(default_factory=set)
    noted: dict[str, list[Amounts]] = field(default_factory=dict)
    settling: dict[str, Amounts] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)

    def hear(self, line: bytes) -> str:
        what, *words = json.loads(line)
        if what == "reserved":
            self.reserved.add(words[0])
        elif what == "noted":
            self.noted.setdefault(words[0], [(0, 0, 0)]).append(tuple(words[1:]))
        elif what == "settling":
            self.settling[words[0]] = tuple(words[1:])
        elif what == "settled":
            self.settled.add(words[0])
        return str(what)


def live_and_die(url: str, seed: int, said: Said, dice: random.Random) -> None:
    """Run a child until it writes, then a random time longer, and kill it; one in four while it opens the ledger."""
    reading, writing = os.pipe()
    pid = os.fork()  # a new Python would take longer to start than to die
    if not pid:
        os.close(reading)
        os.dup2(writing, 1)
        try:
            child(url, seed)
        finally:
            os._exit(1)  # nothing but SIGKILL ends a child in time
    os.close(writing)
    opening = dice.random() < 0.25
    end_s = time.monotonic() + (dice.uniform(0, LONGEST_OPENING_S) if opening else PATIENCE_S)
    rest, killed = b"", False
    while True:
        if time.monotonic() >= end_s and not killed:
            os.kill(pid, signal.SIGKILL)
            killed = True
        ready, _, _ = select.select([reading], [], [], None if killed else max(0.0, end_s - time.monotonic()))
        if not ready:
            continue
        chunk = os.read(reading, 1 << 16)
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if said.hear(line) == "open" and not opening:
                end_s = time.monotonic() + dice.uniform(0, LONGEST_S)
    os.close(reading)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
        raise SystemExit(f"the child with seed {seed} ended by itself")


def problems(engine: Engine, said: Said, limits: Mapping[str, int]) -> list[str]:
    """Return every way in which the ledger does not tell what was said."""
    rows, found = books(engine, limits)
    by_id = {row.id: row for row in rows}
    return found + [wrong for one in said.settled | said.reserved if (wrong := wrong_row(one, by_id, said))]


def books(engine: Engine, limits: Mapping[str, int]) -> tuple[Sequence[Row[Any]], list[str]]:
    """Return the rows of the ledger, and every way in which it contradicts itself; `limits` are tokens, by key."""
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT * FROM completions")).all()
        (still_open,) = connection.execute(text("SELECT count(*) FROM reservations")).one()
        kept = connection.execute(
            text("SELECT sum(requests), sum(prompt_tokens), sum(output_tokens), sum(nano_usd) FROM usage")
        ).one()
        balances = connection.execute(text("SELECT key_id, tokens, nano_usd, reserved_tokens FROM balances")).all()
    ids = len({row.id for row in rows})
    found = [f"{len(rows) - ids} rows are of requests that have one"] if len(rows) != ids else []
    if still_open:
        found.append(f"{still_open} reservations stand open")
    amounts = ("prompt_tokens", "output_tokens", "nano_usd")
    sums = (len(rows), *(sum(getattr(row, name) for row in rows) for name in amounts))
    if sums != tuple(int(value or 0) for value in kept):
        found.append(f"the rows sum to {sums}, kept is {kept}")
    for key_id, tokens, nano_usd, reserved in balances:
        of_key = [row for row in rows if row.key_id == key_id]
        spent = sum(row.prompt_tokens + row.output_tokens for row in of_key)
        if (tokens, nano_usd, reserved) != (spent, sum(row.nano_usd for row in of_key), 0):
            found.append(f"key {key_id} has spent {spent} tokens, its balance says {tokens} and {reserved} reserved")
        if tokens > limits[key_id]:
            found.append(f"key {key_id} has spent {tokens} of {limits[key_id]} tokens")
    return rows, found


def wrong_row(request_id: str, rows: Mapping[str, Row[Any]], said: Said) -> str:
    """Return what is wrong with the row of a request that was acknowledged."""
    row = rows.get(request_id)
    if not row:
        return f"{request_id} was acknowledged, and has no row"
    amounts = (row.prompt_tokens, row.output_tokens, row.nano_usd)
    if row.outcome == "interrupted":
        if request_id in said.settled:
            return f"{request_id} was settled, and is called interrupted"
        if amounts not in said.noted.get(request_id, [(0, 0, 0)]):
            return f"{request_id} is charged {amounts}, which was never noted"
    elif amounts != said.settling.get(request_id):
        return f"{request_id} is charged {amounts}, and said was {said.settling.get(request_id)}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--url", default="", help="an empty PostgreSQL; without it SQLite in a temporary folder")
    arguments = parser.parse_args()
    dice, said = random.Random(arguments.seed), Said()
    with tempfile.TemporaryDirectory() as folder:
        url = arguments.url or str(Path(folder) / "ledger.db")
        with Ledger.open(url) as ledger:
            limits = {}
            for client, tokens in (("scarce", 20 * TOKENS), ("ample", 10**12)):
                key, _ = create_key(ledger.engine, tenant="public", client=client, quotas=Quotas(tokens_total=tokens))
                limits[key.id] = tokens
        for kill in range(arguments.kills):
            live_and_die(url, arguments.seed * 1_000_003 + kill, said, dice)
            with Ledger.open(url) as ledger:  # settles what was left open
                found = problems(ledger.engine, said, limits)
                if found:
                    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
                    raise SystemExit(f"after kill {kill + 1}: {'; '.join(found[:5])}{more}")
        with Ledger.open(url) as ledger, ledger.engine.connect() as connection:
            rows = connection.execute(
                text("SELECT outcome, count(*), sum(output_tokens) FROM completions GROUP BY outcome")
            ).all()
    told = ", ".join(f"{count:,} {outcome} with {tokens:,} tokens" for outcome, count, tokens in sorted(rows))
    print(
        f"{arguments.kills} kills: {len(said.reserved):,} reservations and {len(said.settled):,} settlements were "
        f"acknowledged; none is lost, none charged twice, no quota overspent. Rows: {told}."
    )


if __name__ == "__main__":
    main()
