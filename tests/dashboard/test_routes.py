"""The listener for operators over real HTTP."""

import asyncio
import json

import aiohttp
import msgspec
from msgspec.structs import replace
from stage import KEY, Script, quiet, shown, surge

from waterline.snapshot import Snapshot

BEARER = {"authorization": f"Bearer {KEY}"}


async def events(reply: aiohttp.ClientResponse, most: int) -> list[Snapshot]:
    found = []
    async for line in reply.content:
        if line.startswith(b"data: "):
            found.append(msgspec.json.decode(line[6:], type=Snapshot))
            if len(found) == most:
                break
    return found


def test_events_are_snapshots_without_clients_until_the_service_has_ended() -> None:
    async def case() -> None:
        script = Script()
        async with shown(script) as url, aiohttp.ClientSession() as session, session.get(f"{url}/events") as reply:
            assert reply.content_type == "text/event-stream"
            (first,) = await events(reply, 1)
            assert first == quiet().public_view()
            assert {queue.client for queue in first.queues} == {""}
            script.now = surge()
            (second,) = await events(reply, 1)
            assert second.waterline == 39 / 52
            script.now = replace(surge(), health="stopping")
            script.stopping.set()
            async with asyncio.timeout(0.9):  # without waiting for the next second
                (last,) = await events(reply, 1)
            assert last.health == "stopping"
            assert (await events(reply, 1))[0].health == "stopping", "until the service has ended"

    asyncio.run(case())


def test_who_leaves_is_forgotten_and_who_is_too_many_is_told() -> None:
    async def case() -> None:
        async with shown(Script()) as url, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            watching = [await session.get(f"{url}/events") for _ in range(200)]
            for reply in watching:
                await events(reply, 1)
            async with session.get(f"{url}/events") as reply:
                assert reply.status == 503
                assert "200 watch already" in await reply.text()
            for reply in watching:
                reply.close()
            async with asyncio.timeout(5):
                while True:
                    async with session.get(f"{url}/events") as reply:
                        if reply.status == 200:
                            break
                    await asyncio.sleep(0.05)

    asyncio.run(case())


def test_the_admin_api_answers_in_json() -> None:
    async def case() -> None:
        script = Script()
        async with shown(script) as url, aiohttp.ClientSession(headers=BEARER) as session:

            async def ask(method: str, path: str) -> tuple[int, object]:
                async with session.request(method, url + path) as reply:
                    assert reply.headers["cache-control"] == "no-store"
                    return reply.status, json.loads(await reply.text())

            async with session.get(f"{url}/admin/snapshot") as reply:
                whole = msgspec.json.decode(await reply.read(), type=Snapshot)
            assert {queue.client for queue in whole.queues} == {"alice", "bob"}
            status, said = await ask("POST", "/admin/replicas/small/0/drain")
            assert (status, said) == (200, {"replica": "small/0", "draining": True})
            assert await ask("POST", "/admin/replicas/small/0/undrain") == (
                200,
                {"replica": "small/0", "draining": False},
            )
            assert await ask("POST", "/admin/reload") == (200, {"reloaded": "1 replica more"})
            async with session.get(f"{url}/admin/decisions") as reply:
                assert (reply.content_type, await reply.text()) == ("application/x-ndjson", '{"rule":"slot free"}\n')
            assert await ask("GET", "/admin/usage?since=2026-11-01") == (
                200,
                {"usage": [{"tenant": "public", "since": "2026-11-01", "until": ""}]},
            )
            for method, path, expected in (
                ("POST", "/admin/replicas/none/drain", 404),
                ("GET", "/admin/usage?since=yesterday", 400),
                ("GET", "/admin/replicas/small/0/drain", 405),
                ("GET", "/nothing", 404),
            ):
                status, said = await ask(method, path)
                assert status == expected, path
                assert isinstance(said, dict)
                assert said["error"]["message"], path

    asyncio.run(case())


def test_a_browser_may_run_the_pages_own_script_and_load_nothing() -> None:
    async def case() -> None:
        async with shown(Script()) as url, aiohttp.ClientSession() as session, session.get(url) as reply:
            policy, page = reply.headers["content-security-policy"], await reply.text()
            assert policy.startswith("default-src 'none'; script-src 'sha256-")
            assert "unsafe" not in policy
            assert len(page.encode()) <= 40_000
            assert "http://" not in page.replace("http://www.w3.org/", "")
            assert "https://" not in page

    asyncio.run(case())


def test_a_bug_of_the_service_does_not_end_the_listener() -> None:
    async def case() -> None:
        script = Script()
        async with shown(script) as url, aiohttp.ClientSession() as session:
            script.metrics = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
            async with session.get(f"{url}/metrics") as reply:
                assert reply.status == 500
            async with session.get(f"{url}/snapshot") as reply:
                assert reply.status == 200

    asyncio.run(case())
