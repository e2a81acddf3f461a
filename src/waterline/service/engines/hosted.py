"""Somebody else's server as a process of ours: it is told where to listen, and ends when we do.

vLLM, SGLang and llama-server know nothing of the way our own engine processes talk, so a small process of ours stands
between: it picks a free port, starts the program, says where it listens, and takes it along when it has to go.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import aiohttp

from waterline.plan import Replica
from waterline.service.engines import ask
from waterline.service.engines.dialect import Dialect
from waterline.service.engines.lifeline import announce
from waterline.service.engines.seat import Command

FAULTS = dict.fromkeys(("context length", "maximum model length"), "context_length_exceeded")


@dataclass(frozen=True, kw_only=True)
class Hosted:
    """One server of somebody else's making, on this machine."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    name: str
    input: bytes = b""
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    dialect: Dialect
    faults: Mapping[str, str] = field(default_factory=lambda: FAULTS)
    start_within_s: float = 3600.0  # it may fetch the weights first; a failure shows at once, by the exit

    async def served_name(self, session: aiohttp.ClientSession, url: str) -> str:
        await ask(session, url.removesuffix("/v1"), "/health")  # 503, or nothing, until it is ready
        return self.name


def host(replica: Replica, command: Command, dialect: Dialect) -> Hosted:
    """Return the engine that runs a command."""
    arguments, environment = command
    return Hosted(name=replica.model, dialect=dialect, command=hosted(arguments), environment=environment)


def hosted(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Return the command of the process between, for a command of somebody else's."""
    return (sys.executable, "-m", "waterline.service.engines.hosted", *arguments)


# --- The process between --------------------------------------------------------------------------------------------


def main() -> None:
    """Run the program on the command line on a free port until standard input ends; leave with its exit code."""
    host = sys.argv[sys.argv.index("--host") + 1]
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    try:
        program = subprocess.Popen(  # noqa: S603 - the command was made from the plan
            [*sys.argv[1:], "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,  # our own output is for announcing
        )
    except FileNotFoundError:
        sys.exit(f"{sys.argv[1]} is not on the path of {socket.gethostname()}. Install it there.")
    threading.Thread(target=_end_with_input, args=(program,), daemon=True).start()
    announce(f"http://{host}:{port}/v1")
    code = program.wait()
    sys.exit(code if code >= 0 else 128 - code)


def _end_with_input(program: "subprocess.Popen[bytes]") -> None:
    """Kill the program and whatever it has started when nobody holds our input any more."""
    while os.read(0, 4096):
        pass
    if os.getpgrp() == os.getpid():  # we lead a group, as every engine of a service does
        os.killpg(0, signal.SIGKILL)
    program.kill()


if __name__ == "__main__":
    main()
