"""Who may see and do what: on this machine, from elsewhere, with a key and without."""

import asyncio
import stat
from base64 import b64encode
from pathlib import Path

import aiohttp
import pytest
from stage import KEY, Script, shown

from waterline.dashboard import admin_key, is_loopback
from waterline.errors import InputError

BEARER = {"authorization": f"Bearer {KEY}"}
PASSWORD = {"authorization": "Basic " + b64encode(f"ops:{KEY}".encode()).decode()}
ELSEWHERE = "0.0.0.0"  # what the listener is said to be bound to
LOOK = ("/", "/snapshot", "/metrics", "/events")
KEYED = ("/admin/snapshot", "/admin/decisions", "/admin/keys", "/admin/usage")
CHANGE = (("POST", "/admin/replicas/small/0/drain"), ("POST", "/admin/reload"), ("DELETE", "/admin/keys/key-1"))


def statuses(bound_to: str, requests: list[tuple[str, str, dict[str, str]]]) -> tuple[list[int], list[str]]:
    """Return the status of each request, and what was done."""

    async def case() -> tuple[list[int], list[str]]:
        script = Script()
        async with shown(script, bound_to=bound_to) as url, aiohttp.ClientSession() as session:
            found = []
            for method, path, headers in requests:
                async with session.request(method, url + path, headers=headers) as reply:
                    found.append(reply.status)
            return found, script.asked

    return asyncio.run(case())


def test_on_this_machine_totals_need_no_key() -> None:
    assert statuses("127.0.0.1", [("GET", path, {}) for path in LOOK])[0] == [200] * 4


def test_from_elsewhere_everything_needs_the_key() -> None:
    wrong = {"authorization": "Bearer an-admin-key-for-tesst"}
    for headers, status in (({}, 401), (wrong, 401), (BEARER, 200), (PASSWORD, 200)):
        assert statuses(ELSEWHERE, [("GET", path, headers) for path in LOOK])[0] == [status] * 4, headers


def test_another_name_for_this_machine_or_a_proxy_in_between_is_elsewhere() -> None:
    rebound = {"host": "evil.example:8001"}
    for headers in (
        rebound,
        {"x-forwarded-for": "203.0.113.7"},
        {"forwarded": "for=203.0.113.7"},
        {"via": "1.1 caddy"},
    ):
        assert statuses("127.0.0.1", [("GET", "/snapshot", headers)])[0] == [401], headers
        assert statuses("127.0.0.1", [("GET", "/snapshot", headers | BEARER)])[0] == [200], headers
    for name in ("localhost:8001", "[::1]:8001", "127.0.0.1"):
        assert statuses("127.0.0.1", [("GET", "/snapshot", {"host": name})])[0] == [200], name


def test_what_names_clients_needs_the_key_here_too() -> None:
    for headers, status in (({}, 401), (PASSWORD, 200), (BEARER, 200)):
        assert statuses("127.0.0.1", [("GET", path, headers) for path in KEYED])[0] == [status] * len(KEYED)


def test_what_changes_something_takes_no_password_that_a_browser_sends_by_itself() -> None:
    for headers in ({}, PASSWORD):
        refused, done = statuses("127.0.0.1", [(method, path, headers) for method, path in CHANGE])
        assert (refused, done) == ([401] * 3, [])
    allowed, done = statuses("127.0.0.1", [(method, path, BEARER) for method, path in CHANGE])
    assert (allowed, done) == ([200] * 3, ["drain small/0", "reload", "revoke key-1"])


def test_the_key_is_made_once_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    first = admin_key(folder)
    assert len(first) > 40
    assert admin_key(folder) == first
    assert stat.S_IMODE((folder / "admin-key").stat().st_mode) == 0o600
    assert admin_key(tmp_path / "another") != first


def test_a_key_of_the_environment_wins_and_must_be_long_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATERLINE_ADMIN_KEY", "x" * 16)
    assert admin_key(tmp_path) == "x" * 16
    assert not (tmp_path / "admin-key").exists()
    monkeypatch.setenv("WATERLINE_ADMIN_KEY", "short")
    with pytest.raises(InputError, match="has 5 characters|of 5 characters"):
        admin_key(tmp_path)


def test_a_key_that_cannot_be_kept_says_where_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="WATERLINE_ADMIN_KEY"):
        admin_key(tmp_path / "file")


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("[::1]", True), ("localhost", True), ("LOCALHOST", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.evil.example", False), ("", False)],
)  # fmt: skip
def test_loopback_is_known_by_its_addresses(host: str, here: bool) -> None:
    assert is_loopback(host) == here
