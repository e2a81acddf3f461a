"""ServeGen: production traffic as models of its clients, from which requests are drawn.

Alibaba published the clients of several of its services (ServeGen, arXiv:2505.09999): for each window of ten minutes
how many requests a client sent and how its gaps were spread, for each quarter of a day how long its prompts and answers
were. Second 0 is midnight.

What is drawn keeps, in every window and for every client, the number of requests that was recorded, and the shape of
the gaps between them (Gamma or Weibull). Lengths are independent draws of the recorded distributions, for only those
were published.
"""

import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
from numpy.random import PCG64, Generator
from numpy.typing import NDArray

from waterline.errors import TraceError
from waterline.units import GIGA
from waterline.workload.source import Source
from waterline.workload.stream import Chunk, Ints, Longs, chunk_of, cut, joined

MEMBER = re.compile(r"chunk-(\d+)-(trace\.csv|dataset\.json)")
PARTS = ("image", "audio", "video")  # of a prompt of several kinds: how many, and how long each is
MOST_TOKENS = 999_999_999
EXPECTED_ROW = "window start (s), requests/s, CV, family, shape, scale"
FAMILIES = ("", "Gamma", "Weibull")

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distribution:
    """How often each length occurs."""

    lengths: Longs
    cumulated: Floats  # rises to 1

    def draw(self, count: int, generator: Generator) -> Longs:
        places = np.searchsorted(self.cumulated, generator.random(count), side="right")
        return self.lengths[np.minimum(places, len(self.lengths) - 1)]

    @property
    def mean(self) -> float:
        return float(self.lengths @ np.diff(self.cumulated, prepend=0.0))


Lengths = Mapping[str, Distribution]  # by the name of the field


@dataclass(frozen=True, slots=True)
class Client:
    """One client: how it asks in each window, and how long its requests are from each of some times on."""

    number: int
    requests_per_s: Floats  # [window]
    family: NDArray[np.int8]  # [window] index into FAMILIES
    shape: Floats  # [window]
    lengths: tuple[tuple[int, Lengths], ...]  # (from this second on, …), in the order of time; empty: unknown

    def lengths_at(self, time_s: int) -> Lengths:
        return next((own for since_s, own in reversed(self.lengths) if since_s <= time_s), self.lengths[0][1])


@dataclass(frozen=True)
class ServeGen:
    """The clients of one service."""

    name: str
    window_s: int
    clients: tuple[Client, ...]

    @cached_property
    def recorded(self) -> NDArray[np.intp]:
        """Which window tells what is asked in each: itself, or where nothing at all was recorded the one before."""
        there = self.requests_per_s > 0
        if not there.any():
            raise TraceError(f"{self.name}: no client asks for anything. Is it the whole archive?")
        last = np.maximum.accumulate(np.where(there, np.arange(len(there)), -1))
        return np.where(last < 0, int(np.argmax(there)), last)

    @property
    def requests_per_s(self) -> Floats:
        """The rate of all clients in each window, as recorded."""
        return np.asarray(np.sum([client.requests_per_s for client in self.clients], axis=0))

    @property
    def gaps(self) -> int:
        """Windows in which nothing was recorded: the recording failed, the demand was there."""
        return int((self.requests_per_s == 0).sum())

    def chunks(self, seed: int) -> Iterator[Chunk]:
        """Draw all requests, window by window; each client and window has dice of its own."""
        if not self.lenders[0]:
            raise TraceError(
                f"{self.name} has the rates of its clients but not their lengths. Put their chunk-…-dataset.json "
                "beside."
            )
        for window, recorded in enumerate(self.recorded.tolist()):
            drawn = [
                self._drawn(index, client, window, recorded, seed)
                for index, client in enumerate(self.clients)
                if client.requests_per_s[recorded] > 0
            ]
            together = joined(drawn)
            yield from cut(together[np.argsort(together.arrival_ns, kind="stable")])

    @cached_property
    def lenders(self) -> tuple[tuple[Client, ...], Floats]:
        """Clients whose lengths are known, and up to which of them a share of all requests goes."""
        known = tuple(client for client in self.clients if client.lengths)
        asked = np.cumsum([client.requests_per_s.sum() for client in known])
        return known, asked / asked[-1] if len(asked) else asked

    @property
    def borrowing(self) -> tuple[int, float]:
        """How many clients have no lengths, and the share of all requests that is theirs."""
        without = [client.requests_per_s.sum() for client in self.clients if not client.lengths]
        return len(without), float(sum(without) / self.requests_per_s.sum())

    def _lender(self, client: Client, generator: Generator) -> Client:
        """Return whose lengths a client has: its own, or if they are unknown those of others, as often as they ask."""
        if client.lengths:
            return client
        known, upto = self.lenders
        return known[min(int(np.searchsorted(upto, generator.random(), side="right")), len(known) - 1)]

    def _drawn(self, index: int, client: Client, window: int, recorded: int, seed: int) -> Chunk:
        generator = Generator(PCG64([seed, client.number, window]))
        expected = client.requests_per_s[recorded] * self.window_s
        count = int(expected + generator.random()) if abs(expected - round(expected)) > 1e-6 else round(expected)
        places = _places(count, FAMILIES[client.family[recorded]], float(client.shape[recorded]), generator)
        begin_s = window * self.window_s
        lengths = self._lender(client, generator).lengths_at(begin_s)
        return chunk_of(
            begin_s * GIGA + (places * (self.window_s * GIGA)).astype(np.int64),
            _prompts(lengths, count, generator),
            _whole(lengths["output_tokens"].draw(count, generator)),
            client=np.full(count, index, np.int32),
        )


