"""What the server of forks imports first (`ranks.py`): from then on it ends with the tests' process, at any moment."""

from __future__ import annotations

import os

from penstock.distributed.launcher import end_with

STARTER = "PENSTOCK_TEST_STARTER"
"""Variable with the process id of the tests."""

if STARTER in os.environ:
    end_with(int(os.environ[STARTER]))
