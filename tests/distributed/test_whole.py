"""Methods that need a denoiser whole are refused while it is split, and come back."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from penstock.distributed.whole import refuse_while_split
from penstock.errors import ConfigError
from penstock.undo import Undo


class Denoiser(nn.Module):
    def add_adapter(self, config: object) -> str:
        return f"added {config}"


def test_a_method_is_refused_until_the_undo() -> None:
    denoiser, undo, mended = Denoiser(), Undo(), list[str]()
    refuse_while_split(denoiser, "in 2 parts", undo, lambda: mended.append("so"))
    with pytest.raises(ConfigError, match=r"Denoiser\.add_adapter: the denoiser is split in 2 parts.*before it is"):
        denoiser.add_adapter("one")
    assert mended == ["so"]
    assert not hasattr(denoiser, "load_lora_adapter")
    undo.run()
    assert denoiser.add_adapter("one") == "added one" and "add_adapter" not in vars(denoiser)


def test_a_method_that_somebody_put_there_survives() -> None:
    denoiser: Any = Denoiser()
    mine = denoiser.add_adapter = denoiser.add_adapter
    outer, inner = Undo(), Undo()
    refuse_while_split(denoiser, "once", outer)
    refuse_while_split(denoiser, "twice", inner)
    inner.run()
    with pytest.raises(ConfigError, match="split once"):
        denoiser.add_adapter("one")
    outer.run()
    assert vars(denoiser)["add_adapter"] is mine
