"""A new plan file while the service runs: noticed, read, and moved to; a wrong one is said, and nothing changes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import structlog

from waterline.errors import WaterlineError
from waterline.plan import Plan
from waterline.service.keeper import Keeper

LOOK_EVERY_S = 1.0

log = structlog.get_logger()

Signature = tuple[int, ...]


def signature(path: Path) -> Signature:
    """Return what changes when a file is written; nothing while it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


async def changes(path: Path, hangup: asyncio.Event, every_s: float = LOOK_EVERY_S) -> AsyncIterator[None]:
    """Yield whenever a file has changed and is quiet again for one look, or `hangup` was set."""
    known = before = signature(path)
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(every_s):
                await hangup.wait()
        now = signature(path)
        if hangup.is_set() or (now and now != known and now == before):
            hangup.clear()
            known = now
            yield
        before = now


async def keep_to_file(
    path: Path,
    read: Callable[[], Plan],
    keeper: Keeper,
    hangup: asyncio.Event,
    every_s: float = LOOK_EVERY_S,
    on_plan: Callable[[Plan], None] = lambda _plan: None,
) -> None:
    """Follow a plan or fleet file for ever.

    Args:
        path: the file.
        read: returns the plan that it says now, or raises WaterlineError. Called in a thread: it may plan.
        keeper: who moves to it.
        hangup: set by who wants the file read again though it has not changed.
        every_s: how often the file is looked at.
        on_plan: told of each plan that is moved to; called in a thread.
    """
    moving: asyncio.Task[None] | None = None
    try:
        async for _ in changes(path, hangup, every_s):
            try:
                plan = await asyncio.to_thread(read)
            except WaterlineError as error:
                log.error("the new plan cannot be used, the old one stays", reason=str(error))  # noqa: TRY400 - a slip
                continue
            if moving:  # it begins anew from what runs now
                moving.cancel()
                await asyncio.gather(moving, return_exceptions=True)
            moving = asyncio.create_task(_move(keeper, plan, on_plan))
    finally:
        if moving:
            moving.cancel()


async def _move(keeper: Keeper, plan: Plan, on_plan: Callable[[Plan], None]) -> None:
    try:
        await keeper.move_to(plan)
        await asyncio.to_thread(on_plan, plan)
    except WaterlineError as error:
        log.error("the new plan cannot be used, the old one stays", reason=str(error))  # noqa: TRY400 - a slip
    except Exception:
        log.exception("a bug in the move to a new plan")
