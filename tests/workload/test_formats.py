"""Traces of every format: found by what stands in them, read in chunks, and refused with the line that is wrong."""

import gzip
import io
import json
import sys
import tarfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.errors import MissingExtraError, TraceError
from waterline.workload import order
from waterline.workload import source as source_module
from waterline.workload.columns import HEADER, parse_columns
from waterline.workload.delimited import nanoseconds
from waterline.workload.digits import Fields, counts, decimals, timestamps
from waterline.workload.files import open_trace
from waterline.workload.mooncake import EndlessCache, read_mooncake
from waterline.workload.servegen import read_servegen
from waterline.workload.source import Source
from waterline.workload.stream import ENDLESS, Stream, measure

MAPPED = parse_columns("arrival=ts,prompt=in_tokens,output=out_tokens,tenant=team")


def written(folder: Path, data: str | bytes, name: str = "trace") -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def rows(stream: Stream) -> list[tuple[float, int, int]]:
    chunk = stream.whole()
    return list(
        zip((chunk.arrival_ns / 1e9).tolist(), chunk.prompt_tokens.tolist(), chunk.output_tokens.tolist(), strict=True)
    )


def fields(texts: list[str]) -> Fields:
    ends = np.cumsum([len(text) + 1 for text in texts]) - 1
    begins = np.concatenate([[0], ends[:-1] + 1])
    return Fields(np.frombuffer(",".join(texts).encode() + bytes(64), np.uint8), begins, ends)


# --- Many fields at once, against one at a time ------------------------------------------------------------------------

TEXTS = st.text("0123456789.-+:TZ e", min_size=0, max_size=32)


@given(st.lists(TEXTS | st.integers(0, 10**12).map(str), min_size=1, max_size=20))
def test_whole_numbers_read_together_are_those_read_alone(texts: list[str]) -> None:
    values, known = counts(fields(texts))
    for text, value, right in zip(texts, values.tolist(), known.tolist(), strict=True):
        assert right == (text.isdigit() and len(text) <= 9)
        assert not right or value == int(text)


@given(
    st.lists(TEXTS | st.decimals(0, 10**10, places=4).map(str), min_size=1, max_size=20), st.sampled_from([1, 3, 6, 9])
)
def test_decimals_read_together_are_exact(texts: list[str], digits: int) -> None:
    values, known = decimals(fields(texts), 10**digits)
    for text, value, right in zip(texts, values.tolist(), known.tolist(), strict=True):
        assert not right or value == Decimal(text) * 10**digits


@given(
    st.lists(
        TEXTS
        | st.datetimes().map(str)
        | st.datetimes().map(lambda one: one.isoformat() + "Z")
        | st.tuples(st.datetimes(), st.sampled_from(["+02:00", "-11:30", "+99:99"])).map(
            lambda two: f"{two[0]}{two[1]}"
        ),
        min_size=1,
        max_size=20,
    )
)
def test_times_of_day_read_together_are_those_read_alone(texts: list[str]) -> None:
    values, known = timestamps(fields(texts))
    for text, value, right in zip(texts, values.tolist(), known.tolist(), strict=True):
        assert not right or value == nanoseconds(text)
    usual = fields(["2023-11-16 18:17:03.9799600", "2024-02-29T00:00:00Z", "2024-05-10 02:00:01.5+02:00"])
    assert timestamps(usual)[1].all()


# --- CSV with a column map ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_table_is_read_by_its_column_map_whatever_its_name(tmp_path: Path, delimiter: str, packed: bool) -> None:
    text = "team,out_tokens,ts,in_tokens,note\nred,5,100.25,10,x\nblue,6.0,100.5,20,\nred,7,1.01e2,30,y\n"
    data = text.replace(",", delimiter).encode()
    stream = open_trace(written(tmp_path, gzip.compress(data) if packed else data, "no-suffix"), columns=MAPPED)
    assert rows(stream) == [(0.0, 10, 5), (0.25, 20, 6), (0.75, 30, 7)]
    assert [stream.tenants[index] for index in stream.whole().tenant.tolist()] == ["red", "blue", "red"]
    assert stream.clock_ns == 100_250_000_000  # 00:01:40.25


