"""Events in a stream of bytes."""

import pytest

from rayserve_sarathi.bench.sse import EventParser

STREAM = b"data: one\n\n: a comment\n\ndata:two\r\ndata: lines\r\n\r\nid: 7\nevent: x\ndata:  three\r\rdata: [DONE]\n\n"
EVENTS = [b"one", b"two\nlines", b" three", b"[DONE]"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(STREAM)])
def test_events_are_the_same_however_the_bytes_are_cut(size: int):
    parser = EventParser()
    events = [event for start in range(0, len(STREAM), size) for event in parser.feed(STREAM[start : start + size])]

    assert events == EVENTS


def test_an_event_is_there_with_its_last_byte_and_not_before():
    parser = EventParser()

    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == [b"a"]
    assert parser.feed(b"data: b") == []
