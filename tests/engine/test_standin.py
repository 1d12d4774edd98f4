"""Stand-ins leave no trace, whether or not the object had an attribute of its own."""

from __future__ import annotations

import pytest
from torch import nn

from penstock.engine.standin import stand_in


class Owner:
    def answer(self) -> int:
        return 1


@pytest.mark.parametrize("has_own", [False, True])
def test_before_inside_after(has_own: bool) -> None:
    owner = Owner()
    if has_own:
        owner.answer = lambda: 2
    before = dict(vars(owner))
    with pytest.raises(KeyError), stand_in(owner, "answer", lambda: 3):
        assert owner.answer() == 3
        raise KeyError
    assert vars(owner) == before
    assert owner.answer() == (2 if has_own else 1)


def test_method_of_a_module() -> None:
    module = nn.Linear(1, 1)
    with stand_in(module, "forward", lambda x: "stood in"):
        assert module(None) == "stood in"
    assert "forward" not in vars(module)
