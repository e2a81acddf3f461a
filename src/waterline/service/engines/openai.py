"""Somebody else's server that speaks OpenAI's API: attached by its URL, never started or stopped."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import aiohttp
import orjson

from waterline.errors import EngineError
from waterline.fleet import Model
from waterline.plan import Plan, Replica
from waterline.service.engines import ANSWER_S, NotReadyError, ask
from waterline.service.engines.dialect import OPENAI, OWNERS, Dialect
from waterline.service.engines.seat import Seat

FAULTS = {"context length": "context_length_exceeded", "context size": "context_length_exceeded"}  # vLLM's, llama.cpp's


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A running server."""

    url: str
    name: str
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    input: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    faults: Mapping[str, str] = field(default_factory=lambda: FAULTS)
    owners: list[str] = field(default_factory=list, compare=False)  # as it calls itself, once it was asked
    lacks: list[bool] = field(default_factory=list, compare=False)  # whether it has no /responses, likewise
    start_within_s: float = 0.0

    @property
    def dialect(self) -> Dialect:
        dialect = _dialect_of(self.owners)
        return replace(dialect, responses=False) if dialect.responses and self.lacks != [False] else dialect

    async def served_name(self, session: aiohttp.ClientSession, url: str) -> str:
        """Return our name for the model when the server knows it; else the name of the only one it serves."""
        owners = _models(await ask(session, url, "/models", self.headers), url)
        names = list(owners)
        owner = [owners.get(self.name, next(iter(owners.values()), ""))]
        if owner != self.owners or not self.lacks:
            self.owners[:] = owner
            self.lacks[:] = [_dialect_of(owner).responses and await _lacks_responses(session, url, self.headers)]
        if self.name in names:
            return self.name
        if len(names) == 1:
            return names[0]
        raise NotReadyError(f"{url} serves {', '.join(names) or 'no model'}, none called '{self.name}'. Name it so.")


def _dialect_of(owners: list[str]) -> Dialect:
    return OWNERS.get(owners[0], OPENAI) if owners else OPENAI


async def _lacks_responses(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> bool:
    """Ask for a response without saying for which: who makes them says what is missing, and who does not, 404."""
    try:
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with session.post(f"{url}/responses", json={}, headers=headers, timeout=timeout) as reply:
            return reply.status not in {400, 422}
    except (aiohttp.ClientError, OSError):
        return True


def prepare(plan: Plan, replica: Replica, _seat: Seat | None = None) -> Attached:
    url = plan.fleet.model(replica.model).url.rstrip("/")
    if not url:
        raise EngineError(
            f"model '{replica.model}' does not say which server to attach to. Write engine = \"openai\" and "
            'url = "http://…/v1" in the fleet file.'
        )
    return Attached(url=url, name=replica.model, headers=_key(plan.fleet.model(replica.model)))


def _key(model: Model) -> dict[str, str]:
    if not model.api_key_env:
        return {}
    key = os.environ.get(model.api_key_env)
    if not key:
        raise EngineError(
            f"model '{model.name}' says api_key_env = \"{model.api_key_env}\", but there is no such environment "
            f"variable. Set it: export {model.api_key_env}=…"
        )
    return {"authorization": f"Bearer {key}"}


def _models(data: bytes, url: str) -> dict[str, str]:
    """Return the names of the models a server has, and whose they are, as it says."""
    try:
        return {str(model["id"]): str(model.get("owned_by")) for model in orjson.loads(data)["data"]}
    except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise NotReadyError(f"{url}/models does not list models as OpenAI does.") from error
