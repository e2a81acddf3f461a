"""Streams taken apart: what passes is whole events, whatever stands between them."""

from hypothesis import given
from hypothesis import strategies as st

from waterline.service.events import Events

WORD = b'data: {"choices":[{"index":0,"delta":{"content":"word"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


@given(st.binary(min_size=1, max_size=3))
def test_what_stands_between_the_last_event_and_the_end_does_not_pass_as_a_part_of_either(junk: bytes) -> None:
    events = Events(lambda _said: "")
    passed = events.feed(WORD + USAGE + junk + DONE)
    passed += b"" if events.done or events.problem else events.feed(b"")
    assert passed.endswith(b"\n\n")
    assert passed.startswith(WORD)
    assert all(line.startswith(b"data: {") for line in passed.split(b"\n\n")[:2])


def test_a_stream_ends_with_the_mark_of_its_end() -> None:
    events = Events(lambda _said: "")
    assert events.feed(WORD + USAGE + DONE) == WORD + USAGE
    assert events.done
    assert [bool(event.usage) for event in events.latest] == [False, True]
