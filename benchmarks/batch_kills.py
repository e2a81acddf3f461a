"""Batches under a service that is stopped and killed at random: is each line answered once and charged once?

    python benchmarks/batch_kills.py [--seed 1] [--requests 2000] [--stops 20] [--ledger FILE|URL]

`waterline up` serves a fake engine; it gets SIGKILL or, one time in four, SIGTERM after a random time, and is started
again, until the batch has ended. Then the output file is held against the input and the ledger against both.
"""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import openai
from sqlalchemy import select

from waterline.ledger import Ledger
from waterline.ledger.tables import completions
from waterline.service.batches import request_id

FLEET = """
name = "batch-kills"

[[pools]]
name = "box"
gpu = "cpu"

[[models]]
name = "chat"
weights = "waterline/abacus"
engine = "fake"

[[demand]]
requests_per_s = 0.5
prompt_tokens = 10
output_tokens = 40
"""
ENDPOINT = "/v1/chat/completions"
TOKENS = 40


def start(fleet: Path, ledger: str) -> tuple["subprocess.Popen[str]", str]:
    command = [sys.executable, "-m", "waterline", "up", str(fleet), "--port", "0", "--json", "--ledger", ledger]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    return process, json.loads(process.stdout.readline())["url"]


async def begin(client: openai.AsyncOpenAI, requests: int) -> str:
    lines = [
        {
            "custom_id": f"mine-{number}",
            "method": "POST",
            "url": ENDPOINT,
            "body": {
                "model": "chat",
                "messages": [{"role": "user", "content": f"{number}?"}],
                "max_tokens": TOKENS,
            },
        }
        for number in range(requests)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    return (await client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")).id


async def run(options: argparse.Namespace, folder: Path) -> None:
    dice = random.Random(options.seed)
    fleet, ledger = folder / "fleet.toml", options.ledger or str(folder / "ledger.db")
    fleet.write_text(FLEET)
    batch_id, stops, begun_s, shown = "", Counter[str](), time.monotonic(), 0
    while True:
        process, url = await asyncio.to_thread(start, fleet, ledger)
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            batch_id = batch_id or await begin(client, options.requests)
            last = sum(stops.values()) >= options.stops
            until_s = float("inf") if last else time.monotonic() + dice.uniform(0.05, 1.5)
            while time.monotonic() < until_s:
                batch = await client.batches.retrieve(batch_id)
                assert batch.request_counts
                assert batch.request_counts.completed >= shown, "what it has it keeps"
                shown = batch.request_counts.completed
                if batch.status == "completed":
                    break
                await asyncio.sleep(0.02)
            if batch.status == "completed":
                assert batch.output_file_id
                assert not batch.error_file_id
                content = (await client.files.content(batch.output_file_id)).read()
        how = signal.SIGTERM if dice.random() < 0.25 else signal.SIGKILL
        process.send_signal(how)
        await asyncio.to_thread(process.wait, 30)
        stops[how.name] += 1
        print(f"{stops.total()}: {how.name} with {shown} of {options.requests} answered", flush=True)
        if batch.status == "completed":
            break
    check(content, ledger, batch_id, options.requests)
    print(
        f"{options.requests} requests, {dict(stops)}, {time.monotonic() - begun_s:.0f} s: answered once, charged once"
    )


def check(content: bytes, ledger: str, batch_id: str, requests: int) -> None:
    said = [json.loads(line)["custom_id"] for line in content.splitlines()]
    assert said == [f"mine-{number}" for number in range(requests)], "a line is missing, twice, or out of order"
    with Ledger.open(ledger) as opened, opened.engine.connect() as connection:
        asked = select(completions.c.id, completions.c.outcome, completions.c.output_tokens).order_by(completions.c.id)
        rows = [tuple(row) for row in connection.execute(asked) if row[0].startswith(batch_id)]
    expected = [(request_id(batch_id, number), "ok", TOKENS) for number in range(requests)]
    assert rows == expected, [pair for pair in zip(rows, expected, strict=False) if pair[0] != pair[1]][:5]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--ledger", default="")
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(run(parser.parse_args(), Path(temporary)))
