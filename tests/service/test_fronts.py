"""The front ends of examples/deploy, as they are given to people: a real nginx and a real Caddy before the service."""

import asyncio
import getpass
import grp
import io
import json
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from msgspec.structs import replace
from serving import QUESTION, engine_that, fake_plan, served, until

from waterline.fleet import Tenant

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
BODY = {"model": "chat", "messages": QUESTION}
EVENTS = 20
WITHIN_S = 30.0  # of what takes milliseconds, on a machine that is busy


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a certificate of localhost and its key, as certbot calls them."""
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("there is no openssl: apt-get install openssl")
    folder = tmp_path_factory.mktemp("certificate")
    names = ("-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem")
    kind = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1")
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    subprocess.run([openssl, "req", *kind, *subject, *names], check=True, capture_output=True)
    return folder


def nginx(folder: Path, certificate: Path, upstream: int, port: int) -> list[str]:
    """Write what is around the shipped file, and the ports and paths of a test into it; return the command."""
    site = (DEPLOY / "nginx.conf").read_text()
    for ours, theirs in (
        ("listen 443 ", f"listen 127.0.0.1:{port} "),
        ("server 127.0.0.1:8000;", f"server 127.0.0.1:{upstream};"),
        ("/etc/letsencrypt/live/llm.example.com", str(certificate)),
    ):
        assert ours in site
        site = site.replace(ours, theirs)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"user {getpass.getuser()} {grp.getgrgid(os.getgid()).gr_name}; daemon off; worker_processes 1; pid {folder}/pid; error_log stderr; events {{ }}\n"
        f"http {{ access_log off; {temporary}\n{site}}}\n"
    )
    return ["-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]


def caddy(folder: Path, certificate: Path, upstream: int, port: int) -> list[str]:
    site = (DEPLOY / "Caddyfile").read_text()
    for ours, theirs in (
        (
            "{$DOMAIN:llm.example.com} {",
            f"localhost:{port} {{\n\ttls {certificate}/fullchain.pem {certificate}/privkey.pem",
        ),
        ("{$UPSTREAM:127.0.0.1:8000}", f"127.0.0.1:{upstream}"),
    ):
        assert ours in site
        site = site.replace(ours, theirs)
    (folder / "Caddyfile").write_text(f"{{\n\tadmin off\n\tauto_https off\n}}\n{site}")
    return ["run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


FRONTS = {"nginx": nginx, "caddy": caddy}


@pytest.fixture(params=sorted(FRONTS))
def front(request: pytest.FixtureRequest, certificate: Path, tmp_path: Path) -> Callable[[int], "Front"]:
    """Return how to start it before a port."""
    name = request.param
    program = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if not program:
        pytest.skip(f"there is no {name}: apt-get install {name}")
    context = ssl.create_default_context(cafile=certificate / "fullchain.pem")

    def start(upstream: int) -> Front:
        return Front(
            program, FRONTS[name](tmp_path, certificate, upstream, port := free_port()), tmp_path, port, context
        )

    return start


class Front:
    """A front end that runs for the length of a block, and its clients."""

    def __init__(self, program: str, arguments: list[str], folder: Path, port: int, context: ssl.SSLContext) -> None:
        self._command = [program, *arguments]
        self._folder = folder
        self.port = port
        self.context = context

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[aiohttp.ClientSession]:
        home = {"HOME": str(self._folder), "XDG_DATA_HOME": str(self._folder), "XDG_CONFIG_HOME": str(self._folder)}
        log = (self._folder / "log").open("wb")
        process = await asyncio.create_subprocess_exec(*self._command, env=home, stdout=log, stderr=log)
        try:
            await until(lambda: process.returncode is not None or is_listening(self.port))
            assert process.returncode is None, (self._folder / "log").read_text()
            connector = aiohttp.TCPConnector(ssl=self.context, limit=0)
            url = f"https://localhost:{self.port}"
            async with aiohttp.ClientSession(url, connector=connector) as session:
                yield session
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
            log.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port)).close()
        return True
    return False


class Engine:
    """An engine that says a word when the last one has arrived, and notes when nobody listens any more."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.asked = asyncio.Event()
        self.left = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.set()
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if body.get("stream"):
            await reply.prepare(request)
            for number in range(EVENTS):
                await reply.write(event({"content": f"{number} "}))
                if not await self._heard(request):
                    return reply
            await reply.write(event({}, "stop") + b"data: [DONE]\n\n")
        else:
            await self._heard(request)
        return reply

    async def _heard(self, request: web.Request) -> bool:
        """Wait until the last word has arrived, or nobody is there to hear the next one; return which."""
        await until(lambda: self.arrived.is_set() or request.transport is None or request.transport.is_closing())
        heard = self.arrived.is_set()
        (self.arrived.clear if heard else self.left.set)()
        return heard