def test_quotes_are_taken_off_and_may_hold_delimiters(tmp_path: Path) -> None:
    text = '"ts","in_tokens","out_tokens","team"\n"1","2","3","Smith, Ltd"\n"2","4","5","say ""hi"""\n3,6,7,\n'
    stream = open_trace(written(tmp_path, text), columns=MAPPED)
    assert rows(stream) == [(0.0, 2, 3), (1.0, 4, 5), (2.0, 6, 7)]
    assert [stream.tenants[index] for index in stream.whole().tenant.tolist()] == ["Smith, Ltd", 'say "hi"', ""]


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [("arrival", "1.5", "1.75"), ("arrival_ms", "1500", "1750"), ("arrival_ns", "1500000000", "1750000000")],
)
def test_numbers_of_any_unit_are_exact(tmp_path: Path, key: str, first: str, second: str) -> None:
    columns = parse_columns(f"{key}=t,prompt=p,output=o")
    stream = open_trace(written(tmp_path, f"t,p,o\n{first},1,1\n{second},1,1\n"), columns=columns)
    assert stream.whole().arrival_ns.tolist() == [0, 250_000_000]


def test_epoch_seconds_keep_their_nanoseconds(tmp_path: Path) -> None:
    text = "ts,in_tokens,out_tokens,team\n1700158623.979960001,1,1,a\n1700158623.979960003,1,1,a\n"
    stream = open_trace(written(tmp_path, text), columns=MAPPED)
    assert stream.whole().arrival_ns.tolist() == [0, 2]
    assert stream.clock_ns == (18 * 3600 + 17 * 60 + 3) * 10**9 + 979_960_001  # 18:17 UTC


def test_our_own_names_need_no_map(tmp_path: Path) -> None:
    stream = open_trace(written(tmp_path, "tenant,arrival_s,prompt_tokens,output_tokens,cached_tokens\na,0.5,10,2,4\n"))
    assert (stream.tenants[0], measure(stream).cached_tokens) == ("a", 4)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("nan,1,1,a", "line 3: column ts: 'nan' is not a time, in seconds from 0 to 9,223,372,036; for milliseconds"),
        ("-3,1,1,a", "line 3: column ts: '-3' is not a time"),
        ("1700158623979,1,1,a", "for milliseconds write arrival_ms="),
        ("2,NaN,1,a", "line 3: column in_tokens: 'NaN' is not a whole number from 1"),
        ("2,,1,a", "line 3: column in_tokens: '' is not a whole number"),
        ("2,0,1,a", "line 3: column in_tokens: '0' is not a whole number from 1"),
        ("2,1,1", "line 3: '2,1,1' has 3 values. Expected 4, as in the header"),
        ('2,1,1,"a', "line 3: a quote does not end on this line"),
    ],
)
def test_a_wrong_row_of_a_table_is_named(tmp_path: Path, row: str, complaint: str) -> None:
    path = written(tmp_path, f"ts,in_tokens,out_tokens,team\n1,1,1,a\n{row}\n")
    with pytest.raises(TraceError) as caught:
        open_trace(path, columns=MAPPED)
    assert complaint in str(caught.value)


TIMES = [("patience", "patience_s"), ("leaves", "leaves_after_s")]  # keys, and our own names


@pytest.mark.parametrize(("key", "own"), TIMES)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_how_long_a_client_waits_or_stays_is_a_column_and_empty_where_that_has_no_end(
    tmp_path: Path, ending: str, key: str, own: str
) -> None:
    lines = ["t,p,o,cancel_after_s", "0,9,1,2.5", "1,9,1,", "2,9,1,1e-12", "3,9,1,3e3", ""]
    columns = f"arrival=t,prompt=p,output=o,{key}=cancel_after_s"
    whole = open_trace(written(tmp_path, ending.join(lines)), columns=columns).whole()
    times_ns = {"patience": whole.patience_ns, "leaves": whole.leaves_ns}
    assert times_ns.pop(key).tolist() == [2_500_000_000, ENDLESS, 1, 3_000_000_000_000]
    assert [other.tolist() for other in times_ns.values()] == [[ENDLESS] * 4]
    path = written(tmp_path, f"arrival_s,prompt_tokens,output_tokens,{own}\n0,9,1,4\n")
    assert getattr(open_trace(path).whole(), f"{key}_ns").tolist() == [4_000_000_000]


