"""Which column of a table is what: a map that a person writes, or the headers we know."""

from collections.abc import Sequence
from dataclasses import dataclass

from waterline.errors import TraceError, nearest
from waterline.units import GIGA
from waterline.workload.source import shown

SECONDS_NS = GIGA
UNITS_NS = {"arrival": SECONDS_NS, "arrival_ms": 10**6, "arrival_us": 10**3, "arrival_ns": 1}
COUNTS = ("prompt", "output", "cached")
TIMES = ("patience", "leaves")
LABELS = ("tenant", "model", "client")
KEYS = (*UNITS_NS, *COUNTS, *LABELS, *TIMES)
EXAMPLE = "arrival=ts,prompt=in_tokens,output=out_tokens,tenant=team"


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnMap:
    """The name of each column in a file; empty where it has none. Arrivals are times of day, or numbers of a unit."""

    arrival: str
    prompt: str
    output: str
    cached: str = ""
    tenant: str = ""
    model: str = ""
    client: str = ""
    patience: str = ""  # seconds …
    leaves: str = ""  # … likewise
    unit_ns: int = SECONDS_NS  # what an arrival of 1 is

    @property
    def named(self) -> dict[str, str]:
        """The columns that are there, by what they are."""
        both = {key: getattr(self, key) for key in ("arrival", *COUNTS, *LABELS, *TIMES)}
        return {key: name for key, name in both.items() if name}


AZURE = ColumnMap(arrival="TIMESTAMP", prompt="ContextTokens", output="GeneratedTokens")
OWN = ColumnMap(
    arrival="arrival_s",
    prompt="prompt_tokens",
    output="output_tokens",
    cached="cached_tokens",
    tenant="tenant",
    model="model",
    client="client",
    patience="patience_s",
    leaves="leaves_after_s",
)
HEADER = ",".join((AZURE.arrival, AZURE.prompt, AZURE.output))


def parse_columns(text: str) -> ColumnMap:
    """Read a map like ``arrival=ts,prompt=in_tokens,output=out_tokens,tenant=team``. Raises TraceError.

    ``arrival_ms``, ``arrival_us`` and ``arrival_ns`` instead of ``arrival`` say what unit the numbers have.
    """
    found: dict[str, str] = {}
    unit_ns = SECONDS_NS
    for part in text.split(","):
        key, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise TraceError(f"'{part.strip()}' names no column. Write it like {EXAMPLE}")
        if key not in KEYS:
            raise TraceError(f"'{key}' in '{part.strip()}' is nothing a request has. {nearest(key, KEYS)}")
        unit_ns = UNITS_NS.get(key, unit_ns)
        key = "arrival" if key in UNITS_NS else key
        if key in found:
            raise TraceError(f"'{key}' is given twice, as '{found[key]}' and as '{name}'. Keep one of the two.")
        found[key] = name
    for key in ("arrival", "prompt", "output"):
        if key not in found:
            raise TraceError(f"the columns '{text}' lack {key}=… . Write it like {EXAMPLE}")
    return ColumnMap(unit_ns=unit_ns, **found)


def find_columns(header: Sequence[str], columns: ColumnMap | None, where: str) -> ColumnMap:
    """Return the map for a header: the one that was given, or that of a header we know. Raises TraceError.

    Of our own names, those that may be absent are left out where they are.
    """
    if columns:
        for key, name in columns.named.items():
            if header.count(name) != 1:
                number = "has no column" if name not in header else "has more than one column"
                raise TraceError(f"{where}: the file {number} '{name}' for {key}. {nearest(name, header)}")
        return columns
    if tuple(header) == tuple(AZURE.named.values()):
        return AZURE
    needed = (OWN.arrival, OWN.prompt, OWN.output)
    if all(header.count(name) == 1 for name in needed):
        there = {key: name for key, name in OWN.named.items() if header.count(name) == 1}
        return ColumnMap(unit_ns=SECONDS_NS, **there)
    raise TraceError(
        f"{where}: the header is {shown(','.join(header))}. Expected {HEADER}; or say which column is what: "
        "--columns arrival=ts,prompt=in,output=out"
    )
