"""What our own engine processes do first: make sure that they never outlive the one who started them."""

import ctypes
import os
import signal
import sys
import threading

import orjson

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def end_with_parent() -> None:
    """Leave at once when standard input ends, which it does when the parent closes it, exits or is killed.

    Linux sends a signal too, which also works while native code keeps every thread of ours from running.
    """
    threading.Thread(target=_leave_at_end_of_input, daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _leave_at_end_of_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def announce(url: str) -> None:
    """Tell the parent where we listen."""
    sys.stdout.buffer.write(orjson.dumps({"url": url}) + b"\n")
    sys.stdout.buffer.flush()
