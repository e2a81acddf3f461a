"""Files and batches in both databases: kept whole, seen by their owner alone, run by one gateway at a time."""

from codecs import BOM_UTF8
from concurrent.futures import ThreadPoolExecutor

import pytest
from asking import rows
from sqlalchemy import insert

from waterline.ledger import Ledger, connect, files, utc_us
from waterline.ledger.database import writing
from waterline.ledger.files import PART_BYTES, Client, Line
from waterline.ledger.tables import file_parts

ALICE, BOB = Client(tenant="public", client="alice"), Client(tenant="public", client="bob")
ENDPOINT = "/v1/chat/completions"


def new_batch(ledger: Ledger, content: bytes = b"{}\n") -> files.Batch:
    file = files.add_file(ledger.engine, ALICE, "batch", "in.jsonl", [content])
    return files.add_batch(
        ledger.engine, ALICE, key_id="", endpoint=ENDPOINT, input_file_id=file.id, metadata={"ä": "ß"}, for_s=60.0
    )


def test_a_file_comes_back_byte_for_byte_in_parts(url: str) -> None:
    engine = connect(url)
    content = bytes(range(256)) * 3000
    pieces = [content[:10], content[10:PART_BYTES], content[PART_BYTES:]]
    file = files.add_file(engine, ALICE, "batch", "odd", pieces)
    assert file.bytes == len(content)
    parts = []
    while (part := files.read_part(engine, file.id, len(parts))) is not None:
        parts.append(part)
    assert b"".join(parts) == content
    assert [len(part) for part in parts[:-1]] == [PART_BYTES] * (len(parts) - 1)
    assert files.file_bytes(engine, ALICE) == len(content)
    assert files.file_bytes(engine, BOB) == 0
    engine.dispose()


def test_a_file_that_breaks_off_is_not_there(url: str) -> None:
    engine = connect(url)

    def pieces() -> object:
        yield b"x" * PART_BYTES * 2
        raise ConnectionError

    with pytest.raises(ConnectionError):
        files.add_file(engine, ALICE, "batch", "half", pieces())  # type: ignore[arg-type]
    assert files.list_files(engine, ALICE, "", "", 10, newest_first=True) == []
    assert files.file_bytes(engine, ALICE) == 0
    engine.dispose()


def test_lines_are_read_across_parts_and_blank_ones_and_a_byte_order_mark_left_out(url: str) -> None:
    engine = connect(url)
    lines = [b"%d:" % number + b"x" * (number % 977) for number in range(1500)]
    file = files.add_file(engine, ALICE, "batch", "lines", [BOM_UTF8 + b"\n\n".join(lines), b"\n  \nlast"])
    assert list(files.read_lines(engine, file.id)) == [*lines, b"last"]
    engine.dispose()


def test_a_batch_is_run_by_one_gateway_until_that_is_gone(url: str) -> None:
    with Ledger.open(url) as first:
        batch = new_batch(first)
        with Ledger.open(url) as second:
            assert [one.id for one in files.claim_batches(first.engine, first.owner)] == [batch.id]
            assert files.claim_batches(second.engine, second.owner) == []
            assert [one.id for one in files.claim_batches(first.engine, first.owner)] == [batch.id]
            first.close()
            assert [one.id for one in files.claim_batches(second.engine, second.owner)] == [batch.id]


def test_of_gateways_that_look_at_once_one_gets_a_batch(url: str) -> None:
    with Ledger.open(url) as first, Ledger.open(url) as second, ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            batch = new_batch(first)
            claims = [pool.submit(files.claim_batches, one.engine, one.owner) for one in (first, second)]
            claimed = [one.id for claim in claims for one in claim.result()]
            assert claimed.count(batch.id) == 1


