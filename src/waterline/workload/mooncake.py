"""The traces of Mooncake: a JSON object a request, with the hashes of its prompt's blocks.

Kimi's operators published them with their paper (Mooncake, FAST'25): ``timestamp`` in milliseconds, ``input_length``,
``output_length``, and ``hash_ids``, one for each block of 512 tokens of the prompt. Each hash stands for its block and
all before it, so that two prompts which begin alike have the same hashes as far as they do.
"""

from collections.abc import Iterator
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from waterline.workload import ragged
from waterline.workload.source import Source, shown
from waterline.workload.stream import BLOCK_TOKENS, Chunk, chunk_of

NS_PER_MS = 10**6
EXPECTED = '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}'

Tokens = Annotated[int, Meta(ge=1, le=999_999_999)]
Hash = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class Row(msgspec.Struct):
    """One line."""

    timestamp: Annotated[float, Meta(ge=0, le=9e12)]  # ms
    input_length: Tokens
    output_length: Tokens
    hash_ids: list[Hash] = []


class EndlessCache:
    """Which blocks have been asked for before; it forgets none, so what it finds is the most any cache can."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self.blocks = self.hits = 0

    @property
    def hit_fraction(self) -> float:
        """Share of all blocks that were there when they were asked for."""
        return self.hits / self.blocks if self.blocks else 0.0

    def hit_tokens(self, prompt_tokens: int, hashes: list[int]) -> int:
        """Return how much of a prompt is there, and keep the rest; the last token is always computed."""
        hits = 0
        for block in hashes:
            if block not in self._known:
                break
            hits += 1
        self._known.update(hashes)
        self.blocks += len(hashes)
        self.hits += hits
        return min(hits * BLOCK_TOKENS, prompt_tokens - 1)


def read_mooncake(source: Source, cache: EndlessCache | None = None) -> Iterator[Chunk]:
    """Yield the requests, in the order of the file, with their blocks; cached tokens are those of an endless cache.

    Raises:
        TraceError: naming the line, what is wrong with it and what a line looks like.
    """
    cache = cache or EndlessCache()
    decoder = msgspec.json.Decoder(Row)
    source.line = 0
    for block in source.blocks():
        rows, numbers, cached = [], [], []
        for line in block.removeprefix(b"\xef\xbb\xbf").split(b"\n")[:-1]:
            source.line += 1
            if line.isspace() or not line:
                continue
            try:
                row = decoder.decode(line)
            except msgspec.MsgspecError as error:
                source.refuse(f"{shown(line.decode(errors='replace'))}: {error}. Expected {EXPECTED}", source.line)
            except UnicodeDecodeError:
                source.refuse(f"it is not text. Expected {EXPECTED}", source.line)
            rows.append(row)
            numbers.append(source.line)
            cached.append(cache.hit_tokens(row.input_length, row.hash_ids))
        yield chunk_of(
            np.rint(np.array([row.timestamp for row in rows], np.float64) * NS_PER_MS).astype(np.int64),
            np.array([row.input_length for row in rows], np.int32),
            np.array([row.output_length for row in rows], np.int32),
            cached_tokens=np.array(cached, np.int32),
            line=np.array(numbers, np.int64),
            blocks=ragged.ragged([row.hash_ids for row in rows]),
        )
