"""The tables, as the code queries them; `migrations` makes them. `*_us` is UTC, `nano_usd` billionths of a dollar."""

from sqlalchemy import BigInteger, Column, Index, LargeBinary, MetaData, Table, Text

from waterline.ledger.records import OUTCOMES

REVISION = "0002"  # the newest migration
metadata = MetaData()


def _text(name: str, *, primary_key: bool = False) -> "Column[str]":
    return Column(name, Text, primary_key=primary_key, nullable=False)


def _count(name: str, *, nullable: bool = False) -> "Column[int]":
    return Column(name, BigInteger, nullable=nullable)


meta = Table("meta", metadata, _text("name", primary_key=True), _text("value"))

keys = Table(
    "keys",
    metadata,
    _text("id", primary_key=True),
    Column("hash", Text, nullable=False, unique=True),  # SHA-256 of a secret of 256 random bits, in hex
    _text("prefix"),
    _text("tenant"),
    _text("client"),
    _text("models"),  # a JSON list
    _count("tokens_per_day", nullable=True),
    _count("tokens_per_month", nullable=True),
    _count("tokens_total", nullable=True),
    _count("nano_usd_per_day", nullable=True),
    _count("nano_usd_per_month", nullable=True),
    _count("nano_usd_total", nullable=True),
    _count("created_us"),
    _count("revoked_us", nullable=True),
)

# Requests that have not ended. What was last noted of one is charged when its gateway dies.
reservations = Table(
    "reservations",
    metadata,
    _text("id", primary_key=True),
    _text("owner"),  # the gateway
    _text("tenant"),
    _text("client"),
    _text("key_id"),
    _text("model"),
    _count("arrival_us"),
    _count("reserved_tokens"),
    _count("reserved_nano_usd"),
    _count("prompt_tokens"),
    _count("output_tokens"),
    _count("nano_usd"),
    _count("noted_us"),
    Index("reservations_owner", "owner"),
    sqlite_with_rowid=False,
)

# Requests that have ended: one row each, never changed.
completions = Table(
    "completions",
    metadata,
    _text("id", primary_key=True),
    _text("tenant"),
    _text("client"),
    _text("key_id"),
    _text("model"),
    _text("replicas"),  # a JSON list
    _count("prompt_tokens"),
    _count("cached_tokens"),
    _count("output_tokens"),
    _count("thinking_tokens"),
    _count("arrival_us"),
    _count("first_token_us", nullable=True),
    _count("finish_us"),
    _count("gpu_us"),
    _count("nano_usd"),
    _text("outcome"),
    _text("reason"),
    Index("completions_arrival", "arrival_us"),
    sqlite_with_rowid=False,
)

# What a key with quotas has spent and reserved, by period: '2026-11-26', '2026-11' or 'total'.
balances = Table(
    "balances",
    metadata,
    _text("key_id", primary_key=True),
    _text("period", primary_key=True),
    _count("tokens"),
    _count("nano_usd"),
    _count("reserved_tokens"),
    _count("reserved_nano_usd"),
    sqlite_with_rowid=False,
)

# The sums of `completions`, kept up to date in the same transactions: what `waterline usage` reads.
GROUP = ("day", "tenant", "client", "key_id", "model")  # the day of the arrival, in UTC
AMOUNTS = ("prompt_tokens", "cached_tokens", "output_tokens", "thinking_tokens", "gpu_us", "nano_usd")
SUMS = ("requests", *OUTCOMES, *AMOUNTS)
usage = Table(
    "usage",
    metadata,
    *(_text(name, primary_key=True) for name in GROUP),
    *(_count(name) for name in SUMS),
    sqlite_with_rowid=False,
)

# What clients upload, and what batches give back.
files = Table(
    "files",
    metadata,
    _text("id", primary_key=True),
    _text("tenant"),
    _text("client"),
    _text("purpose"),
    _text("filename"),
    _count("bytes"),
    _count("created_us"),
    Index("files_client", "tenant", "client", "created_us"),
)

file_parts = Table(
    "file_parts",
    metadata,
    _text("file_id", primary_key=True),
    Column("number", BigInteger, primary_key=True, nullable=False, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)

MOMENTS = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
batches = Table(
    "batches",
    metadata,
    _text("id", primary_key=True),
    _text("tenant"),
    _text("client"),
    _text("key_id"),
    _text("endpoint"),
    _text("input_file_id"),
    _text("status"),
    _text("metadata"),  # JSON, of the client
    _count("requests"),  # lines of the input; 0 until they have been read
    _count("ok"),  # of them have ended well
    _count("not_ok"),  # of them have ended otherwise
    _count("created_us"),
    _count("expires_us"),
    *(_count(f"{moment}_us", nullable=True) for moment in MOMENTS),
    _text("errors"),  # a JSON list: why the input cannot be run
    _text("output_file_id"),
    _text("error_file_id"),
    _text("owner"),  # the gateway that runs it
    Index("batches_client", "tenant", "client", "created_us"),
    Index("batches_status", "status"),
)

# Lines of a batch that have ended, as its output or its error file will have them.
batch_lines = Table(
    "batch_lines",
    metadata,
    _text("batch_id", primary_key=True),
    Column("number", BigInteger, primary_key=True, nullable=False, autoincrement=False),
    _count("ok"),  # 1: of the output file, 0: of the error file
    Column("line", LargeBinary, nullable=False),
)
