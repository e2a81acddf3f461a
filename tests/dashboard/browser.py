"""A headless Chromium, spoken to over its DevTools protocol: what a person sees of a page, without a driver to install."""

import asyncio
import base64
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """Return the program, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[str]:
    """Run a browser for the block; yield the address it is spoken to at."""
    program = chromium()
    assert program
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--disable-gpu"]
        flags += ["--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-sync"]
        flags += ["--no-sandbox", "--disable-dev-shm-usage"] if os.geteuid() == 0 else []
        with subprocess.Popen([program, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                yield f"http://127.0.0.1:{_port(Path(profile) / 'DevToolsActivePort')}"
            finally:
                process.terminate()


def _port(said: Path) -> int:
    until_s = time.monotonic() + 30
    while time.monotonic() < until_s:
        if said.exists() and (lines := said.read_text().split()):
            return int(lines[0])
        time.sleep(0.02)
    raise TimeoutError("Chromium did not say its port within 30 s.")


class Tab:
    """One page, and what went wrong in it."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.problems: list[str] = []  # errors and what the console was told
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.ensure_future(self._read())

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(20):
            return await self._answers[number]

    async def run(self, script: str) -> Any:
        """Return what an expression is worth; a promise is waited for."""
        done = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "result" in done, f"{script}: {done}"  # the page may have been left meanwhile
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    async def until(self, script: str, within_s: float = 10.0) -> None:
        """Wait for an expression to become true."""
        try:
            async with asyncio.timeout(within_s):
                while True:
                    with suppress(AssertionError):  # a page that is left or not there yet knows nothing
                        if await self.run(script):
                            return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"not within {within_s} s: {script}. The page says:\n{await self.text()}") from None

    async def text(self) -> str:
        return str(await self.run("document.body.innerText"))

    async def key(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        for kind in ("rawKeyDown", "char", "keyUp") if key == "Enter" else ("rawKeyDown", "keyUp"):
            text = {"text": "\r"} if kind == "char" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    async def look(self, *, width: int = 1100, height: int = 900, dark: bool = False) -> None:
        """Choose the size and the theme."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[theme])

    async def screenshot(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))  # noqa: ASYNC240 - small

    async def _read(self) -> None:
        async for message in self._socket:
            said = message.json()
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said.get("result", said))
            elif said["method"] == "Runtime.exceptionThrown":
                self.problems.append(str(said["params"]["exceptionDetails"]))
            elif said["method"] == "Log.entryAdded" and said["params"]["entry"]["source"] != "network":
                self.problems.append(str(said["params"]["entry"]["text"]))


@asynccontextmanager
async def tab(address: str, url: str) -> AsyncIterator[Tab]:
    """Open a page in a browser for the block."""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{address}/json/new?about:blank") as reply:
            target = await reply.json()
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            page = Tab(socket)
            for domain in ("Page", "Runtime", "Log"):
                await page.call(f"{domain}.enable")
            await page.look()
            await page.call("Page.navigate", url=url)
            await page.until("document.readyState === 'complete' && location.protocol !== 'about:'")
            try:
                yield page
            finally:
                async with session.get(f"{address}/json/close/{target['id']}"):
                    pass
