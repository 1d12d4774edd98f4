"""What the tests share: folders of tiny pipelines, made once per run, and a machine without a hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before any library reads them: no test may reach the network, or leave a model's code in the user's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="penstock-test-modules-")

import pytest
import torch

from penstock.distributed.launcher import end_with
from tests import zoo
from tests.turns import IS_THOROUGH, not_their_turn

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
if "PYTEST_XDIST_WORKER" in os.environ:
    end_with(os.getppid())  # a test that hangs would go on without the run that it is part of
torch.set_num_threads(1)  # the tests are small; several threads only wait for each other on a busy machine


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what is marked `thorough` to `make thorough`, and what needs a GPU to machines that have one."""
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in _left_out_marks())]
    here = Path(__file__).parent
    rest = [item for item in items if item not in left_out and isinstance(item, pytest.Function)]
    left_out += not_their_turn((str(item.path.relative_to(here)), item.originalname, item) for item in rest)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def _left_out_marks() -> list[str]:
    """The marks whose tests do not run here; `PENSTOCK_GPU_TESTS=cpu` has those for GPUs run on the CPU."""
    num_devices = 2 if "PENSTOCK_GPU_TESTS" in os.environ else torch.cuda.device_count()
    marks = {"thorough": IS_THOROUGH, "gpu": num_devices > 0, "gpus": num_devices > 1}
    return [name for name, is_wanted in marks.items() if not is_wanted]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once why a test failed: a run that is ended from outside never comes to its summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} ({report.when}):\n{report.longreprtext}\n")


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved zoo pipelines by name; read-only for tests: copy one to change it."""
    root = tmp_path_factory.mktemp("zoo")
    return lambda name: zoo.folder(name, root)
