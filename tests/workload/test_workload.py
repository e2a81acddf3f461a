"""Reading and writing traces: exact times, and one clear message for everything that can be wrong."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.errors import TraceError
from waterline.workload import Request, Trace, read_trace, write_trace
from waterline.workload.columns import HEADER

GOOD_ROW = "2023-11-16 18:17:03.9799600,4808,10"


def trace_file(folder: Path, *rows: str, header: str = HEADER, name: str = "trace.csv", end: str = "\n") -> Path:
    path = folder / name
    data = end.join([header, *rows, ""]).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def arrivals_s(path: Path) -> list[float]:
    return [request.arrival_s for request in read_trace(path).requests]


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_trace_is_read_relative_to_its_first_row(tmp_path: Path, name: str, end: str) -> None:
    path = trace_file(tmp_path, GOOD_ROW, "2023-11-16 18:17:04.0319601,3180,8", name=name, end=end)
    trace = read_trace(path)
    assert trace.name == name
    assert trace.requests == [
        Request(arrival_s=0.0, prompt_tokens=4808, output_tokens=10),
        Request(arrival_s=0.0520001, prompt_tokens=3180, output_tokens=8),
    ]
    assert trace.duration_s == 0.0520001


def test_times_cross_midnight_months_and_leap_days_exactly(tmp_path: Path) -> None:
    rows = ("2024-02-28 23:59:59.9999999,1,1", "2024-02-29 00:00:00,1,1", "2024-03-01T00:00:00.5,1,1")
    assert arrivals_s(trace_file(tmp_path, *rows)) == [0.0, 1e-7, 86400.5000001]


def test_offsets_from_utc_are_taken_off(tmp_path: Path) -> None:
    rows = ("2024-05-10 00:00:00.009930+00:00,1,1", "2024-05-10 02:00:01.009930+02:00,1,1", "2024-05-10 00:00:02Z,1,1")
    assert arrivals_s(trace_file(tmp_path, *rows)) == [0.0, 1.0, 1.99007]


def test_rows_out_of_order_are_sorted_and_ties_keep_their_order(tmp_path: Path) -> None:
    rows = (
        "2024-01-01 00:00:02,20,1",
        "2024-01-01 00:00:01,11,1",
        "2024-01-01 00:00:02,21,1",
        "2024-01-01 00:00:01,12,1",
    )
    requests = read_trace(trace_file(tmp_path, *rows)).requests
    assert [(request.arrival_s, request.prompt_tokens) for request in requests] == [
        (0.0, 11),
        (0.0, 12),
        (1.0, 20),
        (1.0, 21),
    ]


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEADER}\n\n{GOOD_ROW}\n\n".encode())
    assert arrivals_s(path) == [0.0]


@given(
    st.lists(
        st.tuples(st.integers(0, 40 * 86400 * 10**7), st.integers(1, 10**6), st.integers(1, 10**6)),
        min_size=1,
        max_size=30,
    )
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int]]
) -> None:
    rows.sort()
    first = rows[0][0]
    requests = [
        Request(arrival_s=(ticks - first) / 10**7, prompt_tokens=prompt, output_tokens=output)
        for ticks, prompt, output in rows
    ]
    path = tmp_path_factory.getbasetemp() / "round.csv"
    write_trace(Trace(name="any", requests=requests), path)
    assert read_trace(path).requests == requests


def test_a_packed_trace_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    trace = read_trace(trace_file(tmp_path, GOOD_ROW))
    write_trace(trace, tmp_path / "a.csv.gz")
    write_trace(trace, tmp_path / "b.csv.gz")
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()
    assert read_trace(tmp_path / "a.csv.gz").requests == trace.requests


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot write the trace .*nowhere/t.csv: No such file"):
        write_trace(Trace(name="any", requests=[]), tmp_path / "nowhere" / "t.csv")
    trace_file(tmp_path)
    with pytest.raises(TraceError, match="Not a directory"):
        write_trace(Trace(name="any", requests=[]), tmp_path / "trace.csv" / "t.csv")


def test_a_trace_is_sorted_and_every_request_asks_for_something() -> None:
    def trace(*arrivals_s: float, output_tokens: int = 5) -> Trace:
        return Trace(
            name="mine",
            requests=[Request(arrival_s=one, prompt_tokens=9, output_tokens=output_tokens) for one in arrivals_s],
        )

    assert trace(0.0, 0.0, 3.0).duration_s == 3.0
    for arrivals_s in ([1.0, 0.5], [-1.0], [0.0, float("nan")], [float("inf")]):
        with pytest.raises(TraceError, match=rf"request {len(arrivals_s)} of the trace 'mine' arrives at .*Sort"):
            trace(*arrivals_s)
    with pytest.raises(TraceError, match=r"request 1 of the trace 'mine' has 9 \+ 0 tokens"):
        trace(0.0, output_tokens=0)


def test_a_trace_is_written_through_links_and_to_a_path_that_is_text(tmp_path: Path) -> None:
    trace = Trace(name="any", requests=[Request(arrival_s=0.0, prompt_tokens=1, output_tokens=2)])
    (tmp_path / "link.csv").symlink_to("real.csv")
    write_trace(trace, str(tmp_path / "link.csv"))
    assert (tmp_path / "link.csv").is_symlink()
    assert read_trace(str(tmp_path / "real.csv")).requests == trace.requests


def test_an_arrival_beyond_the_calendar_cannot_be_written(tmp_path: Path) -> None:
    late = Trace(name="late", requests=[Request(arrival_s=1e12, prompt_tokens=1, output_tokens=1)])
    with pytest.raises(TraceError, match=r"cannot write the trace .*t\.csv"):
        write_trace(late, tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("2023-11-16 18:17,5,5", "column TIMESTAMP: '2023-11-16 18:17' is not a time like 2023-11-16 18:17:03.9799600"),
        ("2023-02-30 00:00:00,5,5", "column TIMESTAMP: '2023-02-30 00:00:00' is not a time"),
        ("2023-02-01 24:00:00,5,5", "column TIMESTAMP: '2023-02-01 24:00:00' is not a time"),
        (",5,5", "column TIMESTAMP: '' is not a time"),
        ("1700158623,5,5", "column TIMESTAMP: '1700158623' is not a time"),
        ("2023-11-16 18:17:03,0,5", "column ContextTokens: '0' is not a whole number from 1 to 999999999"),
        ("2023-11-16 18:17:03,-7,5", "column ContextTokens: '-7' is not a whole number"),
        ("2023-11-16 18:17:03,5,0", "column GeneratedTokens: '0' is not a whole number"),
        ("2023-11-16 18:17:03,5,1.5", "column GeneratedTokens: '1.5' is not a whole number"),
        ("2023-11-16 18:17:03,5,many", "column GeneratedTokens: 'many' is not a whole number"),
        ("2023-11-16 18:17:03,5,٣", "column GeneratedTokens: '٣' is not a whole number"),
        ("2023-11-16 18:17:03,5,9999999999", "column GeneratedTokens: '9999999999' is not a whole number"),
        ("2023-11-16 18:17:03,5", f"'2023-11-16 18:17:03,5' has 2 values. Expected {HEADER}"),
        ("2023-11-16 18:17:03,5,5,5", "has 4 values"),
    ],
)
def test_a_bad_row_is_named_with_its_line_column_value_and_what_is_expected(
    tmp_path: Path, row: str, complaint: str
) -> None:
    path = trace_file(tmp_path, GOOD_ROW, row)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}, line 3")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("data", "name", "complaint"),
    [
        (b"", "t.csv", "is empty. Expected a first line TIMESTAMP,ContextTokens,GeneratedTokens"),
        (gzip.compress(b"", mtime=0), "t.csv.gz", "is empty"),
        (HEADER.encode(), "t.csv", "holds no requests, only the header"),
        (b"time,in,out\n", "t.csv", "line 1: the header is 'time,in,out'. Expected TIMESTAMP,"),
        (f"{GOOD_ROW}\n".encode(), "t.csv", "line 1: the header is"),
        (HEADER.encode(), "t.csv.gz", "holds no requests, only the header"),
        (gzip.compress(f"{HEADER}\n{GOOD_ROW}\n".encode(), mtime=0)[:-9], "t.csv.gz", "is cut short"),
        (gzip.compress(b"x" * 100, mtime=0)[:20] + b"\xff" * 40, "t.csv.gz", "cannot be unpacked"),
        (gzip.compress(HEADER.encode(), mtime=0), "t.csv", "holds no requests, only the header"),
        (b"\xff\xfe\x00\x01" * 5000, "t.csv", "is not text"),
        (b"\x00" * 5000, "t.csv", "line 1: the header is"),
        (f"{HEADER}\n".encode() + b"\x00\x01,2" * 5000, "t.csv", "line 2: "),
    ],
)
def test_a_file_that_is_no_trace_gets_one_clear_message(tmp_path: Path, data: bytes, name: str, complaint: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert complaint in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 250


def test_a_missing_file_and_a_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read the trace .*none.csv: No such file or directory"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(TraceError, match="Is a directory"):
        read_trace(tmp_path)


def test_the_azure_trace_is_read_whole_and_exactly(shared_data: Path) -> None:
    path = shared_data / "traces" / "AzureLLMInferenceTrace_code.csv.gz"
    if not path.is_file():
        pytest.skip("the Azure code trace is not beside this checkout")
    requests = read_trace(path).requests
    assert len(requests) == 8819
    assert requests[0] == Request(arrival_s=0.0, prompt_tokens=4808, output_tokens=10)
    # 18:17:03.9799600 to 19:14:19.9280160 is 57 min 15.9480560 s
    assert requests[-1] == Request(arrival_s=3435.948056, prompt_tokens=549, output_tokens=173)
    assert sum(request.prompt_tokens for request in requests) / 8819 == pytest.approx(2048, abs=0.5)
