"""Whatever is reserved, settled, tried again, recovered or told twice: the sums are those of the rows."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from asking import NOON_US, settlement
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from waterline.ledger import Key, Quotas, connect, create_key
from waterline.ledger.batch import Batch, Books, Ending, Reserve
from waterline.ledger.quotas import periods

LIMIT = 1_000
Step = tuple[Literal["reserve", "settle", "recover"], int, int, bool]  # what, of which request, tokens, carefully


def reserve(number: int, key: Key, tokens: int) -> Reserve:
    return Reserve(
        request_id=f"r{number}",
        tenant="public",
        client="alice",
        key=key,
        model="small",
        arrival_us=NOON_US,
        tokens=tokens,
        nano_usd=tokens * 3,
        periods=periods(key, NOON_US),
    )


def books_of(engine: Engine) -> dict[str, object]:
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT prompt_tokens, output_tokens, nano_usd FROM completions")).all()
        (kept,) = connection.execute(text("SELECT sum(requests), sum(output_tokens), sum(nano_usd) FROM usage")).all()
        balances = connection.execute(text("SELECT period, tokens, nano_usd, reserved_tokens FROM balances")).all()
        (reserved,) = connection.execute(text("SELECT coalesce(sum(reserved_tokens), 0) FROM reservations")).one()
    return {
        "rows": (len(rows), sum(row[1] for row in rows), sum(row[2] for row in rows)),
        "kept": tuple(int(value or 0) for value in kept),
        "spent": (sum(row[0] + row[1] for row in rows), sum(row[2] for row in rows), reserved),
        "balances": {tuple(row[1:]) for row in balances} or {(0, 0, 0)},
    }


@settings(max_examples=20)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(["reserve", "settle", "settle", "recover"]),
                st.integers(0, 5),
                st.integers(1, 400),
                st.booleans(),
            ),
            min_size=1,
            max_size=5,
        ),
        min_size=1,
        max_size=12,
    )
)
def test_the_sums_are_those_of_the_rows_whatever_happens(transactions: Sequence[Sequence[Step]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        engine = connect(str(Path(folder) / "ledger.db"))
        key, _ = create_key(
            engine, tenant="public", client="alice", quotas=Quotas(tokens_per_day=LIMIT, tokens_total=LIMIT)
        )
        books = Books(engine, "owner")
        reserved: dict[str, Reserve] = {}
        for steps in transactions:
            batch = Batch()
            for what, number, tokens, careful in steps:
                batch.careful |= careful
                if what == "recover":
                    books.recover("owner")
                elif what == "reserve":
                    one = reserved.setdefault(f"r{number}", reserve(number, key, tokens))
                    batch.reserves[one.request_id] = one
                else:
                    row = settlement(
                        f"r{number}",
                        key,
                        prompt_tokens=0,
                        output_tokens=tokens,
                        nano_usd=tokens * 3,
                        arrival_us=NOON_US,
                    )
                    was_reserved = reserved.get(row.request_id)
                    batch.endings[row.request_id] = Ending(
                        settlement=row, periods=periods(key, NOON_US), reserved=was_reserved
                    )
            books.write(batch)
            found = books_of(engine)
            assert found["rows"] == found["kept"]
            assert found["balances"] == {found["spent"]}
        engine.dispose()
