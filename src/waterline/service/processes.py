"""Who is running of those we have started: found by a mark in their environment and by descent, and ended to the last.

To signal a process group is not enough: ranks of a training run sit in sessions of their own and outlive the launcher
that was killed. Whoever inherits an environment inherits the mark in it, and whoever rewrites his own is still a child,
or of a session, of one who has it.

Linux tells all this in /proc. Elsewhere nobody is found, and the process group is all there is.
"""

import asyncio
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

MARK = "WATERLINE_OWNER"  # the environment variable: whose process it is
PROC = Path("/proc")
LOOK_EVERY_S = 0.05
KILL_ROUNDS = 10  # a process that forks all the time may be missed by one
KILL_WITHIN_S = 5.0  # a process that is still there so long after SIGKILL hangs in the kernel


class Process(NamedTuple):
    """One line of the process table."""

    pid: int
    parent: int
    session: int
    started: int  # in clock ticks since boot: with the pid it is nobody else
    ended: bool  # a zombie: it has nothing any more but its exit code


def census() -> dict[int, Process]:
    """Return all processes of this machine by pid."""
    processes = {}
    for entry in _listed():
        if entry.isdigit() and (process := find_process(int(entry))):
            processes[process.pid] = process
    return processes


def find_process(pid: int) -> Process | None:
    """Return a process; None when there is none of that number."""
    try:
        stat = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold anything
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), fields[0] in "ZX")


def marked(mark: str) -> list[Process]:
    """Return who runs with a mark, or with one that begins with it and a slash, and whoever descends from them."""
    processes = census()
    found = {pid for pid in processes if _bears(pid, mark)}
    sessions = {processes[pid].session for pid in found} - {os.getsid(0)}
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.pid)
        if process.session in sessions:
            found.add(process.pid)
    unseen = list(found)
    while unseen:
        fresh = set(children.get(unseen.pop(), ())) - found
        found |= fresh
        unseen += fresh
    found.discard(os.getpid())
    return [processes[pid] for pid in sorted(found) if not processes[pid].ended]


async def end_marked(mark: str, grace_s: float = 0.0) -> list[Process]:
    """End whoever bears a mark: politely, after the grace not; return who is left, which hangs in the kernel.

    Asked is who has no parent among them: he passes it on, or is alone. Whoever is asked twice may give up his work.
    """
    left = await asyncio.to_thread(marked, mark)
    if grace_s > 0.0:
        pids = {process.pid for process in left}
        send((process for process in left if process.parent not in pids), signal.SIGTERM)
    kill_s = time.monotonic() + grace_s
    while left and time.monotonic() < kill_s + KILL_WITHIN_S:
        if time.monotonic() >= kill_s:
            send(left, signal.SIGKILL)
        await asyncio.sleep(LOOK_EVERY_S)
        left = await asyncio.to_thread(marked, mark)
    return left


def kill_marked(mark: str) -> None:
    """End whoever bears a mark, on the spot; for when the event loop does not run any more."""
    for _ in range(KILL_ROUNDS):
        if not (left := marked(mark)):
            return
        send(left, signal.SIGKILL)
        time.sleep(LOOK_EVERY_S / 10)


def send(processes: Iterable[Process], number: int) -> None:
    """Send a signal to processes that may be gone by now; never to one that has got the number of one of them."""
    for process in processes:
        with suppress(OSError):
            descriptor = os.pidfd_open(process.pid)
            try:
                if (now := find_process(process.pid)) and now.started == process.started:
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)


def _listed() -> list[str]:
    try:
        return os.listdir(PROC)  # noqa: PTH208 - names, many of them
    except OSError:
        return []


def _bears(pid: int, mark: str) -> bool:
    """Whether a process was started with the mark. Another user's environment is closed to us, and not ours."""
    try:
        environment = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False
    wanted = f"{MARK}={mark}".encode()
    return any(
        variable == wanted or variable.startswith(wanted + b"/")
        for variable in environment.split(b"\0")
        if variable.startswith(wanted)
    )
