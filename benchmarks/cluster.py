"""A Ray cluster on this machine whose nodes have networks of their own: a cable can be cut, and mended. Wants root."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

BRIDGE, NETWORK, PORT = "wlbridge", "10.77.0", 6399
APART = (  # a process table and a folder of Ray's own: two nodes that start at once would take each other's
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c"),
    'mount -t proc proc /proc && mount -t tmpfs none /tmp/ray && "$@"; exit',  # not exec: Ray is no process 1
    "apart",
)
STARTED_S = 8.0  # one after the other: on a busy machine, raylets that start together give up
STORE = "--object-store-memory 80000000"  # nothing of ours is kept there
RAY = str(Path(sys.executable).with_name("ray"))


def run(command: str, *, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, capture_output=not check)


class Cluster:
    """So many nodes of four GPUs, which are only a number here, inside the block."""

    def __init__(self, nodes: int, gpus: int = 4) -> None:
        self.address = f"{NETWORK}.1:{PORT}"
        self._nodes = nodes
        self._gpus = gpus
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        self._clear()
        for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            os.environ.pop(proxy, None)  # they know nothing of our networks
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # ours too, when we join
        run(f"ip link add {BRIDGE} type bridge")
        run(f"ip addr add {NETWORK}.1/24 dev {BRIDGE}")
        run(f"ip link set {BRIDGE} up")
        self._started = [self._start([], f"--head --port {PORT} --num-gpus 0 --include-dashboard=false", 1)]
        for node in range(self._nodes):
            run(f"ip netns add wl{node}")
            run(f"ip link add wlveth{node} type veth peer name eth0 netns wl{node}")
            run(f"ip link set wlveth{node} master {BRIDGE} up")
            run(f"ip -n wl{node} addr add {NETWORK}.{10 + node}/24 dev eth0")
            run(f"ip -n wl{node} link set eth0 up")
            run(f"ip -n wl{node} link set lo up")
            time.sleep(STARTED_S)
            self._started.append(self._node(node))
        return self

    def _node(self, node: int) -> "subprocess.Popen[bytes]":
        options = f"--address {self.address} --labels pool=box --num-gpus {self._gpus}"
        return self._start(["ip", "netns", "exec", f"wl{node}", *APART], options, 10 + node)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        head, *nodes = self._started
        for process in nodes:
            process.kill()  # unshare minds no other signal, and takes its children along
            process.wait()
        head.terminate()
        head.wait()
        self._clear()

    def cut(self, node: int) -> None:
        run(f"ip link set wlveth{node} down")

    def mend(self, node: int) -> None:
        """Put the cable back, and start Ray there anew, which gives up by itself when it is cut off for long."""
        run(f"ip link set wlveth{node} up")
        self._started[1 + node].kill()
        self._started[1 + node].wait()
        self._started[1 + node] = self._node(node)

    def runs_on(self, node: int) -> list[int]:
        """Return the processes of jobs on a node, ranks included."""
        found = []
        for pid in (int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit()):
            try:
                environment = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            owner = next((one for one in environment if one.startswith(b"WATERLINE_OWNER=")), b"")
            if f"/box.{node}/jobs/".encode() in owner:
                found.append(pid)
        return found

    def _start(self, within: list[str], options: str, number: int) -> "subprocess.Popen[bytes]":
        command = f"{RAY} start --block --num-cpus 1 --node-ip-address {NETWORK}.{number} {STORE} {options}"
        return subprocess.Popen([*within, *command.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _clear(self) -> None:
        for node in range(self._nodes):
            run(f"ip link del wlveth{node}", check=False)
            run(f"ip netns del wl{node}", check=False)
        run(f"ip link del {BRIDGE}", check=False)
