"""`waterline up` as a person meets it: what it prints, how it fails, how it ends. Real processes and signals."""

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest
import structlog
from click.testing import CliRunner

import waterline
from waterline.cli.up import LAPTOP, _goodbye, _note_fleet, _ready_text
from waterline.cli.up import up as command
from waterline.errors import InputError, WaterlineError
from waterline.fleet import load_fleet
from waterline.ledger import connect, create_key
from waterline.outcome import Completion
from waterline.planner import make_plan
from waterline.service.server import Outlet, listen

ROOT = Path(waterline.__file__).parent
WEIGHTS = ROOT / "catalog" / "weights" / "abacus-q8_0.gguf"
EXAMPLES = Path(__file__).parents[2] / "examples"
ENDLESS = {
    "model": "abacus",
    "prompt": "1",
    "stream": True,
    "logit_bias": [[256, False]],
    "n": 8,
}  # until no room is left


@dataclass(frozen=True, kw_only=True)
class Up:
    """A running `waterline up --json`."""

    process: subprocess.Popen[str]
    url: str
    children: list[int]


@contextmanager
def up(*arguments: str | Path) -> Iterator[Up]:
    process = subprocess.Popen(
        [sys.executable, "-m", "waterline", "up", "--port", "0", "--json", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout
            said = process.stdout.readline()
            assert said, process.communicate()[1]
            yield Up(process=process, url=json.loads(said)["url"], children=children_of(process.pid))
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Mark what a test starts, by a variable that its children inherit; in the end nothing with the mark may run."""
    mark = uuid4().hex
    monkeypatch.setenv("WATERLINE_TEST", mark)
    at_term = signal.getsignal(signal.SIGTERM)  # `up` sets its own, here too where it is called in this process
    yield
    signal.signal(signal.SIGTERM, at_term)
    assert gone_within(marked(mark), 5), [Path(f"/proc/{pid}/cmdline").read_text() for pid in marked(mark)]


def marked(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is not ours
            if f"WATERLINE_TEST={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Say whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pids: list[int], seconds: float) -> bool:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        if not any(map(alive, pids)):
            return True
        time.sleep(0.01)
    return False


def fails(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "waterline", "up", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def refuses(*arguments: str | Path) -> WaterlineError:
    """Return why it starts nothing, asked in this process."""
    with pytest.raises(WaterlineError) as refused:
        CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    return refused.value


async def end_during_a_stream(service: Up, number: int) -> tuple[float, bytes]:
    """Send a signal while a stream runs; return how long the end took, and the end of the stream."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{service.url}/completions", json=ENDLESS) as reply,
    ):
        await reply.content.readany()
        begun_s = time.monotonic()
        service.process.send_signal(number)
        end = b""
        with suppress(aiohttp.ClientError):
            end = await reply.read()
        await asyncio.to_thread(service.process.wait, 5)
        return time.monotonic() - begun_s, end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_within_two_seconds_even_during_a_stream(number: int) -> None:
    with up() as service:
        assert len(service.children) == 1
        took_s, end = asyncio.run(end_during_a_stream(service, number))
        assert took_s < 2
        assert gone_within(service.children, 0.1)
        assert b"The service is stopping." in end
        assert service.process.returncode == 0
        assert service.process.stdout
        [total, abacus] = json.loads(service.process.stdout.read())["summaries"]
        assert (total["requests"], abacus["failed"], abacus["cancelled"]) == (1, 1, 0)


def test_killing_the_parent_leaves_no_orphan() -> None:
    for arguments in ([], ["--engine", "fake"]):
        with up(*arguments) as service:
            assert service.children
            service.process.kill()
            assert gone_within(service.children, 2)


