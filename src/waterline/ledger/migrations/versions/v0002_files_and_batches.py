"""Files that clients upload, and batches of requests.

A step of the past does not follow `tables`, which moves on; so the columns are written out here.
"""

from alembic import op
from sqlalchemy import BigInteger, Column, LargeBinary, Text

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the tables of files and batches."""
    op.create_table(
        "files",
        *_texts("id", "tenant", "client", "purpose", "filename", key=("id",)),
        *_counts("bytes", "created_us"),
    )
    op.create_index("files_client", "files", ["tenant", "client", "created_us"])
    op.create_table(
        "file_parts",
        Column("file_id", Text, primary_key=True, nullable=False),
        Column("number", BigInteger, primary_key=True, nullable=False, autoincrement=False),
        Column("data", LargeBinary, nullable=False),
    )
    op.create_table(
        "batches",
        *_texts("id", "tenant", "client", "key_id", "endpoint", "input_file_id", "status", "metadata", key=("id",)),
        *_counts("requests", "ok", "not_ok", "created_us", "expires_us"),
        *(
            Column(f"{moment}_us", BigInteger)
            for moment in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        ),
        *_texts("errors", "output_file_id", "error_file_id", "owner"),
    )
    op.create_index("batches_client", "batches", ["tenant", "client", "created_us"])
    op.create_index("batches_status", "batches", ["status"])
    op.create_table(
        "batch_lines",
        Column("batch_id", Text, primary_key=True, nullable=False),
        Column("number", BigInteger, primary_key=True, nullable=False, autoincrement=False),
        *_counts("ok"),
        Column("line", LargeBinary, nullable=False),
    )


def _texts(*names: str, key: tuple[str, ...] = ()) -> list["Column[str]"]:
    return [Column(name, Text, primary_key=name in key, nullable=False) for name in names]


def _counts(*names: str) -> list["Column[int]"]:
    return [Column(name, BigInteger, nullable=False) for name in names]
