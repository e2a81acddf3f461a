"""Holds one run of a job: starts its command, and does not leave before everything that came of it has ended.

A file of its own that needs nothing but Python, because a run may well outlive the service for the length of its grace.
Called as ``python -I -S holder.py GRACE_S COMMAND…``; standard input is the line to whoever started it:

- a line with a number: end it, within so many seconds;
- the end of input, or SIGTERM: whoever started us is gone; end it within GRACE_S.

To end it means SIGTERM to the command's process group, who pass it on as they do, and SIGKILL to all that is left when
the time is up. Linux hands every orphan below us to us (a subreaper), so nobody gets lost however they fork, in
whatever session: when we have no child any more, nothing is left. Our exit code is the command's, 128 and more by a
signal.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of <linux/prctl.h>
CANNOT_START = 127  # what a shell says
LOOK_EVERY_S = 0.05
LISTEN_S = 3600.0  # a run may take days; whatever happens wakes us
NEVER_S = float("inf")


def main() -> int:
    """Run the command line to its end; return its exit code."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1)
    line = Line(float(sys.argv[1]))
    try:
        first = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - as asked
    except OSError as error:
        sys.stderr.write(f"cannot start {sys.argv[2]}: {error.strerror}\n")
        return CANNOT_START
    return _hold(first.pid, line)


def _hold(first: int, line: "Line") -> int:
    code, kill_s = None, NEVER_S
    while True:
        ended = _reap(first)
        if ended is not None:
            code = ended
            if kill_s == NEVER_S:  # whoever it has left behind has no business any more
                kill_s = time.monotonic() + line.grace_s
                _signal(_descendants(), signal.SIGTERM)
        if not _have_children():
            return CANNOT_START if code is None else code
        if time.monotonic() >= kill_s:
            _signal(_descendants(), signal.SIGKILL)
            if sys.platform != "linux" and code is None:  # without /proc its group is all we know
                _signal_group(first, signal.SIGKILL)
        within_s = line.wait(LISTEN_S if kill_s == NEVER_S else LOOK_EVERY_S)
        if within_s is not None:
            if kill_s == NEVER_S:
                _signal_group(first, signal.SIGTERM)
            kill_s = min(kill_s, time.monotonic() + within_s)


class Line:
    """What we are told: by standard input, and by signals."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self._said = b""
        self._asked = False
        self._wakes, wake = os.pipe()
        for end in (self._wakes, wake):
            os.set_blocking(end, False)
        self._sources = [0, self._wakes]
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # it wakes us

    def wait(self, most_s: float) -> float | None:
        """Wait until something happens; return within how many seconds to end the run, None when nobody wants it."""
        ready, _, _ = select.select(self._sources, [], [], most_s)
        if self._wakes in ready:
            os.read(self._wakes, 4096)
        if self._asked:
            self._asked = False
            return self.grace_s
        if 0 not in ready:
            return None
        data = os.read(0, 4096)
        if not data:
            self._sources = [self._wakes]
            return self.grace_s
        self._said += data
        if not self._said.endswith(b"\n"):
            return None
        within_s, self._said = float(self._said.split()[-1]), b""
        return within_s

    def _ask(self, *_: object) -> None:
        self._asked = True


def _reap(first: int) -> int | None:
    """Take the exit codes of all who have ended; return that of the command if it is among them."""
    code = None
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == first:
                code = os.waitstatus_to_exitcode(ended[1])
    return code if code is None or code >= 0 else 128 - code


def _have_children() -> bool:
    """Whether anybody is left, dead or alive, who has not been reaped."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc") if sys.platform == "linux" else ():  # noqa: PTH208 - names, many of them
        with suppress(OSError, ValueError):
            pid = int(entry)
            with open(f"/proc/{pid}/stat", errors="replace") as file:  # noqa: PTH123 - often, and pathlib is slow to load
                stat = file.read()
            children.setdefault(int(stat[stat.rindex(")") + 2 :].split()[1]), []).append(pid)
    found: list[int] = []
    unseen = [os.getpid()]
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += below
    return found


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, number)


def _signal_group(leader: int, number: int) -> None:
    with suppress(OSError):
        os.killpg(leader, number)


if __name__ == "__main__":
    sys.exit(main())