def _places(count: int, family: str, shape: float, generator: Generator) -> Floats:
    """Return when so many requests arrive, from 0 to 1: gaps of a shape, stretched to fill the time."""
    if family == "Gamma":
        gaps = generator.gamma(shape, size=count + 1)
    elif family == "Weibull":
        gaps = generator.weibull(shape, count + 1)
    else:
        gaps = generator.exponential(size=count + 1)
    total = gaps.sum()
    if not total > 0:  # a shape so near 0 that every gap is
        return np.full(count, generator.random())
    return np.asarray(np.minimum(np.cumsum(gaps)[:-1] / total, np.nextafter(1.0, 0.0)))


def _prompts(lengths: Lengths, count: int, generator: Generator) -> Ints:
    """Draw prompts: of text, or of text and some parts of other kinds."""
    if "input_tokens" in lengths:
        return _whole(lengths["input_tokens"].draw(count, generator))
    tokens = lengths["text_tokens"].draw(count, generator)
    for part in PARTS:
        if f"{part}_count" in lengths and f"{part}_tokens" in lengths:
            parts = lengths[f"{part}_count"].draw(count, generator)
            each = lengths[f"{part}_tokens"].draw(int(parts.sum()), generator)
            owner = np.repeat(np.arange(count), parts)
            tokens = tokens + np.bincount(owner, each, minlength=count).astype(np.int64)
    return _whole(tokens)


def _whole(tokens: Longs) -> Ints:
    """A length of 0 is of a request that was cut off; it is drawn as 1."""
    return np.clip(tokens, 1, MOST_TOKENS).astype(np.int32)


# --- Files ----------------------------------------------------------------------------------------------------------


def is_folder_of_clients(path: Path) -> bool:
    return path.is_dir() and any(MEMBER.fullmatch(member.name) for member in path.iterdir())


def is_tar(start: bytes) -> bool:
    return start[257:262] == b"ustar"