def test_a_second_signal_ends_at_once() -> None:
    code = 'import signal, time; signal.signal(15, signal.SIG_IGN); print(\'{"url": "http://x/v1"}\', flush=True); time.sleep(60)'
    script = f"""
import sys
from waterline.service.engines import fake
from waterline.service.engines.fake import Fake
async def ready(self, session, url): return self.name
Fake.served_name = ready
fake.prepare = lambda plan, replica, seat: Fake(command=(sys.executable, "-c", {code!r}), input=b"", name=replica.model)
sys.argv = ["waterline", "up", "--engine", "fake", "--port", "0", "--json"]
from waterline.cli import main
main()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout
            assert process.stdout.readline()
            children = children_of(process.pid)
            begun_s = time.monotonic()
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert time.monotonic() - begun_s < 0.9, "without the second it waits a second for its child"
            assert gone_within(children, 0.2)
        finally:
            process.kill()


def test_a_fleet_file_that_changes_is_followed_and_one_that_is_wrong_is_not(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(LAPTOP.read_text())
    with up(fleet, "--engine", "fake") as service:
        fleet.write_text(LAPTOP.read_text().replace('name = "abacus"', 'name = "counter"'))
        service.process.send_signal(signal.SIGHUP)
        begun_s = time.monotonic()
        while asyncio.run(models(service)) != ["counter"]:
            assert time.monotonic() - begun_s < 20
            time.sleep(0.05)
        [pid] = children_of(service.process.pid)
        assert [pid] != service.children
        asyncio.run(count(service, "counter"))
        fleet.write_text("name = 1")
        service.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert (asyncio.run(models(service)), children_of(service.process.pid)) == (["counter"], [pid])
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(30) == 0
        assert service.process.stderr
        assert service.process.stdout
        assert "'name': expected text" in service.process.stderr.read()
        total, _ = json.loads(service.process.stdout.read())["summaries"]
        assert total["completed"] == 1, "of a model that came with a later plan"


async def count(service: Up, model: str) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{service.url}/completions", json={"model": model, "prompt": "1", "max_tokens": 3}) as reply,
    ):
        assert reply.status == 200, await reply.text()


async def models(service: Up) -> list[str]:
    async with aiohttp.ClientSession() as session, session.get(f"{service.url}/models") as reply:
        return [model["id"] for model in (await reply.json())["data"]]


def test_it_says_what_runs_and_how_to_ask_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "waterline", "up", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            lines: list[str] = []
            while not (lines and lines[-1].startswith("Ctrl-C")):
                lines.append(process.stdout.readline())
                assert lines[-1]
            text = "".join(lines)
            assert "abacus: 1 x llamacpp, q8_0" in text
            assert "it does not chat" in text
            curl = next(line for line in lines if line.startswith("curl "))
            answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True).stdout
            assert json.loads(answer)["choices"][0]["message"]["content"] == "203342"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            assert "public, abacus: 1 completed; " in process.stdout.read()
        finally:
            process.kill()


def test_a_plan_of_big_cards_runs_in_the_time_of_the_cost_model(tmp_path: Path) -> None:
    plan = tmp_path / "friday"  # a plan by what is in it, whatever its name
    subprocess.run(
        [sys.executable, "-m", "waterline", "plan", EXAMPLES / "mixed.toml", "-o", plan],
        check=True,
        capture_output=True,
    )
    with up(plan, "--engine", "fake") as service:
        assert len(service.children) == len(json.loads(plan.read_text())["replicas"])
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(3) == 0
        assert service.process.stdout
        assert service.process.stdout.read() == "", "nothing was asked, so there is nothing to sum up"


def test_a_port_in_use_is_found_before_anything_is_started() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = fails("--port", str(port))
    assert done.returncode == 6
    assert f"port {port} of 127.0.0.1 is in use" in done.stderr
    assert f"--port {port + 1}" in done.stderr
    assert "starting" not in done.stderr


def fleet_of(weights: bytes, folder: Path) -> Path:
    """Write a fleet of one file of weights."""
    (folder / "odd.gguf").write_bytes(weights)
    fleet = folder / "fleet.toml"
    fleet.write_text(
        'name = "odd"\n[[pools]]\nname = "here"\ngpu = "cpu"\nusd_per_gpu_hour = 0.0\n'
        '[[models]]\nname = "odd"\nweights = "odd.gguf"\n'
        "[[demand]]\nrequests_per_s = 0.1\nprompt_tokens = 30\noutput_tokens = 100\n"
    )
    return fleet


def test_a_file_that_was_cut_short_is_found_before_anything_is_started(tmp_path: Path) -> None:
    refused = refuses(fleet_of(WEIGHTS.read_bytes()[: WEIGHTS.stat().st_size // 2], tmp_path), "--port", "0")
    assert refused.exit_code == 2
    assert "cut short" in str(refused)


def test_a_file_that_llama_cpp_refuses_shows_its_words_after_one_attempt(tmp_path: Path) -> None:
    done = fails(fleet_of(WEIGHTS.read_bytes().replace(b"gpt2", b"gptX", 1), tmp_path), "--port", "0")
    assert done.returncode == 5, done.stderr
    assert "The engine of replica 'odd/0' failed: exit 1. Its last words:" in done.stderr
    assert "unknown tokenizer: 'gptX'" in done.stderr
    assert done.stderr.count("unknown tokenizer") <= 2, "one attempt, of which llama.cpp itself says it twice"


def test_a_cut_file_that_is_swapped_in_after_planning_shows_the_words_of_llama_cpp(tmp_path: Path) -> None:
    fleet = fleet_of(WEIGHTS.read_bytes(), tmp_path)
    script = f"""