@pytest.mark.parametrize(("key", "own"), TIMES)
@pytest.mark.parametrize("value", ["-1", "0", "-0.0", "nan", "inf", "soon", "1e12"])
def test_a_time_to_wait_or_stay_that_is_none_is_named(tmp_path: Path, value: str, key: str, own: str) -> None:
    path = written(tmp_path, f"arrival_s,prompt_tokens,output_tokens,{own}\n0,9,1,1\n0,9,1,{value}\n")
    with pytest.raises(TraceError) as caught:
        open_trace(path)
    assert f"line 3: column {own}: '{value}' is not a number of seconds above 0, or empty" in str(caught.value), key


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("arrival=ts,prompt", "'prompt' names no column. Write it like arrival=ts,"),
        ("arival=ts,prompt=a,output=b", "'arival' in 'arival=ts' is nothing a request has. Did you mean 'arrival'"),
        ("arrival=ts,arrival_ms=tms,prompt=a,output=b", "'arrival' is given twice, as 'ts' and as 'tms'"),
        ("arrival=ts,prompt=a", "lack output=…"),
    ],
)
def test_a_mistake_in_a_column_map_is_answered_with_what_to_write(text: str, complaint: str) -> None:
    with pytest.raises(TraceError) as caught:
        parse_columns(text)
    assert complaint in str(caught.value)


def test_a_column_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    path = written(tmp_path, "ts,in_token,out_tokens,team\n1,1,1,a\n")
    with pytest.raises(TraceError, match="has no column 'in_tokens' for prompt. Did you mean 'in_token'"):
        open_trace(path, columns=MAPPED)


# --- Chunks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "BLOCK", 100)
    monkeypatch.setattr(order, "REACH", 4)


@pytest.mark.usefixtures("small_chunks")
def test_a_long_trace_is_read_in_blocks_and_again_from_the_start(tmp_path: Path) -> None:
    lines = [f"{second},{second + 1},{second + 2}" for second in range(500)]
    path = written(
        tmp_path, "\r\n".join(["arrival_s,prompt_tokens,output_tokens", *lines])
    )  # no end of line at the end
    stream = open_trace(path)
    assert sum(1 for _ in stream.chunks()) > 50
    assert rows(stream) == rows(stream) == [(float(second), second + 1, second + 2) for second in range(500)]
    assert stream.whole().line.tolist() == list(range(2, 502))


@pytest.mark.usefixtures("small_chunks")
def test_rows_near_their_place_are_put_right_and_one_far_from_it_is_named(tmp_path: Path) -> None:
    near = [*range(40), 38, *range(40, 60)]
    text = "\n".join(
        ["arrival_s,prompt_tokens,output_tokens", *(f"{second}.5,{at + 1},1" for at, second in enumerate(near))]
    )
    arrivals = [row[0] for row in rows(open_trace(written(tmp_path, text + "\n")))]
    assert arrivals == sorted(float(second) for second in near)
    far = written(tmp_path, text + "\n3.5,1,1\n", "far")
    with pytest.raises(TraceError, match=r"far, line 63: it arrives 49 s before a line .* Sort the file"):
        measure(open_trace(far))


@pytest.mark.usefixtures("small_chunks")
def test_a_cut_gzip_says_after_which_line(tmp_path: Path) -> None:
    text = (
        HEADER
        + "\n"
        + "".join(f"2023-11-16 18:{at // 60:02}:{at % 60:02}.{at * 7919 % 9973},{at + 1},10\n" for at in range(2000))
    )
    path = written(tmp_path, gzip.compress(text.encode())[:-3000])
    with pytest.raises(
        TraceError, match=r"is cut short after line [\d,]+: its gzip data ends too early. Copy it again"
    ):
        measure(open_trace(path))


def test_a_million_rows_are_no_million_objects(tmp_path: Path) -> None:
    seconds = np.arange(200_000)
    path = written(
        tmp_path, "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{s},7,9\n" for s in seconds.tolist())
    )
    stream = open_trace(path)
    largest = max(len(chunk) for chunk in stream.chunks())
    assert largest <= 1 << 16
    assert measure(stream).requests == 200_000
    assert measure(stream).prompt_mean == 7.0


# --- Parquet -----------------------------------------------------------------------------------------------------------


