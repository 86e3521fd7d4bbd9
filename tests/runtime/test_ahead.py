"""Items made ahead: the same ones in the same order, errors in their place, no thread left behind."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toto.runtime.ahead import ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


@given(st.lists(st.integers(), max_size=30), st.integers(1, 5))
def test_the_same_items_in_the_same_order(items, depth):
    assert list(ahead(iter(items), depth)) == items
    assert not threads()


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_the_depth_waits(depth):
    made = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    with contextlib.closing(ahead(items(), depth)) as found:
        assert next(found) == 0
        time.sleep(0.1)
        assert len(made) == 1 + depth
        assert next(found) == 1
        time.sleep(0.1)
        assert len(made) == 2 + depth
    assert not threads()


def test_an_error_comes_after_what_was_made_before_it():
    def items():
        yield 1
        yield 2
        raise ValueError("of the third")

    found = ahead(items(), 8)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(ValueError, match="of the third"):
        next(found)
    assert not threads()


def test_closing_stops_the_thread_and_closes_the_source():
    closed = []

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.append(threading.current_thread().name)

    found = ahead(items(), 2)
    next(found)
    found.close()
    assert closed == ["ahead"]
    assert not threads()
