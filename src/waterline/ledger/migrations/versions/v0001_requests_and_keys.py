"""Keys with quotas, requests under way, requests that have ended, and their sums.

A step of the past does not follow `tables`, which moves on; so the columns are written out here.
"""

from alembic import op
from sqlalchemy import BigInteger, Column, Text

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the first tables."""
    op.create_table("meta", *_texts("name", "value", key=("name",)))
    op.create_table(
        "keys",
        *_texts("id", key=("id",)),
        Column("hash", Text, nullable=False, unique=True),
        *_texts("prefix", "tenant", "client", "models"),
        *(
            Column(f"{unit}_{period}", BigInteger)
            for unit in ("tokens", "nano_usd")
            for period in ("per_day", "per_month", "total")
        ),
        *_counts("created_us"),
        Column("revoked_us", BigInteger),
    )
    op.create_table(
        "reservations",
        *_texts("id", "owner", "tenant", "client", "key_id", "model", key=("id",)),
        *_counts("arrival_us", "reserved_tokens", "reserved_nano_usd"),
        *_counts("prompt_tokens", "output_tokens", "nano_usd", "noted_us"),
        sqlite_with_rowid=False,
    )
    op.create_index("reservations_owner", "reservations", ["owner"])
    op.create_table(
        "completions",
        *_texts("id", "tenant", "client", "key_id", "model", "replicas", key=("id",)),
        *_counts("prompt_tokens", "cached_tokens", "output_tokens", "thinking_tokens", "arrival_us"),
        Column("first_token_us", BigInteger),
        *_counts("finish_us", "gpu_us", "nano_usd"),
        *_texts("outcome", "reason"),
        sqlite_with_rowid=False,
    )
    op.create_index("completions_arrival", "completions", ["arrival_us"])
    op.create_table(
        "balances",
        *_texts("key_id", "period", key=("key_id", "period")),
        *_counts("tokens", "nano_usd", "reserved_tokens", "reserved_nano_usd"),
        sqlite_with_rowid=False,
    )
    group = ("day", "tenant", "client", "key_id", "model")
    op.create_table(
        "usage",
        *_texts(*group, key=group),
        *_counts("requests", "ok", "refused", "failed", "cancelled", "interrupted"),
        *_counts("prompt_tokens", "cached_tokens", "output_tokens", "thinking_tokens", "gpu_us", "nano_usd"),
        sqlite_with_rowid=False,
    )


def _texts(*names: str, key: tuple[str, ...] = ()) -> list["Column[str]"]:
    return [Column(name, Text, primary_key=name in key, nullable=False) for name in names]


def _counts(*names: str) -> list["Column[int]"]:
    return [Column(name, BigInteger, nullable=False) for name in names]