def test_parquet_is_read_like_the_same_table_in_csv(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = {"ts": [0.25, 0.5, 0.75], "in_tokens": [1, 2, 3], "out_tokens": [4, 5, 6], "team": ["a", None, "b"]}
    parquet.write_table(arrow.table(table), tmp_path / "table")
    stream = open_trace(tmp_path / "table", columns=MAPPED)
    assert rows(stream) == [(0.0, 1, 4), (0.25, 2, 5), (0.5, 3, 6)]
    assert [stream.tenants[index] for index in stream.whole().tenant.tolist()] == ["a", "", "b"]
    times = np.array(["2025-01-01T20:00:00", "2025-01-01T20:00:01.5"], "datetime64[us]")
    parquet.write_table(arrow.table({**{k: v[:2] for k, v in table.items()}, "ts": times}), tmp_path / "times")
    stream = open_trace(tmp_path / "times", columns=MAPPED)
    assert rows(stream) == [(0.0, 1, 4), (1.5, 2, 5)]
    assert stream.clock_ns == 20 * 3600 * 10**9


@pytest.mark.parametrize(
    ("column", "values", "complaint"),
    [
        ("in_tokens", [1, None], "line 2: column in_tokens: None is not a whole number from 1"),
        ("in_tokens", [1, 0], "line 2: column in_tokens: 0 is not a whole number from 1"),
        ("out_tokens", [1.5, 2.0], "line 1: column out_tokens: 1.5 is not a whole number"),
        ("ts", [1.0, float("nan")], "line 2: column ts: nan is not a timestamp, or a number from 0 on"),
        ("ts", ["x", "y"], "column ts holds string. Expected a timestamp"),
    ],
)
def test_a_wrong_row_of_parquet_is_named(tmp_path: Path, column: str, values: list[object], complaint: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = {"ts": [0.0, 1.0], "in_tokens": [1, 1], "out_tokens": [1, 1], "team": ["a", "b"], column: values}
    parquet.write_table(arrow.table(table), tmp_path / "table")
    with pytest.raises(TraceError) as caught:
        open_trace(tmp_path / "table", columns=MAPPED)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(("key", "own"), TIMES)
def test_a_time_to_wait_or_stay_of_parquet_may_be_missing_but_not_below_zero(
    tmp_path: Path, key: str, own: str
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = {"arrival_s": [0, 1, 2], "prompt_tokens": [5, 5, 5], "output_tokens": [1, 1, 1]}
    for values, times_ns in (
        ([1.5, None, 3.0], [1_500_000_000, ENDLESS, 3_000_000_000]),
        ([1, None, 3], [1_000_000_000, ENDLESS, 3_000_000_000]),
    ):
        parquet.write_table(arrow.table({**table, own: values}), tmp_path / "right")
        assert getattr(open_trace(tmp_path / "right").whole(), f"{key}_ns").tolist() == times_ns
    for value in (-1.0, 0.0, float("nan")):
        parquet.write_table(arrow.table({**table, own: [1.0, value, 2.0]}), tmp_path / "wrong")
        with pytest.raises(TraceError, match=f"line 2: column {own}: {value} is not a number of seconds above 0"):
            open_trace(tmp_path / "wrong")
    parquet.write_table(arrow.table({**table, own: ["1", "2", "3"]}), tmp_path / "text")
    with pytest.raises(TraceError, match=f"column {own} holds string. Expected a number of seconds above 0"):
        open_trace(tmp_path / "text")


def test_parquet_without_pyarrow_says_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = written(tmp_path, b"PAR1 and more")
    with pytest.raises(MissingExtraError, match=r"pip install 'waterline-llm\[parquet\]'"):
        open_trace(path, columns=MAPPED)


def test_broken_parquet_is_said(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(TraceError, match="it cannot be read as Parquet"):
        open_trace(written(tmp_path, b"PAR1" + b"\x00" * 200), columns=MAPPED)


# --- Mooncake ----------------------------------------------------------------------------------------------------------


def mooncake(timestamp: float, prompt: int, output: int, hashes: list[int]) -> str:
    return json.dumps({"timestamp": timestamp, "input_length": prompt, "output_length": output, "hash_ids": hashes})


def test_a_prompt_finds_the_blocks_that_were_asked_before_it(tmp_path: Path) -> None:
    lines = [
        mooncake(0, 1500, 10, [1, 2, 3]),
        mooncake(500, 1600, 20, [1, 2, 4, 5]),  # begins like the first for two blocks
        mooncake(500.5, 1024, 30, [1, 2]),  # all of it was asked; its last token is computed all the same
        mooncake(900, 600, 40, [9, 2]),  # block 2 is known, but what is before it is not
    ]
    stream = open_trace(written(tmp_path, "\n".join(lines)))
    assert rows(stream) == [(0.0, 1500, 10), (0.5, 1600, 20), (0.5005, 1024, 30), (0.9, 600, 40)]
    assert stream.whole().cached_tokens.tolist() == [0, 1024, 1023, 0]
    assert stream.whole().cached_tokens.tolist() == [0, 1024, 1023, 0]  # read again, the cache begins empty
    assert stream.whole().blocks.values.tolist() == [1, 2, 3, 1, 2, 4, 5, 1, 2, 9, 2]
    assert stream.whole().blocks.counts.tolist() == [3, 4, 2, 2]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (mooncake(-1, 5, 5, []), 'line 2: \'{"timestamp": -1'),
        (mooncake(1, 0, 5, []), "`int` >= 1 - at `$.input_length`"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 5}', "line 2: "),
        ('{"timestamp": 1, "input_length": 5}', "missing required field `output_length`"),
        ('{"timestamp": 1, "input_len', "line 2: "),
    ],
)
def test_a_wrong_line_of_json_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = written(tmp_path, f"{mooncake(0, 5, 5, [])}\n{line}\n")
    with pytest.raises(TraceError, match=r"trace, line 2: ") as caught:
        open_trace(path)
    assert complaint in str(caught.value)


# --- ServeGen ----------------------------------------------------------------------------------------------------------


def archive(folder: Path, members: dict[str, str], name: str = "clients.tar.gz") -> Path:
    with tarfile.open(folder / name, "w:gz") as tar:
        for member, text in members.items():
            entry = tarfile.TarInfo(f"data/any/{member}")
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return folder / name


LENGTHS = json.dumps({"0": {"input_tokens": "{100: 0.5, 300: 0.5}", "output_tokens": "{7: 1.0}"}})
CLIENTS = {
    "chunk-3-trace.csv": "0,0.1,1.0,Gamma,1.0,10.0\n600,0,0,,0,0\n1200,0.2,3.0,Weibull,0.5,2.0\n",
    "chunk-3-dataset.json": LENGTHS,
    "chunk-10-trace.csv": "0,0.5,1.0,Gamma,0.02,10.0\n600,0,0,,0,0\n1200,0,0,,0,0\n",
    "chunk-10-dataset.json": LENGTHS,
}


def test_a_client_asks_as_often_as_was_recorded_in_every_window(tmp_path: Path) -> None:
    stream = open_trace(archive(tmp_path, CLIENTS), seed=5)
    chunk = stream.whole()
    windows = chunk.arrival_ns // (600 * 10**9)
    asked = {(stream.clients[c], w): 0 for c in range(2) for w in range(3)}
    for client, window in zip(chunk.client.tolist(), windows.tolist(), strict=True):
        asked[stream.clients[client], window] += 1
    assert asked == {  # nothing at all was recorded from 600 s on: as before
        ("client 3", 0): 60, ("client 3", 1): 60, ("client 3", 2): 120,
        ("client 10", 0): 300, ("client 10", 1): 300, ("client 10", 2): 0,
    }  # fmt: skip
    assert stream.notes[1] == "1 of 3 windows were not recorded: each asks what the last did"
    assert (np.diff(chunk.arrival_ns) >= 0).all()
    assert set(chunk.prompt_tokens.tolist()) == {100, 300}
    assert set(chunk.output_tokens.tolist()) == {7}


def test_a_seed_says_what_is_drawn(tmp_path: Path) -> None:
    path = archive(tmp_path, CLIENTS)
    first, again, other = (open_trace(path, seed=seed).whole() for seed in (1, 1, 2))
    assert first.arrival_ns.tolist() == again.arrival_ns.tolist() != other.arrival_ns.tolist()
    assert first.prompt_tokens.tolist() == again.prompt_tokens.tolist() != other.prompt_tokens.tolist()


def test_a_client_without_lengths_borrows_them_and_that_is_said(tmp_path: Path) -> None:
    stream = open_trace(archive(tmp_path, CLIENTS | {"chunk-10-dataset.json": "{}"}))
    chunk = stream.whole()
    assert set(chunk.prompt_tokens[chunk.client == 1].tolist()) == {100, 300}
    assert stream.notes[2] == (
        "1 of the clients, who ask 62.5% of the requests, come without lengths: theirs are drawn from the others'"
    )


def test_bursts_are_those_of_the_recorded_shape(tmp_path: Path) -> None:
    members = {
        "chunk-0-trace.csv": "0,20,1.0,Gamma,1.0,1.0\n", "chunk-0-dataset.json": LENGTHS,
        "chunk-1-trace.csv": "0,20,4.0,Gamma,0.0625,1.0\n", "chunk-1-dataset.json": LENGTHS,
    }  # fmt: skip
    chunk = open_trace(archive(tmp_path, members), seed=3).whole()
    variation = []
    for client in (0, 1):
        gaps = np.diff(chunk.arrival_ns[chunk.client == client])
        variation.append(gaps.std() / gaps.mean())
    assert variation[0] == pytest.approx(1.0, rel=0.05)
    assert variation[1] == pytest.approx(4.0, rel=0.15)  # of a heavy tail, 12,000 gaps


def test_prompts_of_pictures_count_each_picture(tmp_path: Path) -> None:
    lengths = {
        "text_tokens": "{10: 1.0}", "image_count": "{0: 0.5, 2: 0.5}", "image_tokens": "{1000: 1.0}", "output_tokens": "{5: 1.0}",
    }  # fmt: skip
    members = {"chunk-0-trace.csv": "0,1,1,Gamma,1,1\n", "chunk-0-dataset.json": json.dumps({"0": lengths})}
    chunk = open_trace(archive(tmp_path, members)).whole()
    assert set(chunk.prompt_tokens.tolist()) == {10, 2010}


def test_a_folder_of_clients_is_read_like_the_archive(tmp_path: Path) -> None:
    for name, text in CLIENTS.items():
        written(tmp_path, text, name)
    folder, packed = open_trace(tmp_path, seed=5), open_trace(archive(tmp_path, CLIENTS), seed=5)
    assert folder.whole().arrival_ns.tolist() == packed.whole().arrival_ns.tolist()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"chunk-3-dataset.json": "{}", "chunk-10-dataset.json": "{}"},
            "has the rates of its clients but not their lengths. Put their chunk-…-dataset.json beside",
        ),
        ({"chunk-3-trace.csv": "0,fast,1,Gamma,1,1\n"}, "line 1: '0,fast,1,Gamma,1,1' is not window start"),
        ({"chunk-3-trace.csv": "0,nan,1,Gamma,1,1\n"}, "windows must follow one another from 0 on"),
        ({"chunk-3-trace.csv": "0,1,1,Gamma,1,1\n"}, "has other windows than the others"),
        ({"chunk-3-dataset.json": '{"0": {"input_tokens": "{a: 1}"}}'}, "Expected {window start:"),
    ],
)
def test_a_wrong_archive_is_said(tmp_path: Path, changes: dict[str, str], complaint: str) -> None:
    with pytest.raises(TraceError) as caught:
        measure(open_trace(archive(tmp_path, CLIENTS | changes)))
    assert complaint in str(caught.value)


