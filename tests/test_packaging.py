"""What is installed is what was tested: constraints, requirements, and the lines of the README."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import penstock
from penstock.models.folder import BUILT_IN
from tests import processes

ROOT = Path(__file__).resolve().parents[1]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        return tomllib.load(stream)["project"]


def name_of(requirement: str) -> str:
    found = re.match(r"[\w-]+", requirement)
    assert found
    return found[0].lower()


def test_torch_is_held_to_one_version_without_a_build() -> None:
    assert "torch>=2.9" in project()["dependencies"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", pins()["torch"])  # "+cpu" would shut out GPU machines
    assert "torchvision" not in pins()


def test_every_requirement_is_pinned_and_installed_as_pinned() -> None:
    wanted = [*project()["dependencies"], *project()["optional-dependencies"]["dev"]]
    wanted += project()["optional-dependencies"]["plot"]
    for name in map(name_of, wanted):
        assert importlib.metadata.version(name).split("+")[0] == pins()[name], name


def test_one_line_installs_all_of_it_under_the_constraints() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["-c constraints.txt", "-e .[dev,plot]"]


def test_readme_shows_what_make_does() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for line in re.findall(r"^\t(\S*\$\((?:BIN|PYTHON)\).*)$", makefile, re.MULTILINE):
        shown = line.replace("$(BIN)", ".venv/bin").replace("$(PYTHON)", "python3").replace(" --quiet", "")
        if "ruff" not in shown and "mypy" not in shown:
            assert shown in readme


def test_version_is_the_same_everywhere() -> None:
    assert project()["version"] == penstock.__version__ == importlib.metadata.version("penstock")


@pytest.mark.parametrize("model", BUILT_IN)
def test_built_in_model_is_small(model: str) -> None:
    files = [file for file in (ROOT / "src" / "penstock" / model).rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) < 10_000_000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    processes.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("model", BUILT_IN)
def test_wheel_carries_the_model(built: Path, model: str) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {str(file.relative_to(ROOT / "src")) for file in (ROOT / "src" / "penstock" / model).rglob("*.*")}
    assert inside and inside <= names
    assert "penstock/py.typed" in names


def test_source_distribution_is_complete(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"constraints.txt", "requirements.txt", "Makefile", "tests/conftest.py"} <= names
    assert {"demo/train.py", "demo/train_video.py", "demo/video/denoiser.py"} <= names
    assert not any(name.startswith(("demo/work", ".venv")) for name in names)
