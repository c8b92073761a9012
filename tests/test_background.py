"""Work on the host while a device computes: what is made, in which order, and by which thread."""

import threading

import pytest

from recyc_jax.commands.background import one_ahead


def test_the_next_is_made_while_one_is_used():
    """When an item is used, the one after it is being made, and none beyond it is begun."""
    begun = {number: threading.Event() for number in range(4)}

    def make(number):
        begun[number].set()
        return number * number, threading.current_thread() is threading.main_thread()

    for number, (square, is_main) in one_ahead(range(4), make):
        assert (square, is_main) == (number * number, False)
        if number < 3:
            assert begun[number + 1].wait(timeout=20)
        assert not any(begun[later].is_set() for later in range(number + 2, 4))
    assert list(one_ahead([], make)) == []


def test_an_exception_comes_in_its_items_place():
    def make(number):
        if number == 2:
            raise ValueError("no sample 2")
        return number

    pairs = one_ahead(range(4), make)
    assert [next(pairs)[0], next(pairs)[0]] == [0, 1]
    with pytest.raises(ValueError, match="no sample 2"):
        next(pairs)


def test_nothing_is_made_after_the_caller_stops():
    """The thread ends with what it is making."""
    begun, may_end = threading.Event(), threading.Event()

    def make(number):
        if number == 1:
            begun.set()
            assert may_end.wait(timeout=20)
        return number

    pairs = one_ahead(range(9), make)
    assert next(pairs) == (0, 0)
    assert begun.wait(timeout=20)
    (thread,) = (one for one in threading.enumerate() if one.name.startswith("one-ahead"))
    pairs.close()
    assert thread.is_alive()
    may_end.set()
    thread.join(timeout=20)
    assert not thread.is_alive()
