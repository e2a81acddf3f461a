"""Who is let in, as whom, and to which models."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
from serving import LAPTOP, QUESTION, Served, fake_plan, served

from waterline.fleet import Fleet, Tenant, load_fleet
from waterline.ledger import Key, Ledger
from waterline.plan import Plan
from waterline.service.access import Access, anonymous_tenant, line_of
from waterline.service.asgi import HttpServer
from waterline.service.errors import RejectedError
from waterline.service.server import is_loopback, listen

LOCAL = Tenant(name="public", deserved=1.0, anonymous="local")
TENANTS = (Tenant(name="enterprise", deserved=0.5), Tenant(name="public", deserved=0.5, anonymous=True))


def plan_for(*tenants: Tenant, models: dict[str, int] | None = None) -> Plan:
    plan = fake_plan(models)
    return msgspec.structs.replace(plan, fleet=msgspec.structs.replace(plan.fleet, tenants=tenants))


def fleet_of(*tenants: Tenant) -> Fleet:
    return plan_for(*tenants).fleet


def key(secret: str, **changes: Any) -> tuple[str, Key]:
    fields = {"id": "k1", "prefix": secret[:9], "tenant": "enterprise", "client": "acme", "created_us": 0}
    return secret, Key(**{**fields, **changes})


class Known:
    """Keys by their secrets."""

    def __init__(self, *keys: tuple[str, Key]) -> None:
        self.keys = dict(keys)

    def find_key(self, secret: str) -> Key | None:
        return self.keys.get(secret)


def scope(authorization: str = "") -> dict[str, Any]:
    headers = [(b"authorization", authorization.encode("latin-1"))] if authorization else []
    return {"headers": headers, "client": ("10.0.0.7", 4711)}


def test_a_key_stands_for_its_tenant_and_client() -> None:
    access = Access(fleet_of(*TENANTS), Known(key("wl-secret")), loopback=False)
    caller = access.caller(scope("Bearer wl-secret"))
    assert (caller.tenant, caller.client, caller.line) == ("enterprise", "acme", "acme")
    assert access.caller(scope("bearer  wl-secret ")).client == "acme"


@pytest.mark.parametrize(
    ("authorization", "says"),
    [
        ("", "There is no key"),
        ("Basic d2w6", "That is no key"),
        ("Bearer wl-other", "not valid"),
        ("Bearer other", "not valid"),
        ("Bearer " + "x" * 300, "That is no key"),
        ("Bearer wl-\xe9", "That is no key"),
        ("Bearer wl-revoked", "wl-revoke… has been revoked"),
    ],
)
def test_without_a_valid_key_the_answer_is_401_and_says_why(authorization: str, says: str) -> None:
    access = Access(fleet_of(TENANTS[0]), Known(key("wl-revoked", revoked_us=1)), loopback=True)
    with pytest.raises(RejectedError, match=says) as caught:
        access.caller(scope(authorization))
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


def test_a_key_of_a_tenant_that_the_fleet_does_not_name_is_told_so_with_403() -> None:
    access = Access(fleet_of(*TENANTS), Known(key("wl-gone", tenant="marketing")), loopback=True)
    with pytest.raises(RejectedError, match="wl-gone… is of the tenant 'marketing', which is not in this") as caught:
        access.caller(scope("Bearer wl-gone"))
    assert (caught.value.status, caught.value.code) == (403, "tenant_not_served")


def test_without_a_key_one_is_the_anonymous_tenants_and_waits_in_the_line_of_its_address() -> None:
    access = Access(fleet_of(*TENANTS), Known(), loopback=False)
    for authorization in ("", "Bearer none", "Basic d2w6"):
        caller = access.caller(scope(authorization))
        assert (caller.tenant, caller.client, caller.line) == ("public", "anonymous", "10.0.0.7")
    with pytest.raises(RejectedError, match="not valid"):  # it was meant to be a key of ours
        access.caller(scope("Bearer wl-mistyped"))


def test_an_address_is_one_subscriber() -> None:
    assert [line_of(address) for address in ("10.0.0.7", "::ffff:10.0.0.7", "2001:db8::1", "2001:db8::ffff:2")] == [
        "10.0.0.7", "10.0.0.7", "2001:db8::/64", "2001:db8::/64",
    ]  # fmt: skip
    assert [line_of(address) for address in ("2001:db8:0:1::1", "fe80::1%eth0", "unknown", "")] == [
        "2001:db8:0:1::/64", "fe80::/64", "anonymous", "anonymous",
    ]  # fmt: skip


def test_a_fleet_that_names_no_tenants_is_open_to_its_own_machine_alone() -> None:
    default, named = load_fleet(LAPTOP), fleet_of(*TENANTS)
    assert [(tenant.name, tenant.anonymous) for tenant in default.tenants] == [("public", "local")]
    assert [anonymous_tenant(default, loopback=loopback) for loopback in (True, False)] == ["public", ""]
    assert [anonymous_tenant(named, loopback=loopback) for loopback in (True, False)] == ["public", "public"]
    assert anonymous_tenant(fleet_of(TENANTS[0]), loopback=True) == ""
    assert [is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "0.0.0.0", "::", "192.168.0.1")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_clients_of_openai_see_keys_as_openai_has_them() -> None:
    async def case() -> None:
        plan = plan_for(TENANTS[0], Tenant(name="public", deserved=0.5), models={"chat": 1, "code": 1})
        async with served(plan, start=False) as service:
            service.gateway.access._keys = Known(key("wl-chat", models=("chat",)))
            with pytest.raises(openai.AuthenticationError) as caught:
                await service.openai.chat.completions.create(model="chat", messages=QUESTION)
            assert caught.value.code == "invalid_api_key"
            assert caught.value.response.headers["www-authenticate"].startswith("Bearer")
            with pytest.raises(openai.AuthenticationError):
                await service.openai.models.list()
            client = service.openai.with_options(api_key="wl-chat")
            assert [model.id async for model in client.models.list()] == ["chat"]
            with pytest.raises(openai.PermissionDeniedError, match="is not for 'code', but for chat"):
                await client.chat.completions.create(model="code", messages=QUESTION)
            with pytest.raises(openai.InternalServerError, match="not ready"):
                await client.chat.completions.create(model="chat", messages=QUESTION)

    asyncio.run(case())


def test_a_body_is_not_read_of_who_is_not_let_in() -> None:
    async def endless() -> Any:
        while True:
            yield b" " * 1024
            await asyncio.sleep(0.01)

    async def case() -> None:
        url = "/v1/chat/completions"
        async with (
            served(plan_for(TENANTS[0]), start=False) as service,
            aiohttp.ClientSession() as session,
            asyncio.timeout(5),
            session.post(service.url + url, data=endless()) as reply,
        ):
            assert reply.status == 401

    asyncio.run(case())


def test_every_reply_has_a_request_id_the_clients_own_where_that_is_sane(tmp_path: Path) -> None:
    async def case() -> None:
        with Ledger.open(str(tmp_path / "ledger.db")) as ledger:
            async with served(fake_plan(), start=False, ledger=ledger) as service, aiohttp.ClientSession() as session:
                await ask(service, session)

    async def ask(service: Served, session: aiohttp.ClientSession) -> None:
        cases = [("/health", "mine-1.2:3"), ("/nowhere", "bad id"), ("/v1/models", "x" * 200), ("/health", "")]
        cases += [("/v1/files", "bad id"), ("/v1/batches/none", "")]
        seen = []
        for path, sent in cases:
            async with session.get(service.url + path, headers={"x-request-id": sent} if sent else {}) as reply:
                seen.append(reply.headers["x-request-id"])
        assert seen[0] == "mine-1.2:3"
        assert len(set(seen)) == len(seen)
        assert not {"bad id", "x" * 200} & set(seen)

    asyncio.run(case())


@pytest.mark.parametrize(
    ("headers", "local"),
    [
        ([(b"host", b"127.0.0.1:8000")], True),
        ([(b"host", b"LocalHost")], True),
        ([(b"host", b"[::1]:8000")], True),
        ([], True),
        ([(b"host", b"127.0.0.1.evil.example")], False),
        ([(b"host", b"evil.example:8000")], False),
        ([(b"host", b"127.0.0.1:8000"), (b"x-forwarded-for", b"203.0.113.7")], False),
        ([(b"host", b"localhost"), (b"via", b"1.1 front")], False),
    ],
)
def test_a_request_is_of_this_machine_when_it_says_so_and_no_proxy_passed_it_on(
    headers: list[tuple[bytes, bytes]], local: bool
) -> None:
    access = Access(fleet_of(LOCAL), Known(), loopback=True)
    request = {"headers": headers, "client": ("127.0.0.1", 4711)}
    if local:
        assert access.caller(request).tenant == "public"
    else:
        with pytest.raises(RejectedError, match="comes from elsewhere"):
            access.caller(request)
    for tenants in (TENANTS, (Tenant(name="public", deserved=1.0, anonymous=True),)):  # what is assumed, but said
        access = Access(fleet_of(*tenants), Known(), loopback=True)
        assert access.caller(request).tenant == "public", "it is for everybody"


def test_only_a_proxy_that_was_named_is_believed_who_its_clients_are() -> None:
    async def line(proxies: tuple[str, ...]) -> str:
        seen: list[str] = []

        async def app(scope: Any, _receive: Any, send: Any) -> None:
            seen.append(scope["client"][0])
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        listening = listen("127.0.0.1", 0)
        server = HttpServer(app, proxies=proxies)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
            async with session.get(url, headers={"x-forwarded-for": "1.2.3.4, 203.0.113.7"}):
                pass
        server.should_exit = True
        await serving
        return seen[0]

    assert asyncio.run(line(())) == "127.0.0.1"
    assert asyncio.run(line(("10.0.0.1",))) == "127.0.0.1"
    assert asyncio.run(line(("127.0.0.0/8",))) == "203.0.113.7"
