"""What a service keeps on disk beside the ledger, and what it leaves behind when it is killed.

    ~/.local/state/waterline/FLEET/     or below $XDG_STATE_HOME; FLEET-2 … while another service of that fleet runs
      lock                              held by the service; the pid of who held it last
      decisions.jsonl                   what the minutes clock decided, and why
      signals.jsonl                     what it was told: replayed, it decides the same again
      jobs/JOB.COPY.log                 what runs of jobs wrote

Every process that the service starts bears the path of this directory as its mark (see `processes`). Whoever holds the
lock therefore knows that the others who bear it are orphans.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import structlog

from waterline.errors import InputError
from waterline.service.processes import MARK, end_marked, marked

MOST_SERVICES = 100  # of one fleet on one machine, at a time

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The directory of one running service; nobody else has it."""

    path: Path
    abandoned: tuple[str, ...] = ()  # marks of services that were killed: their processes may still run
    others: ExitStack = field(default_factory=ExitStack)  # locks on their directories, until that is settled

    @property
    def mark(self) -> str:
        return str(self.path)

    def environment(self, run: str) -> dict[str, str]:
        """Return what marks a process as ours; `run` says of what."""
        return {MARK: f"{self.mark}/{run}"}

    def log_of(self, run: str) -> Path:
        """Return where a run writes; its folder is there."""
        path = self.path / "jobs" / f"{_file_name(run)}.log"
        path.parent.mkdir(exist_ok=True)
        return path

    async def end_orphans(self, grace_s: float) -> int:
        """End what services that were killed have left behind; return how many processes that were.

        Jobs have been told by the end of their service already, and have the grace to save their work.
        """
        ended = 0
        for mark in self.abandoned:
            if orphans := marked(mark):
                log.warning("ends what an earlier service has left behind", processes=len(orphans), grace_s=grace_s)
                ended += len(orphans)
                if left := await end_marked(mark, grace_s):
                    log.error("these cannot be ended: their GPUs may be in use", pids=[one.pid for one in left])
        self.others.close()
        return ended


@contextmanager
def claim_state(fleet: str) -> Iterator[State]:
    """Take the directory of a fleet for the length of the block. Raises InputError where nothing can be written."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    base = Path(home).absolute() / "waterline" / _file_name(fleet)
    with ExitStack() as ours, ExitStack() as others:
        taken: Path | None = None
        abandoned = []
        for number in range(1, MOST_SERVICES):
            path = base if number == 1 else base.with_name(f"{base.name}-{number}")
            if taken and not path.exists():
                break
            if lock := _lock(path):
                (others if taken else ours).enter_context(lock)
                taken = taken or path
                abandoned.append(str(path))
        if not taken:
            raise InputError(f"{MOST_SERVICES - 1} services of '{fleet}' run here already. Stop one of them.")
        yield State(path=taken, abandoned=tuple(abandoned), others=others)


def _lock(path: Path) -> TextIO | None:
    """Return the lock on a directory, None where another service has it; the kernel opens it when its holder dies."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)  # what jobs write may be nobody else's business
        file = (path / "lock").open("a+")
    except OSError as error:
        raise InputError(
            f"cannot write to {path}: {error.strerror}. Set XDG_STATE_HOME to a directory that is yours."
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    with suppress(OSError):  # of a full disk: the pid is for people
        file.truncate(0)
        os.write(file.fileno(), f"{os.getpid()}\n".encode())
    return file


def _file_name(name: str) -> str:
    """Return a name as a file may be called."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "fleet"
