"""`waterline status` as a person meets it: once, as JSON, live in a terminal, and when there is nothing to see."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from waterline.cli.status import status
from waterline.errors import InputError
from waterline.outcome import Percentiles
from waterline.snapshot import (
    JobNow,
    LatencyNow,
    ModelNow,
    MoveNow,
    NodeNow,
    QueueNow,
    ReplicaNow,
    Snapshot,
    TenantNow,
    Use,
)

NOW = Snapshot(
    at_s=1.8e9,
    uptime_s=7300.0,
    fleet="iceberg",
    health="ok",
    gpus=16,
    uses=(
        Use(pool="a", tenant="public", kind="serving", gpus=4.0),
        Use(pool="a", tenant="research", kind="job", gpus=8.0),
        Use(pool="a", tenant="", kind="idle", gpus=4.0),
    ),
    tenants=(
        TenantNow(tenant="research", gpus=8.0, guarantee_gpus=4.0, deserved_gpus=15.0, limit_gpus=16.0),
        TenantNow(tenant="public", gpus=4.0, guarantee_gpus=0.0, deserved_gpus=1.0, limit_gpus=16.0, waiting=3),
    ),
    models=(
        ModelNow(model="chat", ready=1, replicas=2, running=2, slots=4, waiting=3, ttft_slo_s=1.0, tpot_slo_s=0.05),
    ),
    latencies=(
        LatencyNow(
            model="chat",
            tenant="public",
            window_s=60.0,
            requests=120,
            ok=118,
            within_slo=90,
            output_tokens=1000,
            ttft_s=Percentiles(mean=0.5, p50=0.4, p90=0.9, p99=1.7),
            tpot_s=Percentiles(mean=0.02, p50=0.02, p90=0.03, p99=0.04),
        ),
    ),
    queues=(QueueNow(model="chat", tenant="public", client="alice", waiting=3, oldest_s=2.5),),
    replicas=(
        ReplicaNow(id="chat/0", model="chat", tenant="", pool="a", node=0, gpus=4, state="ready"),
        ReplicaNow(
            id="chat/1", model="chat", tenant="", pool="a", node=1, gpus=4, state="suspect", reason="[silent] :x:"
        ),
    ),
    replica_states={"ready": 1, "suspect": 1},
    moves=(
        MoveNow(at_s=1.8e9, kind="start", rule="borrow idle", why="", tenant="public", what="chat", pool="a", gpus=4),
    ),
    problems=("Replica 'chat/1' is suspect: [silent] :x:",),
)


@contextmanager
def answering(answer: list[tuple[int, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Serve the last of the answers, whatever is asked; yield the URL and the keys that were shown."""
    keys = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("authorization", ""))
            code, body = answer[-1]
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/", keys
        finally:
            server.shutdown()