def test_a_cut_or_foreign_archive_is_said(tmp_path: Path) -> None:
    whole = archive(tmp_path, CLIENTS).read_bytes()
    with pytest.raises(TraceError, match="cut short"):
        open_trace(written(tmp_path, whole[:-40]))
    with pytest.raises(TraceError, match="holds no chunk-…-trace.csv"):
        open_trace(archive(tmp_path, {"readme.txt": "hi"}))


def test_what_is_no_table_has_no_columns(tmp_path: Path) -> None:
    for path in (written(tmp_path, mooncake(0, 5, 5, [])), archive(tmp_path, CLIENTS)):
        with pytest.raises(TraceError, match="it is no table, and needs no map of columns"):
            open_trace(path, columns=MAPPED)


@given(
    st.sampled_from(
        ["", f"{HEADER}\n", "arrival_s,prompt_tokens,output_tokens\n", '{"timestamp": 0,', "PAR1", "\x1f\x8b"]
    ),
    st.text(max_size=60) | st.from_regex(r"([0-9:.\- ]{0,30},[0-9.]{0,12},[0-9]{0,3}\n){0,4}", fullmatch=True),
)
def test_whatever_is_in_a_file_the_answer_is_a_stream_or_one_of_our_errors(
    tmp_path_factory: pytest.TempPathFactory, start: str, rest: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "anything"
    path.write_bytes(start.encode("latin-1") + rest.encode("utf-8", "surrogatepass"))
    try:
        got = measure(open_trace(path))
    except TraceError as error:
        assert str(path) in str(error)
        assert len(str(error)) < len(str(path)) + 300
    else:
        assert got.requests > 0


# --- The traces we were built on ---------------------------------------------------------------------------------------


def shared(shared_data: Path, name: str) -> Path:
    path = shared_data / "traces" / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside this checkout")
    return path


@pytest.mark.parametrize(
    ("name", "requests", "span_s", "prompt_mean", "output_mean"),
    [
        ("AzureLLMInferenceTrace_code.csv.gz", 8_819, 3_436, 2_048, 28),
        ("mooncake_conversation_trace.jsonl.gz", 12_031, 3_537, 12_035, 343),
        ("mooncake_synthetic_trace.jsonl.gz", 3_993, 1_022, 15_325, 149),
    ],
)
def test_the_published_traces_have_their_published_counts_spans_and_means(
    shared_data: Path, name: str, requests: int, span_s: int, prompt_mean: int, output_mean: int
) -> None:
    got = measure(open_trace(shared(shared_data, name)))
    assert got.requests == requests
    assert got.span_ns / 1e9 == pytest.approx(span_s, abs=0.5)
    assert got.prompt_mean == pytest.approx(prompt_mean, abs=0.5)
    assert got.output_mean == pytest.approx(output_mean, abs=0.5)


@pytest.mark.parametrize(("kind", "hit_fraction"), [("conversation", 0.366), ("synthetic", 0.640)])
def test_an_endless_cache_finds_the_share_of_blocks_that_was_published(
    shared_data: Path, kind: str, hit_fraction: float
) -> None:
    cache = EndlessCache()
    for _ in read_mooncake(Source(shared(shared_data, f"mooncake_{kind}_trace.jsonl.gz")), cache):
        pass
    assert cache.hit_fraction == pytest.approx(hit_fraction, abs=0.0005)


@pytest.mark.parametrize(
    ("name", "clients", "windows", "requests", "mean", "peak"),
    [
        ("reason_deepseek-r1", 73, 144, 1.38e6, 16.0, 42.5),
        ("language_m-large_rates", 162, 2016, 237e6, 196, 583),
        ("language_m-small", 43, 2016, 1.42e9, 1174, 3880),
        ("multimodal_mm-image", 35, 144, 0.82e6, 9.5, 13.3),
    ],
)
def test_the_services_of_servegen_have_their_clients_and_rates(
    shared_data: Path, name: str, clients: int, windows: int, requests: float, mean: float, peak: float
) -> None:
    model = read_servegen(Source(shared(shared_data, f"servegen/{name}.tar.gz")))
    rates = model.requests_per_s
    assert (len(model.clients), len(rates), model.window_s) == (clients, windows, 600)
    assert rates.sum() * 600 == pytest.approx(requests, rel=0.005)
    assert rates.mean() == pytest.approx(mean, rel=0.005)
    assert rates.max() == pytest.approx(peak, rel=0.005)


def test_a_day_of_a_service_is_drawn_as_often_and_as_long_as_it_was(shared_data: Path) -> None:
    path = shared(shared_data, "servegen/multimodal_mm-image.tar.gz")
    model, got = read_servegen(Source(path)), measure(open_trace(path, seed=1))
    assert got.requests == round(model.requests_per_s.sum() * 600)
    expected = sum(
        client.requests_per_s[window] * 600 * client.lengths_at(window * 600)["output_tokens"].mean
        for client in model.clients
        for window in range(144)
    )
    assert got.output_tokens == pytest.approx(expected, rel=0.005)
