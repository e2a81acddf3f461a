"""How fakes hand over what they have read, as vLLM's NixlConnector and SGLang do; what goes over is a fingerprint.

One that reads keeps the caches of prompts for those who come to fetch them over HTTP, each once and within LEASE_S. One
that writes fetches the cache of its request before it goes on, and fails the request when it is not there or is that
of another prompt. What the requests say is as in `service.pairs`.
"""

import asyncio
import secrets
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from waterline.service.errors import RejectedError

LEASE_S = 30.0  # vLLM's; SGLang waits longer for those it is to meet
PATH = "/cache/"  # and the key of a cache
BLOCK_TOKENS = 16
TOLD = ("kv_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room")  # fields about caches


@dataclass(slots=True, eq=False)
class Cache:
    """One prompt that was read, or will be."""

    key: str
    until_s: float
    fingerprint: int = 0  # of the tokens, once they were read
    tokens: int = 0
    wanted: asyncio.Event = field(default_factory=asyncio.Event)  # somebody has come for it
    read: asyncio.Event = field(default_factory=asyncio.Event)


def fingerprint(prompt_ids: Sequence[int]) -> int:
    return zlib.crc32(orjson.dumps(list(prompt_ids)))


class Caches:
    """What one fake has read for others, or fetches from them.

    Args:
        host, port: where it listens.
        s_per_token: how long the cache of a token is under way.
        session: to ask others.
    """

    def __init__(self, host: str, port: int, s_per_token: float, session: aiohttp.ClientSession) -> None:
        self._host, self._port = host, port
        self._s_per_token = s_per_token
        self._session = session
        self._engine_id = secrets.token_hex(8)
        self._kept: dict[str, Cache] = {}

    # --- Of one that reads ------------------------------------------------------------------------------------------

    async def wait_for_writer(self, room: int) -> None:
        """Return when the one has come that is to write: before that, nothing is read at once with it."""
        await self._within(self._cache(f"room-{room}").wanted, f"Nobody has come to room {room}")

    def keep_for_room(self, room: int, prompt_ids: Sequence[int]) -> None:
        """Hand a cache to the one that waits for it."""
        _fill(self._cache(f"room-{room}"), prompt_ids)

    def keep(self, prompt_ids: Sequence[int]) -> dict[str, Any]:
        """Keep a cache until it is fetched, and return where it lies."""
        request_id = f"cmpl-{secrets.token_hex(12)}"
        _fill(self._cache(f"{self._engine_id}-{request_id}"), prompt_ids)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": list(range(-(-len(prompt_ids) // BLOCK_TOKENS))),
            "remote_engine_id": self._engine_id,
            "remote_request_id": request_id,
            "remote_host": self._host,
            "remote_port": self._port,
            "tp_size": 1,
        }

    async def give(self, key: str) -> dict[str, int]:
        """Return a cache to the one who has come for it, once it was read and sent. Raises RejectedError."""
        cache = self._cache(key) if key.startswith("room-") else self._kept.get(key)
        if not cache or cache.until_s < time.monotonic():
            raise RejectedError("There is no such cache any more.", status=404)
        cache.wanted.set()
        await self._within(cache.read, "The prompt was not read")
        await asyncio.sleep(cache.tokens * self._s_per_token)
        self._kept.pop(key, None)
        return {"fingerprint": cache.fingerprint}

    def _cache(self, key: str) -> Cache:
        """Return a cache that is kept, or expected from now on."""
        now_s = time.monotonic()
        for old in [one.key for one in self._kept.values() if one.until_s < now_s]:
            del self._kept[old]
        return self._kept.setdefault(key, Cache(key, now_s + LEASE_S))

    async def _within(self, event: asyncio.Event, problem: str) -> None:
        try:
            async with asyncio.timeout(LEASE_S):
                await event.wait()
        except TimeoutError:
            raise RejectedError(f"{problem} within {LEASE_S:g} s.", status=500) from None

    # --- Of one that writes -----------------------------------------------------------------------------------------

    async def fetch(self, fields: Mapping[str, Any], prompt_ids: Sequence[int]) -> bool:
        """Get the cache of a request from the one that has read it; False when it has to be read here.

        Raises RejectedError when it is not to be had: as with vLLM's policy "fail", somebody else decides what then.
        """
        told = fields.get("kv_transfer_params") or {}
        if "bootstrap_room" in fields:
            host, port, key = fields["bootstrap_host"], fields["bootstrap_port"], f"room-{fields['bootstrap_room']}"
        elif told.get("do_remote_prefill"):
            host, port = told["remote_host"], told["remote_port"]
            key = f"{told['remote_engine_id']}-{told['remote_request_id']}"
        else:
            return False
        try:
            async with self._session.get(f"http://{host}:{port}{PATH}{key}") as response:
                got = orjson.loads(await response.read()) if response.status == 200 else {}
        except (aiohttp.ClientError, OSError) as error:
            raise RejectedError(f"The cache at {host}:{port} cannot be fetched: {error}", status=500) from error
        if got.get("fingerprint") != fingerprint(prompt_ids):
            raise RejectedError(f"The cache at {host}:{port} is gone, or that of another prompt.", status=500)
        return True


def _fill(cache: Cache, prompt_ids: Sequence[int]) -> None:
    cache.fingerprint, cache.tokens = fingerprint(prompt_ids), len(prompt_ids)
    cache.read.set()