def test_a_line_is_kept_and_counted_once_and_files_are_made_of_them_in_order(url: str) -> None:
    with Ledger.open(url) as ledger:
        engine, batch = ledger.engine, new_batch(ledger)
        files.claim_batches(engine, ledger.owner)
        files.begin_batch(engine, batch.id, 200)
        for numbers in (range(199, 99, -1), range(150), range(100)):
            files.add_lines(engine, batch.id, [Line(number=n, ok=n % 3 > 0, line=b"line %d" % n) for n in numbers])
        assert files.ended_lines(engine, batch.id) == set(range(200))
        now = files.find_batch(engine, batch.id)
        assert now
        assert (now.status, now.ok, now.not_ok, now.metadata) == ("in_progress", 133, 67, {"ä": "ß"})
        files.finish_batch(engine, batch.id, "completed")
        files.finish_batch(engine, batch.id, "completed")
        done = files.find_batch(engine, batch.id, ALICE)
        assert done
        assert (done.status, done.ok, done.not_ok) == ("completed", 133, 67)
        good, bad = (list(files.read_lines(engine, id_)) for id_ in (done.output_file_id, done.error_file_id))
        assert good == [b"line %d" % n for n in range(200) if n % 3]
        assert bad == [b"line %d" % n for n in range(0, 200, 3)]
        assert len(files.list_files(engine, ALICE, "batch_output", "", 10, newest_first=True)) == 2
        assert files.claim_batches(engine, ledger.owner) == []
        cancelled = files.cancel_batch(engine, ALICE, batch.id)
        assert cancelled
        assert cancelled.status == "completed", "it has ended"


def test_what_kills_leave_behind_is_swept_away_and_nothing_else(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger.open(url) as ledger:
        engine, batch = ledger.engine, new_batch(ledger)
        files.claim_batches(engine, ledger.owner)
        files.begin_batch(engine, batch.id, 3)
        files.add_lines(engine, batch.id, [Line(number=n, ok=True, line=b"x") for n in range(3)])
        with monkeypatch.context() as killed:
            killed.setattr(files, "_advance", killed_here)
            with pytest.raises(KeyboardInterrupt):
                files.finish_batch(engine, batch.id, "completed")
        with monkeypatch.context() as killed:
            killed.setattr(files, "_delete_lines", killed_here)
            with pytest.raises(KeyboardInterrupt):
                files.finish_batch(engine, batch.id, "completed")
        with writing(engine) as connection:
            for age_s, name in ((4 * 86_400, "old"), (60, "young")):
                file_id = f"file-{utc_us() - age_s * 1_000_000:014x}{name}"
                connection.execute(insert(file_parts), {"file_id": file_id, "number": 0, "data": b"x"})
        files.sweep(engine)
        done = files.find_batch(engine, batch.id)
        assert done
        assert (done.status, done.ok) == ("completed", 3)
        assert list(files.read_lines(engine, done.output_file_id)) == [b"x"] * 3
        assert files.ended_lines(engine, batch.id) == set()
        parts = [row[0] for row in rows(ledger, "SELECT DISTINCT file_id FROM file_parts")]
        assert {batch.input_file_id, done.output_file_id} < set(parts)
        assert [str(one)[-5:] for one in parts if "o" in str(one)[-5:] and one != done.output_file_id] == ["young"]


def killed_here(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_lists_go_on_behind_the_last_one_seen(url: str) -> None:
    engine = connect(url)
    made = [files.add_file(engine, ALICE, "batch", f"{number}", [b"x"]).id for number in range(5)]
    files.add_file(engine, BOB, "batch", "other", [b"x"])
    newest = files.list_files(engine, ALICE, "batch", "", 2, newest_first=True)
    assert [file.id for file in newest] == [made[4], made[3]]
    rest = files.list_files(engine, ALICE, "batch", newest[-1].id, 9, newest_first=True)
    assert [file.id for file in rest] == made[2::-1]
    oldest = files.list_files(engine, ALICE, "", made[1], 9, newest_first=False)
    assert [file.id for file in oldest] == made[2:]
    assert files.list_files(engine, ALICE, "other", "", 9, newest_first=True) == []
    engine.dispose()