import sys
from pathlib import Path
from waterline.service import engines
prepare = engines.prepare_engines
def cut_first(*arguments, **named):
    prepared = prepare(*arguments, **named)
    weights = Path({str(tmp_path / "odd.gguf")!r})
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    return prepared
engines.prepare_engines = cut_first
sys.argv = ["waterline", "up", {str(fleet)!r}, "--port", "0"]
from waterline.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 5, done.stderr
    assert "corrupted or incomplete" in done.stderr


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['xllamacpp'] = None; sys.argv = ['waterline', 'up', '--port', '0']; "
        "from waterline.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 4
    assert "pip install 'waterline-llm[embedded]'" in done.stderr


def test_engines_that_are_not_installed_are_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = fails(EXAMPLES / "mixed.toml", "--port", "0")
    assert done.returncode == 5
    remedy = f"waterline up {EXAMPLES / 'mixed.toml'} --engine fake"
    for part in ("'r1' (", "'coder' (", "'small' (", 'engine = "openai"', remedy):
        assert part in done.stderr
    refused = refuses("--engine", "nope", "--port", "0")
    assert refused.exit_code == 2
    assert "Known: vllm, sglang, llamacpp, openai, fake." in str(refused)


def test_a_host_that_is_not_ours_is_refused() -> None:
    refused = refuses("--host", "192.0.2.1", "--port", "0")
    assert refused.exit_code == 2
    assert "cannot listen on 192.0.2.1" in str(refused)