def event(delta: dict[str, str], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return f"data: {json.dumps({'id': 'a', 'model': 'chat', 'choices': [choice]})}\n\n".encode()


async def comes_word_by_word(clients: aiohttp.ClientSession, engine: Engine) -> None:
    """Ask for a stream; a front that keeps words back until there are more waits for ever."""
    words = 0
    async with clients.post("/v1/chat/completions", json={**BODY, "stream": True}) as reply:
        assert reply.status == 200
        async for line in reply.content:
            if b'"content"' in line:
                words += 1
                engine.arrived.set()
    assert words == EVENTS


async def who_leaves_is_missed(front: Front, engine: Engine, *, stream: bool) -> None:
    """Ask, hang up as a program does that is ended, and wait until the engine knows."""
    engine.asked.clear()
    engine.left.clear()
    body = json.dumps({**BODY, "stream": stream}).encode()
    _, writer = await asyncio.open_connection("localhost", front.port, ssl=front.context)
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    )
    writer.write(body)
    await engine.asked.wait()
    writer.transport.abort()
    await engine.left.wait()


async def read(clients: aiohttp.ClientSession, path: str, body: io.BytesIO | None = None) -> tuple[int, str]:
    async with clients.request("POST" if body else "GET", path, data=body) as reply:
        return reply.status, await reply.text()


def test_words_go_out_as_they_come_who_leaves_is_missed_and_nothing_but_the_api_is_shown(
    front: Callable[[int], Front],
) -> None:
    async def case() -> None:
        engine = Engine()
        async with engine_that(engine.answer) as url:
            plan = fake_plan(engine="openai", urls=(url,))
            async with served(plan) as service, (one := front(port_of(service.url))).clients() as clients:
                async with asyncio.timeout(WITHIN_S):
                    await comes_word_by_word(clients, engine)
                    await who_leaves_is_missed(one, engine, stream=True)
                    await who_leaves_is_missed(one, engine, stream=False)
                for path, status in {"/health": 200, "/v1/models": 200, "/": 404, "/metrics": 404, "/v1": 404}.items():
                    assert (await read(clients, path))[0] == status, path
                too_long = b'{"model": "chat", "prompt": "' + b"a" * 17 * 1024**2 + b'"}'
                status, said = await read(clients, "/v1/completions", io.BytesIO(too_long))
                assert status == 413
                assert json.loads(said)["error"]["code"] == "body_too_large", "Waterline's words, not the front's"

    asyncio.run(case())


def test_a_fleet_that_is_open_to_its_own_machine_alone_is_not_open_through_a_front(
    front: Callable[[int], Front],
) -> None:
    async def case() -> tuple[int, str]:
        plan, local = fake_plan(), Tenant(name="public", deserved=1.0, anonymous="local")
        plan = replace(plan, fleet=replace(plan.fleet, tenants=(local,), demand=()))
        async with served(plan, start=False) as service, front(port_of(service.url)).clients() as clients:
            return await read(clients, "/v1/chat/completions", io.BytesIO(json.dumps(BODY).encode()))

    status, said = asyncio.run(case())
    assert status == 401
    assert "a proxy passed it on" in said


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])
