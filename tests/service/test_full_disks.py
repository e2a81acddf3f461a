"""A service on a disk that is full: it says so, loses no more than what found no room, and needs no help afterwards."""

import asyncio
import errno
import io
import os
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from serving import fake_plan, served

from waterline.dashboard import admin_key
from waterline.errors import InputError, PlanFileError
from waterline.ledger import Ledger
from waterline.service.minutes import _open_record
from waterline.service.server import Outlet
from waterline.service.state import claim_state


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_log_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as room, Path("/dev/full").open("w") as stream:
        outlet = Outlet(stream)
        outlet.say("lost")
        outlet.say("lost, too")
        os.dup2(room.fileno(), stream.fileno())
        outlet.say("kept")
    assert (tmp_path / "log").read_bytes() == b"kept\n"


def test_a_state_directory_without_room_is_claimed_and_what_moves_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "write", no_room)
    with claim_state("box") as state:
        assert state.path.name == "box"

        def refuse(_plan: object, path: Path) -> None:
            raise PlanFileError(f"cannot write {path}")

        monkeypatch.setattr("waterline.service.minutes.write_plan", refuse)
        signals, decisions = _open_record(state.path, fake_plan(), 0.0)
        with signals, decisions:
            assert (signals.name, decisions.name) == (os.devnull, os.devnull)


def test_half_an_admin_key_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATERLINE_ADMIN_KEY", raising=False)
    with monkeypatch.context() as full:
        full.setattr("waterline.dashboard.access.secrets.token_urlsafe", no_room)
        with pytest.raises(InputError, match="No space left on device"):
            admin_key(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(admin_key(tmp_path)) > 16


def test_a_file_that_finds_no_room_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waterline.ledger.files.add_file", no_room)

    async def case() -> None:
        with Ledger.open(str(tmp_path / "ledger.db")) as ledger:
            async with served(fake_plan(), start=False, ledger=ledger) as service, aiohttp.ClientSession() as session:
                form = {"purpose": "batch", "file": io.BytesIO(b"{}")}
                async with session.post(f"{service.url}/v1/files", data=form) as reply:
                    said = await reply.json()
                    assert (reply.status, said["error"]["code"]) == (503, "no_room")

    asyncio.run(case())