def read_servegen(source: Source) -> ServeGen:
    """Read the clients of an archive as it is shipped, or of a folder of it. Raises TraceError."""
    rates: dict[int, tuple[Floats, NDArray[np.int8], Floats, Longs]] = {}
    lengths: dict[int, tuple[tuple[int, Lengths], ...]] = {}
    for name, number, kind, data in _members(source):
        if kind == "trace.csv":
            rates[number] = _rates(data, f"{source.path}, {name}")
        else:
            lengths[number] = _lengths(data, f"{source.path}, {name}")
    if not rates:
        raise TraceError(f"{source.path} holds no chunk-…-trace.csv. Expected an archive of ServeGen, or a table.")
    begins = next(iter(rates.values()))[3]
    for number, own in rates.items():
        if not np.array_equal(own[3], begins):
            raise TraceError(f"{source.path}: client {number} has other windows than the others. Unpack it again.")
    window_s = int(begins[1] - begins[0]) if len(begins) > 1 else 600
    return ServeGen(
        name=source.path.name,
        window_s=window_s,
        clients=tuple(Client(number, *rates[number][:3], lengths.get(number, ())) for number in sorted(rates)),
    )


def _members(source: Source) -> Iterator[tuple[str, int, str, bytes]]:
    if source.path.is_dir():
        for path in sorted(source.path.iterdir()):
            if found := MEMBER.fullmatch(path.name):
                yield path.name, int(found[1]), found[2], path.read_bytes()
        return
    with source.opened() as file:
        try:
            with tarfile.open(fileobj=file, mode="r|") as archive:
                for member in archive:
                    found = MEMBER.fullmatch(Path(member.name).name)
                    content = archive.extractfile(member) if found else None
                    if found and content:
                        yield found[0], int(found[1]), found[2], content.read()
        except tarfile.TarError as error:
            raise TraceError(f"{source.path} is cut short or no tar: {error}. Copy it again.") from error


def _rates(data: bytes, where: str) -> tuple[Floats, NDArray[np.int8], Floats, Longs]:
    rows = [line.split(",") for line in data.decode(errors="replace").split()]
    begins, rates = np.zeros(len(rows), np.int64), np.zeros(len(rows))
    families, shapes = np.zeros(len(rows), np.int8), np.zeros(len(rows))
    for number, row in enumerate(rows):
        try:
            begin, rate, _, family, shape, _ = row
            begins[number], rates[number] = int(begin), float(rate)
            families[number], shapes[number] = FAMILIES.index(family), float(shape)
        except ValueError as error:
            raise TraceError(f"{where}, line {number + 1}: {','.join(row)!r} is not {EXPECTED_ROW}.") from error
    steps = np.diff(begins)
    even = len(begins) > 0 and begins[0] == 0 and (not len(steps) or (steps[0] > 0 and (steps == steps[0]).all()))
    if not even or not (np.isfinite(rates).all() and (rates >= 0).all() and (shapes[families > 0] > 0).all()):
        raise TraceError(f"{where}: windows must follow one another from 0 on, with rates and shapes from 0 on.")
    return rates, families, shapes, begins


def _lengths(data: bytes, where: str) -> tuple[tuple[int, Lengths], ...]:
    """Read how long requests are from each time on; times of which nothing is told are left out."""
    try:
        steps = msgspec.json.decode(data, type=dict[str, dict[str, str]])
        found = []
        for since_s, texts in sorted(steps.items(), key=lambda step: int(step[0])):
            own = {field: _distribution(text) for field, text in texts.items() if field.endswith(("_tokens", "_count"))}
            known = {field: one for field, one in own.items() if one}
            if "output_tokens" in known and ("input_tokens" in known or "text_tokens" in known):
                found.append((int(since_s), known))
        return tuple(found)
    except (msgspec.MsgspecError, ValueError) as error:
        raise TraceError(f"{where}: {error}. Expected {{window start: {{field: {{tokens: share}}}}}}.") from error


def _distribution(text: str) -> Distribution | None:
    """Read ``{50: 0.04, 51: 0.96}``; None of nothing."""
    inside = text.strip().removeprefix("{").removesuffix("}").strip()
    if not inside:
        return None
    pairs = np.array(inside.replace(":", ",").split(","), np.float64).reshape(-1, 2)
    pairs = pairs[np.argsort(pairs[:, 0])]
    total = pairs[:, 1].sum()
    if not total > 0 or (pairs < 0).any():
        return None
    return Distribution(pairs[:, 0].astype(np.int64), np.cumsum(pairs[:, 1]) / total)
