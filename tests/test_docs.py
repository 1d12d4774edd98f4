"""Every example in the documentation runs as it is printed."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.cli.app import app
from penstock.server import process
from tests import processes
from tests.server.served import Served, served
from tests.turns import by_turns

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"FluxPipeline": "demo", "LTXPipeline": "demo-video"}
"""Which built-in model's card shows the pipeline by itself, run in the model's folder."""

CARDS = [ROOT / "src" / "penstock" / model / "README.md" for model in MODELS.values()]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *CARDS, *sorted((ROOT / "docs").rglob("*.md"))]
ADDRESS = "http://127.0.0.1:8000"
BLOCK = re.compile(r"```(python|sh)\n(.*?)```", re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, code) for page in PAGES for kind, code in BLOCK.findall(page.read_text("utf-8")) if kind == language
    ]


def commands() -> list[tuple[str, str]]:
    lines = [(page, line) for page, code in blocks("sh") for line in code.splitlines()]
    found = [(page, line.removeprefix(".venv/bin/")) for page, line in lines if "penstock " in line.split("#")[0]]
    return [one for one in found if not starts_ranks(one[1])] + by_turns(
        filter(lambda one: starts_ranks(one[1]), found), 3
    )


def starts_ranks(line: str) -> bool:
    """Whether a command starts processes; those take turns, for each takes as long as many tests."""
    return any(word.endswith(("-degree", "-parallel-size", "-hsdp")) for word in line.split("#")[0].split())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """What `penstock serve demo` starts, on another port."""
    with served("demo", tmp_path_factory.mktemp("docs")) as server:
        yield server


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: value if value.endswith(".md") else "")
def test_python(
    page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    shown = [model for name, model in MODELS.items() if f"{name}.from_pretrained" in code]
    monkeypatch.chdir(ROOT / "src" / "penstock" / shown[0] if shown else tmp_path)
    if ADDRESS in code:
        code = code.replace(ADDRESS, request.getfixturevalue("server").url)
    exec(compile(code, page, "exec"), {"__name__": "example"})


@pytest.mark.parametrize(("page", "line"), commands())
def test_command(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(line, comments=True)
    assert name == "penstock"
    if arguments[0] == "serve":  # which would not end
        monkeypatch.setattr(process, "run", lambda *settings, **options: 0)
    if starts_ranks(line):
        processes.run([sys.executable, "-m", "penstock", *arguments], check=True, timeout=300)
        return
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
