"""Servers of somebody else's making are started here and leave nothing behind; a stand-in plays them."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from serving import QUESTION, served, until

from plans import one_replica
from waterline.errors import EngineError
from waterline.plan import Layout, Plan
from waterline.service.engines import prepare_engines

# Answers as vLLM and SGLang do: /health with 503 until it has been asked twice; it keeps a process of its own.
STAND_IN = """#!{python}
import json, os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

print("this line is not for the one who waits for a URL", flush=True)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
told = {{"arguments": sys.argv, "mask": os.environ.get("CUDA_VISIBLE_DEVICES"), "pids": [os.getpid(), worker.pid]}}
open({notes!r}, "w").write(json.dumps(told))
if os.environ.get("STAND_IN_FAILS"):
    sys.exit("the card is on fire")
asked = 0

class Handler(BaseHTTPRequestHandler):
    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        global asked
        asked += 1
        self.answer(200 if asked > 2 else 503, {{}})

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        message = {{"role": "assistant", "content": "203342"}}
        usage = {{"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
        choice = {{"index": 0, "finish_reason": "stop", "message": message}}
        self.answer(200, {{"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}})

    def log_message(self, *_):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
ABACUS = str(Path(__file__).parents[2] / "src/waterline/catalog/weights/abacus-q8_0.gguf")


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file in which the stand-in for all three programs says how it was started; they are on the path."""
    notes = tmp_path / "notes.json"
    for program in ("vllm", "sglang", "llama-server"):
        file = tmp_path / program
        file.write_text(STAND_IN.format(python=sys.executable, notes=str(notes)))
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return notes


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("plan", "begins"),
    [
        (one_replica("vllm", "rtx-4090", Layout(tp=2)), ["serve", "meta-llama/Llama-3.1-8B", "--served-model-name"]),
        (one_replica("sglang", "rtx-4090", Layout(tp=2)), ["serve", "--model-path", "meta-llama/Llama-3.1-8B"]),
        (one_replica("llamacpp", "rtx-4090", Layout(tp=2), 1, ABACUS, "q8_0"), ["--model", ABACUS, "--alias"]),
    ],
)
def test_it_is_started_on_its_cards_asked_until_it_is_ready_and_gone_with_us(
    notes: Path, plan: Plan, begins: list[str]
) -> None:
    async def case() -> str:
        async with served(plan) as service:
            reply = await service.openai.chat.completions.create(model="chat", messages=QUESTION)
            return reply.choices[0].message.content or ""

    assert asyncio.run(case()) == "203342"
    told = json.loads(notes.read_text())
    assert told["arguments"][1:4] == begins
    assert told["mask"] == "0,1"
    assert not any(is_running(pid) for pid in told["pids"])


def test_why_it_does_not_start_is_said_in_its_own_words(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "1")

    async def case() -> None:
        async with served(one_replica("vllm", "rtx-4090")):
            pass

    with pytest.raises(EngineError, match="exit 1. Its last words:(.|\n)*the card is on fire"):
        asyncio.run(case())
    assert not any(is_running(pid) for pid in json.loads(notes.read_text())["pids"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_the_one_who_holds_its_input_however_that_ends(notes: Path, number: signal.Signals) -> None:
    (engine,) = prepare_engines(one_replica("vllm", "rtx-4090")).values()
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen({list(engine.command)!r}, stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(notes.exists)
    wait_until(lambda: notes.read_text().endswith("}"))
    pids = json.loads(notes.read_text())["pids"]
    assert all(is_running(pid) for pid in pids)
    holder.send_signal(number)
    holder.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def wait_until(condition: object) -> None:
    asyncio.run(until(condition, within_s=20))  # type: ignore[arg-type]


def test_what_is_not_installed_is_said_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError) as caught:
        prepare_engines(one_replica("vllm", "rtx-4090"), fleet="box.toml")
    said = str(caught.value)
    assert "'chat' (vllm). Install it (pip install vllm;" in said
    assert "waterline launch box.toml prints how" in said
    assert "waterline up box.toml --engine fake" in said


@pytest.mark.parametrize(
    ("engine", "role", "flag"),
    [("vllm", "prefill", '"kv_role": "kv_producer"'), ("sglang", "decode", "--disaggregation-mode")],
)
def test_replicas_of_one_role_are_started_in_it(notes: Path, engine: str, role: str, flag: str) -> None:
    assert notes.parent.exists()
    (made,) = prepare_engines(one_replica(engine, role=role)).values()
    assert flag in " ".join(made.command)
    assert made.dialect.hand_over == {"vllm": "in turn", "sglang": "at once"}[engine]


def test_one_that_reads_is_met_where_it_was_told_to_listen(notes: Path) -> None:
    assert notes.parent.exists()
    (made,) = prepare_engines(one_replica("sglang", role="prefill")).values()
    port = made.command[made.command.index("--disaggregation-bootstrap-port") + 1]
    assert int(port) == made.dialect.meeting_port > 0


def test_replicas_of_other_nodes_are_not_started_here(notes: Path) -> None:
    assert notes.parent.exists()
    with pytest.raises(
        EngineError, match="is planned on node 1 of pool 'box', but engines are started on this machine"
    ):
        prepare_engines(one_replica(layout=Layout(tp=8, pp=2), nodes=2))
