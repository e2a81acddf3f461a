"""What the gateway makes of nonsense: requests and engines' answers with mutations, and what their clients see.

    python benchmarks/fuzz.py                        # 100,000 requests and 100,000 answers: some minutes
    python benchmarks/fuzz.py --size 500 --seed 7    # does it work at all

Requests are mutated as JSON, where each must be answered, and as bytes on the socket, where HTTP may end anywhere.
Answers of the engine are mutated as bytes, head included, and the connection then ends; in each case a client must see
JSON and the end of its answer. The goal is 0 of each: errors of the server that a client has caused, bugs, hangs.
"""

import argparse
import asyncio
import io
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import orjson
import uvloop

from waterline.fleet import load_fleet
from waterline.planner import make_plan
from waterline.service.engines import prepare_engines
from waterline.service.logs import log_to
from waterline.service.server import listen, running

AT_ONCE = 32
WITHIN_S = 10.0
QUIET_S = 0.05  # after which half a request is taken for one that waits for its rest
FLEET = """
name = "fuzz-{number}"
[[pools]]
name = "box"
gpu = "cpu"
usd_per_gpu_hour = 0.0
[[models]]
name = "m"
weights = "waterline/abacus"
engine = "openai"
url = "{url}"
slo = {{ ttft_s = 60.0, tpot_s = 1.0 }}
[[demand]]
requests_per_s = 0.1
prompt_tokens = 10
output_tokens = 5
"""

# --- What is mutated ------------------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "How deep?"}, {"type": "image_url", "image_url": {"url": "data:,"}}],
    },
]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "m", "messages": MESSAGES, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True},
        "temperature": 0.5, "n": 1, "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
        "response_format": {"type": "text"}, "stop": ["x"], "seed": 1, "logprobs": False, "service_tier": "flex",
    },
    "/v1/completions": {"model": "m", "prompt": ["a", "b"], "max_tokens": 5, "stream": False, "echo": True, "n": 2},
    "/v1/embeddings": {"model": "m", "input": ["a", [1, 2]], "dimensions": 3, "encoding_format": "float"},
    "/v1/responses": {
        "model": "m", "stream": True, "instructions": "Be brief.", "max_output_tokens": 5,
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}, "tool_choice": "auto",
        "tools": [{"type": "function", "name": "look", "parameters": {}}],
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "blue"},
        ],
    },
}  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**31, 2**63, 2**64 - 1, 1e308, -0.5, "", "x" * 5000, "\0", "\ud7ff", "m", [], {},
    [[]], [{}], [None],
    {"": None}, {"type": "text"}, [1, "a"], list(range(300)),
)  # fmt: skip
TOKENS = (
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b'"',
    b"data: ",
    b"[DONE]",
    b":",
    b"0",
    b"9" * 30,
    b" " * 70_000,
)


def mutated_json(dice: random.Random, value: Any) -> Any:
    """Return JSON with something odd somewhere."""
    if dice.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return dice.choice(ODD)
    if isinstance(value, list):
        place = dice.randrange(len(value))
        return [*value[:place], mutated_json(dice, value[place]), *value[place + dice.randint(0, 1) :]]
    name = dice.choice(list(value))
    if dice.random() < 0.2:
        return {other: value[other] for other in value if other != name}
    return {**value, name: mutated_json(dice, value[name])}


def mutated_bytes(dice: random.Random, data: bytes) -> bytes:
    """Return bytes of which some were changed, lost, doubled or put in."""
    for _ in range(dice.randint(1, 3)):
        place, length = dice.randrange(len(data) + 1), dice.choice((1, 1, 2, 8, 64))
        match dice.randrange(5):
            case 0:
                data = data[:place] + bytes(dice.randrange(256) for _ in range(length)) + data[place + length :]
            case 1:
                data = data[:place] + data[place + length :]
            case 2:
                data = data[:place] + data[place : place + length] * dice.choice((2, 3, 50)) + data[place:]
            case 3:
                data = data[:place] + dice.choice(TOKENS) + data[place:]
            case _:
                data = data[:place]
    return data


def request_of(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


# --- The engine -----------------------------------------------------------------------------------------------------

USAGE = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


def event(**fields: Any) -> bytes:
    whole = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [], **fields}
    return b"data: " + orjson.dumps(whole) + b"\n\n"


def choice(**fields: Any) -> list[dict[str, Any]]:
    return [{"index": 0, "finish_reason": None, "delta": {}, **fields}]


STREAM = (
    event(choices=choice(delta={"role": "assistant", "content": ""}))
    + b"".join(event(choices=choice(delta={"content": f" word {number}"})) for number in range(3))
    + event(choices=choice(finish_reason="stop"))
    + event(usage=USAGE)
    + b"data: [DONE]\n\n"
)
WHOLE = orjson.dumps(
    {
        "id": "c", "object": "chat.completion", "created": 1, "model": "m", "usage": USAGE,
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "word"}}],
    }
)  # fmt: skip


def answer_of(*, stream: bool) -> bytes:
    if not stream:
        return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
            len(WHOLE),
            WHOLE,
        )
    chunks = b"".join(b"%x\r\n%s\n\n\r\n" % (len(part) + 2, part) for part in STREAM.split(b"\n\n") if part)
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        + chunks
        + b"0\r\n\r\n"
    )


class Engine(asyncio.Protocol):
    """Answers at once; with dice, with mutations, and then it hangs up."""

    dice: random.Random | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.data = cast("asyncio.Transport", transport), b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, rest = self.data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        size = int(length[1]) if length else 0
        if not found or len(rest) < size:
            return
        body, self.data = rest[:size], rest[size:]
        if not body:
            models = b'{"data":[{"id":"m"}]}'
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(models)
            self.transport.write(head + models)
            return
        try:
            answer = answer_of(stream=bool(orjson.loads(body).get("stream")))
        except orjson.JSONDecodeError:
            print(f"!the engine got what is no JSON: {body[:300]!r}")
            answer = answer_of(stream=False)
        if self.dice:
            self.transport.write(mutated_bytes(self.dice, answer))
            self.transport.close()
        else:
            self.transport.write(answer)