def shown(now: Snapshot, *options: str) -> str:
    with answering([(200, msgspec.json.encode(now))]) as (url, _):
        result = CliRunner().invoke(status, ["--url", url, *options], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output


def test_once_says_everything_without_colour() -> None:
    text = shown(NOW)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "iceberg: serving, up 2.03 h"
    assert lines[1] == "! Replica 'chat/1' is suspect: [silent] :x:"
    assert "Waterline 25%: 4 of 16 GPUs serve the public" in text
    above, water, below = (
        next(i for i, line in enumerate(lines) if line.startswith(start)) for start in ("public", "~~", "research")
    )
    assert above < water < below
    assert lines[above].split() == ["public", "4", "██████", "0", "1", "16", "0", "3"], "6 of 24 characters"
    assert "1.7 s !" in text, "beyond the SLO, told without colour"
    assert "1 of 2" in text
    assert "2.5 s" in text
    assert "public/alice 3" in text
    assert "start: chat of public, 4 GPUs of a (borrow idle)" in text
    assert "Replicas: 1 ready, 1 suspect" in text


def test_nodes_that_are_lost_come_first_with_who_has_the_others_and_a_job_says_why_it_does_not_run() -> None:
    lost = NodeNow(pool="a", node=3, state="silent", gpus=4, address="10.0.0.4", reason="It has been silent for 8 s.")
    there = NodeNow(pool="a", node=0, state="up", gpus=4, used_gpus=4, users=tuple(f"chat/{one}" for one in range(10)))
    job = JobNow(job="train/0", tenant="research", state="backing off", reason="its command left with 3.")
    text = shown(replace(NOW, nodes=(lost, there), node_states={"silent": 1, "up": 12}, jobs=(job,)), "--once")
    print(text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    title = lines.index("Nodes: 1 silent, 12 up; the first 2, those that are lost before all others")
    assert lines[title + 2] == "a, 3 silent ! 0 of 4 - 10.0.0.4 It has been silent for 8 s."
    assert lines[title + 3].startswith("a, 0 up 4 of 4 chat/0, chat/1")
    assert "and 2 more" in " ".join(lines[title + 3 :])
    assert any("train/0 research backing off" in line and "its command left with 3." in line for line in lines)


def test_json_is_the_snapshot() -> None:
    assert msgspec.json.decode(shown(NOW, "--json"), type=Snapshot) == NOW
    assert json.loads(shown(NOW, "--json"))["health"] == "ok"


def test_what_is_not_well_stands_first() -> None:
    text = shown(replace(NOW, health="stopping", problems=tuple(f"problem {number}" for number in range(20))))
    assert text.startswith("iceberg: STOPPING")
    assert "! and 12 more" in text
    nothing = replace(
        NOW, uses=(), tenants=(), models=(), latencies=(), queues=(), replicas=(), replica_states={}, gpus=0
    )
    assert "Waterline 0%" in shown(nothing)


@pytest.mark.parametrize(
    ("code", "body", "says"),
    [
        (401, b"", "wants its admin key in WATERLINE_ADMIN_KEY"),
        (404, b"", "is no page of waterline up: 404"),
        (200, b"<html>", "is no page of waterline up, or of another version"),
        (200, b'{"at_s": 1}', "is no page of waterline up, or of another version"),
    ],
)
def test_who_answers_otherwise_is_named(code: int, body: bytes, says: str) -> None:
    with answering([(code, body)]) as (url, _), pytest.raises(InputError, match=says):
        CliRunner().invoke(status, ["--url", url], catch_exceptions=False)


def test_nobody_there_is_an_error_with_the_next_step() -> None:
    with pytest.raises(InputError, match=r"no service answers at http://127.0.0.1:1: .* waterline up"):
        CliRunner().invoke(status, ["--url", "http://127.0.0.1:1"], catch_exceptions=False)
    with pytest.raises(InputError, match="is no address"):
        CliRunner().invoke(status, ["--url", "127.0.0.1:8001"], catch_exceptions=False)


def test_the_key_of_the_environment_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATERLINE_ADMIN_KEY", "a-key-of-operators")
    with answering([(200, msgspec.json.encode(NOW))]) as (url, keys):
        CliRunner().invoke(status, ["--url", url], catch_exceptions=False)
    assert keys == ["Bearer a-key-of-operators"]


HEARS_CTRL_C = """
import signal, sys
from waterline.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell ignores it
"""


def test_live_it_follows_the_service_says_when_it_is_gone_and_leaves_with_ctrl_c() -> None:
    answers = [(200, msgspec.json.encode(NOW))]
    with answering(answers) as (url, _):
        screen, slave = pty.openpty()
        command = [
            sys.executable,
            "-c",
            f"{HEARS_CTRL_C}\nsys.argv = ['waterline', 'status', '--url', {url!r}]\nmain()",
        ]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "110", "LINES": "50"}
        terminal = {"stdin": slave, "stdout": slave, "stderr": slave}
        with subprocess.Popen(command, **terminal, env=environment) as process:
            os.close(slave)
            try:
                until(screen, "Waterline 25%")
                answers.append((200, msgspec.json.encode(replace(NOW, uses=NOW.uses[1:]))))
                until(screen, "Waterline 0%")
                answers.append((503, b""))
                until(screen, "Trying again")
                process.send_signal(signal.SIGINT)
                until(screen, "\x1b[?1049l")
                assert process.wait(30) == 0
            finally:
                process.kill()
        os.close(screen)


def until(screen: int, words: str, within_s: float = 20.0) -> None:
    """Read a terminal until the words have been written."""
    end_s, said = time.monotonic() + within_s, ""
    while words not in said:
        assert time.monotonic() < end_s, said
        if select.select([screen], [], [], 0.1)[0]:
            said += os.read(screen, 65536).decode(errors="replace")
