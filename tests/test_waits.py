from __future__ import annotations

import threading

import pytest

from penstock.waits import current_wait, failed_ranks, noted


def test_a_wait_is_known_while_it_lasts() -> None:
    own = threading.get_ident()
    assert current_wait(own) is None
    with noted((0, 2)):
        first = current_wait(own)
        assert first is not None and first.ranks == (0, 2)
        with noted((0, 1)):
            inner = current_wait(own)
            assert inner is not None and inner.ranks == (0, 1) and inner.number != first.number
        assert current_wait(own) == first
    assert current_wait(own) is None
    with noted((0, 2)):
        second = current_wait(own)
    assert second is not None and second.number not in (first.number, inner.number)


def test_who_waits_for_a_thread_waits_for_its_ranks() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def exchange() -> None:
        with noted((0, 3)):
            begun.set()
            may_end.wait(20)

    thread = threading.Thread(target=exchange)
    thread.start()
    assert begun.wait(20)
    assert current_wait(threading.get_ident()) is None  # it computes, whatever the other thread does
    with noted():
        wait = current_wait(threading.get_ident())
        assert wait is not None and wait.ranks == (0, 3)
    may_end.set()
    thread.join()


def test_errors_keep_the_ranks_of_their_wait() -> None:
    with pytest.raises(RuntimeError) as caught, noted(), noted((0, 1)):
        raise RuntimeError("closed by peer")
    assert failed_ranks(caught.value) == (0, 1)
    wrapper = ValueError("wrapped")
    wrapper.__cause__ = caught.value
    assert failed_ranks(wrapper) == (0, 1)
    assert failed_ranks(RuntimeError("elsewhere")) == ()
    assert current_wait(threading.get_ident()) is None
