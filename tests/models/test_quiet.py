"""The libraries are silent inside and as before outside."""

from __future__ import annotations

import logging

import pytest
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from penstock.models.quiet import quiet_libraries


@pytest.mark.parametrize("library", [diffusers_logging, transformers_logging])
@pytest.mark.parametrize("drawing", [True, False])
def test_switches_are_put_back(library: object, drawing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_tqdm_active", drawing)
    before = library.get_verbosity()
    with pytest.raises(KeyError), quiet_libraries():
        assert not library.is_progress_bar_enabled()
        assert library.get_verbosity() >= logging.ERROR
        raise KeyError
    assert library.is_progress_bar_enabled() == drawing
    assert library.get_verbosity() == before