# --- The client -----------------------------------------------------------------------------------------------------


async def exchange(port: int, request: bytes, quiet_s: float) -> bytes:
    """Send a request and return what comes back, up to the end of one answer or until nothing more comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    answer = b""
    try:
        with suppress(ConnectionError):
            writer.write(request)
        with suppress(ConnectionError, TimeoutError):
            while not is_whole(answer):
                async with asyncio.timeout(WITHIN_S if answer else quiet_s):
                    part = await reader.read(2**16)
                if not part:
                    break
                answer += part
    finally:
        writer.close()
    return answer


def is_whole(answer: bytes) -> bool:
    head, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        return False
    length = re.search(rb"content-length: (\d+)", head)
    return len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")


def verdict(answer: bytes, *, must_answer: bool, engine_is_bad: bool) -> str:
    """Say what became of one exchange; what begins with ! must not be."""
    if not answer:
        return "!no answer" if must_answer else "waits for the rest"
    status = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    if not status:
        return "!no HTTP"
    if not is_whole(answer):
        return "!no end of its answer"
    code = int(status[1])
    if code == 500 or (code > 500 and not engine_is_bad):
        return f"!{code}"
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"text/event-stream" not in head.lower():  # a type has no case
        return str(code) if is_json(body) else f"!{code} that is no JSON: {body[:200]!r}"
    return f"{code} streamed, " + stream_verdict(answer)


def is_json(data: bytes) -> bool:
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True


def stream_verdict(answer: bytes) -> str:
    body = unchunked(answer.partition(b"\r\n\r\n")[2])
    events = [line[6:] for line in body.splitlines() if line.startswith(b"data: ")]
    for one in events:
        if one != b"[DONE]":
            try:
                orjson.loads(one)
            except orjson.JSONDecodeError:
                return f"!an event that is no JSON: {one[:200]!r}"
    if events and events[-1] == b"[DONE]":
        return "whole"
    ended = events and any(mark in events[-1] for mark in (b'"error":{', b'"type":"response.', b'"type":"error"'))
    return "with its last word" if ended else "!without an end"


def unchunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        parts.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return b"".join(parts)


# --- The runs -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def service() -> AsyncIterator[int]:
    loop = asyncio.get_running_loop()
    engine = await loop.create_server(Engine, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{engine.sockets[0].getsockname()[1]}/v1"
    with tempfile.TemporaryDirectory() as folder:
        fleet = Path(folder) / "fleet.toml"
        fleet.write_text(FLEET.format(url=url, number=os.getpid()))
        plan, listening = make_plan(load_fleet(fleet)), listen("127.0.0.1", 0)
        async with running(plan, prepare_engines(plan), listening, lambda _: None) as parts:
            await parts.supervisor.start()
            yield listening.getsockname()[1]
            if len(parts.gateway.completions._open) > 0:  # noqa: SLF001 - whether anybody was left behind
                print("!requests are left in the gateway")
    engine.close()


def requests_of(dice: random.Random) -> tuple[bytes, bool]:
    """Return a request, and whether it is one that must be answered."""
    path = dice.choice(list(BODIES))
    if dice.random() < 0.6:
        return request_of(path, orjson.dumps(mutated_json(dice, BODIES[path]))), True
    return mutated_bytes(dice, request_of(path, orjson.dumps(BODIES[path]))), False


async def run(port: int, size: int, seed: int, *, engine_is_bad: bool) -> Counter[str]:
    counts, left = Counter[str](), iter(range(size))

    async def one_after_the_other() -> None:
        for number in left:
            dice = random.Random(f"{seed} {number}")
            if engine_is_bad:
                path = "/v1/responses" if number % 4 == 3 else "/v1/chat/completions"
                body = {"model": "m", "messages": MESSAGES[:1], "input": "hi", "stream": number % 2 == 0}
                request, must_answer = request_of(path, orjson.dumps(body)), True
            else:
                request, must_answer = requests_of(dice)
            answer = await exchange(port, request, WITHIN_S if must_answer else QUIET_S)
            said = verdict(answer, must_answer=must_answer, engine_is_bad=engine_is_bad)
            if "!" in said:
                print(
                    f"{said}: seed {seed}, number {number}: {request[:300]!r} -> {answer[:300]!r} … {answer[-200:]!r}"
                )
            counts[said.partition(": ")[0]] += 1

    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))
    return counts


async def main_in_loop(size: int, seed: int) -> bool:
    bugs = io.StringIO()
    log_to(bugs, terminal=False)
    good = True
    async with service() as port:
        for engine_is_bad in (False, True):
            Engine.dice = random.Random(seed) if engine_is_bad else None
            begun_s = time.perf_counter()
            counts = await run(port, size, seed, engine_is_bad=engine_is_bad)
            what = "answers of the engine" if engine_is_bad else "requests"
            print(f"{size:,} mutated {what} in {time.perf_counter() - begun_s:.0f} s:")
            for said, count in counts.most_common():
                print(f"  {count:8,}  {said}")
                good = good and "!" not in said
    found = [line for line in bugs.getvalue().splitlines() if "a bug" in line or "Traceback" in line]
    print(f"bugs in the log: {len(found)}")
    print(*found[:3], sep="\n")
    return good and not found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(0 if uvloop.run(main_in_loop(arguments.size, arguments.seed)) else 1)


if __name__ == "__main__":
    main()
