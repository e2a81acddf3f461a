"""Kills `waterline up` under load, at random points, and checks its ledger against what its clients saw.

    python benchmarks/kill_gateway.py                      # 50 kills, about three seconds each
    python benchmarks/kill_gateway.py --kills 5 --seed 3 --url postgresql://…
    python benchmarks/kill_gateway.py --hedged             # two replicas, and every request is sent to both

The service plays one replica with a fake engine, or two. Clients ask for streams and for whole answers, without a key,
with a key that has tokens for few, and with one that has plenty; each remembers the id of its request, how many tokens
came, and whether the answer ended. Then SIGKILL, a new start on the same ledger, and:

- every answer of which a byte came has its row;
- an answer that came to its end is charged what its usage says: it is settled before its last byte goes out;
- an answer that broke off is charged no more tokens than came, and those of its prompt;
- no request has two rows, nothing stands open, sums and balances equal the rows, and no quota is overspent.
"""

import argparse
import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from kill_nine import books
from sqlalchemy import Row

from waterline.ledger import Ledger, Quotas, create_key

AT_ONCE = 16
LONGEST_S = 2.5  # a service's life once it serves
SCARCE = 1_500  # tokens

FLEET = """
name = "kill-gateway"
[[pools]]
name = "cards"
gpu = "rtx-4090"
nodes = 1
gpus_per_node = {gpus}
[[models]]
name = "small"
weights = "qwen3-8b"
slo = {{ ttft_s = 60.0, tpot_s = 1.0 }}
{hedge}
[[tenants]]
name = "public"
deserved = 1.0
anonymous = true
[[demand]]
model = "small"
requests_per_s = {requests_per_s}
prompt_tokens = 100
output_tokens = 100
"""

ALONE = {"gpus": 1, "requests_per_s": 0.1, "hedge": ""}
HEDGED = {"gpus": 2, "requests_per_s": 60, "hedge": "hedge_after_s = 0.001"}  # before the first token of any


@dataclass(slots=True, kw_only=True)
class Seen:
    """What a client saw of one answer."""

    request_id: str
    tokens: int = 0  # that came
    prompt_tokens: int | None = None  # as its usage says
    charged_tokens: int | None = None  # likewise, of the answer
    ended: bool = False


async def ask(session: aiohttp.ClientSession, url: str, secret: str, dice: random.Random, seen: list[Seen]) -> None:
    stream = dice.random() < 0.7
    body = {
        "model": "small",
        "messages": [{"role": "user", "content": "word " * dice.randint(1, 60)}],
        "max_tokens": dice.randint(1, 120),
        "stream": stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    async with session.post(f"{url}/chat/completions", json=body, headers=headers) as answer:
        if answer.status != 200:
            await answer.read()
            await asyncio.sleep(0.05)
            return
        one = Seen(request_id=answer.headers["x-request-id"])
        seen.append(one)
        if not stream:
            usage = (await answer.json())["usage"]
            one.tokens = usage["completion_tokens"]
        else:
            usage = await read_stream(answer, one)
        one.prompt_tokens, one.charged_tokens, one.ended = usage["prompt_tokens"], usage["completion_tokens"], True


async def read_stream(answer: aiohttp.ClientResponse, one: Seen) -> dict[str, int]:
    usage: dict[str, int] = {}
    async for line in answer.content:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            one.tokens += sum(bool(choice["delta"].get("content")) for choice in event["choices"])
            usage = event.get("usage") or usage
    return usage


async def keep_asking(url: str, secrets: Sequence[str], seed: int, seen: list[Seen]) -> None:
    """Ask, many at a time, until the service is gone."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:

        async def one_client(number: int) -> None:
            dice = random.Random(seed * 1_000 + number)
            try:
                while True:
                    await ask(session, url, secrets[number % len(secrets)], dice, seen)
            except (aiohttp.ClientError, ConnectionError):
                return

        await asyncio.gather(*(one_client(number) for number in range(AT_ONCE)))


@asynccontextmanager
async def service(folder: Path, ledger: str) -> AsyncIterator[tuple["subprocess.Popen[bytes]", str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "waterline", "up", str(folder / "fleet.toml"), "--engine", "fake", "--json"]
    process = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs yet
        [*command, "--port", str(port), "--admin-port", "0", "--ledger", ledger],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        if not await asyncio.to_thread(process.stdout.readline):
            raise SystemExit(f"waterline up ended with {process.wait()}")
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def live_and_die(folder: Path, ledger: str, secrets: Sequence[str], seed: int, seen: list[Seen]) -> None:
    dice = random.Random(seed)
    async with service(folder, ledger) as (process, url):
        asking = asyncio.create_task(keep_asking(url, secrets, seed, seen))
        await asyncio.sleep(dice.uniform(0.1, LONGEST_S))
        process.send_signal(signal.SIGKILL)
        await asking


def wrong(one: Seen, row: Row[Any] | None) -> str:
    """Return what the ledger tells wrongly of an answer."""
    if not row:
        return f"{one.request_id} has no row, and {one.tokens} tokens came"
    charged = (row.prompt_tokens, row.output_tokens)
    if not one.ended:
        return f"{one.request_id} is charged {charged}, and {one.tokens} came" if row.output_tokens > one.tokens else ""
    usage = (one.prompt_tokens, one.charged_tokens)
    if row.outcome == "interrupted":
        return f"{one.request_id} came to its end, and is called interrupted"
    return f"{one.request_id} is charged {charged}, and its usage says {usage}" if charged != usage else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hedged", action="store_true", help="two replicas, and every request is sent to both")
    parser.add_argument("--url", default="", help="an empty PostgreSQL; without it SQLite in a temporary folder")
    arguments = parser.parse_args()
    seen: list[Seen] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "fleet.toml").write_text(FLEET.format(**(HEDGED if arguments.hedged else ALONE)))
        url = arguments.url or str(folder / "ledger.db")
        limits, secrets = {}, [""]
        with Ledger.open(url) as ledger:
            for client, tokens in (("scarce", SCARCE), ("ample", 10**12)):
                quotas = Quotas(tokens_total=tokens)
                key, secret = create_key(ledger.engine, tenant="public", client=client, quotas=quotas)
                limits[key.id] = tokens
                secrets.append(secret)
        for kill in range(arguments.kills):
            asyncio.run(live_and_die(folder, url, secrets, arguments.seed * 1_000_003 + kill, seen))
            with Ledger.open(url) as ledger:
                rows, found = books(ledger.engine, limits)
            by_id = {row.id: row for row in rows}
            found += [said for one in seen if (said := wrong(one, by_id.get(one.request_id)))]
            if found:
                more = f" and {len(found) - 5} more" if len(found) > 5 else ""
                raise SystemExit(f"after kill {kill + 1}: {'; '.join(found[:5])}{more}")
    ended, broken = [one for one in seen if one.ended], [one for one in seen if not one.ended]
    gift = sum(one.tokens - by_id[one.request_id].output_tokens for one in broken)
    outcomes = Counter(row.outcome for row in rows).most_common()
    print(
        f"{arguments.kills} kills: {len(seen):,} answers had begun, {len(ended):,} came to their end. None is missing, "
        "none charged twice or more than came, no quota overspent.\n"
        f"{len(broken)} broke off: {sum(one.tokens for one in broken):,} tokens had come, {gift:,} are not charged.\n"
        f"Rows: {', '.join(f'{count:,} {outcome}' for outcome, count in outcomes)}."
    )
    if arguments.hedged:
        print(f"{sum(',' in row.replicas for row in rows):,} were answered by the second replica that was asked.")


if __name__ == "__main__":
    main()
