"""Streams end with their usage, for us; who did not ask for it does not see it."""

import orjson

from waterline.errors import WaterlineError
from waterline.service.asgi import broken_event

USAGE = b'"usage"'


class WithoutUsage:
    """Takes the event that holds nothing but the usage out of a stream; all other bytes pass as they are."""

    def __init__(self) -> None:
        self._dropped = False  # the event that is under way: the blank line that ends it is still to come
        self._end = b"\n\n"  # the last bytes that passed

    def whole(self, data: bytes) -> bytes:
        return data

    def chunk(self, data: bytes) -> bytes:
        if self._dropped or USAGE in data:
            data = b"".join(line for line in data.splitlines(keepends=True) if self._passes(line))
        self._end = (self._end + data[-2:])[-2:]
        return data

    def last(self, data: bytes) -> bytes:
        return self.chunk(data)

    def broken(self, error: WaterlineError) -> bytes:
        return b"\n" * (self._end != b"\n\n") + broken_event(error)

    def _passes(self, line: bytes) -> bool:
        if self._dropped:
            self._dropped = bool(line.strip())
            return False
        self._dropped = USAGE in line and _is_usage(line)
        return not self._dropped


def _is_usage(line: bytes) -> bool:
    try:
        event = orjson.loads(line.removeprefix(b"data:"))
    except orjson.JSONDecodeError:
        return False
    return isinstance(event, dict) and event.get("choices") == [] and bool(event.get("usage"))