@pytest.mark.parametrize(
    ("host", "said"), [("", "the host is empty"), ("127.0.0.1:8301", "--host 127.0.0.1 --port 8301")]
)
def test_a_host_that_is_none_says_what_to_write(host: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        listen(host, 0)


def test_a_service_for_everybody_says_so_and_prints_a_url_that_works() -> None:
    with up("--engine", "fake", "--host", "0.0.0.0") as service:
        assert service.url.startswith("http://127.0.0.1:")
        service.process.send_signal(signal.SIGHUP)
        assert service.process.wait(30) == 0, "a closed terminal ends it in good order"
        assert service.process.stderr
        assert service.process.stderr.read().count("Requests need a key. Make one: waterline keys create") == 1


def test_it_warns_of_keys_that_its_fleet_is_not_for(tmp_path: Path) -> None:
    ledger, plan = connect(str(tmp_path / "ledger.db")), make_plan(load_fleet(LAPTOP))
    create_key(ledger, tenant="public", client="alice")
    lost, _ = create_key(ledger, tenant="marketing", client="bob")
    with structlog.testing.capture_logs() as said:
        _note_fleet(ledger, plan)
    [warning] = said
    assert warning["keys"] == [f"{lost.id} of bob: no tenant 'marketing'"]


def test_a_server_that_is_not_reachable_yet_is_named_when_all_else_is_ready() -> None:
    text = _ready_text(
        make_plan(load_fleet(LAPTOP)), "http://127.0.0.1:8000/v1", "http://127.0.0.1:8001/", 1.0, ["far/0"]
    )
    assert text.startswith("Not reachable yet, and asked again and again: far/0.\nReady after 1")


def test_the_last_words_show_who_left_apart_from_what_failed() -> None:
    left = Completion(
        tenant="public",
        model="abacus",
        replica="abacus/0",
        status="cancelled",
        arrival_s=0.0,
        first_token_s=1.0,
        finish_s=2.0,
        prompt_tokens=3,
        output_tokens=4,
    )
    text = _goodbye(deque([left]), load_fleet(LAPTOP).slos, 10.0, {"abacus/0": 0.0}, as_json=False)
    assert text.startswith("\npublic, abacus: 1 cancelled; 3 tokens in, 4 out")


def test_ctrl_c_before_anything_has_started_leaves_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_path: Path, _engine: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("waterline.cli.up._plan", interrupted)
    left = CliRunner().invoke(command, [])
    assert (left.exit_code, left.output) == (130, "")


@pytest.fixture
def hangups_are_ignored() -> Iterator[None]:
    """Let our children inherit what nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups_are_ignored")
def test_when_nobody_reads_its_words_any_more_it_goes_on() -> None:
    with up("--engine", "fake") as service:
        service.process.send_signal(signal.SIGHUP)
        assert service.process.stdout
        assert service.process.stderr
        service.process.stdout.close()
        service.process.stderr.close()
        [old] = service.children
        os.kill(old, signal.SIGKILL)
        begun_s = time.monotonic()
        seen = set()
        while children_of(service.process.pid) in ([], [old]) or 200 not in seen:
            seen.add(asyncio.run(health(service)))
            assert time.monotonic() - begun_s < 20
        print(f"noticed and restarted within {time.monotonic() - begun_s:.2f} s; /health said {seen}")
        assert seen == {200, 503}
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(30) == 0


def test_words_that_cannot_be_written_hold_nothing_up(capfd: pytest.CaptureFixture[str]) -> None:
    written = io.BytesIO()
    narrow = io.TextIOWrapper(written, encoding="ascii")
    Outlet(narrow).say("café")
    assert written.getvalue() == b"caf?\n"
    Outlet(None).say("to nobody")  # as after `waterline up >&-`
    with Path("/dev/full").open("w") as full:
        Outlet(full).say("too much")
        Outlet(full).say("and more")
    assert capfd.readouterr() == ("", "")


def test_without_any_standard_stream_it_serves() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "waterline", "up", "--port", str(port)]
    process = subprocess.Popen(["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *command], text=True)
    with process:
        try:
            service = Up(process=process, url=f"http://127.0.0.1:{port}/v1", children=[])
            begun_s = time.monotonic()
            while asyncio.run(health(service)) != 200:
                assert time.monotonic() - begun_s < 20
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


async def health(service: Up) -> int:
    """Return the status of /health, 0 while nobody listens."""
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(service.url.removesuffix("/v1") + "/health") as reply:
                return reply.status
        except aiohttp.ClientConnectorError:
            return 0


def test_the_last_words_know_what_replicas_cost_that_came_and_went() -> None:
    slos = load_fleet(LAPTOP).slos
    lent = Completion(
        tenant="public", model="abacus", replica="abacus/7", status="ok", arrival_s=0.0, first_token_s=0.1, finish_s=1.0,
        prompt_tokens=5, output_tokens=9, gpu_s=0.5,
    )  # fmt: skip
    usd = {"abacus/0": 0.25, "abacus/7": 0.125}
    assert "1 completed" in _goodbye(deque([lent]), slos, 10.0, usd, as_json=False)
    total, abacus = json.loads(_goodbye(deque([lent]), slos, 10.0, usd, as_json=True))["summaries"]
    assert (total["usd"], abacus["usd"]) == (pytest.approx(0.375), pytest.approx(0.125)), "nobody used the other"
