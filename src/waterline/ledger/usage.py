"""What was used, summed: read from sums that are kept up to date, so that it takes as long on a year as on a day."""

from collections.abc import Sequence

from msgspec import Struct
from sqlalchemy import Engine, func, select

from waterline.ledger.database import reading
from waterline.ledger.tables import GROUP, SUMS, usage
from waterline.units import GIGA, MEGA

GROUPS = ("tenant", "client", "model", "day", "key")


class Usage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one group of requests used; "" of what the groups are not told apart by."""

    day: str = ""  # of the arrival, in UTC
    tenant: str = ""
    client: str = ""
    key_id: str = ""
    model: str = ""
    requests: int = 0
    ok: int = 0
    refused: int = 0
    failed: int = 0
    cancelled: int = 0
    interrupted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    thinking_tokens: int = 0
    gpu_us: int = 0
    nano_usd: int = 0

    @property
    def gpu_s(self) -> float:
        return self.gpu_us / MEGA

    @property
    def usd(self) -> float:
        return self.nano_usd / GIGA


def columns_of(by: Sequence[str]) -> list[str]:
    """Return the columns that tell groups apart: clients are those of a tenant, keys those of a client."""
    named = {"client": {"tenant", "client"}, "key": {"tenant", "client", "key_id"}}
    wanted = {column for name in by for column in named.get(name, {name})}
    return [name for name in GROUP if name in wanted]


def read_usage(engine: Engine, by: Sequence[str], since: str = "", until: str = "") -> list[Usage]:
    """Sum what arrived from one day to another, both included, by some of `GROUPS`, sorted by `columns_of` them."""
    columns = [usage.c[name] for name in columns_of(by)]
    question = select(*columns, *(func.sum(usage.c[name]).label(name) for name in SUMS))
    if since:
        question = question.where(usage.c.day >= since)
    if until:
        question = question.where(usage.c.day <= until)
    with reading(engine) as connection:
        rows = connection.execute(question.group_by(*columns).order_by(*columns)).mappings().all()
    return [_read(dict(row)) for row in rows if row["requests"] is not None]


def _read(row: dict[str, object]) -> Usage:
    """PostgreSQL sums integers to decimals."""
    return Usage(**{str(name): int(str(value)) if name in SUMS else str(value) for name, value in row.items()})  # type: ignore[arg-type] # names and types are those of the columns
