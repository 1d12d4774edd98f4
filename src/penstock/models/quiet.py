"""diffusers and transformers load without a word for a while: penstock draws one bar and raises its own errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, the libraries draw no loading bars and log errors only; afterwards they are as they were."""
    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    drawing = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in libraries:
        library.set_verbosity(max(library.get_verbosity(), logging.ERROR))
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        for library in drawing:
            library.enable_progress_bar()
