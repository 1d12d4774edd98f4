from __future__ import annotations

import pytest

from penstock.undo import Undo


def test_steps_run_once_the_last_first_and_an_interrupted_one_runs_again() -> None:
    ran: list[str] = []
    errors = [KeyboardInterrupt()]

    def interrupted() -> None:
        ran.append("second")
        if errors:
            raise errors.pop()

    undo = Undo()
    undo.add(lambda: ran.append("first"))
    undo.add(interrupted)
    undo.add(lambda: ran.append("third"))
    with pytest.raises(KeyboardInterrupt):
        undo.run()
    assert ran == ["third", "second"]
    undo.run()
    undo.run()
    assert ran == ["third", "second", "second", "first"]


def test_what_raises_half_way_is_taken_back() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt), Undo() as undo:
        undo.add(lambda: done.append("first"))
        undo.add(lambda: done.append("second"))
        raise KeyboardInterrupt
    assert done == ["second", "first"]
    with Undo() as undo:
        undo.add(lambda: done.append("kept"))
    assert len(done) == 2
