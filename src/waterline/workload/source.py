"""A trace file as blocks of bytes: unpacked when it is packed, and every way it can be broken put into words."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn

from waterline.errors import TraceError

GZIP = b"\x1f\x8b"
BLOCK = 1 << 21  # bytes


@dataclass(slots=True)
class Source:
    """A file, and how far it has been read: a file that breaks off is told where."""

    path: Path
    line: int = field(default=0)  # last one that was read

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Open it, unpacked, and turn what goes wrong while it is read into a TraceError."""
        after = f" after line {self.line:,}" if self.line else ""
        try:
            with self.path.open("rb") as packed:
                is_packed = packed.read(2) == GZIP
                packed.seek(0)
                if not is_packed:
                    yield packed
                    return
                with gzip.open(packed) as file:
                    yield file  # type: ignore[misc]  # a GzipFile reads bytes as any other
        except EOFError as error:
            after = f" after line {self.line:,}" if self.line else ""
            raise TraceError(
                f"{self.path} is cut short{after}: its gzip data ends too early. Copy it again."
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            after = f" after line {self.line:,}" if self.line else ""
            raise TraceError(f"{self.path} cannot be unpacked{after}: {error}. Copy it again.") from error
        except OSError as error:
            raise TraceError(
                f"cannot read the trace {self.path}: {error.strerror or error}. Check the path."
            ) from error

    def start(self, size: int) -> bytes:
        """Return its first bytes, unpacked, by which its format is known."""
        with self.opened() as file:
            return file.read(size)

    def blocks(self) -> Iterator[bytes]:
        """Yield it in blocks of whole lines, each line with its end."""
        with self.opened() as file:
            rest = b""
            while block := file.read(BLOCK):
                end = block.rfind(b"\n") + 1
                if not end and len(rest) >= BLOCK:
                    raise TraceError(
                        f"{self.path}, line {self.line + 1}: it is longer than {len(rest) >> 20} MiB. "
                        "Expected a trace, a line a request."
                    )
                if end:
                    yield rest + block[:end]
                    rest = block[end:]
                else:
                    rest += block
            if rest:
                yield rest + b"\n"

    def refuse(self, problem: str, line: int | None = None) -> NoReturn:
        """Raise a TraceError that names the file, and the line if there is one."""
        where = f", line {line}" if line else ""
        raise TraceError(f"{self.path}{where}: {problem}")


def shown(value: str) -> str:
    """Return a value as it stands there, in quotes, and no more of it than fits a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
