"""A stream without the event that nobody asked for, however its bytes are cut."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from waterline.errors import EngineError
from waterline.service.usage import WithoutUsage

WORD = b'data: {"choices":[{"index":0,"delta":{"content":"the \\"usage\\" of it"}}]}'
TOLD = b'data: {"choices":[{"index":0,"delta":{}}],"usage":{"prompt_tokens":1}}'  # as some engines do: it stays
EMPTY = b'data: {"choices":[],"usage":null}'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}'
DONE = b"data: [DONE]"


@given(st.sampled_from([b"\n", b"\r\n"]), st.lists(st.integers(0, 12), max_size=6))
def test_only_the_event_with_nothing_but_the_usage_is_taken_out(end: bytes, cuts: list[int]) -> None:
    def stream_of(*events: bytes) -> bytes:
        return b"".join(event + 2 * end for event in events)

    lines = stream_of(WORD, TOLD, EMPTY, USAGE, DONE).splitlines(keepends=True)
    edit, said = WithoutUsage(), b""
    places = [0, *sorted(min(cut, len(lines)) for cut in cuts), len(lines)]
    for begin, until in pairwise(places):  # chunks end where a line does
        said += edit.chunk(b"".join(lines[begin:until]))
    assert said + edit.last(b"") == stream_of(WORD, TOLD, EMPTY, DONE)


def test_a_stream_that_breaks_off_within_an_event_ends_it_first() -> None:
    edit = WithoutUsage()
    edit.chunk(WORD + b"\n")
    assert edit.broken(EngineError("gone")).startswith(b'\ndata: {"error":{"message":"gone"')
    edit.chunk(b"\n")
    assert edit.broken(EngineError("gone")).startswith(b"data: ")


def test_whole_answers_pass() -> None:
    assert WithoutUsage().whole(b'{"usage":{}}') == b'{"usage":{}}'


def test_of_an_event_that_is_taken_out_no_line_stays() -> None:
    stream = WORD + b"\n\n" + USAGE + b"\ndata: \nid: 7\n\n" + DONE + b"\n\n"
    assert WithoutUsage().chunk(stream) == WORD + b"\n\n" + DONE + b"\n\n"
